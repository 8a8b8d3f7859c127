"""What the commands share: flags, and what is said of errors. Exit codes: 0 done, 1 something went wrong, 2 an input is wrong."""

import argparse
import contextlib
import functools
import os
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from diffpo_jax import algorithms, checkpoint, storage

# What the library raises of a wrong value, path or file, of a workdir in use, of what is asked for and not implemented.
BAD_INPUT = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError, NotImplementedError,
    checkpoint.InUseError, storage.DamagedError,
)  # fmt: skip
OTHER = (OSError, RuntimeError, ImportError, MemoryError, OverflowError)  # a full disk, a lost process, training that diverged


@contextlib.contextmanager
def errors_said(interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the program where something goes wrong inside: its message on standard error, `exit_code` as exit code; by SIGINT after Ctrl-C.

    With DIFFPO_TRACEBACK=1 in the environment errors are raised as they are.
    """
    sys.unraisablehook = functools.partial(_unraisable, interrupted)
    try:
        yield
    except (*BAD_INPUT, *OTHER) as error:
        if os.environ.get("DIFFPO_TRACEBACK"):
            raise
        code = exit_code(error)
        if isinstance(error, storage.FullDiskError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(code)  # at once: the threads of a save that failed would print their stacks
        stop(str(error) or type(error).__name__, code, hint="" if code == 2 else "DIFFPO_TRACEBACK=1 shows where")
    except KeyboardInterrupt:
        _end_interrupted(interrupted)


def _end_interrupted(message: str) -> None:
    print(message, file=sys.stderr)
    _die_of_interrupt()


def _die_of_interrupt() -> None:
    """So that a shell's loop ends, too; at once, without what libraries say of a save cut short."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _unraisable(interrupted: str, unraisable: Any) -> None:
    """Python's own way with errors that nobody can catch, but for a Ctrl-C, as during a garbage collection, which ends the program as
    any other does, and for what orbax leaves of reads under way when one of them has failed."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _end_interrupted(interrupted)
    elif "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def exit_code(error: BaseException) -> int:
    """2 where an input was wrong, 1 for any other error."""
    return 2 if isinstance(error, BAD_INPUT) else 1


def stop(message: str, code: int = 2, hint: str = "") -> NoReturn:
    """Ends the program with a message on standard error."""
    print(f"error: {message}", *([f"({hint})"] if hint else []), sep="\n", file=sys.stderr)
    sys.exit(code)


def parse(argv: list[str]) -> list[str]:
    """absl's parser; what is wrong with a flag, or in the configuration's file, is said in a line and ends the program."""
    file, rest = _config_file(argv)[0], argv[:1]
    try:
        if file and not os.path.isfile(file):
            problem = f"--config={file}: there is no such file"
        elif not (file or flags.FLAGS["config"].default) and any(argument.startswith("--config.") for argument in argv):
            problem = "--config must have a value: fields are those of its file"
        else:
            with checkpoint.quietly():
                rest = flags.FLAGS(argv)
            problem = f"unknown arguments: {' '.join(rest[1:])}" if len(rest) > 1 else ""
    except (flags.Error, OSError) as error:  # the file's own error arrives as a traceback
        problem = _last_line(str(error), file)
        if missing := re.fullmatch(r"flag --(\w+)=None: Flag .* must have a value other than None\.", problem):
            nothing = missing[1] == "config" and file
            problem = f"{file}: get_config returns nothing" if nothing else f"--{missing[1]} must have a value"
    except Exception as error:  # of a flag of a field that is not there; or of the file, which may raise anything
        problem = _unknown_field(argv) or _last_line("".join(traceback.format_exception(error)), file)
    if problem:
        stop(problem, hint="--helpshort lists the flags, configs/default.py the fields")
    return rest


def read_config() -> Any:
    """The configuration of --config; the fields of its algorithm are set, but for those given beside it.

    Raises:
      ValueError: an unknown algorithm.
    """
    config, given = flags.FLAGS.config, config_flags.get_override_values(flags.FLAGS["config"])
    return algorithms.set_algorithm(config, config.algorithm, given) if config.algorithm else config


def _config_file(argv: list[str]) -> tuple[str, list[str]]:
    """(the file of --config, the presets given after a colon); "" where the flag is missing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-config", default="")
    file, *preset = parser.parse_known_args(argv[1:])[0].config.split(":", 1)
    return file, preset


def _last_line(text: str, file: str) -> str:
    """The last line of an error's text; of a traceback with the line of the configuration's file that raised it."""
    last = text.strip().splitlines()[-1].strip()
    said = last.removeprefix("ValueError: ")
    if not file or "Traceback" not in text or said.startswith(file):
        return said
    lines = re.findall(rf'File "[^"]*{re.escape(os.path.basename(file))}", line (\d+)', text)
    return f"{file}, line {lines[-1]}: {last}" if lines else f"{file}: {last}"


def _unknown_field(argv: list[str]) -> str:
    """Names the first --config.FIELD that the configuration file does not have, and what it does have there; "" for none."""
    file, preset = _config_file(argv)
    try:
        config = runpy.run_path(file)["get_config"](*preset)
    except Exception:  # the file is what is wrong
        return ""
    for name in (argument.partition("=")[0] for argument in argv if argument.startswith("--config.")):
        section, place = config, "config"
        for part in name.split(".")[1:]:
            if not hasattr(section, "keys"):
                return f"there is no field {name[2:]}: {place} has a value, and no fields below it"
            if part not in section:
                return f"there is no field {name[2:]}; where {part!r} stands are known: {', '.join(section)}"
            section, place = section[part], f"{place}.{part}"
    return ""
