"""Online preferences: who draws which row, updates worked out from the gradients of whole responses, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.compose import ComposedState, compose
from rlhf_jax.algorithms.online_preference import LOSSES, ONLINE, PairLogprobs, online, online_preference
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.heads import init_policy, init_reward_model, response_logits
from rlhf_jax.rewards.bradley_terry import EnsembleParams, ensemble_scorer
from rlhf_jax.rewards.ensemble import uncertainty_weighted
from rlhf_jax.sampling.filters import SamplingConfig

# Four pairs: the policy's response wins, loses, ties, wins.
REWARDS = jnp.array([0.9, -1.6, 0.3, 2.5, -0.4, -0.4, 1.1, -2.2])
FIRST_WINS = np.array([True, False, False, True])
DECIDED = np.array([True, True, False, True])
BETA, RATE = 0.2, 0.1


def close(found, expected, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def reference(config):
    return jax.jit(init_policy, static_argnums=0)(config, jax.random.key(7))


@pytest.fixture(scope="module")
def four(prompts):
    return jax.tree.map(lambda leaf: leaf[:4], prompts)


@pytest.fixture(scope="module")
def start(config, sampling, policy, reference):
    """`start(name, **options) -> (algorithm, state)`, with a reference that is not the policy."""

    def begin(name, **options):
        options = {"beta": BETA} | options
        algorithm = online_preference(config, online(name, sampling, **options), optax.sgd(RATE))
        state = algorithm.init(jax.random.key(3), {"policy": policy, "reference": reference})
        return algorithm, state

    return begin


@pytest.fixture(scope="module")
def against_reference(start, four):
    """Online DPO of the policy against its reference: a jitted update, a state and a rollout."""
    algorithm, state = start("online_dpo", opponent="reference")
    return jax.jit(algorithm.update), *jax.jit(algorithm.rollout)(state, four)


@pytest.fixture(scope="module")
def against_mixture(start, four):
    """Nash-MD."""
    algorithm, state = start("nash_md")
    return jax.jit(algorithm.update), *jax.jit(algorithm.rollout)(state, four)


@pytest.fixture(scope="module")
def whole(config):
    """`whole(params, rollout, weights) -> (log pi of each response, gradient of their weighted sum)`, from logits."""

    def weighted(params, taken, weights):
        logprobs = jax.nn.log_softmax(response_logits(config, params, taken), axis=-1)
        by_token = jnp.take_along_axis(logprobs, taken.tokens[..., None], axis=-1)[..., 0]
        totals = jnp.where(taken.mask, by_token, 0.0).sum(axis=1)
        return (weights * totals).sum(), totals

    gradient = jax.jit(jax.grad(weighted, has_aux=True))

    def totals_and_slope(params, taken, weights):
        slope, totals = gradient(params, taken, jnp.asarray(weights, jnp.float32).reshape(-1))
        return np.asarray(totals, np.float64).reshape(-1, 2), slope

    return totals_and_slope


def moved_by(state, slope):
    return jax.tree.map(lambda leaf, by: leaf - RATE * by, state.params, slope)


def log_ratios(whole, state, taken):
    return tuple(whole(params, taken, np.zeros(8))[0] for params in (state.params, state.reference))


# Rollouts


def test_even_rows_are_the_policys_and_odd_rows_the_opponents(config, against_reference, against_mixture, four):
    """The log-probabilities of the tokens taken are those of whoever drew them."""
    logits_of = jax.jit(response_logits, static_argnums=0)
    for (_, state, taken), eta in ((against_reference, 1.0), (against_mixture, 0.5)):
        own, other = (logits_of(config, params, taken) for params in (state.params, state.reference))
        weight = jnp.tile(jnp.array([0.0, eta]), 4)[:, None, None]
        drawn_from = jax.nn.log_softmax((1.0 - weight) * own + weight * other, axis=-1)
        expected = jnp.take_along_axis(drawn_from, taken.tokens[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(taken.logprob, jnp.where(taken.mask, expected, 0.0), atol=1e-4)
        np.testing.assert_array_equal(taken.prompts.tokens, jnp.repeat(four.tokens, 2, axis=0))
        np.testing.assert_array_equal(taken.prompts.index, jnp.arange(8))
        assert (np.asarray(taken.tokens[::2]) != np.asarray(taken.tokens[1::2])).any(axis=1).sum() >= 2


# Updates


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_an_update_of_dpo_and_xpo_is_a_step_worked_out_by_hand(start, whole, against_reference, alpha):
    """Of the three decided pairs: -beta sigma(-beta h) on the winner, the opposite on the loser; alpha on odd rows."""
    update, state, taken = against_reference
    if alpha is not None:
        update = jax.jit(start("xpo", alpha=alpha)[0].update)
    own, by_reference = log_ratios(whole, state, taken)
    ratio = own - by_reference
    sign = np.where(FIRST_WINS, 1.0, -1.0)
    gap = BETA * sign * (ratio[:, 0] - ratio[:, 1])
    weights = (DECIDED * -BETA * sign * sigmoid(-gap))[:, None] * np.array([1.0, -1.0])
    weights[:, 1] += DECIDED * (alpha or 0.0)
    _, slope = whole(state.params, taken, weights / 3)
    found, metrics = update(state, taken, REWARDS)
    close(found.params, moved_by(state, slope), rtol=2e-4, atol=2e-6)
    losses = -np.log(sigmoid(gap)) + (alpha or 0.0) * own[:, 1]
    chosen = BETA * np.where(FIRST_WINS, ratio[:, 0], ratio[:, 1])[DECIDED]
    expected = {
        "loss/policy": losses[DECIDED].mean(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": (chosen - gap[DECIDED]).mean(),
        "rewards/margins": gap[DECIDED].mean(),
        "rewards/accuracies": (gap[DECIDED] > 0).mean(),
        "objective/equal_groups": 0.25,
        "objective/win_rate": 2.5 / 4,
        "objective/scores": (0.9 + 0.3 - 0.4 + 1.1) / 4,
        "objective/kl": ratio[:, 0].mean(),
        "kl_coefficient": BETA,
    }
    assert "loss" not in metrics
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_an_update_of_nash_md_is_a_step_worked_out_by_hand(whole, against_mixture):
    """-A on the policy's own rows, with A = sigma(r - r') - 1/2 - beta log(pi / ref): the tied pair counts, too."""
    update, state, taken = against_mixture
    own, by_reference = log_ratios(whole, state, taken)
    scores = np.asarray(REWARDS, np.float64).reshape(4, 2)
    advantages = sigmoid(scores[:, 0] - scores[:, 1]) - 0.5 - BETA * (own - by_reference)[:, 0]
    _, slope = whole(state.params, taken, np.stack([-advantages, np.zeros(4)], axis=1) / 4)
    found, metrics = update(state, taken, REWARDS)
    close(found.params, moved_by(state, slope), rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(metrics["loss/policy"], -(advantages * own[:, 0]).mean(), rtol=1e-3)


def test_the_first_step_sees_the_policy_that_drew_its_own_rows(against_reference, against_mixture):
    """The opponents' rows have other log-probabilities and are left out of the ratio."""
    for update, state, taken in (against_reference, against_mixture):
        _, metrics = update(state, taken, REWARDS)
        assert abs(float(metrics["val/first_ratio"]) - 1.0) < 1e-4
        assert float(metrics["policy/max_logprob_gap"]) < 1e-4
        assert set(metrics) >= {"policy/entropy", "completions/mean_length", "objective/entropy", "grad_norm"}


