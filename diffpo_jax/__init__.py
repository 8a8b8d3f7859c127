"""diffpo_jax: RL of masked diffusion language models, jointly with the sampler's inference thresholds (DiFFPO, arXiv 2510.02212)."""

from diffpo_jax.algorithms import ALGORITHMS, set_algorithm
from diffpo_jax.likelihood import all_cuts, draw_cuts, surrogate_log_probs
from diffpo_jax.models.pretrained import load_pretrained, save_pretrained
from diffpo_jax.models.transformer import Policy, init_policy
from diffpo_jax.modes import evaluate, export, load, sample, train_sft
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.serve import serve
from diffpo_jax.structs import Prompts, Trajectory
from diffpo_jax.tasks import TASKS
from diffpo_jax.train import train

__all__ = [
    "ALGORITHMS",
    "TASKS",
    "Policy",
    "Prompts",
    "Trajectory",
    "all_cuts",
    "denoise",
    "draw_cuts",
    "evaluate",
    "export",
    "init_policy",
    "load",
    "load_pretrained",
    "sample",
    "save_pretrained",
    "serve",
    "set_algorithm",
    "surrogate_log_probs",
    "train",
    "train_sft",
]
