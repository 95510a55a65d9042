"""FLOPs by arithmetic against what compiled programs hold."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models.config import Experts, ModelConfig
from rlhf_jax.models.heads import init_policy, unembed
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.parallel.plan import flops
from rlhf_jax.parallel.plan.hlo import parse
from rlhf_jax.parallel.plan.published import PUBLISHED
from rlhf_jax.parallel.plan.traffic import product_flops

SMALL = ModelConfig(
    vocab_size=32,
    width=16,
    layers=3,
    heads=4,
    key_value_heads=2,
    feed_forward_width=40,
    context_length=64,
    tied_embeddings=False,
)


def compiled(config, gradient):
    params = jax.eval_shape(partial(init_policy, config), jax.random.key(0))

    def logits(params, tokens):
        hidden = apply_trunk(config, params["trunk"], tokens, jnp.ones(tokens.shape, bool)).final
        return unembed(config, params, hidden).sum()

    return (
        jax.jit(jax.value_and_grad(logits) if gradient else logits)
        .lower(params, jnp.zeros((2, 24), jnp.int32))
        .compile()
    )


def test_a_forward_pass_is_the_products_that_xla_counts_where_there_is_no_loop():
    """One layer is no loop. What is counted beside products (norms, softmax) is small even at this width."""
    config = dataclasses.replace(SMALL, layers=1)
    expected = flops.scoring_flops(config, rows=2, tokens=24, scored=24)
    program = compiled(config, gradient=False)
    assert product_flops(parse(program.as_text())) == expected
    assert program.cost_analysis()["flops"] == pytest.approx(expected, rel=0.25)
    assert program.cost_analysis()["flops"] > expected


def test_training_three_layers_is_three_times_their_forward_pass():
    """And once more the trunk where it is rematerialised. In training, logits would be computed once more too."""
    for remat in ("none", "full"):
        config = dataclasses.replace(SMALL, remat=remat)
        expected = flops.training_flops(config, 2, 24, 0) + 3 * flops.unembedding_flops(config, 2 * 24)
        assert product_flops(parse(compiled(config, gradient=True).as_text())) == expected


def test_of_a_mixture_only_the_active_experts_count():
    dense = dataclasses.replace(SMALL, feed_forward_width=80)
    mixture = dataclasses.replace(SMALL, experts=Experts(count=8, active=2))
    router = 3 * 2 * 16 * 8
    assert flops.projection_flops(mixture) == flops.projection_flops(dense) + router


def test_generation_is_a_prefill_and_one_token_at_a_time():
    """With 1 new token it is the prefill and its logits; each further one sees the whole cache and itself."""
    first = flops.generation_flops(SMALL, rows=2, prompt=8, new=1)
    assert first == flops.forward_flops(SMALL, 2, 8) + flops.unembedding_flops(SMALL, 2)
    further = flops.generation_flops(SMALL, 2, 8, 3) - flops.generation_flops(SMALL, 2, 8, 2)
    slots = 3 * 4 * 4 * 4 * 2  # layers, 4 FLOPs, heads, head width, rows
    decoded = 2 * flops.projection_flops(SMALL) + flops.unembedding_flops(SMALL, 2) + slots * (8 + 2 + 1)
    assert further == decoded + slots  # the cache of the longer one has one slot more, for the token before too


def test_rows_skip_what_is_behind_their_part_and_auto_is_what_it_stands_for():
    reference = dataclasses.replace(SMALL, attention="reference", context_length=256)
    rows, auto = (dataclasses.replace(reference, attention=kind) for kind in ("rows", "auto"))
    skipped = flops.forward_flops(reference, 1, 128) - flops.forward_flops(rows, 1, 128)
    assert skipped == 3 * 4 * 16 * 128 * 128 * 6 / 16  # three layers; 3 + 2 + 1 of 16 squares
    assert flops.forward_flops(auto, 1, 128) == flops.forward_flops(rows, 1, 128)
    assert flops.forward_flops(auto, 1, 24) == flops.forward_flops(reference, 1, 24)


def test_the_kernel_skips_what_is_masked():
    long = dataclasses.replace(SMALL, attention="splash", window=4, local_layers=(True, False, True))
    whole = flops.forward_flops(dataclasses.replace(long, attention="reference"), 1, 16)
    skipped = whole - flops.forward_flops(long, 1, 16)
    assert skipped == 16 * 4 * 4 * 4 * ((16 - 4) * 2 + (16 - 8.5))


def test_a_llama_of_8_billion_trains_at_about_six_flops_a_parameter_and_token():
    model = dataclasses.replace(PUBLISHED["llama-3-8b"], attention="splash")
    each = flops.training_flops(model, 1, 1024, 0) / 1024 / (8.03e9 - 2 * 128_256 * 4096)
    assert each == pytest.approx(6.0, rel=0.05)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name, parameters):
    shapes = jax.eval_shape(partial(init_policy, PUBLISHED[name]), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
