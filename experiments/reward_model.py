"""A Bradley-Terry reward model from any Hugging Face model and pairs of completions.

    python experiments/reward_model.py --model FOLDER --data pairs.jsonl --out OUT
    python experiments/reward_model.py --model FOLDER --data webgpt.jsonl --convert webgpt_comparisons --out OUT

Rows have `chosen` and `rejected`, and `prompt` unless it is what both begin with (and perhaps `margin`); text or chats.
The model is a policy, which gets a fresh head, or a reward model, which goes on learning. OUT holds the reward model as
a Hugging Face folder (`model`, a `…ForSequenceClassification`), `summary.json` with the accuracy on held-out pairs
beside that of the longer answer, and the calibration error, `samples.md` with the best and worst margins,
`metrics.jsonl`, `figures/training.png` and checkpoints; an interrupted run goes on with `--resume`.
"""

import dataclasses

import jax
import numpy as np

from rlhf_jax.algorithms.in_place import in_place
from rlhf_jax.algorithms.optimizer import adam, learning_rate_schedule
from rlhf_jax.algorithms.reward_modeling import RewardModelState, preference_scores, reward_modeling
from rlhf_jax.data.batches import pad_preferences
from rlhf_jax.data.columns import PREFERENCE_FORMATS
from rlhf_jax.data.pipeline import batches
from rlhf_jax.data.tokenization import tokenize_preferences
from rlhf_jax.evaluation.calibration import reliability
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.models.adapters import attach
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.devices import layout, on_devices, start
from rlhf_jax.training.export import export_reward_model
from rlhf_jax.training.held_out import bootstrap_row, over_rows, pair_accuracy
from rlhf_jax.training.options import TrainingOptions
from rlhf_jax.training.run_folder import check
from rlhf_jax.training.samples import readable, write_samples
from rlhf_jax.training.session import adapter_of, check_run, finish, open_run, train
from rlhf_jax.training.sources import Split, collate_for, count_steps, load_trunk, open_source, read_split


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions):
    """Options of reward modelling.

    Attributes:
        margins: of rows that have a `margin`, the reward of the chosen completion is to exceed the other by that much.
        label_smoothing: probability that a label is taken to be flipped.
        centring: weight of (chosen + rejected reward)^2, which fixes the free constant of each prompt.
    """

    margins: bool = True
    label_smoothing: float = 0.0
    centring: float = 0.0


PRESETS = {
    "default": Config(),
    "tiny": Config(preset="tiny", steps=20, batch_size=8, learning_rate=1e-3, log_every=5, most_held_out=32),
}


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


@on_devices
def main(config: Config) -> dict:
    """Trains, evaluates and exports; returns the summary."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    check_run(config, "reward_model")
    source = open_source(config)
    data = read_split(config, source, PREFERENCE_FORMATS, tokenize_preferences)
    pairs = data.train if config.margins else [pair._replace(margin=0.0) for pair in data.train]
    collate = collate_for(pad_preferences, source, data.held_out, pairs, config.batch_size)
    steps = count_steps(config, len(pairs))
    schedule = learning_rate_schedule(config.learning_rate, steps, int(config.warmup * steps), config.schedule)
    optimizer = adam(schedule, config.max_grad_norm, config.weight_decay, moments=config.moments)
    adapter = adapter_of(config)
    algorithm = reward_modeling(
        source.config,
        optimizer,
        "final_norm",
        config.label_smoothing,
        config.centring,
        adapter,
        config.accumulate,
    )
    key = jax.random.key(config.seed)
    state = start(algorithm.init, [source.config], key, load_trunk(source), **layout(config))
    folder = open_run(config, "reward_model")
    measured = {}

    def evaluate(state: RewardModelState, step: int) -> dict[str, float]:
        model = state.params
        if adapter is not None:
            model = attach(state.base, model["trunk"], adapter) | {"head": model["head"]}

        def scores(batch):
            return preference_scores(source.config, model, batch)

        chosen, rejected = measured[step] = over_rows(scores, data.held_out, collate, config.batch_size)
        return {
            "eval/rewards/accuracies": pair_accuracy(chosen, rejected),
            "eval/rewards/margins": (chosen - rejected).mean(),
            "eval/ece": calibration_error(chosen - rejected),
        }

    trained = train(
        config,
        folder,
        in_place(algorithm.update),
        state,
        batches(pairs, config.batch_size, collate, seed=config.seed),
        steps,
        evaluate,
        tokens=lambda batch, _: batch.chosen.mask.sum() + batch.rejected.mask.sum(),
        shown=("loss/reward", "rewards/accuracies", "rewards/margins"),
    )
    chosen, rejected = measured[steps]
    write_samples(
        folder.path / "samples.md",
        "Held-out pairs with the best and the worst margins",
        extremes(data, chosen - rejected, config.samples),
    )
    export_reward_model(folder.path, source, trained.state.params, trained.state.base, adapter)
    lengths = np.array([[pair.chosen.loss_mask.sum(), pair.rejected.loss_mask.sum()] for pair in data.held_out])

    def gain(*scores_and_lengths: np.ndarray) -> float:
        return pair_accuracy(*scores_and_lengths[:2]) - pair_accuracy(*scores_and_lengths[2:])

    table = [
        bootstrap_row("held-out accuracy", "", pair_accuracy, chosen, rejected),
        bootstrap_row("held-out accuracy of the longer answer", "", pair_accuracy, *lengths.T),
        bootstrap_row("accuracy gained over the longer answer", "", gain, chosen, rejected, *lengths.T),
        bootstrap_row("held-out calibration error (ECE, 10 bins)", "", calibration_error, chosen - rejected),
        row("held-out margin", "nats", chosen - rejected),
        row("held-out reward of the chosen completion", "nats", chosen),
    ]
    panels = [("loss/reward",), ("rewards/accuracies", "eval/rewards/accuracies"), ("eval/rewards/margins", "eval/ece")]
    checks = [check("held-out accuracy, against chance", pair_accuracy(chosen, rejected), 0.5, "at least")]
    return finish(folder, trained, table, checks, began, clock, panels)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
