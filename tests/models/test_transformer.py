"""What must hold of the trunk whatever its weights: causality, padding, the cache, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.models.adapters import AdapterConfig, attach, init_adapter, merge
from rlhf_jax.models.attention import new_cache, write
from rlhf_jax.models.config import Experts, ModelConfig, RopeScaling
from rlhf_jax.models.heads import init_policy, unembed
from rlhf_jax.models.transformer import apply_trunk, init_trunk, logical_axes

run = jax.jit(apply_trunk, static_argnums=0)
init = jax.jit(init_policy, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, mask):
    return unembed(config, params, apply_trunk(config, params["trunk"], tokens, mask).final)


def padded(rows, left: int, right: int):
    """Token rows of one length between padding of token 19: (tokens, mask)."""
    tokens = jnp.pad(jnp.asarray(rows), ((0, 0), (left, right)), constant_values=19)
    mask = jnp.pad(jnp.ones(jnp.shape(rows), bool), ((0, 0), (left, right)))
    return tokens, mask


@pytest.fixture
def rows():
    return np.random.default_rng(0).integers(0, 19, size=(3, 7), dtype=np.int32)


@pytest.mark.parametrize(("left", "right"), [(4, 0), (0, 4), (9, 0), (2, 3)])
def test_padding_on_either_side_changes_no_logit(config, params, rows, left, right):
    bare = logits_of(config, params, *padded(rows, 0, 0))
    found = logits_of(config, params, *padded(rows, left, right))[:, left : left + 7]
    assert float(jnp.abs(bare).max()) > 0.5
    np.testing.assert_allclose(found, bare, atol=2e-5)


def test_rows_do_not_hear_each_other(config, params, rows):
    together = logits_of(config, params, *padded(rows, 0, 0))
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(logits_of(config, params, *padded(rows[order], 0, 0)), together[order], atol=2e-5)
    np.testing.assert_allclose(logits_of(config, params, *padded(rows[1:2], 0, 0)), together[1:2], atol=2e-5)


def test_what_stands_at_padding_does_not_matter(config, params, rows):
    tokens, mask = padded(rows, 3, 2)
    other = jnp.where(mask, tokens, 5)
    real = np.asarray(mask)
    np.testing.assert_array_equal(
        np.asarray(logits_of(config, params, tokens, mask))[real],
        np.asarray(logits_of(config, params, other, mask))[real],
    )


def gradient_to_embeddings(config, params, tokens, mask):
    """How strongly the hidden state at each position depends on the embedding of each token: [position, token]."""
    direction = jax.random.normal(jax.random.key(1), (config.width,))

    @jax.jit
    def jacobian(embedding):
        def states(embedding):
            trunk = {**params["trunk"], "embed": {"embedding": embedding}}
            return apply_trunk(config, trunk, tokens[None], mask[None]).final[0] @ direction

        pull = jax.vjp(states, embedding)[1]
        return jax.lax.map(lambda one: pull(one)[0], jnp.eye(len(tokens)))  # a mixture of experts has no vmap

    return np.abs(np.asarray(jacobian(params["trunk"]["embed"]["embedding"]))).max(axis=-1)


def test_no_gradient_flows_from_a_state_to_later_tokens(config, params):
    tokens = jnp.arange(8, dtype=jnp.int32)
    strength = gradient_to_embeddings(config, params, tokens, jnp.ones(8, bool))[:, :8]
    assert (strength[np.triu_indices(8, 1)] == 0).all()
    assert (strength[np.tril_indices(8)] > 1e-6).all()


def test_no_gradient_flows_from_real_tokens_to_padding(config, params):
    tokens = jnp.array([19, 19, 0, 1, 2, 18], jnp.int32)
    mask = jnp.array([False, False, True, True, True, False])
    strength = gradient_to_embeddings(config, params, tokens, mask)[2:5]
    assert (strength[:, [18, 19]] == 0).all()
    assert (strength[2, :3] > 1e-6).all()


@pytest.mark.parametrize(("key_value_heads", "chunks"), [(2, (1, 1, 1, 1)), (1, (2, 2)), (4, (1, 3))])
def test_cached_decoding_equals_the_full_forward(config, rows, key, key_value_heads, chunks):
    """Left-padded prompts of 12 slots, then 4 tokens in chunks; the cache fills the model's whole context."""
    config = dataclasses.replace(config, key_value_heads=key_value_heads)
    params = init(config, key)
    prompt = 12
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 19, size=(3, 16), dtype=np.int32))
    mask = jnp.arange(16)[None] >= jnp.array([0, 5, 11])[:, None]
    full = run(config, params["trunk"], tokens, mask)

    hidden = run(config, params["trunk"], tokens[:, :prompt], mask[:, :prompt])
    cache = new_cache(hidden.keys, hidden.values, mask[:, :prompt], slots=config.context_length)
    states, start = [hidden.final], prompt
    for size in chunks:
        piece = slice(start, start + size)
        hidden = run(config, params["trunk"], tokens[:, piece], mask[:, piece], cache)
        cache = write(cache, hidden.keys, hidden.values, mask[:, piece])
        states.append(hidden.final)
        start += size
    real = np.asarray(mask)
    np.testing.assert_allclose(np.concatenate(states, axis=1)[real], np.asarray(full.final)[real], atol=2e-5)
    np.testing.assert_allclose(
        np.moveaxis(np.asarray(cache.keys), 4, 2)[:, real], np.asarray(full.keys)[:, real], atol=2e-5
    )


