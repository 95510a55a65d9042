"""Kinds of uncertain reward models against each other: how sure they are, and what policies make of it.

The way of a kind: `prepare` puts its scores into one unit (standard deviations of its own score on samples of the
initial policy), so that the coefficients of reward rules mean the same for every kind. `uncertainty_panel` asks it
about stored responses, the same for all kinds. `contest_of` sets a policy algorithm on it under every reward rule that
it can serve, all rules and seeds as lanes of one program, with the noise of their seed.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms.compose import Scorer
from rlhf_jax.laboratory.arms import Plan
from rlhf_jax.laboratory.comparison import Contest, OneSeed, Reward, Schedule
from rlhf_jax.laboratory.last_layers import GEOMETRIES, natural_square, pair_features
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.proxies import compare
from rlhf_jax.laboratory.rated_kinds import RATED, rate
from rlhf_jax.laboratory.setting import Setting, gold_of, repeated, sample
from rlhf_jax.laboratory.uncertain_kinds import COMPARED, Kind, Labels
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.rewards.bradley_terry import check_rewards
from rlhf_jax.rewards.ellipsoid import Geometry, uncertainty
from rlhf_jax.rewards.ensemble import lower_confidence_bound, member_offset, single, uncertainty_weighted, worst_case
from rlhf_jax.rewards.last_layer import advpo, radius_from, samplewise
from rlhf_jax.rewards.transforms import select
from rlhf_jax.types import Params, PreferenceBatch, Score, Sequences, Transform

KINDS: Mapping[str, Kind] = MappingProxyType({**COMPARED, **RATED})
"""Every kind of reward model by name; "single" is what the others are compared with."""


class Study(NamedTuple):
    """What all kinds have in common.

    Attributes:
        options: of the world, the labels and the reward models.
        setting: where.
        labels: of every seed.
        initial: samples of the initial policy.
        initial_gold: their gold reward.
    """

    options: Options
    setting: Setting
    labels: Labels
    initial: Sequences
    initial_gold: Float[np.ndarray, " n"]

    def scale(self, gold: np.ndarray) -> np.ndarray:
        """Gold in standard deviations of the initial policy's."""
        return (gold - self.initial_gold.mean()) / self.initial_gold.std()


def begin(options: Options, setting: Setting, rated: bool, key: Array, samples: int = 1024) -> Study:
    """Samples of the initial policy, and the labels of every seed.

    Args:
        options: number and noise of the labels.
        setting: where.
        rated: whether ratings are wanted, which only the built-in world has.
        key: of everything random.
        samples: of the initial policy.

    Raises:
        ValueError: the gold reward is not finite somewhere, or the same everywhere.
    """
    initial_key, pairs_key, ratings_key = jax.random.split(key, 3)
    prompts = repeated(setting.world.prompts, np.arange(samples) % len(setting.world.prompts.tokens))
    initial = sample(setting, prompts, initial_key)
    gold = gold_of(setting.world, initial)
    check_rewards(gold, "the gold reward")
    if gold.std() == 0:
        raise ValueError("the gold reward is the same for all samples of the initial policy; give one that differs.")

    def drawn(draw: Callable[..., Any], key: Array) -> Any:
        rngs = np.random.default_rng(options.seed).spawn(options.seeds)
        each = [
            draw(setting, own, options.pairs, options.label_noise, rng)
            for own, rng in zip(jax.random.split(key, options.seeds), rngs, strict=True)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    labels = Labels(drawn(compare, pairs_key), drawn(rate, ratings_key) if rated else None)
    return Study(options, setting, labels, initial.sequences, gold)


class Rule(NamedTuple):
    """A reward rule.

    Attributes:
        transform: what it does.
        needs: sets of what a kind may offer, of which one must be there.
    """

    transform: Transform
    needs: tuple[frozenset[str], ...]


_EITHER = (frozenset({"members"}), frozenset({"epistemic"}))
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "mean": Rule(single(), (frozenset(),)),
        "WCO": Rule(worst_case(), (frozenset({"members"}),)),
        "UWO": Rule(uncertainty_weighted(), _EITHER),
        "LCB": Rule(lower_confidence_bound(), _EITHER),
        "AdvPO": Rule(advpo(), (frozenset({"features", "head"}),)),
        "sample-wise": Rule(samplewise(), (frozenset({"features", "head"}),)),
    }
)
"""Reward rules by name, the plain score first."""


