"""Completions of any Hugging Face model for a file of prompts, several a prompt if asked for.

    python experiments/generate.py --model FOLDER --data prompts.jsonl --out OUT
    python experiments/generate.py --model FOLDER --data prompts.jsonl --out OUT --samples 16 --temperature 0.7

Rows have `prompt` (text or a chat) or `messages`, and any other columns, which are kept. OUT/completions.jsonl has one
line a completion: the row, and `row` (its number, from 0), `sample`, `completion`, `tokens` (how many), and `finished`
(it ended by itself). Lines are written as they are drawn, those of like length together, and put into the order of the
prompts at the end; an interrupted run keeps what it wrote and goes on with `--resume`.
"""

import dataclasses
import os
import time
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.data.formats import as_chats, load_rows
from rlhf_jax.data.tokenization import describe_dropped
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.models.quantised import Storage
from rlhf_jax.parallel.distributed import first_process
from rlhf_jax.parallel.meetings import gathered, on_first
from rlhf_jax.sampling.batches import generate_batches
from rlhf_jax.sampling.queue import InTurns
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.devices import check_rows, on_devices
from rlhf_jax.training.json_lines import line_of, read_lines, write_lines
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.training.options import SourceOptions
from rlhf_jax.training.progress import ProgressReport
from rlhf_jax.training.prompting import (
    PROMPTED_FORMATS,
    PromptRow,
    collate_prompts,
    completions_of,
    prompt_rows,
    sampling_of,
)
from rlhf_jax.training.session import check_run, open_run
from rlhf_jax.training.sources import BUCKETS, Source, open_source, read_policy
from rlhf_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Config(SourceOptions):
    """Options of generation.

    Attributes:
        seed: of the draws.
        samples: completions a prompt.
        response_length: most tokens of a completion.
        temperature: of the draws; 0 takes the most likely token.
        top_k: draw from the k most likely tokens only; None: from all.
        top_p: draw from the fewest most likely tokens with at least this probability together; 1: from all.
        min_p: draw from tokens at least this fraction as likely as the most likely one; 0: from all.
        slots: completions of a batch that are drawn at a time, where some are much longer than others: one that has
            ended makes room for the next (give a larger --batch-size, too); None: all at once.
        cache: how keys and values are kept while drawing.
        weights: how the model's matrices are kept while drawing; fewer bits take less memory and are a little off.
    """

    seed: int = 0
    samples: int = 1
    response_length: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    slots: int | None = None
    cache: Storage = "computation"
    weights: Storage = "computation"


PRESETS = {
    "default": Config(),
    "greedy": Config(preset="greedy", temperature=0.0),
    "tiny": Config(preset="tiny", batch_size=8, response_length=32),
}


WRITTEN = ("row", "sample", "completion", "tokens", "finished")


def read_items(config: Config, source: Source) -> list[PromptRow]:
    """The prompts, each as often as it has samples; a sample's index is row * samples + sample."""
    rows = load_rows(config.data, PROMPTED_FORMATS, config.columns, config.convert)
    taken = sorted(set(WRITTEN).intersection(*rows.values[:1]))
    if taken:
        raise ValueError(f"{config.data} has the column {taken[0]!r}, which is written here: rename it with --columns.")
    rows = as_chats(rows) if config.chat else rows
    tokenize = prompt_rows(config.response_length)
    examples = tokenize(rows, source.tokenizer, source.longest, vocab_size=source.config.vocab_size)
    print(f"{config.data}: {describe_dropped(examples)}", flush=True)
    return [
        PromptRow(item.prompt._replace(index=item.prompt.index * config.samples + sample), item.row)
        for item in examples.items
        for sample in range(config.samples)
    ]


def lines_of(source: Source, items: list[PromptRow], rollout: Rollout, samples: int) -> list[str]:
    """What is written of a batch: one line of JSON a row."""
    rows = [item.row for item in items]
    made = zip(
        (divmod(item.prompt.index, samples) for item in items),
        completions_of(source, rows, rollout),
        *(values.tolist() for values in gathered((rollout.mask.sum(axis=-1), rollout.finished))),
        strict=True,
    )
    return [
        line_of(values | dict(zip(WRITTEN, (*place, *rest), strict=True)))
        for values, (place, *rest) in zip(rows, made, strict=True)
    ]


@on_devices
def main(config: Config) -> dict:
    """Draws and writes the completions; returns the summary."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    check_run(config, "generate")
    source = open_source(config)
    sampling = sampling_of(
        source,
        config.response_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
    )
    check_rows(config.slots, None, "--slots, which are drawn at a time")
    decode = None if config.slots is None else InTurns(config.slots)
    sampling = dataclasses.replace(sampling, decode=decode, cache=config.cache, weights=config.weights)
    items = read_items(config, source)
    collate = collate_prompts(source, items, config.response_length, BUCKETS)
    policy = read_policy(source)
    folder = open_run(config, "generate")
    path = folder.path / "completions.jsonl"
    number = {item.prompt.index: place for place, item in enumerate(items)}
    drawn_before = lambda: [line["row"] * config.samples + line["sample"] for line in read_lines(path)]  # noqa: E731
    done = {number[index] for index in on_first(drawn_before, "the completions that are there")}
    first, last, drawn, seconds, lengths = None, time.monotonic(), 0, 0.0, set()
    key, prompts = jax.random.key(config.seed), lambda some: collate(some).prompts
    batches = generate_batches(source.config, policy, items, prompts, config.batch_size, key, sampling, done)
    written, measured = (path, folder.path / "metrics.jsonl") if first_process() else [Path(os.devnull)] * 2
    with (
        written.open("a", encoding="utf-8") as file,
        MetricsWriter(measured) as metrics,
        ProgressReport("completions", len(items), done=len(done)) as progress,
    ):
        for places, rollout in batches:
            lines = lines_of(source, [items[place] for place in places], rollout, config.samples)
            new = {place: line for place, line in zip(places, lines, strict=True) if place not in done}
            file.writelines(new.values())
            file.flush()
            done |= new.keys()
            now = time.monotonic()
            if rollout.prompts.tokens.shape[1] in lengths:  # of another length, it was compiled first
                drawn, seconds = drawn + int(rollout.mask.sum()), seconds + now - last
            lengths.add(rollout.prompts.tokens.shape[1])
            first, last = first or now, now
            rate = {"throughput/tokens_per_second": drawn / seconds} if drawn else {}
            metrics.write(len(done), rate | {"completions/mean_length": rollout.mask.sum(axis=-1).mean()})
            progress.advance(rate, len(new))
    table = []
    if drawn:
        table.append(
            row("tokens a second, without batches that were compiled first", "1/s", np.array([drawn / seconds]))
        )
    if first is not None:
        table.append(row("from the command to the first completions", "s", np.array([first - began])))

    def summarise() -> dict:
        lines = sorted(read_lines(path), key=lambda line: (line["row"], line["sample"]))
        write_lines(path, lines)
        rows = [
            row("tokens of a completion", "", np.array([line["tokens"] for line in lines], np.float64)),
            row("completions that ended by themselves", "", np.array([line["finished"] for line in lines], np.float64)),
        ]
        return run_folder.conclude(folder, rows + table, [], began, clock.seconds)

    return on_first(summarise, "the summary of the run")


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
