"""Supervised fine-tuning of any Hugging Face model on prompts and completions, chats or plain text.

    python experiments/sft.py --model FOLDER --data FILE.jsonl --out OUT
    python experiments/sft.py --model FOLDER --data chats.jsonl --out OUT --adapter lora --rank 16 --packing

Rows have `prompt` and `completion`, or `messages`, or `text`. The loss is on completions (the assistant's turns of a
chat, all of a text). OUT holds the model as a Hugging Face folder (`model`; of an adapter the merged one, and `adapter`
for PEFT), `summary.json` with the held-out negative log-likelihood before and after, `samples.md`, `metrics.jsonl`,
`figures/training.png` and checkpoints; an interrupted run goes on with `--resume`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.in_place import in_place
from rlhf_jax.algorithms.likelihood import next_token_logprob
from rlhf_jax.algorithms.optimizer import adam, learning_rate_schedule
from rlhf_jax.algorithms.sft import SFTState, sft
from rlhf_jax.algorithms.trained import assemble
from rlhf_jax.data.batches import pad_demonstrations
from rlhf_jax.data.columns import DEMONSTRATION_FORMATS
from rlhf_jax.data.packing import group, pad_packed
from rlhf_jax.data.pipeline import batches
from rlhf_jax.data.tokenization import tokenize_demonstrations
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.devices import check_rows, layout, on_devices, placing, start
from rlhf_jax.training.export import export_policy
from rlhf_jax.training.held_out import bootstrap_row, over_rows
from rlhf_jax.training.options import TrainingOptions
from rlhf_jax.training.run_folder import check
from rlhf_jax.training.samples import choose_prompts, complete, write_completions
from rlhf_jax.training.session import adapter_of, check_run, finish, open_run, train
from rlhf_jax.training.sources import collate_for, count_steps, open_source, read_policy, read_split


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions):
    """Options of supervised fine-tuning.

    Attributes:
        response_length: most tokens of a completion in samples.md.
        packing: put several short rows into one of --longest tokens; each attends to itself only.
    """

    response_length: int = 64
    packing: bool = False


PRESETS = {
    "default": Config(),
    "tiny": Config(preset="tiny", steps=20, batch_size=8, learning_rate=1e-3, log_every=5, most_held_out=32),
}


def mean_nll(sums: np.ndarray, tokens: np.ndarray) -> float:
    """Negative log-likelihood in nats a token, every token of all rows counting the same."""
    return sums.sum() / tokens.sum()


@on_devices
def main(config: Config) -> dict:
    """Trains, evaluates and exports; returns the summary."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    check_run(config, "sft")
    source = open_source(config)
    data = read_split(config, source, DEMONSTRATION_FORMATS, tokenize_demonstrations)
    padded = collate_for(pad_demonstrations, source, data.held_out, data.train, config.batch_size)
    rows, collate = data.train, padded
    if config.packing:
        check_rows(None, source.longest)
        rows = group(data.train, source.longest)
        padded = collate_for(pad_demonstrations, source, data.held_out)
        collate = placing(partial(pad_packed, length=source.longest, pad=source.pad))
    steps = count_steps(config, len(rows))
    schedule = learning_rate_schedule(config.learning_rate, steps, int(config.warmup * steps), config.schedule)
    adapter = adapter_of(config)
    algorithm = sft(
        source.config,
        adam(schedule, config.max_grad_norm, config.weight_decay, moments=config.moments),
        adapter,
        config.accumulate,
    )
    prompts = choose_prompts(source, data.held_out, config.samples, config.response_length)
    params = read_policy(source)
    before = complete(source, params, prompts, config.response_length, config.seed)
    state = start(algorithm.init, [source.config], jax.random.key(config.seed), {"policy": params}, **layout(config))
    del params  # they are in the state now
    folder = open_run(config, "sft")

    def policy(state: SFTState):
        return assemble(state.base, state.params, adapter)

    @jax.jit
    def nll_by_row(policy, batch):
        logprob = next_token_logprob(source.config, policy, batch.tokens, batch.mask)
        counted = batch.loss_mask[:, 1:]
        return jnp.where(counted, -logprob, 0.0).sum(axis=-1), counted.sum(axis=-1)

    measured = {}

    def evaluate(state: SFTState, step: int) -> dict[str, float]:
        model = policy(state)
        measured[step] = over_rows(lambda batch: nll_by_row(model, batch), data.held_out, padded, config.batch_size)
        return {"eval/nll": mean_nll(*measured[step])}

    stream = batches(rows, config.batch_size, collate, seed=config.seed)
    trained = train(
        config,
        folder,
        in_place(algorithm.update),
        state,
        stream,
        steps,
        evaluate,
        tokens=lambda batch, _: batch.mask.sum(),
    )
    after = complete(source, policy(trained.state), prompts, config.response_length, config.seed)
    write_completions(folder.path / "samples.md", source, prompts, {"before": before, "after": after})
    export_policy(folder.path, source, trained.state.params, trained.state.base, adapter)
    table = [
        bootstrap_row("held-out negative log-likelihood before", "nats a token", mean_nll, *measured[0]),
        bootstrap_row("held-out negative log-likelihood after", "nats a token", mean_nll, *measured[steps]),
    ]
    first, last = mean_nll(*measured[0]), mean_nll(*measured[steps])
    checks = [check("held-out negative log-likelihood after, against before", last, first, "at most")]
    return finish(folder, trained, table, checks, began, clock, [("loss/policy", "eval/nll"), ("lr",), ("grad_norm",)])


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
