"""Algorithms against each other: every seed of an algorithm is a lane of one compiled program.

The life of an arm: the policy starts as the initial one. `report_every` times, prompts are drawn and the step that
`algorithms.compose` made of algorithm, scorer and reward rule is taken; then the policy is *measured* on responses of
its own to held-out prompts, which no algorithm trains on and which do not count as samples. So all algorithms, those
that learn from another policy's responses too, are measured in one way.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.compose import ComposedState, Scorer, compose
from rlhf_jax.algorithms.rollouts import rollout_metrics, taken_scores
from rlhf_jax.data.synthetic.modular import ModularSums, modular_scorer
from rlhf_jax.evaluation.frontier import Curves
from rlhf_jax.laboratory.arms import ARMS, Plan, build
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.policies import RULES, rule_state
from rlhf_jax.laboratory.proxies import Proxies, compare, prepare, train_members
from rlhf_jax.laboratory.setting import Setting
from rlhf_jax.models.heads import init_value_head
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.rewards.bradley_terry import check_rewards, ensemble_scorer
from rlhf_jax.rewards.ensemble import single
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Metrics, Params, Prompts, Score, Sequences, Transform


class OneSeed(NamedTuple):
    """What a seed is rewarded with.

    Attributes:
        params: of the scorer.
        state: of the reward rule, at the start.
        reference: Score of a reference response to every training prompt; None where no rule compares.
        spread: standard deviation of the score on samples of the initial policy, the unit of the proxy, [].
    """

    params: Params
    state: Any
    reference: Score | None
    spread: jax.Array


class Reward(NamedTuple):
    """What is rewarded in a comparison.

    Attributes:
        scorer: `score(params, tokens, mask) -> Score`.
        rule: the transform that makes rewards of scores.
        data: of every seed, seeds on axis 0.
        of: `of(data of one seed) -> OneSeed`.
    """

    scorer: Scorer
    rule: Transform
    data: Any
    of: Callable[[Any], OneSeed]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long algorithms run, and how they are measured.

    Attributes:
        seeds: repetitions of every algorithm.
        updates: updates of every one.
        report_every: updates between two measurements.
        measured: responses to each held-out prompt that a policy is measured on.
    """

    seeds: int
    updates: int
    report_every: int
    measured: int


def checked(task: ModularSums, seeds: int) -> Reward:
    """The step checker of modular sums as the reward of every seed."""

    def of(nothing: jax.Array) -> OneSeed:
        return OneSeed(params=(), state=(), reference=None, spread=jnp.ones(()))

    return Reward(scorer=modular_scorer(task), rule=single(), data=jnp.zeros(seeds), of=of)


def modelled(options: Options, setting: Setting, proxies: Proxies, rule: str) -> Reward:
    """Proxy reward models under one of `laboratory.policies.RULES`."""
    alone = dataclasses.replace(options, methods=(rule,))

    def of(mine: Proxies) -> OneSeed:
        (state,) = rule_state(alone, jnp.int32(0), mine).states
        return OneSeed(params=mine.ensembles, state=state, reference=mine.reference, spread=mine.spread)

    scorer = ensemble_scorer(setting.reward_config, options.features, lead=0)
    return Reward(scorer=scorer, rule=RULES[rule], data=proxies, of=of)


def proxies_of(options: Options, setting: Setting, initial: Sequences, key: jax.Array) -> Proxies:
    """Reward models of every seed, each trained on noisy comparisons of its own.

    Args:
        options: of comparisons and reward models.
        setting: where.
        initial: samples of the initial policy, on which scores are centred and scaled.
        key: of everything random.
    """
    compare_key, members_key = jax.random.split(key)
    keys, rngs = jax.random.split(compare_key, options.seeds), np.random.default_rng(options.seed).spawn(options.seeds)
    pools = [
        compare(setting, own, options.pairs, options.label_noise, rng) for own, rng in zip(keys, rngs, strict=True)
    ]
    pools = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pools)
    return prepare(options, setting, train_members(options, setting, pools, members_key), pools, initial)


class Contest(NamedTuple):
    """All that the algorithms of a comparison have in common.

    Attributes:
        plan: what their options share.
        setting: where they run.
        reward: what is rewarded.
        schedule: how long.
        key: of states, prompts and samples.
    """

    plan: Plan
    setting: Setting
    reward: Reward
    schedule: Schedule
    key: jax.Array

    def key_of(self, what: Literal["state", "prompts", "measure"], seed: jax.Array) -> jax.Array:
        """One of the keys of a seed."""
        number = ("state", "prompts", "measure").index(what)
        return jax.random.fold_in(jax.random.fold_in(self.key, number), seed)

    def one_seed(self, seed: jax.Array, data: Any) -> OneSeed:
        """What a seed is rewarded with."""
        return self.reward.of(jax.tree.map(lambda leaf: leaf[seed], data))


class Shared(NamedTuple):
    """The arrays that all lanes of a program share."""

    policy: Params
    value: Params
    prompts: Prompts
    held_out: Prompts
    data: Any


def shared_arrays(contest: Contest) -> Shared:
    """The arrays of a contest that its programs take as arguments."""
    setting = contest.setting
    return Shared(
        policy=setting.policy,
        value={
            "head": init_value_head(contest.plan.value),
            "trunk": jax.tree.map(lambda leaf: leaf[0], setting.trunks),
        },
        prompts=setting.world.prompts,
        held_out=setting.world.held_out,
        data=contest.reward.data,
    )


