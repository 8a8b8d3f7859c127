"""What a run ends with: summary.json and the table a person reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table

from diffpo_jax import pareto
from diffpo_jax.checkpoint import write_json
from diffpo_jax.evaluate import Evaluation

QUANTILES = (5, 25, 50, 75, 95)  # percent
HISTOGRAM_BINS = 8


def point(correct: np.ndarray, nfe: np.ndarray, tokens: np.ndarray, seconds: float, seed: int = 0) -> dict[str, Any]:
    """One evaluation in a summary.

    Args:
      correct: [n] in [0, 1].
      nfe: [n] calls of the denoiser.
      tokens: [n] response tokens, up to and including the first EOS.
      seconds: wall time of the evaluation.
      seed: of the interval's bootstrap.
    """
    return {
        "accuracy": float(np.mean(correct)),
        "interval": list(pareto.accuracy_interval(correct, seed)),
        "nfe": float(np.mean(nfe)),
        "tokens_per_call": float(np.sum(tokens) / np.sum(nfe)),
        "seconds": float(seconds),
    }


def threshold_statistics(thresholds: np.ndarray) -> dict[str, Any]:
    """{mean, std, quantiles (of `QUANTILES`), histogram: {edges, counts}} of the thresholds [n] > 0; the bins are equal in log."""
    gammas = np.asarray(thresholds, np.float64)
    low, high = gammas.min(), gammas.max()
    edges = np.geomspace(low, high, HISTOGRAM_BINS + 1) if high > low * 1.001 else np.array([low / 1.001, high * 1.001])
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # rounding must not lose the extreme ones
    return {
        "mean": float(gammas.mean()),
        "std": float(gammas.std()),
        "quantiles": np.percentile(gammas, QUANTILES).tolist(),
        "histogram": {"edges": edges.tolist(), "counts": np.histogram(gammas, edges)[0].tolist()},
    }


def as_curve(evaluations: Mapping[float, Evaluation]) -> pareto.Curve:
    """Evaluations at thresholds as arrays."""
    values = list(evaluations.values())
    return pareto.Curve(np.array(list(evaluations)), np.stack([e.correct for e in values]), np.stack([e.nfe for e in values]))


def curve_points(evaluations: Mapping[float, Evaluation]) -> list[dict[str, Any]]:
    """A summary's "curve": one `point` a threshold."""
    return [{"gamma": gamma} | point(e.correct, e.nfe, e.tokens, e.seconds) for gamma, e in evaluations.items()]


def summarise(
    task: str, seed: int, before: Mapping[float, Evaluation], after: Mapping[float, Evaluation], learned: Evaluation
) -> dict[str, Any]:
    """The summary (see `write_summary`) of evaluations before and after training and at the learned thresholds, without the costs."""
    operating = point(learned.correct, learned.nfe, learned.tokens, learned.seconds)
    return {
        "task": task,
        "seed": seed,
        "base": {"curve": curve_points(before)},
        "trained": {"curve": curve_points(after), "operating_point": operating | {"thresholds": threshold_statistics(learned.threshold)}},
        "comparison": pareto.compare(as_curve(before), learned.correct, learned.nfe, as_curve(after)),
    }


def write_summary(workdir: str | Path, summary: Mapping[str, Any]) -> Path:
    """Writes `workdir/summary.json` in one go and returns its path.

    A summary is:
      task, seed
      base: {"curve": [{"gamma", "accuracy", "interval", "nfe", "tokens_per_call", "seconds"}, ...]}; one entry a threshold, see `point`
      trained: {"curve": [likewise], "operating_point": {the same without gamma, and "thresholds": see `threshold_statistics`}};
        absent where only the base model was evaluated
      comparison: what `pareto.compare` returns; absent likewise
      denoiser_calls: of training, rows x calls
      seconds: {phase: wall time, of the process in which it took longest}
    Intervals are (low, high) at 95%; NFE is calls of the denoiser per response; seconds are wall time. What is not finite is a string.
    """
    path = Path(workdir) / "summary.json"
    write_json(path, summary)
    return path


def longest_seconds(workdir: str | Path, seconds: Mapping[str, float]) -> dict[str, float]:
    """Each phase's wall time, or that of an earlier process in `workdir` where it was longer: one that resumes skips what is done."""
    path = Path(workdir) / "summary.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it was cut off: it is written anew
        earlier = {}
    return {phase: max(value, earlier.get(phase, 0.0)) for phase, value in seconds.items()}


