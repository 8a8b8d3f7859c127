"""What is kept of an experiment's runs: a line a cell in OUT/SUITE.jsonl, from which runs are resumed and the report is made.

A line is
  cell: {"suite", "task", "algorithm", "mode", "seed", "overrides": {"section.field": value}}
  command: what was run
  status: "done", or "failed" with "error", the last lines it printed; a failed line has nothing of what follows
  max_nfe: the most calls a response can take
  base: {"curve": [[gamma, accuracy, NFE], ...]}
  trained: {"curve": likewise, "operating_point": {"accuracy", "nfe", "threshold_mean", "threshold_std"}}
  comparison: that of summary.json (see `pareto.compare`)
  progress: [[step, denoiser calls so far, accuracy, NFE], ...] at the evaluations of training and, last, at its end
  training: means of metrics over the last quarter of the steps
  ess: how many steps had an effective sample size of the truncated weights, used or not, in each of `ESS_BINS` equal parts of 0 to 1
  cost: {"denoiser_calls", "flops", "seconds": {phase: wall time}}
Of two lines of a cell the later one counts. Numbers have five significant digits.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffpo_jax.checkpoint import to_json
from diffpo_jax.flops import Least
from diffpo_jax.models.transformer import ModelConfig
from diffpo_jax.step import MODES

ESS_BINS = 25
TRAINING = ("reward", "weight/ess", "weight/truncated", "surrogate/gap", "clip_share", "kl", "entropy")  # kept where a run has them


def cell_key(cell: Mapping[str, Any]) -> str:
    """What identifies a cell among the lines of a file."""
    return json.dumps(cell, sort_keys=True)


def read(path: str | Path) -> dict[str, dict[str, Any]]:
    """The last line of each cell, by its `cell_key`, in the order in which cells came first; lines cut short by a kill are left out."""
    results = {}
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).exists() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and {"cell", "status"} <= line.keys():
            results[cell_key(line["cell"])] = line
    return results


def append(path: str | Path, line: Mapping[str, Any]) -> None:
    """Adds a line in one write, on a row of its own even where a killed process left half a line."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        start = "\n" if size and os.pread(file, 1, size - 1) != b"\n" else ""
        os.write(file, f"{start}{json.dumps(to_json(line), allow_nan=False)}\n".encode())
        os.fsync(file)
    finally:
        os.close(file)


def rounded(value: Any, digits: int = 5) -> Any:
    """`value` with every float in it, finite ones, rounded to so many significant digits."""
    if isinstance(value, Mapping):
        return {name: rounded(each, digits) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) and math.isfinite(value) else value


def collect(workdir: str | Path) -> dict[str, Any]:
    """What a line says of a finished run (`max_nfe` and what follows), from the files in its workdir.

    Raises:
      FileNotFoundError: the run has not come to its end.
    """
    summary, config = (json.loads((Path(workdir) / f"{name}.json").read_text(encoding="utf-8")) for name in ("summary", "config"))
    lines = [json.loads(text) for text in (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["phase"] == "rl"]
    point, calls = summary["trained"]["operating_point"], summary["denoiser_calls"]
    end = [steps[-1]["step"] if steps else 0, calls, point["accuracy"], point["nfe"]]
    return rounded({
        "max_nfe": config["task"]["response_length"],
        "base": {"curve": _curve(summary["base"]["curve"])},
        "trained": {
            "curve": _curve(summary["trained"]["curve"]),
            "operating_point": {
                "accuracy": point["accuracy"], "nfe": point["nfe"],
                "threshold_mean": point["thresholds"]["mean"], "threshold_std": point["thresholds"]["std"],
            },
        },
        "comparison": summary["comparison"],
        "progress": [*_progress(lines), end],
        "training": final_means(steps),
        "ess": ess_counts(steps),
        "cost": {"denoiser_calls": calls, "flops": flops(config, calls, len(steps)), "seconds": summary["seconds"]},
    })  # fmt: skip


def _curve(points: list[dict[str, Any]]) -> list[list[float]]:
    return [[entry["gamma"], entry["accuracy"], entry["nfe"]] for entry in points]


def _progress(lines: list[dict[str, Any]]) -> list[list[float]]:
    """[step, denoiser calls so far, accuracy, NFE] of each evaluation among the lines of metrics.jsonl."""
    calls = {line["step"]: line["denoiser_calls"] for line in lines if line["phase"] == "rl"}
    return [[line["step"], calls[line["step"]], line["accuracy"], line["nfe"]] for line in lines if line["phase"] == "eval"]


def final_means(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the metrics in `TRAINING` over the last quarter of the steps' lines, one line at least."""
    last = steps[-max(1, len(steps) // 4) :]
    return {name: sum(float(line[name]) for line in last) / len(last) for name in TRAINING if last and all(name in line for line in last)}


def ess_counts(steps: list[dict[str, Any]]) -> list[int]:
    """[`ESS_BINS`] steps by the effective sample size of the weights of their last update; zeros where the model is not trained."""
    return np.histogram([float(line["weight/ess"]) for line in steps if "weight/ess" in line], ESS_BINS, (0, 1))[0].tolist()


def flops(config: Mapping[str, Any], calls: int, steps: int) -> float:
    """The fewest FLOPs of a run's RL, 2 a multiply-add of a product of matrices.

    Counted are a forward pass of one row (see `flops.Least`: prompt and response through the trunk, the head over a block) for each
    denoiser call, of rollouts as of likelihoods, and two more, for the gradient, for each latent of a row in an update of the model. Left
    out are the base model, evaluations and the threshold network, and what a cache saves.

    Args:
      config: the configuration as config.json has it.
      calls: denoiser calls of the run's RL.
      steps: its iterations.
    """
    rl, task, m = config["rl"], config["task"], config["likelihood"]["num_latents"] + bool(config["rl"]["elbo_weight"])
    model = ModelConfig(**{field.name: config["model"][field.name] for field in dataclasses.fields(ModelConfig)})
    length = task["response_length"]
    block = config["sampler"]["block_length"] or length
    row = Least(1, task["prompt_length"], length, block, cuts=m, updates=rl["inner_steps"], reference=0, old=0, model=model, adapters=0)
    trained = steps * rl["inner_steps"] * rl["prompts"] * rl["group_size"] * m * MODES[rl["mode"]][0]
    return row.rollout(1) * (calls + 2 * trained)
