"""Checkpoints of a training state and of its data iterator, and what guards a workdir: its configuration and its lock."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from diffpo_jax import sharding, storage

ABSENT = "(absent)"  # stands for a field that one of two configurations does not have
SHOWN = 3  # leaves that differ which an error shows


class InUseError(RuntimeError):
    """Another process works in the workdir."""


@contextlib.contextmanager
def quietly(least: int = logging.ERROR) -> Iterator[None]:
    """Without what orbax and other libraries log below the level `least`: errors still show, but for logging.FATAL."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(least)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """An open folder of checkpoints: one sub-folder a step, committed by a rename, so that a killed process leaves only whole ones."""

    folder: epath.Path
    every: int  # steps between two saves that are not forced
    manager: ocp.CheckpointManager
    damaged: tuple[int, ...] = ()  # steps that are there and are not to be read


@quietly()
def open_manager(folder: str | os.PathLike, max_to_keep: int | None = None, every: int = 1, read_only: bool = False) -> Checkpoints:
    """Opens a folder of checkpoints, making it unless `read_only`.

    Args:
      folder: local, or of a bucket ("gs://..."), whose objects have checksums of their own; on several hosts one that all of them see.
        Remnants of saves that were cut short are removed, and damaged checkpoints newer than the newest whole one set aside (see
        `diffpo_jax.storage`), unless `read_only`; what is damaged is printed.
      max_to_keep: newest checkpoints kept; None = all.
      every: steps between two saves that are not forced.
      read_only: to read another run's checkpoints; nothing in the folder is touched.

    Raises:
      FileNotFoundError: `read_only` and there is no such folder.
      storage.DamagedError: there are checkpoints, and none is whole; nothing was changed.
    """
    folder = epath.Path(folder)
    folder = folder if is_remote(folder) else folder.resolve()
    if read_only and not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {folder}: check the path, or train first")
    damaged = () if is_remote(folder) else _agree_on_damaged(folder, read_only)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else max_to_keep,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=False,  # the update donates its buffers: a save must have read them before it returns
    )
    # the data's position is the same on every host, however many there are
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler(), "counters": ocp.JsonCheckpointHandler()}
    return Checkpoints(folder, every, ocp.CheckpointManager(folder, options=options, item_handlers=handlers), damaged)


def _agree_on_damaged(folder: epath.Path, read_only: bool) -> tuple[int, ...]:
    """The damaged steps still to be left out, as the first host finds them, on every host; where it may, it renames them instead."""

    def find() -> bytes:
        whole, damaged = storage.newest_whole(folder)
        for step, problem in damaged.items():
            kept = "left out" if read_only else f"kept as {storage.set_aside(folder / str(step))}"
            print(f"the checkpoint of step {step} in {folder} is damaged ({problem}): {kept}, going on from step {whole}", flush=True)
        return json.dumps(list(damaged) if read_only else []).encode()

    return tuple(json.loads(sharding.first_host(find)))


def save(
    checkpoints: Checkpoints,
    step: int,
    state: Any,
    data_iterator: Any = None,
    counters: Mapping[str, Any] | None = None,
    force: bool = False,
) -> bool:
    """Saves `state` (a pytree of arrays, no typed PRNG keys), the iterator's position and host-side counters as `step`, if due or forced.

    Returns whether it saved: not when `step` is no multiple of `every` (unless `force`), nor when that step is already there.

    Raises:
      storage.FullDiskError: there is no space for it; what was saved before is as it was.
    """
    if not (force or step % checkpoints.every == 0) or step in checkpoints.manager.all_steps():
        return False
    items = {"state": ocp.args.PyTreeSave(state)}
    if data_iterator is not None:
        items["data"] = ocp.args.JsonSave(data_iterator.get_state())
    if counters is not None:
        items["counters"] = ocp.args.JsonSave(dict(counters))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with storage.explained(checkpoints.folder, f"the checkpoint of step {step}", size), quietly(logging.FATAL):  # or stacks come, too
        saved = checkpoints.manager.save(step, args=ocp.args.Composite(**items), force=True)
        if saved and not is_remote(checkpoints.folder) and jax.process_index() == 0:
            storage.seal(checkpoints.folder / str(step))
    return saved


def latest_step(checkpoints: Checkpoints) -> int | None:
    """The newest whole checkpoint's step; None if there is none."""
    return max(_steps(checkpoints), default=None)