def test_xpo_without_optimism_in_two_microbatches_is_online_dpo(start, against_reference):
    """The pairs that are decided are two in one microbatch and one in the other."""
    update, state, taken = against_reference
    expected, expected_metrics = update(state, taken, REWARDS)
    algorithm, _ = start("xpo", alpha=0.0, accumulate=2)
    found, metrics = jax.jit(algorithm.update)(state, taken, REWARDS)
    close(found.params, expected.params)
    close(metrics, expected_metrics)


def test_pairs_stay_together_in_minibatches(start, against_reference):
    """Where one pair of four is decided, the minibatch that holds it makes the step and the others make none."""
    update, state, taken = against_reference
    rewards = jnp.array([1.0, 1.0, 0.5, 0.7, -2.0, -2.0, 0.0, 0.0])
    expected, _ = update(state, taken, rewards)
    algorithm, _ = start("online_dpo", opponent="reference", minibatches=4)
    found, _ = jax.jit(algorithm.update)(state, taken, rewards)
    close(found.params, expected.params)
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, found.params, state.params))) > 1e-4


def test_ties_nan_and_empty_responses_weigh_nothing(against_reference):
    update, state, taken = against_reference
    found, metrics = update(state, taken, jnp.repeat(jnp.array([0.1, -3.3, 7.0, 0.0]), 2))
    close(found.params, state.params, rtol=0.0, atol=0.0)
    assert float(metrics["objective/equal_groups"]) == 1.0 and float(metrics["rewards/margins"]) == 0.0
    expected, _ = update(state, taken, REWARDS.at[0].set(REWARDS[1]))
    nan, metrics = update(state, taken, REWARDS.at[0].set(jnp.nan))
    close(nan.params, expected.params)
    assert np.isnan(metrics["objective/scores"])
    empty, _ = update(state, taken.replace(mask=taken.mask.at[1].set(False)), REWARDS)
    close(empty.params, expected.params)


def test_only_the_order_of_rewards_and_real_tokens_matter(against_reference):
    update, state, taken = against_reference
    expected, _ = update(state, taken, REWARDS)
    close(update(state, taken, 3.0 * REWARDS + 1.0)[0].params, expected.params)
    junk = taken.replace(tokens=jnp.where(taken.mask, taken.tokens, 11))
    close(update(state, junk, REWARDS)[0].params, expected.params)
    order = jnp.array([5, 4, 7, 6, 2, 3, 0, 1])  # pairs in another order; two of them the other way round
    close(update(state, jax.tree.map(lambda leaf: leaf[order], taken), REWARDS[order])[0].params, expected.params)


