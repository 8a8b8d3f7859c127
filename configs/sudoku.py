"""4x4 sudoku with one or two clues: any of the many grids that keep them is right.

A model that fills in many cells at once mixes the grids up; RL makes it choose one. The first updates sharpen every distribution, which
does not help by itself; cells come to agree only after that, so that this task needs more updates, and larger ones, than the others.
"""

from configs import default

TINY = {
    "model.vocab_size": 8,
    "task.prompt_length": 16,
    "task.response_length": 16,
    "sudoku.clues_max": 2,
    "threshold_network.gamma_min": 0.02,
    "threshold_network.gamma_init": 1.0,
    "sft.steps": 2000,
    "sampler.lanes": 64,
    "rl.steps": 80,
    "rl.prompts": 32,
    "rl.microbatch": 128,
    "rl.schedule": "cosine",
    "rl.nfe_penalty": 1.5,
    "rl.eval_every": 20,
    "rl.checkpoint_every": 20,
}
SMALL = TINY | {"sft.steps": 2500, "rl.prompts": 64, "rl.steps": 400, "rl.eval_every": 40, "rl.checkpoint_every": 40}
SUITE = TINY | default.SUITE | {
    "sudoku.clues_max": 4,
    "sampler.threshold": 1.0,
    "eval.thresholds": (0.001, 0.01, *default.SUITE["eval.thresholds"]),  # a model that RL has sharpened needs less to take its time
    "rl.calls": 480_000,
    "rl.schedule": "constant",
    "rl.eval_every": 8,
}
PRESETS = {"tiny": TINY, "small": SMALL, "suite": SUITE, "debug": TINY | default.DEBUG}
PRESETS |= default.published({"task.name": "sudoku_4x4", "rl.inner_steps": 8})


def get_config(preset: str = "tiny"):
    """The configuration of a preset: tiny, small, suite, debug; or llada_8b, dream_7b (with _d1, _wd1) on the published puzzles."""
    return default.preset_config("sudoku", PRESETS, preset)
