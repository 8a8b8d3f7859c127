"""What a disk may do to a run: files that are half written or damaged, found by the checksums of a folder, and a disk that is full."""

import concurrent.futures
import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

SEAL = "sha256.json"  # {file: [bytes, SHA-256]} of the folder it is in
FULL = ("No space left on device", "Disk quota exceeded")  # what libraries make of the errors of the system


class DamagedError(RuntimeError):
    """No checkpoint of a folder is whole."""


class FullDiskError(OSError):
    """A file could not be written because the disk is full."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Yields a file to write, UTF-8 where it is text, which is on the disk and becomes `path` at the end: half of it is never there."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


# --- damage ---


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError where it holds none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold a JSON object: {error}. Is it cut off?") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object, but a {type(content).__name__}")
    return content


def seal(folder: str | os.PathLike) -> None:
    """Makes sure that all files below `folder` are on the disk, and only then writes their sizes and checksums to `folder`/sha256.json.

    Orbax's own checksums are of its indices: a bit that flips in an array would be read as it is.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and SEAL not in path.name)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sums = pool.map(lambda path: _checksum(path, flush=True), files)
        entries = {str(path.relative_to(folder)): [path.stat().st_size, digest] for path, digest in zip(files, sums, strict=True)}
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent]:
        _flush_folder(inner)
    with replacing(folder / SEAL) as file:
        json.dump(entries, file)
    _flush_folder(folder)


def damage(folder: str | os.PathLike) -> str:
    """What is wrong with the files of `folder`, as "FILE is missing"; "" where all are as they were sealed, or there is no seal."""
    folder = Path(folder)
    if not (folder / SEAL).exists():
        return ""
    try:
        entries = {name: (int(size), str(digest)) for name, (size, digest) in json.loads((folder / SEAL).read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{SEAL} is not readable"
    for name, (size, _) in entries.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size:,} of its {size:,} bytes"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sums = pool.map(lambda name: _checksum(folder / name), entries)
        changed = [name for name, digest in zip(entries, sums, strict=True) if digest != entries[name][1]]
    return f"{changed[0]} is not what was written" if changed else ""


def newest_whole(folder: str | os.PathLike) -> tuple[int | None, dict[int, str]]:
    """(step of the newest whole checkpoint, {step: what is wrong} of those newer than it); (None, {}) where there is none at all.

    Raises:
      DamagedError: there are checkpoints, and none is whole.
    """
    folder = Path(folder)
    damaged: dict[int, str] = {}
    steps = sorted((int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()), reverse=True)
    sealed = {step for step in steps if (folder / str(step) / SEAL).exists()}
    for step in steps:
        problem = damage(folder / str(step))
        if step not in sealed and any(other < step for other in sealed):
            problem = f"{SEAL} is missing: the process ended before all was on the disk"
        elif not (folder / str(step) / "state").is_dir():
            problem = "state is missing"
        if not problem:
            return step, damaged
        damaged[step] = problem
    if damaged:
        lines = [f"  step {step}: {problem}" for step, problem in damaged.items()]
        what = f"every checkpoint in {folder} is damaged, and nothing was changed:"
        advice = "Put a copy of one back; or move the folder away, then the same command trains again what was in it."
        raise DamagedError("\n".join([what, *lines, advice]))
    return None, {}


def set_aside(folder: str | os.PathLike) -> str:
    """Renames `folder` to FOLDER.damaged (FOLDER.damaged-2 where that exists), which nothing reads; returns the new name."""
    folder = Path(folder)
    names = (f"{folder.name}.damaged{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
    target = next(path for path in map(folder.with_name, names) if not path.exists())
    folder.rename(target)
    return target.name


def _checksum(path: Path, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    """Makes sure that the names in `folder` are on the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


# --- a full disk ---


@contextlib.contextmanager
def explained(folder: str | os.PathLike, what: str, size: int = 0) -> Iterator[None]:
    """Around what writes `what` (about `size` bytes, 0 = unknown) under `folder`: says what to do where the disk is full.

    Raises:
      FullDiskError: in place of any error that comes of a full disk; all others pass.
    """
    try:
        yield
    except Exception as error:
        chain = list(_causes(error))
        told = next((cause for cause in chain if isinstance(cause, FullDiskError)), None)
        if told is not None and told is not error:  # as where closing the files failed too
            raise told from None
        if told is not None or not any(_is_of_a_full_disk(cause) for cause in chain):
            raise
        needs = f"about {_megabytes(size)}, of which " if size else ""
        raise FullDiskError(
            f"no space left for {what} in {folder} ({needs}{_megabytes(shutil.disk_usage(folder).free)} are free). "
            "What was saved before is whole: make space, then the same command goes on from there."
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_a_full_disk(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in FULL)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
