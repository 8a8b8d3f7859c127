"""Text to token ids and back."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character of `alphabet`: ids PAD = 0, EOS = 1, MASK = 2, then the characters in sorted order."""

    alphabet: str
    pad_id: ClassVar[int] = 0
    eos_id: ClassVar[int] = 1
    mask_id: ClassVar[int] = 2

    @functools.cached_property
    def characters(self) -> tuple[str, ...]:
        """The different characters, the one at index i having id i + 3."""
        return tuple(sorted(set(self.alphabet)))

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {character: 3 + i for i, character in enumerate(self.characters)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        return 3 + len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Ids of the characters of `text`; raises ValueError where one is not in the alphabet."""
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            first = min(text.index(character) for character in unknown)
            names = ", ".join(map(repr, unknown))
            raise ValueError(
                f"cannot encode {names}, first at position {first} of {text!r}: not in the alphabet {''.join(self.characters)!r}"
            )
        return [self._ids[character] for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first EOS, without PAD, MASK shown as "_"; raises ValueError for an id that is not in the vocabulary."""
        text = []
        for token in map(int, ids):
            if token == self.eos_id:
                break
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"cannot decode id {token}: ids are 0 to {self.vocab_size - 1}")
            if token != self.pad_id:
                text.append("_" if token == self.mask_id else self.characters[token - 3])
        return "".join(text)
