"""The report of an experiment, from its lines alone (see `experiment_results`): OUT/SUITE.md and pictures beside it.

Numbers are means over seeds with two 95% intervals: the percentile bootstrap over seeds in brackets, and half the width of Student's t.
With few seeds the bootstrap is too narrow; t is not, where seeds are about normal.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffpo_jax import experiment_results as results
from diffpo_jax import pareto

REFERENCE = "d1"  # the algorithm that others are compared with
Line = Mapping[str, Any]  # of OUT/SUITE.jsonl


class Group(NamedTuple):
    """What cells that differ in the seed alone share."""

    task: str
    algorithm: str
    mode: str
    overrides: tuple[tuple[str, Any], ...]

    @property
    def label(self) -> str:
        """'d1, joint'; 'diffpo, fixed, importance_cap=2'."""
        shown = ((field.rpartition(".")[2], f"{value:g}" if isinstance(value, float) else value) for field, value in self.overrides)
        overrides = [f"{name}={value}" for name, value in shown]
        return ", ".join([*filter(None, [self.algorithm]), self.mode, *overrides])


class Column(NamedTuple):
    """A measure as a table shows it."""

    title: str
    scale: float
    digits: str  # format; with "z" a zero is never shown as -0


COLUMNS = {
    "accuracy": Column("accuracy, %", 100, ".1f"),
    "nfe": Column("NFE", 1, ".2f"),
    "gain": Column("gain at that NFE, points", 100, "+z.1f"),
    "nfe_saved": Column("NFE saved, %", 100, ".1f"),
    "hypervolume": Column("hypervolume, %", 100, ".1f"),
    "best_at_base_nfe": Column("accuracy at the base's NFE, %", 100, ".1f"),
    "nfe_at_base_best": Column("NFE at the base's accuracy", 1, ".2f"),
    "over_single_threshold": Column("learned γ over one γ, points", 100, "+z.1f"),
    "denoiser_calls": Column("denoiser calls, thousands", 1e-3, ",.0f"),
    "flops": Column("TFLOPs", 1e-12, ",.3g"),
    "seconds": Column("seconds of RL", 1, ",.0f"),
}
RESULTS = ("accuracy", "nfe", "gain", "nfe_saved", "hypervolume", "best_at_base_nfe", "nfe_at_base_best", "over_single_threshold")
COSTS = ("denoiser_calls", "flops", "seconds")
COMPARED = ("accuracy", "nfe", "gain", "hypervolume", "best_at_base_nfe", "nfe_at_base_best")
MEANING = """
Accuracy and NFE (denoiser calls per response): greedy, on the test problems, at the learned thresholds or, in the mode fixed, at
`sampler.threshold`. Gain: accuracy minus the base model's at the same NFE. NFE saved: how many fewer calls the trained model needs for
that accuracy of the base model. Hypervolume: the area under the best accuracy that at most x calls reach at any one γ, over x from 1 to
the response's length, as a share of the whole. Accuracy at the base's NFE: the trained model's best with no more calls than the base
model takes where it is most accurate; NFE at the base's accuracy: the fewest calls with which the trained model is as accurate as that.
Learned γ over one γ: accuracy at the learned thresholds minus that of the best single γ with no more calls, on the trained model's own
curve. FLOPs: of RL, the fewest that its passes need.

Mean over seeds [95% bootstrap interval over seeds] ± half width of the 95% t interval; (n of N) where it is not defined for all seeds.
Seeds are those of RL: base model and test problems are the same in all.
""".strip()


def measures(line: Line) -> dict[str, float]:
    """The numbers of a cell, named as in `COLUMNS`; NaN where one is not defined."""
    point, compared, cost = line["trained"]["operating_point"], line["comparison"], line["cost"]
    (gammas, accuracy, nfe), (_, base_accuracy, base_nfe) = np.array(line["trained"]["curve"]).T, np.array(line["base"]["curve"]).T
    curve = pareto.Curve(gammas, accuracy[:, None], nfe[:, None])
    best, at_base_best = most_accurate(base_accuracy, base_nfe)
    single = pareto.best_accuracy(nfe, accuracy, point["nfe"]) if line["cell"]["mode"] != "fixed" else math.nan
    return {
        "accuracy": point["accuracy"],
        "nfe": point["nfe"],
        "gain": float(compared["gain"]),
        "nfe_saved": float(compared["nfe_saving_at_base_accuracy"]),
        "hypervolume": pareto.hypervolume(nfe, accuracy, line["max_nfe"]),
        "best_at_base_nfe": pareto.best_accuracy(nfe, accuracy, at_base_best),
        "nfe_at_base_best": pareto.nfe_at_accuracy(curve, best),
        "over_single_threshold": point["accuracy"] - single,
        "denoiser_calls": cost["denoiser_calls"],
        "flops": cost["flops"],
        "seconds": cost["seconds"]["rl"],
    }


def most_accurate(accuracy: np.ndarray, nfe: np.ndarray) -> tuple[float, float]:
    """(accuracy, NFE) of a curve's most accurate point, of several the one with the fewest calls; both [K]."""
    return float(accuracy.max()), float(nfe[accuracy == accuracy.max()].min())


