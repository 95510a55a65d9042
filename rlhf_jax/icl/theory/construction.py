"""One layer of linear attention as one step of gradient descent: the best learning rate, and what it leaves.

Von Oswald et al. 2023 (arXiv 2212.07677, Proposition 1) give weights with which a layer of linear self-attention turns
a prompt into one step of gradient descent on it; `models/deep_linear.py` has the layer. From zero weights the step
predicts y_q = (eta / N) sum_i y_i x_i' x_q. Which eta is best follows from two moments of the inputs. It is what a
trained layer learns, since nothing linear in p = (1/N) sum_i y_i x_i does better when the inputs' features are
independent and alike: the minimiser over matrices is a multiple of the identity.
"""

import math
from typing import NamedTuple

from rlhf_jax.icl.checks import at_least, positive


class InputMoments(NamedTuple):
    """Moments of one feature of the inputs; features are independent, alike and symmetric about 0.

    Attributes:
        variance: s2 = E x^2.
        fourth: k4 = E x^4.
    """

    variance: float
    fourth: float


GAUSSIAN = InputMoments(variance=1.0, fourth=3.0)


def uniform_inputs(width: float = 2.0) -> InputMoments:
    """Moments of inputs that are uniform between -width / 2 and width / 2: s2 = width^2 / 12, k4 = width^4 / 80.

    The published code's option `input_range` is this full width; the best rate goes with 1 / width^2.

    Raises:
        ValueError: a width that is not positive and finite.

    Example:
        >>> uniform_inputs(2.0).variance == 1 / 3
        True
    """
    positive("width of the inputs", width)
    return InputMoments(width**2 / 12, width**4 / 80)


def step_loss(
    rate: float, dimension: int, length: int, inputs: InputMoments = GAUSSIAN, noise_variance: float = 0.0
) -> float:
    """The loss (1/2) E(prediction - w' x_q)^2 of one step of gradient descent from zero, w ~ N(0, I):

        (1/2) d s2 (1 - 2 eta s2 + eta^2 (e2 + sigma^2 s2 / N)),   e2 = (1 - 1/N) s2^2 + (k4 + (d - 1) s2^2) / N.

    e2 = E tr(Shat^2) / d with Shat = (1/N) sum_i x_i x_i': of its pairs of examples N (N - 1) are of two, N of one.

    Args:
        rate: eta; the loss of gradient descent is (1 / 2N) sum_i (w' x_i - y_i)^2.
        dimension: d.
        length: N.
        inputs: moments of a feature.
        noise_variance: sigma^2 of the labels.

    Raises:
        ValueError: a count below 1, impossible moments, a negative noise, or a rate that is not finite.
    """
    if not math.isfinite(rate):
        raise ValueError(f"the learning rate is {rate}: give a finite number.")
    s2 = inputs.variance
    return 0.5 * dimension * s2 * (1 - 2 * rate * s2 + rate**2 * _curvature(dimension, length, inputs, noise_variance))


def best_rate(dimension: int, length: int, inputs: InputMoments = GAUSSIAN, noise_variance: float = 0.0) -> float:
    """The learning rate of the least `step_loss`: `eta* = s2 / (e2 + sigma^2 s2 / N)`.

    Args:
        dimension: d.
        length: N.
        inputs: moments of a feature.
        noise_variance: sigma^2 of the labels.

    Raises:
        ValueError: a count below 1, impossible moments, or a negative noise.

    Example:
        >>> round(best_rate(10, 10, uniform_inputs(2.0)), 4)
        1.5152
    """
    return inputs.variance / _curvature(dimension, length, inputs, noise_variance)


def best_loss(dimension: int, length: int, inputs: InputMoments = GAUSSIAN, noise_variance: float = 0.0) -> float:
    """The loss at the best rate: `(1/2) d s2 (1 - s2 eta*)`.

    Args:
        dimension: d.
        length: N.
        inputs: moments of a feature.
        noise_variance: sigma^2 of the labels.

    Raises:
        ValueError: a count below 1, impossible moments, or a negative noise.

    Example:
        >>> round(best_loss(10, 10, uniform_inputs(2.0)), 4)
        0.8249
    """
    s2 = inputs.variance
    return 0.5 * dimension * s2 * (1 - s2 * best_rate(dimension, length, inputs, noise_variance))


def _curvature(dimension: int, length: int, inputs: InputMoments, noise_variance: float) -> float:
    at_least("dimension d", dimension, 1)
    at_least("context length N", length, 1)
    positive("noise variance", noise_variance, or_zero=True)
    s2, k4 = positive("second moment of the inputs", inputs.variance), positive("fourth moment", inputs.fourth)
    if k4 < s2**2 * (1 - 1e-12):
        raise ValueError(f"no input has E x^2 = {s2} and E x^4 = {k4}: E x^4 is at least (E x^2)^2.")
    return (1 - 1 / length) * s2**2 + (k4 + (dimension - 1) * s2**2 + noise_variance * s2) / length
