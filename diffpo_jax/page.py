"""What a run learned as one self-contained HTML file: words, table, plots, and how some test problems are denoised.

The page's own text, style and scripts are in web/. Everything that comes from a run reaches it as JSON, which scripts show as text.
"""

import base64
import hashlib
import html
import json
import os
import shlex
import string
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import default
from diffpo_jax import denoisings, report, storage
from diffpo_jax.build import Parts
from diffpo_jax.checkpoint import ABSENT, flat_fields, to_json
from diffpo_jax.evaluate import Evaluation, operating_point

WEB = Path(__file__).with_name("web")
PROBLEMS = 12  # in the viewer
MOST_POINTS = 1000  # of a plot with a point a problem
MOST_STEPS = 400  # of a training curve
PARTS = ("hardest third", "middle third", "easiest third")
CHARTS = (  # title, unit ("%" = of a share), phase of metrics.jsonl and name there; the same of the test problems, if any
    ("reward", "", ("rl", "reward"), None),
    ("accuracy", "%", ("rl", "accuracy"), ("eval", "accuracy")),
    ("calls a response (NFE)", "", ("rl", "nfe"), ("eval", "nfe")),
    ("threshold γ, mean", "", ("rl", "threshold/mean"), ("eval", "threshold")),
    ("effective sample size", "%", ("rl", "weight/ess"), None),
    ("KL to the base model", "nats", ("rl", "kl"), None),
    ("entropy of drawn tokens", "nats", ("rl", "entropy"), None),
    ("gradient norm", "", ("rl", "grad_norm"), None),
    ("base model: loss", "nats", ("sft", "loss"), None),
)


def write_report(
    path: str | os.PathLike,
    parts: Parts,
    workdir: str,
    summary: Mapping[str, Any],
    before: Mapping[float, Evaluation],
    learned: Evaluation,
    base: Any,
    trained: Any,
    threshold_params: Any,
) -> None:
    """Writes the report of a run to `path`, in one go. All hosts take part in the denoising, the first one writes.

    Args:
      path: of the .html file.
      parts: the run's.
      workdir: where its metrics.jsonl is.
      summary: see `report.write_summary`; "step" beside it names an evaluation's checkpoint.
      before: the base model's curve.
      learned: the trained model at its operating point.
      base, trained: the policy's parameters before and after RL.
      threshold_params: those of the threshold network after RL.
    """
    config, count = parts.config, min(PROBLEMS, parts.config.eval.limit or PROBLEMS)
    gamma = report.nearest(summary)["gamma"]
    indices, of_base = denoisings.denoise_test(parts, base, count, threshold=gamma)
    _, of_trained = denoisings.denoise_test(parts, trained, count, **operating_point(config, threshold_params))
    if jax.process_index() != 0:
        return
    content = {
        "table": table(summary),
        "charts": charts(Path(workdir) / "metrics.jsonl"),
        "pareto": pareto_points(summary),
        "thresholds": threshold_points(before, learned),
        "viewer": {"learned": "threshold_params" in operating_point(config, threshold_params), "base_gamma": gamma},
        "problems": [
            {"index": index, "prompt": b["prompt"], "base": b, "trained": t}
            for index, b, t in zip(indices, of_base, of_trained, strict=True)
        ],
        "run": run_facts(config),
    }
    step = f", step {summary['step']}" if "step" in summary else ""
    first, *rest = headline(summary)
    texts = {"kicker": f"diffpo_jax report · {summary['task']}, seed {summary['seed']}{step}", "lead": first, "more": " ".join(rest)}
    text, _ = render("report", f"{summary['task']}, seed {summary['seed']}{step}", texts, content)
    with storage.explained(workdir, "the report"), storage.replacing(path) as file:
        file.write(text)


# --- the page ---