# --- over seeds ---


@dataclasses.dataclass(frozen=True)
class Statistic:
    """Of n values, one a seed; those that are not finite do not count. Without values all are NaN."""

    mean: float
    low: float  # of the bootstrap interval
    high: float
    half: float  # half width of the t interval, NaN for one value
    n: int


def statistic(values: Sequence[float]) -> Statistic:
    """Mean and 95% intervals."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return Statistic(math.nan, math.nan, math.nan, math.nan, 0)
    low, high = pareto.bootstrap(lambda seeds: values[seeds].mean(), len(values))
    mean, half = pareto.t_interval(values)
    return Statistic(mean, float(low), float(high), half, len(values))


def group(lines: Iterable[Line]) -> dict[Group, dict[int, Line]]:
    """{group: {seed: line}} of the cells that are done."""
    groups: dict[Group, dict[int, Line]] = {}
    for line in lines:
        cell = line["cell"]
        if line["status"] == "done":
            key = Group(cell["task"], cell["algorithm"], cell["mode"], tuple(cell["overrides"].items()))
            groups.setdefault(key, {})[cell["seed"]] = line
    return groups


def aggregate(seeds: Mapping[int, Line]) -> dict[str, Statistic]:
    """A statistic of each measure, over the seeds of a group."""
    rows = [measures(line) for line in seeds.values()]
    return {name: statistic([row[name] for row in rows]) for name in COLUMNS}


def paired(seeds: Mapping[int, Line], reference: Mapping[int, Line]) -> dict[str, Statistic]:
    """A statistic of each measure's difference to the reference's run of the same seed, over the seeds that both have."""
    rows = [(measures(seeds[seed]), measures(reference[seed])) for seed in seeds if seed in reference]
    return {name: statistic([ours[name] - theirs[name] for ours, theirs in rows]) for name in COLUMNS}


# --- Markdown ---


def write(out: str | Path, suite: str) -> Path:
    """Writes OUT/SUITE.md and, of each task, OUT/SUITE-TASK-{front,calls,ess}.png. Returns the first.

    Raises:
      FileNotFoundError: there is no OUT/SUITE.jsonl.
    """
    source = Path(out) / f"{suite}.jsonl"
    if not source.exists():
        raise FileNotFoundError(f"there are no results in {source}: run the suite first")
    lines = list(results.read(source).values())
    groups = group(lines)
    parts = [f"# {suite}", MEANING]
    for task in dict.fromkeys(key.task for key in groups):
        of_task = {key: seeds for key, seeds in groups.items() if key.task == task}
        pictures = {name: Path(out) / f"{suite}-{task}-{name}.png" for name in ("front", "calls", "ess")}
        plot_fronts(pictures["front"], task, of_task)
        plot_calls(pictures["calls"], task, of_task)
        plot_ess(pictures["ess"], task, of_task)
        parts += [_section(task, of_task), *(f"![{name}]({path.name})" for name, path in pictures.items() if path.exists())]
    parts += _failures(lines)
    path = Path(out) / f"{suite}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _section(task: str, groups: Mapping[Group, Mapping[int, Line]]) -> str:
    """The tables of a task."""
    rows = {key.label: aggregate(seeds) for key, seeds in groups.items()}
    counts = {key.label: len(seeds) for key, seeds in groups.items()}
    parts = [f"## {task}", _base(groups), _table(rows, RESULTS, counts)]
    for mode, title in ((None, f"{REFERENCE} in the same mode"), ("fixed", f"{REFERENCE}, fixed")):
        differences, pairs = {}, {}
        for key, seeds in groups.items():
            reference = key._replace(algorithm=REFERENCE, mode=mode or key.mode)
            if key != reference and (common := seeds.keys() & groups.get(reference, {}).keys()):
                differences[key.label], pairs[key.label] = paired(seeds, groups[reference]), len(common)
        if differences:
            parts += [f"Differences to {title}, seed by seed:", _table(differences, COMPARED, pairs, signed=True)]
    return "\n\n".join([*parts, "Cost of training:", _table(rows, COSTS, counts), "End of training:", _training(groups)])


def _table(rows: Mapping[str, Mapping[str, Statistic]], names: Sequence[str], counts: Mapping[str, int], signed: bool = False) -> str:
    columns = [COLUMNS[name] for name in names]
    if signed:
        columns = [column._replace(digits=f"+z{column.digits.lstrip('+z')}") for column in columns]
    cells = [
        [label, str(counts[label]), *(_shown(row[name], column, counts[label]) for name, column in zip(names, columns, strict=True))]
        for label, row in rows.items()
    ]
    return _markdown(["", "seeds", *(column.title for column in columns)], cells)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _shown(value: Statistic, column: Column, seeds: int) -> str:
    """'39.1 [36.0, 41.2] ± 2.5'; '39.1' of one seed; '' of none."""
    if not value.n:
        return ""
    mean, low, high, half = (column.scale * number for number in (value.mean, value.low, value.high, value.half))
    text = f"{mean:{column.digits}}"
    if value.n > 1:
        text += f" [{low:{column.digits}}, {high:{column.digits}}] ± {half:{column.digits.lstrip('+z')}}"
    return text if value.n == seeds else f"{text} ({value.n} of {seeds})"


def _base(groups: Mapping[Group, Mapping[int, Line]]) -> str:
    """A sentence on the base model: its best accuracy, the NFE of it and its hypervolume."""
    _, accuracy, calls = np.array(_base_curve(groups)).T
    best, nfe = most_accurate(accuracy, calls)
    max_nfe = next(line["max_nfe"] for seeds in groups.values() for line in seeds.values())
    volume = pareto.hypervolume(calls, accuracy, max_nfe)
    return f"Base model: best accuracy {100 * best:.1f}%, at NFE {nfe:.2f}; hypervolume {100 * volume:.1f}%."


def _base_curve(groups: Mapping[Group, Mapping[int, Line]]) -> list[list[float]]:
    """Of the base model, which all cells of a task share."""
    return next(line["base"]["curve"] for seeds in groups.values() for line in seeds.values())


def _training(groups: Mapping[Group, Mapping[int, Line]]) -> str:
    """Means over seeds of the metrics at the end of training."""
    rows = []
    for key, seeds in groups.items():
        known = [line["training"] for line in seeds.values()]
        means = [np.mean([each[name] for each in known]) if all(name in each for each in known) else None for name in results.TRAINING]
        rows.append([key.label, *("" if mean is None else f"{mean:.3g}" for mean in means)])
    return _markdown(["", *results.TRAINING], rows)


def _failures(lines: Iterable[Line]) -> list[str]:
    failed = [line for line in lines if line["status"] == "failed"]
    return ["## Failed", *(f"    {line['command']}\n\n```\n{line['error']}\n```" for line in failed)] if failed else []


# --- pictures ---


def plot_fronts(path: Path, task: str, groups: Mapping[Group, Mapping[int, Line]]) -> None:
    """Accuracy against NFE at each γ, means over seeds; some γ are written beside their points, stars are operating points."""

    def draw(axes):
        _draw_front(axes, [_base_curve(groups)], "base model", "black", "-")
        for (key, seeds), (color, style) in zip(groups.items(), _styles(groups), strict=True):
            _draw_front(axes, [line["trained"]["curve"] for line in seeds.values()], key.label, color, style)
            points = [line["trained"]["operating_point"] for line in seeds.values()]
            x, y = (np.mean([point[name] for point in points]) for name in ("nfe", "accuracy"))
            axes.plot(x, y, "*", color=color, mec="black", mew=0.5, ms=11, zorder=5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _name_lines(axes)

    _plot(path, f"{task}: numbers at points are γ, stars operating points", "NFE: denoiser calls per response", draw)


def _draw_front(axes: Any, curves: Sequence[Sequence[Sequence[float]]], label: str, color: Any, style: str) -> None:
    gammas, accuracy, nfe = np.mean(curves, axis=0).T
    axes.plot(nfe, accuracy, marker=".", ms=4, lw=1.1, ls=style, color=color, label=label)
    for i in range(0, len(gammas), 5):
        axes.annotate(f"{gammas[i]:g}", (nfe[i], accuracy[i]), (2, 2), textcoords="offset points", fontsize=6, color=color)


def plot_calls(path: Path, task: str, groups: Mapping[Group, Mapping[int, Line]]) -> None:
    """Accuracy at the operating point against the denoiser calls of training: mean over seeds and the band of the t interval."""

    def draw(axes):
        for (key, seeds), (color, style) in zip(groups.items(), _styles(groups), strict=True):
            calls, accuracy = progress_on_grid([line["progress"] for line in seeds.values()])
            mean, half = np.array([pareto.t_interval(values) for values in accuracy.T]).T
            axes.plot(calls, mean, ls=style, color=color, lw=1.3, label=key.label)
            if len(seeds) > 1:
                axes.fill_between(calls, mean - half, mean + half, color=color, alpha=0.1, lw=0)
        _name_lines(axes)

    _plot(path, f"{task}: accuracy at the operating point in training", "denoiser calls of training", draw)


def progress_on_grid(runs: Sequence[Sequence[Sequence[float]]], points: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Runs over seeds, which spend different numbers of calls in a step, at the same numbers of calls.

    Args:
      runs: of each of n seeds [[step, denoiser calls, accuracy, NFE], ...].
      points: of the grid, over the calls at which all runs have been evaluated.

    Returns:
      (denoiser calls [points], accuracy [n, points], linear between evaluations).
    """
    runs = [np.array(run, float) for run in runs]
    grid = np.linspace(max(run[0, 1] for run in runs), min(run[-1, 1] for run in runs), points)
    return grid, np.stack([np.interp(grid, run[:, 1], run[:, 2]) for run in runs])