def test_bfloat16_computation_is_close_and_its_logits_are_float32(config, params, rows):
    half = dataclasses.replace(config, dtype="bfloat16")
    tokens, mask = padded(rows, 2, 0)
    assert run(half, params["trunk"], tokens, mask).final.dtype == jnp.bfloat16
    exact, rough = (logits_of(c, params, tokens, mask)[:, 2:] for c in (config, half))
    assert rough.dtype == jnp.float32
    # bfloat16 has 8 bits: 2^-8 = 0.4 % a rounding, some dozens of roundings in two layers.
    assert float(jnp.sqrt(jnp.square(exact - rough).mean() / jnp.square(exact).mean())) < 0.03


def test_bfloat16_parameters_are_stored_as_such(config, key):
    half = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16", tied_embeddings=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(init(half, key))} == {jnp.dtype("bfloat16")}


def test_float64_stays_float64_and_agrees_with_float32(config, params, rows):
    single = logits_of(config, params, *padded(rows, 1, 0))[:, 1:]
    with jax.enable_x64(True):
        double = dataclasses.replace(config, dtype="float64", param_dtype="float64")
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        found = logits_of(double, wide, *padded(rows, 1, 0))[:, 1:]
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(single, found, atol=2e-5)


def test_jit_changes_nothing(config, params, rows):
    tokens, mask = padded(rows, 1, 0)
    eager = apply_trunk(config, params["trunk"], tokens, mask)
    for a, b in zip(eager, run(config, params["trunk"], tokens, mask), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_initial_norms_are_one_and_layers_differ(config, key):
    trunk = init_trunk(config, key)
    assert (trunk["final_norm"]["scale"] == 1).all()
    kernel = trunk["layers"]["query"]["kernel"]
    assert kernel.shape == (2, 16, 16)
    assert not jnp.array_equal(kernel[0], kernel[1])
    assert abs(float(kernel.std()) / config.initializer_range - 1) < 0.2


def test_logical_axes_name_every_axis_of_every_parameter(config, key):
    trunk, axes = init_trunk(config, key), logical_axes(config)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    assert jax.tree.structure(trunk) == jax.tree.structure(axes, is_leaf=is_spec)
    sizes = {"vocabulary": 20, "width": 16, "feed_forward": 24, "layers": 2}
    for leaf, names in zip(jax.tree.leaves(trunk), jax.tree.leaves(axes, is_leaf=is_spec), strict=True):
        assert len(names) == leaf.ndim
        for size, name in zip(leaf.shape, names, strict=True):
            assert size == sizes[name] if name != "heads" else size in (16, 8)
    assert axes["layers"]["query"]["kernel"] == PartitionSpec("layers", "width", "heads")


def test_an_ensemble_is_a_vmap(config, rows):
    tokens, mask = padded(rows, 1, 0)
    keys = jax.random.split(jax.random.key(3), 3)
    members = jax.jit(jax.vmap(lambda key: init_policy(config, key)))(keys)
    together = jax.jit(jax.vmap(lambda params: logits_of(config, params, tokens, mask)))(members)
    for member, key in enumerate(keys):
        alone = logits_of(config, init(config, key), tokens, mask)
        np.testing.assert_allclose(together[member][:, 1:], alone[:, 1:], atol=2e-5)


def test_a_sequence_beyond_the_context_is_refused(config, params):
    tokens, mask = jnp.zeros((1, 17), jnp.int32), jnp.ones((1, 17), bool)
    with pytest.raises(ValueError, match="17 tokens does not fit the model's context of 16"):
        apply_trunk(config, params["trunk"], tokens, mask)


def test_a_cache_beyond_the_context_is_refused(config, params):
    hidden = run(config, params["trunk"], jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))
    cache = new_cache(hidden.keys, hidden.values, jnp.ones((1, 4), bool), slots=17)
    with pytest.raises(ValueError, match="context of 16"):
        apply_trunk(config, params["trunk"], jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool), cache)


