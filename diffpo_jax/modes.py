"""What else a workdir can be asked for: the base model alone, evaluations, a look at how it denoises, a published model's files."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from rich.console import Console
from rich.text import Text

from diffpo_jax import checkpoint, data, denoisings, generations, page, pareto, report
from diffpo_jax.build import Parts
from diffpo_jax.config import check_config
from diffpo_jax.evaluate import evaluate_curve, make_evaluate, operating_point
from diffpo_jax.metrics import Writer, progress
from diffpo_jax.models import adapters, pretrained
from diffpo_jax.tasks import find_task
from diffpo_jax.train import cached_curve, exit_if, init_train_state, run_session, train_base


def train_sft(config: Any, workdir: str) -> dict[str, Any]:
    """Trains the base model alone and evaluates it. Arguments and errors as `train`; returns the base part of its summary."""
    with run_session(config, workdir) as (parts, writer, stopped):
        base = train_base(parts, workdir, writer, stopped)
        curve = cached_curve(parts, workdir, "base", make_evaluate(parts, config.eval.limit), base, stopped)
        summary = {"task": parts.task.name, "seed": config.seed, "base": {"curve": report.curve_points(curve)}}
        report.print_report(summary)
        return summary


def evaluate(config: Any, workdir: str) -> dict[str, Any]:
    """Evaluates what was trained in `workdir`, and prints a table of it.

    With `eval.score_file` the generations in that file are scored again, without a model. With `eval.lengths` this is the evaluation
    protocol of the field (see `diffpo_jax.generations`), of the newest RL checkpoint or, where there is none, of the base model: a line a
    problem in files under `workdir`/generations/CHECKPOINT. Otherwise it is the newest RL checkpoint over `eval.thresholds` and at the
    learned thresholds, in `workdir`/evaluation-STEP.json, .png and .html.

    Returns:
      {"table": rows of `generations.summarise`}, or what it wrote: {"task", "seed", "step", "base", "trained", "comparison"}.

    Raises:
      FileNotFoundError: if there is no checkpoint, or no such file.
      ValueError, RuntimeError: as `train`.
    """
    if config.eval.score_file:
        return score_again(config, workdir)
    with run_session(config, workdir) as (parts, writer, stopped):
        if list(config.eval.lengths):
            return evaluate_lengths(parts, workdir, writer, stopped)
        newest = restore(parts, workdir, writer, stopped)
        base, params, threshold_params, step = newest.base, newest.params, newest.threshold_params, newest.step
        run = make_evaluate(parts, config.eval.limit)
        before = cached_curve(parts, workdir, "base", run, base, stopped)
        with progress(f"evaluation of step {step}", len(config.eval.thresholds)) as advance:
            after = evaluate_curve(run, parts, params, advance)
        chosen = run(params, **operating_point(config, threshold_params))
        summary = report.summarise(parts.task.name, config.seed, before, after, chosen)
        summary["step"] = step
        name = os.path.join(workdir, f"evaluation-{step}")
        checkpoint.write_json(f"{name}.json", summary)
        title, point = f"{parts.task.name}, step {step}", summary["trained"]["operating_point"]
        pareto.plot(f"{name}.png", report.as_curve(before), report.as_curve(after), point, title)
        page.write_report(f"{name}.html", parts, workdir, summary, before, chosen, base, params, threshold_params)
        report.print_report(summary)
        print(f"report: {name}.html")
        return summary


def evaluate_lengths(parts: Parts, workdir: str, writer: Writer, stopped: Callable[[], bool]) -> dict[str, Any]:
    """`evaluate` with `eval.lengths`."""
    config, threshold_params, name = parts.config, None, "base"
    generations.settings(config, learned=True)  # what is wrong with them shows before the model is read
    if any(epath.Path(checkpoint.folder_of(config, workdir, "checkpoints")).glob("[0-9]*")):
        newest = restore(parts, workdir, writer, stopped)
        params, threshold_params, name = newest.params, newest.threshold_params, f"step-{newest.step}"
    else:
        params = train_base(parts, workdir, writer, stopped)
    folder = os.path.join(workdir, "generations", name)
    chosen = operating_point(config, threshold_params).get("threshold_params")
    rows = generations.run(parts, params, folder, name, chosen, lambda: exit_if(stopped()))
    Console().print(generations.table(rows, f"{parts.task.name}, {name}: {folder}"))
    return {"table": rows}


def score_again(config: Any, workdir: str) -> dict[str, Any]:
    """`evaluate` with `eval.score_file`."""
    check_config(config)
    source = data.prepare(config, os.path.join(workdir, "data"))["test"]
    row = generations.score_file(find_task(config.task.name, config.data.d1_faithful), source, config.eval.score_file)
    Console().print(generations.table([row], config.eval.score_file))
    print(f"verdicts changed to right: {row['to_right']}, to wrong: {row['to_wrong']}")
    return {"table": [row]}


def export(config: Any, workdir: str) -> str:
    """Writes the newest RL checkpoint as a published model: `workdir`/export-STEP, and returns that folder.

    It is a directory in the layout of model.pretrained, whose tensors, shards, configuration and tokenizer it repeats, with the adapters
    merged; beside it lie the adapters alone (adapter/, PEFT's layout) and the threshold network (threshold_head.safetensors, .json).

    Raises:
      ValueError: model.pretrained is not set.
      FileNotFoundError: there is no checkpoint.
      FileExistsError: it was exported already.
    """
    need_one_host("export")
    if not config.model.pretrained:
        raise ValueError("--mode=export writes a published model's layout: only runs that started from model.pretrained can be exported")
    with run_session(config, workdir) as (parts, writer, stopped):
        _, base, trained, threshold_params, step = restore(parts, workdir, writer, stopped)
        folder = os.path.join(workdir, f"export-{step}")
        source, trainable = config.model.pretrained, parts.trainable
        pretrained.save_pretrained(folder, parts.policy, trainable.merge(base, trained), source)
        adapters.save_threshold_head(folder, dataclasses.asdict(parts.head), threshold_params)
        if trainable.rank:
            kind = pretrained.read_model_type(source)
            adapters.save_adapter(os.path.join(folder, "adapter"), trainable, trained, kind, source)
        print(f"exported step {step} to {folder}")
        return folder


def sample(config: Any, workdir: str, console: Console | None = None) -> list[denoisings.Record]:
    """Prints how the newest checkpoint denoises `eval.num_samples` test problems, step by step, at its operating point: these records."""
    need_one_host("sample")
    with run_session(config, workdir) as (parts, writer, stopped):
        run = restore(parts, workdir, writer, stopped)
        chosen = operating_point(config, run.threshold_params)
        _, records = denoisings.denoise_test(parts, run.params, config.eval.num_samples, **chosen)
        for record in records:
            print_record(console or Console(), record, "learned threshold" if "threshold_params" in chosen else "threshold")
        return records


def print_record(console: Console, record: denoisings.Record, threshold: str) -> None:
    """Prints a record (see `denoisings`): a line a denoiser call, what it unmasked in brackets and in colour. `threshold`: its name."""
    console.print(Text(f"\nprompt    {record['prompt']}", style="bold"))
    for step in range(record["nfe"]):
        line = Text(f"call {step + 1:3d}  ")
        for symbol, when in zip(record["tokens"], record["steps"], strict=True):
            new = when == step
            text = f"[{symbol}]" if new else f" {symbol if when < step else '_'} "
            line.append(text, style="bold green" if new else "dim" if when > step else "")
        console.print(line, soft_wrap=True)
    verdict = Text("right", style="bold green") if record["correct"] else Text("wrong", style="bold red")
    console.print(Text(f"answer    {record['answer']}   ") + verdict)
    chosen = "" if record["gamma"] is None else f", {threshold} {record['gamma']:.3g}"
    console.print(Text(f"          reward {record['reward']:.2f}, NFE {record['nfe']}{chosen}"))


def need_one_host(mode: str) -> None:
    """Raises ValueError where this is one of several processes."""
    if jax.process_count() > 1:
        raise ValueError(f"--mode={mode} runs on one host: start it there alone, without distributed.initialize, on the same checkpoints")


class Run(NamedTuple):
    """The parts of a run and what it has trained so far."""

    parts: Parts
    base: Any  # parameters of the policy before RL
    trained: Any  # what RL trains of it: all of them, or adapters (see diffpo_jax.models.lora)
    threshold_params: Any  # of the threshold network
    step: int  # RL iterations done at the checkpoint

    @property
    def params(self) -> Any:
        """Parameters of the policy after RL."""
        return self.parts.trainable.join(self.base, self.trained)


def load(config: Any, workdir: str) -> Run:
    """The newest RL checkpoint of `workdir`, for work in Python: run.parts.policy with run.base or run.params. Errors as `evaluate`."""
    with run_session(config, workdir) as (parts, writer, stopped):
        return restore(parts, workdir, writer, stopped)


def restore(parts: Parts, workdir: str, writer: Writer, stopped: Callable[[], bool]) -> Run:
    """The newest RL checkpoint of `workdir`, of a session that is open; FileNotFoundError if there is none."""
    checkpoints = checkpoint.open_manager(checkpoint.folder_of(parts.config, workdir, "checkpoints"), read_only=True)
    step = checkpoint.latest_step(checkpoints)
    if step is None:
        raise FileNotFoundError(f"no checkpoint in {checkpoints.folder}: train first, or check the path")
    base = train_base(parts, workdir, writer, stopped)
    fresh = init_train_state(parts, base)
    wanted = checkpoint.abstract({"params": fresh.params, "threshold_params": fresh.threshold_params})
    state = checkpoint.restore(checkpoints, step, wanted, partial=True)
    return Run(parts, base, state["params"], state["threshold_params"], step)
