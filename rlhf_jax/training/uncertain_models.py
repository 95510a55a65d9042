"""Reward models that pairs teach and that know how unsure they are: from what was trained to scores and a folder.

    chosen, rejected = finish_kind(options, out, source, trained, adapter, pairs, held_out, collate)
    rows = uncertainty_rows(chosen, rejected)

Members count from their mean over the held-out completions, chosen and rejected alike, which no training step has seen:
a Bradley-Terry reward is free up to a constant a member. A posterior has one head, whose zero stays where training put
it. Pipelines that train a policy set all of them anew, on responses of the initial policy.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.tokenization import Preference
from rlhf_jax.evaluation.judging import pair_right
from rlhf_jax.evaluation.sheets import TRIVIAL
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.evaluation.uncertainty import error_rows, margin_deviation, margin_spread, pair_uncertainty
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.rewards.dropout import DropoutParams, draw_masks
from rlhf_jax.rewards.ensemble import member_offset
from rlhf_jax.rewards.last_layer import geometry, gram, radius_from, statistical_scale
from rlhf_jax.rewards.members import Member
from rlhf_jax.rewards.posterior import PosteriorParams, fisher_geometry, pair_geometry
from rlhf_jax.training.adversarial import pair_features
from rlhf_jax.training.completion_scores import CompletionScores, as_scores, by_completion
from rlhf_jax.training.export import export_reward_model, padding_of_its_own
from rlhf_jax.training.held_out import over_rows
from rlhf_jax.training.kind_options import ENSEMBLES, MEMBERS, ONE_HEAD, READ_BY
from rlhf_jax.training.reward_folders import kind_in, load_reward_folder, save_reward_folder
from rlhf_jax.training.reward_kinds import KINDS, WITH_MEMBERS, kind_of
from rlhf_jax.training.sources import Source, load_trunk, placement
from rlhf_jax.types import Params, PreferenceBatch

PairScorer = Callable[[Params, PreferenceBatch], Any]


def starting_params(options: Any, source: Source) -> Params:
    """What training begins with, by role: a trunk, and what the kind can go on with of the heads in the folder.

    One head goes on as one head, and the heads of a linear ensemble go on in an ensemble; other heads begin anew.

    Args:
        options: `KindOptions` and `SourceOptions` in one.
        source: the model.

    Raises:
        ValueError: the model cannot be read, has another number of heads than --members says, or no head where it is
            to stay as it is.
    """
    if options.kind in ENSEMBLES and kind_in(source.folder) == "linear_ensemble":
        shape = (source.config.dtype, source.config.param_dtype, placement())
        found = load_reward_folder(source.folder, *shape).params
        count = len(found.heads["bias"])
        if options.members not in (None, count):
            raise ValueError(
                f"--members is {options.members}, and the ensemble in {options.model} has {count} heads, which go on "
                "learning: leave it out."
            )
        return {"trunk": found.trunk, "heads": found.heads}
    found = load_trunk(source)
    if options.frozen and "head" not in found:
        raise ValueError(
            f"--frozen leaves the reward model as it is, and {options.model} has no reward head: train one first, "
            "without --frozen."
        )
    return found if options.kind in ONE_HEAD else {"trunk": found["trunk"]}


def finish_kind(
    options: Any,
    out: Path,
    source: Source,
    trained: Params,
    adapter: AdapterConfig | None,
    pairs: Sequence[Preference],
    held_out: Sequence[Preference],
    collate: Callable[[Sequence[Preference]], PreferenceBatch],
) -> tuple[CompletionScores, CompletionScores]:
    """Makes the uncertain reward model of what was trained, scores the held-out pairs, and writes `OUT/model`.

    The folder is one of `reward_folders`; its pad token is not its EOS token, see `export.padding_of_its_own`.

    Args:
        options: `KindOptions` and `TrainingOptions` in one, with the rate of `dropout`.
        out: folder of the run.
        source: the model that training began with.
        trained: `{"trunk", "head"}` for the kinds of `ONE_HEAD`, adapters merged; else the kind's own record.
        adapter: of the members of a LoRA ensemble.
        pairs: those that it was trained on.
        held_out: other pairs, which members count from.
        collate: makes a batch of pairs.

    Returns:
        Scores of the chosen and of the rejected completions.

    Raises:
        ValueError: the geometry of a posterior is singular; then the plain reward model is in `OUT/model`.
    """
    try:
        params = uncertain_params(options, source, trained, pairs)
    except ValueError:
        export_reward_model(out, source, trained)
        raise
    how = {"adapter": adapter} if options.kind == "lora_ensemble" else {}
    scorer = KINDS[options.kind].scorer(source.config, **how)
    params, *sides = centred_scores(options, scorer, params, held_out, collate)
    about = {name: vars(options)[name] for name, kinds in READ_BY.items() if options.kind in kinds}
    about |= {"pairs": len(pairs), "held_out": len(held_out)}
    shared = kind_of(params) == "lora_ensemble"
    trunk = params.base["trunk"] if shared else params.trunk
    tokenizer, config, trunk = padding_of_its_own(source.tokenizer, source.config, trunk)
    params = params.replace(base={"trunk": trunk}) if shared else params.replace(trunk=trunk)
    save_reward_folder(out / "model", config, params, tokenizer, source.folder, how, about)
    return tuple(sides)


def uncertain_params(options: Any, source: Source, trained: Params, pairs: Sequence[Preference]) -> Params:
    """The kind's parameters, of offset 0, from what was trained.

    Args:
        options: `KindOptions` and `TrainingOptions` in one, with the rate of `dropout`.
        source: the model that training began with.
        trained: `{"trunk", "head"}` for the kinds of `ONE_HEAD`, adapters merged; else the kind's own record.
        pairs: those that it was trained on.

    Raises:
        ValueError: the geometry of a posterior is singular.
    """
    if options.kind == "dropout":
        count, key = options.members or MEMBERS, jax.random.fold_in(jax.random.key(options.seed), 3)
        masks = draw_masks(key, count, source.config.width, options.dropout)
        return DropoutParams(**trained, masks=masks, offset=jnp.zeros(count, jnp.float32))
    if options.kind == "posterior":
        return posterior_params(options, source, trained, pairs)
    return trained


def posterior_params(options: Any, source: Source, trained: Params, pairs: Sequence[Preference]) -> PosteriorParams:
    """The last-layer posterior of a reward model, from the features of the pairs that it was trained on.

    The radius makes `b sqrt(e^T M^{-1} e)` a standard deviation of the reward in every geometry: `b^2 = B / D` with
    `B = tr(M H^{-1})` of `last_layer.statistical_scale`, the expected squared M-length of the head's error, which D
    directions share. In the Fisher geometry M is H, and b is 1. (AdvPO's own radius, for the worst head of all, is
    sqrt(D) times as large.)

    Args:
        options: with `geometry`, `regularisation` and `batch_size`.
        source: the model that training began with.
        trained: `{"trunk", "head"}`.
        pairs: those that it was trained on.

    Raises:
        ValueError: the geometry is singular in float32.
    """
    chosen, rejected = pair_features(Member(source.config, trained), source, pairs, options.batch_size)
    head, weight = trained["head"], options.regularisation
    match options.geometry:
        case "fisher":
            shape = fisher_geometry(chosen, rejected, head, weight)
        case "pairs":
            shape = pair_geometry(chosen, rejected, weight)
        case _:
            shape = geometry(gram(chosen) + gram(rejected), weight)
    radius = jnp.ones(())
    if options.geometry != "fisher":
        matrix = jnp.matmul(shape.cholesky, shape.cholesky.T, precision="highest")
        natural = statistical_scale(matrix, chosen, rejected, head["kernel"].astype(matrix.dtype), weight)
        radius = radius_from(multiple=1.0 / source.config.width, scale=natural)
    return PosteriorParams(**trained, geometry=shape, radius=radius, offset=jnp.zeros(()))


def pair_scorer(scorer: Callable[..., Any]) -> PairScorer:
    """Compiles a scorer for both sides of pairs, which go through the model at once; for `score_pairs`."""

    @jax.jit
    def scores(params: Params, batch: PreferenceBatch) -> Any:
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch.chosen, batch.rejected)
        named = by_completion(scorer(params, both.tokens, both.mask), params)
        half = len(batch.margin)
        chosen = {name: values[:half] for name, values in named.items()}
        return chosen, {name: values[half:] for name, values in named.items()}

    return scores


def score_pairs(
    scores: PairScorer,
    params: Params,
    pairs: Sequence[Preference],
    collate: Callable[[Sequence[Preference]], PreferenceBatch],
    batch_size: int,
) -> tuple[CompletionScores, CompletionScores]:
    """Scores of the chosen and of the rejected completions.

    Args:
        scores: from `pair_scorer`.
        params: what its scorer takes.
        pairs: the pairs.
        collate: makes a batch of them.
        batch_size: pairs a batch.
    """
    chosen, rejected = over_rows(partial(scores, params), pairs, collate, batch_size)
    return as_scores(chosen), as_scores(rejected)


def centred_scores(
    options: Any,
    scorer: Callable[..., Any],
    params: Params,
    held_out: Sequence[Preference],
    collate: Callable[[Sequence[Preference]], PreferenceBatch],
) -> tuple[Params, CompletionScores, CompletionScores]:
    """The parameters with the zero of each member at its mean over held-out completions, and the scores of these.

    Args:
        options: with `batch_size`.
        scorer: of the kind.
        params: of the kind.
        held_out: pairs.
        collate: makes a batch of them.
    """
    scores = pair_scorer(scorer)
    chosen, rejected = score_pairs(scores, params, held_out, collate, options.batch_size)
    if kind_of(params) not in WITH_MEMBERS:
        return params, chosen, rejected
    both = jnp.asarray(np.concatenate([chosen.members, rejected.members], axis=1))
    params = params.replace(offset=params.offset + member_offset(both))
    return params, *score_pairs(scores, params, held_out, collate, options.batch_size)


def uncertainty_rows(chosen: CompletionScores, rejected: CompletionScores) -> list[dict[str, Any]]:
    """Rows of the summary on the uncertainty of held-out pairs: its size, and whether it finds errors.

    Beside it stands the trivial uncertainty of a pair, which needs no such model: how small its margin is.

    Args:
        chosen: scores with `epistemic` or `aleatoric`.
        rejected: of the same pairs.
    """
    name = "epistemic" if chosen.epistemic is not None else "aleatoric"
    sides = [getattr(side, name) for side in (chosen, rejected)]
    if chosen.members is not None:
        doubt = margin_spread(chosen.members, rejected.members)
    elif chosen.whitened is not None:
        doubt = margin_deviation(chosen.whitened, rejected.whitened)
    else:
        doubt = pair_uncertainty(*sides)
    rows = [
        row(f"{name} standard deviation of a held-out completion", "nats", np.concatenate(sides)),
        row(f"{name} standard deviation of a held-out margin", "nats", doubt),
    ]
    right = pair_right(chosen.mean, rejected.mean)
    for by, values in ((name, doubt), (TRIVIAL, -np.abs(chosen.mean - rejected.mean))):
        rows += [found | {"name": f"{by}: {found['name']}"} for found in error_rows(right, values)[:2]]
    return rows
