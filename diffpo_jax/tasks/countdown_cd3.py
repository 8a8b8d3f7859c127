r"""Countdown with three numbers in the published files: countdown_cd3_test.jsonl (input "30,100,93", output "23"), train_n20000.parquet.

Right: the last boxed expression, else the answer tag, uses each number exactly once and has the target as its value. It is parsed, never
executed, and its value is an exact fraction: the published tolerance of 1e-5 decides alike, as numbers and target are integers.
"""

import json
import re
from collections.abc import Iterator

from diffpo_jax.tasks import countdown
from diffpo_jax.tasks.answers import answer_tag, closed_tags, final_answer, without_layout
from diffpo_jax.tasks.base import Problem, Task, check_split
from diffpo_jax.tasks.files import find_file, read_rows

TRAIN, TEST = "train_n20000.parquet", "countdown_cd3_test.jsonl"
PROMPT = (
    "With the numbers {numbers} write an arithmetic expression whose value is exactly {target}. Use every number once and only once, with"
    " the operations +, -, *, / and parentheses as you need them. Write your answer in this format:\n<reasoning>\nyour steps\n</reasoning>"
    "\n<answer>\nthe expression alone, without an equals sign\n</answer>\nFor example, with the numbers [2, 3, 4] and the target 5, a right"
    " answer is:\n<answer>\n2*4-3\n</answer>"
)
ANSWERED = 0.1  # training reward of an answer that is wrong or no expression
LONGEST_TAG = 2 * countdown.LONGEST_RESPONSE  # characters of a tag that are looked at
_OPERATORS = str.maketrans({"\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "\n": " ", "\t": " "})
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def read(folder: str, split: str, d1_faithful: bool) -> Iterator[Problem]:
    """The problems with three numbers. Training leaves out those of the test set (same multiset of numbers, same target), not so with
    `d1_faithful`.

    Raises:
      FileNotFoundError, ValueError: no such file, or a row that is none of the published format.
    """
    if check_split(split):
        problems, held_out = _read_test(folder), set()
    else:
        problems = _read_train(folder)
        held_out = set() if d1_faithful else {(tuple(sorted(numbers)), target) for numbers, target in _read_test(folder)}
    for numbers, target in problems:
        if len(numbers) == 3 and (tuple(sorted(numbers)), target) not in held_out:
            yield Problem(PROMPT.format(numbers=numbers, target=target), "", json.dumps({"numbers": numbers, "target": target}))


def _read_test(folder: str) -> Iterator[tuple[list[int], int]]:
    path = find_file(folder, [TEST])
    for number, row in enumerate(read_rows(path, ["input", "output"]), 1):
        where = f"{path}, row {number}"
        yield _integers(str(row["input"]).split(","), where), _integers([row["output"]], where)[0]


def _read_train(folder: str) -> Iterator[tuple[list[int], int]]:
    path = find_file(folder, [TRAIN])
    for number, row in enumerate(read_rows(path, ["extra_info", "reward_model"]), 1):
        where = f"{path}, row {number}"
        try:
            numbers, target = row["extra_info"]["numbers"], row["reward_model"]["ground_truth"]
        except (KeyError, TypeError):
            raise ValueError(f"{where}: expected extra_info.numbers and reward_model.ground_truth") from None
        yield _integers(str(numbers).strip("[] ").split(","), f"{where}, numbers"), _integers([target], where)[0]


def _integers(texts: list, where: str) -> list[int]:
    try:
        values = [int(text) for text in texts]
        if all(not isinstance(text, float) or text == value for text, value in zip(texts, values, strict=True)):
            return values
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: {texts!r:.80} are no integers")


def expression(text: str) -> str:
    r"""`text` with LaTeX's operators, fractions, brackets and spaces as plain ones; what follows an equals sign is dropped."""
    text = without_layout(text).translate(_OPERATORS)
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[()]", "", text)
    text = re.sub(r"\\times(?![a-z])|\\cdot(?![a-z])|\\ast(?![a-z])", "*", text)
    text = re.sub(r"\\div(?![a-z])", "/", text).split("=")[0]
    for _ in range(countdown.DEEPEST_NESTING):
        text, replaced = _FRACTION.subn(r"((\1)/(\2))", text)
        if not replaced:
            break
    return text.translate(str.maketrans("{}[]", "()()")).strip()


def extract(response: str) -> str | None:
    """The expression that is judged."""
    found = final_answer(response)
    return None if found is None else expression(found[:LONGEST_TAG])


def _is_right(answer: str, text: str | None) -> bool:
    problem, parsed = json.loads(answer), None if text is None else countdown.parse(text, signs=True)
    return parsed is not None and parsed[0] == problem["target"] and sorted(parsed[1]) == sorted(problem["numbers"])


def reward(answer: str, response: str) -> float:
    """1 if the expression uses each number exactly once and has the target as its value, else 0."""
    return float(_is_right(answer, extract(response)))


def components(answer: str, response: str) -> dict[str, float]:
    r"""0 without answer tag; 0.1 for any answer (tags) and 0.9 more for a right one (correct), as published.

    Corrected against the released code: the expression may be boxed, in LaTeX's notation and followed by "= target", as in the evaluation;
    a last tag that is not closed counts; the expression is parsed, not executed, so that Python's ** and // are not accepted.
    """
    tagged = answer_tag(response) is not None
    return {"tags": ANSWERED * tagged, "correct": (1.0 - ANSWERED) * (tagged and reward(answer, response) == 1.0)}


def released_components(answer: str, response: str) -> dict[str, float]:
    """The training reward of the released d1 code: the plain expression in the last closed tag."""
    tags = closed_tags(response)
    text = response[tags[-1][0] : min(tags[-1][1], tags[-1][0] + LONGEST_TAG)].strip() if tags else None
    right = text is not None and _is_right(answer, " ".join(text.split()))
    return {"tags": ANSWERED * (text is not None), "correct": (1.0 - ANSWERED) * right}


TASK = Task("countdown_cd3", "", reward, components, read=read, extract=extract)
D1_TASK = Task("countdown_cd3", "", reward, released_components, read=read, extract=extract)
