"""What every mode of the program starts from: the parts of a run, made from its configuration."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffpo_jax import data, sharding
from diffpo_jax.models.threshold_head import ThresholdHead
from diffpo_jax.models.transformer import ModelConfig, Policy
from diffpo_jax.tasks import TASKS, Task

KEYS = {name: number for number, name in enumerate(("policy", "threshold", "sft", "rl", "eval"))}


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run; none of them holds state that changes."""

    config: Any
    mesh: Mesh
    task: Task
    tokenizer: Any
    sources: dict[str, data.ProblemSource]  # "train", "test"
    policy: Policy
    head: ThresholdHead

    def key(self, use: str) -> jax.Array:
        """The root key of one use of randomness, a name in `KEYS`."""
        return jax.random.fold_in(jax.random.key(self.config.seed), KEYS[use])


def build(config: Any, workdir: str) -> Parts:
    """Makes the data set under `workdir`/data unless it is there, and puts the parts together; `config` has passed `check_config`.

    Raises:
      ValueError: for sizes that do not fit the model or the mesh.
    """
    mesh = sharding.make_mesh(config.mesh.data)
    sharding.check_divides("rl.prompts * rl.group_size", config.rl.prompts * config.rl.group_size, mesh)
    sharding.check_divides("sft.batch_size", config.sft.batch_size, mesh)
    sharding.check_divides("eval.batch_size", config.eval.batch_size, mesh)
    tokenizer = data.make_tokenizer(config)
    model = dict(config.model)
    if (model["vocab_size"], model["mask_id"]) != (tokenizer.vocab_size, tokenizer.mask_id):
        raise ValueError(
            f"model.vocab_size = {model['vocab_size']} and model.mask_id = {model['mask_id']}, but the tokenizer of {config.task.name} has "
            f"{tokenizer.vocab_size} and {tokenizer.mask_id}"
        )
    net = dict(config.threshold_network)
    head = ThresholdHead(**{field.name: net[field.name] for field in dataclasses.fields(ThresholdHead)})
    policy = Policy(ModelConfig(**model))
    sources = data.prepare(config, os.path.join(workdir, "data"))
    return Parts(config, mesh, TASKS[config.task.name], tokenizer, sources, policy, head)


def grade(parts: Parts, split: str, indices: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores responses: problem indices [N] and tokens [N, L] -> (training reward [N], right or wrong [N]), float32."""
    source, task = parts.sources[split], parts.task
    answers = {index: source[index]["answer"] for index in {int(i) for i in indices}}
    pairs = [(answers[int(index)], parts.tokenizer.decode(row)) for index, row in zip(indices, tokens, strict=True)]
    correct = np.array([task.reward(*pair) for pair in pairs], np.float32)
    if not parts.config.task.dense_reward:
        return correct, correct
    return np.array([task.dense_reward(*pair) for pair in pairs], np.float32), correct
