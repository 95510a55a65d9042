"""Which attention computes, and the path around the kernel for GPUs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import attention_choice
from rlhf_jax.models.attention_choice import chosen_attention
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.parallel.mesh import make_mesh, parse_mesh

CONFIG = ModelConfig(
    vocab_size=20,
    width=256,
    layers=2,
    heads=4,
    key_value_heads=2,
    feed_forward_width=24,
    context_length=4096,
    dtype="bfloat16",
)


@pytest.mark.parametrize(
    ("devices", "changed", "tokens", "packed", "expected"),
    [
        ("cpu", {}, 127, False, "reference"),
        ("cpu", {}, 128, True, "rows"),
        ("tpu", {}, 128, True, "splash"),
        ("tpu", {"head_width": 48}, 128, True, "reference"),
        ("gpu", {}, 128, False, "cudnn"),
        ("gpu", {}, 100, False, "reference"),
        ("gpu", {}, 128, True, "reference"),
        ("gpu", {"dtype": "float32"}, 128, False, "reference"),
        ("gpu", {"attention_softcap": 50.0}, 128, False, "reference"),
        ("gpu", {"head_width": 256}, 128, False, "reference"),
        ("gpu", {"attention": "ring"}, 128, False, "ring"),
        ("gpu", {"dtype": "float32"}, 1024, False, "ring"),
        ("gpu", {}, 2048, True, "ring"),
    ],
)
def test_what_is_chosen(monkeypatch, devices, changed, tokens, packed, expected):
    monkeypatch.setattr(attention_choice, "platform", lambda: devices)
    monkeypatch.setattr(attention_choice, "has_flash_kernel", lambda: True)
    assert chosen_attention(dataclasses.replace(CONFIG, **changed), tokens, packed) == expected


@pytest.mark.parametrize(("capability", "expected"), [("7.5", False), ("8.0", True), ("10.0", True), ("gfx942", False)])
def test_gpus_without_the_kernel_are_known(monkeypatch, capability, expected):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert attention_choice.has_flash_kernel() is expected


@pytest.mark.parametrize(("changed", "packed"), [({}, True), ({"attention_softcap": 50.0}, False)])
def test_what_the_kernel_would_compute_wrongly_is_refused(changed, packed):
    config = dataclasses.replace(CONFIG, attention="cudnn", **changed)
    with pytest.raises(ValueError, match="takes neither packed rows nor a softcap"):
        chosen_attention(config, 128, packed)


def test_rows_that_a_mesh_splits_go_round_the_ring():
    with jax.set_mesh(make_mesh(parse_mesh("sequence=8"))):
        assert chosen_attention(CONFIG, 16) == "ring"


@pytest.mark.parametrize("local", [(), (True, False)])
def test_left_padded_rows_are_moved_for_the_kernel_and_back(local):
    """On a CPU the same path runs without the kernel: states, keys, values and gradients are the reference's."""
    config = dataclasses.replace(CONFIG, width=16, dtype="float32", initializer_range=0.3)
    config = dataclasses.replace(config, window=3 if local else None, local_layers=local)
    params = jax.jit(init_policy, static_argnums=0)(config, jax.random.key(0))
    mask = (jnp.arange(9)[None] >= jnp.array([0, 3, 2])[:, None]) & (
        jnp.arange(9)[None] < jnp.array([9, 9, 6])[:, None]
    )
    tokens = jax.random.randint(jax.random.key(1), mask.shape, 0, 20, jnp.int32)
    weigh = jax.random.normal(jax.random.key(2), (*mask.shape, 16))

    def run(attention):
        own = dataclasses.replace(config, attention=attention)

        def loss(trunk):
            hidden = apply_trunk(own, trunk, tokens, mask)
            return (jnp.where(mask[..., None], hidden.final, 0.0) * weigh).sum(), hidden

        return jax.jit(jax.grad(loss, has_aux=True))(params["trunk"])

    (expected_gradient, expected), (gradient, hidden) = run("reference"), run("cudnn")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max())), gradient, expected_gradient
    )
    real = np.asarray(mask)
    for found, wanted in zip(hidden[:2], expected[:2], strict=True):  # states
        np.testing.assert_allclose(np.asarray(found)[real], np.asarray(wanted)[real], atol=1e-5)
    for found, wanted in zip(hidden[2:], expected[2:], strict=True):  # keys and values
        np.testing.assert_allclose(np.asarray(found)[:, real], np.asarray(wanted)[:, real], atol=1e-5)


def test_a_tpu_is_told_to_take_its_own_kernel(monkeypatch):
    monkeypatch.setattr("rlhf_jax.models.cudnn_attention.platform", lambda: "tpu")
    config = dataclasses.replace(CONFIG, width=16, attention="cudnn")
    tokens = jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: init_policy(config, jax.random.key(0)))
    with pytest.raises(ValueError, match='choose "auto" or "splash" on a TPU'):
        jax.eval_shape(lambda params: apply_trunk(config, params["trunk"], tokens, tokens > 0), shapes)


def test_what_the_kernel_does_not_take_is_refused(monkeypatch):
    monkeypatch.setattr("rlhf_jax.models.cudnn_attention.platform", lambda: "gpu")
    config = dataclasses.replace(CONFIG, width=16, dtype="float32", attention="cudnn")
    tokens = jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: init_policy(config, jax.random.key(0)))
    with pytest.raises(ValueError, match='attention "cudnn" takes bfloat16 or float16 and heads of a width'):
        jax.eval_shape(lambda params: apply_trunk(config, params["trunk"], tokens, tokens > 0), shapes)
