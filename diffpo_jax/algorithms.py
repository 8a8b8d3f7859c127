"""The algorithms by name: each a set of fields of the configuration. The sampler is another matter: `rl.mode` and `sampler` go with all.

What a paper's name does not fix (rates, clips, group sizes) stays as the configuration has it, so that algorithms differ by what is named.
"""

from collections.abc import Collection
from typing import Any

_CUTS = {"likelihood.estimator": "cuts", "likelihood.window": 0, "likelihood.prompt_masking": 0.0, "rl.objective": "clipped"}
_NO_WEIGHTS, _WEIGHTS = {"rl.importance_weights": "none"}, {"rl.importance_weights": "truncated"}
_NO_KL = {"rl.kl_weight": 0.0}


def _cuts(m: int) -> dict[str, Any]:
    return _CUTS | {"likelihood.num_latents": m}


def _masks(estimator: str, m: int) -> dict[str, Any]:
    return _cuts(m) | {"likelihood.estimator": estimator}


ALGORITHMS: dict[str, dict[str, Any]] = {
    # mean-field with random prompt masks (diffu-GRPO, arXiv 2504.12216)
    "d1": _cuts(1) | _NO_WEIGHTS | {"likelihood.prompt_masking": 0.15},
    "d1_is": _cuts(1) | _WEIGHTS | {"likelihood.prompt_masking": 0.15},
    # m-times mean-field (DiFFPO, arXiv 2510.02212)
    "mf2": _cuts(2) | _NO_WEIGHTS,
    "diffpo": _cuts(2) | _WEIGHTS,
    "diffpo_m4": _cuts(4) | _WEIGHTS,
    # near cuts only: less stale latents, more variance
    "window": _cuts(2) | _WEIGHTS | {"likelihood.window": 2},
    # exact conditionals of sampled steps (arXiv 2510.04019)
    "agrpo": _cuts(4) | _NO_WEIGHTS | {"likelihood.window": 1},
    # likelihoods weighted by w+ - w-, without ratio, clip, KL (arXiv 2507.08838)
    "wd1": _cuts(1) | _NO_WEIGHTS | _NO_KL | {"likelihood.prompt_masking": 0.15, "rl.objective": "log_likelihood", "rl.advantage": "wd1"},
    # a random share of the response masked (MMaDA, arXiv 2505.15809)
    "unigrpo": _masks("elbo", 1) | _NO_WEIGHTS,
    # complementary masks (DiffuCoder, arXiv 2506.20639)
    "coupled_grpo": _masks("coupled", 2) | _NO_WEIGHTS,
    # lower and upper bounds by the advantage's sign (arXiv 2510.09541)
    "spg": _masks("elbo", 2) | _NO_WEIGHTS | _NO_KL | {"rl.objective": "sandwiched"},
    # one ratio of ELBOs a row, k2 (arXiv 2512.03759)
    "espo": _masks("coupled", 2) | _NO_WEIGHTS | {"rl.objective": "sequence", "rl.kl_estimator": "k2"},
}


def set_algorithm(config: Any, name: str, keep: Collection[str] = ()) -> Any:
    """`config` with `config.algorithm` = name and that algorithm's fields, but for those to `keep` ("rl.kl_weight").

    Raises:
      ValueError: an unknown name; the known ones are listed.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm = {name!r} is unknown; known: {', '.join(ALGORITHMS)}")
    config.algorithm = name
    config.update_from_flattened_dict({field: value for field, value in ALGORITHMS[name].items() if field not in keep})
    return config


def describe(config: Any) -> str:
    """The effective fields of `config.algorithm`, a line each; what differs from the algorithm's own is said."""
    lines = [f"algorithm {config.algorithm}:"]
    for field, own in ALGORITHMS[config.algorithm].items():
        section, name = field.split(".")
        value = config[section][name]
        lines.append(f"  {field} = {value!r}" + ("" if value == own else f"  ({config.algorithm} itself: {own!r})"))
    return "\n".join(lines)
