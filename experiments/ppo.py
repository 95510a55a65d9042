"""PPO of any Hugging Face model on prompts, with a reward model, several of them, or a Python function as the reward.

    python experiments/ppo.py --model FOLDER --data prompts.jsonl --reward REWARD_FOLDER --out OUT
    python experiments/ppo.py --model FOLDER --data prompts.jsonl --reward A B C --rule worst_case --out OUT
    python experiments/ppo.py --model FOLDER --data prompts.jsonl --reward A --rule advpo --preferences pairs.jsonl
    python experiments/ppo.py --model FOLDER --data prompts.jsonl --reward my_rewards:length --out OUT --adapter lora

Rows have `prompt` (text or a chat) or `messages`, and any other columns, which a Python reward gets as
`f(prompts, completions, **columns)`. With `--rule advpo` the `completion` or `chosen` of a row is the reference
response to its prompt; where there is none, one is drawn from the initial policy. OUT holds the policy as a Hugging
Face folder (`model`; of an adapter the merged one, and `adapter` for PEFT), `summary.json` with the reward and the KL
on held-out prompts before and after (the reward of AdvPO there is the score of the reward model), `samples.md` and
`samples/` (completions at each evaluation), `metrics.jsonl`, `figures/training.png` and checkpoints; an interrupted run
goes on with `--resume`.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax

from rlhf_jax.algorithms.compose import ComposedState
from rlhf_jax.algorithms.on_policy import check_minibatches
from rlhf_jax.algorithms.optimizer import adam, learning_rate_schedule
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.rewarded import function_reward, model_reward
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.data.pipeline import batches
from rlhf_jax.losses.kl import adaptive_kl, fixed_kl
from rlhf_jax.models.heads import init_value_head
from rlhf_jax.parallel.meetings import over_processes
from rlhf_jax.rewards.members import RULES, Rule, centred, members_scorer, rule_state
from rlhf_jax.rewards.named import read_reward
from rlhf_jax.sampling.batches import generate_batches
from rlhf_jax.training.adversarial import AdversarialOptions, adversarial_rule, check_adversarial, read_material
from rlhf_jax.training.answers import Answers, answer, answer_rows, write_answers
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.devices import check_rows, layout, on_devices, start
from rlhf_jax.training.export import export_policy
from rlhf_jax.training.options import TrainingOptions, check_options
from rlhf_jax.training.prompting import PROMPTED_FORMATS, collate_prompts, completions_of, prompt_rows, sampling_of
from rlhf_jax.training.run_folder import check
from rlhf_jax.training.session import adapter_of, check_run, finish, open_run, train
from rlhf_jax.training.sources import count_steps, open_source, placement, read_policy, read_split


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions, AdversarialOptions):
    """Options of PPO.

    Attributes:
        reward: Hugging Face folders of reward models with the vocabulary of the policy, or one function, named
            module:function.
        rule: what becomes of the scores of several reward models: their mean, their minimum, their mean less a penalty
            for their variance or standard deviation, or the score of the first alone. "advpo" is for one reward model:
            its score under the head that is worst for the policy in the confidence ellipsoid of the trained one.
        penalty: coefficient of that penalty; None: 0.5 (uncertainty_weighted) or 1 (lower_confidence_bound).
        reference_samples: responses of the initial policy whose mean score each reward model counts from.
        batch_size: prompts an update, one response each.
        epochs: passes over the prompts.
        response_length: most tokens of a response.
        temperature: of the draws, above 0.
        kl: coefficient of the penalty for the KL from the initial policy, reward units a nat; where it begins, with
            --target-kl.
        target_kl: KL in nats a response that the coefficient is steered towards; None: it stays what it is.
        kl_horizon: responses over which the coefficient follows.
        missing_eos_penalty: subtracted from the reward of a response that did not end by itself.
        value_net: a network of its own, which begins as a copy of the policy, or a head on the policy's trunk.
        passes: passes over the responses of an update.
        minibatches: optimiser steps a pass.
        clip: the ratio of probabilities is clipped at 1 - clip and 1 + clip.
        gae_lambda: lambda of generalised advantage estimation.
        offload_reference: on a mesh, keep the reference policy in the memory of the hosts while it is not used.
    """

    learning_rate: float = 1e-5
    most_held_out: int = 128
    reward: tuple[str, ...] = ()
    rule: Rule | Literal["advpo"] = "mean"
    penalty: float | None = None
    reference_samples: int = 256
    response_length: int = 64
    temperature: float = 1.0
    kl: float = 0.05
    target_kl: float | None = None
    kl_horizon: int = 10_000
    missing_eos_penalty: float = 0.0
    value_net: Literal["separate", "shared"] = "separate"
    passes: int = 2
    minibatches: int = 2
    clip: float = 0.2
    gae_lambda: float = 0.95
    offload_reference: bool = False


PRESETS = {
    "default": Config(),
    "tiny": Config(
        preset="tiny", steps=20, batch_size=16, learning_rate=3e-4, response_length=32, log_every=5, most_held_out=32
    ),
}


@on_devices
def main(config: Config) -> dict:
    """Trains, evaluates and exports; returns the summary."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    check_run(config, "ppo")
    check_options(config, ("reward",))
    adversarial = config.rule == "advpo"
    if adversarial:
        check_adversarial(config, config.reward)
    elif config.preferences is not None:
        raise ValueError(f"--rule {config.rule} does not use --preferences: leave it out, or choose advpo.")
    if config.batch_size % config.minibatches:
        raise ValueError(f"--batch-size {config.batch_size} does not split into {config.minibatches} --minibatches.")
    check_minibatches(config.batch_size, config.minibatches, config.accumulate)
    source = open_source(config)
    data = read_split(config, source, PROMPTED_FORMATS, prompt_rows(config.response_length))
    # Nearly every batch has a long prompt: one length is one compilation of the whole step.
    collate = collate_prompts(source, data.train + data.held_out, config.response_length, buckets=1)
    steps = count_steps(config, len(data.train))
    updates = steps * config.passes * config.minibatches
    schedule = learning_rate_schedule(config.learning_rate, updates, int(config.warmup * updates), config.schedule)
    sampling, adapter = sampling_of(source, config.response_length, temperature=config.temperature), adapter_of(config)
    steered = config.target_kl is not None
    controller = adaptive_kl(config.kl, config.target_kl, config.kl_horizon) if steered else fixed_kl(config.kl)
    algorithm = ppo(
        source.config,
        PPOConfig(
            sampling=sampling,
            epochs=config.passes,
            minibatches=config.minibatches,
            accumulate=config.accumulate,
            clip_low=config.clip,
            clip_high=config.clip,
            gae_lambda=config.gae_lambda,
            missing_eos_penalty=config.missing_eos_penalty,
            value_net=config.value_net,
        ),
        adam(schedule, config.max_grad_norm, config.weight_decay, moments=config.moments),
        controller,
        adapter=adapter,
    )
    longest = collate(data.train[: config.batch_size]).prompts.tokens.shape[1] + config.response_length
    parts = config.minibatches * config.accumulate
    check_rows(config.batch_size // parts, longest, "rows of a minibatch (with --accumulate, of a part of it)")
    combined = "single" if adversarial else config.rule
    reward = read_reward(config.reward, combined, config.penalty, source.config, source.tokenizer, longest, placement())
    if adversarial and callable(reward):
        raise ValueError(f"--rule advpo needs the folder of a reward model, not the function {config.reward[0]}.")
    material = read_material(config, source, reward[0], data.train, config.response_length) if adversarial else None
    policy = read_policy(source)
    folder = open_run(config, "ppo")
    state_key, reference_key, held_out_key = jax.random.split(jax.random.key(config.seed), 3)
    if callable(reward):
        reward = over_processes(reward)
        rewarded = function_reward(algorithm, reward, lambda rows, taken: completions_of(source, rows, taken))
    else:

        def draw(items):
            prompts, size = (lambda rows: collate(rows).prompts), config.batch_size
            return generate_batches(source.config, policy, items, prompts, size, reference_key, sampling)

        params = centred(reward, list(draw(data.train[: config.reference_samples])))
        scorer = members_scorer([member.config for member in reward])
        if adversarial:
            score = partial(jax.jit(scorer), params)
            rule = adversarial_rule(config, source, reward[0], data.train, material, draw, score)
        else:
            rule = RULES[config.rule], rule_state(config.rule, config.penalty)
        rewarded = model_reward(algorithm, scorer, params, *rule)

    def init(key, policy, transform):
        trunk = {"trunk": policy["trunk"]} if config.value_net == "separate" else {}
        value = {"head": init_value_head(source.config)} | trunk
        return ComposedState(algorithm=algorithm.init(key, {"policy": policy, "value": value}), transform=transform)

    state = start(init, [source.config], state_key, policy, rewarded.transform, **layout(config))
    del policy  # it is in the state now
    measured: dict[int, Answers] = {}

    def evaluate(state: ComposedState, step: int) -> dict[str, float]:
        state, held_out = state.algorithm, data.held_out
        policy = assemble(state.reference, state.params["policy"], adapter)
        how = (collate, config.batch_size, held_out_key, sampling, rewarded.score)
        found = measured[step] = answer(source, policy, state.reference, held_out, *how)
        path, name = folder.path / "samples" / f"step_{step:08d}.md", f"step {step}"
        write_answers(path, "Completions of held-out prompts", held_out, {name: found}, config.samples)
        return found.metrics

    stream = batches(data.train, config.batch_size, collate, seed=config.seed)
    trained = train(
        config,
        folder,
        rewarded.step,
        state,
        stream,
        steps,
        evaluate,
        tokens=lambda _, metrics: metrics["completions/mean_length"] * config.batch_size,
        shown=("objective/scores", "objective/kl", "completions/mean_length"),
    )
    before, after = measured[0], measured[steps]
    both, path = {"before": before, "after": after}, folder.path / "samples.md"
    write_answers(path, "Completions of held-out prompts", data.held_out, both, config.samples)
    final = trained.state.algorithm
    export_policy(folder.path, source, final.params["policy"], final.reference, adapter)
    rounding = 1e-2 if config.dtype == "float32" else 1.0
    checks = [check("KL of the initial policy from itself", float(before.kl.mean()), 0.0, rounding)]
    panels = [("objective/scores", "eval/objective/scores"), ("objective/kl", "eval/objective/kl"), ("loss/value",)]
    return finish(folder, trained, answer_rows(before, after), checks, began, clock, panels)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
