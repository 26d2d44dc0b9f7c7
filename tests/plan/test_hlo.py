"""What is read from a program's text, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.plan import hlo
from jaxdistill.plan.hlo.collectives import axes_of

MESH = {"data": 2, "fsdp": 4, "tensor": 2, "context": 1}


@functools.cache
def scanned(layers: int) -> str:
    """x w_1 w_2 ... as a scan: [64, 32] times [layers, 32, 32]."""

    def chain(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 32), (layers, 32, 32)))
    return jax.jit(chain).lower(*shapes).compile().as_text()


def test_products_of_a_loop_count_as_often_as_it_runs():
    assert hlo.product_flops(scanned(3)) == 3 * 2 * 64 * 32 * 32
    assert hlo.collectives(scanned(3)) == []


def test_a_loop_reads_a_slice_of_its_weights_in_each_turn_and_not_all_of_them():
    layers = 64
    least = layers * 4 * (2 * 64 * 32 + 32 * 32)
    assert least <= hlo.bytes_moved(scanned(layers)) <= 2.5 * least
    assert 4 * layers * layers * 32 * 32 > 5 * least  # what counting whole operands would give


def test_bytes_of_shapes():
    assert hlo.nbytes("(f32[8,16]{1,0}, bf16[4])") == 8 * 16 * 4 + 8
    on_chip = "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[2,128]{1,0:T(2,128)})"
    assert hlo.nbytes(on_chip) == 2 * 8 * 128 + 4 * 2 * 128
    assert hlo.nbytes(on_chip, on_chip=False) == 4 * 2 * 128


# As a TPU's compiler writes it: nothing says how often the loop runs.
LOOP = """
%condition.1 (p: (s32[], f32[64,64], s32[])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(17)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body.1 (p: (s32[], f32[64,64], s32[])) -> (s32[], f32[64,64], s32[]) {
  %q = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = f32[64,64]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %step = s32[]{:T(128)} get-tuple-element(%q), index=2
  %next = s32[]{:T(128)} add(%j, %step)
  %y = f32[64,64]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %t = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%next, %y, %step)
}

ENTRY %main (a: f32[64,64]) -> f32[64,64] {
  %a = f32[64,64]{1,0:T(8,128)} parameter(0)
  %first = s32[]{:T(128)} constant(3)
  %two = s32[]{:T(128)} constant(2)
  %copied = s32[]{:T(128)} copy(%two)
  %in = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%first, %a, %copied)
  %loop = (s32[], f32[64,64]{1,0}, s32[]) while(%in), condition=%condition.1, body=%body.1
  ROOT %out = f32[64,64]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_iterations_are_read_off_a_loop_that_does_not_tell_them():
    turns = len(range(3, 17, 2))
    assert hlo.product_flops(LOOP) == turns * 2 * 64**3
    assert not hlo.parse(LOOP).unknown_loops


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    text = LOOP.replace("direction=LT", "direction=NE").replace("%loop", "%endless")
    assert hlo.product_flops(text) == 2 * 64**3
    assert hlo.parse(text).unknown_loops == {"endless"}


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "multiply_adds"),
    [
        # [B, M, K] x [B, K, N], the batch as the holes of a dilated window
        (
            "bf16[16,8,1,32]", "bf16[64,8,32,1]", "bf16[8,16,1,64]",
            "window={size=8x1 stride=7x1 lhs_dilate=8x1}, dim_labels=b01f_o0i1->0b1f",
            8 * 16 * 32 * 64,
        ),
        # [M, K] x [K, G, N], one group of the result for each place of the window
        (
            "f32[16,32,1]", "f32[32,2,64]", "f32[16,2,64]",
            "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            16 * 32 * 2 * 64,
        ),
        # a sum over a window as well as over features
        (
            "f32[16,4,32]", "f32[4,32,64]", "f32[16,64,1]",
            "window={size=4}, dim_labels=b0f_0io->bf0", 16 * 4 * 32 * 64,
        ),
    ],
)  # fmt: skip
def test_products_that_a_tpu_writes_as_convolutions(left, right, out, attributes, multiply_adds):
    text = (
        f"ENTRY %main (a: {left}, b: {right}) -> {out} {{\n  %a = {left} parameter(0)\n"
        f"  %b = {right} parameter(1)\n  ROOT %c = {out} convolution(%a, %b), {attributes}\n}}\n"
    )
    assert hlo.product_flops(text) == 2 * multiply_adds


