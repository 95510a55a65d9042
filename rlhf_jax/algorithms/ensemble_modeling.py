"""Bradley-Terry training of ensembles that share a trunk: linear heads, and low-rank adapters.

The two stages of a LoRA ensemble, each on comparisons of its own:

    stage_1 = linear_ensemble_modeling(config, optimizer, members=5)           # trunk and heads, on the first subset
    stage_2 = lora_ensemble_modeling(config, optimizer, adapter, members=5)    # frozen trunk, on the second
    state = stage_2.init(key, state.params)                                    # the trunk and the heads of stage 1

Without the first stage the adapters start from a trunk that has not learnt to score, and do poorly (the paper).

With a shared trunk and the same comparisons the loss is convex in each head, so the heads agree wherever the data
constrain them. Gradient descent moves a head only within the span of the differences of features it has seen; off that
span it keeps what it began with, which is where an ensemble disagrees. Decay towards 0 destroys that, so heads decay
towards their own start (a randomised prior) or not at all. Bootstrap weights keep members apart on the span as well.

Source: Zhang et al., "Improving Reinforcement Learning from Human Feedback with Efficient Reward Model Ensemble",
arXiv:2401.16635; randomised priors: Osband et al., arXiv:1806.03335.
"""

import math
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from rlhf_jax.algorithms.accumulation import accumulated_gradients
from rlhf_jax.algorithms.optimizer import apply_gradients
from rlhf_jax.algorithms.reward_modeling import counted
from rlhf_jax.algorithms.trained import check_roles, without_shared_arrays
from rlhf_jax.losses.reduce import mean
from rlhf_jax.losses.reward import bradley_terry, preference_accuracy
from rlhf_jax.models.adapters import AdapterConfig, init_adapter
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams, check_members, init_heads, linear_ensemble_scorer
from rlhf_jax.rewards.lora_ensemble import LoRAEnsembleParams, lora_ensemble_scorer, nuclear_diversity
from rlhf_jax.types import Algorithm, Metrics, Params, PreferenceBatch, at_least_float32

Features = Literal["final_norm", "pre_norm"]
Scores = tuple[Float[Array, "B M"], Float[Array, "B M"]]

POISSON = np.cumsum([math.exp(-1.0) / math.factorial(count) for count in range(10)])
"""Probabilities that a Poisson variable of mean 1 is at most 0, 1, …, 9; above that it comes once in nine millions."""


@chex.dataclass(frozen=True)
class EnsembleModelState:
    """Everything the training of an ensemble carries from one update to the next.

    Attributes:
        params: what is trained: `{"trunk", "heads"}`, `{"heads"}` on a frozen trunk, or `{"adapters", "heads"}`.
        base: `{"trunk": tree}` where it is frozen; None where it is trained.
        start: the heads at the start, which prior decay pulls towards; None without prior decay.
        key: what bootstrap weights are drawn with; None without them.
        optimizer_state: the optimiser's state; of adapters, one for each member on axis 0.
        step: number of updates so far, int32.
    """

    params: Params
    base: Params | None
    start: Params | None
    key: Array | None
    optimizer_state: optax.OptState
    step: Int[Array, ""]


