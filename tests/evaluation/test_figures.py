"""Every figure is written, as a PNG, without touching matplotlib's global state, for many seeds and for one."""

import numpy as np
import pytest

from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation.overoptimization import fit_rl

SEEDS = pytest.mark.parametrize("seeds", [3, 1])
METHODS = ("PPO", "AdvPO", "UWO", "WCO")


def runs(seeds: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    step = np.arange(20.0)[None, :]
    distance = np.sqrt(step) * rng.uniform(0.8, 1.2, size=(seeds, 1))
    gold = distance * (1.0 - 0.4 * np.log(np.maximum(distance, 1e-3)))
    return {method: {"kl": distance**2, "gold": gold + i, "proxy": 2.0 * distance} for i, method in enumerate(METHODS)}


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@SEEDS
@pytest.mark.parametrize("methods", [1, 4])
def test_the_overoptimisation_figure_is_written(tmp_path, seeds, methods):
    data = dict(list(runs(seeds).items())[:methods])
    fits = {"PPO": fit_rl(np.sqrt(data["PPO"]["kl"]), data["PPO"]["gold"])}
    path = tmp_path / "figures" / "over.png"
    assert figures.overoptimization_figure(data, fits, path) == path and is_png(path)


def test_the_overoptimisation_figure_needs_no_fit(tmp_path):
    assert is_png(figures.overoptimization_figure(runs(2), {}, str(tmp_path / "over.png")))


@SEEDS
def test_the_training_figure_is_written(tmp_path, seeds):
    gold = {method: run["gold"] for method, run in runs(seeds).items()}
    assert is_png(figures.training_figure(gold, tmp_path / "a.png"))
    assert is_png(figures.training_figure(gold, tmp_path / "b.png", updates=10 * np.arange(20), label="gold (logits)"))


@SEEDS
def test_the_best_of_n_figure_is_written(tmp_path, seeds):
    n = np.array([1, 4, 16, 64])
    gold = np.random.default_rng(0).normal(size=(seeds, 4))
    curve = {"n": n, "kl": np.log(n) - (n - 1) / n, "gold": gold, "proxy": gold + 1.0}
    assert is_png(figures.best_of_n_figure({"single": curve, "WCO": curve}, tmp_path / "n.png"))


@SEEDS
def test_the_uncertainty_figure_is_written_even_where_no_correlation_exists(tmp_path, seeds):
    gap = np.random.default_rng(0).uniform(size=(seeds, 20))
    assert is_png(figures.uncertainty_figure(2.0 * gap, gap, tmp_path / "u.png"))
    assert is_png(figures.uncertainty_figure(np.ones((seeds, 20)), gap, tmp_path / "constant.png"))


@SEEDS
def test_the_final_gold_figure_is_written(tmp_path, seeds):
    final = {method: run["gold"][:, -1] for method, run in runs(seeds).items()}
    assert is_png(figures.final_gold_figure(final, tmp_path / "f.png"))
    assert is_png(figures.final_gold_figure(final, tmp_path / "g.png", baseline="WCO"))
    with pytest.raises(ValueError, match="'GRPO' is not among"):
        figures.final_gold_figure(final, tmp_path / "h.png", baseline="GRPO")


def test_updates_that_fall_into_one_bin_of_distance_are_averaged_by_seed():
    run = {
        "kl": np.array([[0.0, 4.0, 4.0], [0.0, 4.0, 4.0]]),
        "gold": np.array([[0.0, 1.0, 3.0], [0.0, 5.0, 7.0]]),
        "proxy": np.zeros((2, 3)),
    }
    curve = figures._along_distance(run)
    np.testing.assert_allclose(curve["distance"], [0.0, 2.0])
    np.testing.assert_allclose(curve["gold"][0], [0.0, 4.0])
    np.testing.assert_allclose(curve["gold"][1], [0.0, 2.0])  # seeds 2 and 6: sd 2√2, over √2


def test_a_method_keeps_its_colour_and_the_first_ones_differ():
    colours = figures.method_colours(METHODS)
    assert len(set(colours.values())) == len(METHODS)
    assert figures.method_colours(METHODS[:2]) == {method: colours[method] for method in METHODS[:2]}


def test_the_style_leaves_the_global_settings_as_they_were():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figures.style():
        assert not matplotlib.rcParams["axes.spines.top"]
    assert dict(matplotlib.rcParams) == before
