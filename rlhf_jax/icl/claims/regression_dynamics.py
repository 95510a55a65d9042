"""Gradient flow of one layer of linear attention on regression, beside its closed forms (Zhang et al. 2023).

The measured side is an integration of the gradient of the exact loss over u and the whole matrix U, in float64, and
gradient descent on fresh prompts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.icl.comparison import Comparison, standard_error, within
from rlhf_jax.icl.models.linear_attention import label_mean, reduced_prediction
from rlhf_jax.icl.tasks.regression import Regression, draw_regression
from rlhf_jax.icl.theory import gradient_flow
from rlhf_jax.icl.theory.gradient_flow import Factors
from rlhf_jax.icl.training import fit
from rlhf_jax.parallel.lanes import over_lanes


class LogisticCurve(NamedTuple):
    """Gradient flow of an isotropic task, and gradient descent on fresh prompts.

    Attributes:
        comparisons: the curve, and the time of the drop.
        times: of `predicted` and `integrated`, [times].
        predicted: a(t) in closed form, [times].
        integrated: tr A / d of the integration of whole matrices, [times].
        trained_times: steps times the learning rate, [steps].
        predicted_losses: at those times, [steps].
        losses: of descent, smoothed over steps, [seeds, steps].
    """

    comparisons: list[Comparison]
    times: np.ndarray
    predicted: np.ndarray
    integrated: np.ndarray
    trained_times: np.ndarray
    predicted_losses: np.ndarray
    losses: np.ndarray


def gradient_flow_limit(
    dimension: int = 5, length: int = 20, end: float = 400.0, step: float = 0.05, scale: float = 0.1, seed: int = 0
) -> list[Comparison]:
    """Gradient flow of u and U, which share no eigenvector with Lambda at the start, ends at the global minimum.

    Fourth-order Runge-Kutta from u = s, U = s V V' with |V V'|_F = 1. Lambda has eigenvalues from 0.5 to 1.5 along
    random axes. Euler's rule breaks the conservation of u^2 - |U|_F^2 by O(step): half the step, half the drift.

    Args:
        dimension: d.
        length: N.
        end: time to integrate to.
        step: of the time.
        scale: s.
        seed: of the axes and of V.
    """
    from scipy import stats

    rng = np.random.default_rng(seed)
    axes = stats.ortho_group.rvs(dimension, random_state=rng) if dimension > 1 else np.eye(1)
    covariance = (axes * np.linspace(0.5, 1.5, dimension)) @ axes.T
    keys = rng.standard_normal((dimension, dimension))
    keys = keys @ keys.T
    start = Factors(scale, scale * keys / np.linalg.norm(keys))
    ended = integrate(start, covariance, length, end, step, "Runge-Kutta")[-1]
    target = gradient_flow.limit(covariance, length)
    setting = f"d={dimension}, N={length}, t={end:g}"
    drifts = [_imbalance(integrate(start, covariance, length, 5.0, one, "Euler")[-1]) for one in (0.01, 0.005)]
    loss = gradient_flow.risk(ended.values * ended.keys, covariance, length) / 2
    apart = np.linalg.norm(ended.keys - target.keys) / np.linalg.norm(target.keys)
    return [
        within(f"gradient flow: loss ({setting})", gradient_flow.least_loss(covariance, length), loss, 1e-7),
        Comparison(f"gradient flow: |U - U*| / |U*| ({setting})", 0.0, float(apart), tolerance=1e-3),
        within(f"gradient flow: u ({setting})", target.values, ended.values, 1e-3),
        Comparison(f"gradient flow: u^2 - |U|^2 ({setting})", 0.0, _imbalance(ended), tolerance=step**4),
        within("Euler's drift of u^2 - |U|^2, step 0.01 over 0.005", 2.0, drifts[0] / drifts[1], 0.02),
    ]


def logistic_curve(
    dimension: int = 8,
    length: int = 30,
    start: float = 1e-3,
    step: float = 1e-4,
    rate: float = 2e-3,
    batch: int = 1000,
    seeds: int = 4,
) -> LogisticCurve:
    """The sudden drop of the loss is a logistic function of time, for the flow and for descent on fresh prompts.

    Args:
        dimension: d.
        length: N.
        start: a(0).
        step: of Euler's rule, with which whole matrices are integrated.
        rate: learning rate of descent, the time that a step takes.
        batch: prompts a step of descent.
        seeds: runs of descent.
    """
    half = gradient_flow.half_time(start, dimension, length)
    balanced = np.sqrt(start / np.sqrt(dimension))
    first = Factors(np.sqrt(dimension) * balanced, balanced * np.eye(dimension))
    path = integrate(first, np.eye(dimension), length, 2.2 * half, step, "Euler")
    times = step * np.arange(len(path))
    predicted = gradient_flow.logistic(times, start, dimension, length)
    integrated = np.array([one.values * np.trace(one.keys) / dimension for one in path])

    def loss(params: Factors, key: jax.Array) -> jax.Array:
        prompt = draw_regression(key, Regression(dimension), batch, length)
        mean = label_mean(prompt.inputs, prompt.targets)
        predictions = reduced_prediction(params.values * params.keys, mean, prompt.query)
        return jnp.mean((predictions - prompt.query_target) ** 2) / 2

    steps = int(np.ceil(2.2 * half / rate))
    parameters = Factors(jnp.float32(first.values), jnp.asarray(first.keys, jnp.float32))
    descend = over_lanes(
        lambda key: fit(loss, parameters, optax.sgd(rate), steps, key).losses, devices=jax.local_devices()[:seeds]
    )
    losses = np.asarray(jax.jit(descend)(jax.random.split(jax.random.key(0), seeds)), np.float64)
    window = max(1, steps // 40)
    smooth = np.stack([np.convolve(one, np.ones(window) / window, "valid") for one in losses])
    trained_times = rate * (np.arange(smooth.shape[1]) + (window - 1) / 2)
    end = gradient_flow.minimiser(np.eye(dimension), length)[0, 0]
    a = gradient_flow.logistic(trained_times, start, dimension, length)
    crossing = dimension / 2 * (1 - 0.75 * end)  # the loss at a = end / 2
    halves = np.array([trained_times[np.argmax(one < crossing)] for one in smooth])
    setting = f"d={dimension}, N={length}"
    comparisons = [
        Comparison(
            f"logistic curve: largest |a - a(t)| ({setting}, Euler's step {step:g})",
            0.0,
            float(np.abs(integrated - predicted).max()),
            tolerance=2.0 * step,
        ),
        within(
            f"time of the drop, descent on prompts ({setting})",
            half,
            halves.mean(),
            0.03,
            float(standard_error(halves)),
        ),
    ]
    predicted_losses = dimension / 2 * (1 - 2 * a + a**2 / end)
    return LogisticCurve(comparisons, times, predicted, integrated, trained_times, predicted_losses, smooth)


def integrate(start: Factors, covariance: np.ndarray, length: int, end: float, step: float, rule: str) -> list[Factors]:
    """Gradient flow of (1/2) E(x_q' u U p - w' x_q)^2 over u and the whole matrix U, with the exact expectation.

    The gradient over A is `Lambda (A E p p' - Lambda)`; the chain rule gives that over u and U.

    Args:
        start: u and U, [d, d].
        covariance: Lambda, [d, d].
        length: N.
        end: time to integrate to.
        step: of the time.
        rule: "Euler" or "Runge-Kutta" (of the fourth order).

    Returns:
        u and U at 0, step, 2 step, and so on.

    Raises:
        ValueError: another rule.
    """
    if rule not in ("Euler", "Runge-Kutta"):
        raise ValueError(f"the rule is {rule!r}: choose Euler or Runge-Kutta.")
    moment = gradient_flow.context_moment(covariance, length)

    def slope(u: float, keys: np.ndarray) -> Factors:
        gradient = covariance @ (u * (keys @ moment) - covariance)
        return Factors(-np.sum(gradient * keys), -u * gradient)

    path = [start]
    for _ in range(round(end / step)):
        u, keys = path[-1]
        one = slope(u, keys)
        if rule == "Runge-Kutta":
            two = slope(u + step / 2 * one.values, keys + step / 2 * one.keys)
            three = slope(u + step / 2 * two.values, keys + step / 2 * two.keys)
            four = slope(u + step * three.values, keys + step * three.keys)
            one = Factors(*((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(one, two, three, four, strict=True)))
        path.append(Factors(u + step * one.values, keys + step * one.keys))
    return path


def _imbalance(factors: Factors) -> float:
    return float(factors.values**2 - np.sum(factors.keys**2))
