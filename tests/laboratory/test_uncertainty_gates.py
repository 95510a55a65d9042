"""Gates that pass where an effect was planted, fail where its opposite was, and are left out where nothing was run."""

import numpy as np

from rlhf_jax.evaluation.frontier import Curves
from rlhf_jax.laboratory.gates.gate import PRECONDITION
from rlhf_jax.laboratory.uncertain_picks import MEMBER
from rlhf_jax.laboratory.uncertainty_gates import Found, along, gates, rows_of
from rlhf_jax.laboratory.uncertainty_panel import MEASURES, Measured
from rlhf_jax.laboratory.uncertainty_report import study_tables

SEEDS = np.array([0.0, 0.1, -0.1])


def curves(*gold: float) -> Curves:
    """Three seeds around these measurements; KL rises by 4 nats a measurement."""
    values = np.array(gold)[None] + SEEDS[:, None] * np.linspace(1.0, 2.0, len(gold))[None]
    kl = np.broadcast_to(4.0 * np.arange(len(gold)), values.shape).copy()
    return Curves(samples=64 * np.arange(len(gold)), kl=kl, gold=values, proxy=values)


def measured(uncertainty, error, **values: float) -> Measured:
    every = {name: values.get(name, np.nan) + SEEDS for name in MEASURES}
    return Measured(every, *(np.array(line)[None] + SEEDS[:, None] * 0.1 for line in (uncertainty, error)))


def best(quarter: float, largest: float) -> np.ndarray:
    return np.array([[quarter, largest]]) + SEEDS[:, None]


FLAT = measured([0.0, 0.0], [0.0, 0.0])
PLAIN = {("single", "ppo", "mean"): curves(0.0, 1.0, -1.0)}


def found_of(kinds=None, policies=None, picked=None, disagreement=None, noisy=True) -> Found:
    kinds = kinds or {}
    picked = {kind: dict.fromkeys(("mean", "WCO", "UWO", "LCB"), best(0.0, 0.0)) for kind in kinds} | (picked or {})
    return Found(kinds, PLAIN | (policies or {}), picked, disagreement or {}, best_of=64, noisy=noisy)


def passed(**found):
    return {gate.name: gate.passed for gate in gates(found_of(**found), "ppo")}


def test_last_layer_uncertainty_that_rises_with_the_error():
    rising, falling = [0.0, 1.0, 3.0], [3.0, 1.0, 0.0]
    names = (
        "last-layer uncertainty: rise along plain training",
        "Pearson of last-layer uncertainty and error along plain training",
        "the same minus that of linear, an ensemble at the same compute",
        "the same minus that of starts, an ensemble at more compute",
    )
    for own, others, expected in ((rising, falling, True), (falling, rising, False)):
        kinds = {"single": FLAT, "posterior": measured(own, rising)} | dict.fromkeys(
            ("linear", "starts"), measured(others, rising)
        )
        found = passed(kinds=kinds)
        assert [found[name] for name in names] == [expected] * 4


def test_a_study_without_a_fall_is_void():
    (gate,) = gates(found_of(), "ppo")
    assert gate.source == PRECONDITION and gate.passed
    np.testing.assert_allclose(gate.values, 2.0 - SEEDS / 2)  # every seed peaks at 1.5 and ends at twice its deviation
    (gate,) = gates(found_of(policies={("single", "ppo", "mean"): curves(0.0, 1.0, 0.8)}), "ppo")
    assert gate.passed and not gate.clear
    (gate,) = gates(found_of(policies={("single", "ppo", "mean"): curves(0.5, 0.0, 1.0)}), "ppo")
    assert not gate.passed
    np.testing.assert_array_equal(gate.values, 0.0)


def test_adversarial_policies_end_higher_and_are_compared_at_equal_kl():
    better = passed(policies={("single", "ppo", "AdvPO"): curves(0.0, 1.0, 1.0)})
    distances = [name for name in better if "equal √KL" in name]
    assert [name[-9:] for name in distances] == ["0.94 √nat", "1.89 √nat", "2.83 √nat"]  # thirds of √8
    assert len(better) == 5 and all(better.values())
    worse = passed(policies={("single", "ppo", "AdvPO"): curves(0.0, -1.0, -3.0)})
    assert list(worse.values()) == [True, False, False, False, False]


def test_policies_of_ensembles_end_higher_and_fall_less():
    found = passed(
        policies={
            ("seeds", "ppo", "mean"): curves(0.0, 1.0, -1.5),
            ("seeds", "ppo", "WCO"): curves(0.0, 1.0, 0.5),
            ("seeds", "ppo", "UWO"): curves(0.0, 1.0, -2.0),
            ("seeds", "grpo", "mean"): curves(0.0, 9.0, 9.0),  # another algorithm is not judged
        }
    )
    del found["plain ppo: fall of gold from its peak"]
    assert found == {
        "seeds, mean minus one model, ppo: final gold": False,
        "seeds, WCO minus one model, ppo: final gold": True,
        "seeds, UWO minus one model, ppo: final gold": False,
        "best ensemble and rule minus one model, ppo: final gold (chosen on the other seeds)": True,
        "seeds: fall of plain ppo minus that of WCO": True,  # plain falls by 2
        "seeds: fall of the mean minus that of WCO, ppo": True,
        "seeds: fall of plain ppo minus that of UWO": False,
        "seeds: fall of the mean minus that of UWO, ppo": False,
    }


