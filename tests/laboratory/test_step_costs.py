"""What is measured of a step, and that what it must not do is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.laboratory.step_costs import StepCost, host_traffic, measure, process_peak, summary_of
from rlhf_jax.laboratory.workloads import Workload
from rlhf_jax.training.compilation import CompileClock


@pytest.fixture(scope="module")
def clock():
    return CompileClock()


def workload(step, *rest, begin=lambda: jnp.zeros(4)):
    return Workload(begin=begin, step=jax.jit(step, donate_argnums=0), rest=rest, tokens=8, flops=30.0, again=10.0)


def test_a_step_is_timed_and_nothing_is_found(clock):
    cost = measure(workload(lambda state, x: (state + x, state.sum()), jnp.ones(4)), 3, clock)
    assert cost.seconds.shape == (3,) and (cost.seconds > 0).all()
    assert cost.first > cost.compiling > 0
    assert cost.compiled_later == 0 and cost.through_host == ()
    assert cost.planned >= 2 * 16  # two arguments of four numbers


def test_a_callback_is_caught(clock):
    def step(state):
        jax.debug.callback(lambda x: None, state)
        return state + 1, None

    cost = measure(workload(step), 1, clock)
    jax.effects_barrier()
    assert len(cost.through_host) == 1 and "callback" in cost.through_host[0]


def test_an_argument_that_lies_on_the_host_is_caught(clock):
    cost = measure(workload(lambda state, x: (state + x, None), np.ones(4, np.float32)), 2, clock)
    assert len(cost.through_host) == 1 and "transfer" in cost.through_host[0]
    assert (cost.seconds > 0).all()


def test_a_step_whose_state_changes_is_compiled_again(clock):
    growing = workload(lambda state: (state, None))._replace(
        step=jax.jit(lambda state: (jnp.concatenate([state, state]), None))
    )
    cost = measure(growing, 1, clock)
    assert cost.compiled_later >= 3  # two steps that warm up, and one that is timed


def test_infeeds_are_caught_and_names_are_not():
    assert host_traffic("%a = (f32[], token[]) infeed(%token)") == ("infeed(",)
    assert host_traffic('%b = f32[2] fusion(%c), metadata={source_file="infeed.py"}') == ()


def test_rows_of_a_summary_by_hand():
    """20 FLOPs that are needed in 2 s are 10 a second, a quarter of 40."""
    cost = StepCost(
        first=3.0,
        compiling=1.0,
        seconds=np.array([2.0, 2.0]),
        planned=2**30,
        device_peak=2**31,
        compiled_later=1,
        through_host=(),
    )
    rows, checks = summary_of("a", workload(lambda state: (state, None)), cost, ceiling=40.0)
    values = {row["name"]: row["mean"] for row in rows}
    assert values["a: tokens"] == 4.0
    assert values["a: MFU"] == 0.25
    assert values["a: memory of the program"] == 1.0
    assert values["a: most memory of the device so far"] == 2.0
    assert [check["pass"] for check in checks] == [False, True]


def test_no_step_is_refused(clock):
    with pytest.raises(ValueError, match="0 steps cannot be timed"):
        measure(workload(lambda state: (state, None)), 0, clock)


def test_the_process_has_some_memory():
    assert process_peak() > 2**26
