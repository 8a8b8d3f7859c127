"""Countdown: reach the target with the given numbers, each used once. "4 7 1=24" -> "(7-1)*4"; any right expression counts.

The demonstrations write their solution in any of several orders, which a model that fills in many tokens at once mixes up: RL makes it
choose one.
"""

from configs import default

TINY = {
    "model.vocab_size": 21,
    "task.train_size": 50_000,
    "task.prompt_length": 8,
    "task.response_length": 8,
    "sft.steps": 3000,
    "sft.checkpoint_every": 1000,
    "sampler.lanes": 128,
    "rl.steps": 60,
    "rl.prompts": 32,
    "rl.microbatch": 256,
    "rl.eval_every": 20,
    "rl.checkpoint_every": 20,
    "rl.nfe_penalty": 0.7,
}
SMALL = TINY | {"sft.steps": 5000}
SUITE = TINY | default.SUITE | {"rl.calls": 120_000, "sampler.threshold": 0.5, "rl.eval_every": 8}
PRESETS = {"tiny": TINY, "small": SMALL, "suite": SUITE, "debug": TINY | default.DEBUG}
PRESETS |= default.published({"task.name": "countdown_cd3", "rl.inner_steps": 8})


def get_config(preset: str = "tiny"):
    """The configuration of a preset: tiny, small, suite, debug; or llada_8b, dream_7b (with _d1, _wd1) on the published problems."""
    return default.preset_config("countdown", PRESETS, preset)
