"""Runs of the over-optimisation study to time: its policy updates on untrained weights, as lanes of one program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.world import builtin_world
from rlhf_jax.evaluation.timing import ratio, seconds_of
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.policies import make_lane
from rlhf_jax.laboratory.proxies import Proxies
from rlhf_jax.laboratory.setting import Setting, sampling_of, tiny_model
from rlhf_jax.laboratory.step_costs import Found, median_row
from rlhf_jax.models.heads import init_policy, init_reward_model
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.rewards.bradley_terry import EnsembleParams
from rlhf_jax.rewards.ellipsoid import Geometry
from rlhf_jax.types import Score


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


def study(options: Options, rule: str, key: jax.Array) -> Callable[[], Any]:
    """A function that makes `options.report_every` updates of every seed in one program, and goes on from there.

    It has been called once when it is returned, so that nothing is compiled later.

    Args:
        options: of the study; its first method only.
        rule: how lanes are batched, see `parallel.lanes.over_lanes`.
        key: of everything random.
    """
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
    program = jax.jit(over_lanes(advance, rule), donate_argnums=0)

    def go_on() -> Any:
        nonlocal carry
        carry, history = program(carry, setting.world.prompts, proxies)
        return jax.block_until_ready(history)

    go_on()
    return go_on


def measure_study(options: Options, repeats: int) -> Found:
    """All seeds in one program beside run after run, of one seed each: rows and checks of the summary.

    Args:
        options: of the study.
        repeats: timed calls of each, in turns.
    """
    key, seeds = jax.random.key(0), options.seeds
    one = study(dataclasses.replace(options, seeds=1), "vmap", key)  # mapped, each device would run a copy of it
    many = study(options, "auto", key)

    def one_by_one() -> None:
        for _ in range(seeds):
            one()

    seconds = seconds_of(lambda: one_by_one, lambda: many, repeats=repeats)
    each = 1e3 * np.asarray(seconds) / (seeds * options.report_every)
    return [
        ratio(f"study: {seeds} runs one by one over one program, time", *seconds),
        median_row("study: an update of a seed, one by one", "ms", each[0]),
        median_row(f"study: an update of a seed, {seeds} in one program", "ms", each[1]),
    ], []