def render(name: str, title: str, texts: Mapping[str, str], content: Any) -> tuple[str, str]:
    """A page of web/ with all that it needs in it.

    Args:
      name: "report" or "serve": web/NAME.html and .js.
      title: of the window.
      texts: for the places $NAME in web/NAME.html; escaped here.
      content: what JSON can hold, for the scripts.

    Returns:
      The HTML, and its Content-Security-Policy: no other scripts and styles than its own, no requests but of "serve" to where it is from.
    """
    style = (WEB / "page.css").read_text(encoding="utf-8")
    script = "\n".join((WEB / file).read_text(encoding="utf-8") for file in ("tools.js", "charts.js", "viewer.js", f"{name}.js"))
    connect = "; connect-src 'self'" if name == "serve" else ""
    policy = f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'{connect}"
    policy += f"; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    body = string.Template((WEB / f"{name}.html").read_text(encoding="utf-8"))
    page = string.Template((WEB / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        policy=policy,
        style=style,
        body=body.substitute({place: html.escape(text) for place, text in texts.items()}),
        data=embedded_json(content),
        script=script,
    )
    return page, policy


def embedded_json(content: Any) -> str:
    """JSON that can stand in a script element: nothing in it can end the element."""
    return json.dumps(to_json(content), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# --- what it says ---


def headline(summary: Mapping[str, Any]) -> list[str]:
    """Sentences that say what was learned, and what cannot be said; of a summary (see `report.write_summary`) or one read back."""
    compared = summary["comparison"]
    gain, (low, high) = 100 * float(compared["gain"]), [100 * float(bound) for bound in compared["gain_interval"]]
    accuracy, base = 100 * compared["accuracy"], 100 * float(compared["base_accuracy_at_same_nfe"])
    there = f"{accuracy:.1f}% of the test problems right at {compared['nfe']:.1f} calls a response; the base model has {base:.1f}% there"
    size = f"{gain:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}"
    if low > 0:
        first = f"RL made the model answer {there} (gain {size})."
    elif high < 0:
        first = f"RL made the model worse at its operating point: it answers {there} (loss {size})."
    else:
        first = (
            f"This run does not show that RL helped: the model answers {there}, and the interval of the difference includes zero ({size})."
        )
    caution = "Intervals are over the test problems of this one run; they do not say how runs from other seeds would differ."
    return [first, _saving(summary), caution]


def _saving(summary: Mapping[str, Any]) -> str:
    """What RL did to the number of calls, at the accuracy of the operating point."""
    compared = summary["comparison"]
    share = 100 * float(compared["nfe_saving_at_same_accuracy"])
    low, high = (100 * float(bound) for bound in compared["nfe_saving_at_same_accuracy_interval"])
    if not compared["base_reaches_accuracy"]:
        best = max(summary["base"]["curve"], key=lambda entry: entry["accuracy"])
        at = f"its best is {100 * best['accuracy']:.1f}%, at {best['nfe']:.1f} calls"
        return f"The base model reaches that accuracy at none of its thresholds ({at})."
    needed = f"For that accuracy the base model needs {float(compared['base_nfe_at_same_accuracy']):.1f} calls"
    interval = f"95% interval {low:.0f}% to {high:.0f}%"
    if low > 0:
        return f"{needed}; the trained model saves {share:.0f}% of them ({interval})."
    if high < 0:
        return f"{needed}, fewer than the trained model (saving {share:.0f}%, {interval})."
    return f"{needed}: a saving of {share:.0f}% whose interval includes zero ({interval})."


def table(summary: Mapping[str, Any]) -> dict[str, Any]:
    """{columns, rows, notes} of the table that a run prints (see `report.table`), without its histogram in characters."""
    parts: list[Any] = list(report.table(summary).renderables)
    shown, *notes = parts
    columns = [list(column.cells) for column in shown.columns]
    return {
        "columns": [str(column.header) for column in shown.columns],
        "rows": [list(row) for row in zip(*columns, strict=True)],
        "notes": [note for note in notes if not note.startswith(" ")],
    }


def pareto_points(summary: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{base, trained, learned}: points {gamma, nfe, accuracy, low, high} by rising NFE; gamma of `learned` is the mean, of all problems."""

    def point(entry, gamma):
        low, high = entry["interval"]
        return {"gamma": gamma, "nfe": entry["nfe"], "accuracy": entry["accuracy"], "low": low, "high": high}

    curves = {
        name: sorted((point(entry, entry["gamma"]) for entry in summary[name]["curve"]), key=lambda point: point["nfe"])
        for name in ("base", "trained")
    }
    operating = summary["trained"]["operating_point"]
    return curves | {"learned": [point(operating, operating["thresholds"]["mean"])]}


def difficulty(before: Mapping[float, Evaluation]) -> tuple[np.ndarray, np.ndarray]:
    """Of n test problems: the share [n] of thresholds at which the base model is right, and their order [n] from hard to easy.

    Among equals the one that takes more calls is harder.
    """
    curve = report.as_curve(before)
    right = curve.correct.mean(0)
    return right, np.lexsort((-curve.nfe.mean(0), right))


def threshold_points(before: Mapping[float, Evaluation], learned: Evaluation) -> dict[str, Any]:
    """What is drawn of thresholds against difficulty.

    Returns:
      {histogram: {edges, counts}, std, parts: the mean of each third by difficulty, points: [[gamma, share of the base model's thresholds
      that are right, whether the trained model is right, NFE], ...] of at most `MOST_POINTS` problems, evenly chosen}
    """
    right, order = difficulty(before)
    columns = {"gamma": learned.threshold, "nfe": learned.nfe, "accuracy": learned.correct, "base": right}
    statistics = report.threshold_statistics(learned.threshold)
    chosen = np.unique(np.linspace(0, len(right) - 1, min(len(right), MOST_POINTS)).round().astype(int))
    points = zip(learned.threshold[chosen], right[chosen], learned.correct[chosen], learned.nfe[chosen], strict=True)
    return {
        "histogram": statistics["histogram"],
        "std": statistics["std"],
        "levels": len(before),
        "parts": [
            {"name": name, "count": len(part)} | {column: float(values[part].mean()) for column, values in columns.items()}
            for name, part in zip(PARTS, np.array_split(order, 3), strict=True)
            if len(part)
        ],
        "points": [[float(f"{value:.4g}") for value in point] for point in points],
    }


def charts(path: Path) -> list[dict[str, Any]]:
    """`CHARTS` with their points [[step, value], ...] from metrics.jsonl, those that have any; values that are not finite are left out."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def series(phase, name):
        found = [[line["step"], line[name]] for line in lines if line["phase"] == phase and isinstance(line.get(name), float | int)]
        found = found[:: -(-len(found) // MOST_STEPS) or 1]
        return [[step, float(f"{value:.4g}")] for step, value in found]

    drawn = [
        {"title": title, "unit": unit, "points": series(*source), "test": series(*test) if test else []}
        for title, unit, source, test in CHARTS
    ]
    return [chart for chart in drawn if len(chart["points"]) > 1]


def run_facts(config: Any) -> dict[str, Any]:
    """{command, versions, changes: {field: [default, here]}, config}: which run this is."""
    here, usual = flat_fields(to_json(config)), flat_fields(to_json(default.get_config()))
    devices = jax.devices()
    return {
        "command": shlex.join(["python", "-m", "diffpo_jax.main", *sys.argv[1:]]) if sys.argv[0].endswith("main.py") else "",
        "versions": {
            "diffpo_jax": _version("diffpo_jax"), "jax": jax.__version__, "flax": _version("flax"), "numpy": np.__version__,
            "Python": sys.version.split()[0], "devices": f"{len(devices)} x {devices[0].device_kind}",
        },
        "changes": {name: [usual.get(name, ABSENT), value] for name, value in here.items() if usual.get(name, ABSENT) != value},
        "config": to_json(config),
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
