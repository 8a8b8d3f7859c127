"""What the report of a real run shows is what the run evaluated."""

import json
import re

import jax
import numpy as np
import pytest

import diffpo_jax as dp
from configs import sudoku
from diffpo_jax import build, denoisings, page, report
from diffpo_jax.evaluate import load_curve
from diffpo_jax.train import init_train_state
from tests.pages import serve_module
from tests.reference import sharpen


def embedded(path):
    """The data in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1])


def assert_evaluated(records, evaluation):
    """The records are the evaluation's first rows."""
    some = slice(0, len(records))
    assert [record["nfe"] for record in records] == evaluation.nfe[some].tolist()
    assert [record["correct"] for record in records] == evaluation.correct[some].astype(bool).tolist()
    np.testing.assert_allclose([record["gamma"] for record in records], evaluation.threshold[some], rtol=1e-3)


def test_the_viewer_shows_what_was_evaluated(finished):
    workdir, config, summary, _ = finished
    content = embedded(workdir / "report.html")
    [learned] = load_curve(str(workdir / "learned.npz"))[0].values()
    base = load_curve(str(workdir / "base.npz"))[0][report.nearest(summary)["gamma"]]
    assert len(content["problems"]) == page.PROBLEMS
    assert_evaluated([problem["trained"] for problem in content["problems"]], learned)
    assert_evaluated([problem["base"] for problem in content["problems"]], base)
    source = build.build(config, str(workdir)).sources["test"]
    for problem in content["problems"]:
        assert problem["prompt"] == problem["base"]["prompt"] == source[problem["index"]]["prompt"]
        for side in ("base", "trained"):
            record = problem[side]
            assert len(record["tokens"]) == len(record["steps"]) == config.task.response_length
            assert sorted(set(record["steps"])) == list(range(record["nfe"]))  # each call filled something in
            assert all(value is None or 0 < value <= 1 for value in record["confidence"])
    assert {chart["title"] for chart in content["charts"]} >= {"reward", "accuracy", "calls a response (NFE)", "KL to the base model"}
    assert len(content["thresholds"]["points"]) == config.task.test_size and content["run"]["config"]["rl"]["steps"] == config.rl.steps


def test_the_same_command_again_makes_the_same_page(finished):
    workdir, config, _, _ = finished
    before = embedded(workdir / "report.html")
    dp.train(config, str(workdir))
    after = embedded(workdir / "report.html")
    before.pop("table"), after.pop("table")  # it has wall times
    assert after == before


def test_an_evaluation_has_its_own_report_of_its_own_settings(finished):
    workdir, config, _, _ = finished
    config = config.copy_and_resolve_references()
    config.eval.skip, config.eval.limit, config.eval.thresholds = 20, 5, (0.5, 2.0)
    result = dp.evaluate(config, str(workdir))
    content = embedded(workdir / f"evaluation-{config.rl.steps}.html")
    assert [problem["index"] for problem in content["problems"]] == [20, 21, 22, 23, 24]
    assert [point["gamma"] for point in sorted(content["pareto"]["base"], key=lambda point: point["gamma"])] == [0.5, 2.0]
    right = np.mean([problem["trained"]["correct"] for problem in content["problems"]])
    assert right == result["trained"]["operating_point"]["accuracy"]


def test_a_rule_without_thresholds_and_a_model_without_their_network(tmp_path):
    config = sudoku.get_config("debug")
    config.sft.steps, config.rl.steps, config.rl.mode, config.sampler.rule = 10, 2, "model", "top_probability"
    config.sampler.steps = 4
    dp.train(config, str(tmp_path))
    content = embedded(tmp_path / "report.html")
    assert not content["viewer"]["learned"] and content["thresholds"]["std"] == 0
    for problem in content["problems"]:
        assert [(problem[side]["gamma"], problem[side]["nfe"]) for side in ("base", "trained")] == [(None, 4)] * 2


def test_what_is_served_is_what_is_reported(finished):
    workdir, config, _, _ = finished
    parts = build.build(config, str(workdir))
    params = sharpen(parts.policy.init(jax.random.key(0)), 15.0)  # else positions differ by rounding only, which would decide their order
    network = init_train_state(parts, params).threshold_params
    compute = serve_module.make_compute(parts, params, params, network)
    settings = serve_module.page_settings(parts, str(workdir))
    assert (settings["low"], settings["high"], settings["learned"]) == (0.02, 8.0, True)
    _, fixed = denoisings.denoise_test(parts, params, 3, threshold=0.5)
    _, chosen = denoisings.denoise_test(parts, params, 3, threshold_params=network)
    found = compute({"prompt": settings["problems"][2], "gamma": 0.5, "learned": True})
    for record, expected, learned in ((found["base"], fixed[2], False), (found["trained"], chosen[2], True)):
        for name, value in (expected | {"chosen": learned}).items():
            assert record[name] == (pytest.approx(value, rel=2e-3) if name in ("confidence", "entropy") else value), name
    found = compute({"prompt": settings["problems"][2], "gamma": 0.5, "learned": False})
    assert found["trained"] == found["base"]
    [reward] = {compute({"prompt": "1" * 16, "gamma": 0.5, "learned": False})["base"]["reward"]}
    assert reward is None
