"""4x4 sudoku with few clues: any of the many grids that keep them is right.

A model that fills in many cells at once mixes the grids up; RL makes it choose one. Rollouts are drawn at a low temperature: at 1, the
quickest way to more reward is to sharpen every distribution, which does not help a model that is evaluated at temperature 0.
"""

from configs import default

TINY = {
    "model.vocab_size": 8,
    "task.prompt_length": 16,
    "task.response_length": 16,
    "sampler.temperature": 0.3,
    "threshold_network.gamma_min": 0.02,
    "threshold_network.gamma_init": 0.8,
    "sft.steps": 2000,
    "rl.steps": 80,
    "rl.prompts": 32,
    "rl.microbatch": 128,
    "rl.learning_rate": 6e-5,
    "rl.kl_weight": 0.01,
    "rl.nfe_penalty": 1.3,
    "rl.eval_every": 20,
    "rl.checkpoint_every": 20,
}
SMALL = TINY | {"sft.steps": 2500, "rl.steps": 160, "rl.eval_every": 40, "rl.checkpoint_every": 40}
PRESETS = {"tiny": TINY, "small": SMALL, "debug": TINY | default.DEBUG}


def get_config(preset: str = "tiny"):
    """The configuration of a preset: tiny, small or debug."""
    return default.preset_config("sudoku", PRESETS, preset)
