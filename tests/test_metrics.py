"""Reduced metrics, metrics.jsonl, TensorBoard events, progress lines."""

import io
import json
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from diffpo_jax import metrics


def read_events(folder):
    """The TensorBoard events in `folder`, oldest file first; a record is length (8 bytes), its checksum (4), data, checksum (4)."""
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def scalars(events):
    return [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_valid_json_and_events_hold_the_finite_numbers(tmp_path):
    writer = metrics.Writer(tmp_path / "run")
    writer.write("rl", 3, {"reward": np.float32(0.5), "kl": float("nan"), "cap": jnp.asarray(np.inf), "curve": [1, 2]})
    raw = (tmp_path / "run" / "metrics.jsonl").read_text()  # before close: a line is out at once
    assert raw == '{"phase": "rl", "step": 3, "reward": 0.5, "kl": "NaN", "cap": "Infinity", "curve": [1, 2]}\n'
    writer.close()
    assert scalars(read_events(tmp_path / "run" / "tensorboard" / "rl")) == [(3, "reward", 0.5)]


def test_truncated_file_goes_on_as_an_uninterrupted_one(tmp_path):
    whole, resumed = metrics.Writer(tmp_path / "whole"), metrics.Writer(tmp_path / "resumed")
    script = [("sft", 1), ("sft", 2), ("rl", 1), ("eval", 1), ("rl", 2), ("rl", 3), ("eval", 3)]
    for phase, step in script:
        whole.write(phase, step, {"value": step / 3})
    for phase, step in script[:6]:
        resumed.write(phase, step, {"value": step / 3})
    resumed.close()
    with open(tmp_path / "resumed" / "metrics.jsonl", "a") as file:
        file.write('{"phase": "rl", "st')  # killed here

    resumed = metrics.Writer(tmp_path / "resumed")
    assert [(line["phase"], line["step"]) for line in lines(tmp_path / "resumed")] == script[:6]  # only the half line is gone
    resumed.truncate("rl", 1)
    resumed.truncate("eval", 1)
    assert [(line["phase"], line["step"]) for line in lines(tmp_path / "resumed")] == script[:4]
    for phase, step in script[4:]:
        resumed.write(phase, step, {"value": step / 3})
    resumed.close()
    whole.close()
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_whole_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"phase": "rl", "step": 1}')
    writer = metrics.Writer(tmp_path)
    writer.write("rl", 2, {})
    assert lines(tmp_path) == [{"phase": "rl", "step": 1}, {"phase": "rl", "step": 2}]
    writer.close()


def test_truncate_tells_tensorboard_what_to_forget(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step in (1, 2, 3):
        writer.write("rl", step, {"reward": step})
    writer.truncate("rl", 1)
    writer.write("rl", 2, {"reward": 20})
    writer.truncate("absent", 0)
    writer.close()
    starts = [e.step for e in read_events(tmp_path / "tensorboard" / "rl") if e.session_log.status == SessionLog.START]
    assert starts == [2]  # events from here on in older files are void
    assert scalars(read_events(tmp_path / "tensorboard" / "rl"))[-1] == (2, "reward", 20.0)
    assert not (tmp_path / "tensorboard" / "absent").exists()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def test_progress_prints_plain_lines_with_the_time_left():
    console = plain_console()
    with metrics.progress("rl", total=4, start=1, console=console, every=0.0) as advance:
        advance(reward=0.123456, nfe=7)
        advance()
        advance()
    text = console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in text] == ["rl 2/4", "rl 3/4", "rl 4/4"]
    assert text[0].endswith("reward 0.123  nfe 7") and "left" not in text[0]  # the first step compiles: no estimate from it
    assert "left" in text[1] and "left" not in text[2]


def test_progress_is_silent_between_lines_and_ends_with_one():
    console = plain_console()
    with metrics.progress("sft", total=50, console=console) as advance:
        for _ in range(25):
            advance(2, loss=1.0)
    assert [line.split("  ")[0] for line in console.file.getvalue().splitlines()] == ["sft 50/50"]


def test_progress_estimate_is_steps_left_over_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = plain_console()
    with metrics.progress("rl", total=101, console=console) as advance:
        now[0] = 60.0  # the first step compiles for a minute
        advance()
        now[0] = 80.0
        advance(10)  # then 2 s a step; 90 left
    assert console.file.getvalue().splitlines()[-1] == "rl 11/101  1:20 elapsed  3:00 left  0.5/s"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (95.2, "1:35"), (3700, "1:01:40")])
def test_duration(seconds, text):
    assert metrics._duration(seconds) == text


def test_progress_draws_a_bar_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with metrics.progress("rl", total=3, console=console) as advance:
        advance(reward=0.5)
    assert "1/3" in console.file.getvalue() and "reward 0.5" in console.file.getvalue()


