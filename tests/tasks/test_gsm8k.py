"""GSM8K: the reader, the field's verdict, the training reward and what the released d1 code makes of the same texts."""

import json
import random
import re

import pytest

from diffpo_jax.tasks import gsm8k
from tests.tasks.published import in_tags, needs, read_lines


def answer(gold):
    return json.dumps({"answer": gold})


@pytest.mark.parametrize(
    ("gold", "response", "verdict"),
    [
        ("18", "She makes \\boxed{18} dollars.", 1),
        ("18", in_tags("\\boxed{18}"), 1),
        ("18", in_tags("18"), 1),
        ("18", in_tags("She makes $18 a day."), 1),
        ("18", "\\boxed{\\$18}", 1),
        ("18", "\\boxed{18 \\text{ dollars}}", 1),
        ("18", "\\boxed{18\\,\\mathrm{cm}^2}", 1),
        ("18", "\\boxed{\\text{The answer is } 18}", 1),
        ("18", "\\boxed{18.00}", 1),
        ("18", "\\boxed{x = 18}", 1),
        ("18", "\\boxed{x_1=18}", 1),
        ("18", "\\boxed{{18}}", 1),
        ("18", "\\boxed 18", 1),
        ("18", "\\fbox{18}", 1),
        ("18", "\\boxed{18}. I hope this helps all 20 of you.", 1),
        ("18", "\\boxed{18", 0),  # cut off
        ("18", "\\boxed{...} so \\boxed{18} and not \\boxed{3}", 1),  # the first that parses
        ("18", "\\boxed{3} eggs are eaten, so \\boxed{18}", 0),
        ("18", "The answer is 18.", 0),  # neither box nor tag
        ("18", "<answer>16 - 3 = 13</answer>", 0),
        ("18", "<answer>3 * 6 = 18", 1),  # not closed
        ("18", "<ANSWER>18</ANSWER>", 1),
        ("18", "<answer>20</answer> wait <answer>18</answer>", 1),
        ("18", "<answer>18 or 20</answer>", 0),
        ("18", "\\boxed{20} <answer>18</answer>", 0),  # a box goes first
        ("18", "\\boxed{1 8}", 0),
        ("18", "\\boxed{17.5}", 0),
        ("18", "\\boxed{eighteen}", 0),
        ("18", "\\boxed{\uff11\uff18}", 0),
        ("70000", "\\boxed{70,000}", 1),
        ("70000", "\\boxed{70{,}000}", 1),
        ("70000", "\\boxed{\\$70,\\!000}", 1),
        ("70000", "\\boxed{70,00}", 0),
        ("1,080", "\\boxed{1080}", 1),
        ("1,080", "<answer>It costs 1,080.</answer>", 1),
        ("-7", "\\boxed{-7}", 1),
        ("-7", "\\boxed{\u22127}", 1),
        ("7", "\\boxed{-7}", 0),
        ("5", "<answer>from 10 to 10-5</answer>", 1),  # a minus between numbers is no sign
        ("5", "\\boxed{\\frac{10}{2}}", 1),
        ("5", "\\boxed{\\dfrac{10}{2}}", 1),
        ("5", "\\boxed{10/2}", 1),
        ("10", "\\boxed{\\frac{10}{2}}", 0),
        ("50", "\\boxed{50\\%}", 1),
    ],
)
def test_verdicts(gold, response, verdict):
    assert gsm8k.reward(answer(gold), response) == verdict


def test_extract_shows_what_is_judged():
    assert gsm8k.extract("\\boxed{\\$70,000}") == "70000" and gsm8k.extract("\\boxed{\\frac{3}{2}}") == "3/2" and gsm8k.extract("7") is None


FULL = "<reasoning>\nS.\nT.\n</reasoning>\n<answer>\n18\n</answer>"


