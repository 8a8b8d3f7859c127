"""Files that were cut short, changed or are something else: readers say which file it is, or read it; they never run what is in it."""

import ast
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diffpo_jax
from diffpo_jax import checkpoint, experiment_results, generations, metrics
from diffpo_jax.models import adapters, pretrained
from diffpo_jax.models.lora import Trainable
from diffpo_jax.models.threshold_head import ThresholdHead
from diffpo_jax.tasks import TASKS
from diffpo_jax.tokenizer import load_tokenizer
from tests import published_model

TOKENS = (b"null", b"{}", b"[]", b"5", b'"x"', b"-1", b"1.5", b"NaN", b"true", b"1e999", b"[" * 2000)
IDS = {"mask_id": published_model.MASK, "eos_id": published_model.EOS, "pad_id": published_model.EOS, "vocab_size": published_model.VOCAB}


@st.composite
def damaged(draw, content: bytes, within: int | None = None):
    """`content` cut short, with bits flipped, or with another JSON value in one place; bits among the first `within` bytes."""
    positions = st.integers(0, min(len(content), within or len(content)) - 1)
    how = draw(st.sampled_from(("cut", "bits", "value")))
    if how == "cut":
        return content[: draw(positions)]
    if how == "bits":
        changed = bytearray(content)
        for position in draw(st.lists(positions, min_size=1, max_size=3)):
            changed[position] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    spans = [match.span() for match in re.finditer(rb'"[^"]*"|\d+|[{\[]', content)]
    start, end = draw(st.sampled_from(spans or [(0, len(content))]))
    return content[:start] + draw(st.sampled_from(TOKENS)) + content[end:]


def check(path: Path, read, examples: int = 50, within: int | None = None, name: str | None = None) -> None:
    """`read()` of damaged contents of `path` returns, or raises a ValueError or OSError that names the file (or `name`)."""
    content, outcomes = path.read_bytes(), set()

    @settings(deadline=None, max_examples=examples, derandomize=True, database=None)
    @given(damaged(content, within))
    def one(changed):
        path.write_bytes(changed)
        try:
            read()
            outcomes.add("read")
        except (ValueError, OSError) as error:
            assert (name or str(path)) in str(error)
            outcomes.add("said")

    try:
        read()
        one()
    finally:
        path.write_bytes(content)
    assert "said" in outcomes


# --- published models ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return published_model.write_model(tmp_path_factory.mktemp("published") / "model")


def test_safetensors(model):
    file = model / "model.safetensors"
    check(file, lambda: pretrained.load_pretrained(model), examples=25, within=3000, name=str(model))


def test_configuration_of_a_model(model):
    check(model / "config.json", lambda: (pretrained.read_config(model), pretrained.read_special_ids(model)), examples=200)


