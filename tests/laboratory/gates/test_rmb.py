import numpy as np
from scipy.stats import binom

from rlhf_jax.laboratory.gates.rmb import FEATURES, Judges, beats_all, benchmark, spiked_judges, varied_judges, voting

GOLD = np.eye(FEATURES)[0]


def judges(*noise, blind=False):
    weights = np.zeros((len(noise), FEATURES)) if blind else np.repeat(GOLD[None], len(noise), axis=0)
    return Judges(weights=weights, noise=np.array(noise), spikes=np.zeros(len(noise)))


def test_who_sees_the_gold_is_always_right_and_a_list_is_harder_than_a_pair():
    losers = np.repeat([1, 6], 2000)
    right = beats_all(np.random.default_rng(0), judges(0.0, 1.0), GOLD, losers)
    assert right[0].all()
    pairs, lists = right[1].reshape(2, -1).mean(axis=1)
    assert lists < pairs - 0.1


def test_who_is_blind_is_right_by_chance():
    """1 of 2 for a pair, 1 of 4 for a list with three losers; four standard errors of 4,000 items are 0.032."""
    right = beats_all(np.random.default_rng(0), judges(1.0, blind=True), GOLD, np.repeat([1, 3], 4000))[0]
    np.testing.assert_allclose(right.reshape(2, -1).mean(axis=1), [0.5, 0.25], atol=0.032)


def test_a_list_is_won_where_the_best_beats_every_loser_one_by_one(monkeypatch):
    """Against a loop, with the scores and the gold read off what was drawn."""
    drawn = {}
    scores = Judges.scores
    monkeypatch.setattr(
        Judges, "scores", lambda self, rng, x: drawn.setdefault("r", scores(self, rng, drawn.setdefault("x", x)))
    )
    losers = np.array([1, 2, 3, 2])
    right = beats_all(np.random.default_rng(3), judges(1.0, 2.0), GOLD, losers)
    for item, count in enumerate(losers):
        rows = item * (losers.max() + 1) + np.arange(count + 1)
        best = max(rows, key=lambda one: drawn["x"][one] @ GOLD)
        for model in range(2):
            wins = all(drawn["r"][model, best] > drawn["r"][model, one] for one in rows if one != best)
            assert right[model, item] == wins


def test_models_are_as_they_are_described():
    rng = np.random.default_rng(0)
    varied, spiked = varied_judges(rng, 500, GOLD + 1.0), spiked_judges(rng, 500, GOLD + 1.0)
    seen = varied.weights != 0.0
    assert 0.6 < seen.mean() < 0.8  # blind to 0.3 of the features on average
    assert (varied.spikes == 0.0).all() and (spiked.weights == GOLD + 1.0).all()
    assert varied.noise.std() > 4 * spiked.noise.std()
    flat = spiked._replace(noise=np.zeros(500))
    error = flat.scores(rng, np.zeros((100, FEATURES)))
    assert set(np.unique(error)) == {0.0, 6.0}
    assert abs((error > 0).mean() - flat.spikes.mean()) < 0.005


def test_votes_are_expectations_over_the_items_drawn():
    """By hand from the same draws: 3 votes over 1, p²(3 − 2p) − p, and the distance of 5 votes from their limit."""
    noisy, wrong, gap = voting(2, items=50, few=1, many=3, limit=5).gates
    for seed, rng in enumerate(np.random.default_rng(1).spawn(2)):
        symmetric = rng.uniform(0.55, 0.85, 50)
        systematic = np.where(rng.random(50) < 0.3, rng.uniform(0.15, 0.45, 50), symmetric)
        misled = systematic[systematic < 0.5]
        for gate, p in ((noisy, symmetric), (wrong, misled)):
            np.testing.assert_allclose(gate.values[seed], np.mean(p**2 * (3 - 2 * p) - p))
        five = binom.sf(2, 5, systematic).mean()
        np.testing.assert_allclose(gap.values[seed], abs(five - (systematic > 0.5).mean()))


def test_stages_have_one_number_a_seed():
    for stage in (benchmark(3, models=4, items=40), voting(3, items=40)):
        assert [gate.values.shape for gate in stage.gates] == [(3,)] * len(stage.gates)
        assert len({gate.name for gate in stage.gates}) == len(stage.gates)
