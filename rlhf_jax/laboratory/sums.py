"""The verifiable toy as a setting: modular sums, and a policy that was taught them by someone who slips."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.fit import epoch_orders, fit
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.data.synthetic.modular import (
    ModularSums,
    modular_demonstrations,
    modular_prompts,
    modular_reward,
    read_tokens,
)
from rlhf_jax.data.world import World
from rlhf_jax.laboratory.setting import Setting, sampling_of
from rlhf_jax.models.config import ModelConfig

BATCH = 64
BATCHES_OF_DATA = 100


def modular_world(task: ModularSums, prompts: int, held_out: int, seed: int) -> World:
    """Modular sums as a `World`, whose gold reward is the checker's.

    Args:
        task: which sums.
        prompts: number of training prompts.
        held_out: number of other prompts, which policies are measured on.
        seed: of the draw of both.

    Raises:
        ValueError: there are not so many prompts.
    """
    rng = np.random.default_rng(seed)
    every = modular_prompts(rng, task, prompts + held_out)

    def gold(prompt_tokens: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        together = jnp.concatenate([jnp.asarray(prompt_tokens), jnp.asarray(tokens)], axis=1)
        real = jnp.concatenate([jnp.ones(prompt_tokens.shape, bool), jnp.asarray(mask)], axis=1)
        return np.asarray(modular_reward(task, together, real), np.float64)

    def read(prompt_tokens, prompt_mask, tokens, mask) -> list[tuple[str, str]]:
        del prompt_mask
        responses = np.where(mask, tokens, task.pad_token)
        return [
            (read_tokens(task, prompt), read_tokens(task, response))
            for prompt, response in zip(prompt_tokens, responses, strict=True)
        ]

    return World(
        name="modular sums",
        prompts=jax.tree.map(lambda leaf: leaf[:prompts], every),
        held_out=jax.tree.map(lambda leaf: leaf[prompts:], every),
        response_length=task.response_length,
        stop_tokens=(task.stop_token,),
        pad_token=task.pad_token,
        gold=gold,
        read=read,
    )


def sums_setting(
    task: ModularSums, world: World, width: int, slips: float, steps: int, seed: int, key: jax.Array
) -> Setting:
    """A two-layer policy that knows modular sums but slips as often as its teacher.

    Args:
        task: which sums.
        world: from `modular_world`.
        width: of the policy.
        slips: see `modular_demonstrations`.
        steps: fine-tuning steps of 64 demonstrations.
        seed: of the demonstrations.
        key: of the parameters at the start and of the order of the data.
    """
    model = ModelConfig(
        vocab_size=task.vocabulary,
        width=width,
        layers=2,
        heads=2,
        key_value_heads=2,
        feed_forward_width=3 * width,
        context_length=task.prompt_length + task.response_length,
        initializer_range=0.1,  # with the usual 0.02 it takes far longer to find out how to add
    )
    data = modular_demonstrations(np.random.default_rng(seed), task, BATCHES_OF_DATA * BATCH, slips)
    algorithm = sft(model, adam(5e-3))
    init_key, order_key = jax.random.split(key)
    order = epoch_orders(order_key, len(data.tokens), BATCH, -(-steps // BATCHES_OF_DATA))[:steps]
    learned = jax.jit(lambda data: fit(algorithm.update, algorithm.init(init_key), data, order)[0].params)
    policy = learned(data)
    return Setting(
        world=world,
        sampling=sampling_of(world),
        policy_config=model,
        policy=policy,
        reward_config=model,
        trunks=jax.tree.map(lambda leaf: leaf[None], policy["trunk"]),
    )
