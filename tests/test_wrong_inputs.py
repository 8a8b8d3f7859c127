"""Wrong inputs on the command line: each is one clear message, exit code 2 and no traceback."""

import fcntl
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile

import jax
import pytest

from configs import default, sudoku
from diffpo_jax import checkpoint
from diffpo_jax.build import own_policy
from tests import published_model, runs

MAIN, PLAN, STUDY = "diffpo_jax.main", "diffpo_jax.plan", "diffpo_jax.study"
EXPERIMENTS, LM_EVAL = "diffpo_jax.experiments", "diffpo_jax.lm_eval"
SUDOKU, PUBLISHED = "--config=configs/sudoku.py:debug", "--config=configs/math.py:published_debug"
FIELD = "--config."
CASES = {}  # name -> (function of the folder of inputs -> command, what standard error must say, whether it takes seconds)
MADE_FIRST = ("prompt length", "another task's vocabulary", "mesh", "missing model", "no model")  # a workdir, locked
HELD = []  # files that stay open
FOLDERS = tempfile.TemporaryDirectory()


def case(name, *said, slow=False):
    """A case whose command's flags the function returns; {0} in `said` stands for the folder of inputs."""

    def add(function):
        CASES[name] = function, said, slow

    return add


def main(name, *said, slow=False):
    """A case of the main command, without inputs of its own, in a workdir that is not there."""
    return lambda *flags: case(name, *said, slow=slow)(lambda folder: [MAIN, f"--workdir={folder}/new", *flags])


# --- flags and the configuration ---

main("positional junk", "unknown arguments: train now")(SUDOKU, "train", "now")
main("unknown flag", "Unknown command line flag 'workdirr'")(SUDOKU, "--workdirr=x")
main("unknown mode", "--mode=play: value should be one of <train|sft|eval|")(SUDOKU, "--mode=play")
main("no configuration", "--config must have a value")()
main("fields without a configuration", "--config must have a value")(f"{FIELD}rl.steps=3")
main("missing configuration, with a field", "configs/nosuch.py: there is no such file")("--config=configs/nosuch.py", f"{FIELD}rl.steps=3")
main("missing configuration", "--config=configs/nosuch.py: there is no such file")("--config=configs/nosuch.py")
main("a folder as configuration", "--config=configs: there is no such file")("--config=configs")
main("unknown preset", "configs/sudoku.py has no preset 'huge'; known: tiny, small")("--config=configs/sudoku.py:huge")
main("unknown field", f"there is no field config.rl.stepz; where 'stepz' stands are known: {', '.join(default.get_config().rl)}")(
    SUDOKU, f"{FIELD}rl.stepz=3"
)
main("unknown section", f"there is no field config.rll.steps; where 'rll' stands are known: {', '.join(default.get_config())}")(
    SUDOKU, f"{FIELD}rll.steps=3"
)
main("below a field", "no field config.rl.steps.more: config.rl.steps has a value, and no")(SUDOKU, f"{FIELD}rl.steps.more=3")
main("unknown choice", "rl.mode = 'both' is unknown; known: joint, model, sampler")(SUDOKU, f"{FIELD}rl.mode=both")
main("unknown algorithm", "algorithm = 'ppo' is unknown; known: d1, ")(SUDOKU, f"{FIELD}algorithm=ppo")
main("text for an integer", "--config.rl.steps=many: invalid literal for int()")(SUDOKU, f"{FIELD}rl.steps=many")
main("fraction for an integer", "--config.rl.steps=2.5: invalid literal for int()")(SUDOKU, f"{FIELD}rl.steps=2.5")
main("text for a number", "--config.rl.kl_weight=low: could not convert")(SUDOKU, f"{FIELD}rl.kl_weight=low")
main("text for a flag", "--config.task.dense_reward=maybe", "Non-boolean")(SUDOKU, f"{FIELD}task.dense_reward=maybe")
main("text in a tuple", "eval.thresholds = ('low',) must be a tuple, each entry a finite number")(SUDOKU, f"{FIELD}eval.thresholds=low")
main("syntax in a tuple", "eval.thresholds")(SUDOKU, f"{FIELD}eval.thresholds=(0.1,")
main("not a number", "rl.kl_weight = nan must be a finite number")(SUDOKU, f"{FIELD}rl.kl_weight=nan")
main("infinite", "rl.learning_rate = inf must be a finite number")(SUDOKU, f"{FIELD}rl.learning_rate=inf")
main("out of range", "cannot run:\n  rl.group_size = 1 must be at least 2 (advantages")(SUDOKU, f"{FIELD}rl.group_size=1")
main("negative rate", "sft.learning_rate = -0.1 must be positive")(SUDOKU, f"{FIELD}sft.learning_rate=-0.1")
main("repeated threshold", "eval.thresholds = (0.1, 0.1) has a threshold more than once")(SUDOKU, f"{FIELD}eval.thresholds=(0.1,0.1)")
main("across fields", "task.response_length = 16 is not a multiple of sampler.block_length = 5")(SUDOKU, f"{FIELD}sampler.block_length=5")
main("order of bounds", "sudoku.clues_min = 9 is more than sudoku.clues_max = 2")(SUDOKU, f"{FIELD}sudoku.clues_min=9")
main("thresholds out of order", "gamma_min = 0.02, gamma_init = 9.0, gamma_max = 8.0")(SUDOKU, f"{FIELD}threshold_network.gamma_init=9.0")
main("heads", "model.width = 32 must be a multiple of 2 * model.heads = 10")(SUDOKU, f"{FIELD}model.heads=5", f"{FIELD}model.kv_heads=5")
main("another task's vocabulary", "model.vocab_size", "countdown has 21 and 2")(SUDOKU, f"{FIELD}task.name=countdown")
main("d1's code", "'sudoku' is not a task of the released d1 code")(SUDOKU, f"{FIELD}data.d1_faithful=True")
main("mesh", "mesh.data = 99, mesh.fsdp = 1, mesh.tensor = 1 makes 99 devices")(SUDOKU, f"{FIELD}mesh.data=99")
main("prompt length", "task.prompt_length is 3; raise it", slow=True)(SUDOKU, f"{FIELD}task.prompt_length=3")
main("address", "distributed.coordinator = 'host' must be HOST:PORT")(
    SUDOKU, f"{FIELD}distributed.initialize=True", f"{FIELD}distributed.coordinator=host"
)


