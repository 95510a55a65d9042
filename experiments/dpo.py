"""Learning from preferences with any Hugging Face model, without a reward model: DPO and the losses beside it.

    python experiments/dpo.py --model FOLDER --data pairs.jsonl --out OUT --beta 0.1
    python experiments/dpo.py --model FOLDER --data pairs.jsonl --out OUT --adapter lora --rank 16 --learning-rate 1e-4
    python experiments/dpo.py --model FOLDER --data pairs.jsonl --out OUT --loss simpo --beta 2.5 --gamma 1.2
    python experiments/dpo.py --model FOLDER --data thumbs.jsonl --out OUT --loss kto

Rows have `chosen` and `rejected`, and `prompt` unless it is what both begin with; text or chats. For `--loss kto` they
may have `prompt`, `completion` and `label` (good or not); pairs are taken apart. The reference policy is the model at
the start (with an adapter: the model without it, and no second copy); `simpo` and `orpo` have none. OUT holds the model
as a Hugging Face folder (`model`; of an adapter the merged one, and `adapter` for PEFT), `summary.json` with the
accuracy and margin of the implicit rewards on held-out pairs (beta log(pi / ref); without a reference, beta times the
mean log-probability a token; of rows with a label, on good and bad completions put side by side), `samples.md`,
`metrics.jsonl`, `figures/training.png` and checkpoints; an interrupted run goes on with `--resume`.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import numpy as np

from rlhf_jax.algorithms.in_place import in_place
from rlhf_jax.algorithms.kto import kto
from rlhf_jax.algorithms.optimizer import adam, learning_rate_schedule
from rlhf_jax.algorithms.preference import PreferenceState, completion_logprobs, preference
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.data.batches import pad_preferences
from rlhf_jax.data.columns import PREFERENCE_FORMATS
from rlhf_jax.data.pipeline import batches
from rlhf_jax.data.unpaired import LABELLED_FORMATS, as_pairs, as_unpaired, pad_unpaired, tokenize_labelled
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.losses.preference_choices import PREFERENCE_LOSSES, check_read, options_of, preference_loss
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.devices import layout, on_devices, start
from rlhf_jax.training.export import export_policy
from rlhf_jax.training.held_out import bootstrap_row, over_rows, pair_accuracy
from rlhf_jax.training.options import TrainingOptions
from rlhf_jax.training.run_folder import check
from rlhf_jax.training.samples import choose_prompts, complete, write_completions
from rlhf_jax.training.session import adapter_of, check_run, finish, open_run, train
from rlhf_jax.training.sources import Source, collate_for, count_steps, open_source, read_policy, read_split

# Which options each loss reads.
READERS = {name: options_of(make) for name, make in PREFERENCE_LOSSES.items()}
READERS["kto"] = ("beta", "good_weight", "bad_weight")


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions):
    """Options of learning from preferences.

    Attributes:
        loss: what is minimised. An option that says "for" a loss is for no other; None is what the loss takes itself.
        batch_size: pairs an update; of kto, completions.
        response_length: most tokens of a completion in samples.md.
        reference: Hugging Face folder of the reference policy, of the same shape; None: the model at the start.
        beta: how strongly the policy is held to its reference, reward units a nat; of ipo the tau of the paper, of
            simpo the scale of the rewards, of orpo the weight of the odds ratio.
        label_smoothing: for dpo: share of the labels that are taken to be wrong, below 1/2.
        flip_rate: for robust: probability that a label is flipped, below 1/2.
        length_norm: for ipo: divide each log-ratio by the number of tokens.
        nll_weight: for rpo: weight of the negative log-likelihood a token of the chosen completions.
        reward_bound: for chi_po: largest absolute value that the true reward may have.
        gamma: for simpo: by how much the chosen reward is to exceed the other one.
        good_weight: for kto: weight of good completions.
        bad_weight: for kto: weight of bad ones.
        offload_reference: on a mesh, keep the reference policy in the memory of the hosts while it is not used.
    """

    learning_rate: float = 1e-5
    loss: Literal["dpo", "robust", "ipo", "hinge", "rpo", "chi_po", "simpo", "orpo", "kto"] = "dpo"
    response_length: int = 64
    reference: str | None = None
    beta: float | None = None
    label_smoothing: float | None = None
    flip_rate: float | None = None
    length_norm: bool = False
    nll_weight: float | None = None
    reward_bound: float | None = None
    gamma: float | None = None
    good_weight: float | None = None
    bad_weight: float | None = None
    offload_reference: bool = False


PRESETS = {
    "default": Config(),
    "tiny": Config(preset="tiny", steps=20, batch_size=8, learning_rate=3e-4, log_every=5, most_held_out=32),
}


def loss_options(config: Config) -> dict:
    """The options of the loss that are given; refuses those that it does not read."""
    given = {name: vars(config)[name] for read in READERS.values() for name in read}
    options = {name: value for name, value in given.items() if value is not None and value is not False}
    check_read(config.loss, options, READERS)
    return options


def pretrained(config: Config, source: Source) -> dict:
    """The policy, and the reference where another one is asked for."""
    params = {"policy": read_policy(source)}
    return params if config.reference is None else params | {"reference": read_policy(source, config.reference)}


def check_loss(config: Config, has_reference: bool) -> None:
    """Refuses a reference that would be passed over, and a batch that is too small for the loss."""
    if config.loss == "kto" and config.batch_size < 2:
        raise ValueError("--loss kto compares the rows of a batch: give a --batch-size of 2 or more.")
    for name in ("reference", "offload_reference"):
        if vars(config)[name] and not has_reference:
            raise ValueError(f"--loss {config.loss} has no reference: leave out --{name.replace('_', '-')}.")
    if config.reference is not None and config.adapter is not None:
        raise ValueError("--adapter trains on the model, which is the reference: leave out --reference.")


@on_devices
def main(config: Config) -> dict:
    """Trains, evaluates and exports; returns the summary."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    check_run(config, "dpo")
    single, options = config.loss == "kto", loss_options(config)
    # Of KTO, which has no loss of pairs, the rewards are those of DPO.
    loss = preference_loss("dpo", beta=options.get("beta", 0.1)) if single else preference_loss(config.loss, **options)
    check_loss(config, loss.reference)
    source = open_source(config)
    data = read_split(config, source, LABELLED_FORMATS if single else PREFERENCE_FORMATS, tokenize_labelled)
    rows, held_out = as_unpaired(data.train) if single else data.train, as_pairs(data.held_out)
    steps = count_steps(config, len(rows))
    sides = ("completions",) if single else ("chosen", "rejected")
    pad = partial(pad_unpaired, longest=source.config.context_length) if single else pad_preferences
    collate = collate_for(pad, source, (), rows, config.batch_size)
    collate_pairs = collate_for(pad_preferences, source, held_out)
    schedule = learning_rate_schedule(config.learning_rate, steps, int(config.warmup * steps), config.schedule)
    optimizer = adam(schedule, config.max_grad_norm, config.weight_decay, moments=config.moments)
    how = {"adapter": adapter_of(config), "accumulate": config.accumulate}
    build = partial(kto, **options) if single else partial(preference, loss=loss)
    algorithm = build(source.config, optimizer=optimizer, **how)
    params = pretrained(config, source)
    prompts = choose_prompts(source, [pair.chosen for pair in held_out], config.samples, config.response_length)
    before = complete(source, params["policy"], prompts, config.response_length, config.seed)
    state = start(
        algorithm.init, [source.config], jax.random.key(config.seed), params, **layout(config, config.offload_reference)
    )
    del params  # they are in the state now
    folder = open_run(config, "dpo")

    def policy(state: PreferenceState):
        return assemble(state.reference, state.params, how["adapter"])

    @jax.jit
    def rewards(model, reference, batch):
        return loss.rewards(completion_logprobs(source.config, model, reference, batch))

    measured = {}

    def evaluate(state: PreferenceState, step: int) -> dict[str, float]:
        score = partial(rewards, policy(state), state.reference if loss.reference else None)
        chosen, rejected = measured[step] = over_rows(score, held_out, collate_pairs, config.batch_size)
        return {
            "eval/rewards/accuracies": pair_accuracy(chosen, rejected),
            "eval/rewards/margins": (chosen - rejected).mean(),
            "eval/rewards/chosen": chosen.mean(),
        }

    trained = train(
        config,
        folder,
        in_place(algorithm.update),
        state,
        batches(rows, config.batch_size, collate, seed=config.seed),
        steps,
        evaluate,
        tokens=lambda batch, _: sum(batch[side].mask.sum() for side in sides),
        shown=("loss/policy", "kto/reference_point" if single else "rewards/accuracies", "rewards/margins"),
    )
    after = complete(source, policy(trained.state), prompts, config.response_length, config.seed)
    write_completions(folder.path / "samples.md", source, prompts, {"before": before, "after": after})
    export_policy(folder.path, source, trained.state.params, trained.state.reference, how["adapter"])
    chosen, rejected = measured[steps]
    gained = float((chosen - rejected).mean() - np.subtract(*measured[0]).mean())
    table = [
        bootstrap_row("held-out accuracy of the implicit rewards", "", pair_accuracy, chosen, rejected),
        row("held-out margin of the implicit rewards", "nats", chosen - rejected),
        row("held-out implicit reward of the chosen completion", "nats", chosen),
        bootstrap_row("held-out accuracy of the implicit rewards before", "", pair_accuracy, *measured[0]),
    ]
    panels = [("loss/policy",), ("rewards/accuracies", "eval/rewards/accuracies"), ("eval/rewards/margins",)]
    checks = [check("held-out margin of the implicit rewards gained", gained, 0.0, "at least")]
    return finish(folder, trained, table, checks, began, clock, panels)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
