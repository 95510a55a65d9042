"""The first correction to W* in powers of 1 / N: W* = c (Lambda^-1 + G) with N G -> G1.

Shen et al. 2024 (arXiv 2410.11778) give the order of G; its coefficient is derived here. At W = c (Lambda^-1 + G) the
logits are z = a + (mu_l' G x)_l + delta, where delta is the noise of the context, of covariance C / N, and the gradient
E[sum_k (softmax(z) - softmax(a))_k S_k x'] is 0 at W*. With J = diag(q) - q q', q = softmax(a), and T the third
derivatives of logsumexp, its terms of order 1 / N are

    E[sum_kl J_kl (mu_l' G1 x) mu_k x'] = -E[{sum_k c J_kk (x + a_k mu_k) - sum_kl J_kl a_l mu_k
                                              + 1/2 sum_klm T_klm C_lm mu_k} x'],
    C = c diag(x' Lambda^-1 x + a_k^2) - a a'.

In contexts that hold N / c examples of each class the labels are no source of noise: the terms with a_k mu_k and
a_l mu_k are left out, and C = c (x' Lambda^-1 x) I.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import roots_genlaguerre, roots_jacobi

from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.theory.minimiser import POINTS, Coordinates, draw_coordinates, matrix


def first_order(mixture: Mixture, stratified: bool = False, points: int = POINTS, seed: int = 0) -> np.ndarray:
    """G1, the limit of N (W* / c - Lambda^-1), for any number of classes and any Lambda.

    In whitened eigen-coordinates (see `minimiser`) G1 is a diagonal g, and the equations above are d linear ones:

        sum_j E[alpha_i' J alpha_j] g_j
            = -E[sum_k {c J_kk (y_i^2 + a_k alpha_ki) - (J a)_k alpha_ki + tau_k alpha_ki / 2}],
        alpha_ki = nu_ki y_i,      tau_k = sum_lm T_klm C_lm = (J o C 1)_k - (J C q)_k - q_k tr(J C).

    Args:
        mixture: the family of tasks.
        stratified: contexts hold N / c examples of each class instead of a random number.
        points: quasi-random draws, a power of two.
        seed: of the draws.

    Returns:
        G1, float64 [d, d], symmetric.
    """
    given = draw_coordinates(mixture, 1, stratified, points, seed)
    return matrix(mixture, coefficients(given, stratified)[given.groups])


def coefficients(given: Coordinates, stratified: bool = False) -> np.ndarray:
    """The g [g] of `first_order` from draws, whose contexts are not used."""
    alpha, q = given.signal, given.posterior
    count, c = q.shape
    a, size = alpha.sum(axis=2), given.squares.sum(axis=1)[:, None]
    jacobian = q[:, :, None] * np.eye(c) - q[:, :, None] * q[:, None, :]
    diagonal = np.einsum("nkk->nk", jacobian)
    pulled = (jacobian @ a[:, :, None])[:, :, 0] * (not stratified)
    spread = c * (size + a**2 * (not stratified))  # the diagonal part of C
    # C = diag(spread) - a a' acts through three sums, each written out so that no [n, c, c, c] array is made.
    other = a * (not stratified)
    rows = diagonal * spread - other * pulled
    turned = (jacobian @ (spread * q - other * np.sum(other * q, axis=1, keepdims=True))[:, :, None])[:, :, 0]
    trace = np.sum(rows, axis=1, keepdims=True)
    tau = rows - turned - q * trace
    left = np.tensordot(alpha, jacobian @ alpha, axes=((0, 1), (0, 1))) / count
    right = c * diagonal.sum(axis=1) @ given.squares
    right = right + np.einsum("nk,nkg->g", c * diagonal * other - pulled + tau / 2, alpha)
    return -np.linalg.solve(left, right / count)


def isotropic_coefficient(mixture: Mixture, stratified: bool = False) -> float:
    """The number g1 of G1 = g1 Lambda^-1 for two classes and Lambda = lambda I, by quadrature instead of draws.

        g1 = -E[(4 s'(a) + 2 a s''(a)) Q] / E[s'(a) a^2],      s the sigmoid,  Q = |y|^2 + (m'y)^2 (stratified: |y|^2).

    Given h = |u|^2 and kappa = |m|^2, a ~ N(h / 2, h) and E[Q | a] = a^2 / h + d - 2 + (1 + kappa)^2 (stratified:
    a^2 / h + d - 1 + kappa). Here h = 2 r^2 (1 - t) and kappa = r^2 (1 + t) / 2, where r is the length of the whitened
    means, lambda r^2 / prior_scale^2 ~ chi2_d, and t the cosine of their angle, of density (1 - t^2)^((d - 3) / 2).

    Raises:
        ValueError: more classes than two, or a Lambda that is no multiple of the identity.

    Example:
        >>> round(isotropic_coefficient(Mixture(3)), 2)
        -18.23
    """
    if mixture.classes != 2 or not mixture.isotropic:
        raise ValueError("this quadrature is for two classes and a covariance lambda I: call `first_order`.")
    d = mixture.dimension
    half, radial = roots_genlaguerre(60, d / 2 - 1)
    if d > 1:
        cosine, angular = roots_jacobi(40, (d - 3) / 2, (d - 3) / 2)
    else:
        cosine, angular = np.array([-1.0, 1.0]), np.ones(2)
    radius2 = (2 * half * mixture.prior_scale**2 / mixture.matrix[0, 0])[:, None, None]
    gap, middle = 2 * radius2 * (1 - cosine[:, None]), radius2 * (1 + cosine[:, None]) / 2
    # The density of a times s'(a), made symmetric in a: exp(-xi^2 / 2 - h / 8) / (4 cosh(a / 2)) at a = sqrt(h) xi.
    xi = np.linspace(-9.0, 9.0, 401)
    a = np.sqrt(gap) * xi
    density = np.exp(-(xi**2) / 2 - gap / 8 - np.abs(a) / 2) / (1 + np.exp(-np.abs(a)))
    mass = radial[:, None, None] * angular[:, None] * density
    mean = xi**2 + (d - 1 + middle if stratified else d - 2 + (1 + middle) ** 2)
    bend = -np.tanh(a / 2)  # s'' / s'
    return float(-np.sum(mass * (4 + 2 * a * bend) * mean) / np.sum(mass * a**2))


def extrapolated(lengths: Sequence[int], values: np.ndarray) -> np.ndarray:
    """The limit N -> infinity of values at several N: the polynomial in 1 / N through them, at 0.

    Args:
        lengths: different N, [k].
        values: [k, ...].

    Example:
        >>> float(extrapolated([100, 200], np.array([1 + 5 / 100, 1 + 5 / 200])).round(12))
        1.0
    """
    inverse = 1.0 / np.asarray(lengths, np.float64)
    ratios = inverse / (inverse - inverse[:, None] + np.diag(inverse))  # Lagrange's polynomials at 0; diagonal: 1
    return np.tensordot(ratios.prod(axis=1), np.asarray(values, np.float64), axes=1)
