"""Prompts of in-context classification of Gaussian mixtures, in two forms of the same law.

Raw prompts are examples with their labels: any model can read them. Sufficient statistics are the class sums

    S_k = (1/N) sum_i 1{y_i = k} x_i,

all that one layer of linear attention reads of a context. They are drawn in O(c d) numbers a prompt however long the
context is, and the context length N may be a traced scalar, so that one compiled program serves every N:

    n ~ Multinomial(N, P(true class j, shown label k)),   xi_k ~ N(0, I),
    S_k = sum_j (n_jk / N) mu_j + (sqrt(sum_j n_jk) / N) Lambda^1/2 xi_k.

Both follow any `shift.Law`. Floating-point numbers have the dtype of the means; the means have JAX's default one.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from rlhf_jax.icl.checks import at_least, positive
from rlhf_jax.icl.mixture import symmetric_root
from rlhf_jax.icl.shift import Law
from rlhf_jax.icl.tasks.counts import Scalar, multinomial_counts, normal_shares


@chex.dataclass(frozen=True)
class Prompt:
    """Raw prompts: what any model can read.

    Attributes:
        inputs: x_i of the context, [B, N, d].
        labels: shown with them, int32 [B, N].
        query: [B, d].
        query_label: true class of the query, int32 [B].
    """

    inputs: Float[Array, "B N d"]
    labels: Int[Array, "B N"]
    query: Float[Array, "B d"]
    query_label: Int[Array, " B"]


@chex.dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of prompts for one layer of linear attention.

    Attributes:
        sums: S_k, [B, c, d]; for two classes p = S_1 - S_0.
        query: [B, d].
        query_label: true class of the query, int32 [B].
    """

    sums: Float[Array, "B c d"]
    query: Float[Array, "B d"]
    query_label: Int[Array, " B"]


def draw_means(key: Key[Array, ""], law: Law, count: int, prior_scale: Scalar | None = None) -> Float[Array, "B c d"]:
    """Draws tasks: the means of their classes.

        mu_0 ~ N(0, prior_scale^2 I),   mu_k = Lambda^1/2 |Lambda^-1/2 mu_0| v_k,   v_k uniform on the sphere,

    with Lambda the covariance of training, and each mean times its norm ratio (Shen et al. 2024, arXiv 2410.11778; a
    Haar rotation of one vector is a uniform direction, so that no rotation is drawn).

    Args:
        key: random key.
        law: of the prompts.
        count: tasks B.
        prior_scale: in place of the law's; may be traced.

    Returns:
        Means, [B, c, d].

    Raises:
        ValueError: `count` is below 1, or a prior scale that is not traced is not above 0.
    """
    count = at_least("number of tasks", count, 1)
    scale = law.prior_scale if prior_scale is None else prior_scale
    if not isinstance(scale, jax.core.Tracer):
        positive("prior scale", np.asarray(scale).item())
    mixture = law.mixture
    c, d = mixture.classes, mixture.dimension
    gaussian = jax.random.normal(key, (count, c, d))
    dtype = gaussian.dtype
    values, vectors = mixture.eigen
    root = jnp.asarray(mixture.root, dtype)
    whitening = jnp.asarray(vectors / np.sqrt(values), dtype)
    first = jnp.asarray(scale).astype(dtype) * gaussian[:, 0]
    whitened = jnp.einsum("bd,de->be", first, whitening, precision="highest")
    lengths = jnp.linalg.norm(whitened, axis=-1)
    directions = _unit(gaussian[:, 1:])
    others = lengths[:, None, None] * jnp.einsum("bkd,de->bke", directions, root, precision="highest")
    return jnp.concatenate([first[:, None], others], axis=1) * jnp.asarray(law.norm_ratios, dtype)[None, :, None]


