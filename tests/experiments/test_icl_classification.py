"""The study of in-context classification, at a tiny size."""

import json

import pytest


def tiny(script, **changes):
    options = dict(
        stages=(),
        seeds=2,
        lengths=(10, 20),
        many_classes=(2, 3),
        far=(100, 200, 400),
        prompts=512,
        points=2**6,
        sweep_steps=(60, 40),
        sweep_batch=8,
        raw_steps=4,
        settings=1,
        model_steps=2,
        model_lengths=(4,),
        model_test_lengths=(4, 8),
        test_prompts=64,
        length=5,
        test_length=8,
    )
    return script.Config(**(options | changes))


def test_stages_leave_comparisons_rows_and_figures(script, tmp_path, capsys):
    stages = ("setting", "solutions", "first_order", "speed", "sweep", "models")
    result = script.main(tiny(script, stages=stages, out=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    written = json.loads((tmp_path / "run" / "comparisons.json").read_text())
    assert [one["quantity"] for one in written] == [check["name"] for check in result["checks"]]
    # setting 10, solutions 2, first_order 1, speed 10, sweep 2, models 2 + 6 shifts
    assert len(written) == 33
    rows = {row["name"]: row for row in result["rows"]}
    assert 0 < rows["theory: cross-entropy of Bayes"]["mean"] <= rows["theory: cross-entropy of W*"]["mean"] + 0.05
    assert rows["theory: condition number l / lambda_min"]["mean"] > 1
    assert {f"{stage}: time" for stage in stages} <= set(rows)
    assert rows["transformer, N=4, M=8"]["n"] == 2
    for name in ("first_order", "speed", "sweep", "models"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 10_000
    assert "predicted and measured" in capsys.readouterr().out


def test_every_stage_of_the_help_is_one_and_presets_name_them(script):
    documented = script.Config.__doc__.split("parts to run: ")[1].split("; none")[0]
    assert [word.strip() for word in documented.split(",")] == list(script.STAGES)
    assert set(script.Config().stages) <= set(script.STAGES) and script.PAPER.stages == ()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": ("speeds",)}, "there is no stage 'speeds'; choose among setting, tasks"),
        ({"dimension": 0}, "dimension d is 0: give a whole number of at least 1"),
        ({"covariance": (1.0, 0.0)}, "--covariance has 2 numbers: give 3 x 3 = 9, row by row"),
        ({"dimension": 2, "covariance": (1.0, 2.0, 2.0, 1.0)}, "eigenvalues are all positive"),
        ({"dimension": 2, "covariance": (1.0, 0.5, 0.2, 1.0)}, "not symmetric"),
        ({"classes": 1}, "number of classes c is 1"),
        ({"length": 0}, "option --length is 0: give a whole number of at least 1"),
        ({"test_length": 0}, "option --test-length is 0: give a whole number of at least 1"),
        ({"model_lengths": (4, 0)}, "option --model-lengths is 0: give a whole number of at least 1"),
        ({"many_classes": (2, 1)}, "option --many-classes is 1: give a whole number of at least 2"),
        ({"lengths": ()}, "option --lengths has no values: give at least one"),
        ({"seeds": 1}, "seeds is 1: give a whole number of at least 2"),
        ({"learning_rate": 4.0}, r"learning rate is 4, above 2 / l = 3\.24873, where l = 0\.615625 is the smoothness"),
        ({"points": 1000}, "points is 1000: give a power of two"),
        ({"test_prompts": 100}, "--test-prompts is 100: give a multiple of 64"),
    ],
)
def test_impossible_options_are_refused_before_anything_runs(script, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        script.main(tiny(script, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
