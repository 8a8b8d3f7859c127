"""A whole run: base model by masked SFT, its accuracy-NFE curve, joint RL of model and threshold network, the curve again, the report."""

import contextlib
import functools
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from diffpo_jax import checkpoint, data, page, pareto, report, sft, sharding, storage
from diffpo_jax.build import Parts, build, grade
from diffpo_jax.config import check_config
from diffpo_jax.evaluate import Evaluation, evaluate_curve, load_curve, make_evaluate, operating_point, save_curve
from diffpo_jax.metrics import StepLog, Writer, profiled, progress
from diffpo_jax.models.pretrained import load_pretrained
from diffpo_jax.rollout import make_credit, make_rollout
from diffpo_jax.step import init_state, make_update
from diffpo_jax.structs import Prompts, TrainState

# Fields that do not change what is trained
IGNORED_ON_RESUME = ("eval", "serve", "mesh", "distributed", "checkpoints_to_keep", "sampler.lanes", "wandb", "profile_steps")


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient."""


def train(config: Any, workdir: str) -> dict[str, Any]:
    """Trains and evaluates as `config` says, or goes on where an earlier run in `workdir` stopped.

    Writes config.json, data/, sft/ (base model), checkpoints/, metrics.jsonl, tensorboard/, base.npz and trained.npz (test outcomes by
    problem over eval.thresholds), learned.npz (at the learned thresholds), pareto.png, summary.json, report.html.

    Args:
      config: see configs/default.py.
      workdir: the run's folder.

    Returns:
      The summary (see `report.write_summary`).

    Raises:
      ValueError: for a configuration that cannot run, or another one than the workdir's.
      RuntimeError: if another process uses the workdir.
      NonFiniteError: after `rl.max_bad_updates` bad updates in a row; the last good checkpoint is intact.
      SystemExit: code 0, after SIGTERM and a checkpoint.
    """
    with run_session(config, workdir) as (parts, writer, stopped):
        clock, seconds = time.monotonic(), {}

        def took(phase):
            nonlocal clock
            seconds[phase], clock = time.monotonic() - clock, time.monotonic()

        # Base model
        base = train_base(parts, workdir, writer, stopped)
        took("base model")
        evaluate = make_evaluate(parts, config.eval.limit)
        before = cached_curve(parts, workdir, "base", evaluate, base, stopped)
        took("base evaluation")

        # Reinforcement learning
        state, calls = train_rl(parts, workdir, base, writer, stopped)
        took("rl")

        # Evaluation and report
        trained = parts.trainable.join(base, state.params)
        after = cached_curve(parts, workdir, "trained", evaluate, trained, stopped)
        learned = evaluate(trained, **operating_point(config, state.threshold_params))
        save_curve(os.path.join(workdir, "learned.npz"), {float("nan"): learned}, evaluation_settings(config))
        took("evaluation")
        summary = report.summarise(parts.task.name, config.seed, before, after, learned)
        summary |= {"denoiser_calls": calls, "seconds": report.longest_seconds(workdir, seconds)}
        report.write_summary(workdir, summary)
        writer.summarise(summary)
        title = f"{config.task.name}: accuracy against NFE, seed {config.seed}"
        point, plot = summary["trained"]["operating_point"], os.path.join(workdir, "pareto.png")
        pareto.plot(plot, report.as_curve(before), report.as_curve(after), point, title)
        path = os.path.join(workdir, "report.html")
        page.write_report(path, parts, workdir, summary, before, learned, base, trained, state.threshold_params)
        report.print_report(summary)
        print(f"report: {path}")
        return summary


@contextlib.contextmanager
def run_session(config: Any, workdir: str) -> Iterator[tuple[Parts, Writer, Callable[[], bool]]]:
    """Locks `workdir`, checks that it is this configuration's, builds the parts, opens the metrics; SIGTERM and Ctrl-C become requests."""
    check_config(config)
    _keep_programs(workdir)
    with contextlib.ExitStack() as stack, _signals() as stopped:
        stack.enter_context(storage.explained(workdir, "the files of the run"))

        def claim() -> bytes:
            stack.enter_context(checkpoint.lock_workdir(workdir))
            for folder in dict.fromkeys([workdir, config.checkpoint_dir or workdir]):
                _forget_unused_config(folder)
                checkpoint.check_workdir(folder, config, IGNORED_ON_RESUME)
            return b""

        sharding.first_host(claim)  # whose workdir is the run's
        parts = build(config, workdir)
        writer = Writer(workdir, config.wandb.project, config)
        try:
            yield parts, writer, stopped
        except BaseException:
            with contextlib.suppress(OSError):  # as on a full disk: the first error is the one to tell
                writer.close()
            raise
        writer.close()


