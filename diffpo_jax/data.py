"""Task problems on disk (tfds, array_record, no TensorFlow) and the tokenised batches made of them (grain)."""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from ml_collections import ConfigDict

from diffpo_jax.tasks import TASKS
from diffpo_jax.tokenizer import CharTokenizer

SPLITS = ("train", "test")
FIELDS = ("prompt", "response", "answer")
GENERATOR_VERSION = "1.1.0"  # raise it when a task generates different problems from the same settings
ROWS_IN_MEMORY = 500_000  # up to this many rows are tokenised once and held; more are tokenised batch by batch


class DiffpoProblems(tfds.core.GeneratorBasedBuilder):
    """The problems of one task; the builder config's name holds a fingerprint of everything they depend on."""

    VERSION = tfds.core.Version(GENERATOR_VERSION)

    def __init__(self, *, config: ConfigDict, data_dir: str):
        self._run_config = config
        settings = _generation_settings(config)
        digest = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
        name = tfds.core.BuilderConfig(name=f"{config.task.name}-{digest}", version=self.VERSION, description=settings)
        super().__init__(config=name, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        settings = tfds.core.MetadataDict(settings=_generation_settings(self._run_config))
        features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in FIELDS})
        return tfds.core.DatasetInfo(builder=self, features=features, metadata=settings, disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict:
        sizes = {"train": self._run_config.task.train_size, "test": self._run_config.task.test_size}
        return {split: self._generate_examples(split, sizes[split]) for split in SPLITS}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, str]]]:
        task = self._run_config.task
        problems = TASKS[task.name].generate(self._run_config[task.name], split, count, task.seed)
        for index, problem in enumerate(problems):
            yield index, {field: getattr(problem, field) for field in FIELDS}


def _generation_settings(config: ConfigDict) -> str:
    """JSON of every setting that the problems depend on; raises ValueError for an unknown task."""
    task = config.task
    if task.name not in TASKS:
        raise ValueError(f"unknown task.name {task.name!r}: use one of {', '.join(sorted(TASKS))}")
    if task.train_size < 1 or task.test_size < 1:
        raise ValueError(f"task.train_size={task.train_size}, task.test_size={task.test_size}: need at least one problem in each")
    sizes = {"name": task.name, "seed": task.seed, "train_size": task.train_size, "test_size": task.test_size}
    return json.dumps({"version": GENERATOR_VERSION, "task": sizes, task.name: config[task.name].to_dict()}, sort_keys=True)


@dataclass(frozen=True)
class ProblemSource:
    """Random access to a split: len(source), source[i] -> {"prompt", "response", "answer"} as text."""

    records: Sequence[dict]  # values are UTF-8 bytes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, str]:
        record = self.records[index]
        return {field: record[field].decode() for field in FIELDS}


def prepare(config: ConfigDict, folder: str) -> dict[str, ProblemSource]:
    """The splits of config.task, generated under `folder` unless it holds them already.

    A folder per fingerprint of the settings, so that changed settings never meet old problems; it is filled under another name and then
    renamed, so an interrupted run leaves nothing that could be read.

    Args:
      config: the run's configuration; read are `task` and the section named as the task.
      folder: where data sets are kept.

    Returns:
      {"train": source, "test": source}.

    Raises:
      ValueError: unknown task, or settings that admit fewer problems than asked for.
    """
    folder = os.path.abspath(folder)
    with _quiet_tfds():
        builder = DiffpoProblems(config=config, data_dir=folder)
        try:
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        except OSError:  # another process may have renamed its copy into place first
            builder = DiffpoProblems(config=config, data_dir=folder)
            if not builder.is_prepared():
                raise
    return {split: ProblemSource(builder.as_data_source(split=split)) for split in SPLITS}


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Without what tfds prints and shows about a data set it does not know; errors still show."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def make_tokenizer(config: ConfigDict) -> CharTokenizer:
    """The tokenizer of config.task."""
    return CharTokenizer(TASKS[config.task.name].alphabet)


def tokenise(source: Sequence[dict], rows: Sequence[int], tokenizer: CharTokenizer, config: ConfigDict) -> dict[str, np.ndarray]:
    """Rows of a split as arrays.

    Args:
      source: random access to problems.
      rows: B indices into it.
      tokenizer: see diffpo_jax.tokenizer.
      config: the run's configuration; read are task.prompt_length (P) and task.response_length (L).

    Returns:
      prompt [B, P] int32 left-padded with PAD, prompt_mask [B, P] bool True at tokens of the prompt, response [B, L] int32 filled up
      with EOS, index [B] int32.

    Raises:
      ValueError: a prompt or response is longer than its length, or has a character that the tokenizer does not know.
    """
    lengths = {"prompt": config.task.prompt_length, "response": config.task.response_length}
    prompt = np.full((len(rows), lengths["prompt"]), tokenizer.pad_id, np.int32)
    prompt_mask = np.zeros(prompt.shape, bool)
    response = np.full((len(rows), lengths["response"]), tokenizer.eos_id, np.int32)
    for i, row in enumerate(rows):
        problem = source[int(row)]
        ids = {field: tokenizer.encode(problem[field]) for field in lengths}
        for field, length in lengths.items():
            if len(ids[field]) > length:
                raise ValueError(
                    f"{field} of row {row} has {len(ids[field])} tokens, task.{field}_length is {length}; raise it: {problem[field]!r}"
                )
        start = lengths["prompt"] - len(ids["prompt"])
        prompt[i, start:], prompt_mask[i, start:] = ids["prompt"], True
        response[i, : len(ids["response"])] = ids["response"]
    return {"prompt": prompt, "prompt_mask": prompt_mask, "response": response, "index": np.asarray(rows, np.int32)}


def sft_batches(
    source: Sequence[dict], tokenizer: CharTokenizer, config: ConfigDict, *, batch_size: int, seed: int
) -> grain.DatasetIterator:
    """An endless iterator of training batches, every row once an epoch, in another order each epoch.

    The order depends on `seed` and the number of rows only. `get_state()` and `set_state(state)` resume it exactly.

    Args:
      source: random access to problems.
      tokenizer: see diffpo_jax.tokenizer.
      config: the run's configuration, see `tokenise`.
      batch_size: B; a batch may span two epochs.
      seed: of the order.

    Returns:
      Iterator of the dict of arrays that `tokenise` describes.

    Raises:
      ValueError: see `tokenise`; for a split of up to ROWS_IN_MEMORY rows at once, otherwise with the batch that holds the row.
    """
    if len(source) <= ROWS_IN_MEMORY:
        table = tokenise(source, range(len(source)), tokenizer, config)

        def batch(rows: np.ndarray) -> dict[str, np.ndarray]:
            return {name: array[rows] for name, array in table.items()}
    else:

        def batch(rows: np.ndarray) -> dict[str, np.ndarray]:
            return tokenise(source, rows, tokenizer, config)

    rows = grain.MapDataset.range(len(source)).shuffle(seed=seed % 2**32).repeat().batch(batch_size)
    return iter(rows.map(batch).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def eval_batches(source: Sequence[dict], tokenizer: CharTokenizer, config: ConfigDict, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """The whole split once, in order, in batches of one shape: the last is filled up by repeating rows.

    Args:
      source: random access to problems.
      tokenizer: see diffpo_jax.tokenizer.
      config: the run's configuration, see `tokenise`.
      batch_size: B.

    Yields:
      What `tokenise` returns, and valid [B] bool, False at the repeated rows.
    """
    for start in range(0, len(source), batch_size):
        rows = np.arange(start, start + batch_size)
        yield tokenise(source, rows % len(source), tokenizer, config) | {"valid": rows < len(source)}
