"""Runs of the program for the tests: the command as a user types it, and what a workdir holds."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from diffpo_jax import checkpoint

ROOT = Path(__file__).parents[1]
RL_METRICS = {
    "weight/mean", "weight/max", "weight/truncated", "weight/ess", "clip_share", "kl", "entropy", "surrogate/entropy", "surrogate/gap",
    "denoiser_calls", "reward", "accuracy", "nfe", "whole_calls", "utilisation", "tokens_per_call", "threshold/mean", "threshold/std",
    "threshold/entropy", "loss", "grad_norm", "threshold/grad_norm", "bad_updates", "time/rollout", "time/update",
}  # fmt: skip


# Each command in a process of its own, forked from one that has imported the packages.
_FORKS = """
    import importlib, json, os, runpy, sys, tempfile, traceback, warnings
    import diffpo_jax

    warnings.simplefilter("ignore")
    for name in sys.argv[2:]:
        importlib.import_module(name)
    outcomes = []
    for line in json.loads(sys.argv[1]):
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if not child:
                os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
                sys.argv, code = line, 0
                try:
                    runpy.run_module(line[0], run_name="__main__", alter_sys=True)
                except SystemExit as exit:
                    if isinstance(exit.code, str):
                        print(exit.code, file=sys.stderr)
                    code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
                except BaseException:
                    traceback.print_exc()
                    code = 1
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0), err.seek(0)
            outcomes.append([code, out.read(), err.read()])
    print("OUTCOMES" + json.dumps(outcomes))
"""


def commands(lines: list[list[str]], imported: tuple[str, ...] = (), timeout: float = 600) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of commands [module, *flags], one after the other, from the repository's root.

    `imported`: what they import that takes long, done once.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FORKS), json.dumps([[str(part) for part in line] for line in lines]), *imported],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("OUTCOMES")[2])


def start(workdir, *flags: str, task: str = "sudoku", preset: str = "debug", env: dict[str, str] | None = None) -> subprocess.Popen:
    """python -m diffpo_jax.main with a preset of a task, from the repository's root; output is collected."""
    line = [sys.executable, "-m", "diffpo_jax.main", f"--config=configs/{task}.py:{preset}", f"--workdir={workdir}", *flags]
    env = os.environ | {"COLUMNS": "200"} | (env or {})
    return subprocess.Popen(line, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for a started run, requires its exit code and returns what it printed (stdout, of a failure stderr)."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out if code == 0 else err


def stop_at(process: subprocess.Popen, workdir, phase: str, step: int) -> int:
    """Freezes the process (SIGSTOP) once metrics.jsonl shows `step` of `phase` or a later one; returns the one it shows."""
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        seen = [line["step"] for line in metrics(workdir, phase)]
        if seen and seen[-1] >= step:
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.05)
            return metrics(workdir, phase)[-1]["step"]
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"the run ended or hung before {phase} step {step}: {process.communicate()}")


def metrics(workdir, phase: str | None = None) -> list[dict]:
    """The whole lines of metrics.jsonl, of one phase if given."""
    path = Path(workdir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if phase in (None, line["phase"])]


def untimed(workdir) -> list[str]:
    """The lines of metrics.jsonl as text, without the keys that begin with time/."""
    return [json.dumps({name: value for name, value in line.items() if not name.startswith("time/")}) for line in metrics(workdir)]


def saved(folder) -> tuple[int, dict[str, np.ndarray]]:
    """(step, every array by its path) of a folder's newest checkpoint."""
    checkpoints = checkpoint.open_manager(folder, read_only=True)
    step = checkpoint.latest_step(checkpoints)
    tree = checkpoints.manager.item_metadata(step)["state"].tree
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)  # whatever devices it was saved from
    state = checkpoints.manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=on_host)))["state"]
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    checkpoint.close(checkpoints)
    return step, {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def steps(folder) -> list[int]:
    """Steps of the whole checkpoints in a folder."""
    return sorted(int(path.name) for path in Path(folder).glob("*") if path.name.isdigit())


def contents(workdir) -> dict[str, tuple[int, bytes]]:
    """(time of the last change, bytes) of every file but the lock, which each process writes its number into."""
    files = (path for path in Path(workdir).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(workdir)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def assert_same_outcome(workdir, reference, in_order: bool = True) -> None:
    """Final checkpoints (parameters, threshold network, optimisers, counters, the data's position), metrics and results are the same, bit
    for bit, apart from seconds; without `in_order` the lines of metrics.jsonl may stand in another order."""
    ours, theirs = untimed(workdir), untimed(reference)
    assert ours == theirs if in_order else sorted(ours) == sorted(theirs)
    both = {"params", "opt_state"}
    for folder, parts in (("sft", both), ("checkpoints", both | {"threshold_params", "threshold_opt_state"})):
        (step, arrays), (reference_step, expected) = saved(workdir / folder), saved(reference / folder)
        assert step == reference_step and arrays.keys() == expected.keys()
        assert {path.split("/")[0] for path in arrays} >= parts
        for path, array in expected.items():
            assert array.dtype == arrays[path].dtype and array.tobytes() == arrays[path].tobytes(), f"{folder}: {path}"
    for item in ("data", "counters"):
        ours, theirs = (folder / "checkpoints" / str(step) / item / "metadata" for folder in (workdir, reference))
        assert ours.read_bytes() == theirs.read_bytes()
    for name in ("base.npz", "trained.npz", "learned.npz"):
        with np.load(workdir / name) as ours, np.load(reference / name) as theirs:
            assert ours.files == theirs.files
            assert all(ours[field].tobytes() == theirs[field].tobytes() for field in theirs.files if field != "seconds")
    ours, theirs = (_without_seconds(json.loads((folder / "summary.json").read_text())) for folder in (workdir, reference))
    assert ours == theirs


def _without_seconds(value):
    if isinstance(value, dict):
        return {name: _without_seconds(inner) for name, inner in value.items() if name != "seconds"}
    return [_without_seconds(inner) for inner in value] if isinstance(value, list) else value
