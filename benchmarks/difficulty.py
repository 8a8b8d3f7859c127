"""Does a threshold per prompt pay, and where? python benchmarks/difficulty.py WORKDIR [WORKDIR ...], finished joint runs of one task.

Test problems in three equal parts by how hard they are for the base model (the share of eval.thresholds at which it is right; ties by its
calls). Of each: the learned thresholds, calls and accuracy with them, and, on the same trained model, with the one threshold that takes as
many calls over all problems (mixing the two of the grid around it). Mean and 95% t interval over the runs.
"""

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from diffpo_jax.evaluate import load_curve
from diffpo_jax.page import difficulty
from diffpo_jax.pareto import t_interval
from diffpo_jax.report import as_curve

COLUMNS = {"learned γ": 1, "NFE": 1, "accuracy %": 100, "NFE, one γ": 1, "accuracy %, one γ": 100, "learned over one γ, points": 100}


def parts(workdir: str) -> np.ndarray:
    """[4, columns]: of the hard, the middle, the easy third, and all problems of a run."""
    base, trained, learned = (load_curve(str(Path(workdir) / f"{name}.npz"))[0] for name in ("base", "trained", "learned"))
    [learned], (_, order), trained = learned.values(), difficulty(base), as_curve(trained)
    by_calls = np.argsort(trained.nfe.mean(1))
    mixed = np.array([np.interp(learned.nfe.mean(), trained.nfe.mean(1)[by_calls], row[by_calls]) for row in np.eye(len(by_calls))])
    nfe, correct = mixed @ trained.nfe, mixed @ trained.correct
    columns = np.stack([learned.threshold, learned.nfe, learned.correct, nfe, correct, learned.correct - correct])
    return np.array([columns[:, part].mean(1) for part in (*np.array_split(order, 3), order)])


def main(workdirs: list[str]) -> None:
    found = np.stack([parts(workdir) for workdir in workdirs])
    shown = Table(title=f"{len(workdirs)} runs", title_justify="left")
    for name in ("problems", *COLUMNS):
        shown.add_column(name, justify="right")
    for i, name in enumerate(("hardest third", "middle third", "easiest third", "all")):
        intervals = [t_interval(scale * found[:, i, j]) for j, scale in enumerate(COLUMNS.values())]
        shown.add_row(name, *(f"{mean:.2f} ± {half:.2f}" for mean, half in intervals))
    Console(width=160).print(shown)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
