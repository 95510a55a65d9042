"""Best-of-n by hand, and members that part."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.laboratory import uncertain_picks
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.setting import Setting
from rlhf_jax.laboratory.uncertain_kinds import Kind
from rlhf_jax.laboratory.uncertain_picks import MEMBER, disagreement, final_slope, picked, sizes
from rlhf_jax.laboratory.uncertainty_panel import Panel
from rlhf_jax.laboratory.uncertainty_study import Coefficients, Prepared
from rlhf_jax.types import Prompts

WEIGHTS = Coefficients(uwo=0.5, lcb=2.0)


def panel_of(gold):
    return Panel(None, np.array(gold), {"answers": slice(1, len(gold[0]))}, prompts=1, reports=1, best_of=3)


def test_every_rule_picks_its_own_answer():
    """Members agree on the first answer, differ by 2 on the second and by 4 on the third."""
    members = np.array([[[9.0, 1.0, 1.0, 0.0], [9.0, 1.0, 3.0, 4.0]]])
    scores = {"mean": members.mean(axis=1), "members": members}
    found = picked(panel_of([[99.0, 10.0, 20.0, 30.0]]), scores, WEIGHTS)
    # Means 1, 2, 2 (the later of equals wins); least members 1, 1, 0; UWO 1, 1.5, 0; LCB 1, 0, -2.
    assert {rule: gold[0, -1] for rule, gold in found.items()} == {
        "mean": 30.0, "WCO": 20.0, "UWO": 20.0, "LCB": 10.0, MEMBER: 25.0,
    }  # fmt: skip
    for gold in found.values():
        np.testing.assert_allclose(gold[0, 0], 20.0)  # a quarter of three is one: the mean answer


def test_one_model_picks_by_its_score_alone():
    found = picked(panel_of([[0.0, 10.0, 20.0, 30.0]]), {"mean": np.array([[0.0, 3.0, 2.0, 1.0]])}, WEIGHTS)
    assert list(found) == ["mean"]
    np.testing.assert_allclose(found["mean"], [[20.0, 10.0]])


def test_the_slope_is_that_of_the_end():
    assert sizes(512) == (128, 512) and sizes(2) == (1, 2)
    gold = np.array([[0.25, 1.0], [1.0, 0.25]])
    found = final_slope(gold, 16)
    kl = [np.log(n) - (n - 1) / n for n in (4, 16)]
    assert found[0] == -found[1] == pytest.approx(0.75 / (np.sqrt(kl[1]) - np.sqrt(kl[0])))


def test_members_are_asked_about_each_rule_at_both_ends(monkeypatch):
    """The first member says the token, the second its double: their variance is a quarter of its square."""
    rules, seeds, reports = ("mean", "UWO"), 3, 4
    tokens = np.zeros((len(rules) * seeds, reports, 2, 1), np.int32)
    tokens[:, 1:-1] = 1000  # what was written in between is not asked about
    tokens[:, 0] = 2
    tokens[:, -1, 0, 0] = 4 * (1 + np.arange(6))  # of two responses, one stays 0
    asked = []

    def score_panel(options, setting, kind, prepared, sequences):
        asked.append(sequences.tokens.shape)
        said = np.asarray(sequences.tokens[:, :, -1], np.float64)
        return {"members": np.stack([said, 2 * said], axis=1)}

    monkeypatch.setattr(uncertain_picks, "score_panel", score_panel)
    prompts = Prompts(tokens=jnp.array([[7]]), mask=jnp.ones((1, 1), bool), index=jnp.arange(1))
    setting = Setting(SimpleNamespace(held_out=prompts), None, None, None, None, None)
    kind, nothing = Kind("members", None, None, None), Prepared(*[None] * len(Prepared._fields))
    found = disagreement(Options(), setting, kind, nothing, {"tokens": tokens, "mask": tokens >= 0}, rules)
    assert asked == [(seeds, len(rules) * 2 * 2, 2)]
    for place, rule in enumerate(rules):
        last = 4 * (1 + place * seeds + np.arange(seeds))
        np.testing.assert_allclose(found[rule], np.stack([np.ones(seeds), np.square(last) / 8], axis=1))
