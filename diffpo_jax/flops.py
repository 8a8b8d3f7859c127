"""The fewest FLOPs that the programs of a training step need, worked out by hand: what is executed is compared with them."""

import dataclasses
import math

import jax

from diffpo_jax.build import Parts
from diffpo_jax.models.transformer import ModelConfig


@dataclasses.dataclass(frozen=True)
class Least:
    """FLOPs, 2 a multiply-add, of products of matrices: the trunk over every position, the head where it is read, nothing twice."""

    rows: int
    prompt: int
    response: int
    block: int  # response positions the head reads at a call
    cuts: int  # latents of a row that a likelihood passes through the trunk
    updates: int
    reference: int  # passes of the reference an update: 1, or 0 without KL
    old: int  # of the old policy, 0 where it is the policy itself
    model: ModelConfig
    adapters: int  # parameters of a block's adapters; 0: all of the model is trained
    reads: int = 1  # latents at which a likelihood reads a position with the head

    @staticmethod
    def of(parts: Parts) -> "Least":
        config, model = parts.config, parts.policy.config
        length = config.task.response_length
        adapters = 0
        if parts.trainable.rank:
            trained = jax.eval_shape(lambda key: parts.trainable.init(key, parts.policy.init(key)), jax.random.key(0))
            adapters = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(trained["blocks"]))
        return Least(
            config.rl.prompts * config.rl.group_size, config.task.prompt_length, length, config.sampler.block_length or length,
            config.likelihood.num_latents, config.rl.inner_steps, bool(config.rl.kl_weight), config.rl.inner_steps > 1, model,
            adapters, 1 if config.likelihood.estimator == "cuts" else config.likelihood.num_latents,
        )  # fmt: skip

    def _block_parameters(self) -> int:
        m = self.model
        kv_width = m.kv_heads * m.width // m.heads
        return 2 * m.width * m.width + 2 * m.width * kv_width + 3 * m.width * m.mlp_width

    def _trunk(
        self, passes: float, kernels: float = 2.0, adapters: float = 2.0, attention: float = 4.0, in_view: int | None = None
    ) -> float:  # fmt: skip
        """FLOPs of so many row passes at so many FLOPs a kernel parameter, adapter parameter and pair of positions x width, each token.

        With keys and values kept from another pass only the positions in view are computed.
        """
        positions, m = self.prompt + self.response, self.model
        token = kernels * self._block_parameters() + adapters * self.adapters + attention * positions * m.width
        return passes * (positions if in_view is None else in_view) * m.layers * token

    def _head(self, positions: float, kernel: float = 2.0) -> float:
        return kernel * positions * self.model.width * self.model.vocab_size

    def rollout(self, nfe: int, whole_calls: int | None = None) -> float:
        """A forward pass a call of every row: over the whole of it, or, after so many of these, over the block alone (dual cache)."""
        whole = nfe if whole_calls is None else whole_calls
        in_block = (nfe - whole) * self._trunk(self.rows, in_view=self.block)
        return whole * self._trunk(self.rows) + in_block + nfe * self._head(self.rows * self.block)

    def score(self) -> float:
        """A forward pass a cut, with KL of the reference, which has no adapters, and with several updates of the old policy."""
        trunk = self._trunk(self.rows * self.cuts * self.old) + self._trunk(self.rows * self.cuts * self.reference, adapters=0.0)
        return self.updates * (trunk + self._head(self.rows * self.response * self.reads * (self.old + self.reference)))

    def update(self) -> float:
        """A forward pass a cut, and the gradient: with respect to what a kernel reads, and of the kernels that are trained."""
        kernel = 4.0 if self.adapters else 6.0
        return self._trunk(self.rows * self.cuts, kernel, 6.0, 12.0) + self._head(self.rows * self.response * self.reads, kernel)
