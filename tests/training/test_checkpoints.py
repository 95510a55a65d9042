import shutil
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.training.checkpoints import restore, save


@chex.dataclass(frozen=True)
class State:
    params: Any
    optimizer: Any
    keys: jax.Array
    step: Any
    controller: Any = None


def make_state(seed, width=4):
    params = {"w": jax.random.normal(jax.random.key(seed), (3, width)), "b": jnp.full(width, 0.9, jnp.bfloat16)}
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
    return State(
        params=params, optimizer=optimizer, keys=jax.random.split(jax.random.key(seed), 2), step=jnp.int32(seed)
    )


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_state_with_typed_keys_comes_back_bit_for_bit(tmp_path):
    state = make_state(7)
    path = save(tmp_path / "step_1", state)
    assert_same(restore(path, make_state(0)), state)
    assert_same(restore(path, jax.eval_shape(lambda: make_state(0))), state)
    assert [item.name for item in tmp_path.iterdir()] == ["step_1"]


def test_the_next_random_numbers_are_those_of_the_uninterrupted_run(tmp_path):
    state = make_state(7)
    restored = restore(save(tmp_path / "a", state), make_state(0))
    np.testing.assert_array_equal(jax.random.normal(restored.keys[1], (5,)), jax.random.normal(state.keys[1], (5,)))


def test_an_array_comes_back_with_the_sharding_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    values = jnp.arange(16.0)
    path = save(tmp_path / "a", {"x": values})
    restored = restore(path, {"x": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)})["x"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, values)


def test_plain_numbers_are_saved_too(tmp_path):
    restored = restore(save(tmp_path / "a", {"step": 3, "beta": 0.9}), {"step": 0, "beta": 0.0})
    assert restored["step"] == 3 and restored["beta"] == 0.9


def test_a_checkpoint_is_overwritten_only_when_asked(tmp_path):
    path = save(tmp_path / "a", {"x": jnp.ones(2)})
    with pytest.raises(ValueError, match="exists: choose another folder"):
        save(path, {"x": jnp.zeros(2)})
    assert float(restore(path, {"x": jnp.zeros(2)})["x"][0]) == 1.0
    save(path, {"x": jnp.zeros(2)}, overwrite=True)
    assert float(restore(path, {"x": jnp.ones(2)})["x"][0]) == 0.0
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_what_an_interrupted_save_left_does_not_stop_the_next(tmp_path):
    (tmp_path / ".a.new").mkdir()
    (tmp_path / ".a.new" / "half").write_text("half")
    assert float(restore(save(tmp_path / "a", {"x": jnp.ones(2)}), {"x": jnp.zeros(2)})["x"][1]) == 1.0


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"there is no checkpoint at {tmp_path / 'none'}"):
        restore(tmp_path / "none", {"x": jnp.ones(2)})


@pytest.mark.parametrize("damage", ["no metadata", "truncated data", "no data"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = save(tmp_path / "a", {"x": jax.random.normal(jax.random.key(0), (64, 64))})
    if damage == "no metadata":
        (path / "_METADATA").unlink()
    elif damage == "no data":
        shutil.rmtree(path / "ocdbt.process_0" / "d")
        shutil.rmtree(path / "d", ignore_errors=True)
    else:
        for file in [*path.glob("d/*"), *path.glob("ocdbt.process_0/d/*")]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"the checkpoint at {path} is damaged"):
        restore(path, {"x": jnp.zeros((64, 64))})


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"x": jnp.zeros(3), "y": jnp.zeros(2)}, r"'x' is float32\[2\] there, float32\[3\] here"),
        ({"x": jnp.zeros(2, jnp.bfloat16), "y": jnp.zeros(2)}, r"'x' is float32\[2\] there, bfloat16\[2\] here"),
        ({"x": jnp.zeros(2)}, r"'y' is float32\[2\] there, absent here"),
        ({"x": jnp.zeros(2), "y": jnp.zeros(2), "z": jnp.zeros(2)}, r"'z' is absent there, float32\[2\] here"),
    ],
)
def test_a_state_of_another_form_is_refused_and_its_first_leaf_named(tmp_path, like, message):
    path = save(tmp_path / "a", {"x": jnp.ones(2), "y": jnp.ones(2)})
    with pytest.raises(ValueError, match=message):
        restore(path, like)
