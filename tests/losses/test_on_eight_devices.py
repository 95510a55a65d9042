"""Every loss and its gradient, of rows that lie on eight devices, are those of one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.methods import METHODS
from rlhf_jax.losses.imitation import top_rows, var_weights, weighted_likelihood_loss
from rlhf_jax.losses.nash import nash_md_loss
from rlhf_jax.losses.policy import ratio_metrics
from rlhf_jax.losses.preference import CompletionLogprobs, xpo_loss
from rlhf_jax.losses.preference_choices import PREFERENCE_LOSSES
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.unpaired import kto_loss, kto_reference_point
from rlhf_jax.losses.value import clipped_value_loss
from rlhf_jax.parallel.mesh import MeshShape, make_mesh

ROWS, STEPS, SAMPLES = 32, 5, 4


def batch():
    """Responses of several lengths, one of them empty; groups, and pairs, follow each other."""
    keys = jax.random.split(jax.random.key(0), 4)
    old, reference, values = (0.5 * jax.random.normal(key, (ROWS, STEPS)) - 1.0 for key in keys[:3])
    lengths = jnp.asarray(np.random.default_rng(0).integers(1, STEPS + 1, ROWS)).at[5].set(0)
    mask = jnp.arange(STEPS)[None] < lengths[:, None]
    rewards = (
        jnp.zeros((ROWS, STEPS))
        .at[jnp.arange(ROWS), jnp.maximum(lengths - 1, 0)]
        .set(jax.random.normal(keys[3], (ROWS,)))
    )
    return {"old": old, "reference": reference, "values": values, "mask": mask, "rewards": rewards}


def policy_gradient(name, logprob, given):
    chosen, mask = METHODS[name], given["mask"]
    advantages = chosen.advantages(given["rewards"], mask, SAMPLES)
    log_ratio = chosen.ratio(logprob, given["old"], mask)
    losses = chosen.surrogate(logprob, log_ratio, advantages, chosen.clip_low, chosen.clip_high)
    return mean(losses, mask, chosen.reduction, STEPS if chosen.reduction == "constant" else None)


def sums(logprob, given):
    """Sums of log-probabilities of the responses under policy and reference."""
    return tuple(jnp.where(given["mask"], array, 0.0).sum(axis=1) for array in (logprob, given["reference"]))


def pairs_of(logprob, given):
    own, reference = sums(logprob, given)
    lengths = jnp.maximum(given["mask"].sum(axis=1), 1)
    sides = {"chosen": 0, "rejected": 1}
    return CompletionLogprobs(
        **{side: own[start::2] for side, start in sides.items()},
        **{f"{side}_length": lengths[start::2] for side, start in sides.items()},
        **{f"reference_{side}": reference[start::2] for side, start in sides.items()},
    )


def preference(name, logprob, given):
    return PREFERENCE_LOSSES[name]().pairs(pairs_of(logprob, given)).mean()


def xpo(logprob, given):
    pairs = pairs_of(logprob, given)
    ranked = (pairs.chosen, pairs.rejected, pairs.reference_chosen, pairs.reference_rejected)
    return xpo_loss(*ranked, pairs.rejected, 0.1, 0.01).mean()


def nash_md(logprob, given):
    own, reference = sums(logprob, given)
    return nash_md_loss(own, reference, jax.nn.sigmoid(given["rewards"].sum(axis=1)), 0.1).mean()


def kto(logprob, given):
    own, reference = sums(logprob, given)
    counted = given["mask"].any(axis=1)
    point = kto_reference_point(jnp.roll(own, 1), jnp.roll(reference, 1), counted)
    return mean(kto_loss(own, reference, given["rewards"].sum(axis=1) > 0, point, 0.1)[:, None], counted[:, None])


def var(logprob, given):
    weights = var_weights(given["rewards"].sum(axis=1), SAMPLES, 0.5)
    return weighted_likelihood_loss(logprob, weights, given["mask"], SAMPLES, "sequence_sum")


def raft(logprob, given):
    rows = top_rows(given["rewards"].sum(axis=1), SAMPLES, 1)
    return weighted_likelihood_loss(logprob[rows], jnp.ones(len(rows)), given["mask"][rows], 1, "token_mean")


def value_loss(logprob, given):
    return mean(clipped_value_loss(logprob, given["values"], given["rewards"], 0.2), given["mask"])


LOSSES = {
    **{name: partial(policy_gradient, name) for name in METHODS},
    **{name: partial(preference, name) for name in PREFERENCE_LOSSES},
    "xpo": xpo,
    "nash_md": nash_md,
    "kto": kto,
    "var": var,
    "raft": raft,
    "value": value_loss,
}


@jax.jit
def every_loss(logprob, given):
    found = {name: jax.value_and_grad(loss)(logprob, given) for name, loss in LOSSES.items()}
    chosen = METHODS["grpo"]
    return found, ratio_metrics(chosen.ratio(logprob, given["old"], given["mask"]), given["mask"], 0.2, 0.2)


def test_rows_on_eight_devices_give_the_losses_and_gradients_of_one():
    given = batch()
    logprob = given["old"] + 0.3 * jax.random.normal(jax.random.key(7), (ROWS, STEPS))
    expected = every_loss(logprob, given)
    rows = jax.NamedSharding(make_mesh(MeshShape(data=8)), jax.P("data"))
    found = jax.block_until_ready(every_loss(*jax.device_put((logprob, given), rows)))
    assert all(float(jnp.abs(gradient).max()) > 0 for _, gradient in expected[0].values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)
