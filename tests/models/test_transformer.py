"""The denoiser against NumPy, and what it must and must not attend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpo_jax.models.attention import Cache, apply_rope, einsum_attention, flash_attention, rope_tables
from diffpo_jax.models.transformer import REMAT, ModelConfig, Policy, init_policy
from diffpo_jax.reductions import argmax, pick
from tests.reference import LOGITS, sharpen

SIZES = dict(vocab_size=7, mask_id=6, width=16, layers=2, heads=4, kv_heads=4, mlp_width=24, dtype="float32")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 9)), jnp.int32)
MASK = jnp.asarray(np.arange(9) >= np.array([0, 2, 4])[:, None])
HIDDEN = jax.jit(Policy.hidden, static_argnums=0)


def make(**sizes):
    policy = Policy(ModelConfig(**SIZES | sizes))
    return policy, sharpen(policy.init(jax.random.key(0)), 10.0)


@pytest.fixture(scope="module")
def model():
    return make()


def numpy_network(config, params, tokens, mask, renewed=None, kept=None):
    """The network again in float64: logits [S, V] of a row, and the keys and values of its layers.

    With `kept`, those of an earlier pass, positions that are not `renewed` [S] have these instead of their own.
    """
    renewed = np.ones(len(tokens), bool) if kept is None else np.asarray(renewed)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    position = np.maximum(np.cumsum(mask) - 1, 0) if config.count_positions == "valid" else np.arange(len(tokens))

    def rope(x):  # [S, head_dim], halves against each other
        half = x.shape[1] // 2
        angle = position[:, None] / config.rope_theta ** (np.arange(half) / half)
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=1)

    x, head_dim, keep = params["embed"]["embedding"][tokens], config.width // config.heads, []
    for layer in range(config.layers):
        block = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        h = norm(x, block["attn_norm"]["scale"])
        q, k, v = (h @ block[f"{name}_proj"]["kernel"] + block[f"{name}_proj"].get("bias", 0.0) for name in "qkv")
        if kept is not None:
            k, v = (np.where(renewed[:, None], now, before) for now, before in zip((k, v), kept[layer], strict=True))
        keep.append((k, v))
        out = []
        for head in range(config.heads):
            mine = slice(head * head_dim, (head + 1) * head_dim)
            shared = head // (config.heads // config.kv_heads)
            theirs = slice(shared * head_dim, (shared + 1) * head_dim)
            scores = np.where(mask[None, :], rope(q[:, mine]) @ rope(k[:, theirs]).T / np.sqrt(head_dim), -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out.append(weights / weights.sum(1, keepdims=True) @ v[:, theirs])
        x = x + np.concatenate(out, axis=1) @ block["attn_out"]["kernel"]
        h = norm(x, block["mlp_norm"]["scale"])
        gate, up = h @ block["gate_proj"]["kernel"], h @ block["up_proj"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["down_proj"]["kernel"]
    x = norm(x, params["final_norm"]["scale"])
    logits = x @ (params["embed"]["embedding"].T if config.tie_embeddings else params["head_proj"]["kernel"])
    logits[:, config.mask_id] = -1e30
    return np.concatenate([logits[:1], logits[:-1]]) if config.shift else logits, keep


OTHERS = {"kv_heads": 2, "qkv_bias": True, "tie_embeddings": True, "rope_theta": 50.0}


@pytest.mark.parametrize("sizes", [{}, OTHERS, {"remat": "full"}, {"remat": "dots"}])
def test_logits_are_numpys(sizes):
    policy, params = make(**sizes)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)  # norms and biases too
    got = LOGITS(policy, params, TOKENS, MASK)
    assert got.shape == (3, 9, 7) and got.dtype == jnp.float32
    for i in range(3):
        valid = np.asarray(MASK[i])
        expected, _ = numpy_network(policy.config, params, np.asarray(TOKENS[i]), valid)
        np.testing.assert_allclose(np.asarray(got[i])[valid], expected[valid], atol=2e-4, rtol=1e-4)
    assert np.all(jax.nn.softmax(got)[..., policy.config.mask_id] == 0)


VIEWS = {  # positions in view of each row, of those the ones that are renewed
    "its own block": (np.array([[4, 5], [6, 7], [7, 8]]), np.array([[4, 5], [6, 7], [7, 8]])),
    "from the same position on": (np.array([[5, 6, 7, 8]] * 3), np.array([[5, 6, 7, 8], [6, 7, 8, 8], [7, 8, 8, 8]])),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("sizes", [{}, OTHERS, {"shift": True}, {"count_positions": "valid", "shift": True}])
def test_what_is_not_in_view_is_from_the_cache(name, sizes):
    policy, params = make(**sizes)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    view, positions = VIEWS[name]
    renewed = np.zeros(TOKENS.shape, bool)
    np.put_along_axis(renewed, positions, True, axis=1)
    before = jnp.asarray(np.random.default_rng(1).integers(0, 7, TOKENS.shape), jnp.int32)  # other tokens everywhere
    whole, cache = jax.jit(Policy.hidden_and_cache, static_argnums=0)(policy, params, before, MASK)
    np.testing.assert_array_equal(whole, HIDDEN(policy, params, before, MASK))
    seen = jax.jit(Policy.hidden_in_view, static_argnums=0)
    got = policy.head(params, seen(policy, params, TOKENS, MASK, jnp.asarray(view), jnp.asarray(renewed), cache))
    for i in range(3):
        own = np.isin(view[i], positions[i])  # another lane's view may begin earlier
        valid, tokens = np.asarray(MASK[i]), np.asarray(TOKENS[i])
        _, kept = numpy_network(policy.config, params, np.asarray(before[i]), valid)
        if policy.config.shift:  # the position before the first is computed anew, but attended as it was
            own &= view[i] > positions[i].min()
        expected, _ = numpy_network(policy.config, params, tokens, valid, renewed[i], kept)
        np.testing.assert_allclose(np.asarray(got[i])[own], expected[view[i]][own], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_call_of_flash_attention_is_right(kv_heads):
    """On a GPU its implementation is cuDNN's."""
    make = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    query, biases = make(0, 3, 4, 5, 8), (jnp.where(make(1, 3, 1, 1, 5) > -1, 0.0, -1e30), jnp.where(make(2, 3, 1, 1, 9) > -1, 0.0, -1e30))
    parts = tuple(Cache(make(seed, 3, kv_heads, size, 8), make(seed + 1, 3, kv_heads, size, 8)) for seed, size in ((3, 5), (5, 9)))
    for count in (1, 2):
        expected = einsum_attention(query, parts[:count], biases[:count])
        found = flash_attention(query, parts[:count], biases[:count], implementation="xla")
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="model.attention = 'cudnn' needs an NVIDIA GPU; the devices are cpu"):
        flash_attention(query, parts, biases)