def _steps(checkpoints: Checkpoints) -> list[int]:
    """Steps of the checkpoints that can be read, the newest last."""
    return sorted(set(checkpoints.manager.all_steps()) - set(checkpoints.damaged))


def abstract(state: Any) -> Any:
    """The shapes, dtypes and shardings of a pytree of arrays, as jax.ShapeDtypeStruct: what `restore` needs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def restore(checkpoints: Checkpoints, step: int | None, abstract_state: Any, data_iterator: Any = None, partial: bool = False) -> Any:
    """Reads a checkpoint into the structure, dtypes and shardings of `abstract_state`; sets `data_iterator` back in place.

    Args:
      checkpoints: from `open_manager`.
      step: which one; None = the newest.
      abstract_state: pytree of jax.ShapeDtypeStruct, with sharding where leaves are to be placed (see `abstract`).
      data_iterator: a grain iterator over the same data as the saved one, or None to leave the data alone.
      partial: allow the checkpoint to hold more than `abstract_state` asks for (say, only the parameters of a training state).

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: structure or shapes differ; the message counts the differing leaves and shows the first. Or the checkpoint is damaged.
    """
    steps = _steps(checkpoints)
    if not steps or (step is not None and step not in steps):
        have = f"it has steps {steps}: ask for one of them" if steps else "it has none: train first, or check the path"
        raise FileNotFoundError(f"no checkpoint {'' if step is None else f'of step {step} '}in {checkpoints.folder}; {have}")
    step = steps[-1] if step is None else step
    _check_structure(checkpoints, step, abstract_state, partial)
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    items = {"state": ocp.args.PyTreeRestore(abstract_state, restore_args=restore_args, partial_restore=partial)}
    if data_iterator is not None:
        items["data"] = ocp.args.JsonRestore()
    with _damage_said(checkpoints, step):
        restored = checkpoints.manager.restore(step, args=ocp.args.Composite(**items))
    if data_iterator is not None:
        data_iterator.set_state(restored["data"])
    return restored["state"]


def restore_counters(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """The host-side counters saved with checkpoint `step`."""
    return checkpoints.manager.restore(step, args=ocp.args.Composite(counters=ocp.args.JsonRestore()))["counters"]


def close(checkpoints: Checkpoints) -> None:
    """Waits for saves under way and closes the folder."""
    checkpoints.manager.wait_until_finished()
    checkpoints.manager.close()


@contextlib.contextmanager
def _damage_said(checkpoints: Checkpoints, step: int) -> Iterator[None]:
    """What orbax raises of a checkpoint with parts missing or cut short becomes a ValueError that says which one it is."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        cause = first if len(first) <= 100 else f"{first[:100]}..."
        raise ValueError(
            f"the checkpoint of step {step} in {checkpoints.folder} is damaged ({type(error).__name__}: {cause}): put a copy of it back, "
            "or remove that step's folder to take the one before it"
        ) from error


