"""4x4 sudoku in the published files: csv with Puzzle and Solution, 16 digits row-major, 0 for an empty cell.

Right is any valid completion that keeps the clues: 124 of the 500 usual test puzzles have several. The published figure, the share of the
empty cells that equal the reference, is reported beside it.

There are only 288 grids, so a split by puzzle shows every test solution in training. The split is by solution (the grids of
`sudoku.split_grids`); `d1_faithful` keeps the published one by puzzle.
"""

import json
import os
import re
from collections.abc import Iterator

from diffpo_jax.tasks import sudoku
from diffpo_jax.tasks.answers import answer_tag, closed_tags, final_answer
from diffpo_jax.tasks.base import Problem, Task, check_split
from diffpo_jax.tasks.files import find_file, read_rows

TEST = "4x4_test_sudoku.csv"
PROMPT = (
    "Solve this 4x4 sudoku. It is given as 16 digits, row after row from the top left to the bottom right; 0 is an empty cell. Fill every"
    " empty cell with 1, 2, 3 or 4 so that each row, each column and each 2x2 box holds each of them once; do not change the given digits."
    " Write your answer in this format:\n<reasoning>\nyour steps\n</reasoning>\n<answer>\nthe 16 digits of the solution\n</answer>"
)


def read(folder: str, split: str, d1_faithful: bool) -> Iterator[Problem]:
    """The puzzles of a split.

    Test: the test file's puzzles whose solution is one of the 48 held-out grids. Training: the puzzles of every other csv file of the
    folder whose solution is one of the other 240 grids and that are no test puzzle; without such a file, those of the test file. With
    `d1_faithful`: all of the test file, and all of the other files.

    Raises:
      FileNotFoundError, ValueError: no such file, or a row that is no puzzle with its solution.
    """
    path, test = find_file(folder, [TEST]), check_split(split)
    others = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".csv") and name != TEST]
    if d1_faithful:
        if not test and not others:
            raise FileNotFoundError(f"{folder} holds no csv file beside {TEST}: the published split trains on another file")
        rows = [row for file in ([path] if test else others) for row in _read_puzzles(file)]
    else:
        train_grids, test_grids = map(set, sudoku.split_grids())
        tests = [row for row in _read_puzzles(path) if row[1] in test_grids]
        rows, puzzles = tests, {puzzle for puzzle, _ in tests}
        if not test:
            rows = [row for file in others or [path] for row in _read_puzzles(file) if row[1] in train_grids and row[0] not in puzzles]
    for puzzle, solution in rows:
        yield Problem(f"{PROMPT}\n\n{puzzle}", "", json.dumps({"puzzle": puzzle, "solution": solution}))


def _read_puzzles(path: str) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(read_rows(path, ["Puzzle", "Solution"]), 1):
        puzzle, solution = row["Puzzle"].strip(), row["Solution"].strip()
        if not (re.fullmatch("[0-4]{16}", puzzle) and _completes(puzzle, solution)):
            raise ValueError(f"{path}, row {number}: {puzzle!r}, {solution!r} are no 4x4 puzzle of digits 0-4 and its solution")
        yield puzzle, solution


def _completes(puzzle: str, grid: str) -> bool:
    return sudoku.reward(json.dumps({"puzzle": puzzle.replace("0", ".")}), grid) == 1.0


def extract(response: str) -> str | None:
    """The digits of the last box, else of the last answer tag."""
    found = final_answer(response)
    return None if found is None else _digits(found)


def _digits(text: str) -> str:
    return "".join(character for character in text if character in "0123456789")


def reward(answer: str, response: str) -> float:
    """1 for 16 digits that are a valid grid and keep the clues, else 0."""
    grid = extract(response)
    return float(grid is not None and _completes(json.loads(answer)["puzzle"], grid))


def published_score(answer: str, response: str) -> float:
    """The share of the empty cells that equal the reference; digits that are missing are wrong, those past the 16th do not count."""
    return _share(answer, extract(response) or "")


def _share(answer: str, digits: str) -> float:
    problem = json.loads(answer)
    empty = [cell for cell in range(16) if problem["puzzle"][cell] == "0"]
    return sum(digits[cell : cell + 1] == problem["solution"][cell] for cell in empty) / max(len(empty), 1)


def components(answer: str, response: str) -> dict[str, float]:
    """cells: the published share of right cells, 0 without answer tag.

    Corrected against the released code: any valid completion that keeps the clues is worth 1, also where it is not the reference; a last
    tag that is not closed counts; digits in a box count.
    """
    if answer_tag(response) is None:
        return {"cells": 0.0}
    return {"cells": 1.0 if reward(answer, response) == 1.0 else published_score(answer, response)}


def released_components(answer: str, response: str) -> dict[str, float]:
    """The training reward of the released d1 code: the share of right cells by the digits in the last closed tag."""
    tags = closed_tags(response)
    return {"cells": _share(answer, _digits(response[slice(*tags[-1])])) if tags else 0.0}


TASK = Task("sudoku_4x4", "", reward, components, read=read, published_score=published_score, extract=extract)
D1_TASK = Task("sudoku_4x4", "", reward, released_components, read=read, published_score=published_score, extract=extract)
