"""What uncertainty is worth, on panels whose answer is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.laboratory.uncertainty_panel import MEASURES, Panel, begun, measure, moved, written
from rlhf_jax.types import Prompts, Sequences

PARTS = {
    "initial": slice(0, 40),
    "chosen": slice(40, 60),
    "rejected": slice(60, 80),
    "moved": slice(80, 120),
    "answers": slice(120, 136),
    "along": slice(136, 168),
}


@pytest.fixture
def panel():
    """Two seeds; 4 reports of 8 responses to 2 prompts."""
    gold = np.random.default_rng(0).normal(size=(2, 168))
    return Panel(sequences=None, gold=gold, parts=PARTS, prompts=2, reports=4, best_of=8)


def test_a_perfect_score_is_right_everywhere(panel):
    found = measure(panel, {"mean": panel.gold}, np.ones(2)).values
    wrong_labels = panel.gold[:, PARTS["chosen"]] < panel.gold[:, PARTS["rejected"]]
    assert wrong_labels.any()  # accuracy is by the gold, whatever the annotator said
    for name in ("accuracy", "optimised_accuracy", "margin_area"):
        np.testing.assert_array_equal(found[name], 1.0)
    np.testing.assert_allclose(
        found["best_gold"], panel.gold[:, PARTS["answers"]].reshape(2, 2, 8).max(axis=-1).mean(axis=-1)
    )
    for name in ("initial_correlation", "moved_auroc", "area", "member_correlation"):
        assert np.isnan(found[name]).all()
    assert set(found) == set(MEASURES)


def test_uncertainty_that_is_the_error_finds_it(panel):
    rng = np.random.default_rng(1)
    error = rng.normal(size=panel.gold.shape)
    uncertainty = np.abs(error)
    uncertainty[:, PARTS["moved"]] += 100.0
    scores = {"mean": panel.gold + error, "epistemic": uncertainty, "aleatoric": -uncertainty}
    found = measure(panel, scores, np.ones(2))
    np.testing.assert_allclose(found.values["initial_correlation"], 1.0)
    np.testing.assert_allclose(found.values["optimised_correlation"], 1.0)
    np.testing.assert_array_equal(found.values["moved_auroc"], 1.0)
    halves = (found.values["surest_half"] + found.values["other_half"]) / 2
    np.testing.assert_allclose(halves, found.values["accuracy"])
    along = uncertainty[:, PARTS["along"]].reshape(2, 4, 8).mean(axis=-1)
    np.testing.assert_allclose(found.uncertainty, along)
    np.testing.assert_allclose(found.error, along)


def test_without_epistemic_uncertainty_the_aleatoric_one_is_taken(panel):
    uncertainty = np.random.default_rng(1).random(panel.gold.shape)
    alone, beside = (
        measure(panel, {"mean": panel.gold, name: uncertainty}, np.ones(2)).values
        for name in ("aleatoric", "epistemic")
    )
    np.testing.assert_array_equal(alone["optimised_auroc"], beside["optimised_auroc"])


def test_only_the_second_half_of_a_run_counts_as_optimised(panel):
    uncertainty = np.zeros(panel.gold.shape)
    uncertainty[:, 136:152] = 1.0  # the first half
    found = measure(panel, {"mean": panel.gold, "epistemic": uncertainty}, np.ones(2)).values
    np.testing.assert_array_equal(found["optimised_auroc"], 0.5)


def test_new_prompts_are_not_taken_for_optimised_responses(panel):
    uncertainty = np.zeros(panel.gold.shape)
    uncertainty[:, 120:] = 1.0  # all answers to held-out prompts, the initial policy's too
    found = measure(panel, {"mean": panel.gold, "epistemic": uncertainty}, np.ones(2)).values
    np.testing.assert_array_equal(found["optimised_auroc"], 0.5)


def test_margins_are_calibrated_in_their_own_unit(panel):
    scores = {"mean": np.zeros_like(panel.gold)}
    scores["mean"][:, PARTS["chosen"]] = 1.0
    found = measure(panel, scores, np.array([2.0, 4.0])).values
    np.testing.assert_allclose(found["calibration_error"], 1.0 / (1.0 + np.exp([2.0, 4.0])))  # all labels agree


def test_the_uncertainty_of_a_pair_leaves_out_what_its_sides_share(panel):
    rng = np.random.default_rng(2)
    members = np.stack([panel.gold, -panel.gold], axis=1)
    shared = measure(panel, {"mean": panel.gold, "members": members, "epistemic": np.abs(panel.gold)}, np.ones(2))
    np.testing.assert_allclose(shared.values["member_correlation"], -1.0)
    members = panel.gold[:, None] + rng.normal(size=(2, 3, 1))  # members that differ by constants agree
    same = measure(panel, {"mean": panel.gold, "members": members, "epistemic": np.ones_like(panel.gold)}, np.ones(2))
    np.testing.assert_allclose(same.values["member_correlation"], 1.0)


def test_responses_move_to_the_next_prompt():
    tokens = jnp.array([[1, 2, 30], [3, 4, 40]])
    found = moved(Sequences(tokens=tokens, mask=tokens > 1), 2)
    assert found.tokens.tolist() == [[3, 4, 30], [1, 2, 40]]
    assert found.mask.tolist() == [[True, True, True], [False, True, True]]


def test_all_kinds_begin_with_the_same_policy(panel):
    first = {"kl": np.zeros(2, np.float32), "proxy": np.ones(2, np.float32)}
    found = begun(first, panel, panel.gold, rules=3)
    assert found["kl"].shape == (6,)
    np.testing.assert_allclose(found["proxy"], np.tile(panel.gold[:, 136:144].mean(axis=1), 3), rtol=1e-6)


def test_what_policies_wrote_stands_after_its_prompt():
    prompts = Prompts(tokens=jnp.array([[1], [2]]), mask=jnp.ones((2, 1), bool), index=jnp.arange(2))
    tokens = np.arange(10, 18).reshape(1, 2, 4, 1)  # two reports of two responses to either prompt
    found = written(prompts, tokens, tokens > 10)
    assert found.tokens[0].tolist() == [[1, 10], [1, 11], [2, 12], [2, 13], [1, 14], [1, 15], [2, 16], [2, 17]]
    assert found.mask[0, 0].tolist() == [True, False]
