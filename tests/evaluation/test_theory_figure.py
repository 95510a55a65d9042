import matplotlib.image
import numpy as np
import pytest

from rlhf_jax.evaluation.theory_figure import Panel, theory_figure


def panel(**fields) -> Panel:
    x = np.array([1.0, 10.0, 100.0])
    curves = {"predicted": {"N = 20": (x, 1 / x)}, "measured": {"N = 20": (x, 1.1 / x, 0.1 / x)}}
    return Panel(title="a", x_label="M", y_label="distance", **curves | fields)


def test_panels_are_drawn_and_empty_places_left_free(tmp_path):
    panels = [
        panel(x_scale="log", y_scale="log", levels={"floor": 0.02}),
        panel(categories=("a", "b")),
        panel(),
        panel(),
    ]
    path = theory_figure(panels, tmp_path / "figures" / "theory.png")
    height, width, _ = matplotlib.image.imread(path).shape
    assert width > 2000 and height > 1000


def test_a_predicted_and_a_measured_curve_of_one_name_have_one_colour():
    from matplotlib.figure import Figure

    from rlhf_jax.evaluation.theory_figure import _draw

    axes = Figure().subplots()
    _draw(axes, panel())
    line, points = axes.get_lines()[:2]
    assert line.get_color() == points.get_color()


def test_curves_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the curve 'N = 20' of panel 'a' has x and y of different lengths"):
        theory_figure([panel(predicted={"N = 20": (np.ones(2), np.ones(3))})], tmp_path / "a.png")
    with pytest.raises(ValueError, match="at least one panel"):
        theory_figure([], tmp_path / "a.png")
