"""Direct preference optimisation of any Hugging Face model on pairs of completions, without a reward model.

    python experiments/dpo.py --model FOLDER --data pairs.jsonl --out OUT --beta 0.1
    python experiments/dpo.py --model FOLDER --data pairs.jsonl --out OUT --adapter lora --rank 16 --learning-rate 1e-4

Rows have `chosen` and `rejected`, and `prompt` unless it is what both begin with; text or chats. The reference policy
is the model at the start (with an adapter: the model without it, and no second copy). OUT holds the model as a Hugging
Face folder (`model`; of an adapter the merged one, and `adapter` for PEFT), `summary.json` with the accuracy and margin
of the implicit rewards beta log(pi / ref) on held-out pairs, `samples.md`, `metrics.jsonl`, `figures/training.png` and
checkpoints; an interrupted run goes on with `--resume`.
"""

import dataclasses

import jax

from rlhf_jax.algorithms.dpo import DPOState, dpo, implicit_rewards
from rlhf_jax.algorithms.in_place import in_place
from rlhf_jax.algorithms.optimizer import adam, learning_rate_schedule
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.data.batches import pad_preferences
from rlhf_jax.data.columns import PREFERENCE_FORMATS
from rlhf_jax.data.pipeline import batches
from rlhf_jax.data.tokenization import tokenize_preferences
from rlhf_jax.evaluation.statistics import row
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


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions):
    """Options of direct preference optimisation.

    Attributes:
        response_length: most tokens of a completion in samples.md.
        reference: Hugging Face folder of the reference policy, of the same shape; None: the model at the start.
        beta: how strongly the policy is held to its reference, reward units a nat.
        label_smoothing: share of the labels that are taken to be wrong, below 1/2.
        offload_reference: on a mesh, keep the reference policy in the memory of the hosts while it is not used.
    """

    learning_rate: float = 1e-5
    response_length: int = 64
    reference: str | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    offload_reference: bool = False


PRESETS = {
    "default": Config(),
    "tiny": Config(preset="tiny", steps=20, batch_size=8, learning_rate=3e-4, log_every=5, most_held_out=32),
}


def pretrained(config: Config, source: Source) -> dict:
    """The policy, and the reference where another one is asked for."""
    params = {"policy": read_policy(source)}
    return params if config.reference is None else params | {"reference": read_policy(source, config.reference)}


@on_devices
def main(config: Config) -> dict:
    """Trains, evaluates and exports; returns the summary."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    check_run(config, "dpo")
    if config.reference is not None and config.adapter is not None:
        raise ValueError("--adapter trains on the model, which is the reference: leave out --reference.")
    source = open_source(config)
    data = read_split(config, source, PREFERENCE_FORMATS, tokenize_preferences)
    collate = collate_for(pad_preferences, source, data.held_out, data.train, config.batch_size)
    steps = count_steps(config, len(data.train))
    schedule = learning_rate_schedule(config.learning_rate, steps, int(config.warmup * steps), config.schedule)
    optimizer = adam(schedule, config.max_grad_norm, config.weight_decay, moments=config.moments)
    adapter = adapter_of(config)
    algorithm = dpo(source.config, optimizer, config.beta, config.label_smoothing, adapter, config.accumulate)
    params = pretrained(config, source)
    prompts = choose_prompts(source, [pair.chosen for pair in data.held_out], config.samples, config.response_length)
    before = complete(source, params["policy"], prompts, config.response_length, config.seed)
    state = start(algorithm.init, [source.config], jax.random.key(config.seed), params, **layout(config))
    del params  # they are in the state now
    folder = open_run(config, "dpo")

    def policy(state: DPOState):
        return assemble(state.reference, state.params, adapter)

    measured = {}

    def evaluate(state: DPOState, step: int) -> dict[str, float]:
        model = policy(state)

        def rewards(batch):
            return implicit_rewards(source.config, model, state.reference, batch, config.beta)

        chosen, rejected = measured[step] = over_rows(rewards, data.held_out, collate, config.batch_size)
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
        batches(data.train, config.batch_size, collate, seed=config.seed),
        steps,
        evaluate,
        tokens=lambda batch, _: batch.chosen.mask.sum() + batch.rejected.mask.sum(),
        shown=("loss/policy", "rewards/accuracies", "rewards/margins"),
    )
    after = complete(source, policy(trained.state), prompts, config.response_length, config.seed)
    write_completions(folder.path / "samples.md", source, prompts, {"before": before, "after": after})
    export_policy(folder.path, source, trained.state.params, trained.state.reference, adapter)
    chosen, rejected = measured[steps]
    table = [
        bootstrap_row("held-out accuracy of the implicit rewards", "", pair_accuracy, chosen, rejected),
        row("held-out margin of the implicit rewards", "nats", chosen - rejected),
        row("held-out implicit reward of the chosen completion", "nats", chosen),
    ]
    panels = [("loss/policy",), ("rewards/accuracies", "eval/rewards/accuracies"), ("eval/rewards/margins",)]
    checks = [check("held-out margin of the implicit rewards", float((chosen - rejected).mean()), 0.0, "at least")]
    return finish(folder, trained, table, checks, began, clock, panels)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
