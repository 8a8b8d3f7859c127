"""Which likelihood estimator? Their gradients, distributions and importance weights on a base model, with exact ones as the referee.

python -m diffpo_jax.study --config=configs/sudoku.py[:PRESET] --workdir=DIR [--out=DIR/study] [--prompts=8] [--batches=8] [--draws=2]

The base model of the workdir, trained if it is not there, makes rollouts at the fixed sampler.threshold, whose task reward gives the
advantages; what is measured on them is in diffpo_jax.referee. Written are study.json, study.md and three pictures. `sudoku:tiny` takes
six to eight minutes of one core.
"""

import functools
import os
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from diffpo_jax import checkpoint, command_line, data, objectives, sharding
from diffpo_jax.build import Parts, grade
from diffpo_jax.metrics import progress
from diffpo_jax.referee import (
    BINS,
    CALLS,
    CAPS,
    ESTIMATORS_STUDIED,
    Studied,
    draw,
    gradient_statistics,
    jackknife,
    kl_statistics,
    kl_sums,
    make_comparison,
    make_exact_hidden,
    make_gradient,
    make_referee,
    products,
    weight_statistics,
    weight_sums,
)
from diffpo_jax.rollout import sample, sampler_options
from diffpo_jax.sampling.denoise import response_mask
from diffpo_jax.structs import Prompts, Trajectory
from diffpo_jax.train import exit_if, run_session, train_base

Found = dict[str, dict[str, Any]]  # {statistic: {value, interval}}, of `jackknife`


class Batch(NamedTuple):
    """Graded rollouts."""

    trajectory: Trajectory
    advantages: jax.Array  # [N] float32, of the task reward
    mask: jax.Array  # [N, L] bool, positions that count
    reward: float
    accuracy: float


def roll_out(parts: Parts, params: Any, prompts: int, batches: int, key: jax.Array) -> list[Batch]:
    """Batches of `prompts` training problems times rl.group_size rows at sampler.threshold, graded."""
    config, group, rows = parts.config, parts.config.rl.group_size, prompts * parts.config.rl.group_size
    options = sampler_options(parts) | {"threshold": config.sampler.threshold, "temperature": config.sampler.temperature}
    source = data.train_batches(
        parts.sources["train"], parts.tokenizer, config, batch_size=prompts, seed=config.seed + 1, group_size=group
    )
    found = []
    for number in range(batches):
        batch = next(source)
        there = sharding.put_rows(parts.mesh, Prompts(batch["prompt"], batch["prompt_mask"]), rows)
        trajectory = sample(parts, params, there, jax.random.fold_in(key, number), **options)
        grades = grade(parts, "train", batch["index"], np.asarray(trajectory.tokens))
        advantages = objectives.ADVANTAGES[config.rl.advantage](jnp.asarray(grades.reward).reshape(-1, group)).reshape(-1)
        mask = response_mask(trajectory.tokens, parts.tokenizer.eos_id)
        found.append(Batch(trajectory, advantages, mask, float(grades.reward.mean()), float(grades.correct.mean())))
    return found


Drawn = list[list[tuple[Prompts, Any]]]  # [B][D] of `referee.draw`: what an estimator reads


def measure_gradients(gradient: Callable[..., jax.Array], params: Any, batches: list[Batch], drawn: Drawn, exact: np.ndarray) -> Found:
    """`gradient_statistics`, with intervals, of an estimator: gradient(params, trajectory, prompts, reads, advantages, mask).

    exact: [B, parameters]. Where there is one draw, it is taken for an estimator without noise.
    """
    each = [[gradient(params, batch.trajectory, *read, *batch[1:3]) for read in draws] for batch, draws in zip(batches, drawn, strict=True)]
    each = np.array(each)
    found = products(each if each.shape[1] > 1 else np.repeat(each, 2, axis=1), exact)
    return jackknife(functools.partial(gradient_statistics, found), len(batches))


