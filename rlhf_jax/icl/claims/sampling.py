"""Claim: sufficient statistics have the law of raw prompts, so that whatever is learnt from them holds of prompts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.comparison import Comparison, within_errors
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.models.linear_attention import class_sums
from rlhf_jax.icl.shift import Law, Shift, shifted
from rlhf_jax.icl.tasks.mixtures import draw_means, draw_prompts, draw_statistics

CHUNK = 10_000  # prompts drawn at once
LEVEL = 0.001  # of the tests of Kolmogorov and Smirnov
ERRORS = 4.0


def sums_moments(law: Law, means: np.ndarray, length: int, stratified: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the class sums S_k = (1/N) sum_i 1{y_i = k} x_i of one task, in closed form.

    Examples are independent and identically distributed, each adding 1{y = k} x / N. With q_jk = P(true class j, shown
    label k),

        E S_k = sum_j q_jk mu_j,
        N Cov(S_k, S_l) = 1{k = l} sum_j q_jk (Lambda + mu_j mu_j') - E S_k E S_l'.

    For two classes without a shift, p = S_1 - S_0 has the mean u / 2 and the covariance (Lambda + m m') / N, with
    u = mu_1 - mu_0 and m = (mu_0 + mu_1) / 2. With fixed numbers of examples
    only Lambda is left of the second line.

    Args:
        law: of the prompts.
        means: of the task, [c, d].
        length: examples in the context, N.
        stratified: as in `tasks.mixtures.draw_statistics`.

    Returns:
        The mean, float64 [c, d], and the covariance, float64 [c, d, c, d].
    """
    at_least("context length N", length, 1)
    c = len(means)
    joint = law.probabilities[:, None] * law.confusion
    centre = joint.T @ means
    spread = joint.sum(axis=0)[:, None, None] * law.covariance
    if not stratified:
        spread = spread + np.einsum("jk,jd,je->kde", joint, means, means)
    covariance = np.einsum("kl,kde->kdle", np.eye(c), spread)
    if not stratified:
        covariance = covariance - np.einsum("kd,le->kdle", centre, centre)
    return centre, covariance / length


def sampling(dimension: int = 4, length: int = 20, count: int = 200_000, seed: int = 0) -> list[Comparison]:
    """Raw prompts beside sufficient statistics: two and three classes, with a shift, and stratified.

    For one task, the mean and the covariance of the class sums of both forms against `sums_moments`, the entry that is
    furthest off in standard errors; and the distance of Kolmogorov and Smirnov between the two forms, for a random
    projection of class sums and query together, at that task and over fresh tasks. Its tolerance is what two samples of
    one law exceed with probability 0.001. Normal counts have their moments compared at twenty times the length.

    Args:
        dimension: d.
        length: N, even, so that a stratified context of two classes is possible.
        count: prompts of each form and setting.
        seed: of everything.

    Returns:
        The comparisons.
    """
    covariance = 0.5 * np.eye(dimension) + 0.25
    two, three = Mixture(dimension, 2), Mixture(dimension, 3, covariance)
    shift = Shift(
        class_probabilities=(0.5, 0.3, 0.2),
        covariance=1.5 * np.eye(dimension) - 0.1,
        norm_ratios=(1.0, 1.5, 0.5),
        label_noise=0.1,
        prior_scale=0.7,
    )
    rows = []
    for number, (name, law, stratified) in enumerate(
        [
            ("c=2", shifted(two), False),
            ("c=3", shifted(three), False),
            ("c=3, shifted", shifted(three, shift), False),
            ("c=2, stratified", shifted(two), True),
        ]
    ):
        rows += both_forms(f"{name}, d={dimension}, N={length}", law, length, count, seed + 100 * number, stratified)
    law, long = shifted(three, dataclasses.replace(shift, label_noise=0.0)), 20 * length
    task = draw_means(jax.random.key(seed), law, 1)
    one, _ = _draw_both(jax.random.key(seed + 1), law, long, count, task, form="normal")
    name = f"normal, c=3, shifted, d={dimension}, N={long}"
    return rows + _moment_rows(name, law, task, long, one[:, : 3 * dimension], False)


