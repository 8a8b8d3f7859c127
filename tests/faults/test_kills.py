"""kill -9 at random moments of a run: the same command goes on each time, and ends as if nothing had happened, bit for bit."""

import collections
import os
import random
import shutil
import signal
import time

import pytest

from tests import runs
from tests.faults.conftest import FLAGS

pytestmark = pytest.mark.slow

# Seconds up to which a process goes on after it was seen in a phase, before it is killed
LONGEST = {
    "imports": 3.0, "problems": 0.5, "supervised step": 0.1, "save of the base model": 0.1, "evaluation of the base model": 0.2,
    "rollout": 0.1, "update": 0.05, "save in RL": 0.1, "evaluation during RL": 0.05, "evaluation of the trained model": 0.05,
}  # fmt: skip
TARGETS = [  # (phase, step of it that must have been reached), in an order in which the run can get there
    *[("imports", 0)] * 3, *[("problems", 0)] * 2,
    *[(phase, 8 * i) for i in range(7) for phase in ("supervised step", "save of the base model")],
    *[("evaluation of the base model", 0)] * 5,
    *[(phase, 2 * i) for i in range(6) for phase in ("rollout", "update", "save in RL")],
    *[("imports", 0)] * 2, *[("evaluation during RL", 0)] * 2, *[("evaluation of the trained model", 0)] * 4,
]  # fmt: skip
SEED = 0

OBSERVER = """
import os, sys, threading, time

def watch(path, thread):
    while True:
        frame, names = sys._current_frames().get(thread), []
        while frame is not None:
            names.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}")
            frame = frame.f_back
        with open(f"{path}.new", "w") as file:
            file.write(" ".join(names))
        os.replace(f"{path}.new", path)
        time.sleep(0.005)

threading.Thread(target=watch, args=(os.environ["STACK_FILE"], threading.main_thread().ident), daemon=True).start()
"""  # what Python runs before anything else: a thread that says where the main one is; the program knows nothing of it


class Life:
    """One process of the run, and where it is."""

    def __init__(self, workdir, folder):
        self.workdir, self.stack = workdir, folder / "stack"
        self.stack.unlink(missing_ok=True)
        (folder / "sitecustomize.py").write_text(OBSERVER)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = runs.start(workdir, *FLAGS, env={"PYTHONPATH": path, "STACK_FILE": str(self.stack)})

    def phase(self) -> str:
        """Where the main thread is, or was some milliseconds ago."""
        frames = set(self.stack.read_text().split()) if self.stack.exists() else set()
        functions = {frame.partition(":")[2] for frame in frames}
        if "checkpoint.py:save" in frames:
            return "save in RL" if "train_rl" in functions else "save of the base model"
        if frames & {"checkpoint.py:restore", "checkpoint.py:open_manager"}:
            return "restore"
        if "train.py:cached_curve" in frames:
            return f"evaluation of the {'trained' if (self.workdir / 'checkpoints' / '16').exists() else 'base'} model"
        if "train_rl" in functions:
            if "evaluate.py:evaluate" in frames:
                return "evaluation during RL"
            if functions & {"get_rows", "rollout"}:
                return "rollout"
            return "update" if functions & {"settle", "update"} else "elsewhere in RL"
        if "train_base" in functions:
            return "supervised step"
        return "problems" if "run_session" in functions else "report" if "train.py:train" in frames else "imports"

    def step(self, phase: str) -> int:
        """The last step in metrics.jsonl of the part of the run that `phase` is in."""
        lines = runs.metrics(self.workdir, "rl" if "RL" in phase or phase in ("rollout", "update") else "sft")
        return lines[-1]["step"] if lines else 0


def kill_in(life: Life, phase: str, step: int, after: float) -> str | None:
    """Waits until `life` is in `phase`, at `step` or later, lets it go on for `after` seconds and kills it.

    Returns where it was; None if it ended before.
    """
    deadline = time.monotonic() + 200
    while life.process.poll() is None:
        assert time.monotonic() < deadline, f"{phase} did not come"
        if phase == "imports" or (life.phase() == phase and life.step(phase) >= step):
            time.sleep(after)
            found = life.phase()
            life.process.kill()
            life.process.communicate()
            return found if life.process.returncode == -signal.SIGKILL else None
        time.sleep(0.003)
    out, err = life.process.communicate()
    assert life.process.returncode == 0, f"{out}\n{err}"
    return None


def test_killed_at_random_moments(undisturbed, tmp_path):
    rng, fell, ended = random.Random(SEED), collections.Counter(), 0
    workdir = tmp_path / "run"
    for phase, step in TARGETS:
        after = rng.uniform(0, LONGEST[phase]) if phase in fell else 0.0  # the first at once, so that every phase has one
        while (found := kill_in(Life(workdir, tmp_path), phase, step, after)) is None:
            ended += 1  # the run was over before: what it ended with is as it should be, and the next begins at the start
            runs.assert_same_outcome(workdir, undisturbed)
            shutil.rmtree(workdir)
        fell[found] += 1
        print(f"{found} (sft {runs.steps(workdir / 'sft')}, rl {runs.steps(workdir / 'checkpoints')})", flush=True)
    runs.finish(runs.start(workdir, *FLAGS))
    runs.assert_same_outcome(workdir, undisturbed)
    print(f"{len(TARGETS)} kills, {ended} runs ended between them; where they fell: {dict(fell)}")
    assert sum(fell.values()) == len(TARGETS) >= 50
    assert LONGEST.keys() <= fell.keys()
