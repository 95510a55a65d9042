import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.sft import negative_log_likelihood, sft
from rlhf_jax.models.heads import unembed
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.types import Demonstrations

loss_of = jax.jit(lambda *given: negative_log_likelihood(*given)[0], static_argnums=0)


@pytest.fixture(scope="module")
def batch() -> Demonstrations:
    """Prompts of two tokens and responses of one to four, right-padded."""
    length = jnp.array([4, 1, 3, 2])
    place = jnp.arange(6)[None]
    tokens = jax.random.randint(jax.random.key(5), (4, 6), 1, 12, jnp.int32)
    mask = place < 2 + length[:, None]
    return Demonstrations(tokens=tokens, mask=mask, loss_mask=mask & (place >= 2))


def test_the_loss_is_the_mean_over_response_tokens(config, policy, batch):
    hidden = apply_trunk(config, policy["trunk"], batch.tokens, batch.mask).final
    logprob = np.asarray(jax.nn.log_softmax(unembed(config, policy, hidden), axis=-1))
    terms = [
        -logprob[row, t - 1, batch.tokens[row, t]] for row in range(4) for t in range(6) if batch.loss_mask[row, t]
    ]
    assert len(terms) == 10
    np.testing.assert_allclose(loss_of(config, policy, batch), np.mean(terms), rtol=1e-5)


def test_padding_does_not_matter(config, policy, batch):
    expected = loss_of(config, policy, batch)
    other = batch.replace(tokens=jnp.where(batch.mask, batch.tokens, 11))
    np.testing.assert_allclose(loss_of(config, policy, other), expected, rtol=1e-6)
    left = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (3, 0))), batch)
    np.testing.assert_allclose(loss_of(config, policy, left), expected, rtol=1e-5)


def test_the_order_of_rows_does_not_matter(config, policy, batch):
    other = jax.tree.map(lambda leaf: leaf[::-1], batch)
    np.testing.assert_allclose(loss_of(config, policy, other), loss_of(config, policy, batch), rtol=1e-6)


def test_the_gradient_of_a_uniform_policy_is_that_of_its_entropy_bound(config, policy, batch):
    """With an embedding of zeros every logit is 0: the loss is log V."""
    zero = {**policy, "trunk": {**policy["trunk"], "embed": jax.tree.map(jnp.zeros_like, policy["trunk"]["embed"])}}
    np.testing.assert_allclose(loss_of(config, zero, batch), np.log(12), rtol=1e-6)


def test_parts_of_a_batch_add_up_to_its_mean(config, policy, batch):
    rows = [jax.tree.map(lambda leaf: leaf[rows], batch) for rows in (slice(1), slice(1, 4))]  # noqa: B023
    expected = float(loss_of(config, policy, batch))
    parts = [float(loss_of(config, policy, part, batch)) for part in rows]
    assert sum(parts) == pytest.approx(expected, rel=1e-5)
    assert (
        abs(np.mean([loss_of(config, policy, part) for part in rows]) - expected) > 1e-2
    )  # the fault: a mean of means


def test_a_batch_without_response_tokens_has_loss_zero(config, policy, batch):
    nothing = batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask))
    assert float(loss_of(config, policy, nothing)) == 0.0


def test_a_packed_row_has_the_loss_and_the_gradient_of_its_sequences(config, policy, batch):
    """The four sequences, 6 + 3 + 5 + 4 tokens, in two rows of ten."""
    lengths, rows = [6, 3, 5, 4], [[0, 1], [2, 3]]

    def packed(leaf, fill):
        parts = [jnp.concatenate([leaf[i, : lengths[i]] for i in row]) for row in rows]
        return jnp.stack([jnp.pad(part, (0, 10 - len(part)), constant_values=fill) for part in parts])

    numbers = jnp.tile(jnp.array([[1], [2], [1], [2]], jnp.int32), (1, 6))
    together = Demonstrations(
        tokens=packed(batch.tokens, 7),
        mask=packed(batch.mask, False),
        loss_mask=packed(batch.loss_mask, False),
        segments=packed(numbers, 0),
    )
    differentiate = jax.jit(jax.value_and_grad(lambda params, batch: loss_of(config, params, batch)))
    found, expected = differentiate(policy, together), differentiate(policy, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
    careless = loss_of(config, policy, together.replace(segments=None))
    assert abs(float(careless) - float(expected[0])) > 1e-3


def test_an_update_is_a_step_down_the_gradient(config, policy, batch):
    algorithm = sft(config, optax.sgd(0.1))
    start = algorithm.init(jax.random.key(0), {"policy": policy})
    state, metrics = jax.jit(algorithm.update)(start, batch)
    value, gradient = jax.value_and_grad(lambda params: loss_of(config, params, batch))(policy)
    np.testing.assert_allclose(metrics["loss/policy"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    expected = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, policy, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected)
    assert int(state.step) == 1


def test_demonstrations_are_learned_by_heart(config, batch):
    """Four fixed responses, which the prompts determine: from log 12 to near 0."""
    algorithm = sft(config, adam(0.03))
    state = algorithm.init(jax.random.key(2))
    assert algorithm.rollout is None
    train = jax.jit(lambda state: jax.lax.scan(lambda s, _: algorithm.update(s, batch), state, length=300))
    state, metrics = train(state)
    assert float(metrics["loss/policy"][0]) > 1.5
    assert float(metrics["loss/policy"][-1]) < 0.2
