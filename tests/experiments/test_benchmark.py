"""The benchmark at a tiny size: every row, the files that it leaves, and options that cannot be."""

import dataclasses
import json

import pytest

from rlhf_jax.training.metrics import read_metrics


@pytest.fixture
def tiny(script, tmp_path):
    return dataclasses.replace(script.PRESETS["tiny"], out=tmp_path / "run")


def test_every_row_is_measured_and_written_down(script, tiny):
    result = script.main(tiny)
    assert json.loads((tiny.out / "summary.json").read_text()) == result
    assert [line["row"] for line in read_metrics(tiny.out / "metrics.jsonl")] == list(tiny.rows)
    assert (tiny.out / "figures" / "benchmark.png").stat().st_size > 10_000
    values = {row["name"]: row["mean"] for row in result["rows"]}
    steps = [name for name in tiny.rows if name not in ("queue", "buckets", "gap", "study")]
    for name in steps:
        assert values[f"{name}: tokens"] > 0
        assert 0 < values[f"{name}: MFU"] < 1
        assert 0 < values[f"{name}: compilation in it"] < values[f"{name}: first call"]
        assert values[f"{name}: memory of the program"] > 0
    assert values["PPO, shared trunk: matrix products of a step"] < values["PPO: matrix products of a step"]
    assert "generate: bytes read in decoding" in values
    assert values["study: 2 runs one by one over one program, time"] > 0
    assert values["gap: log-probabilities in float32"] < 1e-4 < values["gap: log-probabilities in bfloat16"]
    held = {check["name"]: check["pass"] for check in result["checks"]}
    assert all(held[f"{name}: programs compiled after the first call"] for name in steps)
    assert all(held[f"{name}: ways through the host"] for name in steps)
    assert held["queue: share of identical responses"]
    assert held["buckets: largest difference over the largest gradient"]
    assert values["buckets: an update on those cut"] > 0
    assert not any("peer" in name for name in held)  # the figures of the peer are those of another workload


def test_a_row_that_does_not_fit_says_so_and_the_others_go_on(script, tiny, monkeypatch, capsys):
    import jax

    def refuse(workload, steps, clock, trace=None):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(script, "measure", refuse)
    result = script.main(dataclasses.replace(tiny, rows=("score", "last-layer statistics")))
    failed = [check["name"] for check in result["checks"] if not check["pass"]]
    assert failed == ["score: fits into memory", "last-layer statistics: fits into memory"]
    assert "score: does not fit into memory" in capsys.readouterr().out
    assert not (tiny.out / "figures").exists()


def test_the_peer_is_beaten_or_the_check_fails(script, tiny, monkeypatch):
    monkeypatch.setattr(script, "PEERS", {"score": 1e-3, "last-layer statistics": 1e12})
    monkeypatch.setattr(script, "GOALS", {"score": 2.0, "last-layer statistics": 2.0})
    monkeypatch.setitem(script.MODELS, "cpu", script.MODELS["tiny"])
    monkeypatch.setitem(script.SIZES, "cpu", script.SIZES["tiny"])
    result = script.main(dataclasses.replace(tiny, preset="cpu", rows=("score", "last-layer statistics"), trace=True))
    held = {check["name"]: check["pass"] for check in result["checks"] if "peer" in check["name"]}
    assert held == {"score: times as fast as the peer": True, "last-layer statistics: times as fast as the peer": False}
    assert list((tiny.out / "trace" / "score").rglob("perfetto_trace.json.gz"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(steps=1), "--steps is 1: give 2 or more"),
        (dict(largest_product=0), "--largest-product is 0"),
        (dict(rows=()), "--rows is empty: choose of generate, SFT"),
        (dict(queued=5), "--queued 5 does not split into batches of --slots 2"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_computed(script, tiny, wrong, message):
    with pytest.raises(ValueError, match=message):
        script.main(dataclasses.replace(tiny, **wrong))
    assert not tiny.out.exists()


def test_sizes_of_nothing_are_refused(script, tiny):
    for wrong, message in ((dict(generated=()), "generated is"), (dict(pairs=0), "pairs is 0: give 1 or more")):
        with pytest.raises(ValueError, match=message):
            script.main(dataclasses.replace(tiny, sizes=dataclasses.replace(tiny.sizes, **wrong)))
