import numpy as np
import pytest

from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import Shift, shifted

SHIFTS = {
    "none": Shift(),
    "classes": Shift(class_probabilities=(0.2, 0.5, 0.3)),
    "covariance": Shift(covariance=((2.0, 0.3), (0.3, 0.5))),
    "norms": Shift(norm_ratios=(1.0, 1.5, 0.5)),
    "all": Shift((0.2, 0.5, 0.3), ((2.0, 0.3), (0.3, 0.5)), (1.0, 1.5, 0.5), 0.1, 2.0),
}
MIXTURE = Mixture(2, classes=3, covariance=((1.0, 0.2), (0.2, 0.7)))


@pytest.mark.parametrize("name", SHIFTS)
def test_logits_are_those_of_bayes_rule(name):
    """Against the densities themselves; the means have equal lengths before the ratios."""
    law = shifted(MIXTURE, SHIFTS[name])
    rng = np.random.default_rng(0)
    whitened = rng.normal(size=(5, 3, 2))
    whitened *= np.linalg.norm(whitened[:, :1], axis=2, keepdims=True) / np.linalg.norm(whitened, axis=2, keepdims=True)
    means, query = whitened @ MIXTURE.root * law.norm_ratios[:, None], rng.normal(size=(5, 2))
    logits = law.logits(means, query)
    for row in range(5):
        apart = query[row] - means[row]
        density = law.probabilities * np.exp(-np.einsum("kd,de,ke->k", apart, np.linalg.inv(law.covariance), apart) / 2)
        expected = density / density.sum()
        np.testing.assert_allclose(np.exp(logits[row]) / np.exp(logits[row]).sum(), expected, rtol=1e-12)


def test_logits_are_linear_where_the_lengths_are_equal():
    law = shifted(MIXTURE, Shift(covariance=2 * MIXTURE.matrix))
    assert law.unbiased and not shifted(MIXTURE, SHIFTS["norms"]).unbiased
    assert not shifted(MIXTURE, SHIFTS["covariance"]).unbiased and not shifted(MIXTURE, SHIFTS["classes"]).unbiased


def test_the_confusion_of_labels():
    expected = [[0.7, 0.15, 0.15], [0.15, 0.7, 0.15], [0.15, 0.15, 0.7]]
    np.testing.assert_allclose(shifted(MIXTURE, Shift(label_noise=0.3)).confusion, expected)


@pytest.mark.parametrize(
    ("shift", "sentence"),
    [
        (Shift(class_probabilities=(0.5, 0.4, 0.2)), "sum to 1.1"),
        (Shift(class_probabilities=(0.5, 0.5)), "2 class probabilities for 3 classes"),
        (Shift(covariance=((1.0, 2.0), (2.0, 1.0))), "eigenvalues are all positive"),
        (Shift(norm_ratios=(1.0, 1.0)), "give 3 numbers above 0"),
        (Shift(norm_ratios=(1.0, 0.0, 1.0)), "give 3 numbers above 0"),
        (Shift(label_noise=1.5), "label noise is 1.5: give a probability"),
        (Shift(prior_scale=-1.0), "prior scale of the test is -1.0"),
    ],
)
def test_impossible_shifts_are_refused(shift, sentence):
    with pytest.raises(ValueError, match=sentence):
        shifted(MIXTURE, shift)
