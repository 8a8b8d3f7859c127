"""The sampler and its trajectories written again in plain Python from `policy.logits`, to compare the package with; and tiny models."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffpo_jax.models.transformer import ModelConfig, Policy, Whole
from diffpo_jax.sampling.unmasking import TOP_K_RULES
from diffpo_jax.structs import Prompts, Trajectory

LOGITS, HIDDEN_AND_CACHE, HIDDEN_IN_VIEW = (
    jax.jit(method, static_argnums=0) for method in (Policy.logits, Policy.hidden_and_cache, Policy.hidden_in_view)
)
# rules that pick positions before tokens
POSITION_FIRST = ("top_probability", "margin", "entropy", "random", "threshold", "entropy_bounded")


@dataclasses.dataclass(frozen=True)
class Parts(Whole):
    """Dimensions split as over several devices, all on one: (logical name, parts), ..."""

    parts: tuple[tuple[str, int], ...]

    def splits(self, name):
        return dict(self.parts).get(name, 1)


def tiny_policy(vocab=4, width=8, sharpness=20.0, seed=0, **sizes):
    """(policy, params) whose distributions are far from uniform and depend on the context; MASK is the last of `vocab` tokens."""
    sizes = {"layers": 1, "heads": 2, "kv_heads": 2, "mlp_width": 2 * width, "dtype": "float32"} | sizes
    policy = Policy(ModelConfig(vocab_size=vocab, mask_id=vocab - 1, width=width, **sizes))
    return policy, sharpen(policy.init(jax.random.key(seed)), sharpness)


def sharpen(params, factor):
    """Kernels times `factor`."""
    return jax.tree.map_with_path(lambda path, x: x * factor if path[-1].key == "kernel" else x, params)


def make_prompts(rows, length, vocab, *, padding=(0,), seed=1):
    """Random left-padded prompts; row i has padding[i % len(padding)] padding tokens."""
    tokens = np.random.default_rng(seed).integers(0, vocab - 1, (rows, length)).astype(np.int32)
    pads = np.array([padding[i % len(padding)] for i in range(rows)])
    return Prompts(jnp.asarray(tokens), jnp.asarray(np.arange(length) >= pads[:, None]))


def repeat_prompt(prompts, rows):
    return jax.tree.map(lambda x: jnp.repeat(x[:1], rows, axis=0), prompts)


def log_softmax(logits, temperature=1.0):
    logits = np.asarray(logits, np.float64) / temperature
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def entropy_of(log_probs):
    return -(np.exp(log_probs) * log_probs).sum(-1)


def choose(rule, log_probs, masked, amount, *, tokens=None, noise=None):
    """Positions (a set) that a rule picks among the list `masked`: log_probs [L, V] at temperature 1, amount a count or a threshold."""
    probs = np.exp(log_probs)
    top = -np.sort(-probs, axis=-1)
    score = {
        "low_confidence": lambda k: probs[k, tokens[k]],
        "top_probability": lambda k: top[k, 0],
        "threshold": lambda k: top[k, 0],
        "margin": lambda k: top[k, 0] - top[k, 1],
        "entropy": lambda k: -entropy_of(log_probs[k]),
        "entropy_bounded": lambda k: -entropy_of(log_probs[k]),
        "random": lambda k: noise[k],
    }[rule]
    best_first = sorted(masked, key=lambda k: (-score(k), k))
    if rule == "threshold":
        return set(best_first[:1]) | {k for k in masked if top[k, 0] >= amount}
    if rule == "entropy_bounded":
        entropies = [-score(k) for k in best_first]
        return set(best_first[: max(n for n in range(1, len(masked) + 1) if n == 1 or sum(entropies[: n - 1]) <= amount)])
    return set(best_first[: max(int(amount), 1)])


def schedule(step, block_length, steps_per_block):
    """LLaDA's get_num_transfer_tokens for one block."""
    amounts = [block_length // steps_per_block] * steps_per_block
    for i in range(block_length % steps_per_block):
        amounts[i] += 1
    return amounts[step]


def view_of(tokens, mask_id, eos_id, block_length):
    """Masked positions of the active block, a list; empty where the row is finished."""
    before_eos = list(tokens).index(eos_id) if eos_id is not None and eos_id in tokens else len(tokens)
    masked = [k for k, token in enumerate(tokens) if token == mask_id]
    if not [k for k in masked if k < before_eos]:
        return []
    return [k for k in masked if k // block_length == masked[0] // block_length]


@dataclasses.dataclass(frozen=True)
class Path:
    """One trajectory of an enumeration."""

    tokens: tuple
    sigma: tuple
    log_prob: tuple  # a position
    choices: float  # probability of the positions chosen
    nfe: int

    @property
    def probability(self):
        return self.choices * math.exp(sum(self.log_prob))


def enumerate_paths(
    policy, params, prompts, *, length, rule, threshold=0.0, block_length=0, steps=0, temperature=1.0, eos_id=None,
    cuts=None, token_params=None,
):  # fmt: skip
    """All trajectories of the first row of `prompts`, as the rule's stochastic process.

    With `cuts`, a set of steps that holds 0, tokens are drawn at the latent of the last cut at or before the step, from `token_params`,
    which is the process that a surrogate is the likelihood of; positions are still picked from `params` at the current latent.
    """
    mask_id, block_length, steps = policy.config.mask_id, block_length or length, steps or length
    every = list(itertools.product(range(policy.config.vocab_size), repeat=length))

    def table(p):
        rows = repeat_prompt(prompts, len(every))
        attend = jnp.concatenate([rows.mask, jnp.ones((len(every), length), bool)], axis=1)
        logits = LOGITS(policy, p, jnp.concatenate([rows.tokens, jnp.asarray(every, jnp.int32)], axis=1), attend)[:, -length:]
        return dict(zip(every, np.asarray(logits), strict=True))

    positions_table = table(params)
    tokens_table = positions_table if token_params is None else table(token_params)
    paths = []

    def walk(z, sigma, log_prob, choices, history, step_in_block):
        step, view = len(history), view_of(z, mask_id, eos_id, block_length)
        if not view:
            filled = [t == mask_id for t in z]
            tokens = tuple(eos_id if f else t for f, t in zip(filled, z, strict=True))
            sigma = tuple(step - 1 if f else s for f, s in zip(filled, sigma, strict=True))
            paths.append(Path(tokens, sigma, log_prob, choices, step))
            return
        history = [*history, z]
        at = step if cuts is None else max(cut for cut in cuts if cut <= step)
        drawn_from = log_softmax(tokens_table[history[at]], temperature)
        blocks = length // block_length
        amount = threshold if rule in ("threshold", "entropy_bounded") else schedule(step_in_block, block_length, steps // blocks)
        if rule == "random":
            sets = list(itertools.combinations(view, min(amount, len(view))))
        else:
            sets = [sorted(choose(rule, log_softmax(positions_table[z]), view, amount))]
        for chosen in sets:
            for values in itertools.product([v for v in range(policy.config.vocab_size) if v != mask_id], repeat=len(chosen)):
                new = dict(zip(chosen, values, strict=True))
                walk(
                    tuple(new.get(k, t) for k, t in enumerate(z)),
                    tuple(step if k in new else s for k, s in enumerate(sigma)),
                    tuple(float(drawn_from[k, new[k]]) if k in new else p for k, p in enumerate(log_prob)),
                    choices / len(sets),
                    history,
                    0 if len(chosen) == len(view) else step_in_block + 1,
                )

    walk((mask_id,) * length, (0,) * length, (0.0,) * length, 1.0, [], 0)
    return paths


def keys_of(key, row_id, step, length):
    """The keys of a row at a step: of tokens [L], of noise [L], and of the threshold."""
    key_positions, key_threshold = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, row_id), step))
    each = [jax.random.split(jax.random.fold_in(key_positions, position)) for position in range(length)]
    return [pair[0] for pair in each], [pair[1] for pair in each], key_threshold


