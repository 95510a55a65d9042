import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import Experts, ModelConfig
from rlhf_jax.models.heads import init_policy, init_reward_model
from rlhf_jax.models.partitioning import constrain, parts_of
from rlhf_jax.parallel.mesh import MeshShape, make_mesh
from rlhf_jax.parallel.sharding import infer, initialised, place_batch, replicated, reshard
from rlhf_jax.sampling.filters import SamplingConfig

MODEL = ModelConfig(
    vocab_size=32,
    width=16,
    layers=2,
    heads=4,
    key_value_heads=2,
    feed_forward_width=8,
    context_length=16,
    tied_embeddings=False,
)
MESH = MeshShape(data=2, fsdp=2, tensor=2)
PPO = PPOConfig(sampling=SamplingConfig(max_new_tokens=4, stop_tokens=(1,), pad_token=0))


def specs(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): where.spec
        for path, where in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_every_copy_of_a_parameter_lies_as_the_parameter_does():
    algorithm, mesh = ppo(MODEL, PPO, adam(1e-3)), make_mesh(MESH)
    found = specs(infer(jax.eval_shape(algorithm.init, jax.random.key(0)), mesh, (MODEL,)))
    query = {name: spec for name, spec in found.items() if name.endswith("layers.query.kernel")}
    # policy, value net, reference, and two moments of the first two
    assert len(query) == 7 and set(query.values()) == {PartitionSpec(None, "fsdp", "tensor")}
    down = [spec for name, spec in found.items() if name.endswith("down.kernel")]
    assert set(down) == {PartitionSpec(None, "tensor", "fsdp")}
    assert found["params.policy.unembedding"] == PartitionSpec("fsdp", "tensor")
    assert found["params.policy.trunk.embed.embedding"] == PartitionSpec("tensor", "fsdp")
    assert not any(found["params.policy.trunk.final_norm.scale"])
    assert found["key"] == PartitionSpec()


def test_members_stacked_before_a_parameter_are_not_split():
    keys = jax.random.split(jax.random.key(0), 3)
    members = jax.eval_shape(jax.vmap(lambda key: init_reward_model(MODEL, key)), keys)
    found = specs(infer(members, make_mesh(MESH), (MODEL,)))
    assert found["trunk.layers.up.kernel"] == PartitionSpec(None, None, "fsdp", "tensor")
    assert not any(found["head.kernel"])


def test_adapters_lie_as_the_kernels_beside_them():
    adapter = AdapterConfig(kind="lora", targets=("query", "down"), rank=2)
    algorithm = ppo(MODEL, PPO, adam(1e-3), adapter=adapter)
    found = specs(infer(jax.eval_shape(algorithm.init, jax.random.key(0)), make_mesh(MESH), (MODEL,)))
    assert found["params.policy.query.a"] == PartitionSpec(None, "fsdp", None)
    assert found["params.policy.down.b"] == PartitionSpec(None, None, "fsdp")
    assert found["params.policy.down.a"] == PartitionSpec(None, "tensor", None)


def test_experts_are_split_over_their_axis():
    import dataclasses

    mixture = dataclasses.replace(MODEL, experts=Experts(count=4, active=2))
    shapes = jax.eval_shape(lambda key: init_policy(mixture, key), jax.random.key(0))
    found = specs(infer(shapes, make_mesh(MeshShape(fsdp=2, tensor=2, expert=2)), (mixture,)))
    assert found["trunk.layers.experts.up"] == PartitionSpec(None, "expert", "fsdp", "tensor")


def test_an_optimizer_may_be_split_further_than_its_parameters():
    algorithm, mesh = ppo(MODEL, PPO, adam(1e-3)), make_mesh(MESH)
    found = specs(infer(jax.eval_shape(algorithm.init, jax.random.key(0)), mesh, (MODEL,), split_optimizer=True))
    moments = [spec for name, spec in found.items() if "mu" in name and name.endswith("query.kernel")]
    assert set(moments) == {PartitionSpec(None, ("fsdp", "data"), "tensor")}
    assert found["params.policy.trunk.layers.query.kernel"] == PartitionSpec(None, "fsdp", "tensor")