# As libtpu writes [64, 16] x [4, 16, 24] in groups: large, as a kernel beside one that prepares it;
# small, as a product for each group whose empty blocks are passed by, in a fusion within a fusion.
KERNEL = """
ENTRY %main (a: bf16[64,16], b: RIGHT, n: s32[4]) -> OUT {
  %a = bf16[64,16] parameter(0)
  %b = RIGHT parameter(1)
  %n = s32[4] parameter(2)
  %ragged-dot-metadata.1 = s32[5] custom-call(%a, %b), custom_call_target="tpu_custom_call"
  ROOT %ragged-dot-none.2 = OUT custom-call(%n, /*index=1*/%a, %b), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501
MASKED = """
%product (p: bf16[4,64,16], q: bf16[4,16,24]) -> bf16[64,24] {
  %p = bf16[4,64,16] parameter(0)
  %q = bf16[4,16,24] parameter(1)
  %c = bf16[4,64,24] convolution(%p, %q), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
  ROOT %sum = bf16[64,24] reduce(%c, %zero), dimensions={0}, to_apply=%add
}

%outer (p: bf16[4,64,16], q: bf16[4,16,24]) -> bf16[64,24] {
  %p.1 = bf16[4,64,16] parameter(0)
  %q.1 = bf16[4,16,24] parameter(1)
  ROOT %inner = bf16[64,24] fusion(%p.1, %q.1), kind=kOutput, calls=%product, backend_config=CONFIG
}

