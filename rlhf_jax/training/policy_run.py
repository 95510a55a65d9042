"""One run of a script that trains a policy on its own responses: what it reads, and how it trains and reports.

task = open_task(options)
old_logprob = settle_old_logprob(options, folder, task, policy, key)
result = train_policy(options, folder, task, rewarded.step, rewarded.score, state, key, …)
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.data.pipeline import batches
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import response_states, token_scores
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.parallel.meetings import gathered, on_first
from rlhf_jax.sampling.batches import generate_batches
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.queue import InTurns
from rlhf_jax.training.answers import Answers, answer, answer_rows, write_answers
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.devices import check_rows, current_mesh
from rlhf_jax.training.export import export_policy
from rlhf_jax.training.json_files import write_json
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.policy_options import PolicyOptions
from rlhf_jax.training.prompting import (
    PROMPTED_FORMATS,
    PromptBatch,
    PromptRow,
    collate_prompts,
    completions_of,
    prompt_rows,
    sampling_of,
)
from rlhf_jax.training.run_folder import RunFolder, check
from rlhf_jax.training.session import adapter_of, finish, train
from rlhf_jax.training.sources import Source, Split, count_steps, open_source, read_split
from rlhf_jax.types import Params, Rollout


class Task(NamedTuple):
    """What is trained, and on what.

    Attributes:
        source: the initial policy's shape and tokenizer.
        data: `PromptRow`s to train on and others to evaluate on.
        collate: makes a `PromptBatch` of them.
        sampling: how responses are drawn.
        adapter: the adapter that is trained; None: the whole policy.
        longest: tokens of the longest prompt and response.
        steps: number of updates.
        optimizer_steps: steps of the optimiser in all of them.
    """

    source: Source
    data: Split
    collate: Callable[[Sequence[PromptRow]], PromptBatch]
    sampling: SamplingConfig
    adapter: AdapterConfig | None
    longest: int
    steps: int
    optimizer_steps: int

    def completions(self, rows: Sequence[dict], taken: Rollout) -> list[str | list[dict]]:
        """The responses of a rollout as a Python reward reads them."""
        return completions_of(self.source, rows, taken)


def open_task(options: PolicyOptions) -> Task:
    """Reads the policy's shape and tokenizer, and the prompts; no parameters.

    Raises:
        ValueError: see `open_source` and `read_split`; or the mesh that is set does not divide a minibatch.
    """
    source = open_source(options)
    data = read_split(options, source, PROMPTED_FORMATS, prompt_rows(options.response_length))
    # Nearly every batch has a long prompt: one length is one compilation of the whole step.
    collate = collate_prompts(source, data.train + data.held_out, options.response_length, buckets=1)
    steps = count_steps(options, len(data.train))
    longest = collate(data.train[: options.batch_size]).prompts.tokens.shape[1] + options.response_length
    parts = options.minibatches * options.accumulate
    check_rows(options.rows // parts, longest, "rows of a minibatch (with --accumulate, of a part of it)")
    mesh = current_mesh()
    if mesh is not None and mesh.shape["sequence"] > 1 and options.length_buckets > 1:
        raise ValueError("--length-buckets cuts the sequences that the sequence axis of --mesh splits: leave one out.")
    check_rows(options.slots, None, "--slots, which are drawn at a time")
    sampling = sampling_of(source, options.response_length, temperature=options.temperature)
    decode = None if options.slots is None else InTurns(options.slots)
    return Task(
        source=source,
        data=data,
        collate=collate,
        sampling=dataclasses.replace(sampling, decode=decode, cache=options.cache, weights=options.weights),
        adapter=adapter_of(options),
        longest=longest,
        steps=steps,
        optimizer_steps=steps * options.passes * options.minibatches,
    )


def settle_old_logprob(
    options: PolicyOptions, folder: RunFolder, task: Task, policy: Params, key: Array
) -> Literal["rollout", "recomputed", "truncated"]:
    """Which log-probabilities ratios are taken to: those of the draws, if they are good and the options allow it.

    The initial policy draws one batch and reads it again: the largest difference of a token's two log-probabilities is
    held against `options.logprob_bound`. It comes from the dtype and from how the policy is kept while drawing, and is
    logged at every step as `policy/max_logprob_gap`. What was found and chosen stays in the folder, in
    `old_logprob.json`: a resumed run goes on with it.

    Args:
        options: the options.
        folder: the run's folder.
        task: what is trained on.
        policy: the initial policy.
        key: of the draws.
    """
    if options.old_logprob in ("recomputed", "truncated"):
        return options.old_logprob
    file = folder.path / "old_logprob.json"
    known = on_first(lambda: json.loads(file.read_text()) if file.exists() else None, "a look at old_logprob.json")
    if known is not None:
        return known["chosen"]
    items, prompts = task.data.train[: options.batch_size], (lambda rows: task.collate(rows).prompts)
    config, temperature = task.source.config, task.sampling.logprob_temperature
    drawn = generate_batches(config, policy, items, prompts, options.batch_size, key, task.sampling)
    gap = max(float(gathered(logprob_gap(config, policy, taken, temperature))) for _, taken in drawn)
    off = f"log-probabilities of the draws are up to {gap:.2g} nats off those of training"
    fine = gap <= options.logprob_bound
    chosen = "rollout" if fine or options.old_logprob == "rollout" else "recomputed"
    on_first(lambda: write_json(file, {"gap": gap, "chosen": chosen}), "writing old_logprob.json")
    if options.old_logprob == "auto":
        side = "within" if fine else "above"
        print(f"{off}, {side} --logprob-bound {options.logprob_bound:g}: --old-logprob {chosen}", flush=True)
    elif not fine:
        print(
            f"warning: {off}, above --logprob-bound {options.logprob_bound:g}, so that the first ratios are not 1: "
            "give --old-logprob recomputed or truncated",
            flush=True,
        )
    return chosen


@partial(jax.jit, static_argnums=(0, 3))
def logprob_gap(config: ModelConfig, policy: Params, taken: Rollout, temperature: float) -> Float[Array, ""]:
    """The largest difference between a token's log-probability when it was drawn and in a forward pass, nats."""
    hidden = apply_trunk(config, policy["trunk"], taken.sequences.tokens, taken.sequences.mask).final
    states = response_states(hidden, taken.tokens.shape[1])
    logprob, _ = token_scores(config, policy, states, taken.tokens, temperature)
    return jnp.max(jnp.where(taken.mask, jnp.abs(taken.logprob - logprob), 0.0))


