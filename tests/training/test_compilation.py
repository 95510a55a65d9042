"""Compilations are counted, and only compilations."""

import jax
import jax.numpy as jnp

from rlhf_jax.training.compilation import CompileClock


def test_a_program_is_counted_once_and_another_shape_is_another_program():
    small, large = jnp.ones(3), jnp.ones(5)
    program = jax.jit(lambda x: jnp.sin(x) * 2.5)
    clock = CompileClock()
    jax.block_until_ready(program(small))
    first = clock.programs
    assert first >= 1
    assert clock.seconds > 0
    jax.block_until_ready(program(small))
    assert clock.programs == first
    jax.block_until_ready(program(large))
    assert clock.programs > first
