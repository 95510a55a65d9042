"""Changes of the inputs do what they say, for every kind of function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.icl.tasks import changes
from rlhf_jax.icl.tasks.regression import Regression, draw_function, draw_prompt, draw_regression, evaluate

CHANGES = [
    changes.scale_inputs(2.0),
    changes.keep_coordinates(2),
    changes.same_quadrant,
    changes.opposite_quadrant,
    changes.orthogonal_query,
    changes.repeated_query,
    changes.interpolated_query,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["linear", "network", "tree"])
def test_targets_are_those_of_the_changed_inputs(change, kind, key):
    setting = Regression(4, kind=kind, hidden=6, depth=2)
    function = draw_function(key, setting, 5)
    prompt = draw_prompt(key, setting, function, 3, change)
    np.testing.assert_allclose(prompt.targets, evaluate(function, prompt.inputs), atol=1e-5)
    np.testing.assert_allclose(prompt.query_target, evaluate(function, prompt.query[:, None])[:, 0], atol=1e-5)
    plain = draw_prompt(key, setting, function, 3)
    assert not np.array_equal(prompt.query, plain.query) or not np.array_equal(prompt.inputs, plain.inputs)


def test_scaled_inputs(key):
    plain, scaled = (draw_regression(key, Regression(3), 4, 6, change) for change in (None, changes.scale_inputs(3.0)))
    for name in ("inputs", "query", "targets", "query_target"):
        np.testing.assert_allclose(scaled[name], 3 * plain[name], rtol=1e-5)


def test_kept_coordinates_may_be_traced(key):
    plain = draw_regression(key, Regression(4), 5, 6)
    draw = jax.jit(lambda active: draw_regression(key, Regression(4), 5, 6, changes.keep_coordinates(active)))
    for active in (1, 3, 4):
        kept = draw(jnp.int32(active))
        for one, other in ((kept.inputs, plain.inputs), (kept.query, plain.query)):
            np.testing.assert_allclose(one[..., :active], other[..., :active], atol=1e-6)
            assert (one[..., active:] == 0).all()


def test_quadrants(key):
    plain, same, opposite = (
        draw_regression(key, Regression(3), 200, 6, change)
        for change in (None, changes.same_quadrant, changes.opposite_quadrant)
    )
    for prompt in (same, opposite):
        signs = np.sign(prompt.inputs)
        assert (signs == signs[:, :1]).all()
        np.testing.assert_allclose(np.abs(prompt.inputs), np.abs(plain.inputs), atol=1e-6)
        assert len(np.unique(signs[:, 0], axis=0)) == 8
    np.testing.assert_allclose(same.query, plain.query, atol=1e-6)
    assert (np.sign(opposite.query) == -np.sign(opposite.inputs[:, 0])).all()
    np.testing.assert_allclose(np.abs(opposite.query), np.abs(plain.query), atol=1e-6)


def test_an_orthogonal_query_keeps_its_length_and_leaves_least_squares_at_zero(key):
    plain, prompt = (draw_regression(key, Regression(8), 50, 5, change) for change in (None, changes.orthogonal_query))
    np.testing.assert_allclose(np.linalg.norm(prompt.query, axis=1), np.linalg.norm(plain.query, axis=1), rtol=1e-5)
    for inputs, targets, query in zip(prompt.inputs, prompt.targets, prompt.query, strict=True):
        np.testing.assert_allclose(inputs @ query, 0, atol=1e-4)
        weights = np.linalg.lstsq(np.asarray(inputs, np.float64), np.asarray(targets, np.float64))[0]
        assert abs(weights @ query) < 1e-4
    with pytest.raises(ValueError, match="8 examples leave no direction of 8 orthogonal to them: give at most 7"):
        draw_regression(key, Regression(8), 2, 8, changes.orthogonal_query)


def test_a_repeated_query_is_one_of_the_context(key):
    prompt = draw_regression(key, Regression(3, kind="tree"), 300, 4, changes.repeated_query)
    same = (prompt.inputs == prompt.query[:, None]).all(axis=2)
    assert (same.sum(axis=1) == 1).all()
    np.testing.assert_allclose(same.mean(axis=0), 0.25, atol=4 * np.sqrt(0.1875 / 300))
    np.testing.assert_array_equal(prompt.query_target, jnp.where(same, prompt.targets, 0).sum(axis=1))


def test_an_interpolated_query_lies_between_two_examples(key):
    prompt = draw_regression(key, Regression(1), 300, 2, changes.interpolated_query)
    low, high = prompt.inputs.min(axis=1), prompt.inputs.max(axis=1)
    assert ((low - 1e-6 <= prompt.query) & (prompt.query <= high + 1e-6)).all()
    inside = (low < prompt.query) & (prompt.query < high)
    assert 0.3 < inside.mean() < 0.7  # half of the pairs are twice the same example
