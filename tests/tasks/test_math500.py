"""MATH: equivalence of answers in LaTeX, the verdict on responses, the training reward, the reader."""

import json
import random
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpo_jax.tasks import math500
from diffpo_jax.tasks.equivalence import equivalent, published_form
from tests.tasks.published import in_tags, needs, read_lines


def answer(gold):
    return json.dumps({"answer": gold})


@pytest.mark.parametrize(
    ("gold", "other", "same"),
    [  # numbers
        ("\\frac{14}{3}", "14/3", 1),
        ("\\frac{14}{3}", "\\dfrac{14}{3}", 1),
        ("\\frac43", "\\frac{4}{3}", 1),
        ("\\frac 59", "5/9", 1),
        ("\\frac9{19}", "\\tfrac{9}{19}", 1),
        ("\\frac{1}{2}", "\\frac12", 1),
        ("\\frac{1}{2}", "0.5", 1),
        ("\\frac{1}{2}", ".5", 1),
        ("\\frac{1}{2}", "\\frac{2}{4}", 1),
        ("\\frac{1}{2}", "-\\frac{1}{2}", 0),
        ("-\\frac{24}{25}", "-0.96", 1),
        ("-\\frac{24}{25}", "\\frac{-24}{25}", 1),
        ("\\frac{1}{3}", "0.333333", 0),  # not the same number
        ("1\\frac{4}{5}", "\\frac{9}{5}", 1),
        ("137 \\frac{1}{2}", "137.5", 1),
        ("10,\\!080", "10080", 1),
        ("58,500", "58500", 1),
        ("11,\\! 111,\\! 111,\\! 100", "11111111100", 1),
        ("\\$32,\\!348", "\\$32,348", 1),
        ("\\$18.90", "18.9", 1),
        ("5", "5.0", 1),
        ("5", "5.", 1),
        ("12", "-12", 0),
        ("12", "\u221212", 0),
        ("2^{100}", "4^{50}", 1),
        ("2^{100}", "2^{100}+1", 0),
        ("4210_{5}", "4210_5", 1),
        ("4210_{5}", "4210", 0),  # as published: the base belongs to the answer
        # units, degrees, words
        ("90^\\circ", "90", 1),
        ("90", "90^{\\circ}", 1),
        ("90^\\circ", "90 \\text{ degrees}", 1),
        ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}", 1),
        ("864 \\mbox{ inches}^2", "864", 1),
        ("15\\mbox{ cm}^2", "15 \\text{ cm}^2", 1),
        ("15\\mbox{ cm}^2", "15 cm^2", 1),
        ("5.4 \\text{ cents}", "5.4", 1),
        ("50\\%", "50", 1),
        ("\\text{Evelyn}", "Evelyn", 1),
        ("\\text{Evelyn}", "\\textbf{evelyn}", 1),
        ("\\text{even}", "\\text{odd}", 0),
        ("\\text{east}", "\\text{seat}", 0),
        ("\\text{(C)}", "C", 1),
        ("\\text{(C)}", "(C)", 1),
        ("\\text{(C)}", "D", 0),
        # prefixes and equations
        ("x=5", "5", 1),
        ("5", "x = 5", 1),
        ("5", "x = 6", 0),
        ("y = 2x + 3", "2x+3", 1),
        ("y = 2x + 3", "y = 3 + 2x", 1),
        ("y = 2x + 3", "y = 3x + 2", 0),
        ("5x - 7y + 11z + 4 = 0", "10x - 14y + 22z + 8 = 0", 1),
        ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z = -4", 1),
        ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z = 4", 0),
        ("x < 3", "3 > x", 1),
        ("x < 3", "x \\le 3", 0),
        ("x < 3", "x > 3", 0),
        ("x \\in [-2,7]", "[-2, 7]", 1),
        # intervals, tuples, lists, sets
        ("(3,4]", "\\left(3, 4\\right]", 1),
        ("(3,4]", "(3,4)", 0),
        ("(3,4]", "[3,4]", 0),
        ("(2,\\infty)", "(2, +\\infty)", 1),
        ("(0,9) \\cup (9,36)", "(9,36) \\cup (0,9)", 1),
        ("(0,9) \\cup (9,36)", "(0,36)", 0),
        ("\\left(\\frac{3}{5},\\frac{8}{3}\\right]", "(0.6, 8/3]", 1),
        ("(-2,1)", "(1,-2)", 0),
        ("1,-2", "-2, 1", 1),
        ("1,-2", "1, 2", 0),
        ("1,-2", "-2, 1, 1", 0),
        ("3, 5, 7", "3, 5 \\text{ and } 7", 1),
        ("\\{1\\pm\\sqrt{5},-2\\}", "\\{-2, 1+\\sqrt5, 1-\\sqrt5\\}", 1),
        ("1 \\pm \\sqrt{19}", "1 - \\sqrt{19}, 1 + \\sqrt{19}", 1),
        ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}", 0),
        # matrices
        ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "\\begin{bmatrix} -\\frac13 \\\\ \\frac23 \\end{bmatrix}", 1),
        ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "\\begin{pmatrix}-1/3\\\\2/3\\\\\\end{pmatrix}", 1),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\end{pmatrix}", 0),
        ("\\begin{pmatrix} 1 & 0 \\\\ 0 & 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 0 \\\\ 0 & 3 \\end{pmatrix}", 0),
        # expressions
        ("11\\sqrt2", "11\\sqrt{2}", 1),
        ("3\\sqrt{13}", "\\sqrt{117}", 1),
        ("2\\sqrt{113}", "2\\sqrt{131}", 0),
        ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}", 1),
        ("\\pi", "3.14159265358979", 0),
        ("18+2\\pi", "2(\\pi + 9)", 1),
        ("6 - 5i", "-5i + 6", 1),
        ("2", "(1+i)(1-i)", 1),
        ("(a+5)(b+2)", "ab + 2a + 5b + 10", 1),
        ("(a+5)(b+2)", "(a+2)(b+5)", 0),
        ("p - q", "q - p", 0),
        ("2k", "2n", 0),
        ("\\frac{11+9a}{20}", "\\frac{9a+11}{20}", 1),
        ("\\cot x", "\\frac{\\cos x}{\\sin x}", 1),
        ("\\cot x", "cot(x)", 1),
        ("x^{10}", "x^10", 1),
        ("x^{10}", "x^{11}", 0),
        ("x", "\\sqrt{x^2}", 0),  # not where x is negative
        ("x - y", "0", 0),
        ("5", "", 0),
    ],
)
def test_equivalent(gold, other, same):
    assert equivalent(gold, other) == bool(same)
    assert equivalent(gold, gold)


