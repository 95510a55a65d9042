"""How often the computations of a program run, read from texts written by hand and from compiled loops."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.parallel.plan.hlo import loops, parse, runs, within

NESTED = """HloModule m, is_scheduled=true, num_partitions=4

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %x)
}

%inner_condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit.1 = s32[] constant(5)
  ROOT %lt.1 = pred[] compare(%i.1, %limit.1), direction=LT
}

%unrolled_body (p.2: (f32[8], s32[], s32[])) -> (f32[8], s32[], s32[]) {
  %p.2 = (f32[8]{0}, s32[], s32[]) parameter(0)
  %x.2 = f32[8]{0} get-tuple-element(%p.2), index=0
  %zero.2 = s32[] constant(0)
  %start.2 = (s32[], f32[8]{0}) tuple(%zero.2, %x.2)
  %while.2 = (s32[], f32[8]{0}) while(%start.2), condition=%inner_condition, body=%inner_body
  %y.2 = f32[8]{0} get-tuple-element(%while.2), index=1
  %i.2 = s32[] get-tuple-element(%p.2), index=1
  %one.2 = s32[] constant(1)
  %once.2 = s32[] add(%i.2, %one.2)
  %twice.2 = s32[] add(%once.2, %one.2)
  %limit.2 = s32[] get-tuple-element(%p.2), index=2
  ROOT %t.2 = (f32[8]{0}, s32[], s32[]) tuple(%y.2, %twice.2, %limit.2)
}

%unrolled_condition (p.3: (f32[8], s32[], s32[])) -> pred[] {
  %p.3 = (f32[8]{0}, s32[], s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=1
  %limit.3 = s32[] get-tuple-element(%p.3), index=2
  ROOT %lt.3 = pred[] compare(%i.3, %limit.3), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %first = s32[] constant(1)
  %kept = s32[] copy(%first)
  %seven = s32[] constant(7)
  %start = (f32[8]{0}, s32[], s32[]) tuple(%a, %kept, /*index=2*/%seven)
  %while = (f32[8]{0}, s32[], s32[]) while(%start), condition=%unrolled_condition, body=%unrolled_body
  ROOT %out = f32[8]{0} get-tuple-element(%while), index=0
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_nested_loops_multiply():
    """From 1 to 7 by 2 is three turns, each with five of the loop inside."""
    module = parse(NESTED)
    assert module.entry == "main" and module.partitions == 4
    assert {name: int(times) for name, times in runs(module).items()} == {
        "main": 1,
        "unrolled_body": 3,
        "inner_body": 15,
    }
    assert all(loop.exact for loop in loops(module))


def test_the_note_of_xla_is_believed_and_an_unknown_number_is_said():
    noted = NESTED.replace("body=%unrolled_body", 'body=%unrolled_body, backend_config={"known_trip_count":{"n":"9"}}')
    assert runs(parse(noted))["unrolled_body"] == 9
    unknown = parse(NESTED.replace("%kept = s32[] copy(%first)", "%kept = s32[] custom-call(%first)"))
    assert {loop.name: loop.trips for loop in loops(unknown)} == {"while": None, "while.2": 5}
    assert runs(unknown)["unrolled_body"] == 1


def test_the_cases_of_a_conditional_share_its_runs():
    text = NESTED.replace(
        "ROOT %out = f32[8]{0} get-tuple-element(%while), index=0",
        "%which = s32[] constant(0)\n"
        "  ROOT %out = f32[8]{0} conditional(%which, %a, %a), branch_computations={%left, %right}",
    )
    text = "%left (l: f32[8]) -> f32[8] {\n  ROOT %l = f32[8]{0} parameter(0)\n}\n" + text
    text = "%right (r: f32[8]) -> f32[8] {\n  ROOT %r = f32[8]{0} parameter(0)\n}\n" + text
    counted = runs(parse(text))
    assert counted["left"] == counted["right"] == 0.5


def test_a_compiled_decoding_loop_counts_the_most_it_can_run():
    def decode(start):
        def unfinished(carry):
            position, x = carry
            return (position + 1 < 12) & ~(x > 100).all()

        return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, 2 * carry[1]), (jnp.int32(2), start))

    module = parse(jax.jit(decode).lower(jnp.ones(4)).compile().as_text())
    (loop,) = loops(module)
    assert loop.trips == 9 and not loop.exact  # positions 2 … 10


def test_what_a_fusion_does_is_found_within_its_caller():
    text = jax.jit(lambda x: jnp.tanh(x) + x.sum()).lower(jnp.ones(4)).compile().as_text()
    module = parse(text)
    assert "tanh" in {instruction.opcode for _, instruction in within(module, module.entry)} | {
        instruction.opcode for name in runs(module) for _, instruction in within(module, name)
    }


def test_attributes_of_a_kernel_may_take_several_lines():
    kernel = '%next = s32[] add(%i, %one), frontend_attributes={kernel_metadata={\n}}, metadata={op_name="a = b"}'
    module = parse(NESTED.replace("%next = s32[] add(%i, %one)", kernel))
    assert "next" in module.computations["inner_body"] and runs(module)["inner_body"] == 15


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match=r"no ENTRY; give compiled.as_text"):
        parse("nothing")
