"""What sixteen seeds cost beside one, in one program: vmapped, and mapped one after the other on every device.

    python experiments/lanes.py

It runs the policy updates of the over-optimisation study (`experiments/overoptimization.py --preset demo`, PPO on a
single reward model, fresh weights) and reports compile time, wall time of a call, and how many programs were compiled
after the first call. Two minutes on 2 CPU cores; docs/results.md has the numbers.

On a CPU, jaxlib 0.10 can wait for ever in its thread pool when vmapped lanes are split over several devices, or when
they hold batched triangular solves (AdvPO, sample-wise) inside a loop: vmapped lanes take one device here, and studies
on a CPU map their lanes.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.world import builtin_world
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.policies import make_lane
from rlhf_jax.laboratory.proxies import Proxies
from rlhf_jax.laboratory.setting import Setting, sampling_of, tiny_model
from rlhf_jax.models.heads import init_policy, init_reward_model
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.parallel.lanes import over_lanes, use_all_cores
from rlhf_jax.rewards.bradley_terry import EnsembleParams
from rlhf_jax.rewards.ellipsoid import Geometry
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.options import RunOptions
from rlhf_jax.training.progress import ProgressReport
from rlhf_jax.types import Score


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Options of the measurement.

    Attributes:
        seeds: lanes of the larger program.
        updates: PPO updates a call.
        calls: timed calls of each program, after one that is not timed.
    """

    seeds: int = 16
    updates: int = 5
    calls: int = 3


def fresh_setting(options: Options, key: jax.Array) -> Setting:
    """The built-in world with untrained weights: the work of an update does not depend on them."""
    world = builtin_world(options.pairs, options.held_out, options.seed)
    policy, reward = tiny_model(options.policy_layers, options.width), tiny_model(options.reward_layers, options.width)
    trunk_keys = jax.random.split(key, options.members)
    return Setting(
        world=world,
        sampling=sampling_of(world),
        policy_config=policy,
        policy=init_policy(policy, key),
        reward_config=reward,
        trunks=jax.vmap(lambda key: init_trunk(reward, key))(trunk_keys),
    )


def fresh_proxies(options: Options, setting: Setting, key: jax.Array) -> Proxies:
    """Untrained reward models of every seed, with a round geometry."""
    width, prompts = options.width, len(setting.world.prompts.tokens)

    def one_seed(key: jax.Array) -> Proxies:
        keys = jax.random.split(key, options.members)
        members = jax.vmap(lambda key: init_reward_model(setting.reward_config, key))(keys)
        return Proxies(
            ensembles=EnsembleParams(members=members, offset=jnp.zeros(options.members)),
            geometry=Geometry(cholesky=jnp.eye(width)),
            radius=jnp.ones(()),
            mean_uncertainty=jnp.zeros(()),
            spread=jnp.ones(()),
            reference=Score(mean=jnp.zeros(prompts), features=jnp.zeros((prompts, width))),
        )

    return jax.vmap(one_seed)(jax.random.split(key, options.seeds))


def measure(name: str, options: Options, rule: str, calls: int, key: jax.Array) -> tuple[float, np.ndarray, int]:
    """Seconds of compilation, seconds of each timed call, and programs compiled after the first call."""
    setting = fresh_setting(options, key)
    proxies = fresh_proxies(options, setting, key)
    start, advance = make_lane(options, setting, key)
    lanes = {
        "method": jnp.zeros(options.seeds, jnp.int32),
        "kl_coefficient": jnp.zeros(options.seeds),
        "seed": jnp.arange(options.seeds, dtype=jnp.int32),
    }
    value_trunk = jax.tree.map(lambda leaf: leaf[0], setting.trunks)
    carry = jax.jit(over_lanes(start, rule))(lanes, setting.policy, value_trunk, proxies)
    began = time.perf_counter()
    program = (
        jax.jit(over_lanes(advance, rule), donate_argnums=0).lower(carry, setting.world.prompts, proxies).compile()
    )
    compile_seconds = time.perf_counter() - began
    carry, history = program(carry, setting.world.prompts, proxies)
    jax.block_until_ready((carry, history))
    clock, seconds = CompileClock(), []
    with ProgressReport(name, calls) as progress:
        for _ in range(calls):
            began = time.perf_counter()
            carry, history = program(carry, setting.world.prompts, proxies)
            jax.block_until_ready((carry, history))
            seconds.append(time.perf_counter() - began)
            progress.advance({"seconds a call": seconds[-1]})
    return compile_seconds, np.array(seconds), clock.programs


def main(config: Config) -> dict:
    """Measures one seed and many, vmapped and mapped, and returns the summary."""
    began = time.monotonic()
    if config.seeds < 2 or config.calls < 1 or config.updates < 1:
        raise ValueError("lanes needs at least 2 seeds, 1 update and 1 timed call.")
    folder = run_folder.create(config.out, "lanes", config, config.overwrite)
    rows, compiled, late = [], 0.0, 0
    per_seed = {}
    for name, seeds, rule in (
        ("1 seed", 1, "map"),
        (f"{config.seeds} seeds, mapped", config.seeds, "map"),
        (f"{config.seeds} seeds, vmapped", config.seeds, "vmap"),
    ):
        options = Options(seeds=seeds, updates=config.updates, report_every=config.updates, methods=("PPO",))
        compile_seconds, seconds, more = measure(name, options, rule, config.calls, jax.random.key(0))
        per_seed[name] = seconds / (seeds * config.updates) * 1e3
        rows += [
            row(f"{name}: compilation", "s", np.array([compile_seconds])),
            row(f"{name}: {config.updates} updates", "s", seconds),
            row(f"{name}: one update of one seed", "ms", per_seed[name]),
        ]
        compiled, late = compiled + compile_seconds, late + more
    checks = [run_folder.check("programs compiled after the first call", float(late), 0.0)]
    return run_folder.conclude(folder, rows, checks, began, compiled)


if __name__ == "__main__":
    use_all_cores()
    run(main, {"default": Config()}, __doc__)
