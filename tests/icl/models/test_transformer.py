"""The transformer on vectors: it is the package's trunk between two linear maps, causal, and reads what it should."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.icl.models.transformer import (
    VectorModel,
    apply_vector_model,
    classification_logits,
    classification_tokens,
    init_vector_model,
    regression_predictions,
    regression_tokens,
)
from rlhf_jax.models.transformer import apply_trunk

MODEL = VectorModel(token_width=3, outputs=1, context_length=11, layers=2, heads=2, width=8)
CLASSIFIER = dataclasses.replace(MODEL, token_width=3 + 4, outputs=4)

init = jax.jit(init_vector_model, static_argnums=0)
run = jax.jit(apply_vector_model, static_argnums=0)
predictions = jax.jit(regression_predictions, static_argnums=0)
logits = jax.jit(classification_logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return init(MODEL, jax.random.key(0))


def data(length=6, count=2):
    draw = np.random.default_rng(0)
    inputs, targets = draw.normal(size=(count, length, 3)).astype("f4"), draw.normal(size=(count, length)).astype("f4")
    return jnp.asarray(inputs), jnp.asarray(targets)


def test_it_is_the_trunk_of_the_package_between_two_linear_maps(params):
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # no bias is 0
    tokens = data()[0]
    inward, outward = (jax.tree.map(np.asarray, params[name]) for name in ("read_in", "read_out"))
    rows = jnp.asarray(np.asarray(tokens) @ inward["kernel"] + inward["bias"])
    trunk = jax.jit(apply_trunk, static_argnums=0)
    states = np.asarray(trunk(MODEL.trunk(), params["trunk"], rows, jnp.ones((2, 6), bool)).final)
    found = run(MODEL, params, tokens)
    assert found.shape == (2, 6, 1)
    np.testing.assert_allclose(found, states @ outward["kernel"] + outward["bias"], atol=2e-5)


def test_the_parameters_hold_no_table_of_tokens(params):
    assert set(params["trunk"]) == {"positions", "layers", "final_norm"}
    wide = init(dataclasses.replace(MODEL, width=64, token_width=50), jax.random.key(1))
    assert wide["trunk"]["layers"]["up"]["kernel"].shape == (2, 64, 256)
    assert abs(float(wide["trunk"]["layers"]["up"]["kernel"].std()) * 8 - 1) < 0.02  # 64 ** -0.5
    assert abs(float(wide["read_in"]["kernel"].std()) * 50**0.5 - 1) < 0.05


def test_a_classification_prompt_worked_by_hand():
    """Two examples of d = 1, labels 2 and 0 of three classes, then the query without a label."""
    tokens = classification_tokens(jnp.array([[[5.0], [6.0]]]), jnp.array([[2, 0]]), 3, jnp.array([[7.0]]))
    assert tokens.tolist() == [[[5.0, 0.0, 0.0, 1.0], [6.0, 1.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0]]]


def test_logits_of_classes_are_read_at_the_query():
    params = init(CLASSIFIER, jax.random.key(2))
    inputs, labels = data()[0], jnp.array([[0, 1, 3, 2, 0], [3, 3, 1, 0, 2]])
    context, query = inputs[:, :5], inputs[:, 5]
    found = logits(CLASSIFIER, params, context, labels, query)
    assert found.shape == (2, 4)
    tokens = classification_tokens(context, labels, 4, query)
    np.testing.assert_array_equal(found, run(CLASSIFIER, params, tokens)[:, -1])
    gradient = jax.jit(jax.grad(lambda tokens: jnp.square(run(CLASSIFIER, params, tokens)[:, -1]).sum()))(tokens)
    assert bool((jnp.abs(gradient).max(axis=-1) > 1e-6).all())  # every example is read
    other = logits(CLASSIFIER, params, context, labels.at[0, 2].set(1), query)
    assert float(jnp.abs(other - found)[0].max()) > 1e-4
    np.testing.assert_allclose(other[1], found[1], atol=1e-6)


def test_a_regression_prompt_worked_by_hand():
    tokens = regression_tokens(jnp.array([[[1.0, 2.0], [3.0, 4.0]]]), jnp.array([[5.0, 6.0]]))
    assert tokens.tolist() == [[[1.0, 2.0], [5.0, 0.0], [3.0, 4.0], [6.0, 0.0]]]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_prediction_hears_its_input_and_the_examples_before_it_only(positions):
    model = dataclasses.replace(MODEL, positions=positions)
    params = init(model, jax.random.key(0))
    inputs, targets = data(count=1)

    @jax.jit
    def jacobians(inputs, targets):
        return jax.jacrev(lambda *prompt: regression_predictions(model, params, *prompt)[0], (0, 1))(inputs, targets)

    from_inputs, from_targets = (np.abs(np.asarray(part))[:, 0] for part in jacobians(inputs, targets))
    from_inputs = from_inputs.max(axis=-1)
    assert (from_inputs[np.triu_indices(6, 1)] == 0).all()
    assert (from_inputs[np.tril_indices(6)] > 1e-6).all()
    assert (from_targets[np.triu_indices(6)] == 0).all()
    assert (from_targets[np.tril_indices(6, -1)] > 1e-6).all()


def test_a_longer_prompt_begins_with_the_predictions_of_a_shorter_one(params):
    inputs, targets = data()
    full = predictions(MODEL, params, inputs, targets)
    assert full.shape == (2, 6)
    np.testing.assert_allclose(predictions(MODEL, params, inputs[:, :4], targets[:, :4]), full[:, :4], atol=2e-5)


def test_every_parameter_learns_but_the_biases_of_keys(params):
    """A bias of all keys moves every logit of a query alike, which softmax does not see."""
    inputs, targets = data()
    loss = lambda params: jnp.square(regression_predictions(MODEL, params, inputs, targets) - targets).mean()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)
    assert float(jnp.abs(gradient["trunk"]["layers"]["key"].pop("bias")).max()) < 1e-6
    sizes = jax.tree.map(lambda leaf: float(jnp.abs(leaf).max()), gradient)
    assert min(jax.tree.leaves(sizes)) > 1e-5, sizes


def test_the_computation_takes_the_dtype_of_the_tokens(params):
    inputs, targets = data()
    single = predictions(MODEL, params, inputs, targets)
    assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        found = predictions(MODEL, double, *(jnp.asarray(np.asarray(part), jnp.float64) for part in (inputs, targets)))
        assert found.dtype == jnp.float64
        fresh = jax.eval_shape(lambda key: init_vector_model(MODEL, key, jnp.float64), jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float64")}
        np.testing.assert_allclose(single, found, atol=2e-5)


def test_seeds_are_a_vmap():
    inputs, targets = data()
    keys = jax.random.split(jax.random.key(3), 2)
    together = jax.jit(
        jax.vmap(lambda key: regression_predictions(MODEL, init_vector_model(MODEL, key), inputs, targets))
    )(keys)
    assert float(jnp.abs(together[0] - together[1]).max()) > 0.01
    for key, found in zip(keys, together, strict=True):
        np.testing.assert_allclose(found, predictions(MODEL, init(MODEL, key), inputs, targets), atol=2e-5)


def _bare(**changes):
    """A model with the values given, unchecked: the tests' own type checks would stand in the way."""
    model = object.__new__(VectorModel)
    for name, value in (dataclasses.asdict(MODEL) | changes).items():
        object.__setattr__(model, name, value)
    return model


def test_what_does_not_fit_is_refused(params):
    with pytest.raises(ValueError, match="tokens have 4 entries and the model reads 3: set token_width to match"):
        apply_vector_model(MODEL, params, jnp.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match="13 tokens does not fit the model's context of 11"):
        regression_predictions(MODEL, params, jnp.zeros((1, 7, 3)), jnp.zeros((1, 7)))
    with pytest.raises(ValueError, match="token_width of the model is 0: give a whole number of at least 1"):
        dataclasses.replace(MODEL, token_width=0)
    for name in ("outputs", "context_length", "layers", "heads", "width"):
        with pytest.raises(ValueError, match=f"{name} of the model is 2.5"):
            inspect.unwrap(VectorModel.__post_init__)(_bare(**{name: 2.5}))
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="initializer_range of the model is"):
            dataclasses.replace(MODEL, initializer_range=value)
    with pytest.raises(ValueError, match="heads = 3 does not divide width = 8"):
        dataclasses.replace(MODEL, heads=3)
