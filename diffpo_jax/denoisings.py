"""How responses were denoised, as plain records: what the report's viewer, --mode=serve and --mode=sample show.

A record is a dict of JSON values:
  prompt: its text; answer: the response's text
  tokens: [L] a printable string a position, see the tokenizers' `symbols`
  steps: [L] the denoising step at which the position was unmasked, 0 .. nfe - 1
  confidence: [L] probability of the token at temperature 1, given the prompt and what was unmasked before that step; None where EOS was
    filled in behind another
  entropy: [L] nats, of that distribution; None likewise
  nfe: denoiser calls; gamma: the threshold, None where the sampler's rule takes none
  reward, correct: scores of the task; None where the problem has no known answer

Evaluation draws greedily, where a trajectory's log-probabilities are all 0: confidences are computed anew, a forward pass a step.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffpo_jax import data, sharding
from diffpo_jax.build import Grades, Parts, grade
from diffpo_jax.evaluate import evaluated, sampler_choice
from diffpo_jax.likelihood import latents, read_hidden, token_log_probs
from diffpo_jax.models.transformer import Policy
from diffpo_jax.rollout import sample, sampler_options
from diffpo_jax.sampling.unmasking import THRESHOLD_RULES
from diffpo_jax.structs import Prompts, Reads, Trajectory

Record = dict[str, Any]


@functools.partial(jax.jit, static_argnames="policy")
def confidences(policy: Policy, params: Any, trajectory: Trajectory) -> jax.Array:
    """[N, L] float32, probability of each token at temperature 1 at the latent it was unmasked in.

    Exact for a sampler without a cache. One pass of the N rows after the other, as many as the slowest row had: unlike
    `likelihood.all_cuts`, with which all of them are in memory together.
    """

    def step(number, kept):
        z = latents(trajectory, jnp.full(trajectory.nfe.shape, number), policy.config.mask_id)
        hidden = read_hidden(policy, params, trajectory.prompts, Reads(z[:, None], None, None))[:, 0]
        return jnp.where((trajectory.unmask_step == number)[..., None], hidden, kept)

    z = jnp.full(trajectory.tokens.shape, policy.config.mask_id, jnp.int32)
    like = jax.eval_shape(functools.partial(read_hidden, policy), params, trajectory.prompts, Reads(z[:, None], None, None))
    start = jnp.zeros((*trajectory.tokens.shape, like.shape[-1]), like.dtype)
    hidden = jax.lax.fori_loop(0, jnp.max(trajectory.nfe), step, start)
    return jnp.exp(token_log_probs(policy, params, hidden, trajectory.tokens)[0])


def make_denoise(parts: Parts, rows: int) -> Callable[..., Trajectory]:
    """`run(params, prompts, key, threshold=gamma)` or `run(params, prompts, key, threshold_params=...)`: as evaluation denoises.

    Prompts are this host's of `rows` rows; the trajectory is on the devices. One program a way to choose thresholds.
    """
    options = sampler_options(parts) | {"temperature": parts.config.eval.temperature}

    def run(params: Any, prompts: Prompts, key: jax.Array, **choice: Any) -> Trajectory:
        prompts = sharding.put_rows(parts.mesh, prompts, rows)
        return sample(parts, params, prompts, key, **options, **sampler_choice(parts, **choice))

    return run


def denoise_test(parts: Parts, params: Any, count: int, **choice: Any) -> tuple[list[int], list[Record]]:
    """(indices, records) of the first `count` test problems after eval.skip, fewer where there are fewer.

    Where they fit into eval.batch_size they are rows of the first batch of an evaluation (see `evaluate.make_evaluate`), run by the same
    program with the same key: what is shown is what was evaluated. All hosts take part and get the same records.

    Args:
      parts: the run's.
      params: of the policy.
      count: of problems.
      choice: threshold=gamma, or threshold_params=those of the threshold network.

    Raises:
      ValueError: eval.skip leaves none.
    """
    shown, every = evaluated(parts, count), np.array(evaluated(parts))
    size = max(parts.config.eval.batch_size, whole_rows(parts, len(shown)))
    indices = np.resize(every, size)
    batch = data.tokenise(parts.sources["test"], indices[sharding.host_rows(parts.mesh, size)], parts.tokenizer, parts.config)
    key = jax.random.fold_in(parts.key("eval"), 0)
    trajectory = make_denoise(parts, size)(params, Prompts(batch["prompt"], batch["prompt_mask"]), key, **choice)
    rows = whole_rows(parts, len(shown))
    first = jax.tree.map(lambda x: x[:rows], sharding.fetch(trajectory))
    grades = grade(parts, "test", indices[:rows], first.tokens)
    records = to_records(parts, first, read_confidences(parts, params, first), grades, choice.get("threshold"))
    return list(shown), records[: len(shown)]


def whole_rows(parts: Parts, rows: int) -> int:
    """The fewest rows, at least `rows`, that both meshes can split."""
    unit = math.lcm(*(sharding.split(mesh, "rows") for mesh in (parts.mesh, parts.rollout_mesh)))
    return -(-rows // unit) * unit


def read_confidences(parts: Parts, params: Any, trajectory: Trajectory) -> np.ndarray:
    """`confidences` of a whole trajectory [N, ...] in numpy arrays, N as `whole_rows`; likewise, on every host."""
    mine = sharding.host_rows(parts.mesh, len(trajectory.tokens))
    trajectory = trajectory.replace(draw=None)  # which is not read
    placed = sharding.put_rows(parts.mesh, jax.tree.map(lambda x: x[mine], trajectory), len(trajectory.tokens))
    return sharding.fetch(confidences(parts.policy, params, placed))


def to_records(
    parts: Parts, trajectory: Trajectory, confidence: np.ndarray, grades: Grades | None = None, threshold: float | None = None
) -> list[Record]:
    """Rows of a trajectory as records.

    Args:
      parts: read are the tokenizer, sampler.rule and sampler.eos_early_stop.
      trajectory: N rows, numpy.
      confidence: [N, L], of `confidences`.
      grades: of the rows; None where no answer is known.
      threshold: of all rows, where the trajectory has no draw of the threshold network.
    """
    tokenizer, sampler, records = parts.tokenizer, parts.config.sampler, []
    for row, (tokens, steps) in enumerate(zip(trajectory.tokens, trajectory.unmask_step, strict=True)):
        entropy, nfe = trajectory.entropy[row], int(trajectory.nfe[row])
        eos = tokens == tokenizer.eos_id
        filled = eos & (np.cumsum(eos) > 1) & (steps == nfe - 1) & (entropy == 0) & bool(sampler.eos_early_stop)
        gamma = threshold if trajectory.draw is None else trajectory.draw.gamma[row]
        records.append({
            "prompt": tokenizer.decode(trajectory.prompts.tokens[row][trajectory.prompts.mask[row]]),
            "answer": tokenizer.decode(tokens),
            "tokens": tokenizer.symbols(tokens),
            "steps": steps.tolist(),
            "confidence": _numbers(confidence[row], filled),
            "entropy": _numbers(entropy, filled),
            "nfe": nfe,
            "gamma": None if gamma is None or sampler.rule not in THRESHOLD_RULES else _short(gamma),
            "reward": None if grades is None else _short(grades.reward[row]),
            "correct": None if grades is None else bool(grades.correct[row] == 1),
        })  # fmt: skip
    return records


def _numbers(values: np.ndarray, absent: Sequence[bool]) -> list[float | None]:
    return [None if gone or not math.isfinite(value) else _short(value) for value, gone in zip(values, absent, strict=True)]


def _short(value: float) -> float:
    """Four significant digits: enough to read, and a page of 256-token responses stays small."""
    return float(f"{float(value):.4g}")
