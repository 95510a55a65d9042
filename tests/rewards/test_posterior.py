"""Posteriors of a linear head against float64 loops, the Hessian of the loss and a brute-force posterior."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.stats import chi2

from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards import ellipsoid
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.ensemble import lower_confidence_bound
from rlhf_jax.rewards.last_layer import advpo, statistical_scale
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams, apply_heads, linear_ensemble_scorer
from rlhf_jax.rewards.posterior import (
    PosteriorParams,
    draw_heads,
    fisher_geometry,
    pair_geometry,
    posterior_scorer,
    updated,
)


@pytest.fixture(scope="module")
def scorer(config):
    return jax.jit(posterior_scorer(config))


def pairs_of(rows: int, width: int, seed: int = 0, dtype=np.float64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of chosen and rejected responses with a large common part, and a head."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width))
    chosen, rejected = generator.normal(size=(2, rows, width)) @ mixing + 2.0
    return chosen.astype(dtype), rejected.astype(dtype), generator.normal(size=width).astype(dtype)


def of_kind(kind: str, chosen, rejected, head, regularisation: float, mask=None):
    """The geometry and the rows that it is the second moment of."""
    chosen, rejected, head = map(jnp.asarray, (chosen, rejected, head))
    if kind == "pair":
        return pair_geometry(chosen, rejected, regularisation, mask), chosen - rejected
    margins = (chosen - rejected) @ head
    weights = jax.nn.sigmoid(margins) * jax.nn.sigmoid(-margins)
    found = fisher_geometry(chosen, rejected, {"kernel": head}, regularisation, mask)
    return found, jnp.sqrt(weights)[:, None] * (chosen - rejected)


def matrix_of(geometry) -> np.ndarray:
    factor = np.asarray(geometry.cholesky, np.float64)
    return factor @ factor.T


KINDS = pytest.mark.parametrize("kind", ["pair", "fisher"])


@KINDS
def test_geometries_are_those_of_a_loop_over_pairs(kind):
    chosen, rejected, head = pairs_of(20, 4, dtype=np.float32)
    expected = 0.3 * np.eye(4)
    for left, right in zip(chosen.astype(np.float64), rejected.astype(np.float64), strict=True):
        p = 1.0 / (1.0 + np.exp(-(left - right) @ head.astype(np.float64)))
        expected += (p * (1.0 - p) if kind == "fisher" else 1.0) * np.outer(left - right, left - right)
    found, _ = of_kind(kind, chosen, rejected, head, 0.3)
    assert found.cholesky.dtype == jnp.float32
    np.testing.assert_allclose(matrix_of(found), expected, rtol=1e-4, atol=1e-4)


def test_the_fisher_geometry_is_the_hessian_of_the_loss_with_its_prior():
    with jax.enable_x64(True):
        chosen, rejected, head = map(jnp.asarray, pairs_of(12, 3))

        def loss(kernel):
            return bradley_terry(chosen @ kernel, rejected @ kernel).sum() + 0.35 * jnp.square(kernel).sum()

        found = fisher_geometry(chosen, rejected, {"kernel": head}, 0.7)
        np.testing.assert_allclose(matrix_of(found), jax.hessian(loss)(head), rtol=1e-10)


def test_large_margins_weigh_nothing_and_stay_finite():
    chosen, rejected = jnp.array([[400.0, 0.0]]), jnp.array([[-400.0, 0.0]])
    found = fisher_geometry(chosen, rejected, {"kernel": jnp.array([1.0, 0.0])}, 2.0)
    np.testing.assert_allclose(matrix_of(found), 2.0 * np.eye(2), rtol=1e-6)


@KINDS
def test_masked_pairs_do_not_matter_even_if_nan(kind):
    chosen, rejected, head = pairs_of(10, 3, dtype=np.float32)
    kept = np.arange(10) % 3 != 0
    spoiled = np.where(kept[:, None], chosen, np.nan).astype(np.float32)
    found, _ = of_kind(kind, spoiled, rejected, head, 0.3, jnp.asarray(kept))
    expected, _ = of_kind(kind, chosen[kept], rejected[kept], head, 0.3)
    np.testing.assert_allclose(found.cholesky, expected.cholesky, rtol=1e-4, atol=1e-5)


@KINDS
def test_what_both_responses_share_and_which_was_preferred_do_not_matter(kind):
    with jax.enable_x64(True):
        chosen, rejected, head = pairs_of(15, 4)
        shared = 5.0 * np.random.default_rng(9).normal(size=(15, 4))
        expected, _ = of_kind(kind, chosen, rejected, head, 0.3)
        for left, right in ((chosen + shared, rejected + shared), (rejected, chosen)):
            found, _ = of_kind(kind, left, right, head, 0.3)
            np.testing.assert_allclose(found.cholesky, expected.cholesky, rtol=1e-9, atol=1e-12)


def test_the_three_geometries_are_ordered():
    # z z^T <= 2 (e_c e_c^T + e_r e_r^T) and p (1 - p) <= 1/4, in the order of positive semidefinite matrices.
    with jax.enable_x64(True):
        chosen, rejected, head = pairs_of(25, 4)
        probes = jnp.asarray(np.random.default_rng(1).normal(size=(30, 4)))
        alone = ellipsoid.geometry(ellipsoid.gram(jnp.asarray(np.concatenate([chosen, rejected]))), 0.4)
        pair, fisher = (of_kind(kind, chosen, rejected, head, 0.8)[0] for kind in ("pair", "fisher"))
        quarter, _ = of_kind("pair", chosen, rejected, head, 3.2)  # four times (0.8 I + Z^T Z / 4)
        assert np.all(2.0 * ellipsoid.leverage(pair, probes) >= ellipsoid.leverage(alone, probes) - 1e-12)
        assert np.all(ellipsoid.leverage(fisher, probes) >= 4.0 * ellipsoid.leverage(quarter, probes) - 1e-12)
        assert np.all(ellipsoid.leverage(fisher, probes) > ellipsoid.leverage(pair, probes))


@KINDS
def test_adding_pairs_never_raises_uncertainty(kind):
    with jax.enable_x64(True):
        chosen, rejected, head = pairs_of(30, 4)
        probes = jnp.asarray(np.random.default_rng(1).normal(size=(20, 4)))
        seen = jnp.tri(30, dtype=bool)  # row n: the first n + 1 pairs
        lever = jax.jit(
            jax.vmap(lambda mask: ellipsoid.leverage(of_kind(kind, chosen, rejected, head, 0.7, mask)[0], probes))
        )(seen)
        assert np.all(np.diff(lever, axis=0) <= 1e-12)
        assert np.all(lever >= 0.0)
        assert np.all(jnp.sqrt(lever) <= jnp.linalg.norm(probes, axis=1)[None] / np.sqrt(0.7) + 1e-12)


@KINDS
def test_leverages_of_the_rows_are_below_one_and_sum_to_a_trace(kind):
    with jax.enable_x64(True):
        found, rows = of_kind(kind, *pairs_of(30, 4), 0.7)
        lever, total = ellipsoid.leverage(found, rows), np.asarray(rows.T @ rows)
        assert np.all(np.asarray(lever) < 1.0)
        expected = np.trace(np.linalg.solve(total + 0.7 * np.eye(4), total))
        np.testing.assert_allclose(lever.sum(), expected, rtol=1e-10)


@KINDS
def test_the_unit_of_features_does_not_matter_nor_their_basis_without_regularisation(kind):
    with jax.enable_x64(True):
        chosen, rejected, head = pairs_of(30, 4)
        generator = np.random.default_rng(2)
        probes, mixing = generator.normal(size=(9, 4)), generator.normal(size=(4, 4)) + 3.0 * np.eye(4)

        def lever(map_, regularisation):
            moved = [chosen @ map_, rejected @ map_, np.linalg.solve(map_, head)]  # the same rewards
            return ellipsoid.leverage(of_kind(kind, *moved, regularisation)[0], jnp.asarray(probes @ map_))

        np.testing.assert_allclose(lever(13.0 * np.eye(4), 0.7 * 169.0), lever(np.eye(4), 0.7), rtol=1e-9)
        np.testing.assert_allclose(lever(mixing, 0.0), lever(np.eye(4), 0.0), rtol=1e-8)


@KINDS
def test_eight_devices_give_the_geometry_of_one(kind):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices (tests/conftest.py makes fake ones)")
    rows = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    chosen, rejected, head = pairs_of(64, 4, dtype=np.float32)
    make = jax.jit(lambda left, right: of_kind(kind, left, right, head, 0.5)[0])
    found = jax.block_until_ready(make(*jax.device_put((chosen, rejected), rows)))
    expected, _ = of_kind(kind, chosen, rejected, head, 0.5)
    np.testing.assert_allclose(found.cholesky, expected.cholesky, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["pair", "fisher"])
@pytest.mark.parametrize("rows", [2, 30])
def test_a_singular_covariance_is_one_sentence_with_a_remedy(kind, rows):
    chosen, rejected, head = pairs_of(rows, 5, dtype=np.float32)
    chosen[:, 4] = rejected[:, 4]  # a feature in which no pair differs
    name = "covariance of the differences" if kind == "pair" else "Fisher information of the head"
    with pytest.raises(
        ValueError, match=f"{name} of {rows} pairs and 5 features is singular .* raise the regularisation"
    ):
        of_kind(kind, chosen, rejected, head, 0.0)
    of_kind(kind, chosen, rejected, head, 0.1)


@pytest.mark.parametrize("seed", range(5))
def test_fewer_pairs_than_features_are_singular_whatever_rounding_does(seed):
    chosen, rejected, head = pairs_of(5, 8, seed, dtype=np.float32)
    with pytest.raises(ValueError, match="singular in float32 with regularisation 0"):
        of_kind("pair", chosen, rejected, head, 0.0)


def test_updates_equal_factoring_all_at_once_however_they_are_split():
    chosen, rejected, _ = pairs_of(40, 5, dtype=np.float32)
    rows = jnp.asarray(chosen - rejected)
    whole = ellipsoid.geometry(ellipsoid.gram(rows), 0.3)
    add = jax.jit(updated)
    found = ellipsoid.geometry(ellipsoid.gram(rows[:8]), 0.3)
    for start in range(8, 40, 16):
        found = add(found, rows[start : start + 16])
    np.testing.assert_allclose(found.cholesky, whole.cholesky, rtol=1e-4, atol=1e-4)
    assert np.all(np.triu(found.cholesky, 1) == 0.0) and np.all(np.diagonal(found.cholesky) > 0.0)
    np.testing.assert_array_equal(updated(whole, jnp.zeros((3, 5))).cholesky, whole.cholesky)
    np.testing.assert_array_equal(updated(whole, jnp.zeros((0, 5))).cholesky, whole.cholesky)


def test_an_update_is_woodburys_identity():
    with jax.enable_x64(True):
        chosen, rejected, _ = pairs_of(30, 5)
        before = pair_geometry(jnp.asarray(chosen), jnp.asarray(rejected), 0.3)
        generator = np.random.default_rng(3)
        rows, probes = generator.normal(size=(4, 5)), generator.normal(size=(7, 5))
        inverse = np.linalg.inv(matrix_of(before))
        small = np.linalg.inv(np.eye(4) + rows @ inverse @ rows.T)
        inverse -= inverse @ rows.T @ small @ rows @ inverse
        expected = np.einsum("nd,de,ne->n", probes, inverse, probes)
        after = updated(before, jnp.asarray(rows))
        np.testing.assert_allclose(ellipsoid.leverage(after, jnp.asarray(probes)), expected, rtol=1e-9)


def test_three_thousand_updates_in_float32_do_not_drift():
    rows = np.random.default_rng(4).normal(size=(3000, 4)).astype(np.float32)
    start = ellipsoid.Geometry(cholesky=jnp.eye(4, dtype=jnp.float32))
    found = jax.jit(lambda rows: jax.lax.scan(lambda seen, row: (updated(seen, row[None]), None), start, rows)[0])(rows)
    exact = rows.astype(np.float64).T @ rows.astype(np.float64) + np.eye(4)
    assert np.abs(matrix_of(found) - exact).max() / exact.max() < 1e-5


def newton(differences: np.ndarray, regularisation: float) -> np.ndarray:
    """The Bradley-Terry head with a Gaussian prior that has the largest posterior density."""
    head = np.zeros(differences.shape[1])
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-differences @ head))
        hessian = (differences * (p * (1.0 - p))[:, None]).T @ differences + regularisation * np.eye(len(head))
        head += np.linalg.solve(hessian, differences.T @ (1.0 - p) - regularisation * head)
    return head


@functools.cache
def brute_force(pairs: int) -> dict:
    """A head of two features after some comparisons: its Laplace posterior, and the true one on a grid."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(2, pairs, 2)) @ np.array([[1.0, 0.4], [0.0, 0.6]])
    differences = features[0] - features[1]
    won = generator.random(pairs) < 1.0 / (1.0 + np.exp(-differences @ np.array([1.0, -0.5])))
    chosen = np.where(won[:, None], features[0], features[1])
    rejected = np.where(won[:, None], features[1], features[0])
    head = newton(chosen - rejected, 1.0)
    with jax.enable_x64(True):
        sides = jnp.asarray(chosen), jnp.asarray(rejected)
        fisher, pair = fisher_geometry(*sides, {"kernel": jnp.asarray(head)}, 1.0), pair_geometry(*sides, 1.0)
    factor = np.asarray(fisher.cholesky)
    line = np.linspace(-7.0, 7.0, 281)
    white = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    heads = head + np.linalg.solve(factor.T, white.T).T
    log_density = -np.logaddexp(0.0, -(chosen - rejected) @ heads.T).sum(axis=0) - 0.5 * (heads**2).sum(axis=1)
    density = np.exp(log_density - log_density.max())
    found = {"chosen": chosen, "rejected": rejected, "fisher": fisher, "pair": pair, "head": head, "heads": heads}
    return found | {"density": density / density.sum()}