def table(summary: Mapping[str, Any]) -> Group:
    """The summary (see `write_summary`) as something rich prints: before and after, the gains, the learned thresholds."""
    base = summary["base"]["curve"]
    rows = Table(title=f"{summary['task']}, seed {summary['seed']}", title_justify="left")
    rows.add_column("")
    for name in ("accuracy (95%)", "NFE", "tokens/call", "wall time"):
        rows.add_column(name, justify="right")
    if "trained" not in summary:
        for entry in base:
            rows.add_row(f"base, γ = {entry['gamma']:g}", *_cells(entry))
        return Group(rows)
    after, compared = summary["trained"]["operating_point"], summary["comparison"]
    closest = nearest(summary)
    rows.add_row(f"base, γ = {closest['gamma']:g}", *_cells(closest))
    rows.add_row("base, at the same NFE", _percent(compared["base_accuracy_at_same_nfe"]), f"{compared['nfe']:.2f}", "", "")
    thresholds = after["thresholds"]
    label = "learned γ" if thresholds["std"] else f"γ = {thresholds['mean']:g}"
    rows.add_row(f"trained, {label}", *_cells(after), style="bold")
    costs = [_costs(summary)] if "seconds" in summary else []
    return Group(rows, *_gains(compared), *(_thresholds(thresholds) if thresholds["std"] else []), *costs)


def nearest(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """The base model's `point` with the most nearly as many calls as the trained model takes at its operating point."""
    curve, nfe = summary["base"]["curve"], summary["trained"]["operating_point"]["nfe"]
    return curve[pareto.nearest([entry["nfe"] for entry in curve], nfe)]


def print_report(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints `table(summary)`; a summary read back from summary.json will do."""
    (console or Console()).print(table(summary), highlight=False)


def _cells(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    low, high = entry["interval"]
    accuracy = f"{_percent(entry['accuracy'])} ({100 * low:.1f}-{100 * high:.1f})"
    return accuracy, f"{entry['nfe']:.2f}", f"{entry['tokens_per_call']:.2f}", f"{entry['seconds']:.1f} s"


def _gains(compared: Mapping[str, Any]) -> list[str]:
    low, high = map(float, compared["gain_interval"])
    lines = [f"accuracy at the same NFE: {100 * compared['gain']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"]
    low, high = map(float, compared["nfe_saving_at_same_accuracy_interval"])
    saving = f"{_percent(compared['nfe_saving_at_same_accuracy'])} ({100 * low:.1f} to {100 * high:.1f})"
    if compared["base_reaches_accuracy"]:
        lines.append(f"NFE saved at the same accuracy: {saving}; the base model needs {compared['base_nfe_at_same_accuracy']:.2f}")
    else:
        lines.append(f"NFE saved at the same accuracy: at least {saving}; the base model never gets there")
    if np.isfinite(float(compared.get("nfe_saving_at_base_accuracy", "NaN"))):
        low, high = map(float, compared["nfe_saving_at_base_accuracy_interval"])
        saving = f"{_percent(compared['nfe_saving_at_base_accuracy'])} ({100 * low:.1f} to {100 * high:.1f})"
        lines.append(f"NFE saved at the base model's accuracy: {saving}; the trained model needs {compared['nfe_for_base_accuracy']:.2f}")
    return lines


def _thresholds(statistics: Mapping[str, Any]) -> list[str]:
    quantiles = ", ".join(f"{q}%: {value:.3g}" for q, value in zip(QUANTILES, statistics["quantiles"], strict=True))
    lines = [f"learned thresholds: mean {statistics['mean']:.3g}, std {statistics['std']:.2g}; quantiles {quantiles}"]
    edges, counts = statistics["histogram"]["edges"], statistics["histogram"]["counts"]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        lines.append(f"  {low:8.3g} to {high:<8.3g} {'█' * round(30 * count / max(counts))} {count}")
    return lines


def _costs(summary: Mapping[str, Any]) -> str:
    seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in summary["seconds"].items())
    return f"denoiser calls in training: {summary['denoiser_calls']:,}; wall time: {seconds}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
