"""kill -9 at random moments of a run: the same command goes on each time, and ends as if nothing had happened, bit for bit."""

import collections
import contextlib
import os
import random
import re
import shutil
import signal
import time

import pytest

from tests import runs
from tests.faults.conftest import FLAGS

pytestmark = pytest.mark.slow

# Seconds up to which a process goes on after it was seen in a phase, before it is killed
LONGEST = {
    "imports": 3.0, "problems": 0.5, "supervised step": 0.1, "save of the base model": 0.1, "evaluation of the base model": 1.0,
    "rollout": 0.1, "update": 0.05, "save in RL": 0.1, "evaluation during RL": 0.05, "evaluation of the trained model": 0.3,
}  # fmt: skip
TARGETS = [  # (phase, step of it that must have been reached), in an order in which the run can get there
    *[("imports", 0)] * 3, *[("problems", 0)] * 2,
    *[(phase, 8 * i) for i in range(7) for phase in ("supervised step", "save of the base model")],
    *[("evaluation of the base model", 0)] * 5,
    *[(phase, 2 * i) for i in range(6) for phase in ("rollout", "update", "save in RL")],
    *[("imports", 0)] * 2, *[("evaluation during RL", 0)] * 2, *[("evaluation of the trained model", 0)] * 4,
]  # fmt: skip
SEED = 0

# What Python runs before anything else: at SIGUSR1 a signal handler in C writes the stack to a file; the program knows nothing of it
OBSERVER = """
import faulthandler, os, signal
faulthandler.register(signal.SIGUSR1, file=open(os.environ["STACK_FILE"], "ab", 0))
"""


class Life:
    """One process of the run, and where it is."""

    def __init__(self, workdir, folder):
        self.workdir, self.stack = workdir, folder / "stack"
        self.stack.unlink(missing_ok=True)
        (folder / "sitecustomize.py").write_text(OBSERVER)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = runs.start(workdir, *FLAGS, env={"PYTHONPATH": path, "STACK_FILE": str(self.stack)})

    def phase(self) -> str:
        """Where the main thread is now."""
        if not self.stack.exists():
            return "imports"
        os.truncate(self.stack, 0)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
        whole = re.compile(r"in _run_module_as_main\n|^  \.\.\.\n", re.MULTILINE)  # the last line, also where the stack is too deep for it
        deadline = time.monotonic() + 1.0
        while not whole.search(text := self.stack.read_text()) and time.monotonic() < deadline:
            time.sleep(0.0005)
        main = next((part for part in text.split("\n\n") if "_run_module_as_main" in part), "")
        return self._name(set(re.findall(r'File ".*?(\w+\.py|<\w+.*?>)", line \d+ in (\w+)', main)), main)

    def step(self, phase: str) -> int:
        """The last step in metrics.jsonl of the part of the run that `phase` is in."""
        lines = runs.metrics(self.workdir, "rl" if "RL" in phase or phase in ("rollout", "update") else "sft")
        return lines[-1]["step"] if lines else 0

    def _name(self, frames: set[tuple[str, str]], text: str) -> str:
        functions = {function for _, function in frames}
        trained = (self.workdir / "checkpoints" / "16").exists()
        if ("checkpoint.py", "save") in frames:
            return "save in RL" if "train_rl" in functions else "save of the base model"
        if ("checkpoint.py", "restore") in frames or ("checkpoint.py", "open_manager") in frames:
            return "restore"
        if ("train.py", "cached_curve") in frames:
            return f"evaluation of the {'trained' if trained else 'base'} model"
        if "train_rl" in functions:
            if ("evaluate.py", "evaluate") in frames:
                return "evaluation during RL"
            if functions & {"get_rows", "rollout"}:
                return "rollout"
            return "update" if functions & {"settle", "update"} else "elsewhere in RL"
        if "train_base" in functions:
            return "supervised step"
        if "run_session" in functions:
            return "problems"
        return "imports" if "importlib" in text or not {"train"} & functions else "report"


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
        time.sleep(0.01)
    out, err = life.process.communicate()
    assert life.process.returncode == 0, f"{out}\n{err}"
    return None


def test_killed_at_random_moments(undisturbed, tmp_path):
    rng, fell, ended = random.Random(SEED), collections.Counter(), 0
    workdir = tmp_path / "run"
    for phase, step in TARGETS:
        while (found := kill_in(Life(workdir, tmp_path), phase, step, rng.uniform(0, LONGEST[phase]))) is None:
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