def test_index_of_shards(model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name.replace("model.", "a.")).write_bytes((model / name).read_bytes())
    names = pretrained.tensor_table("llada", pretrained.read_config(model))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(list(names)[:3], "a.safetensors")}))
    check(index, lambda: pretrained.load_pretrained(tmp_path), examples=20, name=str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(model, name):
    check(model / name, lambda: load_tokenizer(str(model), **IDS), name=str(model))


def test_adapter_and_threshold_network(model, tmp_path):
    policy, params = pretrained.load_pretrained(model)
    trainable = Trainable(2, 4.0, 0.0, ("q_proj",))
    adapters.save_adapter(tmp_path / "adapter", trainable, trainable.init(jax.random.key(0), params), "llada", "base")
    for name in (adapters.ADAPTER, adapters.ADAPTER_CONFIG):
        read = lambda: adapters.load_adapter(tmp_path / "adapter", policy, "llada")  # noqa: E731
        check(tmp_path / "adapter" / name, read, examples=25, within=600, name=str(tmp_path))
    head = ThresholdHead(4, 0.1, 8.0, 1.0, 1.0)
    adapters.save_threshold_head(tmp_path / "head", {"hidden": 4}, head.init(jax.random.key(0), 8))
    for name in (adapters.HEAD, adapters.HEAD_CONFIG):
        read = lambda: adapters.load_threshold_head(tmp_path / "head")  # noqa: E731
        check(tmp_path / "head" / name, read, examples=25, within=600, name=str(tmp_path))


# --- data ---

PUBLISHED = {  # task -> (file, rows)
    "gsm8k": ("test.jsonl", {"question": "q", "answer": "x\n#### 5"}),
    "math500": ("test.jsonl", {"problem": "p", "solution": "s", "answer": "5"}),
    "countdown_cd3": ("countdown_cd3_test.jsonl", {"input": "3,4,5", "output": "12"}),
}
PARQUET = {
    "gsm8k": ("train.parquet", {"question": "q", "answer": "x\n#### 5"}),
    "math500": ("train.parquet", {"prompt": [{"role": "user", "content": "x"}], "reward_model": {"ground_truth": "5"}}),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_json_lines(tmp_path, task):
    name, row = PUBLISHED[task]
    (tmp_path / name).write_text(f"{json.dumps(row)}\n" * 3)
    check(tmp_path / name, lambda: list(TASKS[task].read(str(tmp_path), "test", False)), examples=150)


@pytest.mark.parametrize("task", PARQUET)
def test_published_parquet(tmp_path, task):
    name, row = PARQUET[task]
    pq.write_table(pa.Table.from_pylist([row] * 3), tmp_path / name)
    check(tmp_path / name, lambda: list(TASKS[task].read(str(tmp_path), "train", False)), examples=150)


def test_published_csv(tmp_path):
    (tmp_path / "4x4_test_sudoku.csv").write_text("Puzzle,Solution\n" + "3102200002100320,3142243142131324\n" * 3)
    check(tmp_path / "4x4_test_sudoku.csv", lambda: list(TASKS["sudoku_4x4"].read(str(tmp_path), "test", False)), examples=100)


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("gsm8k", {"question": None, "answer": "#### 5"}, "row 2: question must be text, not None"),
        ("gsm8k", {"question": "q", "answer": 5}, "row 2: answer must be text, not 5"),
        ("math500", {"problem": 3, "solution": "", "answer": "5"}, "row 2: problem must be text, not 3"),
        ("math500", {"problem": "p", "solution": 3, "answer": "5"}, "row 2: solution must be text, not 3"),
        ("math500", {"problem": "p", "solution": "", "answer": [5]}, r"row 2: answer must be text, not \[5\]"),
        ("countdown_cd3", {"input": "3,4,5", "output": 12.5}, r"row 2: \[12.5\] are no integers"),
        ("countdown_cd3", {"input": "3,4,5", "output": float("inf")}, r"row 2: \[inf\] are no integers"),
    ],
)
def test_values_that_are_no_text_or_no_integers(tmp_path, task, row, said):
    name, good = PUBLISHED[task]
    (tmp_path / name).write_text("".join(f"{json.dumps(each)}\n" for each in (good, row)))
    with pytest.raises(ValueError, match=f"{name}, {said}$"):
        list(TASKS[task].read(str(tmp_path), "test", False))


def test_answers_that_are_numbers_or_missing(tmp_path):
    rows = ({"problem": "p", "solution": None, "answer": answer} for answer in (7, 0.5, None))
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    problems = list(TASKS["math500"].read(str(tmp_path), "test", False))
    assert [json.loads(problem.answer)["answer"] for problem in problems] == ["7", "0.5"]


# --- what runs write ---

HEADER = {"task": "sudoku", "setting": "L16", "length": 16, "rule": "margin", "threshold": None, "steps": 8, "learned": False,
          "block_length": 16, "temperature": 0.0}  # fmt: skip
LINE = {"index": 0, "prompt": "." * 16, "generation": "1234", "extracted": "1234", "verdict": 0, "components": {"dense": 0.0}, "nfe": 3,
        "tokens": 4, "seconds": 0.1, "threshold": None}  # fmt: skip


