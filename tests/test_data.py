"""The data set on disk and the batches made of it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from configs.default import get_config
from diffpo_jax import data
from diffpo_jax.tasks import TASKS


def small_config(task="sudoku", **settings):
    config = get_config()
    config.task.name, config.task.train_size, config.task.test_size = task, 50, 7
    config.task.prompt_length, config.task.response_length = {"sudoku": (16, 16), "countdown": (10, 8), "math": (52, 24)}[task]
    config.task.update(settings)
    return config


def rows_of(number):
    return [{"prompt": "1" * (1 + i % 4), "response": "2" * (i % 3), "answer": str(i)} for i in range(number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_prepare_holds_the_generated_problems_in_order(task, folder):
    config = small_config(task)
    splits = data.prepare(config, folder)
    assert set(splits) == {"train", "test"} and (len(splits["train"]), len(splits["test"])) == (50, 7)
    for split, source in splits.items():
        expected = TASKS[task].generate(config[task], split, len(source), config.task.seed)
        assert [source[i] for i in range(len(source))] == [vars(problem) for problem in expected]


def test_changed_settings_never_meet_old_problems(folder):
    config = small_config()
    before = data.prepare(config, folder)["train"]
    config.sudoku.clues_min = config.sudoku.clues_max = 6
    after = data.prepare(config, folder)["train"]
    assert all(16 - after[i]["prompt"].count(".") == 6 for i in range(50))
    assert before[0] != after[0]
    assert len(data.prepare(small_config(train_size=30), folder)["train"]) == 30
    assert data.prepare(small_config(seed=1), folder)["train"][0] != before[0]
    config.math.steps_max = 5  # another task's settings do not matter
    assert data.DiffpoProblems(config=config, data_dir=folder).is_prepared()


def test_second_call_reuses_the_files(folder, monkeypatch):
    first = data.prepare(small_config(), folder)["test"][0]

    def generate(*_):
        raise AssertionError("generated again")

    monkeypatch.setattr(data.DiffpoProblems, "_generate_examples", generate)
    assert data.prepare(small_config(), folder)["test"][0] == first


def test_interrupted_generation_leaves_nothing_to_read(tmp_path, monkeypatch):
    original = data.DiffpoProblems._generate_examples

    def interrupted(self, split, count):
        yield from original(self, split, count // 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.DiffpoProblems, "_generate_examples", interrupted)
        data.prepare(small_config(), str(tmp_path))
    assert not data.DiffpoProblems(config=small_config(), data_dir=str(tmp_path)).is_prepared()
    assert len(data.prepare(small_config(), str(tmp_path))["train"]) == 50


def test_bad_settings_are_named(folder):
    with pytest.raises(ValueError, match="unknown task.name 'chess': use one of countdown, math, sudoku"):
        config = small_config()
        config.task.name = "chess"
        data.prepare(config, folder)
    with pytest.raises(ValueError, match="task.test_size=0"):
        data.prepare(small_config(test_size=0), folder)


def test_no_tensorflow(tmp_path):
    program = (
        "import sys; from configs.default import get_config; from diffpo_jax import data\n"
        "c = get_config(); c.task.train_size = c.task.test_size = 3\n"
        f"print(len(data.prepare(c, {str(tmp_path)!r})['train']), 'tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "3 False\n"


def test_tokenise_by_hand():
    config = small_config(prompt_length=4, response_length=3)
    tokenizer = data.make_tokenizer(config)
    source = [{"prompt": "1.", "response": "43", "answer": ""}, {"prompt": "2413", "response": "111", "answer": ""}]
    batch = data.tokenise(source, [1, 0], tokenizer, config)
    np.testing.assert_array_equal(batch["prompt"], [[5, 7, 4, 6], [0, 0, 4, 3]])
    np.testing.assert_array_equal(batch["prompt_mask"], [[True] * 4, [False, False, True, True]])
    np.testing.assert_array_equal(batch["response"], [[4, 4, 4], [7, 6, 1]])
    np.testing.assert_array_equal(batch["index"], [1, 0])
    assert [batch[name].dtype for name in ("prompt", "prompt_mask", "response", "index")] == [np.int32, bool, np.int32, np.int32]


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_too_long_text_names_row_text_and_lengths(field):
    config = small_config(prompt_length=4, response_length=4)
    source = rows_of(3)
    source[2][field] = "12341"
    message = f"{field} of row 2 has 5 tokens, task.{field}_length is 4; raise it: '12341'"
    with pytest.raises(ValueError, match=message):
        data.sft_batches(source, data.make_tokenizer(config), config, batch_size=2, seed=0)


@pytest.mark.parametrize("in_memory", [True, False])
def test_each_epoch_holds_every_row_once_in_another_order(in_memory, monkeypatch):
    if not in_memory:
        monkeypatch.setattr(data, "ROWS_IN_MEMORY", 0)
    config, source = small_config(), rows_of(20)
    tokenizer = data.make_tokenizer(config)
    iterator = data.sft_batches(source, tokenizer, config, batch_size=8, seed=5)
    batches = [next(iterator) for _ in range(15)]  # 6 epochs; batches span their ends
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(6, 20)
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    for batch in batches:
        assert batch["prompt"].shape == (8, 16) and batch["response"].shape == (8, 16)
        for name, expected in data.tokenise(source, batch["index"], tokenizer, config).items():
            np.testing.assert_array_equal(batch[name], expected)


def test_order_depends_on_the_seed_only():
    config = small_config()

    def order(seed):
        iterator = data.sft_batches(rows_of(20), data.make_tokenizer(config), config, batch_size=10, seed=seed)
        return np.concatenate([next(iterator)["index"] for _ in range(4)]).tolist()

    assert order(0) == order(0) != order(1)
    assert len(order(-1)) == 40  # any integer is a seed


def test_state_resumes_exactly():
    config = small_config()

    def new():
        return data.sft_batches(rows_of(20), data.make_tokenizer(config), config, batch_size=7, seed=3)

    iterator = new()
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(6)]
    resumed = new()
    next(resumed)
    resumed.set_state(state)
    for batch in expected:
        again = next(resumed)
        assert batch.keys() == again.keys()
        for name in batch:
            np.testing.assert_array_equal(again[name], batch[name])


@pytest.mark.parametrize(("number", "batch_size", "batches"), [(7, 3, 3), (6, 3, 2), (2, 5, 1)])
def test_eval_batches_cover_the_split_once_in_order(number, batch_size, batches):
    config, source = small_config(), rows_of(number)
    found = list(data.eval_batches(source, data.make_tokenizer(config), config, batch_size))
    assert len(found) == batches
    assert all(batch["valid"].shape == (batch_size,) and batch["prompt"].shape == (batch_size, 16) for batch in found)
    assert np.concatenate([batch["index"][batch["valid"]] for batch in found]).tolist() == list(range(number))
    for batch in found:
        for name, expected in data.tokenise(source, batch["index"], data.make_tokenizer(config), config).items():
            np.testing.assert_array_equal(batch[name], expected)
