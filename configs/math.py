"""Arithmetic word problems, solved in written steps: "ann has 5 pens. buys 3 bags of 4. total?" -> "3*4=12 5+12=17 #### 17".

The demonstrations differ in the order of steps and operands and in how they link the steps, as people's do.
"""

from configs import default

TINY = {
    "model.vocab_size": 45,
    "task.prompt_length": 52,
    "task.response_length": 26,
    "math.largest_number": 5,
    "sft.steps": 2200,
    "sft.batch_size": 64,
    "sft.learning_rate": 3e-3,
    "sampler.lanes": 64,
    "rl.steps": 30,
    "rl.prompts": 32,
    "rl.microbatch": 128,
    "rl.eval_every": 10,
    "rl.checkpoint_every": 10,
    "rl.nfe_penalty": 1.5,
    "threshold_network.gamma_init": 2.0,
}
SMALL = TINY | {"sft.steps": 7000, "rl.steps": 60, "rl.eval_every": 20, "rl.checkpoint_every": 20}
SUITE = TINY | default.SUITE | {"rl.calls": 120_000, "sampler.threshold": 2.0, "rl.eval_every": 8}
PRESETS = {"tiny": TINY, "small": SMALL, "suite": SUITE, "debug": TINY | default.DEBUG}
PRESETS |= default.published({"task.name": "gsm8k"})


def get_config(preset: str = "tiny"):
    """The configuration of a preset: tiny, small, suite, debug; or llada_8b, dream_7b (with _d1, _wd1) on GSM8K."""
    return default.preset_config("math", PRESETS, preset)
