"""Seconds of an RL step by phase, and the share outside device programs: python benchmarks/update.py --config=configs/math.py[:PRESET]

In turns, each from the same state: `--block` steps of the loop as `diffpo_jax.train.train_rl` runs it, and the same steps with every device
program alone, dispatched and waited for before anything else is done. Both must end with the same parameters, bit for bit. What is outside
is said in two ways: the share of the loop's wall time in which no program was dispatched and unfinished (a thread notes when each is done),
and 1 - programs alone / loop, where what else the machine does is noise, and host work that slows a program on the same cores counts too.

With --steps=200 the loop then runs so many steps of the same policy (learning rates 0, so that no step has less work than another): seconds
and CPU seconds a step, first quarter against last, their slope with a 95% interval, and resident memory after the first quarter (Linux).

The base model is trained for --base_steps updates, or is that of --config.sft.checkpoint=DIR/sft; any other field as for the program.
"""

import collections
import ctypes
import tempfile
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from diffpo_jax import command_line, data, sharding
from diffpo_jax.build import Parts, grade
from diffpo_jax.metrics import StepLog, Writer
from diffpo_jax.rollout import make_credit, make_rollout, make_score, rollout_options, sample
from diffpo_jax.step import make_update
from diffpo_jax.structs import Prompts, TrainState
from diffpo_jax.train import init_train_state, run_session, train_base

CONFIG = config_flags.DEFINE_config_file("config", "configs/math.py", "A file of configs/, with a preset after a colon.")
TURNS = flags.DEFINE_integer("turns", 7, "Turns of loop and programs alone.", lower_bound=1)
BLOCK = flags.DEFINE_integer("block", 5, "RL steps of a turn.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 0, "Steps of the long run afterwards; 0 = none.", lower_bound=0)
BASE_STEPS = flags.DEFINE_integer("base_steps", 50, "Updates of the base model.", lower_bound=1)
MEMORY = "VmRSS", "RssAnon"  # all that is resident; without pages of files, which the system takes and gives as it likes
PROGRAMS, HOST = ("rollout", "likelihoods", "advantages", "updates"), ("batch", "grading", "line")


class Bench:
    """The steps of a run from `base`, both ways."""

    def __init__(self, parts: Parts, base: Any, writer: Writer):
        config = parts.config
        self.parts, self.base, self.writer, self.rows = parts, base, writer, config.rl.prompts * config.rl.group_size
        self.rollout, self.credit = make_rollout(parts), make_credit(parts)
        self.score = make_score(parts.policy, parts.trainable, config)
        self.watch, self.spans = futures.ThreadPoolExecutor(1), []
        eos_id, root = parts.tokenizer.eos_id, parts.key("dropout")
        self.update = make_update(parts.policy, parts.trainable, parts.head, config, eos_id, root, parts.mesh)
        self.batches = data.train_batches(
            parts.sources["train"], parts.tokenizer, config, batch_size=config.rl.prompts, seed=1, group_size=config.rl.group_size,
            mine=sharding.host_rows(parts.mesh, self.rows),
        )  # fmt: skip

    def key(self, step: int) -> jax.Array:
        return jax.random.fold_in(self.parts.key("rl"), step)

    def watched(self, function: Callable, output: Callable[[Any], Any]) -> Callable:
        """`function`, noting in `self.spans` from when its program was surely dispatched until when `output` of its result was there."""

        def call(*args):
            result = function(*args)
            start, awaited = time.perf_counter(), output(result)
            self.watch.submit(lambda: (jax.block_until_ready(awaited), self.spans.append((start, time.perf_counter()))))
            return result

        return call

    def busy_seconds(self) -> float:
        """Seconds covered by the spans since the last call."""
        self.watch.submit(lambda: None).result()
        covered, until = 0.0, 0.0
        for start, end in self.spans:
            covered, until = covered + max(0.0, end - max(start, until)), max(end, until)
        self.spans.clear()
        return covered

    def loop(self, state: TrainState, first: int, count: int) -> TrainState:
        """Steps first .. first + count - 1 as `train_rl` does them."""
        log = StepLog(self.writer, lambda **_: None)
        rollout, credit = self.watched(self.rollout, lambda result: result[1]["cuts"]), self.watched(self.credit, lambda result: result[1])
        update = self.watched(self.update, lambda result: result[1])  # the state is donated
        for step in range(first, first + count):
            batch = next(self.batches)
            log.begin()
            trajectory, likelihoods = rollout(state, self.base, batch, self.key(step))
            log.write()
            tokens = sharding.get_rows(trajectory.tokens)
            log.sampled()
            group, metrics = credit(trajectory, likelihoods, grade(self.parts, "train", batch["index"], tokens))
            for i in range(self.parts.config.rl.inner_steps):
                state, update_metrics = update(state, self.base, group, jnp.asarray(i))
            log.add(step, metrics | update_metrics)
        log.write()
        return state

    def alone(self, state: TrainState, first: int, count: int) -> tuple[TrainState, collections.Counter]:
        """The same, one thing after the other: seconds of each of PROGRAMS and of HOST."""
        parts, base, config, seconds = self.parts, self.base, self.parts.config, collections.Counter()

        def timed(name, function, *args, **options):
            start = time.perf_counter()
            result = jax.block_until_ready(function(*args, **options))
            seconds[name] += time.perf_counter() - start
            return result

        def next_batch():
            batch = next(self.batches)
            return batch, sharding.put_rows(parts.mesh, Prompts(batch["prompt"], batch["prompt_mask"]), self.rows)

        for step in range(first, first + count):
            batch, prompts = timed("batch", next_batch)
            key_sample, key_cuts = jax.block_until_ready(jax.random.split(self.key(step)))
            params = parts.trainable.join(base, state.params)
            trajectory = timed("rollout", sample, parts, params, prompts, key_sample, **rollout_options(parts, state.threshold_params))
            likelihoods = timed("likelihoods", self.score, state.params, base, trajectory, key_cuts)
            grades = timed("grading", lambda x, batch=batch: grade(parts, "train", batch["index"], sharding.get_rows(x.tokens)), trajectory)
            group, metrics = timed("advantages", self.credit, trajectory, likelihoods, grades)
            for i in range(config.rl.inner_steps):
                state, update_metrics = timed("updates", self.update, state, base, group, jnp.asarray(i))
            log = StepLog(self.writer, lambda **_: None)
            log.begin(), log.sampled(), log.add(step, metrics | update_metrics)
            timed("line", log.write)
        return state, seconds


def phases(bench: Bench, state: TrainState, turns: int, block: int) -> TrainState:
    """Prints the table and the share outside; the state after all turns."""
    wall, busy, apart = [], [], []
    for turn in range(-1, turns):  # the first compiles
        first, place, results = 1 + (turn + 1) * block, bench.batches.get_state(), {}
        for way in sorted(("loop", "alone"), reverse=bool(turn % 2)):
            bench.batches.set_state(place)
            start = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            began = time.perf_counter()
            if way == "loop":
                results[way] = jax.block_until_ready(bench.loop(start, first, block))
                wall.append((time.perf_counter() - began) / block)
                busy.append(bench.busy_seconds() / block)
            else:
                results[way], seconds = bench.alone(start, first, block)
                apart.append([seconds[name] / block for name in PROGRAMS + HOST])
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((results["loop"], results["alone"])))
        state = results["loop"]
    wall, busy, apart = (np.array(values[1:]) for values in (wall, busy, apart))
    rows = dict(zip(PROGRAMS + HOST, apart.T, strict=True))
    programs = apart[:, : len(PROGRAMS)].sum(axis=1)
    print(f"{jax.devices()[0].device_kind}, median of {turns} turns of {block} steps (range): seconds a step, share of the loop's")
    for name, seconds in [*rows.items(), ("programs", programs), ("loop", wall)]:
        note = "   host, in the loop beside a program" if name in HOST else ""
        print(f"{name:12s} {spread(seconds, '.4f')} s  {spread(100 * seconds / wall, '.1f')}%{note}")
    print(f"no device program under way: {spread(100 * (1 - busy / wall), '.2f')}% of the loop")
    print(f"1 - programs / loop: {spread(100 * (1 - programs / wall), '.2f')}%")
    host = apart[:, len(PROGRAMS) :].sum(axis=1)
    print(f"host, where one thing is done after the other: {spread(100 * host / apart.sum(axis=1), '.2f')}%")
    return state


