"""Accuracy and NFE on the test problems, at fixed thresholds or at the learned ones."""

import dataclasses
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from diffpo_jax import data, sharding, storage
from diffpo_jax.build import Parts, grade
from diffpo_jax.rollout import rollout_params, sample, sampler_options
from diffpo_jax.sampling.denoise import response_mask
from diffpo_jax.sampling.unmasking import THRESHOLD_RULES
from diffpo_jax.step import MODES
from diffpo_jax.structs import Prompts


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Outcome of each of n test problems."""

    correct: np.ndarray  # [n] share of right samples
    nfe: np.ndarray  # [n] mean denoiser calls
    tokens: np.ndarray  # [n] mean response tokens, up to and including the first EOS
    threshold: np.ndarray  # [n] inference threshold
    seconds: float  # wall time


def evaluated(parts: Parts, limit: int = 0) -> range:
    """Indices of the first `limit` test problems after eval.skip (0 = all of them); ValueError where that leaves none."""
    skip, count = parts.config.eval.skip, len(parts.sources["test"])
    if skip >= count:
        raise ValueError(f"eval.skip = {skip} leaves none of the {count} test problems")
    return range(skip, min(skip + (limit or count), count))


def make_evaluate(parts: Parts, limit: int = 0) -> Callable[..., Evaluation]:
    """`evaluate(params, threshold=gamma)` or `evaluate(params, threshold_params=...)` over the problems that are `evaluated`."""
    config, mesh = parts.config, parts.mesh
    options = sampler_options(parts) | {"temperature": config.eval.temperature}
    skip, problems = config.eval.skip, [parts.sources["test"][i] for i in evaluated(parts, limit)]
    size = config.eval.batch_size
    batches = list(data.eval_batches(problems, parts.tokenizer, config, size, mine=sharding.host_rows(mesh, size)))

    def evaluate(params, *, threshold: float | None = None, threshold_params: Any = None) -> Evaluation:
        start, rows, params = time.monotonic(), [], rollout_params(parts, params)
        chosen = sampler_choice(parts, threshold, threshold_params)
        for number, batch in enumerate(batches):
            prompts = sharding.put_rows(mesh, Prompts(batch["prompt"], batch["prompt_mask"]), size)
            valid = np.arange(size) < len(problems) - number * size
            samples = []
            for repeat in range(config.eval.repeats):
                key = jax.random.fold_in(parts.key("eval"), repeat * len(batches) + number)
                trajectory = sample(parts, params, prompts, key, **options, **chosen)
                correct = grade(parts, "test", skip + batch["index"], sharding.get_rows(trajectory.tokens)).correct
                counted = response_mask(trajectory.tokens, parts.tokenizer.eos_id).sum(axis=1)
                outcome = [sharding.put_rows(mesh, correct, size), trajectory.nfe, counted]
                outcome += [] if trajectory.draw is None else [trajectory.draw.gamma]
                outcome = sharding.fetch(outcome)
                samples.append(np.stack([*outcome, *([np.full(size, threshold)] if threshold_params is None else [])]))
            rows.append(np.mean(samples, axis=0)[:, valid])
        correct, nfe, tokens, gamma = np.concatenate(rows, axis=1)
        return Evaluation(correct, nfe, tokens, gamma, time.monotonic() - start)

    return evaluate


def sampler_choice(parts: Parts, threshold: float | None = None, threshold_params: Any = None) -> dict[str, Any]:
    """The arguments of `sample` for a threshold of all rows, or for those that the threshold network of these params chooses."""
    if threshold_params is None:
        return {"threshold": threshold}
    return {"threshold_fn": parts.head.mode, "threshold_params": threshold_params}


def operating_point(config: Any, threshold_params: Any) -> dict[str, Any]:
    """What `evaluate` takes at a run's operating point: the threshold network's choice where the run trains it, else sampler.threshold."""
    return {"threshold_params": threshold_params} if MODES[config.rl.mode][1] else {"threshold": config.sampler.threshold}


def evaluate_curve(evaluate: Callable[..., Evaluation], parts: Parts, params: Any, advance: Callable[..., None]) -> dict[float, Evaluation]:
    """An evaluation at each of `eval.thresholds` (of sampler.threshold alone, for a rule that takes none); `advance` after each."""
    learned = parts.config.sampler.rule in THRESHOLD_RULES
    gammas = sorted(parts.config.eval.thresholds) if learned else [parts.config.sampler.threshold]
    curve = {}
    for gamma in gammas:
        curve[gamma] = evaluate(params, threshold=gamma)
        advance(gamma=gamma, accuracy=curve[gamma].correct.mean(), nfe=curve[gamma].nfe.mean())
    return curve


def save_curve(path: str | Path, evaluations: dict[float, Evaluation], settings: str) -> None:
    """Writes evaluations at thresholds, and the settings they were made with, to an .npz file, in one go; the first host does."""
    if jax.process_index() != 0:
        return
    fields: dict[str, Any] = {"gammas": np.array(list(evaluations)), "settings": np.array(settings)}
    for field in dataclasses.fields(Evaluation):
        fields[field.name] = np.stack([getattr(each, field.name) for each in evaluations.values()])
    with storage.replacing(path, "wb") as file:
        np.savez(file, **fields)


def load_curve(path: str | BinaryIO) -> tuple[dict[float, Evaluation], str]:
    """(evaluations, settings) that `save_curve` wrote.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is cut off or damaged.
    """
    try:
        return _load_curve(path)
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, OSError, RuntimeError) as error:  # all that flipped bits have led to
        raise ValueError(f"not a whole file of evaluations: {error}") from None


def _load_curve(path: str | BinaryIO) -> tuple[dict[float, Evaluation], str]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {field.name: file[field.name] for field in dataclasses.fields(Evaluation)}
        curve = {float(gamma): Evaluation(**{k: v[i] for k, v in arrays.items()}) for i, gamma in enumerate(file["gammas"])}
        return curve, str(file["settings"])
