"""PPO of any Hugging Face model on prompts, with a reward model, several of them, or a Python function as the reward.

    python experiments/ppo.py --model FOLDER --data prompts.jsonl --reward REWARD_FOLDER --out OUT
    python experiments/ppo.py --model FOLDER --data prompts.jsonl --reward A B C --rule worst_case --out OUT
    python experiments/ppo.py --model FOLDER --data prompts.jsonl --reward A --rule advpo --preferences pairs.jsonl
    python experiments/ppo.py --model FOLDER --data prompts.jsonl --reward A --rule par --reference-responses 4
    python experiments/ppo.py --model FOLDER --data prompts.jsonl --reward my_rewards:length --out OUT --adapter lora

Rows have `prompt` (text or a chat) or `messages`, and any other columns, which a Python reward gets as
`f(prompts, completions, **columns)`. With `--rule advpo` or `par` the `completion` or `chosen` of a row is the
reference response to its prompt; where there is none, or with `--reference-responses`, they are drawn from the initial
policy. OUT holds the policy as a Hugging Face folder (`model`; of an adapter the merged one, and `adapter` for PEFT),
`summary.json` with the reward and the KL on held-out prompts before and after (with `advpo` and `par` the reward there
is the score of the reward model), `samples.md` and `samples/` (completions at each evaluation), `metrics.jsonl`,
`figures/training.png` and checkpoints; an interrupted run goes on with `--resume`. `experiments/grpo.py` has the
algorithms that need no value net.
"""

import dataclasses
from typing import Literal

import jax

from rlhf_jax.algorithms.compose import ComposedState
from rlhf_jax.algorithms.optimizer import adam, learning_rate_schedule
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.rewarded import rewarded_by
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.models.heads import init_value_head
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.devices import layout, on_devices, start
from rlhf_jax.training.policy_options import PolicyOptions, check_policy_run, given, kl_of
from rlhf_jax.training.policy_rewards import make_reward, read_material
from rlhf_jax.training.policy_run import open_task, settle_old_logprob, train_policy
from rlhf_jax.training.session import open_run
from rlhf_jax.training.sources import read_policy


@dataclasses.dataclass(frozen=True)
class Config(PolicyOptions):
    """Options of PPO.

    Attributes:
        batch_size: prompts an update, one response each.
        value_net: a network of its own, which begins as a copy of the policy, or a head on the policy's trunk.
        clip: the ratio of probabilities is clipped at 1 - clip and 1 + clip.
        gae_lambda: lambda of generalised advantage estimation.
    """

    passes: int = 2
    minibatches: int = 2
    value_net: Literal["separate", "shared"] = "separate"
    clip: float = 0.2
    gae_lambda: float = 0.95


PRESETS = {
    "default": Config(),
    "tiny": Config(
        preset="tiny", steps=20, batch_size=16, learning_rate=3e-4, response_length=32, log_every=5, most_held_out=32
    ),
}


def options_of(config: Config) -> PPOConfig:
    """The options of the algorithm; how it samples is known when the tokenizer is read."""
    return PPOConfig(
        sampling=SamplingConfig(config.response_length, stop_tokens=()),
        epochs=config.passes,
        minibatches=config.minibatches,
        accumulate=config.accumulate,
        importance_cap=config.importance_cap,
        length_buckets=config.length_buckets,
        clip_low=config.clip,
        clip_high=config.clip,
        dual_clip=config.dual_clip,
        gae_lambda=config.gae_lambda,
        missing_eos_penalty=config.missing_eos_penalty,
        value_net=config.value_net,
        **given(config, "kl_in", "kl_estimate"),
    )


@on_devices
def main(config: Config) -> dict:
    """Trains, evaluates and exports; returns the summary."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    check_policy_run(config, "ppo")
    options = options_of(config)
    task = open_task(config)
    shape, adapter = task.source.config, task.adapter
    warmup = int(config.warmup * task.optimizer_steps)
    schedule = learning_rate_schedule(config.learning_rate, task.optimizer_steps, warmup, config.schedule)
    optimizer = adam(schedule, config.max_grad_norm, config.weight_decay, moments=config.moments)
    material = read_material(config, task)
    policy = read_policy(task.source)
    state_key, reference_key, held_out_key = jax.random.split(jax.random.key(config.seed), 3)
    folder = open_run(config, "ppo")
    old_logprob = settle_old_logprob(config, folder, task, policy, held_out_key)
    options = dataclasses.replace(options, sampling=task.sampling, old_logprob=old_logprob)
    algorithm = ppo(shape, options, optimizer, kl_of(config), adapter=adapter)
    reward = make_reward(config, task, material, policy, reference_key)
    rewarded = rewarded_by(algorithm, reward, task.completions)

    def init(key, policy, transform):
        trunk = {"trunk": policy["trunk"]} if config.value_net == "separate" else {}
        value = {"head": init_value_head(shape)} | trunk
        return ComposedState(algorithm=algorithm.init(key, {"policy": policy, "value": value}), transform=transform)

    state = start(init, [shape], state_key, policy, rewarded.transform, **layout(config, config.offload_reference))
    del policy  # it is in the state now
    return train_policy(
        config,
        folder,
        task,
        rewarded.step,
        rewarded.score,
        state,
        held_out_key,
        trained_in=lambda state: state.params["policy"],
        policy_in=lambda state: assemble(state.reference, state.params["policy"], adapter),
        began=began,
        clock=clock,
        panels=[("loss/value",)],
    )


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
