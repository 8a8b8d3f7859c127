r"""GSM8K: word problems of grade-school arithmetic, read from the published files (train.jsonl, test.jsonl: question, answer).

Right is the field's verdict: the first number that parses in a \boxed{}, else the last number in the answer tag, equals the reference.
"""

import json
import re
from collections.abc import Iterator

from diffpo_jax.tasks.answers import answer_tag, closed_tags, demonstration, last_boxed, number_answer, to_number, without_layout
from diffpo_jax.tasks.base import Problem, Task, check_split
from diffpo_jax.tasks.files import find_file, read_texts

FORMAT = "Write your answer in this format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"
PROMPT = (
    "You solve math word problems. Work the problem out step by step and put the final number in \\boxed{}.\n"
    "Write your answer in this format:\n<reasoning>\nyour steps\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>"
)
LONGEST_FORMATTED = 10_000  # characters; a longer response has no right format (matching is quadratic at worst)
_SOFT, _STRICT = (
    r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>",
    r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>",
)


def read(folder: str, split: str, d1_faithful: bool) -> Iterator[Problem]:
    r"""The problems of a split; the demonstration is the file's worked solution without its calculator annotations.

    With `d1_faithful` training prompts ask for no \boxed{}, since the released training reward compares the text of the answer tag.

    Raises:
      FileNotFoundError, ValueError: no such file, or a row that is none of GSM8K's.
    """
    name = "test" if check_split(split) else "train"
    path = find_file(folder, [f"{name}.jsonl", f"{name}.parquet"])
    plain = d1_faithful and split == "train"
    for number, row in enumerate(read_texts(path, ["question", "answer"]), 1):
        steps, mark, final = row["answer"].rpartition("####")
        final = final.strip()
        if not mark or to_number(final) is None:
            raise ValueError(f"{path}, row {number}: the answer does not end in '#### NUMBER': {row['answer'][-40:]!r}")
        steps = re.sub(r"<<[^<>]*>>", "", steps).strip()
        prompt = f"{FORMAT if plain else PROMPT}\n\n{row['question'].strip()}"
        response = demonstration(steps, final if plain else f"\\boxed{{{final.replace(',', '')}}}")
        yield Problem(prompt, response, json.dumps({"answer": final}))


def extract(response: str) -> str | None:
    """The number that is judged, as text."""
    value = number_answer(response)
    return None if value is None else str(value)


def reward(answer: str, response: str) -> float:
    """1 if the number in the response is the reference, else 0."""
    return float(number_answer(response) == to_number(json.loads(answer)["answer"]))


def _matches(pattern: str, response: str, flags: int = 0) -> bool:
    return len(response) <= LONGEST_FORMATTED and re.match(pattern, response, flags) is not None


def _tags(response: str, penalty: float) -> float:
    marks = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    return sum(0.125 * (response.count(mark) == 1) for mark in marks) - penalty


def components(answer: str, response: str) -> dict[str, float]:
    r"""The published parts: tags up to 0.5, two format checks of 0.5, integer 0.5, correct 2.0.

    Corrected against the released code: "." of the format patterns matches line breaks; the strict format does without a line break at the
    end; text after </answer> costs 0.001 a character once (there twice, and a response without a line break at its end paid for all of its
    characters); the answer may stand in \boxed{}, as the prompt asks; it is compared as a number (there as text); negative integers and
    thousands separators are integers.
    """
    strict = _matches(_STRICT + r"\s*$", response, re.DOTALL)
    content = answer_tag(response)
    boxed = None if content is None else last_boxed(content)
    value = to_number(without_layout((content if boxed is None else boxed) or ""))
    return {
        "tags": _tags(response, 0.001 * len(response.rpartition("</answer>")[2].strip()) if "</answer>" in response else 0.0),
        "soft_format": 0.5 * _matches(_SOFT, response, re.DOTALL),
        "strict_format": 0.5 * strict,
        "integer": 0.5 * (value is not None and value.denominator == 1),
        "correct": 2.0 * reward(answer, response),
    }


def _released_number(response: str) -> float | None:
    """The number that the released evaluation judges: it knows no thousands separators and no nested braces."""
    boxed = [response[start:end] for start, end in _shallow_boxes(response)]
    tag = [response[start:end] for start, end in closed_tags(response)[:1]]
    for contents, index in ((boxed, 0), (tag, -1)):
        for content in contents:
            try:
                return float(content.strip().encode("ascii"))
            except ValueError:  # no number, or digits of another script
                found = re.findall(r"-?[0-9]+\.?[0-9]*", content[:LONGEST_FORMATTED])
                if found:
                    return float(found[index])
    return None


def _shallow_boxes(response: str) -> list[tuple[int, int]]:
    return [match.span(1) for match in re.finditer(r"\\boxed\{([^}\n]{0,200})\}", response)]


def released_reward(answer: str, response: str) -> float:
    """The verdict of the released d1 evaluation, which reads 1,080 as 1."""
    return float(_released_number(response) == float(json.loads(answer)["answer"].replace(",", "")))


def released_components(answer: str, response: str) -> dict[str, float]:
    """The training reward of the released d1 code, with what `components` corrects."""
    content = response.split("<answer>")[-1].split("</answer>")[0].strip()
    penalty = 0.0
    if response.count("\n<answer>\n") == 1:
        penalty += 0.001 * len(response.split("\n</answer>\n")[-1])
    if response.count("\n</answer>") == 1:
        penalty += 0.001 * (len(response.split("\n</answer>")[-1]) - 1)
    return {
        "tags": _tags(response, penalty),
        "soft_format": 0.5 * _matches(_SOFT, response),
        "strict_format": 0.5 * _matches(_STRICT + "\n$", response),
        "integer": 0.5 * content.isdigit(),
        "correct": 2.0 * (content == json.loads(answer)["answer"]),
    }


TASK = Task("gsm8k", "", reward, components, read=read, extract=extract)
D1_TASK = Task("gsm8k", "", released_reward, released_components, read=read, extract=extract)
