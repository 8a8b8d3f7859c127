r"""Whether two answers in LaTeX are the same, as MATH is scored: normalised text, then structure, then the value of single expressions.

`equivalent` takes lists, tuples, intervals, unions, sets and matrices apart and compares their entries; numbers are compared exactly.
What is left, single expressions, goes to the LaTeX parser of math_verify if it is tame: sympy can run for hours or out of memory on a short
text such as 9^{9^{9^9}}. What is not tame is right only if the normalised texts are equal. The parsed expressions are compared by their
values at fixed points, not by sympy's simplification as math_verify does: that takes seconds on short expressions, and the one limit on its
time is an exception raised by a signal wherever the process happens to be, and only in the main thread.
"""

import functools
import itertools
import re
from fractions import Fraction
from typing import Any

from diffpo_jax.tasks.answers import to_number, without_layout

LONGEST_TEXT = 400  # characters of a normalised answer that is taken apart
DEEPEST_NESTING = 8  # open brackets
MOST_PARTS = 12  # entries of a list or matrix; an unordered list may take the square of it in comparisons
LONGEST_EXPRESSION = 120  # characters of an expression that is given to sympy; the further limits of such are in `_is_tame`
POINTS = (  # at which expressions are compared: values of the letters in alphabetical order
    ((7, 3), (-5, 7), (11, 9), (13, 11), (-3, 8), (17, 13), (19, 7), (-23, 17), (29, 23), (31, 37)),
    ((-9, 5), (4, 3), (-6, 7), (15, 7), (8, 11), (-12, 17), (21, 13), (25, 19), (-27, 29), (33, 31)),
    ((2, 9), (10, 7), (14, 5), (-5, 11), (16, 7), (18, 23), (-20, 11), (26, 17), (28, 19), (-35, 32)),
)
DIGITS, DIGITS_EQUAL = 40, 25  # decimal digits of values that are not rational, and how many of them must agree

_UNICODE = {
    "\u03c0": "\\pi ", "\u221a": "\\sqrt ", "\u221e": "\\infty ", "\u00b0": "", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u00f7": "/",
    "\u2264": "\\leq ", "\u2265": "\\geq ", "\u222a": "\\cup ", "\u2208": "\\in ", "\u00b1": "\\pm ", "\u00b2": "^2", "\u00b3": "^3",
}  # fmt: skip
_WRAPPER = r"\\(?:text|mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}"
_UNIT_WORDS = (
    r"degrees?|(?:square |cubic )?(?:units?|inch(?:es)?|feet|foot|ft|yards?|miles?|cm|mm|km|m|(?:kilo|centi|milli)?met(?:er|re)s?)"
    r"|cents?|dollars?|percent|hours?|minutes?|seconds?|days?|weeks?|years?"
)
_GROUP = r"(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})"  # braces, nested up to three deep
_NAME = r"(?:[A-Za-z]|\\[a-z]+|[A-Za-z]\([A-Za-z]\)|[A-Za-z]_\{?[A-Za-z0-9]+\}?)"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}", ","),
        (rf"(?<=[0-9}})])\s*{_WRAPPER}\s*(?:\^\{{?[0-9]\}}?)?\s*\.?$", ""),  # units
        (_WRAPPER, r" \1 "),
        (rf"(?<=[0-9}})])\s*\b(?:{_UNIT_WORDS})(?:\^\{{?[0-9]\}}?)?\s*\.?\s*$", ""),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|\\?%", ""),
        (r"\\le(?![a-zA-Z])|<=", r"\\leq "),
        (r"\\ge(?![a-zA-Z])|>=", r"\\geq "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\(begin|end)\{[bB]matrix\}", r"\\\1{pmatrix}"),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|log|ln|pi|infty)(?![a-zA-Z])", r"\\\1 "),
        (r"\\sqrt\s*([^\s\\{}\[])", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\\[a-z]+)", r"\\sqrt{\1}"),
        (r"\\frac\s*([^\s\\{}])\s*([^\s\\{}])", r"\\frac{\1}{\2}"),
        (rf"\\frac\s*([^\s\\{{}}])\s*{_GROUP}", r"\\frac{\1}\2"),
        (rf"\\frac\s*{_GROUP}\s*([^\s\\{{}}])", r"\\frac\1{\2}"),
        (rf"\\frac\s*{_GROUP}\s*{_GROUP}", r"\\frac\1\2"),
        (r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])", "\\1\x00"),  # the one space that matters
        (r"\s+", ""),
        ("\x00", " "),
        (r"(?<![0-9])\.(?=[0-9])", "0."),
        (r"([_^])\{([A-Za-z0-9])\}", r"\1\2"),
        (r"_([0-9]{2,})", r"_{\1}"),
        (r"(?:\^|\*\*)(-?[0-9]{2,}|-[0-9])", r"^{\1}"),  # x^10 and x**10 mean what they say
        (r"\*\*", "^"),
        (r"\+\\infty", r"\\infty"),
    )
]
_CHOICE = re.compile(r"\(([A-Za-z])\)")
_PREFIX = re.compile(rf"{_NAME}(?:=|\\in(?![a-zA-Z]) ?)(?=[^=])")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")
_MIXED = re.compile(r"(-?)([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}")
_QUOTIENT = re.compile(r"(-?)(?:\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}|\(?(-?[0-9]+)\)?/\(?([0-9]+)\)?)")
_RELATION = re.compile(r"[=<>]|\\(?:leq|geq|neq?)(?![a-zA-Z])")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")


