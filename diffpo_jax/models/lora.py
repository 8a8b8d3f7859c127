"""What training changes: all of the model, or low-rank adapters beside it (LoRA, arXiv 2106.09685).

Our own and not qwix, whose dropout draws one mask for a whole array: rows would depend on the micro-batch they are in.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "attn_out", "gate_proj", "up_proj", "down_proj")  # of a block, by our names


@dataclasses.dataclass(frozen=True)
class Trainable:
    """Splits the policy's parameters into the frozen start (`base`) and those that are trained.

    With rank 0 all of the model is trained, from a copy of the base; otherwise adapters: y = x W + (alpha / rank) x A B, of each target.
    """

    rank: int = 0
    alpha: float = 64.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # our names (`PROJECTIONS`); () = all

    def __post_init__(self):
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        if unknown:
            raise ValueError(f"lora.targets: {', '.join(unknown)} matches nothing; known: {', '.join(PROJECTIONS)}")
        if self.rank < 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"lora.rank = {self.rank} must not be negative and lora.dropout = {self.dropout} must be in [0, 1)")

    def init(self, key: jax.Array, base: Any) -> Any:
        """The trained parameters before the first update, float32: with them the policy is exactly the base.

        A is uniform in +-1/sqrt(inputs) (as PEFT draws it), B zero.
        """
        if not self.rank:
            return jax.tree.map(lambda x: jnp.array(x, jnp.float32), base)
        adapters = {}
        for number, name in enumerate(self.targets or PROJECTIONS):
            layers, inputs, outputs = base["blocks"][name]["kernel"].shape
            bound = 1 / math.sqrt(inputs)
            a = jax.random.uniform(jax.random.fold_in(key, number), (layers, inputs, self.rank), jnp.float32, -bound, bound)
            adapters[name] = {"lora_a": a, "lora_b": jnp.zeros((layers, self.rank, outputs), jnp.float32)}
        return {"blocks": adapters}

    def join(self, base: Any, trained: Any) -> Any:
        """The policy's parameters: what `Policy` takes."""
        if not self.rank:
            return trained
        blocks = dict(base["blocks"])
        for name, adapter in trained["blocks"].items():
            blocks[name] = base["blocks"][name] | {"lora_a": adapter["lora_a"], "lora_b": adapter["lora_b"] * (self.alpha / self.rank)}
        return base | {"blocks": blocks}

    def merge(self, base: Any, trained: Any) -> Any:
        """The same policy without adapters: W + (alpha / rank) A B, in the base's dtype."""
        if not self.rank:
            return jax.tree.map(lambda x, like: x.astype(like.dtype), trained, base)
        blocks = dict(base["blocks"])
        for name, adapter in trained["blocks"].items():
            kernel = base["blocks"][name]["kernel"]
            change = (adapter["lora_a"] @ adapter["lora_b"]) * (self.alpha / self.rank)
            blocks[name] = base["blocks"][name] | {"kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}
        return base | {"blocks": blocks}