def coverage(found: dict, kind: str, level: float) -> float:
    """How much of the true posterior lies in the region that should hold `level` of it."""
    away = (found["heads"] - found["head"]) @ np.asarray(found[kind].cholesky)
    return float(found["density"][(away**2).sum(axis=1) <= chi2.ppf(level, 2)].sum())


def test_the_laplace_posterior_covers_a_brute_force_posterior():
    found = brute_force(300)
    for level in (0.5, 0.9, 0.95):
        assert coverage(found, "fisher", level) == pytest.approx(level, abs=0.01)
    # The unweighted differences say too much by p (1 - p) <= 1/4: their 90 % hold less than 1 - 0.1^(1/4).
    assert coverage(found, "pair", 0.9) < 0.45


def test_the_laplace_deviation_of_a_reward_nears_the_true_one_as_pairs_grow():
    probes = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    errors = []
    for pairs in (20, 300):
        found = brute_force(pairs)
        rewards = found["heads"] @ probes.T
        mean = found["density"] @ rewards
        exact = np.sqrt(found["density"] @ (rewards - mean) ** 2)
        with jax.enable_x64(True):
            unsure = ellipsoid.uncertainty(found["fisher"], jnp.asarray(probes), 1.0)
        errors.append(np.abs(np.asarray(unsure) / exact - 1.0).max())
    assert errors[1] < 0.01 and errors[1] < errors[0] / 3.0


