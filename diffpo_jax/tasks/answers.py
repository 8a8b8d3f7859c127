r"""The answer in a response: boxes, answer tags, numbers. Shared by the published tasks; linear in the response, nothing is executed."""

import re
from fractions import Fraction

LONGEST_ANSWER = 1000  # characters; what is longer is no answer
LONGEST_NUMBER = 30  # characters
MOST_BOXES = 50  # that are searched for a number
_BRACES = re.compile(r"\\\\|\\[{}]|\\(?:boxed|fbox)(?![a-zA-Z])\s*(\{)?|[{}]")
_UNBRACED = re.compile(rf"[^$\n<]{{0,{LONGEST_ANSWER}}}")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"(?:(?<![0-9])[-+])?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_QUOTIENT = re.compile(r"([-+]?)(?:\\[dt]?frac\{([-+]?[0-9]+)\}\{([-+]?[0-9]+)\}|([0-9]+)/([0-9]+))")
_PREFIX = re.compile(r"(?:[A-Za-z]\w*|\\text\{[^{}]*\})\s*=")


def demonstration(reasoning: str, answer: str) -> str:
    """A response in the format that the prompts ask for."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def boxes(text: str) -> list[tuple[int, int]]:
    r"""(start, end) of the content of every \boxed{...} and \fbox{...} that is closed, and of "\boxed 5", in the order of their starts.

    Braces may be nested; escaped ones do not count. Without braces the content goes up to a dollar sign, a tag or the end of the line.
    """
    found, unclosed = [], []
    for match in _BRACES.finditer(text):
        if match[0].startswith(("\\b", "\\f")) and match[1] is None:
            found += [rest.span() for rest in [_UNBRACED.match(text, match.end())] if rest]
        elif match[0].endswith("{") and match[0] != "\\{":
            unclosed.append((match.end(), match[1] is not None))
        elif match[0] == "}" and unclosed:
            start, boxed = unclosed.pop()
            found += [(start, match.start())] if boxed else []
    return sorted(found)


def last_boxed(text: str, longest: int = LONGEST_ANSWER) -> str | None:
    """The content of the last box, None where there is none or it has more than `longest` characters."""
    found = boxes(text)
    return _short(text, *found[-1], longest) if found else None


def answer_tag(text: str, longest: int = LONGEST_ANSWER) -> str | None:
    """The text after the last <answer>, up to </answer> or the end; None where there is none or it has more than `longest` characters."""
    start = None
    for match in _TAG.finditer(text):
        if not match[1]:
            start, end = match.end(), len(text)
        elif start is not None and end == len(text):
            end = match.start()
    return None if start is None else _short(text, start, end, longest)


def closed_tags(text: str) -> list[tuple[int, int]]:
    """(start, end) of what stands between <answer> and the next </answer>, without overlap: what the released d1 code looks for."""
    found, position = [], 0
    while (start := text.find("<answer>", position)) >= 0 and (end := text.find("</answer>", start)) >= 0:
        found.append((start + len("<answer>"), end))
        position = end
    return found


def final_answer(text: str) -> str | None:
    """The last box, else the last answer tag; None where there is neither."""
    boxed = last_boxed(text)
    return answer_tag(text) if boxed is None else boxed


def _short(text: str, start: int, end: int, longest: int) -> str | None:
    content = text[start : min(end, start + 2 * longest)].strip()
    return content if len(content) <= longest else None


def without_layout(text: str) -> str:
    r"""`text` without dollar signs and spacing commands; the comma of "1{,}234" and the minus sign of typesetting become plain ones."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\$", "").replace("$", "")
    text = re.sub(r"(?<=[0-9],)\\!\s*", "", text)  # 10,\! 000
    return re.sub(r"(\\\\)|\\[,;:!]|~|\\q?quad(?![a-zA-Z])|\\(?=\s)", lambda match: match[1] or " ", text).strip()  # \\ ends a row


def to_number(text: str) -> Fraction | None:
    """The exact value of a decimal number, with or without thousands separators; None for anything else."""
    if len(text) > LONGEST_NUMBER or _NUMBER.fullmatch(text) is None:
        return None
    return Fraction(text.replace(",", ""))


def _numbers(text: str) -> list[Fraction]:
    values = (to_number(match[0]) for match in _NUMBER.finditer(text))
    return [value for value in values if value is not None]


def number_answer(response: str) -> Fraction | None:
    """The first number that parses in a box, else the last number in the answer tag, as GSM8K is scored; None where there is neither.

    A box that holds one fraction counts as its value.
    """
    for start, end in boxes(response)[:MOST_BOXES]:
        content = without_layout(response[start : min(end, start + LONGEST_ANSWER)])
        content = content[match.end() :].lstrip() if (match := _PREFIX.match(content)) else content
        quotient = _QUOTIENT.fullmatch(content)
        if quotient is not None and len(content) <= LONGEST_NUMBER:
            above, below = int(quotient[2] or quotient[4]), int(quotient[3] or quotient[5])
            if below:
                return Fraction(-above if quotient[1] == "-" else above, below)
        elif values := _numbers(content):
            return values[0]
    values = _numbers(without_layout(answer_tag(response) or ""))
    return values[-1] if values else None
