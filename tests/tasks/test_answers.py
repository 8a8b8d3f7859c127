"""Finding answers: boxes, tags, numbers; and that no verifier raises or is slow."""

import json
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpo_jax.tasks import D1_TASKS, TASKS, answers, find_task
from tests.tasks.published import ADVERSARIAL

ANSWERS = {
    "gsm8k": {"answer": "17"},
    "math500": {"answer": "\\frac{x+1}{2}"},
    "countdown_cd3": {"numbers": [3, 7, 9], "target": 30},
    "sudoku_4x4": {"puzzle": "1234341221430000", "solution": "1234341221434321"},
}
PUBLISHED = [(tasks[name], json.dumps(answer)) for tasks in (TASKS, D1_TASKS) for name, answer in ANSWERS.items()]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("so \\boxed{5}.", "5"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("\\boxed{\\frac{\\sqrt{3}}{\\frac{1}{2}}}", "\\frac{\\sqrt{3}}{\\frac{1}{2}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),  # escaped braces need no partner
        ("\\boxed{a \\\\{b}}", "a \\\\{b}"),  # a line break, then a brace
        ("\\boxed {7}", "7"),
        ("$\\boxed 7$ is it", "7"),
        ("\\boxed \\frac{1}{2}$", "\\frac{1}{2}"),
        ("\\fbox{8}", "8"),
        ("\\boxed{1\\boxed{2}}", "2"),  # the last to start
        ("\\boxed{3} and \\boxed{4", "3"),  # cut off
        ("\\boxed{4", None),
        ("no box", None),
        ("\\boxedx{4}", None),
        ("} } \\boxed{4}", "4"),
        ("{ { \\boxed{4}", "4"),
        ("\\boxed{ }", ""),
        ("\\boxed{" + "1" * 1001 + "}", None),
    ],
)
def test_last_boxed(text, content):
    assert answers.last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<answer>5</answer>", "5"),
        ("<answer>\n5\n</answer>\n", "5"),
        ("<answer>5</answer> <answer>6</answer>", "6"),
        ("<answer>5</answer> <answer>6", "6"),
        ("<answer>5", "5"),
        ("<Answer>5</ANSWER> 7", "5"),
        ("<answer>5</answer></answer>", "5"),
        ("5</answer>", None),
        ("", None),
        ("\u0130\u0130<answer>5</answer>", "5"),  # these letters change their length in lower case
    ],
)
def test_answer_tag(text, content):
    assert answers.answer_tag(text) == content


def test_closed_tags_pair_as_the_released_pattern_does():
    text = "<answer>a<answer>b</answer>c</answer><answer>d</answer><answer>e"
    assert [text[start:end] for start, end in answers.closed_tags(text)] == ["a<answer>b", "d"]


def test_numbers():
    assert answers.to_number("1,234.5") == Fraction(2469, 2) and answers.to_number("-.5") == Fraction(-1, 2)
    assert answers.to_number("+7") == 7 and answers.to_number("1,234,567") == 1_234_567
    for text in ("", "1,23", "1e3", "0x1", "1.", "--1", "1 2", "\u0661", "9" * 31, "inf", "nan", "1_0"):
        assert answers.to_number(text) is None


def test_find_task():
    assert find_task("gsm8k") is TASKS["gsm8k"] is not D1_TASKS["gsm8k"] and find_task("gsm8k", d1_faithful=True) is D1_TASKS["gsm8k"]
    with pytest.raises(ValueError, match="'gsm' is unknown: use one of countdown, countdown_cd3, gsm8k, math, math500, reasoning"):
        find_task("gsm")
    with pytest.raises(ValueError, match="'math' is not a task of the released d1 code .* countdown_cd3, gsm8k, math500, sudoku_4x4$"):
        find_task("math", d1_faithful=True)


def test_dense_reward_is_the_sum_of_the_components():
    for name, answer, response in (
        ("sudoku", {"puzzle": "1..............."}, "1234341221434321"),
        ("countdown", {"numbers": [3, 7], "target": 10}, "3+7"),
        ("math", {"answer": 17, "values": [12, 17], "steps": 2}, "#### 17"),
    ):
        assert TASKS[name].components(json.dumps(answer), response) == {"dense": 1.0} and TASKS[name].alphabet
        assert TASKS[name].dense_reward(json.dumps(answer), response) == 1.0
    for task, answer in PUBLISHED:
        parts = task.components(answer, "<answer>\n17\n</answer>")
        assert task.dense_reward(answer, "<answer>\n17\n</answer>") == pytest.approx(sum(parts.values()))


@pytest.mark.parametrize(("task", "answer"), PUBLISHED, ids=lambda value: getattr(value, "name", ""))
def test_adversarial_texts_are_wrong_and_quick(task, answer):
    task.reward(answer, "\\boxed{x+1}")  # imports
    for text in ADVERSARIAL:
        start = time.process_time()
        assert task.reward(answer, text) == 0.0, text[:60]
        assert all(isinstance(part, float) for part in task.components(answer, text).values()), text[:60]
        if task.published_score is not None:
            assert 0.0 <= task.published_score(answer, text) <= 1.0
        task.extract(text)
        assert time.process_time() - start < 0.5, text[:60]


@pytest.mark.parametrize(("task", "answer"), PUBLISHED, ids=lambda value: getattr(value, "name", ""))
def test_garbage_never_raises(task, answer):
    pieces = "\\boxed{ } <answer> </answer> \\frac { 1 2 x + ^ ( ) , \\ $ = \\text{a} \\pm".split()
    texts = st.text() | st.lists(st.sampled_from(pieces), max_size=12).map("".join)

    @settings(deadline=None, max_examples=100)
    @given(texts)
    def check(text):
        assert task.reward(answer, text) in (0.0, 1.0)
        assert all(isinstance(part, float) for part in task.components(answer, text).values())
        assert task.extract(text) is None or isinstance(task.extract(text), str)

    check()
