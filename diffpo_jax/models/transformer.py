"""The denoiser: a bidirectional transformer (RMSNorm, RoPE, SwiGLU) as LLaDA's and Dream's, with the head apart from the trunk.

Dimensions of arrays have logical names; over which devices each is split is said by the policy's `layout` (see diffpo_jax.sharding):

  rows      prompts or responses, and what is computed of them
  batch     rows, where `embed` is split too (the embedding's output)
  embed     residual width of the parameters
  heads     query heads; kv_heads: key and value heads
  mlp       hidden width of the MLP
  vocab     vocabulary of the embedding; head_vocab: of the head and of logits
  adapter   inputs of an adapter's A, outputs of its B (see diffpo_jax.models.lora)
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from diffpo_jax.models.attention import ATTENTION, Cache, apply_rope, rope_tables

KERNEL_AXES = {  # projection -> logical names of its kernel's (inputs, outputs)
    "q_proj": ("embed", "heads"), "k_proj": ("embed", "kv_heads"), "v_proj": ("embed", "kv_heads"), "attn_out": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"), "up_proj": ("embed", "mlp"), "down_proj": ("mlp", "embed"), "head_proj": (None, "head_vocab"),
}  # fmt: skip
EMBEDDING_AXES = ("vocab", "embed")
LORA_A_AXES, LORA_B_AXES = ("adapter", None), (None, "adapter")

REMAT = {  # what the backward pass keeps of a block's forward pass beside its input: a policy of jax.checkpoint; None = all of it
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Layout(Protocol):
    """How arrays are split over devices; hashable."""

    def __call__(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x` laid out by the logical names of its dimensions, None = not split."""

    def splits(self, name: str) -> int:
        """Into how many parts a dimension of logical name `name` is split."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """The layout of one device: nothing is split."""

    def __call__(self, x: jax.Array, *names: str | None) -> jax.Array:
        del names
        return x

    def splits(self, name: str) -> int:
        del name
        return 1


DTYPES = ("auto", "float32", "bfloat16")  # of activations
COUNT_POSITIONS = ("all", "valid")  # what rotary positions count
OURS = ("dtype", "attention", "remat", "head_chunk")  # fields of ModelConfig that do not change what a network is


def misfits(width: int, heads: int, kv_heads: int) -> list[str]:
    """What is wrong between these sizes of a model, each at least 1."""
    problems = []
    if width % (2 * heads):
        problems.append(f"model.width = {width} must be a multiple of 2 * model.heads = {2 * heads} (RoPE rotates pairs)")
    if heads % kv_heads:
        problems.append(f"model.heads = {heads} must be a multiple of model.kv_heads = {kv_heads}")
    return problems


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
    attention: str = "einsum"
    remat: str = "none"
    head_chunk: int = 0
    tie_embeddings: bool = False
    shift: bool = False
    count_positions: str = "all"
    mask_in_confidence: bool = False

    def __post_init__(self):
        problems = []
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width"):
            if getattr(self, name) < 1:
                problems.append(f"model.{name} = {getattr(self, name)} must be at least 1")
        if not problems:
            problems += misfits(self.width, self.heads, self.kv_heads)
        if not 0 <= self.mask_id < max(self.vocab_size, 1):
            problems.append(f"model.mask_id = {self.mask_id} is not in the vocabulary of {self.vocab_size}")
        if self.dtype not in DTYPES:
            problems.append(f"model.dtype = {self.dtype!r} is unknown; known: {', '.join(DTYPES)}")
        if self.attention not in ATTENTION:
            problems.append(f"model.attention = {self.attention!r} is unknown; known: {', '.join(ATTENTION)}")
        if self.remat not in REMAT:
            problems.append(f"model.remat = {self.remat!r} is unknown; known: {', '.join(REMAT)}")
        if self.head_chunk < 0:
            problems.append(f"model.head_chunk = {self.head_chunk} must not be negative")
        if self.count_positions not in COUNT_POSITIONS:
            problems.append(f"model.count_positions = {self.count_positions!r} is unknown; known: {', '.join(COUNT_POSITIONS)}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def compute_dtype(self) -> Any:
        """Dtype of the activations; parameters are float32."""
        if self.dtype == "auto":
            return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        return jnp.dtype(self.dtype)


class Dropout(struct.PyTreeNode):
    """Dropout on the input of the adapters (LoRA). A row's noise depends on its own key, not on the rows beside it."""

    keys: jax.Array  # [N] typed PRNG keys
    rate: float = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, name: str, layer: jax.Array) -> jax.Array:
        """Drops entries of x [N * S, D]; a mask of its own for each layer and projection."""
        shape = (x.shape[0] // self.keys.shape[0], x.shape[1])
        number = zlib.crc32(name.encode())

        def row(key):
            return jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, number), layer), 1 - self.rate, shape)

        kept = jax.vmap(row)(self.keys).reshape(x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def gather(layout: Layout, stored: tuple[str | None, ...], used: tuple[str | None, ...], kernel: jax.Array) -> jax.Array:
    """A kernel that is laid out as `stored`, laid out as `used`: a layer is gathered, in the compute dtype, when it is used.

    Its gradient is laid out as `stored` where it is made: summed over devices and scattered, never whole on one.
    """
    del stored
    return layout(kernel, *used)


gather.defvjp(
    lambda layout, stored, used, kernel: (layout(kernel, *used), None), lambda layout, stored, used, _, grad: (layout(grad, *stored),)
)


class Dense(nn.Module):
    """A projection, with a low-rank adapter where the parameters hold one (see diffpo_jax.models.lora)."""

    features: int
    use_bias: bool
    dtype: Any
    kernel_init: Any
    layout: Layout

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, dropout: Dropout | None) -> jax.Array:
        name = str(self.name)
        inputs, outputs = (None if axis == "embed" else axis for axis in KERNEL_AXES[name])
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features)).astype(self.dtype)
        y = x @ gather(self.layout, KERNEL_AXES[name], (inputs, outputs), kernel)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if self.has_variable("params", "lora_a"):
            lora: Any = {part: self.get_variable("params", part).astype(self.dtype) for part in ("lora_a", "lora_b")}
            down = gather(self.layout, LORA_A_AXES, (inputs, None), lora["lora_a"])
            up = gather(self.layout, LORA_B_AXES, (None, outputs), lora["lora_b"])
            y += (x if dropout is None else dropout(x, name, layer)) @ down @ up
        return self.layout(y, "rows", outputs)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU MLP."""

    config: ModelConfig
    layout: Layout
    keep_cache: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: jax.Array, cache: Cache | None, biases: tuple[jax.Array, ...], rope: tuple[jax.Array, jax.Array],
        dropout: Dropout | None,
    ) -> tuple[jax.Array, Cache | None]:  # fmt: skip
        """One layer, as `nn.scan` wants it: returns x, and with `keep_cache` the keys and values of the positions in view.

        Rows and positions are one axis outside attention: weight gradients that contract two axes are several times slower on CPU.

        Args:
          x: [N * K, D], K positions in view of each row: all S, or some, and the others are in the cache.
          layer: [] int32, its number.
          cache: keys and values of an earlier pass at this layer, None without one.
          biases: [N, 1, 1, K] of the positions in view and, with a cache, [N, 1, 1, S] of those in it: 0 where they are to be attended,
            very negative elsewhere.
          rope: (cos, sin) of the positions in view, see `apply_rope`.
          dropout: of the adapters, None for none.
        """
        c = self.config
        rows = biases[0].shape[0]
        length = x.shape[0] // rows
        norm = functools.partial(nn.RMSNorm, epsilon=c.norm_eps, dtype=c.compute_dtype)
        normal = nn.initializers.normal
        head_dim = c.width // c.heads

        def dense(name, features, x, use_bias=False, std=0.02):
            return Dense(features, use_bias, c.compute_dtype, normal(std), self.layout, name=name)(x, layer, dropout)

        h = norm(name="attn_norm")(x)

        def project(name, heads):  # [N * S, D] -> [N, heads, S, head_dim]
            projected = dense(name, heads * head_dim, h, c.qkv_bias).reshape(rows, length, heads, head_dim).swapaxes(1, 2)
            return self.layout(projected, "rows", KERNEL_AXES[name][1], None, None)

        query, key, value = project("q_proj", c.heads), project("k_proj", c.kv_heads), project("v_proj", c.kv_heads)
        query, key = apply_rope(query, *rope) * head_dim**-0.5, apply_rope(key, *rope)
        new = Cache(key, value)
        attended = ATTENTION[c.attention](query, (new,) if cache is None else (new, cache), biases)
        attended = attended.swapaxes(1, 2).reshape(rows * length, c.width)
        out_std = 0.02 / (2 * c.layers) ** 0.5
        x = x + dense("attn_out", c.width, attended, std=out_std)

        h = norm(name="mlp_norm")(x)
        gate, up = dense("gate_proj", c.mlp_width, h), dense("up_proj", c.mlp_width, h)
        return x + dense("down_proj", c.width, nn.silu(gate) * up, std=out_std), new if self.keep_cache else None


class Transformer(nn.Module):
    """Trunk and head; the layers are stacked and scanned."""

    config: ModelConfig
    layout: Layout = Whole()
    keep_cache: bool = False  # `hidden` returns the keys and values, too, and not None

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.width, dtype=c.compute_dtype, embedding_init=nn.initializers.normal(1.0))
        block = Block if REMAT[c.remat] is None else nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])
        unroll = c.layers if c.layers <= 8 else 1  # a small trunk runs a quarter faster without the loop's copies
        self.blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, 0, *[nn.broadcast] * 3), length=c.layers,
            unroll=unroll,
        )(c, self.layout, self.keep_cache)  # fmt: skip
        self.final_norm = nn.RMSNorm(epsilon=c.norm_eps, dtype=c.compute_dtype)
        if not c.tie_embeddings:
            self.head_proj = nn.Dense(c.vocab_size, use_bias=False, dtype=c.compute_dtype, kernel_init=nn.initializers.normal(0.02))

    def hidden(self, tokens: jax.Array, mask: jax.Array, dropout: Dropout | None = None) -> tuple[jax.Array, Cache | None]:
        c = self.config
        x, cache = self._trunk(tokens, (mask,), self._rope(mask, None), None, dropout)
        return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1) if c.shift else x, cache

    def hidden_in_view(self, tokens: jax.Array, mask: jax.Array, view: jax.Array, renewed: jax.Array, cache: Cache) -> jax.Array:
        c = self.config
        if c.shift:
            view = jnp.concatenate([view[:, :1] - 1, view], axis=1)
        at_view = functools.partial(jnp.take_along_axis, indices=view, axis=1)
        x, _ = self._trunk(at_view(tokens), (at_view(mask & renewed), mask & ~renewed), self._rope(mask, view), cache, None)
        return x[:, :-1] if c.shift else x

    def _rope(self, mask: jax.Array, view: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tables (cos, sin), see `apply_rope`, of the positions in view [N, K], None = all; mask [N, S]."""
        c, positions = self.config, view
        if c.count_positions == "valid":
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)  # from the first token that is not padding
            positions = positions if view is None else jnp.take_along_axis(positions, view, axis=1)
        tables = rope_tables(mask.shape[1], c.width // c.heads, c.rope_theta)
        return tables if positions is None else tuple(jnp.asarray(table)[positions][:, None] for table in tables)

    def _trunk(self, tokens, masks, rope, cache, dropout):
        """Outputs [N, K, D] at tokens [N, K], which attend to one another and to the cache where masks ([N, K], [N, S]) say so."""
        c = self.config
        biases = tuple(jnp.where(mask, 0.0, -1e30)[:, None, None, :] for mask in masks)
        x = self.layout(self.embed(self.layout(tokens.reshape(-1), "batch")), "batch", "embed")  # the table stays where it is
        x, kept = self.blocks(self.layout(x, "rows", None), jnp.arange(c.layers), cache, biases, rope, dropout)
        return self.layout(self.final_norm(x), "rows", None).reshape(*tokens.shape, -1), kept

    def head(self, hidden: jax.Array) -> jax.Array:
        # The head is split over its vocabulary only: it stays where it is, and the few hidden states come to it.
        batch = ["batch"] + [None] * (hidden.ndim - 2)
        hidden = self.layout(hidden, *batch, None)
        logits = self.embed.attend(hidden) if self.config.tie_embeddings else self.head_proj(hidden)
        return self.layout(logits.astype(jnp.float32), *batch, "head_vocab")

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return self.head(self.hidden(tokens, mask)[0])


def without_mask(logits: jax.Array, mask_id: int, index: jax.Array | None = None) -> jax.Array:
    """Logits [..., V] under which MASK has probability 0; of some tokens only, those of these indices (int32, of the last dimensions)."""
    return jnp.where((jnp.arange(logits.shape[-1]) if index is None else index) == mask_id, -1e30, logits)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The denoiser as pure functions of its parameters. Hashable: a static argument of jitted functions."""

    config: ModelConfig
    layout: Layout = Whole()

    def init(self, key: jax.Array) -> Any:
        """Random float32 parameters."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        return Transformer(self.config).init(key, tokens, jnp.ones((1, 2), bool))["params"]

    def hidden(self, params: Any, tokens: jax.Array, mask: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Last hidden states of the trunk, each at the position whose token it predicts.

        Args:
          params: of `init`.
          tokens: [N, S] int32, prompt and response.
          mask: [N, S] bool, False at padding, which is attended by nobody.
          dropout: of the adapters, in training; None for none.

        Returns:
          [N, S, D] in the compute dtype. For a model that predicts the next position (`shift`, Dream) the states are moved right by one.
        """
        chex.assert_rank([tokens, mask], 2)
        chex.assert_equal_shape([tokens, mask])
        return Transformer(self.config, self.layout).apply({"params": params}, tokens, mask, dropout, method="hidden")[0]

    def hidden_and_cache(self, params: Any, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, Cache]:
        """`hidden`, and the keys and values of all layers, for `hidden_in_view`."""
        return Transformer(self.config, self.layout, keep_cache=True).apply({"params": params}, tokens, mask, method="hidden")

    def hidden_in_view(
        self, params: Any, tokens: jax.Array, mask: jax.Array, view: jax.Array, renewed: jax.Array, cache: Cache
    ) -> jax.Array:
        """Hidden states at some positions, which attend to the cache of an earlier pass elsewhere: an approximation of `hidden`.

        Exact where no token outside the view has changed since that pass and the network has one layer.

        Args:
          params: of `init`.
          tokens: [N, S] int32.
          mask: [N, S] bool, as in `hidden`.
          view: [N, K] int32, ascending positions whose hidden states are wanted, none of them 0 where the model predicts the next position
            (`shift`): the trunk then runs on the position before them, too.
          renewed: [N, S] bool, positions in view whose keys and values are those of this pass; the others' are from the cache.
          cache: of `hidden_and_cache`.

        Returns:
          [N, K, D] in the compute dtype.
        """
        return Transformer(self.config, self.layout).apply(
            {"params": params}, tokens, mask, view, renewed, cache, method="hidden_in_view"
        )

    def head(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D] at any chosen positions; MASK has probability 0."""
        return without_mask(self.whole_head(params, hidden), self.config.mask_id)

    def whole_head(self, params: Any, hidden: jax.Array) -> jax.Array:
        """`head` with the network's own logit of MASK."""
        return Transformer(self.config, self.layout).apply({"params": params}, hidden, method="head")

    def head_in_parts(self, params: Any, hidden: jax.Array) -> Callable[[jax.Array | int, int], jax.Array]:
        """`whole_head` of hidden states [..., D] to be read in pieces of each of the S parts that the vocabulary is split in.

        Returns:
          A function: (start, size) -> logits [..., S, size] float32, of the tokens s * V / S + start + (0 .. size - 1).
        """
        tied, parts, width = self.config.tie_embeddings, self.layout.splits("head_vocab"), self.config.width
        kernel = params["embed"]["embedding"] if tied else params["head_proj"]["kernel"]
        kernel = self.layout(kernel, *(("head_vocab", None) if tied else (None, "head_vocab")))
        batch = ["batch"] + [None] * (hidden.ndim - 2)
        hidden = self.layout(hidden, *batch, None).astype(self.config.compute_dtype)

        def read(start, size):
            apart = kernel.reshape((parts, -1, width) if tied else (width, parts, -1))
            some = jax.lax.dynamic_slice_in_dim(apart, start, size, axis=1 if tied else 2).astype(hidden.dtype)
            logits = jnp.einsum("...d,svd->...sv" if tied else "...d,dsv->...sv", hidden, some)
            return self.layout(logits.astype(jnp.float32), *batch, "head_vocab", None)

        return read

    def logits(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """`head` of `hidden`: [N, S] int32, [N, S] bool -> [N, S, V] float32."""
        return self.head(params, self.hidden(params, tokens, mask))


def init_policy(config: Any, key: jax.Array) -> tuple[Policy, Any]:
    """A policy of `config` (the fields of `ModelConfig`, as a mapping) and its random parameters.

    Raises:
      ValueError: if sizes do not fit together; all problems in one message.
    """
    policy = Policy(ModelConfig(**{field.name: config[field.name] for field in dataclasses.fields(ModelConfig) if field.name in config}))
    return policy, policy.init(key)