ENTRY %main (a: bf16[4,64,16], b: bf16[4,16,24]) -> bf16[64,24] {
  %a = bf16[4,64,16] parameter(0)
  %b = bf16[4,16,24] parameter(1)
  ROOT %f = bf16[64,24] fusion(%a, %b), kind=kCustom, calls=%outer, backend_config=CONFIG
}
"""  # noqa: E501
PASSED_BY = '{"convolution_algorithm_config":{"num_groups_in_ragged_dot":"4"}}'


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (KERNEL.replace("RIGHT", "bf16[4,16,24]").replace("OUT", "bf16[64,24]"), 64),
        # The gradient of the groups' matrices.
        (KERNEL.replace("RIGHT", "bf16[64,24]").replace("OUT", "bf16[4,16,24]"), 64),
        (MASKED.replace("CONFIG", PASSED_BY), 64),
        (MASKED.replace("CONFIG", "{}"), 4 * 64),
    ],
)
def test_a_tpu_multiplies_each_row_of_a_ragged_product_once(text, rows):
    assert hlo.product_flops(text) == 2 * rows * 16 * 24
    filled = 0.25 if rows == 64 else 1.0
    assert hlo.product_flops(text, filled=0.25) == filled * 2 * rows * 16 * 24


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['data'=2,'fsdp'=4,'tensor'=2,'context'=1] {'fsdp'}", ("fsdp",)),
        ("mesh['data'=2,'fsdp'=4,'tensor'=2,'context'=1] {'data','tensor'}", ("data", "tensor")),
        ("mesh['axis_0'=16] {'axis_0'}", ("data", "fsdp", "tensor")),
        ("mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a'}", ("tensor",)),
        ("mesh['a'=2,'b'=8], device_ids=([16]) {'a'}", ("data",)),
        ("mesh['a'=2,'b'=8], device_ids=(0,8,1) {'a'}", ("data", "fsdp", "tensor")),  # not read
        ("[8,2]<=[16]", ("tensor",)),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("{{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", ("data",)),
        ("{{0,2},{2,4},{4,6},{6,0}}", ("fsdp",)),  # pairs of a permutation
        ("", ("data", "fsdp", "tensor")),
    ],
)
def test_the_axes_of_a_collective(groups, axes):
    assert axes_of(groups, MESH) == axes


def test_what_a_collective_sends():
    named = "mesh['data'=2,'fsdp'=4,'tensor'=2,'context'=1] {'fsdp'}"
    sent = {
        kind: hlo.Collective("x", kind, "", 1000.0, 3, "", named).link_bytes(MESH)
        for kind in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute")
    }
    assert sent == {
        "all-gather": 3 * 750,
        "all-reduce": 3 * 1500,
        "reduce-scatter": 3 * 3000,
        "collective-permute": 3 * 1000,
    }


# Eight devices, four on each of two hosts, and a result of 1,000 bytes.
HOSTS = (0, 0, 0, 0, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("kind", "groups", "leaving"),
    [
        # The four of a host together need what the other host has: 500, or both its results.
        ("all-gather", "[1,8]<=[8]", 500 / 4),
        ("all-reduce", "[1,8]<=[8]", 2 * 500 / 4),
        ("reduce-scatter", "[1,8]<=[8]", 4 * 1000 / 4),
        ("all-to-all", "[1,8]<=[8]", 4 * 1000 / 8),  # each device has four of eight parts to send
        ("all-gather", "[4,2]<=[2,4]T(1,0)", 500),  # {0, 4}, {1, 5}, ...: nobody shares the way
        ("all-gather", "[2,4]<=[8]", 0),  # each host by itself
        ("collective-permute", "{{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}", 1000 / 4),
        ("collective-permute", "{{0,4},{4,0}}", 1000 / 4),
        ("collective-permute", "{{0,1},{1,0}}", 0),
    ],
)
def test_what_leaves_a_host(kind, groups, leaving):
    one = hlo.Collective("x", kind, "", 1000.0, 3, "", groups)
    assert one.network_bytes(HOSTS) == 3 * leaving
    assert one.network_bytes([5] * 8) == 0


# As libtpu writes them: two slices of four devices; what they do first among themselves is told by
# the places of one slice.
SLICES = """
ENTRY %main (a: f32[32]) -> f32[8] {
  %a = f32[32] parameter(0)
  %near = f32[32] all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
  %token = token[] after-all()
  %r.1 = (f32[8], u32[], token[]) recv(%token), frontend_attributes={ATTRIBUTES}
  ROOT %b = f32[8] get-tuple-element(%r.1), index=0
}
"""


@pytest.mark.parametrize(
    ("target", "transfer", "kind", "sent"),
    [
        ('"{1,2}x{0:3}"', "ALL_REDUCE", "all-reduce", 32),
        ('"{1,2}x{0:3}"', "ALL_GATHER", "all-gather", 16),
        (
            "{{100000,200000},{100003,200003},{100001,200001}}",
            "REDUCE_SCATTER",
            "reduce-scatter",
            32,
        ),
        ("{{100003->200000},{200003->100000}}", "ONE_TO_ONE", "collective-permute", 32 / 4),
    ],
)
def test_what_leaves_a_slice(target, transfer, kind, sent):
    written = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{transfer}"'
    near, beyond = hlo.collectives(SLICES.replace("ATTRIBUTES", written))
    mesh = {"data": 2, "fsdp": 4}
    assert (beyond.kind, beyond.nbytes, near.network_bytes(HOSTS)) == (kind, 32, 0)
    assert beyond.network_bytes(HOSTS) == sent
    assert beyond.axes(mesh) == (("data", "fsdp") if kind == "collective-permute" else ("data",))
    assert near.axes(mesh) == ("fsdp",) and near.link_bytes(mesh) == 2 * 128 * 3 / 4


def test_collectives_of_a_sharded_product(mesh8):
    place = lambda *axes: jax.NamedSharding(mesh8, jax.P(*axes))
    a = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=place(None, "tensor"))
    b = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=place("tensor", None))
    text = jax.jit(jnp.dot, out_shardings=place()).lower(a, b).compile().as_text()
    (found,) = hlo.collectives(text)
    assert (found.kind, found.axes(mesh8.shape)) == ("all-reduce", ("tensor",))
    assert found.nbytes == 32 * 16 * 4
    assert hlo.product_flops(text) == 2 * 32 * 16 * 64 / mesh8.shape["tensor"]


def test_a_collective_in_pieces_counts_once():
    piece = (
        "%fused.{n} (p: f32[8]) -> f32[32] {{\n  %p.{n} = f32[8] parameter(0)\n"
        "  ROOT %g.{n} = f32[32] all-gather(%p.{n}), channel_id=7, replica_groups=[4,4]<=[16], "
        'frontend_attributes={{chain_id="1"}}\n}}\n'
    )
    calls = "".join(
        f"  %f.{n} = f32[32] fusion(%a), kind=kCustom, calls=%fused.{n}\n" for n in range(3)
    )
    text = "".join(piece.format(n=n) for n in range(3))
    text += f"ENTRY %main (a: f32[8]) -> f32[32] {{\n  %a = f32[8] parameter(0)\n{calls}}}\n"
    (found,) = hlo.collectives(text)
    assert (found.kind, found.times, found.nbytes) == ("all-gather", 1, 32 * 4)
    assert np.isclose(found.link_bytes({"fsdp": 4, "tensor": 4}), 32 * 4 * 3 / 4)


def test_a_tpu_writes_a_reduce_scatter_as_an_all_reduce_that_is_sliced():
    text = (
        "%all-reduce-scatter.1.clone (p: f32[32]) -> f32[8] {\n  %p = f32[32] parameter(0)\n"
        "  %r = f32[32] all-reduce(%p), replica_groups=[4,4]<=[16], to_apply=%add\n"
        "  ROOT %s = f32[8] dynamic-slice(%r, %n), dynamic_slice_sizes={8}\n}\n"
        "ENTRY %main (a: f32[32]) -> f32[8] {\n  %a = f32[32] parameter(0)\n"
        "  ROOT %f = f32[8] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1.clone\n}\n"
    )
    (found,) = hlo.collectives(text)
    assert (found.kind, found.nbytes) == ("reduce-scatter", 8 * 4)
    assert found.link_bytes({"fsdp": 4, "tensor": 4}) == 3 * 8 * 4
