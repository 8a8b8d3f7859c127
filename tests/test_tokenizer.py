"""Characters to ids and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffpo_jax.tasks import TASKS
from diffpo_jax.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("cab")


def test_ids_by_hand():
    assert (TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.mask_id, TOKENIZER.vocab_size) == (0, 1, 2, 6)
    assert TOKENIZER.encode("abca") == [3, 4, 5, 3]
    assert TOKENIZER.encode("") == []
    assert CharTokenizer("abcabc").encode("abc") == [3, 4, 5]


def test_decode_stops_at_eos_drops_pad_and_shows_mask():
    assert TOKENIZER.decode([0, 0, 3, 2, 0, 5, 1, 4]) == "a_c"
    assert TOKENIZER.decode(np.array([3, 4, 1, 9, -1], np.int32)) == "ab"
    assert TOKENIZER.decode([]) == ""


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"'X', 'é'.*first at position 2 of 'abéXé'"):
        TOKENIZER.encode("abéXé")
    for bad in (6, -1):
        with pytest.raises(ValueError, match=f"cannot decode id {bad}: ids are 0 to 5"):
            TOKENIZER.decode([3, bad])


def test_equal_alphabets_make_equal_tokenizers():
    assert CharTokenizer("ab") == CharTokenizer("ab") != CharTokenizer("abc")
    assert hash(CharTokenizer("ab")) == hash(CharTokenizer("ab"))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_round_trip(task):
    tokenizer = CharTokenizer(TASKS[task].alphabet)

    @given(st.text(alphabet=TASKS[task].alphabet))
    def check(text):
        ids = tokenizer.encode(text)
        assert min(ids, default=3) >= 3 and max(ids, default=3) < tokenizer.vocab_size
        assert tokenizer.decode(ids) == tokenizer.decode([0, *ids, 1, 3]) == text

    check()