def plot_ess(path: Path, task: str, groups: Mapping[Group, Mapping[int, Line]]) -> None:
    """A histogram a row: the training steps of all seeds by the effective sample size of their weights. Groups that have none,
    as of the sampler alone, are left out; where no group has any there is no picture."""
    counts = {key.label: np.sum([line["ess"] for line in seeds.values()], axis=0) for key, seeds in groups.items()}
    counts = {label: count for label, count in counts.items() if count.any()}
    if not counts:
        return

    def draw(axes):
        shares = np.array([count / count.sum() for count in counts.values()])
        edges = np.linspace(0, 1, results.ESS_BINS + 1)
        mesh = axes.pcolormesh(edges, np.arange(len(shares) + 1), np.where(shares > 0, shares, np.nan), cmap="viridis_r")
        axes.set_yticks(np.arange(len(shares)) + 0.5, list(counts), fontsize=7)
        axes.invert_yaxis()
        axes.figure.colorbar(mesh, format=_percent, label="share of the steps")

    _plot(path, f"{task}: effective sample size of the truncated weights", "(Σ w)² / (n Σ w²), n tokens of an update", draw)


def _name_lines(axes: Any) -> None:
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(_percent)
    axes.legend(fontsize=7)


def _percent(share: float, _: Any = None) -> str:
    return f"{100 * share:g}%"


def _styles(groups: Iterable[Group]) -> list[tuple[Any, str]]:
    """(colour, of the algorithm with its overrides; style of line, of the mode) of each group."""
    from matplotlib import colormaps  # here, as in `pareto.plot`

    named = list(dict.fromkeys((key.algorithm, key.overrides) for key in groups))
    colors = colormaps["tab10" if len(named) <= 10 else "tab20"]
    styles = {"fixed": "--", "sampler": ":"}
    return [(colors(named.index((key.algorithm, key.overrides)) % colors.N), styles.get(key.mode, "-")) for key in groups]


def _plot(path: Path, title: str, xlabel: str, draw: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure  # here, as in `pareto.plot`
    from PIL import Image

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_xlabel(xlabel)
    figure.suptitle(title)
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    few_colors = Image.open(picture).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # half the size: pictures are committed
    few_colors.save(path, optimize=True)