def test_padding_is_never_attended(model):
    policy, params = model
    whole = np.asarray(HIDDEN(policy, params, TOKENS, MASK))
    other = np.asarray(HIDDEN(policy, params, jnp.where(MASK, TOKENS, (TOKENS + 1) % 7), MASK))
    valid = np.asarray(MASK)
    np.testing.assert_array_equal(other[valid], whole[valid])
    assert np.abs(other[~valid] - whole[~valid]).max() > 0.1
    moved = HIDDEN(policy, params, jnp.pad(TOKENS, ((0, 0), (3, 0))), jnp.pad(MASK, ((0, 0), (3, 0))))[:, 3:]
    np.testing.assert_allclose(np.asarray(moved)[valid], whole[valid], atol=2e-4)  # positions are relative


def test_every_position_sees_every_other(model):
    policy, params = model
    whole = np.asarray(HIDDEN(policy, params, TOKENS[:1], MASK[:1]))[0]
    changed = jnp.repeat(TOKENS[:1], 9, 0)
    changed = changed.at[jnp.arange(9), jnp.arange(9)].set((changed[0] + 1) % 7)
    moved = np.abs(np.asarray(HIDDEN(policy, params, changed, jnp.ones((9, 9), bool))) - whole).max(-1)
    assert moved.min() > 1e-4  # [changed position, position seen], forwards and backwards


def test_rows_do_not_see_each_other(model):
    policy, params = model
    whole = HIDDEN(policy, params, TOKENS, MASK)
    for i in range(3):
        np.testing.assert_allclose(HIDDEN(policy, params, TOKENS[i : i + 1], MASK[i : i + 1])[0], whole[i], atol=1e-5)


def test_grouped_queries_are_repeated_keys_and_values():
    few, params = make(kv_heads=2)
    many, _ = make(kv_heads=4)
    blocks = dict(params["blocks"])
    for name in ("k_proj", "v_proj"):
        kernel = blocks[name]["kernel"]  # [layers, D, 2 * head_dim]: head 0 serves queries 0 and 1
        assert kernel.shape == (2, 16, 8)
        blocks[name] = {"kernel": jnp.concatenate([kernel[..., :4], kernel[..., :4], kernel[..., 4:], kernel[..., 4:]], axis=-1)}
    np.testing.assert_allclose(LOGITS(few, params, TOKENS, MASK), LOGITS(many, params | {"blocks": blocks}, TOKENS, MASK), atol=1e-5)


