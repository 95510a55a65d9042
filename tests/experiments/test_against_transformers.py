"""The peer at a tiny size, on a CPU."""

import importlib.util

import pytest


def test_both_rows_are_measured(script, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import dataclasses

    result = script.main(dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run"))
    values = {row["name"]: row["mean"] for row in result["rows"] if "memory" not in row["name"]}
    assert list(values) == ["generate: tokens", "generate: a decoded token", "SFT: tokens"]
    assert all(value > 0 for value in values.values())
    assert result["checks"] == []


def test_the_peer_has_the_parameters_of_the_benchmark(script):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import jax

    from rlhf_jax.models.heads import init_policy

    shape = script.MODELS["tiny"]
    ours = jax.eval_shape(lambda: init_policy(shape, jax.random.key(0)))
    model = script.random_model(shape, "float32")
    assert model.num_parameters() == sum(leaf.size for leaf in jax.tree.leaves(ours))


def test_what_is_not_installed_is_said(script, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torch is not installed: pip install torch"):
        script.main(script.Config(out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_one_step_is_refused(script, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="give 2 steps or more"):
        script.main(script.Config(out=tmp_path / "run", steps=1))
