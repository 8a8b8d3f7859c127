"""What a task is: problems, and verifiers that parse and never execute an answer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from ml_collections import ConfigDict

DRAWS_WITHOUT_SUCCESS = 200_000  # rejected draws in a row after which the settings are held to admit no further problem


@dataclass(frozen=True)
class Problem:
    """One problem of a task."""

    prompt: str  # what the model reads
    response: str  # a demonstration: one right response among possibly many
    answer: str  # JSON; what the verifier needs


@dataclass(frozen=True)
class Task:
    """Problems and their verifiers; the verifiers never raise and are fast on adversarial text."""

    name: str
    alphabet: str  # every character its prompts and responses can hold
    generate: Callable[[ConfigDict, str, int, int], Iterator[Problem]]  # (the task's settings, split "train" | "test", count, seed)
    reward: Callable[[str, str], float]  # (answer, response) -> 1.0 right, 0.0 wrong
    dense_reward: Callable[[str, str], float]  # (answer, response) -> in [0, 1], 1.0 exactly if right


def stable_hash(key: str) -> int:
    """A 64-bit hash, the same on every machine and in every run."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")


def held_out(key: str, one_in: int) -> bool:
    """Whether everything with this key belongs to the test split, as about one key in `one_in` does; the same for every seed."""
    return stable_hash(key) % one_in == 0


def check_split(split: str) -> bool:
    """Whether `split` is the test split; raises ValueError for a name that is neither "train" nor "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use 'train' or 'test'")
    return split == "test"


def check_range(name: str, low: int, high: int, at_least: int, at_most: int) -> None:
    """Raises ValueError unless at_least <= low <= high <= at_most, the settings `name`_min and `name`_max."""
    if not at_least <= low <= high <= at_most:
        raise ValueError(f"{name}_min={low}, {name}_max={high}: need {at_least} <= {name}_min <= {name}_max <= {at_most}")


def collect(name: str, draw: Callable[[], Problem | None], count: int, distinct: bool) -> Iterator[Problem]:
    """Yields `count` problems of `draw`, which returns None to reject a draw.

    Args:
      name: the task's name, for the error.
      draw: draws one problem at random, or None where it does not belong to the split.
      count: problems to yield.
      distinct: never yield one prompt twice.

    Raises:
      ValueError: where the settings admit fewer than `count` problems.
    """
    seen, failures, found = set(), 0, 0
    while found < count:
        problem = draw()
        if problem is None or problem.prompt in seen:
            failures += 1
            if failures > DRAWS_WITHOUT_SUCCESS:
                raise ValueError(f"{name}: found {found} of {count} problems; lower task.test_size or widen config.{name}")
            continue
        if distinct:
            seen.add(problem.prompt)
        failures, found = 0, found + 1
        yield problem
