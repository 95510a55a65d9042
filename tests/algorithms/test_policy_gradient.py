"""GRPO and its relatives: every method's step by hand, groups, what is left out of training, and refusals."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.methods import METHODS, method
from rlhf_jax.algorithms.on_policy import check_kl
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.rollouts import taken_scores
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.parallel.mesh import MeshShape, make_mesh
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate, repeat_prompts
from rlhf_jax.types import Prompts

REWARDS = jnp.array([0.9, -1.6, 0.3, 2.5, -0.4, 0.0, 1.1, -2.2])
KL = 0.3


def close(found, expected, rtol=2e-4, atol=2e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def built(config, sampling, name="grpo", kl=KL, adapter=None, **options):
    """The algorithm of a method by its name (or of a `Method`), with plain gradient steps."""
    chosen = METHODS[name] if isinstance(name, str) else name
    options = PolicyGradientConfig(**({"sampling": sampling, "method": chosen, "samples": 4} | options))
    return policy_gradient(config, options, optax.sgd(0.1), None if kl is None else fixed_kl(kl), adapter)


@pytest.fixture(scope="module")
def reference(config):
    return jax.jit(init_policy, static_argnums=0)(config, jax.random.key(7))


@pytest.fixture(scope="module")
def two(prompts) -> Prompts:
    return jax.tree.map(lambda leaf: leaf[:2], prompts)


@pytest.fixture(scope="module")
def plain(config, policy, reference, sampling, two):
    """GRPO on two groups of four: its jitted update, a state after a rollout, and that."""
    algorithm = built(config, sampling)
    start = algorithm.init(jax.random.key(3), {"policy": policy, "reference": reference})
    state, taken = jax.jit(algorithm.rollout)(start, two)
    return jax.jit(algorithm.update), state, taken


@pytest.fixture(scope="module")
def moved(plain):
    """The rollout with old log-probabilities that are far from those of the policy, so that ratios are far from 1."""
    taken = plain[2]
    noise = 0.3 * jax.random.normal(jax.random.key(9), taken.logprob.shape)
    return taken.replace(logprob=jnp.where(taken.mask, taken.logprob + noise, 0.0))


@pytest.fixture(scope="module")
def backwards(config, plain, moved, reference):
    """Log-probabilities of the policy and of the reference; and from a gradient with respect to the former, that of the
    parameters."""
    params = plain[1].params

    @jax.jit
    def logprobs(params):
        return taken_scores(config, params, moved, 1.0)[0]

    pull = jax.jit(lambda cotangent: jax.vjp(logprobs, params)[1](cotangent)[0])
    return logprobs(params), logprobs(reference), pull


def by_hand(name, now, old, ref, mask, rewards, finished):
    """The loss of a method from arrays, as its paper writes it, in plain numbers: [8, 6] and groups of four."""
    real = mask.astype(jnp.float32)
    lengths, tokens = real.sum(axis=1), real.sum()
    held = jax.lax.stop_gradient

    def grouped(x):
        return x.reshape(2, 4)

    def ungrouped(x):
        return x.reshape(8, 1)

    def spread(x):
        return jnp.sqrt(jnp.square(x - x.mean(axis=1, keepdims=True)).sum(axis=1, keepdims=True) / 3)

    def clip(ratio, gain, low, high):
        return -jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - low, 1 + high) * gain)

    raw = grouped(rewards)
    centred = raw - raw.mean(axis=1, keepdims=True)
    grpo = ungrouped(centred / (spread(raw) + 1e-4))
    behind = ref - now
    k3 = jnp.exp(behind) - 1 - behind
    ratio = jnp.exp(now - old)
    total = rewards - KL * ((old - ref) * real).sum(axis=1)
    if name == "grpo":
        return (((clip(ratio, grpo, 0.2, 0.2) + KL * k3) * real).sum(axis=1) / lengths).mean()
    if name == "dr_grpo":
        return ((clip(ratio, ungrouped(centred), 0.2, 0.2) + KL * k3) * real).sum() / (8 * 6)
    if name == "dapo":
        kept = real * finished[:, None]
        return ((clip(ratio, grpo, 0.2, 0.28) + KL * k3) * kept).sum() / kept.sum()
    if name == "gspo":
        ratio = jnp.exp(((now - old) * real).sum(axis=1) / lengths)
        return (clip(ratio, grpo[:, 0], 3e-4, 4e-4) + KL * (k3 * real).sum(axis=1) / lengths).mean()
    if name == "cispo":
        return ((-held(jnp.minimum(ratio, 5.0)) * grpo * now + KL * k3) * real).sum() / tokens
    if name == "rloo":
        others = (grouped(total).sum(axis=1, keepdims=True) - grouped(total)) / 3
        gain = (grouped(total) - others).reshape(8)
        return clip(jnp.exp(((now - old) * real).sum(axis=1)), gain, 0.2, 0.2).mean()
    if name.startswith("reinforce++"):
        base = grouped(rewards).mean(axis=1).repeat(4) if name.endswith("baseline") else 0.0
        last = jax.nn.one_hot(lengths.astype(int) - 1, 6)
        steps = ((rewards - base)[:, None] * last - KL * (old - ref)) * real
        to_go = jnp.cumsum(steps[:, ::-1], axis=1)[:, ::-1]
        centre = (to_go * real).sum() / tokens
        deviation = jnp.sqrt((jnp.square(to_go - centre) * real).sum() / tokens)
        return (clip(ratio, (to_go - centre) / deviation, 0.2, 0.2) * real).sum() / tokens
    assert name == "remax"
    gain = grouped(total) - grouped(total)[:, -1:]
    sampled = jnp.tile(jnp.array([1.0, 1.0, 1.0, 0.0]), 2)  # the greedy response of a group is not trained on
    return (-gain.reshape(8) * sampled * (now * real).sum(axis=1)).sum() / 6


@pytest.mark.parametrize("name", METHODS)
def test_an_update_is_the_step_of_the_paper(name, config, sampling, plain, moved, backwards):
    _, state, _ = plain
    now, ref, pull = backwards
    values = (moved.logprob, ref, moved.mask, REWARDS, moved.finished.astype(jnp.float32))
    value, slope = jax.value_and_grad(lambda now: by_hand(name, now, *values))(now)
    algorithm = built(config, sampling, name, samples=3 if name == "remax" else 4)
    if name == "remax":
        moved = moved.replace(own=jnp.arange(8) % 4 != 3)
    found, metrics = jax.jit(algorithm.update)(state, moved, REWARDS)
    np.testing.assert_allclose(metrics["loss/policy"] + KL * metrics.get("loss/kl", 0.0), value, rtol=2e-4, atol=1e-6)
    expected = jax.tree.map(lambda leaf, by: leaf - 0.1 * by, state.params, pull(slope))
    close(found.params, expected, rtol=3e-4, atol=3e-6)
    assert (float(metrics["policy/clipfrac"]) > 0) == (name not in ("cispo", "remax"))
    assert float(metrics["objective/equal_groups"]) == 0.0
    assert set(metrics) >= {
        "objective/kl",
        "objective/scores",
        "policy/entropy",
        "grad_norm",
        "completions/mean_length",
    }


def test_responses_stand_in_groups_and_differ(plain, two):
    _, state, taken = plain
    assert int(state.step) == 1 and taken.tokens.shape == (8, 6)
    np.testing.assert_array_equal(taken.prompts.tokens, jnp.repeat(two.tokens, 4, axis=0))
    np.testing.assert_array_equal(taken.prompts.index, jnp.arange(8))
    drawn = np.where(taken.mask, taken.tokens, 0)
    assert len({row.tobytes() for row in drawn[:4]}) > 1
    assert repeat_prompts(two.replace(index=jnp.array([7, 2], jnp.int32)), 3).index.tolist() == [21, 22, 23, 6, 7, 8]


def test_the_first_step_sees_the_policy_that_sampled(plain):
    update, state, taken = plain
    _, metrics = update(state, taken, REWARDS)
    assert abs(float(metrics["val/first_ratio"]) - 1.0) < 1e-4 and float(metrics["policy/max_logprob_gap"]) < 1e-4
    np.testing.assert_allclose(metrics["objective/scores"], REWARDS.mean(), rtol=1e-5)


def test_groups_of_equal_rewards_change_nothing_without_kl(plain):
    update, state, taken = plain
    free = state.replace(kl_coefficient=jnp.float32(0.0))
    rewards = jnp.repeat(jnp.array([0.1, -3.3]), 4)
    found, metrics = update(free, taken, rewards)
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    assert float(metrics["objective/equal_groups"]) == 1.0 and float(metrics["grad_norm"]) == 0.0
    moved, _ = update(state, taken, rewards)
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, moved.params, state.params))) > 1e-4


def test_constants_of_prompts_padding_and_the_order_of_groups_do_not_matter(plain):
    update, state, taken = plain
    expected, _ = update(state, taken, REWARDS)
    close(update(state, taken, REWARDS + jnp.repeat(jnp.array([4.0, -8.0]), 4))[0].params, expected.params, atol=1e-5)
    junk = taken.replace(
        tokens=jnp.where(taken.mask, taken.tokens, 11), logprob=jnp.where(taken.mask, taken.logprob, -5.0)
    )
    close(update(state, junk, REWARDS)[0].params, expected.params)
    order = jnp.array([5, 4, 7, 6, 2, 3, 0, 1])
    shuffled = jax.tree.map(lambda leaf: leaf[order], taken)
    close(update(state, shuffled, REWARDS[order])[0].params, expected.params)


def test_an_empty_response_weighs_nothing_and_counts_in_its_group_with_a_reward_of_0(plain):
    update, state, taken = plain
    empty = taken.replace(mask=taken.mask.at[1].set(False))
    found, metrics = update(state, empty, REWARDS.at[1].set(50.0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found.params, metrics)))
    close(found.params, update(state, empty, REWARDS.at[1].set(0.0))[0].params)
    # Where it alone would differ from its group, its 0 is what the others are compared with.
    free = state.replace(kl_coefficient=jnp.float32(0.0))
    ones = jnp.ones(8)
    assert float(update(free, taken, ones)[1]["grad_norm"]) == 0.0 < float(update(free, empty, ones)[1]["grad_norm"])


def test_responses_pay_for_having_no_end_and_for_coming_near_the_longest(config, sampling, plain):
    """Of 6 tokens at most, the last 3 cost a third each; lengths and ends are set by hand."""
    update, state, taken = plain
    lengths, finished = jnp.array([6, 5, 4, 3, 2, 1, 6, 6]), jnp.array([False, *(True,) * 6, False])
    taken = taken.replace(mask=jnp.arange(6)[None] < lengths[:, None], finished=finished)
    paid = jnp.array([1.0 + 0.7, 2 / 3, 1 / 3, 0.0, 0.0, 0.0, 1.0, 1.0 + 0.7])
    algorithm = built(config, sampling, overlong_buffer=3, missing_eos_penalty=0.7)
    found, metrics = jax.jit(algorithm.update)(state, taken, REWARDS)
    close(found.params, update(state, taken, REWARDS - paid)[0].params, atol=1e-5)
    np.testing.assert_allclose(metrics["objective/scores"], REWARDS.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], (REWARDS - paid).mean(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (8, 1), (8, 5)])
def test_rewards_of_another_shape_are_refused(config, sampling, plain, shape):
    _, state, taken = plain
    with pytest.raises(ValueError, match=r"rewards have the shape .*: give one a response, \(8,\), or one a token"):
        built(config, sampling).update(state, taken, jnp.ones(shape))


def test_the_last_response_of_a_group_of_remax_is_greedy(config, policy, sampling, two):
    algorithm = built(config, sampling, "remax", samples=2)
    state = algorithm.init(jax.random.key(3), {"policy": policy})
    _, taken = jax.jit(algorithm.rollout)(state, two)
    assert len(taken.tokens) == 6 and taken.own.tolist() == [True, True, False] * 2
    coldest = dataclasses.replace(sampling, temperature=0.0)
    greedy = jax.jit(generate, static_argnums=(0, 4))(config, policy, two, jax.random.key(0), coldest)
    np.testing.assert_array_equal(taken.tokens[2::3], greedy.tokens)
    np.testing.assert_array_equal(taken.prompts.tokens, jnp.repeat(two.tokens, 3, axis=0))
    scored = taken_scores(config, policy, taken, 1.0)[0]
    np.testing.assert_allclose(jnp.where(taken.mask, scored, 0.0), taken.logprob, atol=1e-5)


def test_oversampling_trains_on_the_groups_that_differ(config, reference, policy, sampling, prompts):
    """Four groups of two for two places; only the second and the last differ: those make the step."""
    chosen = method("dapo", mask_unfinished=False)
    algorithm = built(config, sampling, chosen, samples=2, oversample=2)
    state = algorithm.init(jax.random.key(3), {"policy": policy, "reference": reference})
    four = jax.tree.map(lambda leaf: leaf[:4], prompts)
    state, taken = jax.jit(algorithm.rollout)(state, four)
    rewards = jnp.array([1.0, 1.0, 0.0, 1.0, 0.5, 0.5, 2.0, 0.0])
    found, metrics = jax.jit(algorithm.update)(state, taken, rewards)
    assert float(metrics["objective/equal_groups"]) == 0.5 and float(metrics["objective/trained"]) == 1.0
    some = jnp.array([2, 3, 6, 7])
    both = built(config, sampling, chosen, samples=2)
    update = jax.jit(both.update)
    expected, _ = update(state, jax.tree.map(lambda leaf: leaf[some], taken), rewards[some])
    close(found.params, expected.params)
    # Without oversampling, the others weigh nothing in the step either.
    close(update(state, taken, rewards)[0].params, expected.params)
    still, _ = update(state, taken, jnp.ones(8))
    jax.tree.map(np.testing.assert_array_equal, still.params, state.params)
    with pytest.raises(ValueError, match="3 prompts are no multiple of oversample"):
        algorithm.update(state, jax.tree.map(lambda leaf: leaf[:6], taken), rewards[:6])


def test_a_mesh_of_eight_makes_the_step_of_one_device(config, plain, moved, sampling):
    """DAPO with oversampling, which gathers rows from all devices."""
    _, state, _ = plain
    algorithm = built(config, sampling, method("dapo", mask_unfinished=False), samples=2, oversample=2)
    rewards = REWARDS.at[:2].set(1.0)
    expected, metrics = jax.jit(algorithm.update)(state, moved, rewards)
    mesh = make_mesh(MeshShape(data=8), jax.devices())
    rows = jax.NamedSharding(mesh, jax.P("data"))
    split = jax.tree.map(lambda leaf: jax.device_put(leaf, rows), (moved, rewards))
    with jax.set_mesh(mesh):
        found, found_metrics = jax.block_until_ready(jax.jit(algorithm.update)(state, *split))
    close(found.params, expected.params, rtol=1e-5, atol=1e-6)
    close(found_metrics, metrics, rtol=1e-5, atol=1e-5)


def test_no_reference_is_kept_where_none_is_wanted(config, policy, sampling, plain):
    algorithm = built(config, sampling, kl=None, keep_reference=False)
    state = algorithm.init(jax.random.key(3), {"policy": policy})
    assert state.reference is None
    update, start, taken = plain
    found, metrics = jax.jit(algorithm.update)(start.replace(reference=None), taken, REWARDS)
    assert "objective/kl" not in metrics
    close(found.params, update(start.replace(kl_coefficient=jnp.float32(0.0)), taken, REWARDS)[0].params)
    for needs in ({"kl": KL}, {"adapter": AdapterConfig(kind="lora")}):
        with pytest.raises(ValueError, match="needs the reference: keep it"):
            built(config, sampling, keep_reference=False, **({"kl": None} | needs))


def test_an_adapter_is_all_that_is_trained(config, policy, sampling, two):
    adapter = AdapterConfig(kind="lora", targets=("query", "value"), rank=2)
    algorithm = built(config, sampling, adapter=adapter)
    state = algorithm.init(jax.random.key(3), {"policy": policy})
    before = jax.tree.map(jnp.copy, state.reference)
    state, taken = jax.jit(algorithm.rollout)(state, two)
    found, metrics = jax.jit(algorithm.update)(state, taken, REWARDS)
    jax.tree.map(np.testing.assert_array_equal, found.reference, before)
    assert float(metrics["grad_norm"]) > 0 and float(metrics["objective/kl"]) == pytest.approx(0.0, abs=1e-4)
    assert sum(leaf.size for leaf in jax.tree.leaves(found.params)) < 0.3 * sum(
        leaf.size for leaf in jax.tree.leaves(found.reference)
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"samples": 1}, "samples is 1: give 2 or more, for a response is compared"),
        ({"samples": 0, "method": METHODS["remax"]}, "samples is 0: give 1 or more"),
        ({"epochs": 0}, "at least 1 epoch"),
        ({"accumulate": 0}, "1 microbatch"),
        ({"sampling": SamplingConfig(max_new_tokens=2, stop_tokens=(3,), top_k=3)}, "samples from the policy"),
        ({"target_kl": -0.1}, "PolicyGradientConfig.target_kl is -0.1: give more than 0, or None"),
        ({"overlong_buffer": 7}, "overlong_buffer is 7: give 0 to 6"),
        ({"oversample": 2}, "oversample is for methods that drop groups of equal rewards"),
        ({"method": METHODS["remax"], "epochs": 2}, "corrects nothing for steps away"),
    ],
)
def test_bad_options_are_refused(sampling, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PolicyGradientConfig(**({"sampling": sampling} | options))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: method("grop"), "no method 'grop': choose one of grpo, dr_grpo"),
        (lambda: method("cispo", dual_clip=3.0), "cispo does not clip its surrogate"),
        (lambda: method("rloo", baseline="batch"), "leave_one_out compares within groups"),
        (lambda: method("remax", baseline="group"), "greedy_difference compares with a greedy response"),
        (lambda: method("reinforce++", centre_scores=True), "centre_scores subtracts the mean of a group"),
        (lambda: method("grpo", kl_estimate="k1"), "mean gradient of k1 is 0"),
        (lambda: method("grpo", dual_clip=float("nan")), "dual_clip is nan; it bounds a ratio from above"),
        (lambda: method("grpo", clip_low=-0.1), "clip_low is -0.1; it is a distance from a ratio of 1"),
        (lambda: check_kl("both", "k3"), "kl_in is 'both'"),
        (lambda: check_kl("loss", "k4"), "kl_estimate is 'k4'"),
    ],
)
def test_bad_methods_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("field", "sentence"),
    [("baseline", "baseline is 'typo': choose group, batch or greedy"), ("reduction", "unknown reduction 'typo'")],
)
def test_words_that_do_not_exist_are_refused(field, sentence):
    chosen = copy.copy(METHODS["grpo"])
    object.__setattr__(chosen, field, "typo")  # the types of the tests would refuse it first
    with pytest.raises(ValueError, match=sentence):
        chosen.__post_init__()


def test_minibatches_that_do_not_divide_are_refused(config, sampling, plain):
    _, state, taken = plain
    with pytest.raises(ValueError, match="8 responses do not split into 3 minibatches"):
        built(config, sampling, minibatches=3).update(state, taken, REWARDS)


def test_a_role_that_does_not_exist_is_refused(config, policy, sampling):
    with pytest.raises(ValueError, match="no role 'polcy' in this algorithm: name the trees policy, reference"):
        built(config, sampling).init(jax.random.key(0), {"polcy": policy})