@pytest.mark.parametrize(
    ("gold", "response", "verdict"),
    [
        ("\\frac{1}{2}", "So it is $\\boxed{\\frac{1}{2}}$.", 1),
        ("\\frac{1}{2}", in_tags("\\boxed{\\dfrac12}"), 1),
        ("\\frac{1}{2}", in_tags("0.5"), 1),
        ("\\frac{1}{2}", in_tags("$x = 0.5$."), 1),
        ("\\frac{1}{2}", "\\boxed{3}, no, \\boxed{\\frac{1}{2}}", 1),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}, no, \\boxed{3}", 0),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}} of the 3 apples", 1),
        ("\\frac{1}{2}", "It is \\frac{1}{2}.", 0),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}", 0),
        ("\\frac{1}{2}", "<answer>3</answer> \\boxed{1/2}", 1),
        ("\\frac{1}{2}", "$\\boxed \\frac12$", 1),
        ("\\{1, 2\\}", "\\boxed{\\{2, 1\\}}", 1),
        ("2\\sqrt{\\frac{1}{\\sqrt{3}}}", "\\fbox{$2\\sqrt{\\frac{1}{\\sqrt{3}}}$}", 1),
        ("-3", "\\boxed{-3\\text{ units}}", 1),
        ("-3", "\\boxed{3}", 0),
    ],
)
def test_verdicts(gold, response, verdict):
    assert math500.reward(answer(gold), response) == verdict


