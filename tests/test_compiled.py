"""What is read out of compiled programs, and what is predicted from it."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import absent, instructions, kernels, operations, predict, targets
from benchmarks.__main__ import main
from benchmarks.kernels import Kernel, Work
from benchmarks.subject import make_shapes
from twister_jax.errors import UserError
from twister_jax.fields import replace
from twister_jax.presets import make_config
from twister_jax.runtime import tracing_for

GPU_PROGRAM = """HloModule jit_update, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_add (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  ROOT %add.0 = f32[8]{0} add(%param_0, %param_0)
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%carry), index=1
  %product = (f32[8]{0}, s8[64]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul"
  %more = (f32[8]{0}, /*index=1*/s32[]) fusion(%x), kind=kInput, calls=%fused_add
  %inner = (s32[], f32[8]{0}) while(%carry), condition=%go_on, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, %x)
}

%inner_body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %softmax = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused_add, backend_config={"fusion_backend_config":{"kind":"__triton"}}
}

%called (x: f32[8]) -> f32[8] {
  ROOT %copy.1 = f32[8]{0} copy(%x)
}

%nothing (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}

ENTRY %main (Arg_0: f32[8]) -> f32[8] {
  %Arg_0 = f32[8]{0} parameter(0)
  %constant.1 = s32[] constant(5)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%go_on, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %later-start = ((f32[8]{0}), f32[8]{0}) fusion-start(%Arg_0), kind=kLoop, calls=%fused_add
  %later-done = f32[8]{0} fusion-done(%later-start)
  %call.1 = f32[8]{0} call(%Arg_0), to_apply=%called
  %either = f32[8]{0} conditional(%constant.1, %Arg_0, %Arg_0), branch_computations={%called, %nothing}
  %sort-start = ((f32[8]{0}), f32[8]{0}) custom-call-start(%Arg_0), custom_call_target="cub_sort"
  %sort-done = f32[8]{0} custom-call-done(%sort-start)
  %here = u32[] partition-id()
  ROOT %last = f32[8]{0} fusion(%Arg_0), kind=kLoop, calls=%fused_add
}
"""  # noqa: E501


def test_kernels_are_counted_as_often_as_their_loops_go_round():
    counted = kernels.read(GPU_PROGRAM)
    found = {each.name: (each.kind, each.times, each.loop) for each in counted}
    assert len(counted) == len(found) + 1  # what is called is called from two places
    assert found == {
        "sort-start": ("call cub_sort", 1, ""),
        "product": ("call __cublas$lt$matmul", 5, "loop"),
        "more": ("fusion kInput", 5, "loop"),
        "softmax": ("fusion triton", 15, "inner"),
        "later-start": ("fusion kLoop", 1, ""),
        "copy.1": ("copy", 1, ""),
        "last": ("fusion kLoop", 1, ""),
    }
    (last,) = (each for each in counted if each.name == "last")
    assert (last.bytes, last.work) == (64, Work(vector=8.0))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("HloModule of another format", "no computation ''"),
        (GPU_PROGRAM.replace('"known_trip_count":{"n":"5"}', ""), "how often loop goes round"),
        (GPU_PROGRAM.replace("%called (x", "%lost (x"), "no computation 'called'"),
    ],
)
def test_what_cannot_be_counted_is_not_counted_as_nothing(program, message):
    with pytest.raises(ValueError, match=message):
        kernels.read(program)


# Of an 'f32[16,3]' a TPU stores 16 × 128; the loop's index goes 3, 5, 7, 9 and ends before 11.
TPU_PROGRAM = """HloModule jit_update

