"""The rewards of every task: no text makes them raise, they stay in their bounds, and a right answer gets all there is."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpo_jax.tasks import D1_TASKS, TASKS
from tests.tasks.published import in_tags

BOXED = "<reasoning>\nSo it is.\n</reasoning>\n<answer>\n\\boxed{17}\n</answer>"
RIGHT = {  # task -> (answer, a right response, the most that it can earn in training)
    "sudoku": ({"puzzle": "1..............."}, "1234341221434321", 1.0),
    "countdown": ({"numbers": [3, 7], "target": 10}, "3+7", 1.0),
    "math": ({"answer": 17, "values": [12, 17], "steps": 2}, "3*4=12 5+12=17 #### 17", 1.0),
    "gsm8k": ({"answer": "17"}, BOXED, 4.0),
    "math500": ({"answer": "\\frac{34}{2}"}, BOXED, 3.0),
    "countdown_cd3": ({"numbers": [3, 7, 9], "target": 30}, in_tags("3*7+9"), 1.0),
    "sudoku_4x4": ({"puzzle": "1234341221430000", "solution": "1234341221434321"}, in_tags("1234341221434321"), 1.0),
    "reasoning_gym": (
        {"dataset": "basic_arithmetic", "options": {}, "entry": {"question": "1 + 2 =", "answer": "3", "metadata": {}}}, in_tags("3"), 1.0,
    ),
}  # fmt: skip
PIECES = (
    "\\boxed{", "}", "<answer>", "</answer>", "<reasoning>\n", "\n</reasoning>\n", "\\frac{", "1", "2", "17", "3+7", "(", ")", "/0", "*",
    "-", "=", "####", " ", "\n", "1234341221434321", "x", "^", ",", ".", "\\pm", "\u0661", "\x00", "\ud800",
)  # fmt: skip


def test_every_task_is_here():
    assert RIGHT.keys() == TASKS.keys() and D1_TASKS.keys() <= RIGHT.keys()


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_gets_all_there_is(name):
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    answer, response, most = RIGHT[name]
    assert TASKS[name].reward(json.dumps(answer), response) == 1.0
    assert TASKS[name].dense_reward(json.dumps(answer), response) == pytest.approx(most)


@pytest.mark.parametrize("name", RIGHT)
def test_any_text_earns_something_in_bounds(name):
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    answer, response, most = RIGHT[name]
    answer = json.dumps(answer)
    near = st.builds(lambda end, text: response[:end] + text + response[end + 1 :], st.integers(0, len(response)), st.text(max_size=3))

    @settings(deadline=None, max_examples=100, derandomize=True, database=None)
    @given(st.text() | st.lists(st.sampled_from(PIECES), max_size=15).map("".join) | near)
    def check(text):
        for tasks in (TASKS, D1_TASKS):
            if name in tasks:
                verdict, dense = tasks[name].reward(answer, text), tasks[name].dense_reward(answer, text)
                assert verdict in (0.0, 1.0) and math.isfinite(dense)
                # GSM8K's published reward takes a thousandth for each character after the answer, in d1's code twice
                assert -0.002 * len(text) * (name == "gsm8k") <= dense <= most
                if tasks[name].extract is not None:
                    assert isinstance(tasks[name].extract(text), str | None)
                if tasks[name].published_score is not None:
                    assert 0.0 <= tasks[name].published_score(answer, text) <= 1.0

    check()
