"""What the commands share: flags, and what is said of wrong ones."""

import argparse
import runpy
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from diffpo_jax import algorithms


def parse(argv: list[str]) -> list[str]:
    """absl's parser; what is wrong with a flag is said in a line, without the traceback of the libraries."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, OSError) as error:  # a configuration file's own error arrives as a traceback, its last line says what it is
        problem = str(error).strip().splitlines()[-1].strip()
    except (AttributeError, KeyError, TypeError) as error:
        problem = _unknown_fields(argv) or repr(error)
    sys.exit(f"error: {problem}\n(--helpshort lists the flags, configs/default.py the fields)")


def read_config() -> Any:
    """The configuration of --config; the fields of its algorithm are set, but for those given beside it.

    Raises:
      ValueError: an unknown algorithm.
    """
    config, given = flags.FLAGS.config, config_flags.get_override_values(flags.FLAGS["config"])
    return algorithms.set_algorithm(config, config.algorithm, given) if config.algorithm else config


def _unknown_fields(argv: list[str]) -> str:
    """Names the first --config.FIELD that the configuration file does not have, and what it does have there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    file, *preset = parser.parse_known_args(argv[1:])[0].config.split(":", 1)
    config = runpy.run_path(file)["get_config"](*preset)
    for name in (argument.partition("=")[0] for argument in argv if argument.startswith("--config.")):
        section = config
        for part in name.split(".")[1:]:
            known = list(section) if hasattr(section, "keys") else []  # nothing, below a field
            if part not in known:
                return f"there is no field {name[2:]}; where {part!r} stands are known: {', '.join(known)}"
            section = section[part]
    return ""