def normalise(text: str) -> str:
    r"""`text` in one way of writing: fractions as \frac{a}{b}, without layout, units, degrees, percent signs, spaces, a final period."""
    text = without_layout(text)
    for character, command in _UNICODE.items():
        text = text.replace(character, command)
    text = text.strip().rstrip(".,;:").strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return _without_prefix(_CHOICE.sub(r"\1", text) if _CHOICE.fullmatch(text) else text)


def _without_prefix(text: str) -> str:
    """`text` without "x=" or "x \\in" in front, unless a further relation follows."""
    match = _PREFIX.match(text)
    return text[match.end() :] if match and not _RELATION.search(_without_brackets(text[match.end() :])) else text


def _without_brackets(text: str) -> str:
    return re.sub(r"[\[({].*[\])}]", "", text)


def equivalent(gold: str, answer: str) -> bool:
    """Whether `answer` is the same as the reference `gold`; both in LaTeX, without box. Never raises; bounded in time."""
    if max(len(gold), len(answer)) > 2 * LONGEST_TEXT:
        return gold == answer
    gold, answer = normalise(gold), normalise(answer)
    if not answer or max(map(len, (gold, answer))) > LONGEST_TEXT or max(map(_nesting, (gold, answer))) > DEEPEST_NESTING:
        return bool(answer) and gold == answer
    return _same(gold, answer)


