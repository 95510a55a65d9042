"""Chips, slices and topologies."""

import importlib.util

import pytest

from rlhf_jax.parallel.plan.hardware import CHIPS, Topology, family, parse_topology, topology_devices


def test_words_and_topologies():
    assert str(parse_topology("v6e:8x8")) == "v6e:8x8"
    assert parse_topology("h100:16").devices == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("v9:2x2", "names no known chip: begin with one of v5e, v5p, v6e, h100, h200"),
        ("v5p:4x4", "has no shape of 3 numbers: write it as v5p:2x4x4"),
        ("h100:2x2", "has no shape of 1 numbers: write it as h100:8"),
        ("v5e", "has no shape of 2 numbers"),
    ],
)
def test_bad_words_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(words)


def test_slices_grow():
    for chip in CHIPS.values():
        sizes = [topology.devices for topology in family(chip)]
        assert sizes == sorted(set(sizes))
        assert chip.flops / chip.hbm_bandwidth > 100  # FLOPs a byte that bind a product: a typing error would show


def test_gpus_are_stood_for_by_as_many_cpu_devices():
    assert len(topology_devices(parse_topology("h100:8"))) == 8
    with pytest.raises(ValueError, match=r"needs 16 CPU devices .* there are 8: .* JAX_NUM_CPU_DEVICES=16"):
        topology_devices(parse_topology("h100:16"))


def test_without_the_tpu_compiler_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the TPU compiler: pip install 'rlhf_jax\[plan\]'"):
        topology_devices(Topology(CHIPS["v5e"], (2, 2)))
