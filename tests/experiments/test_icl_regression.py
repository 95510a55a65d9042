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
        gd_starts=10,
        gd_batch=8,
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
    # flow 5, logistic 2, lengths 16, shift 8, random covariances 6, pools 2, layers 3, GD++ 1, step 7, blocks 3
    assert len(written) == 53
    assert [one["pass"] for one in written] == [check["pass"] for check in result["checks"]]
    assert [row["name"] for row in result["rows"] if not row["name"].endswith(": time")] == [
        "loss of linear layers, k = 1, trained",
        "loss of GD++, k = 2, trained",
    ]
    for name in ("logistic", "lengths", "shift", "layers", "gd_plus_plus"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": 0}, "option seeds is 0"),
        ({"batch": 1}, "option batch is 1"),
        ({"settings": (5, 10, 3)}, "must be pairs"),
        ({"layers": ()}, "option layers is empty"),
        ({"layers": (1, 0)}, "option layers, one of whose numbers is 0"),
        ({"pools": ()}, "option pools is empty"),
        ({"pools": (0,)}, "option pools, one of whose numbers is 0"),
        ({"settings": ()}, "option settings is empty"),
        ({"settings": (5, 0)}, "option settings, one of whose numbers is 0"),
        ({"many_prompts": 100}, "option many_prompts is 100: give a whole number of at least 400"),
        ({"prompts": 1}, "option prompts is 1"),
        ({"gd_starts": 0}, "option gd_starts is 0"),
        ({"rate": 0.0}, "option rate is 0.0: give a number above 0"),
        ({"rate": 0.5}, "option rate is 0.5: give at most 0.1"),
        ({"flow_step": -1.0}, "option flow_step is -1.0"),
        ({"flow_step": 1.0}, "option flow_step is 1.0: give at most 0.1"),
        ({"flow_time": float("nan")}, "option flow_time is nan"),
        ({"stages": ("flows",)}, "there is no stage 'flows'; choose among flow, logistic"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(script, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(tiny(script, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