def measure(
    contest: Contest, policy: Params, seed: jax.Array, count: jax.Array, shared: Shared
) -> dict[str, jax.Array]:
    """A policy on responses of its own to the held-out prompts, after `count` updates.

    Returns:
        "kl" from the initial policy (k1, nats a response) and "proxy" (in units of `OneSeed.spread`), [], and the
        responses: "tokens" and "mask", [N, T].
    """
    plan, given = contest.plan, contest.one_seed(seed, shared.data)
    noise = jax.random.fold_in(contest.key_of("measure", seed), count)
    taken = generate(plan.model, policy, shared.held_out, noise, plan.sampling, contest.schedule.measured)
    reference_logprob = taken_scores(plan.model, shared.policy, taken, plan.sampling.logprob_temperature)[0]
    proxy = contest.reward.scorer(given.params, taken.sequences.tokens, taken.sequences.mask).mean
    kl = rollout_metrics(taken, reference_logprob)["objective/kl"]
    return {"kl": kl, "proxy": proxy.mean() / given.spread, "tokens": taken.tokens, "mask": taken.mask}


def first_measurement(contest: Contest) -> dict[str, np.ndarray]:
    """The initial policy as `measure` finds it, by seed: where all algorithms begin."""

    def lane(seed: jax.Array, shared: Shared) -> dict[str, jax.Array]:
        return measure(contest, shared.policy, seed, jnp.int32(0), shared)

    return jax.device_get(_on_seeds(lane, contest))


def run_arm(name: str, contest: Contest, first: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All seeds of one algorithm.

    Everything random depends on the seed and the update alone, so that algorithms with as many responses a prompt see
    the same prompts.

    Args:
        name: one of `ARMS`.
        contest: what the algorithms have in common.
        first: from `first_measurement`.

    Returns:
        The history: what `measure` gives, before the first update and after every `report_every`, [seeds, reports + 1,
        ...]; and of algorithms that learn from samples of their own "first_ratio" and "logprob_gap" of every update,
        [seeds, updates].

    Raises:
        ValueError: the proxy or the KL became NaN.
    """
    plan, schedule, arm, algorithm = contest.plan, contest.schedule, ARMS[name], build(name, contest.plan)
    step = compose(algorithm, contest.reward.scorer, contest.reward.rule)
    asked = plan.responses // arm.rows(plan)

    def lane(seed: jax.Array, shared: Shared) -> tuple[dict[str, jax.Array], Metrics]:
        given = contest.one_seed(seed, shared.data)

        def update(state: ComposedState, count: jax.Array) -> tuple[ComposedState, Metrics]:
            prompt_key = jax.random.fold_in(contest.key_of("prompts", seed), count)
            rows = jax.random.randint(prompt_key, (asked,), 0, len(shared.prompts.tokens))
            index = count * asked + jnp.arange(asked, dtype=jnp.int32)
            drawn = Prompts(tokens=shared.prompts.tokens[rows], mask=shared.prompts.mask[rows], index=index)
            reference = jax.tree.map(lambda leaf: leaf[rows], given.reference)
            state, output = step(state, drawn, given.params, reference)
            names = {"first_ratio": "val/first_ratio", "logprob_gap": "policy/max_logprob_gap"}
            return state, {ours: output.metrics[theirs] for ours, theirs in names.items() if arm.own_samples}

        def report(state: ComposedState, counts: jax.Array):
            state, metrics = jax.lax.scan(update, state, counts)
            return state, (measure(contest, arm.policy(state.algorithm), seed, counts[-1] + 1, shared), metrics)

        params = {"policy": shared.policy} | ({"value": shared.value} if name == "ppo" else {})
        state = algorithm.init(contest.key_of("state", seed), params)
        counts = jnp.arange(schedule.updates, dtype=jnp.int32).reshape(-1, schedule.report_every)
        start = ComposedState(algorithm=state, transform=given.state)
        _, (measured, metrics) = jax.lax.scan(report, start, counts)
        return measured, {name: values.reshape(-1) for name, values in metrics.items()}

    later, metrics = jax.device_get(_on_seeds(lane, contest))
    history = jax.tree.map(lambda one, more: np.concatenate([one[:, None], more], axis=1), first, later)
    check_rewards(history["proxy"], f"{name}: the proxy reward")
    check_rewards(history["kl"], f"{name}: the KL")
    return history | metrics


def _on_seeds(lane: Callable[[jax.Array, Shared], Any], contest: Contest) -> Any:
    """`lane(seed, shared)` for every seed, as one program."""
    seeds = jnp.arange(contest.schedule.seeds, dtype=jnp.int32)
    return jax.jit(over_lanes(lane))(seeds, shared_arrays(contest))


def curves_of(history: dict[str, np.ndarray], contest: Contest, scale: Callable[[np.ndarray], np.ndarray]) -> Curves:
    """What one algorithm's history says, by samples drawn.

    Args:
        history: from `run_arm`.
        contest: whose world has the gold reward.
        scale: puts the gold reward into the unit wanted.
    """
    world, schedule = contest.setting.world, contest.schedule
    tokens, mask = history["tokens"], history["mask"]
    prompts = np.repeat(np.asarray(world.held_out.tokens), schedule.measured, axis=0)
    every = np.broadcast_to(prompts, (*tokens.shape[:2], *prompts.shape)).reshape(-1, prompts.shape[1])
    flat = [array.reshape(-1, array.shape[-1]) for array in (tokens, mask)]
    gold = scale(world.gold(every, *flat)).reshape(tokens.shape[:3]).mean(axis=-1)
    return Curves(
        samples=np.arange(tokens.shape[1]) * schedule.report_every * contest.plan.responses,
        kl=np.concatenate([np.zeros((len(tokens), 1)), history["kl"][:, 1:]], axis=1),
        gold=gold,
        proxy=history["proxy"].astype(np.float64),
    )