# Every family: what holds of the Llama above holds of whatever else a configuration may ask for.

LAYER_NORM = dict(norm="layer", query_key_value_bias=True, attention_output_bias=True, feed_forward_bias=True)
FAMILIES = {
    "windows of 3": dict(window=3),
    "Gemma 3": dict(
        norm="rms_plus_one",
        norm_placement="both",
        window=3,
        local_layers=(True, False),
        local_rope_theta=50.0,
        rope_scaling=RopeScaling("linear", 4.0),
        head_width=6,
        query_scale=0.3,
        query_key_norm="head",
        attention_softcap=2.0,
        logit_softcap=5.0,
        activation="gelu_tanh",
        embedding_scale=4.0,
    ),
    "GPT-NeoX": dict(**LAYER_NORM, parallel_residual=True, rotary_width=2, feed_forward="plain", activation="gelu"),
    "GPT-2": dict(**LAYER_NORM, positions="learned", feed_forward="plain", activation="gelu_tanh"),
    "OLMo 2": dict(norm_placement="post", query_key_norm="projection", rope_scaling=RopeScaling("yarn", 4.0, 4)),
    "experts": dict(experts=Experts(count=4, active=2), window=4, rope_scaling=RopeScaling("llama3", 4.0, 8)),
}
LENGTHS = (16, 11, 5)