%product (a: bf16[100,64], b: bf16[64,3]) -> f32[100,3] {
  %a = bf16[100,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[64,3]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %dot = f32[100,3]{1,0:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
}

%body (carry: (s32[], f32[16,3], bf16[64,3])) -> (s32[], f32[16,3], bf16[64,3]) {
  %two = s32[]{:T(128)} constant(2)
  %carry = (s32[]{:T(128)}, f32[16,3]{1,0:T(8,128)}, bf16[64,3]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %copied = s32[]{:T(128)S(6)} copy(%i)
  %next = s32[]{:T(128)S(6)} add(%copied, %two)
  %x = f32[16,3]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %b = bf16[64,3]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %a = bf16[100,64]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %negate = f32[16,3]{1,0:T(8,128)} negate(%x)
  %fusion = f32[100,3]{1,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%product, \
backend_config={"estimated_cycles":"1500"}
  ROOT %out = (s32[]{:T(128)}, f32[16,3]{1,0:T(8,128)}, bf16[64,3]{1,0:T(8,128)(2,1)}) \
tuple(%next, %negate, %b)
}

%go_on (carry: (s32[], f32[16,3], bf16[64,3])) -> pred[] {
  %end = s32[]{:T(128)} constant(11)
  %carry = (s32[]{:T(128)}, f32[16,3]{1,0:T(8,128)}, bf16[64,3]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%slice_of (all: u8[1000,256], row: s32[]) -> u8[1,256] {
  %all = u8[1000,256]{1,0:T(8,128)(4,1)} parameter(0)
  %row = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = u8[1,256]{1,0:T(1,128)S(1)} dynamic-slice(%all, %row, %zero), dynamic_slice_sizes={1,256}
}

ENTRY %main (x: f32[16,3], b: bf16[64,3], all: u8[1000,256]) -> (s32[], f32[16,3], bf16[64,3]) {
  %x = f32[16,3]{1,0:T(8,128)} parameter(0)
  %b = bf16[64,3]{1,0:T(8,128)(2,1)} parameter(1)
  %all = u8[1000,256]{1,0:T(8,128)(4,1)} parameter(2)
  %three = s32[]{:T(128)} constant(3)
  %first = s32[]{:T(128)} copy(%three)
  %row = u8[1,256]{1,0:T(1,128)S(1)} fusion(%all, %first), kind=kLoop, calls=%slice_of
  %sum-start = f32[16,3]{1,0:T(8,128)} all-reduce-start(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %sum = f32[16,3]{1,0:T(8,128)} all-reduce-done(%sum-start)
  %start = (s32[]{:T(128)}, f32[16,3]{1,0:T(8,128)}, bf16[64,3]{1,0:T(8,128)(2,1)}) tuple(%first, %sum, %b)
  ROOT %loop = (s32[]{:T(128)}, f32[16,3]{1,0:T(8,128)}, bf16[64,3]{1,0:T(8,128)(2,1)}) while(%start), \
condition=%go_on, body=%body
}
""".replace("\\\n", "")


def read_tpu_program() -> dict[str, Kernel]:
    return {each.name: each for each in kernels.read(TPU_PROGRAM, tile=128)}


def test_tiles_of_a_tpu_are_counted_with_their_padding_and_what_is_on_the_chip_is_not():
    found = read_tpu_program()
    assert {name: each.times for name, each in found.items()} == {
        "first": 1, "row": 1, "sum-start": 1, "copied": 4, "next": 4, "negate": 4, "fusion": 4,
    }  # fmt: skip
    assert found["negate"].bytes == 2 * 16 * 128 * 4
    assert found["negate"].work == Work(vector=16 * 128)
    assert found["fusion"].bytes == 64 * 128 * 2 + 104 * 128 * 4  # 'a' is on the chip
    assert found["fusion"].work == Work(2 * 100 * 64 * 3, 2 * 100 * 128 * 128, 0.0, "bfloat16")
    assert found["fusion"].cycles == 1500
    assert found["row"].bytes == 256 + 512  # the row and its number, not 1,000 rows
    assert found["next"].scalar
    assert not found["negate"].scalar


def test_a_collective_has_its_kind_and_its_bytes():
    found = read_tpu_program()["sum-start"]
    assert (found.collective, found.sent) == ("all-reduce", 16 * 3 * 4)
    assert predict.ring("all-reduce", 1e9, 200e9, 4) == pytest.approx(2 * 3 / 4 * 1e9 / 100e9)
    assert predict.ring("all-gather", 1e9, 200e9, 4) == pytest.approx(3 * 1e9 / 100e9)


# As a TPU is given them: a gathering that goes on beside a product, and a sum that is scattered.
ASYNCHRONOUS_PROGRAM = """HloModule jit_update

%begin (a: f32[4,8]) -> (f32[4,8], f32[32,8]) {
  %a = f32[4,8]{1,0} parameter(0)
  %all-gather.1 = f32[32,8]{1,0} all-gather(%a), channel_id=5, dimensions={0}
  ROOT %started = (f32[4,8]{1,0}, f32[32,8]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (a: f32[4,8], b: f32[8,8]) -> (f32[8,8], f32[32,8]) {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %all-gather.2 = f32[32,8]{1,0} all-gather(%a), channel_id=5, dimensions={0}
  %product = f32[8,8]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %both = (f32[8,8]{1,0}, f32[32,8]{1,0}) tuple(%product, %all-gather.2)
}

%all-reduce-scatter (whole: f32[32,8]) -> f32[4,8] {
  %whole = f32[32,8]{1,0} parameter(0)
  %all-reduce.1 = f32[32,8]{1,0} all-reduce(%whole), channel_id=6, to_apply=%add
  %here = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %share = f32[4,8]{1,0} dynamic-slice(%all-reduce.1, %here, %zero), dynamic_slice_sizes={4,8}
}

ENTRY %main (a: f32[4,8], b: f32[8,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %start = (f32[4,8]{1,0}, f32[32,8]{1,0}) fusion(%a), kind=kCustom, calls=%begin
  %on = (f32[8,8]{1,0}, f32[32,8]{1,0}) fusion(%a, %b), kind=kOutput, calls=%beside
  %gathered = f32[32,8]{1,0} get-tuple-element(%on), index=1
  ROOT %mine = f32[4,8]{1,0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


def test_a_collective_beside_other_work_counts_once_and_a_scattered_sum_as_such():
    found = {each.name: each for each in kernels.read(ASYNCHRONOUS_PROGRAM)}
    collectives = {name: (each.collective, each.sent) for name, each in found.items() if each.collective}
    assert collectives == {"start": ("all-gather", 4 * 8 * 4), "mine": ("reduce-scatter", 32 * 8 * 4)}
    assert found["on"].work.products == 2 * 8**3


SLICED_PROGRAM = """HloModule jit_update

%parts (a: f32[100]) -> (f32[10], f32[5]) {
  %a = f32[100]{0} parameter(0)
  %drawn = f32[100]{0} add(%a, %a)
  %mixed = f32[100]{0} multiply(%drawn, %drawn)
  %first = f32[10]{0} slice(%mixed), slice={[0:10]}
  %second = f32[5]{0} slice(%mixed), slice={[10:15]}
  ROOT %both = (f32[10]{0}, f32[5]{0}) tuple(%first, %second)
}

%all (a: f32[100]) -> f32[] {
  %a = f32[100]{0} parameter(0)
  %zero = f32[] constant(0)
  %drawn = f32[100]{0} add(%a, %a)
  ROOT %sum = f32[] reduce(%drawn, %zero), dimensions={0}, to_apply=%add
}

ENTRY %main (a: f32[100]) -> f32[] {
  %a = f32[100]{0} parameter(0)
  %some = (f32[10]{0}, f32[5]{0}) fusion(%a), kind=kLoop, calls=%parts
  ROOT %every = f32[] fusion(%a), kind=kInput, calls=%all
}
"""


def test_of_what_a_kernel_slices_it_computes_the_slices():
    found = {each.name: each.work.vector for each in kernels.read(SLICED_PROGRAM)}
    assert found == {"some": pytest.approx(2 * 15), "every": pytest.approx(2 * 100)}


def test_a_kernel_takes_the_largest_of_its_times_and_a_launch():
    chip = targets.CHIPS["v5e"]
    work = Work(products=1e9, padded=197e9, vector=chip.vector * 1e-4, precision="bfloat16")
    kernel = Kernel("k", "fusion", 3, "", 819e6, work, False, False, 0.0, "", 0.0, "a.py:1 f")
    found = predict.cost(kernel, chip)
    assert found.total == pytest.approx(3 * (1e-3 + 0.5e-6))  # memory and products take a millisecond each
    assert found.bound in ("memory", "products")
    lines = predict.by_line([kernel, kernel], chip)
    assert lines == [("a.py:1 f", pytest.approx(2 * found.total), found.bound)]


def test_products_of_a_real_program_are_those_of_the_traced_one():
    """Loops are multiplied; what meets only padding is not counted."""

    def convolve(x, w, stride, dilation):
        labels = ("NHWC", "HWIO", "NHWC")
        pads = ((1, 1), (2, 1))
        return jax.lax.conv_general_dilated(x, w, stride, pads, dilation, dimension_numbers=labels)

    def program(x, w, m):
        x = convolve(x, w, (1, 1), (1, 1))
        m = jax.lax.fori_loop(0, 7, lambda _, m: jnp.tanh(m @ m), m)
        return x.sum(), m

    x, w, m = jnp.ones((2, 9, 8, 3)), jnp.ones((4, 4, 3, 5)), jnp.ones((64, 64))
    lowered = jax.jit(program).lower(x, w, m)
    text = lowered.compile(compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""}).as_text()
    found = kernels.read(text)
    in_loop = [each for each in found if each.loop and each.work.products]
    assert [(each.times, each.work.products) for each in in_loop] == [(7, 2 * 64**3)]
    assert in_loop[0].bytes >= 2 * 64 * 64 * 4
    outside = sum(each.work.products for each in found if not each.loop)
    pairs_rows = sum(0 <= o + k - 1 < 9 for o in range(8) for k in range(4))
    pairs_columns = sum(0 <= o + k - 2 < 8 for o in range(8) for k in range(4))
    assert outside == 2 * 2 * 5 * 3 * pairs_rows * pairs_columns


@pytest.mark.parametrize(
    ("line", "shapes", "expected"),
    [
        # Products of 64 batches as a dilated convolution, as XLA does for TPUs: one of 64 places counts.
        (
            "window={size=64 stride=63 lhs_dilate=64}, dim_labels=0bf_0io->0bf",
            ("bf16[64,16,32]", "bf16[64,32,8]", "bf16[64,16,8]"),
            2 * 64 * 16 * 32 * 8,
        ),
        # A 2 × 2 kernel with stride 2, and its two gradients by a library.
        (
            "window={size=2x2 stride=2x2}, dim_labels=b01f_o01i->b01f, "
            'custom_call_target="__cudnn$convForward"',
            ("f32[4,8,8,3]", "f32[5,2,2,3]", "f32[4,4,4,5]"),
            2 * 4 * 16 * 5 * 4 * 3,
        ),
        (
            "window={size=2x2 stride=2x2}, dim_labels=b01f_o01i->b01f, "
            'custom_call_target="__cudnn$convBackwardInput"',
            ("f32[4,4,4,5]", "f32[5,2,2,3]", "f32[4,8,8,3]"),
            2 * 4 * 16 * 5 * 4 * 3,
        ),
        (
            "window={size=2x2 stride=2x2}, dim_labels=b01f_o01i->b01f, "
            'custom_call_target="__cudnn$convBackwardFilter"',
            ("f32[4,8,8,3]", "f32[4,4,4,5]", "f32[5,2,2,3]"),
            2 * 4 * 16 * 5 * 4 * 3,
        ),
        (
            'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1","2"]}}}',
            ("f32[6,4,8]", "f32[32,7]", "f32[6,7]"),
            2 * 6 * 32 * 7,
        ),
    ],
)
def test_products_of_convolutions_and_library_calls(line, shapes, expected):
    a, b, result = shapes
    operation = "custom-call" if "custom_call" in line else "convolution"
    found = kernels.read(
        f"HloModule m\n\nENTRY %main (a: {a}, b: {b}) -> {result} {{\n  %a = {a} parameter(0)\n"
        f"  %b = {b} parameter(1)\n  ROOT %it = {result} {operation}(%a, %b), {line}\n}}\n"
    )
    assert [each.work.products for each in found] == [expected]


def test_what_is_summed_for_a_pixel_fills_the_matrix_unit_and_not_its_channels_alone():
    """48 numbers of a window of 4 × 4 pixels with 3 channels, to 128; and 32 results to 128."""
    shapes = "bf16[8,64,64,3]", "bf16[4,4,3,32]", "bf16[8,31,31,32]"
    (found,) = kernels.read(
        f"HloModule m\n\nENTRY %main (a: {shapes[0]}, b: {shapes[1]}) -> {shapes[2]} {{\n"
        f"  %a = {shapes[0]} parameter(0)\n  %b = {shapes[1]} parameter(1)\n  ROOT %it = {shapes[2]} "
        "convolution(%a, %b), window={size=4x4 stride=2x2}, dim_labels=b01f_01io->b01f\n}\n",
        tile=128,
    )
    assert found.work.products == 2 * 8 * 31**2 * 48 * 32
    assert found.work.padded == pytest.approx(2 * 8 * 31**2 * 128 * 128)


def test_shapes_are_read_with_their_layout():
    (shape,) = instructions.shapes("bf16[4,64,12]{1,2,0:T(8,128)(2,1)S(1)}")
    assert (shape.dims, shape.minor_to_major, shape.tile, shape.space) == (
        (4, 64, 12),
        (1, 2, 0),
        (8, 128),
        1,
    )
    assert shape.padded == 4 * 16 * 128
    assert instructions.shapes("pred[]")[0].bytes == 1
    assert instructions.shapes("s4[10]{0}")[0].bytes == 5


ALL_REDUCE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from benchmarks import kernels
mesh = Mesh(np.array(jax.devices()), ("data",))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=split)
text = jax.jit(lambda x: x.T @ x, out_shardings=whole).lower(x).compile().as_text()
print([(k.collective, k.sent) for k in kernels.read(text) if k.collective])
"""


def test_the_all_reduce_of_a_product_over_devices_is_found():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ALL_REDUCE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([("all-reduce", 32.0 * 32 * 4)])


# ------------------------------------------------------------------------------------ absent machines


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("v5e", 1, "tpu"),
        ("v5e:2x4", 8, "tpu"),
        ("v5p:2x2x1", 4, "tpu"),
        ("H200", 1, "gpu"),
        ("H100:8", 8, "gpu"),
    ],
)
def test_targets_are_named_as_people_name_them(name, count, kind):
    target = targets.parse(name)
    assert (target.count, target.chip.kind) == (count, kind)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x", "unknown device 'v5x'"),
        ("v5e:8", "v5e:2x4"),
        ("v5e:0x4", "v5e:2x4"),
        ("v5p:2x2", "v5p:2x2x1"),
        ("H200:2x4", "H200:8"),
    ],
)
def test_what_is_no_target_is_refused_in_one_line(name, message, capsys):
    assert main(["--only", "compile", "--target", name]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("target", "extra"), [("v5e:2x4", "[tpu]"), ("H200", "[cuda12]")])
def test_without_the_compiler_the_extra_is_named(target, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        absent.compile_update(targets.parse(target), make_config(preset="debug"))
    assert extra in str(refused.value)


def test_the_chip_of_this_machine_is_known_by_its_name():
    assert targets.chip_of("TPU v5 lite") is targets.CHIPS["v5e"]
    assert targets.chip_of("TPU v5") is targets.CHIPS["v5p"]
    assert targets.chip_of("NVIDIA H100 80GB HBM3") is targets.CHIPS["H100"]
    assert targets.chip_of("cpu") is None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra tpu")
def test_an_update_is_compiled_for_a_chip_that_is_not_there(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", "--preset", "debug", "--only", "compile"]
    subprocess.run([*command, "--target", "v5e", "--json", str(path)], check=True, timeout=900)
    rows = {row["name"]: row["value"] for row in json.loads(path.read_text())["rows"]}
    assert 0 < rows["memory"] < 1
    assert rows["kernels"] > 500
    assert 1e-4 < rows["time of an update"] < 1e-1
    with tracing_for("tpu"):
        subject = make_shapes(replace(make_config(preset="debug"), {"precision": "bfloat16"}))
        key = jax.eval_shape(lambda: jax.random.key(0))
        traced = jax.jit(subject.agent.update).trace(subject.state, subject.replay, key)
    # The compiler leaves out products with padding, and what nobody reads.
    assert rows["products"] == pytest.approx(operations.count(traced.jaxpr), rel=0.1)