def _nesting(text: str) -> int:
    return max(itertools.accumulate(({"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(c, 0) for c in text), initial=0))


def _same(gold: str, answer: str) -> bool:
    if gold == answer:
        return True
    (kind, parts), (answer_kind, answer_parts) = _parts(gold), _parts(answer)
    if kind != answer_kind or len(parts) != len(answer_parts) or len(parts) > MOST_PARTS:
        return False
    if kind == "value":
        return _same_value(parts[0], answer_parts[0])
    if kind not in ("set", "union"):
        return all(map(_same, parts, answer_parts))
    left = list(answer_parts)
    for part in parts:  # being the same is transitive, so that the first match is as good as any
        match = next((i for i, other in enumerate(left) if _same(part, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _parts(text: str) -> tuple[str, list[str]]:
    """(kind, entries): ("set" | "union" | the brackets of a tuple or interval | "matrix ROWSxCOLUMNS" | "value", ...)."""
    text = _without_prefix(text)
    matrix = _MATRIX.fullmatch(text)
    if matrix is not None and "\\begin" not in matrix[1]:
        rows = [row.split("&") for row in re.sub(r"\\\\$", "", matrix[1]).split("\\\\")]
        return f"matrix {len(rows)}x{'-'.join(str(len(row)) for row in rows)}", [cell for row in rows for cell in row]
    if to_number(text) is not None:  # 10,080 is a number, not two
        return "value", [text]
    pieces = _split(text, "\\cup")
    if len(pieces) > 1:
        return "union", pieces
    if text.startswith("\\{") and text.endswith("\\}"):
        return _as_set(_split(text[2:-2], ","))
    pieces = _split(text, ",")
    if len(pieces) > 1 or "\\pm" in text:
        return _as_set(pieces)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        inside = _split(text[1:-1], ",")
        if len(inside) > 1:
            return text[0] + text[-1], inside
    return "value", [text]


def _as_set(pieces: list[str]) -> tuple[str, list[str]]:
    r"""A list whose order does not matter; an entry with one \pm counts as two."""
    entries = []
    for piece in pieces:
        both = piece.count("\\pm") == 1
        entries += [re.sub(r"^\+", "", piece.replace("\\pm", sign)) for sign in "+-"] if both else [piece]
    return ("set", entries) if len(entries) > 1 else ("value", entries)


def _split(text: str, separator: str) -> list[str]:
    """`text` split at `separator` outside of brackets; half-open intervals count as brackets."""
    pieces, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and text.startswith(separator, position):
            pieces.append(text[start:position])
            start = position + len(separator)
    return [*pieces, text[start:]]


def _same_value(gold: str, answer: str) -> bool:
    numbers = _rational(gold), _rational(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _WORD.search(gold) or _WORD.search(answer):
        return gold.casefold() == answer.casefold()
    if bool(_RELATION.search(gold)) != bool(_RELATION.search(answer)):
        return False
    return _is_tame(gold) and _is_tame(answer) and _same_expression(gold, answer)


def _rational(text: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction or mixed number."""
    if (number := to_number(text)) is not None or len(text) > LONGEST_EXPRESSION:
        return number
    if match := _MIXED.fullmatch(text):
        sign, whole, above, below = match.groups()
    elif match := _QUOTIENT.fullmatch(text):
        sign, whole, above, below = match[1], "0", match[2] or match[4], match[3] or match[5]
    else:
        return None
    if int(below) == 0:
        return None
    return (-1 if sign else 1) * (int(whole) + Fraction(int(above), int(below)))


_COMMAND = re.compile(r"\\[a-zA-Z]+")
_FUNCTIONS = frozenset(f"\\{name}" for name in "sin cos tan cot sec csc log ln arcsin arccos arctan sqrt".split())
_SYMBOLS = frozenset(
    f"\\{name}" for name in "frac pi theta alpha beta gamma lambda phi omega infty cdot times div leq geq neq ne lt gt".split()
)
_POWER = re.compile(r"(.)\^(\{(?:[^{}^]|\{[^{}^]*\})*\}|[a-zA-Z0-9])")


def _is_tame(text: str) -> bool:
    """Whether sympy is sure to be quick with `text`: few letters, functions and digits, no tower of powers, no power of a long sum."""
    commands = _COMMAND.findall(text)
    rest = _COMMAND.sub(" ", text)
    if len(text) > LONGEST_EXPRESSION or not set(commands) <= _FUNCTIONS | _SYMBOLS:
        return False
    if not re.fullmatch(r"[\w\s+\-*/^().=<>{}\[\]]*", rest, re.ASCII):
        return False
    if "_" in rest or re.search(r"[0-9]{16}", rest) or len(set(re.findall("[a-zA-Z]", rest))) > 4:
        return False
    if sum(command in _FUNCTIONS for command in commands) > 6:
        return False
    powers = list(_POWER.finditer(text))
    if len(powers) != text.count("^") or any(text.startswith("^", power.end()) for power in powers):
        return False  # a tower, or a power in a form that is not known
    group_powers = 1
    for base, exponent in (power.groups() for power in powers):
        largest = max(map(int, re.findall("[0-9]+", exponent)), default=1)
        if largest > (999 if base.isdigit() else 30 if base.isalpha() else 6):
            return False
        group_powers *= 1 if base.isalnum() else max(largest, 1)
    return group_powers <= 12


def _same_expression(gold: str, answer: str) -> bool:
    """Whether two tame expressions have the same values, or two relations the same sides up to a factor; False where one has no parse."""
    wanted, given = _parse(gold), _parse(answer)
    if wanted is None or given is None or wanted[0] != given[0]:
        return False
    (relation, gold_expression), (_, answer_expression) = wanted, given
    names = sorted({symbol.name for expression in (gold_expression, answer_expression) for symbol in expression.free_symbols} - {"i"})
    pairs = list(zip(_values(gold_expression, names), _values(answer_expression, names), strict=True))
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(pairs) < 2:
        return False
    if relation == "value":
        return all(_close(a, b) for a, b in pairs)
    (a, b), *others = pairs  # the factor between the two differences is the same everywhere, and positive for an inequality
    factor_is_right = a != 0 and b != 0 and (relation == "=" or (a / b).as_real_imag()[0] > 0)
    return bool(factor_is_right) and all(_close(a * d, b * c) for c, d in others)


def _close(a: Any, b: Any) -> bool:
    if a.is_Rational and b.is_Rational:
        return a == b
    return bool(abs(a - b) <= max(abs(a), abs(b)) * 10**-DIGITS_EQUAL)


@functools.lru_cache(maxsize=1024)  # a group of rollouts meets one reference
def _parse(text: str) -> tuple[str, Any] | None:
    """("value", expression), or ("=" | "<" | "<=", left side minus right side, the smaller side first); None for what is neither."""
    import sympy
    from latex2sympy2_extended import latex2sympy

    try:
        parsed = latex2sympy(text, is_real=False, convert_degrees=False, normalization_config=None)
        if isinstance(parsed, sympy.Rel):
            parsed = parsed.reversed if isinstance(parsed, (sympy.StrictGreaterThan, sympy.GreaterThan)) else parsed
            sign = {sympy.Eq: "=", sympy.StrictLessThan: "<", sympy.LessThan: "<="}.get(type(parsed))
            return None if sign is None else (sign, parsed.lhs - parsed.rhs)
        return ("value", parsed) if isinstance(parsed, sympy.Expr) else None
    except Exception:  # the parser raises what it likes on odd input, RecursionError included
        return None


def _values(expression: Any, names: list[str]) -> list[Any]:
    """The expression at each of POINTS for the letters `names`, exact where it is rational; None where it has no value."""
    import sympy

    exact = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    values = []
    for point in POINTS:
        numbers = {"i": sympy.I} | {name: sympy.Rational(*ratio) for name, ratio in zip(names, point, strict=False)}
        try:
            value = expression.xreplace(exact | {symbol: numbers[symbol.name] for symbol in expression.free_symbols}).doit()
            value = value if value.is_Rational else value.evalf(DIGITS)
            values.append(value if value.is_number and value.is_finite else None)
        except Exception:  # more letters than values, or what sympy raises on odd expressions
            values.append(None)
    return values


def published_form(text: str) -> str:
    """The normal form of MATH's published scorer (Hendrycks et al. 2021, arXiv 2103.03874), which the released d1 code compares as text."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for removed in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(removed, "")
    if text.count("\\text{ ") == 1:  # units
        text = text.split("\\text{ ")[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    if text.count("=") == 1 and text.index("=") <= 2:
        text = text.split("=")[1]
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])(?:([^{])|(?=\{))", lambda m: f"\\frac{{{m[1]}}}" + (f"{{{m[2]}}}" if m[2] else ""), text)
    if text == "0.5":
        return "\\frac{1}{2}"
    quotient = re.fullmatch(r"(-?[0-9]{1,18})/(-?[0-9]{1,18})", text)
    return f"\\frac{{{quotient[1]}}}{{{quotient[2]}}}" if quotient else text
