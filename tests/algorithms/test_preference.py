"""Learning from pairs against a slow oracle, and what must and must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.preference import completion_logprobs, preference
from rlhf_jax.losses.preference_choices import preference_loss
from rlhf_jax.models.heads import init_policy, unembed
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.types import PreferenceBatch, Sequences

SMOOTHED = preference_loss("dpo", beta=0.3, label_smoothing=0.1)


def side(seed: int) -> Sequences:
    """Four prompts of two tokens, the same for every seed, and completions of one to four tokens."""
    prompts = jax.random.randint(jax.random.key(0), (4, 2), 5, 12, jnp.int32)
    completions = jax.random.randint(jax.random.key(seed), (4, 4), 5, 12, jnp.int32)
    length = jax.random.permutation(jax.random.key(seed), jnp.array([[4], [1], [3], [2]]))
    mask = jnp.concatenate([jnp.ones((4, 2), bool), jnp.arange(4)[None] < length], axis=1)
    tokens = jnp.where(mask, jnp.concatenate([prompts, completions], axis=1), 0)
    return Sequences(tokens=tokens, mask=mask, loss_mask=mask & (jnp.arange(6)[None] >= 2))


@pytest.fixture(scope="module")
def pairs() -> PreferenceBatch:
    return PreferenceBatch(chosen=side(1), rejected=side(2), margin=jnp.zeros(4))


@pytest.fixture(scope="module")
def reference(config):
    return jax.jit(init_policy, static_argnums=0)(config, jax.random.key(7))


@pytest.fixture(scope="module")
def plain(config):
    """Plain gradient descent with rate 0.1, and its jitted update."""
    algorithm = preference(config, SMOOTHED, optax.sgd(0.1))
    return algorithm, jax.jit(algorithm.update)


@pytest.fixture(scope="module")
def odds(config):
    """The same of ORPO, which has a likelihood of all chosen tokens and no reference."""
    algorithm = preference(config, preference_loss("orpo", beta=0.7), optax.sgd(0.1))
    return algorithm, jax.jit(algorithm.update)


def slow_logprob(config, policy, sequences):
    """Sums over the completion's tokens, by loops."""
    hidden = apply_trunk(config, policy["trunk"], sequences.tokens, sequences.mask).final
    logprob = np.asarray(jax.nn.log_softmax(unembed(config, policy, hidden), axis=-1), np.float64)
    marked, tokens = np.asarray(sequences.loss_mask), np.asarray(sequences.tokens)
    rows, length = marked.shape
    return np.array([
        sum(logprob[row, t - 1, tokens[row, t]] for t in range(length) if marked[row, t]) for row in range(rows)
    ])  # fmt: skip


def start(algorithm, policy, reference=None):
    given = {"policy": policy} if reference is None else {"policy": policy, "reference": reference}
    return algorithm.init(jax.random.key(0), given)


def test_metrics_are_those_worked_out_slowly(config, policy, reference, pairs, plain):
    chosen, rejected = (slow_logprob(config, policy, part) for part in (pairs.chosen, pairs.rejected))
    reference_chosen, reference_rejected = (
        slow_logprob(config, reference, part) for part in (pairs.chosen, pairs.rejected)
    )
    first, second = 0.3 * (chosen - reference_chosen), 0.3 * (rejected - reference_rejected)
    delta = first - second
    expected = {
        "loss/policy": np.mean(0.9 * np.logaddexp(0, -delta) + 0.1 * np.logaddexp(0, delta)),
        "rewards/chosen": first.mean(),
        "rewards/rejected": second.mean(),
        "rewards/accuracies": (delta > 0).mean(),
        "rewards/margins": delta.mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    algorithm, update = plain
    assert algorithm.rollout is None
    state, metrics = update(start(algorithm, policy, reference), pairs)
    assert set(metrics) == {*expected, "grad_norm"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert int(state.step) == 1
    held_out = SMOOTHED.rewards(completion_logprobs(config, policy, reference, pairs))
    np.testing.assert_allclose(held_out, [first, second], rtol=1e-4, atol=1e-5)


def test_an_update_is_a_step_down_the_gradient(config, policy, reference, pairs, plain):
    """grad = -beta mean[(sigma(-delta) - e) (grad log pi(w) - grad log pi(l))], a sum of one gradient a sequence."""
    algorithm, update = plain
    state, _ = update(start(algorithm, policy, reference), pairs)
    first, second = SMOOTHED.rewards(completion_logprobs(config, policy, reference, pairs))
    weight = -0.3 / 4 * (jax.nn.sigmoid(second - first) - 0.1)

    def logprobs(params):
        found = completion_logprobs(config, params, None, pairs)
        return jnp.stack([found.chosen, found.rejected])

    jacobian = jax.jit(jax.jacrev(logprobs))(policy)

    def step(leaf, slopes):
        return leaf - 0.1 * jnp.tensordot(weight, slopes[0] - slopes[1], axes=1)

    expected = jax.tree.map(step, policy, jacobian)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, expected)
    jax.tree.map(np.testing.assert_array_equal, state.reference, reference)


def test_at_the_start_the_policy_is_its_own_reference(policy, pairs, plain):
    algorithm, update = plain
    _, metrics = update(start(algorithm, policy), pairs)
    np.testing.assert_allclose(metrics["loss/policy"], np.log(2), rtol=1e-6)
    assert float(metrics["rewards/margins"]) == 0.0
    assert float(metrics["rewards/accuracies"]) == 0.5
    assert float(metrics["grad_norm"]) > 0.01


def test_padding_and_the_order_of_pairs_do_not_matter(policy, reference, pairs, plain):
    algorithm, update = plain
    begin = start(algorithm, policy, reference)
    expected, metrics = update(begin, pairs)
    junk = pairs.replace(chosen=pairs.chosen.replace(tokens=jnp.where(pairs.chosen.mask, pairs.chosen.tokens, 11)))
    left = pairs.replace(
        chosen=jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (3, 0))), pairs.chosen),
        rejected=jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (3, 0))), pairs.rejected),
    )
    turned = jax.tree.map(lambda leaf: leaf[::-1], pairs)
    for other in (junk, left, turned):
        state, found = update(begin, other)
        for name in metrics:
            np.testing.assert_allclose(found[name], metrics[name], rtol=1e-4, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.params, expected.params)


