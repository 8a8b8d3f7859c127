import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpo_jax.models.lora import PROJECTIONS, Trainable
from diffpo_jax.models.transformer import Dropout, ModelConfig, Policy

POLICY = Policy(ModelConfig(vocab_size=7, mask_id=6, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, qkv_bias=True, dtype="float32"))
TOKENS = jnp.asarray([[1, 2, 6, 6], [0, 3, 4, 6]])
MASK = jnp.asarray([[True] * 4, [False] + [True] * 3])


@pytest.fixture(scope="module")
def base():
    return POLICY.init(jax.random.key(0))


@pytest.fixture(scope="module")
def adapters(base):
    """Adapters after some training: none of their matrices is zero."""
    drawn = Trainable(rank=3).init(jax.random.key(1), base)
    leaves, tree = jax.tree.flatten(drawn)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


def test_adapters_start_as_the_base(base):
    trainable = Trainable(rank=3)
    fresh = trainable.init(jax.random.key(1), base)
    assert set(fresh["blocks"]) == set(PROJECTIONS)
    assert fresh["blocks"]["down_proj"]["lora_a"].shape == (2, 24, 3) and fresh["blocks"]["down_proj"]["lora_b"].shape == (2, 3, 16)
    assert 0.9 / 24**0.5 < np.abs(fresh["blocks"]["down_proj"]["lora_a"]).max() <= 1 / 24**0.5
    logits = POLICY.logits(base, TOKENS, MASK)
    np.testing.assert_array_equal(POLICY.logits(trainable.join(base, fresh), TOKENS, MASK), logits)


def test_without_rank_all_of_the_model_is_trained(base):
    trainable = Trainable()
    params = trainable.init(jax.random.key(1), jax.tree.map(lambda x: x.astype(jnp.bfloat16), base))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert trainable.join(base, params) is params


def test_an_adapter_adds_its_product(base, adapters):
    x = jax.random.normal(jax.random.key(3), (5, 16))
    trainable = Trainable(rank=3, alpha=6.0, targets=("q_proj",))
    joined = trainable.join(base, {"blocks": {"q_proj": adapters["blocks"]["q_proj"]}})["blocks"]
    a, b = adapters["blocks"]["q_proj"].values()
    layer = {name: value[1] for name, value in joined["q_proj"].items()}
    by_hand = x @ base["blocks"]["q_proj"]["kernel"][1] + 2.0 * x @ a[1] @ b[1]
    np.testing.assert_allclose(x @ layer["kernel"] + x @ layer["lora_a"] @ layer["lora_b"], by_hand, atol=1e-5)
    assert "lora_a" not in joined["k_proj"]


@pytest.mark.parametrize("targets", [(), ("v_proj", "up_proj")])
def test_merged_and_unmerged_agree(base, adapters, targets):
    trainable = Trainable(rank=3, alpha=6.0, targets=targets)
    trained = {"blocks": {name: adapters["blocks"][name] for name in targets or PROJECTIONS}}
    unmerged = POLICY.logits(trainable.join(base, trained), TOKENS, MASK)
    merged = POLICY.logits(trainable.merge(base, trained), TOKENS, MASK)
    seen = np.asarray(MASK)
    np.testing.assert_allclose(merged[seen], unmerged[seen], atol=1e-5)
    assert np.abs(merged - POLICY.logits(base, TOKENS, MASK))[seen][:, :6].max() > 1e-2


def test_gradients_reach_every_adapter_and_nothing_else(base, adapters):
    trainable = Trainable(rank=3, alpha=0.3)  # small: attention must not be saturated

    def loss(base, adapters):
        return jnp.sum(jnp.sin(POLICY.logits(trainable.join(base, adapters), TOKENS, MASK)[..., :6]))

    gradients = jax.grad(loss, argnums=1)(base, adapters)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))
    assert jax.tree.structure(gradients) == jax.tree.structure(adapters)


def test_dropout_of_a_row_does_not_depend_on_its_neighbours(base, adapters):
    params = Trainable(rank=3).join(base, adapters)
    keys = jax.random.split(jax.random.key(5), 2)
    both = POLICY.hidden(params, TOKENS, MASK, Dropout(keys, 0.5))
    alone = POLICY.hidden(params, TOKENS[1:], MASK[1:], Dropout(keys[1:], 0.5))
    np.testing.assert_allclose(both[1, 1:], alone[0, 1:], atol=1e-5)
    other = POLICY.hidden(params, TOKENS[1:], MASK[1:], Dropout(keys[:1], 0.5))
    assert np.abs(other - alone)[0, 1:].max() > 1e-2
    np.testing.assert_array_equal(POLICY.hidden(base, TOKENS, MASK, Dropout(keys, 0.5)), POLICY.hidden(base, TOKENS, MASK))


def test_dropout_keeps_the_mean_and_differs_by_layer_and_projection():
    x, dropout = jnp.ones((2 * 50, 40)), Dropout(jax.random.split(jax.random.key(0), 2), 0.25)
    drawn = [np.asarray(dropout(x, name, layer)) for name, layer in (("q_proj", 0), ("q_proj", 1), ("k_proj", 0))]
    for values in drawn:
        assert set(np.round(np.unique(values), 5)) == {0.0, np.float32(np.round(4 / 3, 5))}
        assert values.mean() == pytest.approx(1.0, abs=0.05)
    assert len({values.tobytes() for values in drawn}) == 3


def test_bad_settings():
    with pytest.raises(ValueError, match="ff_proj matches nothing; known: q_proj, .*down_proj"):
        Trainable(rank=2, targets=("ff_proj",))
    with pytest.raises(ValueError, match=r"lora.dropout = 1.0 must be in \[0, 1\)"):
        Trainable(rank=2, dropout=1.0)
