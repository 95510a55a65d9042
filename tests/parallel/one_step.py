"""One step of PPO with AdvPO, and one of SFT and of DPO, on a mesh or on none: what must not depend on the devices.

Optimisers are plain descent at rate 1, so that the change of the parameters is the gradient. As a command it is one of
several processes, the first of which writes what came out of PPO:

    python one_step.py MESH COORDINATOR PROCESSES PROCESS_ID OUT.npz
"""

import contextlib
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algorithms.compose import ComposedState, compose
from rlhf_jax.algorithms.in_place import in_place
from rlhf_jax.algorithms.kto import kto
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.preference import preference
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.losses.preference_choices import preference_loss
from rlhf_jax.models.config import Experts, ModelConfig
from rlhf_jax.models.heads import init_policy, init_reward_model
from rlhf_jax.parallel.distributed import Distributed, first_process, initialise
from rlhf_jax.parallel.meetings import gathered
from rlhf_jax.parallel.mesh import make_mesh, parse_mesh
from rlhf_jax.parallel.sharding import infer, place_batch
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.last_layer import advpo, geometry
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.queue import InTurns
from rlhf_jax.types import Demonstrations, PreferenceBatch, Prompts, Score, Sequences, UnpairedBatch

ROWS, PROMPT, RESPONSE = 16, 8, 8
DENSE = ModelConfig(
    vocab_size=64,
    width=32,
    layers=2,
    heads=8,
    key_value_heads=8,
    feed_forward_width=64,
    context_length=16,
    tied_embeddings=False,
    initializer_range=0.3,
)
MIXTURE = dataclasses.replace(DENSE, experts=Experts(count=8, active=2))
TIED = dataclasses.replace(DENSE, tied_embeddings=True)
DESCENT = optax.sgd(1.0)


def _tokens(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).integers(2, DENSE.vocab_size, shape).astype(np.int32))


def _mask(length, seed):
    """Rows of different lengths, padded on the left."""
    lengths = np.random.default_rng(seed).integers(2, length + 1, (ROWS, 1))
    return jnp.asarray(np.arange(length)[None] >= length - lengths)


def _sequences(seed):
    mask = _mask(PROMPT + RESPONSE, seed)
    before = jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))  # a token behind padding is predicted from what means nothing
    kind = dict(
        tokens=_tokens(mask.shape, seed),
        mask=mask,
        loss_mask=mask & before & jnp.asarray(np.arange(mask.shape[1]) >= PROMPT)[None],
    )
    return kind


def adversarial_ppo(config, on, decode=None):
    """Samples, rewards and displacement, losses, and the change of policy and value net, of one composed step."""
    options = PPOConfig(
        sampling=SamplingConfig(max_new_tokens=RESPONSE, stop_tokens=(1,), pad_token=0, decode=decode),
        epochs=1,
        minibatches=1,
        value_net="shared",
    )
    algorithm = ppo(config, options, DESCENT, fixed_kl(0.1))
    step = compose(algorithm, reward_scorer(config), advpo())
    around = np.random.default_rng(3).normal(size=(2, 64, config.width)).astype(np.float32)

    def init(key):
        transform = advpo().init(geometry(jnp.asarray(around[0].T @ around[0]), 1.0), 2.0)
        reference = init_policy(config, jax.random.fold_in(key, 8))
        state = ComposedState(algorithm=algorithm.init(key, {"reference": reference}), transform=transform)
        return state, init_reward_model(config, jax.random.fold_in(key, 9))

    def run(state, prompts, reference):
        state, reward = state
        before = state.algorithm.params
        after, out = step(state, prompts, reward, reference)
        change = jax.tree.map(jnp.subtract, after.algorithm.params, before)
        return (after, reward), (out.rollout.tokens, out.rewards, out.metrics, change)

    prompts = Prompts(tokens=_tokens((ROWS, PROMPT), 0), mask=_mask(PROMPT, 1), index=jnp.arange(ROWS, dtype=jnp.int32))
    reference = Score(mean=jnp.zeros(ROWS), features=jnp.asarray(around[1, :ROWS]))
    _, (tokens, rewards, metrics, change) = in_place(run)(on.state(init, config), on.rows(prompts), on.rows(reference))
    return {"tokens": tokens, "rewards": rewards, "metrics": metrics, "change": change}


