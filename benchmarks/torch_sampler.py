"""The denoiser and its sampler in plain PyTorch, as published dLLM code has them: what benchmarks/sampler.py compares with.

The network is that of diffpo_jax/models/transformer.py (LLaDA's), the loop that of LLaDA's `generate`: logits of every position at every
step, a softmax over the whole vocabulary, and top-k row by row. JAX is not imported.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [length, head_dim], each half twice."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [N, heads, S, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Block(nn.Module):
    """Pre-norm attention and SwiGLU MLP."""

    def __init__(self, width: int, heads: int, kv_heads: int, mlp_width: int, qkv_bias: bool, norm_eps: float):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        kv_width = kv_heads * self.head_dim
        self.attn_norm, self.mlp_norm = nn.RMSNorm(width, norm_eps), nn.RMSNorm(width, norm_eps)
        self.q_proj = nn.Linear(width, width, qkv_bias)
        self.k_proj, self.v_proj = nn.Linear(width, kv_width, qkv_bias), nn.Linear(width, kv_width, qkv_bias)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(width, mlp_width, bias=False), nn.Linear(width, mlp_width, bias=False)
        self.down_proj = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [N, S, D]; mask [N, 1, 1, S] bool, True at tokens to attend, None for all; cos, sin [S, head_dim]."""
        rows, length, width = x.shape
        h = self.attn_norm(x)
        query = self.q_proj(h).view(rows, length, self.heads, self.head_dim).transpose(1, 2)
        key, value = (
            projection(h).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2) for projection in (self.k_proj, self.v_proj)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if self.kv_heads != self.heads:
            key, value = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.attn_out(attended.transpose(1, 2).reshape(rows, length, width))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Network(nn.Module):
    """The denoiser: a bidirectional transformer with a head of its own."""

    def __init__(
        self, *, vocab_size: int, width: int, layers: int, heads: int, kv_heads: int, mlp_width: int, qkv_bias: bool = False,
        rope_theta: float = 10_000.0, norm_eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        self.head_dim, self.rope_theta = width // heads, rope_theta
        self.embed = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, mlp_width, qkv_bias, norm_eps) for _ in range(layers))
        self.final_norm = nn.RMSNorm(width, norm_eps)
        self.head_proj = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits [N, S, V] of tokens [N, S]; mask [N, S] bool, False at padding, None for none."""
        cos, sin = rope_tables(tokens.shape[1], self.head_dim, self.rope_theta)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, None if mask is None else mask[:, None, None], cos, sin)
        return self.head_proj(self.final_norm(x))


def state(params: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The state of `Network` from the parameters of `Policy.init`, flat: blocks/q_proj/kernel [layers, D, E] gives blocks.0.q_proj.weight
    [E, D] and so on."""
    leaves = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}

    def tensor(kind, value):
        return torch.from_numpy(np.array(value.T if kind == "kernel" else value, np.float32, order="C"))

    tensors = {}
    for path, value in params.items():
        *module, kind = path.split("/")
        if module[0] == "blocks":
            for layer, part in enumerate(value):
                tensors[".".join(["blocks", str(layer), *module[1:], leaves[kind]])] = tensor(kind, part)
        else:
            tensors[".".join([*module, leaves[kind]])] = tensor(kind, value)
    return tensors


def load(params: Mapping[str, np.ndarray], **sizes) -> Network:
    """A `Network` of these sizes with the parameters of `state`, which it takes as they are."""
    with torch.device("meta"):
        network = Network(**sizes)
    network.load_state_dict(state(params), assign=True)
    return network.eval()


def tokens_each_step(masked: torch.Tensor, steps: int) -> torch.Tensor:
    """[N, steps]: the masked positions of a block, masked [N, K], over its steps; one more in the first ones."""
    count = masked.sum(dim=1, keepdim=True)
    return count // steps + (torch.arange(steps) < count % steps)


@torch.inference_mode()
def generate(
    network: Network, prompt: torch.Tensor, prompt_mask: torch.Tensor, *, mask_id: int, length: int, block_length: int, steps: int
) -> torch.Tensor:  # fmt: skip
    """Greedy responses [N, L] by low-confidence remasking: LLaDA's `generate` at temperature 0, with MASK at probability 0.

    Args:
      network: the denoiser.
      prompt: [N, P] int64, left-padded.
      prompt_mask: [N, P] bool, True at real tokens.
      mask_id: id of MASK.
      length: response length L.
      block_length: semi-autoregressive block, a divisor of L.
      steps: denoiser calls, a multiple of the number of blocks.
    """
    rows, start = prompt.shape
    x = torch.full((rows, start + length), mask_id)
    x[:, :start] = prompt
    attend = None if prompt_mask.all() else torch.cat([prompt_mask, torch.ones(rows, length, dtype=torch.bool)], dim=1)
    num_blocks = length // block_length
    for block in range(num_blocks):
        end = start + (block + 1) * block_length
        amounts = tokens_each_step(x[:, end - block_length : end] == mask_id, steps // num_blocks)
        for step in range(steps // num_blocks):
            masked = x == mask_id
            logits = network(x, attend)
            logits[..., mask_id] = -torch.inf
            drawn = torch.argmax(logits, dim=-1)
            probs = F.softmax(logits, dim=-1)
            confidence = torch.gather(probs, dim=-1, index=drawn[..., None]).squeeze(-1)
            confidence[:, end:] = -torch.inf
            drawn = torch.where(masked, drawn, x)
            confidence = torch.where(masked, confidence, -torch.inf)
            chosen = torch.zeros_like(x, dtype=torch.bool)
            for row in range(rows):
                _, index = torch.topk(confidence[row], k=int(amounts[row, step]))
                chosen[row, index] = True
            x[chosen] = drawn[chosen]
    return x[:, start:]