def test_step_log_writes_a_step_when_asked_with_the_seconds_of_its_phases(tmp_path, monkeypatch):
    writer, shown, now = metrics.Writer(tmp_path), [], [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    log = metrics.StepLog(writer, lambda **values: shown.append(values), calls=7)

    def at(seconds, call, *args):
        now[0] = seconds
        call(*args)

    values = {"reward": jnp.float32(0.5), "accuracy": jnp.float32(0.25), "nfe": jnp.float32(2.0), "denoiser_calls": jnp.int32(10)}
    at(100.0, log.begin)
    at(100.1, log.write)  # there is nothing yet
    at(103.0, log.sampled)
    at(103.5, log.add, 1, values)
    at(104.0, log.begin)  # the second rollout is dispatched while the first step's updates run
    assert lines(tmp_path) == [] and shown == []
    at(105.0, log.write)
    at(109.0, log.sampled)
    at(109.5, log.add, 2, values)
    at(111.0, log.write)
    at(120.0, log.write)  # it is written already
    at(130.0, log.begin)  # nothing was under way
    at(131.0, log.sampled)
    at(131.5, log.add, 3, values)
    at(134.0, log.write)
    writer.close()
    plain = {"phase": "rl", "reward": 0.5, "accuracy": 0.25, "nfe": 2.0}
    expected = [(1, 3.0, 2.0, 17), (2, 4.0, 2.0, 27), (3, 1.0, 3.0, 37)]
    assert lines(tmp_path) == [
        plain | {"step": step, "time/rollout": rollout, "time/update": update, "denoiser_calls": calls}
        for step, rollout, update, calls in expected
    ]
    assert shown == [{"reward": 0.5, "accuracy": 0.25, "nfe": 2.0}] * 3 and log.calls == 37


# --- Weights & Biases ---


class FakeWandb(types.ModuleType):
    """Keeps what it is told; as the run, too."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.metrics, self.logged, self.summary, self.finished = [], {}, [], {}, 0

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, name, step_metric):
        self.metrics[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_gets_lines_and_summary_and_the_same_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    for step in (1, 2):
        writer = metrics.Writer(tmp_path / "run", "small", ConfigDict({"seed": 3, "rl": {"steps": 2}}))
        writer.write("rl", step, {"reward": np.float32(0.5), "kl": float("nan")})
        writer.summarise({"comparison": {"gain": np.float32(0.25), "base": float("inf")}})
        writer.close()
        writer.write("rl", 9, {"reward": 1.0})  # closed
    first, second = wandb.started
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 16
    assert (first["project"], first["config"], first["name"]) == ("small", {"seed": 3, "rl": {"steps": 2}}, "run")
    assert [line["rl/step"] for line in wandb.logged] == [1, 2] and wandb.metrics["rl/*"] == "rl/step"
    assert wandb.logged[0]["rl/reward"] == 0.5 and np.isnan(wandb.logged[0]["rl/kl"])
    assert wandb.summary == {"comparison": {"gain": 0.25, "base": "Infinity"}} and wandb.finished == 2


def test_wandb_is_not_touched_without_a_project_and_its_absence_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import fails
    metrics.Writer(tmp_path / "run").close()
    assert not (tmp_path / "run" / "wandb.id").exists()
    with pytest.raises(ImportError, match=r"wandb.project is set.*pip install"):
        metrics.Writer(tmp_path / "run", "small")


@pytest.mark.slow
def test_wandb_itself_takes_it_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = metrics.Writer(tmp_path, "small", ConfigDict({"seed": 3}))
    writer.write("rl", 1, {"reward": np.float32(0.5)})
    writer.summarise({"comparison": {"gain": 0.25}})
    writer.close()
    [record] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = record.read_bytes()
    for part in (b"rl/reward", b"rl/step", b"gain", (tmp_path / "wandb.id").read_bytes()):
        assert part in content


# --- profiles ---


def test_a_trace_of_chosen_steps(tmp_path):
    def run(steps, script):
        with metrics.profiled(tmp_path / str(len(script)), steps) as before:
            for step in script:
                before(step)
                jax.jit(lambda x: x + 1)(jnp.arange(step)).block_until_ready()
        return list((tmp_path / str(len(script))).rglob("*.xplane.pb"))

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
        patch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
        for steps, script, expected in [
            ((2, 3), range(1, 6), ["start", "stop"]),
            ((2, 9), range(1, 6), ["start", "stop"]),  # closed at the end
            ((2, 3), range(3, 6), ["start", "stop"]),  # resumed in between
            ((2, 3), range(4, 6), []),  # resumed behind
            ((), range(1, 6), []),
        ]:
            calls.clear()
            run(steps, script)
            assert calls == expected
    assert len(run((2, 3), [1, 2, 3, 4])) == 1
