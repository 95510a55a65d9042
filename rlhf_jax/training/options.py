"""The options that the training scripts share, and what is refused before anything is computed.

A script adds its own by inheritance: `class Config(TrainingOptions): beta: float = 0.1`. What a script does not use
stands in no class that it inherits from: `SourceOptions` are those of every script that reads a model and rows.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rlhf_jax.models.config import Attention, Remat
from rlhf_jax.parallel.distributed import Distributed
from rlhf_jax.training.resume import parse_best

Dtype = Literal["float32", "bfloat16"]
AdapterKind = Literal["lora", "dora", "ia3", "ssl", "ssb"]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of every script: where its results go, and what becomes of a check that fails.

    Attributes:
        preset: a complete configuration to start from; other options given change it.
        out: folder to write to; None: runs/NAME/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a check fails.
    """

    preset: str = "default"
    out: Path | None = None
    overwrite: bool = False
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class SourceOptions(RunOptions, Distributed):
    """Options of every script that reads a model and rows of data.

    Attributes:
        model: Hugging Face folder of the model, or a hub id.
        data: rows: a JSONL, JSON or Parquet file.
        resume: go on with the run in the folder `out`, which was interrupted.
        columns: columns to rename, as pairs of words, such as `question prompt answer completion`.
        convert: converter for a data set that has a format of its own, one of webgpt_comparisons,
            instructions, candidates.
        chat: read text prompts and completions as turns of a chat, for a model that was tuned on chats.
        chat_template: file with a Jinja chat template, for a tokenizer that has none (or another one than its own).
        longest: most tokens a sequence may have; longer rows are dropped and counted. None: the model's context, at
            most 1024.
        batch_size: rows a batch.
        dtype: dtype of the computation; losses and logits are float32 at least.
        param_dtype: dtype in which parameters are kept.
        mesh: devices along each axis, such as data=2,fsdp=4, of data, fsdp, tensor, sequence and expert; their product
            is the number of devices. None: one device, or all those of several processes as data.
        mesh_between: how often each axis of the mesh is repeated over slices (or hosts) with a slow network between
            them, such as data=2.
    """

    model: str | None = None
    data: Path | None = None
    resume: bool = False
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    convert: str | None = None
    chat: bool = False
    chat_template: Path | None = None
    longest: int | None = None
    batch_size: int = 32
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    mesh: str | None = None
    mesh_between: str | None = None

    @property
    def rows(self) -> int:
        """Sequences that an update sees: those of a batch, where a script does not draw several a row."""
        return self.batch_size


@dataclasses.dataclass(frozen=True)
class TrainingOptions(SourceOptions):
    """Options of every script that trains a model.

    Attributes:
        seed: everything random follows from it, but for which rows are held out.
        eval_data: rows to evaluate on; None: a part of the data is held out.
        held_out: share of the rows that is held out, all rows of a prompt together; the same for every seed.
        most_held_out: most rows to evaluate on.
        epochs: passes over the training rows.
        steps: number of updates, in place of `epochs`.
        learning_rate: largest learning rate of Adam.
        schedule: what the learning rate does after the warm-up.
        warmup: share of the updates in which the learning rate rises from 0.
        weight_decay: decoupled decay, per unit of learning rate.
        moments: how Adam's moments are stored: 8 bytes a parameter (float32), 4 (bfloat16) or 2 (int8).
        max_grad_norm: gradients with a larger global norm are scaled down to it.
        accumulate: microbatches that an update sees one after the other (of PPO, an optimiser step), which needs less
            memory and changes no number; divides the rows of the batch (of a minibatch).
        attention: how attention is computed: what is fastest on these devices ("auto"), or in whole ("reference"), one
            row after the other ("rows"), in blocks, which travel between the devices of a mesh with a sequence axis
            ("ring"), or by the kernel for TPUs ("splash") or GPUs ("cudnn").
        remat: what a layer keeps for the backward pass, see `ModelConfig.remat`.
        adapter: train an adapter and leave the model's own parameters as they are; None: train all parameters.
        rank: rank of the adapter.
        alpha: scale of the adapter: what it adds is multiplied by alpha / rank.
        targets: the projections that the adapter changes: query, key, value, output, gate, up, down.
        log_every: updates between two lines of metrics.
        evaluate_every: updates between two evaluations; None: before and after training only.
        save_every: updates between two checkpoints; None: at the end only (and when interrupted). The newest two are
            kept.
        keep_best: keep the best checkpoint too, by a metric of the evaluations: min:eval/nll or
            max:eval/objective/scores, say; a checkpoint is then written after each evaluation. None: the newest only.
        samples: held-out prompts (or pairs) that are shown in samples.md.
        split_optimizer: on a mesh, split the optimiser's state over the data axis too.
        tensorboard: write files for TensorBoard too (pip install tensorboardX).
        wandb: project of Weights & Biases to log to as well (pip install wandb).
    """

    seed: int = 0
    eval_data: Path | None = None
    held_out: float = 0.1
    most_held_out: int = 1000
    epochs: int = 1
    steps: int | None = None
    learning_rate: float = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    max_grad_norm: float = 1.0
    accumulate: int = 1
    attention: Attention = "auto"
    remat: Remat = "none"
    adapter: AdapterKind | None = None
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    log_every: int = 10
    evaluate_every: int | None = None
    save_every: int | None = None
    keep_best: str | None = None
    samples: int = 8
    split_optimizer: bool = False
    tensorboard: bool = False
    wandb: str | None = None


_AT_LEAST_ONE = (
    *("longest", "batch_size", "most_held_out", "epochs", "steps", "rank", "log_every", "evaluate_every", "save_every"),
    *("samples", "response_length", "accumulate"),
)
_POSITIVE = ("learning_rate", "max_grad_norm", "alpha")


def check_options(options: SourceOptions, needed: Sequence[str] = ("model", "data")) -> None:
    """Refuses options that cannot work.

    Args:
        options: the options of a script.
        needed: options that must be given.

    Raises:
        ValueError: one is missing or out of its range; the sentence names it as it is written on the command line.
    """
    values = vars(options)

    def word(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    for name in needed:
        if not values[name]:
            raise ValueError(f"{word(name)} is missing: give it, or see --help.")
    for name in ("data", "eval_data", "chat_template"):
        if values.get(name) is not None and not values[name].is_file():
            raise ValueError(f"{word(name)} {values[name]} is not a file: give the path of one.")
    for name in _AT_LEAST_ONE:
        if values.get(name) is not None and values[name] < 1:
            raise ValueError(f"{word(name)} is {values[name]}: give 1 or more.")
    for name in _POSITIVE:
        if name in values and not values[name] > 0:
            raise ValueError(f"{word(name)} is {values[name]}: give more than 0.")
    parts = values.get("accumulate", 1)
    if options.rows % parts:
        raise ValueError(
            f"--batch-size {options.batch_size} does not split into --accumulate {parts} microbatches "
            f"({options.rows} / {parts} = {options.rows / parts:.6g}): choose a divisor."
        )
    for name in ("held_out", "warmup"):
        if name in values and not 0 <= values[name] < 1:
            raise ValueError(f"{word(name)} is {values[name]}: give a share from 0 to less than 1.")
    if values.get("adapter") is not None and values.get("offload_reference"):
        raise ValueError(
            "--offload-reference is for a reference that is not used all the time, and --adapter trains on the "
            "reference itself: leave one of them out."
        )
    if values.get("keep_best") is not None:
        parse_best(values["keep_best"])
    if values.get("seed", 0) < 0:
        raise ValueError(f"--seed is {values['seed']}: give 0 or more.")
    if options.resume and options.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it: give one of them.")
