"""Problems, generated (tfds, array_record, no TensorFlow) or read from published files, and their tokenised batches (grain)."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from ml_collections import ConfigDict

from diffpo_jax import storage
from diffpo_jax.tasks import Task, find_task
from diffpo_jax.tasks.base import Problem
from diffpo_jax.tokenizer import CharTokenizer, HuggingFaceTokenizer

Tokenizer = CharTokenizer | HuggingFaceTokenizer

SPLITS = ("train", "test")
FIELDS = ("prompt", "response", "answer")
GENERATOR_VERSION = "1.2.0"  # raise it when a task generates different problems from the same settings
ROWS_IN_MEMORY = 500_000  # up to this many rows are tokenised once and held; more are tokenised batch by batch


class DiffpoProblems(tfds.core.GeneratorBasedBuilder):
    """The problems of one task; the builder config's name holds a fingerprint of everything they depend on."""

    VERSION = tfds.core.Version(GENERATOR_VERSION)

    def __init__(self, *, config: ConfigDict, data_dir: str):
        self._run_config = config
        settings = _generation_settings(config)
        name = tfds.core.BuilderConfig(name=_data_set_name(config), version=self.VERSION, description=settings)
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
        generate = _task(self._run_config).generate
        assert generate is not None, "prepare reads the others"
        problems = generate(self._run_config[task.name], split, count, task.seed)
        for index, problem in enumerate(problems):
            yield index, {field: getattr(problem, field) for field in FIELDS}


def _task(config: ConfigDict) -> Task:
    return find_task(config.task.name, config.data.d1_faithful)


def _generation_settings(config: ConfigDict) -> str:
    """JSON of every setting that generated problems depend on."""
    task = config.task
    sizes = {"name": task.name, "seed": task.seed, "train_size": task.train_size, "test_size": task.test_size}
    return json.dumps({"version": GENERATOR_VERSION, "task": sizes, task.name: config[task.name].to_dict()}, sort_keys=True)