def test_generations(tmp_path):
    file = tmp_path / "L16.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in (HEADER, LINE, LINE | {"index": 1})))
    source = [{"prompt": "." * 16, "answer": json.dumps({"puzzle": "." * 16})}] * 2
    check(file, lambda: generations.score_file(TASKS["sudoku"], source, file), examples=200)
    whole = file.read_bytes()
    for end in range(len(whole)):  # as a killed process leaves it
        file.write_bytes(whole[:end])
        if whole[:end].count(b"\n"):
            _, lines, size = generations.read_file(file, cut_short=True)
            assert list(lines) == [0, 1][: whole[:end].count(b"\n") - 1] and whole[:size].endswith(b"\n")
        else:
            with pytest.raises(ValueError, match="not a file of generations"):
                generations.read_file(file, cut_short=True)


def test_metrics_keep_their_whole_lines(tmp_path):
    lines = [json.dumps({"phase": "rl", "step": step, "loss": 0.5}) for step in range(4)]
    content, path = "\n".join(lines).encode() + b"\n", tmp_path / "metrics.jsonl"

    @settings(deadline=None, max_examples=100, derandomize=True, database=None)
    @given(damaged(content))
    def one(changed):
        path.write_bytes(changed)
        writer = metrics.Writer(tmp_path)
        writer.truncate("rl", 2)
        writer.close()
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(isinstance(line["phase"], str) and (line["phase"] != "rl" or line["step"] <= 2) for line in kept)
        untouched = [line for line in lines[:3] if line.encode() in changed.split(b"\n")]
        assert [line for line in path.read_text().splitlines() if line in lines] == untouched

    one()
    for other in ("5", "[]", "{}", '{"phase": "rl"}', '{"phase": 3, "step": 1}', '{"phase": "rl", "step": "one"}', "[" * 100_000):
        path.write_text(f"{lines[0]}\n{other}\n{lines[1]}\n")
        metrics.Writer(tmp_path).close()
        assert path.read_text().splitlines() == lines[:2]


def test_results_of_experiments_keep_their_whole_lines(tmp_path):
    path, cells = tmp_path / "main.jsonl", [{"suite": "main", "seed": seed} for seed in range(2)]
    lines = [json.dumps({"cell": cell, "status": "done"}) for cell in cells]
    for other in (b"5", b"[]", b"{}", b'{"cell": 3}', b'{"cell"', b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(b"\n".join([lines[0].encode(), other, lines[1].encode()]) + b"\n")
        assert list(experiment_results.read(path)) == [experiment_results.cell_key(cell) for cell in cells]


@pytest.mark.slow
def test_checkpoints(tmp_path):
    state = {"params": {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(5)}, "step": jnp.asarray(3)}
    checkpoints = checkpoint.open_manager(tmp_path / "rl")
    checkpoint.save(checkpoints, 3, state)
    checkpoint.close(checkpoints)

    def read():
        opened = checkpoint.open_manager(tmp_path / "rl", read_only=True)
        checkpoint.restore(opened, None, checkpoint.abstract(state))

    for path in sorted(path for path in (tmp_path / "rl" / "3").rglob("*") if path.is_file()):
        content = path.read_bytes()
        for changed in (content[: len(content) // 2], b""):
            path.write_bytes(changed)
            try:
                read()
            except (ValueError, OSError, RuntimeError) as error:
                assert str(tmp_path / "rl") in str(error)
        path.write_bytes(content)
    read()


# --- nothing that is read is run ---

RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "torch", "marshal", "shelve"}


def calls_and_imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_reader_runs_code():
    files = sorted(Path(diffpo_jax.__file__).parent.rglob("*.py"))
    assert len(files) > 30
    for path in files:
        for name, node in calls_and_imports(path):
            where = f"{path}:{node.lineno}: {name}"
            assert name not in RUNS_CODE and name not in ("eval", "exec"), where
            assert not name.endswith(("torch.load", "read_pickle")), where
            if name in ("np.load", "numpy.load", "jnp.load"):
                allowed = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert allowed.get("allow_pickle") == "False", where
            assert "trust_remote_code" not in {keyword.arg for keyword in getattr(node, "keywords", ())}, where
