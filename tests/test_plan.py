"""Plans: what they say of programs is what was compiled, and the fewest FLOPs are those worked out by hand."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
from rich.console import Console

from configs import math as math_config
from configs import sudoku
from diffpo_jax import flops, hlo, plan
from diffpo_jax.models.transformer import ModelConfig
from diffpo_jax.sampling.reading import CHUNK
from tests import runs

MODEL = ModelConfig(vocab_size=11, mask_id=0, width=8, layers=3, heads=4, kv_heads=2, mlp_width=16)
LEAST = flops.Least(rows=6, prompt=5, response=4, block=2, cuts=2, updates=3, reference=1, old=1, model=MODEL, adapters=0)
BLOCK = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k and v (two of four heads), out, three of the MLP
PASS = 9 * 3 * (2 * BLOCK + 4 * 9 * 8)  # a row: 9 positions, 3 layers; scores and sums over 9 positions, 8 wide, 2 FLOPs each


def test_the_fewest_flops_by_hand():
    assert LEAST.rollout(nfe=7) == 7 * (6 * PASS + 6 * 2 * 2 * 8 * 11)
    # two of each row's nine positions in view at five of the calls
    assert LEAST.rollout(nfe=7, whole_calls=2) == 2 * 6 * PASS + 5 * 6 * PASS * 2 / 9 + 7 * 6 * 2 * 2 * 8 * 11
    # two passes (reference and old policy) of two cuts, for each of three updates; the head at 4 positions a row
    assert LEAST.score() == 3 * (6 * 2 * 2 * PASS + 2 * 6 * 4 * 2 * 8 * 11)
    # forward, and twice as much for the gradient
    assert LEAST.update() == 3 * (6 * 2 * PASS + 6 * 4 * 2 * 8 * 11)


def test_the_fewest_flops_with_adapters_by_hand():
    adapters = 50  # parameters a block
    least = dataclasses.replace(LEAST, adapters=adapters)
    more = 9 * 3 * 2 * adapters
    assert least.rollout(nfe=1) == LEAST.rollout(nfe=1) + 6 * more
    assert least.score() == LEAST.score() + 3 * 6 * 2 * more  # the reference is without
    # kernels are not trained: forward and the gradient of what they read; adapters and attention are paid three times
    trunk = 9 * 3 * (4 * BLOCK + 6 * adapters + 12 * 9 * 8)
    assert least.update() == 6 * 2 * trunk + 6 * 4 * 4 * 8 * 11


@pytest.fixture(scope="module")
def small():
    """(plan of a small run on this process's device, {program: its text})."""
    config, texts = math_config.get_config("debug"), {}
    config.model.layers, config.model.head_chunk, config.rl.inner_steps = 2, 4, 2
    found = plan.plan(config, "cpu:1", nfe=5, after_each=lambda program, text: texts.update({program.name: text}))
    return found, texts


def test_programs_of_a_step(small):
    found, _ = small
    assert [(program["name"], program["runs"]) for program in found["programs"]] == [("rollout", 1), ("score", 1), ("update", 2)]
    assert found["fits"] and found["seconds"] is None and found["chips"] == 1 and found["rows"] == 32
    rollout, score, update = found["programs"]
    threshold_network = 5 * 32 * 2 * (32 * 32 + 32)  # at every call, of 32 rows
    assert rollout["flops"] == rollout["least_flops"] + threshold_network
    assert score["flops"] == pytest.approx(score["least_flops"], rel=1e-3)
    assert 1.0 <= update["flops"] / update["least_flops"] < 1.1  # the head's forward pass is done a second time
    for program in found["programs"]:
        memory = program["memory"]
        assert memory["total"] == sum(memory[name] for name in ("arguments", "outputs", "temporaries", "held"))
    # Beside the rollout lie two moments of every parameter and the frozen start, beside the update the start. Rows are small here.
    parameters = 4 * (2 * 45 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32)
    assert 3 * parameters < rollout["memory"]["held"] < 3.2 * parameters
    assert 2 * parameters < score["memory"]["held"] < 2.2 * parameters and update["memory"]["held"] == parameters
    assert parameters < rollout["memory"]["arguments"] < 1.3 * parameters < 3 * parameters < update["memory"]["arguments"]
    json.dumps(found)


def test_a_cache_saves_what_is_not_in_view(monkeypatch):
    config = sudoku.get_config("debug")
    config.sampler.update(block_length=4, cache="dual", refresh=3)
    assert [plan.whole_calls(config, nfe) for nfe in (16, 12, 4, 2)] == [8, 4, 4, 2]
    whole, compile_one = plan.whole_calls(config, 16), plan._compile
    found = []

    def first(*args):  # the rollout alone
        found.append(compile_one(*args))
        raise StopIteration

    monkeypatch.setattr(plan, "_compile", first)
    with pytest.raises(StopIteration):
        plan.plan(config, "cpu:1", nfe=16)
    rollout = found[0][0]
    threshold_network = whole * 32 * 2 * (32 * 32 + 32)
    attended = (16 - whole) * 32 * 4 * 4 * 4 * 32  # in a block's calls its own keys in the cache are looked at, too, and masked
    assert rollout.flops == rollout.least_flops + threshold_network + attended
    config.sampler.update(cache="none", refresh=0)
    assert plan.whole_calls(config, 16) == 16


def test_no_logits_of_all_positions(small):
    """The likelihood's head reads 2 of 26 positions of 32 rows at a time (the largest divisor up to 4)."""
    for name in ("score", "update"):
        shapes = {array.shape for array in hlo.arrays(small[1][name]) if array.dtype == "f32" and array.shape[-1:] == (45,)}
        assert 32 <= max(math.prod(shape[:-1]) for shape in shapes) <= 32 * 2, (name, shapes)


def test_what_does_not_fit_is_said_with_what_would_help(monkeypatch, small):
    monkeypatch.setitem(plan.CHIPS, "cpu", plan.Chip(1e12, 400_000, 1e11, 1e10))
    found = plan.plan(sudoku.get_config("debug"), "cpu:1")
    assert not found["fits"] and found["seconds"] is None
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    plan.print_plan(found, console)
    text = console.export_text()
    assert "update does not fit" in text and "rl.microbatch" in text and "largest: " in text and "GiB" in text


def test_roofline(monkeypatch):
    monkeypatch.setitem(plan.CHIPS, "cpu", plan.Chip(1e12, 1e12, 1e30, 1e30))
    found = plan.plan(sudoku.get_config("debug"), "cpu:1")
    seconds = {program["name"]: program["seconds"]["compute"] for program in found["programs"]}
    assert seconds["rollout"] == pytest.approx(found["programs"][0]["flops"] / 1e12)
    assert found["seconds"] == pytest.approx(sum(seconds.values()))
    assert found["rollouts_per_hour"] == pytest.approx(32 / found["seconds"] * 3600)
    assert found["dominates"] == max(seconds, key=seconds.get)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", "known: cpu:N"), ("v4:2x2x1", "v5e, v5p, v6e"), ("cpu:0", "is unknown"), ("cpu:3", "has 1 CPU devices"),
        ("v5e:4", "as v5e:4x4"),
    ],
)  # fmt: skip
def test_unknown_topologies(topology, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(sudoku.get_config("debug"), topology)


def run_plan(*flags, timeout=1800):
    line = [sys.executable, "-m", "diffpo_jax.plan", *flags]
    return subprocess.run(line, cwd=runs.ROOT, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=timeout)


def test_a_simulated_mesh_from_the_command_line():
    flags = ["--config=configs/sudoku.py:debug", "--config.mesh.data=2", "--config.mesh.fsdp=4", "--topology=cpu:8"]
    done = run_plan(*flags, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["chips"] == 8 and found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    for program in found["programs"]:
        assert program["collectives"]["all-gather"]["bytes"] > 0
        assert program["flops"] == pytest.approx(program["least_flops"], rel=0.1)


def test_sizes_that_do_not_divide_are_said():
    done = run_plan("--config=configs/sudoku.py:debug", "--config.mesh.tensor=8", "--config.mesh.data=1", "--topology=cpu:8")
    assert done.returncode == 2 and "model.heads = 4 is not a multiple of the 8 devices on the mesh axes tensor = 8" in done.stderr


# --- the published models, compiled for TPU slices ---

FULL = {"lora.rank": 0, "lora.dropout": 0.0, "model.param_dtype": "bfloat16"}  # AdamW on float32 parameters, the frozen start in bfloat16
CASES = {
    "LLaDA-8B, LoRA on v5e:4x4": ("llada_8b", "v5e:4x4", {}),
    "LLaDA-8B, all of it on v5p:2x2x4": ("llada_8b", "v5p:2x2x4", FULL),
    "Dream-7B, LoRA on v5e:4x4": ("dream_7b", "v5e:4x4", {}),
    "Dream-7B, all of it on v5p:2x2x4": ("dream_7b", "v5p:2x2x4", FULL),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_published_models_fit_and_compute_little_twice(case):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    model, topology, fields = CASES[case]
    config = math_config.get_config(model)
    config.update_from_flattened_dict(
        {"model.pretrained": str(runs.ROOT / "tests" / "testdata" / f"{model}_instruct"), "task.prompt_length": 200} | fields
    )
    logits = {}

    def largest_logits(program, text):
        """Elements of the largest float32 array that has a vocabulary's part as its last dimension, whatever the program does with it."""
        vocab = {"llada_8b": 126464, "dream_7b": 152064}[model] // 16
        if program.name == "rollout":  # reads it in equal chunks
            vocab = -(-vocab // -(-vocab // CHUNK))
        found = [array for array in hlo.arrays(text) if array.dtype == "f32" and vocab in array.shape[-2:]]
        rows = [array.bytes // 4 // vocab for array in found if 4096 not in array.shape and 3584 not in array.shape]
        logits[program.name] = max(rows)

    found = plan.plan(config, topology, after_each=largest_logits)
    assert found["fits"] and found["chips"] == 16 and found["rows"] == 96
    rollout, score, update = found["programs"]
    assert rollout["flops"] / rollout["least_flops"] <= 1.10
    assert score["flops"] / score["least_flops"] <= 1.10
    assert update["flops"] / update["least_flops"] <= 1.45
    assert max(program["memory"]["total"] for program in found["programs"]) < found["memory_of_a_chip"]
    # never more than 32 response positions of the 96 rows at a time, where [rows, L, V] are 256
    assert logits.keys() == {"rollout", "score", "update"} and max(logits.values()) <= 96 * 32, logits
