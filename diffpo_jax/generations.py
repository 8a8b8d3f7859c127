"""The evaluation protocol of the field: one file of generations a setting of the sampler, a line a test problem, and the table of them.

Zero-shot, temperature 0, response lengths 128 / 256 / 512, blocks of 32, two tokens a step, unless `config.eval` says otherwise. A file is
JSON lines: a header that says what it was made with, then one object a problem with

  index, prompt: of the test problem
  generation: text up to EOS, the prefill before it; this is what the verifier reads
  extracted: the answer the task finds in it (the whole generation, where the task extracts none)
  verdict: 1 right, 0 wrong
  components: {name: value} of the training reward
  published_score: a published figure beside the verdict; absent where the task has none
  nfe: denoiser calls
  tokens: generated tokens, up to and including the first EOS
  threshold: inference threshold, null for the rules that take none
  seconds: its share of the batch's wall time (the first batch compiles)

Files can be continued after an interruption, and scored again without a model.
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from diffpo_jax import data, sharding, storage
from diffpo_jax.build import Parts
from diffpo_jax.checkpoint import write_json
from diffpo_jax.metrics import progress
from diffpo_jax.report import point
from diffpo_jax.rollout import rollout_params, sample, sampler_options
from diffpo_jax.sampling.denoise import response_mask
from diffpo_jax.sampling.unmasking import RULES, THRESHOLD_RULES
from diffpo_jax.structs import Prompts
from diffpo_jax.tasks import Task

LINE_FIELDS = {
    "index": int, "prompt": str, "generation": str, "verdict": int, "components": dict, "nfe": int, "tokens": int, "seconds": float | int,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of the sampler."""

    length: int  # response tokens
    rule: str  # a key of RULES
    threshold: float | None  # None: the rule takes none, or the threshold network chooses it
    steps: int  # denoising steps of the top-k rules for the whole response; 0 for the others
    learned: bool  # the threshold network chooses the threshold
    block_length: int
    temperature: float

    @property
    def name(self) -> str:
        """What its file is called."""
        dial = "learned" if self.learned else f"S{self.steps}" if self.threshold is None else f"g{self.threshold:.12g}"
        return f"L{self.length}-{self.rule}-{dial}"


SETTING_FIELDS = tuple(field.name for field in dataclasses.fields(Setting))