@functools.cache
def family(name: str):
    """The configuration, parameters in which nothing is 0 or 1, and three rows: 16, 11 and 5 tokens, left-padded."""
    shape = dict(vocab_size=20, width=16, layers=2, heads=4, key_value_heads=2, feed_forward_width=24)
    config = ModelConfig(**shape, context_length=16, initializer_range=0.4, **FAMILIES[name])
    draw = np.random.default_rng(1)
    moved = lambda leaf: jnp.asarray(np.asarray(leaf) + 0.1 * draw.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    tokens = jnp.asarray(draw.integers(0, 19, size=(3, 16), dtype=np.int32))
    mask = jnp.asarray(np.arange(16)[None] >= 16 - np.array(LENGTHS)[:, None])
    return config, jax.tree.map(moved, init(config, jax.random.key(0))), tokens, mask


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_moves_no_state_of_any_family(name):
    """Left padding against right padding, with other tokens standing there."""
    config, params, tokens, mask = family(name)
    left = np.asarray(run(config, params["trunk"], tokens, mask).final)
    rolled = np.stack([np.roll(row, length) for row, length in zip(np.asarray(tokens), LENGTHS, strict=True)])
    right = np.asarray(run(config, params["trunk"], jnp.asarray(rolled), mask[:, ::-1]).final)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(right[row, :length], left[row, 16 - length :], atol=5e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_decoding_of_any_family_equals_the_full_forward(name):
    config, params, tokens, mask = family(name)
    full = run(config, params["trunk"], tokens, mask)
    hidden = run(config, params["trunk"], tokens[:, :12], mask[:, :12])
    cache = new_cache(hidden.keys, hidden.values, mask[:, :12], slots=16)
    states = [hidden.final]
    for start in (12, 14):
        piece = slice(start, start + 2)
        hidden = run(config, params["trunk"], tokens[:, piece], mask[:, piece], cache)
        cache = write(cache, hidden.keys, hidden.values, mask[:, piece])
        states.append(hidden.final)
    real = np.asarray(mask)
    np.testing.assert_allclose(np.concatenate(states, axis=1)[real], np.asarray(full.final)[real], atol=5e-5)


@pytest.mark.parametrize("name", [*FAMILIES, "dynamic"])
def test_packed_rows_of_any_family_equal_rows_of_their_own(name):
    """One row of 9 + 4 tokens and 3 of padding; other rows hold the same sequences alone."""
    if name == "dynamic":
        config, params, tokens, _ = family("windows of 3")
        config = dataclasses.replace(config, rope_scaling=RopeScaling("dynamic", 2.0, 5))
    else:
        config, params, tokens, _ = family(name)
    packed = np.asarray(tokens[0])
    rows = jnp.asarray(np.stack([packed, packed, np.roll(packed, -9)]))
    segments = jnp.array([[5] * 9 + [2] * 4 + [0] * 3, [1] * 16, [1] * 16])
    real = np.arange(16)[None] < np.array([13, 9, 4])[:, None]
    found = np.asarray(run(config, params["trunk"], rows, jnp.asarray(real), None, segments).final)
    np.testing.assert_allclose(found[0, :9], found[1, :9], atol=5e-5)
    np.testing.assert_allclose(found[0, 9:13], found[2, :4], atol=5e-5)
    unpacked = np.asarray(run(config, params["trunk"], rows, jnp.asarray(real)).final)
    np.testing.assert_allclose(found[1:][real[1:]], unpacked[1:][real[1:]], atol=5e-5)
    assert np.abs(unpacked[0, 9:13] - found[0, 9:13]).max() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_a_later_token_of_any_family_changes_no_earlier_state(name):
    config, params, tokens, mask = family(name)
    other = np.array(tokens)
    other[:, 13] = (other[:, 13] + 1) % 19
    before, after = (np.asarray(run(config, params["trunk"], t, mask).final) for t in (tokens, jnp.asarray(other)))
    np.testing.assert_array_equal(after[0, :13], before[0, :13])
    assert (np.abs(after - before)[0, 13:].max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize(("name", "reach"), [("windows of 3", (4, 4)), ("Gemma 3", (7, None)), ("experts", (6, 6))])
def test_gradients_of_any_family_flow_backwards_as_far_as_its_windows(name, reach):
    """Two layers of window w look back on 2 (w - 1) tokens; one global layer is enough to look back on all."""
    config, params, _, _ = family(name)
    strength = gradient_to_embeddings(config, params, jnp.arange(8, dtype=jnp.int32), jnp.ones(8, bool))[:, :8]
    distance = np.arange(8)[:, None] - np.arange(8)[None]
    assert (strength[distance < 0] == 0).all()
    assert (strength[(distance >= 0) & (distance <= reach[0])] > 0).all()
    if reach[1] is not None:
        assert (strength[distance > reach[1]] == 0).all()


@pytest.mark.parametrize("name", ["Gemma 3", "GPT-2", "experts"])
def test_bfloat16_of_any_family_is_close(name):
    config, params, tokens, mask = family(name)
    half = dataclasses.replace(config, dtype="bfloat16")
    exact = np.asarray(run(config, params["trunk"], tokens, mask).final)[np.asarray(mask)]
    rough = run(half, params["trunk"], tokens, mask).final
    assert rough.dtype == jnp.bfloat16
    rough = np.asarray(rough.astype(jnp.float32))[np.asarray(mask)]
    # The median over tokens: a token may choose other experts where two are nearly as probable.
    errors = np.linalg.norm(rough - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.median(errors) < 0.05


KERNELS = ("query", "key", "value", "output", "gate", "up", "down")
NORMS = ("attention_norm", "feed_forward_norm")
POST_NORMS = ("attention_post_norm", "feed_forward_post_norm")
QUERY_KEY_NORMS = ("query_norm", "key_norm")


def modules(kernels=(), norms=(), bias=()):
    return {name: {"kernel", *bias} for name in kernels} | {name: {"scale", *bias} for name in norms}


PLAIN = modules([name for name in KERNELS if name != "gate"], NORMS, bias=["bias"])
LAYERS = {
    "windows of 3": modules(KERNELS, NORMS),
    "Gemma 3": modules(KERNELS, (*NORMS, *POST_NORMS, *QUERY_KEY_NORMS)),
    "GPT-NeoX": PLAIN,
    "GPT-2": PLAIN,
    "OLMo 2": modules(KERNELS, (*POST_NORMS, *QUERY_KEY_NORMS)),
    "experts": modules((*KERNELS[:4], "router"), NORMS) | {"experts": {"gate", "up", "down"}},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tree_of_any_family_and_its_logical_axes(name):
    config, params, _, _ = family(name)
    axes, layers = logical_axes(config), params["trunk"]["layers"]
    assert {module: set(leaves) for module, leaves in layers.items()} == LAYERS[name]
    assert ("positions" in params["trunk"]) == (name == "GPT-2")
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    specs = jax.tree.leaves(axes, is_leaf=is_spec)
    assert jax.tree.structure(params["trunk"]) == jax.tree.structure(axes, is_leaf=is_spec)
    assert all(len(spec) == leaf.ndim for leaf, spec in zip(jax.tree.leaves(params["trunk"]), specs, strict=True))
    named = {axis for spec in specs for axis in spec if axis is not None}
    assert named <= {"vocabulary", "width", "heads", "feed_forward", "layers", "expert"}


def test_shapes_and_axes_that_only_some_families_have():
    gemma, olmo, experts = (family(name) for name in ("Gemma 3", "OLMo 2", "experts"))
    layers = gemma[1]["trunk"]["layers"]
    assert layers["query"]["kernel"].shape == (2, 16, 24)
    assert layers["output"]["kernel"].shape == (2, 24, 16)
    assert layers["query_norm"]["scale"].shape == layers["key_norm"]["scale"].shape == (2, 6)
    layers = olmo[1]["trunk"]["layers"]
    assert (layers["query_norm"]["scale"].shape, layers["key_norm"]["scale"].shape) == ((2, 16), (2, 8))
    assert logical_axes(olmo[0])["layers"]["query_norm"]["scale"] == PartitionSpec("layers", "heads")
    layers, axes = experts[1]["trunk"]["layers"], logical_axes(experts[0])["layers"]
    assert (layers["router"]["kernel"].shape, layers["experts"]["down"].shape) == ((2, 16, 4), (2, 4, 24, 16))
    assert axes["router"]["kernel"] == PartitionSpec("layers", "width", "expert")
    assert axes["experts"]["gate"] == PartitionSpec("layers", "expert", "width", "feed_forward")
    assert family("GPT-2")[1]["trunk"]["positions"]["embedding"].shape == (16, 16)


def test_dynamic_scaling_changes_only_rows_beyond_the_original_context():
    config, params, tokens, mask = family("windows of 3")
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling("dynamic", 2.0, 11))
    plain, found = (run(c, params["trunk"], tokens, mask).final for c in (config, scaled))
    assert float(jnp.abs(found - plain)[0].max()) > 1e-3
    np.testing.assert_allclose(np.asarray(found)[1:][np.asarray(mask)[1:]], plain[1:][np.asarray(mask)[1:]], atol=2e-5)


def test_attached_adapters_compute_what_merged_ones_do():
    """Through the scan over layers: the leaves of an adapter are sliced like the kernel beside them."""
    config, params, tokens, mask = family("GPT-NeoX")
    lora = AdapterConfig(kind="lora", targets=("query", "up"), rank=2)
    adapter = init_adapter(lora, params, jax.random.key(2))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    attached = run(config, attach(params, adapter, lora)["trunk"], tokens, mask).final
    merged = run(config, merge(params, adapter, lora)["trunk"], tokens, mask).final
    real = np.asarray(mask)
    np.testing.assert_allclose(np.asarray(attached)[real], np.asarray(merged)[real], atol=1e-4)
    assert np.abs(np.asarray(attached - run(config, params["trunk"], tokens, mask).final)[real]).max() > 0.01


def test_packed_rows_after_a_cache_are_refused(config, params):
    tokens, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    hidden = run(config, params["trunk"], tokens, mask)
    cache = new_cache(hidden.keys, hidden.values, mask, slots=8)
    with pytest.raises(ValueError, match="packed rows"):
        apply_trunk(config, params["trunk"], tokens, mask, cache, tokens)
