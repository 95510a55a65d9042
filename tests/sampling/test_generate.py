"""Sampling: keys a (sequence, position), stopping, log-probabilities, and what a sample may not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy, response_logits
from rlhf_jax.models.quantised import stored_weights
from rlhf_jax.parallel.mesh import MeshShape, make_mesh
from rlhf_jax.sampling import decoding, queue
from rlhf_jax.sampling import generate as generate_module
from rlhf_jax.sampling.decoding import draw, sequence_keys
from rlhf_jax.sampling.filters import SamplingConfig, filter_logits
from rlhf_jax.sampling.generate import generate, repeat_prompts
from rlhf_jax.sampling.mixture import generate_mixture
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
# Three stop tokens out of twenty: most of the responses below end, at different lengths.
SAMPLING = SamplingConfig(max_new_tokens=10, stop_tokens=(3, 7, 11), pad_token=19)
ROWS = [[5, 1], [2, 4, 6, 8, 1], [9], [12, 13, 14], [5, 1], [0, 0, 17, 16, 2], [18], [10, 4]]

sample = jax.jit(generate, static_argnums=(0, 4))


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_policy, static_argnums=0)(CONFIG, jax.random.key(0))


def prompts_of(rows, index=None, length: int = 5) -> Prompts:
    tokens, mask = np.full((len(rows), length), 19, np.int32), np.zeros((len(rows), length), bool)
    for row, ids in enumerate(rows):
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    index = range(len(rows)) if index is None else index
    return Prompts(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), index=jnp.asarray(list(index), jnp.int32))


PROMPTS = prompts_of(ROWS)


def assert_same(rollout, other, order=slice(None)):
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(rollout[name], other[name][order])
    for name in ("logprob", "sampling_logprob"):
        np.testing.assert_allclose(rollout[name], other[name][order], atol=2e-5)


# Stopping and padding


def test_responses_end_with_the_first_stop_token_and_are_padded_after_it(params, key):
    rollout = sample(CONFIG, params, PROMPTS, key, SAMPLING)
    lengths = []
    for row in range(len(ROWS)):
        tokens = np.asarray(rollout.tokens[row])
        stops = np.flatnonzero(np.isin(tokens, SAMPLING.stop_tokens))
        length = stops[0] + 1 if stops.size else SAMPLING.max_new_tokens
        assert np.asarray(rollout.mask[row]).tolist() == [t < length for t in range(SAMPLING.max_new_tokens)]
        assert bool(rollout.finished[row]) == bool(stops.size)
        assert (tokens[length:] == SAMPLING.pad_token).all()
        assert (np.asarray(rollout.logprob[row, length:]) == 0).all()
        assert (np.asarray(rollout.sampling_logprob[row, length:]) == 0).all()
        assert (np.asarray(rollout.logprob[row, :length]) < 0).all()
        lengths.append(length)
    assert len(set(lengths)) > 2
    assert 0 < int(rollout.finished.sum())


def test_without_stop_tokens_every_response_has_full_length(params, key):
    rollout = sample(CONFIG, params, PROMPTS, key, dataclasses.replace(SAMPLING, stop_tokens=()))
    assert rollout.mask.all()
    assert not rollout.finished.any()


def test_a_stop_token_at_the_last_position_finishes(params, key):
    """With one new token, finished means that it is a stop token."""
    every = tuple(range(10))
    rollout = sample(CONFIG, params, PROMPTS, key, dataclasses.replace(SAMPLING, max_new_tokens=1, stop_tokens=every))
    assert rollout.finished.tolist() == (rollout.tokens[:, 0] < 10).tolist()
    assert 0 < int(rollout.finished.sum()) < len(ROWS)


def test_the_loop_stops_when_every_row_is_done(params, key, monkeypatch):
    """The trunk runs once for the prompts and once for every token but the last of the longest response."""
    runs = []

    def counting(*arguments):
        jax.debug.callback(lambda: runs.append(1))
        return apply_trunk(*arguments)

    apply_trunk = decoding.apply_trunk
    monkeypatch.setattr(decoding, "apply_trunk", counting)
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=20, stop_tokens=tuple(range(10)))
    rollout = jax.block_until_ready(jax.jit(lambda: generate(CONFIG, params, PROMPTS, key, sampling))())
    jax.effects_barrier()
    longest = int(rollout.mask.sum(axis=1).max())
    assert rollout.finished.all()
    assert 1 < longest < 20
    assert len(runs) == longest


def test_prompt_and_types_pass_through(params, key):
    rollout = sample(CONFIG, params, PROMPTS, key, SAMPLING)
    jax.tree.map(np.testing.assert_array_equal, rollout.prompts, PROMPTS)
    assert rollout.tokens.dtype == jnp.int32
    assert rollout.sequences.tokens.shape == (8, 15)
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert sample(half, params, PROMPTS, key, SAMPLING).logprob.dtype == jnp.float32


# What a sample depends on


def test_the_same_key_gives_the_same_samples_and_another_key_others(params, key):
    first = sample(CONFIG, params, PROMPTS, key, SAMPLING)
    assert_same(sample(CONFIG, params, PROMPTS, key, SAMPLING), first)
    other = sample(CONFIG, params, PROMPTS, jax.random.key(1), SAMPLING)
    assert (np.asarray(first.tokens) != np.asarray(other.tokens)).any(axis=1).sum() >= 7


def test_permuted_rows_give_permuted_samples(params, key):
    whole = sample(CONFIG, params, PROMPTS, key, SAMPLING)
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    permuted = sample(CONFIG, params, jax.tree.map(lambda leaf: leaf[order], PROMPTS), key, SAMPLING)
    assert_same(permuted, whole, order)


def test_a_sample_does_not_change_when_other_prompts_leave(params, key):
    whole = sample(CONFIG, params, PROMPTS, key, SAMPLING)
    chosen = np.array([1, 5])
    alone = sample(CONFIG, params, jax.tree.map(lambda leaf: leaf[chosen], PROMPTS), key, SAMPLING)
    assert_same(alone, whole, chosen)


@pytest.mark.parametrize("length", [8, 22])
def test_a_sample_does_not_change_when_left_padding_grows(params, key, length):
    whole = sample(CONFIG, params, PROMPTS, key, SAMPLING)
    assert_same(sample(CONFIG, params, prompts_of(ROWS, length=length), key, SAMPLING), whole)


def test_a_shorter_limit_cuts_the_same_responses(params, key):
    whole = sample(CONFIG, params, PROMPTS, key, SAMPLING)
    short = sample(CONFIG, params, PROMPTS, key, dataclasses.replace(SAMPLING, max_new_tokens=4))
    np.testing.assert_array_equal(short.tokens, whole.tokens[:, :4])
    np.testing.assert_allclose(short.logprob, whole.logprob[:, :4], atol=2e-5)


def test_equal_prompts_differ_by_their_index_only(params, key):
    rows = [[5, 1]] * 4
    different = sample(CONFIG, params, prompts_of(rows), key, SAMPLING)
    assert len({tuple(row) for row in np.asarray(different.tokens).tolist()}) == 4
    equal = sample(CONFIG, params, prompts_of(rows, index=[2, 2, 2, 2]), key, SAMPLING)
    assert_same(equal, different, np.array([2, 2, 2, 2]))


def test_jit_and_vmap_change_nothing(params):
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=4)
    keys = jax.random.split(jax.random.key(5), 3)
    together = jax.jit(jax.vmap(lambda key: generate(CONFIG, params, PROMPTS, key, sampling)))(keys)
    for lane, key in enumerate(keys):
        alone = sample(CONFIG, params, PROMPTS, key, sampling)
        assert_same(alone, jax.tree.map(lambda leaf: leaf[lane], together))  # noqa: B023 - used at once
    assert_same(generate(CONFIG, params, PROMPTS, keys[0], sampling), jax.tree.map(lambda leaf: leaf[0], together))


def test_the_compiled_loop_never_calls_the_host(params, key):
    compiled = sample.lower(CONFIG, params, PROMPTS, key, SAMPLING).compile()
    text = compiled.as_text().lower()
    assert "while" in text
    for word in ("callback", "infeed", "outfeed"):
        assert word not in text
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(compiled(params, PROMPTS, key))


# Log-probabilities


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_logprob_is_the_log_softmax_of_the_full_forward(params, key, temperature):
    rollout = sample(CONFIG, params, PROMPTS, key, dataclasses.replace(SAMPLING, temperature=temperature))
    logits = jax.jit(response_logits, static_argnums=0)(CONFIG, params, rollout)
    logprobs = np.asarray(jax.nn.log_softmax(logits / temperature, axis=-1))
    expected = np.take_along_axis(logprobs, np.asarray(rollout.tokens)[..., None], axis=-1)[..., 0]
    mask = np.asarray(rollout.mask)
    np.testing.assert_allclose(np.asarray(rollout.logprob)[mask], expected[mask], atol=1e-4)
    np.testing.assert_array_equal(rollout.logprob, rollout.sampling_logprob)


def test_sampling_logprob_is_that_of_the_filtered_distribution(params, key):
    sampling = dataclasses.replace(SAMPLING, temperature=0.8, top_k=6, top_p=0.9, min_p=0.05)
    rollout = sample(CONFIG, params, PROMPTS, key, sampling)
    logits = jax.jit(response_logits, static_argnums=0)(CONFIG, params, rollout)
    mask, taken = np.asarray(rollout.mask), np.asarray(rollout.tokens)[..., None]
    for found, distribution in (
        (rollout.logprob, logits / 0.8),
        (rollout.sampling_logprob, jax.vmap(lambda row: filter_logits(row, sampling))(logits)),
    ):
        logprobs = np.asarray(jax.nn.log_softmax(distribution, axis=-1))
        expected = np.take_along_axis(logprobs, taken, axis=-1)[..., 0]
        np.testing.assert_allclose(np.asarray(found)[mask], expected[mask], atol=1e-4)
    assert (np.asarray(rollout.sampling_logprob) >= np.asarray(rollout.logprob) - 1e-6).all()


def test_greedy_takes_the_most_likely_and_scores_it_at_temperature_one(params, key):
    rollout = sample(CONFIG, params, PROMPTS, key, dataclasses.replace(SAMPLING, temperature=0.0))
    logits = jax.jit(response_logits, static_argnums=0)(CONFIG, params, rollout)
    mask = np.asarray(rollout.mask)
    np.testing.assert_array_equal(np.asarray(rollout.tokens)[mask], np.asarray(logits.argmax(axis=-1))[mask])
    best = np.asarray(jax.nn.log_softmax(logits, axis=-1).max(axis=-1))
    np.testing.assert_allclose(np.asarray(rollout.logprob)[mask], best[mask], atol=1e-4)
    assert not rollout.sampling_logprob.any()
    other = sample(CONFIG, params, PROMPTS, jax.random.key(9), dataclasses.replace(SAMPLING, temperature=0.0))
    np.testing.assert_array_equal(other.tokens, rollout.tokens)


# One draw

LOGITS = jnp.array([0.0, 1.5, -1.0, 0.5, 0.7, -0.3])


def draws(logits, keys, position, sampling):
    return jax.jit(lambda logits, keys, position: draw(logits, keys, position, sampling))(logits, keys, position)


@pytest.fixture(params=["of all", "of groups"])
def noise(request, monkeypatch):
    """How one of six tokens is drawn: at once, or a group of groups of two, then a group, then the token."""
    if request.param == "of groups":
        monkeypatch.setattr(decoding, "FEW", 2)
        monkeypatch.setattr(decoding, "MEMBERS", 2)


def chi_square(counts, probabilities) -> float:
    expected = probabilities * counts.sum()
    return float((np.square(counts - expected) / expected).sum())


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 4}, {"top_p": 0.8}])
def test_frequencies_match_the_filtered_probabilities(options):
    """20,000 draws at a fixed seed; with up to 5 degrees of freedom, chi-square exceeds 40 once in 6 million seeds."""
    sampling = dataclasses.replace(SAMPLING, **options)
    keys = sequence_keys(jax.random.key(0), jnp.arange(20_000))
    logits = jnp.broadcast_to(LOGITS[None], (20_000, 6))
    token, logprob, sampling_logprob = draws(logits, keys, jnp.int32(3), sampling)
    probabilities = np.asarray(jax.nn.softmax(filter_logits(LOGITS[None], sampling), axis=-1))[0]
    possible = probabilities > 0
    counts = np.bincount(np.asarray(token), minlength=6)
    assert (counts[~possible] == 0).all()
    assert chi_square(counts[possible], probabilities[possible]) < 40
    policy = np.asarray(jax.nn.log_softmax(LOGITS / sampling.temperature))
    np.testing.assert_allclose(logprob, policy[np.asarray(token)], atol=1e-5)
    np.testing.assert_allclose(sampling_logprob, np.log(probabilities[np.asarray(token)]), atol=1e-5)


def test_sampling_probabilities_of_all_kept_tokens_sum_to_one():
    sampling = dataclasses.replace(SAMPLING, top_k=4, temperature=0.9)
    keys = sequence_keys(jax.random.key(0), jnp.arange(2_000))
    token, _, kept_logprob = draws(jnp.broadcast_to(LOGITS[None], (2_000, 6)), keys, jnp.int32(0), sampling)
    by_token = {int(t): float(logprob) for t, logprob in zip(token, kept_logprob, strict=True)}
    assert len(by_token) == 4
    assert sum(np.exp(list(by_token.values()))) == pytest.approx(1, abs=1e-5)


@pytest.mark.usefixtures("noise")
def test_neighbouring_positions_are_independent():
    """Pairs of draws at positions 0 and 1: 35 degrees of freedom, chi-square above 110 once in a billion seeds."""
    keys = sequence_keys(jax.random.key(0), jnp.arange(20_000))
    logits = jnp.broadcast_to(LOGITS[None], (20_000, 6))
    first, second = (np.asarray(draws(logits, keys, jnp.int32(position), SAMPLING)[0]) for position in (0, 1))
    probabilities = np.asarray(jax.nn.softmax(LOGITS))
    counts = np.bincount(6 * first + second, minlength=36)
    assert chi_square(counts, np.outer(probabilities, probabilities).ravel()) < 110


@pytest.mark.parametrize(("size", "options"), [(2_000, {}), (2_000, {"top_k": 40}), (2_048, {"temperature": 0.7})])
def test_a_large_vocabulary_is_drawn_from_in_groups(size, options):
    """Probabilities as of words, in no order; chi-square of 30 and the rest exceeds 90 once in 10 million seeds."""
    sampling = dataclasses.replace(SAMPLING, **options)
    rank = np.random.default_rng(0).permutation(size)
    logits = jnp.asarray(-1.2 * np.log1p(rank)[None], jnp.float32)
    keys = sequence_keys(jax.random.key(0), jnp.arange(20_000))
    many = jnp.broadcast_to(logits, (20_000, size))
    token, logprob, sampling_logprob = (np.asarray(part) for part in draws(many, keys, jnp.int32(0), sampling))
    kept = np.asarray(jax.nn.log_softmax(filter_logits(logits, sampling)[0]))
    likely = np.argsort(-kept)[:30]
    counts = np.bincount(token, minlength=size)
    each = np.append(np.exp(kept[likely]), 1 - np.exp(kept[likely]).sum())
    assert chi_square(np.append(counts[likely], 20_000 - counts[likely].sum()), each) < 90
    assert np.isfinite(kept[token]).all() and len(np.unique(token % (size // decoding.MEMBERS))) > 10
    np.testing.assert_allclose(sampling_logprob, kept[token], atol=1e-5)
    policy = np.asarray(jax.nn.log_softmax(logits[0] / sampling.temperature))
    np.testing.assert_allclose(logprob, policy[token], atol=1e-5)


def test_greedy_and_nan_in_a_large_vocabulary():
    logits = jax.random.normal(jax.random.key(1), (8, 2_000)).at[0].set(jnp.nan)
    keys = sequence_keys(jax.random.key(0), jnp.arange(8))
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    token, logprob, sampling_logprob = draws(logits, keys, jnp.int32(0), greedy)
    np.testing.assert_array_equal(token[1:], logits[1:].argmax(axis=-1))
    np.testing.assert_allclose(logprob[1:], jax.nn.log_softmax(logits[1:]).max(axis=-1), atol=1e-5)
    np.testing.assert_array_equal(sampling_logprob[1:], 0.0)
    token, logprob, _ = draws(logits, keys, jnp.int32(0), SAMPLING)
    assert int(token[0]) == 1_999 and np.isnan(logprob[0]) and np.isfinite(logprob[1:]).all()


def test_a_vocabulary_split_over_devices_gives_the_same_draws_and_stays_split():
    keys = sequence_keys(jax.random.key(0), jnp.arange(16))
    logits = 2.0 * jax.random.normal(jax.random.key(1), (16, 32_000))
    mesh = make_mesh(MeshShape(tensor=8), jax.devices()[:8])
    split = jax.device_put(logits, jax.NamedSharding(mesh, jax.P(None, "tensor")))
    alone, found = draws(logits, keys, jnp.int32(0), SAMPLING), draws(split, keys, jnp.int32(0), SAMPLING)
    np.testing.assert_array_equal(found[0], alone[0])
    np.testing.assert_allclose(found[1], alone[1], atol=1e-5)
    program = jax.jit(draw, static_argnums=3).lower(split, keys, jnp.int32(0), SAMPLING).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program and "all-to-all" not in program


# Mixtures of two policies

SMALL = dataclasses.replace(CONFIG, vocab_size=5, layers=1, initializer_range=0.6)
TWO_TOKENS = SamplingConfig(max_new_tokens=2, stop_tokens=(0,), pad_token=0, temperature=0.8)
DRAWS = 4_000

mixed = jax.jit(generate_mixture, static_argnums=(0, 6))


@pytest.fixture(scope="module")
def policies():
    fresh = jax.jit(init_policy, static_argnums=0)
    return fresh(SMALL, jax.random.key(1)), fresh(SMALL, jax.random.key(2))


@pytest.fixture(scope="module")
def one_prompt() -> Prompts:
    tokens = jnp.broadcast_to(jnp.array([[2, 4]], jnp.int32), (DRAWS, 2))
    return Prompts(tokens=tokens, mask=jnp.ones((DRAWS, 2), bool), index=jnp.arange(DRAWS, dtype=jnp.int32))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_mixture_has_the_distribution_that_enumeration_gives(policies, one_prompt, key, eta):
    """Each of the 21 responses as often, and with the log-probability, that both policies' full forwards give.

    With 20 degrees of freedom, chi-square exceeds 90 once in 10 billion seeds.
    """
    drawn = mixed(SMALL, *policies, jnp.float32(eta), one_prompt, key, TWO_TOKENS)
    both = np.array([[first, second] for first in range(5) for second in range(5)], np.int32)
    every = jax.tree.map(lambda leaf: leaf[:25], drawn).replace(tokens=jnp.asarray(both), mask=jnp.ones((25, 2), bool))
    own, other = (np.asarray(response_logits(SMALL, policy, every), np.float64) for policy in policies)
    unnormalised = ((1 - eta) * own + eta * other) / 0.8
    logprobs = unnormalised - np.log(np.exp(unnormalised).sum(axis=-1, keepdims=True))
    by_token = np.take_along_axis(logprobs, both[..., None], axis=-1)[..., 0]
    by_token[:5, 1] = 0.0  # a response ends with the stop token 0
    place = 5 * np.asarray(drawn.tokens[:, 0]) + np.asarray(drawn.tokens[:, 1])
    np.testing.assert_allclose(drawn.logprob, by_token[place], atol=2e-5)
    np.testing.assert_array_equal(drawn.logprob, drawn.sampling_logprob)
    possible = np.r_[0, 5:25]
    probabilities = np.exp(by_token.sum(axis=1))[possible]
    assert probabilities.sum() == pytest.approx(1.0)
    assert chi_square(np.bincount(place, minlength=25)[possible], probabilities) < 90


def test_a_mixture_with_all_weight_on_one_policy_draws_its_samples(policies, one_prompt, key):
    for eta, policy in zip((0.0, 1.0), policies, strict=True):
        found = mixed(SMALL, *policies, jnp.float32(eta), one_prompt, key, TWO_TOKENS)
        assert_same(found, sample(SMALL, policy, one_prompt, key, TWO_TOKENS))


def test_a_mixture_of_a_policy_with_itself_is_the_policy(params, key):
    """Rows that end at different lengths, and a weight that is a Python number."""
    rollout = jax.jit(lambda key: generate_mixture(CONFIG, params, params, 0.25, PROMPTS, key, SAMPLING))(key)
    assert_same(rollout, sample(CONFIG, params, PROMPTS, key, SAMPLING))


# Refusals


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_weights_outside_zero_to_one_are_refused(params, key, eta):
    with pytest.raises(ValueError, match="give the second policy a weight from 0 to 1"):
        generate_mixture(CONFIG, params, params, eta, PROMPTS, key, SAMPLING)


def test_prompts_and_responses_beyond_the_context_are_refused(params, key):
    with pytest.raises(ValueError, match="prompts of 23 tokens and responses of 10 exceed the model's context of 32"):
        generate(CONFIG, params, prompts_of(ROWS, length=23), key, SAMPLING)


@pytest.mark.parametrize(
    "options", [{"stop_tokens": (3, 20)}, {"stop_tokens": (-1,)}, {"pad_token": 20}, {"pad_token": -100}]
)
def test_tokens_outside_the_vocabulary_are_refused(params, key, options):
    with pytest.raises(ValueError, match="not in the vocabulary of 20"):
        generate(CONFIG, params, PROMPTS, key, dataclasses.replace(SAMPLING, **options))


# Several responses a prompt, growing room, and a queue


def test_samples_of_one_prompt_are_those_of_the_prompt_repeated(params, key):
    """Each prompt is read once, its cache shared; samples equal those of as many copies of the prompt."""
    shared = jax.jit(generate, static_argnums=(0, 4, 5))(CONFIG, params, PROMPTS, key, SAMPLING, 3)
    apart = sample(CONFIG, params, repeat_prompts(PROMPTS, 3), key, SAMPLING)
    assert_same(shared, apart)
    assert len({tuple(row) for row in np.asarray(shared.tokens[:3]).tolist()}) == 3


@pytest.mark.parametrize("local", [False, True])
def test_a_cache_that_grows_changes_no_sample(params, key, monkeypatch, local):
    config = dataclasses.replace(CONFIG, window=4, local_layers=(True, False)) if local else CONFIG
    whole = jax.jit(lambda: generate(config, params, PROMPTS, key, SAMPLING))()
    monkeypatch.setattr(generate_module, "FIRST_ROOM", 2)
    assert_same(jax.jit(lambda: generate(config, params, PROMPTS, key, SAMPLING))(), whole)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(("slots", "samples", "waiting"), [(3, 1, 16), (1, 1, 16), (5, 3, 2), (8, 1, 16)])
def test_a_queue_draws_the_samples_of_a_batch(params, key, monkeypatch, slots, samples, waiting, local):
    """Fewer slots than responses, free ones filled one or several at a time: not one sample differs."""
    config = dataclasses.replace(CONFIG, window=4, local_layers=(True, False)) if local else CONFIG
    monkeypatch.setattr(queue, "WAITING", waiting)
    for name in ("FEW", "MEMBERS"):  # tokens are drawn as those of a large vocabulary
        monkeypatch.setattr(decoding, name, 4)
    few = dataclasses.replace(SAMPLING, decode=queue.InTurns(slots))
    together = jax.jit(lambda: generate(config, params, PROMPTS, key, SAMPLING, samples))()
    in_turns = jax.jit(lambda: generate(config, params, PROMPTS, key, few, samples))()
    assert_same(in_turns, together)
    np.testing.assert_array_equal(in_turns.prompts.index, together.prompts.index)


def test_a_queue_takes_about_as_many_steps_as_there_are_tokens_for_each_slot(params, key, monkeypatch):
    """Steps of the loop are counted as they run; all at once takes as many steps as the longest response has tokens."""
    steps, read = [], queue.read

    def counting(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return read(*arguments)

    monkeypatch.setattr(queue, "read", counting)
    prompts, slots = prompts_of(ROWS * 4), 4
    in_turns = dataclasses.replace(SAMPLING, decode=queue.InTurns(slots))
    found = jax.jit(lambda: generate(CONFIG, params, prompts, key, in_turns))()
    jax.effects_barrier()
    total = int(found.mask.sum())
    assert total / slots <= len(steps) <= total / slots + 2 * SAMPLING.max_new_tokens


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_a_cache_in_fewer_bits_changes_log_probabilities_by_its_rounding(params, key, storage):
    """Against the policy as it is trained: both keep about 8 bits, a relative 1/256 of the logits in each layer."""
    narrow = dataclasses.replace(SAMPLING, stop_tokens=(), cache=storage)
    found = sample(CONFIG, params, PROMPTS, key, narrow)
    exact, logits = logprob_under(params, found)
    gap = np.abs(np.asarray(found.logprob - exact))
    assert 0 < gap.max() < float(jnp.ptp(logits, axis=-1).max()) * CONFIG.layers / 256
    assert gap[:, 0].max() < 1e-5  # the first token is drawn from what the prompt's forward pass computed


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_weights_in_fewer_bits_draw_from_the_rounded_policy(params, key, storage):
    found = sample(CONFIG, params, PROMPTS, key, dataclasses.replace(SAMPLING, weights=storage))
    rounded = jax.jit(stored_weights, static_argnums=1)(params, storage)
    own, trained = (np.asarray(logprob_under(policy, found)[0]) for policy in (rounded, params))
    mask = np.asarray(found.mask)
    np.testing.assert_allclose(np.asarray(found.logprob)[mask], own[mask], atol=2e-5)
    assert np.abs(own - trained)[mask].max() > 1e-3  # which is another policy than the one that is trained


def logprob_under(policy, found):
    """Log-probabilities of a rollout's tokens by one forward pass, and its logits."""
    logits = jax.jit(response_logits, static_argnums=0)(CONFIG, policy, found)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), found.tokens[..., None], axis=-1)[..., 0], logits


def test_no_slots_are_refused():
    with pytest.raises(ValueError, match=r"InTurns\.slots is 0; it must be at least 1"):
        queue.InTurns(0)