def linear_ensemble_modeling(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    members: int,
    features: Features = "final_norm",
    prior_decay: float = 0.0,
    bootstrap: bool = False,
    train_trunk: bool = True,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
    accumulate: int = 1,
) -> Algorithm:
    """Trains M linear heads, and the trunk that they share, as an offline `Algorithm`.

        loss = (1/M) sum_m [ mean_i w_im BT_i(phi_m) + prior_decay / 2 ||phi_m - phi_m(0)||^2 ]

    with the Bradley-Terry losses of `losses.reward.bradley_terry` and w = 1, or `bootstrap_weights`. A pair of which a
    side has no tokens (a row that only fills the batch) has weight 0.

    Adam scales every coordinate of a gradient by itself, so with it the updates of a head leave the span of the
    features, which those of gradient descent and momentum do not: with Adam it takes a prior decay to keep the heads
    where they began off the span.

    Args:
        config: shape of the trunk.
        optimizer: an optax optimiser of what is trained. No weight decay of the heads, see the module.
        members: M.
        features: what the heads read, see `models.heads.reward_features`.
        prior_decay: at least 0: strength of the pull of every head (kernel and bias) towards its own start.
        bootstrap: weigh the pairs for each member by `bootstrap_weights`; batches need an `index`.
        train_trunk: False: the trunk stays as it is, and only the heads are trained.
        label_smoothing: probability that a label is taken to be flipped.
        centring: weight of (chosen + rejected reward)^2.
        accumulate: microbatches that an update sees one after the other, to need less memory.

    Returns:
        `init(key, params={"trunk"?, "heads"?})`, what is not given being fresh, and `update(state, PreferenceBatch)`
        with the metrics `loss/reward` (the mean of the members', bootstrap weights included), `rewards/{chosen,
        rejected,accuracies,margins}` of the mean over members, `uncertainty/mean` (mean standard deviation over members
        of chosen less rejected reward, which does not depend on the members' constants), `grad_norm` and `lr`.

    Raises:
        ValueError: less than 1 member, a negative `prior_decay`, or (in `init`) heads of another number of members;
            (in `update`) no `index` to draw bootstrap weights by.

    Source: arXiv:2401.16635.
    """
    check_members(members)
    if prior_decay < 0:
        raise ValueError(f"prior_decay is {prior_decay!r}; it must not be negative.")
    scorer = linear_ensemble_scorer(config, features)

    def init(key: Array, params: Params | None = None) -> EnsembleModelState:
        given = params or {}
        check_roles(given, ("trunk", "heads"))
        trunk_key, heads_key, weights_key = jax.random.split(key, 3)
        base = {"trunk": given["trunk"] if "trunk" in given else init_trunk(config, trunk_key)}
        heads = _heads(config, given, heads_key, members)
        trained = (base if train_trunk else {}) | {"heads": heads}
        state = EnsembleModelState(
            params=trained,
            base=None if train_trunk else base,
            start=heads if prior_decay else None,
            key=weights_key if bootstrap else None,
            optimizer_state=optimizer.init(trained),
            step=jnp.int32(0),
        )
        return without_shared_arrays(state)

    def update(state: EnsembleModelState, batch: PreferenceBatch) -> tuple[EnsembleModelState, Metrics]:
        def loss(params: Params, part: PreferenceBatch, whole: PreferenceBatch) -> tuple[Float[Array, ""], Scores]:
            found = pair_scores(scorer, linear_ensemble_params(state.replace(params=params)), part)
            value = _terms(found, part, whole, state.key, label_smoothing, centring)["loss/reward"]
            if prior_decay:
                distance = _squared_distance(params["heads"], state.start) / members
                value = value + 0.5 * prior_decay * distance * _share(part, whole)
            return value, found

        gradients, found = accumulated_gradients(loss, state.params, batch, accumulate)
        metrics = _terms(found, batch, batch, state.key, label_smoothing, centring)
        params, optimizer_state, step_metrics = apply_gradients(
            optimizer, gradients, state.optimizer_state, state.params
        )
        state = state.replace(params=params, optimizer_state=optimizer_state, step=state.step + 1)
        return state, metrics | step_metrics

    return Algorithm(init=init, rollout=None, update=update)