@case("several fields", "the configuration cannot run:\n  rl.prompts = 0 must be at least 1\n  sft.steps = 0 must be at least 1\n")
def _(folder):
    return [MAIN, SUDOKU, f"--workdir={folder}/new", f"{FIELD}sft.steps=0", f"{FIELD}rl.prompts=0"]


def config_file(name, text, *said):
    @case(name, *said)
    def command(folder):
        file = folder / "own.py"
        file.write_text(f"from configs import sudoku\ndef get_config(preset='debug'):\n    c = sudoku.get_config(preset)\n{text}")
        return [MAIN, f"--config={file}", f"--workdir={folder}/run"]


config_file("syntax of the configuration", "    c.rl.steps = = 3\n    return c\n", "{0}/own.py, line 4: SyntaxError: invalid syntax")
config_file("type in the configuration", "    c.rl.steps = 'many'\n    return c\n", "{0}/own.py, line 4: TypeError: ", "steps")
config_file("field in the configuration", "    c.rl.lock()\n    c.rl.stepz = 3\n    return c\n", "{0}/own.py, line 5: ", "stepz")
config_file("new field in the configuration", "    c.rl.stepz = 3\n    return c\n", "there is no field rl.stepz")
config_file("configuration that divides by 0", "    c.rl.steps = 1 // 0\n    return c\n", "{0}/own.py, line 4: ZeroDivisionError")
config_file("configuration that returns nothing", "    pass\n", "{0}/own.py")


# --- workdirs and checkpoints ---


@case("file as workdir", "{0}/run cannot hold a run (File exists)", "use another --workdir")
def _(folder):
    (folder / "run").write_text("")
    return [MAIN, SUDOKU, f"--workdir={folder}/run"]


@case("workdir below a file", "{0}/run/deep cannot hold a run (Not a directory)", "use another --workdir")
def _(folder):
    (folder / "run").write_text("")
    return [MAIN, SUDOKU, f"--workdir={folder}/run/deep"]


@case("unwritable workdir", "/proc/run cannot hold a run", "use another --workdir")
def _(folder):
    return [MAIN, SUDOKU, "--workdir=/proc/run"]


@case("unwritable folder of checkpoints", "/proc/run cannot hold a run", "use another --workdir or checkpoint_dir")
def _(folder):
    return [MAIN, SUDOKU, f"--workdir={folder}/run", f"{FIELD}checkpoint_dir=/proc/run"]


@case("workdir of another configuration", "{0}/run holds a run with another configuration", "rl.steps: 9 -> 6", "another --workdir")
def _(folder):
    config = sudoku.get_config("debug")
    config.rl.steps = 9
    checkpoint.check_workdir(folder / "run", config)
    (folder / "run" / "sft" / "40").mkdir(parents=True)  # something was made of it
    return [MAIN, SUDOKU, f"--workdir={folder}/run"]


