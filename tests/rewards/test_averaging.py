import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rewards.averaging import average_weights, stack_members
from rlhf_jax.rewards.linear_ensemble import apply_heads


def tree(seed: int, width: int = 3):
    key = jax.random.key(seed)
    kernel = jax.random.normal(key, (width, 2))
    return {"trunk": {"kernel": kernel}, "head": {"kernel": kernel[:, 0], "bias": kernel[0, 0]}}


@pytest.mark.parametrize("members", [1, 3, 4])
def test_the_average_of_one_model_several_times_is_that_model(members):
    found = average_weights(stack_members([tree(0)] * members))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1.2e-7), found, tree(0))


def test_the_average_is_that_of_every_parameter():
    trees = [tree(seed) for seed in range(3)]
    found = average_weights(stack_members(trees))
    expected = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves).astype(np.float64), axis=0), *trees)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, expected)


def test_the_average_of_linear_heads_scores_as_their_ensemble():
    heads = stack_members([tree(seed)["head"] for seed in range(3)])
    features = jax.random.normal(jax.random.key(9), (5, 3))
    average = jax.tree.map(lambda leaf: leaf[None], average_weights(heads))
    np.testing.assert_allclose(
        apply_heads(average, features)[0], apply_heads(heads, features).mean(axis=0), rtol=1e-5, atol=1e-6
    )


def test_narrow_parameters_are_summed_in_float32_and_stay_narrow():
    members = {"bias": jnp.array([512.0] + [1.0] * 511, jnp.bfloat16)}  # in bfloat16 512 + 1 is 512
    found = average_weights(members)["bias"]
    assert found.dtype == jnp.bfloat16
    assert float(found) == 2.0  # 1023 / 512 to the nearest; summed in bfloat16 it would be 1


def test_members_of_other_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"reward model 1 .* has float32\[4\] at \['head'\]\['kernel'\]"):
        stack_members([tree(0), tree(1, width=4)])
    headless = {"trunk": tree(1)["trunk"]}
    with pytest.raises(ValueError, match=r"has nothing at \['head'\]\['bias'\], and the first has float32\[\]"):
        stack_members([tree(0), headless])
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree(1))
    with pytest.raises(ValueError, match=r"bfloat16\[\]"):
        stack_members([tree(0), narrow])
    with pytest.raises(ValueError, match="no reward models to stack"):
        stack_members([])


def test_leaves_with_other_numbers_of_members_are_refused():
    with pytest.raises(ValueError, match="stack reward models of one shape"):
        average_weights({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
    with pytest.raises(ValueError, match="stack reward models of one shape"):
        average_weights({"kernel": jnp.ones((3, 2)), "bias": jnp.float32(0.0)})