@quietly()
def _check_structure(checkpoints: Checkpoints, step: int, abstract_state: Any, partial: bool) -> None:
    """Raises ValueError where the checkpoint's tree is not `abstract_state`'s, or cannot be read."""
    with _damage_said(checkpoints, step):
        metadata = checkpoints.manager.item_metadata(step)["state"]
        if metadata is None:
            raise FileNotFoundError("its list of arrays is missing")
        found = _shapes(metadata.tree)
    expected = _shapes(abstract_state)
    paths = expected if partial else expected | found
    differing = [
        f"{path}: expected {expected.get(path, 'no such leaf')}, found {found.get(path, 'no such leaf')}"
        for path in sorted(paths)
        if expected.get(path) != found.get(path)
    ]
    if differing:
        number = f"{len(differing)} leaves differ, first " if len(differing) > 1 else ""
        shown = number + "; ".join(differing[:SHOWN])
        raise ValueError(
            f"the checkpoint of step {step} in {checkpoints.folder} does not fit this configuration: {shown}\n"
            "Use the configuration it was made with, or another checkpoint (--workdir, sft.checkpoint)."
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


# --- a workdir's configuration and lock ---


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` is in a bucket ("gs://...")."""
    return "://" in os.fspath(path)


def folder_of(config: Any, workdir: str | os.PathLike, name: str) -> str:
    """Where a run keeps the checkpoints called `name` ("sft", "checkpoints"): in config.checkpoint_dir, in the workdir by default."""
    return os.path.join(config.checkpoint_dir or os.fspath(workdir), name)


def to_json(value: Any) -> Any:
    """`value` as what JSON can hold: arrays and tuples become lists, NaN and the infinities their names as strings."""
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return {str(k): to_json(v) for k, v in (value if isinstance(value, Mapping) else value.to_dict()).items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `to_json(value)` so that `path` holds either its old content or all of the new; makes the folders above it.

    Only the first host does. `path` may be in a bucket.
    """
    text = json.dumps(to_json(value), indent=2, allow_nan=False) + "\n"
    if jax.process_index() != 0:
        return
    if is_remote(path):
        epath.Path(path).write_text(text)  # an object appears whole
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.replacing(path) as file:
        file.write(text)


def check_workdir(workdir: str | os.PathLike, config: Any, ignore: tuple[str, ...] = ("eval",)) -> None:
    """Writes `workdir/config.json` if it is absent; otherwise requires that it says the same as `config`.

    Args:
      workdir: the run's folder; made if absent.
      config: ConfigDict or nested dict.
      ignore: sections ("eval") or fields ("rl.steps") that may differ; config.json then keeps what the run started with.

    Raises:
      ValueError: fields differ; the message lists each as `field: existing -> requested`. Or config.json is damaged.
    """
    path = epath.Path(workdir) / "config.json"
    requested = to_json(config)
    with _place_said(path.parent, "--workdir or checkpoint_dir"):
        if not path.exists():
            write_json(path, requested)
            return
    old, new = flat_fields(_read_config(path)), flat_fields(requested)
    lines = [
        f"  {field}: {old.get(field, ABSENT)} -> {new.get(field, ABSENT)}"
        for field in sorted(old | new)
        if old.get(field, ABSENT) != new.get(field, ABSENT) and not any(f"{field}.".startswith(f"{name}.") for name in ignore)
    ]
    if lines:
        what = f"{path.parent} holds a run with another configuration; fields that differ (existing -> requested):"
        raise ValueError("\n".join([what, *lines, "Use another --workdir, or the existing configuration to go on with that run."]))


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): put a copy of it back; or remove it, if this is the configuration the run was made with; or use "
            "another --workdir"
        ) from None


def flat_fields(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'rl.steps': 3} from {'rl': {'steps': 3}}; an empty section counts as a field."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flat_fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return flat


@contextlib.contextmanager
def _place_said(folder: str | os.PathLike, flag: str) -> Iterator[None]:
    """Errors of a place that cannot be written to, whatever the space there, say which one it is; they keep their kind."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOSPC, errno.EDQUOT):
            raise
        kind = type(error) if type(error) is not OSError else PermissionError  # a read-only file system, a name that is too long
        raise kind(f"{folder} cannot hold a run ({error.strerror}): it must be a folder to write to; use another {flag}") from None


@contextlib.contextmanager
def lock_workdir(workdir: str | os.PathLike) -> Iterator[None]:
    """Holds `workdir/.lock` so that one process at a time works there; released when the process ends, however it ends.

    Raises:
      InUseError: another process holds it; the message names its pid.
      OSError: of the kind that the system raised: `workdir` is no folder, or one that cannot be written to.
    """
    path = Path(workdir) / ".lock"
    with _place_said(workdir, "--workdir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise InUseError(f"{path.parent} is in use by process {holder}: wait for it, stop it, or use another --workdir") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