def draw_prompts(
    key: Key[Array, ""], law: Law, means: Float[Array, "B c d"], length: int, stratified: bool = False
) -> Prompt:
    """Draws one raw prompt a task.

    Args:
        key: random key.
        law: class probabilities of context and query, covariance of x given its class, and label noise.
        means: of the tasks, [B, c, d].
        length: examples in the context, N.
        stratified: exactly N P(true class j, shown label k) examples of each kind in random order, N / c a class where
            nothing is shifted, instead of random numbers of them. The class of the query is drawn all the same.

    Returns:
        The prompts.

    Raises:
        ValueError: the length is below 1, or a stratified context of that length would need a fraction of an example.
    """
    length = at_least("context length N", length, 1)
    count, c, d = means.shape
    context_key, order_key, noise_key, query_key = jax.random.split(key, 4)
    joint = _joint(law).reshape(-1)
    if stratified:
        exact = joint * length
        whole = np.rint(exact)
        if np.abs(exact - whole).max() > 1e-6 * length:
            share = exact[np.abs(exact - whole).argmax()]
            raise ValueError(
                f"a stratified context of {length} examples would hold {share:.6g} of one class and label: "
                f"give a length that makes each whole, such as a multiple of the {c} classes where they are uniform."
            )
        kinds = np.repeat(np.arange(c * c), whole.astype(np.int64))
        kinds = jnp.broadcast_to(jnp.asarray(kinds, jnp.int32), (count, length))
        kinds = jax.random.permutation(order_key, kinds, axis=1, independent=True)
    else:
        kinds = _categories(context_key, joint, (count, length), means.dtype)
    classes, labels = kinds // c, kinds % c
    noise = jax.random.normal(noise_key, (count, length, d), means.dtype)
    inputs = jnp.take_along_axis(means, classes[:, :, None], axis=1)
    inputs = inputs + jnp.einsum("bnd,de->bne", noise, _root(law, means), precision="highest")
    query, query_label = _draw_query(query_key, law, means)
    return Prompt(inputs=inputs, labels=labels, query=query, query_label=query_label)


def draw_statistics(
    key: Key[Array, ""],
    law: Law,
    means: Float[Array, "B c d"],
    length: Scalar,
    stratified: bool = False,
    counts: Literal["exact", "normal"] = "exact",
) -> Statistics:
    """Draws the sufficient statistics of one prompt a task, without drawing its context.

    With `counts="normal"` the shares n_jk / N are normal with the mean and the covariance of the exact ones (for two
    uniform classes b = 2 n_1 / N - 1 ~ N(0, 1 / N)), never below zero (see `counts.normal_shares`). The mean of S_k,
    and its covariance to first order in 1 / N, depend on no more than these two moments, and so do G1 and the constants
    of total variation and of the excess loss. Corrections of order 1 / N^2 differ.

    Args:
        key: random key.
        law: class probabilities of context and query, covariance of x given its class, and label noise.
        means: of the tasks, [B, c, d].
        length: examples in the context, N; may be traced.
        stratified: exactly N P(true class j, shown label k) examples of each kind, fractions allowed.
        counts: "exact", multinomial; or "normal", faster, for N in the hundreds and above.

    Returns:
        The statistics, of the same law as those of `draw_prompts`.

    Raises:
        ValueError: another name of counts, a length that is not traced and is below 1, or one for which a normal share
            would be negative too often (its mean less than four standard deviations above zero).
    """
    if counts not in ("exact", "normal"):
        raise ValueError(f'the counts are {counts!r}: give "exact" or "normal".')
    if not isinstance(length, jax.core.Tracer):
        at_least("context length N", np.asarray(length).item(), 1)
    count = means.shape[0]
    count_key, noise_key, query_key = jax.random.split(key, 3)
    size = jnp.asarray(length).astype(means.dtype)
    joint = _joint(law)
    if stratified:
        shares = jnp.broadcast_to(jnp.asarray(joint, means.dtype), (count, *joint.shape))
    else:
        kinds = np.flatnonzero(joint)
        draw, unit = (normal_shares, 1) if counts == "normal" else (multinomial_counts, size)
        drawn = draw(count_key, length, joint.reshape(-1)[kinds], count, means.dtype) / unit
        shares = jnp.zeros((count, joint.size), means.dtype).at[:, kinds].set(drawn).reshape(count, *joint.shape)
    noise = jax.random.normal(noise_key, means.shape, means.dtype)
    noise = jnp.einsum("bkd,de->bke", noise, _root(law, means), precision="highest")
    signal = jnp.einsum("bjk,bjd->bkd", shares, means, precision="highest")
    sums = signal + jnp.sqrt(shares.sum(axis=1) / size)[:, :, None] * noise
    query, query_label = _draw_query(query_key, law, means)
    return Statistics(sums=sums, query=query, query_label=query_label)


