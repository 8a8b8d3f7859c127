"""Arithmetic word problems in several steps, solved in writing as in GSM8K: the steps, then "####" and the answer.

Prompt: "ann has 5 pens. buys 3 bags of 4. total?". Response: "3*4=12 5+12=17 #### 17". Any text that ends in "####" and the right
integer is right.

A problem is a template (opening, events, question) filled with numbers. The demonstration takes the steps in a random order among those
that make sense, with operands in either order and one of three ways to link them, so one problem has several written solutions. The test
split's templates, as combinations of fragments, and its numbers, as multisets, never occur in training (two hashes decide); every single
fragment does.
"""

import itertools
import json
import operator
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ml_collections import ConfigDict

from diffpo_jax.tasks.base import Problem, Task, check_range, check_split, collect, held_out, one_component

NAMES = ("ann", "bob", "dan", "eve", "sam")
THINGS = ("pens", "nuts", "eggs", "cups")
LARGEST_VALUE = 99  # of the answer and of every value on the way to it
LONGEST_WORKING = 4096  # characters of a response that are searched for written steps
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_STEP = re.compile(r"([0-9]{1,6})([-+*/])([0-9]{1,6})=([0-9]{1,12})")
_INTEGER = re.compile(r"[+-]?(?:[0-9]{1,18}|[0-9]{1,3}(?:,[0-9]{3}){1,5})")


@dataclass(frozen=True)
class Fragment:
    """A sentence of a problem and what it does to the amount."""

    text: str  # "{}" stands for a number
    steps: int  # arithmetic steps it costs
    terms: tuple[int, ...] = ()  # what it adds: +1 or -1 for a number, +2 or -2 for the product of two
    scale: str = ""  # "" | "*2" | "*3" | "/2": what it does to the amount so far


OPENINGS = (
    Fragment("{name} has {} {things}.", 0, (1,)),
    Fragment("{name} owns {} {things}.", 0, (1,)),
    Fragment("{name} has {} red, {} blue {things}.", 1, (1, 1)),
    Fragment("{name} has {} bags of {} {things}.", 1, (2,)),
)
EVENTS = (
    Fragment("buys {}.", 1, (1,)),
    Fragment("finds {}.", 1, (1,)),
    Fragment("gets {} more.", 1, (1,)),
    Fragment("loses {}.", 1, (-1,)),
    Fragment("sells {}.", 1, (-1,)),
    Fragment("uses up {}.", 1, (-1,)),
    Fragment("buys {} bags of {}.", 2, (2,)),
    Fragment("finds {} sets of {}.", 2, (2,)),
    Fragment("sells {} bags of {}.", 2, (-2,)),
    Fragment("gives {} kids {} each.", 2, (-2,)),
    Fragment("doubles that.", 1, scale="*2"),
    Fragment("triples that.", 1, scale="*3"),
    Fragment("loses half.", 1, scale="/2"),
    Fragment("gives half.", 1, scale="/2"),
)
QUESTIONS = ("total?", "in all?", "now?")
LINKS = (" ", ", ", " so ")  # between written steps; one style a solution, as people have theirs

Terms = list[tuple[int, tuple[int, ...]]]  # (sign, factors): a signed number or product
Stages = list[tuple[Terms, str]]  # the amount is the stage before plus the terms, then scaled


def _draw_template(steps: int, rng: random.Random) -> tuple[list[Fragment], str]:
    """A random opening, events that bring the arithmetic steps to `steps`, and a question."""
    fragments = [rng.choice(OPENINGS)]
    while (left := steps - sum(fragment.steps for fragment in fragments)) > 0:
        fragments.append(rng.choice([event for event in EVENTS if event.steps <= left]))
    return fragments, rng.choice(QUESTIONS)


def _stages(fragments: list[Fragment], numbers: list[int]) -> Stages | None:
    """What the fragments do to the amount; None where the amount leaves 1..LARGEST_VALUE or cannot be halved."""
    remaining, stages, terms, amount = iter(numbers), [], [], 0
    for fragment in fragments:
        for term in fragment.terms:
            factors = tuple(itertools.islice(remaining, abs(term)))
            terms.append((1 if term > 0 else -1, factors))
            amount += terms[-1][0] * _product(factors)
        if fragment.scale:
            if fragment.scale == "/2" and amount % 2:
                return None
            amount = amount // 2 if fragment.scale == "/2" else amount * int(fragment.scale[1])
            stages.append((terms, fragment.scale))
            terms = []
        if not 1 <= amount <= LARGEST_VALUE:
            return None
    return stages + [(terms, "")] if terms else stages


def _product(factors: tuple[int, ...]) -> int:
    return factors[0] if len(factors) == 1 else factors[0] * factors[1]


def _scaled(amount: int, scale: str) -> int:
    return amount // 2 if scale == "/2" else amount * int(scale[1] if scale else 1)


