"""The command line: python -m diffpo_jax.main --config=configs/math.py[:PRESET] [--workdir=DIR] [--mode=MODE] [--config.FIELD=VALUE ...]"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

MODES = ("train", "sft", "eval", "sample")
CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with a preset after a colon.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/NAME of the configuration's file and preset.")
MODE = flags.DEFINE_enum(
    "mode", "train", MODES,
    "train: base model, RL, report. sft: the base model alone. eval: the newest checkpoint over the grid of thresholds. "
    "sample: show how the newest checkpoint denoises.",
)  # fmt: skip


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    workdir = WORKDIR.value or os.path.join("runs", _name(config_flags.get_config_filename(flags.FLAGS["config"])))

    import jax  # here, so that --help does not wait for it

    cache = os.path.join(os.path.dirname(os.path.abspath(workdir)), ".jax_cache")
    if not jax.config.jax_compilation_cache_dir:  # the environment's choice comes first
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    import diffpo_jax as dp

    modes = {"train": dp.train, "sft": dp.train_sft, "eval": dp.evaluate, "sample": dp.sample}
    try:
        modes[MODE.value](CONFIG.value, workdir)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if os.environ.get("DIFFPO_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(DIFFPO_TRACEBACK=1 shows where)")


def _name(path: str) -> str:
    """'configs/math.py:small' -> 'math_small'; 'configs/math.py' -> 'math'."""
    file, _, preset = path.partition(":")
    return "_".join([os.path.splitext(os.path.basename(file))[0], *([preset] if preset else [])])


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
