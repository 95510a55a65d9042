"""How much of what a policy gains is length, in a world whose annotators like long answers.

The claims (Singhal et al., "A Long Way to Go: Investigating Length Correlations in RLHF", arXiv:2310.03716): PPO makes
answers longer; the reward model goes with length more than the gold reward does; and PPO on a reward of length alone
recovers most of what PPO on the reward model wins.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.evaluation.length import longer_is_chosen, within_prompt_correlation
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.laboratory.comparison import OneSeed, Reward
from rlhf_jax.laboratory.gates.gate import PRECONDITION, Gate
from rlhf_jax.laboratory.gates.report import Stage
from rlhf_jax.laboratory.gates.smoothing import proxies_of, scores_of, train_by_epoch
from rlhf_jax.laboratory.gates.world import answer, make_ground, setting_of, train_ppo
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.setting import Setting
from rlhf_jax.rewards.ensemble import single
from rlhf_jax.rewards.length import length_reward
from rlhf_jax.types import Score

SOURCE = "A Long Way to Go, 2310.03716"
LIKING = 0.5
"""What annotators pay for a standard deviation of length, in standard deviations of the rubric."""
KL_COEFFICIENT = 0.04
"""Of PPO, as in the paper's code."""
SHARE = 0.5
"""The share of PPO's gain that is most of it."""


def long_setting(options: Options) -> Setting:
    """The built-in setting, whose gold reward is the rubric and a liking for length, both standardised."""
    setting = setting_of(options)
    seen = answer(setting, 8, jax.random.key(options.seed + 2))
    rubric = setting.world.gold
    gold_centre, gold_spread = seen.gold.mean(), seen.gold.std()
    length_centre, length_spread = seen.lengths.mean(), seen.lengths.std()

    def gold(prompts: np.ndarray, responses: np.ndarray, mask: np.ndarray) -> np.ndarray:
        lengths = mask.sum(axis=1, dtype=np.float64)
        worth = (rubric(prompts, responses, mask) - gold_centre) / gold_spread
        return worth + LIKING * (lengths - length_centre) / length_spread

    return setting._replace(world=setting.world._replace(name="built-in world, long answers liked", gold=gold))


def length_only(response_length: int, seeds: int) -> Reward:
    """A reward of length alone for every seed, largest for answers that use all the room there is."""

    def score(params: tuple[()], tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        lengths = mask[:, -response_length:].sum(axis=1).astype(jnp.float32)
        return Score(mean=length_reward(lengths, response_length))

    def of(nothing: jax.Array) -> OneSeed:
        return OneSeed(params=(), state=(), reference=None, spread=jnp.ones(()))

    return Reward(scorer=score, rule=single(), data=jnp.zeros(seeds), of=of)


def length_correlation(by: Float[np.ndarray, "P N"], lengths: Float[np.ndarray, "P N"]) -> float:
    """Pearson correlation with length over the answers to one prompt, averaged over prompts; 0 where nothing varies."""
    each = within_prompt_correlation(list(by), list(lengths))
    known = each[~np.isnan(each)]
    return float(known.mean()) if known.size else 0.0


def length_gates(options: Options) -> Stage:
    """PPO on reward models and on length alone, where annotators like long answers.

    Args:
        options: sizes.
    """
    setting = long_setting(options)
    ground = make_ground(options, setting)
    models = train_by_epoch(ground, None).params
    scores = scores_of(ground, models).astype(np.float64).reshape(options.seeds, *ground.gold.shape)
    of_gold = length_correlation(ground.gold, ground.lengths)
    of_model = np.array([length_correlation(one, ground.lengths) for one in scores])
    by_model = train_ppo(ground, proxies_of(ground, models), KL_COEFFICIENT)
    by_length = train_ppo(ground, length_only(setting.world.response_length, options.seeds), KL_COEFFICIENT)
    gain = {
        name: one.curves.gold[:, -1] - one.curves.gold[:, 0]
        for name, one in {"reward model": by_model, "length alone": by_length}.items()
    }
    gates = [
        Gate("gold gained by PPO on the reward model", PRECONDITION, gain["reward model"], low=0.1, unit="s.d."),
        Gate("tokens gained by PPO", SOURCE, by_model.lengths[:, -1] - by_model.lengths[:, 0], low=0.0, unit="tokens"),
        Gate("correlation with length: reward model less gold", SOURCE, of_model - of_gold, low=0.0),
        Gate(
            f"gold gained by PPO on length alone less {SHARE:g} x that on the reward model",
            SOURCE,
            gain["length alone"] - SHARE * gain["reward model"],
            low=0.0,
            unit="s.d.",
        ),
    ]
    chosen, rejected = (np.asarray(side.mask.sum(axis=-1)) for side in (ground.pools.chosen, ground.pools.rejected))
    longer = np.array([longer_is_chosen(*pair) for pair in zip(chosen, rejected, strict=True)])
    rows = [
        row("share of comparisons whose chosen response is longer", "1", longer),
        row("correlation of gold with length within a prompt", "1", np.array([of_gold])),
        row("correlation of the reward model with length within a prompt", "1", of_model),
        row("tokens of the initial policy", "tokens", by_model.lengths[:, 0]),
    ]
    rows += [
        row(f"tokens after PPO on {name}", "tokens", one.lengths[:, -1])
        for name, one in (("the reward model", by_model), ("length alone", by_length))
    ]
    rows.append(row("gold gained by PPO on length alone", "s.d.", gain["length alone"]))
    return Stage(gates, rows)