def test_rows_without_a_completion_only_fill_the_batch(policy, reference, pairs, plain):
    algorithm, update = plain
    begin = start(algorithm, policy, reference)
    emptied = jnp.arange(4)[:, None] == 2
    filled = pairs.replace(chosen=pairs.chosen.replace(loss_mask=pairs.chosen.loss_mask & ~emptied))
    rest = jax.tree.map(lambda leaf: leaf[np.array([0, 1, 3])], pairs)
    (found, metrics), (expected, expected_metrics) = update(begin, filled), update(begin, rest)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found.params, expected.params)


def test_pairs_are_learned(config, policy, pairs):
    algorithm = preference(config, preference_loss("dpo", beta=0.5), adam(0.02))
    begin = start(algorithm, jax.tree.map(jnp.copy, policy))  # donated below

    def train(state, pairs):
        return jax.lax.scan(lambda state, _: algorithm.update(state, pairs), state, length=60)

    _, metrics = jax.jit(train, donate_argnums=0)(begin, pairs)
    assert float(metrics["loss/policy"][-1]) < 0.1
    assert float(metrics["rewards/accuracies"][-1]) == 1.0
    np.testing.assert_allclose(
        metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"], rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(metrics["lr"], 0.02, rtol=1e-6)


def test_pairs_that_do_not_say_where_completions_begin_are_refused(policy, pairs, plain):
    algorithm, _ = plain
    unmarked = pairs.replace(rejected=pairs.rejected.replace(loss_mask=None))
    with pytest.raises(ValueError, match="do not say where completions begin; give chosen and rejected a loss_mask"):
        algorithm.update(start(algorithm, policy), unmarked)


def test_soft_labels_are_refused(policy, pairs, plain):
    algorithm, _ = plain
    state = algorithm.init(jax.random.key(0), {"policy": policy})
    with pytest.raises(ValueError, match="leave out the column 'label', which is for reward models"):
        algorithm.update(state, pairs.replace(label=jnp.ones(4)))


def test_a_loss_without_reference_keeps_none_and_takes_none(policy, reference, odds):
    algorithm, _ = odds
    assert start(algorithm, policy).reference is None
    with pytest.raises(ValueError, match="The loss needs no reference policy; leave out params"):
        start(algorithm, policy, reference)


@pytest.fixture(scope="module")
def filled(pairs) -> PreferenceBatch:
    """The pairs, of which the third one only fills the batch."""
    emptied = jnp.arange(4)[:, None] == 2
    return pairs.replace(rejected=pairs.rejected.replace(loss_mask=pairs.rejected.loss_mask & ~emptied))


def test_orpo_is_the_likelihood_of_all_chosen_tokens_and_the_odds_of_pairs(config, policy, filled, odds):
    algorithm, update = odds
    kept = np.array([0, 1, 3])
    chosen, rejected = (slow_logprob(config, policy, part)[kept] for part in (filled.chosen, filled.rejected))
    lengths = [np.asarray(part.loss_mask.sum(axis=1))[kept] for part in (filled.chosen, filled.rejected)]
    averages = [chosen / lengths[0], rejected / lengths[1]]
    first, second = (average - np.log(-np.expm1(average)) for average in averages)
    nll = -chosen.sum() / lengths[0].sum()
    expected = {
        "loss/nll": nll,
        "loss/policy": nll + 0.7 * np.logaddexp(0, second - first).mean(),
        "rewards/chosen": 0.7 * averages[0].mean(),
        "rewards/rejected": 0.7 * averages[1].mean(),
        "rewards/accuracies": (averages[0] > averages[1]).mean(),
        "odds/log_ratio": (first - second).mean(),
    }
    _, metrics = update(start(algorithm, policy), filled)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_microbatches_of_orpo_are_the_whole_batch(config, policy, filled, odds):
    """Though one of them has fewer tokens."""
    algorithm, update = odds
    parts = preference(config, preference_loss("orpo", beta=0.7), optax.sgd(0.1), accumulate=2)
    begin = start(algorithm, policy)
    (expected, metrics), (found, found_metrics) = update(begin, filled), jax.jit(parts.update)(begin, filled)
    for name, value in metrics.items():
        np.testing.assert_allclose(found_metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.params, expected.params)
