"""Arithmetic word problems: the generator, the written solutions, the verifier."""

import json
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from diffpo_jax.tasks import math

SETTINGS = ConfigDict({"steps_min": 2, "steps_max": 2, "largest_number": 9})
ANSWER = json.dumps({"answer": 17, "values": [12, 17], "steps": 2})


def template(prompt):
    """The wording without numbers, names and things."""
    words = re.sub(r"[0-9]+", "{}", prompt).split(" ")
    return " ".join(re.sub("[a-z]+", "_", word) if word.strip(".") in math.NAMES + math.THINGS else word for word in words)


def numbers(prompt):
    return tuple(sorted(map(int, re.findall(r"[0-9]+", prompt))))


def amount_by_hand(prompt):
    """The answer, read off the sentences one after the other."""
    amount = 0
    for sentence in re.split(r"[.?]", prompt):
        found = list(map(int, re.findall(r"[0-9]+", sentence)))
        if "bags of" in sentence or "sets of" in sentence or "kids" in sentence:
            found = [found[0] * found[1]]
        if "half" in sentence:
            amount //= 2
        elif "doubles" in sentence or "triples" in sentence:
            amount *= 2 if "doubles" in sentence else 3
        elif any(word in sentence for word in ("loses", "sells", "uses", "gives")):
            amount -= sum(found)
        else:
            amount += sum(found)
    return amount


@pytest.fixture(scope="module")
def splits():
    return list(math.generate(SETTINGS, "train", 20_000, 0)), list(math.generate(SETTINGS, "test", 512, 0))


def test_answers_agree_with_the_text(splits):
    for problem in splits[0] + splits[1]:
        assert json.loads(problem.answer)["answer"] == amount_by_hand(problem.prompt)
    longer = ConfigDict({"steps_min": 1, "steps_max": 5, "largest_number": 9})
    for problem in math.generate(longer, "train", 3000, 0):
        assert json.loads(problem.answer)["answer"] == amount_by_hand(problem.prompt)


def test_written_steps_hold_and_reach_true_values(splits):
    longer = ConfigDict({"steps_min": 1, "steps_max": 5, "largest_number": 9})
    for problem in splits[0] + splits[1] + list(math.generate(longer, "train", 3000, 0)):
        facts = json.loads(problem.answer)
        working, final = problem.response.split(" #### ")
        link = next((link for link in math.LINKS[1:] if link in working), " ")  # one style a solution
        steps = working.split(link)
        assert int(final) == facts["answer"] and len(steps) == facts["steps"]
        for step in steps:
            a, symbol, b, value = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
            a, b, value = int(a), int(b), int(value)
            assert value * b == a if symbol == "/" else {"+": a + b, "-": a - b, "*": a * b}[symbol] == value
            assert 0 <= value <= 99 and value in facts["values"]
        assert value == facts["answer"]
        assert math.reward(problem.answer, problem.response) == math.dense_reward(problem.answer, problem.response) == 1.0


def test_splits_share_neither_template_nor_numbers(splits):
    train, test = splits
    assert not {template(p.prompt) for p in train} & {template(p.prompt) for p in test}
    assert not {numbers(p.prompt) for p in train} & {numbers(p.prompt) for p in test}
    assert len({p.prompt for p in test}) == 512
    assert len({template(p.prompt) for p in test}) > 30 and len({numbers(p.prompt) for p in test}) > 30
    seen = {template(p.prompt) for p in train}
    for text in [fragment.text for fragment in math.OPENINGS + math.EVENTS] + list(math.QUESTIONS):
        assert any(text.replace("{name}", "_").replace("{things}", "_") in words for words in seen), text


def test_texts_are_short(splits):
    problems = splits[0] + splits[1]
    assert max(len(p.prompt) for p in problems) <= 52
    assert max(len(p.response) for p in problems) <= 26
    assert {c for p in problems for c in p.prompt + p.response} == set(math.TASK.alphabet)
    assert len(math.TASK.alphabet) + 3 <= 48


def test_one_problem_has_several_solutions():
    stages = [([(1, (5,)), (1, (3,)), (-1, (2,))], "")]
    solutions = {" ".join(math.write_steps(stages, random.Random(seed))) for seed in range(200)}
    assert solutions == {"5+3=8 8-2=6", "3+5=8 8-2=6", "5-2=3 3+3=6", "3-2=1 5+1=6", "3-2=1 1+5=6"}
    assert math.true_values(stages) == (6, {8, 3, 1, 6})