def measure_distributions(
    compare: Callable[..., Any], params: Any, batches: list[Batch], drawn: Drawn, hidden: list[jax.Array], weigh: bool
) -> Found:
    """`kl_statistics` of an estimator's first draw, with intervals; and `weight_statistics`, if it reads each position once.

    compare: of `referee.make_comparison`; hidden: [B] of its exact hidden states; weigh: whether the estimator does.
    """
    kls, weights = [], []
    for batch, draws, exact in zip(batches, drawn, hidden, strict=True):
        kl, gap = jax.device_get(compare(params, batch.trajectory, *draws[0], exact))
        kls.append(kl_sums(kl, draws[0][1].weights, batch.trajectory, batch.mask))
        weights.append(weight_sums(gap[:, 0][np.asarray(batch.mask)]))
    found = jackknife(functools.partial(kl_statistics, np.array(kls)), len(batches))
    if weigh:
        found |= jackknife(functools.partial(weight_statistics, weights), len(batches))
    return found


def study(
    parts: Parts, params: Any, *, prompts: int, batches: int, draws: int, after_each: Callable[..., Any] = lambda: None
) -> dict[str, Any]:
    """Measures every estimator on the model `params`.

    Args:
      parts: of the run.
      params: the policy's, old and new.
      prompts: a batch; each has rl.group_size rows.
      batches: independent ones, at least 3.
      draws: of an estimator's noise on the same rows, at least 2.
      after_each: called after each estimator.

    Returns:
      {"measured": on what, "estimators": a list of {name, calls (a row), ...} with every statistic as {value, interval}}.
    """
    if batches < 3 or draws < 2:
        raise ValueError(f"batches = {batches}, draws = {draws}: intervals need 3 batches, products of independent draws 2 draws")
    policy, config, began = parts.policy, parts.config, time.monotonic()
    key_rollouts, key_noise = jax.random.split(parts.key("study"))
    rolled = roll_out(parts, params, prompts, batches, key_rollouts)
    nfe = np.concatenate([batch.trajectory.nfe for batch in rolled])
    steps = int(nfe.max())
    referee, exact_hidden = make_referee(policy, config, steps), make_exact_hidden(policy, steps)
    exact = np.array([referee(params, *batch[:3]) for batch in rolled])
    hidden = [exact_hidden(params, batch.trajectory) for batch in rolled]
    gradient, compare, found = make_gradient(policy, config), make_comparison(policy, config), []
    keys = [jax.random.fold_in(key_noise, i) for i in range(batches)]  # for all: estimators that read alike read the same
    for studied in (*ESTIMATORS_STUDIED, Studied("exact", steps, "exact")):
        noisy = studied.estimator != "exact"
        drawn = [
            [draw(policy, studied, batch.trajectory, jax.random.fold_in(key, i)) for i in range(draws if noisy else 1)]
            for batch, key in zip(rolled, keys, strict=True)
        ]
        entry: dict[str, Any] = {"name": studied.name, "calls": studied.num_latents if noisy else float(nfe.mean()), "plain": studied.plain}
        its = functools.partial(gradient, importance=studied.importance, objective=studied.objective)
        entry |= measure_gradients(its, params, rolled, drawn, exact)
        if studied.plain:
            once = studied.estimator == "cuts" and not studied.window
            entry |= measure_distributions(compare, params, rolled, drawn, hidden, once)
        found.append(entry)
        after_each()
    measured = {
        "rows": len(nfe) // batches, "prompts": prompts, "batches": batches, "draws": draws, "parameters": exact.shape[1],
        "accuracy": float(np.mean([batch.accuracy for batch in rolled])), "reward": float(np.mean([batch.reward for batch in rolled])),
        "nfe": float(nfe.mean()), "seconds": time.monotonic() - began,
    }  # fmt: skip
    return {"measured": measured, "estimators": found}


# --- what is written ---

Cell = dict[str, Any]  # {value, interval} of `jackknife`
GRADIENT = {  # statistic -> head of its column
    "cosine": "cosine", "norm": "norm", "noise": "noise", "variance": "variance", "expected_cosine": "expected cosine",
    "kl": "KL (nats)",
}  # fmt: skip


