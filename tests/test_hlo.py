"""HLO text as a structure: arrays and trip counts, of compiled programs and of text as XLA writes it."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from diffpo_jax import hlo
from diffpo_jax.cost import analyse


def compiled(fn, *shapes):
    """`fn` compiled for float32 arguments of these shapes; a dtype in place of a shape is a scalar."""
    args = [jax.ShapeDtypeStruct(s, jnp.float32) if isinstance(s, tuple) else jax.ShapeDtypeStruct((), s) for s in shapes]
    return jax.jit(fn).lower(*args).compile()


def module(entry, others=""):
    """The text of a module over 4 devices: the instructions of its entry, and other computations in full."""
    lines = textwrap.indent(textwrap.dedent(entry).strip(), "  ")
    return f"HloModule m, num_partitions=4\n\n{textwrap.dedent(others)}\nENTRY %main (a: f32[]) -> f32[] {{\n{lines}\n}}\n"


def test_a_scan_counts_as_often_as_it_runs():
    cost = analyse(compiled(lambda x, w: jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0], (64, 64), (7, 64, 64)).as_text())
    assert cost.flops == 7 * 2 * 64**3
    assert cost.dynamic_loops == 0


@pytest.mark.parametrize("known", [True, False])
def test_nested_scans(known):
    def outer(x, w):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=5)[0], None

    text = compiled(lambda x, w: jax.lax.scan(outer, x, w)[0], (64, 64), (3, 64, 64)).as_text()
    assert "known_trip_count" in text
    cost = analyse(text if known else text.replace("known_trip_count", "other"))  # without: from the loops' conditions
    assert cost.flops == 3 * 5 * 2 * 64**3
    assert cost.dynamic_loops == 0


def test_loops_whose_end_depends_on_data():
    def run(x, w, end):
        return jax.lax.while_loop(lambda c: c[0] < end, lambda c: (c[0] + 1, c[1] @ w @ w), (0, x))[1]

    text = compiled(run, (64, 64), (64, 64), jnp.int32).as_text()
    assert analyse(text).dynamic_loops == 1
    assert analyse(text).flops == 2 * 2 * 64**3
    assert analyse(text, dynamic_trips=10).flops == 10 * 2 * 2 * 64**3


def test_a_loop_in_another_whose_ends_depend_on_data():
    def run(x, w, end):
        inner = lambda c: jax.lax.while_loop(lambda c: c[0] % 4 > 0, lambda c: (c[0] + 1, c[1] @ w), (c[0] + 1, c[1] @ w @ w))  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < end, inner, (0, x))[1]

    text = compiled(run, (64, 64), (64, 64), jnp.int32).as_text()
    assert analyse(text).dynamic_loops == 2
    assert analyse(text, dynamic_trips=10).flops == 10 * (2 + 10) * 2 * 64**3
    assert analyse(text, dynamic_trips=(10, 3)).flops == 10 * (2 + 3) * 2 * 64**3


STACK = """
    %slice_one (param.0: f32[32,128,256], param.1: s32[]) -> f32[128,256] {
      %param.0 = f32[32,128,256]{2,1,0} parameter(0)
      %param.1 = s32[] parameter(1)
      %zero = s32[] constant(0)
      %ds = f32[1,128,256]{2,1,0} dynamic-slice(%param.0, %param.1, %zero, %zero), dynamic_slice_sizes={1,128,256}
      ROOT %b = f32[128,256]{1,0} bitcast(%ds)
    }
    %put_one (param.0: f32[32,128,256], param.1: f32[128,256], param.2: s32[]) -> f32[32,128,256] {
      %param.0 = f32[32,128,256]{2,1,0} parameter(0)
      %param.1 = f32[128,256]{1,0} parameter(1)
      %param.2 = s32[] parameter(2)
      %zero = s32[] constant(0)
      %b = f32[1,128,256]{2,1,0} bitcast(%param.1)
      ROOT %dus = f32[32,128,256]{2,1,0} dynamic-update-slice(%param.0, %b, %param.2, %zero, %zero)
    }
    %body (state: (s32[], f32[32,128,256], f32[32,128,256], s32[])) -> (s32[], f32[32,128,256], f32[32,128,256], s32[]) {
      %state = (s32[], f32[32,128,256]{2,1,0}, f32[32,128,256]{2,1,0}, s32[]) parameter(0)
      %i = s32[]{:S(6)} get-tuple-element(%state), index=0
      %x = f32[32,128,256]{2,1,0} get-tuple-element(%state), index=1
      %y = f32[32,128,256]{2,1,0} get-tuple-element(%state), index=2
      %end = s32[]{:S(6)} get-tuple-element(%state), index=3
      %one = s32[]{:S(6)} constant(1)
      %next = s32[]{:S(6)} add(%i, %one)
      %slice = f32[128,256]{1,0} fusion(%x, %i), kind=kLoop, calls=%slice_one
      %put = f32[32,128,256]{2,1,0} fusion(%y, %slice, %i), kind=kLoop, calls=%put_one
      ROOT %t = (s32[], f32[32,128,256]{2,1,0}, f32[32,128,256]{2,1,0}, s32[]) tuple(%next, %x, %put, %end)
    }
    %condition (state: (s32[], f32[32,128,256], f32[32,128,256], s32[])) -> pred[] {
      %state = (s32[], f32[32,128,256]{2,1,0}, f32[32,128,256]{2,1,0}, s32[]) parameter(0)
      %i = s32[]{:S(6)} get-tuple-element(%state), index=0
      %end = s32[]{:S(6)} get-tuple-element(%state), index=3
      ROOT %lt = pred[]{:S(6)} compare(%i, %end), direction=LT
    }
