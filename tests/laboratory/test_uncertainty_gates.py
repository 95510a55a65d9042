"""Checks that pass where an effect was planted, fail where its opposite was, and are left out where nothing was run."""

import numpy as np

from rlhf_jax.evaluation.frontier import Curves
from rlhf_jax.laboratory.uncertainty_gates import along, gates, in_standard_errors, rows_of
from rlhf_jax.laboratory.uncertainty_panel import MEASURES, Measured

SEEDS = np.array([0.0, 0.1, -0.1])


def curves(*gold: float) -> Curves:
    """Three seeds around these measurements; KL rises by 4 nats a measurement."""
    values = np.array(gold)[None] + SEEDS[:, None] * np.linspace(1.0, 2.0, len(gold))[None]
    kl = np.broadcast_to(4.0 * np.arange(len(gold)), values.shape).copy()
    return Curves(samples=64 * np.arange(len(gold)), kl=kl, gold=values, proxy=values)


def measured(doubt, error, **values: float) -> Measured:
    every = {name: values.get(name, np.nan) + SEEDS for name in MEASURES}
    return Measured(every, *(np.array(line)[None] + SEEDS[:, None] * 0.1 for line in (doubt, error)))


def passed(kinds, policies):
    return {check["name"]: check["pass"] for check in gates(kinds, policies, "ppo")}


PLAIN = {("single", "ppo", "mean"): curves(0.0, 1.0, -1.0)}


def test_last_layer_uncertainty_that_rises_with_the_error():
    rising, falling = [0.0, 1.0, 3.0], [3.0, 1.0, 0.0]
    kinds = {"posterior": measured(rising, rising), "starts": measured(falling, rising)}
    found = passed(kinds, PLAIN)
    assert [found[name] for name in found if name.startswith("last-layer")] == [True, True]
    assert found["the same minus that of the ensemble (starts)"]
    kinds = {"posterior": measured(falling, rising), "starts": measured(rising, rising)}
    found = passed(kinds, PLAIN)
    assert not any(found[name] for name in found if name.startswith(("last-layer", "the same")))


def test_a_study_without_a_fall_is_void():
    name = "plain ppo: fall of gold from its peak, in standard errors"
    assert passed({}, PLAIN) == {name: True}
    assert passed({}, {("single", "ppo", "mean"): curves(0.0, 0.5, 1.0)}) == {name: False}


def test_adversarial_policies_end_higher_and_are_compared_at_equal_kl():
    better = passed({}, PLAIN | {("single", "ppo", "AdvPO"): curves(0.0, 1.0, 1.0)})
    assert len(better) == 3 and all(better.values())
    worse = passed({}, PLAIN | {("single", "ppo", "AdvPO"): curves(0.0, -1.0, -3.0)})
    assert list(worse.values()) == [True, False, False]


def test_ensembles_end_higher_and_fall_less():
    policies = PLAIN | {
        ("seeds", "ppo", "mean"): curves(0.0, 1.0, 0.0),
        ("seeds", "ppo", "WCO"): curves(0.0, 1.0, 0.5),
        ("seeds", "ppo", "UWO"): curves(0.0, 1.0, -2.0),
        ("seeds", "grpo", "mean"): curves(0.0, 9.0, 9.0),  # another algorithm is not judged
    }
    found = passed({}, policies)
    assert found["best ensemble (seeds, WCO) minus plain: final gold"]
    assert found["seeds: fall of the mean minus that of WCO"]
    assert not found["seeds: fall of the mean minus that of UWO"]
    # Plain PPO falls by 2: WCO falls less, UWO more.
    assert found["seeds: fall of plain ppo minus that of WCO"]
    assert not found["seeds: fall of plain ppo minus that of UWO"]


def test_adapters_against_heads():
    flat = [0.0, 0.0]
    gold = {"single": 1.0, "linear": 2.0, "LoRA": 1.5}
    agreement = {"single": np.nan, "linear": 0.9, "LoRA": 0.8}
    kinds = {k: measured(flat, flat, best_gold=gold[k], member_correlation=agreement[k]) for k in gold}
    found = passed(kinds, PLAIN)
    assert found["best of n by linear minus by single: gold"] and not found["best of n by LoRA minus by linear: gold"]
    assert found["member correlation of linear minus that of LoRA"]


def test_ratings():
    flat = [0.0, 0.0]
    values = {"moved_auroc": 0.9, "optimised_auroc": 0.5, "surest_half": 0.8, "other_half": 0.6}
    policies = PLAIN | {("URME", "ppo", rule): curves(0.0, end) for rule, end in (("mean", 0.5), ("LCB", 0.1))}
    found = passed({"URME": measured(flat, flat, **values)}, policies)
    assert [found[name] for name in found if name.startswith("URME")] == [True, False, True, False]


def test_numbers_by_hand():
    assert in_standard_errors(np.array([2.0, 2.0])) == np.inf and in_standard_errors(np.zeros(2)) == 0.0
    np.testing.assert_allclose(along(measured([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])), 1.0)


def test_rows_leave_out_what_is_not_defined():
    rows = rows_of({"single": measured([np.nan] * 2, [0.0, 1.0], accuracy=0.7)}, PLAIN)
    assert [row["name"] for row in rows] == [
        "single: accuracy",
        "single, ppo, mean: final gold",
        "single, ppo, mean: final gold minus plain",
        "single, ppo, mean: final KL",
    ]
    assert rows[2]["mean"] == 0.0