def test_two_subtractions_may_be_added_up_first():
    stages = [([(1, (9,)), (-1, (2,)), (-1, (3,))], "")]
    solutions = {" ".join(math.write_steps(stages, random.Random(seed))) for seed in range(200)}
    assert solutions == {"9-2=7 7-3=4", "9-3=6 6-2=4", "2+3=5 9-5=4", "3+2=5 9-5=4"}
    assert math.true_values(stages) == (4, {7, 6, 5, 4})


def test_scaling_waits_for_what_came_before():
    stages = [([(1, (3, 4))], "/2"), ([(1, (5,))], "")]
    solutions = {" ".join(math.write_steps(stages, random.Random(seed))) for seed in range(200)}
    assert solutions == {f"{a}=12 12/2=6 {b}=11" for a in ("3*4", "4*3") for b in ("6+5", "5+6")}
    assert math.true_values(stages) == (11, {12, 6, 11})


def test_impossible_settings_are_an_error():
    with pytest.raises(ValueError, match="steps_min=3, steps_max=2"):
        math.generate(ConfigDict({"steps_min": 3, "steps_max": 2, "largest_number": 9}), "train", 1, 0)
    with pytest.raises(ValueError, match="lower task.test_size"):
        list(math.generate(ConfigDict({"steps_min": 1, "steps_max": 1, "largest_number": 2}), "test", 500, 0))


@pytest.mark.parametrize(
    "response",
    ["#### 17", "####17", "#### +17 ", "3*4=12 5+12=17 #### 17", "#### 3 #### 17", "#### 0017", "no #### 17\n", "#### 17 #### 17"],
)
def test_right(response):
    assert math.reward(ANSWER, response) == math.dense_reward(ANSWER, response) == 1.0


def test_signs_and_commas():
    thousand, negative = json.dumps({"answer": 12345, "values": [], "steps": 1}), json.dumps({"answer": -4, "values": [], "steps": 1})
    assert math.reward(thousand, "#### 12,345") == math.reward(negative, "#### -4") == 1.0
    assert math.reward(thousand, "#### 123,45") == math.reward(thousand, "#### 12,,345") == math.reward(negative, "#### 4") == 0.0


@pytest.mark.parametrize(
    "response",
    ["", "17", "####", "### 17", "#### 18", "#### 17.", "#### 17 pens", "#### -17", "#### 1 7", "#### 17 ####", "#### 17 #### 3"]
    + ["#### 1_7", "#### 0x11", "#### 17.0", "#### \u0661\u0667", "#### \uff11\uff17", "#### 17\u00a0", "#### 9**9**9**9"]
    + ["#### " + "9" * 10**6, "#" * 10**6, "#### " + "(" * 10**5 + "17", "#### 17/1", "#### " + "1," * 10**5],
)
def test_wrong(response):
    start = time.perf_counter()
    assert math.reward(ANSWER, response) == 0.0
    assert math.dense_reward(ANSWER, response) == 0.0
    assert time.perf_counter() - start < 0.2


def test_dense_reward_by_hand():
    assert math.dense_reward(ANSWER, "3*4=12 5+12=18 #### 18") == 0.25
    assert math.dense_reward(ANSWER, "3*4=12 5+12=17 #### 18") == 0.5
    assert math.dense_reward(ANSWER, "3*4=12 4*3=12 6*2=12 #### 3") == 0.25  # one value, however often
    assert math.dense_reward(ANSWER, "3*4=12 5+12=17 12+5=17") == 0.5
    assert math.dense_reward(ANSWER, "3*4=13 12=12 12/0=12 1/2=12 #### 1") == 0.0
    assert math.dense_reward(ANSWER, "24/2=12") == 0.25
    assert math.dense_reward(ANSWER, "#### 3 3*4=12 #### 1") == 0.0  # after the mark nothing counts
    assert math.dense_reward(ANSWER, "3*\u0664=12 x3*4=12") == 0.0


@settings(deadline=None, max_examples=300)
@given(st.text() | st.text(alphabet="0123456789+-*/=# ", max_size=60) | st.integers().map(lambda n: f"#### {n}"))
def test_garbage_never_raises(text):
    dense = math.dense_reward(ANSWER, text)
    assert (dense == 1.0) == (math.reward(ANSWER, text) == 1.0)
    assert dense == 1.0 or 0.0 <= dense <= 0.5
    if re.fullmatch(r"#### -?[0-9]+", text):
        assert math.reward(ANSWER, text) == float(text == "#### 17")