def test_the_statistical_scale_is_the_mean_squared_distance_of_heads():
    found = brute_force(300)
    features = np.concatenate([found["chosen"], found["rejected"]])
    matrix, away = features.T @ features + 0.5 * np.eye(2), found["heads"] - found["head"]
    expected = found["density"] @ np.einsum("nd,de,ne->n", away, matrix, away)
    with jax.enable_x64(True):
        scale = statistical_scale(
            *map(jnp.asarray, (features.T @ features, found["chosen"], found["rejected"], found["head"])), 1.0, 0.5
        )
    assert float(scale) == pytest.approx(expected, rel=0.03)


def test_drawn_heads_have_the_mean_and_the_deviation_of_the_posterior():
    chosen, rejected, head = pairs_of(20, 3, dtype=np.float32)
    geometry = pair_geometry(jnp.asarray(chosen), jnp.asarray(rejected), 0.3)
    head = {"kernel": jnp.asarray(head), "bias": jnp.float32(0.75)}
    heads = draw_heads(jax.random.key(2), head, geometry, 1.5, 40_000)
    away = (np.asarray(heads["kernel"], np.float64) - np.asarray(head["kernel"])) @ np.asarray(geometry.cholesky) / 1.5
    np.testing.assert_allclose(away.mean(axis=0), 0.0, atol=5 / np.sqrt(40_000))
    np.testing.assert_allclose(away.T @ away / 40_000, np.eye(3), atol=5 * np.sqrt(2 / 40_000))
    probes = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32))
    scores = apply_heads(heads, probes)
    np.testing.assert_allclose(scores.std(axis=0), ellipsoid.uncertainty(geometry, probes, 1.5), rtol=0.02)
    np.testing.assert_array_equal(heads["bias"], np.full(40_000, 0.75, np.float32))


