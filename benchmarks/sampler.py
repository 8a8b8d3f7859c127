"""Our sampler and the same one in plain PyTorch (torch_sampler.py), taken in turns on the CPU: python benchmarks/sampler.py --size=mid

All decode greedily by low confidence with the same random weights and prompts: exactly (no cache of keys and values, none of logits), or,
in --samplers, with a cache (see sampler.cache in configs/default.py). Each is compared with the last one named. The time of each, on the
clock and on the processor (of all threads: it hardly depends on what else the machine does), is given beside what it computes (products of
matrices, counted where they run) and what the machine's libraries reach in one large product. Peak memory is measured in a process of its
own, which imports and loads only what it needs. Without PyTorch (the extra `torch`) it is left out.
"""

import argparse
import ctypes
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np  # JAX and PyTorch are imported where they are used: a process whose memory is measured has only one of them

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # PyTorch's threads wait without spinning: they may share the cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")

Sampler = Callable[[], np.ndarray]  # -> tokens [rows, length]


@dataclasses.dataclass(frozen=True)
class Size:
    """The network, and what is sampled."""

    vocab_size: int
    rows: int
    steps: int
    heads: int = 8
    layers: int = 6
    width: int = 256
    mlp_width: int = 768
    prompt: int = 64
    length: int = 128
    block_length: int = 32
    refresh: int = 0
    lanes: int = 0

    @property
    def network(self) -> dict[str, int]:
        names = ("vocab_size", "width", "layers", "heads", "mlp_width")
        return {name: getattr(self, name) for name in names} | {"kv_heads": self.heads}

    @property
    def mask_id(self) -> int:
        return self.vocab_size - 1

    @property
    def options(self) -> dict[str, int]:
        return {"length": self.length, "block_length": self.block_length, "steps": self.steps}

    def prompts(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, self.mask_id, (self.rows, self.prompt), np.int32)


SIZES = {
    "mid": Size(vocab_size=8192, rows=16, steps=64),
    "large-vocabulary": Size(vocab_size=126_464, rows=4, steps=16),
    "small": Size(vocab_size=64, rows=64, steps=32, heads=4, layers=3, width=64, mlp_width=192, prompt=16, length=64),
    "debug": Size(vocab_size=64, rows=2, steps=8, layers=2, width=64, mlp_width=64, prompt=8, length=16, block_length=8),
}


def policy_of(size: Size):
    from diffpo_jax.models.transformer import ModelConfig, Policy

    return Policy(ModelConfig(mask_id=size.mask_id, dtype="float32", **size.network))


def random_params(size: Size, sharpness: float) -> dict[str, np.ndarray]:
    """Random parameters, flat, the kernels times `sharpness`: distributions that differ, so that rounding hardly ever decides."""
    import jax
    from flax.traverse_util import flatten_dict

    params = flatten_dict(jax.jit(policy_of(size).init)(jax.random.key(0)), sep="/")
    return {path: np.asarray(x) * np.float32(sharpness if path.endswith("kernel") else 1) for path, x in params.items()}


def ours(size: Size, params: Mapping[str, np.ndarray], cache: str = "none") -> Sampler:
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import unflatten_dict

    from diffpo_jax.sampling.denoise import denoise

    policy, params = policy_of(size), jax.tree.map(jnp.asarray, unflatten_dict(dict(params), sep="/"))
    prompt, key = jnp.asarray(size.prompts()), jax.random.key(1)
    options = size.options | {"rule": "low_confidence", "temperature": 0.0, "cache": cache, "refresh": size.refresh, "lanes": size.lanes}
    return lambda: np.asarray(denoise(policy, params, prompt, jnp.ones(prompt.shape, bool), key, **options).tokens)


def pytorch(size: Size, params: Mapping[str, np.ndarray]) -> Sampler:
    import torch
    import torch_sampler

    torch.set_num_threads(os.cpu_count())
    network = torch_sampler.load(params, **size.network)
    prompt = torch.from_numpy(size.prompts()).long()
    mask = torch.ones(prompt.shape, dtype=torch.bool)
    return lambda: torch_sampler.generate(network, prompt, mask, mask_id=size.mask_id, **size.options).numpy()


SAMPLERS = {
    "exact": ours,
    "prefix": functools.partial(ours, cache="prefix"),
    "dual": functools.partial(ours, cache="dual"),
    "PyTorch": pytorch,
}


# --- speed ---


def gflop(size: Size, name: str) -> float:
    """GFLOP of the products of matrices of whole calls: ours reads the logits of a block, the PyTorch loop those of every position."""
    from diffpo_jax.flops import Least

    read = size.prompt + size.length if name == "PyTorch" else size.block_length
    return Least(
        size.rows, size.prompt, size.length, read, cuts=0, updates=0, reference=0, old=0, model=policy_of(size).config, adapters=0
    ).rollout(size.steps) / 1e9


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """(on the clock, on the processor)."""
    start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def matmul_speeds(size: int = 2048, tries: int = 10) -> dict[str, float]:
    """The most GFLOP/s that each library reaches in a float32 product of matrices [size, size]."""
    import jax
    import jax.numpy as jnp

    a = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    on_device, product = jnp.asarray(a), jax.jit(jnp.matmul)
    products = {"numpy": lambda: a @ a, "jax": lambda: product(on_device, on_device).block_until_ready()}
    if importlib.util.find_spec("torch"):
        import torch

        tensor = torch.from_numpy(a)
        products["torch"] = lambda: tensor @ tensor
    return {name: 2e-9 * size**3 / min(seconds(call)[0] for _ in range(tries)) for name, call in products.items()}


