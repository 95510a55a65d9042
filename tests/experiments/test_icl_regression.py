"""The study of in-context regression, at a tiny size."""

import csv
import json

import pytest


def tiny(script, **changes):
    options = dict(
        seeds=1,
        layers=(1,),
        settings=(2, 3),
        pools=(2,),
        steps=3,
        gd_steps=3,
        batch=8,
        prompts=50,
        many_prompts=400,
        averaged_pools=2,
        rate=0.1,
        flow_step=0.01,
        flow_time=1.0,
    )
    return script.Config(**(options | changes))


def test_it_leaves_comparisons_a_summary_and_figures(script, tmp_path):
    result = script.main(tiny(script, out=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    written = json.loads((tmp_path / "run" / "comparisons.json").read_text())
    with open(tmp_path / "run" / "comparisons.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(written) == len(result["checks"])
    # flow 5, logistic 2, lengths 8, shift 8, random covariances 6, pools 2, layers 3, GD++ 1, step 3
    assert len(written) == 38
    assert [one["pass"] for one in written] == [check["pass"] for check in result["checks"]]
    assert [row["name"] for row in result["rows"] if not row["name"].endswith(": time")] == [
        "loss of linear layers, k = 1, trained",
        "loss of GD++, k = 2, trained",
    ]
    for name in ("logistic", "lengths", "shift", "layers", "pools"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": 0}, "option seeds is 0"),
        ({"batch": 1}, "option batch is 1"),
        ({"settings": (5, 10, 3)}, "must be pairs"),
        ({"layers": ()}, "at least one number of each"),
        ({"stages": ("flows",)}, "there is no stage 'flows'; choose among flow, logistic"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(script, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(tiny(script, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