def bayes_logits(law: Law, means: Float[Array, "B c d"], query: Float[Array, "B d"]) -> Float[Array, "B c"]:
    """The logits of Bayes, who knows the task and its law.

        a_k = mu_k' L^-1 x - mu_k' L^-1 mu_k / 2 + log P(k),

    with L the covariance of the law; where nothing makes them differ between classes, the last two terms are left out,
    and a_k = mu_k' Lambda^-1 x.

    Args:
        law: of the prompts.
        means: of the tasks, [B, c, d].
        query: [B, d].

    Returns:
        Logits whose softmax is the posterior of the class of the query, [B, c].
    """
    precision = jnp.asarray(np.linalg.solve(law.covariance, np.eye(len(law.covariance))), means.dtype)
    weighted = jnp.einsum("bkd,de->bke", means, precision, precision="highest")
    scores = jnp.einsum("bkd,bd->bk", weighted, query, precision="highest")
    if law.unbiased:
        return scores
    with np.errstate(divide="ignore"):
        prior = jnp.asarray(np.log(law.probabilities), means.dtype)
    return scores - jnp.einsum("bkd,bkd->bk", weighted, means, precision="highest") / 2 + prior[None, :]


def _joint(law: Law) -> np.ndarray:
    """P(true class j, shown label k), float64 [c, c]."""
    return law.probabilities[:, None] * law.confusion


def _draw_query(
    key: Key[Array, ""], law: Law, means: Float[Array, "B c d"]
) -> tuple[Float[Array, "B d"], Int[Array, " B"]]:
    """Draws a class a task, and an input of it."""
    class_key, noise_key = jax.random.split(key)
    count, _, d = means.shape
    label = _categories(class_key, law.probabilities, (count,), means.dtype)
    noise = jax.random.normal(noise_key, (count, d), means.dtype)
    centre = jnp.take_along_axis(means, label[:, None, None], axis=1)[:, 0]
    return centre + jnp.einsum("bd,de->be", noise, _root(law, means), precision="highest"), label


def _categories(
    key: Key[Array, ""], probabilities: np.ndarray, shape: tuple[int, ...], dtype: DTypeLike
) -> Int[Array, "..."]:
    """Draws indices with these probabilities, int32, by one uniform number each; never one of probability 0."""
    kinds = np.flatnonzero(probabilities)
    uniform = jax.random.uniform(key, shape, dtype)
    place = sum(
        ((uniform >= bound).astype(jnp.int32) for bound in np.cumsum(probabilities[kinds])[:-1].tolist()),
        start=jnp.zeros(shape, jnp.int32),
    )
    return jnp.asarray(kinds, jnp.int32)[place]


def _root(law: Law, means: Float[Array, "B c d"]) -> Float[Array, "d d"]:
    """Symmetric square root of the covariance of the law, in the dtype of the means."""
    return jnp.asarray(symmetric_root(law.covariance), means.dtype)


def _unit(vectors: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """The vectors over their lengths; the first axis in place of a vector of length zero."""
    lengths = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    axis = jnp.broadcast_to(jnp.eye(1, vectors.shape[-1], dtype=vectors.dtype)[0], vectors.shape)
    return jnp.where(lengths > 0, vectors / jnp.where(lengths > 0, lengths, 1), axis)
