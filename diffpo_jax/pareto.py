"""Accuracy against NFE (calls of the denoiser a response takes): curves over thresholds, their comparison with intervals, the picture.

A fixed threshold gamma gives one point, (mean NFE, accuracy) over the test problems; a grid of them gives a curve. Two models are compared
at equal NFE or at equal accuracy, never at equal gamma: a model that has become more confident unmasks more tokens at the same gamma.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Curve:
    """A model evaluated on the same n problems at K thresholds."""

    gammas: np.ndarray  # [K] float, in the unit of sampler.threshold
    correct: np.ndarray  # [K, n] in [0, 1]: right or wrong, or the share of right samples where a problem was sampled several times
    nfe: np.ndarray  # [K, n] calls of the denoiser

    def __post_init__(self):
        for name in ("gammas", "correct", "nfe"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        if self.gammas.ndim != 1 or self.correct.ndim != 2 or self.correct.shape != self.nfe.shape or len(self.gammas) != len(self.correct):
            shapes = f"gammas {self.gammas.shape}, correct {self.correct.shape}, nfe {self.nfe.shape}"
            raise ValueError(f"a curve needs gammas [K], correct [K, n] and nfe [K, n]; got {shapes}")

    def take(self, problems: np.ndarray) -> "Curve":
        """The curve on these problems, [n'] int."""
        return Curve(self.gammas, self.correct[:, problems], self.nfe[:, problems])


def points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(mean NFE [K'], accuracy [K']) by rising NFE; points of equal NFE become one, at their mean accuracy."""
    nfe, which = np.unique(curve.nfe.mean(1), return_inverse=True)
    accuracy = np.bincount(which, curve.correct.mean(1)) / np.bincount(which)
    return nfe, accuracy


def accuracy_at_nfe(curve: Curve, nfe: float) -> float:
    """Accuracy at a mean NFE: linear between the curve's points; beyond its ends, that of the nearest end."""
    return float(np.interp(nfe, *points(curve)))


def nfe_at_accuracy(curve: Curve, accuracy: float) -> float:
    """The smallest mean NFE at which the curve, linear between its points, reaches `accuracy`.

    NaN if it never does; its smallest NFE if it starts at or above `accuracy`.
    """
    x, y = points(curve)
    reached = np.flatnonzero(y >= accuracy)
    if not len(reached):
        return float("nan")
    i = reached[0]  # all points before it are below, so that the segment that ends in it crosses `accuracy` once
    return float(x[0]) if i == 0 else float(x[i - 1] + (accuracy - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def nearest(nfe: Sequence[float], wanted: float) -> int:
    """Index of the point whose NFE is nearest to `wanted` in ratio, the first of equals."""
    return int(np.argmin(np.abs(np.log(np.asarray(nfe, float) / wanted))))


def best_accuracy(nfe: np.ndarray, accuracy: np.ndarray, at_most: float) -> float:
    """The best accuracy that a curve, linear between its points, has at a mean NFE of at most `at_most`.

    Args:
      nfe: [K] mean NFE of the points, in any order.
      accuracy: [K].
      at_most: calls.

    Returns:
      NaN if all points need more calls.
    """
    order = np.lexsort((accuracy, nfe))
    x, y = np.asarray(nfe, float)[order], np.asarray(accuracy, float)[order]
    if not len(x) or x[0] > at_most:
        return float("nan")
    return float(max(y[x <= at_most].max(), np.interp(at_most, x, y)))


def hypervolume(curve_nfe: np.ndarray, curve_accuracy: np.ndarray, max_nfe: float) -> float:
    """How much of the plane of accuracy and NFE a curve dominates: 1 for all problems right in one call, 0 for none right.

    It is the area under the best accuracy of a point that needs at most x calls, for x from 1 to `max_nfe`, as a share of `max_nfe` - 1.
    Where no point needs so few calls the accuracy is 0; points are not joined by lines.

    Args:
      curve_nfe: [K] mean NFE of the points, in any order; dominated points and those beyond `max_nfe` add nothing.
      curve_accuracy: [K].
      max_nfe: the most calls a response can take, above 1.
    """
    order = np.argsort(curve_nfe, kind="stable")
    best = np.maximum.accumulate(np.asarray(curve_accuracy, float)[order])
    edges = np.clip(np.append(np.asarray(curve_nfe, float)[order], max_nfe), 1.0, max_nfe)
    return float(np.sum(np.diff(edges) * best) / (max_nfe - 1))


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95% interval of Student's t) of independent values, say of seeds; the width of one value is NaN."""
    from scipy import special  # here, because it takes long to import, and a run does not need it

    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    quantile = special.stdtrit(len(values) - 1, 0.975)
    return float(values.mean()), float(quantile * values.std(ddof=1) / len(values) ** 0.5)


def bootstrap(fn: Callable[[np.ndarray], Any], n: int, seed: int = 0, samples: int = 1000) -> np.ndarray:
    """The 95% percentile interval of statistics of n problems (or seeds), under resampling of them with replacement.

    Args:
      fn: from the drawn problems, [n] int, to a number or a vector [d]; all that it compares is resampled together (paired).
      n: problems.
      seed: of the draws.
      samples: draws.

    Returns:
      (low, high), [2] or [2, d]. Quantiles are rounded outwards to drawn values, so that infinite values do no harm.
    """
    rng = np.random.default_rng(seed)
    values = np.array([fn(rng.integers(0, n, n)) for _ in range(samples)])
    low, high = np.quantile(values, 0.025, axis=0, method="lower"), np.quantile(values, 0.975, axis=0, method="higher")
    return np.array([low, high])


def accuracy_interval(correct: np.ndarray, seed: int = 0, samples: int = 1000) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of `correct` [n]."""
    correct = np.asarray(correct, np.float64)
    low, high = bootstrap(lambda problems: correct[problems].mean(), len(correct), seed, samples)
    return float(low), float(high)


def compare(
    base: Curve,
    trained_correct: np.ndarray,
    trained_nfe: np.ndarray,
    trained: Curve | None = None,
    seed: int = 0,
    samples: int = 1000,
) -> dict[str, Any]:
    """The trained model at its learned operating point against the base model's curve, on the same n problems.

    Args:
      base: the base model's curve.
      trained_correct: [n], at the operating point.
      trained_nfe: [n], likewise.
      trained: the trained model's curve over fixed thresholds; None leaves out the fields marked (*).
      seed, samples: of the bootstrap over problems; every `*_interval` is its (low, high) at 95%.

    Returns:
      accuracy, nfe: of the operating point.
      base_accuracy_at_same_nfe: interpolated; gain = accuracy - that; gain_interval.
      base_nfe_at_same_accuracy: the NFE the base model needs for `accuracy`, NaN if it never gets there (`base_reaches_accuracy` False);
        nfe_saving_at_same_accuracy = 1 - nfe / that, and its _interval. Where the base model never gets there, its largest NFE stands
        in: the saving is then understated.
      nfe_for_base_accuracy (*): the NFE the trained model needs for `base_accuracy_at_same_nfe`, which the base model has at `nfe`;
        nfe_saving_at_base_accuracy (*) = 1 - that / nfe, and its _interval; NaN if its curve never gets there (-inf in the interval).
    """
    correct, nfe = np.asarray(trained_correct, np.float64), np.asarray(trained_nfe, np.float64)
    n = base.correct.shape[1]
    if correct.shape != (n,) or nfe.shape != (n,) or (trained is not None and trained.correct.shape[1] != n):
        raise ValueError(f"base and trained model must be evaluated on the same problems: {n} and {correct.shape}, {nfe.shape}")

    def statistics(problems: np.ndarray) -> np.ndarray:
        """(gain, saving at the same accuracy, saving at the base's accuracy)."""
        base_, a, t = base.take(problems), correct[problems].mean(), nfe[problems].mean()
        base_accuracy = accuracy_at_nfe(base_, t)
        base_nfe = nfe_at_accuracy(base_, a)
        base_nfe = points(base_)[0][-1] if np.isnan(base_nfe) else base_nfe
        needed = np.inf if trained is None else nfe_at_accuracy(trained.take(problems), base_accuracy)
        return np.array([a - base_accuracy, 1 - t / base_nfe, -np.inf if np.isnan(needed) else 1 - needed / t])

    value = statistics(np.arange(n))
    intervals = bootstrap(statistics, n, seed, samples).T.tolist()
    accuracy, mean_nfe = float(correct.mean()), float(nfe.mean())
    base_accuracy, base_nfe = accuracy_at_nfe(base, mean_nfe), nfe_at_accuracy(base, accuracy)
    result = {
        "accuracy": accuracy,
        "nfe": mean_nfe,
        "base_accuracy_at_same_nfe": base_accuracy,
        "gain": float(value[0]),
        "gain_interval": intervals[0],
        "base_reaches_accuracy": bool(np.isfinite(base_nfe)),
        "base_nfe_at_same_accuracy": base_nfe,
        "nfe_saving_at_same_accuracy": float(value[1]),
        "nfe_saving_at_same_accuracy_interval": intervals[1],
    }
    if trained is not None:
        result |= {
            "nfe_for_base_accuracy": nfe_at_accuracy(trained, base_accuracy),
            "nfe_saving_at_base_accuracy": float(value[2]) if np.isfinite(value[2]) else float("nan"),
            "nfe_saving_at_base_accuracy_interval": intervals[2],
        }
    return result


def plot(
    path: str | Path,
    base: Curve,
    trained: Curve | None = None,
    operating: Mapping[str, Any] | None = None,
    title: str = "",
    seed: int = 0,
) -> None:
    """Writes the picture: both curves with 95% bands, the gamma at each point, the operating point as a star.

    Args:
      path: a .png (or any format matplotlib knows); folders above it are made.
      base: the base model's curve.
      trained: the trained model's curve, or None.
      operating: {"accuracy", "interval": (low, high), "nfe"} of the learned thresholds, or None.
      title: above the picture.
      seed: of the intervals' bootstrap.
    """
    if jax.process_index() != 0:
        return
    from matplotlib.figure import Figure  # here, because it takes as long to import as all else but JAX, and a run plots at its end

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    _draw_curve(axes, base, "base model", "tab:blue", above=False, seed=seed)
    if trained is not None:
        _draw_curve(axes, trained, "trained model", "tab:red", above=True, seed=seed)
    if operating is not None:
        x, y, (low, high) = operating["nfe"], operating["accuracy"], operating["interval"]
        axes.errorbar(x, y, [[max(y - low, 0)], [max(high - y, 0)]], color="black", capsize=3, zorder=4)
        axes.plot(x, y, "*", color="gold", mec="black", ms=17, zorder=5, label="trained model, learned thresholds")
    axes.set(xlabel="NFE: denoiser calls per response (mean)", ylabel="accuracy", title=title)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.margins(x=0.08, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title="numbers at the points: threshold γ", title_fontsize="small")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _draw_curve(axes: Any, curve: Curve, label: str, color: str, above: bool, seed: int) -> None:
    """One curve; thresholds whose points (nearly) coincide share one annotation."""
    order = np.argsort(curve.nfe.mean(1), kind="stable")
    x, y = curve.nfe.mean(1)[order], curve.correct.mean(1)[order]
    low, high = np.array([accuracy_interval(curve.correct[i], seed) for i in order]).T
    axes.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
    error = np.maximum([y - low, high - y], 0)
    axes.errorbar(x, y, error, fmt="o-", color=color, capsize=2, ms=4, lw=1.4, elinewidth=0.7, label=label)
    near_x, near_y = 0.03 * max(x[-1], 1.0), 0.05 * max(y.max(), 0.1)  # closer than this, two annotations would overlap
    groups: list[list[int]] = []
    for i in range(len(x)):
        if groups and x[i] - x[groups[-1][0]] < near_x and abs(y[i] - y[groups[-1][0]]) < near_y:
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        text = ", ".join(f"{gamma:g}" for gamma in sorted(curve.gammas[order][group]))
        xy = x[group].mean(), y[group].max() if above else y[group].min()
        offset, vertical = ((-3, 6), "bottom") if above else ((3, -6), "top")
        align = "right" if above else "left"
        axes.annotate(text, xy, offset, textcoords="offset points", color=color, fontsize=8, ha=align, va=vertical)