def lora_ensemble_modeling(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    adapter: AdapterConfig,
    members: int,
    features: Features = "final_norm",
    bootstrap: bool = False,
    diversity: float = 0.0,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
    accumulate: int = 1,
) -> Algorithm:
    """Trains M adapters and heads on one frozen trunk as an offline `Algorithm`; see the module for its two stages.

        loss = sum_m mean_i w_im BT_i(member m) - diversity ||[A_1 | … | A_M]||_*

    Fresh adapters change nothing, so that at first members differ by their heads only. Every member has its own state
    of the optimiser (and its own clipping of gradients): without the diversity term each is trained as it would be
    alone, by `reward_modeling` with this adapter.

    Args:
        config: shape of the trunk.
        optimizer: an optax optimiser of one member, `{"adapters", "heads"}`.
        adapter: which adapter each member trains.
        members: M.
        features: what the heads read, see `models.heads.reward_features`.
        bootstrap: weigh the pairs for each member by `bootstrap_weights`; batches need an `index`.
        diversity: at least 0: weight of `rewards.lora_ensemble.nuclear_diversity` (UP-RLHF, arXiv:2401.00243). The norm
            has no upper bound: keep the weight small beside the likelihood.
        label_smoothing: probability that a label is taken to be flipped.
        centring: weight of (chosen + rejected reward)^2.
        accumulate: microbatches that an update sees one after the other, to need less memory.

    Returns:
        `init(key, params={"trunk"?, "heads"?})`, what is not given being fresh, and `update(state, PreferenceBatch)`
        with the metrics of `linear_ensemble_modeling` (`grad_norm` is the mean over members).

    Raises:
        ValueError: less than 1 member, a negative `diversity`, or one with an adapter that has no matrix `a`; (in
            `init`) heads of another number of members; (in `update`) no `index` to draw bootstrap weights by.

    Source: arXiv:2401.16635.
    """
    check_members(members)
    if diversity < 0:
        raise ValueError(f"diversity is {diversity!r}; it must not be negative.")
    if diversity and adapter.kind not in ("lora", "dora", "trilora", "flora"):
        raise ValueError(f"a diversity term needs the matrix a of a low-rank adapter, which {adapter.kind!r} has not.")
    scorer = lora_ensemble_scorer(config, adapter, features)

    def init(key: Array, params: Params | None = None) -> EnsembleModelState:
        given = params or {}
        check_roles(given, ("trunk", "heads"))
        trunk_key, heads_key, weights_key, adapters_key = jax.random.split(key, 4)
        base = {"trunk": given["trunk"] if "trunk" in given else init_trunk(config, trunk_key)}
        fresh = jax.vmap(lambda key: init_adapter(adapter, base, key))(jax.random.split(adapters_key, members))
        trained = {"adapters": fresh, "heads": _heads(config, given, heads_key, members)}
        return EnsembleModelState(
            params=trained,
            base=base,
            start=None,
            key=weights_key if bootstrap else None,
            optimizer_state=jax.vmap(optimizer.init)(trained),
            step=jnp.int32(0),
        )

    def update(state: EnsembleModelState, batch: PreferenceBatch) -> tuple[EnsembleModelState, Metrics]:
        def loss(params: Params, part: PreferenceBatch, whole: PreferenceBatch) -> tuple[Float[Array, ""], Scores]:
            found = pair_scores(scorer, lora_ensemble_params(state.replace(params=params)), part)
            value = members * _terms(found, part, whole, state.key, label_smoothing, centring)["loss/reward"]
            if diversity:
                value = value - diversity * nuclear_diversity(params["adapters"]) * _share(part, whole)
            return value, found

        gradients, found = accumulated_gradients(loss, state.params, batch, accumulate)
        metrics = _terms(found, batch, batch, state.key, label_smoothing, centring)
        params, optimizer_state, step_metrics = jax.vmap(
            lambda gradients, optimizer_state, params: apply_gradients(optimizer, gradients, optimizer_state, params)
        )(gradients, state.optimizer_state, state.params)
        state = state.replace(params=params, optimizer_state=optimizer_state, step=state.step + 1)
        return state, metrics | jax.tree.map(lambda values: values.mean(axis=0), step_metrics)

    return Algorithm(init=init, rollout=None, update=update)


def linear_ensemble_params(state: EnsembleModelState) -> LinearEnsembleParams:
    """What `linear_ensemble_scorer` takes, from a state of `linear_ensemble_modeling`; the offsets are 0."""
    given = (state.base or {}) | state.params
    return LinearEnsembleParams(trunk=given["trunk"], heads=given["heads"], offset=_no_offset(given["heads"]))


def lora_ensemble_params(state: EnsembleModelState) -> LoRAEnsembleParams:
    """What `lora_ensemble_scorer` takes, from a state of `lora_ensemble_modeling`; the offsets are 0."""
    heads = state.params["heads"]
    return LoRAEnsembleParams(base=state.base, adapters=state.params["adapters"], heads=heads, offset=_no_offset(heads))