class Source(Protocol):
    """Random access to problems {"prompt", "response", "answer"}."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, str]: ...


def _data_set_name(config: ConfigDict) -> str:
    digest = hashlib.blake2b(_generation_settings(config).encode(), digest_size=8).hexdigest()
    return f"{config.task.name}-{digest}"


@dataclass(frozen=True)
class ProblemSource:
    """Random access to a split: len(source), source[i] -> {"prompt", "response", "answer"} as text."""

    records: Sequence[dict]  # values are UTF-8 bytes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, str]:
        record = self.records[index]
        return {field: record[field].decode() for field in FIELDS}


def prepare(config: ConfigDict, folder: str) -> dict[str, Source]:
    """The splits of config.task: read from the published files in data.path, or generated under `folder` unless it holds them already.

    Of a task that is read, the first task.train_size and task.test_size problems are taken, fewer where the files hold fewer. Generated
    problems have a folder per fingerprint of the settings, so that changed settings never meet old problems; it is filled under another
    name and then renamed, so an interrupted run leaves nothing that could be read. One that was damaged since is kept under another name,
    which is printed, and made again.

    Args:
      config: the run's configuration; read are `task`, `data` and the section named as the task.
      folder: where generated data sets are kept.

    Returns:
      {"train": source, "test": source}; source[i] is {"prompt", "response", "answer"} as text.

    Raises:
      FileNotFoundError: data.path is no folder, or a file is not in it.
      ValueError: unknown task, settings that admit fewer problems than asked for, or a file that does not hold what it must.
    """
    task, sizes = _task(config), {"train": config.task.train_size, "test": config.task.test_size}
    if min(sizes.values()) < 1:
        raise ValueError(f"task.train_size={sizes['train']}, task.test_size={sizes['test']}: need at least one problem in each")
    if task.read is not None:
        return {split: _read(task.read, config, split, sizes[split]) for split in SPLITS}
    return _generated(config, os.path.abspath(folder))


def _generated(config: ConfigDict, folder: str) -> dict[str, Source]:
    made = os.path.join(folder, DiffpoProblems.name, _data_set_name(config), GENERATOR_VERSION)
    if problem := storage.damage(made):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            print(f"the problems in {made} are damaged ({problem}): kept as {storage.set_aside(made)} and made again", flush=True)
    with _quiet_tfds():
        builder = DiffpoProblems(config=config, data_dir=folder)
        if not builder.is_prepared():
            try:
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
            except OSError:  # another process may have renamed its copy into place first
                builder = DiffpoProblems(config=config, data_dir=folder)
                if not builder.is_prepared():
                    raise
            storage.seal(made)
    return {split: ProblemSource(builder.as_data_source(split=split)) for split in SPLITS}


def _read(read: Callable[[str, str, bool], Iterator[Problem]], config: ConfigDict, split: str, limit: int) -> list[dict[str, str]]:
    """The first `limit` problems of a published split."""
    path = config.data.path
    problems = read(path, split, config.data.d1_faithful)
    if not os.path.isdir(path):
        next(problems, None)  # its `find_file` raises, with the names of the files it needs
        raise FileNotFoundError(
            f"data.path={path!r} is not a folder: set --config.data.path to the folder of {config.task.name}'s published files"
        )
    rows = [{field: getattr(problem, field) for field in FIELDS} for problem in itertools.islice(problems, limit)]
    if not rows:
        raise ValueError(f"{path} holds no {split} problem of {config.task.name}")
    return rows


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
    """The tokenizer of config.task; raises ValueError for a task of any text, which needs that of a published model."""
    alphabet = _task(config).alphabet
    if not alphabet:
        raise ValueError(f"{config.task.name} holds any text: set --config.model.pretrained to a published model, whose tokenizer is used")
    return CharTokenizer(alphabet)


def drop_long(source: Source, tokenizer: Tokenizer, config: ConfigDict) -> tuple[Source, int]:
    """A split of a task that is read, without the prompts of more than task.prompt_length tokens.

    Nothing is dropped of generated tasks, where such a prompt is an error, nor with data.d1_faithful, where it is cut (see `tokenise`).

    Args:
      source: random access to problems.
      tokenizer: see diffpo_jax.tokenizer.
      config: the run's configuration; read are task.name, task.prompt_length and data.d1_faithful.

    Returns:
      The split that the indices of batches count in, and how many prompts it lacks.

    Raises:
      ValueError: no prompt is left.
    """
    if _task(config).read is None or config.data.d1_faithful:
        return source, 0
    lengths = [len(tokenizer.encode_prompt(source[i]["prompt"])) for i in range(len(source))]
    kept = [source[i] for i, length in enumerate(lengths) if length <= config.task.prompt_length]
    if not kept:
        raise ValueError(
            f"task.prompt_length={config.task.prompt_length} is less than every prompt has: the shortest has {min(lengths)} tokens"
        )
    return kept, len(source) - len(kept)


def tokenise(
    source: Source,
    rows: Sequence[int] | np.ndarray,
    tokenizer: Tokenizer,
    config: ConfigDict,
    *,
    prefill: str = "",
    demonstrations: bool = False,
) -> dict[str, np.ndarray]:
    """Rows of a split as arrays.

    Args:
      source: random access to problems.
      rows: B indices into it.
      tokenizer: see diffpo_jax.tokenizer.
      config: the run's configuration; read are task.prompt_length, task.response_length (L) and data.d1_faithful.
      prefill: text that every response starts with; its tokens come after task.prompt_length tokens of the prompt.
      demonstrations: whether the rows' responses are wanted too.

    Returns:
      prompt [B, P] int32 left-padded with PAD, prompt_mask [B, P] bool True at tokens of the prompt and of the prefill, index [B] int32,
      with P = task.prompt_length + tokens of the prefill; with `demonstrations` response [B, L] int32 filled up with EOS.

    Raises:
      ValueError: a prompt or response is longer than its length, or has a character that the tokenizer does not know; or a response is
        wanted that the problem does not have. With data.d1_faithful the first tokens of a prompt that is too long are left out instead,
        as the released d1 code does: those that open the chat template.
    """
    width = config.task.prompt_length + len(tokenizer.encode(prefill))
    prompt = np.full((len(rows), width), tokenizer.pad_id, np.int32)
    prompt_mask = np.zeros(prompt.shape, bool)
    for i, row in enumerate(rows):
        text = source[int(row)]["prompt"]
        ids = tokenizer.encode_prompt(text, prefill)
        if config.data.d1_faithful:
            ids = ids[-width:]
        _check_length("prompt", row, text, len(ids) - (width - config.task.prompt_length), config)
        prompt[i, width - len(ids) :], prompt_mask[i, width - len(ids) :] = ids, True
    table = {"prompt": prompt, "prompt_mask": prompt_mask, "index": np.asarray(rows, np.int32)}
    return table | ({"response": _responses(source, rows, tokenizer, config)} if demonstrations else {})


def _responses(source: Source, rows: Sequence[int] | np.ndarray, tokenizer: Tokenizer, config: ConfigDict) -> np.ndarray:
    response = np.full((len(rows), config.task.response_length), tokenizer.eos_id, np.int32)
    for i, row in enumerate(rows):
        text = source[int(row)]["response"]
        if not text:
            raise ValueError(
                f"row {row} of {config.task.name} has no demonstration, which supervised training needs: start from a trained model"
            )
        ids = tokenizer.encode(text)
        _check_length("response", row, text, len(ids), config)
        response[i, : len(ids)] = ids
    return response


def _check_length(field: str, row: int, text: str, tokens: int, config: ConfigDict) -> None:
    length = config.task[f"{field}_length"]
    if tokens > length:
        raise ValueError(f"{field} of row {row} has {tokens} tokens, task.{field}_length is {length}; raise it: {text!r}")


def train_batches(
    source: Source,
    tokenizer: Tokenizer,
    config: ConfigDict,
    *,
    batch_size: int,
    seed: int,
    group_size: int = 1,
    mine: np.ndarray | None = None,
    demonstrations: bool = False,
) -> grain.DatasetIterator:
    """An endless iterator of training batches, every row once an epoch, in another order each epoch.

    The order depends on `seed` and the number of rows only, not on how many hosts share a batch. `get_state()` and `set_state(state)`
    resume it exactly.

    Args:
      source: random access to problems.
      tokenizer: see diffpo_jax.tokenizer.
      config: the run's configuration, see `tokenise`.
      batch_size: B; a batch may span two epochs.
      seed: of the order.
      group_size: G, how often each problem is repeated, one after the other.
      mine: which of the B * G rows of a batch are wanted, those of this host (see `sharding.host_rows`); None = all.
      demonstrations: whether the rows' responses are wanted too, as supervised training does and RL does not.

    Returns:
      Iterator of the dict of arrays that `tokenise` describes.

    Raises:
      ValueError: see `tokenise`; for a split of up to ROWS_IN_MEMORY rows at once, otherwise with the batch that holds the row.
    """
    arrays = functools.partial(tokenise, source, tokenizer=tokenizer, config=config, demonstrations=demonstrations)
    if len(source) <= ROWS_IN_MEMORY:
        table = arrays(range(len(source)))

        def batch(rows: np.ndarray) -> dict[str, np.ndarray]:
            return {name: array[rows] for name, array in table.items()}
    else:
        batch = arrays

    mine = slice(None) if mine is None else mine
    rows = grain.MapDataset.range(len(source)).shuffle(seed=seed % 2**32).repeat().batch(batch_size)
    rows = rows.map(lambda problems: np.repeat(problems, group_size)[mine])
    return iter(rows.map(batch).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def eval_batches(
    source: Source,
    tokenizer: Tokenizer,
    config: ConfigDict,
    batch_size: int,
    *,
    mine: np.ndarray | None = None,
    prefill: str = "",
    demonstrations: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """The whole split once, in order, in batches of one shape: the last is filled up by repeating rows.

    Args:
      source: random access to problems.
      tokenizer: see diffpo_jax.tokenizer.
      config: the run's configuration, see `tokenise`.
      batch_size: B.
      mine: which rows of a batch are wanted, those of this host (see `sharding.host_rows`); None = all.
      prefill: text that every response starts with, see `tokenise`.
      demonstrations: whether the rows' responses are wanted too.

    Yields:
      What `tokenise` returns, and valid [B] bool, False at the repeated rows.
    """
    for start in range(0, len(source), batch_size):
        rows = np.arange(start, start + batch_size)[slice(None) if mine is None else mine]
        batch = tokenise(source, rows % len(source), tokenizer, config, prefill=prefill, demonstrations=demonstrations)
        yield batch | {"valid": rows < len(source)}
