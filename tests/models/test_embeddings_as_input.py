"""The trunk on embeddings in place of token ids: the same numbers, no table needed, gradients to the embeddings."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import new_cache
from rlhf_jax.models.heads import init_policy
from rlhf_jax.models.transformer import apply_trunk

run = jax.jit(apply_trunk, static_argnums=0)
TOKENS = np.random.default_rng(0).integers(0, 19, size=(3, 10), dtype=np.int32)
MASK = np.arange(10)[None] >= np.array([0, 3, 7])[:, None]
GPT_2 = dict(norm="layer", positions="learned", feed_forward="plain", activation="gelu_tanh", query_key_value_bias=True)


def without_table(params):
    return {name: part for name, part in params["trunk"].items() if name != "embed"}


@pytest.mark.parametrize("options", [{}, GPT_2, dict(embedding_scale=4.0), dict(dtype="bfloat16")])
def test_rows_of_the_table_given_as_embeddings_give_the_same_states(config, options):
    config = dataclasses.replace(config, **options)
    params = jax.jit(init_policy, static_argnums=0)(config, jax.random.key(0))
    rows = params["trunk"]["embed"]["embedding"][TOKENS]
    expected = run(config, params["trunk"], jnp.asarray(TOKENS), jnp.asarray(MASK))
    found = run(config, without_table(params), rows, jnp.asarray(MASK))
    assert found.final.dtype == config.dtype
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(left, np.float32), np.asarray(right, np.float32))


def test_embeddings_follow_a_cache_and_may_be_packed(config, params):
    rows, trunk = params["trunk"]["embed"]["embedding"][TOKENS], without_table(params)
    mask = jnp.ones((3, 10), bool)
    full = run(config, trunk, rows, mask).final
    first = run(config, trunk, rows[:, :6], mask[:, :6])
    cache = new_cache(first.keys, first.values, mask[:, :6], slots=10)
    np.testing.assert_allclose(run(config, trunk, rows[:, 6:], mask[:, 6:], cache).final, full[:, 6:], atol=2e-5)
    segments = jnp.asarray(np.repeat([[0] * 6 + [1] * 4], 3, axis=0))
    packed = run(config, trunk, rows, mask, None, segments).final
    np.testing.assert_allclose(packed[:, :6], full[:, :6], atol=2e-5)
    np.testing.assert_allclose(packed[:, 6:], run(config, trunk, rows[:, 6:], mask[:, 6:]).final, atol=2e-5)


def test_no_gradient_flows_from_a_state_to_later_embeddings(config, params):
    rows = params["trunk"]["embed"]["embedding"][TOKENS[:1, :6]]
    direction = jax.random.normal(jax.random.key(1), (config.width,))

    @jax.jit
    def jacobian(rows):
        states = lambda rows: apply_trunk(config, params["trunk"], rows, jnp.ones((1, 6), bool)).final[0] @ direction  # noqa: E731
        return jax.jacrev(states)(rows)[:, 0]

    strength = np.abs(np.asarray(jacobian(rows))).max(axis=-1)
    assert (strength[np.triu_indices(6, 1)] == 0).all()
    assert (strength[np.tril_indices(6)] > 1e-6).all()


@pytest.mark.parametrize(
    "tokens", [jnp.zeros((1, 2, 16), jnp.int32), jnp.zeros((1, 2)), jnp.zeros((1, 2, 4, 4))], ids=lambda one: one.shape
)
def test_tokens_that_are_neither_ids_nor_embeddings_are_refused(config, params, tokens):
    with pytest.raises(ValueError, match=r"are neither whole numbers .* nor embeddings"):
        inspect.unwrap(apply_trunk)(config, params["trunk"], tokens, jnp.ones((1, 2), bool))


def test_embeddings_of_another_width_or_beyond_the_context_are_refused(config, params):
    with pytest.raises(ValueError, match="embeddings have 5 entries and the model's width is 16: project them"):
        apply_trunk(config, params["trunk"], jnp.zeros((1, 2, 5)), jnp.ones((1, 2), bool))
    with pytest.raises(ValueError, match="17 tokens does not fit the model's context of 16"):
        apply_trunk(config, params["trunk"], jnp.zeros((1, 17, 16)), jnp.ones((1, 17), bool))
