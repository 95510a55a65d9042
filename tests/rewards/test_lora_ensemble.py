import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.adapters import AdapterConfig, adapter_size, init_adapter, merge
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.ensemble import lower_confidence_bound, member_offset, uncertainty_weighted, worst_case
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams, init_heads, linear_ensemble_scorer
from rlhf_jax.rewards.lora_ensemble import LoRAEnsembleParams, lora_ensemble_scorer, nuclear_diversity

ADAPTER = AdapterConfig(kind="lora", targets=("query", "down"), rank=2, alpha=4.0)
MEMBERS = 3


@pytest.fixture(scope="session")
def config(config):
    """Two layers, whose adapters differ."""
    return dataclasses.replace(config, layers=2)


@pytest.fixture(scope="module")
def fresh(config) -> LoRAEnsembleParams:

    def build(key) -> LoRAEnsembleParams:
        trunk_key, heads_key, adapter_key = jax.random.split(key, 3)
        base = {"trunk": init_reward_model(config, trunk_key)["trunk"]}
        adapters = jax.vmap(lambda key: init_adapter(ADAPTER, base, key))(jax.random.split(adapter_key, MEMBERS))
        heads, offset = init_heads(config, heads_key, MEMBERS), jnp.array([0.5, -1.0, 0.25])
        return LoRAEnsembleParams(base=base, adapters=adapters, heads=heads, offset=offset)

    return jax.jit(build)(jax.random.key(1))


@pytest.fixture(scope="module")
def trained(fresh) -> LoRAEnsembleParams:
    """Adapters that change something."""
    leaves, tree = jax.tree.flatten(fresh.adapters)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return fresh.replace(adapters=jax.tree.unflatten(tree, moved))


@functools.cache
def scorer_of(config, lead=None):
    return jax.jit(lora_ensemble_scorer(config, ADAPTER, lead=lead))


def member(tree, place: int):
    return jax.tree.map(lambda leaf: leaf[place], tree)


@pytest.fixture(scope="module")
def alone(trained, config, tokens, mask):
    """The scores of each member as an ordinary reward model, its adapter merged into the kernels."""
    scorer = jax.jit(reward_scorer(config))
    return [
        scorer(
            merge(trained.base, member(trained.adapters, m), ADAPTER) | {"head": member(trained.heads, m)}, tokens, mask
        )
        for m in range(MEMBERS)
    ]


def test_an_ensemble_is_a_loop_over_merged_members(trained, alone, config, tokens, mask):
    score = scorer_of(config)(trained, tokens, mask)
    each = np.stack([one.mean for one in alone]) - np.asarray(trained.offset)[:, None]
    np.testing.assert_allclose(score.members, each, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.mean, each.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.epistemic, each.std(axis=0), rtol=1e-4, atol=1e-5)
    assert score.features is None


def test_the_lead_member_gives_mean_and_features(trained, alone, config, tokens, mask):
    score = scorer_of(config, 2)(trained, tokens, mask)
    np.testing.assert_array_equal(score.mean, score.members[2])
    np.testing.assert_allclose(score.features, alone[2].features, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(alone[2].features) - np.asarray(alone[0].features)).max() > 1e-2


def test_fresh_adapters_leave_a_linear_ensemble(fresh, config, tokens, mask):
    linear = LinearEnsembleParams(trunk=fresh.base["trunk"], heads=fresh.heads, offset=fresh.offset)
    expected = jax.jit(linear_ensemble_scorer(config))(linear, tokens, mask)
    found = scorer_of(config)(fresh, tokens, mask)
    np.testing.assert_allclose(found.members, expected.members, rtol=1e-5, atol=1e-6)
    a = np.asarray(fresh.adapters["query"]["a"])
    assert (np.abs(a[0] - a[1]).max() > 0.1) and (np.abs(a[1] - a[2]).max() > 0.1)  # yet they will go apart


def test_one_adapter_is_one_reward_model(trained, alone, config, tokens, mask):
    one = trained.replace(
        adapters=jax.tree.map(lambda leaf: leaf[:1], trained.adapters),
        heads=jax.tree.map(lambda leaf: leaf[:1], trained.heads),
        offset=jnp.zeros(1),
    )
    found = scorer_of(config)(one, tokens, mask)
    np.testing.assert_allclose(found.mean, alone[0].mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.epistemic, 0.0)


