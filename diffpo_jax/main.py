"""The command line: python -m diffpo_jax.main --config=configs/math.py[:PRESET] [--workdir=DIR] [--mode=MODE] [--config.FIELD=VALUE ...]"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import diffpo_jax as dp
from diffpo_jax import algorithms, command_line, processes
from diffpo_jax.config import check_config

MODES: dict[str, Callable[..., Any]] = {
    "train": dp.train, "sft": dp.train_sft, "eval": dp.evaluate, "sample": dp.sample, "serve": dp.serve,
    "export": dp.export,
}  # fmt: skip
CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with a preset after a colon.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/NAME of the configuration's file and preset.")
MODE = flags.DEFINE_enum(
    "mode", "train", list(MODES),
    "train: base model, RL, report. sft: the base model alone. eval: the newest checkpoint over the grid of thresholds. "
    "sample: show how the newest checkpoint denoises. serve: the same on a local page, of problems that you type. "
    "export: write it as a published model.",
)  # fmt: skip


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    workdir = WORKDIR.value or os.path.join("runs", _name(config_flags.get_config_filename(flags.FLAGS["config"])))

    with command_line.errors_said("interrupted; the same command goes on from the last checkpoint"):
        config = command_line.read_config()
        check_config(config)
        with processes.together(config.distributed, command_line.exit_code), _quiet_unless_first():
            if config.algorithm:
                print(algorithms.describe(config))
            MODES[MODE.value](config, workdir)


def _quiet_unless_first() -> contextlib.AbstractContextManager:
    """Only the first of several processes prints; errors show on all."""
    return contextlib.nullcontext() if jax.process_index() == 0 else contextlib.redirect_stdout(open(os.devnull, "w"))


def _name(path: str) -> str:
    """'configs/math.py:small' -> 'math_small'; 'configs/math.py' -> 'math'."""
    file, _, preset = path.partition(":")
    return "_".join([os.path.splitext(os.path.basename(file))[0], *([preset] if preset else [])])


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parse)
