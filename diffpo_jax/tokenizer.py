"""Text to token ids and back."""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffpo_jax import storage

JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
CONTENT = "\ue000content\ue000"  # stands for the user's text where the template's frame is read off


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

    def encode_prompt(self, text: str, prefill: str = "") -> list[int]:
        """Ids of a prompt and of the text that the response starts with."""
        return self.encode(text + prefill)

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

    def symbols(self, ids: Sequence[int]) -> list[str]:
        """A printable string for each id: its character, "·" for EOS, "_" for MASK, "<pad>" for PAD; raises ValueError as `decode`."""
        shown = {self.pad_id: "<pad>", self.eos_id: "·"}
        return [shown.get(token) or self.decode([token]) for token in map(int, ids)]


@dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer:
    """The tokenizer of a published model; `load_tokenizer` makes it.

    What a problem or a prefill says is always encoded as plain text: "<|im_end|>" in it becomes the tokens of these ten characters. Only
    the chat template puts special tokens into a prompt.
    """

    mask_id: int
    eos_id: int
    pad_id: int
    vocab_size: int  # rows of the model's embedding; those past the tokenizer's table stand for no text
    full: Any  # tokenizers.Tokenizer
    plain: Any  # the same without its added tokens
    render: Callable[[str], str]  # a user's text -> the chat template's text, the assistant's header included
    frame: tuple[str, str]  # what the template puts before and after the user's text

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; raises ValueError for text that is not Unicode (unpaired surrogates)."""
        try:
            return self.plain.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(f"cannot encode {text!r}: it holds unpaired surrogates") from None

    def encode_prompt(self, text: str, prefill: str = "") -> list[int]:
        """Ids of the published chat template around one user turn, then those of the text that the response starts with.

        Raises:
          ValueError: the template depends on the text, so that it cannot be told which special tokens are the template's.
        """
        head, tail = self.frame
        rendered = self.render(text)
        if not (rendered.startswith(head) and rendered.endswith(tail) and len(rendered) >= len(head) + len(tail)):
            raise ValueError(f"the chat template puts something else than {head!r} and {tail!r} around {text!r}")
        content = rendered[len(head) : len(rendered) - len(tail)]  # the template may have trimmed it
        before, opening, closing, after = self._frame_pieces
        return [*before, *self.encode(opening + content + closing), *after, *self.encode(prefill)]

    @functools.cached_property
    def _frame_pieces(self) -> tuple[list[int], str, str, list[int]]:
        """(ids up to the last added token of the head, the text after it, the text up to the first of the tail, ids from there)."""
        added = {token.content: number for number, token in self.full.get_added_tokens_decoder().items()}
        names = sorted(added, key=len, reverse=True)  # the longest that matches is meant
        pattern = f"({'|'.join(map(re.escape, names)) or '(?!)'})"
        head, tail = (re.split(pattern, text) for text in self.frame)

        def ids(pieces: list[str]) -> list[int]:
            return [number for piece in pieces for number in ([added[piece]] if piece in added else self.encode(piece))]

        return ids(head[:-1]), head[-1], tail[0], ids(tail[1:])

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        marked = {number for number, token in self.full.get_added_tokens_decoder().items() if token.special}
        return frozenset(marked | {self.pad_id}) - {self.mask_id}

    def _check(self, ids: Sequence[int]) -> list[int]:
        ids = [int(token) for token in ids]
        bad = [token for token in ids if not 0 <= token < self.vocab_size]
        if bad:
            raise ValueError(f"cannot decode id {bad[0]}: ids are 0 to {self.vocab_size - 1}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first EOS, without special tokens, MASK shown as "_".

        Ids past the tokenizer's table, which the padded vocabularies of published models allow, are no text; bytes that are not UTF-8
        show as U+FFFD. Raises ValueError for an id that is not in the vocabulary.
        """
        ids = self._check(ids)
        runs: list[list[int]] = [[]]
        for token in ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids:
            if token == self.mask_id:
                runs.append([])
            elif token not in self._special:
                runs[-1].append(token)
        return "_".join(self.full.decode(run, skip_special_tokens=False) for run in runs)

    def symbols(self, ids: Sequence[int]) -> list[str]:
        """A printable string for each id: its text with control characters escaped, "·" for EOS, "_" for MASK; raises as `decode`."""
        shown = {self.eos_id: "·", self.mask_id: "_"}
        return [shown.get(token) or self._printable(token) for token in self._check(ids)]

    def _printable(self, token: int) -> str:
        text = self.full.decode([token], skip_special_tokens=False) or f"<{token}>"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def load_tokenizer(folder: str, *, mask_id: int, eos_id: int, pad_id: int, vocab_size: int) -> HuggingFaceTokenizer:
    """The tokenizer in a published model's folder, read without network, without torch, and without running code from the folder.

    Args:
      folder: holds tokenizer.json, or vocab.json and merges.txt (Qwen2's byte-level BPE, as Dream uses it); and the chat template, in
        tokenizer_config.json or chat_template.jinja.
      mask_id, eos_id, pad_id: the special ids of the model's config.json.
      vocab_size: rows of the model's embedding.

    Raises:
      FileNotFoundError: the folder holds no tokenizer; the message names the files looked for.
      ValueError: no chat template; the tokenizer is not a BPE; tokens do not get their published ids or do not fit the vocabulary; or
        text could be encoded as MASK, EOS or PAD.
    """
    from tokenizers import Tokenizer

    loaded = load_fast(folder)
    full = loaded.backend_tokenizer
    full.no_truncation()
    full.no_padding()
    spec = json.loads(full.to_str())
    if spec["model"]["type"] != "BPE":
        raise ValueError(f"the tokenizer in {folder} is of type {spec['model']['type']}; only BPE is supported")
    for token in spec["added_tokens"]:
        spec["model"]["vocab"].pop(token["content"], None)
    plain = Tokenizer.from_str(json.dumps(spec | {"added_tokens": [], "post_processor": None}))
    _check_ids(folder, full, plain, {"mask_id": mask_id, "eos_id": eos_id, "pad_id": pad_id}, vocab_size)

    def render(text: str) -> str:
        try:
            return loaded.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template in {folder} fails on a user's turn ({type(error).__name__}: {error})") from error

    if not loaded.chat_template:
        raise ValueError(f"the tokenizer in {folder} has no chat template: tokenizer_config.json or chat_template.jinja must hold it")
    parts = render(CONTENT).split(CONTENT)
    if len(parts) != 2:
        raise ValueError(f"the chat template in {folder} must show the user's text once; it shows it {len(parts) - 1} times")
    tokenizer = HuggingFaceTokenizer(mask_id, eos_id, pad_id, vocab_size, full, plain, render, (parts[0], parts[1]))
    sample = "What is 2 + 3?\n\nAnswer:"
    if tokenizer.encode_prompt(sample) != full.encode(render(sample), add_special_tokens=False).ids:
        raise ValueError(f"the tokenizer in {folder} merges text across its special tokens: its prompts cannot be encoded piece by piece")
    return tokenizer


