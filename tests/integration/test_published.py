"""A published model from its folder to its export: prompts, rollouts, rewards by component, updates, evaluation files, reload."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffpo_jax as dp
from configs import default, math
from diffpo_jax.models.adapters import load_adapter, load_threshold_head
from tests import runs
from tests.published_model import write_model

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
PROBLEMS = [
    {"question": f"Ann has {n} pens and buys {m} more. How many pens has she?", "answer": f"She has {n} + {m} = <<{n}+{m}={n + m}>>{n + m} "
     f"pens.\n#### {n + m}"} for n in range(2, 8) for m in range(2, 5)
]  # fmt: skip
REWARDS = {"reward/correct", "reward/integer"}


def write_problems(folder):
    folder.mkdir()
    for name, rows in (("train", PROBLEMS[:12]), ("test", PROBLEMS[12:])):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def make_config(model, data, **fields):
    config = math.get_config("published_debug")
    config.update_from_flattened_dict({"model.pretrained": str(model), "data.path": str(data), "task.test_size": 4} | fields)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    config = make_config(write_model(root / "model"), write_problems(root / "data"))
    summary = dp.train(config, str(root / "run"))
    return root, config, summary


def test_a_run_from_a_published_model(finished):
    root, config, summary = finished
    lines = runs.metrics(root / "run", "rl")
    assert [line["step"] for line in lines] == [1, 2] and REWARDS <= lines[0].keys()
    for line in lines:
        assert line["reward"] == pytest.approx(sum(value for name, value in line.items() if name.startswith("reward/")), abs=1e-5)
        assert line["bad_updates"] == 0 and line["grad_norm"] > 0 and line["surrogate/gap"] > 0
    assert not (root / "run" / "sft").exists()  # nothing was trained before RL
    assert summary["trained"]["operating_point"]["nfe"] >= 2  # at least a call a block


def test_evaluation_files(finished, capsys):
    root, config, _ = finished
    config = config.copy_and_resolve_references()
    config.eval.lengths = (32,)
    config.eval.prefill = "<reasoning>"
    rows = dp.evaluate(config, str(root / "run"))["table"]
    files = sorted((root / "run" / "generations" / "step-2").glob("*.jsonl"))
    assert [file.stem for file in files] == [row["setting"] for row in rows] == ["L32-low_confidence-S16"]
    header, *lines = map(json.loads, files[0].read_text().splitlines())
    assert header["checkpoint"] == "step-2" and [line["index"] for line in lines] == [0, 1, 2, 3]
    assert all(line["nfe"] <= 16 and line["generation"].startswith("<reasoning>") for line in lines)
    assert rows[0]["accuracy"] == np.mean([line["verdict"] for line in lines])

    # a generation that is put right by hand is scored right again, without a model
    lines[1]["generation"] = f"<reasoning>\n</reasoning><answer>\\boxed{{{PROBLEMS[13]['answer'].split()[-1]}}}</answer>"
    files[0].write_text("".join(f"{json.dumps(line)}\n" for line in [header, *lines]))
    config.eval.score_file = str(files[0])
    (root / "model" / "model.safetensors").rename(root / "model" / "hidden")
    try:
        row = dp.evaluate(config, str(root / "run"))["table"][0]
    finally:
        (root / "model" / "hidden").rename(root / "model" / "model.safetensors")
    assert row["to_right"] == 1 and row["to_wrong"] == 0
    assert "verdicts changed to right: 1" in capsys.readouterr().out


def test_export_and_reload(finished):
    root, config, _ = finished
    folder = Path(dp.export(config, str(root / "run")))
    policy, merged = dp.load_pretrained(folder)
    _, base = dp.load_pretrained(root / "model", "bfloat16")
    trainable, adapters = load_adapter(folder / "adapter", policy, "llada")
    assert trainable.rank == 2 and any(np.abs(x).max() > 0 for x in jax.tree.leaves(adapters))
    tokens, mask = jnp.arange(12)[None], jnp.ones((1, 12), bool)
    expected = policy.logits(trainable.join(jax.tree.map(lambda x: x.astype(jnp.float32), base), adapters), tokens, mask)
    np.testing.assert_allclose(policy.logits(merged, tokens, mask), expected, atol=0.05)  # bfloat16 weights, rounded once more
    settings, head = load_threshold_head(folder)
    assert settings["gamma_init"] == config.threshold_network.gamma_init and "log_std" in head
    with pytest.raises(FileExistsError):
        dp.export(config, str(root / "run"))

    # and the export is a model to start from
    again = make_config(folder, root / "data", **{"rl.steps": 0, "eval.lengths": (32,)})
    assert dp.evaluate(again, str(root / "again"))["table"][0]["problems"] == 4


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs GSM8K and Dream's tokenizer in ../shared")
def test_real_gsm8k_with_dreams_tokenizer(tmp_path):
    tokenizer = SHARED / "models" / "dream_7b_instruct"
    model = write_model(tmp_path / "model", eos_id=151643, mask_id=151666, vocab_size=152064, tokenizer=tokenizer)
    flags = [f"--config.model.pretrained={model}", f"--config.data.path={SHARED / 'data' / 'gsm8k'}", "--config.rl.inner_steps=1"]
    flags += [f"--config.{field}" for field in (  # a vocabulary of 152,064 is slow on a CPU
        "task.test_size=4", "task.response_length=32", "sampler.block_length=16", "model.head_chunk=16", "eval.batch_size=4",
        "eval.thresholds=(1.0,)", "eval.lengths=(32,)", "eval.block_length=16",
    )]  # fmt: skip
    workdir = tmp_path / "run"
    out = runs.finish(runs.start(workdir, *flags, task="math", preset="published_debug"))
    assert "accuracy" in out
    assert REWARDS <= runs.metrics(workdir, "rl")[-1].keys()
    runs.finish(runs.start(workdir, *flags, "--mode=eval", task="math", preset="published_debug"))
    file = workdir / "generations" / "step-2" / "L32-low_confidence-S16.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert len(lines) == 4 and "ducks" in lines[0]["prompt"]
    assert "exported step 2" in runs.finish(runs.start(workdir, *flags, "--mode=export", task="math", preset="published_debug"))
    policy, _ = dp.load_pretrained(workdir / "export-2")
    assert policy.config.vocab_size == 152064


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d1", "wd1"])
def test_baselines_run(tmp_path, name):
    fields = default._D1_SAMPLER | {"sampler.steps": 32, "rl.steps": 1, "eval.thresholds": (1.0,)}
    config = dp.set_algorithm(make_config(write_model(tmp_path / "model"), write_problems(tmp_path / "data"), **fields), name)
    thresholds = dp.train(config, str(tmp_path / "run"))["trained"]["operating_point"]["thresholds"]
    assert (thresholds["mean"], thresholds["std"]) == (config.sampler.threshold, 0.0)  # no threshold network has been trained
    [line] = runs.metrics(tmp_path / "run", "rl")
    assert line["nfe"] <= 32 and line["bad_updates"] == 0 and "threshold/mean" not in line
    # mean-field pays one pass where 2-MF pays two: 8 rows, 2 updates of one cut, each with an old pass, and with KL a reference's
    assert line["denoiser_calls"] == round(line["nfe"] * 8) + 8 * 2 * (3 if name == "d1" else 2)
