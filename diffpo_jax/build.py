"""What every mode of the program starts from: the parts of a run, made from its configuration."""

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from diffpo_jax import data, sharding
from diffpo_jax.models import pretrained
from diffpo_jax.models.lora import PROJECTIONS, Trainable
from diffpo_jax.models.threshold_head import ThresholdHead
from diffpo_jax.models.transformer import OURS, ModelConfig, Policy
from diffpo_jax.tasks import Task, find_task
from diffpo_jax.tokenizer import load_tokenizer

KEYS = {name: number for number, name in enumerate(("policy", "threshold", "sft", "rl", "eval", "lora", "dropout", "study", "serve"))}


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run; none of them holds state that changes."""

    config: Any
    mesh: Mesh
    rollout_mesh: Mesh  # of rollouts and evaluations; the same one unless mesh.rollout says otherwise
    task: Task
    tokenizer: data.Tokenizer
    sources: dict[str, Any]  # "train", "test": random access to problems
    policy: Policy
    trainable: Trainable
    head: ThresholdHead

    def key(self, use: str) -> jax.Array:
        """The root key of one use of randomness, a name in `KEYS`."""
        return jax.random.fold_in(jax.random.key(self.config.seed), KEYS[use])


def build(config: Any, workdir: str) -> Parts:
    """Makes the data set under `workdir`/data unless it is there, and puts the parts together; `config` has passed `check_config`.

    Raises:
      ValueError: for sizes that do not fit the model or the mesh.
      FileNotFoundError: for a published model or files of a task that are not there.
    """
    policy, tokenizer = published_policy(config.model) if config.model.pretrained else own_policy(config)
    mesh, rollout_mesh = make_meshes(config, policy.config)
    policy = dataclasses.replace(policy, layout=sharding.Layout(mesh))
    sources = {}
    for split, source in data.prepare(config, os.path.join(workdir, "data")).items():
        sources[split], dropped = data.drop_long(source, tokenizer, config)
        if dropped:
            limit = config.task.prompt_length
            print(f"{config.task.name} {split}: {dropped} of {len(source)} prompts have more than {limit} tokens and are left out")
    task = find_task(config.task.name, config.data.d1_faithful)
    return Parts(config, mesh, rollout_mesh, task, tokenizer, sources, policy, make_trainable(config), make_head(config))


def make_meshes(config: Any, model: ModelConfig, devices: Any = None) -> tuple[Mesh, Mesh]:
    """The meshes of training and of rollouts that `config.mesh` asks for, over `devices` (all by default).

    Raises:
      ValueError: for sizes that the devices, the batches or the model do not divide into.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    own = any(config.mesh.rollout.values())
    rollout_mesh = sharding.remesh(mesh, config.mesh.rollout) if own else mesh
    sharding.check_divides("sft.batch_size", config.sft.batch_size, mesh)
    for each in (mesh, rollout_mesh):
        sharding.check_divides("rl.prompts * rl.group_size", config.rl.prompts * config.rl.group_size, each)
        sharding.check_divides("eval.batch_size", config.eval.batch_size, each)
        sharding.check_model(model, each)
    sharding.check_divides("sampler.lanes", config.sampler.lanes, rollout_mesh)
    return mesh, rollout_mesh


def make_head(config: Any) -> ThresholdHead:
    """The threshold network that `config.threshold_network` describes."""
    return ThresholdHead(**{field.name: config.threshold_network[field.name] for field in dataclasses.fields(ThresholdHead)})


def own_policy(config: Any) -> tuple[Policy, data.Tokenizer]:
    """The policy of the sizes in `config.model` and the tokenizer of the task's characters."""
    tokenizer = data.make_tokenizer(config)
    model = ModelConfig(**{field.name: config.model[field.name] for field in dataclasses.fields(ModelConfig)})
    if (model.vocab_size, model.mask_id) != (tokenizer.vocab_size, tokenizer.mask_id):
        raise ValueError(
            f"model.vocab_size = {model.vocab_size} and model.mask_id = {model.mask_id}, but the tokenizer of {config.task.name} has "
            f"{tokenizer.vocab_size} and {tokenizer.mask_id}: set them to these"
        )
    return Policy(model), tokenizer


def published_policy(settings: Any) -> tuple[Policy, data.Tokenizer]:
    """The policy of a published model, without its weights, and its tokenizer; `settings` as `config.model`."""
    folder = pretrained.resolve(settings.pretrained)
    model = pretrained.read_config(folder, **{name: settings[name] for name in OURS})
    special = pretrained.read_special_ids(folder)
    return Policy(model), load_tokenizer(settings.tokenizer or folder, mask_id=model.mask_id, vocab_size=model.vocab_size, **special)


def make_trainable(config: Any) -> Trainable:
    """What `config.lora` trains; its targets are named as the published model names them.

    Raises:
      ValueError: a target that matches no projection; the message lists those there are.
    """
    names = {name: name for name in PROJECTIONS}
    if config.model.pretrained:
        names = pretrained.published_projections(pretrained.read_model_type(pretrained.resolve(config.model.pretrained)))
    unknown = [name for name in config.lora.targets if name not in names]
    if unknown:
        raise ValueError(f"lora.targets: {', '.join(unknown)} matches nothing; known: {', '.join(names)}")
    return Trainable(config.lora.rank, config.lora.alpha, config.lora.dropout, tuple(names[name] for name in config.lora.targets))


class Grades(NamedTuple):
    """Scores of N responses, float32 [N] each."""

    reward: np.ndarray  # what RL trains on
    correct: np.ndarray  # 1 right, 0 wrong
    components: dict[str, np.ndarray]  # named parts of the training reward


def grade(parts: Parts, split: str, indices: np.ndarray, tokens: np.ndarray) -> Grades:
    """Scores responses: problem indices [N] and tokens [N, L]."""
    source, task = parts.sources[split], parts.task
    answers = {index: source[index]["answer"] for index in {int(i) for i in indices}}
    pairs = [(answers[int(index)], parts.tokenizer.decode(row)) for index, row in zip(indices, tokens, strict=True)]
    correct = np.array([task.reward(*pair) for pair in pairs], np.float32)
    if not parts.config.task.dense_reward:
        return Grades(correct, correct, {})
    rows = [task.components(*pair) for pair in pairs]
    components = {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]}
    return Grades(functools.reduce(np.add, components.values()), correct, components)