def in_turns(samplers: Mapping[str, Sampler], turns: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(`seconds` [turns, 2], tokens [rows, length]) of each, after a call that is not timed."""
    tokens = {name: sampler() for name, sampler in samplers.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in samplers}
    for turn in range(turns):
        for name in sorted(samplers, reverse=bool(turn % 2)):
            taken[name].append(seconds(samplers[name]))
    return {name: np.array(values) for name, values in taken.items()}, tokens


# --- memory ---


def resident(field: str) -> float:
    """A field of /proc/self/status, MiB: VmRSS, memory now; VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def free_memory() -> None:
    """Gives back to the system what is free, so that resident memory is what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(name: str, folder: Path) -> dict[str, float]:
    """MiB of this process: see `peak_memory`."""
    if name != "PyTorch":
        sys.modules["torch"] = None  # a library that we use would import it where it is installed
    size = Size(**json.loads((folder / "size.json").read_text()))
    with np.load(folder / "params.npz") as file:
        sampler = SAMPLERS[name](size, dict(file))
    free_memory()
    loaded = resident("VmRSS")
    sampler()
    whole = resident("VmHWM")
    free_memory()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    sampler()
    peak = resident("VmHWM")
    return {"loaded": loaded, "peak": max(whole, peak), "sampling": peak - before}


def peak_memory(size: Size, params: Mapping[str, np.ndarray], names: list[str]) -> dict[str, dict[str, float]]:
    """MiB of each sampler in a process of its own.

    It denoises a block in one call each: memory does not depend on the number of calls.

    Returns:
      For each name: `loaded`, before the first call (imports, parameters); `peak`, the largest of the process (compilation included);
      `sampling`, the most that a second run, with nothing left to compile, adds to what is in use before it.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        few = dataclasses.replace(size, steps=size.length // size.block_length)
        (Path(folder) / "size.json").write_text(json.dumps(dataclasses.asdict(few)))
        np.savez(Path(folder) / "params.npz", **params)
        for name in names:
            command = [sys.executable, __file__, f"--measure={name}", f"--folder={folder}"]
            found[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


# --- both ---


def spread(values: np.ndarray, digits: int = 2) -> str:
    low, high = (f"{value:.{digits}f}" for value in (values.min(), values.max()))
    return f"{np.median(values):.{digits}f} (median of {len(values)}; {low} to {high})"


def report(size: Size, taken: dict[str, np.ndarray], memory: dict[str, dict[str, float]]) -> None:
    for name, (clock, processor) in ((name, values.T) for name, values in taken.items()):
        middle, work = np.median(clock), gflop(size, name)
        speed = f"; {work:.0f} GFLOP, {work / middle:.1f} GFLOP/s" if name in ("exact", "PyTorch") else ""
        print(f"{name}: {spread(clock)} s, on the processor {spread(processor)} s; {size.rows * size.length / middle:.1f} tokens/s{speed}")
        if memory:
            print("  MiB: {loaded:.0f} imported and loaded, peak {peak:.0f}, sampling adds {sampling:.0f}".format(**memory[name]))


def compare(
    name: str, other: str, taken: dict[str, np.ndarray], tokens: dict[str, np.ndarray], memory: dict[str, dict[str, float]]
) -> None:  # fmt: skip
    clock, processor = (taken[other] / taken[name]).T
    equal = tokens[name] == tokens[other]
    print(f"{name} is {spread(clock)} times as fast as {other}, on the processor {spread(processor)}")
    if memory:
        print(f"  sampling adds {memory[other]['sampling'] / memory[name]['sampling']:.2f} times less memory")
    print(f"  {100 * np.mean(equal):.2f}% of the tokens are equal, all of {np.sum(np.all(equal, axis=1))} of {len(equal)} rows")


def main(args: argparse.Namespace) -> None:
    if args.measure:
        print(json.dumps(measure(args.measure, Path(args.folder))))
        return
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Size) if getattr(args, field.name) is not None}
    size = dataclasses.replace(SIZES[args.size], **given)
    names, params = list(args.samplers), random_params(size, args.sharpness)
    if "PyTorch" in names and not importlib.util.find_spec("torch"):
        print('PyTorch is not installed and left out: pip install -e ".[torch]"')
        names.remove("PyTorch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", *(["torch"] if "PyTorch" in names else [])))
    print(f"{os.cpu_count()} cores, {versions}; {size}; parameters {sum(x.nbytes for x in params.values()) / 2**20:.0f} MiB")
    memory = {} if args.no_memory else peak_memory(size, params, names)
    peaks = matmul_speeds()
    taken, tokens = in_turns({name: SAMPLERS[name](size, params) for name in names}, args.turns)
    print("a product of matrices [2048, 2048], GFLOP/s: " + ", ".join(f"{name} {speed:.0f}" for name, speed in peaks.items()))
    report(size, taken, memory)
    for name in names[:-1]:
        compare(name, names[-1], taken, tokens, memory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=("exact", "PyTorch"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--sharpness", type=float, default=4.0, help="kernels of the random model are multiplied by it")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="instead of the size's")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes whose memory is measured")
    parser.add_argument("--measure", choices=SAMPLERS, help=argparse.SUPPRESS)  # what is run in a process of its own
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    main(parser.parse_args())
