"""On-policy losses and advantages against values that other software computed, in float64 and in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.advantages import gae, token_rewards, whiten
from rlhf_jax.losses.credit import group_centred, group_standardised, leave_one_out, whitened_return
from rlhf_jax.losses.kl import kl_estimate
from rlhf_jax.losses.policy import clipped_surrogate, reinforce_surrogate, sequence_log_ratio, token_log_ratio
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.value import clipped_value_loss

SAMPLES = 4
PATHS = [
    ("kl_token_mean", "k1"),
    ("kl_token_mean", "k2"),
    ("kl_token_mean", "k3"),
    ("adv", "grpo_ddof1_eps1e-4"),
    ("adv", "dr_grpo"),
    ("adv", "rloo"),
    ("grpo",),
    ("dr_grpo_C5",),
    ("dapo_nofilter",),
    ("gspo_eps_.0003_.0004",),
    ("gspo_eps_.2",),
    ("rloo_kl.05", "adv"),
    ("rloo_kl.05", "loss_seq_sum"),
    ("ppo", "adv"),
    ("ppo", "policy_token_mean"),
    ("ppo", "value_token_mean"),
    ("reinforce_pp",),
]


def ours(inputs, dtype):
    """What the package makes of the inputs: the values of `PATHS`."""
    names = ("logp", "old", "ref", "mask", "values", "old_values", "rewards")
    logprob, old, reference, mask, values, old_values, scores = (jnp.asarray(inputs[name], dtype) for name in names)
    scores = scores.reshape(-1)
    kl = {kind: kl_estimate(logprob, reference, kind) for kind in ("k1", "k2", "k3")}
    plain = token_rewards(scores, kl["k1"], mask, 0.0)
    penalised = token_rewards(scores, kl["k1"], mask, 0.05)
    standardised, centred = (method(plain, mask, SAMPLES) for method in (group_standardised, group_centred))
    penalised_left_out = leave_one_out(penalised, mask, SAMPLES)
    advantages, returns = gae(penalised, old_values, mask, 1.0, 0.95)

    def clipped(ratio, advantages, clip_low, clip_high):
        return clipped_surrogate(logprob, ratio(logprob, old, mask), advantages, clip_low, clip_high)

    token, sequence = token_log_ratio, sequence_log_ratio
    reinforce = reinforce_surrogate(logprob, jnp.zeros_like(logprob), penalised_left_out, 0.2, 0.2)
    return {
        **{("kl_token_mean", kind): mean(estimates, mask) for kind, estimates in kl.items()},
        # The first token of a response is never masked; it has the advantage of them all.
        ("adv", "grpo_ddof1_eps1e-4"): standardised[:, 0],
        ("adv", "dr_grpo"): centred[:, 0],
        ("adv", "rloo"): leave_one_out(plain, mask, SAMPLES)[:, 0],
        ("grpo",): mean(clipped(token, standardised, 0.2, 0.2) + 0.04 * kl["k3"], mask, "sequence_mean"),
        ("dr_grpo_C5",): mean(clipped(token, centred, 0.2, 0.2), mask, "constant", 5),
        ("dapo_nofilter",): mean(clipped(token, standardised, 0.2, 0.28), mask, "token_mean"),
        ("gspo_eps_.0003_.0004",): mean(clipped(sequence, standardised, 3e-4, 4e-4), mask, "sequence_mean"),
        ("gspo_eps_.2",): mean(clipped(sequence, standardised, 0.2, 0.2), mask, "sequence_mean"),
        ("rloo_kl.05", "adv"): penalised_left_out[:, 0],
        ("rloo_kl.05", "loss_seq_sum"): mean(reinforce, mask, "sequence_sum"),
        ("ppo", "adv"): advantages,
        ("ppo", "policy_token_mean"): mean(clipped(token, whiten(advantages, mask), 0.2, 0.2), mask),
        ("ppo", "value_token_mean"): mean(clipped_value_loss(values, old_values, returns, 0.2), mask),
        ("reinforce_pp",): mean(clipped(token, whitened_return(penalised, mask, SAMPLES), 0.2, 0.2), mask),
    }


@pytest.fixture(scope="module", params=[(jnp.float64, 1e-6), (jnp.float32, 1e-4)], ids=["float64", "float32"])
def computed(request, golden_losses):
    """What the package computes in a dtype, that dtype, and how near it must come."""
    dtype, tolerance = request.param
    with jax.enable_x64(dtype == jnp.float64):
        values = ours(golden_losses["inputs"], dtype)
        return {path: np.asarray(value) for path, value in values.items()}, dtype, tolerance


@pytest.mark.parametrize("path", PATHS, ids="/".join)
def test_value_matches_the_golden_one(computed, golden_losses, path):
    values, dtype, tolerance = computed
    expected = golden_losses
    for name in path:
        expected = expected[name]
    assert values[path].dtype == dtype
    np.testing.assert_allclose(values[path], expected, rtol=tolerance, atol=tolerance * 1e-2)
