import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import kstest

from rlhf_jax.icl.claims.generality import against_monte_carlo, predictions, random_setting, raw_prompts
from rlhf_jax.icl.mixture import Mixture


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_raw_prompts_agree_with_theory(seed: int) -> None:
    rows = against_monte_carlo(*random_setting(seed), prompts=1500, seed=seed, points=2**11)
    assert len(rows) == 10
    assert [row for row in rows if not row.passed] == []


def test_a_wrong_prediction_is_seen() -> None:
    """Prompts of one mixture beside the theory of another, of the same shapes."""
    rows = against_monte_carlo(Mixture(3), 20, 50, prompts=4000, points=2**11)
    other = predictions(Mixture(3, prior_scale=1.4), 20, 50, points=2**11)
    by_name = {row.quantity.split(" (")[0]: row for row in rows}
    for name, value in (
        ("loss at W*", other.loss.mean),
        ("total variation at W* and M", other.total_variation.mean),
        ("loss of Bayes", other.bayes_loss.mean),
        ("(c/2) lambda_max at W=0", other.smoothness),
    ):
        row = by_name[name]
        assert row.passed
        assert abs(row.measured - value) > 3 * row.standard_error, name


def test_a_row_beyond_the_errors_is_measured_again() -> None:
    rows = against_monte_carlo(Mixture(1), 5, 5, prompts=200, points=2**6, errors=0.0)
    assert all(row.quantity.endswith("(d=1, c=2, N=5, M=5), measured again") for row in rows)
    once = against_monte_carlo(Mixture(1), 5, 5, prompts=200, points=2**6, errors=100.0)
    assert [row.quantity + ", measured again" for row in once] == [row.quantity for row in rows]


def test_predictions_hang_together() -> None:
    mixture = Mixture(2, 3, [[1.0, 0.3], [0.3, 0.5]])
    found = predictions(mixture, 40, 60, points=2**12)
    assert found.bayes_loss.mean < found.loss.mean < np.log(3)
    assert 0 < found.total_variation.mean < found.total_variation_bound.mean
    assert 0 < found.bayes_error.mean < 2 / 3
    eigenvalues = np.linalg.eigvalsh(found.hessian)
    assert found.curvature.mean == pytest.approx(eigenvalues[0])
    assert eigenvalues[-1] < found.smoothness
    # 40 G is some way from G1 yet, and has its sign.
    scaled = 40 * (found.weights / 3 - mixture.inverse)
    assert 0.2 < np.trace(scaled) / np.trace(found.first_order) < 1
    with pytest.raises(ValueError, match="the test length M is 0"):
        predictions(mixture, 40, 0)


def test_raw_prompts_are_those_of_the_definition() -> None:
    mixture = Mixture(3, 3, [[1.0, 0.4, 0.1], [0.4, 0.8, -0.2], [0.1, -0.2, 0.6]], prior_scale=0.7)
    prompts = raw_prompts(mixture, 8, 3, 4000, np.random.default_rng(0))
    lengths = np.einsum("nkd,de,nke->nk", prompts.means, mixture.inverse, prompts.means)
    np.testing.assert_allclose(lengths, lengths[:, :1] * np.ones(3), rtol=1e-9)
    assert kstest(prompts.means[:, 0, 1] / 0.7, "norm").pvalue > 1e-3
    # A coordinate of a uniform direction in three dimensions is uniform on [-1, 1].
    whitened = prompts.means @ (mixture.inverse @ mixture.root)
    cosine = np.sum(whitened[:, 1] * whitened[:, 2], axis=1) / lengths[:, 0]
    assert kstest(cosine, "uniform", args=(-1, 2)).pvalue > 1e-3
    a = np.einsum("nkd,nd->nk", prompts.means @ mixture.inverse, prompts.query)
    right = softmax(a, axis=1)[np.arange(4000), prompts.label]
    assert np.mean(right) == pytest.approx(np.mean(np.sum(softmax(a, axis=1) ** 2, axis=1)), abs=0.02)
    assert prompts.sums.shape == prompts.test_sums.shape == (4000, 3, 3)
    assert not np.allclose(prompts.sums, prompts.test_sums)


def test_predictions_made_before_are_used() -> None:
    mixture = Mixture(2)
    theory = predictions(mixture, 10, 20, points=2**8, seeds=2)
    given_, own = (
        against_monte_carlo(mixture, 10, 20, prompts=100, points=2**8, seeds=2, errors=100.0, theory=one)
        for one in (theory, None)
    )
    assert given_ == own
    wrong = theory._replace(loss=theory.loss._replace(mean=0.123))
    rows = against_monte_carlo(mixture, 10, 20, 100, points=2**8, seeds=2, errors=1e6, theory=wrong)
    assert rows[0].predicted == 0.123
    for numbers in ({"seeds": 1}, {"prompts": 1}):
        with pytest.raises(ValueError, match="is 1: give a whole number of at least 2"):
            against_monte_carlo(mixture, 10, 20, **numbers)