def python_denoise(
    model, key, *, length, rule, threshold=0.5, block_length=0, steps=0, temperature=1.0, eos_id=None, row_ids=None, cache="none", refresh=0
):  # fmt: skip
    """The loop of section 2 a row at a time; the same keys, the rules written again.

    With a cache a row's logits are those of `Policy.hidden_in_view`, but at the calls over the whole row. Returns tokens, unmasking steps,
    log-probabilities, entropies [N, L], calls and calls over the whole row [N].
    """
    policy, params, prompts = model
    block_length, steps, mask_id = block_length or length, steps or length, policy.config.mask_id
    rows = prompts.tokens.shape[0]
    attend, caches = jnp.concatenate([prompts.mask, jnp.ones((rows, length), bool)], axis=1), {}
    tokens, sigma = np.full((rows, length), mask_id), np.zeros((rows, length), int)
    log_prob, entropy = np.zeros((rows, length)), np.zeros((rows, length))
    nfe, step_in_block, whole_calls = np.zeros(rows, int), np.zeros(rows, int), np.zeros(rows, int)
    while any(view_of(row.tolist(), mask_id, eos_id, block_length) for row in tokens):
        seen = jnp.concatenate([prompts.tokens, jnp.asarray(tokens, jnp.int32)], axis=1)
        logits = np.array(LOGITS(policy, params, seen, attend))[:, -length:]
        for i in range(rows):
            view = view_of(tokens[i].tolist(), mask_id, eos_id, block_length)
            if not view:
                continue
            keys_token, keys_noise, _ = keys_of(key, i if row_ids is None else row_ids[i], int(nfe[i]), length)
            gumbel = np.stack([jax.random.gumbel(k, (policy.config.vocab_size,)) for k in keys_token])
            noise = np.array([float(jax.random.uniform(k)) for k in keys_noise])
            one, start = slice(i, i + 1), attend.shape[1] - length + view[0] // block_length * block_length
            if cache == "none" or step_in_block[i] % (refresh or length) == 0:
                whole_calls[i] += 1
                caches[i] = HIDDEN_AND_CACHE(policy, params, seen[one], attend[one])[1]
            else:
                position = jnp.arange(attend.shape[1])[None]
                renewed = (position >= start) & ((position < start + block_length) | (cache == "prefix"))
                inside = position[renewed][None]
                hidden = HIDDEN_IN_VIEW(policy, params, seen[one], attend[one], inside, renewed, caches[i])
                logits[i, np.asarray(inside[0]) - (attend.shape[1] - length)] = policy.head(params, hidden)[0]
            at_one = log_softmax(logits[i])
            drawn_from = log_softmax(logits[i], temperature) if temperature else at_one
            drawn = np.argmax(drawn_from + gumbel if temperature else at_one, axis=-1)
            amount = threshold if rule not in TOP_K_RULES else schedule(step_in_block[i], block_length, steps * block_length // length)
            chosen = sorted(choose(rule, at_one, view, amount, tokens=drawn, noise=noise))
            tokens[i, chosen], sigma[i, chosen] = drawn[chosen], nfe[i]
            log_prob[i, chosen] = drawn_from[chosen, drawn[chosen]] if temperature else 0.0
            entropy[i, chosen] = entropy_of(at_one[chosen])
            step_in_block[i] = 0 if len(chosen) == len(view) else step_in_block[i] + 1
            nfe[i] += 1
    left = tokens == mask_id
    tokens, sigma = np.where(left, mask_id if eos_id is None else eos_id, tokens), np.where(left, nfe[:, None] - 1, sigma)
    return tokens, sigma, log_prob, entropy, nfe, whole_calls


def as_trajectory(paths, prompts):
    """The package's struct of enumerated paths, a row each."""
    log_prob = jnp.asarray([path.log_prob for path in paths], jnp.float32)
    return Trajectory(
        prompts=repeat_prompt(prompts, len(paths)),
        tokens=jnp.asarray([path.tokens for path in paths], jnp.int32),
        unmask_step=jnp.asarray([path.sigma for path in paths], jnp.int32),
        log_prob=log_prob,
        entropy=jnp.zeros_like(log_prob),
        nfe=jnp.asarray([path.nfe for path in paths], jnp.int32),
    )
