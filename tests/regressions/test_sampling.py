"""Failures of sampling seen in other stacks: each faulty variant is kept here and shown to fail."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.models import attention
from rlhf_jax.models.attention import new_cache
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy, response_logits, unembed
from rlhf_jax.models.huggingface import load_config
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.sampling.decoding import draw, sequence_keys
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Prompts

CONFIG = ModelConfig(
    vocab_size=20,
    width=16,
    layers=2,
    heads=4,
    key_value_heads=2,
    feed_forward_width=24,
    context_length=32,
    initializer_range=0.3,
)
SAMPLING = SamplingConfig(max_new_tokens=10, stop_tokens=(3,))
PROMPTS = Prompts(
    tokens=jnp.array([[0, 5, 1], [2, 4, 6], [0, 0, 9], [5, 7, 1]], jnp.int32),
    mask=jnp.array([[False, True, True], [True, True, True], [False, False, True], [True, True, True]]),
    index=jnp.arange(4),
)

sample = jax.jit(generate, static_argnums=(0, 4))
logits_of_responses = jax.jit(response_logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_policy, static_argnums=0)(CONFIG, jax.random.key(0))


# 9.2 The same sampling noise in every call, because a default seed is re-used.


def generate_from_a_default_seed(params, prompts, seed: int = 0):
    """The fault: whoever calls this in a loop gets the same noise in every step."""
    return sample(CONFIG, params, prompts, jax.random.key(seed), SAMPLING)


def test_9_2_a_default_seed_repeats_its_samples(params):
    first, second = (generate_from_a_default_seed(params, PROMPTS) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, second.tokens)


def test_9_2_sampling_has_no_default_key(params):
    with pytest.raises(TypeError, match="key"):
        generate(CONFIG, params, PROMPTS, sampling=SAMPLING)


def test_9_2_every_step_of_an_algorithm_samples_anew(params):
    """The state carries the key, and the step is folded in."""
    algorithm = ppo(CONFIG, PPOConfig(sampling=SAMPLING), optax.sgd(0.0))
    state = algorithm.init(jax.random.key(0), {"policy": params})
    rollout = jax.jit(algorithm.rollout)
    responses = []
    for step in range(3):
        _, drawn = rollout(state.replace(step=jnp.int32(step)), PROMPTS)
        responses.append(np.asarray(drawn.tokens).tolist())
    assert responses[0] != responses[1] != responses[2] != responses[0]


def test_9_2_rows_of_one_call_do_not_share_noise(params):
    same = Prompts(tokens=PROMPTS.tokens[:1].repeat(4, 0), mask=PROMPTS.mask[:1].repeat(4, 0), index=PROMPTS.index)
    rollout = sample(CONFIG, params, same, jax.random.key(0), SAMPLING)
    assert len({tuple(row) for row in np.asarray(rollout.tokens).tolist()}) == 4


def keys_by_place(key, index):
    """The fault: noise belongs to the place in the micro-batch, so that every micro-batch draws the same."""
    return sequence_keys(key, jnp.arange(len(index)))


@pytest.mark.parametrize(("keys_of", "shared"), [(sequence_keys, False), (keys_by_place, True)])
def test_9_2_micro_batches_do_not_share_noise(keys_of, shared):
    logits, index = jnp.zeros((16, 1000)), jnp.arange(16)
    drawn = [
        np.asarray(draw(logits[rows], keys_of(jax.random.key(0), index[rows]), jnp.int32(0), SAMPLING)[0])
        for rows in (slice(0, 16), slice(0, 8), slice(8, 16))
    ]
    assert np.array_equal(drawn[1], drawn[2]) == shared
    assert np.array_equal(drawn[0], np.concatenate(drawn[1:])) == (not shared)


# 9.5 Old log-probs at temperature 1 while sampling at another temperature.


@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_9_5_the_first_ratio_is_one_at_the_sampling_temperature_only(params, temperature):
    options = dataclasses.replace(SAMPLING, temperature=temperature)
    rollout = sample(CONFIG, params, PROMPTS, jax.random.key(0), options)
    logits = logits_of_responses(CONFIG, params, rollout)
    mask = np.asarray(rollout.mask)

    def logprob_at(temperature):
        logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
        return np.asarray(jnp.take_along_axis(logprobs, rollout.tokens[..., None], axis=-1)[..., 0])[mask]

    updated = logprob_at(temperature)
    faulty = np.exp(updated - logprob_at(1.0))
    assert np.abs(faulty - 1).max() > 0.2
    # The reference is the policy itself, so that its KL is 0; the fault reports one of its own.
    assert abs((updated - logprob_at(1.0)).mean()) > 0.02
    ours = np.exp(updated - np.asarray(rollout.logprob)[mask])
    np.testing.assert_allclose(ours, 1.0, atol=1e-4)


# 9.8 `temperature=1` meaning greedy unless another option is given.


def draw_greedily_unless_told(logits, keys, position, sampling, do_sample: bool = False):
    """The fault: the temperature is read only behind a second switch."""
    if not do_sample:
        return jnp.argmax(logits, axis=-1)
    return draw(logits, keys, position, sampling)[0]


def test_9_8_a_temperature_of_one_samples():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.2]))[None], (2_000, 3))
    keys = sequence_keys(jax.random.key(0), jnp.arange(2_000))
    arguments = (logits, keys, jnp.int32(0), SAMPLING)
    assert not draw_greedily_unless_told(*arguments).any()
    share = np.bincount(np.asarray(draw(*arguments)[0]), minlength=3) / 2_000
    # The standard error of a share is at most 0.011: 0.06 is over five of those.
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.06)


def test_9_8_only_a_temperature_of_zero_is_greedy(params):
    greedy = sample(CONFIG, params, PROMPTS, jax.random.key(0), dataclasses.replace(SAMPLING, temperature=0.0))
    default = sample(CONFIG, params, PROMPTS, jax.random.key(0), SAMPLING)
    assert SAMPLING.temperature == 1.0
    assert not np.array_equal(greedy.tokens, default.tokens)


# 9.9 Padding attended to; position ids wrong under left padding; `rope_theta` ignored.


def states(config, params, tokens, mask, cache=None):
    return jax.jit(lambda params, tokens, mask: apply_trunk(config, params["trunk"], tokens, mask, cache))(
        params, tokens, mask
    )


def test_9_9_padding_is_not_attended(params):
    row, mask = PROMPTS.tokens[2:3], PROMPTS.mask[2:3]
    alone = states(CONFIG, params, row[:, 2:], mask[:, 2:]).final[0, -1]
    faulty = states(CONFIG, params, row, jnp.ones_like(mask)).final[0, -1]
    assert float(jnp.abs(faulty - alone).max()) > 0.1
    np.testing.assert_allclose(states(CONFIG, params, row, mask).final[0, -1], alone, atol=2e-5)


def decoded_after_left_padding(params):
    """The state of a fourth token from the cache of a padded prompt."""
    hidden = states(CONFIG, params, PROMPTS.tokens, PROMPTS.mask)
    cache = new_cache(hidden.keys, hidden.values, PROMPTS.mask, slots=8)
    return states(CONFIG, params, jnp.full((4, 1), 12, jnp.int32), jnp.ones((4, 1), bool), cache).final[:, 0]


def test_9_9_decoding_continues_the_positions_of_a_left_padded_prompt(params, monkeypatch):
    padded = np.asarray([0, 2])
    tokens = jnp.pad(PROMPTS.tokens, ((0, 0), (0, 1)), constant_values=12)
    mask = jnp.pad(PROMPTS.mask, ((0, 0), (0, 1)), constant_values=True)
    whole = states(CONFIG, params, tokens, mask).final[:, -1]
    np.testing.assert_allclose(decoded_after_left_padding(params), whole, atol=2e-5)

    counted = attention.positions_of

    def positions_by_slot(mask, cache=None):
        """The fault: the prompt's positions skip padding, a new token's position is its slot."""
        return counted(mask) if cache is None else jnp.broadcast_to(cache.length[None, None], mask.shape)

    monkeypatch.setattr(attention, "positions_of", positions_by_slot)
    faulty = decoded_after_left_padding(params)
    assert (jnp.abs(faulty - whole).max(axis=-1)[padded] > 0.02).all()


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters"])
def test_9_9_rope_theta_is_read_and_used(params, tmp_path, spelling):
    rope = {"rope_theta": 5.0} if spelling == "rope_theta" else {"rope_parameters": {"rope_theta": 5.0}}
    raw = {
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.width,
        "num_hidden_layers": CONFIG.layers,
        "num_attention_heads": CONFIG.heads,
        "num_key_value_heads": CONFIG.key_value_heads,
        "intermediate_size": CONFIG.feed_forward_width,
        "max_position_embeddings": CONFIG.context_length,
        "tie_word_embeddings": True,
        **rope,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    read = load_config(tmp_path)
    ignored = dataclasses.replace(read, rope_theta=10_000.0)
    tokens, mask = jnp.arange(12, dtype=jnp.int32)[None], jnp.ones((1, 12), bool)
    logits = [unembed(c, params, states(c, params, tokens, mask).final)[0, -1] for c in (read, ignored)]
    assert read.rope_theta == 5.0
    assert float(jnp.abs(logits[0] - logits[1]).max()) > 0.01


# 9.14 Options accepted with a typo, discovered (or not) after the first rollout.


@dataclasses.dataclass(frozen=True)
class SimpleOptions:
    temperature: float
    top_p: float


def options_from(given: dict) -> SimpleOptions:
    """The fault: options are looked up by name with a default, and nobody asks about the names left over."""
    return SimpleOptions(temperature=given.get("temperature", 1.0), top_p=given.get("top_p", 1.0))


def test_9_14_a_lookup_with_defaults_swallows_a_typo():
    assert options_from({"temprature": 0.2}).temperature == 1.0


@pytest.mark.parametrize("typo", ["temprature", "topp", "max_length", "do_sample"])
def test_9_14_a_misspelt_sampling_option_is_refused_when_it_is_written(typo):
    with pytest.raises(TypeError, match=typo):
        SamplingConfig(max_new_tokens=1, stop_tokens=(0,), **{typo: 1})
    with pytest.raises(TypeError, match=typo):
        dataclasses.replace(SAMPLING, **{typo: 1})


def test_9_14_a_misspelt_option_of_model_or_algorithm_is_refused():
    with pytest.raises(TypeError, match="rope_base"):
        dataclasses.replace(CONFIG, rope_base=500.0)
    with pytest.raises(TypeError, match="clip_range"):
        PPOConfig(sampling=SAMPLING, clip_range=0.2)


def test_9_14_an_option_that_the_algorithm_cannot_honour_is_refused():
    with pytest.raises(ValueError, match="top_k=None"):
        PPOConfig(sampling=dataclasses.replace(SAMPLING, top_k=5))