def load_fast(folder: str) -> Any:
    """The transformers tokenizer of a folder.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: its files are damaged.
    """
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if not ("tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there):
        raise FileNotFoundError(
            f"no tokenizer in {folder}: looked for tokenizer.json, or vocab.json and merges.txt. Set --config.model.tokenizer"
        )
    for name in sorted(there.intersection(JSON_FILES)):
        storage.read_object(os.path.join(folder, name))
    with _quiet_transformers():
        from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast

        kind = PreTrainedTokenizerFast if "tokenizer.json" in there else Qwen2TokenizerFast
        try:
            return kind.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the libraries raise what they like on files that are not theirs
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the tokenizer in {folder} cannot be read ({cause}): download its files again") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without what transformers says about a missing torch and about classes that only the folder's own code defines; errors still show."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # read while the package is imported
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _check_ids(folder: str, full: Any, plain: Any, special: dict[str, int], vocab_size: int) -> None:
    """Raises ValueError unless every token has its published id and the model's special ids are no text."""
    path = os.path.join(folder, "tokenizer_config.json")
    if os.path.isfile(path):
        published = storage.read_object(path).get("added_tokens_decoder", {})
        for number, token in published.items():
            if full.token_to_id(token["content"]) != int(number):
                raise ValueError(
                    f"{path} gives {token['content']!r} the id {number}, but it becomes {full.token_to_id(token['content'])}: "
                    "the vocabulary beside it is another one"
                )
    largest = max(full.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise ValueError(f"the tokenizer in {folder} has ids up to {largest}, the model a vocabulary of {vocab_size}")
    for name, number in special.items():
        if not 0 <= number < vocab_size:
            raise ValueError(f"{name} = {number} is not in the model's vocabulary of {vocab_size}")
        if plain.id_to_token(number) is not None:
            raise ValueError(
                f"{name} = {number} is {plain.id_to_token(number)!r} in the tokenizer in {folder}: text would be encoded as it"
            )
    if special["mask_id"] in (special["eos_id"], special["pad_id"]):
        raise ValueError(f"mask_id = {special['mask_id']} is also eos_id or pad_id")