def offline(config, algorithm, batch, on):
    """Metrics and the change of the parameters of one update on a batch."""

    def run(state, batch):
        after, metrics = algorithm.update(state, batch)
        return after, (metrics, jax.tree.map(jnp.subtract, after.params, state.params))

    def init(key):
        return algorithm.init(key, {"policy": init_policy(config, key)})

    _, (metrics, change) = in_place(run)(on.state(init, config), on.rows(batch))
    return {"metrics": metrics, "change": change}


def supervised(config, on):
    """One update of SFT."""
    return offline(config, sft(config, DESCENT), Demonstrations(**_sequences(5)), on)


def preferences(on):
    """One update of DPO; with another reference, for else the loss is log 2."""
    algorithm = preference(DENSE, preference_loss("dpo", beta=0.5), DESCENT)
    pairs = PreferenceBatch(
        chosen=Sequences(**_sequences(6)), rejected=Sequences(**_sequences(7)), margin=jnp.zeros(ROWS)
    )

    return offline(DENSE, another_reference(algorithm), pairs, on)


def completions(on):
    """One update of KTO, whose reference point is a mean over all rows."""
    batch = UnpairedBatch(
        completions=Sequences(**_sequences(6)),
        mismatched=Sequences(**_sequences(7)),
        good=jnp.arange(ROWS) % 3 == 0,
    )
    return offline(DENSE, another_reference(kto(DENSE, DESCENT, beta=0.5)), batch, on)


def another_reference(algorithm):
    """The same algorithm, whose reference is not the policy at the start."""

    def init(key, params):
        other = init_policy(DENSE, jax.random.fold_in(key, 1))
        return algorithm.init(key, params | {"reference": other})

    return algorithm._replace(init=init)


class OneDevice:
    """Where arrays lie: on the default device."""

    def state(self, init, config):
        return jax.jit(init)(jax.random.key(0))

    def rows(self, batch):
        return jax.tree.map(jnp.asarray, batch)


class OnMesh:
    """Where arrays lie: on a mesh."""

    def __init__(self, mesh):
        self.mesh = mesh

    def state(self, init, config):
        state = OneDevice().state(init, config)
        return jax.device_put(state, infer(state, self.mesh, (config,)))

    def rows(self, batch):
        return place_batch(batch, self.mesh)


def outcome(part, words=None, devices=None):
    """What a part gives on a mesh, or on one device, as a tree of numpy arrays."""
    if words is None:
        return gathered(part(OneDevice()))
    mesh = make_mesh(parse_mesh(words), devices)
    with jax.set_mesh(mesh):
        return gathered(jax.block_until_ready(part(OnMesh(mesh))))


PARTS = {
    "ppo": lambda on: adversarial_ppo(DENSE, on),
    "ppo of a queue": lambda on: adversarial_ppo(DENSE, on, InTurns(ROWS // 2)),
    "mixture": lambda on: adversarial_ppo(MIXTURE, on),
    "sft": lambda on: supervised(TIED, on),
    "sft of a mixture": lambda on: supervised(MIXTURE, on),
    "dpo": preferences,
    "kto": completions,
}


def leaves(tree):
    """Arrays of a tree by name."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def main(words, coordinator, processes, process_id, out):
    initialise(Distributed(coordinator, int(processes), int(process_id)))
    found = leaves(outcome(PARTS["ppo"], words))
    if first_process():
        np.savez(out, **found)


if __name__ == "__main__":
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", 4)
    main(*sys.argv[1:])
