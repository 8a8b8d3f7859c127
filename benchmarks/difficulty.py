"""Does a threshold per prompt pay, and where? python benchmarks/difficulty.py WORKDIR [WORKDIR ...], finished joint runs of one task.

Test problems in three equal parts by how hard they are for the base model (the share of eval.thresholds at which it is right; ties by its
calls). Of each: the learned thresholds, calls and accuracy with them, and, on the same trained model, with the one threshold that takes as
many calls over all problems (mixing the two of the grid around it). Below that, how much thresholds per prompt could gain at all: the best
mix of γ for each third, and for each problem in hindsight, over the best mix for all, at as many calls; chosen and measured on the same
problems, hence an upper bound. Mean and 95% t interval over the runs.
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
PRICES = np.linspace(0, 1, 1001)[:, None, None]  # of a call, in accuracy


def best_mix(nfe: np.ndarray, correct: np.ndarray, calls: float) -> float:
    """The best accuracy at so many calls on average if each of P kinds of problems has a mix of the K thresholds of its own.

    It is a linear program, solved through its dual: the least, over prices of a call, of what one makes of each kind at that price.

    Args:
      nfe, correct: [K, P] means at each threshold.
      calls: the mean over kinds.
    """
    return float((correct - PRICES * (nfe - calls)).max(1).mean(1).min())


def parts(workdir: str) -> tuple[np.ndarray, list[float]]:
    """([4, columns] of a run's hard, middle and easy third and all problems; the most that a γ a third and one a problem could gain)."""
    base, trained, learned = (load_curve(str(Path(workdir) / f"{name}.npz"))[0] for name in ("base", "trained", "learned"))
    [learned], (_, order), trained = learned.values(), difficulty(base), as_curve(trained)
    by_calls = np.argsort(trained.nfe.mean(1))
    mixed = np.array([np.interp(learned.nfe.mean(), trained.nfe.mean(1)[by_calls], row[by_calls]) for row in np.eye(len(by_calls))])
    nfe, correct = mixed @ trained.nfe, mixed @ trained.correct
    columns = np.stack([learned.threshold, learned.nfe, learned.correct, nfe, correct, learned.correct - correct])
    thirds = np.array_split(order, 3)

    def best(kinds):
        means = (np.stack([values[:, kind].mean(1) for kind in kinds], 1) for values in (trained.nfe, trained.correct))
        return best_mix(*means, learned.nfe.mean())

    one, *more = best([order]), best(thirds), best(order[:, None])
    return np.array([columns[:, part].mean(1) for part in (*thirds, order)]), [each - one for each in more]


def main(workdirs: list[str]) -> None:
    tables, gains = zip(*map(parts, workdirs), strict=True)
    found = np.stack(tables)
    shown = Table(title=f"{len(workdirs)} runs", title_justify="left")
    for name in ("problems", *COLUMNS):
        shown.add_column(name, justify="right")
    for i, name in enumerate(("hardest third", "middle third", "easiest third", "all")):
        intervals = [t_interval(scale * found[:, i, j]) for j, scale in enumerate(COLUMNS.values())]
        shown.add_row(name, *(f"{mean:.2f} ± {half:.2f}" for mean, half in intervals))
    Console(width=160).print(shown)
    for name, values in zip(("third", "problem"), 100 * np.transpose(gains), strict=True):
        print("the best γ for each {} over the best for all: at most {:.1f} ± {:.1f} points".format(name, *t_interval(values)))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
