"""What a task is: problems, and verifiers that parse and never execute an answer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from ml_collections import ConfigDict

DRAWS_WITHOUT_SUCCESS = 200_000  # rejected draws in a row, see `collect`


@dataclass(frozen=True)
class Problem:
    """One problem of a task."""

    prompt: str  # what the model reads
    response: str  # a demonstration: one right response among possibly many
    answer: str  # JSON; what the verifier needs


@dataclass(frozen=True)
class Task:
    """Problems and their verifiers, which never raise and are fast on adversarial text.

    `generate` makes the problems; a task that has none is read from published files by `read`.
    """

    name: str
    alphabet: str  # every character its prompts and responses can hold; "" = any text, which needs a published model's tokenizer
    reward: Callable[[str, str], float]  # (answer, response) -> 1.0 right, 0.0 wrong: the field's verdict
    components: Callable[[str, str], dict[str, float]]  # (answer, response) -> the named parts of the reward that RL trains on
    generate: Callable[[ConfigDict, str, int, int], Iterator[Problem]] | None = None  # (settings, split "train" | "test", count, seed)
    read: Callable[[str, str, bool], Iterator[Problem]] | None = None  # (folder, split, as the released d1 code splits)
    published_score: Callable[[str, str], float | None] | None = None  # (answer, response) -> a published figure beside the verdict
    extract: Callable[[str], str | None] | None = None  # (response) -> the answer in it that is judged, for people to read

    def dense_reward(self, answer: str, response: str) -> float:
        """The training reward: the sum of the components."""
        return float(sum(self.components(answer, response).values()))


def one_component(function: Callable[[str, str], float]) -> Callable[[str, str], dict[str, float]]:
    """The components of a task whose training reward has one part, `function`."""
    return lambda answer, response: {"dense": function(answer, response)}


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


def collect(
    name: str, draw: Callable[[], Problem | None], count: int, distinct: bool, patience: int = DRAWS_WITHOUT_SUCCESS
) -> Iterator[Problem]:
    """Yields `count` problems of `draw`, which returns None to reject a draw.

    Args:
      name: the task's name, for the error.
      draw: draws one problem at random, or None where it does not belong to the split.
      count: problems to yield.
      distinct: never yield one prompt twice.
      patience: rejected draws in a row after which the settings are held to admit no further problem.

    Raises:
      ValueError: where the settings admit fewer than `count` problems.
    """
    seen, failures, found = set(), 0, 0
    while found < count:
        problem = draw()
        if problem is None or problem.prompt in seen:
            failures += 1
            if failures > patience:
                raise ValueError(f"{name}: found {found} of {count} problems; lower task.test_size or widen config.{name}")
            continue
        if distinct:
            seen.add(problem.prompt)
        failures, found = 0, found + 1
        yield problem
