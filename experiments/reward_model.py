r"""A reward model from any Hugging Face model and pairs of completions: one that scores, or one that knows its doubts.

    python experiments/reward_model.py --model FOLDER --data pairs.jsonl --out OUT
    python experiments/reward_model.py --model FOLDER --data pairs.jsonl --out OUT --kind linear_ensemble --members 20 \
        --prior-decay 0.01
    python experiments/reward_model.py --model FOLDER --data webgpt.jsonl --convert webgpt_comparisons --out OUT

Rows have `chosen` and `rejected`, and `prompt` unless it is what both begin with, and perhaps `margin` and `label` (the
probability, from 1/2, that the chosen one is better); text or chats. The model is a policy, which gets a fresh head, or
a reward model, which goes on learning.

`--kind` says what is made: by default a Bradley-Terry model. `linear_ensemble`, `dropout`, `posterior` and, with an
ensemble as the model, `lora_ensemble` also say of each score how unsure it is, which policies can be kept from
exploiting: `ppo.py --reward OUT/model --rule lower_confidence_bound`. `probabilistic` says what the data leave open.
`--kind posterior --frozen` makes the posterior of a reward model that is there already, without a step of training:
`--data` are the pairs that it was trained on, of which the same prompts are held out.

For several epochs, `--smoothing-rate 0.7` (Iterative Data Smoothing) moves the label of each pair to what the model
says of it after each visit. Against rewards that count tokens, `--balance-lengths` leaves out pairs, and `--augment
0.25` adds some that prefer an answer to their prompt to one to another. Held-out pairs stay as they are.

OUT holds the reward model as a Hugging Face folder (`model`, a `…ForSequenceClassification`, with its uncertainty
beside it), `summary.json` with the accuracy on held-out pairs beside that of the longer answer, the calibration error
and whether the uncertainty finds the errors, `samples.md` with the best and worst margins, `metrics.jsonl`,
`figures/training.png` and checkpoints; an interrupted run goes on with `--resume`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from rlhf_jax.algorithms import reward_modeling as modeling
from rlhf_jax.algorithms.attribute_modeling import probabilistic_modeling, probabilistic_params
from rlhf_jax.algorithms.ensemble_modeling import (
    linear_ensemble_modeling,
    linear_ensemble_params,
    lora_ensemble_modeling,
    lora_ensemble_params,
)
from rlhf_jax.algorithms.in_place import in_place
from rlhf_jax.algorithms.optimizer import adam, learning_rate_schedule
from rlhf_jax.data.batches import pad_preferences
from rlhf_jax.data.columns import PREFERENCE_FORMATS
from rlhf_jax.data.length_balance import augment_pairs, balance_lengths, check_share, completion_lengths, numbered
from rlhf_jax.data.pipeline import batches
from rlhf_jax.data.tokenization import Preference, tokenize_preferences
from rlhf_jax.evaluation.calibration import reliability
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.models.adapters import attach, merge
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.linear_ensemble import linear_ensemble_scorer
from rlhf_jax.rewards.lora_ensemble import lora_ensemble_scorer
from rlhf_jax.rewards.probabilistic import probabilistic_scorer
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.devices import layout, on_devices, start
from rlhf_jax.training.export import export_reward_model
from rlhf_jax.training.held_out import bootstrap_row, pair_accuracy
from rlhf_jax.training.kind_options import MEMBERS, ONE_HEAD, KindOptions, check_kind
from rlhf_jax.training.options import TrainingOptions
from rlhf_jax.training.run_folder import check
from rlhf_jax.training.samples import readable, write_samples
from rlhf_jax.training.session import adapter_of, check_run, finish, open_run, train
from rlhf_jax.training.sources import Source, Split, collate_for, count_steps, open_source, read_split
from rlhf_jax.training.uncertain_models import (
    finish_kind,
    pair_scorer,
    score_pairs,
    starting_params,
    uncertainty_rows,
)
from rlhf_jax.types import Algorithm, Params


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions, KindOptions):
    """Options of reward modelling.

    Attributes:
        margins: of rows that have a `margin`, the reward of the chosen completion is to exceed the other by that much.
        label_smoothing: probability that a label is taken to be flipped.
        centring: weight of (chosen + rejected reward)^2, which fixes the free constant of each prompt.
        smoothing_rate: how far the label of a pair moves to the model's probability at each visit, from 0 to 1; None:
            labels stay.
        dropout: probability that an entry of the vector that the reward head reads is left out in training; for the
            kind dropout, in its masks too.
        balance_lengths: keep as many pairs with a longer chosen as with a longer rejected completion; see
            `data.length_balance`.
        augment: copies a training pair, from 0 to 1, whose rejected completion is the chosen one of another prompt.
    """

    margins: bool = True
    label_smoothing: float = 0.0
    centring: float = 0.0
    smoothing_rate: float | None = None
    dropout: float = 0.0
    balance_lengths: bool = False
    augment: float = 0.0


PRESETS = {
    "default": Config(),
    "tiny": Config(preset="tiny", steps=20, batch_size=8, learning_rate=1e-3, log_every=5, most_held_out=32),
}


def training_pairs(config: Config, pairs: list[Preference], longest: int) -> list[Preference]:
    """The pairs to train on, after what the options do with them; prints how many there are."""
    if not config.margins:
        pairs = [pair._replace(margin=0.0) for pair in pairs]
    kept = balance_lengths(pairs, config.seed) if config.balance_lengths else pairs
    copies = augment_pairs(kept, config.augment, config.seed, longest)
    if config.balance_lengths or copies:
        print(f"{len(kept)} of {len(pairs)} pairs are trained on, and {len(copies)} copies", flush=True)
    by_pair = config.smoothing_rate is not None or config.bootstrap
    return numbered(kept + copies) if by_pair else kept + copies


def calibration_error(margins: np.ndarray) -> float:
    """ECE of sigmoid(margin) in ten bins of equal width."""
    return reliability(margins).expected_error


def extremes(data: Split, margins: np.ndarray, count: int) -> list[dict[str, str]]:
    """The held-out pairs with the best and with the worst margins."""
    order = np.argsort(-margins)
    count = min(count, len(order))
    best, worst = order[: (count + 1) // 2], order[len(order) - count // 2 :]
    columns = ("prompt", "chosen", "rejected")
    return [
        {"margin": f"{margins[place]:.3f}"} | {name: readable(data.rows[place][name]) for name in columns}
        for place in (*best, *worst)
    ]


def table_of(
    config: Config, chosen: np.ndarray, rejected: np.ndarray, held_out: list[Preference], pairs: list[Preference]
) -> list[dict[str, Any]]:
    """What the summary says of the scores of the held-out pairs, and of the lengths in `pairs`, trained on."""
    lengths = completion_lengths(held_out)

    def gain(*scores_and_lengths: np.ndarray) -> float:
        return pair_accuracy(*scores_and_lengths[:2]) - pair_accuracy(*scores_and_lengths[2:])

    table = [
        bootstrap_row("held-out accuracy", "", pair_accuracy, chosen, rejected),
        bootstrap_row("held-out accuracy of the longer answer", "", pair_accuracy, *lengths),
        bootstrap_row("accuracy gained over the longer answer", "", gain, chosen, rejected, *lengths),
        bootstrap_row("held-out calibration error (ECE, 10 bins)", "", calibration_error, chosen - rejected),
        row("held-out margin", "nats", chosen - rejected),
        row("held-out reward of the chosen completion", "nats", chosen),
    ]
    if config.balance_lengths or config.augment:
        name = "accuracy of the longer answer on the pairs trained on"
        table.append(bootstrap_row(name, "", pair_accuracy, *completion_lengths(pairs)))
    return table


class Recipe(NamedTuple):
    """How a kind of reward model is trained, and what its scorer takes while it is."""

    algorithm: Algorithm
    scorer: Callable[..., Any]
    params_of: Callable[[Any], Params]


def recipe_of(
    config: Config, source: Source, optimizer: optax.GradientTransformation, given: Params, examples: int
) -> Recipe:
    """The recipe of `config.kind`; `given` is what training begins with, on so many `examples`."""
    shape, adapter = source.config, adapter_of(config)
    losses = {"label_smoothing": config.label_smoothing, "centring": config.centring, "accumulate": config.accumulate}
    members = len(given["heads"]["bias"]) if "heads" in given else config.members or MEMBERS
    if config.kind == "linear_ensemble":
        how = losses | {"prior_decay": config.prior_decay, "bootstrap": config.bootstrap}
        algorithm = linear_ensemble_modeling(shape, optimizer, members, **how)
        return Recipe(algorithm, linear_ensemble_scorer(shape), linear_ensemble_params)
    if config.kind == "lora_ensemble":
        algorithm = lora_ensemble_modeling(shape, optimizer, adapter, members, bootstrap=config.bootstrap, **losses)
        return Recipe(algorithm, lora_ensemble_scorer(shape, adapter), lora_ensemble_params)
    if config.kind == "probabilistic":
        algorithm = probabilistic_modeling(shape, optimizer, accumulate=config.accumulate)
        return Recipe(algorithm, probabilistic_scorer(shape), probabilistic_params)
    how = losses | {"smoothing_rate": config.smoothing_rate, "examples": examples, "dropout": config.dropout}
    algorithm = modeling.reward_modeling(shape, optimizer, adapter=adapter, **how)

    def params_of(state: modeling.RewardModelState) -> Params:
        if adapter is None:
            return state.params
        return attach(state.base, state.params["trunk"], adapter) | {"head": state.params["head"]}

    return Recipe(algorithm, reward_scorer(shape), params_of)


def optimizer_of(config: Config, steps: int) -> optax.GradientTransformation:
    """Adam with the schedule of so many steps; of none an optimiser that keeps nothing."""
    if not steps:
        return optax.set_to_zero()
    schedule = learning_rate_schedule(config.learning_rate, steps, int(config.warmup * steps), config.schedule)
    return adam(schedule, config.max_grad_norm, config.weight_decay, moments=config.moments)


def merged(config: Config, recipe: Recipe, state: Any) -> Params:
    """What was trained as it is kept: of one head, without an adapter apart."""
    if config.kind not in ONE_HEAD or config.adapter is None:
        return recipe.params_of(state)
    return merge(state.base, state.params["trunk"], adapter_of(config)) | {"head": state.params["head"]}


@on_devices
def main(config: Config) -> dict:
    """Trains, evaluates and exports; returns the summary."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    check_run(config, "reward_model")
    modeling.check_reward_options(config.smoothing_rate, 1, config.dropout)
    check_share(config.augment)
    check_kind(config)
    source = open_source(config)
    data = read_split(config, source, PREFERENCE_FORMATS, tokenize_preferences)
    pairs = training_pairs(config, data.train, source.longest)
    pad = partial(pad_preferences, examples=len(pairs))
    collate = collate_for(pad, source, data.held_out, pairs, config.batch_size)
    steps = 0 if config.frozen else count_steps(config, len(pairs))
    given = starting_params(config, source)
    recipe = recipe_of(config, source, optimizer_of(config, steps), given, len(pairs))
    state = start(recipe.algorithm.init, [source.config], jax.random.key(config.seed), given, **layout(config))
    folder = open_run(config, "reward_model")
    scores, measured = pair_scorer(recipe.scorer), {}

    def evaluate(state: Any, step: int) -> dict[str, float]:
        measured[step] = score_pairs(scores, recipe.params_of(state), data.held_out, collate, config.batch_size)
        chosen, rejected = (side.mean for side in measured[step])
        return {
            "eval/rewards/accuracies": pair_accuracy(chosen, rejected),
            "eval/rewards/margins": (chosen - rejected).mean(),
            "eval/ece": calibration_error(chosen - rejected),
        }

    trained = train(
        config,
        folder,
        in_place(recipe.algorithm.update),
        state,
        batches(pairs, config.batch_size, collate, seed=config.seed),
        steps,
        evaluate,
        tokens=lambda batch, _: batch.chosen.mask.sum() + batch.rejected.mask.sum(),
        shown=("loss/reward", "rewards/accuracies", "rewards/margins"),
    )
    if config.kind == "bradley_terry":
        sides, unsure = measured[steps], []
        export_reward_model(folder.path, source, trained.state.params, trained.state.base, adapter_of(config))
    else:
        model = merged(config, recipe, trained.state)
        sides = finish_kind(config, folder.path, source, model, adapter_of(config), pairs, data.held_out, collate)
        unsure = uncertainty_rows(*sides)
    chosen, rejected = (side.mean for side in sides)
    write_samples(
        folder.path / "samples.md",
        "Held-out pairs with the best and the worst margins",
        extremes(data, chosen - rejected, config.samples),
    )
    table = table_of(config, chosen, rejected, data.held_out, pairs) + unsure
    if config.smoothing_rate is not None:
        labels = np.asarray(trained.state.labels)
        table.append(row("label of the pairs seen, after training", "", labels[~np.isnan(labels)]))
    panels = [("loss/reward",), ("rewards/accuracies", "eval/rewards/accuracies"), ("eval/rewards/margins", "eval/ece")]
    checks = [check("held-out accuracy, against chance", pair_accuracy(chosen, rejected), 0.5, "at least")]
    return finish(folder, trained, table, checks, began, clock, panels)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
