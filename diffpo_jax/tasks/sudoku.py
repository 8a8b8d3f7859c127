"""4x4 sudoku: fill the grid so that rows, columns and 2x2 boxes hold 1 to 4 each; any completion that keeps the clues is right.

Prompt: 16 characters, row-major, digits 1-4 and "." for an empty cell. Response: the 16 digits of a filled grid.

The 288 grids are split by solution, 240 train and 48 test; the demonstration is the grid the clues were taken from. Puzzles with few
clues have many completions, so the puzzles are split as well, in two halves: no test puzzle occurs in training. As a test set holds
distinct puzzles, it has fewer with one clue (there are 64 of those in all) than with more.
"""

import functools
import itertools
import json
import random
from collections.abc import Iterator

from ml_collections import ConfigDict

from diffpo_jax.tasks.base import Problem, Task, check_range, check_split, collect, held_out, one_component, stable_hash

TEST_GRIDS = 48
DIGITS = "1234"
UNITS = (  # cells of the 4 rows, 4 columns, 4 boxes
    *(tuple(4 * row + column for column in range(4)) for row in range(4)),
    *(tuple(4 * row + column for row in range(4)) for column in range(4)),
    *(tuple(4 * (top + row) + left + column for row in range(2) for column in range(2)) for top in (0, 2) for left in (0, 2)),
)


def _satisfied_units(grid: str) -> int:
    """How many of the 12 units hold each digit once; `grid` is 16 digits 1-4."""
    return sum(len({grid[cell] for cell in unit}) == 4 for unit in UNITS)


@functools.cache
def all_grids() -> tuple[str, ...]:
    """The 288 valid grids, each 16 digits row-major."""
    rows = ["".join(row) for row in itertools.permutations(DIGITS)]
    halves = [top + bottom for top in rows for bottom in rows if len(set(top[:2] + bottom[:2])) == len(set(top[2:] + bottom[2:])) == 4]
    return tuple(grid for grid in (top + bottom for top in halves for bottom in halves) if _satisfied_units(grid) == 12)


@functools.cache
def split_grids() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, test) solution grids, 240 and 48, in the fixed order of their hash: the same for every seed."""
    order = sorted(all_grids(), key=stable_hash)
    return tuple(order[TEST_GRIDS:]), tuple(order[:TEST_GRIDS])


def generate(settings: ConfigDict, split: str, count: int, seed: int) -> Iterator[Problem]:
    """Puzzles with clues_min to clues_max given cells, the number uniform and the cells random.

    first_share of the demonstrations are the first grid of the split, in ascending order, that keeps the clues; the others any that does.
    """
    test = check_split(split)
    check_range("clues", settings.clues_min, settings.clues_max, at_least=0, at_most=16)
    rng = random.Random(f"sudoku {split} {seed}")
    grids = split_grids()[test]
    ascending = sorted(grids)

    def draw() -> Problem | None:
        grid = rng.choice(grids)
        clues = set(rng.sample(range(16), rng.randint(settings.clues_min, settings.clues_max)))
        puzzle = "".join(digit if cell in clues else "." for cell, digit in enumerate(grid))
        if held_out(puzzle, one_in=2) != test:
            return None
        if rng.random() < settings.first_share:
            grid = next(other for other in ascending if all(other[cell] == grid[cell] for cell in clues))
        return Problem(puzzle, grid, json.dumps({"puzzle": puzzle}))

    return collect("sudoku", draw, count, distinct=test)


def dense_reward(answer: str, response: str) -> float:
    """1 if right, else half of (share of the 12 units that hold each digit once) * (share of clues kept); 0 unless 16 digits 1-4."""
    puzzle = json.loads(answer)["puzzle"]
    if len(response) != 16 or not set(response) <= set(DIGITS):
        return 0.0
    clues = [cell for cell in range(16) if puzzle[cell] != "."]
    kept = sum(response[cell] == puzzle[cell] for cell in clues) / len(clues) if clues else 1.0
    units = _satisfied_units(response) / len(UNITS)
    return 1.0 if kept == units == 1.0 else 0.5 * units * kept


def reward(answer: str, response: str) -> float:
    """1 for a valid grid that keeps the clues, else 0."""
    return float(dense_reward(answer, response) == 1.0)


TASK = Task("sudoku", "." + DIGITS, reward, one_component(dense_reward), generate)
