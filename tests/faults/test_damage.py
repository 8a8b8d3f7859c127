"""Files of a run that were cut off, changed or lost: what can be made again is, with a word; else the error says what and where."""

import json
import random
import shutil

import pytest

from tests import runs
from tests.faults.conftest import FLAGS
from tests.published_model import write_model

pytestmark = pytest.mark.slow


def spoil(path, how: str, seed: int = 0) -> None:
    """Cuts a file in half, flips a bit of it, empties it or removes it."""
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[random.Random(seed).randrange(len(data))] ^= 1 << (seed % 8)
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"flipped": data, "cut": data[: len(data) // 2], "empty": b""}[how])


def largest(folder):
    """The file of a folder that holds most: of a checkpoint, arrays."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def go_on(workdir) -> str:
    return runs.finish(runs.start(workdir, *FLAGS))


# --- checkpoints ---


@pytest.mark.parametrize("how, told", [("flipped", "is not what was written"), ("cut", "of its"), ("missing", "is missing")])
def test_the_newest_checkpoint_is_damaged(undisturbed, nearly_done, how, told):
    folder = nearly_done / "checkpoints"
    spoilt = largest(folder / "16")
    spoil(spoilt, how)
    out = go_on(nearly_done)
    [line] = [line for line in out.splitlines() if "damaged" in line]
    assert line.startswith(f"the checkpoint of step 16 in {folder} is damaged ({spoilt.relative_to(folder / '16')} ") and told in line
    assert line.endswith("): kept as 16.damaged, going on from step 14")
    assert runs.steps(folder) == [14, 16] and (folder / "16.damaged").is_dir()
    runs.assert_same_outcome(nearly_done, undisturbed)


def test_the_newest_checkpoint_of_the_base_model_is_damaged_while_rl_is_under_way(undisturbed, nearly_done):
    spoil(largest(nearly_done / "sft" / "60"), "flipped")
    shutil.rmtree(nearly_done / "checkpoints" / "16")
    out = go_on(nearly_done)
    assert f"the checkpoint of step 60 in {nearly_done / 'sft'} is damaged" in out and "going on from step 50" in out
    assert "rl 16/16" in out
    runs.assert_same_outcome(nearly_done, undisturbed, in_order=False)  # the lines of the base model come after those of RL now


def test_every_checkpoint_is_damaged(undisturbed, nearly_done):
    folder = nearly_done / "checkpoints"
    spoil(largest(folder / "16"), "flipped")
    spoil(largest(folder / "14"), "cut")
    before = runs.contents(folder)
    for mode in ("train", "eval"):
        error = runs.finish(runs.start(nearly_done, *FLAGS, f"--mode={mode}"), code=2)
        assert f"error: every checkpoint in {folder} is damaged, and nothing was changed:" in error and "Traceback" not in error
        assert "  step 16: state/" in error and "  step 14: state/" in error and "move the folder away" in error
        assert runs.contents(folder) == before
    folder.rename(nearly_done / "elsewhere")  # as the message advises
    assert "rl 16/16" in go_on(nearly_done)
    runs.assert_same_outcome(nearly_done, undisturbed)


def test_evaluation_takes_the_newest_whole_one_and_changes_nothing(nearly_done):
    folder = nearly_done / "checkpoints"
    spoil(largest(folder / "16"), "flipped")
    before = runs.contents(folder)
    out = runs.finish(runs.start(nearly_done, *FLAGS, "--mode=eval"))
    assert f"the checkpoint of step 16 in {folder} is damaged" in out and "left out, going on from step 14" in out
    assert runs.contents(folder) == before
    assert json.loads((nearly_done / "evaluation-14.json").read_text())["step"] == 14
    assert not (nearly_done / "evaluation-16.json").exists()


def test_a_given_base_model_that_is_damaged_is_not_replaced_by_an_earlier_one(undisturbed, tmp_path):
    given = tmp_path / "sft"
    shutil.copytree(undisturbed / "sft", given)
    spoil(largest(given / "60"), "flipped")
    error = runs.finish(runs.start(tmp_path / "run", *FLAGS, f"--config.sft.checkpoint={given}"), code=2)
    assert f"sft.checkpoint={given} is damaged: copy or make it again" in error and "Traceback" not in error


# --- what else a workdir holds ---


def test_small_files_that_were_cut_off_are_made_again(undisturbed, nearly_done):
    for name, how in (("base.npz", "cut"), ("trained.npz", "cut"), ("summary.json", "cut")):
        shutil.copy(undisturbed / name, nearly_done / name)
        spoil(nearly_done / name, how)
    with open(nearly_done / "metrics.jsonl", "a") as file:
        file.write('{"phase": "rl", "st')
    for path in nearly_done.glob("tensorboard/*/*"):
        spoil(path, "cut")
    [problems] = nearly_done.glob("data/diffpo_problems/*/*/*train*")
    spoil(problems, "cut")
    out = go_on(nearly_done)
    for path in (nearly_done / "base.npz", nearly_done / "trained.npz"):
        assert f"{path} is damaged" in out and "it is made again" in out
    assert f"the problems in {problems.parent} are damaged ({problems.name} has " in out and "1.2.0.damaged and made again" in out
    runs.assert_same_outcome(nearly_done, undisturbed)
    assert len(problems.read_bytes()) == len(next(undisturbed.glob("data/diffpo_problems/*/*/*train*")).read_bytes())


@pytest.mark.parametrize("how", ["cut", "empty"])
def test_a_configuration_that_was_cut_off_is_an_error(nearly_done, how):
    config = nearly_done / "config.json"
    spoil(config, how)
    before = runs.contents(nearly_done)
    error = runs.finish(runs.start(nearly_done, *FLAGS), code=2)
    assert f"error: {config} is damaged (" in error and "put a copy of it back; or remove it" in error and "Traceback" not in error
    assert runs.contents(nearly_done) == before


def test_compiled_programs_that_were_cut_off_are_compiled_again(undisturbed, nearly_done, tmp_path):
    cache = tmp_path / "cache"
    env = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    shutil.copytree(nearly_done, tmp_path / "first")
    runs.finish(runs.start(tmp_path / "first", *FLAGS, env=env))
    programs = [path for path in cache.rglob("*-cache") if path.is_file()]
    for number, path in enumerate(programs):
        spoil(path, ("cut", "empty", "flipped")[number % 3], seed=number)
    assert len(programs) > 3
    runs.finish(runs.start(nearly_done, *FLAGS, env=env))
    runs.assert_same_outcome(nearly_done, undisturbed)


# --- published files ---


def test_a_published_file_that_was_not_loaded_to_its_end(tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    rows = [{"question": f"How many are {i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(80)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (published / "test.jsonl").write_text(text)
    (published / "train.jsonl").write_text(text[: text.index("60 + 60")])
    model = write_model(tmp_path / "model")
    flags = (f"--config.data.path={published}", f"--config.model.pretrained={model}", "--config.task.train_size=99")
    error = runs.finish(runs.start(tmp_path / "run", *flags, task="math", preset="published_debug"), code=2)
    assert f"{published / 'train.jsonl'}, line 61, is not JSON" in error and "Is the file cut off?" in error and "Traceback" not in error
    assert not list((tmp_path / "run").glob("checkpoints/*"))
