"""What a run says while it goes on: metrics.jsonl, TensorBoard events, Weights & Biases, a progress bar; a trace of its programs."""

import contextlib
import importlib.util
import json
import math
import numbers
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from diffpo_jax import storage
from diffpo_jax.checkpoint import to_json

PHASES = ("sft", "rl", "eval")  # that lines are of
FLUSH_SECONDS = 5.0  # TensorBoard's files are brought up to date no more often than this


class Writer:
    """Appends to `workdir/metrics.jsonl` and to TensorBoard events in `workdir/tensorboard/PHASE`; only the first host writes.

    With a `wandb_project` lines also go to a run of Weights & Biases, as PHASE/NAME against PHASE/step, with `config`, a ConfigDict. Its id
    is kept in `workdir`/wandb.id, so that the same workdir goes on with the same run; what a resumed run does again is there twice. Raises
    ImportError where that package is wanted and absent.

    A line is {"phase": ..., "step": ..., name: number, ...}; NaN and the infinities are the strings "NaN", "Infinity", "-Infinity". A file
    that `truncate` brought back to a checkpoint goes on as an uninterrupted run's would, apart from names that begin with "time/".
    """

    def __init__(self, workdir: str | Path, wandb_project: str = "", config: Any = None):
        self._folder = Path(workdir)
        self._path = self._folder / "metrics.jsonl"
        self._events: dict[str, _Events] = {}
        self._file: TextIO | None = None
        self._wandb = None
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._rewrite(lambda _: True)  # without the half line that a killed process left
            self._wandb = _open_wandb(self._folder, wandb_project, config) if wandb_project else None

    def write(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line, on the disk when this returns: a later checkpoint says that it is there. TensorBoard gets the finite numbers.

        Raises:
          storage.FullDiskError: there is no space for it.
        """
        if self._file is None:
            return
        with storage.explained(self._folder, "metrics.jsonl and TensorBoard"):
            self._file.write(json.dumps(to_json({"phase": phase, "step": int(step), **values}), allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            scalars = {k: v for k, v in values.items() if isinstance(v, numbers.Real) or getattr(v, "ndim", None) == 0}
            self._phase_events(phase).add({k: float(v) for k, v in scalars.items() if math.isfinite(v)}, int(step))
        if self._wandb is not None:
            self._wandb.log({f"{phase}/{name}": value for name, value in {"step": int(step), **values}.items()})

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Hands a run's summary (see `report.write_summary`) to Weights & Biases, where that is used."""
        if self._wandb is not None:
            self._wandb.summary.update(to_json(summary))

    def truncate(self, phase: str, step: int) -> None:
        """Forgets what `phase` wrote after `step` (-1: all of it), for a run that goes on from there."""
        if self._file is None:
            return
        self._rewrite(lambda line: line["phase"] != phase or line["step"] <= step)
        if phase in self._events:
            self._events.pop(phase).close()
        if (self._folder / "tensorboard" / phase).exists():
            self._phase_events(phase, purge_step=step + 1)

    def close(self) -> None:
        """Closes the files; writing afterwards does nothing."""
        with contextlib.ExitStack() as stack:  # all of them, though one may fail
            for file in [self._file, *self._events.values()]:
                if file is not None:
                    stack.callback(file.close)
            if self._wandb is not None:
                stack.callback(self._wandb.finish)
            self._file, self._events, self._wandb = None, {}, None

    def _phase_events(self, phase: str, purge_step: int | None = None) -> "_Events":
        if phase not in self._events:
            self._events[phase] = _Events(self._folder / "tensorboard" / phase, purge_step)
        return self._events[phase]

    def _rewrite(self, keep: Callable[[dict], bool]) -> None:
        """Replaces the file, at once, by its whole lines that `keep` wants, and opens it to append."""
        if self._file is not None:
            self._file.close()
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        kept = [line for line in text.splitlines() if (parsed := _parse(line)) is not None and keep(parsed)]
        with storage.replacing(self._path) as file:
            file.write("".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")


def _open_wandb(folder: Path, project: str, config: Any) -> Any:
    """The run of Weights & Biases that belongs to a workdir, gone on with where there is one."""
    try:
        import wandb  # here, because few use it
    except ImportError:
        raise ImportError('wandb.project is set, but the package is not installed: pip install -e ".[wandb]"') from None
    kept = folder / "wandb.id"
    if not kept.exists():
        kept.write_text(secrets.token_hex(8), encoding="utf-8")
    shown = {} if config is None else to_json(config)
    run = wandb.init(project=project, id=kept.read_text(encoding="utf-8"), resume="allow", dir=folder, name=folder.name, config=shown)
    for phase in PHASES:
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    return run


class _Events:
    """TensorBoard's file of one phase, written in the caller's thread: a SummaryWriter's own dies on a full disk, then its queue blocks."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer, self._flushed = EventsWriter(str(folder / "events"), f".{os.getpid()}"), -math.inf
        if purge_step is not None:  # events from there on in older files are void
            self._writer.write_event(Event(step=purge_step, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Mapping[str, float], step: int) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class StepLog:
    """The lines of RL steps. A step's metrics are fetched once the next rollout is dispatched, so that devices never wait for a host.

    time/rollout is the seconds from the end of the updates before (where nothing was under way, from `begin`) until the tokens are on the
    host; time/update from there until the updates are done, with likelihoods and grading.
    """

    def __init__(self, writer: Writer, advance: Callable[..., None], calls: int = 0):
        self.calls = calls  # denoiser calls of all steps written
        self._writer, self._advance = writer, advance
        self._open: tuple[int, Mapping[str, jax.Array], float, float] | None = None

    def begin(self) -> None:
        """A rollout is about to be dispatched."""
        self._start = time.monotonic()

    def sampled(self) -> None:
        """Its tokens have come."""
        self._sampled = time.monotonic()

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Its updates are dispatched; `metrics` are their scalars, "denoiser_calls" those of this step."""
        self._open = (step, metrics, self._sampled - self._start, self._sampled)

    def write(self) -> None:
        """Waits for the updates of the step that was added last and writes its line, unless that is done."""
        if self._open is None:
            return
        (step, metrics, rollout_seconds, sampled), self._open = self._open, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._start = time.monotonic()
        self.calls += int(values.pop("denoiser_calls"))
        times = {"time/rollout": rollout_seconds, "time/update": self._start - sampled}
        self._writer.write("rl", step, values | times | {"denoiser_calls": self.calls})
        self._advance(reward=values["reward"], accuracy=values["accuracy"], nfe=values["nfe"])


def _parse(line: str) -> dict | None:
    """The line's object, or None where it is not a whole one."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(parsed, dict) and isinstance(parsed.get("phase"), str) and isinstance(parsed.get("step"), int)
    return parsed if whole else None


@contextlib.contextmanager
def profiled(workdir: str | Path, steps: Sequence[int]) -> Iterator[Callable[[int], None]]:
    """Traces steps first .. last, `steps` = (first, last), with jax.profiler into `workdir`/profile; () = none.

    Yields a function to call with each step's number before it begins. A trace that is open at the end is closed.
    """
    tracing = False

    def before(step: int) -> None:
        nonlocal tracing
        if steps and not tracing and steps[0] <= step <= steps[1]:
            jax.profiler.start_trace(os.path.join(workdir, "profile"))
            tracing = True
        elif tracing and step > steps[1]:
            jax.profiler.stop_trace()
            tracing = False

    try:
        yield before
    finally:
        if tracing:
            jax.profiler.stop_trace()


@contextlib.contextmanager
def progress(phase: str, total: int, start: int = 0, console: Console | None = None, every: float = 10.0) -> Iterator[Callable[..., None]]:
    """Shows how far `phase` is; yields `advance(count=1, **shown)`, to be called after each step with a few live numbers.

    On a terminal or in a notebook: a bar with the elapsed time, an estimate of the time left, steps a second, and `shown`. Elsewhere: a
    plain line at most every `every` seconds and one at the end. Estimate and speed leave out the first step, which compiles.

    Args:
      phase: what is shown in front.
      total: steps of the whole phase.
      start: steps already done, of a resumed run.
      console: where to print; default: standard output. Hosts other than the first print nothing.
      every: seconds between two plain lines.
    """
    console = console or Console(quiet=jax.process_index() != 0)
    live = console.is_interactive or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)  # which a bar needs there
    columns = TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[shown]}")
    bar = Progress(*columns, console=console)
    began = printed = time.monotonic()
    done, first = start, None  # first: (when, how many were done) after the first step

    def status(shown: Mapping[str, Any]) -> str:
        pace: list[str] = []
        if first is not None and first[1] < done < total:
            each = (time.monotonic() - first[0]) / (done - first[1])
            pace = [f"{_duration(each * (total - done))} left", f"{1 / max(each, 1e-9):.3g}/s"]
        return "  ".join(pace + [f"{name} {_number(value)}" for name, value in shown.items()])

    def advance(count: int = 1, **shown: Any) -> None:
        nonlocal done, first, printed
        done += count
        text = status(shown)
        first = first or (time.monotonic(), done)
        bar.update(task, completed=done, shown=text)
        if not live and (done >= total or time.monotonic() - printed >= every):
            printed = time.monotonic()
            console.print(f"{phase} {done}/{total}  {_duration(printed - began)} elapsed  {text}".rstrip(), highlight=False, soft_wrap=True)

    with bar if live else contextlib.nullcontext():
        task = bar.add_task(phase, total=total, completed=start, shown="")
        yield advance


def _duration(seconds: float) -> str:
    """95.2 -> '1:35', 3700 -> '1:01:40'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _number(value: Any) -> str:
    return f"{float(value):.3g}" if isinstance(value, float | np.floating | jax.Array) else str(value)
