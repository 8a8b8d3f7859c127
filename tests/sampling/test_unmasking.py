"""The unmasking rules on cases worked by hand, and by brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpo_jax.sampling import unmasking
from diffpo_jax.sampling.unmasking import RULES, THRESHOLD_RULES, TOP_K_RULES, PositionStats, tokens_this_step

FIELDS = {"low_confidence": "sampled_prob", "top_probability": "max_prob", "margin": "margin", "entropy": "entropy", "random": "noise",
          "threshold": "max_prob", "entropy_bounded": "entropy"}  # fmt: skip


JITTED = {rule: jax.jit(function) for rule, function in RULES.items()}


def select(rule, values, eligible, amount, jit=True):
    """Positions picked in one row, filled up to 6; statistics that the rule must not read would pick from the other end."""
    fill = 6 - len(values)
    values, eligible = np.array([[*values, *[0.0] * fill]], np.float32), np.array([[*eligible, *[False] * fill]], bool)
    decoy = np.arange(6, dtype=np.float32)[None] * 100
    stats = PositionStats(**({name: decoy for name in FIELDS.values()} | {"entropy": -decoy} | {FIELDS[rule]: values}))
    amount = np.array([amount], np.int32 if rule in TOP_K_RULES else np.float32)
    picked = JITTED[rule](stats, eligible, amount) if jit else RULES[rule](*jax.tree.map(jnp.asarray, (stats, eligible, amount)))
    return np.flatnonzero(picked[0]).tolist()


@pytest.mark.parametrize("rule", sorted(TOP_K_RULES))
def test_top_k_rules(rule):
    sign = -1 if rule == "entropy" else 1  # the least entropy, the most of everything else
    values, everywhere = [sign * v for v in (0.3, 0.9, 0.5, 0.9, 0.1)], [1] * 5
    assert select(rule, values, everywhere, 1) == [1]  # a tie goes to the left
    assert select(rule, values, everywhere, 2) == [1, 3]
    assert select(rule, values, everywhere, 3) == [1, 2, 3]
    assert select(rule, values, [1, 0, 1, 0, 1], 2) == [0, 2]  # the best two are not masked
    assert select(rule, values, [1, 0, 0, 0, 1], 4) == [0, 4]  # more asked for than there are
    assert select(rule, values, everywhere, 0) == [1]  # at least one
    assert select(rule, values, [0] * 5, 3) == []
    assert select(rule, [0.0] * 5, everywhere, 2) == [0, 1]
    if rule == "margin":
        assert select(rule, values, everywhere, 3, jit=False) == [1, 2, 3]


def test_threshold():
    values, everywhere = [0.3, 0.9, 0.5, 0.8, 0.5], [1] * 5
    assert select("threshold", values, everywhere, 0.8) == [1, 3]  # the threshold itself is enough
    assert select("threshold", values, everywhere, 0.5) == [1, 2, 3, 4]
    assert select("threshold", values, everywhere, 0.95) == [1]  # at least the best
    assert select("threshold", values, [1, 0, 1, 0, 1], 0.95) == [2]
    assert select("threshold", values, [1, 0, 1, 0, 1], 0.2) == [0, 2, 4]
    assert select("threshold", values, [0] * 5, 0.0) == []


def test_entropy_bounded():
    values, everywhere = [0.5, 0.1, 0.7, 0.2], [1] * 4
    # ascending 0.1 (1), 0.2 (3), 0.5 (0), 0.7 (2): sum minus maximum of the prefixes is 0, 0.1, 0.3, 0.8
    assert select("entropy_bounded", values, everywhere, 0.0) == [1]
    assert select("entropy_bounded", values, everywhere, 0.11) == [1, 3]
    assert select("entropy_bounded", values, everywhere, 0.31) == [0, 1, 3]
    assert select("entropy_bounded", values, everywhere, 0.79) == [0, 1, 3]
    assert select("entropy_bounded", values, everywhere, 0.81) == [0, 1, 2, 3]
    assert select("entropy_bounded", values, [1, 0, 1, 1], 0.19) == [3]  # without position 1: 0, 0.2, 0.7
    assert select("entropy_bounded", values, [1, 0, 1, 1], 0.21) == [0, 3]
    assert select("entropy_bounded", values, [1, 0, 1, 1], np.inf) == [0, 2, 3]
    assert select("entropy_bounded", values, everywhere, -1.0) == [1]
    assert select("entropy_bounded", values, everywhere, 0.31, jit=False) == [0, 1, 3]
    assert select("entropy_bounded", values, [0] * 4, 9.0) == []


def test_entropy_bounded_ties():
    assert select("entropy_bounded", [0.0, 0.4, 0.0, 0.5], [1] * 4, 0.0) == [0, 1, 2]  # certain positions are free, and so is the next one
    assert select("entropy_bounded", [0.4, 0.4], [1, 1], 0.3) == [0]
    # A position whose entropy is small but not zero uses up gamma = 0, beside however large an entropy.
    assert select("entropy_bounded", [1e-9, 1.5, 3e-9], [1] * 3, 0.0) == [0]


@settings(max_examples=80, deadline=None)
@given(
    entropies=st.lists(st.integers(0, 64), min_size=6, max_size=6),
    eligible=st.integers(0, 63),
    gamma=st.integers(0, 256),
)
def test_entropy_bounded_is_the_largest_prefix(entropies, eligible, gamma):
    """Against every prefix tried out; multiples of 1/32 are exact in float32."""
    eligible = [bool(eligible >> i & 1) for i in range(len(entropies))]
    ascending = sorted((h, k) for k, (h, e) in enumerate(zip(entropies, eligible, strict=True)) if e)
    prefixes = [ascending[:n] for n in range(1, len(ascending) + 1)]
    allowed = [p for n, p in enumerate(prefixes) if n == 0 or sum(h for h, _ in p) - max(h for h, _ in p) <= gamma]
    expected = sorted(k for _, k in allowed[-1]) if allowed else []
    # allowed prefixes are nested, so that the last is the largest
    assert [len(p) for p in allowed] == list(range(1, len(allowed) + 1))
    assert select("entropy_bounded", [h / 32 for h in entropies], eligible, gamma / 32) == expected


@pytest.mark.parametrize("rule", sorted(RULES))
def test_rows_are_independent_and_have_their_own_amounts(rule):
    rng = np.random.default_rng(0)
    rows = rng.random((4, 6)).astype(np.float32)
    eligible = rng.random((4, 6)) < 0.7
    amounts = np.array([1, 2, 3, 0]) if rule in TOP_K_RULES else np.array([0.2, 0.9, 0.5, 0.0])
    stats = PositionStats(**{name: jnp.asarray(rows) for name in FIELDS.values()})
    together = JITTED[rule](stats, eligible, np.asarray(amounts, np.int32 if rule in TOP_K_RULES else np.float32))
    for i in range(4):
        assert np.flatnonzero(together[i]).tolist() == select(rule, rows[i], eligible[i], amounts[i])


def test_rules_are_the_seven_of_the_design():
    assert set(TOP_K_RULES) == {"low_confidence", "top_probability", "margin", "entropy", "random"}
    assert set(THRESHOLD_RULES) == {"threshold", "entropy_bounded"}
    assert set(RULES) == set(TOP_K_RULES) | set(THRESHOLD_RULES)


def get_num_transfer_tokens(masked, steps):
    """LLaDA's function of this name, for one row."""
    base, remainder = masked // steps, masked % steps
    counts = np.zeros(steps, np.int64) + base
    counts[:remainder] += 1
    return counts


@pytest.mark.parametrize("length, steps", [(8, 8), (8, 3), (7, 2), (16, 5), (4, 1), (9, 7)])
def test_schedule_is_the_published_one(length, steps):
    k = tokens_this_step(jnp.arange(steps, dtype=jnp.int32), length, steps)
    np.testing.assert_array_equal(k, get_num_transfer_tokens(length, steps))
    assert k.sum() == length and k.dtype == jnp.int32


def test_top_k_takes_an_amount_a_row():
    picked = unmasking.top_k(jnp.asarray([[3.0, 1.0, 2.0]] * 3), jnp.ones((3, 3), bool), jnp.asarray([1, 2, 5]))
    np.testing.assert_array_equal(picked, [[1, 0, 0], [1, 0, 1], [1, 1, 1]])
