import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.optimizer import adam, apply_gradients
from rlhf_jax.models.compressed_moments import Coded, decode, encode, narrow, scale_by_adam

EVERY_NOISE = jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16)
FORMATS = ("bfloat16", "int8")
STEP = 2 ** (1 / 8)


@functools.cache
def updates_of(moments: str, b2: float = 0.999):
    """`scale_by_adam` and a compiled run of it over stacked gradients [steps, ...]: the last state and all updates."""
    optimizer = scale_by_adam(0.9, b2, moments)

    @jax.jit
    def run(state, gradients):
        def step(state, gradient):
            updates, state = optimizer.update(gradient, state)
            return state, updates

        with jax.numpy_dtype_promotion("standard"):
            return jax.lax.scan(step, state, gradients)

    return optimizer, run


def loaded(moment):
    return np.asarray(decode(moment) if isinstance(moment, Coded) else moment, np.float64)


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_one_of_the_two_levels_around_the_entry(signed):
    """Neighbouring levels are an eighth of an octave apart down to 2^-15.75 (2^-31.75) of the scale."""
    octaves = 15.5 if signed else 31.5
    random = np.random.default_rng(0)
    values = 3.0 * 2.0 ** -random.uniform(0, octaves, size=(4, 64))
    values[0, :3] = [0.0, 3.0, 3.0 * 2.0**-8]
    values *= random.choice([-1, 1], size=values.shape) if signed else 1
    noise = random.integers(0, 2**16, size=values.shape, dtype=np.uint16)
    coded = encode(jnp.float32(values), jnp.full(4, 3.0), jnp.asarray(noise), signed)
    found = np.asarray(decode(coded))
    assert coded.codes.dtype == (jnp.int8 if signed else jnp.uint8)
    np.testing.assert_array_equal(found[values == 0], 0.0)
    ratio = found[values != 0] / values[values != 0]
    assert (ratio > 1 / STEP - 1e-5).all() and (ratio < STEP + 1e-5).all()
    np.testing.assert_allclose(np.abs(found[0, 1:3]), [3.0, 3.0 * 2.0**-8], rtol=1e-6)


@pytest.mark.parametrize("moments", FORMATS)
def test_rounding_is_unbiased(moments):
    """Over all noises there are, the mean is the value, also of one below the smallest level (1.5 * 2^-15.75)."""
    values = jnp.array([1.0, -0.3, 1.7e-4, 3.1e-7, 1e-30])[:, None] * jnp.ones((5, 2**16))
    noise = jnp.broadcast_to(EVERY_NOISE, values.shape)
    if moments == "bfloat16":
        found = np.asarray(narrow(values, noise), np.float64)
    else:
        found = np.asarray(decode(encode(values, jnp.full(5, 1.5), noise, signed=True)), np.float64)
    tolerance = 2.0**-16 * 1.5 * 2**-15.75 if moments == "int8" else 0.0
    np.testing.assert_allclose(found.mean(axis=1), values[:, 0], rtol=1e-5, atol=tolerance)
    assert all(len(np.unique(row)) == 2 for row in found[1:])


def test_no_second_moment_is_rounded_to_0():
    values = jnp.array([1.0, 1e-12, 1e-20, 1e-30, 0.0])
    lowest = decode(encode(values, jnp.array(1.0), jnp.full(5, 2**16 - 1, jnp.uint16), signed=False))
    np.testing.assert_allclose(lowest[1:4], 2.0**-31.75, rtol=1e-5)
    assert lowest[4] == 0 and bool((narrow(values[:4], jnp.zeros(4, jnp.uint16)) > 0).all())


def test_scales_are_bounds_that_follow_the_gradients():
    """By hand: the average of the largest entries, b s + (1 - b) max |g|; it is never below the moment."""
    gradients = np.random.default_rng(1).standard_normal((20, 3, 32)).astype(np.float32)
    gradients[:, 1] *= np.arange(20)[:, None] % 7 == 0
    optimizer, run = updates_of("int8")
    state, _ = run(optimizer.init(jnp.zeros((3, 32))), jnp.asarray(gradients))
    first, second = np.zeros(3), np.zeros(3)
    for gradient in gradients:
        first = 0.9 * first + 0.1 * np.abs(gradient).max(axis=-1)
        second = 0.999 * second + 0.001 * np.square(gradient).max(axis=-1)
    np.testing.assert_allclose(state.mu.scales, first, rtol=1e-5)
    np.testing.assert_allclose(state.nu.scales, second, rtol=1e-5)
    assert (np.abs(loaded(state.mu)).max(axis=-1) <= first * 1.0001).all()