def test_with_radius_zero_all_drawn_heads_are_the_mean_and_others_differ():
    head = {"kernel": jnp.arange(3.0), "bias": jnp.float32(0.5)}
    geometry = ellipsoid.geometry(jnp.eye(3), 1.0)
    heads = draw_heads(jax.random.key(0), head, geometry, 0, 4)
    np.testing.assert_array_equal(heads["kernel"], np.tile(np.arange(3.0, dtype=np.float32), (4, 1)))
    moved = draw_heads(jax.random.key(0), head, geometry, 1, 4)["kernel"]
    assert len(np.unique(np.asarray(moved), axis=0)) == 4
    with pytest.raises(ValueError, match="0 heads cannot be drawn"):
        draw_heads(jax.random.key(0), head, geometry, 1.0, 0)


@pytest.fixture(scope="module")
def params(config) -> PosteriorParams:
    model = init_reward_model(config, jax.random.key(1))
    chosen, rejected, _ = pairs_of(30, 8, dtype=np.float32)
    return PosteriorParams(
        trunk=model["trunk"],
        head={**model["head"], "bias": jnp.float32(0.75)},
        geometry=pair_geometry(jnp.asarray(chosen), jnp.asarray(rejected), 0.5),
        radius=jnp.float32(2.0),
        offset=jnp.float32(0.25),
    )