def both_forms(
    name: str, law: Law, length: int, count: int, seed: int = 0, stratified: bool = False
) -> list[Comparison]:
    """The comparisons of `sampling` for one law.

    Args:
        name: of the setting, in the rows.
        law: of the prompts.
        length: N.
        count: prompts of each form.
        seed: of everything.
        stratified: contexts with fixed numbers of examples.

    Returns:
        Six comparisons.
    """
    from scipy import stats

    at_least("number of prompts", count, 2)
    c, d = law.mixture.classes, law.mixture.dimension
    task = draw_means(jax.random.key(seed), law, 1)
    direction = np.random.default_rng(seed).normal(size=(c + 1) * d)
    rows, projections = [], {}
    for number, form in enumerate(("raw", "exact")):
        key = jax.random.fold_in(jax.random.key(seed + 1), number)
        one, fresh = _draw_both(key, law, length, count, task, form, stratified)
        rows += _moment_rows(f"{form}, {name}", law, task, length, one[:, : c * d], stratified)
        projections[form] = (one @ direction, fresh @ direction)
    limit = math.sqrt(-math.log(LEVEL / 2) / 2) * math.sqrt(2 / count)
    for number, which in enumerate(("one task", "fresh tasks")):
        raw, exact = (projections[form][number] for form in ("raw", "exact"))
        distance = float(stats.ks_2samp(raw, exact, method="asymp").statistic)
        rows.append(Comparison(f"distance of raw and exact, {which}, {name}", 0.0, distance, tolerance=limit))
    return rows


def _draw_both(
    key: jax.Array, law: Law, length: int, count: int, task: jax.Array, form: str, stratified: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Class sums and queries of one task and of fresh ones, float64 [n, c d + d] each."""
    chunk = min(count, CHUNK)
    one_task = jnp.broadcast_to(task, (chunk, *task.shape[1:]))
    fresh_tasks = jax.jit(lambda key: draw_means(key, law, chunk))

    @jax.jit
    def draw(key: jax.Array, means: jax.Array) -> jax.Array:
        if form == "raw":
            prompt = draw_prompts(key, law, means, length, stratified)
            sums, query = class_sums(prompt.inputs, prompt.labels, law.mixture.classes), prompt.query
        else:
            drawn = draw_statistics(key, law, means, length, stratified, form)
            sums, query = drawn.sums, drawn.query
        return jnp.concatenate([sums.reshape(chunk, -1), query], axis=1)

    one, fresh = [], []
    for number in range(-(-count // chunk)):
        one_key, task_key, fresh_key = jax.random.split(jax.random.fold_in(key, number), 3)
        one.append(draw(one_key, one_task))
        fresh.append(draw(fresh_key, fresh_tasks(task_key)))
    return tuple(np.concatenate(parts)[:count].astype(np.float64) for parts in (one, fresh))


def _moment_rows(
    name: str, law: Law, task: jax.Array, length: int, sums: np.ndarray, stratified: bool
) -> list[Comparison]:
    """Mean and covariance of class sums [n, c d] beside their closed forms: the entry furthest off, of each."""
    means = np.asarray(task[0], np.float64)
    centre, covariance = (moment.reshape(means.size, -1) for moment in sums_moments(law, means, length, stratified))
    count = len(sums)
    off = sums - centre[:, 0]
    products = off.T @ off / count
    squares = np.square(off).T @ np.square(off) / count
    return [
        _furthest(f"mean of S, {name}", centre[:, 0], sums.mean(axis=0), sums.std(axis=0) / math.sqrt(count)),
        _furthest(f"covariance of S, {name}", covariance, products, np.sqrt((squares - products**2) / count)),
    ]


def _furthest(name: str, predicted: np.ndarray, measured: np.ndarray, error: np.ndarray) -> Comparison:
    """The entry whose difference is largest in standard errors."""
    place = np.unravel_index(np.argmax(np.abs(measured - predicted) / error), predicted.shape)
    return within_errors(f"{name}, furthest entry", predicted[place], measured[place], error[place], ERRORS)
