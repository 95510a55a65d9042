"""Seeds of a study on several devices: each device makes its own policy updates and asks nothing of the others."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.policies import make_lane
from rlhf_jax.laboratory.study_costs import fresh_proxies, fresh_setting
from rlhf_jax.parallel.lanes import over_lanes

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
TINY = Options(seeds=8, members=1, methods=("PPO",), pairs=32, rollouts=4, report_every=1, policy_layers=1, width=8)


def test_updates_of_eight_seeds_on_eight_devices_need_no_collective():
    """Shapes alone are compiled, split as the first program leaves them."""
    key = jax.random.key(0)
    setting = fresh_setting(TINY, key)
    proxies = jax.eval_shape(lambda: fresh_proxies(TINY, setting, key))
    start, advance = make_lane(TINY, setting, key)
    lanes = {name: jnp.zeros(8, jnp.int32) for name in ("method", "seed")} | {"kl_coefficient": jnp.zeros(8)}
    value_trunk = jax.tree.map(lambda leaf: leaf[0], setting.trunks)
    carry = jax.eval_shape(over_lanes(start, "vmap", jax.devices()), lanes, setting.policy, value_trunk, proxies)
    mesh = Mesh(np.array(jax.devices()), ("lane",))
    split = NamedSharding(mesh, PartitionSpec("lane"))
    carry = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split), carry)
    program = jax.jit(over_lanes(advance, "vmap", jax.devices()), donate_argnums=0)
    compiled = program.lower(carry, setting.world.prompts, proxies).compile()
    assert not [name for name in COLLECTIVES if name in compiled.as_text()]
    assert all(found.is_equivalent_to(split, 1) for found in jax.tree.leaves(compiled.output_shardings))
