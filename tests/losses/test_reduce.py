"""Named reductions: hand-worked numbers, loops, masks, permutation, microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.reduce import REDUCTIONS, mean, reduce

VALUES = jnp.array([[1.0, 2.0, 3.0], [10.0, 5.0, 5.0], [7.0, 7.0, 7.0]])
MASK = jnp.array([[True, True, True], [True, False, False], [False, False, False]])
ARGUMENTS = [("token_mean", None), ("sequence_mean", None), ("sequence_sum", None), ("constant", 4)]


def loop(values, mask, rule, constant):
    """The reductions as loops over rows; empty rows are left out."""
    rows = [[x for x, m in zip(v, k, strict=True) if m] for v, k in zip(values, mask, strict=True)]
    rows = [row for row in rows if row]
    if rule == "token_mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if rule == "sequence_mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    if rule == "sequence_sum":
        return sum(map(sum, rows)) / len(rows)
    return sum(map(sum, rows)) / (len(rows) * constant)


def random_batch(seed=0, rows=6, steps=5):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(rows, steps)).astype(np.float32)
    lengths = generator.integers(0, steps + 1, rows)
    lengths[0] = steps
    return values, np.arange(steps)[None] < lengths[:, None]


@pytest.mark.parametrize(
    ("rule", "constant", "total", "weight"),
    [
        ("token_mean", None, 16.0, 4.0),
        ("sequence_mean", None, 12.0, 2.0),
        ("sequence_sum", None, 16.0, 2.0),
        ("constant", 4, 16.0, 8.0),
    ],
)
def test_totals_and_weights_worked_by_hand(rule, constant, total, weight):
    assert [float(x) for x in reduce(VALUES, MASK, rule, constant)] == [total, weight]
    assert float(mean(VALUES, MASK, rule, constant)) == total / weight


@pytest.mark.parametrize(("rule", "constant"), ARGUMENTS)
def test_mean_equals_a_loop_and_its_jitted_self(rule, constant):
    values, mask = random_batch()
    got = mean(jnp.asarray(values), jnp.asarray(mask), rule, constant)
    np.testing.assert_allclose(got, loop(values.tolist(), mask, rule, constant), rtol=1e-6)
    jitted = jax.jit(lambda v, m: mean(v, m, rule, constant))(jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_allclose(jitted, got, rtol=1e-6)


@pytest.mark.parametrize(("rule", "constant"), ARGUMENTS)
@pytest.mark.parametrize("junk", [5.0, np.nan, np.inf, -np.inf])
def test_masked_positions_enter_neither_value_nor_gradient(rule, constant, junk):
    values, mask = random_batch()
    spoilt = jnp.asarray(np.where(mask, values, junk).astype(np.float32))
    function = jax.value_and_grad(lambda v: mean(v, jnp.asarray(mask), rule, constant))
    value, gradient = function(jnp.asarray(values))
    spoilt_value, spoilt_gradient = function(spoilt)
    assert float(value) == float(spoilt_value)
    np.testing.assert_array_equal(gradient, spoilt_gradient)
    assert not np.asarray(gradient)[~mask].any()


@pytest.mark.parametrize(("rule", "constant"), ARGUMENTS)
def test_rows_may_be_permuted_and_empty_rows_added(rule, constant):
    values, mask = random_batch()
    order = np.random.default_rng(1).permutation(len(values))
    expected = mean(jnp.asarray(values), jnp.asarray(mask), rule, constant)
    permuted = mean(jnp.asarray(values[order]), jnp.asarray(mask[order]), rule, constant)
    np.testing.assert_allclose(permuted, expected, rtol=1e-6)
    padded_values = jnp.concatenate([jnp.asarray(values), jnp.full((3, values.shape[1]), jnp.nan)])
    padded_mask = jnp.concatenate([jnp.asarray(mask), jnp.zeros((3, values.shape[1]), bool)])
    np.testing.assert_allclose(mean(padded_values, padded_mask, rule, constant), expected, rtol=1e-6)


@pytest.mark.parametrize(("rule", "constant"), ARGUMENTS)
def test_nothing_unmasked_gives_zero_and_zero_gradient(rule, constant):
    empty = jnp.zeros((2, 3), bool)
    value, gradient = jax.value_and_grad(lambda v: mean(v, empty, rule, constant))(jnp.full((2, 3), jnp.nan))
    assert float(value) == 0.0
    assert not np.asarray(gradient).any()


def test_float_masks_equal_boolean_ones_and_weigh_tokens():
    for rule, constant in ARGUMENTS:
        assert float(mean(VALUES, MASK, rule, constant)) == float(
            mean(VALUES, MASK.astype(jnp.float32), rule, constant)
        )
    assert float(mean(jnp.array([[1.0, 4.0]]), jnp.array([[1.0, 0.5]]))) == 2.0


def test_half_precision_is_summed_in_float32():
    ones = jnp.ones((1, 1000), jnp.bfloat16)
    total, weight = reduce(ones, jnp.ones((1, 1000), bool), "token_mean")
    assert total.dtype == weight.dtype == jnp.float32
    assert float(total) == float(weight) == 1000.0


def test_wrong_rules_and_constants_are_errors_that_name_the_choices():
    with pytest.raises(ValueError, match="token_mean, sequence_mean, sequence_sum, constant"):
        reduce(VALUES, MASK, "mean")
    with pytest.raises(ValueError, match="needs a positive constant"):
        reduce(VALUES, MASK, "constant")
    with pytest.raises(ValueError, match="needs a positive constant"):
        mean(VALUES, MASK, "constant", constant=0)
    for rule in REDUCTIONS[:3]:
        with pytest.raises(ValueError, match="takes no constant"):
            reduce(VALUES, MASK, rule, constant=4)


@pytest.mark.parametrize(("rule", "constant"), ARGUMENTS)
def test_eight_devices_give_the_number_of_one(rule, constant):
    values, mask = (jnp.asarray(x) for x in random_batch(rows=16))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = jax.jit(lambda v, m: mean(v, m, rule, constant))(*(jax.device_put(x, rows) for x in (values, mask)))
    np.testing.assert_allclose(jax.block_until_ready(spread), mean(values, mask, rule, constant), rtol=1e-6)
