"""Log-probabilities of whole sequences, in one block of positions and in several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import likelihood
from rlhf_jax.models import chunked_logprobs
from rlhf_jax.models.heads import unembed
from rlhf_jax.models.transformer import apply_trunk


@pytest.fixture(scope="module")
def batch():
    tokens = jax.random.randint(jax.random.key(5), (3, 8), 1, 12, jnp.int32)
    return tokens, jnp.arange(8)[None] < jnp.array([[8], [5], [6]])


def test_entry_t_belongs_to_token_t_plus_1(config, policy, batch):
    tokens, mask = batch
    found = jax.jit(likelihood.next_token_logprob, static_argnums=0)(config, policy, tokens, mask)
    assert found.shape == (3, 7)
    logprob = np.asarray(
        jax.nn.log_softmax(unembed(config, policy, apply_trunk(config, policy["trunk"], *batch).final))
    )
    for row in range(3):
        for t in range(7):
            np.testing.assert_allclose(found[row, t], logprob[row, t, tokens[row, t + 1]], rtol=1e-5)


def test_blocks_of_positions_change_neither_value_nor_gradient(config, policy, batch, monkeypatch):
    """Eight positions in one block, and in three of which the last is not full."""
    weights = jax.random.normal(jax.random.key(6), (3, 7))

    def value_and_gradient():
        def total(policy):
            logprob = likelihood.next_token_logprob(config, policy, *batch)
            return (weights * logprob).sum(), logprob

        return jax.jit(jax.value_and_grad(total, has_aux=True))(policy)

    expected = value_and_gradient()
    monkeypatch.setattr(chunked_logprobs, "LOGITS_AT_ONCE", 3 * 3 * config.vocab_size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), value_and_gradient(), expected)
