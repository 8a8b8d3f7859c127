"""How the sampler's time grows with calls, rows, lanes and response length: python benchmarks/growth.py --size=small

One of them is varied, the rest is that of the size (see sampler.py); greedy, low confidence, no cache, as many calls a row as denoising
steps. Settings are taken in turns; seconds are medians. For calls and rows a line is fitted to all turns: its slope with a 95% interval
over turns, how far the medians lie from it, and what is left at 0 as a share of the largest.
"""

import argparse
import dataclasses

import numpy as np
from sampler import SIZES, Size, ours, random_params, seconds

FITTED = ("steps", "rows")


def settings(size: Size) -> dict[str, list[Size]]:
    """Sizes that differ in one field, by field."""
    blocks = size.length // size.block_length
    values = {
        "steps": [blocks * n for n in (2, 4, 8, 16, 32) if blocks * n <= size.length],
        "rows": [size.rows * n // 4 for n in (1, 2, 4, 8)],
        "lanes": [size.rows // n for n in (8, 4, 2, 1)],
        "length": [size.length * n // 2 for n in (1, 2, 4)],
    }
    return {name: [dataclasses.replace(size, **{name: value}) for value in some] for name, some in values.items()}


def fit(x: np.ndarray, taken: np.ndarray) -> str:
    """What a line through seconds `taken` [turns, settings] at x [settings] says."""
    slopes, starts = np.polynomial.polynomial.polyfit(x, taken.T, 1)[::-1]
    half = 1.96 * slopes.std(ddof=1) / len(slopes) ** 0.5
    middle, line = np.median(taken, axis=0), np.median(starts) + np.median(slopes) * x
    off = np.abs(middle / line - 1).max()
    return (f"{1e3 * slopes.mean():.3f} ± {1e3 * half:.3f} ms each; medians at most {100 * off:.1f}% from the line; "
            f"at 0 {100 * np.median(starts) / middle[-1]:.1f}% of the largest")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    size = SIZES[args.size]
    params = random_params(size, sharpness=4.0)
    for name, sizes in settings(size).items():
        samplers = [ours(each, params) for each in sizes]
        for sampler in samplers:
            sampler()  # compiles
        order = [list(range(len(sizes)))[:: 1 if turn % 2 else -1] for turn in range(args.turns)]
        taken = np.zeros((args.turns, len(sizes)))
        for turn, some in enumerate(order):
            for i in some:
                taken[turn, i] = seconds(samplers[i])[0]
        x = np.array([getattr(each, name) for each in sizes], float)
        print(f"{name}: " + ", ".join(
            f"{value:.0f}: {middle:.3f} s, {each.rows / middle:.1f} rows/s"
            for value, middle, each in zip(x, np.median(taken, axis=0), sizes, strict=True)
        ))  # fmt: skip
        if name in FITTED:
            print(f"  {fit(x, taken)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--turns", type=int, default=5)
    main(parser.parse_args())
