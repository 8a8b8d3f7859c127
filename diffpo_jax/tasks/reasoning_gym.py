r"""Any data set of the reasoning-gym package (arXiv 2505.24760), by its name in config.reasoning_gym.dataset; an optional extra.

Right is a score of exactly 1 by the data set's own scorer, which is also the training reward. What is scored is the text of the last answer
tag, else the last box. Whether a problem is a test problem is decided by a hash of its prompt, so that no prompt is in both splits.

Some scorers hand the answer to Python's eval, by itself or through sympy. They get it only where it is plain arithmetic or a plain list:
see `_is_harmless`.
"""

import contextlib
import difflib
import functools
import io
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from ml_collections import ConfigDict

from diffpo_jax.tasks.answers import answer_tag, last_boxed
from diffpo_jax.tasks.base import Problem, Task, check_split, collect, held_out, stable_hash

PROMPT = "Write your answer in this format:\n<reasoning>\nyour steps\n</reasoning>\n<answer>\nthe answer alone\n</answer>"
PIECE = 1000  # problems of one seed
DRAWS_WITHOUT_SUCCESS = 5_000  # a data set may take milliseconds a draw
LISTS = frozenset(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"))  # scored with eval
EXPRESSIONS = frozenset(  # scored with sympy.parse_expr, which is eval
    ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration")
)
LONGEST_TEXT = 10_000  # characters of an answer
LONGEST_EXPRESSION = 1000  # characters of one that reaches sympy
_POWER = re.compile(r"(?:\*\*|\^) ?\(?([0-9]{1,2})(?:/[0-9]{1,2})?\)?(?![0-9.]| *(?:\*\*|\^|\())")  # no tower
_NAMES = frozenset("sin cos tan exp log ln sqrt pi asin acos atan sinh cosh tanh Abs".split())


def _package() -> Any:
    """The package; ValueError where it is not installed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ValueError('task reasoning_gym needs the package reasoning-gym: pip install "diffpo_jax[gym]"') from None
    return reasoning_gym, DATASETS


def _create(name: str, options: dict, **sizes: int) -> Any:
    """The data set; ValueError for an unknown name or options that it does not take."""
    package, known = _package()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        hint = f"close to it: {', '.join(close)}" if close else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"reasoning_gym.dataset {name!r} is unknown; {hint}")
    allowed = sorted({field.name for field in fields(known[name][1])} - {"seed", "size"})
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"reasoning_gym.options: {name} has no option {', '.join(unknown)}; it has {', '.join(allowed)}")
    try:
        return package.create_dataset(name, **options, **sizes)
    except Exception as error:  # the package asserts what it wants
        raise ValueError(f"reasoning_gym.options: {name} refuses {json.dumps(options)}: {error}") from None


def generate(settings: ConfigDict, split: str, count: int, seed: int) -> Iterator[Problem]:
    """Problems of the data set settings.dataset with settings.options, a JSON object.

    Raises:
      ValueError: the package is not installed, it has no such data set (close names are listed) or option, or too few problems.
    """
    test, name = check_split(split), settings.dataset
    try:
        options = json.loads(settings.options)
    except ValueError as error:
        raise ValueError(f"reasoning_gym.options is no JSON: {error}: {settings.options!r}") from None
    if not isinstance(options, dict):
        raise ValueError(f"reasoning_gym.options must be a JSON object: {settings.options!r}")

    def entries() -> Iterator[dict]:  # in pieces, since some data sets draw all of their problems when they are made
        for piece in itertools.count():
            dataset = _create(name, options, seed=stable_hash(f"{name} {split} {seed} {piece}") % 2**31, size=PIECE)
            yield from (dataset[i] for i in range(PIECE))

    stream = entries()

    def draw() -> Problem | None:
        entry = next(stream)
        prompt = f"{entry['question'].strip()}\n\n{PROMPT}"
        if held_out(prompt, one_in=8) != test:
            return None
        return Problem(prompt, "", json.dumps({"dataset": name, "options": options, "entry": _pack(entry)}))

    return collect("reasoning_gym", draw, count, distinct=test, patience=DRAWS_WITHOUT_SUCCESS)


def _pack(value: Any) -> Any:
    """`value` for JSON: tuples, sets and dicts with keys other than text are marked, so that `_unpack` restores them."""
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("<") for key in value):
            return {key: _pack(item) for key, item in value.items()}
        return {"<dict>": [[_pack(key), _pack(item)] for key, item in value.items()]}
    if isinstance(value, (tuple, set, frozenset)):
        return {f"<{type(value).__name__}>": [_pack(item) for item in value]}
    return [_pack(item) for item in value] if isinstance(value, list) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (kind := next(iter(value))) in _KINDS:
        return _KINDS[kind](_unpack(value[kind]))
    return {key: _unpack(item) for key, item in value.items()}


_KINDS = {"<dict>": dict, "<tuple>": tuple, "<set>": set, "<frozenset>": frozenset}


@functools.lru_cache(maxsize=16)
def _scorer(name: str, options: str) -> Any:
    return _create(name, json.loads(options), size=1, seed=0).score_answer


def _is_harmless(name: str, text: str) -> bool:
    """Whether the scorer of `name` may see `text`: what reaches eval must be numbers, single letters, operators, known functions."""
    if name in LISTS:  # a list of numbers or texts; without parentheses and operators nothing is called or grows
        return len(text) <= 4000 and re.fullmatch(r"[A-Za-z0-9\s,.\[\]'\"_-]*", text) is not None and "for" not in text and "__" not in text
    if name not in EXPRESSIONS:
        return True
    if len(text) > LONGEST_EXPRESSION or re.fullmatch(r"[A-Za-z0-9\s+\-*/^().]*", text) is None or re.search(r"\.\s*[A-Za-z]|//", text):
        return False
    if any(len(word) > 1 and word not in _NAMES for word in re.findall("[A-Za-z]+", text)) or re.search("[0-9]{13}", text):
        return False
    powers = list(_POWER.finditer(text))
    of_groups = [power for power in powers if text[: power.start()].rstrip().endswith(")")]
    if len(powers) != len(re.findall(r"\*\*|\^", text)) or len(of_groups) > 4 or any(len(power[1]) > 1 for power in of_groups):
        return False
    return text.count("(") <= 40


def extract(response: str) -> str | None:
    """The text of the last answer tag, else the last box."""
    found = answer_tag(response, LONGEST_TEXT)
    return last_boxed(response, LONGEST_TEXT) if found is None else found


def score(answer: str, response: str) -> float:
    """The data set's own score in [0, 1]; 0 without an answer and where the scorer fails on it."""
    text, problem = extract(response), json.loads(answer)
    if text is None or not _is_harmless(problem["dataset"], text):
        return 0.0
    scorer = _scorer(problem["dataset"], json.dumps(problem["options"], sort_keys=True))
    state = random.getstate()  # some scorers seed the global generator
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            value = float(scorer(text, _unpack(problem["entry"])))
    except Exception:  # scorers index, parse and convert what the model wrote
        return 0.0
    finally:
        random.setstate(state)
    return min(max(value, 0.0), 1.0) if value == value else 0.0


def reward(answer: str, response: str) -> float:
    """1 if the score is exactly 1, else 0."""
    return float(score(answer, response) == 1.0)


def components(answer: str, response: str) -> dict[str, float]:
    """score: the data set's own."""
    return {"score": score(answer, response)}


TASK = Task("reasoning_gym", "", reward, components, generate, extract=extract)
