"""What AdvPO needs beside a reward model: the ellipsoid of the pairs it was trained on, and a reference a prompt."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.data.batches import pad_demonstrations, pad_preferences
from rlhf_jax.data.columns import PREFERENCE_FORMATS
from rlhf_jax.data.formats import as_chats, format_rows, load_rows
from rlhf_jax.data.rows import LocatedRow
from rlhf_jax.data.tokenization import (
    Demonstration,
    Preference,
    describe_dropped,
    tokenize_demonstrations,
    tokenize_preferences,
)
from rlhf_jax.parallel.meetings import gathered
from rlhf_jax.rewards.bradley_terry import check_rewards, reward_scorer
from rlhf_jax.rewards.last_layer import (
    AdversarialState,
    Geometry,
    advpo,
    geometry,
    gram,
    radius_from,
    statistical_scale,
)
from rlhf_jax.rewards.members import Member
from rlhf_jax.training.held_out import over_rows
from rlhf_jax.training.options import SourceOptions
from rlhf_jax.training.prompting import PromptRow
from rlhf_jax.training.sources import Source, collate_for
from rlhf_jax.types import Demonstrations, Rollout, Score, Sequences, Transform

Draw = Callable[[Sequence[PromptRow]], Iterable[tuple[list[int], Rollout]]]


@dataclasses.dataclass(frozen=True)
class AdversarialOptions:
    """Options of AdvPO.

    Attributes:
        preferences: for AdvPO, the pairs that the reward model was trained on: a file of chosen and rejected.
        advpo_multiple: the squared radius B of AdvPO's ellipsoid as a multiple of its statistical scale.
        advpo_value: B itself; then `advpo_multiple` is not used.
        advpo_ema: decay of a moving average of the policy's displacement over updates; None: each batch's own.
        advpo_rescale: "std" gives AdvPO's rewards the spread of the reward model's scores, on a moving average.
        regularisation: lambda of AdvPO's ellipsoid, in squared units of the features; also the ridge of the Fisher
            information in the statistical scale of B.
    """

    preferences: Path | None = None
    advpo_multiple: float = 1.0
    advpo_value: float | None = None
    advpo_ema: float | None = None
    advpo_rescale: Literal["std"] | None = None
    regularisation: float = 1.0


class Material(NamedTuple):
    """What AdvPO is made of, as tokens.

    Attributes:
        pairs: the pairs that the reward model was trained on.
        answers: reference answers, by the place of their prompt, see `reference_answers`.
    """

    pairs: list[Preference]
    answers: dict[int, Demonstration]


def check_adversarial(options: AdversarialOptions, rewards: Sequence[str]) -> None:
    """Refuses options that AdvPO cannot work with, before anything is read.

    Args:
        options: the options.
        rewards: the reward models.

    Raises:
        ValueError: the sentence names the option.
    """
    if options.preferences is None:
        raise ValueError("--rule advpo needs --preferences FILE, the pairs that the reward model was trained on.")
    if len(rewards) != 1:
        raise ValueError(f"--rule advpo is for one reward model, and --reward names {len(rewards)}: give one.")
    if options.regularisation <= 0:
        raise ValueError(f"--regularisation is {options.regularisation}: give more than 0.")
    for name in ("advpo_multiple", "advpo_value"):
        if (getattr(options, name) or 0.0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give 0 or more.")
    advpo(ema=options.advpo_ema, rescale=options.advpo_rescale)


def read_material(
    options: Any, source: Source, member: Member, items: Sequence[PromptRow], response_length: int
) -> Material:
    """Reads the pairs, and the answers of the rows; prints how many there are.

    Args:
        options: `AdversarialOptions` and `SourceOptions` in one.
        source: the policy.
        member: the reward model.
        items: the prompts to train on.
        response_length: most tokens of an answer.

    Raises:
        ValueError: see `read_pairs` and `reference_answers`.
    """
    longest = min(source.longest, member.config.context_length)
    pairs = read_pairs(options, source, options.preferences, longest)
    return Material(pairs, reference_answers(source, items, options.data, response_length))


def adversarial_rule(
    options: Any,
    source: Source,
    member: Member,
    items: Sequence[PromptRow],
    material: Material,
    draw: Draw,
    score: Callable[[Array, Array], Score],
) -> tuple[Transform, AdversarialState, Score]:
    """AdvPO as a reward transform, its state at the start, and the reward model's Score of a reference a prompt.

    Args:
        options: `AdversarialOptions` and `SourceOptions` in one.
        source: the policy.
        member: the reward model.
        items: the prompts to train on.
        material: from `read_material`.
        draw: see `reference_table`.
        score: `score(tokens, mask)`, of the reward model.

    Raises:
        ValueError: see `ellipsoid` and `reference_table`.
    """
    shape, radius = ellipsoid(
        member,
        source,
        material.pairs,
        options.batch_size,
        options.regularisation,
        options.advpo_value,
        options.advpo_multiple,
    )
    answers = material.answers
    collate = collate_for(pad_demonstrations, source, list(answers.values())) if answers else None
    table = reference_table(items, answers, collate, draw, score, options.batch_size)
    transform = advpo(ema=options.advpo_ema, rescale=options.advpo_rescale)
    return transform, transform.init(shape, radius), table


def read_pairs(options: SourceOptions, source: Source, path: Path, longest: int) -> list[Preference]:
    """The pairs that a reward model was trained on, as the policy's tokenizer writes them; prints how many were kept.

    Args:
        options: what renames and converts columns does so here too.
        source: the policy.
        path: a file of preferences.
        longest: most tokens that the reward model reads; longer pairs are dropped and counted.

    Raises:
        ValueError: the file cannot be used; see `load_rows` and `tokenize_preferences`.
    """
    rows = load_rows(path, PREFERENCE_FORMATS, options.columns, options.convert)
    rows = as_chats(rows) if options.chat else rows
    pairs = tokenize_preferences(rows, source.tokenizer, longest, vocab_size=source.config.vocab_size)
    print(f"{path}: {describe_dropped(pairs)}", flush=True)
    return pairs.items


def ellipsoid(
    member: Member,
    source: Source,
    pairs: Sequence[Preference],
    batch_size: int,
    regularisation: float,
    value: float | None = None,
    multiple: float | None = None,
) -> tuple[Geometry, Float[Array, ""]]:
    """Shape and radius of the ellipsoid in which the reward model's head lies, from the pairs that it was trained on.

    Args:
        member: the reward model.
        source: the policy, whose tokens the pairs are.
        pairs: from `read_pairs`.
        batch_size: pairs a batch.
        regularisation: lambda of the geometry, and the ridge of the Fisher information in the radius's scale.
        value: the squared radius B itself.
        multiple: B as a multiple of its statistical scale, where there is no `value`.

    Raises:
        ValueError: the geometry cannot be factored in float32.
    """
    scorer = jax.jit(reward_scorer(member.config))
    collate = collate_for(pad_preferences, source._replace(config=member.config), pairs)

    def features(batch: Any) -> tuple[Array, Array]:
        sides = (batch.chosen, batch.rejected)
        chosen, rejected = (scorer(member.params, side.tokens, side.mask).features for side in sides)
        return chosen, rejected

    chosen, rejected = map(jnp.asarray, over_rows(features, pairs, collate, batch_size))
    total = gram(chosen) + gram(rejected)
    shape = geometry(total, regularisation)
    if value is not None:
        return shape, radius_from(value=value)
    head = member.params["head"]["kernel"].astype(total.dtype)
    radius = radius_from(
        multiple=multiple, scale=statistical_scale(total, chosen, rejected, head, regularisation, regularisation)
    )
    if not bool(jnp.isfinite(radius)):
        raise ValueError(f"the radius of AdvPO is {radius} in float32: raise --regularisation from {regularisation}.")
    return shape, radius


def reference_answers(
    source: Source, items: Sequence[PromptRow], path: Path, response_length: int
) -> dict[int, Demonstration]:
    """The answers that rows bring along as sequences: `completion`, `chosen`, or the last turn of `messages`.

    An answer of more than `response_length` tokens is cut there, as those of the policy are.

    Args:
        source: the policy.
        items: prompts and their rows.
        path: where the rows are from, for messages.
        response_length: most tokens of an answer.

    Returns:
        Sequences by the place of their item; items without an answer, or with an empty one, are left out.

    Raises:
        ValueError: answers of different kinds, or of a kind that is no completion.
    """
    found = {place: answer for place, item in enumerate(items) if (answer := _answer(item.row)) is not None}
    if not found:
        return {}
    located = [
        LocatedRow(
            f"{path}, prompt {items[place].prompt.index} (counting from 0)",
            {"prompt": items[place].row["prompt"], "completion": answer},
        )
        for place, answer in found.items()
    ]
    rows = format_rows(located, str(path), ("prompt_completion",))
    # Too long ones are cut below, not dropped.
    examples = tokenize_demonstrations(rows, source.tokenizer, sys.maxsize, vocab_size=source.config.vocab_size)
    places = list(found)
    return {
        places[row]: _cut(answer, response_length, source.longest)
        for row, answer in zip(examples.rows, examples.items, strict=True)
    }


def reference_table(
    items: Sequence[PromptRow],
    answers: Mapping[int, Demonstration],
    collate: Callable[[Sequence[Demonstration]], Any] | None,
    draw: Draw,
    score: Callable[[Array, Array], Score],
    batch_size: int,
) -> Score:
    """The reward model's Score of a reference response to every prompt.

    Args:
        items: N prompts.
        answers: from `reference_answers`.
        collate: makes a batch of answers; None where there are none.
        draw: `draw(items)` gives responses of the initial policy and the places of their items, a batch at a time; it
            is asked for the items without an answer.
        score: `score(tokens, mask)`.
        batch_size: answers a batch.

    Returns:
        `mean` [R] and `features` [R, D], in which row i belongs to the prompt of index i; R is the largest index and
        one more, and rows that no prompt has are 0.

    Raises:
        ValueError: a score is not finite.
    """
    index = np.array([item.prompt.index for item in items])
    missing = [place for place in range(len(items)) if place not in answers]

    def by_row(sequences: Sequences | Demonstrations) -> Score:
        return score(sequences.tokens, sequences.mask).replace(members=None)  # whose first axis counts no rows

    parts = []
    if answers:
        found = over_rows(by_row, list(answers.values()), collate, batch_size)
        parts.append((index[list(answers)], found))
    for places, taken in draw([items[place] for place in missing]) if missing else ():
        parts.append((index[[missing[place] for place in places]], gathered(by_row(taken.sequences))))
    table = None
    for rows, found in parts:
        check_rewards(found.mean, "the reward model, of reference responses,")
        if table is None:
            table = jax.tree.map(lambda leaf: np.zeros((index.max() + 1, *leaf.shape[1:]), leaf.dtype), found)
        for whole, leaf in zip(jax.tree.leaves(table), jax.tree.leaves(found), strict=True):
            whole[rows] = leaf
    print(f"reference responses: {len(answers)} from the rows, {len(missing)} drawn from the policy", flush=True)
    return jax.tree.map(jnp.asarray, table)


def _cut(answer: Demonstration, response_length: int, longest: int) -> Demonstration:
    end = min(int(np.argmax(answer.loss_mask)) + response_length, longest)
    return Demonstration(answer.tokens[:end], answer.loss_mask[:end])


def _answer(row: Mapping[str, Any]) -> Any:
    columns = [row[name] for name in ("completion", "chosen") if row.get(name) is not None]
    messages = row.get("messages") or []
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return next(iter(columns), messages[-1:] if answered else None)
