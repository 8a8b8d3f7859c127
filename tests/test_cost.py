"""Costs read from HLO text: constants by hand, of compiled programs and of text as XLA writes it."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from diffpo_jax import hlo
from diffpo_jax.cost import Collective, analyse
from tests.test_hlo import compiled, module


def flops(fn, *shapes, **options):
    return analyse(compiled(fn, *shapes).as_text(), **options).flops


# Compiled for the CPU.


def test_matmul():
    assert flops(lambda a, b: a @ b, (64, 128), (128, 32)) == 2 * 64 * 128 * 32


def test_batched_einsum():
    assert flops(lambda a, b: jnp.einsum("nhsd,nhtd->nhst", a, b), (2, 3, 16, 8), (2, 3, 24, 8)) == 2 * 2 * 3 * 16 * 24 * 8


def test_the_dearer_branch_counts():
    def run(x, which):
        return jax.lax.cond(which, lambda x: x @ jnp.sin(x) @ x, lambda x: x @ x, x)

    assert flops(run, (64, 64), jnp.bool_) == 2 * 2 * 64**3


def test_gradient_of_a_chain():
    def loss(w1, w2, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w1) @ w2) ** 2)

    first, second = 2 * 32 * 64 * 48, 2 * 32 * 48 * 16
    # Both forward; backward two for each but x, which needs no gradient.
    assert flops(jax.grad(loss, argnums=(0, 1)), (64, 48), (48, 16), (32, 64)) == 2 * first + 3 * second


def test_agreement_with_xla_without_loops():
    def mlp(x, w1, w2, w3):
        h = jax.nn.silu(x @ w1) * (x @ w2)
        return jnp.einsum("nhd,mhd->hnm", (h @ w3).reshape(256, 4, 64), x.reshape(256, 4, 64))

    program = compiled(mlp, (256, 256), (256, 512), (256, 512), (512, 256))
    assert analyse(program.as_text()).flops == pytest.approx(program.cost_analysis()["flops"], rel=0.02)


# Dots that a TPU's text has as convolutions; all but the last two from its forward and backward passes.
@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "expected"),
    [
        ("256,512", "512,128", "256,128", "dim_labels=bf_io->bf", 2 * 256 * 512 * 128),
        ("1,256,512", "512,2048,1", "1,256,2048", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 256 * 512 * 2048),
        ("2,256,512", "512,2048,1", "2,256,2048", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 2 * 256 * 512 * 2048),
        ("2,256,512", "2,256,2048", "512,2048,1", "window={size=2}, dim_labels=0fb_0io->bf0", 2 * 2 * 256 * 512 * 2048),
        (  # nhsd,nhtd->nhst
            "2,8,256,64",
            "2,8,128,64",
            "2,8,256,128",
            "window={size=2x8 stride=1x7 lhs_dilate=2x8}, dim_labels=01bf_01oi->01bf",
            2 * 2 * 8 * 256 * 128 * 64,
        ),
        (  # nhst,nhtd->nhsd
            "2,8,256,64",
            "2,8,128,256",
            "2,8,128,64",
            "window={size=2x8 stride=2x8 pad=1_1x7_7 lhs_dilate=1x7 rhs_reversal=1x1}, dim_labels=01fb_01oi->01fb",
            2 * 2 * 8 * 128 * 256 * 64,
        ),
        (  # nsgrd,ntgd->ngrst, r = 3 query heads to a key head
            "2,256,4,64,1",
            "2,128,4,3,64",
            "2,4,256,128,3",
            "window={size=2x4x3 stride=1x3x1 pad=0_0x0_0x2_2 lhs_dilate=2x4x1 rhs_reversal=0x0x1}, dim_labels=0b1f2_0o12i->01bf2",
            2 * 2 * 4 * 3 * 256 * 128 * 64,
        ),
        ("512,2048,1", "2,256,2048", "512,2,256", "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_0oi->b0f", 2 * 512 * 2048 * 512),
        # True convolutions, 3 x 3 on 32 x 32: the outermost of 3 * 32 taps of a row read padding.
        ("8,32,32,64", "3,3,64,16", "8,32,32,16", "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f", 2 * 8 * 94 * 94 * 64 * 16),
        (
            "8,32,32,64",
            "3,3,1,64",
            "8,32,32,64",
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, feature_group_count=64",
            2 * 8 * 94 * 94 * 64,
        ),
    ],
)
def test_convolutions(lhs, rhs, out, attributes, expected):
    text = module(f"""
        %lhs = bf16[{lhs}]{{:T(8,128)(2,1)S(1)}} parameter(0)
        %rhs = bf16[{rhs}]{{:T(8,128)(2,1)}} parameter(1)
        ROOT %convolution.1 = bf16[{out}]{{:T(8,128)(2,1)}} convolution(%lhs, %rhs), {attributes}
    """)
    assert analyse(text).flops == expected


@pytest.mark.parametrize(
    ("kind", "groups", "expected"),  # of f32[8,16] on each device: 512 bytes
    [
        ("all-gather", "replica_groups={{0,1,2,3},{4,5,6,7}}", 3 * 512),
        ("reduce-scatter", "replica_groups=[4,2]<=[2,4]T(1,0)", 512 / 2),
        ("all-reduce", "replica_groups=[2,8]<=[16]", 2 * 512 * 7 / 8),
        ("all-reduce", "replica_groups={}", 2 * 512 * 3 / 4),
        ("all-reduce", "replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a','b'}", 2 * 512 * 7 / 8),
        ("all-to-all", "replica_groups=mesh['a'=2,'b'=4] {'b'}", 512 * 3 / 4),
        ("collective-permute", "source_target_pairs={{0,1},{1,0}}", 512),
    ],
)
def test_collectives(kind, groups, expected):
    cost = analyse(
        module(f"""
            %p.1-x = f32[8,16]{{1,0}} parameter(0)
            ROOT %c = f32[8,16]{{1,0}} {kind}(f32[8,16]{{1,0:T(8,128)}} %p.1-x), channel_id=1, {groups}, dimensions={{0}}
        """)
    )
    assert cost.collectives == {kind: Collective(1, expected)}
    assert cost.bytes == 2 * 512


def test_asynchronous_pairs_count_once():
    others = """
        %async_computation (p: f32[8,16]) -> f32[8,16] {
          %p = f32[8,16]{1,0} parameter(0)
          ROOT %r = f32[8,16]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
        }, execution_thread="sparsecore"
    """
    text = module(
        """
        %p = f32[8,16]{1,0} parameter(0)
        %s = (f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
        %d = f32[32,16]{1,0} all-gather-done(%s)
        %async-start = ((f32[8,16]{1,0}), f32[8,16]{1,0}, u32[]{:S(2)}) async-start(%p), calls=%async_computation
        %async-update = ((f32[8,16]{1,0}), f32[8,16]{1,0}, u32[]{:S(2)}) async-update(%async-start)
        %async-done = f32[8,16]{1,0} async-done(%async-update)
        %copy-start = (f32[8,16]{1,0:S(1)}, f32[8,16]{1,0}, u32[]{:S(2)}) copy-start(%p)
        ROOT %copy-done = f32[8,16]{1,0:S(1)} copy-done(%copy-start)
        """,
        others,
    )
    cost = analyse(text)
    assert cost.collectives == {"all-gather": Collective(1, 3 * 512), "all-reduce": Collective(1, 512)}
    assert cost.bytes == 5 * 512 + 2 * 512 + 512


def test_collectives_in_fusions_of_a_tpu():
    """A gather that goes on during another fusion, which repeats it; a reduce-scatter as a fusion of all-reduce and slice."""
    flag = 'backend_config={"async_collective_fusion_config":{"flag_start":"%s","flag_end":"8"}}'
    gather = "%g = bf16[512,64]{1,0} all-gather(%p), channel_id=5, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, "
    state = "(bf16[128,64]{1,0}, bf16[512,64]{1,0}, u32[]{:S(2)})"
    states = "(bf16[8,8]{1,0}, bf16[128,64]{1,0}, bf16[512,64]{1,0}, bf16[512,64]{1,0})"
    others = f"""
        %start (p: bf16[128,64]) -> (bf16[128,64], bf16[512,64], u32[]) {{
          %p = bf16[128,64]{{1,0}} parameter(0)
          {gather}{flag % -1}
          ROOT %c = {state} custom-call(%g), custom_call_target="AsyncCollectiveStart"
        }}
        %during (p: bf16[128,64], r: bf16[512,64], x: bf16[8,8]) -> (bf16[8,8], bf16[128,64], bf16[512,64], bf16[512,64]) {{
          %p = bf16[128,64]{{1,0}} parameter(0)
          %r = bf16[512,64]{{1,0}} parameter(1)
          %x = bf16[8,8]{{1,0}} parameter(2)
          %y = bf16[8,8]{{1,0}} convolution(%x, %x), dim_labels=bf_io->bf
          {gather}{flag % 2}
          ROOT %t = {states} tuple(%y, %p, %r, %g)
        }}
        %end (p: bf16[128,64], r: bf16[512,64]) -> bf16[512,64] {{
          %p = bf16[128,64]{{1,0}} parameter(0)
          %r = bf16[512,64]{{1,0}} parameter(1)
          {gather}{flag % 2}
          ROOT %c = bf16[512,64]{{1,0}} custom-call(%p, %r, %g), custom_call_target="AsyncCollectiveDone"
        }}
        %all-reduce-scatter (input: bf16[512,64]) -> bf16[128,64] {{
          %input = bf16[512,64]{{1,0}} parameter(0)
          %i = u32[] partition-id()
          %all-reduce = bf16[512,64]{{1,0}} all-reduce(%input), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
          ROOT %s = bf16[128,64]{{1,0}} dynamic-slice(%all-reduce, %i, %i), dynamic_slice_sizes={{128,64}}
        }}
    """
    text = module(
        f"""
        %p = bf16[128,64]{{1,0}} parameter(0)
        %x = bf16[8,8]{{1,0}} parameter(1)
        %start.1 = {state} fusion(%p), kind=kCustom, output_to_operand_aliasing={{{{0}}: (0, {{}})}}, calls=%start
        %a = bf16[128,64]{{1,0}} get-tuple-element(%start.1), index=0
        %b = bf16[512,64]{{1,0}} get-tuple-element(%start.1), index=1
        %t = {states} fusion(%a, %b, %x), kind=kOutput, calls=%during
        %c = bf16[128,64]{{1,0}} get-tuple-element(%t), index=1
        %d = bf16[512,64]{{1,0}} get-tuple-element(%t), index=2
        %e = bf16[512,64]{{1,0}} fusion(%c, %d), kind=kCustom, calls=%end
        ROOT %f = bf16[128,64]{{1,0}} fusion(%e), kind=kCustom, calls=%all-reduce-scatter
        """,
        others,
    )
    cost, shard = analyse(text), 128 * 64 * 2
    assert cost.flops == 2 * 8**3
    assert cost.collectives == {"all-gather": Collective(1, 3 * shard), "reduce-scatter": Collective(1, 3 * shard)}
    assert cost.bytes == 5 * shard + 2 * 8 * 8 * 2 + 5 * shard


def test_memory_that_is_not_hbm_costs_nothing():
    text = module("""
        %a = bf16[4,256,4096]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
        %b = bf16[4,256,4096]{2,1,0:T(8,128)(2,1)} parameter(1)
        %c = bf16[4,256,4096]{2,1,0:T(8,128)(2,1)S(5)} copy(%b)
        ROOT %d = bf16[4,256,4096]{2,1,0:T(8,128)(2,1)S(1)} add(%a, %b)
    """)
    assert analyse(text).bytes == 2 * 4 * 256 * 4096 * 2


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("f32[1,256]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,256}", 2 * 256 * 4),
        ("f32[3,256]{1,0} slice(%x), slice={[0:3], [0:256]}", 2 * 3 * 256 * 4),
        ("f32[5,256]{1,0} gather(%x, %rows), offset_dims={1}, slice_sizes={1,256}", 2 * 5 * 256 * 4),
        ("f32[512,256]{1,0} dynamic-update-slice(%x, %new, %i, %i)", 2 * 5 * 256 * 4),
        ("f32[512,256]{1,0} scatter(%x, %rows, %new), update_window_dims={1}, to_apply=%add", 2 * 5 * 256 * 4),
        ("f32[512,256]{1,0} multiply(%x, %x)", 2 * 512 * 256 * 4),
    ],
)
def test_slices_and_updates_outside_of_fusions(instruction, expected):
    text = module(f"""
        %x = f32[512,256]{{1,0}} parameter(0)
        %rows = s32[5]{{0}} parameter(1)
        %new = f32[5,256]{{1,0}} parameter(2)
        %i = s32[] constant(3)
        ROOT %r = {instruction}
    """)
    assert analyse(text).bytes == expected


def test_text_of_something_else():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        analyse("module @jit_f {\n  func.func public @main() {\n  }\n}\n")


TPU_PROGRAMS = """
import math, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = jax.make_mesh((4,), ("fsdp",), devices=topology.devices, axis_types=(AxisType.Auto,))
N, S, D, H, F, L = map(int, sys.argv[2:])
SHAPES = dict(q=(D, D), k=(D, D), v=(D, D), o=(D, D), gate=(D, F), up=(D, F), down=(F, D))

def array(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

def norm(x):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)

def block(x, p):
    p = jax.tree.map(lambda w: jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P())), p)
    h = norm(x)
    q, k, v = ((h @ p[name]).reshape(*h.shape[:2], H, D // H).transpose(0, 2, 1, 3) for name in "qkv")
    scores = jnp.einsum("nhsd,nhtd->nhst", q, k, preferred_element_type=jnp.float32) / math.sqrt(D // H)
    seen = jnp.einsum("nhst,nhtd->nhsd", jax.nn.softmax(scores).astype(x.dtype), v)
    x = x + seen.transpose(0, 2, 1, 3).reshape(x.shape) @ p["o"]
    h = norm(x)
    x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp"))), None

def forward(params, x):
    return jax.lax.scan(jax.checkpoint(block), x, params)[0]

def loss(params, x):
    return jnp.sum(forward(params, x).astype(jnp.float32) ** 2)

params = {name: array((L, *shape), None, "fsdp") for name, shape in SHAPES.items()}
x = array((N, S, D), "fsdp")
for name, program, out in (("forward", forward, x.sharding), ("gradient", jax.grad(loss), {n: w.sharding for n, w in params.items()})):
    with open(f"{sys.argv[1]}/{name}.txt", "w") as file:
        file.write(jax.jit(program, out_shardings=out).lower(params, x).compile().as_text())
"""


@pytest.mark.slow
def test_transformer_compiled_for_a_tpu(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    rows, length, width, heads, mlp, layers, devices = 8, 256, 512, 8, 2048, 3, 4
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    sizes = map(str, (rows, length, width, heads, mlp, layers))
    subprocess.run([sys.executable, "-c", TPU_PROGRAMS, str(tmp_path), *sizes], env=env, check=True, timeout=600)
    texts = {name: (tmp_path / f"{name}.txt").read_text() for name in ("forward", "gradient")}
    cost = {name: analyse(text) for name, text in texts.items()}

    weights = 4 * width**2 + 3 * width * mlp  # of one layer
    analytic = layers * (2 * rows * length * weights + 2 * 2 * rows * length**2 * width)
    assert cost["forward"].flops * devices == pytest.approx(analytic, rel=0.02)
    # Twice the forward pass, and once again recomputed but for the last product of a block, which nothing reads.
    recomputed = analytic - layers * 2 * rows * length * width * mlp
    assert cost["gradient"].flops * devices == pytest.approx(3 * analytic + recomputed, rel=0.02)
    assert 3 < cost["gradient"].flops / cost["forward"].flops < 4
    assert cost["forward"].dynamic_loops == cost["gradient"].dynamic_loops == 0

    moved = layers * weights * 2 * (devices - 1) / devices  # bf16: gathered for each pass, their gradients scattered once
    gathered = {name: c.collectives["all-gather"].bytes for name, c in cost.items()}
    assert gathered["forward"] == pytest.approx(moved, rel=0.05)
    assert gathered["gradient"] == pytest.approx(2 * moved, rel=0.05)
    reduced = sum(c.bytes for kind, c in cost["gradient"].collectives.items() if kind in ("reduce-scatter", "all-reduce"))
    assert 0.95 * moved < reduced < 2 * 1.05 * moved  # twice as much if all-reduced
    assert cost["forward"].bytes > layers * weights * 2 / devices  # at least the shards are read
    shapes = {array.shape for array in hlo.arrays(texts["forward"])}
    assert (rows // devices, heads, length, length) in shapes and (rows, heads, length, length) not in shapes
