"""What a run needs of a machine, before paying for it: every program of a training step compiled for it, here, without weights.

    python -m diffpo_jax.plan --config=configs/math.py:llada_8b --topology=v5e:4x4
    python -m diffpo_jax.plan --config=configs/sudoku.py --topology=cpu:8 --json

TPU slices need the TPU compiler, which runs on any machine (`pip install -e ".[tpu]"`). All that is said of a program is read from what the
compiler made: memory from its own account, FLOPs, HBM traffic and bytes between chips from the program's text, every loop body counted as
often as it runs (see `diffpo_jax.cost`). Times are those of a roofline: the longest of FLOPs / peak, bytes / bandwidth and bytes sent /
links of a chip, as if each overlapped the others and nothing else took time. "x least" compares the FLOPs with the fewest that the
computation needs, worked out by hand: the trunk over every position, the head where it is read, nothing computed a second time.
"""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from diffpo_jax import build, command_line, cost, hlo, sharding
from diffpo_jax.config import check_config
from diffpo_jax.flops import Least
from diffpo_jax.models import pretrained
from diffpo_jax.models.transformer import OURS, Policy
from diffpo_jax.rollout import lanes, make_score, rollout_options
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.step import make_update
from diffpo_jax.structs import Prompts, ScoredGroup
from diffpo_jax.train import base_dtype, initial_state

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do, by its maker's data sheet."""

    flops: float  # bfloat16 a second
    memory: float  # bytes of HBM that a program can have
    bandwidth: float  # bytes a second of HBM
    links: float  # bytes a second that a chip sends to others, over all its links


CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95.0 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 31.25 * GIB, 1640e9, 448e9),
}
ADVICE = {
    "rollout": "fewer sampler.lanes or rl.prompts; split parameters further (mesh.fsdp, mesh.tensor, mesh.rollout)",
    "score": "lower rl.prompts, rl.group_size or likelihood.num_latents; split parameters further (mesh.fsdp, mesh.tensor)",
    "update": "lower rl.microbatch or model.head_chunk; model.remat=full; split parameters further (mesh.fsdp=-1, mesh.tensor); "
    "adapters (lora.rank), or model.param_dtype=bfloat16 for a frozen start that is not float32",
    "reshard": "take a mesh.rollout that splits parameters further, or none",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program. Bytes are a chip's; FLOPs those of all chips."""

    name: str
    runs: int  # a training step
    fits: bool
    memory: dict[str, float]  # bytes: "arguments", "outputs", "temporaries" (code included), "held" (state that lies beside it), "total"
    flops: float = 0.0  # a run
    least_flops: float = 0.0  # the fewest that a run needs
    bytes: float = 0.0  # HBM traffic of a run
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # kind -> {"count", "bytes" sent}, a run
    compile_seconds: float = 0.0
    seconds: dict[str, float] | None = None  # roofline of a run: "compute", "memory", "links"; None where the chip is not known
    largest: tuple[str, ...] = ()  # its largest arrays
    error: str = ""  # the compiler's, where it does not fit


# --- the programs of a step ---


def make_parts(config: Any, devices: Any) -> build.Parts:
    """The parts of a run over `devices` that are not there: no data, no weights, of the tokenizer only the id of EOS."""
    if config.model.pretrained:
        config.model.pretrained = pretrained.resolve(config.model.pretrained, weights=False)
        model = pretrained.read_config(config.model.pretrained, **{name: config.model[name] for name in OURS})
        eos_id = pretrained.read_special_ids(config.model.pretrained)["eos_id"]
    else:
        policy, characters = build.own_policy(config)
        model, eos_id = policy.config, characters.eos_id
    if model.dtype == "auto" and devices[0].platform == "tpu":
        model = dataclasses.replace(model, dtype="bfloat16")
    mesh, rollout_mesh = build.make_meshes(config, model, devices)
    policy = Policy(model, sharding.Layout(mesh))
    task: Any = None  # a plan has no problems
    tokenizer: Any = SimpleNamespace(eos_id=eos_id)
    return build.Parts(config, mesh, rollout_mesh, task, tokenizer, {}, policy, build.make_trainable(config), build.make_head(config))


def _at(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` with shardings, one for each leaf or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def compile_step(parts: build.Parts, nfe: int, chip: Chip | None, after_each: Callable[[Program, str], None]) -> list[Program]:
    """Compiles rollout, score, update and, with a mesh of rollouts, what brings parameters there; `nfe` denoiser calls a row."""
    config, mesh, there = parts.config, parts.mesh, parts.rollout_mesh
    rows, prompt_length = config.rl.prompts * config.rl.group_size, config.task.prompt_length
    by_rows, whole = sharding.rows_sharding(mesh), sharding.replicated_sharding(mesh)

    def params(tree, on=mesh):
        return _at(tree, sharding.params_sharding(on, tree))

    key = _at(jax.eval_shape(lambda: jax.random.key(0)), whole)
    base = jax.eval_shape(parts.policy.init, key)
    base = params(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, base_dtype(config)), base))
    state = params(jax.eval_shape(lambda *args: initial_state(parts, *args), base, key, key))
    joined = params(jax.eval_shape(parts.trainable.join, base, state.params))
    policy = dataclasses.replace(parts.policy, layout=sharding.Layout(there))
    at_once, whole = lanes(parts, rows), whole_calls(config, nfe)
    trips = whole * -(-rows // at_once), (nfe - whole) / whole  # of the sampler's loops, the only ones whose length is not known

    def rollout(params, threshold_params, prompts, key):
        return denoise(policy, params, prompts.tokens, prompts.mask, key, lanes=at_once, **rollout_options(parts, threshold_params))

    tokens = jax.ShapeDtypeStruct((rows, prompt_length), jnp.int32)
    prompts = _at(Prompts(tokens, jax.ShapeDtypeStruct(tokens.shape, bool)), sharding.rows_sharding(there))
    away, thresholds = params(joined, there), params(state.threshold_params, there)
    least, programs = Least.of(parts), []

    def compiled(name, runs, least_flops, held, function, *args):
        program, outputs, text = _compile(name, runs, least_flops, _local_bytes(held), chip, mesh.size, trips, function, *args)
        programs.append(program)
        after_each(program, text)
        return outputs

    optimisers = (state.opt_state, state.threshold_opt_state)
    start = () if parts.trainable.rank else base  # of what is trained in full it is the reference alone
    beside = (optimisers, start)
    if there != mesh:
        compiled("reshard", 1, 0.0, beside, jax.jit(lambda x: x, out_shardings=jax.tree.map(lambda x: x.sharding, away)), joined)
    held = (beside, () if there == mesh else joined)
    trajectory = jax.eval_shape(rollout, away, thresholds, prompts, key)
    key_there = _at(key, sharding.replicated_sharding(there))
    compiled("rollout", 1, least.rollout(nfe, whole), held, jax.jit(rollout), away, thresholds, prompts, key_there)
    score, trajectory = make_score(parts.policy, parts.trainable, config), _at(trajectory, by_rows)
    inputs = (state.params, base, trajectory, key)
    scored = compiled("score", 1, least.score(), optimisers, score, *inputs)
    likelihoods = jax.eval_shape(score, *inputs)
    likelihoods = _at(likelihoods, scored or sharding.named(mesh, None, "rows"))
    advantages = jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=by_rows)
    group = ScoredGroup(trajectory=trajectory, advantages=advantages, sampler_advantages=advantages, **likelihoods)
    root = parts.key("dropout")
    update = make_update(parts.policy, parts.trainable, parts.head, config, parts.tokenizer.eos_id, root, mesh)
    compiled("update", config.rl.inner_steps, least.update(), start, update, state, base, group, jax.ShapeDtypeStruct((), jnp.int32))
    return programs


def whole_calls(config: Any, nfe: int) -> int:
    """How many of a row's `nfe` calls run over all of it; as many in each block."""
    sampler, length = config.sampler, config.task.response_length
    if sampler.cache == "none":
        return nfe
    blocks = length // (sampler.block_length or length)
    return min(nfe, blocks * (math.ceil(nfe / blocks / sampler.refresh) if sampler.refresh else 1))


def _local_bytes(tree: Any) -> float:
    """Bytes that a device holds of abstract arrays."""
    shapes = [(x.sharding.shard_shape(x.shape) if x.sharding else x.shape, x.dtype.itemsize) for x in jax.tree.leaves(tree)]
    return float(sum(math.prod(shape) * size for shape, size in shapes))


def _compile(
    name: str, runs: int, least: float, held: float, chip: Chip | None, devices: int, trips: tuple[float, ...], function: Any,
    *args: Any,
) -> tuple[Program, Any, str]:  # fmt: skip
    """(the program, its outputs' shardings, None where it does not fit, and its text); `trips` of `cost.analyse`."""
    start = time.monotonic()
    lowered = function.lower(*args)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = {"arguments": _local_bytes(args), "held": held}
        largest = _largest_in(lowered.as_text(), args)
        return Program(name, runs, False, memory, least_flops=least, error=str(error), largest=largest), None, ""
    seconds = time.monotonic() - start
    stats, text = compiled.memory_analysis(), compiled.as_text()
    found_cost = cost.analyse(text, dynamic_trips=trips)
    memory = {
        "arguments": float(stats.argument_size_in_bytes),
        "outputs": float(stats.output_size_in_bytes - stats.alias_size_in_bytes),
        "temporaries": float(stats.temp_size_in_bytes + stats.generated_code_size_in_bytes),
        "held": held,
    }
    memory["total"] = sum(memory.values())
    roofline = None
    if chip is not None:
        sent = sum(each.bytes for each in found_cost.collectives.values())
        roofline = {"compute": found_cost.flops / chip.flops, "memory": found_cost.bytes / chip.bandwidth, "links": sent / chip.links}
    program = Program(
        name, runs, chip is None or memory["total"] <= chip.memory, memory, flops=found_cost.flops * devices, least_flops=least,
        bytes=found_cost.bytes, collectives={kind: dataclasses.asdict(each) for kind, each in found_cost.collectives.items()},
        compile_seconds=seconds, seconds=roofline, largest=tuple(_described(array) for array in hlo.largest_arrays(text)),
    )  # fmt: skip
    return program, compiled.output_shardings, text


def _described(array: hlo.Array) -> str:
    shape = f"{array.dtype}[{','.join(map(str, array.shape))}]"
    return f"{array.bytes / GIB:.2f} GiB {shape} {array.op_name}".rstrip()


def _largest_in(text: str, args: Any) -> tuple[str, ...]:
    """The largest arguments, and the largest arrays of a program as it was before it was split over devices: the compiler names none."""
    leaves = [(_local_bytes(leaf), jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(args)[0]]
    leaves.sort(key=lambda leaf: -leaf[0])
    found = [f"{size / GIB:.2f} GiB a chip, argument {path} {leaf.dtype}{list(leaf.shape)}" for size, path, leaf in leaves[:3]]
    tensors = {(math.prod(map(int, dims.split("x"))) * {"bf16": 2, "f32": 4}[dtype], dtype, dims)
               for dims, dtype in re.findall(r"tensor<([\dx]+)x(bf16|f32)>", text)}  # fmt: skip
    return (*found, *(f"{size / GIB:.2f} GiB over all chips, {dtype}[{dims}]" for size, dtype, dims in sorted(tensors, reverse=True)[:5]))


# --- the plan ---


def plan(config: Any, topology: str, nfe: int = 0, after_each: Callable[[Program, str], None] = lambda *_: None) -> dict[str, Any]:
    """Compiles a training step of `config` for `topology` ("v5e:4x4", "cpu:8").

    Args:
      config: see configs/default.py; it is changed where "auto" has to be settled.
      topology: a chip of `CHIPS` and the shape of the slice, or cpu and a number of devices, which must be the process's.
      nfe: denoiser calls a row; 0 = half the response length, two tokens a call.
      after_each: called with every program and its optimised HLO text once it is compiled.

    Returns:
      JSON's: topology, chips, nfe, rows, programs (fields of `Program`), fits, and of the whole step seconds, rollouts_per_hour, dominates
      (None where a program does not fit or the chip is not known).

    Raises:
      ValueError: an unknown topology, or a configuration that cannot run on it.
    """
    check_config(config)
    kind, devices = topology_devices(topology)
    nfe = nfe or max(config.task.response_length // 2, 1)
    parts = make_parts(config, devices)
    programs = compile_step(parts, nfe, CHIPS.get(kind), after_each)
    fits = all(program.fits for program in programs)
    found = {
        "topology": topology, "chips": parts.mesh.size, "mesh": dict(parts.mesh.shape), "rollout_mesh": dict(parts.rollout_mesh.shape),
        "nfe": nfe, "rows": config.rl.prompts * config.rl.group_size, "fits": fits,
        "memory_of_a_chip": CHIPS[kind].memory if kind in CHIPS else None,
        "programs": [dataclasses.asdict(program) for program in programs],
        "seconds": None, "rollouts_per_hour": None, "dominates": None,
    }  # fmt: skip
    if fits and kind in CHIPS:
        times = {program.name: program.runs * max(program.seconds.values()) for program in programs if program.seconds}
        found["seconds"] = sum(times.values())
        found["rollouts_per_hour"] = found["rows"] / found["seconds"] * 3600
        found["dominates"] = max(times, key=lambda name: times[name])
    return found


def topology_devices(topology: str) -> tuple[str, list[Any]]:
    """(kind of chip, devices) of a topology by name.

    Raises:
      ValueError: it is not known, or the TPU compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0:
        if int(shape) != len(jax.devices()):
            raise ValueError(f"topology {topology!r}: this process has {len(jax.devices())} CPU devices (jax_num_cpu_devices sets them)")
        return kind, jax.devices()
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(f"topology {topology!r} is unknown; known: cpu:N, and KIND:SHAPE with KIND of {', '.join(CHIPS)}, as v5e:4x4")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU here to ask about
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the compiler takes no device that another process could hold
    try:
        return kind, list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # of several kinds: no libtpu, a shape that this chip does not come in
        cause = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f'topology {topology!r}: {cause}. The TPU compiler comes with pip install -e ".[tpu]"') from error


def table(found: dict[str, Any]) -> Table:
    """The plan as something rich prints."""
    capacity = found["memory_of_a_chip"]
    limit = f" of {capacity / GIB:.2f}" if capacity else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    shown = Table(title=f"{found['topology']}: {mesh}; {found['rows']} rows, {found['nfe']} calls a row", title_justify="left")
    columns = ("runs", f"GiB a chip{limit}", "arguments", "outputs", "temporaries", "held", "PFLOP", "x least", "GB of HBM", "GB sent",
               "seconds", "bound by", "compile s")  # fmt: skip
    shown.add_column("program")
    for name in columns:
        shown.add_column(name, justify="right")
    for program in found["programs"]:
        memory = program["memory"]
        sizes = [f"{memory[name] / GIB:.2f}" if name in memory else "-" for name in ("arguments", "outputs", "temporaries", "held")]
        if program["error"]:
            shown.add_row(program["name"], str(program["runs"]), "does not fit", *sizes, *["-"] * 7)
            continue
        total = f"{memory['total'] / GIB:.2f}" + ("" if program["fits"] else " does not fit")
        sent = sum(each["bytes"] for each in program["collectives"].values())
        ratio = f"{program['flops'] / program['least_flops']:.2f}" if program["least_flops"] else "-"
        bound = max(program["seconds"], key=program["seconds"].get) if program["seconds"] else "-"
        seconds = f"{program['seconds'][bound]:.3g}" if program["seconds"] else "-"
        shown.add_row(
            program["name"], str(program["runs"]), total, *sizes, f"{program['flops'] / 1e15:.3g}", ratio, f"{program['bytes'] / 1e9:.3g}",
            f"{sent / 1e9:.3g}", seconds, bound, f"{program['compile_seconds']:.0f}",
        )  # fmt: skip
    return shown


def print_plan(found: dict[str, Any], console: Console) -> None:
    """Prints the table, the collectives, what does not fit and what would help, and the whole step."""
    console.print(table(found))
    for program in found["programs"]:
        kinds = [f"{kind} {each['count']:.0f} ({each['bytes'] / 1e9:.3g} GB)" for kind, each in program["collectives"].items()]
        if kinds:
            console.print(f"{program['name']} sends: {', '.join(kinds)}", highlight=False)
    for program in found["programs"]:
        if not program["fits"]:
            cause = program["error"].splitlines()[0] if program["error"] else "It and what lies beside it are larger than a chip's memory."
            console.print(f"\n{program['name']} does not fit. {cause}", highlight=False)
            console.print("  largest: " + "\n           ".join(program["largest"]), highlight=False)
            console.print(f"  what would help: {ADVICE[program['name']]}", highlight=False)
    if found["seconds"]:
        speed = f"{found['rollouts_per_hour']:.0f} rollouts an hour"
        console.print(f"a step at these peaks: {found['seconds']:.3g} s, most of it {found['dominates']}; {speed}", highlight=False)


config_flags.DEFINE_config_file("config", None, "A file of configs/, with a preset after a colon.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "The machine: v5e:4x4, v5p:2x2x4, v6e:4x4, cpu:8.")
NFE = flags.DEFINE_integer("nfe", 0, "Denoiser calls a row in the rollout; 0 = half the response length.", lower_bound=0)
JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(argv: list[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    kind, _, count = TOPOLOGY.value.partition(":")
    if kind == "cpu" and count.isdigit() and int(count) > 0:
        jax.config.update("jax_num_cpu_devices", int(count))
    console = Console(stderr=JSON.value)

    def say(program, _):
        console.print(program.name + (" compiled" if program.fits else " does not fit"), style="dim")

    with command_line.errors_said():
        found = plan(command_line.read_config(), TOPOLOGY.value, NFE.value, say)
    if JSON.value:
        print(json.dumps(found, indent=2))
    else:
        print_plan(found, Console(width=max(console.width, 160)))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=command_line.parse)