def served(rules: Sequence[str], offered: frozenset[str]) -> tuple[str, ...]:
    """The rules that a kind can serve, in the order given.

    Example:
        >>> served(("mean", "WCO", "UWO", "AdvPO"), frozenset({"epistemic"}))
        ('mean', 'UWO')
    """
    return tuple(name for name in rules if any(needed <= offered for needed in RULES[name].needs))


class Prepared(NamedTuple):
    """A kind's models of every seed (seeds on axis 0), and what reward rules need of them.

    Attributes:
        params: of its scorer.
        centre: mean score on samples of the initial policy, [seeds].
        spread: standard deviation of it there, the unit of all that follows, [seeds].
        geometry: of the last layer; None, like the next two, where the score is not one head on features.
        radius: b of AdvPO and of the sample-wise penalty, [seeds].
        uncertainty: mean of the sample-wise penalty on samples of the initial policy, [seeds].
        reference: Score of the chosen response to every training prompt, [seeds, prompts, …].
    """

    params: Params
    centre: Float[Array, " *seeds"]
    spread: Float[Array, " *seeds"]
    geometry: Geometry | None
    radius: Float[Array, " *seeds"] | None
    uncertainty: Float[Array, " *seeds"] | None
    reference: Score


def standardised(scorer: Scorer) -> Scorer:
    """`score(prepared of one seed, tokens, mask)`: a kind's Score in standard deviations of its mean score."""

    def score(own: Prepared, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        found = scorer(own.params, tokens, mask)
        shrunk = {
            name: getattr(found, name) / own.spread
            for name in ("members", "epistemic", "aleatoric")
            if getattr(found, name) is not None
        }
        return found.replace(mean=(found.mean - own.centre) / own.spread, **shrunk)

    return score


def offers(kind: Kind, score: Score) -> frozenset[str]:
    """What a kind offers to rules: the fields that its Score has, and "head" if its features are multiplied by one."""
    fields = ("members", "features", "epistemic", "aleatoric")
    head = {"head"} if kind.head is not None else set()
    return frozenset({name for name in fields if getattr(score, name) is not None} | head)


def prepare(
    options: Options, setting: Setting, kind: Kind, params: Params, pools: PreferenceBatch, initial: Sequences
) -> tuple[Prepared, frozenset[str]]:
    """Centres, units, geometries and references of every seed, and what the kind offers.

    Args:
        options: features, regularisation, B of AdvPO.
        setting: shape of the trunks, number of prompts.
        kind: what the parameters are of.
        params: from `kind.train`.
        pools: the comparisons of every seed, [seeds, N, …]; the geometry is that of their responses.
        initial: samples of the initial policy.

    Raises:
        ValueError: the score of a seed is the same for all samples, or its geometry cannot be factored.
    """
    scorer, prompts = kind.scorer(options, setting), len(setting.world.prompts.tokens)
    offered: set[str] = set()

    def one(lane: tuple[Params, PreferenceBatch], initial: Sequences) -> Prepared:
        params, pool = lane
        params = with_offset(params, scorer(params, initial.tokens, initial.mask))
        before = scorer(params, initial.tokens, initial.mask)
        offered.update(offers(kind, before))
        centre, spread = before.mean.mean(), before.mean.std()
        own = Prepared(params, centre, spread, None, None, None, before)
        chosen = jax.tree.map(lambda leaf: leaf[:prompts], pool.chosen)
        reference = standardised(scorer)(own, chosen.tokens, chosen.mask)
        own = own._replace(reference=Score(mean=reference.mean, features=reference.features))
        if kind.head is None or before.features is None:
            return own
        pair = pair_features(options, setting, params.trunk if hasattr(params, "trunk") else params["trunk"], pool)
        head = kind.head(params)
        shape = GEOMETRIES[kind.geometry](pair, head, options.regularisation)
        if options.advpo_value is None:
            natural = natural_square(shape, pair, head, options.regularisation)
            radius = radius_from(multiple=options.advpo_multiple, scale=natural) / spread
        else:
            radius = radius_from(value=options.advpo_value) / spread
        mean = uncertainty(shape, before.features, radius).mean()
        return own._replace(geometry=shape, radius=radius, uncertainty=mean)

    prepared = jax.jit(over_lanes(one))((params, pools), initial)
    for seed, unit in enumerate(np.asarray(prepared.spread)):
        if not unit > 0:
            raise ValueError(f"{kind.label} of seed {seed} scores all samples of the initial policy alike ({unit}).")
        if prepared.radius is not None and not np.isfinite(prepared.radius[seed]):
            raise ValueError(
                f"the last-layer geometry of {kind.label}, seed {seed}, cannot be factored in float32; raise the "
                f"regularisation (it is {options.regularisation})."
            )
    return prepared, frozenset(offered)


def with_offset(params: Params, score: Score) -> Params:
    """Parameters whose members (or whose mean) average 0 on these samples, where they have an offset."""
    if not hasattr(params, "offset"):
        return params
    return params.replace(offset=score.mean.mean() if score.members is None else member_offset(score.members))


class RuledContest(Contest):
    """A contest whose lane `rule * seeds + seed` is rewarded by one rule, with everything random as its seed has it."""

    __slots__ = ()

    def key_of(self, what: str, seed: jax.Array) -> jax.Array:
        """One of the keys of a lane's seed."""
        return super().key_of(what, seed % len(self.reward.data.centre))

    def one_seed(self, seed: jax.Array, data: Prepared) -> OneSeed:
        """What a lane is rewarded with."""
        seeds = len(self.reward.data.centre)
        return self.reward.of((jax.tree.map(lambda leaf: leaf[seed % seeds], data), seed // seeds))


class Coefficients(NamedTuple):
    """Weights of the penalties, in standard deviations of the score.

    Attributes:
        uwo: of the variance.
        lcb: of the standard deviation.
    """

    uwo: float
    lcb: float


def reward_of(scorer: Scorer, rules: Sequence[str], prepared: Prepared, weights: Coefficients) -> Reward:
    """A kind as the reward of a `RuledContest`."""
    rule = select([RULES[name].transform for name in rules])

    def of(given: tuple[Prepared, jax.Array]) -> OneSeed:
        own, place = given
        states = {
            "UWO": lambda: RULES["UWO"].transform.init(weights.uwo),
            "LCB": lambda: RULES["LCB"].transform.init(weights.lcb),
            "AdvPO": lambda: RULES["AdvPO"].transform.init(own.geometry, own.radius),
            "sample-wise": lambda: RULES["sample-wise"].transform.init(own.geometry, own.radius, own.uncertainty),
        }
        state = rule.init(place, tuple(states.get(name, tuple)() for name in rules))
        return OneSeed(params=own, state=state, reference=own.reference, spread=jnp.ones(()))

    return Reward(scorer=standardised(scorer), rule=rule, data=prepared, of=of)


def contest_of(
    plan: Plan, setting: Setting, reward: Reward, schedule: Schedule, key: Array, rules: int
) -> RuledContest:
    """The contest of a kind: `schedule.seeds` seeds for each of its rules."""
    lanes = Schedule(schedule.seeds * rules, schedule.updates, schedule.report_every, schedule.measured)
    return RuledContest(plan=plan, setting=setting, reward=reward, schedule=lanes, key=key)


def flops(options: Options, setting: Setting, kind: Kind, params: Params, rows: int = 64) -> float:
    """Floating-point operations of scoring a batch, as the compiler counts them before it optimises.

    The body of a loop counts once, so of a trunk one layer: ratios between kinds are nearer to 1 than with more.
    """
    own = jax.tree.map(lambda leaf: leaf[0], params)
    tokens = jnp.zeros((rows, setting.world.prompts.tokens.shape[1] + setting.world.response_length), jnp.int32)
    lowered = jax.jit(kind.scorer(options, setting)).lower(own, tokens, jnp.ones(tokens.shape, bool))
    return float(lowered.cost_analysis()["flops"])


def parameters_trained(kind: Kind, params: Params) -> int:
    """How many numbers training changes, in one seed."""
    own = jax.eval_shape(lambda params: jax.tree.map(lambda leaf: leaf[0], params), params)
    return sum(leaf.size for leaf in jax.tree.leaves(kind.trained(own)))