def test_moments_in_codes_lie_as_the_parameter_does():
    algorithm, mesh = ppo(MODEL, PPO, adam(1e-3, moments="int8")), make_mesh(MESH)
    found = specs(infer(jax.eval_shape(algorithm.init, jax.random.key(0)), mesh, (MODEL,)))
    codes = [spec for name, spec in found.items() if "policy" in name and name.endswith("embed.embedding.codes")]
    scales = [spec for name, spec in found.items() if "policy" in name and name.endswith("embed.embedding.scales")]
    assert codes == [PartitionSpec("tensor", "fsdp")] * 2 and scales == [PartitionSpec("tensor")] * 2


def test_no_device_holds_the_whole_state_and_its_numbers_do_not_depend_on_the_mesh():
    algorithm, key, mesh = ppo(MODEL, PPO, adam(1e-3)), jax.random.key(0), make_mesh(MESH)
    state = jax.block_until_ready(initialised(algorithm.init, mesh, (MODEL,), jax.random.key(0)))
    whole = jax.jit(algorithm.init)(key)
    for here, there in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(here, there)
    kernel = state.params["policy"]["trunk"]["layers"]["query"]["kernel"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}


def test_parameters_move_to_the_mesh_of_another_layout_and_to_other_devices():
    tree = init_policy(MODEL, jax.random.key(0))
    devices = jax.devices()
    train = reshard(tree, make_mesh(MeshShape(fsdp=4), devices[:4]), (MODEL,))
    decode = reshard(train, make_mesh(MeshShape(data=2, tensor=2), devices[:4]), (MODEL,))
    beside = reshard(train, make_mesh(MeshShape(tensor=2), devices[4:6]), (MODEL,))
    half = reshard(train, make_mesh(MeshShape(tensor=2), devices[4:6]), (MODEL,), "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    kernels = [part["trunk"]["layers"]["query"]["kernel"] for part in (train, decode, beside)]
    assert [kernel.sharding.spec for kernel in kernels] == [
        PartitionSpec(None, "fsdp", None),
        PartitionSpec(None, None, "tensor"),
        PartitionSpec(None, None, "tensor"),
    ]
    assert kernels[2].sharding.device_set == set(devices[4:6])
    for kernel in kernels:
        np.testing.assert_array_equal(kernel, tree["trunk"]["layers"]["query"]["kernel"])


def test_a_mesh_that_does_not_divide_an_array_is_refused_with_its_name_and_the_arithmetic():
    shapes = jax.eval_shape(lambda key: init_policy(MODEL, key), jax.random.key(0))
    mesh = make_mesh(MeshShape(tensor=3), jax.devices()[:3])
    message = r"trunk\.embed\.embedding: its vocabulary axis has 32 entries and is split over tensor=3 \(32 = 3 × 10"
    with pytest.raises(ValueError, match=message):
        infer(shapes, mesh, (MODEL,))


def test_a_batch_lies_split_by_rows_and_is_refused_where_it_does_not_divide():
    mesh = make_mesh(MESH)
    batch = place_batch({"tokens": np.arange(8).reshape(4, 2), "count": np.float32(3)}, mesh)
    assert batch["tokens"].sharding.spec == PartitionSpec(("data", "fsdp"))
    assert batch["count"].sharding == replicated(mesh)
    np.testing.assert_array_equal(batch["tokens"], np.arange(8).reshape(4, 2))
    with pytest.raises(ValueError, match=r"data=2 × fsdp=2 do not divide the 6 rows of a batch \(6 = 4 × 1 \+ 2\)"):
        place_batch(np.zeros((6, 2)), mesh)


def test_constraints_do_nothing_without_a_mesh_and_leave_whole_what_does_not_divide():
    x = jnp.ones((3, 4))
    assert constrain(x, "batch", "heads") is x
    with jax.set_mesh(make_mesh(MESH)):
        assert parts_of("batch", 8) == 4 and parts_of("batch", 6) == parts_of("tokens", 8) == 1
        split = jax.jit(lambda x: constrain(x, "batch", "heads"))(x)
    assert split.sharding.spec == PartitionSpec(None, "tensor")