def pair_scores(scorer: Callable, params: LinearEnsembleParams | LoRAEnsembleParams, batch: PreferenceBatch) -> Scores:
    """Every member's rewards of the chosen and of the rejected sequences, float32 [B, M] each.

    Both sides go through the model at once.
    """
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch.chosen, batch.rejected)
    members = scorer(params, both.tokens, both.mask).members.T
    return members[: len(batch.margin)], members[len(batch.margin) :]


def bootstrap_weights(key: Array, index: Int[Array, " B"], members: int) -> Float[Array, "B M"]:
    """How often each member has drawn each pair: independent Poisson variables of mean 1.

    They depend on the key and the pair's index only, so a pair has the same weights in every epoch, in whatever batch
    it stands. For many pairs this is the bootstrap: a resample of N pairs of N counts each of them by a binomial
    variable of mean 1 that tends to this one (Oza and Russell 2001, online bagging).

    Args:
        key: a typed key, the same at every update.
        index: which pair of the data each row is, [B].
        members: M.

    Returns:
        Whole numbers from 0 to 10 as float32, [B, M].
    """

    def count(index: Int[Array, ""]) -> Float[Array, " M"]:
        draw = jax.random.uniform(jax.random.fold_in(key, index), (members,), jnp.float32)
        return jnp.sum(draw[:, None] >= jnp.asarray(POISSON, jnp.float32)[None, :], axis=1).astype(jnp.float32)

    return jax.vmap(count)(index)


def _terms(
    found: Scores,
    batch: PreferenceBatch,
    whole: PreferenceBatch,
    key: Array | None,
    label_smoothing: float,
    centring: float,
) -> Metrics:
    """Loss and metrics of some rows: their parts of those of the `whole` batch."""
    chosen, rejected = found

    def average(values: Float[Array, " B"]) -> Float[Array, ""]:
        return mean(values[:, None], counted(batch)[:, None], whole=counted(whole)[:, None])

    def member_losses(chosen: Float[Array, " B"], rejected: Float[Array, " B"]) -> Float[Array, " B"]:
        return bradley_terry(chosen, rejected, batch.margin, label_smoothing, centring, label=batch.label)

    losses = jax.vmap(member_losses, in_axes=1, out_axes=1)(chosen, rejected)
    if key is not None:
        if batch.index is None:
            raise ValueError("bootstrap weights are drawn by pair; fill the `index` of the batch.")
        losses = losses * bootstrap_weights(key, batch.index, chosen.shape[1]).astype(losses.dtype)
    together = (chosen.mean(axis=1), rejected.mean(axis=1))
    return {
        "loss/reward": average(losses.mean(axis=1)),
        "rewards/chosen": average(together[0]),
        "rewards/rejected": average(together[1]),
        "rewards/accuracies": average(preference_accuracy(*together)),
        "rewards/margins": average(together[0] - together[1]),
        "uncertainty/mean": average(jnp.std(chosen - rejected, axis=1)),
    }


def _heads(config: ModelConfig, given: Params, key: Array, members: int) -> Params:
    """The heads that are given, if they are as many as there are members; else fresh ones."""
    if "heads" not in given:
        return init_heads(config, key, members)
    found = given["heads"]["kernel"].shape
    if found != (members, config.width):
        raise ValueError(
            f"params['heads'] has a kernel of shape {list(found)}, but {members} members of width {config.width} need "
            f"{[members, config.width]}."
        )
    return given["heads"]


def _no_offset(heads: Params) -> Float[Array, " M"]:
    return jnp.zeros(heads["kernel"].shape[0], jnp.float32)


def _share(part: PreferenceBatch, whole: PreferenceBatch) -> float:
    """The share of a batch's rows that a part of it has: what does not depend on the rows is split by it."""
    return len(part.margin) / len(whole.margin)


def _squared_distance(tree: Params, start: Params) -> Float[Array, ""]:
    distances = jax.tree.map(lambda a, b: jnp.square(at_least_float32(a) - at_least_float32(b)).sum(), tree, start)
    return sum(jax.tree.leaves(distances))