def test_the_best_of_many_is_chosen_on_other_seeds():
    """Each of three rules is best in one seed alone: who chooses by the others gains nothing."""
    policies = {}
    for place, rule in enumerate(("mean", "WCO", "UWO")):
        plain = PLAIN["single", "ppo", "mean"]
        gold = plain.gold + np.where(np.arange(3) == place, 3.0, 0.0)[:, None]
        policies["seeds", "ppo", rule] = plain._replace(gold=gold)
    found = {gate.name: gate.values for gate in gates(found_of(policies=policies), "ppo")}
    name = "best ensemble and rule minus one model, ppo: final gold (chosen on the other seeds)"
    np.testing.assert_allclose(found[name], 0.0, atol=1e-12)


def test_members_part_more_under_the_mean_than_under_the_penalty():
    ends = {("seeds", "mean"): np.array([[1.0, 3.0], [2.0, 6.5]]), ("seeds", "UWO"): np.array([[1.0, 1.2], [2.0, 2.4]])}
    (gate,) = gates(found_of(disagreement=ends), "ppo")[1:]
    assert gate.name == "seeds: growth of the members' variance along ppo, mean minus UWO" and gate.passed
    np.testing.assert_allclose(gate.values, [1.8, 2.05])
    nothing = {key: np.zeros((2, 2)) for key in ends}
    assert len(gates(found_of(disagreement=nothing), "ppo")) == 1  # members that agree have no growth


def test_best_of_n_by_ensembles():
    picked = {
        "single": {"mean": best(9.0, 9.0)},
        "seeds": {"mean": best(1.0, 0.9), "WCO": best(1.0, 1.2), "UWO": best(1.0, 0.7), MEMBER: best(0.9, 0.8)},
    }
    best_64, slope = "minus one model: gold of best of 64", "slope of gold at best of 64, s.d. a √nat"
    found = passed(picked=picked)
    assert [found[f"seeds, {rule} {best_64}"] for rule in ("mean", "WCO", "UWO")] == [True, True, False]
    assert found[f"one model: {slope}"] and found[f"seeds, WCO: {slope}"] and not found[f"seeds, UWO: {slope}"]
    picked["seeds"][MEMBER] = best(0.9, 1.0)
    assert not passed(picked=picked)[f"one model: {slope}"]
    assert not any(slope in name for name in passed(picked=picked, noisy=False))
    # Members of bootstraps are no single models: then the single one counts.
    assert not passed(picked={"single": picked["single"], "bootstrap": picked["seeds"]})[f"bootstrap, WCO {best_64}"]


def test_adapters_against_heads():
    picked = {kind: {"mean": best(0.0, gold)} for kind, gold in {"single": 1.0, "linear": 2.0, "LoRA": 1.5}.items()}
    agreement = {"single": np.nan, "linear": 0.9, "LoRA": 0.8}
    kinds = {kind: measured([0.0], [0.0], member_correlation=value) for kind, value in agreement.items()}
    found = passed(kinds=kinds, picked=picked)
    assert found["linear minus single: gold of best of 64"] and not found["LoRA minus linear: gold of best of 64"]
    assert found["member correlation: linear minus LoRA"]


def test_ratings():
    values = {"moved_auroc": 0.9, "optimised_auroc": 0.5, "surest_half": 0.8, "other_half": 0.6}
    policies = {("URME", "ppo", rule): curves(0.0, end) for rule, end in (("mean", 0.5), ("LCB", 0.1))}
    picked = {"URME": {"mean": best(0.0, 0.5), "LCB": best(0.0, 0.6)}}
    found = passed(kinds={"URME": measured([0.0], [0.0], **values)}, policies=policies, picked=picked)
    assert [found[name] for name in found if name.startswith("URME")] == [True, False, True, True, False]


def test_correlation_along_a_run():
    np.testing.assert_allclose(along(measured([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])), 1.0)
    assert np.isnan(along(FLAT)).all()
    assert passed(kinds={"posterior": FLAT}).keys() == {  # a gate on what is not defined is left out
        "plain ppo: fall of gold from its peak",
        "last-layer uncertainty: rise along plain training",
    }


def test_rows_leave_out_what_is_not_defined():
    kinds = {"single": measured([np.nan] * 2, [0.0, 1.0], accuracy=0.7)}
    rows = rows_of(found_of(kinds=kinds, picked={"single": {"mean": best(0.0, 1.0)}}))
    assert [row["name"] for row in rows] == [
        "single: accuracy",
        "single: slope of gold at the largest n by mean",
        "single, ppo, mean: final gold",
        "single, ppo, mean: final gold minus plain",
        "single, ppo, mean: fall of gold from its peak",
        "single, ppo, mean: final KL",
    ]
    assert rows[3]["mean"] == 0.0 and rows[1]["mean"] > 0.0


def test_tables_are_what_a_page_shows():
    ends = {("single", "ppo", rule): curves(0.0, end) for rule, end in (("AdvPO", 1.0), ("UWO", 2.0))}
    found = found_of(kinds={"single": measured([np.nan] * 2, [0.0, 1.0], accuracy=0.7)}, policies=ends)
    text = study_tables({"single": "one model"}, {"single": {"training": 1.0}}, found, gates(found, "ppo"))
    blocks = text.split("\n\n")
    assert blocks[0].endswith("over 3 seeds.") and "| gold of best of 64 |" in blocks[1]
    assert blocks[2].startswith("ppo: final gold") and blocks[3].splitlines()[-1].startswith("| one model | -1.00 [")
    assert blocks[3].startswith("| kind | mean | UWO | AdvPO |")  # whatever the order of training
    assert blocks[4].endswith("gates passed:") and blocks[5].startswith("| gate | claim |")
