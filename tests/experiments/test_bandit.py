"""The study of imitation on bandits, at a tiny size."""

import json

import pytest


def tiny(script, **changes):
    options = dict(
        seeds=2,
        arms=5,
        groups=(2, 4),
        best_of=(2,),
        samples=4,
        betas=(0.0, 0.5),
        iterations=1,
        responses=16,
        steps=2,
    )
    return script.Config(**(options | changes))


def test_it_leaves_a_summary_with_a_row_for_every_policy_and_a_figure(script, tmp_path):
    config = tiny(script, out=tmp_path / "run")
    result = script.main(config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    assert (tmp_path / "run" / "figures" / "bandit.png").stat().st_size > 10_000
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == 3 + 3 * (1 + 2) + 3 * (1 + 1 + 2)
    assert all(rows[f"{name}: J* - J"]["mean"] >= 0 for name in ("SFT", "VAR, K = 2", "VAR, K = 4"))
    assert {row["n"] for row in result["rows"]} == {2}
    checks = {check["name"]: check["pass"] for check in result["checks"]}
    assert checks["best of n, exact: KL above log n - (n - 1) / n, worst seed"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": 1}, "at least 2 seeds"),
        ({"temperature": 0.0}, "must be positive"),
        ({"temperature": float("nan")}, "must be positive"),
        ({"groups": (2, 3)}, "divide the 16 responses"),
        ({"groups": (4, 2)}, "ascending"),
        ({"betas": (0.5, 1.0)}, "give 0 and at least one more"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(script, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(tiny(script, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
