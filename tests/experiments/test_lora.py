"""LoRA beside full tuning at a tiny size."""

import functools
import json

import jax
import numpy as np
import pytest


@pytest.fixture(scope="module")
def ran(script, tmp_path_factory):
    """The folder and the summary of a tiny run, and the steps by LoRA that it compiled."""
    folder, steps, compile_steps = tmp_path_factory.mktemp("lora") / "run", {}, script.compiled_steps
    tiny = dict(seeds=2, width=16, ranks=(2,), pretraining_steps=10, pairs=128)
    tiny |= dict(memory_width=64, memory_layers=1, memory_rows=4, calls=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "over_lanes", functools.partial(script.over_lanes, devices=jax.devices()[:1]))
        patch.setattr(script, "compiled_steps", lambda config, way: steps.setdefault(way, compile_steps(config, way)))
        result = script.main(script.Config(out=folder, **tiny))
    return folder, result, steps[script.attention_lora(script.MEMORY_RANK)]


def test_the_run_leaves_its_files_and_rows_that_agree_with_one_another(ran):
    folder, result, steps = ran
    assert json.loads((folder / "summary.json").read_text()) == result
    assert (folder / "figures" / "lora.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] * 4  # 128 pairs, 32 an update; 2 seeds, 2 ways
    values = {row["name"]: row["mean"] for row in result["rows"]}
    difference = values["LoRA of rank 2: accuracy"] - values["full tuning: accuracy"]
    assert values["LoRA of rank 2: accuracy minus full tuning, paired"] == pytest.approx(difference, abs=1e-4)
    for name in steps:
        ratio = values[f"{name}: bytes, LoRA"] / values[f"{name}: bytes, full"]
        assert values[f"{name}: bytes, LoRA over full"] == pytest.approx(ratio)
        assert values[f"{name}: time, full"] > 0
    checks = {check["name"]: check["pass"] for check in result["checks"]}
    assert checks["largest |score merged - score beside the adapter|"]
    assert checks["optimiser state of LoRA, beyond 2 x its numbers"]


def test_numbers_trained_are_those_of_the_formula_and_moments_twice_as_many(ran, script):
    _, result, steps = ran
    update, width, vocabulary = steps["reward model step"], 64, 96
    head, adapter = width + 1, 8 * script.MEMORY_RANK * width  # one layer
    weights = 13 * width**2 + 3 * width + vocabulary * width + head  # with three norms
    assert update.trained == adapter + head
    assert update.moments == 2 * update.trained + 1  # and the learning rate
    assert update.held == weights + adapter + update.moments + 2  # and the margins of two pairs
    values = {row["name"]: row["mean"] for row in result["rows"]}
    head, adapter = 17, 2 * 8 * 2 * 16
    weights = 2 * (13 * 16**2 + 2 * 16) + 16 + 96 * 16 + head
    assert values["LoRA of rank 2: share trained"] == pytest.approx(100 * (adapter + head) / weights)


@pytest.mark.parametrize("name, base", [("reward model step", "base"), ("RL step", "reference")])
def test_a_step_changes_the_adapter_and_not_the_base(ran, name, base):
    step = ran[2][name]
    state = jax.jit(step.init)(jax.random.key(1))
    before = jax.device_get((getattr(state, base), state.params))
    after, _ = step.program(state, *step.inputs)
    jax.tree.map(np.testing.assert_array_equal, getattr(after, base), before[0])
    moved = jax.tree.map(lambda new, old: bool((np.asarray(new) != old).any()), after.params, before[1])
    assert any(jax.tree.leaves(moved))


def test_no_rank_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match="ranks of 1 or more"):
        script.main(script.Config(out=tmp_path / "run", ranks=()))
    assert not (tmp_path / "run").exists()