@pytest.mark.parametrize(
    ("response", "parts", "released"),
    [  # (correct, format)
        (in_tags("\\boxed{\\frac12}"), (2.0, 1.0), (2.0, 0.75)),  # the released check for a box never holds
        (in_tags("\\boxed{1/3}"), (0.0, 1.0), (0.0, 0.75)),
        (in_tags("\\boxed{\\frac{2}{4}}"), (2.0, 1.0), (0.0, 0.75)),  # compared as text there
        (in_tags("\\frac12"), (2.0, 0.75), (0.0, 0.75)),  # there all of the response is compared without box
        ("\\boxed{\\frac12}", (2.0, 0.5), (2.0, 0.25)),
        ("\\frac12", (0.0, 0.25), (2.0, 0.25)),
        ("", (0.0, 0.25), (0.0, 0.25)),
    ],
)
def test_training_rewards_by_hand(response, parts, released):
    assert tuple(math500.components(answer("\\frac{1}{2}"), response).values()) == parts
    assert tuple(math500.D1_TASK.components(answer("\\frac{1}{2}"), response).values()) == released


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\tfrac 3{72}", "\\frac{3}{72}"),
        ("x = \\sqrt3", "\\sqrt{3}"),
        ("abc = 3", "abc=3"),
        ("0.5", "\\frac{1}{2}"),
        (".25", "0.25"),
        ("3/4", "\\frac{3}{4}"),
        ("90^\\circ", "90"),
        ("10\\%", "10"),
        ("5 \\text{ cm}", "5"),
        ("\\left( 3, 4 \\right]", "(3,4]"),
        ("10,\\!080", "10,080"),
        ("\\$5", "5"),
    ],
)
def test_published_form(text, form):
    assert published_form(text) == form


def test_released_verdicts():
    assert math500.D1_TASK.reward(answer("(a+5)(b+2)"), "\\boxed{(a + 5)(b + 2)}") == 1.0
    assert math500.D1_TASK.reward(answer("(a+5)(b+2)"), "\\boxed{(b+2)(a+5)}") == 0.0


def test_equivalence_in_a_thread_of_its_own():
    found = []
    thread = threading.Thread(target=lambda: found.append((equivalent("\\sqrt{8}", "2\\sqrt{2}"), equivalent("x", "9^{9^{9^9}}"))))
    thread.start()
    thread.join()
    assert found == [(True, False)]


def test_read(tmp_path):
    row = {"problem": " What? ", "solution": "It is $\\boxed{5}$.", "answer": "5", "level": 1}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = math500.read(str(tmp_path), "test", False)
    assert problem.prompt == math500.PROMPT + "\n\nWhat?" and "\\boxed{}" in math500.PROMPT
    assert problem.response == "<reasoning>\nIt is $\\boxed{5}$.\n</reasoning>\n<answer>\n\\boxed{5}\n</answer>"
    assert math500.TASK.dense_reward(problem.answer, problem.response) == 3.0
    with pytest.raises(FileNotFoundError, match="train.jsonl or train.parquet"):
        next(math500.read(str(tmp_path), "train", False))


def test_read_parquet_leaves_out_and_counts_what_has_no_answer(tmp_path, caplog):
    rows = [{"prompt": [{"content": "What?", "role": "user"}], "reward_model": {"ground_truth": gold}} for gold in ("5", None, "")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    with caplog.at_level("WARNING"):
        (problem,) = math500.read(str(tmp_path), "train", False)
    assert problem.response == "" and json.loads(problem.answer) == {"answer": "5"}
    assert "2 problems have no reference answer" in caplog.text


def test_published_golds_and_solutions_are_right_and_others_wrong():
    folder = needs("math500")
    rows = read_lines(f"{folder}/test.jsonl")
    problems = list(math500.read(folder, "test", False))
    assert len(rows) == len(problems) == 500
    for row, problem in zip(rows, problems, strict=True):
        assert math500.reward(problem.answer, f"So it is $\\boxed{{{row['answer']}}}$.") == 1.0
        assert math500.reward(problem.answer, row["solution"]) == 1.0  # the answer as the solution writes it
    rng = random.Random(0)
    pairs = [rng.sample(rows, 2) for _ in range(200)]
    pairs = [(a["answer"], b["answer"]) for a, b in pairs if a["answer"] != b["answer"]][:100]
    assert len(pairs) == 100
    assert [pair for pair in pairs if math500.reward(answer(pair[0]), f"\\boxed{{{pair[1]}}}")] == []


def test_published_training_problems():
    folder = needs("math500")
    assert len(list(math500.read(folder, "train", False))) == 7474 - 4
