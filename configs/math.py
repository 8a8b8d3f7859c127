"""math."""

from configs import default

LENGTHS = {"task.prompt_length": 52, "task.response_length": 26}
TINY = LENGTHS
SMALL = LENGTHS | {"sft.steps": 2500, "task.test_size": 1024, "sft.checkpoint_every": 2500}
PRESETS = {"tiny": TINY, "small": SMALL, "debug": LENGTHS | default.DEBUG}


def get_config(preset: str = "tiny"):
    """The configuration of a preset: tiny, small or debug."""
    return default.preset_config("math", PRESETS, preset)
