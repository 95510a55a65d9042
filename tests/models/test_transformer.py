"""What must hold of the trunk whatever its weights: causality, padding, the cache, rematerialisation, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.models.attention import new_cache, write
from rlhf_jax.models.heads import init_policy, unembed
from rlhf_jax.models.transformer import apply_trunk, init_trunk, logical_axes

run = jax.jit(apply_trunk, static_argnums=0)
init = jax.jit(init_policy, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, mask):
    return unembed(config, params, apply_trunk(config, params["trunk"], tokens, mask).final)


def padded(rows, left: int, right: int):
    """Token rows of one length between padding of token 19: (tokens, mask)."""
    tokens = jnp.pad(jnp.asarray(rows), ((0, 0), (left, right)), constant_values=19)
    mask = jnp.pad(jnp.ones(jnp.shape(rows), bool), ((0, 0), (left, right)))
    return tokens, mask


@pytest.fixture
def rows():
    return np.random.default_rng(0).integers(0, 19, size=(3, 7), dtype=np.int32)


@pytest.mark.parametrize(("left", "right"), [(4, 0), (0, 4), (9, 0), (2, 3)])
def test_padding_on_either_side_changes_no_logit(config, params, rows, left, right):
    bare = logits_of(config, params, *padded(rows, 0, 0))
    found = logits_of(config, params, *padded(rows, left, right))[:, left : left + 7]
    assert float(jnp.abs(bare).max()) > 0.5
    np.testing.assert_allclose(found, bare, atol=2e-5)


def test_rows_do_not_hear_each_other(config, params, rows):
    together = logits_of(config, params, *padded(rows, 0, 0))
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(logits_of(config, params, *padded(rows[order], 0, 0)), together[order], atol=2e-5)
    np.testing.assert_allclose(logits_of(config, params, *padded(rows[1:2], 0, 0)), together[1:2], atol=2e-5)


def test_what_stands_at_padding_does_not_matter(config, params, rows):
    tokens, mask = padded(rows, 3, 2)
    other = jnp.where(mask, tokens, 5)
    real = np.asarray(mask)
    np.testing.assert_array_equal(
        np.asarray(logits_of(config, params, tokens, mask))[real],
        np.asarray(logits_of(config, params, other, mask))[real],
    )


def gradient_to_embeddings(config, params, tokens, mask):
    """How strongly the hidden state at each position depends on the embedding of each token: [position, token]."""
    direction = jax.random.normal(jax.random.key(1), (config.width,))

    def states(embedding):
        trunk = {**params["trunk"], "embed": {"embedding": embedding}}
        return apply_trunk(config, trunk, tokens[None], mask[None]).final[0] @ direction

    jacobian = jax.jit(jax.jacrev(states))(params["trunk"]["embed"]["embedding"])
    return np.abs(np.asarray(jacobian)).max(axis=-1)


def test_no_gradient_flows_from_a_state_to_later_tokens(config, params):
    tokens = jnp.arange(8, dtype=jnp.int32)
    strength = gradient_to_embeddings(config, params, tokens, jnp.ones(8, bool))[:, :8]
    assert (strength[np.triu_indices(8, 1)] == 0).all()
    assert (strength[np.tril_indices(8)] > 1e-6).all()


def test_no_gradient_flows_from_real_tokens_to_padding(config, params):
    tokens = jnp.array([19, 19, 0, 1, 2, 18], jnp.int32)
    mask = jnp.array([False, False, True, True, True, False])
    strength = gradient_to_embeddings(config, params, tokens, mask)[2:5]
    assert (strength[:, [18, 19]] == 0).all()
    assert (strength[2, :3] > 1e-6).all()


@pytest.mark.parametrize(("key_value_heads", "chunks"), [(2, (1, 1, 1, 1)), (1, (2, 2)), (4, (1, 3))])
def test_cached_decoding_equals_the_full_forward(config, rows, key, key_value_heads, chunks):
    """Left-padded prompts of 12 slots, then 4 tokens in chunks; the cache fills the model's whole context."""
    config = dataclasses.replace(config, key_value_heads=key_value_heads)
    params = init(config, key)
    prompt = 12
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 19, size=(3, 16), dtype=np.int32))
    mask = jnp.arange(16)[None] >= jnp.array([0, 5, 11])[:, None]
    full = run(config, params["trunk"], tokens, mask)

    hidden = run(config, params["trunk"], tokens[:, :prompt], mask[:, :prompt])
    cache = new_cache(hidden.keys, hidden.values, mask[:, :prompt], slots=config.context_length)
    states, start = [hidden.final], prompt
    for size in chunks:
        piece = slice(start, start + size)
        hidden = run(config, params["trunk"], tokens[:, piece], mask[:, piece], cache)
        cache = write(cache, hidden.keys, hidden.values, mask[:, piece])
        states.append(hidden.final)
        start += size
    real = np.asarray(mask)
    np.testing.assert_allclose(np.concatenate(states, axis=1)[real], np.asarray(full.final)[real], atol=2e-5)
    np.testing.assert_allclose(np.asarray(cache.keys)[:, real], np.asarray(full.keys)[:, real], atol=2e-5)


