"""GRPO and its relatives, which need no value net, of any Hugging Face model on prompts, with any reward.

    python experiments/grpo.py --model FOLDER --data prompts.jsonl --reward my_rewards:length --out OUT
    python experiments/grpo.py --model FOLDER --data prompts.jsonl --reward A --method rloo --responses 4
    python experiments/grpo.py --model FOLDER --data prompts.jsonl --reward A B C --rule uncertainty_weighted
    python experiments/grpo.py --model FOLDER --data prompts.jsonl --reward A --rule par --method remax
    python experiments/grpo.py --model FOLDER --data prompts.jsonl --reward A --method dapo --oversample 2 --kl 0

Methods are those of `algorithms.methods.METHODS`, where their papers are. Rows and rewards are those of
`experiments/ppo.py`, and OUT holds the same; an interrupted run goes on with `--resume`. A Python reward gets the
columns of a row once for each response. `docs/your_reward.md` goes through an example, also by calls of the library.
"""

import dataclasses
from typing import Literal

import jax

from rlhf_jax.algorithms.compose import ComposedState
from rlhf_jax.algorithms.methods import METHODS, Method, method
from rlhf_jax.algorithms.optimizer import adam, learning_rate_schedule
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.rewarded import rewarded_by
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.losses.policy import capped_surrogate, clipped_surrogate, reinforce_surrogate
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.devices import layout, on_devices, start
from rlhf_jax.training.policy_options import PolicyOptions, check_policy_run, given, kl_of
from rlhf_jax.training.policy_rewards import make_reward, read_material
from rlhf_jax.training.policy_run import open_task, settle_old_logprob, train_policy
from rlhf_jax.training.session import open_run
from rlhf_jax.training.sources import read_policy

CLIPS = {
    clipped_surrogate: ("clip_low", "clip_high", "dual_clip"),
    capped_surrogate: ("clip_high",),
    reinforce_surrogate: (),
}
"""The options of clipping that a surrogate reads."""


@dataclasses.dataclass(frozen=True)
class Config(PolicyOptions):
    """Options of policy gradients without a value net.

    Attributes:
        method: which one.
        batch_size: prompts an update.
        responses: K, responses that are sampled a prompt; None: 8 where they are compared with each other, else 1.
            ReMax draws one more, the greedy one.
        clip_low: the ratio of probabilities is clipped at 1 - clip_low; None: as the method does it.
        clip_high: the ratio is clipped (of cispo, capped) at 1 + clip_high; None: as the method does it.
        mask_unfinished: responses that did not end by themselves are not trained on; None: as the method does it (dapo
            does: give False, and an --overlong-buffer, where hardly any response ends).
        oversample: of so many times as many prompts as are trained on, those are whose rewards are not all equal
            (dapo); divides the batch.
        overlong_buffer: the reward falls by up to 1 over the last so many tokens before the longest response.
    """

    batch_size: int = 16
    method: Literal[*METHODS] = "grpo"
    responses: int | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    mask_unfinished: bool | None = None
    oversample: int = 1
    overlong_buffer: int = 0

    @property
    def rows(self) -> int:
        """Responses that an update is made of."""
        return options_of(self).rows * self.batch_size // self.oversample


PRESETS = {
    "default": Config(),
    "tiny": Config(
        preset="tiny", steps=20, batch_size=4, responses=4, learning_rate=3e-4, response_length=32, log_every=5,
        most_held_out=32,
    ),
}  # fmt: skip


def method_of(config: Config) -> Method:
    """The pieces of the method, changed as the options ask; raises ValueError for options that it does not read."""
    pieces = method(config.method)
    for name in ("clip_low", "clip_high", "dual_clip"):
        value, word = getattr(config, name), name.replace("_", "-")
        if value is not None and name not in CLIPS[pieces.surrogate]:
            raise ValueError(f"--method {config.method} does not use --{word}: leave it out.")
        if value is not None and not value >= 0:
            raise ValueError(f"--{word} is {value}: give 0 or more.")
    if config.oversample > 1 and not pieces.drop_equal:
        raise ValueError(f"--method {config.method} does not use --oversample: leave it out, or choose dapo.")
    if pieces.surrogate is reinforce_surrogate and config.passes * config.minibatches > 1:
        raise ValueError(
            f"--method {config.method} corrects nothing for steps away from the policy that sampled: "
            "give --passes 1 and --minibatches 1."
        )
    changes = given(config, "clip_low", "clip_high", "kl_in", "kl_estimate", "mask_unfinished")
    return method(config.method, config.dual_clip, **changes)


def options_of(config: Config) -> PolicyGradientConfig:
    """The options of the algorithm; where responses stop is known when the tokenizer is read."""
    pieces = method_of(config)
    grouped = pieces.baseline == "group"
    samples = config.responses if config.responses is not None else 8 if grouped else 1
    if samples < 1 + grouped:
        why = ", for they are compared with each other" if grouped else ""
        raise ValueError(f"--responses is {samples}: give {config.method} {1 + grouped} or more{why}.")
    if config.oversample < 1:
        raise ValueError(f"--oversample is {config.oversample}: give 1 or more.")
    if config.batch_size % config.oversample:
        raise ValueError(
            f"--batch-size {config.batch_size} is no multiple of --oversample {config.oversample} "
            f"({config.batch_size} / {config.oversample} prompts are trained on): choose a divisor."
        )
    return PolicyGradientConfig(
        sampling=SamplingConfig(config.response_length, stop_tokens=(), temperature=config.temperature),
        method=pieces,
        samples=samples,
        epochs=config.passes,
        minibatches=config.minibatches,
        accumulate=config.accumulate,
        importance_cap=config.importance_cap,
        length_buckets=config.length_buckets,
        missing_eos_penalty=config.missing_eos_penalty,
        overlong_buffer=config.overlong_buffer,
        oversample=config.oversample,
    )


@on_devices
def main(config: Config) -> dict:
    """Trains, evaluates and exports; returns the summary."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    check_policy_run(config, "grpo")
    options = options_of(config)
    task = open_task(config)
    shape, adapter = task.source.config, task.adapter
    warmup = int(config.warmup * task.optimizer_steps)
    schedule = learning_rate_schedule(config.learning_rate, task.optimizer_steps, warmup, config.schedule)
    optimizer = adam(schedule, config.max_grad_norm, config.weight_decay, moments=config.moments)
    material = read_material(config, task)
    policy = read_policy(task.source)
    state_key, reference_key, held_out_key = jax.random.split(jax.random.key(config.seed), 3)
    folder = open_run(config, "grpo")
    old_logprob = settle_old_logprob(config, folder, task, policy, held_out_key)
    options = dataclasses.replace(options, sampling=task.sampling, old_logprob=old_logprob)
    algorithm = policy_gradient(shape, options, optimizer, kl_of(config), adapter)
    reward = make_reward(config, task, material, policy, reference_key)
    rewarded = rewarded_by(algorithm, reward, task.completions)

    def init(key, policy, transform):
        return ComposedState(algorithm=algorithm.init(key, {"policy": policy}), transform=transform)

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
        trained_in=lambda state: state.params,
        policy_in=lambda state: assemble(state.reference, state.params, adapter),
        began=began,
        clock=clock,
        panels=[("objective/equal_groups", "objective/trained", "completions/clipped_ratio")],
        watched="objective/trained",
    )


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
