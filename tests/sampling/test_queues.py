"""Lanes that take the next row of their queue: by hand, and against the sampler in lockstep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpo_jax.models.threshold_head import ThresholdHead
from diffpo_jax.models.transformer import Whole
from diffpo_jax.sampling import queues
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.sampling.unmasking import RULES
from tests.reference import Parts, make_prompts, tiny_policy

VOCAB, EOS, LENGTH, ROWS = 6, 0, 8, 7
HEAD = ThresholdHead(hidden=4, gamma_min=0.05, gamma_max=8.0, gamma_init=1.0, std_init=1.0)
HALVES = Parts((("rows", 2),))  # rows split in two, as over two devices; all on one


@pytest.fixture(scope="module")
def model():
    policy, params = tiny_policy(vocab=VOCAB, seed=3, sharpness=40.0)
    return policy, params, make_prompts(ROWS, 4, VOCAB, padding=(0, 1, 3))


def sample(model, key=0, prompts=None, **options):
    policy, params, default = model
    prompts = default if prompts is None else prompts
    return denoise(policy, params, prompts.tokens, prompts.mask, jax.random.key(key), **{"length": LENGTH} | options)


def assert_same(a, b):
    """Whatever is not a float must be equal, floats nearly; when rows ran may differ."""
    a, b = a.replace(first_step=None, last_step=None), b.replace(first_step=None, last_step=None)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        exact = not jnp.issubdtype(x.dtype, jnp.floating)
        np.testing.assert_allclose(x, y, rtol=0, atol=0 if exact else 2e-5, err_msg=jax.tree_util.keystr(path))


# The lanes alone


def test_lanes_by_hand():
    lanes = queues.start(4, 10, 2)  # two queues of five rows, two lanes on each
    rows = jnp.arange(10) * 10
    np.testing.assert_array_equal(queues.take(lanes, {"x": rows})["x"], [0, 10, 50, 60])
    rows = queues.put(lanes, rows, jnp.array([1, 11, 51, 61]))
    np.testing.assert_array_equal(rows, [1, 11, 20, 30, 40, 51, 61, 70, 80, 90])

    lanes = queues.advance(lanes, jnp.array([False, True, True, True]))
    np.testing.assert_array_equal(queues.take(lanes, rows), [1, 20, 70, 80])
    lanes = queues.advance(lanes, jnp.array([True, True, True, True]))
    np.testing.assert_array_equal(queues.take(lanes, rows)[:3], [30, 40, 90])
    np.testing.assert_array_equal(queues.busy(lanes), [True, True, True, False])  # the second queue had one row left

    for done in ([True, False, False, True], [False, False, False, True]):  # an idle lane is not asked
        lanes = queues.advance(lanes, jnp.array(done))
        np.testing.assert_array_equal(queues.busy(lanes), [False, True, True, False])
        before = rows
        rows = queues.put(lanes, rows, jnp.array([-1, 41, 91, -1]))
        np.testing.assert_array_equal(rows, before.at[jnp.array([4, 9])].set(jnp.array([41, 91])))
    lanes = queues.advance(lanes, jnp.array([True] * 4))
    np.testing.assert_array_equal(queues.busy(lanes), [False] * 4)
    np.testing.assert_array_equal(queues.put(lanes, rows, jnp.full(4, -1)), rows)


def test_as_many_lanes_as_rows_by_hand():
    lanes, rows = queues.start(4, 4, 2), {"x": jnp.arange(8).reshape(4, 2)}
    assert queues.take(lanes, rows) is rows
    lanes = queues.advance(lanes, jnp.array([False, True, False, False]))
    np.testing.assert_array_equal(queues.busy(lanes), [True, False, True, True])
    assert queues.take(lanes, rows) is rows
    np.testing.assert_array_equal(queues.put(lanes, rows, {"x": -rows["x"]})["x"], [[0, -1], [2, 3], [-4, -5], [-6, -7]])


def test_utilisation_by_hand():
    # two lanes: rows of 3, 1, 1, 2 calls; the second lane has its last row from step 2 to 3
    assert queues.utilisation(jnp.array([0, 0, 1, 2]), jnp.array([2, 0, 1, 3]), jnp.array([3, 1, 1, 2])) == 7 / 8
    assert queues.utilisation(jnp.array([0, 0, 0]), jnp.array([3, 0, 0]), jnp.array([4, 1, 1])) == 0.5
    assert queues.utilisation(jnp.array([0, 0]), jnp.array([3, 1]), jnp.array([2, 2])) == 0.5  # the first waited for two steps


# The sampler


SCHEDULES = [  # lanes, queues, calls a row, the step at which each row comes into a lane
    (1, 1, [8, 4, 4, 8, 4, 8, 4], [0, 8, 12, 16, 24, 28, 36]),
    (2, 1, [8, 4, 4, 8, 4, 8, 4], [0, 0, 4, 8, 8, 12, 16]),
    (3, 1, [8, 4, 4, 8, 4, 8, 4], [0, 0, 0, 4, 4, 8, 8]),
    (7, 1, [8, 4, 4, 8, 4, 8, 4], [0, 0, 0, 0, 0, 0, 0]),
    (2, 2, [8, 4, 4, 4, 4, 8], [0, 8, 12, 0, 4, 8]),
    (4, 2, [8, 4, 4, 4, 4, 8], [0, 0, 4, 0, 0, 4]),
]


@pytest.mark.parametrize("lanes, shards, calls, first_step", SCHEDULES)
def test_a_row_that_waits_takes_the_place_of_a_finished_one_at_once(model, lanes, shards, calls, first_step):
    policy, params, _ = model
    policy = dataclasses.replace(policy, layout=HALVES if shards == 2 else Whole())
    rows = len(calls)
    prompts = make_prompts(rows, 4, VOCAB)
    threshold = jnp.where(jnp.asarray(calls) == 4, jnp.inf, 0.0)  # a call a block of two, or one a token
    found = sample((policy, params, prompts), block_length=2, threshold=threshold, lanes=lanes)
    np.testing.assert_array_equal(found.nfe, calls)
    np.testing.assert_array_equal(found.first_step, first_step)
    steps = max(start + nfe for start, nfe in zip(first_step, calls, strict=True))
    np.testing.assert_array_equal(found.last_step, np.asarray(first_step) + calls - 1)
    np.testing.assert_array_equal(found.whole_calls, calls)
    assert queues.utilisation(found.first_step, found.last_step, found.nfe) == pytest.approx(sum(calls) / (lanes * steps))
    assert_same(found, sample((policy, params, prompts), block_length=2, threshold=threshold))


def test_rows_of_equal_calls_go_in_turns(model):
    found = sample(model, rule="margin", steps=4, lanes=3)
    np.testing.assert_array_equal(found.first_step, [0, 0, 0, 4, 4, 4, 8])


BLOCKS = {"block_length": 4, "steps": 6, "eos_id": EOS, "threshold": 0.5}
CASES = [(rule, lanes, BLOCKS) for rule, lanes in zip(sorted(RULES), (1, 2, 3, 6, 2, 3, 2), strict=True)] + [
    ("entropy_bounded", 2, BLOCKS | {"temperature": 0.0}),
    ("entropy_bounded", 3, {"threshold": 0.9, "temperature": 0.7}),
    ("low_confidence", 3, {"steps": 3, "temperature": 0.0}),
    ("threshold", 2, {"block_length": 2, "threshold": 0.6, "eos_id": EOS, "temperature": 0.0}),
]


@pytest.mark.parametrize("rule, lanes, options", CASES)
def test_lanes_change_no_token(model, rule, lanes, options):
    ids = jnp.asarray([9, 3, 11, 4, 8, 1, 5])
    lockstep = sample(model, key=7, rule=rule, row_ids=ids, **options)
    found = sample(model, key=7, rule=rule, row_ids=ids, lanes=lanes, **options)
    assert_same(found, lockstep)
    assert not np.any(found.tokens == model[0].config.mask_id) and np.any(np.asarray(found.first_step) > 0)
    np.testing.assert_array_equal(lockstep.first_step, 0)


def test_rows_that_end_early_do_make_room(model):
    """What the cases above compare is not all alike: rows end at EOS, at different calls, and lanes do not stand still."""
    found = sample(model, key=7, lanes=2, **BLOCKS)
    whole = sample(model, key=7, **BLOCKS | {"eos_id": None})
    assert len(set(np.asarray(found.nfe).tolist())) > 1 and np.any(np.asarray(found.nfe) < np.asarray(whole.nfe))
    steps = int(np.max(np.asarray(found.first_step) + np.asarray(found.nfe)))
    assert steps <= -(-int(found.nfe.sum()) // 2) + LENGTH


@pytest.mark.parametrize("draw", ["sample", "mode"])
def test_the_threshold_network_is_read_at_each_rows_own_first_call(model, draw):
    params = HEAD.init(jax.random.key(5), model[0].config.width)
    options = {"threshold_fn": getattr(HEAD, draw), "threshold_params": params, "threshold": 99.0}
    lockstep = sample(model, key=2, **options)
    assert len(set(np.asarray(lockstep.draw.gamma).tolist())) >= ROWS - 1  # `mode` reads the prompt alone, and two are alike
    for lanes in (1, 3):
        assert_same(sample(model, key=2, lanes=lanes, **options), lockstep)


def test_the_vocabulary_in_parts_and_two_queues(model):
    policy, params, _ = model
    prompts = make_prompts(12, 4, VOCAB, padding=(0, 1, 3))
    lockstep = sample(model, prompts=prompts, block_length=4)
    parts = dataclasses.replace(policy, layout=Parts((("rows", 2), ("head_vocab", 3))))
    assert_same(sample((parts, params, prompts), block_length=4, lanes=4), lockstep)


def test_rows_whose_logits_are_not_numbers_end(model):
    policy, params, prompts = model
    broken = params | {"head_proj": {"kernel": jnp.full_like(params["head_proj"]["kernel"], jnp.nan)}}
    found = sample((policy, broken, prompts), lanes=3)
    np.testing.assert_array_equal(found.nfe, LENGTH)
    np.testing.assert_array_equal(found.first_step, [0, 0, 0, 8, 8, 8, 16])
    # one token makes a row's logits NaN from where it stands in it: some rows break, and the others do as ever
    table = params["embed"]["embedding"]
    broken = params | {"embed": {"embedding": table.at[3].set(jnp.nan)}}
    found, lockstep = (sample((policy, broken, prompts), lanes=lanes) for lanes in (2, 0))
    stuck = np.any(np.asarray(found.tokens) == policy.config.mask_id, axis=1)
    assert 0 < stuck.sum() < ROWS and np.all(np.asarray(found.nfe)[stuck] == LENGTH)
    assert_same(found, lockstep)


def test_another_key_is_not_another_program(model):
    traced = []

    def choose(params, features, keys):
        traced.append(features.shape)
        return HEAD.sample(params, features, keys)

    options = {"threshold_fn": choose, "threshold_params": HEAD.init(jax.random.key(5), model[0].config.width), "lanes": 3}
    one = sample(model, key=1, **options)
    once = len(traced)
    assert once and set(traced) == {(3, model[0].config.width)}
    other = sample(model, key=2, prompts=make_prompts(ROWS, 4, VOCAB, seed=8), **options)
    assert len(traced) == once and np.any(one.tokens != other.tokens)


@pytest.mark.parametrize("lanes, rows, layout, said", [
    (8, 7, Whole(), "lanes = 8 must be at least 1 and at most the 7 rows"),
    (-1, 7, Whole(), "lanes = -1 must be at least 1"),
    (3, 6, HALVES, "lanes = 3 is not a multiple of the 2 devices over which rows are split"),
    (2, 7, HALVES, "rows = 7 is not a multiple of the 2 devices"),
    (0, 7, HALVES, "rows = 7 is not a multiple of the 2 devices"),
])  # fmt: skip
def test_errors(model, lanes, rows, layout, said):
    policy = dataclasses.replace(model[0], layout=layout)
    with pytest.raises(ValueError, match=said):
        sample((policy, model[1], make_prompts(rows, 4, VOCAB)), lanes=lanes)
