"""What else a workdir can be asked for: the base model alone, the curve of a checkpoint, a look at how it denoises."""

import os
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from diffpo_jax import checkpoint, data, pareto, report, sharding
from diffpo_jax.build import Parts, grade
from diffpo_jax.evaluate import evaluate_curve, make_evaluate
from diffpo_jax.metrics import progress
from diffpo_jax.rollout import sampler_options
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.structs import Prompts, Trajectory
from diffpo_jax.train import cached_curve, init_train_state, run_session, train_base


def train_sft(config: Any, workdir: str) -> dict[str, Any]:
    """Trains the base model alone and evaluates it. Arguments and errors as `train`; returns the base part of its summary."""
    with run_session(config, workdir) as (parts, writer, stopped):
        base = train_base(parts, workdir, writer, stopped)
        curve = cached_curve(parts, workdir, "base", make_evaluate(parts), base, stopped)
        summary = {"task": parts.task.name, "seed": config.seed, "base": {"curve": report.curve_points(curve)}}
        report.print_report(summary)
        return summary


def evaluate(config: Any, workdir: str) -> dict[str, Any]:
    """Evaluates the newest RL checkpoint of `workdir` over `eval.thresholds` and at the learned thresholds.

    Prints the table, writes `workdir`/evaluation-STEP.json and .png, and returns what it wrote: {"task", "seed", "step", "base", "trained",
    "comparison"}.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError, RuntimeError: as `train`.
    """
    with run_session(config, workdir) as (parts, writer, stopped):
        params, threshold_params, step = restore_policy(parts, workdir)
        run = make_evaluate(parts)
        before = cached_curve(parts, workdir, "base", run, train_base(parts, workdir, writer, stopped), stopped)
        with progress(f"evaluation of step {step}", len(config.eval.thresholds)) as advance:
            after = evaluate_curve(run, parts, params, advance)
        summary = report.summarise(parts.task.name, config.seed, before, after, run(params, threshold_params=threshold_params))
        summary["step"] = step
        name = os.path.join(workdir, f"evaluation-{step}")
        checkpoint.write_json(f"{name}.json", summary)
        title, point = f"{parts.task.name}, step {step}", summary["trained"]["operating_point"]
        pareto.plot(f"{name}.png", report.as_curve(before), report.as_curve(after), point, title)
        report.print_report(summary)
        return summary


def sample(config: Any, workdir: str, console: Console | None = None) -> Trajectory:
    """Prints how the newest checkpoint denoises `eval.num_samples` test problems, step by step, at the learned thresholds."""
    with run_session(config, workdir) as (parts, _, _):
        params, threshold_params, step = restore_policy(parts, workdir)
        count = -(-config.eval.num_samples // parts.mesh.shape["data"]) * parts.mesh.shape["data"]
        batch = next(iter(data.eval_batches(parts.sources["test"], parts.tokenizer, config, count)))
        prompts = sharding.put_rows(parts.mesh, Prompts(batch["prompt"], batch["prompt_mask"]))
        trajectory = denoise(
            parts.policy, params, prompts.tokens, prompts.mask, parts.key("eval"), **sampler_options(parts),
            temperature=config.eval.temperature, threshold_fn=parts.head.mode, threshold_params=threshold_params,
        )  # fmt: skip
        rewards = grade(parts, "test", batch["index"], np.asarray(trajectory.tokens))
        console = console or Console()
        host = jax.device_get(trajectory)
        for row in range(config.eval.num_samples):
            print_trajectory(console, parts, jax.tree.map(lambda x, row=row: x[row], host), rewards[0][row], rewards[1][row])
        return trajectory


def print_trajectory(console: Console, parts: Parts, row: Trajectory, reward: float, correct: float) -> None:
    """Prints one row (a Trajectory without its first axis): a line a denoiser call, what it unmasked in brackets and in colour."""
    symbols = ["·" if token == parts.tokenizer.eos_id else parts.tokenizer.decode([token]) for token in row.tokens]
    prompt = parts.tokenizer.decode(row.prompts.tokens[row.prompts.mask])
    console.print(Text(f"\nprompt    {prompt}", style="bold"))
    for step in range(int(row.nfe)):
        line = Text(f"call {step + 1:3d}  ")
        for symbol, when in zip(symbols, row.unmask_step, strict=True):
            new = when == step
            text = f"[{symbol}]" if new else f" {symbol if when < step else '_'} "
            line.append(text, style="bold green" if new else "dim" if when > step else "")
        console.print(line, soft_wrap=True)
    verdict = Text("right", style="bold green") if correct == 1 else Text("wrong", style="bold red")
    console.print(Text(f"answer    {parts.tokenizer.decode(row.tokens)}   ") + verdict)
    console.print(Text(f"          reward {reward:.2f}, NFE {int(row.nfe)}, learned threshold {float(row.draw.gamma):.3g}"))


def restore_policy(parts: Parts, workdir: str) -> tuple[Any, Any, int]:
    """(params, threshold network's params, step) of the newest RL checkpoint of `workdir`; FileNotFoundError if there is none."""
    checkpoints = checkpoint.open_manager(os.path.join(workdir, "checkpoints"), read_only=True)
    fresh = init_train_state(parts, parts.policy.init(parts.key("policy")))
    wanted = checkpoint.abstract({"params": fresh.params, "threshold_params": fresh.threshold_params})
    state = checkpoint.restore(checkpoints, None, wanted, partial=True)
    return state["params"], state["threshold_params"], checkpoint.latest_step(checkpoints)
