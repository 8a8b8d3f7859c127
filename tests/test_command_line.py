"""Exit codes and messages of errors; what the commands say of wrong inputs is in test_wrong_inputs.py."""

import errno
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from diffpo_jax import checkpoint, command_line
from diffpo_jax.train import NonFiniteError

BAD_INPUT = (
    ValueError("no such field"), FileNotFoundError("no such file"), NotADirectoryError("a file"), PermissionError("not yours"),
    FileExistsError("there already"), UnicodeDecodeError("utf-8", b"x", 0, 1, "no text"), checkpoint.InUseError("in use"),
    NotImplementedError("no likelihoods"),
)  # fmt: skip
OTHER = (
    NonFiniteError("diverged"), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a process is lost"),
    ImportError("no gcsfs"), MemoryError("too large"),
)  # fmt: skip


@pytest.mark.parametrize("error", [*BAD_INPUT, *OTHER], ids=lambda error: type(error).__name__)
def test_errors_end_with_a_message_and_a_code(error, capsys, monkeypatch):
    monkeypatch.delenv("DIFFPO_TRACEBACK", raising=False)
    code = 2 if error in BAD_INPUT else 1
    with pytest.raises(SystemExit) as ended, command_line.errors_said():
        raise error
    assert ended.value.code == code
    hint = "" if code == 2 else "(DIFFPO_TRACEBACK=1 shows where)\n"
    assert capsys.readouterr().err == f"error: {error}\n{hint}"


def test_an_error_without_text_has_its_name(capsys):
    with pytest.raises(SystemExit), command_line.errors_said():
        raise MemoryError
    assert capsys.readouterr().err.startswith("error: MemoryError\n")


def test_errors_as_they_are_on_request_and_those_of_the_program(monkeypatch):
    with pytest.raises(ZeroDivisionError), command_line.errors_said():  # a bug shows where it is
        raise ZeroDivisionError
    monkeypatch.setenv("DIFFPO_TRACEBACK", "1")
    for error in (ValueError("x"), RuntimeError("x")):
        with pytest.raises(type(error)), command_line.errors_said():
            raise error


def test_what_orbax_leaves_behind_is_not_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", lambda unraisable: shown.append(str(unraisable.exc_value)))
    monkeypatch.setattr(sys, "unraisablehook", None)
    with command_line.errors_said():
        pass
    for text in ("Event loop is closed", "something else"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert shown == ["something else"]


def test_a_ctrl_c_that_python_cannot_raise_ends_the_program_too():
    program = """
import os, signal
from diffpo_jax import command_line

class Collected:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10): pass

with command_line.errors_said("interrupted; go on"):
    collected = Collected()
    del collected
    print("went on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "interrupted; go on\n")
