"""Seals of folders, damage to them, and what is said of a full disk."""

import errno
import io
import random

import numpy as np
import pytest

from diffpo_jax import storage
from diffpo_jax.evaluate import Evaluation, load_curve, save_curve


def make(folder, seed=0, sealed=True):
    """A folder as of a checkpoint."""
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "state" / "d" / "arrays").write_bytes(random.Random(seed).randbytes(5000))
    (folder / "state" / "index").write_text("{}")
    (folder / "metadata").write_text("12")
    if sealed:
        storage.seal(folder)
    return folder


def test_every_flipped_bit_every_cut_and_every_missing_file_is_found(tmp_path):
    folder, rng = make(tmp_path / "1"), random.Random(0)
    assert storage.damage(folder) == ""
    for name in ("state/d/arrays", "state/index", "metadata"):
        path = folder / name
        whole = path.read_bytes()
        for _ in range(30):
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            assert storage.damage(folder) == f"{name} is not what was written"
        path.write_bytes(whole[:-1])
        assert storage.damage(folder) == f"{name} has {len(whole) - 1:,} of its {len(whole):,} bytes"
        path.unlink()
        assert storage.damage(folder) == f"{name} is missing"
        path.write_bytes(whole)
        assert storage.damage(folder) == ""
    (folder / storage.SEAL).write_text("{")
    assert storage.damage(folder) == "sha256.json is not readable"


def test_the_newest_whole_one_and_why_those_after_it_are_not(tmp_path):
    assert storage.newest_whole(tmp_path) == (None, {})
    for step in (4, 6, 10):
        make(tmp_path / str(step), step)
    assert storage.newest_whole(tmp_path) == (10, {})
    (tmp_path / "10" / "metadata").unlink()
    (tmp_path / "6" / "state" / "index").write_text("")
    assert storage.newest_whole(tmp_path) == (4, {10: "metadata is missing", 6: "state/index has 0 of its 2 bytes"})
    assert [storage.set_aside(tmp_path / "10"), storage.set_aside(tmp_path / "6")] == ["10.damaged", "6.damaged"]
    make(tmp_path / "6", sealed=False)  # a process that was killed before it could seal it
    assert storage.newest_whole(tmp_path) == (4, {6: "sha256.json is missing: the process ended before all was on the disk"})
    assert storage.set_aside(tmp_path / "6") == "6.damaged-2"
    (tmp_path / "4" / "metadata").unlink()
    with pytest.raises(storage.DamagedError, match="nothing was changed:\n  step 4: metadata is missing\nPut a copy"):
        storage.newest_whole(tmp_path)


def test_checkpoints_without_any_seal_are_taken_as_they_are(tmp_path):
    make(tmp_path / "2", sealed=False)
    assert storage.newest_whole(tmp_path) == (2, {})
    (tmp_path / "3").mkdir()
    assert storage.newest_whole(tmp_path) == (2, {3: "state is missing"})


def test_a_full_disk_is_explained_once_and_other_errors_pass(tmp_path):
    def fails(error, cause=None):
        with storage.explained(tmp_path, "the run"), storage.explained(tmp_path, "the checkpoint of step 3", 5_000_000):
            raise error from cause

    wanted = rf"^no space left for the checkpoint of step 3 in {tmp_path} \(about 5.0 MB, of which [\d,.]+ MB are free\)"
    for error, cause in (
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (ValueError("RESOURCE_EXHAUSTED: ... [OS error 28: ENOSPC No space left on device]"), None),
        (RuntimeError("saving failed"), OSError(errno.EDQUOT, "over quota")),
    ):
        with pytest.raises(storage.FullDiskError, match=wanted):
            fails(error, cause)
    for error in (ValueError("RESOURCE_EXHAUSTED: out of memory"), OSError(errno.EACCES, "no")):
        with pytest.raises(type(error)) as caught:
            fails(error)
        assert caught.value is error


def test_what_was_said_first_of_a_full_disk_is_what_is_said(tmp_path):
    with pytest.raises(storage.FullDiskError, match="no space left for the checkpoint"):
        with storage.explained(tmp_path, "the run"):
            try:
                with storage.explained(tmp_path, "the checkpoint"):
                    raise OSError(errno.ENOSPC, "No space left on device")
            finally:
                raise OSError(errno.ENOSPC, "No space left on device")  # closing a file


def test_a_file_of_evaluations_is_read_as_it_was_or_not_at_all(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "base.npz"
    made = Evaluation(*rng.uniform(size=(4, 6)), seconds=1.5)
    save_curve(path, {0.5: made}, "settings")
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << (place % 8)
        try:
            curve, settings = load_curve(io.BytesIO(spoilt))
        except ValueError:
            refused += 1
            continue
        assert settings == "settings" and list(curve) == [0.5] and curve[0.5].seconds == 1.5
        assert all(np.array_equal(getattr(curve[0.5], name), getattr(made, name)) for name in ("correct", "nfe", "tokens", "threshold"))
    assert refused > 0.7 * len(whole) / 3
    for length in range(0, len(whole), 50):
        with pytest.raises(ValueError, match="not a whole file of evaluations"):
            load_curve(io.BytesIO(whole[:length]))
