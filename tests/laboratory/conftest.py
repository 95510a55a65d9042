"""A study of two seeds with two members, as small as it can be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.proxies import compare, prepare, train_members
from rlhf_jax.laboratory.setting import builtin_setting, repeated, sample


@pytest.fixture(scope="session")
def options() -> Options:
    return Options(
        seeds=2,
        members=2,
        pairs=24,
        updates=2,
        rollouts=4,
        report_every=1,
        best_of_n=4,
        held_out=2,
        policy_layers=1,
        width=8,
        sft_steps=2,
        reward_epochs=1,
        reward_batch=8,
        value_net="shared",
        kl_coefficients=(0.125,),
    )


@pytest.fixture(scope="session")
def setting(options):
    """Fewer prompts than pairs, so that prompts come round again."""
    setting = builtin_setting(dataclasses.replace(options, pairs=16), jax.random.key(0))
    return setting


@pytest.fixture(scope="session")
def pools(options, setting):
    keys = jax.random.split(jax.random.key(1), options.seeds)
    each = [compare(setting, key, options.pairs, 0.25, np.random.default_rng(seed)) for seed, key in enumerate(keys)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@pytest.fixture(scope="session")
def initial(setting):
    return sample(setting, repeated(setting.world.prompts, np.arange(32) % 16), jax.random.key(2))


@pytest.fixture(scope="session")
def members(options, setting, pools):
    return train_members(options, setting, pools, jax.random.key(3))


@pytest.fixture(scope="session")
def proxies(options, setting, pools, initial, members):
    return prepare(options, setting, members, pools, initial.sequences)