def test_the_order_of_members_does_not_matter(trained, config, tokens, mask):
    order = jnp.array([2, 0, 1])
    permuted = trained.replace(
        adapters=jax.tree.map(lambda leaf: leaf[order], trained.adapters),
        heads=jax.tree.map(lambda leaf: leaf[order], trained.heads),
        offset=trained.offset[order],
    )
    found, expected = scorer_of(config)(permuted, tokens, mask), scorer_of(config)(trained, tokens, mask)
    np.testing.assert_allclose(found.members, expected.members[order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.epistemic, expected.epistemic, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [worst_case, uncertainty_weighted, lower_confidence_bound])
def test_constants_of_members_change_no_objective_once_offsets_are_fixed_on_reference_samples(
    trained, rule, config, tokens, mask
):
    shifted = {**trained.heads, "bias": trained.heads["bias"] + jnp.array([3.0, -7.0, 0.0])}
    reference, transform = (tokens[::-1], mask[::-1]), rule()

    def rewards(heads):
        raw = trained.replace(heads=heads, offset=jnp.zeros(MEMBERS))
        centred = raw.replace(offset=member_offset(scorer_of(config)(raw, *reference).members))
        return transform.apply(scorer_of(config)(centred, tokens, mask), None, transform.init())[0]

    np.testing.assert_allclose(rewards(shifted), rewards(trained.heads), rtol=1e-4, atol=1e-5)


def test_members_add_their_adapters_and_heads_to_one_trunk(fresh, config):
    one = adapter_size(member(fresh.adapters, 0))
    assert one == 2 * (2 * (8 + 8) + 2 * (12 + 8))  # two layers; rank 2; query 8 x 8, down 12 x 8
    assert adapter_size(fresh.adapters) == MEMBERS * one
    assert sum(leaf.size for leaf in jax.tree.leaves(fresh.heads)) == MEMBERS * (config.width + 1)


def test_the_nuclear_norm_of_numbers_worked_by_hand():
    """[[3, 0], [0, 4]] has singular values 4 and 3; [[1, 1], [1, 1]] has 2 and 0."""
    first, second = jnp.array([[3.0], [0.0]]), jnp.array([[0.0], [4.0]])
    ones = jnp.ones((2, 1))
    adapters = {"query": {"a": jnp.stack([jnp.stack([first, ones]), jnp.stack([second, ones])])}}
    np.testing.assert_allclose(nuclear_diversity(adapters), 3.0 + 4.0 + 2.0, rtol=1e-6)


def test_the_nuclear_norm_is_that_of_the_members_side_by_side(trained, config):
    expected = 0.0
    for leaves in trained.adapters.values():
        a = np.asarray(leaves["a"], np.float64)
        for layer in range(config.layers):
            expected += np.linalg.norm(np.concatenate(list(a[:, layer]), axis=1), "nuc")
    np.testing.assert_allclose(nuclear_diversity(trained.adapters), expected, rtol=1e-5)


def test_the_gradient_of_the_nuclear_norm_is_u_times_v(trained, config):
    adapters = {"query": {"a": trained.adapters["query"]["a"]}}
    gradient = jax.grad(nuclear_diversity)(adapters)["query"]["a"]
    for layer in range(config.layers):
        joined = np.concatenate(list(np.asarray(adapters["query"]["a"], np.float64)[:, layer]), axis=1)
        left, _, right = np.linalg.svd(joined, full_matrices=False)
        found = np.concatenate(list(np.asarray(gradient)[:, layer]), axis=1)
        np.testing.assert_allclose(found, left @ right, atol=2e-5)


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_the_gradient_is_finite_where_members_are_the_same_or_nothing(fresh, factor):
    same = {"query": {"a": factor * jnp.repeat(fresh.adapters["query"]["a"][:1], MEMBERS, axis=0)}}
    gradient = jax.grad(nuclear_diversity)(same)["query"]["a"]
    assert np.isfinite(gradient).all() and np.abs(gradient).max() <= 1.0 + 1e-5
    if factor:  # a step along it tells the members apart or lengthens them: the norm rises
        assert nuclear_diversity({"query": {"a": same["query"]["a"] + 0.01 * gradient}}) > nuclear_diversity(same)


def test_an_adapter_without_a_is_refused():
    with pytest.raises(ValueError, match=r"targets \['query'\] do not have"):
        nuclear_diversity({"query": {"input_scale": jnp.ones((2, 1, 8))}})