def test_the_scorer_says_the_reward_and_its_deviation(params, config, tokens, mask, scorer):
    score = scorer(params, tokens, mask)
    plain = jax.jit(reward_scorer(config))({"trunk": params.trunk, "head": params.head}, tokens, mask)
    np.testing.assert_allclose(score.mean, plain.mean - 0.25, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(score.features, plain.features)
    inverse = np.linalg.inv(matrix_of(params.geometry))
    features = np.asarray(plain.features, np.float64)
    expected = 2.0 * np.sqrt(np.einsum("nd,de,ne->n", features, inverse, features))
    np.testing.assert_allclose(score.epistemic, expected, rtol=1e-3)
    assert score.epistemic.dtype == jnp.float32 and score.members is None and score.aleatoric is None


@pytest.mark.parametrize(("left", "right"), [(4, 0), (3, 2)])
def test_padding_does_not_matter_to_the_deviation(params, left, right, tokens, mask, scorer):
    widths = ((0, 0), (left, right))
    padded = jnp.pad(jnp.where(mask, tokens, 9), widths, constant_values=9)
    found, expected = scorer(params, padded, jnp.pad(mask, widths)), scorer(params, tokens, mask)
    np.testing.assert_allclose(found.epistemic, expected.epistemic, rtol=1e-4)


def test_rules_that_penalise_and_advpo_take_a_posterior(params, tokens, mask, scorer):
    score = scorer(params, tokens, mask)
    bound = lower_confidence_bound()
    rewards, _, metrics = bound.apply(score, None, bound.init(0.5))
    np.testing.assert_allclose(rewards, score.mean - 0.5 * score.epistemic, rtol=1e-6)
    np.testing.assert_allclose(metrics["uncertainty/mean"], score.epistemic.mean(), rtol=1e-6)
    robust = advpo()
    rewards, _, metrics = robust.apply(score, score, robust.init(params.geometry, params.radius))
    np.testing.assert_array_equal(rewards, score.mean)  # a batch equal to its reference pays nothing
    np.testing.assert_allclose(metrics["uncertainty/mean"], score.epistemic.mean(), rtol=1e-6)


def test_a_linear_ensemble_of_drawn_heads_stands_for_the_posterior(params, config, tokens, mask, scorer):
    heads = draw_heads(jax.random.key(3), params.head, params.geometry, params.radius, 4000)
    ensemble = LinearEnsembleParams(trunk=params.trunk, heads=heads, offset=jnp.full(4000, params.offset))
    found = jax.jit(linear_ensemble_scorer(config))(ensemble, tokens, mask)
    expected = scorer(params, tokens, mask)
    np.testing.assert_allclose(found.epistemic, expected.epistemic, rtol=5 / np.sqrt(2 * 4000))
    np.testing.assert_array_less(np.abs(found.mean - expected.mean), 5 * expected.epistemic / np.sqrt(4000))


def test_eight_devices_give_the_scores_of_one(params, tokens, mask, scorer):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices (tests/conftest.py makes fake ones)")
    rows = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    twice = jnp.tile(tokens, (2, 1)), jnp.tile(mask, (2, 1))
    found = jax.block_until_ready(scorer(params, *jax.device_put(twice, rows)))
    expected = scorer(params, tokens, mask)
    np.testing.assert_allclose(found.mean, np.tile(expected.mean, 2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.epistemic, np.tile(expected.epistemic, 2), rtol=1e-4)
