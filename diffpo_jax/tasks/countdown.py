"""Countdown: write an expression with the given numbers, each exactly once, that has the target as its value.

Prompt: "3 7 9=30". Response: an expression with + - * / and parentheses, "(3+7)*9/3". Any expression of the right value is right;
arithmetic is on exact fractions. The demonstration is one random expression among those that reach the target.

A problem's multiset of numbers and its target decide together, by a hash, whether it is a training or a test problem.
"""

import json
import random
from collections.abc import Iterator
from fractions import Fraction

from ml_collections import ConfigDict

from diffpo_jax.tasks.base import Problem, Task, check_range, check_split, collect, held_out, one_component

LONGEST_RESPONSE = 256  # characters; a longer response is wrong
DEEPEST_NESTING = 16  # open parentheses; deeper is wrong
LONGEST_NUMBER = 6  # digits
PARSED, ALL_NUMBERS = 0.1, 0.2  # dense credit of an expression that parses; that also uses exactly the given numbers and has a value
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def _combine(left: tuple, operator: str, right: tuple) -> tuple | None:
    """(value, text, precedence) of `left operator right` with minimal parentheses; None unless a non-negative integer."""
    (a, left_text, left_level), (b, right_text, right_level) = left, right
    if (operator == "-" and a < b) or (operator == "/" and (b == 0 or a % b)):
        return None
    level = PRECEDENCE[operator]
    if left_level < level:
        left_text = f"({left_text})"
    if right_level < level or (right_level == level and operator in "-/"):
        right_text = f"({right_text})"
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[operator]
    return value, left_text + operator + right_text, level


def _random_expression(numbers: list[int], rng: random.Random) -> tuple[int, str] | None:
    """(value, text) of a random expression tree over `numbers`, or None where an intermediate value is no non-negative integer."""
    pool = [(number, str(number), 3) for number in numbers]
    while len(pool) > 1:
        left, right = (pool.pop(rng.randrange(len(pool))) for _ in range(2))
        combined = _combine(left, rng.choice("+-*/"), right)
        if combined is None:
            return None
        pool.append(combined)
    return pool[0][:2]


def generate(settings: ConfigDict, split: str, count: int, seed: int) -> Iterator[Problem]:
    """Solvable problems with numbers_min to numbers_max numbers in 1..largest_number and a target in 1..largest_target."""
    test = check_split(split)
    check_range("numbers", settings.numbers_min, settings.numbers_max, at_least=2, at_most=8)
    rng = random.Random(f"countdown {split} {seed}")

    def draw() -> Problem | None:
        numbers = [rng.randint(1, settings.largest_number) for _ in range(rng.randint(settings.numbers_min, settings.numbers_max))]
        expression = _random_expression(numbers, rng)
        if expression is None or not 1 <= expression[0] <= settings.largest_target:
            return None
        target, text = expression
        if held_out(f"{sorted(numbers)} {target}", one_in=4) != test:
            return None
        prompt = f"{' '.join(map(str, numbers))}={target}"
        return Problem(prompt, text, json.dumps({"numbers": numbers, "target": target}))

    return collect("countdown", draw, count, distinct=test)


class _NotAnExpression(ValueError):
    """The text does not follow the grammar or exceeds a limit."""


def _tokens(text: str) -> list[str]:
    """Numbers, operators and parentheses of `text`; spaces between them are dropped. ASCII only."""
    tokens, position = [], 0
    while position < len(text):
        end = position + 1
        if text[position] in "0123456789":
            while end < len(text) and text[end] in "0123456789":
                end += 1
            if end - position > LONGEST_NUMBER or (text[position] == "0" and end - position > 1):
                raise _NotAnExpression(f"number at {position}")
        elif text[position] not in "+-*/() ":
            raise _NotAnExpression(f"character at {position}")
        if text[position] != " ":
            tokens.append(text[position:end])
        position = end
    return tokens


def _apply(operator: str, a: Fraction | None, b: Fraction | None) -> Fraction | None:
    """a operator b; None where undefined."""
    if a is None or b is None or (operator == "/" and b == 0):
        return None
    return a + b if operator == "+" else a - b if operator == "-" else a * b if operator == "*" else a / b


def parse(text: str, signs: bool = False) -> tuple[Fraction | None, list[int]] | None:
    """Recursive descent over sum = product ((+|-) product)*, product = factor ((*|/) factor)*, factor = number | ( sum ).

    Args:
      text: the expression.
      signs: whether a factor may also be (+|-) factor, as in "-3+5".

    Returns:
      (value, numbers in order of appearance), the value None after a division by zero; None for a text that is no expression.
    """
    if len(text) > LONGEST_RESPONSE:
        return None
    numbers, position = [], 0

    def peek() -> str:
        return tokens[position] if position < len(tokens) else ""

    def factor(depth: int) -> Fraction | None:
        nonlocal position
        token, position = peek(), position + 1
        if token.isdigit():
            numbers.append(int(token))
            return Fraction(numbers[-1])
        if signs and token and token in "+-" and depth < DEEPEST_NESTING:
            value = factor(depth + 1)
            return -value if token == "-" and value is not None else value
        if token != "(" or depth >= DEEPEST_NESTING:
            raise _NotAnExpression("number or parenthesis expected, or nested too deep")
        value = chain("+-", depth + 1)
        if peek() != ")":
            raise _NotAnExpression("no closing parenthesis")
        position += 1
        return value

    def chain(operators: str, depth: int) -> Fraction | None:
        nonlocal position
        value = chain("*/", depth) if operators == "+-" else factor(depth)
        while peek() and peek() in operators:
            operator, position = peek(), position + 1
            value = _apply(operator, value, chain("*/", depth) if operators == "+-" else factor(depth))
        return value

    try:
        tokens = _tokens(text)
        value = chain("+-", 0)
    except _NotAnExpression:
        return None
    return (value, numbers) if position == len(tokens) else None


def dense_reward(answer: str, response: str) -> float:
    """1 if right; 0.2 for a wrong value of exactly the given numbers; 0.1 for another expression; 0 for anything else."""
    problem, parsed = json.loads(answer), parse(response)
    if parsed is None:
        return 0.0
    value, numbers = parsed
    if value is None or sorted(numbers) != sorted(problem["numbers"]):
        return PARSED
    return 1.0 if value == problem["target"] else ALL_NUMBERS


def reward(answer: str, response: str) -> float:
    """1 for an expression of exactly the given numbers whose value is the target, else 0."""
    return float(dense_reward(answer, response) == 1.0)


TASK = Task("countdown", "0123456789 +-*/()=", reward, one_component(dense_reward), generate)