def test_rope():
    x = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (4, 2))
    rotated = apply_rope(x[None, None], *rope_tables(4, 2, 10.0))[0, 0]
    np.testing.assert_allclose(rotated, [[np.cos(i), np.sin(i)] for i in range(4)], atol=1e-6)
    cos, _ = rope_tables(5, 4, 100.0)
    np.testing.assert_allclose(cos[3], [np.cos(3.0), np.cos(0.3)], atol=1e-6)
    query, key = (jax.random.normal(jax.random.key(i), (8,)) for i in range(2))
    rotated = [apply_rope(jnp.broadcast_to(v, (10, 8))[None, None], *rope_tables(10, 8, 100.0))[0, 0] for v in (query, key)]
    scores = np.asarray(rotated[0] @ rotated[1].T)
    for offset in range(-9, 10):  # a score depends on the distance alone
        np.testing.assert_allclose(np.diagonal(scores, offset), np.diagonal(scores, offset)[0], atol=1e-5)
    assert len(np.unique(scores[0].round(4))) == 10
    np.testing.assert_allclose(np.linalg.norm(rotated[0], axis=1), np.linalg.norm(query), rtol=1e-5)


def test_what_the_backward_pass_keeps_changes_no_gradient():
    def gradient(remat):
        policy, params = make(remat=remat)
        loss = lambda params: jnp.sum(jnp.sin(policy.hidden(params, TOKENS, MASK)))  # noqa: E731
        return jax.jit(jax.grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params))

    kept, program = gradient("none")
    assert list(REMAT) == ["none", "full", "dots"] and "remat" not in program and "checkpoint" not in program
    programs = {program}
    for remat in ("full", "dots"):
        recomputed, program = gradient(remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), recomputed, kept)
        assert "remat" in program or "checkpoint" in program
        programs.add(program)
    assert len(programs) == 3


def test_argmax_and_pick_by_hand():
    values = jnp.asarray([[[1.0, 3.0, 3.0, -1.0], [-jnp.inf, -1e30, -jnp.inf, -2e30]], [[2.0, jnp.nan, 5.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    top = argmax(values)
    assert top.tolist() == [[1, 1], [3, 0]] and top.dtype == jnp.int32  # the first of equals; the last where there is a NaN
    drawn = jax.random.normal(jax.random.key(0), (50, 3, 11))
    np.testing.assert_array_equal(argmax(drawn), jnp.argmax(drawn, axis=-1))
    index = jnp.asarray(np.random.default_rng(0).integers(0, 11, (50, 3)))
    np.testing.assert_array_equal(pick(drawn, index), np.take_along_axis(np.asarray(drawn), np.asarray(index)[..., None], -1)[..., 0])
    np.testing.assert_array_equal(pick(jnp.asarray([-jnp.inf, 2.0, jnp.nan]), jnp.asarray(1)), 2.0)  # what is not picked does not count


def test_head_at_chosen_positions_is_the_logits_there(model):
    policy, params = model
    hidden = HIDDEN(policy, params, TOKENS, MASK)
    chosen = hidden[:, jnp.asarray([7, 2])]
    np.testing.assert_allclose(jax.jit(policy.head)(params, chosen), LOGITS(policy, params, TOKENS, MASK)[:, [7, 2]], atol=1e-5)
    np.testing.assert_allclose(jax.jit(policy.head)(params, hidden[1, 5]), LOGITS(policy, params, TOKENS, MASK)[1, 5], atol=1e-5)


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    policy, params = make(dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    hidden = HIDDEN(policy, params, TOKENS, MASK)
    assert hidden.dtype == jnp.bfloat16 and LOGITS(policy, params, TOKENS, MASK).dtype == jnp.float32
    exact = HIDDEN(make()[0], params, TOKENS, MASK)
    assert 1e-6 < np.abs(np.asarray(hidden, np.float32) - exact).mean() < 0.05
    assert ModelConfig(**SIZES | {"dtype": "auto"}).compute_dtype == jnp.float32  # on a CPU


def test_errors_name_all_problems():
    with pytest.raises(ValueError, match="model.layers = 0.*model.mask_id = 9.*model.dtype = 'int8'.*float32, bfloat16"):
        ModelConfig(**SIZES | {"layers": 0, "mask_id": 9, "dtype": "int8"})
    with pytest.raises(ValueError, match=r"model.width = 12 must be a multiple of 2 \* model.heads = 8.*heads = 4.*model.kv_heads = 3"):
        ModelConfig(**SIZES | {"width": 12, "kv_heads": 3})
    with pytest.raises(ValueError, match="model.remat = 'some' is unknown; known: none, full, dots; model.head_chunk = -1 must not be neg"):
        ModelConfig(**SIZES | {"remat": "some", "head_chunk": -1})
    with pytest.raises(ValueError, match="model.remat = True is unknown"):  # as it was written once
        ModelConfig(**SIZES | {"remat": True})
    policy, params = init_policy(SIZES, jax.random.key(0))
    with pytest.raises(AssertionError):
        policy.hidden(params, TOKENS, MASK[:, 1:])