def _keep_programs(workdir: str) -> None:
    """Has JAX keep compiled programs beside the workdir; the environment's choice comes first."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.dirname(os.path.abspath(workdir)), ".jax_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _forget_unused_config(folder: str) -> None:
    """Removes config.json while nothing was made from it, so that a configuration which failed at its start can be corrected."""
    kept = ("sft/[0-9]*", "base.npz", "checkpoints/[0-9]*", "generations")
    if not any(any(epath.Path(folder).glob(pattern)) for pattern in kept):
        (epath.Path(folder) / "config.json").unlink(missing_ok=True)


def train_base(parts: Parts, workdir: str, writer: Writer, stopped: Callable[[], bool]) -> Any:
    """Parameters of the base model: published ones, or those of `sft.checkpoint`, or trained here and checkpointed under `workdir`/sft."""
    config, mesh = parts.config, parts.mesh
    if config.model.pretrained:
        return load_pretrained(config.model.pretrained, base_dtype(config), functools.partial(sharding.param_sharding, mesh))[1]
    state = sharding.init_sharded(mesh, functools.partial(_init_sft, parts), parts.key("policy"))
    if config.sft.checkpoint:
        given = checkpoint.open_manager(config.sft.checkpoint, read_only=True)
        if given.damaged:
            raise storage.DamagedError(f"the newest checkpoint of sft.checkpoint={config.sft.checkpoint} is damaged: copy or make it again")
        return checkpoint.restore(given, None, checkpoint.abstract({"params": state.params}), partial=True)["params"]

    update, rows = sft.make_sft_update(parts.policy, config, parts.key("sft"), mesh), config.sft.batch_size
    checkpoints = checkpoint.open_manager(checkpoint.folder_of(config, workdir, "sft"), max_to_keep=2, every=config.sft.checkpoint_every)
    step = checkpoint.latest_step(checkpoints) or 0
    if step == config.sft.steps:  # nothing to train: do not read the training data
        return checkpoint.restore(checkpoints, step, checkpoint.abstract(state)).params
    mine = sharding.host_rows(mesh, rows)
    batches = data.train_batches(
        parts.sources["train"], parts.tokenizer, config, batch_size=rows, seed=config.seed, mine=mine, demonstrations=True
    )
    if step:
        state = checkpoint.restore(checkpoints, step, checkpoint.abstract(state), batches)
    writer.truncate("sft", step)
    with progress("base model", config.sft.steps, step) as advance:
        shown = {}
        for step in range(step + 1, config.sft.steps + 1):  # noqa: B020
            batch = next(batches)
            prompts = Prompts(batch["prompt"], batch["prompt_mask"])
            state, metrics = update(state, *sharding.put_rows(mesh, (prompts, batch["response"]), rows))
            if step % config.sft.log_every == 0:
                shown = {name: float(value) for name, value in metrics.items()}
                writer.write("sft", step, shown)
                if not shown["loss"] < float("inf"):
                    raise NonFiniteError(f"the supervised loss is {shown['loss']} at update {step}; lower sft.learning_rate")
            stop = stopped()  # asked once, so that a run that ends here has been saved
            checkpoint.save(checkpoints, step, state, batches, force=step == config.sft.steps or stop)
            advance(**shown)
            exit_if(stop)
    checkpoint.close(checkpoints)
    return state.params


def base_dtype(config: Any) -> str:
    """The dtype of the base model's parameters: of a published one as model.param_dtype says, "auto" = bfloat16 where it is frozen."""
    given = config.model.param_dtype if config.model.pretrained else "float32"
    return {"auto": "bfloat16" if config.lora.rank else "float32"}.get(given, given)


def _init_sft(parts: Parts, key: jax.Array) -> sft.SftState:
    params = parts.policy.init(key)
    return sft.SftState(jnp.zeros((), jnp.int32), params, sft.make_optimiser(parts.config).init(params))


def init_train_state(parts: Parts, base: Any) -> TrainState:
    """The state RL starts from, split over the mesh; nothing of it is shared with `base`, because updates donate their state."""
    return sharding.init_sharded(parts.mesh, functools.partial(initial_state, parts), base, parts.key("threshold"), parts.key("lora"))


def initial_state(parts: Parts, base: Any, key_threshold: jax.Array, key_lora: jax.Array) -> TrainState:
    """`init_train_state` as a pure function."""
    threshold_params = parts.head.init(key_threshold, parts.policy.config.width)
    return init_state(parts.config, parts.trainable.init(key_lora, base), threshold_params)


