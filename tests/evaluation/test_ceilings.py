"""Measured ceilings."""

import pytest

from rlhf_jax.evaluation import ceilings
from rlhf_jax.evaluation.ceilings import copy_ceiling, matmul_ceiling


def test_the_fastest_product_is_the_ceiling(monkeypatch):
    """With a second for every call the rate is the work: 2 M K N."""
    monkeypatch.setattr(ceilings, "_fastest", lambda call, repeats: 1.0)
    found = matmul_ceiling("float32", [(2, 3, 4), (4, 4, 4), (8, 1, 1)])
    assert found.rate == 128.0
    assert found.of == "4 x 4 x 4"


def test_a_copy_reads_and_writes(monkeypatch):
    monkeypatch.setattr(ceilings, "_fastest", lambda call, repeats: 0.5 if call()[0] == 1 else 1.0)
    assert copy_ceiling(64).rate == 256.0  # 64 bytes read and 64 written, in half a second


def test_rates_are_positive():
    assert matmul_ceiling("bfloat16", [(8, 8, 8)], repeats=1).rate > 0
    found = copy_ceiling(2**12, repeats=2)
    assert found.rate > 0 and found.of in ("in place", "into a new array")


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="needs a product"):
        matmul_ceiling("float32", [])
    with pytest.raises(ValueError, match="copy of 2 bytes"):
        copy_ceiling(2)
