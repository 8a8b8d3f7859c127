"""Data sets of the reasoning-gym package: splits, scores, errors, and what its scorers are never shown."""

import inspect
import json
import sys
import time

import pytest
from ml_collections import ConfigDict

from diffpo_jax.tasks import reasoning_gym
from tests.tasks.published import ADVERSARIAL

pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")


def settings(dataset="basic_arithmetic", options="{}"):
    return ConfigDict({"dataset": dataset, "options": options})


@pytest.fixture(autouse=True)
def installed(request):
    if "missing" not in request.node.name:
        pytest.importorskip("reasoning_gym")


def generate(dataset, split="train", count=3, seed=0, options="{}"):
    return list(reasoning_gym.generate(settings(dataset, options), split, count, seed))


def reference(problem):
    return reasoning_gym._unpack(json.loads(problem.answer)["entry"])["answer"]


def test_splits_share_no_prompt_and_seeds_differ():
    train, test = generate("basic_arithmetic", "train", 400), generate("basic_arithmetic", "test", 50)
    assert len(train) == 400 and len({p.prompt for p in test}) == 50
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert generate("basic_arithmetic", "test", 50) == test != generate("basic_arithmetic", "test", 50, seed=1)
    assert not {p.prompt for p in generate("basic_arithmetic", "train", 400, seed=1)} & {p.prompt for p in test}


@pytest.mark.parametrize("dataset", ["basic_arithmetic", "rearc", "n_queens", "simple_integration", "word_sorting", "spiral_matrix"])
def test_the_reference_answer_is_right(dataset):
    for problem in generate(dataset):
        text = reference(problem)
        for response in (f"<reasoning>\n...\n</reasoning>\n<answer>\n{text}\n</answer>", f"so <answer>{text}"):
            assert reasoning_gym.reward(problem.answer, response) == 1.0
            assert reasoning_gym.TASK.components(problem.answer, response) == {"score": 1.0}
        assert reasoning_gym.reward(problem.answer, text) == reasoning_gym.score(problem.answer, "no answer") == 0.0
        assert problem.prompt.endswith(reasoning_gym.PROMPT) and problem.response == ""


def test_only_a_score_of_one_is_right():
    problem = generate("simple_equations")[0]
    assert reasoning_gym.reward(problem.answer, f"\\boxed{{{reference(problem)}}}") == 1.0
    partial = f"<answer>about {reference(problem)}</answer>"
    assert 0.0 < reasoning_gym.score(problem.answer, partial) < 1.0 and reasoning_gym.reward(problem.answer, partial) == 0.0


def test_options_reach_the_data_set_and_its_scorer():
    options = '{"min_terms": 2, "max_terms": 2, "operators": ["+"], "allow_negation": false}'
    for problem in generate("basic_arithmetic", options=options):
        assert problem.prompt.split("Write your answer")[0].count("+") == 1
        assert json.loads(problem.answer)["options"] == json.loads(options)


def test_entries_survive_json():
    entry = {"a": (1, [2, (3,)]), 5: {"<x>": {1, 2}}, "m": {(0, 1): "b", "s": frozenset("q")}, "n": None}
    assert reasoning_gym._unpack(json.loads(json.dumps(reasoning_gym._pack(entry)))) == entry


def test_errors():
    with pytest.raises(ValueError, match="'basic_arithmetics' is unknown; close to it: basic_arithmetic"):
        generate("basic_arithmetics")
    with pytest.raises(ValueError, match="basic_arithmetic has no option terms; it has .*max_terms"):
        generate("basic_arithmetic", options='{"terms": 3}')
    with pytest.raises(ValueError, match="has no option seed"):
        generate("basic_arithmetic", options='{"seed": 3}')
    with pytest.raises(ValueError, match="basic_arithmetic refuses"):
        generate("basic_arithmetic", options='{"min_terms": -1}')
    for options in ("{", "[1]"):
        with pytest.raises(ValueError, match="reasoning_gym.options"):
            generate("basic_arithmetic", options=options)
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        generate("basic_arithmetic", "valid")


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r'pip install "diffpo_jax\[gym\]"'):
        generate("basic_arithmetic")


def test_every_scorer_that_evaluates_answers_is_known():
    _, datasets = reasoning_gym._package()
    evaluating = set()
    for name, (cls, _) in datasets.items():
        source = inspect.getsource(cls.score_answer)
        evaluating |= {name} if any(call in source for call in ("eval(", "exec(", "parse_expr(", "sympify(")) else set()
    evaluating -= {"number_sorting"}  # evaluates the reference
    assert evaluating == reasoning_gym.LISTS | reasoning_gym.EXPRESSIONS


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("x**2 + 2*x*y - 3", True),
        ("3*sin(x)**2/2 + exp(2*x) + C", True),
        ("(x + 1)**3", True),
        ("x**(3/2)", True),
        ("(3+7)*9/3", True),
        ("9**9**9**9", False),
        ("9**(9**9)", False),
        ("(9**9)**99", False),
        ("9**999", False),
        ("9^9^9", False),
        ("factorial(9)", False),
        ("__import__('os')", False),
        ("x.diff(x)", False),
        ("[1 for x in y]", False),
        ("f'{x}'", False),
        ("1" * 14, False),
    ],
)
def test_what_reaches_sympy(text, harmless):
    assert reasoning_gym._is_harmless("countdown", text) is harmless


@pytest.mark.parametrize(("text", "harmless"), [("[[0, 1], [1, 2]]", True), ("_ Q _ _\nQ _ _ _", True), ("['a', 'b']", True)])
def test_what_reaches_eval(text, harmless):
    assert reasoning_gym._is_harmless("n_queens", text) is harmless
    for code in ("exit()", "[1]*10**9", "[x for x in y]", "{}", "f'{x}'", "[].__class__", "lambda: 1"):
        assert not reasoning_gym._is_harmless("n_queens", code)


@pytest.mark.parametrize("dataset", ["basic_arithmetic", "countdown", "spiral_matrix", "polynomial_multiplication"])
def test_adversarial_answers_are_wrong_and_quick(dataset):
    (problem,) = generate(dataset, count=1)
    for text in ADVERSARIAL:
        start = time.process_time()
        assert reasoning_gym.reward(problem.answer, text) == 0.0 and 0.0 <= reasoning_gym.score(problem.answer, text) < 1.0
        assert time.process_time() - start < 0.5, text[:60]
