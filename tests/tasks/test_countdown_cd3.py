"""Countdown in the published files: the reader, the verdict on expressions in plain text and LaTeX, the training reward."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpo_jax.tasks import countdown, countdown_cd3
from tests.tasks.published import in_tags, needs


def answer(numbers, target):
    return json.dumps({"numbers": numbers, "target": target})


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("\\boxed{7*3+9}", 1),
        (in_tags("7*3+9"), 1),
        (in_tags("$7 \\times 3 + 9$"), 1),
        (in_tags("\\(7 \\times 3 + 9\\)"), 1),
        ("\\boxed{7 \\cdot 3 + 9 = 30}", 1),
        ("\\boxed{9+7\u00d73}", 1),
        ("\\boxed{\\left(7 \\times 3\\right) + 9}", 1),
        ("\\boxed{\\left[7 \\times 3\\right]+ 9}", 1),
        ("\\boxed{9-(-7*3)}", 1),
        ("\\boxed{7*3} and \\boxed{7*3+9}", 1),
        ("\\boxed{7*3+9}, which is 30 and not 31", 1),
        ("<answer>7*3+9", 1),
        ("<answer>9*3+7</answer> \\boxed{7*3+9}", 1),
        ("\\boxed{7*3+9} so not \\boxed{9*3+7}", 0),
        ("\\boxed{3*9+7}", 0),  # 34
        ("\\boxed{7*3+9-0}", 0),  # 0 is not given
        ("\\boxed{(7+3)*9/3}", 0),  # 30, with 3 twice
        ("\\boxed{37-7}", 0),
        ("\\boxed{30}", 0),
        ("\\boxed{30 = 7*3+9}", 0),  # what is kept is 30
        ("\\boxed{7*3+9", 0),
        ("7*3+9", 0),
        ("\\boxed{7*3+9.0}", 0),
        ("\\boxed{7**3+9}", 0),
        ("\\boxed{\uff17*3+9}", 0),
        ("\\boxed{}", 0),
    ],
)
def test_verdicts(response, verdict):
    assert countdown_cd3.reward(answer([3, 7, 9], 30), response) == verdict


@pytest.mark.parametrize(
    ("numbers", "target", "expression", "verdict"),
    [
        ([8, 4, 5], 10, "\\frac{8}{4} \\times 5", 1),
        ([8, 4, 5], 10, "\\dfrac{8 \\times 5}{4}", 1),
        ([8, 4, 5], 10, "\\frac{5}{\\frac{4}{8}}", 1),
        ([8, 4, 5], 10, "8 \\div 4 \\times 5", 1),
        ([8, 4, 5], 10, "\\frac{8+5}{4}", 0),
        ([3, 4, 8], 1, "\\frac{4}{8-4}", 0),
        ([4, 5, 9], 10, "-4+5+9", 1),
        ([4, 5, 9], 10, "(-4)+5+9", 1),
        ([4, 5, 9], 8, "5-+-4--9", 0),  # 5 + 4 + 9 = 18
        ([4, 5, 9], 18, "5-+-4--9", 1),
        ([3, 3, 9], 9, "3/3*9", 1),
        ([3, 3, 9], 0, "9/(3-3)", 0),
        ([1, 3, 90], 30, "90*(1/3)", 1),
        ([44, 19, 35], 98, "44 + 19 + 35", 1),
        ([44, 19, 35], 98, "44 + 19 + 35 + 0", 0),
    ],
)
def test_verdicts_on_expressions(numbers, target, expression, verdict):
    assert countdown_cd3.reward(answer(numbers, target), f"\\boxed{{{expression}}}") == verdict


def test_signs_only_where_asked_for():
    assert countdown.parse("-3+5") is None and countdown.parse("-3+5", signs=True) == (2, [3, 5])
    assert countdown.parse("-" * 30 + "3", signs=True) is None


@pytest.mark.parametrize(
    ("response", "reward", "released"),
    [
        ("\\boxed{7*3+9}", 0.0, 0.0),  # no tag
        ("", 0.0, 0.0),
        ("<answer>7*3+9</answer>", 1.0, 1.0),
        ("<answer>\n7*3\n+9\n</answer>", 1.0, 1.0),
        ("<answer>3*9+7</answer>", 0.1, 0.1),
        ("<answer>no idea</answer>", 0.1, 0.1),
        ("<answer>\\boxed{7*3+9}</answer>", 1.0, 0.1),
        ("<answer>7*3+9 = 30</answer>", 1.0, 0.1),
        ("<answer>7 \\times 3 + 9</answer>", 1.0, 0.1),
        ("<answer>7*3+9", 1.0, 0.0),  # not closed
        ("<answer>1</answer><answer>7*3+9</answer>", 1.0, 1.0),
    ],
)
def test_training_rewards_by_hand(response, reward, released):
    problem = answer([3, 7, 9], 30)
    assert countdown_cd3.TASK.dense_reward(problem, response) == pytest.approx(reward)
    assert countdown_cd3.D1_TASK.dense_reward(problem, response) == pytest.approx(released)
    assert set(countdown_cd3.components(problem, response)) == {"tags", "correct"}


def write(folder, train, test):
    rows = [
        {"extra_info": {"index": i, "numbers": str(numbers)}, "reward_model": {"ground_truth": str(target), "style": "rule"}}
        for i, (numbers, target) in enumerate(train)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / countdown_cd3.TRAIN)
    lines = [json.dumps({"input": ",".join(map(str, numbers)), "output": str(target)}) for numbers, target in test]
    (folder / countdown_cd3.TEST).write_text("\n".join(lines) + "\n")


def test_read_leaves_test_problems_out_of_training(tmp_path):
    write(tmp_path, [([9, 3, 7], 30), ([9, 3, 7], 34), ([1, 2, 3, 4], 10), ([5, 5, 5], 15)], [([3, 7, 9], 30)])
    train = [json.loads(problem.answer) for problem in countdown_cd3.read(str(tmp_path), "train", False)]
    assert train == [{"numbers": [9, 3, 7], "target": 34}, {"numbers": [5, 5, 5], "target": 15}]
    (test,) = countdown_cd3.read(str(tmp_path), "test", False)
    assert json.loads(test.answer) == {"numbers": [3, 7, 9], "target": 30} and test.response == ""
    assert "[3, 7, 9]" in test.prompt and "exactly 30" in test.prompt and "<answer>" in test.prompt
    assert len(list(countdown_cd3.read(str(tmp_path), "train", True))) == 3


def test_read_errors(tmp_path):
    write(tmp_path, [([1, 2, 3], 6)], [([1, 2, 3], "six")])
    with pytest.raises(ValueError, match="countdown_cd3_test.jsonl, row 1: .*'six'.* no integers"):
        list(countdown_cd3.read(str(tmp_path), "test", False))
    (tmp_path / countdown_cd3.TEST).unlink()
    with pytest.raises(FileNotFoundError, match="countdown_cd3_test.jsonl"):
        list(countdown_cd3.read(str(tmp_path), "train", False))


def test_published_files():
    folder = needs("countdown")
    train, test = (
        [(tuple(sorted(problem["numbers"])), problem["target"]) for problem in map(json.loads, (p.answer for p in problems))]
        for problems in (countdown_cd3.read(folder, "train", False), countdown_cd3.read(folder, "test", False))
    )
    assert len(test) == 256 and len(train) == 9953 - 4 and not set(train) & set(test)