@case("damaged config.json of a workdir", "{0}/run/config.json is damaged (", "put a copy of it back")
def _(folder):
    (folder / "run" / "sft" / "40").mkdir(parents=True)
    (folder / "run" / "config.json").write_text('{"seed": 0,')
    return [MAIN, SUDOKU, f"--workdir={folder}/run"]


@case("nothing to evaluate", "no checkpoint folder {0}/run/checkpoints: check the path, or train first")
def _(folder):
    return [MAIN, SUDOKU, f"--workdir={folder}/run", "--mode=eval"]


@case("nothing to serve", "no checkpoint folder {0}/run/checkpoints: check the path, or train first")
def _(folder):
    return [MAIN, SUDOKU, f"--workdir={folder}/run", "--mode=serve"]


@case("nothing to sample", "no checkpoint folder {0}/run/checkpoints: check the path, or train first")
def _(folder):
    return [MAIN, SUDOKU, f"--workdir={folder}/run", "--mode=sample"]


@case("nothing to export", "--mode=export", "model.pretrained")
def _(folder):
    return [MAIN, SUDOKU, f"--workdir={folder}/run", "--mode=export"]


@case("workdir in use", "{0}/run is in use by process 12345: wait for it, stop it, or use another --workdir")
def _(folder):
    (folder / "run").mkdir()
    HELD.append(open(folder / "run" / ".lock", "w"))
    fcntl.flock(HELD[-1], fcntl.LOCK_EX)
    HELD[-1].write("12345\n")
    HELD[-1].flush()
    return [MAIN, SUDOKU, f"--workdir={folder}/run"]


def base_model(folder, **fields):
    """Checkpoints of a base model as the preset's, but for `fields` of the model."""
    config = sudoku.get_config("debug")
    config.model.update(fields)
    checkpoints = checkpoint.open_manager(folder)
    checkpoint.save(checkpoints, 40, {"params": own_policy(config)[0].init(jax.random.key(0))})
    checkpoint.close(checkpoints)


def start(folder):
    return [MAIN, SUDOKU, f"--workdir={folder}/run", f"{FIELD}sft.checkpoint={folder}/sft"]


@case("missing base model", "no checkpoint folder {0}/sft: check the path", slow=True)
def _(folder):
    return start(folder)


@case("empty folder of checkpoints", "no checkpoint in {0}/sft", "check the path", slow=True)
def _(folder):
    (folder / "sft").mkdir()
    return start(folder)


@case("workdir as base model", "{0}/sft", slow=True)
def _(folder):
    base_model(folder / "sft" / "sft")
    return start(folder)


@case("base model of another size", "{0}/sft does not fit this configuration: ", " leaves differ, first ", "found (", slow=True)
def _(folder):
    base_model(folder / "sft", width=64)
    return start(folder)


