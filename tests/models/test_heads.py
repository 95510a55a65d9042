"""What is read off hidden states: logits, values, rewards."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import chunked_logprobs, heads
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.parallel.mesh import make_mesh, parse_mesh
from rlhf_jax.parallel.sharding import batch_sharding, infer
from rlhf_jax.types import Prompts, Rollout

features_of = jax.jit(heads.reward_features, static_argnums=(0, 4))


@pytest.fixture
def batch():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, size=(3, 6), dtype=np.int32))
    return tokens, jnp.arange(6)[None] < jnp.array([6, 2, 4])[:, None]


def test_tied_logits_are_products_with_the_embedding(config, params):
    hidden = jax.random.normal(jax.random.key(1), (2, 5, config.width))
    assert set(params) == {"trunk"}
    embedding = np.asarray(params["trunk"]["embed"]["embedding"], np.float64)
    expected = np.asarray(hidden, np.float64) @ embedding.T
    np.testing.assert_allclose(heads.unembed(config, params, hidden), expected, atol=1e-4)


def test_untied_logits_are_products_with_the_unembedding(config, key):
    untied = dataclasses.replace(config, tied_embeddings=False)
    params = jax.jit(heads.init_policy, static_argnums=0)(untied, key)
    assert params["unembedding"].shape == (config.width, config.vocab_size)
    hidden = jax.random.normal(jax.random.key(1), (4, config.width))
    expected = np.asarray(hidden, np.float64) @ np.asarray(params["unembedding"], np.float64)
    np.testing.assert_allclose(heads.unembed(untied, params, hidden), expected, atol=1e-4)


def test_capped_logits_are_bounded_and_small_ones_stay(config, params):
    hidden = jax.random.normal(jax.random.key(1), (2, 5, config.width))
    plain = np.asarray(heads.unembed(config, params, hidden), np.float64)
    capped = heads.unembed(dataclasses.replace(config, logit_softcap=0.5), params, hidden)
    np.testing.assert_allclose(capped, 0.5 * np.tanh(plain / 0.5), atol=1e-6)
    assert float(jnp.abs(capped).max()) <= 0.5 < np.abs(plain).max()


def test_logits_of_bfloat16_states_are_accumulated_in_float32(config, params):
    hidden = jax.random.normal(jax.random.key(1), (4, config.width), jnp.bfloat16)
    assert heads.unembed(config, params, hidden).dtype == jnp.float32


@pytest.fixture
def scored(config):
    """A program that scores 8 rows of 16 positions, four at once, with the gradient of all; and what it is given."""
    untied = dataclasses.replace(config, vocab_size=96, tied_embeddings=False, logit_softcap=4.0)
    keys = jax.random.split(jax.random.key(2), 3)
    states = jax.random.normal(keys[0], (8, 16, config.width))
    tokens, weights = jax.random.randint(keys[1], (8, 16), 0, 96), jax.random.normal(keys[2], (2, 8, 16))

    def total(params, states):
        scores = heads.token_scores(untied, params, states, tokens, 0.8)
        return (weights * jnp.stack(scores)).sum(), scores

    params = {"unembedding": jax.random.normal(jax.random.key(3), (config.width, 96))}
    return untied, jax.value_and_grad(total, (0, 1), has_aux=True), params, states


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "tensor=8", "fsdp=2,tensor=2,sequence=2"])
def test_token_scores_on_eight_devices_are_those_of_one_and_no_logits_travel(scored, monkeypatch, mesh):
    config, program, params, states = scored
    shape = parse_mesh(mesh)
    here = 8 * 96 * 4 // (shape.data * shape.fsdp * shape.tensor)
    monkeypatch.setattr(chunked_logprobs, "LOGITS_AT_ONCE", here)
    expected = jax.jit(lambda *given: program(*given))(params, states)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        where = infer(params, mesh, (config,))
        given = jax.device_put((params, states), (where, batch_sharding(mesh)))
        compiled = jax.jit(program, out_shardings=(None, (where, None))).lower(*given).compile()
        found = jax.block_until_ready(compiled(*given))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected)

    loops, entry = compiled.as_text().split("\nENTRY ")
    travels = re.compile(r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
    sizes = [
        [int(n) for n in dims.split(",")] for text in travels.findall(loops) for dims in re.findall(r"\[(.+?)\]", text)
    ]
    assert all(96 not in size and 96 // shape.tensor not in size for size in sizes)
    assert bool(sizes) == (shape.tensor > 1)  # only sums over a split vocabulary stand inside the walk
    assert entry.count(" all-gather(") == (shape.fsdp > 1)


def test_token_scores_are_those_of_the_logits(config, params):
    states = jax.random.normal(jax.random.key(1), (2, 5, config.width))
    tokens = jax.random.randint(jax.random.key(2), (2, 5), 0, config.vocab_size)
    logprob, entropy = jax.jit(heads.token_scores, static_argnums=0)(config, params, states, tokens, 0.7)
    logprobs = np.asarray(jax.nn.log_softmax(heads.unembed(config, params, states) / 0.7), np.float64)
    np.testing.assert_allclose(logprob, np.take_along_axis(logprobs, np.asarray(tokens)[..., None], -1)[..., 0], 1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(logprobs) * logprobs).sum(-1), rtol=1e-5)


def test_a_head_is_a_dot_product_and_a_bias():
    head = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.float32(0.5)}
    assert heads.apply_head(head, jnp.array([[3.0, 1.0], [0.0, 0.25]])).tolist() == [1.5, 0.0]
    assert heads.apply_head(head, jnp.ones((2, 3, 2), jnp.bfloat16)).dtype == jnp.float32


def test_a_fresh_value_head_predicts_zero(config):
    features = jax.random.normal(jax.random.key(1), (3, 5, config.width))
    assert not heads.apply_head(heads.init_value_head(config), features).any()


def test_a_fresh_reward_head_has_variance_one_over_width_plus_one(config, key):
    wide = dataclasses.replace(config, width=4096)
    head = heads.init_reward_head(wide, key)
    # The standard deviation of 4096 normals is known to 1.1 %: 5 % is over four of those.
    assert abs(float(head["kernel"].std()) * 4097**0.5 - 1) < 0.05
    assert float(head["bias"]) == 0


def test_a_reward_model_keeps_the_trunk_that_it_is_given(config, params, key):
    model = heads.init_reward_model(config, key, trunk=params["trunk"])
    assert model["trunk"] is params["trunk"]
    assert set(heads.init_reward_model(config, key)) == {"trunk", "head"}


def test_last_token_finds_the_last_real_token_under_either_padding():
    states = jnp.tile(jnp.arange(5.0)[None, :, None], (4, 1, 2))
    mask = jnp.array(
        [
            [True, True, False, False, False],
            [False, False, True, True, True],
            [False, True, True, False, False],
            [False] * 5,
        ]
    )
    assert heads.last_token(states, mask)[:, 0].tolist() == [1.0, 4.0, 2.0, 0.0]


@pytest.mark.parametrize("kind", ["final_norm", "pre_norm"])
def test_reward_features_do_not_depend_on_padding(config, params, batch, kind):
    tokens, mask = batch
    found = features_of(config, params["trunk"], tokens, mask, kind)
    assert found.shape == (3, config.width)
    assert found.dtype == jnp.float32
    for row, length in enumerate((6, 2, 4)):
        left_tokens = jnp.pad(tokens[row : row + 1, :length], ((0, 0), (8 - length, 0)))
        left_mask = jnp.pad(jnp.ones((1, length), bool), ((0, 0), (8 - length, 0)))
        moved = features_of(config, params["trunk"], left_tokens, left_mask, kind)
        np.testing.assert_allclose(moved[0], found[row], atol=2e-5)


def test_the_two_kinds_of_features_differ_by_the_last_norm(config, params, batch):
    final, residual = (features_of(config, params["trunk"], *batch, kind) for kind in heads.FEATURES)
    size = np.sqrt(np.square(residual).mean(axis=-1, keepdims=True) + config.norm_epsilon)
    np.testing.assert_allclose(final, np.asarray(residual) / size, atol=1e-5)


def test_unknown_features_are_refused(config, params, batch):
    with pytest.raises((ValueError, TypeError), match="middle"):
        heads.reward_features(config, params["trunk"], *batch, "middle")


def test_response_logits_score_each_response_token_from_the_position_before(config, params):
    prompt = jnp.array([[0, 0, 5], [7, 8, 9]], jnp.int32)
    prompt_mask = jnp.array([[False, False, True], [True, True, True]])
    response = jnp.array([[4, 6], [3, 0]], jnp.int32)
    response_mask = jnp.array([[True, True], [True, False]])
    rollout = Rollout(
        prompts=Prompts(tokens=prompt, mask=prompt_mask, index=jnp.arange(2)),
        tokens=response,
        mask=response_mask,
        logprob=jnp.zeros((2, 2)),
        sampling_logprob=jnp.zeros((2, 2)),
        finished=jnp.array([False, True]),
    )
    found = jax.jit(heads.response_logits, static_argnums=0)(config, params, rollout)
    assert found.shape == (2, 2, config.vocab_size)
    bare = jnp.array([[5, 4, 6]], jnp.int32)
    hidden = jax.jit(apply_trunk, static_argnums=0)(config, params["trunk"], bare, jnp.ones((1, 3), bool)).final
    np.testing.assert_allclose(found[:1], heads.unembed(config, params, hidden)[:, :2], atol=2e-5)
