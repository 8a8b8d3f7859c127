"""The denoiser: a bidirectional transformer (RMSNorm, RoPE, SwiGLU) as LLaDA's and Dream's, with the head apart from the trunk."""

import dataclasses
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the network; the fields are those of `config.model`."""

    vocab_size: int
    mask_id: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    qkv_bias: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dtype: str = "auto"
    remat: bool = False
    tie_embeddings: bool = False

    def __post_init__(self):
        problems = []
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width"):
            if getattr(self, name) < 1:
                problems.append(f"model.{name} = {getattr(self, name)} must be at least 1")
        positive = not problems
        if positive and self.width % (2 * self.heads):
            problems.append(f"model.width = {self.width} must be a multiple of 2 * model.heads = {2 * self.heads} (RoPE rotates pairs)")
        if positive and self.heads % self.kv_heads:
            problems.append(f"model.heads = {self.heads} must be a multiple of model.kv_heads = {self.kv_heads}")
        if not 0 <= self.mask_id < max(self.vocab_size, 1):
            problems.append(f"model.mask_id = {self.mask_id} is not in the vocabulary of {self.vocab_size}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            problems.append(f"model.dtype = {self.dtype!r} is unknown; known: auto, float32, bfloat16")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def compute_dtype(self) -> Any:
        """Dtype of the activations; parameters are float32."""
        if self.dtype == "auto":
            return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        return jnp.dtype(self.dtype)


@functools.cache
def rope_tables(length: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Constant (cos, sin) tables [length, head_dim / 2], float32, of rotary position embeddings (arXiv 2104.09864)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.arange(length)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def apply_rope(x: jax.Array, theta: float) -> jax.Array:
    """Rotates x [..., S, head_dim] by its position, halves against each other as LLaDA and Qwen do; computed in float32."""
    cos, sin = rope_tables(x.shape[-2], x.shape[-1], theta)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU MLP."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array):
        """x [N * S, D], bias [N, 1, 1, S] (0 at tokens to attend, very negative at padding) -> (x, None), as `nn.scan` wants.

        Rows and positions are one axis outside attention: weight gradients that contract two axes are several times slower on CPU.
        """
        c = self.config
        rows, length = bias.shape[0], bias.shape[-1]
        dense = functools.partial(nn.Dense, dtype=c.compute_dtype, kernel_init=nn.initializers.normal(0.02))
        norm = functools.partial(nn.RMSNorm, epsilon=c.norm_eps, dtype=c.compute_dtype)
        head_dim = c.width // c.heads

        h = norm(name="attn_norm")(x)

        def project(name, heads):  # [N * S, D] -> [N, heads, S, head_dim]
            y = dense(heads * head_dim, use_bias=c.qkv_bias, name=name)(h)
            return y.reshape(rows, length, heads, head_dim).swapaxes(1, 2)

        query = apply_rope(project("q_proj", c.heads), c.rope_theta) * head_dim**-0.5
        key, value = apply_rope(project("k_proj", c.kv_heads), c.rope_theta), project("v_proj", c.kv_heads)
        if c.kv_heads != c.heads:
            key, value = (jnp.repeat(t, c.heads // c.kv_heads, axis=1) for t in (key, value))
        scores = jnp.einsum("nhsd,nhtd->nhst", query, key, preferred_element_type=jnp.float32) + bias
        attended = jnp.einsum("nhst,nhtd->nhsd", jax.nn.softmax(scores).astype(c.compute_dtype), value)
        attended = attended.swapaxes(1, 2).reshape(rows * length, c.width)
        out_init = nn.initializers.normal(0.02 / (2 * c.layers) ** 0.5)
        x = x + dense(c.width, use_bias=False, kernel_init=out_init, name="attn_out")(attended)

        h = norm(name="mlp_norm")(x)
        gate, up = dense(c.mlp_width, use_bias=False, name="gate_proj")(h), dense(c.mlp_width, use_bias=False, name="up_proj")(h)
        return x + dense(c.width, use_bias=False, kernel_init=out_init, name="down_proj")(nn.silu(gate) * up), None


class Transformer(nn.Module):
    """Trunk and head; the layers are stacked and scanned."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.width, dtype=c.compute_dtype, embedding_init=nn.initializers.normal(1.0))
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        unroll = c.layers if c.layers <= 8 else 1  # a small trunk runs a quarter faster without the loop's copies
        self.blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=c.layers, unroll=unroll
        )(c)
        self.final_norm = nn.RMSNorm(epsilon=c.norm_eps, dtype=c.compute_dtype)
        if not c.tie_embeddings:
            self.head_proj = nn.Dense(c.vocab_size, use_bias=False, dtype=c.compute_dtype, kernel_init=nn.initializers.normal(0.02))

    def hidden(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        bias = jnp.where(mask, 0.0, -1e30)[:, None, None, :]
        x, _ = self.blocks(self.embed(tokens.reshape(-1)), bias)
        return self.final_norm(x).reshape(*tokens.shape, -1)

    def head(self, hidden: jax.Array) -> jax.Array:
        logits = self.embed.attend(hidden) if self.config.tie_embeddings else self.head_proj(hidden)
        return logits.astype(jnp.float32).at[..., self.config.mask_id].set(-1e30)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return self.head(self.hidden(tokens, mask))


@dataclasses.dataclass(frozen=True)
class Policy:
    """The denoiser as pure functions of its parameters. Hashable: a static argument of jitted functions."""

    config: ModelConfig

    def init(self, key: jax.Array) -> Any:
        """Random float32 parameters."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        return Transformer(self.config).init(key, tokens, jnp.ones((1, 2), bool))["params"]

    def hidden(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Last hidden states of the trunk.

        Args:
          params: of `init`.
          tokens: [N, S] int32, prompt and response.
          mask: [N, S] bool, False at padding, which is attended by nobody.

        Returns:
          [N, S, D] in the compute dtype. Bidirectional: the state at a position predicts that position.
        """
        chex.assert_rank([tokens, mask], 2)
        chex.assert_equal_shape([tokens, mask])
        return Transformer(self.config).apply({"params": params}, tokens, mask, method="hidden")

    def head(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D] at any chosen positions; MASK has probability 0."""
        return Transformer(self.config).apply({"params": params}, hidden, method="head")

    def logits(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """`head` of `hidden`: [N, S] int32, [N, S] bool -> [N, S, V] float32."""
        return self.head(params, self.hidden(params, tokens, mask))


def init_policy(config: Any, key: jax.Array) -> tuple[Policy, Any]:
    """A policy of `config` (the fields of `ModelConfig`, as a mapping) and its random parameters.

    Raises:
      ValueError: if sizes do not fit together; all problems in one message.
    """
    policy = Policy(ModelConfig(**dict(config)))
    return policy, policy.init(key)
