"""Any data set of the reasoning-gym package (`pip install -e ".[gym]"`), for a published model: --config.reasoning_gym.dataset=NAME.

The reward is the data set's own scorer; right is a score of exactly 1.
"""

from configs import default

PRESETS = default.published({"task.train_size": 20_000, "task.test_size": 500})


def get_config(preset: str = "llada_8b"):
    """The configuration of a preset: llada_8b, dream_7b (with _d1, _wd1), or published_debug."""
    return default.preset_config("reasoning_gym", PRESETS, preset)