@pytest.mark.parametrize("moments", FORMATS)
def test_the_second_moment_follows_gradients_that_become_smaller(moments):
    """A tenth of the gradient after 20 steps: v falls by 1 % a step, less than half the way to the next lower level.

    Rounded to the nearest it would stay. The mean over 4096 equal entries is known to about 0.5 %.
    """
    gradients = jnp.ones((120, 1, 4096)) * jnp.where(jnp.arange(120) < 20, 1.0, 0.1)[:, None, None]
    optimizer, run = updates_of(moments, b2=0.99)
    state, _ = run(optimizer.init(gradients[0]), gradients)
    v = 0.0
    for gradient in np.asarray(gradients[:, 0, 0]):
        v = 0.99 * v + 0.01 * float(gradient) ** 2
    np.testing.assert_allclose(loaded(state.nu).mean(), v, rtol=0.03)
    np.testing.assert_allclose(loaded(state.mu).mean(), 0.1 + 0.9 * 0.9**100, rtol=0.03)


@functools.partial(jax.jit, static_argnums=1)
def student_losses(keys, moments):
    """Losses [seeds, 200] of small networks that learn what others compute."""
    optimizer = adam(0.01, moments=moments)
    apply = lambda params, x: jnp.tanh(x @ params[0]) @ params[1]  # noqa: E731

    def one(key):
        keys = jax.random.split(key, 5)
        network = lambda key: tuple(jax.random.normal(key, (2, 16, 16)) / 4)  # noqa: E731
        teacher, student = network(keys[0]), network(keys[1])

        def step(carry, key):
            params, state = carry
            x = jax.random.normal(key, (16, 16))
            error = lambda params: jnp.square(apply(params, x) - apply(teacher, x)).mean()  # noqa: E731
            loss, gradients = jax.value_and_grad(error)(params)
            return apply_gradients(optimizer, gradients, state, params)[:2], loss

        return jax.lax.scan(step, (student, optimizer.init(student)), jax.random.split(keys[2], 200))[1]

    return jax.vmap(one)(keys)


def test_a_tiny_model_trains_as_with_float32():
    """The last losses, a mean over 8 seeds and 20 steps, are within 3 % of those of float32 moments."""
    keys = jax.random.split(jax.random.key(3), 8)
    exact, *others = [np.asarray(student_losses(keys, moments)) for moments in ("float32", *FORMATS)]
    assert exact[:, -20:].mean() < 0.3 * exact[:, 0].mean()
    for found in others:
        np.testing.assert_allclose(found[:, -20:].mean(), exact[:, -20:].mean(), rtol=0.03)


def test_the_bytes_of_the_state_are_those_of_the_arithmetic():
    params = {"kernel": jnp.zeros((3, 64, 128)), "norm": jnp.zeros((3, 64)), "low_rank": jnp.zeros((64, 8))}
    large, small = 3 * 64 * 128 + 3 * 64, 64 * 8
    size = {"float32": 8, "bfloat16": 4}
    for moments in ("float32", *FORMATS):
        state = jax.eval_shape(scale_by_adam(0.9, 0.999, moments).init, params)
        found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.mu, state.nu)))
        rows = 3 * 64 + 3
        assert found == (2 * large + 8 * rows + 8 * small if moments == "int8" else size[moments] * (large + small))


def test_codes_and_scales_stand_under_the_name_of_their_parameter():
    state = scale_by_adam(0.9, 0.999, "int8").init({"trunk": {"kernel": jnp.zeros((2, 16))}})
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state.mu)]
    assert names == ["trunk/kernel/codes", "trunk/kernel/scales"]
    assert state.mu["trunk"]["kernel"].scales.shape == (2,)


@pytest.mark.parametrize("moments", FORMATS)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(moments):
    gradients = jax.random.normal(jax.random.key(0), (20, 3, 32))
    optimizer, run = updates_of(moments)
    start = optimizer.init(gradients[0])
    whole, expected = run(start, gradients)
    half, first = run(start, gradients[:10])
    again, second = run(half, gradients[10:])
    np.testing.assert_array_equal(jnp.concatenate([first, second]), expected)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_every_entry_and_every_step_has_a_noise_of_its_own():
    optimizer, run = updates_of("int8")
    gradients = jnp.full((1, 3, 32), 0.3).at[:, :, 0].set(1.0)
    start = optimizer.init(gradients[0])
    first, _ = run(start, gradients)
    second, _ = run(start._replace(count=start.count + 1), gradients)
    codes = np.asarray(first.mu.codes)[:, 1:]
    assert set(codes.ravel().tolist()) == {113, 114}  # 8 log2(0.3) = -13.9
    assert not np.array_equal(codes, np.asarray(second.mu.codes)[:, 1:])


def test_float32_moments_are_those_of_optax_and_wider_than_the_parameters():
    params = {"a": jnp.ones(3, jnp.bfloat16)}
    ours, theirs = scale_by_adam(0.9, 0.99), optax.scale_by_adam(0.9, 0.99)
    state = ours.init(params)
    assert state.mu["a"].dtype == state.nu["a"].dtype == jnp.float32
    gradients = {"a": jnp.array([1.0, -2.0, 0.5])}
    with jax.numpy_dtype_promotion("standard"):
        found, _ = ours.update(gradients, state)
        expected, _ = theirs.update(gradients, theirs.init(gradients))
    np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-6)