def settings(config: Any, learned: bool) -> list[Setting]:
    """The settings that `config.eval` asks for: at each length the rule, at each threshold if it takes one.

    Args:
      config: the run's configuration.
      learned: whether there is a threshold network. Its own choice is then a setting too, of a rule that takes a threshold; not where
        eval.rule is another rule than sampler.rule, whose thresholds it has learned and whose unit they have.

    Raises:
      ValueError: for an unknown rule, sizes that do not divide, no lengths, or eval.repeats above 1; all problems in one message.
    """
    c = config.eval
    problems = [] if c.rule in RULES else [f"eval.rule = {c.rule!r} is unknown; known: {', '.join(RULES)}"]
    if not list(c.lengths):
        problems.append("eval.lengths is empty")
    if c.repeats != 1:
        problems.append(f"eval.repeats = {c.repeats}: with eval.lengths a problem gets one generation; set it to 1")
    if c.tokens_per_step < 1 or c.block_length < 0:
        problems.append(f"eval.tokens_per_step = {c.tokens_per_step} and eval.block_length = {c.block_length} must be at least 1 and 0")
    else:
        problems += [problem for length in c.lengths for problem in _misfits(length, c)]
    if problems:
        raise ValueError("the evaluation cannot run:\n  " + "\n  ".join(problems))

    def setting(length, threshold=None, steps=0, learned=False):
        return Setting(length, c.rule, threshold, steps, learned, c.block_length or length, float(c.temperature))

    if c.rule not in THRESHOLD_RULES:
        return [setting(length, steps=length // c.tokens_per_step) for length in dict.fromkeys(c.lengths)]
    chosen = [{"threshold": float(threshold)} for threshold in dict.fromkeys(c.thresholds)]
    if learned and c.rule == config.sampler.rule:
        chosen.append({"learned": True})
    return [setting(length, **choice) for length in dict.fromkeys(c.lengths) for choice in chosen]


def _misfits(length: int, c: Any) -> Iterator[str]:
    """What is wrong with a response length."""
    block = c.block_length or length
    if length < 1:
        yield f"eval.lengths: {length} must be at least 1"
    elif length % block:
        yield f"eval.lengths: {length} is not a multiple of eval.block_length = {c.block_length}"
    elif c.rule not in THRESHOLD_RULES and block % c.tokens_per_step:
        yield f"eval.lengths: blocks of {block} tokens are not a multiple of eval.tokens_per_step = {c.tokens_per_step}"


def run(
    parts: Parts, params: Any, folder: str | os.PathLike, checkpoint: str, threshold_params: Any = None,
    after_batch: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Generates for the first eval.limit test problems at every setting; goes on where an earlier run in `folder` stopped.

    Writes `folder`/NAME.jsonl a setting (see the module) and `folder`/table.json. A problem's random key depends on its index only, so
    that neither eval.batch_size nor an interruption changes a generation. Another eval.limit goes on with the same files.

    Args:
      parts: of the run.
      params: the policy's.
      folder: where the files are; made if absent.
      checkpoint: names what `params` are, say "step-100"; a file made with another one is refused.
      threshold_params: the threshold network's, None if there is none.
      after_batch: called whenever a batch has been written.

    Returns:
      A `summarise` a setting.

    Raises:
      ValueError: as `settings`; or a file in `folder` was made with something else or is damaged, found before anything is generated.
    """
    source, table_rows, unfinished = parts.sources["test"], [], []
    count = min(parts.config.eval.limit or len(source), len(source))
    for setting in settings(parts.config, threshold_params is not None):
        path, header = Path(folder) / f"{setting.name}.jsonl", make_header(parts, setting, checkpoint)
        done = sharding.first_host(functools.partial(_lines_there, path, header, source))
        unfinished.append((setting, path, header, {line["index"]: line for line in json.loads(done)}))
    params = rollout_params(parts, params)
    for setting, path, header, done in unfinished:
        rows = [index for index in range(count) if index not in done]
        written = path if jax.process_index() == 0 else os.devnull
        with open(written, "a", encoding="utf-8") as file, progress(setting.name, count, start=count - len(rows)) as advance:
            for lines in generate(parts, params, setting, rows, threshold_params):
                file.writelines(f"{json.dumps(line)}\n" for line in lines)
                file.flush()
                done |= {line["index"]: line for line in lines}
                verdicts, nfe = zip(*((line["verdict"], line["nfe"]) for line in done.values()), strict=True)
                advance(len(lines), accuracy=float(np.mean(verdicts)), nfe=float(np.mean(nfe)))
                after_batch()
        table_rows.append(summarise(header, [line for index, line in done.items() if index < count]))
    write_json(Path(folder) / "table.json", {"task": parts.task.name, "checkpoint": checkpoint, "settings": table_rows})
    return table_rows


def _lines_there(path: Path, header: Mapping[str, Any], source: data.Source) -> bytes:
    """JSON of the lines that a file of generations has already."""
    return json.dumps([*open_file(path, header, source).values()]).encode()


def generate(
    parts: Parts, params: Any, setting: Setting, rows: Sequence[int], threshold_params: Any = None
) -> Iterator[list[dict[str, Any]]]:
    """Generates for these test problems; yields the lines (see the module) of a batch of up to eval.batch_size at a time."""
    config, source = parts.config, parts.sources["test"]
    options = sampler_options(parts) | {name: getattr(setting, name) for name in ("length", "block_length", "rule", "steps", "temperature")}
    if setting.learned:
        options |= {"threshold_fn": parts.head.mode, "threshold_params": threshold_params}
    elif setting.threshold is not None:
        options |= {"threshold": setting.threshold}
    chosen, size = _Rows(source, rows), config.eval.batch_size
    mine = sharding.host_rows(parts.mesh, size)
    for batch in data.eval_batches(chosen, parts.tokenizer, config, size, mine=mine, prefill=config.eval.prefill):
        start = time.monotonic()
        index = np.asarray(rows, np.int32)[batch["index"]]
        own = (Prompts(batch["prompt"], batch["prompt_mask"]), index, batch["valid"])
        prompts, row_ids, valid = sharding.put_rows(parts.mesh, own, size)
        trajectory = sample(parts, params, prompts, parts.key("eval"), row_ids=row_ids, **options)
        counted = response_mask(trajectory.tokens, parts.tokenizer.eos_id).sum(axis=1)
        gamma = trajectory.nfe if trajectory.draw is None else trajectory.draw.gamma
        index, valid, tokens, nfe, counted, gamma = sharding.fetch((row_ids, valid, trajectory.tokens, trajectory.nfe, counted, gamma))
        gamma = gamma.tolist() if setting.learned else [setting.threshold] * len(index)
        valid = np.flatnonzero(valid)
        seconds = (time.monotonic() - start) / len(valid)
        lines = []
        for row in valid:
            problem = source[int(index[row])]
            text = config.eval.prefill + parts.tokenizer.decode(tokens[row])
            line = {"index": int(index[row]), "prompt": problem["prompt"], "generation": text} | judge(parts.task, problem["answer"], text)
            line |= {"nfe": int(nfe[row]), "tokens": int(counted[row]), "threshold": gamma[row], "seconds": seconds}
            lines.append(line)
        yield lines


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Some rows of a source, as a source."""

    source: data.Source
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self.source[self.rows[index]]


def judge(task: Task, answer: str, generation: str) -> dict[str, Any]:
    """What the task says of a generation: extracted, verdict, components and, where the task has one, published_score."""
    judged = {
        "extracted": task.extract(generation) if task.extract else generation,
        "verdict": int(task.reward(answer, generation)),
        "components": task.components(answer, generation),
    }
    return judged | ({"published_score": task.published_score(answer, generation)} if task.published_score else {})


def summarise(header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A setting's row of the table.

    Args:
      header: of the setting's file, see `make_header`.
      lines: of its problems.

    Returns:
      setting (its name), length, rule, steps, learned, block_length, temperature, problems (their number), accuracy, interval (95%,
      bootstrap over problems), nfe, tokens_per_call, seconds (all of them), components ({name: mean}), threshold and published_score
      (means, or None).
    """

    def mean(name: str) -> float | None:
        values = [line[name] for line in lines if line.get(name) is not None]
        return float(np.mean(values)) if values else None

    verdict, nfe, tokens, seconds = (np.array([line[name] for line in lines], float) for name in ("verdict", "nfe", "tokens", "seconds"))
    names = dict.fromkeys(name for line in lines for name in line["components"])
    components = {name: float(np.mean([line["components"].get(name, 0.0) for line in lines])) for name in names}
    row = {name: header[name] for name in ("setting", *SETTING_FIELDS)} | {"problems": len(lines)}
    row |= point(verdict, nfe, tokens, seconds.sum())
    return row | {"components": components, "threshold": mean("threshold"), "published_score": mean("published_score")}


def table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Rows of `summarise` as something rich prints."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("setting")
    components = dict.fromkeys(name for row in rows for name in row["components"])
    columns = ["problems", "accuracy (95%)", "NFE", "tokens/call", "seconds"]
    optional = [name for name in ("threshold", "published_score") if any(row[name] is not None for row in rows)]
    for name in (*columns, *optional, *components):
        shown.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        low, high = row["interval"]
        cells = [f"{row['problems']}", f"{100 * row['accuracy']:.1f}% ({100 * low:.1f}-{100 * high:.1f})", f"{row['nfe']:.2f}"]
        cells += [f"{row['tokens_per_call']:.2f}", f"{row['seconds']:.1f}"]
        values = [row[name] for name in optional] + [row["components"].get(name) for name in components]
        shown.add_row(row["setting"], *cells, *("" if value is None else f"{value:.3g}" for value in values))
    return shown


# --- files ---


def make_header(parts: Parts, setting: Setting, checkpoint: str) -> dict[str, Any]:
    """The first line of a file: all that its generations and verdicts depend on, apart from the problems, which are in its lines."""
    config = parts.config
    return {
        "task": parts.task.name,
        "problems": len(parts.sources["test"]),  # of the split
        "checkpoint": checkpoint,
        "setting": setting.name,
        **dataclasses.asdict(setting),
        "prefill": config.eval.prefill,
        "eos_early_stop": bool(config.sampler.eos_early_stop),
        "cache": config.sampler.cache,
        "refresh": int(config.sampler.refresh),
        "seed": int(config.seed),
        "d1_faithful": bool(config.data.d1_faithful),
    }


def open_file(path: Path, header: Mapping[str, Any], source: data.Source) -> dict[int, dict[str, Any]]:
    """Makes a file that holds `header` alone, or reads the one that is there and drops a last line that was cut short.

    Returns:
      Its lines by problem index.

    Raises:
      ValueError: the file was made with something else (each field that differs), for other problems, or is damaged (see `read_file`).
    """
    advice = f"move {path} away, or evaluate into another folder"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(path) as file:
            file.write(f"{json.dumps(header)}\n")
        return {}
    found, lines, whole = read_file(path, cut_short=True)
    names = [name for name in {**found, **header} if found.get(name) != header.get(name)]
    if names:
        differing = "".join(f"\n  {name}: {found.get(name)} -> {header.get(name)}" for name in names)
        raise ValueError(f"{path} was made with something else (existing -> requested):{differing}\n{advice}")
    for index, line in lines.items():
        if not index < len(source) or source[index]["prompt"] != line["prompt"]:
            raise ValueError(f"{path}: its problem {index} is not that of the test split: {line['prompt']!r}; {advice}")
    os.truncate(path, whole)
    return lines


def read_file(path: Path, cut_short: bool = False) -> tuple[dict[str, Any], dict[int, dict[str, Any]], int]:
    """Reads a file of generations.

    Args:
      path: of the file.
      cut_short: leave out a last line without its end, as an interrupted run leaves one; otherwise that is an error too.

    Returns:
      (header, lines by problem index, bytes that hold them).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is damaged; the message names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of generations {path}: --mode=eval with eval.lengths writes them")
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    header, lines = None, {}
    for number, text in enumerate(content[: whole if cut_short else None].splitlines(), start=1):
        if header is None:
            header = _parse(text, f"{path}:{number}", {"task": str, "setting": str, **dict.fromkeys(SETTING_FIELDS, object)})
            continue
        line = _parse(text, f"{path}:{number}", LINE_FIELDS)
        if line["index"] in lines:
            raise ValueError(f"{path}:{number}: problem {line['index']} occurs a second time")
        lines[line["index"]] = line
    if header is None:
        raise ValueError(f"{path}:1: not a file of generations: its first line should say what it was made with")
    return header, lines, whole


def _parse(text: bytes, where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A line's object; raises ValueError unless it has these fields, of these types."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); was the line cut short?") from None
    if not isinstance(line, dict):
        raise ValueError(f"{where}: not a line of a file of generations: it is no JSON object")
    missing = [name for name in fields if name not in line]
    if missing:
        raise ValueError(f"{where}: not a line of a file of generations: {', '.join(missing)} missing")
    for name, kind in fields.items():
        if not isinstance(line[name], kind) or (name == "index" and line[name] < 0):
            raise ValueError(f"{where}: field {name!r} cannot be {line[name]!r}")
    return line


def score_file(task: Task, source: data.Source, path: str | os.PathLike) -> dict[str, Any]:
    """Judges the generations in a file again, with the task's present verifier; the file is left as it is.

    Args:
      task: of the generations.
      source: the test problems, with prompt and answer. A problem is found by its index, or by its prompt where the prompts at that
        index differ (the generations are of a split from which over-long prompts were dropped).
      path: of the file.

    Returns:
      What `summarise` returns, and {"to_right": n, "to_wrong": n}, the verdicts that are no longer those in the file.

    Raises:
      FileNotFoundError, ValueError: as `read_file`; or the file is of another task, holds no line, or one of a problem not in `source`.
    """
    path = Path(path)
    header, lines, _ = read_file(path)
    if header["task"] != task.name:
        raise ValueError(f"{path} holds generations for the task {header['task']!r}, not {task.name!r}: set task.name to it")
    if not lines:
        raise ValueError(f"{path} holds no generations")
    by_prompt = {source[index]["prompt"]: index for index in reversed(range(len(source)))}
    judged = []
    for line in lines.values():
        index, prompt = line["index"], line["prompt"]
        if not (index < len(source) and source[index]["prompt"] == prompt):
            index = by_prompt.get(prompt)
        if index is None:
            raise ValueError(f"{path}: its problem {line['index']} is not in the test split of {task.name}: {prompt!r}")
        judged.append(line | {"published_score": None} | judge(task, source[index]["answer"], line["generation"]))
    changes = [new["verdict"] - old["verdict"] for new, old in zip(judged, lines.values(), strict=True)]
    return summarise(header, judged) | {"to_right": changes.count(1), "to_wrong": changes.count(-1)}
