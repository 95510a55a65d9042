"""The experiment on task diversity, at a tiny size."""

import json

import pytest


def tiny(script, **changes):
    options = dict(
        seeds=2,
        prompts=1024,
        decompositions=64,
        pools=2,
        pool_sizes=(1, 8),
        linear_sizes=(1, 4),
        linear_dimension=2,
        linear_steps=20,
        sizes=(1, 4),
        length=4,
        layers=1,
        width=8,
        steps=20,
    )
    return script.Config(**(options | changes))


def test_it_leaves_comparisons_a_summary_and_three_figures(script, tmp_path):
    out = tmp_path / "run"
    result = script.main(tiny(script, out=out))
    assert json.loads((out / "summary.json").read_text()) == result
    for name in ("pools", "linear_layer", "transformer"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
    comparisons = json.loads((out / "comparisons.json").read_text())
    assert len(comparisons) == len(result["checks"])
    passed = {row["quantity"]: row["pass"] for row in comparisons}
    assert passed["pool of 1: largest difference from its task"]
    assert passed["transformer, M=4: error/d on new tasks = Bayes + distance"]
    rows = {row["name"]: row for row in result["rows"] if not row["name"].endswith(": time")}
    assert {row["n"] for row in rows.values()} == {2}
    assert rows["transformer, M=1: pool to bayes"]["mean"] == pytest.approx(
        rows["transformer, M=1: pool error"]["mean"]
    )
    assert len(rows) == 2 * 5 + 2 * 2 + 2 * 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"seeds": 1}, "number of seeds is 1"), ({"width": 5}, "heads"), ({"length": 0}, "context")],
)
def test_bad_options_are_refused_before_anything_runs(script, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(tiny(script, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
