"""Files of generations: settings, contents against the sampler called by hand, resuming, refusing, scoring again, the table."""

import dataclasses
import io
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import sudoku
from diffpo_jax import generations, rollout, sharding
from diffpo_jax.models.threshold_head import ThresholdHead
from diffpo_jax.models.transformer import ModelConfig, Policy
from diffpo_jax.sampling import denoise as denoise_module
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.tasks import TASKS
from diffpo_jax.tasks.base import Task
from diffpo_jax.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abcd")  # a = 3 ... d = 6
PROBLEMS = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(("ab", "c", "dda", "bbb", "a"), "abcda", strict=True)]
TASK = Task(  # right: the response has the answer's letter at least twice
    name="letters",
    alphabet="abcd",
    reward=lambda answer, response: float(response.count(answer) >= 2),
    components=lambda answer, response: {"letters": 0.5 * response.count(answer), "brief": -0.125 * len(response)},
    published_score=lambda answer, response: len(response) / 8,
    extract=lambda response: response[-1:] or None,
)
POLICY = Policy(ModelConfig(vocab_size=7, mask_id=2, width=16, layers=1, heads=2, kv_heads=2, mlp_width=16))
PARAMS = jax.tree.map(lambda x: 3 * x, POLICY.init(jax.random.key(0)))
HEAD = ThresholdHead(hidden=8, gamma_min=0.1, gamma_max=8.0, gamma_init=1.0, std_init=1.0)
HEAD_PARAMS = jax.tree.map(lambda x: 5 * x, HEAD.init(jax.random.key(1), 16))
KEY = jax.random.key(5)
FIELDS = {
    "task.prompt_length": 4, "eval.lengths": (8,), "eval.block_length": 4, "eval.tokens_per_step": 2, "eval.rule": "low_confidence",
    "eval.thresholds": (0.5,), "eval.temperature": 1.0, "eval.batch_size": 2,
}  # fmt: skip


def configuration(**fields):
    config = sudoku.get_config("debug")
    config.update_from_flattened_dict(FIELDS | fields)
    return config


