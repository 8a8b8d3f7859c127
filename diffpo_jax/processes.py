"""The processes of a run over several hosts: how they meet, and how the others end when one is lost or fails.

JAX's own end of a process whose peers are gone is an abort with a page of native stack. `together` watches the peers itself, through the
key-value store of `jax.distributed`, and ends with what happened and what to do. Only where that store is lost, with process 0, JAX is
faster: then a small process that has outlived this one says it.
"""

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the client has no public name

AGAIN = "Start all processes again with the same command: the run goes on from its last checkpoint."
FOLDER = "diffpo_jax/processes"


@contextlib.contextmanager
def together(settings: Any, exit_code: Callable[[BaseException], int] = lambda _: 1) -> Iterator[None]:
    """Joins the processes of a run, where `settings` (as `config.distributed`) say that there are several, before anything else uses JAX.

    Inside, this process ends with a message after an error, which the others are told, with its `exit_code`, and once another has failed,
    with the same code, or given no sign of life for settings.timeout seconds, with code 1.

    Raises:
      RuntimeError: the others could not be found.
    """
    if not settings.initialize:
        yield
        return
    outlived, over = _last_words(), threading.Event()
    _join(settings)
    client = jax_distributed.global_state.client

    def die(message, code=1):
        outlived()
        print(f"error: {message}", file=sys.stderr, flush=True)
        if jax.process_index() == 0:  # the others read what was told before the store is gone
            time.sleep(1.5 * settings.timeout / 10)
        os._exit(code)  # not by way of JAX's own end, which waits for the others

    threading.Thread(target=_watch, args=(client, settings.timeout, over, die), daemon=True).start()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("DIFFPO_TRACEBACK"):
            traceback.print_exc()
        message = str(error) or type(error).__name__
        if isinstance(error, jax.errors.JaxRuntimeError):  # as where what another was to send did not come: `_watch` will know
            wait = 1.25 * settings.timeout
            print(f"error: {message}\n(waiting {wait:.0f} s to see whether another process is gone)", file=sys.stderr, flush=True)
            time.sleep(wait)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # of a first process that is gone itself
            failed = json.dumps([message, exit_code(error)])
            client.key_value_set(f"{FOLDER}/{jax.process_index()}/failed", failed, allow_overwrite=True)
        die(message, exit_code(error))
    finally:  # of the run, or of all processes after SIGTERM to one of them
        client.wait_at_barrier(f"{FOLDER}/done", timeout_in_ms=3_600_000)  # JAX's own at the exit waits for settings.timeout only
        over.set()
        outlived()


def _last_words() -> Callable[[], None]:
    """Starts a process that says how this one ended, unless what is returned was called before."""
    message = f"error: this process was killed, or aborted because process 0, where the others meet, is gone. {AGAIN}\n"
    code = f"import sys; sys.stdin.read() or sys.stderr.write({message!r})"
    child = subprocess.Popen([sys.executable, "-ISc", code], stdin=subprocess.PIPE, text=True, start_new_session=True)
    faulthandler.disable()  # absl's; what Python was doing when JAX aborted says nothing

    def forget():
        with contextlib.suppress(OSError, ValueError):  # said already
            child.communicate("all is well")

    return forget


def _join(settings: Any) -> None:
    try:
        jax.distributed.initialize(
            settings.coordinator or None,
            settings.processes or None,
            None if settings.process_id < 0 else settings.process_id,
            heartbeat_timeout_seconds=10 * settings.timeout,  # beats come at half of it; `_watch` is to be the first
            shutdown_timeout_seconds=settings.timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"distributed.initialize: the processes did not find each other ({error}). On TPU, Slurm, Open MPI and Kubernetes all is read "
            "from the environment; elsewhere set distributed.coordinator=HOST:PORT, .processes and .process_id"
        ) from error


def _watch(client: Any, timeout: float, over: threading.Event, die: Callable[..., None]) -> None:
    """Gives a sign of life, and looks for those of the others, several times in `timeout` seconds, until the run is over."""
    me, others = jax.process_index(), sorted(set(range(jax.process_count())) - {jax.process_index()})
    seen, beat = dict.fromkeys(others, ("", time.monotonic())), 0
    while not over.wait(timeout / 10):
        beat += 1
        try:
            client.key_value_set(f"{FOLDER}/{me}/beat", str(beat), allow_overwrite=True)
            found = dict(client.key_value_dir_get(FOLDER))
        except jax.errors.JaxRuntimeError as error:
            if not over.wait(timeout / 10):
                die(f"process 0, where the others meet, is gone ({str(error).splitlines()[0]}). {AGAIN}")
            return
        for other in others:
            if failure := found.get(f"{FOLDER}/{other}/failed"):
                message, code = json.loads(failure)
                die(f"process {other} failed: {message}\n{AGAIN}", code)
                return
            value, when = seen[other]
            now = found.get(f"{FOLDER}/{other}/beat", "")
            if now != value:
                seen[other] = (now, time.monotonic())
            elif time.monotonic() - when > timeout:
                die(f"process {other} gave no sign of life for {timeout:.0f} s: it was killed or its host is lost. {AGAIN}")
                return
