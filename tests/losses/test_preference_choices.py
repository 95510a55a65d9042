"""Losses of pairs by name: what all of them keep to, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.losses.preference import CompletionLogprobs, dpo_loss, hinge_loss, ipo_loss, robust_dpo_loss
from rlhf_jax.losses.preference_choices import PREFERENCE_LOSSES, preference_loss
from rlhf_jax.losses.reference_free import simpo_loss

MADE = {name: preference_loss(name) for name in PREFERENCE_LOSSES} | {
    "ipo by length": preference_loss("ipo", length_norm=True)
}
COMPILED = {
    name: jax.jit(lambda found, loss=loss: (loss.pairs(found), loss.rewards(found))) for name, loss in MADE.items()
}
LOGPROBS = st.lists(st.floats(-40.0, -0.0625, width=32), min_size=12, max_size=12)
LENGTHS = st.lists(st.integers(1, 9), min_size=6, max_size=6)
SIDES = ("chosen", "rejected", "reference_chosen", "reference_rejected")


def pairs(logprobs, lengths, dtype=jnp.float32) -> CompletionLogprobs:
    """Three pairs."""
    sums, counts = np.reshape(logprobs, (4, 3)), np.reshape(lengths, (2, 3))
    return CompletionLogprobs(
        **{name: jnp.asarray(row, dtype) for name, row in zip(SIDES, sums, strict=True)},
        chosen_length=jnp.asarray(counts[0], jnp.int32),
        rejected_length=jnp.asarray(counts[1], jnp.int32),
    )


def turned(found: CompletionLogprobs) -> CompletionLogprobs:
    """With the sides exchanged."""
    return CompletionLogprobs(
        chosen=found.rejected,
        rejected=found.chosen,
        chosen_length=found.rejected_length,
        rejected_length=found.chosen_length,
        reference_chosen=found.reference_rejected,
        reference_rejected=found.reference_chosen,
    )


@pytest.mark.parametrize("name", MADE)
@given(logprobs=LOGPROBS, lengths=LENGTHS)
def test_what_all_losses_keep_to(name, logprobs, lengths):
    """Rows stand for themselves; jit changes nothing; narrow floats are raised; the larger the margin, the better."""
    loss, compiled, found = MADE[name], COMPILED[name], pairs(logprobs, lengths)
    each, (chosen, rejected) = compiled(found)
    assert each.shape == (3,) and np.isfinite(each).all()
    rounding = 1e-6 * max(1.0, float(jnp.abs(chosen).max()), float(jnp.abs(rejected).max()))
    np.testing.assert_allclose(loss.pairs(found), each, rtol=1e-5, atol=rounding)
    order = np.array([2, 0, 1])
    permuted, _ = compiled(jax.tree.map(lambda row: row[order], found))
    np.testing.assert_allclose(permuted, each[order], rtol=1e-6, atol=rounding)
    narrow = pairs(logprobs, lengths, jnp.bfloat16)
    raised = jax.tree.map(lambda row: row.astype(jnp.float32) if row.dtype == jnp.bfloat16 else row, narrow)
    np.testing.assert_array_equal(loss.pairs(narrow), loss.pairs(raised))
    assert loss.pairs(narrow).dtype == jnp.float32
    other, (second, first) = compiled(turned(found))
    np.testing.assert_array_equal(first - second, chosen - rejected)
    if name not in ("ipo", "ipo by length"):  # which has a gap that is wide enough
        better = np.asarray(chosen - rejected) > 1e-3
        assert (np.asarray(each)[better] <= np.asarray(other)[better] + rounding).all()


def test_the_table_has_the_losses_with_their_options():
    found = pairs(np.linspace(-9.0, -1.0, 12) ** 2 * -0.1, [4, 1, 2, 2, 5, 1])
    four = [found[name] for name in SIDES]
    lengths = found.chosen_length, found.rejected_length
    expected = {
        ("dpo", "beta", "label_smoothing"): (dpo_loss(*four, 0.3, 0.2), (0.3, 0.2)),
        ("robust", "beta", "flip_rate"): (robust_dpo_loss(*four, 0.3, 0.2), (0.3, 0.2)),
        ("ipo", "beta", "length_norm"): (ipo_loss(*four, 0.3, lengths), (0.3, True)),
        ("hinge", "beta"): (hinge_loss(*four, 0.3), (0.3,)),
        ("rpo", "beta", "nll_weight"): (dpo_loss(*four, 0.3), (0.3, 0.7)),
        ("simpo", "beta", "gamma"): (simpo_loss(*four[:2], *lengths, 3.0, 0.4), (3.0, 0.4)),
    }
    for (name, *options), (losses, values) in expected.items():
        made = preference_loss(name, **dict(zip(options, values, strict=True)))
        np.testing.assert_array_equal(made.pairs(found), losses)
        assert made.likelihood == (0.7 if name == "rpo" else None)
    assert {name for name, loss in MADE.items() if not loss.reference} == {"simpo", "orpo"}
    assert MADE["orpo"].likelihood_rule == "token_mean" and MADE["rpo"].likelihood_rule == "sequence_mean"
    np.testing.assert_allclose(
        MADE["orpo"].rewards(found)[0], 0.1 * found.chosen / found.chosen_length.astype(jnp.float32)
    )


def test_options_may_be_traced():
    """So that a study over coefficients is one program."""
    found = pairs(np.linspace(-9.0, -1.0, 12), [4, 1, 2, 2, 5, 1])
    betas = jnp.array([0.1, 0.4])
    losses = jax.vmap(lambda beta: preference_loss("hinge", beta=beta).pairs(found))(betas)
    np.testing.assert_allclose(losses[1], preference_loss("hinge", beta=0.4).pairs(found), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dop", {}, "no loss 'dop': choose one of dpo, robust, ipo, hinge, rpo, chi_po, simpo, orpo."),
        ("hinge", {"gamma": 0.5}, "the loss hinge does not read gamma, only beta: leave it out, or choose simpo."),
        ("dpo", {"beta": -0.1}, "beta is -0.1; it must be positive"),
        ("orpo", {"beta": 0.0}, "beta is 0.0; it must be positive"),
        ("rpo", {"nll_weight": -1.0}, "nll_weight is -1.0; it must not be negative"),
        ("robust", {"flip_rate": 0.5}, "flip_rate is 0.5; it must be at least 0 and below 1/2"),
    ],
)
def test_typos_and_impossible_values_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(name, **options)
