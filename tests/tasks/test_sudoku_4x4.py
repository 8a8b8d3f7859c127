"""4x4 sudoku in the published files: the split by solution, the verdict, the published cell accuracy, the training reward."""

import json

import pytest

from diffpo_jax.tasks import sudoku, sudoku_4x4
from tests.tasks.published import in_tags, needs

GRID, OTHER = "1234341221434321", "2143432112343412"  # valid grids that differ in every cell
PUZZLE = "1234341221430000"


def answer(puzzle=PUZZLE, solution=GRID):
    return json.dumps({"puzzle": puzzle, "solution": solution})


@pytest.mark.parametrize(
    ("puzzle", "response", "verdict", "published"),
    [
        (PUZZLE, in_tags(GRID), 1, 1.0),
        (PUZZLE, f"\\boxed{{{GRID}}}", 1, 1.0),
        (PUZZLE, f"{GRID} <answer>\\boxed{{{GRID}}}</answer>", 1, 1.0),
        (PUZZLE, "<answer>1234 3412 2143 4321</answer>", 1, 1.0),
        (PUZZLE, "<answer>\n1 2 | 3 4\n3 4 | 1 2\n2 1 | 4 3\n4 3 | 2 1\n</answer>", 1, 1.0),
        (PUZZLE, f"<answer>{GRID}", 1, 1.0),
        (PUZZLE, f"<answer>{OTHER}</answer> <answer>{GRID}</answer>", 1, 1.0),
        (PUZZLE, f"<answer>{OTHER}</answer> \\boxed{{{GRID}}}", 1, 1.0),
        (PUZZLE, f"<answer>{GRID}</answer> \\boxed{{{OTHER}}}", 0, 0.0),
        (PUZZLE, f"\\boxed{{{OTHER}}} \\boxed{{{GRID}}} as asked", 1, 1.0),
        (PUZZLE, f"<answer>{GRID[:15]}</answer>", 0, 0.75),
        (PUZZLE, f"<answer>{GRID[:12]}</answer>", 0, 0.0),
        (PUZZLE, f"<answer>{GRID}1</answer>", 0, 1.0),
        (PUZZLE, f"<answer>{GRID[:15]}2</answer>", 0, 0.75),
        (PUZZLE, f"<answer>2{GRID[1:]}</answer>", 0, 1.0),  # a clue broken
        (PUZZLE, f"<answer>{PUZZLE}</answer>", 0, 0.0),
        (PUZZLE, f"<answer>{GRID[:12]}5321</answer>", 0, 0.75),
        (PUZZLE, f"<answer>row 1: {GRID}</answer>", 0, 0.0),  # the digits are 1123434122143432
        (PUZZLE, GRID, 0, 0.0),  # neither tag nor box
        (PUZZLE, "<answer>" + "\uff11" * 16 + "</answer>", 0, 0.0),
        ("0" * 16, in_tags(OTHER), 1, 0.0),  # another completion
        ("0" * 16, in_tags(GRID[:8] + OTHER[8:]), 0, 0.5),
    ],
)
def test_verdicts_and_published_scores(puzzle, response, verdict, published):
    assert sudoku_4x4.reward(answer(puzzle), response) == verdict
    assert sudoku_4x4.TASK.published_score(answer(puzzle), response) == published


@pytest.mark.parametrize(
    ("puzzle", "response", "reward", "released"),
    [
        (PUZZLE, in_tags(GRID), 1.0, 1.0),
        (PUZZLE, in_tags(GRID[:15] + "2"), 0.75, 0.75),
        (PUZZLE, in_tags(GRID[:13]), 0.25, 0.25),
        ("0" * 16, in_tags(OTHER), 1.0, 0.0),  # any completion is right
        (PUZZLE, f"\\boxed{{{GRID}}}", 0.0, 0.0),  # no tag
        (PUZZLE, f"<answer>{GRID}", 1.0, 0.0),  # not closed
        (PUZZLE, in_tags(f"\\boxed{{{GRID}}}"), 1.0, 1.0),
    ],
)
def test_training_rewards_by_hand(puzzle, response, reward, released):
    assert sudoku_4x4.TASK.components(answer(puzzle), response) == {"cells": reward}
    assert sudoku_4x4.D1_TASK.components(answer(puzzle), response) == {"cells": released}


def write(folder, name, rows):
    (folder / name).write_text("Puzzle,Solution\n" + "".join(f"{puzzle},{solution}\n" for puzzle, solution in rows))


def holes(grid, count):
    return "0" * count + grid[count:]


def puzzles(folder, split, d1_faithful=False):
    problems = list(sudoku_4x4.read(str(folder), split, d1_faithful))
    assert all(problem.prompt.endswith("\n\n" + json.loads(problem.answer)["puzzle"]) for problem in problems)
    return [(json.loads(problem.answer)["puzzle"], json.loads(problem.answer)["solution"]) for problem in problems]


def test_split_is_by_solution(tmp_path):
    (train, other), held_out = sudoku.split_grids()[0][:2], sudoku.split_grids()[1][0]
    write(tmp_path, sudoku_4x4.TEST, [(holes(train, 3), train), (holes(held_out, 5), held_out)])
    assert puzzles(tmp_path, "test") == [(holes(held_out, 5), held_out)]
    assert puzzles(tmp_path, "train") == [(holes(train, 3), train)]  # no training file: the rest of the test file
    with pytest.raises(FileNotFoundError, match="no csv file beside"):
        puzzles(tmp_path, "train", d1_faithful=True)
    write(tmp_path, "unique.csv", [(holes(other, 2), other), (holes(held_out, 4), held_out)])
    assert puzzles(tmp_path, "train") == [(holes(other, 2), other)]
    assert puzzles(tmp_path, "train", d1_faithful=True) == [(holes(other, 2), other), (holes(held_out, 4), held_out)]
    assert puzzles(tmp_path, "test", d1_faithful=True) == [(holes(train, 3), train), (holes(held_out, 5), held_out)]


def test_a_test_puzzle_with_another_solution_is_no_training_puzzle(tmp_path):
    train, held_out = sudoku.split_grids()[0][0], sudoku.split_grids()[1][0]
    write(tmp_path, sudoku_4x4.TEST, [("0" * 16, held_out)])
    write(tmp_path, "more.csv", [("0" * 16, train), (holes(train, 1), train)])
    assert puzzles(tmp_path, "train") == [(holes(train, 1), train)]


def test_read_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=sudoku_4x4.TEST):
        puzzles(tmp_path, "test")
    for puzzle, solution in ((PUZZLE, OTHER), (PUZZLE[:15], GRID), ("." * 16, GRID), (PUZZLE, GRID[:15] + "2")):
        write(tmp_path, sudoku_4x4.TEST, [(PUZZLE, GRID), (puzzle, solution)])
        with pytest.raises(ValueError, match="row 2: .* no 4x4 puzzle"):
            puzzles(tmp_path, "test")


def test_published_file():
    folder = needs("sudoku")
    train, test = puzzles(folder, "train"), puzzles(folder, "test")
    assert len(train) + len(test) == len(puzzles(folder, "test", d1_faithful=True)) == 500 and len(test) > 50
    assert not {solution for _, solution in train} & {solution for _, solution in test}
    assert not {puzzle for puzzle, _ in train} & {puzzle for puzzle, _ in test}
    for problem in sudoku_4x4.read(folder, "test", True):
        solution = json.loads(problem.answer)["solution"]
        assert sudoku_4x4.reward(problem.answer, in_tags(solution)) == sudoku_4x4.published_score(problem.answer, in_tags(solution)) == 1.0