def test_rematerialisation_changes_no_gradient(config, params, rows):
    tokens, mask = padded(rows, 2, 0)

    def gradient(remat):
        chosen = dataclasses.replace(config, remat=remat)
        return jax.jit(jax.grad(lambda params: jnp.square(logits_of(chosen, params, tokens, mask)).mean()))(params)

    plain = gradient("none")
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(plain))
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, gradient(remat))


def test_rematerialisation_keeps_less_for_the_backward_pass(config, params, rows):
    tokens, mask = padded(rows, 0, 0)

    def kept(remat):
        chosen = dataclasses.replace(config, remat=remat)
        states = lambda trunk: apply_trunk(chosen, trunk, tokens, mask).final  # noqa: E731
        backward = jax.eval_shape(lambda trunk: jax.vjp(states, trunk)[1], params["trunk"])
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept("none") > kept("dots") > kept("full")


def test_bfloat16_computation_is_close_and_its_logits_are_float32(config, params, rows):
    half = dataclasses.replace(config, dtype="bfloat16")
    tokens, mask = padded(rows, 2, 0)
    assert run(half, params["trunk"], tokens, mask).final.dtype == jnp.bfloat16
    exact, rough = (logits_of(c, params, tokens, mask)[:, 2:] for c in (config, half))
    assert rough.dtype == jnp.float32
    # bfloat16 has 8 bits: 2^-8 = 0.4 % a rounding, some dozens of roundings in two layers.
    assert float(jnp.sqrt(jnp.square(exact - rough).mean() / jnp.square(exact).mean())) < 0.03


def test_bfloat16_parameters_are_stored_as_such(config, key):
    half = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16", tied_embeddings=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(init(half, key))} == {jnp.dtype("bfloat16")}


def test_float64_stays_float64_and_agrees_with_float32(config, params, rows):
    single = logits_of(config, params, *padded(rows, 1, 0))[:, 1:]
    with jax.enable_x64(True):
        double = dataclasses.replace(config, dtype="float64", param_dtype="float64")
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        found = logits_of(double, wide, *padded(rows, 1, 0))[:, 1:]
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(single, found, atol=2e-5)


def test_jit_changes_nothing(config, params, rows):
    tokens, mask = padded(rows, 1, 0)
    eager = apply_trunk(config, params["trunk"], tokens, mask)
    for a, b in zip(eager, run(config, params["trunk"], tokens, mask), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_initial_norms_are_one_and_layers_differ(config, key):
    trunk = init_trunk(config, key)
    assert (trunk["final_norm"]["scale"] == 1).all()
    kernel = trunk["layers"]["query"]["kernel"]
    assert kernel.shape == (2, 16, 16)
    assert not jnp.array_equal(kernel[0], kernel[1])
    assert abs(float(kernel.std()) / config.initializer_range - 1) < 0.2


def test_logical_axes_name_every_axis_of_every_parameter(config, key):
    trunk, axes = init_trunk(config, key), logical_axes(config)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    assert jax.tree.structure(trunk) == jax.tree.structure(axes, is_leaf=is_spec)
    sizes = {"vocabulary": 20, "width": 16, "feed_forward": 24, "layers": 2}
    for leaf, names in zip(jax.tree.leaves(trunk), jax.tree.leaves(axes, is_leaf=is_spec), strict=True):
        assert len(names) == leaf.ndim
        for size, name in zip(leaf.shape, names, strict=True):
            assert size == sizes[name] if name != "heads" else size in (16, 8)
    assert axes["layers"]["query"]["kernel"] == PartitionSpec("layers", "width", "heads")


def test_an_ensemble_is_a_vmap(config, rows):
    tokens, mask = padded(rows, 1, 0)
    keys = jax.random.split(jax.random.key(3), 3)
    members = jax.jit(jax.vmap(lambda key: init_policy(config, key)))(keys)
    together = jax.jit(jax.vmap(lambda params: logits_of(config, params, tokens, mask)))(members)
    for member, key in enumerate(keys):
        alone = logits_of(config, init(config, key), tokens, mask)
        np.testing.assert_allclose(together[member][:, 1:], alone[:, 1:], atol=2e-5)


def test_a_sequence_beyond_the_context_is_refused(config, params):
    tokens, mask = jnp.zeros((1, 17), jnp.int32), jnp.ones((1, 17), bool)
    with pytest.raises(ValueError, match="17 tokens does not fit the model's context of 16"):
        apply_trunk(config, params["trunk"], tokens, mask)


def test_a_cache_beyond_the_context_is_refused(config, params):
    hidden = run(config, params["trunk"], jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))
    cache = new_cache(hidden.keys, hidden.values, jnp.ones((1, 4), bool), slots=17)
    with pytest.raises(ValueError, match="context of 16"):
        apply_trunk(config, params["trunk"], jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool), cache)
