"""Bytes between memory and core, and FLOPs of products, with loops counted as often as they run."""

import jax
import jax.numpy as jnp

from rlhf_jax.parallel.plan.hlo import parse
from rlhf_jax.parallel.plan.traffic import memory_traffic, product_flops

SLICES = """HloModule m, is_scheduled=true

%read_one (p: bf16[10,64], i: s32[]) -> bf16[64] {
  %p = bf16[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,64}
  ROOT %row = bf16[64]{0} bitcast(%slice)
}

%outer (q: bf16[10,64], j: s32[], r: bf16[64]) -> bf16[64] {
  %q = bf16[10,64]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %r = bf16[64]{0} parameter(2)
  %inner = bf16[64]{0} fusion(%q, %j), kind=kLoop, calls=%read_one
  ROOT %sum = bf16[64]{0} add(%inner, %r)
}

%write_one (w: bf16[10,64], v: bf16[1,64], k: s32[]) -> bf16[10,64] {
  %w = bf16[10,64]{1,0} parameter(0)
  %v = bf16[1,64]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %nil = s32[] constant(0)
  ROOT %u = bf16[10,64]{1,0} dynamic-update-slice(%w, %v, %k, %nil)
}

ENTRY %main (a: bf16[10,64], n: s32[], b: bf16[64]) -> bf16[10,64] {
  %a = bf16[10,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %b = bf16[64]{0:T(1024)S(1)} parameter(2)
  %one = bf16[64]{0} fusion(%a, %n, %b), kind=kLoop, calls=%outer
  %view = bf16[1,64]{1,0} bitcast(%one)
  ROOT %all = bf16[10,64]{1,0} fusion(%a, %view, %n), kind=kLoop, calls=%write_one
}
"""


def test_of_an_array_that_is_sliced_only_the_slice_moves():
    """The first fusion reads a row of 128 bytes and writes one; the second reads one and writes it into its place.

    What lies on the chip (`b`) moves nothing; the two scalars have 4 bytes each.
    """
    assert memory_traffic(parse(SLICES)) == (128 + 128 + 4) + (128 + 128 + 4)


def test_products_in_a_loop_count_each_turn():
    """Six products of [4, 16] and [16, 16]: 2 x 4 x 16 x 16 FLOPs each."""

    def products(x, matrices):
        return jax.lax.scan(lambda x, matrix: (jnp.tanh(x @ matrix), None), x, matrices)[0]

    shapes = jax.ShapeDtypeStruct((4, 16), jnp.float32), jax.ShapeDtypeStruct((6, 16, 16), jnp.float32)
    compiled = jax.jit(products).lower(*shapes).compile()
    module = parse(compiled.as_text())
    assert product_flops(module) == 6 * 2 * 4 * 16 * 16
    assert compiled.cost_analysis()["flops"] < product_flops(module)  # XLA's own count has the body once
    assert 6 * 16 * 16 * 4 <= memory_traffic(module) < 60 * 16 * 16 * 4