"""


@pytest.mark.parametrize(
    ("start", "end", "config", "trips"),
    [
        ("constant(0)", "constant(32)", "", 32),  # as on a TPU, whose text leaves out the trip count
        ("constant(5)", "constant(32)", "", 27),
        ("parameter(2)", "parameter(3)", ', backend_config={"known_trip_count":{"n":"32"}}', 32),
        ("constant(0)", "parameter(2)", "", None),
    ],
)
def test_loops_over_a_stack_read_and_write_a_slice_a_trip(start, end, config, trips):
    text = module(
        f"""
        %x = f32[32,128,256]{{2,1,0}} parameter(0)
        %y = f32[32,128,256]{{2,1,0}} parameter(1)
        %start = s32[]{{:S(6)}} {start}
        %copy = s32[]{{:S(6)}} copy(%start)
        %end = s32[]{{:S(6)}} {end}
        %state = (s32[], f32[32,128,256]{{2,1,0}}, f32[32,128,256]{{2,1,0}}, s32[]) tuple(%copy, %x, %y, %end)
        ROOT %w = (s32[], f32[32,128,256]{{2,1,0}}, f32[32,128,256]{{2,1,0}}, s32[]) while(%state), condition=%condition, body=%body{config}
        """,
        STACK,
    )
    cost = analyse(text, dynamic_trips=4)
    assert cost.bytes == (4 if trips is None else trips) * 4 * (128 * 256 * 4)  # a slice read and written, read and put
    assert cost.dynamic_loops == (trips is None)


def test_arrays_and_the_largest():
    text = module(
        """
        %a = bf16[1000,1000]{1,0} parameter(0)
        %b = (s4[64,8]{1,0:E(4)}, (pred[3,<=16]{1,0}, f8e4m3fn[7]{0}), token[]) custom-call(%a), custom_call_target="f"
        %c = s4[64,8]{1,0:E(4)} get-tuple-element(%b), index=0
        %d = bf16[500,10]{1,0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/dot[\\"x\\"]" stack_frame_id=3}
        %e = bf16[500,10]{1,0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/dot[\\"x\\"]" stack_frame_id=3}
        %f = bf16[5000]{0} bitcast(%e)
        ROOT %t = (bf16[500,10]{1,0}, bf16[500,10]{1,0}) tuple(%d, %e)
        """,
        """
        %fused (p: bf16[1000,1000]) -> bf16[500,10] {
          %p = bf16[1000,1000]{1,0} parameter(0)
          %wide = f32[1000,1000]{1,0} convert(%p)
          ROOT %s = bf16[500,10]{1,0} custom-call(%wide), custom_call_target="g"
        }
        """,
    )
    assert hlo.largest_arrays(text, 4) == [
        hlo.Array("bf16", (500, 10), 10_000, 'jit(f)/dot[\\"x\\"]'),
        hlo.Array("s4", (64, 8), 256, ""),
        hlo.Array("pred", (3, 16), 48, ""),
        hlo.Array("f8e4m3fn", (7,), 7, ""),
    ]
    everything = {(array.dtype, array.shape) for array in hlo.arrays(text)}
    assert ("f32", (1000, 1000)) in everything  # only inside the fusion
    assert ("f32", (500, 10)) not in everything


@pytest.mark.parametrize("read", [hlo.largest_arrays, lambda text: list(hlo.arrays(text))])
def test_text_of_something_else(read):
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read("module @jit_f {\n  func.func public @main() {\n  }\n}\n")
