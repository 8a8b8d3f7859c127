"""Countdown: the generator, the parser, the verifier."""

import json
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from diffpo_jax.tasks import countdown

SETTINGS = ConfigDict({"numbers_min": 3, "numbers_max": 4, "largest_number": 9, "largest_target": 50})


def answer(numbers, target):
    return json.dumps({"numbers": numbers, "target": target})


def key(problem):
    numbers, target = problem.prompt.split("=")
    return tuple(sorted(map(int, numbers.split(" ")))), int(target)


def test_problems():
    train = list(countdown.generate(SETTINGS, "train", 10_000, 0))
    test = list(countdown.generate(SETTINGS, "test", 512, 0))
    assert not {key(p) for p in train} & {key(p) for p in test}
    assert len({p.prompt for p in test}) == 512
    for problem in train + test:
        numbers, target = key(problem)
        assert json.loads(problem.answer)["target"] == target and sorted(json.loads(problem.answer)["numbers"]) == list(numbers)
        assert 3 <= len(numbers) <= 4 and all(1 <= n <= 9 for n in numbers) and 1 <= target <= 50
        assert countdown.reward(problem.answer, problem.response) == 1.0
        assert set(problem.prompt + problem.response) <= set(countdown.TASK.alphabet)


def test_one_problem_has_several_demonstrations():
    settings = SETTINGS.copy_and_resolve_references()
    settings.numbers_max = 3
    ways = {}
    for problem in countdown.generate(settings, "train", 10_000, 0):
        ways.setdefault(key(problem), set()).add(problem.response)
    assert sum(len(responses) > 1 for responses in ways.values()) > 0.5 * len(ways)
    assert list(countdown.generate(settings, "test", 20, 1)) == list(countdown.generate(settings, "test", 20, 1))


def test_impossible_settings_are_an_error():
    with pytest.raises(ValueError, match="numbers_min=4, numbers_max=3"):
        countdown.generate(ConfigDict({"numbers_min": 4, "numbers_max": 3}), "train", 1, 0)
    few = ConfigDict({"numbers_min": 2, "numbers_max": 2, "largest_number": 2, "largest_target": 5})
    with pytest.raises(ValueError, match="of 100 problems"):
        list(countdown.generate(few, "test", 100, 0))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3+7*9", 66),
        ("(3+7)*9", 90),
        ("8-3-2", 3),
        ("8-(3-2)", 7),
        ("8/4/2", 1),
        ("8/(4/2)", 4),
        ("7/2*4", 14),
        ("1/3+1/6", Fraction(1, 2)),
        ("((5))", 5),
        (" 3 + 7 ", 10),
        ("2-9", -7),
        ("1/(3-3)", None),
        ("1/0+5", None),
    ],
)
def test_parser_values(text, value):
    assert countdown.parse(text)[0] == value


@pytest.mark.parametrize(
    "text",
    ["", " ", "3+", "+3", "-3", "3--2", "()", "(3", "3)", "(3+4", "3(4)", "3 4", "3**4", "3//4", "3+7=10", "3.0", "1e3", "1_0", "07", "00"]
    + ["3,4", "a", "3;4", "\u0663+4", "\uff13+4", "\u00b2+1", "3\n+4", "3\u00d74", "__import__('os')", "1234567", "(" * 17 + "1" + ")" * 17]
    + ["1+" * 200 + "1", "(" * 10**6, ")" * 100, "9" * 10**6, "9*" * 128],
)
def test_not_an_expression(text):
    assert countdown.parse(text) is None
    assert countdown.dense_reward(answer([3, 4], 7), text) == countdown.reward(answer([3, 4], 7), text) == 0.0


def test_rewards_by_hand():
    problem = answer([3, 7, 9], 30)
    assert countdown.dense_reward(problem, "(7+3)*9/3") == 0.1  # uses 3 twice
    assert countdown.dense_reward(problem, "7*3+9") == countdown.dense_reward(problem, "(9)+3*7") == 1.0
    assert countdown.dense_reward(problem, "3*9+7") == 0.2
    assert countdown.dense_reward(problem, "30") == countdown.dense_reward(problem, "39/7") == 0.1
    assert countdown.dense_reward(problem, "7/(9-3-3-3)") == 0.1
    assert countdown.reward(answer([3, 3], 1), "3/(3-3)") == 0.0
    assert countdown.reward(answer([3, 3, 8, 8], 24), "8/(3-8/3)") == 1.0  # only fractions reach it
    assert countdown.reward(answer([1, 3, 3], 1), "1/3*3") == 1.0
    assert countdown.reward(answer([3, 7, 9], 30), "37-9+2") == 0.0


def test_longest_expressions_are_quick():
    start = time.perf_counter()
    for text in ("+".join(f"1/9999{i:02d}" for i in range(28)), "*".join(["999999"] * 36), "(" * 16 + "1" + ")" * 16 + "/0" * 100):
        assert countdown.reward(answer([3, 7, 9], 30), text) == 0.0
    assert time.perf_counter() - start < 0.2


trees = st.recursive(st.integers(0, 99).map(lambda n: (n,)), lambda t: st.tuples(st.sampled_from("+-*/"), t, t), max_leaves=8)


def written(tree):
    return str(tree[0]) if len(tree) == 1 else f"({written(tree[1])}{tree[0]}{written(tree[2])})"


def evaluated(tree):
    if len(tree) == 1:
        return Fraction(tree[0])
    a, b = evaluated(tree[1]), evaluated(tree[2])
    if a is None or b is None or (tree[0] == "/" and b == 0):
        return None
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[tree[0]]()


@settings(deadline=None)
@given(trees)
def test_parser_agrees_with_the_tree(tree):
    assert countdown.parse(written(tree))[0] == evaluated(tree)


@settings(deadline=None, max_examples=300)
@given(st.text() | st.text(alphabet="0123456789+-*/() =", max_size=60))
def test_garbage_never_raises(text):
    dense = countdown.dense_reward(answer([3, 7], 10), text)
    assert dense in (0.0, 0.1, 0.2, 1.0)
    assert (dense == 1.0) == (countdown.reward(answer([3, 7], 10), text) == 1.0)
    assert (dense == 0.0) == (countdown.parse(text) is None)
