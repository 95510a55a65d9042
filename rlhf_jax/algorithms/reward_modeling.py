"""Bradley-Terry reward modelling; an ensemble is `jax.vmap` over the state.

The life of an update: with Iterative Data Smoothing the labels of the batch come from the state's table; rewards of
both sides are read, with dropout where it is on; a step is taken on the loss; and the labels of the batch move to what
the new model says.
"""

from functools import partial
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.accumulation import accumulated_gradients, by_parts
from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.algorithms.trained import assemble, trainable
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.reward import bradley_terry, preference_accuracy
from rlhf_jax.losses.smoothing import check_rate, smoothed_labels
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_head, init_reward_model, reward_features
from rlhf_jax.rewards.dropout import draw_masks
from rlhf_jax.types import Algorithm, Metrics, Params, PreferenceBatch

Scores = tuple[Float[Array, " B"], Float[Array, " B"]]
Part = tuple[PreferenceBatch, Array | None]


@chex.dataclass(frozen=True)
class RewardModelState:
    """Everything reward modelling carries from one update to the next.

    Attributes:
        params: `{"trunk": tree, "head": tree}`; the trunk's tree is its adapter where one is trained.
        base: `{"trunk": tree}`, frozen, under the adapter; None without one.
        optimizer_state: the optimiser's state.
        step: number of updates so far, int32.
        labels: of Iterative Data Smoothing, the probability that the first response of each pair of the data is the
            better one, float32 [N]; NaN for a pair that was not seen yet, whose label its batch has. None without.
        key: a typed key of the dropout, into which the step is folded; None without.
    """

    params: Params
    base: Params | None
    optimizer_state: optax.OptState
    step: Int[Array, ""]
    labels: Float[Array, " N"] | None = None
    key: Array | None = None


