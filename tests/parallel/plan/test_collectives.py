"""Bytes that devices send: the formula of each kind, and a compiled loop with a known number of collectives."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.parallel.plan.collectives import collectives, group_size, moved_by_kind
from rlhf_jax.parallel.plan.hlo import parse

BODY = """HloModule m, is_scheduled=true, num_partitions=8

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

FUSION
ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  LINE
  ROOT %out = f32[64]{0} copy(%a)
}
"""


def only(line, fusion=""):
    (found,) = collectives(parse(BODY.replace("LINE", line).replace("FUSION", fusion)))
    return found.kind, found.result_bytes, found.group, found.moved_bytes


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # 64 floats in all, of which a device has 1 / 4 and gets the other 3 / 4
        ("%c = f32[64]{0} all-gather(%a), channel_id=1, replica_groups=[2,4]<=[8]", ("all-gather", 256, 4, 192)),
        ("%c = f32[64]{0} all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%sum", ("all-reduce", 256, 2, 256)),
        ("%c = f32[8]{0} reduce-scatter(%a), replica_groups={}, to_apply=%sum", ("reduce-scatter", 32, 8, 224)),
        ("%c = f32[64]{0} all-to-all(%a), replica_groups=[1,8]<=[8]", ("all-to-all", 256, 8, 224)),
        # only begun: the operand and bookkeeping stand beside the result
        (
            "%c = (f32[16]{0}, f32[64]{0}) all-gather-start(%a), channel_id=1, replica_groups=[2,4]<=[8]",
            ("all-gather", 256, 4, 192),
        ),
        (
            "%c = (bf16[64]{0}, bf16[64]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}",
            ("collective-permute", 128, 8, 128),
        ),
    ],
)
def test_each_kind_by_its_formula(line, expected):
    assert only(line) == expected


def test_a_fusion_that_keeps_its_part_of_a_sum_is_a_reduce_scatter():
    fusion = """%all-reduce-scatter.1 (i: f32[64]) -> f32[16] {
  %i = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%i), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %s = f32[16]{0} dynamic-slice(%r), dynamic_slice_sizes={16}
}
"""
    line = "%c = f32[16]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1"
    assert only(line, fusion) == ("reduce-scatter", 64, 4, 192)


def test_a_collective_that_is_written_into_several_fusions_counts_once():
    part = """%part.N (i.N: f32[16]) -> f32[64] {
  %i.N = f32[16]{0} parameter(0)
  ROOT %g.N = f32[64]{0} all-gather(%i.N), channel_id=7, replica_groups=[2,4]<=[8]
}
"""
    lines = "\n  ".join(f"%c.{n} = f32[64]{{0}} fusion(%a), kind=kCustom, calls=%part.{n}" for n in (1, 2))
    assert only(lines, part.replace("N", "1") + part.replace("N", "2"))[0] == "all-gather"


def test_groups_named_by_axes_and_parts_of_axes():
    assert group_size("replica_groups=mesh['data'=4,'tensor'=8] {'data','tensor'}, x", 32) == 32
    assert group_size("replica_groups=mesh['data'=4,'tensor'=8] {'tensor':(2)4}, x", 32) == 4


def test_one_device_sends_nothing():
    text = BODY.replace("FUSION", "").replace("num_partitions=8", "num_partitions=1")
    assert collectives(parse(text.replace("LINE", "%c = f32[64]{0} all-gather(%a), replica_groups={}"))) == []


def test_a_compiled_scan_of_split_products_has_one_all_reduce_a_turn():
    """[4, 16] times matrices whose inner axis is split over 8 devices: each of the 5 products is a sum over them."""
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "tensor", None))

    def products(x, matrices):
        def turn(x, matrix):
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, "tensor")))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ matrix), whole), None

        return jax.lax.scan(turn, x, matrices)[0]

    program = jax.jit(products, in_shardings=(whole, split), out_shardings=whole)
    shapes = jax.ShapeDtypeStruct((4, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    module = parse(program.lower(*shapes).compile().as_text())
    (found,) = [one for one in collectives(module) if one.times > 1]
    assert (found.kind, found.group, found.times, found.result_bytes) == ("all-reduce", 8, 5, 4 * 16 * 4)
    assert moved_by_kind(module)["all-reduce"] == 5 * 2 * 256 * 7 / 8