@case("base model cut short", "{0}/sft", "40", "damaged", slow=True)
def _(folder):
    base_model(folder / "sft")
    for path in (folder / "sft" / "40" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            os.truncate(path, path.stat().st_size // 2)
    return start(folder)


@case("base model without its structure", "{0}/sft", "40", "damaged", slow=True)
def _(folder):
    base_model(folder / "sft")
    for name in ("_METADATA", "_sharding", "manifest.ocdbt"):
        (folder / "sft" / "40" / "state" / name).unlink(missing_ok=True)
    return start(folder)


# --- published models and their data ---


def published(folder):
    published_model.write_model(folder / "model")
    (folder / "data").mkdir()
    row = json.dumps({"question": "What is 2 + 3?", "answer": "It is 5.\n#### 5"})
    for split in ("train", "test"):
        (folder / "data" / f"{split}.jsonl").write_text(f"{row}\n" * 8)
    return [MAIN, PUBLISHED, f"--workdir={folder}/run", f"{FIELD}model.pretrained={folder}/model", f"{FIELD}data.path={folder}/data"]


def model(name, *said):
    """A case of a published model and its data after a function of the folder that damages it."""

    def add(damage):
        @case(name, *said, slow=True)
        def command(folder):
            flags = published(folder)
            damage(folder)
            return flags

    return add


def replace(folder, name, **fields):
    content = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps(content))


main("no model", "gsm8k", "model.pretrained")(PUBLISHED)
main("missing model", "there is no folder '/nonexistent/llada'", "pretrained")(PUBLISHED, f"{FIELD}model.pretrained=/nonexistent/llada")
case("no data", "no data folder is set: set --config.data.path to a folder that holds train.jsonl", slow=True)(lambda f: published(f)[:-1])
model("model without config.json", "there is no {0}/model/config.json")(lambda f: (f / "model" / "config.json").unlink())
model("config.json cut short", "{0}/model/config.json does not hold a JSON object")(lambda f: os.truncate(f / "model" / "config.json", 40))
model("config.json of another kind", "{0}/model/config.json: model_type = 'gpt2' is not implemented; known: llada, Dream")(
    lambda f: replace(f / "model", "config.json", model_type="gpt2")
)
model("config.json with a text for a number", "{0}/model/config.json: d_model = '16' is not an integer")(
    lambda f: replace(f / "model", "config.json", d_model="16")
)
model("config.json with a fraction for a size", "{0}/model/config.json: d_model = 16.5 is not an integer")(
    lambda f: replace(f / "model", "config.json", d_model=16.5)
)
model("config.json of no JSON object", "{0}/model/config.json does not hold a JSON object")(
    lambda f: (f / "model" / "config.json").write_text("[1, 2]")
)
model("config.json of another size", "{0}/model do not fit its config.json", "mis-shaped")(
    lambda f: replace(f / "model", "config.json", mlp_hidden_size=24)
)
model("no weights", "{0}/model has neither model.safetensors nor model.safetensors.index.json")(
    lambda f: (f / "model" / "model.safetensors").unlink()
)
model("weights cut short", "{0}/model/model.safetensors is damaged or cut short", "download it again")(
    lambda f: os.truncate(f / "model" / "model.safetensors", 5000)
)
model("empty weights", "{0}/model/model.safetensors is damaged or cut short", "download it again")(
    lambda f: os.truncate(f / "model" / "model.safetensors", 0)
)


@model("missing shard", "{0}/model: model.safetensors.index.json names shards that are not there: b.safetensors")
def _(folder):
    os.rename(folder / "model" / "model.safetensors", folder / "model" / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


model("no tokenizer", "no tokenizer in {0}/model: looked for tokenizer.json", "model.tokenizer")(
    lambda f: (f / "model" / "tokenizer.json").unlink()
)
model("tokenizer cut short", "{0}/model/tokenizer.json does not hold a JSON object", "cut off?")(
    lambda f: os.truncate(f / "model" / "tokenizer.json", 500)
)
model("tokenizer_config.json cut short", "{0}/model/tokenizer_config.json does not hold a JSON object", "cut off?")(
    lambda f: os.truncate(f / "model" / "tokenizer_config.json", 30)
)
model("missing data folder", "the folder '{0}/data' does not exist: set --config.data.path")(lambda f: shutil.rmtree(f / "data"))
model("missing data file", "{0}/data holds no train.jsonl or train.parquet; there: test.jsonl")(
    lambda f: (f / "data" / "train.jsonl").unlink()
)
model("empty data file", "{0}/data/train.jsonl holds no rows")(lambda f: os.truncate(f / "data" / "train.jsonl", 0))


def data(name, line, *said):
    def damage(folder):
        with open(folder / "data" / "train.jsonl", "ab") as file:
            file.write(line)

    model(name, "{0}/data/train.jsonl", *said)(damage)


data("no JSON in the data", b"question: answer\n", "line 9, is not JSON")
data("data cut short", b'{"question": "What is 2 + ', "line 9, is not JSON", "cut off?")
data("no object in the data", b"[1, 2]\n", "line 9, is a JSON list, not an object")
data("another column in the data", b'{"problem": "2 + 3", "answer": "5"}\n', "line 9, has no column 'question'")
data("a number for a text in the data", b'{"question": "2 + 3", "answer": 5}\n', "row 9", "answer", "5")
data("no answer in the data", b'{"question": "2 + 3", "answer": "five"}\n', "row 9: the answer does not end in '#### NUMBER'")
data("data that is not UTF-8", b'{"question": "caf\xe9", "answer": "#### 5"}\n', "line 9, is not JSON: 'utf-8'")


case("lengths that do not divide", "cannot run:\n  eval.lengths: 48 is not a multiple of eval.block_length = 32", slow=True)(
    lambda f: [*published(f), "--mode=eval", f"{FIELD}eval.lengths=(48,)"]
)


# --- generations to score again ---


def generations(name, text, *said):
    @case(name, *said)
    def command(folder):
        if text is not None:
            (folder / "made.jsonl").write_text(text)
        workdir = folder.parent / "scored"  # the problems are made once
        return [MAIN, SUDOKU, f"--workdir={workdir}", "--mode=eval", f"{FIELD}eval.score_file={folder}/made.jsonl"]


HEADER = {"task": "sudoku", "setting": "L16-margin-S8", "length": 16, "rule": "margin", "threshold": None, "steps": 8, "learned": False,
          "block_length": 16, "temperature": 0.0}  # fmt: skip
generations("missing generations", None, "no file of generations {0}/made.jsonl")
generations("empty generations", "", "{0}/made.jsonl:1: not a file of generations")
generations("malformed generations", "{]\n", "{0}/made.jsonl:1: not JSON")
generations("generations without fields", json.dumps(HEADER) + '\n{"index": 0}\n', "{0}/made.jsonl:2", "prompt", "missing")
generations("generations cut short", json.dumps(HEADER) + '\n{"index": 0, "pro', "{0}/made.jsonl:2: not JSON", "cut short?")
generations("of another task", json.dumps(HEADER | {"task": "math"}) + "\n", "{0}/made.jsonl holds generations for the task 'math'")
generations("no generations", json.dumps(HEADER) + "\n", "{0}/made.jsonl holds no generations")


# --- the other commands ---

case("plan: unknown topology", "topology 'v9:4x4' is unknown; known: cpu:N")(lambda _: [PLAN, SUDOKU, "--topology=v9:4x4"])
case("plan: no topology", "--topology must have a value")(lambda _: [PLAN, SUDOKU])
case("plan: mesh", "mesh.data = 3", "makes 3 devices, but there are 2")(lambda _: [PLAN, SUDOKU, "--topology=cpu:2", f"{FIELD}mesh.data=3"])
case("plan: out of range", "rl.prompts = 0 must be at least 1")(lambda _: [PLAN, SUDOKU, "--topology=cpu:1", f"{FIELD}rl.prompts=0"])
case("plan: negative calls", "--nfe")(lambda _: [PLAN, SUDOKU, "--topology=cpu:1", "--nfe=-3"])
case("plan: positional junk", "unknown arguments: v5e")(lambda _: [PLAN, SUDOKU, "--topology=cpu:1", "v5e"])
case("study: no workdir", "--workdir must have a value", slow=True)(lambda _: [STUDY, SUDOKU])
case("study: too few draws", "--draws=1", "2", slow=True)(lambda f: [STUDY, SUDOKU, f"--workdir={f}/run", "--draws=1"])
case("study: out of range", "rl.prompts = 0 must be at least 1", slow=True)(
    lambda f: [STUDY, SUDOKU, f"--workdir={f}/run", f"{FIELD}rl.prompts=0"]
)
case("experiments: unknown suite", "unknown suite: large; known: main, tune")(lambda f: [EXPERIMENTS, "--suite=large", f"--out={f}/out"])
case("experiments: unknown flag", "--outt")(lambda f: [EXPERIMENTS, f"--outt={f}/out"])
case("experiments: seeds", "--seeds", "one")(lambda f: [EXPERIMENTS, "--seeds=one", f"--out={f}/out"])
case("experiments: no results", "there are no results in {0}/out/main.jsonl")(lambda f: [EXPERIMENTS, "--report", f"--out={f}/out"])
case("lm_eval: missing model", "there is no folder '/nonexistent/llada'", slow=True)(
    lambda _: [LM_EVAL, "--model", "diffpo_jax", "--model_args", "pretrained=/nonexistent/llada", "--tasks", "gsm8k"]
)


@functools.cache
def outcomes(slow):
    """{name: (exit code, standard output, standard error, folder of the inputs)} of the cases that take seconds, or of the others."""
    cases = {name: command for name, (command, _, takes_seconds) in CASES.items() if takes_seconds == slow}
    folders = {name: pathlib.Path(tempfile.mkdtemp(dir=FOLDERS.name)) for name in cases}
    lines = [command(folders[name]) for name, command in cases.items()]
    found = runs.commands(lines, imported=("transformers.models.qwen2.tokenization_qwen2",) if slow else ())
    return {name: (*outcome, folders[name]) for name, outcome in zip(cases, found, strict=True)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if slow else []) for name, (*_, slow) in CASES.items()])
def test_a_wrong_input_is_one_clear_message(name):
    _, said, slow = CASES[name]
    code, _, err, folder = outcomes(slow)[name]
    for each in said:
        assert each.format(folder) in err
    assert "Traceback" not in err
    assert code == 2
    assert not (folder / "new").exists() or name in MADE_FIRST  # found out before anything was made
    lines = [line for line in err.splitlines() if not re.match(r"\d{4}-\d\d-\d\d:", line)]  # without the log of lm-eval
    assert lines[0].startswith("error: ") and len(lines) <= 3
