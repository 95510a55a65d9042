"""KTO against a slow oracle, and what must and must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.kto import kto, reference_point
from rlhf_jax.models.heads import init_policy, unembed
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.types import Sequences, UnpairedBatch

GOOD = jnp.array([True, False, True, True])
KEPT = np.array([0, 1, 3])


def rows(seed: int) -> Sequences:
    """Four prompts of two tokens and completions of one to four; the third row only fills the batch."""
    tokens = jax.random.randint(jax.random.key(seed), (4, 6), 5, 12, jnp.int32)
    length = jax.random.permutation(jax.random.key(seed), jnp.array([[4], [1], [3], [2]]))
    mask = jnp.concatenate([jnp.ones((4, 2), bool), jnp.arange(4)[None] < length], axis=1)
    loss_mask = mask & (jnp.arange(6)[None] >= 2) & (jnp.arange(4)[:, None] != 2)
    return Sequences(tokens=jnp.where(mask, tokens, 0), mask=mask, loss_mask=loss_mask)


@pytest.fixture(scope="module")
def batch() -> UnpairedBatch:
    return UnpairedBatch(completions=rows(1), mismatched=rows(2), good=GOOD)


@pytest.fixture(scope="module")
def reference(config):
    return jax.jit(init_policy, static_argnums=0)(config, jax.random.key(7))


@pytest.fixture(scope="module")
def plain(config):
    """Plain gradient descent with rate 0.1, and its jitted update."""
    algorithm = kto(config, optax.sgd(0.1), 0.3, 1.5, 2.0)
    return algorithm, jax.jit(algorithm.update)


@pytest.fixture(scope="module")
def begin(plain, policy, reference):
    return plain[0].init(jax.random.key(0), {"policy": policy, "reference": reference})


def slow_log_ratio(config, policy, reference, sequences):
    """log pi - log ref of the completions that count, by loops."""
    marked, tokens = np.asarray(sequences.loss_mask), np.asarray(sequences.tokens)
    totals = []
    for params in (policy, reference):
        hidden = apply_trunk(config, params["trunk"], sequences.tokens, sequences.mask).final
        logprob = np.asarray(jax.nn.log_softmax(unembed(config, params, hidden), axis=-1), np.float64)
        totals.append([sum(logprob[r, t - 1, tokens[r, t]] for t in range(6) if marked[r, t]) for r in KEPT])
    return np.subtract(*totals)


def close(found, expected, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def test_metrics_are_those_worked_out_slowly(config, policy, reference, batch, plain, begin):
    algorithm, update = plain
    assert algorithm.rollout is None
    gains = slow_log_ratio(config, policy, reference, batch.completions)
    point = max(0.0, slow_log_ratio(config, policy, reference, batch.mismatched).mean())
    good, bad = np.asarray(GOOD)[KEPT], ~np.asarray(GOOD)[KEPT]
    sigmoid = 1 / (1 + np.exp(-0.3 * (gains - point)))
    state, metrics = update(begin, batch)
    expected = {
        "loss/policy": np.where(good, 1.5 * (1 - sigmoid), 2.0 * sigmoid).mean(),
        "rewards/chosen": 0.3 * gains[good].mean(),
        "rewards/rejected": 0.3 * gains[bad].mean(),
        "rewards/margins": 0.3 * (gains[good].mean() - gains[bad].mean()),
        "kto/reference_point": point,
        "kto/weight_ratio": 1.5 * 2 / (2.0 * 1),
    }
    assert set(metrics) == {*expected, "logps/chosen", "logps/rejected", "grad_norm"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, state.reference, reference)


def test_the_reference_point_is_above_0_and_moves_the_gradient(config, policy, reference, batch, plain, begin):
    """Or the tests above and below would show nothing of it. Exchanged, policy and reference have none."""
    there = reference_point(config, policy, reference, batch.mismatched)
    back = reference_point(config, reference, policy, batch.mismatched)
    assert sorted([float(there), float(back)])[0] == 0.0 < max(float(there), float(back))
    other = batch.replace(mismatched=rows(3))
    assert float(plain[1](begin, other)[1]["grad_norm"]) != float(plain[1](begin, batch)[1]["grad_norm"])


def test_microbatches_share_the_reference_point_of_the_whole_batch(config, batch, plain, begin):
    """The point of each half is another one."""
    expected, metrics = plain[1](begin, batch)
    parts = kto(config, optax.sgd(0.1), 0.3, 1.5, 2.0, accumulate=2)
    found, found_metrics = jax.jit(parts.update)(begin, batch)
    close(found_metrics, metrics)
    close(found.params, expected.params)


def test_a_batch_of_one_row_and_impossible_options_are_refused(config, batch, plain, begin):
    with pytest.raises(ValueError, match="A batch of KTO has 1 row; its reference point needs 2 rows or more"):
        plain[0].update(begin, jax.tree.map(lambda leaf: leaf[:1], batch))
    with pytest.raises(ValueError, match="The sequences do not say where completions begin; give them a loss_mask"):
        plain[0].update(begin, batch.replace(mismatched=batch.mismatched.replace(loss_mask=None)))
    for options, name in (({"beta": -0.1}, "beta"), ({"bad_weight": 0.0}, "bad_weight")):
        with pytest.raises(ValueError, match=f"{name} is .*; it must be positive"):
            kto(config, optax.sgd(0.1), **options)
