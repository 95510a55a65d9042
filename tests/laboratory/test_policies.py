import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.laboratory.policies import best_of_n, lane_table, make_lane, train_policies
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.training.metrics import MetricsWriter, read_metrics


@pytest.fixture(scope="module")
def trained(options, setting, proxies, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        history, policies = train_policies(options, setting, proxies, jax.random.key(6), metrics)
    return history, policies, read_metrics(path)


def test_lanes_are_in_order_of_method_coefficient_and_seed(options):
    table = lane_table(dataclasses.replace(options, methods=("PPO", "UWO"), kl_coefficients=(0.0, 0.1)))
    assert [tuple(lane.values()) for lane in table] == [
        (method, coefficient, seed) for method in ("PPO", "UWO") for coefficient in (0.0, 0.1) for seed in (0, 1)
    ]


def test_the_history_holds_every_response_of_every_lane(options, setting, trained):
    history, policies, _ = trained
    lanes, length = 12, setting.world.response_length
    for name in ("rows", "proxy", "rewards", "spread", "uncertainty"):
        assert history[name].shape == (lanes, 2, 4)
    assert history["tokens"].shape == history["mask"].shape == (lanes, 2, 4, length)
    assert jax.tree.leaves(policies)[0].shape[0] == lanes
    assert all(values.shape == (lanes, 2) for values in history["metrics"].values())
    assert (history["rows"] < 16).all()


def test_one_line_is_written_a_lane_and_report(options, trained):
    _, _, lines = trained
    assert [line["step"] for line in lines] == [1] * 12 + [2] * 12
    seen = [(line["method"], line["kl_coefficient"], line["seed"]) for line in lines[:12]]
    assert seen == [tuple(lane.values()) for lane in lane_table(options)]
    assert {"objective/kl", "rewards/proxy", "policy/max_logprob_gap", "completions/mean_length"} <= set(lines[0])


def test_methods_begin_with_the_same_samples_and_seeds_do_not(trained):
    history, _, _ = trained
    first = history["tokens"][:, 0].reshape(6, 2, -1)
    np.testing.assert_array_equal(first, np.broadcast_to(first[:1], first.shape))
    assert (first[0, 0] != first[0, 1]).any()
    assert (history["tokens"][:, 0] != history["tokens"][:, 1]).any(axis=(1, 2)).all()


def test_rules_give_different_rewards_for_the_same_score(trained):
    history, _, _ = trained
    shown = {name: history["metrics"][name][:, 0].reshape(6, 2) for name in ("rewards/proxy", "rewards/transformed")}
    np.testing.assert_allclose(shown["rewards/proxy"], shown["rewards/proxy"][:1].repeat(6, axis=0), rtol=1e-5)
    np.testing.assert_allclose(shown["rewards/transformed"][0], shown["rewards/proxy"][0], rtol=1e-5)
    for one, other in zip(*np.triu_indices(6, 1), strict=True):
        assert np.abs(shown["rewards/transformed"][one] - shown["rewards/transformed"][other]).max() > 1e-6
    np.testing.assert_allclose(history["metrics"]["val/first_ratio"], 1.0, atol=1e-4)
    assert history["metrics"]["policy/max_logprob_gap"].max() < 1e-4


def test_a_lane_alone_gives_the_numbers_it_has_among_others(options, setting, proxies, trained):
    """The lane alone is vmapped; among others it was mapped, which is the rule on CPUs."""
    history, _, _ = trained
    start, advance = make_lane(options, setting, jax.random.key(6))
    place = 9  # AdvPO, seed 1
    lane = {
        "method": jnp.array([options.methods.index("AdvPO")], jnp.int32),
        "kl_coefficient": jnp.full(1, 0.125),
        "seed": jnp.array([1], jnp.int32),
    }
    one = jax.devices()[:1]
    value_trunk = jax.tree.map(lambda leaf: leaf[0], setting.trunks)
    carry = jax.jit(over_lanes(start, "vmap", one))(lane, setting.policy, value_trunk, proxies)
    _, kept = jax.jit(over_lanes(advance, "vmap", one))(carry, setting.world.prompts, proxies)
    assert lane_table(options)[place] == {"method": "AdvPO", "kl_coefficient": 0.125, "seed": 1}
    np.testing.assert_array_equal(kept["tokens"][0, 0], history["tokens"][place, 0])
    for name in ("proxy", "spread", "uncertainty"):
        np.testing.assert_allclose(kept[name][0, 0], history[name][place, 0], rtol=1e-4, atol=1e-5)


def test_a_proxy_that_becomes_nan_is_an_error(options, setting, proxies, tmp_path):
    broken = proxies._replace(spread=proxies.spread.at[1].set(jnp.nan))
    with pytest.raises(ValueError, match="the proxy reward model of seed 1 returned nan for row 0"):
        with MetricsWriter(tmp_path / "metrics.jsonl") as metrics:
            train_policies(options, setting, broken, jax.random.key(6), metrics)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 12


def test_a_reward_rule_that_becomes_nan_is_an_error_naming_it(options, setting, proxies, tmp_path):
    broken = proxies._replace(mean_uncertainty=proxies.mean_uncertainty.at[1].set(jnp.nan))
    with pytest.raises(ValueError, match="the reward rule sample-wise of seed 1 returned nan for row 0"):
        with MetricsWriter(tmp_path / "metrics.jsonl") as metrics:
            train_policies(options, setting, broken, jax.random.key(6), metrics)


def test_best_of_n_ranks_by_each_rule(options, setting, proxies):
    curves = best_of_n(options, setting, proxies, lambda gold: gold, jax.random.key(7))
    assert list(curves) == ["single", "mean", "WCO", "UWO"]
    for curve in curves.values():
        assert curve["n"].tolist() == [1, 2, 3, 4]
        assert curve["gold"].shape == curve["proxy"].shape == (2, 4)
        assert (np.diff(curve["proxy"], axis=1) >= -1e-6).all()
    # With one answer nothing is chosen: every rule has the same gold.
    np.testing.assert_allclose(curves["UWO"]["gold"][:, 0], curves["single"]["gold"][:, 0])
