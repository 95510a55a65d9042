"""A sweep is its runs, one by one, whatever the rule and the devices; and it goes where a loop written out goes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.models.linear_attention import reduced_logits
from rlhf_jax.icl.shift import shifted
from rlhf_jax.icl.sweep import (
    Log,
    Runs,
    Sweep,
    grid,
    make_cross_entropy,
    make_loss,
    make_sweep,
    posterior_cross_entropy,
    start,
    train,
)
from rlhf_jax.icl.tasks.mixtures import bayes_logits, draw_means, draw_statistics
from rlhf_jax.parallel.lanes import over_lanes

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
MIXTURE = Mixture(2, covariance=[[1.0, 0.3], [0.3, 0.5]])
RUNS = grid(seeds=(0, 1), lengths=(3, 50), prior_scales=(0.5, 1.5))
RATE = optax.piecewise_constant_schedule(2.0, {2: 0.25})
SIZE = dict(steps=4, batch=8)


def one(runs: Runs, number: int) -> Runs:
    return Runs(*(leaf[number : number + 1] for leaf in runs))


@pytest.fixture(scope="module")
def alone():
    """The state and the log of every run, one after another on one device."""
    optimizer = optax.sgd(RATE)
    advance = make_sweep(MIXTURE, optimizer, stride=2, devices=jax.devices()[:1], **SIZE)
    return [advance(start(MIXTURE, one(RUNS, i), optimizer)) for i in range(8)]


def test_a_grid_is_every_combination():
    assert [leaf.tolist() for leaf in RUNS] == [
        [0, 1, 0, 1, 0, 1, 0, 1],
        [3, 3, 50, 50, 3, 3, 50, 50],
        [0.5, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5],
    ]


def test_a_run_is_stochastic_descent_written_out(alone):
    """Run 5: seed 1, N = 3, prior scale 1.5, which a mixture of that scale draws with plain numbers."""
    law = shifted(Mixture(2, covariance=MIXTURE.covariance, prior_scale=1.5))
    weights, trail, losses = jnp.zeros((2, 2)), [], []

    def loss(weights, key):
        for_means, for_prompts = jax.random.split(key)
        means = draw_means(for_means, law, 8)
        prompts = draw_statistics(for_prompts, law, means, 3)
        logits = reduced_logits(weights, prompts.sums, prompts.query)
        posterior = jax.nn.softmax(bayes_logits(law, means, prompts.query))
        return -jnp.mean(jnp.sum(posterior * jax.nn.log_softmax(logits), axis=-1))

    gradient_of = jax.jit(jax.value_and_grad(loss))
    for step, rate in enumerate((2.0, 2.0, 0.5, 0.5)):
        value, gradient = gradient_of(weights, jax.random.fold_in(jax.random.key(1), step))
        weights = weights - rate * gradient
        trail.append(weights)
        losses.append(value)
    lane, log = alone[5]
    np.testing.assert_allclose(lane.weights[0], weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lane.averaged[0], np.mean(trail, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log.weights[0], [trail[1], trail[3]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log.losses[0], np.mean(np.reshape(losses, (2, 2)), axis=1), rtol=1e-4)


@pytest.mark.parametrize(("rule", "devices"), [("map", 1), ("vmap", 1), ("map", 8)])
def test_a_sweep_is_its_runs_one_by_one(alone, rule, devices):
    found = train(MIXTURE, RUNS, optax.sgd(RATE), stride=2, rule=rule, devices=jax.devices()[:devices], **SIZE)
    expected = jax.tree.map(
        lambda *leaves: np.concatenate(leaves), *[(lane.weights, lane.averaged, log) for lane, log in alone]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (found.weights, found.averaged, Log(found.history, found.losses)),
        expected,
    )
    assert found.steps.tolist() == [2, 4]
    assert np.ptp(found.weights[:, 0, 0]) > 0.01  # the runs differ


def test_devices_do_not_communicate():
    optimizer = optax.sgd(RATE)
    advance = make_sweep(MIXTURE, optimizer, stride=2, rule="map", devices=jax.devices(), **SIZE)
    lanes = jax.eval_shape(lambda: start(MIXTURE, RUNS, optimizer))
    text = advance.lower(lanes).compile().as_text()
    assert "num_partitions=8" in text
    assert not [name for name in COLLECTIVES if name in text]


def test_two_calls_are_one_and_the_state_is_donated(alone):
    optimizer = optax.sgd(RATE)
    advance = make_sweep(MIXTURE, optimizer, steps=2, batch=8, average_from=3, devices=jax.devices()[:1])
    begin = start(MIXTURE, one(RUNS, 5), optimizer)
    middle, _ = advance(begin)
    end, log = advance(middle)
    assert begin.weights.is_deleted() and middle.weights.is_deleted()
    np.testing.assert_allclose(end.weights, alone[5][0].weights, rtol=1e-5)
    np.testing.assert_allclose(log.losses[:, 0], alone[5][1].losses[:, 1], rtol=1e-5)
    np.testing.assert_allclose(end.averaged, end.weights, rtol=1e-6)  # from update 3 on: the last alone
    assert end.step.tolist() == [4]


def test_traces_and_distances_by_hand():
    history = np.array([[[[1.0, 5.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 9.0]]]])
    found = Sweep(RUNS, history[:, -1], history[:, -1], np.array([1, 2]), history, np.zeros((1, 2)))
    assert found.traces.tolist() == [[1.5, 6.0]]
    np.testing.assert_allclose(found.distances(np.array([[[3.0, 0.0], [0.0, 4.0]]])), [[33**0.5 / 5, 1.0]])


def test_labels_and_posterior_have_gradients_of_one_mean(key):
    """On the same 4096 prompts the mean difference is within 4 standard errors of 0; batches give their size."""
    weights = jnp.array([[0.7, 0.1], [-0.2, 1.1]])

    def differences(key):
        hard, posterior = (
            jax.grad(make_loss(MIXTURE, 64, labels))(weights, key, jnp.int32(5), jnp.float32(1.0))
            for labels in ("hard", "posterior")
        )
        return hard - posterior

    found = np.asarray(jax.jit(over_lanes(differences, "vmap"))(jax.random.split(key, 64)))
    error = found.std(axis=0, ddof=1) / np.sqrt(64)
    assert (error > 0).all()
    assert (np.abs(found.mean(axis=0)) < 4 * error).all()


def test_posterior_cross_entropy_by_hand():
    """The posterior is (1/4, 3/4) and the model's (1/2, 1/2): log 2, whatever is added to all logits."""
    found = posterior_cross_entropy(jnp.array([[7.0, 7.0]]), jnp.log(jnp.array([[1.0, 3.0]])))
    assert float(found) == pytest.approx(np.log(2.0), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: grid((), (10,)), "a sweep without seeds has no runs"),
        (lambda: grid((0,), (0,)), "the context length N is 0"),
        (lambda: grid((0,), (10,), (-1.0,)), "the prior scale is -1.0"),
        (lambda: grid((-1,), (10,)), "the seed is -1: give a whole number of at least 0"),
        (lambda: grid((0, 2**32), (10,)), "the seed is 4294967296: give a whole number below"),
        (lambda: make_cross_entropy("Hard"), 'the labels are \'Hard\': give "posterior" or "hard"'),
        (lambda: make_sweep(MIXTURE, optax.sgd(1.0), 4, 8, average_from=-1), "first update that is averaged is -1"),
        (lambda: train(MIXTURE, RUNS, optax.sgd(1.0), 4, 8, average_from=4), "from update 4 on: give one below the 4"),
        (lambda: train(MIXTURE, RUNS, optax.sgd(1.0), 4, 8, counts="normal"), "normal counts in a context of 3 examp"),
        (lambda: make_sweep(MIXTURE, optax.sgd(1.0), 0, 8), "the number of steps is 0"),
        (lambda: make_sweep(MIXTURE, optax.sgd(1.0), 4, 0), "the batch is 0"),
        (lambda: make_sweep(MIXTURE, optax.sgd(1.0), 4, 8, stride=3), "the stride of the log is 3: give a divisor of"),
    ],
)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
