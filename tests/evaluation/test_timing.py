import time

import numpy as np
import pytest

from rlhf_jax.evaluation.timing import ratio, seconds_of


def test_ratio_by_hand():
    """4 and 9 times as long: 6 times in the geometric mean; t of one degree of freedom is 12.7062."""
    found = ratio("a over b", np.array([4.0, 18.0]), np.array([1.0, 2.0]))
    half = 12.7062 * np.log(1.5)
    assert found["mean"] == pytest.approx(6.0)
    assert found["ci95"] == pytest.approx([6 * np.exp(-half), 6 * np.exp(half)], rel=1e-3)
    assert (found["name"], found["unit"], found["n"]) == ("a over b", "times", 2)


def test_the_ratio_the_other_way_round_is_the_inverse():
    slow, fast = np.array([4.0, 18.0, 3.0]), np.array([1.0, 2.0, 7.0])
    there, back = ratio("", slow, fast), ratio("", fast, slow)
    assert there["mean"] == pytest.approx(1 / back["mean"])
    assert there["ci95"] == pytest.approx([1 / end for end in reversed(back["ci95"])])


def test_calls_take_turns_and_what_prepares_them_is_not_timed():
    order = []

    def prepare(name, before=0.0, during=0.0):
        time.sleep(before)
        order.append(f"prepare {name}")

        def call():
            order.append(name)
            time.sleep(during)

        return call

    found = seconds_of(lambda: prepare("a", before=0.1), lambda: prepare("b", during=0.02), repeats=2)
    assert order == ["prepare a", "a", "prepare b", "b"] * 2
    assert found.shape == (2, 2)
    assert (found[0] < 0.1).all() and (found[1] >= 0.02).all()