def parts(problems=PROBLEMS, task=TASK, **fields):
    """What `generations` reads of the parts of a run."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    return SimpleNamespace(
        config=configuration(**fields), mesh=mesh, rollout_mesh=mesh, task=task, tokenizer=TOKENIZER, sources={"test": problems},
        policy=POLICY, head=HEAD, key=lambda use: jax.random.clone(KEY) if use == "eval" else None,
    )  # fmt: skip


def read(path):
    """(header, lines without their times)."""
    header, *lines = (json.loads(text) for text in path.read_text().splitlines())
    return header, [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def names(*args, **kwargs):
    return [setting.name for setting in generations.settings(*args, **kwargs)]


# --- settings ---


def test_settings_of_a_top_k_rule():
    published = {"eval.lengths": (128, 256, 512), "eval.block_length": 32, "eval.temperature": 0.0}
    found = generations.settings(configuration(**published), learned=True)  # no threshold to learn
    assert [setting.name for setting in found] == ["L128-low_confidence-S64", "L256-low_confidence-S128", "L512-low_confidence-S256"]
    assert found[1] == generations.Setting(256, "low_confidence", None, 128, False, 32, 0.0)


def test_settings_of_a_rule_that_takes_a_threshold():
    config = configuration(**{"eval.lengths": (8, 16, 8), "eval.rule": "entropy_bounded", "eval.thresholds": (0.5, 8.0, 0.5, 1 / 3)})
    each = [["g0.5", "g8", "g0.333333333333"], ["learned"]]
    assert names(config, learned=False) == [f"L{length}-entropy_bounded-{dial}" for length in (8, 16) for dial in each[0]]
    assert names(config, learned=True) == [f"L{length}-entropy_bounded-{dial}" for length in (8, 16) for dial in each[0] + each[1]]
    learned = generations.settings(config, learned=True)[3]
    assert learned.learned and learned.threshold is None and learned.steps == 0 and learned.block_length == 4


def test_a_threshold_learned_for_another_rule_is_no_setting():
    config = configuration(**{"eval.rule": "threshold", "sampler.rule": "entropy_bounded"})
    assert names(config, learned=True) == ["L8-threshold-g0.5"]


def test_no_blocks_means_one_block():
    (setting,) = generations.settings(configuration(**{"eval.block_length": 0, "eval.tokens_per_step": 8}), learned=False)
    assert (setting.block_length, setting.steps) == (8, 1)


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"eval.lengths": ()}, ["eval.lengths is empty"]),
        ({"eval.rule": "best", "eval.repeats": 3}, ["eval.rule = 'best' is unknown; known: low_confidence,", "eval.repeats = 3"]),
        ({"eval.lengths": (8, 6, -4)}, ["6 is not a multiple of eval.block_length = 4", "eval.lengths: -4 must be at least 1"]),
        ({"eval.tokens_per_step": 3}, ["blocks of 4 tokens are not a multiple of eval.tokens_per_step = 3"]),
        ({"eval.tokens_per_step": 0}, ["eval.tokens_per_step = 0"]),
    ],
)
def test_settings_that_cannot_run(fields, messages):
    with pytest.raises(ValueError) as error:
        generations.settings(configuration(**fields), learned=False)
    for message in messages:
        assert message in str(error.value)


# --- generating ---


def by_hand(index, prefill="", **options):
    """The trajectory of one problem alone."""
    ids = TOKENIZER.encode(PROBLEMS[index]["prompt"] + prefill)
    prompt = np.array([[0] * (6 - len(ids)) + ids], np.int32)
    options = {"length": 8, "block_length": 4, "eos_id": 1, "temperature": 1.0} | options
    return denoise(POLICY, PARAMS, prompt, prompt > 0, jax.random.clone(KEY), row_ids=np.array([index], np.int32), **options)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_a_file_holds_what_the_sampler_gives_each_problem_alone(tmp_path, batch_size):
    (row,) = generations.run(parts(**{"eval.batch_size": batch_size}), PARAMS, tmp_path, "step-3")
    header, lines = read(tmp_path / "L8-low_confidence-S4.jsonl")
    assert header == {
        "task": "letters", "problems": 5, "checkpoint": "step-3", "setting": "L8-low_confidence-S4", "length": 8,
        "rule": "low_confidence", "threshold": None, "steps": 4, "learned": False, "block_length": 4, "temperature": 1.0, "prefill": "",
        "cache": "none", "refresh": 0, "eos_early_stop": True, "seed": 0, "d1_faithful": False,
    }  # fmt: skip
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4]
    for line, problem in zip(lines, PROBLEMS, strict=True):
        trajectory = by_hand(line["index"], rule="low_confidence", steps=4)
        tokens = np.asarray(trajectory.tokens)[0].tolist()
        ended = tokens.index(1) if 1 in tokens else 8
        text = "".join("abcd"[token - 3] for token in tokens[:ended] if token >= 3)
        assert line == {
            "index": line["index"], "prompt": problem["prompt"], "generation": text, "extracted": text[-1:] or None,
            "verdict": int(text.count(problem["answer"]) >= 2),
            "components": {"letters": 0.5 * text.count(problem["answer"]), "brief": -0.125 * len(text)},
            "published_score": len(text) / 8, "nfe": int(trajectory.nfe[0]), "tokens": min(ended + 1, 8), "threshold": None,
        }  # fmt: skip
    assert len({line["generation"] for line in lines}) == 5 and {line["verdict"] for line in lines} == {0, 1}
    assert any(line["tokens"] < 8 for line in lines)  # some end early
    assert row["problems"] == 5 and row["accuracy"] == np.mean([line["verdict"] for line in lines])


def test_thresholds_given_and_learned(tmp_path):
    run_parts = parts(**{"eval.rule": "entropy_bounded", "eval.thresholds": (0.05, 2.5)})
    rows = generations.run(run_parts, PARAMS, tmp_path, "step-3", HEAD_PARAMS)
    assert [row["setting"] for row in rows] == [f"L8-entropy_bounded-{dial}" for dial in ("g0.05", "g2.5", "learned")]
    choices = [{"threshold": 0.05}, {"threshold": 2.5}, {"threshold_fn": HEAD.mode, "threshold_params": HEAD_PARAMS}]
    for row, choice in zip(rows, choices, strict=True):
        _, lines = read(tmp_path / f"{row['setting']}.jsonl")
        for line in lines:
            trajectory = by_hand(line["index"], rule="entropy_bounded", **choice)
            assert line["generation"] == TOKENIZER.decode(trajectory.tokens[0]) and line["nfe"] == trajectory.nfe[0]
            gamma = choice["threshold"] if "threshold" in choice else float(trajectory.draw.gamma[0])
            assert line["threshold"] == pytest.approx(gamma, rel=1e-5)
        assert row["threshold"] == pytest.approx(np.mean([line["threshold"] for line in lines]))
    learned = read(tmp_path / "L8-entropy_bounded-learned.jsonl")[1]
    assert len({line["threshold"] for line in learned}) == 5  # each prompt its own
    assert rows[0]["nfe"] > rows[1]["nfe"]


def test_the_prefill_is_read_by_the_model_and_by_the_verifier(tmp_path):
    generations.run(parts(**{"eval.prefill": "dc"}), PARAMS, tmp_path, "base")
    header, lines = read(tmp_path / "L8-low_confidence-S4.jsonl")
    assert header["prefill"] == "dc"
    for line, problem in zip(lines, PROBLEMS, strict=True):
        trajectory = by_hand(line["index"], "dc", rule="low_confidence", steps=4)
        assert line["generation"] == "dc" + TOKENIZER.decode(trajectory.tokens[0])
        assert line["components"]["letters"] == 0.5 * line["generation"].count(problem["answer"])


def test_without_extraction_or_published_score(tmp_path):
    task = dataclasses.replace(TASK, extract=None, published_score=None)
    (row,) = generations.run(parts(task=task), PARAMS, tmp_path, "base")
    _, lines = read(tmp_path / "L8-low_confidence-S4.jsonl")
    assert all(line["extracted"] == line["generation"] and "published_score" not in line for line in lines)
    assert row["published_score"] is None and row["threshold"] is None


def test_a_length_is_compiled_once_for_all_its_thresholds(tmp_path):
    fields = {"eval.rule": "entropy_bounded", "eval.lengths": (12,), "eval.thresholds": (0.5, 1.0, 2.0)}
    before = denoise_module._denoise._cache_size()
    generations.run(parts(**fields), PARAMS, tmp_path, "base", HEAD_PARAMS)
    assert denoise_module._denoise._cache_size() - before == 2  # and once for the learned ones; three batches each


# --- resuming ---


def failing(*args, **kwargs):
    raise AssertionError("nothing should be generated")


@pytest.mark.parametrize("cut_at", [0, 1, 3])
def test_an_interrupted_file_is_continued(tmp_path, cut_at):
    path = tmp_path / "L8-low_confidence-S4.jsonl"
    generations.run(parts(), PARAMS, tmp_path, "step-3")
    header, whole = read(path)
    kept = path.read_text().splitlines(keepends=True)[: cut_at + 1]
    path.write_text("".join(kept) + '{"index": 4, "pro')  # the half line of a process that was killed
    generations.run(parts(**{"eval.batch_size": 4}), PARAMS, tmp_path, "step-3")
    assert read(path) == (header, whole)
    assert path.read_text().splitlines(keepends=True)[: cut_at + 1] == kept  # times included: they were not made again


def test_every_batch_is_on_disk_when_it_is_done(tmp_path):
    path, seen = tmp_path / "L8-low_confidence-S4.jsonl", []

    def stop():
        seen.append(len(path.read_text().splitlines()))
        if len(seen) == 2:
            raise SystemExit(0)

    with pytest.raises(SystemExit):
        generations.run(parts(), PARAMS, tmp_path, "step-3", after_batch=stop)
    assert seen == [3, 5] and not (tmp_path / "table.json").exists()
    generations.run(parts(), PARAMS, tmp_path, "step-3", after_batch=stop)
    assert seen == [3, 5, 6] and len(path.read_text().splitlines()) == 6


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    once = generations.run(parts(), PARAMS, tmp_path, "step-3")
    monkeypatch.setattr(rollout, "denoise", failing)
    assert generations.run(parts(), PARAMS, tmp_path, "step-3") == once
    assert json.loads((tmp_path / "table.json").read_text())["settings"] == once


def test_the_first_problems_alone_and_then_the_others(tmp_path):
    path = tmp_path / "L8-low_confidence-S4.jsonl"
    (few,) = generations.run(parts(**{"eval.limit": 3}), PARAMS, tmp_path, "step-3")
    _, lines = read(path)
    assert [line["index"] for line in lines] == [0, 1, 2] and few["problems"] == 3
    (every,) = generations.run(parts(**{"eval.limit": 9}), PARAMS, tmp_path, "step-3")
    assert read(path)[1][:3] == lines and every["problems"] == 5
    assert generations.run(parts(**{"eval.limit": 3}), PARAMS, tmp_path, "step-3") == [few]  # of these three alone, again
    assert few["nfe"] == np.mean([line["nfe"] for line in lines])


OTHERS = {  # what differs -> (how, what the message must say)
    "checkpoint": ({"checkpoint": "step-4"}, "checkpoint: step-3 -> step-4"),
    "temperature": ({"eval.temperature": 0.0}, "temperature: 1.0 -> 0.0"),
    "blocks": ({"eval.block_length": 8}, "block_length: 4 -> 8"),
    "prefill": ({"eval.prefill": "a"}, "prefill:  -> a"),
    "seed": ({"seed": 1}, "seed: 0 -> 1"),
    "number of problems": ({"problems": PROBLEMS[:4]}, "problems: 5 -> 4"),
    "task": ({"task": dataclasses.replace(TASK, name="words")}, "task: letters -> words"),
    "another problem": ({"problems": [*PROBLEMS[:4], {"prompt": "d", "answer": "a"}]}, "its problem 4 is not that of the test split: 'a'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_made_with_something_else_is_refused_and_kept(tmp_path, monkeypatch, name):
    path, (fields, message) = tmp_path / "L8-low_confidence-S4.jsonl", dict(OTHERS)[name]
    generations.run(parts(), PARAMS, tmp_path, "step-3")
    before = path.read_bytes()
    monkeypatch.setattr(rollout, "denoise", failing)
    fields = dict(fields)
    checkpoint = fields.pop("checkpoint", "step-3")
    lengths = {"eval.lengths": (16, 8)}  # the other length would come first
    with pytest.raises(ValueError) as error:
        generations.run(parts(**fields, **lengths), PARAMS, tmp_path, checkpoint)
    assert message in str(error.value) and str(path) in str(error.value) and f"move {path} away" in str(error.value)
    assert path.read_bytes() == before


HEADER = {
    "task": "letters", "setting": "S", "length": 8, "rule": "r", "threshold": None, "steps": 4, "learned": False, "block_length": 4,
    "temperature": 0.0,
}  # fmt: skip
LINES = [
    {"index": 0, "prompt": "ab", "generation": "aa", "verdict": 1, "components": {"letters": 1.0}, "nfe": 4, "tokens": 3, "seconds": 0.5},
    {"index": 1, "prompt": "c", "generation": "bdb", "verdict": 0, "components": {"letters": 1.0}, "nfe": 2, "tokens": 4, "seconds": 0.25},
    {"index": 3, "prompt": "bbb", "generation": "d", "verdict": 1, "components": {"letters": 0.5}, "nfe": 2, "tokens": 2, "seconds": 0.25},
]
FILE = [json.dumps(line) for line in (HEADER, *LINES)]
DAMAGED = {
    "not JSON": (2, FILE[2][:30], "not JSON"),
    "no object": (1, "3", "it is no JSON object"),
    "empty": (2, "", "not JSON"),
    "bytes": (1, "\udcff", "not JSON"),
    "fields": (2, '{"index": 1, "verdict": 1}', "prompt, generation, components, nfe, tokens, seconds missing"),
    "type": (1, FILE[1].replace('"aa"', "7"), "field 'generation' cannot be 7"),
    "index": (1, FILE[1].replace('"index": 0', '"index": -1'), "field 'index' cannot be -1"),
    "twice": (2, FILE[1], "problem 0 occurs a second time"),
    "header": (0, FILE[1], "task, setting, length, rule, threshold, steps, learned, block_length, temperature missing"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_is_named(tmp_path, name):
    at, text, message = DAMAGED[name]
    path = tmp_path / "file.jsonl"
    content = "".join(f"{line}\n" for line in [*FILE[:at], text, *FILE[at + 1 :]]).encode(errors="surrogateescape")
    path.write_bytes(content)
    for read_it in (lambda: generations.score_file(TASK, PROBLEMS, path), lambda: generations.open_file(path, {}, PROBLEMS)):
        with pytest.raises(ValueError) as error:
            read_it()
        assert f"{path}:{at + 1}: " in str(error.value) and message in str(error.value)
    assert path.read_bytes() == content


def test_an_empty_file_is_no_file_of_generations(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text("half a header")
    with pytest.raises(ValueError, match="file.jsonl:1: not a file of generations"):
        generations.open_file(path, {}, PROBLEMS)
    assert path.read_text() == "half a header"


# --- scoring again, the table ---


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text("".join(f"{line}\n" for line in FILE))
    return path


def test_scoring_again_by_hand(stored):
    """Verdicts in the file: 1, 0, 1. The verifier says: 'aa' has a twice, 'bdb' has b twice, 'd' has d once: 1, 1, 0."""
    before = stored.read_bytes()
    result = generations.score_file(TASK, PROBLEMS, stored)
    assert (result["to_right"], result["to_wrong"]) == (1, 1)
    assert (result["setting"], result["length"], result["problems"]) == ("S", 8, 3)
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["nfe"] == pytest.approx(8 / 3) and result["tokens_per_call"] == pytest.approx(9 / 8) and result["seconds"] == 1.0
    assert result["components"] == pytest.approx({"letters": (1.0 + 1.0 + 0.5) / 3, "brief": -0.125 * (2 + 3 + 1) / 3})
    assert result["published_score"] == pytest.approx((2 + 3 + 1) / 24)
    assert stored.read_bytes() == before


def test_problems_are_found_by_prompt_where_the_indices_have_moved(stored):
    """With a split from which nothing was dropped: two problems stand before those of the file."""
    source = [{"prompt": "dddddddd", "answer": "d"}, {"prompt": "cccccccc", "answer": "c"}, *PROBLEMS]
    assert generations.score_file(TASK, source, stored) == generations.score_file(TASK, PROBLEMS, stored)
    assert generations.score_file(TASK, PROBLEMS[::-1], stored) == generations.score_file(TASK, PROBLEMS, stored)


@pytest.mark.parametrize(
    ("task", "problems", "message"),
    [
        (TASKS["sudoku"], PROBLEMS, "generations for the task 'letters', not 'sudoku'"),
        (TASK, PROBLEMS[:3], "its problem 3 is not in the test split of letters: 'bbb'"),
    ],
)
def test_generations_for_something_else_are_not_scored(stored, task, problems, message):
    with pytest.raises(ValueError, match=message):
        generations.score_file(task, problems, stored)


def test_a_file_cut_short_or_absent_is_not_scored(stored):
    with pytest.raises(FileNotFoundError, match="no file of generations .*other.jsonl"):
        generations.score_file(TASK, PROBLEMS, stored.with_name("other.jsonl"))
    stored.write_text("\n".join([*FILE[:3], FILE[3][:50]]))
    with pytest.raises(ValueError, match="file.jsonl:4: not JSON"):
        generations.score_file(TASK, PROBLEMS, stored)
    stored.write_text(f"{FILE[0]}\n")
    with pytest.raises(ValueError, match="holds no generations"):
        generations.score_file(TASK, PROBLEMS, stored)


def test_what_run_wrote_scores_as_it_did(tmp_path):
    (row,) = generations.run(parts(), PARAMS, tmp_path, "step-3")
    again = generations.score_file(TASK, PROBLEMS, tmp_path / "L8-low_confidence-S4.jsonl")
    assert again == row | {"to_right": 0, "to_wrong": 0}


def test_the_table(stored):
    first = generations.summarise(HEADER, [line | {"verdict": 1} for line in LINES])
    assert first["interval"] == [1.0, 1.0] and first["published_score"] is None
    second = generations.summarise(HEADER | {"setting": "T"}, [LINES[1] | {"threshold": 0.25, "components": {"tags": 0.5}}])
    assert (second["accuracy"], second["threshold"], second["components"]) == (0.0, 0.25, {"tags": 0.5})
    console = Console(width=200, file=io.StringIO())
    console.print(generations.table([first, second], "letters, step 3"))
    shown = [line.strip("┃│ ") for line in console.file.getvalue().splitlines() if line.startswith(("┃", "│"))]
    cells = [[cell.strip() for cell in line.replace("┃", "│").split("│")] for line in shown]
    assert cells[0] == ["setting", "problems", "accuracy (95%)", "NFE", "tokens/call", "seconds", "threshold", "letters", "tags"]
    assert cells[1][:7] == ["S", "3", "100.0% (100.0-100.0)", "2.67", "1.12", "1.0", ""] and cells[1][7:] == ["0.833"]  # no tags there
    assert cells[2] == ["T", "1", "0.0% (0.0-0.0)", "2.00", "2.00", "0.2", "0.25", "", "0.5"]