def train_rl(parts: Parts, workdir: str, base: Any, writer: Writer, stopped: Callable[[], bool]) -> tuple[TrainState, int]:
    """RL from `base`, which is also the reference of the KL. Returns the final state and the denoiser calls spent."""
    config, rl = parts.config, parts.config.rl
    rollout, credit = make_rollout(parts), make_credit(parts)
    update = make_update(parts.policy, parts.trainable, parts.head, config, parts.tokenizer.eos_id, parts.key("dropout"), parts.mesh)
    quick_evaluate = make_evaluate(parts, limit=config.eval.batch_size)
    state, calls, step = init_train_state(parts, base), 0, 0
    batches = data.train_batches(
        parts.sources["train"], parts.tokenizer, config, batch_size=rl.prompts, seed=config.seed + 1, group_size=rl.group_size,
        mine=sharding.host_rows(parts.mesh, rl.prompts * rl.group_size),
    )  # fmt: skip

    checkpoints = checkpoint.open_manager(checkpoint.folder_of(config, workdir, "checkpoints"), config.checkpoints_to_keep)
    if latest := checkpoint.latest_step(checkpoints):
        step = latest
        state = checkpoint.restore(checkpoints, step, checkpoint.abstract(state), batches)
        calls = checkpoint.restore_counters(checkpoints, step)["denoiser_calls"]
    for phase in ("rl", "eval"):
        writer.truncate(phase, step)

    with progress("rl", rl.steps, step) as advance, profiled(workdir, config.profile_steps) as profile:
        log = StepLog(writer, advance, calls)

        def settle():
            """Waits for the updates under way and writes their line; `state` is then known to be good, or that it is not."""
            log.write()
            _stop_if_bad(state, rl.max_bad_updates, checkpoints)

        done = spent(rl, step, calls)
        while not done:
            step, batch = step + 1, next(batches)
            profile(step)
            log.begin()
            trajectory, likelihoods = rollout(state, base, batch, jax.random.fold_in(parts.key("rl"), step))
            settle()  # the step before, now that the devices know what comes next
            tokens = sharding.get_rows(trajectory.tokens)  # all that the loop waits for
            log.sampled()
            group, metrics = credit(trajectory, likelihoods, grade(parts, "train", batch["index"], tokens))
            for i in range(rl.inner_steps):
                state, update_metrics = update(state, base, group, jnp.asarray(i))
            log.add(step, metrics | update_metrics)
            if rl.calls:
                settle()
            done = spent(rl, step, log.calls)
            if step % rl.eval_every == 0 and not done:
                settle()
                params = parts.trainable.join(base, state.params)
                writer.write("eval", step, _scalars(quick_evaluate(params, **operating_point(config, state.threshold_params))))
            stop = stopped()
            if stop or done or step % rl.checkpoint_every == 0:
                settle()
                if int(state.bad_updates) == 0:
                    checkpoint.save(checkpoints, step, state, batches, {"denoiser_calls": log.calls})
            exit_if(stop)
    checkpoint.close(checkpoints)
    return state, log.calls


def spent(rl: Any, step: int, calls: int) -> bool:
    """Whether RL is over after so many iterations and denoiser calls."""
    return step >= rl.steps or 0 < rl.calls <= calls


def cached_curve(
    parts: Parts, workdir: str, name: str, evaluate: Callable[..., Evaluation], params: Any, stopped: Callable[[], bool]
) -> dict[float, Evaluation]:
    """The accuracy-NFE curve of `params`, kept in `workdir`/NAME.npz and made anew when the settings it depends on change."""
    path, settings = Path(workdir) / f"{name}.npz", evaluation_settings(parts.config)
    stored = sharding.first_host(lambda: path.read_bytes() if path.exists() else b"")
    if stored:
        try:
            curve, made_with = load_curve(io.BytesIO(stored))
        except ValueError as error:
            print(f"{path} is damaged ({error}); it is made again", flush=True)
            made_with = None
        if made_with == settings:
            return curve
    with progress(f"evaluation of the {name} model", len(parts.config.eval.thresholds)) as advance:

        def after_each(**shown):
            advance(**shown)
            exit_if(stopped())

        curve = evaluate_curve(evaluate, parts, params, after_each)
    save_curve(path, curve, settings)
    return curve


def evaluation_settings(config: Any) -> str:
    """JSON of what an evaluation at given thresholds depends on, besides model and problems."""
    sampler = {name: value for name, value in config.sampler.items() if name not in ("lanes", "mixture", "temperature", "threshold")}
    return json.dumps(checkpoint.to_json({"eval": config.eval, "sampler": sampler}), sort_keys=True)


def _scalars(evaluation: Evaluation) -> dict[str, float]:
    point = report.point(evaluation.correct, evaluation.nfe, evaluation.tokens, evaluation.seconds)
    return {name: point[name] for name in ("accuracy", "nfe", "tokens_per_call")} | {"threshold": float(evaluation.threshold.mean())}


def _stop_if_bad(state: TrainState, limit: int, checkpoints: checkpoint.Checkpoints) -> None:
    if int(state.bad_updates) >= limit:
        raise NonFiniteError(
            f"{limit} updates in a row had a non-finite loss or gradient and were skipped; the last good checkpoint is step "
            f"{checkpoint.latest_step(checkpoints)} in {checkpoints.folder}. Lower rl.learning_rate or rl.importance_cap."
        )


def exit_if(stop: bool) -> None:
    """Ends the program with code 0 where that was asked for."""
    if stop:
        print("stopped; the same command goes on from here", flush=True)
        raise SystemExit(0)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM or Ctrl-C has come to any host; never, where this is not the main thread.

    The end that follows a Ctrl-C is a KeyboardInterrupt here; a second one is that at once.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        if number == signal.SIGINT:
            os.write(2, b"\nCtrl-C: saves after the step under way and ends; once more ends at once\n")  # print may be at work

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        yield lambda: sharding.any_host(False)
        return
    try:
        yield lambda: sharding.any_host(bool(received))
    except SystemExit:
        if signal.SIGINT in received:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
