"""4x4 sudoku: the grids, the split, the verifier."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from diffpo_jax.tasks import sudoku

SETTINGS = ConfigDict({"clues_min": 1, "clues_max": 4, "first_share": 0.0})
GRID = "1234341221434321"


def answer(puzzle):
    return json.dumps({"puzzle": puzzle})


def by_hand_valid(grid):
    rows = [grid[i : i + 4] for i in range(0, 16, 4)]
    columns = ["".join(row[i] for row in rows) for i in range(4)]
    boxes = [grid[i] + grid[i + 1] + grid[i + 4] + grid[i + 5] for i in (0, 2, 8, 10)]
    return all("".join(sorted(unit)) == "1234" for unit in rows + columns + boxes)


def test_there_are_288_grids_and_all_are_valid():
    grids = sudoku.all_grids()
    assert len(grids) == len(set(grids)) == 288
    assert all(by_hand_valid(grid) for grid in grids)


def test_split_is_by_solution():
    train, test = sudoku.split_grids()
    assert (len(train), len(test)) == (240, 48)
    assert not set(train) & set(test)


def test_problems_of_the_splits_share_neither_solution_nor_puzzle():
    train = list(sudoku.generate(SETTINGS, "train", 20_000, 0))
    test = list(sudoku.generate(SETTINGS, "test", 512, 0))
    assert {p.response for p in train} == set(sudoku.split_grids()[0])
    assert {p.response for p in test} <= set(sudoku.split_grids()[1])
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert len({p.prompt for p in test}) == 512
    for problem in train[:2000] + test:
        assert all(a in (".", b) for a, b in zip(problem.prompt, problem.response, strict=True))
        assert sudoku.reward(problem.answer, problem.response) == 1.0
    clues = collections.Counter(16 - p.prompt.count(".") for p in train)
    assert set(clues) == {1, 2, 3, 4} and min(clues.values()) > 0.2 * len(train)


def test_same_seed_same_problems():
    first, again, other = (list(sudoku.generate(SETTINGS, "train", 50, seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_too_few_puzzles_is_an_error():
    with pytest.raises(ValueError, match="lower task.test_size"):
        list(sudoku.generate(ConfigDict({"clues_min": 1, "clues_max": 1, "first_share": 0.0}), "test", 100, 0))
    with pytest.raises(ValueError, match="clues_min=5"):
        sudoku.generate(ConfigDict({"clues_min": 5, "clues_max": 4, "first_share": 0.0}), "test", 1, 0)
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        sudoku.generate(SETTINGS, "valid", 1, 0)


def test_every_completion_that_keeps_the_clues_is_right_and_no_other():
    puzzle = "1..............4"
    for grid in sudoku.all_grids():
        assert sudoku.reward(answer(puzzle), grid) == float(grid[0] == "1" and grid[15] == "4")


def test_dense_reward_by_hand():
    assert sudoku.dense_reward(answer("1" + "." * 15), GRID) == 1.0
    assert sudoku.dense_reward(answer("2" + "." * 15), GRID) == 0.0  # valid grid, its only clue broken
    assert sudoku.dense_reward(answer("21" + "." * 14), GRID) == 0.0
    assert sudoku.dense_reward(answer("11" + "." * 14), GRID) == 0.25  # one clue of two kept, all units
    wrong_corner = "2" + GRID[1:]  # its row, column and box break: 9 of 12 units
    assert sudoku.dense_reward(answer("." * 16), wrong_corner) == pytest.approx(0.5 * 9 / 12)
    assert sudoku.dense_reward(answer("." * 16), "1" * 16) == 0.0


@pytest.mark.parametrize(
    "response",
    ["", GRID[:15], GRID + "1", GRID[:15] + ".", GRID[:15] + " ", GRID[:15] + "5", GRID[:15] + "\u0661", "\uff11" * 16, "1" * 10**6],
)
def test_malformed_grids_are_worth_nothing(response):
    assert sudoku.dense_reward(answer("." * 16), response) == sudoku.reward(answer("." * 16), response) == 0.0


@settings(deadline=None)
@given(st.text() | st.text(alphabet="1234", min_size=16, max_size=16))
def test_reward_agrees_with_a_verifier_by_hand(response):
    right = len(response) == 16 and set(response) <= set("1234") and by_hand_valid(response)
    dense = sudoku.dense_reward(answer("." * 16), response)
    assert sudoku.reward(answer("." * 16), response) == float(right)
    assert dense == 1.0 if right else 0.0 <= dense <= 0.5


def test_first_share_of_the_demonstrations_are_the_first_grid_that_keeps_the_clues():
    few = ConfigDict({"clues_min": 1, "clues_max": 3, "first_share": 0.5})
    train, _ = sudoku.split_grids()
    first = [
        problem.response == min(g for g in train if all(clue in (".", digit) for clue, digit in zip(problem.prompt, g, strict=True)))
        for problem in sudoku.generate(few, "train", 600, 0)
    ]
    assert 0.5 < np.mean(first) < 0.65  # and of the others those that happen to be
