"""What AdvPO needs beside a reward model: its options, and the ellipsoid of the pairs that the model was trained on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.data.batches import pad_preferences
from rlhf_jax.data.columns import PREFERENCE_FORMATS
from rlhf_jax.data.formats import as_chats, load_rows
from rlhf_jax.data.tokenization import Preference, describe_dropped, tokenize_preferences
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
from rlhf_jax.training.sources import Source, collate_for
from rlhf_jax.types import Transform


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


def check_adversarial(options: AdversarialOptions) -> None:
    """Refuses options that AdvPO cannot work with, before anything is read.

    Raises:
        ValueError: the sentence names the option.
    """
    if options.preferences is None:
        raise ValueError("--rule advpo needs --preferences FILE, the pairs that the reward model was trained on.")
    if options.regularisation <= 0:
        raise ValueError(f"--regularisation is {options.regularisation}: give more than 0.")
    for name in ("advpo_multiple", "advpo_value"):
        if (getattr(options, name) or 0.0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give 0 or more.")
    advpo(ema=options.advpo_ema, rescale=options.advpo_rescale)


def check_not_adversarial(options: AdversarialOptions, rule: str) -> None:
    """Refuses options of AdvPO beside another rule, which does not read them.

    Raises:
        ValueError: the sentence names the option.
    """
    for field in dataclasses.fields(AdversarialOptions):
        if getattr(options, field.name) != field.default:
            word = field.name.replace("_", "-")
            raise ValueError(f"--rule {rule} does not use --{word}: leave it out, or choose advpo.")


def adversarial_rule(
    options: Any, source: Source, member: Member, pairs: Sequence[Preference]
) -> tuple[Transform, AdversarialState]:
    """AdvPO as a reward transform, and its state at the start.

    Args:
        options: `AdversarialOptions` and `SourceOptions` in one.
        source: the policy.
        member: the reward model.
        pairs: those that it was trained on, from `read_pairs`.

    Raises:
        ValueError: see `ellipsoid`.
    """
    shape, radius = ellipsoid(
        member,
        source,
        pairs,
        options.batch_size,
        options.regularisation,
        options.advpo_value,
        options.advpo_multiple,
    )
    transform = advpo(ema=options.advpo_ema, rescale=options.advpo_rescale)
    return transform, transform.init(shape, radius)


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


def pair_features(
    member: Member, source: Source, pairs: Sequence[Preference], batch_size: int
) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
    """What the reward model's head reads of the chosen and of the rejected sequences: what geometries are made from.

    Args:
        member: the reward model.
        source: the policy, whose tokens the pairs are.
        pairs: N of them, from `read_pairs`.
        batch_size: pairs a batch.
    """
    scorer = jax.jit(member.score)
    collate = collate_for(pad_preferences, source._replace(config=member.config), pairs)

    def features(batch: Any) -> tuple[Array, Array]:
        sides = (batch.chosen, batch.rejected)
        chosen, rejected = (scorer(member.params, side.tokens, side.mask).features for side in sides)
        return chosen, rejected

    chosen, rejected = map(jnp.asarray, over_rows(features, pairs, collate, batch_size))
    return chosen, rejected


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
    chosen, rejected = pair_features(member, source, pairs, batch_size)
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
