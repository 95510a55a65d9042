"""One step of each algorithm: one device, every axis of a mesh, and two processes give the same numbers."""

import functools
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("one_step.py")
spec = importlib.util.spec_from_file_location("one_step", PROGRAM)
one_step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(one_step)


@functools.cache
def alone(part):
    """What one device gives."""
    return one_step.leaves(one_step.outcome(one_step.PARTS[part]))


def assert_agree(found, part):
    """Sampled tokens are identical; gradients agree to 1e-5 of the largest in their array, metrics to 1e-5 of theirs.

    A metric near 0, such as the gap between decoding and training, is the rounding of numbers of 1 and more.
    """
    expected = alone(part)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if np.issubdtype(value.dtype, np.integer):
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            largest = 1.0 if "metrics" in name else 0.0
            largest = max(largest, np.abs(value[np.isfinite(value)]).max(initial=0.0))
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize("words", ["data=8", "fsdp=8", "tensor=8", "sequence=8"])
def test_ppo_with_advpo_is_the_same_on_every_mesh(words):
    assert_agree(one_step.leaves(one_step.outcome(one_step.PARTS["ppo"], words)), "ppo")


def test_a_queue_on_a_mesh_draws_what_one_device_draws_all_at_once():
    assert_agree(one_step.leaves(one_step.outcome(one_step.PARTS["ppo of a queue"], "data=2,fsdp=2,tensor=2")), "ppo")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("mixture", "fsdp=2,tensor=2,expert=2"),
        ("sft of a mixture", "expert=8"),
        ("sft", "fsdp=2,tensor=2,sequence=2"),
        ("dpo", "fsdp=2,tensor=2,sequence=2"),
        ("kto", "fsdp=2,tensor=2,sequence=2"),
    ],
)
def test_mixtures_of_experts_and_offline_updates_are_the_same_on_a_mesh(part, words):
    assert_agree(one_step.leaves(one_step.outcome(one_step.PARTS[part], words)), part)


def test_the_step_has_something_to_disagree_about():
    found = alone("ppo")
    displacement = next(value for name, value in found.items() if "displacement" in name)
    assert displacement > 0.1 and len(np.unique(next(v for n, v in found.items() if "tokens" in n))) > 20
    assert max(np.abs(value).max() for name, value in found.items() if "change" in name) > 1e-2


def test_ppo_with_advpo_is_the_same_in_two_processes_and_on_a_mesh_of_three_axes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(PROGRAM), "data=2,fsdp=2,tensor=2", address, "2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    runs = [
        subprocess.Popen([*command, str(number), str(tmp_path / "out.npz")], env=environment, stderr=subprocess.PIPE)
        for number in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors.decode()[-3000:]
    with np.load(tmp_path / "out.npz") as found:
        assert_agree(dict(found), "ppo")
