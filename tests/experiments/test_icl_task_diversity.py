"""The experiment on task diversity, at a tiny size."""

import json

import pytest


def tiny(script, **changes):
    options = dict(
        seeds=2,
        prompts=256,
        decompositions=64,
        estimator_dimension=4,
        lengths=(8,),
        pools=2,
        pool_prompts=32,
        pool_sizes=(1, 8),
        linear_sizes=(1, 4),
        linear_dimension=2,
        linear_steps=20,
        sizes=(1, 4),
        length=4,
        layers=1,
        width=8,
        steps=20,
        transformer_prompts=64,
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
    assert passed["Bayes on new tasks, M=4: a network's error/d is that of Bayes + its distance to Bayes"]
    rows = {row["name"]: row for row in result["rows"] if not row["name"].endswith(": time")}
    of_pools = [row for row in rows.values() if "M=" in row["name"]]
    assert {row["n"] for row in of_pools} == {2}
    assert rows["transformer, M=1: pool to bayes"]["mean"] == pytest.approx(
        rows["transformer, M=1: pool error"]["mean"]
    )
    assert len(of_pools) == 2 * 5 + 2 * 2 + 2 * 8
    assert rows["sparse, k=8: least squares"]["mean"] < 1e-6 and rows["sparse, k=8: least squares"]["n"] == 32
    assert len(rows) == len(of_pools) + 3 + 4 * 5  # noise levels; baselines on tasks whose query is not changed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": 1}, "option seeds is 1"),
        ({"prompts": 8}, "option prompts is 8"),
        ({"decompositions": 0}, "option decompositions is 0"),
        ({"estimator_dimension": 2}, "option estimator_dimension is 2"),
        ({"lengths": ()}, "option lengths is empty"),
        ({"lengths": (0,)}, "option lengths is 0"),
        ({"share": 0.0}, "option share is 0.0"),
        ({"pools": 1}, "option pools is 1"),
        ({"pool_prompts": 1}, "option pool_prompts is 1"),
        ({"pool_sizes": ()}, "option pool_sizes is empty"),
        ({"pool_sizes": (1, 0)}, "option pool_sizes is 0"),
        ({"linear_sizes": (3, 4)}, "option linear_sizes, 3 does not divide"),
        ({"linear_dimension": 0}, "option linear_dimension is 0"),
        ({"linear_steps": 0}, "option linear_steps is 0"),
        ({"sizes": ()}, "option sizes are empty"),
        ({"dimension": 0}, "option dimension is 0"),
        ({"length": 0}, "option length is 0"),
        ({"layers": 0}, "option layers is 0"),
        ({"width": 5}, "heads = 2 does not divide width = 5"),
        ({"steps": 1}, "option steps is 1"),
        ({"transformer_prompts": 1}, "option transformer_prompts is 1"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(script, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(tiny(script, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
