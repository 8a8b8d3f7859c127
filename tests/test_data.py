"""The data set on disk and the batches made of it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from configs.default import get_config
from diffpo_jax import data
from diffpo_jax.tasks import TASKS, Problem, Task
from diffpo_jax.tasks.files import find_file, read_rows

TINY = ("countdown", "math", "sudoku")


def small_config(task="sudoku", **settings):
    config = get_config()
    config.task.name, config.task.train_size, config.task.test_size = task, 50, 7
    config.task.prompt_length, config.task.response_length = {"sudoku": (16, 16), "countdown": (10, 8), "math": (52, 24)}[task]
    config.task.update(settings)
    return config


def rows_of(number):
    return [{"prompt": "1" * (1 + i % 4), "response": "2" * (1 + i % 3), "answer": str(i)} for i in range(number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("task", TINY)
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
    with pytest.raises(ValueError, match="task.name 'chess' is unknown: use one of countdown, "):
        config = small_config()
        config.task.name = "chess"
        data.prepare(config, folder)
    with pytest.raises(ValueError, match="task.test_size=0"):
        data.prepare(small_config(test_size=0), folder)
    with pytest.raises(ValueError, match="'sudoku' is not a task of the released d1 code"):
        config = small_config()
        config.data.d1_faithful = True
        data.prepare(config, folder)


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
    batch = data.tokenise(source, [1, 0], tokenizer, config, demonstrations=True)
    np.testing.assert_array_equal(batch["prompt"], [[5, 7, 4, 6], [0, 0, 4, 3]])
    np.testing.assert_array_equal(batch["prompt_mask"], [[True] * 4, [False, False, True, True]])
    np.testing.assert_array_equal(batch["response"], [[4, 4, 4], [7, 6, 1]])
    np.testing.assert_array_equal(batch["index"], [1, 0])
    assert [batch[name].dtype for name in ("prompt", "prompt_mask", "response", "index")] == [np.int32, bool, np.int32, np.int32]
    assert data.tokenise(source, [1, 0], tokenizer, config).keys() == batch.keys() - {"response"}


def test_prefill_comes_after_the_prompt_length():
    config = small_config(prompt_length=4)
    source = [{"prompt": "2413", "response": "", "answer": ""}, {"prompt": "1", "response": "", "answer": ""}]
    batch = data.tokenise(source, [0, 1], data.make_tokenizer(config), config, prefill="..")
    np.testing.assert_array_equal(batch["prompt"], [[5, 7, 4, 6, 3, 3], [0, 0, 0, 4, 3, 3]])
    np.testing.assert_array_equal(batch["prompt_mask"], [[True] * 6, [False] * 3 + [True] * 3])
    (same,) = data.eval_batches(source, data.make_tokenizer(config), config, 2, prefill="..")
    np.testing.assert_array_equal(same["prompt"], batch["prompt"])
    source[0]["prompt"] = "24131"
    with pytest.raises(ValueError, match="prompt of row 0 has 5 tokens, task.prompt_length is 4; raise it: '24131'"):
        data.tokenise(source, [0], data.make_tokenizer(config), config, prefill="..")


def test_missing_demonstration_is_an_error_where_one_is_wanted():
    config, source = small_config(), rows_of(3)
    source[1]["response"] = ""
    tokenizer = data.make_tokenizer(config)
    next(data.train_batches(source, tokenizer, config, batch_size=2, seed=0))
    with pytest.raises(ValueError, match="row 1 of sudoku has no demonstration"):
        data.train_batches(source, tokenizer, config, batch_size=2, seed=0, demonstrations=True)


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_too_long_text_names_row_text_and_lengths(field):
    config = small_config(prompt_length=4, response_length=4)
    source = rows_of(3)
    source[2][field] = "12341"
    message = f"{field} of row 2 has 5 tokens, task.{field}_length is 4; raise it: '12341'"
    with pytest.raises(ValueError, match=message):
        data.train_batches(source, data.make_tokenizer(config), config, batch_size=2, seed=0, demonstrations=True)


@pytest.mark.parametrize(("in_memory", "demonstrations"), [(True, True), (True, False), (False, True), (False, False)])
def test_each_epoch_holds_every_row_once_in_another_order(in_memory, demonstrations, monkeypatch):
    if not in_memory:
        monkeypatch.setattr(data, "ROWS_IN_MEMORY", 0)
    config, source = small_config(), rows_of(20)
    tokenizer = data.make_tokenizer(config)
    iterator = data.train_batches(source, tokenizer, config, batch_size=8, seed=5, demonstrations=demonstrations)
    batches = [next(iterator) for _ in range(15)]  # 6 epochs; batches span their ends
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(6, 20)
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    for batch in batches:
        assert batch["prompt"].shape == (8, 16) and ("response" in batch) == demonstrations
        for name, expected in data.tokenise(source, batch["index"], tokenizer, config, demonstrations=demonstrations).items():
            np.testing.assert_array_equal(batch[name], expected)


def test_order_depends_on_the_seed_only():
    config = small_config()

    def order(seed):
        iterator = data.train_batches(rows_of(20), data.make_tokenizer(config), config, batch_size=10, seed=seed)
        return np.concatenate([next(iterator)["index"] for _ in range(4)]).tolist()

    assert order(0) == order(0) != order(1)
    assert len(order(-1)) == 40  # any integer is a seed


def test_a_group_is_a_problem_repeated_and_hosts_share_a_batch():
    config, source = small_config(), rows_of(20)
    tokenizer = data.make_tokenizer(config)

    def batches(**options):
        iterator = data.train_batches(source, tokenizer, config, batch_size=6, seed=5, **options)
        return [next(iterator) for _ in range(7)]

    hosts = [np.array([0, 1, 2, 9, 10, 11]), np.array([3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17])]
    once, grouped, *shared = batches(), batches(group_size=3), *(batches(group_size=3, mine=mine) for mine in hosts)
    for each, group, *parts in zip(once, grouped, *shared, strict=True):
        assert group.keys() == each.keys() and group["prompt"].shape == (18, 16)
        for name in each:
            np.testing.assert_array_equal(group[name], np.repeat(each[name], 3, axis=0))
            for mine, part in zip(hosts, parts, strict=True):
                np.testing.assert_array_equal(part[name], group[name][mine])


def test_the_position_is_the_same_on_every_host():
    """So that a checkpoint of one number of hosts can be continued on another."""
    config = small_config()
    states = []
    for options in ({}, {"mine": np.array([0, 1])}, {"group_size": 2, "mine": np.array([5])}):
        iterator = data.train_batches(rows_of(20), data.make_tokenizer(config), config, batch_size=6, seed=5, **options)
        for _ in range(4):
            next(iterator)
        states.append(json.dumps(iterator.get_state()))
    assert len(set(states)) == 1


def test_state_resumes_exactly():
    config = small_config()

    def new():
        return data.train_batches(rows_of(20), data.make_tokenizer(config), config, batch_size=7, seed=3)

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


@pytest.mark.parametrize("demonstrations", [True, False])
@pytest.mark.parametrize(("number", "batch_size", "batches"), [(7, 3, 3), (6, 3, 2), (2, 5, 1)])
def test_eval_batches_cover_the_split_once_in_order(number, batch_size, batches, demonstrations):
    config, source = small_config(), rows_of(number)
    tokenizer = data.make_tokenizer(config)
    found = list(data.eval_batches(source, tokenizer, config, batch_size, demonstrations=demonstrations))
    assert len(found) == batches
    assert all(batch["valid"].shape == (batch_size,) and batch["prompt"].shape == (batch_size, 16) for batch in found)
    assert np.concatenate([batch["index"][batch["valid"]] for batch in found]).tolist() == list(range(number))
    for batch in found:
        assert ("response" in batch) == demonstrations
        for name, expected in data.tokenise(source, batch["index"], tokenizer, config, demonstrations=demonstrations).items():
            np.testing.assert_array_equal(batch[name], expected)


def test_hosts_share_the_batches_of_an_evaluation():
    config, source = small_config(), rows_of(7)
    tokenizer = data.make_tokenizer(config)
    whole = list(data.eval_batches(source, tokenizer, config, 4))
    for mine in (np.array([0, 3]), np.array([1, 2])):
        found = list(data.eval_batches(source, tokenizer, config, 4, mine=mine))
        assert len(found) == len(whole) == 2
        for batch, part in zip(whole, found, strict=True):
            assert batch.keys() == part.keys()
            for name in batch:
                np.testing.assert_array_equal(part[name], batch[name][mine])


# --- tasks that are read from published files ---


def read_questions(folder, split, d1_faithful):
    for row in read_rows(find_file(folder, [f"{split}.jsonl"]), ["q", "a"]):
        yield Problem(row["q"] + "!" * d1_faithful, "", json.dumps(row["a"]))


class ChatTokenizer:
    """A head of two tokens and a tail of one around the text; 9 is any letter, 7 any letter of a prefill."""

    pad_id, eos_id, mask_id, vocab_size = 0, 1, 2, 10

    def encode(self, text):
        return [7] * len(text)

    def encode_prompt(self, text, prefill=""):
        return [3, 4, *[9] * len(text), 5, *self.encode(prefill)]


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The configuration of a task with 5 training and 2 test questions."""
    for split, questions in {"train": ["aa", "b", "aaaaa", "", "aaaaaa"], "test": ["c", "dd"]}.items():
        lines = [json.dumps({"q": question, "a": number}) for number, question in enumerate(questions)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    task = Task("questions", "", lambda *_: 0.0, lambda *_: {}, read=read_questions)
    monkeypatch.setattr(data, "find_task", lambda name, d1_faithful=False: {"questions": task, **TASKS}[name])
    config = get_config()
    config.task.update({"name": "questions", "prompt_length": 7, "train_size": 100, "test_size": 100})
    config.data.path = str(tmp_path)
    return config


def texts(source):
    return [source[i]["prompt"] for i in range(len(source))]


def test_prepare_reads_the_published_splits(published, tmp_path):
    splits = data.prepare(published, str(tmp_path / "unused"))
    assert list(splits) == ["train", "test"]
    assert texts(splits["train"]) == ["aa", "b", "aaaaa", "", "aaaaaa"] and texts(splits["test"]) == ["c", "dd"]
    assert splits["train"][4] == {"prompt": "aaaaaa", "response": "", "answer": "4"}
    assert not (tmp_path / "unused").exists()
    published.task.train_size, published.task.test_size, published.data.d1_faithful = 2, 1, True
    splits = data.prepare(published, str(tmp_path))
    assert texts(splits["train"]) == ["aa!", "b!"] and texts(splits["test"]) == ["c!"]


@pytest.mark.parametrize(("path", "message"), [("", "no data folder is set"), ("absent", "the folder 'absent' does not exist")])
def test_missing_folder_names_the_field_and_the_files(published, path, message):
    published.data.path = path
    with pytest.raises(FileNotFoundError, match=f"{message}: set --config.data.path to a folder that holds train.jsonl"):
        data.prepare(published, "unused")


def test_reader_that_finds_a_problem_without_a_folder_is_not_believed(published, monkeypatch):
    task = Task("questions", "", lambda *_: 0.0, lambda *_: {}, read=lambda *_: iter([Problem("p", "", "")]))
    monkeypatch.setattr(data, "find_task", lambda *_: task)
    published.data.path = ""
    with pytest.raises(FileNotFoundError, match="data.path='' is not a folder"):
        data.prepare(published, "unused")


def test_published_task_that_reads_nothing_is_an_error(published, monkeypatch):
    task = Task("questions", "", lambda *_: 0.0, lambda *_: {}, read=lambda *_: iter(()))
    monkeypatch.setattr(data, "find_task", lambda *_: task)
    with pytest.raises(ValueError, match="holds no train problem of questions"):
        data.prepare(published, "unused")
    with pytest.raises(ValueError, match="questions holds any text: set --config.model.pretrained"):
        data.make_tokenizer(published)


def test_long_prompts_are_dropped_with_a_count(published):
    source = data.prepare(published, "unused")["train"]  # 5, 4, 8, 3 and 9 tokens
    kept, dropped = data.drop_long(source, ChatTokenizer(), published)
    assert (texts(kept), dropped) == (["aa", "b", ""], 2)
    published.task.prompt_length = 8
    assert texts(data.drop_long(source, ChatTokenizer(), published)[0]) == ["aa", "b", "aaaaa", ""]
    published.task.prompt_length = 2
    with pytest.raises(ValueError, match="task.prompt_length=2 is less than every prompt has: the shortest has 3 tokens"):
        data.drop_long(source, ChatTokenizer(), published)


def test_indices_count_in_the_split_without_the_dropped_prompts(published):
    kept, _ = data.drop_long(data.prepare(published, "unused")["train"], ChatTokenizer(), published)
    batches = data.train_batches(kept, ChatTokenizer(), published, batch_size=3, seed=0)
    batch = next(batches)
    assert sorted(batch["index"]) == [0, 1, 2]
    for index, mask in zip(batch["index"], batch["prompt_mask"], strict=True):
        assert mask.sum() == 3 + len(kept[index]["prompt"])
    assert kept[2] == {"prompt": "", "response": "", "answer": "3"}


def test_long_prompts_that_were_not_dropped_are_an_error(published):
    source = data.prepare(published, "unused")["train"]
    with pytest.raises(ValueError, match="prompt of row 2 has 8 tokens, task.prompt_length is 7"):
        data.train_batches(source, ChatTokenizer(), published, batch_size=2, seed=0)


def test_d1_cuts_long_prompts_from_the_left(published):
    published.data.d1_faithful = True
    source = data.prepare(published, "unused")["train"]
    assert data.drop_long(source, ChatTokenizer(), published) == (source, 0)
    published.task.prompt_length = 5
    batch = data.tokenise(source, [0, 1, 3], ChatTokenizer(), published, prefill="xy")  # "aa!", "b!", "!"
    np.testing.assert_array_equal(batch["prompt"], [[4, 9, 9, 9, 5, 7, 7], [3, 4, 9, 9, 5, 7, 7], [0, 3, 4, 9, 5, 7, 7]])
    np.testing.assert_array_equal(batch["prompt_mask"], batch["prompt"] > 0)


def test_nothing_is_dropped_of_generated_tasks():
    config, source = small_config(prompt_length=2), rows_of(4)
    tokenizer = data.make_tokenizer(config)
    assert data.drop_long(source, tokenizer, config) == (source, 0)
    with pytest.raises(ValueError, match="prompt of row 2 has 3 tokens"):
        data.train_batches(source, tokenizer, config, batch_size=2, seed=0)