def spread(values: np.ndarray, form: str) -> str:
    return f"{np.median(values):{form}} ({values.min():{form}} to {values.max():{form}})"


def long_run(bench: Bench, state: TrainState, steps: int, block: int) -> None:
    """Prints how time and memory of the loop develop over `steps` steps; memory between blocks, when no program holds buffers."""
    seconds, resident = [], []
    for first in range(1, steps + 1, block):
        began = time.perf_counter(), time.process_time()
        state = jax.block_until_ready(bench.loop(state, first, block))
        seconds.append(((time.perf_counter() - began[0]) / block, (time.process_time() - began[1]) / block))
        bench.busy_seconds()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps more or less of what was freed
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        resident.append([int(status[name].split()[0]) / 1024 for name in MEMORY])  # MiB
    quarter = max(len(seconds) // 4, 1)
    for name, each in zip(("seconds", "CPU seconds"), np.array(seconds).T, strict=True):
        x = np.arange(len(each)) - (len(each) - 1) / 2
        slope = (x @ each) / (x @ x)
        rest = each - each.mean() - slope * x
        half = 1.96 * np.sqrt(rest @ rest / (len(each) - 2) / (x @ x))
        begin, end, scale = np.median(each[:quarter]), np.median(each[-quarter:]), 100 * len(each) / each.mean()
        print(f"{name} a step: first quarter {begin:.4f}, last {end:.4f} ({100 * (end / begin - 1):+.1f}%); "
              f"slope over the run {scale * slope:+.1f} ± {scale * half:.1f}% of the mean")  # fmt: skip
    for name, each in zip(MEMORY, np.array(resident[quarter:]).T, strict=True):
        print(f"{name} after the first quarter: {each[0]:.1f} MiB, then {each.min():.1f} to {each.max():.1f}, at the end {each[-1]:.1f}: "
              f"at most {100 * np.abs(each / each[0] - 1).max():.2f}% away")  # fmt: skip


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    config.sft.steps, config.sft.checkpoint_every = BASE_STEPS.value, BASE_STEPS.value
    with tempfile.TemporaryDirectory() as workdir, run_session(config, workdir) as (parts, writer, stopped):
        base = train_base(parts, workdir, writer, stopped)
        phases(Bench(parts, base, writer), init_train_state(parts, base), TURNS.value, BLOCK.value)
        if STEPS.value:
            config.rl.learning_rate, config.threshold_network.learning_rate = 0.0, 0.0
            long_run(Bench(parts, base, writer), init_train_state(parts, base), STEPS.value, BLOCK.value)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