def train_policy(
    options: PolicyOptions,
    folder: RunFolder,
    task: Task,
    step: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    score: Callable[[Sequence[dict], Rollout], np.ndarray],
    state: Any,
    key: Array,
    trained_in: Callable[[Any], Params],
    policy_in: Callable[[Any], Params],
    began: float,
    clock: CompileClock,
    panels: Sequence[Sequence[str]] = (),
    watched: str = "completions/mean_length",
) -> dict[str, Any]:
    """Trains, evaluates on held-out prompts, and exports; returns the summary.

    Args:
        options: the options.
        folder: the run's folder.
        task: what is trained on.
        step: `step(state, batch) -> (state, metrics)`: rollout, reward and update.
        score: `score(rows, rollout) -> rewards` of held-out responses.
        state: the first one; `state.algorithm` is the algorithm's, with a field `reference`.
        key: of the held-out responses, the same at each evaluation.
        trained_in: `trained_in(state.algorithm)`: the policy that is trained, or its adapter.
        policy_in: `policy_in(state.algorithm)`: the policy.
        began: when the work began, see `command_line.started`.
        clock: counts compilation since then.
        panels: metrics to draw beside scores and KL.
        watched: the metric that the progress bar shows beside them.
    """
    source, held_out = task.source, task.data.held_out
    measured: dict[int, Answers] = {}
    title = "Completions of held-out prompts"

    def evaluate(state: Any, step: int) -> dict[str, float]:
        state = state.algorithm
        how = (task.collate, options.batch_size, key, task.sampling, score)
        found = measured[step] = answer(source, policy_in(state), state.reference, held_out, *how)
        path, name = folder.path / "samples" / f"step_{step:08d}.md", f"step {step}"
        write_answers(path, title, held_out, {name: found}, options.samples)
        return found.metrics

    stream = batches(task.data.train, options.batch_size, task.collate, seed=options.seed)
    trained = train(
        options,
        folder,
        step,
        state,
        stream,
        task.steps,
        evaluate,
        tokens=lambda _, metrics: metrics["completions/mean_length"] * options.rows,
        shown=("objective/scores", "objective/kl", watched),
    )
    before, after = measured[0], measured[task.steps]
    both, path = {"before": before, "after": after}, folder.path / "samples.md"
    write_answers(path, title, held_out, both, options.samples)
    final = trained.state.algorithm
    export_policy(folder.path, source, trained_in(final), final.reference, task.adapter)
    rounding = 1e-2 if options.dtype == "float32" and options.draws_as_trained else 1.0
    checks = [check("KL of the initial policy from itself", float(before.kl.mean()), 0.0, rounding)]
    share = on_first(lambda: largest(folder, "objective/trained"), "the share of responses that was trained on")
    if share is not None:  # methods that leave responses out may leave out all, those that did not end by themselves
        checks.append(check("largest share of responses trained on", share, 1 / options.rows, "at least"))
    panels = [("objective/scores", "eval/objective/scores"), ("objective/kl", "eval/objective/kl"), *panels]
    return finish(folder, trained, answer_rows(before, after), checks, began, clock, panels)


def largest(folder: RunFolder, metric: str) -> float | None:
    """The largest value of a metric over the lines of a run; None where no line has it."""
    values = [line[metric] for line in read_metrics(folder.path / "metrics.jsonl") if metric in line]
    return max(values, default=None)