@partial(jax.jit, static_argnames=("config", "features"))
def preference_scores(
    config: ModelConfig,
    params: Params,
    batch: PreferenceBatch,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    masks: Float[Array, "B D"] | None = None,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Rewards of the chosen and of the rejected sequences, float32 [B] each: both go through the model at once.

    Args:
        config: shape of the reward model's trunk.
        params: `{"trunk", "head"}`.
        batch: B pairs.
        features: what the reward head reads, see `models.heads.reward_features`.
        masks: what the vectors of each pair are multiplied by, [B, D], see `rewards.dropout.draw_masks`; None: nothing.
    """
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch.chosen, batch.rejected)
    vectors = reward_features(config, params["trunk"], both.tokens, both.mask, features)
    if masks is not None:
        vectors = vectors * jnp.concatenate([masks, masks])
    scores = apply_head(params["head"], vectors)
    return scores[: len(batch.margin)], scores[len(batch.margin) :]


def counted(batch: PreferenceBatch) -> Bool[Array, " B"]:
    """Which pairs count: those with tokens on both sides; a row that only fills the batch has none."""
    return batch.chosen.mask.any(axis=-1) & batch.rejected.mask.any(axis=-1)


def refreshed(
    table: Float[Array, " N"], index: Int[Array, " B"], labels: Float[Array, " B"], counts: Bool[Array, " B"]
) -> Float[Array, " N"]:
    """The table with the labels of a batch: of the rows of one pair the first that counts writes, others do not.

    Args:
        table: one label a pair of the data, [N].
        index: which pair each row is, [B]. A batch across the end of an epoch may have a pair twice.
        labels: of the rows, [B].
        counts: which rows count, see `counted`.

    Example:
        >>> table, rows = jnp.zeros(3), jnp.array([2, 2, 0, 1])
        >>> refreshed(table, rows, jnp.array([0.5, 0.75, 1.0, 1.0]), jnp.array([True, True, True, False])).tolist()
        [1.0, 0.0, 0.5]
    """
    same = (index[:, None] == index[None, :]) & counts[None, :]
    owner = counts & (jnp.argmax(same, axis=1) == jnp.arange(len(index)))
    return table.at[jnp.where(owner, index, len(table))].set(labels, mode="drop")


def reward_modeling(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    label_smoothing: float = 0.0,
    centring: float = 0.0,
    adapter: AdapterConfig | None = None,
    accumulate: int = 1,
    smoothing_rate: float | int | None = None,
    examples: int | None = None,
    dropout: float | int = 0.0,
) -> Algorithm:
    """Bradley-Terry training as an offline `Algorithm`.

    A pair of which a side has no tokens (a row that only fills the batch) has weight 0. Batches may have soft labels.

    With `smoothing_rate` the labels of pairs are kept in a table and move after each visit (Iterative Data Smoothing,
    see `losses.smoothing`), from those of the batch at the first visit. That takes another forward pass of the batch,
    by the new parameters and without dropout, beside the forward and the backward pass of a step: 1.33 times the
    operations (counted by XLA for a trunk of four layers). The table is part of the state, and so of checkpoints.

    Args:
        config: shape of the reward model's trunk.
        optimizer: an optax optimiser of what is trained.
        features: what the reward head reads, see `models.heads.reward_features`.
        label_smoothing: probability that a label is taken to be flipped.
        centring: weight of (chosen + rejected reward)^2, which fixes the free constant of each prompt.
        adapter: train this adapter on the trunk, which stays as it is, and the head; None: train trunk and head.
        accumulate: microbatches that an update sees one after the other, to need less memory.
        smoothing_rate: how far labels move to the model's probabilities at each visit, from 0 to 1; None: they stay.
        examples: N, the number of pairs of the data, for the table of labels; batches then have an `index` below it.
        dropout: probability that an entry of the vector that the reward head reads is left out in training, see
            `rewards.dropout`. Both sides of a pair have one mask: a mask is a draw of the head's weights, and the two
            rewards of a comparison are of one model. The metrics are those of the scores with dropout.

    Returns:
        `init(key, params={"trunk": tree, "head"?: tree})` (without a head a fresh one, without params a fresh trunk
        too) and `update(state, PreferenceBatch)` with the metrics `loss/reward`,
        `rewards/{chosen,rejected,accuracies,margins}`, `grad_norm` and `lr`, and with smoothing `rewards/labels`, the
        mean label of the batch after its step.

    Raises:
        ValueError: an option is out of its range, smoothing is without `examples`, or (when traced) a batch for it
            without `index`.
    """
    check_reward_options(smoothing_rate, examples, dropout)

    def init(key: Array, params: Params | None = None) -> RewardModelState:
        given = params or {}
        fresh = init_reward_model(config, key, given.get("trunk"))
        base = {"trunk": fresh["trunk"]}
        trunk = fresh["trunk"] if adapter is None else trainable(base, adapter, key)
        trained = {"trunk": trunk, "head": given.get("head", fresh["head"])}
        return RewardModelState(
            params=trained,
            base=None if adapter is None else base,
            optimizer_state=optimizer.init(trained),
            step=jnp.int32(0),
            labels=None if smoothing_rate is None else jnp.full(examples, jnp.nan, jnp.float32),
            key=jax.random.fold_in(key, 2) if dropout else None,
        )

    def terms(found: Scores, batch: PreferenceBatch, whole: PreferenceBatch) -> Metrics:
        """Loss and metrics of some rows: their parts of those of the `whole` batch."""

        def average(values: Float[Array, " B"]) -> Float[Array, ""]:
            return mean(values[:, None], counted(batch)[:, None], whole=counted(whole)[:, None])

        chosen, rejected = found
        loss = bradley_terry(chosen, rejected, batch.margin, label_smoothing, centring, batch.label)
        return {
            "loss/reward": average(loss),
            "rewards/chosen": average(chosen),
            "rewards/rejected": average(rejected),
            "rewards/accuracies": average(preference_accuracy(chosen, rejected)),
            "rewards/margins": average(chosen - rejected),
        }

    def model_of(state: RewardModelState, params: Params) -> Params:
        if adapter is None:
            return params
        return assemble(state.base, params["trunk"], adapter) | {"head": params["head"]}

    def update(state: RewardModelState, batch: PreferenceBatch) -> tuple[RewardModelState, Metrics]:
        if smoothing_rate is not None:
            batch = batch.replace(label=known_labels(state.labels, batch))
        masks = None
        if dropout:
            rows = len(batch.margin)
            step_key = jax.random.fold_in(state.key, state.step)
            masks = draw_masks(step_key, max(rows, 2), config.width, dropout)[:rows]

        def loss(params: Params, part: Part, whole: Part) -> tuple[Float[Array, ""], Scores]:
            rows, kept = part
            found = preference_scores(config, model_of(state, params), rows, features, kept)
            return terms(found, rows, whole[0])["loss/reward"], found

        gradients, found = accumulated_gradients(loss, state.params, (batch, masks), accumulate)
        metrics = terms(found, batch, batch)
        params, optimizer_state, step_metrics = apply_gradients(
            optimizer, gradients, state.optimizer_state, state.params
        )
        state = state.replace(params=params, optimizer_state=optimizer_state, step=state.step + 1)
        if smoothing_rate is None:
            return state, metrics | step_metrics
        model = model_of(state, params)
        found = by_parts(lambda rows: preference_scores(config, model, rows, features), batch, accumulate)
        labels = smoothed_labels(batch.label, *found, smoothing_rate, batch.margin)
        state = state.replace(labels=refreshed(state.labels, batch.index, labels, counted(batch)))
        labels = {"rewards/labels": mean(labels[:, None], counted(batch)[:, None])}
        return state, metrics | step_metrics | labels

    return Algorithm(init=init, rollout=None, update=update)


def known_labels(table: Float[Array, " N"], batch: PreferenceBatch) -> Float[Array, " B"]:
    """The labels of a batch by the table of Iterative Data Smoothing, or its own where a pair was not seen yet.

    Raises:
        ValueError: the batch does not say which pairs its rows are.
    """
    if batch.index is None:
        raise ValueError(
            "Iterative Data Smoothing keeps labels by pair: give batches an `index`, the pair of each row."
        )
    own = jnp.ones(len(batch.margin), table.dtype) if batch.label is None else batch.label.astype(table.dtype)
    kept = table[batch.index]
    return jnp.where(jnp.isnan(kept), own, kept)


def check_reward_options(smoothing_rate: float | int | None, examples: int | None, dropout: float | int) -> None:
    """Refuses options of `reward_modeling` that cannot work.

    Raises:
        ValueError: the sentence names the option.

    Example:
        >>> check_reward_options(0.5, None, 0.0)
        Traceback (most recent call last):
            ...
        ValueError: Iterative Data Smoothing keeps one label a pair: give examples, the number of pairs.
    """
    if smoothing_rate is not None:
        check_rate(smoothing_rate)
        if examples is None or examples < 1:
            raise ValueError("Iterative Data Smoothing keeps one label a pair: give examples, the number of pairs.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: give a share from 0 to less than 1.")
