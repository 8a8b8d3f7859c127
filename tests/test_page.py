"""The report's words and numbers, by hand; what a page embeds and permits."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest

from configs import math, sudoku
from diffpo_jax import page, report
from diffpo_jax.checkpoint import to_json
from diffpo_jax.evaluate import Evaluation
from tests.test_report import make_summary


def evaluation(correct, nfe, threshold=1.0):
    correct, nfe = np.asarray(correct, float), np.asarray(nfe, float)
    return Evaluation(correct, nfe, np.full(len(nfe), 8.0), np.broadcast_to(threshold, len(nfe)).astype(float), 1.0)


def summary(gain, interval, saving=0.5, saving_interval=(0.47, 0.51), reaches=True):
    compared = {
        "accuracy": 0.34, "nfe": 4.01, "base_accuracy_at_same_nfe": 0.34 - gain, "gain": gain, "gain_interval": list(interval),
        "base_reaches_accuracy": reaches, "base_nfe_at_same_accuracy": 8.0 if reaches else "NaN",
        "nfe_saving_at_same_accuracy": saving, "nfe_saving_at_same_accuracy_interval": list(saving_interval),
    }  # fmt: skip
    return {"comparison": compared, "base": {"curve": [{"accuracy": 0.332, "nfe": 8.7}, {"accuracy": 0.2, "nfe": 2.0}]}}


@pytest.mark.parametrize(
    ("gain", "interval", "said"),
    [
        (
            0.049, (0.007, 0.087),
            "RL made the model answer 34.0% of the test problems right at 4.0 calls a response; the base model has 29.1% there "
            "(gain +4.9 points, 95% interval +0.7 to +8.7).",
        ),
        (
            0.01, (-0.02, 0.04),
            "This run does not show that RL helped: the model answers 34.0% of the test problems right at 4.0 calls a response; the base "
            "model has 33.0% there, and the interval of the difference includes zero (+1.0 points, 95% interval -2.0 to +4.0).",
        ),
        (
            0.01, (0.0, 0.04),
            "This run does not show that RL helped: the model answers 34.0% of the test problems right at 4.0 calls a response; the base "
            "model has 33.0% there, and the interval of the difference includes zero (+1.0 points, 95% interval +0.0 to +4.0).",
        ),
        (
            -0.06, (-0.09, -0.03),
            "RL made the model worse at its operating point: it answers 34.0% of the test problems right at 4.0 calls a response; the base "
            "model has 40.0% there (loss -6.0 points, 95% interval -9.0 to -3.0).",
        ),
    ],
)  # fmt: skip
def test_the_headline_says_what_the_interval_allows(gain, interval, said):
    assert page.headline(summary(gain, interval))[0] == said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "For that accuracy the base model needs 8.0 calls; the trained model saves 50% of them (95% interval 47% to 51%)."),
        (
            {"saving": 0.1, "saving_interval": (-0.2, 0.3)},
            "For that accuracy the base model needs 8.0 calls: a saving of 10% whose interval includes zero (95% interval -20% to 30%).",
        ),
        (
            {"saving": -0.3, "saving_interval": (-0.5, -0.1)},
            "For that accuracy the base model needs 8.0 calls, fewer than the trained model (saving -30%, 95% interval -50% to -10%).",
        ),
        ({"reaches": False}, "The base model reaches that accuracy at none of its thresholds (its best is 33.2%, at 8.7 calls)."),
    ],
)
def test_the_second_sentence_is_of_the_calls(changes, said):
    _, saving, caution = page.headline(summary(0.05, (0.01, 0.09), **changes))
    assert saving == said and "one run" in caution


def test_the_headline_of_a_summary_read_back_is_the_same():
    whole = make_summary()
    assert page.headline(json.loads(json.dumps(to_json(whole)))) == page.headline(whole)


def test_the_table_is_the_printed_one():
    found = page.table(make_summary())
    assert found["columns"] == ["", "accuracy (95%)", "NFE", "tokens/call", "wall time"]
    assert [row[0] for row in found["rows"]] == ["base, γ = 1", "base, at the same NFE", "trained, learned γ"]
    assert found["rows"][1][1:] == ["40.0%", "3.00", "", ""]
    assert found["notes"][0].startswith("accuracy at the same NFE: +30.0 points") and not any("█" in note for note in found["notes"])
    assert found["notes"][-1] == "denoiser calls in training: 1,234,567; wall time: sft 61 s, rl 300 s"


def test_points_of_the_plot_rise_in_calls():
    found = page.pareto_points(make_summary())
    base = [(point["gamma"], point["nfe"], point["accuracy"]) for point in found["base"]]
    assert base == [(4.0, 2.0, 0.2), (1.0, 4.0, 0.6), (0.1, 8.0, 0.8)]
    [learned] = found["learned"]
    assert (learned["nfe"], learned["accuracy"]) == (3.0, 0.7) and 0 < learned["low"] < 0.7 < learned["high"] <= 1
    assert report.nearest(make_summary())["gamma"] == 1.0  # 4 calls are nearer to 3 than 2 are, in ratio


BEFORE = {  # of six problems at two thresholds: right at 0, 0, 1, 1, 2, 2 of them
    0.1: evaluation([0, 0, 1, 0, 1, 1], [8, 9, 6, 6, 4, 3]),
    1.0: evaluation([0, 0, 0, 1, 1, 1], [4, 5, 3, 2, 2, 2]),
}


def test_difficulty_by_hand():
    right, order = page.difficulty(BEFORE)
    assert right.tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert order.tolist() == [1, 0, 2, 3, 4, 5]  # among equals the one that takes more calls first


def test_thresholds_against_difficulty_by_hand():
    learned = evaluation([0, 1, 0, 1, 1, 1], [5, 7, 3, 3, 1, 1], [0.5, 0.7, 1.0, 2.0, 4.0, 8.0])
    found = page.threshold_points(BEFORE, learned)
    assert found["points"] == [[0.5, 0, 0, 5], [0.7, 0, 1, 7], [1, 0.5, 0, 3], [2, 0.5, 1, 3], [4, 1, 1, 1], [8, 1, 1, 1]]
    hard, middle, easy = found["parts"]
    assert hard == {"name": "hardest third", "count": 2, "gamma": pytest.approx(0.6), "nfe": 6.0, "accuracy": 0.5, "base": 0.0}
    assert (middle["gamma"], middle["base"], easy["gamma"], easy["nfe"]) == (1.5, 0.5, 6.0, 1.0)
    assert found["histogram"] == report.threshold_statistics(learned.threshold)["histogram"] and found["levels"] == 2


def test_many_problems_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(page, "MOST_POINTS", 3)
    learned = evaluation([0, 1, 0, 1, 1, 1], [5, 7, 3, 3, 1, 1], [0.5, 0.7, 1.0, 2.0, 4.0, 8.0])
    found = page.threshold_points(BEFORE, learned)
    assert [point[0] for point in found["points"]] == [0.5, 1.0, 8.0] and sum(found["histogram"]["counts"]) == 6


def test_charts_of_metric_lines(tmp_path):
    rl = [{"phase": "rl", "step": i, "accuracy": i / 10, "kl": 0.123456 if i > 1 else "NaN"} for i in (1, 2, 3)]
    lines = [*rl, {"phase": "eval", "step": 2, "accuracy": 0.5}, {"phase": "sft", "step": 50, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    accuracy, kl = page.charts(tmp_path / "metrics.jsonl")  # one point of the loss is no curve
    assert accuracy == {"title": "accuracy", "unit": "%", "points": [[1, 0.1], [2, 0.2], [3, 0.3]], "test": [[2, 0.5]]}
    assert kl["points"] == [[2, 0.1235], [3, 0.1235]] and kl["test"] == []
    assert page.charts(tmp_path / "none.jsonl") == []


def test_long_curves_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_STEPS", 10)
    lines = [{"phase": "rl", "step": i, "reward": 0.5} for i in range(1, 26)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    [reward] = page.charts(tmp_path / "metrics.jsonl")
    assert [step for step, _ in reward["points"]] == list(range(1, 26, 3))


def test_run_facts_name_what_differs_from_the_defaults(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/diffpo_jax/main.py", "--config=configs/math.py:tiny", "--workdir=a b"])
    config = math.get_config("tiny")
    config.rl.learning_rate = 0.5
    facts = page.run_facts(config)
    assert facts["command"] == "python -m diffpo_jax.main --config=configs/math.py:tiny '--workdir=a b'"
    assert facts["changes"]["rl.learning_rate"] == [1e-4, 0.5] and facts["changes"]["task.name"] == ["sudoku", "math"]
    assert "rl.group_size" not in facts["changes"] and facts["config"]["rl"]["group_size"] == 16
    monkeypatch.setattr("sys.argv", ["notebook"])
    assert page.run_facts(sudoku.get_config("tiny"))["command"] == ""


HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>&\u2028"


def test_nothing_that_is_embedded_ends_its_element():
    text = page.embedded_json({"prompt": HOSTILE, "value": float("nan")})
    assert "<" not in text and json.loads(text) == {"prompt": HOSTILE, "value": "NaN"}


@pytest.mark.parametrize("name", ["report", "serve"])
def test_a_page_holds_all_it_needs_and_permits_nothing_else(name):
    texts = {"kicker": HOSTILE, "lead": "$kicker ${data}", "more": "b", "note": "c"}
    text, policy = page.render(name, HOSTILE, texts, {"prompt": HOSTILE, "more": "$style"})
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", text, re.S)  # these two and no other
    assert json.loads(data) == {"prompt": HOSTILE, "more": "$style"}
    assert "<title>&lt;/script&gt;" in text and "$kicker ${data}" in text and "<img" not in text
    [style] = re.findall(r"<style>(.*?)</style>", text, re.S)
    for kind, content in (("style", style), ("script", script)):
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; ") and ("connect-src" in policy) == (name == "serve")
    assert policy in text and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text.replace("http://127.0.0.1", ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