def test_an_adapter_learns_from_an_uncertainty_weighted_ensemble_in_one_program(config, policy, prompts):
    """Against itself, over shuffled minibatches: the whole step is compiled and never calls the host."""
    options = online("online_ipo", SamplingConfig(max_new_tokens=3, stop_tokens=(3,)), epochs=2, minibatches=2)
    adapter = AdapterConfig(kind="lora", targets=("query", "value"), rank=2)
    algorithm = online_preference(config, options, optax.sgd(0.1), adapter)
    members = jax.jit(jax.vmap(lambda key: init_reward_model(config, key)))(jax.random.split(jax.random.key(1), 3))
    rewards = EnsembleParams(members=members, offset=jnp.zeros(3))
    rule = uncertainty_weighted()
    start = jax.jit(algorithm.init)(jax.random.key(2), {"policy": policy})
    state = ComposedState(algorithm=start, transform=rule.init(0.5))
    step = jax.jit(compose(algorithm, ensemble_scorer(config, lead=0), rule)).lower(state, prompts, rewards).compile()
    assert not any(word in step.as_text().lower() for word in ("callback", "infeed", "outfeed"))
    state, output = step(state, prompts, rewards)
    assert output.rewards.shape == (16,) and int(state.algorithm.step) == 1
    assert all(np.isfinite(value).all() for value in output.metrics.values())
    assert "uncertainty/mean" in output.metrics and float(output.metrics["policy/max_logprob_gap"]) < 1e-4
    close(state.algorithm.reference, policy, rtol=0.0, atol=0.0)
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, state.algorithm.params, start.params))) > 1e-4


# The table of losses


@pytest.mark.parametrize(("double", "rtol"), [(True, 1e-6), (False, 1e-4)])
def test_reference_values(golden_losses, double, rtol):
    """Rows 2 i and 2 i + 1 are pairs; the first wins, or wins with the probability given."""
    preference = np.array([0.9, 0.2, 0.6, 0.5])
    with jax.enable_x64(double):
        inputs = {name: jnp.asarray(golden_losses["inputs"][name]) for name in ("logp", "ref", "mask")}
        own, reference = ((inputs[name] * inputs["mask"]).sum(axis=1).reshape(4, 2) for name in ("logp", "ref"))

        def mean(loss, margins, beta, alpha):
            lengths = jnp.ones(own.shape, jnp.int32)
            pairs = PairLogprobs(
                logprob=own, reference_logprob=reference, lengths=lengths, margins=jnp.asarray(margins)
            )
            return LOSSES[loss](pairs, beta, alpha).mean()

        for path, *arguments in (
            ("dpo_.1", "dpo", np.ones(4), 0.1, 0.0),
            ("ipo_tau.1_sum", "ipo", np.ones(4), 0.1, 0.0),
            ("slic_hinge_.1", "hinge", np.ones(4), 0.1, 0.0),
            ("xpo_.1_a.001_refside_losers", "xpo", np.ones(4), 0.1, 0.001),
            ("nash_md_pg_b.125_seqKL", "nash_md", np.log(preference / (1 - preference)), 0.125, 0.0),
        ):
            np.testing.assert_allclose(mean(*arguments), golden_losses[path], rtol=rtol, err_msg=path)


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("nash", {}, "no method 'nash': choose one of online_dpo, online_ipo, xpo, nash_md"),
        ("online_dpo", {"loss": "dpp"}, "loss is 'dpp': choose one of dpo, robust, ipo, hinge, chi_po, xpo, nash_md"),
        ("online_dpo", {"opponent": "judge"}, "opponent is 'judge': choose one of policy, reference, mixture"),
        ("online_dpo", {"beta": 0.0}, "beta is 0.0; it must be positive"),
        ("nash_md", {"beta": -0.1}, "beta is -0.1; it must be positive"),
        ("nash_md", {"eta": 1.5}, "eta is 1.5; give the second policy a weight from 0 to 1"),
        ("nash_md", {"eta": -0.5}, "eta is -0.5"),
        ("nash_md", {"eta": None}, "the opponent is 'mixture' and eta None"),
        ("online_dpo", {"eta": 0.5}, "the opponent is 'policy' and eta 0.5"),
        ("nash_md", {"epochs": 2}, "nash_md corrects nothing"),
        ("xpo", {"alpha": -1.0}, "alpha is -1.0"),
        ("online_dpo", {"alpha": 0.1}, "give xpo 0 or more, the others 0"),
        ("xpo", {"opponent": "policy"}, "the opponent is 'policy'"),
        ("online_dpo", {"minibatches": 0}, "at least 1 epoch"),
    ],
)
def test_bad_options_are_refused(sampling, name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        online(name, sampling, **options)


def test_every_method_of_the_table_is_made(sampling):
    for name in ONLINE:
        assert online(name, sampling, beta=0.5).beta == 0.5
    with pytest.raises(ValueError, match="samples from the policy itself"):
        online("xpo", dataclasses.replace(sampling, top_k=3))
