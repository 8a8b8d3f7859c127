"""Seconds from the command to the first RL update, by phase, with a cold and a warm compilation cache: python benchmarks/startup.py

Each run is a process of its own in a fresh workdir, cold ones beside an empty .jax_cache and warm ones beside that of the cold run before;
modules are compiled to bytecode beforehand, as pip does. Flags of the program follow a --: ... startup.py -- --config.rl.prompts=64
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PHASES = ("interpreter", "imports", "data and parts", "base model", "base evaluation", "first RL step")


def child(spawned: float, argv: list[str]) -> None:
    """The program, until its first line of RL; prints {"seconds": ..., "compiling": ...} by phase as its last line."""
    phase, clock, seconds, compiling = 0, spawned, {}, collections.Counter()

    def ended():
        nonlocal phase, clock
        now = time.time()
        seconds[PHASES[phase]], clock, phase = now - clock, now, phase + 1

    ended()
    import jax
    from absl import app

    from diffpo_jax import command_line, main, metrics

    train = sys.modules["diffpo_jax.train"]  # `diffpo_jax.train` is the function
    ended()

    def then_ended(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **options):
            result = function(*args, **options)
            ended()
            return result

        setattr(owner, name, wrapped)

    for name in ("build", "train_base", "cached_curve"):
        then_ended(train, name)
    write = metrics.Writer.write

    def first_line(writer, kind, *args):
        write(writer, kind, *args)
        if kind == "rl":
            ended()
            print(json.dumps({"seconds": seconds, "compiling": compiling}), flush=True)
            os._exit(0)

    metrics.Writer.write = first_line

    def listen(event, duration, **_):
        if event.startswith("/jax/core/compile/"):  # tracing, lowering, compiling or reading what was compiled
            compiling[PHASES[phase]] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    app.run(main.main, argv=["main", *argv], flags_parser=command_line.parse)


def run(folder: Path, name: str, environment: dict[str, str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    flags = [f"--config={args.config}", f"--workdir={folder / name}", "--config.rl.checkpoint_every=1", *args.flags]
    line = [sys.executable, __file__, "--child", repr(time.time()), "--", *flags]
    done = subprocess.run(line, cwd=ROOT, env=environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(args: argparse.Namespace) -> None:
    found = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as scratch:
        left_out = ("PYTHONDONTWRITEBYTECODE", "JAX_COMPILATION_CACHE_DIR")
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": f"{scratch}/bytecode"}
        run(Path(scratch) / "bytecode-run", "run", environment, args)
        for turn in range(args.turns):
            for cache in found:
                found[cache].append(run(Path(scratch) / str(turn), cache, environment, args))
    print(f"{args.config}: median of {args.turns} runs (range), seconds; beside them those of tracing and compiling")
    print(f"{'':18s}{'cold cache':34s}warm cache")
    for phase in (*PHASES, "all"):
        row = f"{phase:18s}"
        for runs in found.values():
            taken, compiling = ([sum(each[kind].values()) if phase == "all" else each[kind].get(phase, 0.0) for each in runs]
                                for kind in ("seconds", "compiling"))  # fmt: skip
            text = f"{np.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f}), {np.median(compiling):.2f}"
            row += f"{text:34s}"
        print(row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/sudoku.py:debug")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="of the program, after --")
    parsed = parser.parse_args()
    if parsed.child:
        child(parsed.child, parsed.flags)
    else:
        main(parsed)