def true_values(stages: Stages) -> tuple[int, set[int]]:
    """(the answer, every value that some sensible order of the steps writes down)."""
    values: set[int] = set()
    amount = None
    for terms, scale in stages:
        signed = [sign * _product(factors) for sign, factors in terms]
        values |= {abs(value) for value, (_, factors) in zip(signed, terms, strict=True) if len(factors) > 1}
        signed += [] if amount is None else [amount]
        for size in range(2, len(signed) + 1):
            for part in itertools.combinations(signed, size):
                if sum(part) >= 0 or max(part) < 0:
                    values.add(abs(sum(part)))
        amount = _scaled(sum(signed), scale)
        values |= {amount} if scale else set()
    assert amount is not None, "a problem has a stage"
    return amount, values


def _moves(pool: Terms) -> list[tuple[int, ...]]:
    """What can be worked out next: one term that is a product, or two finished terms whose difference, if any, is not negative."""
    products = [(i,) for i, (_, factors) in enumerate(pool) if len(factors) == 2]
    finished = [i for i, (_, factors) in enumerate(pool) if len(factors) == 1]
    pairs = itertools.permutations(finished, 2)
    return products + [(i, j) for i, j in pairs if pool[i][0] == pool[j][0] or (pool[i][0] > 0 and pool[i][1] >= pool[j][1])]


def write_steps(stages: Stages, rng: random.Random) -> list[str]:
    """One written solution: the steps "a+b=c" in a random sensible order, operands of + and * in either order."""
    steps: list[str] = []
    carried: Terms = []
    for terms, scale in stages:
        pool = carried + terms
        while moves := _moves(pool):
            move = rng.choice(moves)
            chosen = [pool[i] for i in move]
            if len(move) == 1:
                sign, symbol, (a, b) = chosen[0][0], "*", rng.sample(chosen[0][1], 2)
            else:
                sign, symbol, a, b = chosen[0][0], "+" if chosen[0][0] == chosen[1][0] else "-", chosen[0][1][0], chosen[1][1][0]
            value = OPERATIONS[symbol](a, b)
            steps.append(f"{a}{symbol}{b}={value}")
            pool = [term for i, term in enumerate(pool) if i not in move] + [(sign, (value,))]
        amount = pool[0][1][0]
        if scale:
            ways = {"*2": ("{0}*2", "2*{0}", "{0}+{0}"), "*3": ("{0}*3", "3*{0}"), "/2": ("{0}/2",)}[scale]
            steps.append(f"{rng.choice(ways).format(amount)}={_scaled(amount, scale)}")
        carried = [(1, (_scaled(amount, scale),))]
    return steps


def generate(settings: ConfigDict, split: str, count: int, seed: int) -> Iterator[Problem]:
    """Problems of steps_min to steps_max arithmetic steps with numbers in 2..largest_number."""
    test = check_split(split)
    check_range("steps", settings.steps_min, settings.steps_max, at_least=1, at_most=8)
    rng = random.Random(f"math {split} {seed}")

    def draw() -> Problem | None:
        steps = rng.randint(settings.steps_min, settings.steps_max)
        fragments, question = _draw_template(steps, rng)
        template = " ".join([*(fragment.text for fragment in fragments), question])
        if held_out(template, one_in=8) != test:
            return None
        numbers = [rng.randint(2, settings.largest_number) for fragment in fragments for _ in range(fragment.text.count("{}"))]
        if held_out(str(sorted(numbers)), one_in=4) != test:
            return None
        stages = _stages(fragments, numbers)
        if stages is None:
            return None
        amount, values = true_values(stages)
        if max(values) > LARGEST_VALUE:
            return None
        prompt = template.format(*numbers, name=rng.choice(NAMES), things=rng.choice(THINGS))
        response = f"{rng.choice(LINKS).join(write_steps(stages, rng))} #### {amount}"
        return Problem(prompt, response, json.dumps({"answer": amount, "values": sorted(values), "steps": steps}))

    return collect("math", draw, count, distinct=test)


def reward(answer: str, response: str) -> float:
    """1 if what follows the last "####" is the right integer (ASCII digits, optional sign, thousands commas, white space), else 0."""
    _, mark, final = response.rpartition("####")
    final = final.strip(" \t\r\n")
    return float(bool(mark) and _INTEGER.fullmatch(final) is not None and int(final.replace(",", "")) == json.loads(answer)["answer"])


def dense_reward(answer: str, response: str) -> float:
    """1 if right, else 0.5 * (different true values that valid written steps reach) / (steps of the problem), at most 0.5."""
    if reward(answer, response) == 1.0:
        return 1.0
    problem, reached = json.loads(answer), set()
    for word in response[:LONGEST_WORKING].split("####")[0].split(" "):
        if (step := _STEP.fullmatch(word)) is not None:
            a, symbol, b, value = int(step[1]), step[2], int(step[3]), int(step[4])
            holds = (b > 0 and value * b == a) if symbol == "/" else OPERATIONS[symbol](a, b) == value
            reached |= {value} if holds else set()
    return 0.5 * min(1.0, len(reached.intersection(problem["values"])) / problem["steps"])


_TEXT = "".join([*(f.text for f in OPENINGS + EVENTS), *QUESTIONS, *NAMES, *THINGS]).replace("{name}", "").replace("{things}", "")
TASK = Task("math", "".join(sorted(set(_TEXT + "0123456789 +-*/=#") - set("{}"))), reward, one_component(dense_reward), generate)
