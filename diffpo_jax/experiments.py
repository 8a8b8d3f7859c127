"""Experiments: tasks x algorithms x seeds, each cell a run of diffpo_jax.main, and a report over all of them.

    python -m diffpo_jax.experiments --suite=main --out=results --processes=2
    python -m diffpo_jax.experiments --suite=main --out=results --report

A cell is the command a person would type; OUT/SUITE.jsonl has it beside its results (see `experiment_results`). The same command again
runs what is missing or has failed. All cells of a task start from one base model, trained under OUT/base, as those of a paper do from
one published model: a seed is that of RL. What cells take over from it, its curve and its data, saves time and changes no number.
"""

import argparse
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from diffpo_jax import command_line, experiment_report
from diffpo_jax import experiment_results as results
from diffpo_jax.algorithms import ALGORITHMS

MODES = {  # of a cell, as fields; where thresholds are fixed, NFE is not what the model is trained for
    "fixed": {"rl.mode": "model", "rl.model_reward": "task"},
    "sampler": {"rl.mode": "sampler"},
    "joint": {"rl.mode": "joint"},
}
TASKS = ("countdown", "math", "sudoku")
PAIRS = (
    *((name, "fixed") for name in ALGORITHMS),
    *((name, "joint") for name in ("d1", "diffpo", "agrpo")),
    ("", "sampler"),  # the model is frozen: one cell for all algorithms
)
ERROR_LINES = 8  # kept of what a failed run printed
GRACE = 120.0  # seconds that a stopped run has to save its checkpoint


@dataclasses.dataclass(frozen=True)
class Suite:
    """Every combination of task, seed, pair and variant is a cell."""

    pairs: tuple[tuple[str, str], ...]  # (algorithm, mode); algorithm "" = the preset's
    seeds: tuple[int, ...]
    tasks: tuple[str, ...] = TASKS
    variants: tuple[dict[str, Any], ...] = ({},)  # a cell's overrides, {"section.field": value}
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of all cells and their base models
    preset: str = "suite"
    tuned: bool = False  # learning rates are the best of OUT/tune.jsonl, where an algorithm is tuned in mode fixed


