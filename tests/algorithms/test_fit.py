import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.fit import epoch_orders, fit


def test_a_pass_takes_no_row_twice(key):
    orders = np.asarray(epoch_orders(key, examples=12, batch_size=4, epochs=3)).reshape(3, 12)
    assert all(sorted(each) == list(range(12)) for each in orders.tolist())


def test_every_pass_has_its_own_order_and_drops_other_rows(key):
    orders = np.asarray(epoch_orders(key, examples=11, batch_size=4, epochs=6)).reshape(6, 8)
    assert len({tuple(each) for each in orders.tolist()}) == 6
    assert all(len(set(each)) == 8 for each in orders.tolist())
    assert len({frozenset(range(11)) - frozenset(each) for each in orders.tolist()}) > 1


def test_keys_give_orders(key):
    first, again = (np.asarray(epoch_orders(key, 8, 2, 2)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != np.asarray(epoch_orders(jax.random.key(1), 8, 2, 2))).any()


def test_data_that_fill_no_minibatch_are_refused(key):
    with pytest.raises(ValueError, match="3 examples do not fill one minibatch of 4; lower the batch size"):
        epoch_orders(key, examples=3, batch_size=4, epochs=1)


def test_fit_is_a_loop_over_minibatches(key):
    data = {"x": jnp.arange(10.0), "y": jnp.arange(20.0).reshape(10, 2)}
    order = epoch_orders(key, 10, 3, 2)

    def update(state, batch):
        state = 0.5 * state + batch["x"].sum() + batch["y"].mean()
        return state, {"state": state}

    found, metrics = jax.jit(lambda start: fit(update, start, data, order))(jnp.array(1.0))
    state, seen = 1.0, []
    for rows in np.asarray(order):
        state = 0.5 * state + np.asarray(data["x"])[rows].sum() + np.asarray(data["y"])[rows].mean()
        seen.append(state)
    np.testing.assert_allclose(found, state, rtol=1e-6)
    np.testing.assert_allclose(metrics["state"], seen, rtol=1e-6)