@pytest.mark.parametrize(
    ("response", "parts"),
    [  # tags, soft_format, strict_format, integer, correct
        (FULL, (0.5, 0.5, 0.5, 0.5, 2.0)),
        (FULL + "\n", (0.5, 0.5, 0.5, 0.5, 2.0)),
        (FULL.replace("18", "\\boxed{18}"), (0.5, 0.5, 0.5, 0.5, 2.0)),
        (FULL.replace("18", "\\boxed{-7}"), (0.5, 0.5, 0.5, 0.5, 0.0)),
        (FULL.replace("18", "\\boxed{1.5}"), (0.5, 0.5, 0.5, 0.0, 0.0)),
        (FULL.replace("18", "It is 18."), (0.5, 0.5, 0.5, 0.0, 2.0)),
        (FULL + "\nabcd", (0.5 - 0.004, 0.5, 0.0, 0.5, 2.0)),
        (FULL.replace("\n", " "), (0.0, 0.5, 0.0, 0.5, 2.0)),
        (FULL + "\n" + FULL, (0.0, 0.5, 0.5, 0.5, 2.0)),  # each tag twice
        ("so " + FULL, (0.5, 0.0, 0.0, 0.5, 2.0)),
        ("<answer>\n18", (0.0, 0.0, 0.0, 0.5, 2.0)),
        ("\n<answer>\n18\n</answer>", (0.25, 0.0, 0.0, 0.5, 2.0)),
        ("\\boxed{18}", (0.0, 0.0, 0.0, 0.0, 2.0)),
        ("18", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_components_by_hand(response, parts):
    components = gsm8k.components(answer("18"), response)
    assert list(components) == ["tags", "soft_format", "strict_format", "integer", "correct"]
    assert tuple(components.values()) == pytest.approx(parts)
    assert gsm8k.TASK.dense_reward(answer("18"), response) == pytest.approx(sum(parts))


LINE = "<reasoning>\nS.\n</reasoning>\n<answer>\n18\n</answer>"  # 49 characters


@pytest.mark.parametrize(
    ("gold", "response", "parts"),
    [
        ("18", LINE + "\n", (0.5, 0.0, 0.5, 0.5, 2.0)),  # the soft format never matches over lines
        ("18", FULL + "\n", (0.5, 0.0, 0.0, 0.5, 2.0)),  # nor the strict one over two lines of reasoning
        ("18", LINE, (0.5 - 0.049 + 0.001, 0.0, 0.0, 0.5, 2.0)),  # without its last line break it pays for everything
        ("18", LINE + "\nabcd", (0.5 - 0.008, 0.0, 0.0, 0.5, 2.0)),  # twice for what follows
        ("18", "<reasoning>S.</reasoning><answer>18</answer>", (0.0, 0.5, 0.0, 0.5, 2.0)),
        ("18", LINE.replace("18", "\\boxed{18}") + "\n", (0.5, 0.0, 0.5, 0.0, 0.0)),
        ("18", "18", (0.0, 0.0, 0.0, 0.5, 2.0)),  # no tag: all of the text
        ("-7", "<answer>-7</answer>", (0.0, 0.0, 0.0, 0.0, 2.0)),
        ("1,080", "<answer>1,080</answer>", (0.0, 0.0, 0.0, 0.0, 2.0)),
        ("1,080", "<answer>1080</answer>", (0.0, 0.0, 0.0, 0.5, 0.0)),
    ],
)
def test_released_components_by_hand(gold, response, parts):
    assert tuple(gsm8k.D1_TASK.components(answer(gold), response).values()) == pytest.approx(parts)


@pytest.mark.parametrize(
    ("gold", "response", "verdict"),
    [
        ("70000", "\\boxed{70000}", 1),
        ("70000", "\\boxed{70,000}", 0),  # read as 70
        ("70", "\\boxed{70,000}", 1),
        ("10", "\\boxed{\\frac{10}{2}}", 1),
        ("18", "\\boxed{...} \\boxed{18}", 1),
        ("1,080", "<answer>so 1080</answer> <answer>5</answer>", 1),  # the first tag
        ("18", "<answer>18", 0),
        ("18", "18", 0),
    ],
)
def test_released_verdicts(gold, response, verdict):
    assert gsm8k.D1_TASK.reward(answer(gold), response) == verdict


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_read(tmp_path):
    row = {"question": " How many? ", "answer": "2 of 540 are 2*540=<<2*540=1080>>1080.\nSo it is.\n#### 1,080"}
    write(tmp_path, "train.jsonl", [row])
    write(tmp_path, "test.jsonl", [row, row])
    (problem,) = gsm8k.read(str(tmp_path), "train", False)
    assert problem.prompt == gsm8k.PROMPT + "\n\nHow many?" and "<answer>" in gsm8k.PROMPT and "\\boxed{" in gsm8k.PROMPT
    assert problem.response == "<reasoning>\n2 of 540 are 2*540=1080.\nSo it is.\n</reasoning>\n<answer>\n\\boxed{1080}\n</answer>"
    assert json.loads(problem.answer) == {"answer": "1,080"}
    assert gsm8k.TASK.dense_reward(problem.answer, problem.response) == 4.0
    assert len(list(gsm8k.read(str(tmp_path), "test", False))) == 2
    (released,) = gsm8k.read(str(tmp_path), "train", True)  # the released training reward knows no box
    assert "boxed" not in released.prompt + released.response and released.response.endswith("<answer>\n1,080\n</answer>")
    assert gsm8k.D1_TASK.components(released.answer, released.response)["correct"] == 2.0
    assert "boxed" in next(gsm8k.read(str(tmp_path), "test", True)).prompt


def test_read_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="train.jsonl"):
        next(gsm8k.read(str(tmp_path), "train", False))
    write(tmp_path, "train.jsonl", [{"question": "?", "answer": "#### 5"}, {"question": "?", "answer": "five"}])
    with pytest.raises(ValueError, match="train.jsonl, row 2: the answer does not end in '#### NUMBER': 'five'"):
        list(gsm8k.read(str(tmp_path), "train", False))
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        next(gsm8k.read(str(tmp_path), "valid", False))


def test_published_golds_are_right_and_others_wrong():
    folder = needs("gsm8k")
    golds = [row["answer"].split("####")[1].strip() for row in read_lines(f"{folder}/test.jsonl")]
    problems = list(gsm8k.read(folder, "test", False))
    assert len(golds) == len(problems) == 1319 and len(list(gsm8k.read(folder, "train", False))) == 7473
    for gold, problem in zip(golds, problems, strict=True):
        assert gsm8k.reward(problem.answer, f"So it is \\boxed{{{gold}}}.") == 1.0
        assert gsm8k.reward(problem.answer, problem.response) == 1.0 and not re.search("<<|>>|####", problem.response)
    rng = random.Random(0)
    pairs = [rng.sample(range(1319), 2) for _ in range(200)]
    pairs = [(i, j) for i, j in pairs if golds[i].replace(",", "") != golds[j].replace(",", "")][:100]
    assert len(pairs) == 100
    assert all(gsm8k.reward(problems[i].answer, f"\\boxed{{{golds[j]}}}") == 0.0 for i, j in pairs)
