import dataclasses
import enum
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.training.json_files import plain, write_json


class Rule(enum.Enum):
    MEAN = 1


@dataclasses.dataclass(frozen=True)
class Inner:
    activation: object = "gelu"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    seeds: tuple[int, ...] = (0, 1)
    rule: Rule = Rule.MEAN
    out: Path = Path("runs/a")


def test_nested_dataclasses_become_json_values():
    assert plain(Outer(Inner())) == {"inner": {"activation": "gelu"}, "seeds": [0, 1], "rule": "MEAN", "out": "runs/a"}


def test_scalars_and_arrays_of_numpy_and_jax_keep_their_values_and_kinds():
    values = {
        "a": np.float64(0.9),
        "b": jnp.float32(-1.5),
        "c": jnp.arange(3),
        "d": np.bool_(True),
        "e": jnp.bfloat16(2.5),
    }
    result = plain(values)
    assert result == {"a": 0.9, "b": -1.5, "c": [0, 1, 2], "d": True, "e": 2.5}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert type(result["d"]) is bool


def test_numbers_that_json_lacks_are_null_or_what_the_caller_says():
    assert plain([float("nan"), np.float32("inf")]) == [None, None]
    assert plain([float("-inf")], non_finite=str) == ["-inf"]


def test_a_value_json_cannot_hold_is_named_by_its_path():
    with pytest.raises(ValueError, match=r"config\.inner\.activation is a function"):
        plain(Outer(Inner(activation=lambda x: x)), "config")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]