SUITES = {
    "main": Suite(PAIRS, seeds=(0, 1, 2, 3, 4), tuned=True),
    "tune": Suite(
        tuple(pair for pair in PAIRS if pair[1] == "fixed"),
        seeds=(100,),
        variants=tuple({"rl.learning_rate": rate} for rate in (3e-5, 1e-4, 3e-4)),
        shared={"eval.skip": 512},  # the validation problems: no choice is made on those the results are of
    ),
    "caps": Suite(
        (("diffpo", "fixed"),),
        seeds=(0, 1, 2),
        variants=(
            *({"rl.importance_cap": cap} for cap in (1.0, 2.0, 5.0, 1e9)),
            *({"rl.inner_steps": 4, "rl.clip_low": clip, "rl.clip_high": clip} for clip in (0.1, 0.2, 0.5)),  # the first clips nothing
        ),
    ),
    "thresholds": Suite(  # as slowly, and for as few calls, as in `main` the network ends with one threshold for all prompts
        (("", "sampler"),),
        seeds=(0, 1, 2, 3, 4),
        variants=({"rl.calls": 480_000, "threshold_network.learning_rate": 1e-2},),
    ),
    "stabilisers": Suite(
        (("mf2", "fixed"),),
        seeds=(0, 1, 2),
        variants=(
            {},
            *({"rl.elbo_weight": 0.1, "rl.elbo_rows": rows} for rows in ("all", "right")),
            {"sampler.mixture": "(0.01,0.3,1.0)"},
        ),
        tuned=True,
    ),
    "debug": Suite((("", "fixed"), ("", "joint")), (0, 1), ("countdown",), ({"rl.importance_cap": 1.0},), preset="debug"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    suite: str
    task: str
    algorithm: str  # "" = the preset's
    mode: str
    seed: int
    overrides: dict[str, Any]  # {"section.field": value}

    @property
    def name(self) -> str:
        """'main-math-d1-joint-0', with overrides 'tune-math-d1-joint-100-learning_rate=3e-05'."""
        overrides = [f"{field.rpartition('.')[2]}={value}" for field, value in self.overrides.items()]
        return "-".join([self.suite, self.task, *filter(None, [self.algorithm]), self.mode, str(self.seed), *overrides])


def make_cells(suite: str, tasks: Sequence[str] = (), algorithms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Cell]:
    """The cells of a suite; of one seed and task they lie together.

    Args:
      suite: a name in `SUITES`.
      tasks, algorithms: of those, only these; none given = all. What has no algorithm goes by its mode ("sampler").
      seeds: these instead of the suite's.

    Raises:
      ValueError: for an unknown name; the known ones are listed.
    """
    _check_known("suite", [suite], SUITES)
    chosen = SUITES[suite]
    _check_known("task", tasks, chosen.tasks)
    _check_known("algorithm", algorithms, dict.fromkeys(algorithm or mode for algorithm, mode in chosen.pairs))
    return [
        Cell(suite, task, algorithm, mode, seed, overrides)
        for seed in seeds or chosen.seeds
        for task in tasks or chosen.tasks
        for algorithm, mode in chosen.pairs
        if not algorithms or (algorithm or mode) in algorithms
        for overrides in chosen.variants
    ]


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown {what}: {', '.join(unknown)}; known: {', '.join(known)}")


# --- commands ---


def base_folder(cell: Cell, out: str) -> str:
    return os.path.join(out, "base", cell.task)


def base_command(cell: Cell, out: str) -> list[str]:
    """The command that trains the cell's base model and evaluates it."""
    return [*_start(cell), "--mode=sft", *_fields(SUITES[cell.suite].shared), f"--workdir={base_folder(cell, out)}"]


def cell_command(cell: Cell, out: str, learning_rate: float | None = None) -> list[str]:
    """The cell's command; a learning rate of None is the preset's, or that of the cell's overrides."""
    fields: dict[str, Any] = {"algorithm": cell.algorithm} if cell.algorithm else {}
    fields |= MODES[cell.mode] | {"seed": cell.seed, "sft.checkpoint": os.path.join(base_folder(cell, out), "sft")}
    fields |= SUITES[cell.suite].shared | ({} if learning_rate is None else {"rl.learning_rate": learning_rate}) | cell.overrides
    return [*_start(cell), *_fields(fields), f"--workdir={os.path.join(out, 'runs', cell.name)}"]


def _start(cell: Cell) -> list[str]:
    return ["python", "-m", "diffpo_jax.main", f"--config=configs/{cell.task}.py:{SUITES[cell.suite].preset}"]


def _fields(fields: Mapping[str, Any]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in fields.items()]


def tuned_learning_rate(tuning: Mapping[str, Mapping], task: str, algorithm: str) -> float | None:
    """The learning rate of the largest mean hypervolume of the trained curve, among lines of tune.jsonl; None where there are none."""
    found: dict[float, list[float]] = {}
    for line in tuning.values():
        cell = line["cell"]
        if line["status"] == "done" and (cell["task"], cell["algorithm"]) == (task, algorithm):
            found.setdefault(cell["overrides"]["rl.learning_rate"], []).append(experiment_report.measures(line)["hypervolume"])
    return max(found, key=lambda rate: sum(found[rate]) / len(found[rate])) if found else None


# --- running them ---


@dataclasses.dataclass(frozen=True)
class Job:
    """A command to run; `cell` None is the base model that other jobs wait for."""

    command: list[str]
    workdir: Path
    base: Path  # workdir of the base model
    cell: Cell | None


def make_jobs(cells: Iterable[Cell], out: str) -> list[Job]:
    """Jobs of the cells that OUT/SUITE.jsonl does not have as done, the base model of each in front of it.

    Base models are asked for even where they are there: the command is then quick, and refuses one of another configuration.
    """
    tuning, jobs, bases = results.read(Path(out) / "tune.jsonl"), [], set()
    for cell in cells:
        line = results.read(Path(out) / f"{cell.suite}.jsonl").get(results.cell_key(dataclasses.asdict(cell)))
        if line and line["status"] == "done":
            continue
        base = Path(base_folder(cell, out))
        if base not in bases:
            bases.add(base)
            jobs.append(Job(base_command(cell, out), base, base, None))
        rate = tuned_learning_rate(tuning, cell.task, cell.algorithm) if SUITES[cell.suite].tuned else None
        jobs.append(Job(cell_command(cell, out, rate), Path(out) / "runs" / cell.name, base, cell))
    return jobs


def share_cores(processes: int) -> list[set[int] | None]:
    """The cores of each of so many processes that run at once; None = any, where there is one process or no way to choose."""
    if processes == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * processes
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // processes)
    return [{cores[(i * each + j) % len(cores)] for j in range(each)} for i in range(processes)]


def run_jobs(jobs: Iterable[Job], processes: int, finished: Callable[[Job, float, str], None]) -> None:
    """Runs jobs, so many at once, each cell once its base model is there.

    Args:
      jobs: from `make_jobs`.
      processes: at once.
      finished: called at each job's end with its wall time, seconds, and its error, "" for none. A cell whose base model has failed
        has failed.
    """
    waiting, free = list(jobs), share_cores(processes)
    made: set[Path] = set()
    running: dict[subprocess.Popen, tuple[Job, set[int] | None, float]] = {}
    try:
        while waiting or running:
            while free and (job := next((job for job in waiting if job.cell is None or job.base in made), None)):
                waiting.remove(job)
                cores = free.pop(0)
                running[_launch(job, cores)] = job, cores, time.monotonic()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                job, cores, began = running.pop(process)
                free.append(cores)
                error = _error(job, process.returncode)
                finished(job, time.monotonic() - began, error)
                if job.cell is None and not error:
                    made.add(job.base)
                elif job.cell is None:
                    for lost in [each for each in waiting if each.base == job.base]:
                        waiting.remove(lost)
                        finished(lost, 0.0, f"no base model: {error}")
    finally:
        _stop(running)


def _launch(job: Job, cores: set[int] | None) -> subprocess.Popen:
    """Starts a job; what it prints goes to files beside its workdir."""
    job.workdir.parent.mkdir(parents=True, exist_ok=True)
    if job.cell is not None:
        take_over(job.base, job.workdir)
    with open(f"{job.workdir}.out", "w") as out, open(f"{job.workdir}.err", "w") as err:
        line = [sys.executable, *job.command[1:]]
        process = subprocess.Popen(line, stdout=out, stderr=err, start_new_session=True)  # Ctrl-C is ours: they are asked to save
    if cores:
        os.sched_setaffinity(process.pid, cores)
    return process


def take_over(base: Path, workdir: Path) -> None:
    """Gives a cell the evaluation of its base model and the data set, which it would make again, the same."""
    workdir.mkdir(exist_ok=True)
    if not (workdir / "base.npz").exists():
        shutil.copy(base / "base.npz", workdir / "base.npz.tmp")
        os.replace(workdir / "base.npz.tmp", workdir / "base.npz")
    if not (workdir / "data").exists():
        os.symlink(os.path.relpath(base / "data", workdir), workdir / "data")


def _error(job: Job, code: int) -> str:
    """Why a job that has ended has failed: the end of what it printed; "" if it has not."""
    if code == 0 and (job.workdir / ("base.npz" if job.cell is None else "summary.json")).exists():
        return ""
    printed = [Path(f"{job.workdir}.{name}").read_text(encoding="utf-8", errors="replace").strip() for name in ("err", "out")]
    last = next(filter(None, printed), "it printed nothing").splitlines()[-ERROR_LINES:]
    return "\n".join([f"exit code {code}", *last])


def _stop(running: Iterable[subprocess.Popen]) -> None:
    """Asks runs to save and end, and ends those that do not."""
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()


# --- the command line ---


def run(cells: Sequence[Cell], out: str, processes: int) -> None:
    """Runs what is missing of the cells; each has its line in OUT/SUITE.jsonl, and on the screen, as soon as it ends."""
    jobs = make_jobs(cells, out)
    left = sum(job.cell is not None for job in jobs)
    print(f"{len(cells)} cells, {len(cells) - left} of them done", flush=True)

    def finished(job, seconds, error):
        nonlocal left
        if job.cell is not None:
            left -= 1
            line = {"cell": dataclasses.asdict(job.cell), "command": shlex.join(job.command)}
            line |= {"status": "failed", "error": error} if error else {"status": "done", **results.collect(job.workdir)}
            results.append(Path(out) / f"{job.cell.suite}.jsonl", line)
        name = job.workdir.name if job.cell else f"base model {job.workdir.name}"
        print(f"{name}: {'failed' if error else 'done'} after {seconds:.0f} s, {left} left", *filter(None, [error]), sep="\n", flush=True)

    run_jobs(jobs, processes, finished)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    parser = _Parser(prog="python -m diffpo_jax.experiments", allow_abbrev=False)
    parser.add_argument("--suite", default="main", help=f"which experiment: {', '.join(SUITES)}")
    parser.add_argument("--out", default="results", help="folder of results, base models and runs")
    parser.add_argument("--tasks", type=_names, default=(), help="only these, separated by commas")
    parser.add_argument("--algorithms", type=_names, default=(), help="only these; cells without one go by their mode")
    parser.add_argument("--seeds", type=_integers, default=(), help="these instead of the suite's")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, each on its own cores")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    flags = parser.parse_args(argv)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with command_line.errors_said("stopped; the same command goes on from here"):
            cells = make_cells(flags.suite, flags.tasks, flags.algorithms, flags.seeds)
            if flags.processes < 1:
                raise ValueError(f"--processes={flags.processes}: at least 1")
            if not flags.report:
                run(cells, flags.out, flags.processes)
            print(f"report: {experiment_report.write(flags.out, flags.suite)}")
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Parser(argparse.ArgumentParser):
    """One whose errors are said as those of the other commands."""

    def error(self, message: str) -> NoReturn:
        command_line.stop(message, hint="--help lists the flags")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, _names(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no integers separated by commas") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    main()
