"""Rows a second of the sampler in lockstep, batch after batch, and with lanes that are refilled: python benchmarks/rollout.py

Both have the same lanes, rows, keys and thresholds. With --workdir=DIR model and threshold network are the newest checkpoint of a run, and
prompts those of its training split, denoised as in a rollout. Otherwise the model is random, of the sizes of configs/sudoku.py:tiny and
sharpened, and thresholds are log-uniform over --gammas so that rows need different numbers of calls; two equal ones show what refilling
costs where it can gain nothing. What is printed is of one process, the two taken in turns; tokens must be equal.
"""

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import default, sudoku
from diffpo_jax import build, data
from diffpo_jax.models.transformer import Policy, Whole
from diffpo_jax.modes import restore_policy, rl_checkpoints
from diffpo_jax.rollout import sampler_options
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.structs import Prompts, Trajectory
from diffpo_jax.train import run_session, train_base


def random_model(rows: int, sharpness: float) -> tuple[Policy, Any, Prompts, dict[str, Any]]:
    """(policy, params, prompts, options of `denoise`) of the tiny sudoku model, its kernels times `sharpness`, and random prompts."""
    config = sudoku.get_config("tiny")
    policy, tokenizer = build.own_policy(config)
    params = policy.init(jax.random.key(0))
    params = jax.tree.map_with_path(lambda path, x: x * sharpness if path[-1].key == "kernel" else x, params)
    tokens = jax.random.randint(jax.random.key(1), (rows, config.task.prompt_length), 0, config.model.vocab_size)
    prompts = Prompts(jnp.where(tokens == tokenizer.mask_id, tokenizer.eos_id, tokens), jnp.ones(tokens.shape, bool))
    return policy, params, prompts, {"length": config.task.response_length}  # no EOS: thresholds alone decide the number of calls


@contextlib.contextmanager
def trained(workdir: str) -> Iterator[tuple[build.Parts, Any, Any]]:
    """(parts, params, the threshold network's params) of the newest checkpoint of the run in `workdir`."""
    config = default.get_config()
    config.update(json.loads((Path(workdir) / "config.json").read_text(encoding="utf-8")))
    with run_session(config, workdir) as (parts, writer, stopped):
        base = train_base(parts, workdir, writer, stopped)
        yield parts, *restore_policy(parts, rl_checkpoints(config, workdir), base)[:2]


def trained_model(workdir: str, rows: int) -> tuple[Policy, Any, Prompts, dict[str, Any]]:
    """The same of the run in `workdir` and its threshold network, with the first problems of its training split, repeated if too few."""
    with trained(workdir) as (parts, params, threshold_params):
        batch = next(data.eval_batches(parts.sources["train"], parts.tokenizer, parts.config, rows))
        prompts = Prompts(jnp.asarray(batch["prompt"]), jnp.asarray(batch["prompt_mask"]))
        params, threshold_params = jax.device_put(jax.device_get((params, threshold_params)))
        options = sampler_options(parts) | {"threshold_fn": parts.head.sample, "threshold_params": threshold_params}
        return dataclasses.replace(parts.policy, layout=Whole()), params, prompts, options


def timed(call: Callable[[], list[Trajectory]]) -> tuple[float, list[Trajectory]]:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def main(args: argparse.Namespace) -> None:
    rows, lanes = args.rows, args.lanes
    model = trained_model(args.workdir, rows) if args.workdir else random_model(rows, args.sharpness)
    policy, params, prompts, options = model
    low, high = np.log(args.gammas)
    thresholds = jnp.exp(jax.random.uniform(jax.random.key(2), (rows,), minval=low, maxval=high))
    key, all_rows = jax.random.key(3), (prompts, thresholds, jnp.arange(rows, dtype=jnp.int32))
    batches = [jax.tree.map(lambda x, start=start: x[start : start + lanes], all_rows) for start in range(0, rows, lanes)]

    def run(batch, **more):
        prompts, threshold, row_ids = batch
        return denoise(policy, params, prompts.tokens, prompts.mask, key, threshold=threshold, row_ids=row_ids, **options, **more)

    calls = {"lockstep": lambda: [run(batch) for batch in batches], "refilled": lambda: [run(all_rows, lanes=lanes)]}
    found = {name: timed(call)[1] for name, call in calls.items()}  # and compiled
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *found["lockstep"])
    for name in ("tokens", "unmask_step", "nfe"):
        np.testing.assert_array_equal(getattr(found["refilled"][0], name), getattr(whole, name), err_msg=name)

    seconds = {name: [] for name in calls}
    for turn in range(args.turns):
        for name in sorted(calls, reverse=bool(turn % 2)):
            seconds[name].append(timed(calls[name])[0])
    nfe, calls_needed = whole.nfe, int(whole.nfe.sum())
    steps = {"lockstep": sum(int(part.nfe.max()) for part in found["lockstep"])}
    steps["refilled"] = int(found["refilled"][0].last_step.max()) + 1
    print(f"{jax.devices()[0].device_kind}: {rows} rows, {lanes} lanes, NFE {nfe.mean():.2f} ({nfe.min()} to {nfe.max()}); equal tokens")
    for name, taken in seconds.items():
        speeds = rows / np.array(taken)
        print(f"{name}: {np.median(speeds):.1f} rows/s (median of {args.turns}; {speeds.min():.1f} to {speeds.max():.1f}), "
              f"utilisation {calls_needed / lanes / steps[name]:.3f}, {steps[name]} steps")  # fmt: skip
    ratios = np.array(seconds["lockstep"]) / np.array(seconds["refilled"])
    print(f"refilled / lockstep: {np.median(ratios):.2f} times the rows/s (median of {args.turns}; {ratios.min():.2f} to "
          f"{ratios.max():.2f}), {steps['lockstep'] / steps['refilled']:.2f} times fewer steps")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="", help="of a run; without it the model is random")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--lanes", type=int, default=128, help="a divisor of --rows")
    parser.add_argument("--gammas", type=float, nargs=2, default=(0.05, 16.0), help="smallest and largest threshold, nats")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--sharpness", type=float, default=10.0, help="kernels of the random model are multiplied by it")
    main(parser.parse_args())
