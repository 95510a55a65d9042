"""The kernel for TPUs, interpreted on a CPU, equals the reference; it compiles for TPUs; the rest is refused."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import attend, places_of, sees
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.splash_attention import splash_attend
from rlhf_jax.models.transformer import apply_trunk, init_trunk
from rlhf_jax.parallel.mesh import make_mesh, parse_mesh
from rlhf_jax.parallel.sharding import batch_sharding, infer

ROWS, TOKENS = 2, 140
MASK = np.ones((ROWS, TOKENS), bool)
MASK[0, :37], MASK[1, 130:] = False, False
SEGMENTS = np.where(MASK, 1 + (np.arange(TOKENS) > 70), 0).astype(np.int32)


@pytest.fixture(autouse=True)
def _lenient_promotion():
    """JAX's kernel mixes dtypes, and is traced again for its gradient."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def heads():
    draw = np.random.default_rng(0).normal
    shapes = [(ROWS, TOKENS, 2, 64), (ROWS, TOKENS, 1, 64), (ROWS, TOKENS, 1, 64), (ROWS, TOKENS, 2, 64)]
    return [jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("kind", "windows", "packed", "scale", "softcap"))
def values_and_gradients(kind, query, key, value, weigh, is_local, windows=(None,), packed=False, **scaling):
    places = places_of(jnp.asarray(MASK), segments=jnp.asarray(SEGMENTS) if packed else None)

    def loss(query, key, value):
        if kind == "reference":
            limits = [TOKENS if window is None else window for window in windows]
            limit = jnp.where(is_local, limits[-1], limits[0])
            out = attend(query, key, value, sees(places, places, limit), **scaling)
        else:
            out = splash_attend(query, key, value, places, windows, is_local, **scaling)
        out = jnp.where(MASK[:, :, None, None], out, 0.0)
        return (out * weigh).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return out, *gradients


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


def test_the_kernel_equals_the_reference_in_layers_of_both_kinds():
    options = dict(windows=(None, 20), packed=True, scale=0.2, softcap=1.5)
    for is_local in (jnp.asarray(False), jnp.asarray(True)):
        expected = values_and_gradients("reference", *heads(), is_local, **options)
        found = values_and_gradients("splash", *heads(), is_local, **options)
        jax.tree.map(assert_close, found, expected)


@pytest.mark.slow
def test_the_kernel_on_a_mesh_equals_the_reference():
    is_local = jnp.asarray(False)
    expected = values_and_gradients("reference", *heads(), is_local)
    with jax.set_mesh(make_mesh(parse_mesh("data=2"), jax.devices()[:2])):
        found = jax.block_until_ready(values_and_gradients("splash", *heads(), is_local))
    jax.tree.map(assert_close, found, expected)


def call(width=64):
    states = jnp.zeros((2, 8, 2, width))
    return splash_attend(states, states, states, places_of(jnp.ones((2, 8), bool)), (None,), jnp.asarray(False))


def test_rows_that_are_split_over_devices_are_refused():
    with (
        jax.set_mesh(make_mesh(parse_mesh("sequence=4"), jax.devices()[:4])),
        pytest.raises(ValueError, match="the mesh has sequence=4"),
    ):
        jax.eval_shape(call)


def test_heads_that_do_not_suit_the_kernel_are_refused():
    with pytest.raises(ValueError, match="multiple of 64, not 80"):
        jax.eval_shape(lambda: call(80))


@pytest.mark.slow
def test_a_train_step_with_the_kernel_compiles_for_tpus(monkeypatch):
    """Ahead of time for eight TPUs; needs `libtpu`, no TPU."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", os.environ.get("TPU_SKIP_MDS_QUERY", "1"))
    from jax.experimental import topologies

    shape = dict(width=256, layers=2, heads=4, key_value_heads=2, feed_forward_width=256, head_width=128)
    config = ModelConfig(
        vocab_size=256, context_length=512, **shape, attention="splash", remat="full", dtype="bfloat16"
    )
    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"), topologies.get_topology_desc("v5e:2x4", "tpu").devices)
    shapes = jax.eval_shape(lambda key: init_trunk(config, key), jax.random.key(0))
    where = infer(shapes, mesh, (config,))
    params = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, where)
    rows = [jax.ShapeDtypeStruct((8, 512), dtype, sharding=batch_sharding(mesh)) for dtype in (jnp.int32, jnp.bool_)]

    def step(params, tokens, mask):
        loss = lambda params: jnp.square(apply_trunk(config, params, tokens, mask).final.astype(jnp.float32)).mean()  # noqa: E731
        return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, jax.grad(loss)(params))

    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(params, *rows).compile()
    # The forward pass, the forward pass again, and the gradients of queries and of keys and values.
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 3
