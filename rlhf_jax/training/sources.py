"""What a training script reads before it computes anything: the model's shape and tokenizer, and its rows as tokens."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.batches import bucket_lengths, collate
from rlhf_jax.data.formats import Rows, as_chats, load_rows
from rlhf_jax.data.tokenization import Examples, describe_dropped, padding_id
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.huggingface import check_tokenizer, load_config, load_policy, load_reward_model, load_tokenizer
from rlhf_jax.models.huggingface.folders import local_folder, read_json
from rlhf_jax.parallel.mesh import check_model
from rlhf_jax.parallel.sharding import on
from rlhf_jax.training.devices import check_rows, current_mesh, placing
from rlhf_jax.training.options import SourceOptions, TrainingOptions
from rlhf_jax.types import Params

BUCKETS = 4
"""Lengths that batches are padded to: each is one compilation."""
LONGEST = 1024
"""Most tokens of a sequence where nothing is asked for."""


class Source(NamedTuple):
    """A model on disk, as far as data and options have to fit it; its parameters are not read yet.

    Attributes:
        folder: the Hugging Face folder (of a hub id, where it was downloaded to).
        options: what its `config.json` says.
        config: the shape, with the dtypes, attention and rematerialisation that the options ask for.
        tokenizer: its tokenizer, with the chat template that the options give.
        pad: id that fills batches, see `padding_id`; it is always masked.
        longest: most tokens of a sequence.
    """

    folder: Path
    options: dict[str, Any]
    config: ModelConfig
    tokenizer: Any
    pad: int
    longest: int


class Split(NamedTuple):
    """Tokenised rows to train on and others to evaluate on.

    Attributes:
        train: the items to train on.
        held_out: the items to evaluate on; no prompt of them is in `train`, unless a file of its own was given.
        rows: the row of each held-out item.
    """

    train: list[Any]
    held_out: list[Any]
    rows: list[dict]


def open_source(options: SourceOptions) -> Source:
    """Reads the model's shape and tokenizer.

    Raises:
        ValueError: the model cannot be read, it has no room for sequences so long, or the mesh that is set does not
            divide it or its batches.
    """
    folder = local_folder(options.model)
    config = load_config(folder, options.dtype, options.param_dtype)
    if isinstance(options, TrainingOptions):
        config = dataclasses.replace(config, remat=options.remat, attention=options.attention)
    if options.longest is not None and options.longest > config.context_length:
        raise ValueError(
            f"--longest is {options.longest}, but the model's context is {config.context_length}: give no more."
        )
    mesh = current_mesh()
    if mesh is not None:
        check_model(config, mesh.shape)
    parts = vars(options).get("accumulate", 1)
    if parts > 1:
        check_rows(options.rows // parts, None, "rows of a microbatch")
    check_rows(options.batch_size, None)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(config, tokenizer)
    if options.chat_template is not None:
        tokenizer.chat_template = options.chat_template.read_text(encoding="utf-8")
    return Source(
        folder=folder,
        options=read_json(folder / "config.json"),
        config=config,
        tokenizer=tokenizer,
        pad=padding_id(tokenizer),
        longest=options.longest or min(LONGEST, config.context_length),
    )


def placement():
    """Where the mesh that is set has the parameters of a model that is read; None for the default device."""
    mesh = current_mesh()
    return None if mesh is None else on(mesh)


def read_policy(source: Source, folder: str | Path | None = None) -> Params:
    """The parameters of the policy, each part where it is to lie.

    Args:
        source: the model.
        folder: another folder with a policy of the same shape; None: that of the source.

    Raises:
        ValueError: it cannot be read, or is of another shape.
    """
    shape, params = load_policy(folder or source.folder, source.config.dtype, source.config.param_dtype, placement())
    if dataclasses.replace(shape, remat=source.config.remat, attention=source.config.attention) != source.config:
        raise ValueError(f"{folder} holds a model of another shape than --model: give one of the same.")
    return params


def load_trunk(source: Source) -> Params:
    """What a reward model begins with: `{"trunk"}` of a policy, or `{"trunk", "head"}` of a reward model."""
    classes = source.options.get("architectures") or [""]
    load = load_reward_model if classes[0].endswith("ForSequenceClassification") else load_policy
    _, params = load(source.folder, source.config.dtype, source.config.param_dtype, placement())
    return {role: params[role] for role in ("trunk", "head") if role in params}


def read_split(
    options: TrainingOptions,
    source: Source,
    formats: Sequence[str],
    tokenize: Callable[..., Examples],
) -> Split:
    """Reads the rows, tokenises them, and holds some of their prompts out; prints how many rows were kept.

    Which prompts are held out depends on their text, not on the seed, see `hold_out`.

    Args:
        options: the options.
        source: the model.
        formats: formats that the script can use, see `data.columns`.
        tokenize: `tokenize_demonstrations` or `tokenize_preferences`.

    Raises:
        ValueError: a file cannot be used, or nothing is left to evaluate on.
    """

    def read(path) -> tuple[Rows, Examples]:
        rows = load_rows(path, formats, options.columns, options.convert)
        rows = as_chats(rows) if options.chat else rows
        examples = tokenize(rows, source.tokenizer, source.longest, vocab_size=source.config.vocab_size)
        print(f"{path}: {describe_dropped(examples)}", flush=True)
        return rows, examples

    rows, examples = read(options.data)
    if options.eval_data is None:
        prompts = [_prompt(rows.values[row]) for row in examples.rows]
        out = hold_out(prompts, options.held_out, options.most_held_out)
        train = [item for item, held in zip(examples.items, out, strict=True) if not held]
        held_rows, held_items = rows, [place for place, held in enumerate(out) if held]
    else:
        train = examples.items
        held_rows, examples = read(options.eval_data)
        held_items = list(range(len(examples.items)))[: options.most_held_out]
    held_out = [examples.items[place] for place in held_items]
    kept = [held_rows.values[examples.rows[place]] for place in held_items]
    if not held_out:
        raise ValueError(
            f"no row of {options.data} is held out: raise --held-out from {options.held_out}, or give --eval-data FILE."
        )
    print(f"{len(train)} rows to train on, {len(held_out)} to evaluate on", flush=True)
    return Split(train=train, held_out=held_out, rows=kept)


def hold_out(prompts: Sequence[str], share: float, most: int) -> list[bool]:
    """Which rows to hold out: those of prompts that a hash picks.

    Whether a prompt is held out depends on its text alone (at the limit `most` on the others too): a policy, a reward
    model and whatever is trained on them keep the same prompts of a file apart, though each drops other rows of it.

    Args:
        prompts: the prompt of each row.
        share: of the prompts, between 0 and 1; if it is not 0, at least one prompt is held out.
        most: most rows to hold out, rows of a prompt being kept together.

    Returns:
        True for a row that is held out.

    Example:
        >>> hold_out(["b", "a", "b", "c"], share=0.4, most=10)
        [False, True, False, True]
    """

    def place(prompt: str) -> float:
        """A number in [0, 1) that looks random."""
        return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest()) / 2**64

    rows, drawn = Counter(prompts), set()
    for prompt in sorted(rows, key=place):
        if place(prompt) >= share and (drawn or share == 0):
            break
        if rows[prompt] <= most:
            most -= rows[prompt]
            drawn.add(prompt)
    return [prompt in drawn for prompt in prompts]


def collate_for(
    pad_items: Callable[..., Any],
    source: Source,
    items: Sequence[Any],
    shuffled: Sequence[Any] = (),
    batch_size: int = 1,
) -> Callable[[Sequence[Any]], Any]:
    """A function that makes a batch of items, padded to one of a few lengths that waste least on all of them.

    Args:
        pad_items: `pad_demonstrations` or `pad_preferences`.
        source: the model.
        items: rows that are batched by length, as `held_out.over_rows` does.
        shuffled: rows that are batched in a random order: each is padded as the longest of its batch is.
        batch_size: rows of such a batch.
    """
    lengths, drawn = [item.length for item in items], [item.length for item in shuffled]
    np.random.default_rng(0).shuffle(drawn)
    for start in range(0, len(drawn), batch_size):
        batch = drawn[start : start + batch_size]
        lengths += [max(batch)] * len(batch)
    # Rounded up to a multiple of 8, the last length may not fit a context that is none.
    buckets = {min(length, source.config.context_length) for length in bucket_lengths(lengths, BUCKETS)}
    for length in buckets:
        check_rows(None, length)
    return placing(collate(pad_items, sorted(buckets), source.pad))


def count_steps(options: TrainingOptions, rows: int) -> int:
    """Number of updates: `--steps`, or as many full batches as `--epochs` passes over the rows hold.

    Raises:
        ValueError: the rows do not fill one batch.
    """
    if rows < options.batch_size:
        raise ValueError(f"{rows} rows to train on do not fill one batch of {options.batch_size}: lower --batch-size.")
    return options.steps or options.epochs * rows // options.batch_size


def _prompt(row: dict) -> str:
    """What a row is recognised by: its prompt; a text as a whole; of `messages`, what stands before the last answer."""
    messages = row.get("messages")
    if messages is not None:
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        return json.dumps(messages[: answers[-1]] if answers else messages)
    return json.dumps(row["text"] if row.get("prompt") is None else row["prompt"])
