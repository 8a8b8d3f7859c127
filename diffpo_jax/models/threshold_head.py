"""The threshold network q_phi(gamma | c): a small head over the pooled prompt representation (arXiv 2510.02212)."""

import dataclasses
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffpo_jax.structs import ThresholdDraw


def pool_prompt(hidden: jax.Array, prompt_mask: jax.Array) -> jax.Array:
    """Mean of the hidden states [N, S, D] over the valid prompt positions [N, P] -> [N, D] float32."""
    prompt = hidden[:, : prompt_mask.shape[1]].astype(jnp.float32)
    total = jnp.sum(jnp.where(prompt_mask[..., None], prompt, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(prompt_mask, axis=1, keepdims=True), 1)


class _Net(nn.Module):
    hidden: int
    outputs: int
    output_bias: tuple[float, ...]

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        x = nn.LayerNorm(name="norm")(features)
        x = nn.silu(nn.Dense(self.hidden, name="hidden")(x))
        bias = lambda key, shape, dtype=jnp.float32: jnp.asarray(self.output_bias, dtype)  # noqa: E731
        return nn.Dense(self.outputs, kernel_init=nn.initializers.normal(0.01), bias_init=bias, name="out")(x)


@dataclasses.dataclass(frozen=True)
class ThresholdHead:
    """The threshold network as pure functions of its parameters; the fields are those of `config.threshold_network`.

    `normal`: u ~ Normal(mean_phi(c), std_phi), gamma = gamma_min (gamma_max / gamma_min)^sigmoid(u); std_phi is read from a parameter
    shared by all prompts. Densities are those of u: in ratios the Jacobian cancels. `categorical`: a softmax over a log-spaced grid.
    """

    hidden: int
    gamma_min: float
    gamma_max: float
    gamma_init: float
    std_init: float
    distribution: str = "normal"
    grid_size: int = 8

    def __post_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"threshold_network.distribution = {self.distribution!r} is unknown; known: {', '.join(DISTRIBUTIONS)}")
        if not 0 < self.gamma_min < self.gamma_init < self.gamma_max:
            raise ValueError(
                "threshold_network needs 0 < gamma_min < gamma_init < gamma_max, "
                f"got {self.gamma_min}, {self.gamma_init}, {self.gamma_max}"
            )
        if self.std_init <= 0 or self.hidden < 1 or self.grid_size < 2:
            raise ValueError("threshold_network needs std_init > 0, hidden >= 1 and grid_size >= 2")

    def _net(self) -> _Net:
        return _Net(self.hidden, *DISTRIBUTIONS[self.distribution].outputs(self))

    def init(self, key: jax.Array, width: int) -> Any:
        """Random parameters for features of `width`."""
        params = self._net().init(key, jnp.zeros((1, width)))["params"]
        return params | {"log_std": jnp.log(jnp.full((), self.std_init, jnp.float32))} if self.distribution == "normal" else params

    def _parameters(self, params: Any, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        net = {name: value for name, value in params.items() if name != "log_std"}
        out = self._net().apply({"params": net}, features)
        return out, params.get("log_std", jnp.zeros(()))

    def sample(self, params: Any, features: jax.Array, keys: jax.Array) -> ThresholdDraw:
        """Draws a threshold a row: features [N, D] float32, keys [N] -> ThresholdDraw."""
        chex.assert_rank(features, 2)
        kind, out = DISTRIBUTIONS[self.distribution], self._parameters(params, features)
        action = kind.sample(out, keys)
        return ThresholdDraw(kind.gamma(self, action), action, kind.log_prob(out, action), features)

    def mode(self, params: Any, features: jax.Array, keys: Any = None) -> ThresholdDraw:
        """The threshold used in evaluation: the one at the mean, or the most probable grid point. `keys` is not read."""
        del keys
        kind, out = DISTRIBUTIONS[self.distribution], self._parameters(params, features)
        action = kind.mode(out)
        return ThresholdDraw(kind.gamma(self, action), action, kind.log_prob(out, action), features)

    def log_prob(self, params: Any, features: jax.Array, action: jax.Array) -> jax.Array:
        """log q_phi(action | c) [N] float32 of the actions [N] given features [N, D]."""
        return DISTRIBUTIONS[self.distribution].log_prob(self._parameters(params, features), action)

    def entropy(self, params: Any, features: jax.Array) -> jax.Array:
        """Entropy [N], nats (of u, for `normal`)."""
        return DISTRIBUTIONS[self.distribution].entropy(self._parameters(params, features))


class _Normal:
    """u ~ Normal(out, exp(log_std)), gamma log-linear in sigmoid(u)."""

    @staticmethod
    def outputs(head):
        share = math.log(head.gamma_init / head.gamma_min) / math.log(head.gamma_max / head.gamma_min)
        return 1, (math.log(share / (1 - share)),)

    @staticmethod
    def gamma(head, action):
        return head.gamma_min * (head.gamma_max / head.gamma_min) ** jax.nn.sigmoid(action)

    @staticmethod
    def sample(out, keys):
        return out[0][:, 0] + jnp.exp(out[1]) * jax.vmap(lambda key: jax.random.normal(key, ()))(keys)

    @staticmethod
    def mode(out):
        return out[0][:, 0]

    @staticmethod
    def log_prob(out, action):
        z = (action - out[0][:, 0]) * jnp.exp(-out[1])
        return -0.5 * jnp.square(z) - out[1] - 0.5 * jnp.log(2 * jnp.pi)

    @staticmethod
    def entropy(out):
        return jnp.broadcast_to(out[1] + 0.5 * jnp.log(2 * jnp.pi * jnp.e), out[0].shape[:1])


class _Categorical:
    """A softmax over `grid_size` log-spaced thresholds; at the start the one next to gamma_init is the most probable."""

    @staticmethod
    def outputs(head):
        grid = [_Categorical.gamma(head, index) for index in range(head.grid_size)]
        return head.grid_size, tuple(-abs(math.log(gamma / head.gamma_init)) / head.std_init for gamma in grid)

    @staticmethod
    def gamma(head, action):
        return head.gamma_min * (head.gamma_max / head.gamma_min) ** (action / (head.grid_size - 1))

    @staticmethod
    def sample(out, keys):
        return jax.vmap(jax.random.categorical)(keys, out[0]).astype(jnp.float32)

    @staticmethod
    def mode(out):
        return jnp.argmax(out[0], axis=-1).astype(jnp.float32)

    @staticmethod
    def log_prob(out, action):
        return jnp.take_along_axis(jax.nn.log_softmax(out[0]), action.astype(jnp.int32)[:, None], axis=-1)[:, 0]

    @staticmethod
    def entropy(out):
        return -jnp.sum(jax.nn.softmax(out[0]) * jax.nn.log_softmax(out[0]), axis=-1)


DISTRIBUTIONS: dict[str, Any] = {"normal": _Normal, "categorical": _Categorical}
