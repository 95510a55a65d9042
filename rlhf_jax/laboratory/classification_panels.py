"""The figures of the experiment on in-context classification: what its claims found, as panels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.evaluation.statistics import mean_interval, row
from rlhf_jax.evaluation.theory_figure import Panel
from rlhf_jax.icl.claims import descent, inference, minimisers, training, transformers

TEST_LENGTH, DISTANCE = "test context M", "total variation from Bayes"


def first_order(found: minimisers.Curves, names: Sequence[str]) -> Panel:
    """N g_N against N, and the g1 that it approaches; a name a setting."""
    flat = np.ones(len(found.lengths))
    return Panel(
        title="N g_N approaches g1",
        x_label="training context N",
        y_label="N g_N",
        predicted={name: (found.lengths, limit * flat) for name, limit in zip(names, found.limits, strict=True)},
        measured={name: (found.lengths, *pair) for name, *pair in zip(names, found.scaled, found.errors, strict=True)},
        x_scale="log",
    )


def covariance(found: minimisers.Curves) -> Panel:
    """How far N G is from G1, for correlated features."""
    return Panel(
        title="correlated features: N G approaches G1",
        x_label="training context N",
        y_label="|N G - G1| / |G1|",
        measured={"condition number 4": (found.lengths, found.scaled[0], found.errors[0])},
        x_scale="log",
    )


def rate(found: descent.Rates, title: str) -> Panel:
    """Loss gap against step from every start, and the slope that theory predicts, through the last point."""
    last = found.steps[-1]
    measured, predicted = {}, {}
    for start, gap in zip(found.starts, found.loss_gap, strict=True):
        measured[start] = (found.steps[::20], gap[::20], 0.0 * gap[::20])
        predicted[start] = (found.steps, gap[-1] * np.exp(found.slope * (found.steps - last)))
    return Panel(title, "step", "L(W) - L(W*)", predicted, measured, y_scale="log")


def sweep(found: training.SweepClaim) -> Panel:
    """tr W / d against step for every context length, and where theory says that it ends."""
    traces, spreads = found.traces.mean(axis=1), found.traces.std(axis=1, ddof=1)
    names = [f"N = {length}" for length in found.lengths]
    return Panel(
        "training ends at the W* of its own N",
        "step",
        "tr W / d (± s.d. of seeds)",
        {name: (found.steps, np.full(len(found.steps), at)) for name, at in zip(names, found.predicted, strict=True)},
        {name: (found.steps, *pair) for name, *pair in zip(names, traces, spreads, strict=True)},
        levels={"2 = c Λ⁻¹": 2.0},
    )


def decay(noise: inference.Curves, bent: inference.Curves) -> list[Panel]:
    """Distance to Bayes against M: its decay at W = 2 Lambda^-1, and the floor that training on N examples leaves."""
    root = np.sqrt(noise.test_lengths)
    measured = _points(noise, root)
    predicted = {name: (noise.test_lengths, root * one) for name, one in _by_name(noise, noise.predicted)}
    first = Panel(
        "W = 2 Λ⁻¹: √M TV tends to C_TV", TEST_LENGTH, "√M · total variation", predicted, measured, x_scale="log"
    )
    floors = (("W* of N: down to a floor", bent.predicted), ("the same, by folded normals", bent.folded))
    return [first, *(_falling(title, bent, theory) for title, theory in floors)]


def plateaus(found: inference.Curves) -> Panel:
    """Distance to Bayes against M under every shift of the test."""
    return _falling("shifts of the test leave a plateau", found, found.predicted)


def models(found: transformers.ModelComparison) -> tuple[list[dict[str, Any]], list[Panel]]:
    """Rows and panels of the models that no theory describes: distance to Bayes against M, and under every shift."""
    rows, panels, places = [], [], np.arange(len(found.shifts), dtype=float)

    def curve(name: str, tests: list[str], x: np.ndarray, values: np.ndarray) -> tuple:
        """Mean and half interval over seeds, values [tests, seeds]; adds the rows."""
        rows.extend(row(f"{name}, {test}", "total variation", one) for test, one in zip(tests, values, strict=True))
        estimates = [mean_interval(one) for one in values]
        means = np.array([one.mean for one in estimates])
        return x, means, np.array([one.high for one in estimates]) - means

    for place, length in enumerate(found.lengths):
        by_length, by_shift = {}, {}
        for model, name in enumerate(found.models):
            label, tests = f"{name}, N={length}", [f"M={m}" for m in found.test_lengths]
            by_length[name] = curve(label, tests, found.test_lengths, found.distances[model, place].T)
            under = [f"M={length}, {shift}" for shift in found.shifts]
            by_shift[name] = curve(label, under, places, found.shifted[:, model, place])
        predicted = {"linear": (found.test_lengths, found.predicted_distances[place])}
        for name, distances in zip(found.baselines, found.baseline_distances, strict=True):
            predicted[name] = (found.test_lengths, distances)
        title = f"trained on N = {length}"
        panels.append(Panel(title, TEST_LENGTH, DISTANCE, predicted, by_length, x_scale="log", y_scale="log"))
        if length == found.lengths[-1]:
            predicted = {"linear": (places, found.predicted_shifted[:, place])}
            title = f"under shifts, N = M = {length}"
            panels.append(Panel(title, "", DISTANCE, predicted, by_shift, categories=found.shifts))
    return rows, panels


def _falling(title: str, curves: inference.Curves, theory: np.ndarray) -> Panel:
    kept = np.isfinite(curves.test_lengths)
    predicted = {name: (curves.test_lengths[kept], one[kept]) for name, one in _by_name(curves, theory)}
    return Panel(title, TEST_LENGTH, DISTANCE, predicted, _points(curves), x_scale="log", y_scale="log")


def _by_name(curves: inference.Curves, values: np.ndarray) -> zip:
    return zip(curves.names, values, strict=True)


def _points(curves: inference.Curves, scale: np.ndarray | float = 1.0) -> dict[str, tuple]:
    """The measured curves of a panel, with bars of two standard errors."""
    kept = np.isfinite(curves.test_lengths)
    return {
        name: (curves.test_lengths[kept], (scale * mean)[kept], (2 * scale * error)[kept])
        for name, mean, error in zip(curves.names, curves.measured, curves.standard_error, strict=True)
    }