def text_of(cell: Cell | None, at: Any = ()) -> str:
    """'0.912 ± 0.013' of a statistic (of its element `at`); '' where there is none."""
    if cell is None:
        return ""
    value, high = np.asarray(cell["value"])[at], np.asarray(cell["interval"][1])[at]
    return f"{value:.3g} ± {high - value:.2g}"


def tables(found: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """{title: (heads of the columns, rows)} of what `study` found."""
    every = found["estimators"]
    read, weighed = [entry for entry in every if entry["plain"]], [entry for entry in every if entry["name"] == "cuts"]

    def rows(entries, cells):
        return [[entry["name"], f"{entry['calls']:.3g}", *cells(entry)] for entry in entries]

    first, steps = ["estimator", "calls"], [f"{i / BINS:.1f}-{(i + 1) / BINS:.1f}" for i in range(BINS)]
    caps = [*first, *(f"C = {cap:g}" for cap in CAPS)]
    by_cap = {
        title: (caps, rows(weighed, lambda e, name=name: [text_of(e[name], i) for i in range(len(CAPS))]))
        for title, name in (("Effective sample size of the weights", "ess"), ("Share of the weights truncated", "truncated"))
    }
    return {
        "Policy gradient": ([*first, *GRADIENT.values()], rows(every, lambda e: [text_of(e.get(name)) for name in GRADIENT])),
        "KL by denoising step (relative position, nats)": (
            [*first, *steps], rows(read, lambda e: [text_of(e["by_step"], i) for i in range(BINS)]),
        ),
        "Surrogate gap": ([*first, "mean |log pihat - log pi|"], rows(weighed, lambda e: [text_of(e["gap"])])),
    } | by_cap  # fmt: skip


MEANING = """Cosine and norm are those of an estimator's mean gradient to the exact mean gradient on the same rows, freed of the noise of a
finite number of draws; noise is the variance (trace of the covariance) of one batch's gradient given its rows, variance that over batches,
both over the squared norm of the exact mean gradient; expected cosine is that of the expected gradients, from products of different batches
alone. KL(p(. | c, z_sigma[k]) || p(. | c, z_read)) is a mean over what is read. ± is half a 95% interval (jackknife over batches)."""


def measured_on(found: dict[str, Any]) -> str:
    """A line: on what it was measured."""
    return (
        "{task}, seed {seed}: {batches} batches of {rows} rows ({prompts} prompts), {draws} draws of an estimator's noise; "
        "{parameters} parameters, accuracy of the rollouts {accuracy:.3f}, NFE {nfe:.2f}; {seconds:.0f} s"
    ).format(**found["measured"], task=found["config"]["task"]["name"], seed=found["config"]["seed"])


def markdown(found: dict[str, Any]) -> str:
    """study.md."""
    parts = ["# Estimators of the likelihood against exact gradients", f"`{found['command']}`", measured_on(found), MEANING]
    for title, (heads, rows) in tables(found).items():
        lines = [heads, ["---"] * len(heads), *rows]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _figure(path: str, draw: Callable[[Any], None], panels: int = 1) -> None:
    """Writes a picture of `panels` axes side by side, which `draw` fills."""
    from matplotlib.figure import Figure  # here, as in diffpo_jax.pareto

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots(1, panels)
    draw(axes)
    for each in np.atleast_1d(axes):
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def _curve(axes: Any, x: Any, cell: Cell, label: str) -> None:
    value, high = np.asarray(cell["value"]), np.asarray(cell["interval"][1])
    axes.errorbar(x, value, high - value, fmt="o-", ms=3, lw=1.2, elinewidth=0.7, capsize=2, label=label)


def plot(folder: str, found: dict[str, Any]) -> None:
    """study-gradient.png, study-kl.png and study-cap.png in `folder`."""
    every = found["estimators"]
    weighed = [entry for entry in every if entry["name"] == "cuts"]

    def gradient(axes):
        for number, name in enumerate(dict.fromkeys(entry["name"] for entry in every)):
            mine = [entry for entry in every if entry["name"] == name]
            cell = {"value": [e["cosine"]["value"] for e in mine], "interval": (None, [e["cosine"]["interval"][1] for e in mine])}
            _curve(axes, [e["calls"] * 1.015 ** (number - 4) for e in mine], cell, name)  # side by side, that bars do not hide each other
        axes.set(xlabel="denoiser calls a row", ylabel="cosine to the exact gradient", xscale="log", xticks=CALLS, xticklabels=CALLS)
        axes.minorticks_off()
        axes.set_ylim(-0.5, 1.5)  # intervals of the noisiest are longer
        axes.figure.legend(loc="outside right upper", fontsize=8)

    def kl(axes):
        for entry in every:
            if entry["name"] in ("cuts", "cuts, prompts masked") or (entry["name"], entry["calls"]) == ("elbo", max(CALLS)):
                _curve(axes, (np.arange(BINS) + 0.5) / BINS, entry["by_step"], f"{entry['name']}, {entry['calls']:g}")
        axes.set(xlabel="denoising step, relative position sigma / T", ylabel="KL to the distribution drawn from (nats)")
        axes.figure.legend(loc="outside right upper", fontsize=8, title="estimator, calls", title_fontsize=8)

    def cap(axes):
        for entry in weighed:
            for each, name in zip(axes, ("ess", "truncated"), strict=True):
                _curve(each, np.arange(len(CAPS)), entry[name], f"{entry['calls']:g} calls")
        for each, name in zip(axes, ("effective sample size", "share truncated"), strict=True):
            each.set(xlabel="cap C", ylabel=name, xticks=range(len(CAPS)), xticklabels=[f"{c:g}" for c in CAPS], ylim=(0, 1.02))
        axes[0].legend(fontsize=8)

    _figure(os.path.join(folder, "study-gradient.png"), gradient)
    _figure(os.path.join(folder, "study-kl.png"), kl)
    _figure(os.path.join(folder, "study-cap.png"), cap, panels=2)


def write(folder: str, found: dict[str, Any]) -> None:
    """study.json, study.md and the pictures; makes `folder`."""
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(os.path.join(folder, "study.json"), found)
    (epath.Path(folder) / "study.md").write_text(markdown(found))
    plot(folder, found)


def print_study(found: dict[str, Any], console: Console) -> None:
    """Prints the main table."""
    title, (heads, rows) = next(iter(tables(found).items()))
    table = Table(title=title, caption=measured_on(found), title_justify="left", caption_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def run(config: Any, workdir: str, folder: str, command: str = "", **sizes: int) -> dict[str, Any]:
    """`study` of the base model of `workdir`, written to `folder` and printed; `sizes`: its prompts, batches and draws.

    Raises:
      ValueError, RuntimeError: as `train`; or for fewer batches or draws than intervals need.
    """
    if jax.process_count() > 1:
        raise ValueError("the study runs on one host: start it there alone, without distributed.initialize")
    with run_session(config, workdir) as (parts, writer, stopped):
        params = train_base(parts, workdir, writer, stopped)
        with progress("study", len(ESTIMATORS_STUDIED) + 1) as advance:

            def after_each(**shown):
                advance(**shown)
                exit_if(stopped())

            found = {"command": command, "config": config.to_dict()} | study(parts, params, after_each=after_each, **sizes)
        write(folder, found)
        console = Console()
        print_study(found, Console(width=max(console.width, 150)))
        return found


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    folder, command = given.out or os.path.join(given.workdir, "study"), shlex.join(["python", "-m", "diffpo_jax.study", *sys.argv[1:]])
    with command_line.errors_said():
        run(command_line.read_config(), given.workdir, folder, command, prompts=given.prompts, batches=given.batches, draws=given.draws)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A file of configs/, with a preset after a colon.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run, whose base model is studied; it is trained if it is not there.")
    flags.DEFINE_string("out", None, "Folder of what is written; default: study in the workdir.")
    flags.DEFINE_integer("prompts", 8, "Problems in a batch, each with rl.group_size rows.", lower_bound=1)
    flags.DEFINE_integer("batches", 8, "Independent batches, which the intervals are over.", lower_bound=3)
    flags.DEFINE_integer("draws", 2, "Draws of an estimator's noise on the same rows.", lower_bound=2)
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=command_line.parse)
