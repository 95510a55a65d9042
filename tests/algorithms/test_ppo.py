"""One PPO step against a slow oracle, and what must and must not change it."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.losses.kl import adaptive_kl, fixed_kl
from rlhf_jax.models import chunked_logprobs
from rlhf_jax.models.heads import apply_head, init_policy, response_logits
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.training import checkpoints
from rlhf_jax.types import Prompts

REWARDS = jnp.array([0.9, -1.6, 0.3, 2.5, -0.4, 0.0, 1.1, -2.2])
HOST_TRAFFIC = ("callback", "infeed", "outfeed")


def close(found, expected, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, raw(found), raw(expected))


def raw(tree):
    """Typed keys as the integers they hold."""
    typed = jax.dtypes.prng_key
    return jax.tree.map(lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, typed) else x, tree)


class Case:
    """An algorithm with its jitted update, a state that is not fresh, and one rollout of it."""

    def __init__(self, config, given, taken, options, optimizer=None, kl=None):
        self.config, self.options, self.taken = config, options, taken
        self.algorithm = ppo(config, options, optimizer or optax.sgd(0.1), kl or fixed_kl(0.0))
        state = self.algorithm.init(jax.random.key(3), given)
        head = {"kernel": 0.1 * jnp.arange(1.0, config.width + 1), "bias": jnp.float32(0.2)}
        params = {**state.params, "value": {**state.params["value"], "head": head}}
        self.update = jax.jit(self.algorithm.update)
        self.state = state.replace(params=params, step=jnp.int32(1))


@pytest.fixture(scope="module")
def reference(config):
    return jax.jit(init_policy, static_argnums=0)(config, jax.random.key(7))


@pytest.fixture(scope="module")
def compiled():
    """Cases by their options and rollouts by how they were drawn, so that each is compiled once."""
    return {}


@pytest.fixture
def make(config, policy, reference, prompts, sampling, compiled):
    def build(optimizer=None, coefficient=0.0, kl=None, **options):
        given = PPOConfig(**({"sampling": sampling, "epochs": 1, "minibatches": 1} | options))
        params = {"policy": policy, "reference": reference}
        if given.sampling not in compiled:
            algorithm = ppo(config, PPOConfig(sampling=given.sampling), optax.sgd(0.1))
            start = algorithm.init(jax.random.key(3), params)
            compiled[given.sampling] = jax.jit(algorithm.rollout)(start, prompts)[1]
        if optimizer or kl:
            case = Case(config, params, compiled[given.sampling], given, optimizer, kl)
        else:
            if given not in compiled:
                compiled[given] = Case(config, params, compiled[given.sampling], given)
            case = copy.copy(compiled[given])
        if kl is None:
            case.state = case.state.replace(kl_coefficient=jnp.float32(coefficient))
        return case

    return build


# The update, by hand.


def values_of(config, params, taken, shared):
    trunk = params["policy"]["trunk"] if shared else params["value"]["trunk"]
    sequences = taken.sequences
    hidden = apply_trunk(config, trunk, sequences.tokens, sequences.mask).final
    return apply_head(params["value"]["head"], hidden)[:, taken.prompts.tokens.shape[1] - 1 : -1]


def log_softmax_of_taken(logits, tokens):
    logits = logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    return (logits * jax.nn.one_hot(tokens, logits.shape[-1], dtype=logits.dtype)).sum(axis=-1)


def slow_advantages(rewards, values, mask, discount, lam):
    advantages, returns = np.zeros_like(values), np.zeros_like(values)
    for row in range(len(mask)):
        ahead, value_ahead = 0.0, 0.0
        for t in reversed(range(int(mask[row].sum()))):
            delta = rewards[row, t] + discount * value_ahead - values[row, t]
            ahead = delta + discount * lam * ahead
            value_ahead = values[row, t]
            advantages[row, t], returns[row, t] = ahead, ahead + values[row, t]
    return advantages, returns


def oracle(case, taken, scores, coefficient, rate):
    """Parameters after `epochs` plain gradient steps on the whole rollout."""
    options, config, state = case.options, case.config, case.state
    shared, tau = options.value_net == "shared", options.sampling.temperature
    mask, old = np.asarray(taken.mask), np.asarray(taken.logprob, np.float64)
    values = np.asarray(values_of(config, state.params, taken, shared), np.float64)
    reference = log_softmax_of_taken(response_logits(config, state.reference, taken) / tau, taken.tokens)
    in_reward, in_loss = (coefficient, 0.0) if options.kl_in == "reward" else (0.0, coefficient)
    rewards = -in_reward * (old - np.asarray(reference, np.float64))
    for row in range(len(mask)):
        last = int(mask[row].sum()) - 1
        rewards[row, last] += float(scores[row]) - options.missing_eos_penalty * (not bool(taken.finished[row]))
    advantages, returns = slow_advantages(rewards, values, mask, options.discount, options.gae_lambda)
    if options.whiten_advantages:
        real = advantages[mask]
        advantages = (advantages - real.mean()) / np.sqrt(real.var() + 1e-8)
    advantages, returns, old, values = (jnp.asarray(x, jnp.float32) for x in (advantages, returns, old, values))

    def average(array):
        return jnp.where(mask, array, 0.0).sum() / float(mask.sum())

    def loss(params):
        logits = response_logits(config, params["policy"], taken) / tau
        now = log_softmax_of_taken(logits, taken.tokens)
        ratio = jnp.exp(now - old)
        gain = jnp.minimum(
            ratio * advantages, jnp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high) * advantages
        )
        if options.dual_clip is not None:
            gain = jnp.where(advantages < 0, jnp.maximum(gain, options.dual_clip * advantages), gain)
        value = values_of(config, params, taken, shared)
        near = jnp.clip(value, values - options.value_clip, values + options.value_clip)
        error = 0.5 * jnp.maximum(jnp.square(value - returns), jnp.square(near - returns))
        probability = jax.nn.softmax(logits, axis=-1)
        uncertain = -(probability * jnp.log(probability)).sum(axis=-1)
        return (
            -average(gain)
            + options.value_coefficient * average(error)
            - options.entropy_coefficient * average(uncertain)
            + in_loss * average(jnp.square(now - reference) / 2)
        )

    params, gradient = state.params, jax.jit(jax.grad(loss))
    for _ in range(options.epochs):
        params = jax.tree.map(lambda leaf, slope: leaf - rate * slope, params, gradient(params))
    return params


@pytest.mark.parametrize("value_net", ["separate", "shared"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epochs": 3, "entropy_coefficient": 0.1, "missing_eos_penalty": 0.7, "discount": 0.9, "gae_lambda": 0.6},
        {"whiten_advantages": False, "clip_low": 0.05, "clip_high": 0.4, "value_clip": 0.01, "epochs": 2}
        | {"dual_clip": 1.1, "kl_in": "loss", "kl_estimate": "k2"},
    ],
)
def test_an_update_is_the_one_worked_out_slowly(make, sampling, options, value_net):
    warm = dataclasses.replace(sampling, temperature=1.3)
    case = make(optax.sgd(0.2), coefficient=0.3, value_net=value_net, **({"sampling": warm} | options))
    noise = 0.3 * jax.random.normal(jax.random.key(9), case.taken.logprob.shape)  # ratios that are far from 1
    taken = case.taken.replace(logprob=jnp.where(case.taken.mask, case.taken.logprob + noise, 0.0))
    state, metrics = case.update(case.state, taken, REWARDS)
    assert float(metrics["policy/clipfrac"]) > 0
    close(state.params, oracle(case, taken, REWARDS, 0.3, 0.2), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_first_minibatch_sees_the_policy_that_sampled(make, sampling, temperature):
    case = make(sampling=dataclasses.replace(sampling, temperature=temperature), minibatches=2, epochs=2)
    _, metrics = case.update(case.state, case.taken, REWARDS)
    gap, ratio = float(metrics["policy/max_logprob_gap"]), float(metrics["val/first_ratio"])
    print(f"temperature {temperature}: largest log-prob gap {gap:.2e}, first ratio - 1 = {ratio - 1:.2e}")
    assert gap < 1e-4
    assert abs(ratio - 1.0) < 1e-4


# Padding, order, empty responses.


def test_the_amount_of_prompt_padding_does_not_matter(make, prompts):
    case = make(coefficient=0.1)
    extra = jnp.full((8, 3), 7, jnp.int32)
    wider = Prompts(
        tokens=jnp.concatenate([extra, prompts.tokens], axis=1),
        mask=jnp.concatenate([jnp.zeros((8, 3), bool), prompts.mask], axis=1),
        index=prompts.index,
    )
    before = case.state.replace(step=jnp.int32(0))
    _, taken = jax.jit(case.algorithm.rollout)(before, wider)
    np.testing.assert_array_equal(taken.tokens, case.taken.tokens)
    close(case.update(case.state, taken, REWARDS)[0].params, case.update(case.state, case.taken, REWARDS)[0].params)


def test_padding_behind_the_response_does_not_matter(make):
    case, taken = make(coefficient=0.1), None
    junk = jnp.where(case.taken.mask, case.taken.tokens, 11)
    taken = case.taken.replace(
        tokens=jnp.pad(junk, ((0, 0), (0, 2)), constant_values=9),
        mask=jnp.pad(case.taken.mask, ((0, 0), (0, 2))),
        logprob=jnp.pad(jnp.where(case.taken.mask, case.taken.logprob, -5.0), ((0, 0), (0, 2))),
        sampling_logprob=jnp.pad(case.taken.sampling_logprob, ((0, 0), (0, 2))),
    )
    assert not bool(case.taken.mask.all())
    found, metrics = case.update(case.state, taken, REWARDS)
    expected, expected_metrics = case.update(case.state, case.taken, REWARDS)
    close(found.params, expected.params)
    close(metrics, expected_metrics, atol=1e-5)


def test_blocks_of_positions_do_not_matter(make, monkeypatch):
    """Six tokens in one block, and in two of which the last is not full."""
    case = make(coefficient=0.3, entropy_coefficient=0.1)
    expected, metrics = case.update(case.state, case.taken, REWARDS)
    monkeypatch.setattr(chunked_logprobs, "LOGITS_AT_ONCE", 4 * 8 * case.config.vocab_size)
    found, found_metrics = jax.jit(lambda *args: case.algorithm.update(*args))(case.state, case.taken, REWARDS)
    close(found_metrics, metrics, atol=1e-5)
    close(found.params, expected.params, atol=1e-5)


def test_the_order_of_responses_does_not_matter(make):
    case, order = make(coefficient=0.1), jnp.array([3, 1, 7, 0, 2, 6, 5, 4])
    shuffled = jax.tree.map(lambda leaf: leaf[order], case.taken)
    found, _ = case.update(case.state, shuffled, REWARDS[order])
    close(found.params, case.update(case.state, case.taken, REWARDS)[0].params)


def test_empty_responses_have_weight_zero(make):
    case = make(coefficient=0.1, missing_eos_penalty=0.5, entropy_coefficient=0.1)
    empty = jnp.array([2, 5])
    taken = case.taken.replace(
        mask=case.taken.mask.at[empty].set(False), finished=case.taken.finished.at[empty].set(False)
    )
    rest = np.setdiff1d(np.arange(8), empty)
    without = jax.tree.map(lambda leaf: leaf[rest], taken)
    found, metrics = case.update(case.state, taken, REWARDS)
    expected, expected_metrics = case.update(case.state, without, REWARDS[rest])
    close(found.params, expected.params)
    for name in ("objective/kl", "objective/scores", "objective/rlhf_reward", "objective/entropy", "loss/policy"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-6)


def test_nothing_but_empty_responses_changes_nothing(make):
    case = make(entropy_coefficient=0.1)
    taken = case.taken.replace(mask=jnp.zeros_like(case.taken.mask))
    equal(case.update(case.state, taken, REWARDS)[0].params, case.state.params)


# What is rewarded.


def without_advantage(case):
    """A state whose value net says 0, so that rewards of 0 have no advantage."""
    params = case.state.params
    head = jax.tree.map(jnp.zeros_like, params["value"]["head"])
    return case.state.replace(params={**params, "value": {**params["value"], "head": head}})


def test_without_advantage_there_is_no_gradient(make):
    case = make(epochs=2, minibatches=4)
    state = without_advantage(case)
    equal(case.update(state, case.taken, jnp.zeros(8))[0].params, state.params)


def test_the_entropy_bonus_raises_entropy(make):
    case = make(optax.sgd(0.5), entropy_coefficient=0.2, epochs=2)
    state, metrics = case.update(without_advantage(case), case.taken, jnp.zeros(8))
    _, after = case.update(state, case.taken.replace(logprob=case.taken.logprob), jnp.zeros(8))
    assert float(after["policy/entropy"]) > float(metrics["policy/entropy"]) + 1e-3


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_policy_has_no_kl_to_itself(make, sampling, temperature):
    case = make(sampling=dataclasses.replace(sampling, temperature=temperature), coefficient=5.0)
    state = case.state.replace(reference=case.state.params["policy"])
    _, metrics = case.update(state, case.taken, REWARDS)
    assert abs(float(metrics["objective/kl"])) < 1e-4
    assert abs(float(metrics["objective/kl_k3"])) < 1e-6
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], metrics["objective/scores"], atol=1e-4)


def test_the_kl_coefficient_enters_the_reward(make):
    case = make()
    outcomes = {}
    for coefficient in (0.0, 0.5):
        outcomes[coefficient] = case.update(
            case.state.replace(kl_coefficient=jnp.float32(coefficient)), case.taken, REWARDS
        )
        metrics = outcomes[coefficient][1]
        expected = REWARDS.mean() - coefficient * metrics["objective/kl"]
        np.testing.assert_allclose(metrics["objective/rlhf_reward"], expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["objective/scores"], REWARDS.mean(), rtol=1e-5)
        assert float(metrics["kl_coefficient"]) == coefficient
    assert abs(float(outcomes[0.5][1]["objective/kl"])) > 0.1
    with pytest.raises(AssertionError):
        close(outcomes[0.0][0].params, outcomes[0.5][0].params)


def test_a_missing_eos_lowers_the_reward_of_unfinished_responses_only(make):
    penalised, plain = make(missing_eos_penalty=0.7), make()
    finished = plain.taken.finished
    assert 0 < int(finished.sum()) < 8
    found, metrics = penalised.update(penalised.state, penalised.taken, REWARDS)
    expected, _ = plain.update(plain.state, plain.taken, jnp.where(finished, REWARDS, REWARDS - 0.7))
    close(found.params, expected.params)
    np.testing.assert_allclose(metrics["completions/clipped_ratio"], 1 - float(finished.mean()), rtol=1e-6)


def test_rewards_may_be_given_by_token(make):
    case = make(coefficient=0.2)
    last = jnp.maximum(case.taken.mask.sum(axis=1), 1) - 1
    by_token = jnp.zeros(case.taken.mask.shape).at[jnp.arange(8), last].set(REWARDS)
    equal(
        case.update(case.state, case.taken, by_token)[0].params, case.update(case.state, case.taken, REWARDS)[0].params
    )


def test_the_controller_changes_the_coefficient(make):
    controller = adaptive_kl(0.1, target=0.01, horizon=80)
    case = make(kl=controller)
    state, metrics = case.update(case.state, case.taken, REWARDS)
    assert float(metrics["objective/kl"]) > 0.02
    np.testing.assert_allclose(state.kl_coefficient, 0.1 * (1 + 0.2 * 8 / 80), rtol=1e-6)


# Epochs, minibatches, early stopping.


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 2), (2, 8)])
def test_epochs_times_minibatches_steps_are_taken(make, epochs, minibatches):
    case = make(optax.adam(1e-3), epochs=epochs, minibatches=minibatches)
    state, _ = case.update(case.state, case.taken, REWARDS)
    assert int(optax.tree_utils.tree_get(state.optimizer_state, "count")) == epochs * minibatches


def test_a_minibatch_count_that_does_not_divide_is_refused(make):
    case = make(minibatches=3)
    with pytest.raises(ValueError, match="8 responses do not split into 3 minibatches; choose a divisor"):
        case.update(case.state, case.taken, REWARDS)


def test_early_stopping_leaves_the_parameters_where_they_were(make):
    """The first step is taken, for it sees a ratio of 1; the second sees a policy that is too far, and is not."""
    stopping, one = make(optax.adam(0.1), epochs=4, target_kl=1e-4), make(optax.adam(0.1))
    found, metrics = stopping.update(stopping.state, stopping.taken, REWARDS)
    expected, _ = one.update(one.state, one.taken, REWARDS)
    close(found.params, expected.params)
    assert int(optax.tree_utils.tree_get(found.optimizer_state, "count")) == 1
    assert float(metrics["policy/stopped"]) == 0.75


def test_a_rollout_of_a_distant_policy_is_not_trained_on_at_all(make):
    case = make(optax.adam(0.1), epochs=2, minibatches=2, target_kl=0.01)
    found, metrics = case.update(case.state, case.taken.replace(logprob=case.taken.logprob - 1.0), REWARDS)
    equal((found.params, found.optimizer_state), (case.state.params, case.state.optimizer_state))
    assert float(metrics["policy/stopped"]) == 1.0


# Options.


@pytest.mark.parametrize(
    "filters", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}], ids=lambda f: next(iter(f))
)
def test_filters_are_refused(sampling, filters):
    with pytest.raises(ValueError, match="samples from the policy itself"):
        PPOConfig(sampling=dataclasses.replace(sampling, **filters))


@pytest.mark.parametrize(("options", "message"), [
    ({"epochs": 0}, "at least 1 epoch"),
    ({"minibatches": 0}, "1 minibatch"),
    ({"kl_in": "loss"}, "mean gradient of k1 is 0"),
    ({"dual_clip": 0.5}, "dual_clip is 0.5; it bounds a ratio from above"),
    ({"clip_high": -0.2}, "clip_high is -0.2"),
    ({"gae_lambda": 2.0}, "PPOConfig.gae_lambda is 2.0; give 0 to 1.0"),
])  # fmt: skip
def test_bad_options_are_refused(sampling, options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(sampling=sampling, **options)


def test_a_reduction_that_does_not_exist_is_refused_before_a_rollout(sampling):
    options = PPOConfig(sampling=sampling)
    object.__setattr__(options, "reduction", "constant")  # the types of the tests would refuse it first
    with pytest.raises(ValueError, match=r"PPOConfig.reduction is 'constant'; choose token_mean"):
        options.__post_init__()


# Initialisation.


def test_the_reference_is_the_policy_at_the_start_unless_given(config, policy, sampling):
    algorithm = ppo(config, PPOConfig(sampling=sampling), optax.sgd(0.1))
    equal(algorithm.init(jax.random.key(0), {"policy": policy}).reference, policy)
    fresh = algorithm.init(jax.random.key(0))
    equal(fresh.reference, fresh.params["policy"])
    assert set(fresh.params["value"]) == {"head", "trunk"}
    assert float(fresh.kl_coefficient) == 0.0
    shared = ppo(config, PPOConfig(sampling=sampling, value_net="shared"), optax.sgd(0.1))
    assert set(shared.init(jax.random.key(0)).params["value"]) == {"head"}


def test_two_rollouts_in_a_row_differ(make, prompts):
    case = make()
    state, again = jax.jit(case.algorithm.rollout)(case.state, prompts)
    assert int(state.step) == 2
    assert np.asarray(again.tokens).tolist() != np.asarray(case.taken.tokens).tolist()


# The compiled program.


def step_of(algorithm):
    """A whole step on the device: rewards are the share of token 5."""

    def step(state, prompts):
        state, taken = algorithm.rollout(state, prompts)
        hits = jnp.where(taken.mask, (taken.tokens == 5).astype(jnp.float32), 0.0)
        return algorithm.update(state, taken, hits.sum(axis=1))

    return step


def test_jit_changes_nothing(make):
    case = make(adam(1e-2), minibatches=2, coefficient=0.1)
    found, metrics = case.algorithm.update(case.state, case.taken, REWARDS)
    expected, expected_metrics = case.update(case.state, case.taken, REWARDS)
    close(found.params, expected.params, atol=1e-5)
    close(metrics, expected_metrics, atol=1e-5)


def test_a_step_stays_on_the_device_and_is_compiled_once(make, prompts):
    case = make(adam(1e-2), minibatches=2, epochs=2, target_kl=1.0)
    traced, plain = [], step_of(case.algorithm)

    @jax.jit
    def step(state, prompts):
        traced.append(prompts)
        return plain(state, prompts)

    text = step.lower(case.state, prompts).compile().as_text()
    assert not [name for name in HOST_TRAFFIC if name in text]
    state, _ = step(case.state, prompts)
    with jax.transfer_guard("disallow"):
        for _ in range(5):
            state, metrics = step(state, prompts)
    jax.block_until_ready(metrics)
    assert len(traced) == 1


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(make, prompts, tmp_path):
    case = make(adam(1e-2), minibatches=2, kl=adaptive_kl(0.1, 1.0, 100))
    step = jax.jit(step_of(case.algorithm))
    state, _ = step(case.state, prompts)
    checkpoints.save(tmp_path / "state", state)
    resumed = checkpoints.restore(tmp_path / "state", jax.eval_shape(lambda: case.state))
    for _ in range(2):
        state, metrics = step(state, prompts)
        resumed, resumed_metrics = step(resumed, prompts)
    equal(resumed, state)
    equal(resumed_metrics, metrics)


def test_eight_devices_equal_one(make):
    case = make(adam(1e-2), minibatches=2, epochs=2, coefficient=0.1)
    taken = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), case.taken)
    rewards = jnp.concatenate([REWARDS, -REWARDS])
    expected = case.update(case.state, taken, rewards)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    update = jax.jit(case.algorithm.update, in_shardings=(everywhere, spread, spread), out_shardings=everywhere)
    found = jax.block_until_ready(
        update(jax.device_put(case.state, everywhere), jax.device_put(taken, spread), jax.device_put(rewards, spread))
    )
    close(found[0].params, expected[0].params, rtol=1e-5, atol=1e-5)
    close(found[1], expected[1], rtol=1e-4, atol=1e-5)
