"""Best-of-n without drawing n: the expected gold reward of the best answer by proxy, for every n at once.

N answers a prompt are scored once. The proxy picks, out of a random subset of n of them, the one of the highest score;
which score has rank i among all N is known, so the average over every subset is a weighted sum over ranks. This is
host-side analysis in float64, since the weights span hundreds of orders of magnitude.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class BestOfNCurve:
    """What best-of-n by the proxy yields as n grows, averaged over prompts and kept by prompt for bootstraps.

    Attributes:
        n: how many answers the proxy picks from, int [J].
        kl: KL of best-of-n from the sampling policy in nats, [J].
        proxy: expected proxy reward of the picked answer, [J].
        gold: expected gold reward of the picked answer, [J].
        proxy_by_prompt: the same for each prompt, [J, P].
        gold_by_prompt: the same for each prompt, [J, P].
    """

    n: np.ndarray
    kl: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray
    proxy_by_prompt: np.ndarray
    gold_by_prompt: np.ndarray


def best_of_n_kl(n: int) -> float:
    """KL divergence of best-of-n from the policy that the answers were drawn from.

    `KL = log n − (n − 1)/n`: exact for continuous scores, an upper bound when scores tie or the answers are few.

    Args:
        n: how many answers the best is picked from; at least 1.

    Returns:
        The divergence in nats.

    Raises:
        ValueError: n < 1.

    Source: Gao et al. 2210.10760, section 2.

    Example:
        >>> best_of_n_kl(1)
        0.0
        >>> round(best_of_n_kl(12_500), 2)
        8.43
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n of at least 1; n is {n}")
    return float(np.log(n) - (n - 1) / n)


def best_of_n_weights(n: int, answers: int) -> Float[np.ndarray, " N"]:
    """The probability that the answer of each rank is the best of a random subset of n.

    `w_i = C(i − 1, n − 1) / C(N, n)` for rank i = 1 … N by ascending score: the best of the subset is the i-th when the
    other n − 1 come from the i − 1 below it. Computed from the top by `w_N = n/N`, `w_{i−1} = w_i (i − n)/(i − 1)`,
    which neither overflows nor cancels: at N = 12,600 the sum is 1 within 1e-13, where log-gamma leaves 2e-11.

    Args:
        n: the size of the subset, 1 ≤ n ≤ N.
        answers: N, how many answers there are.

    Returns:
        Weights by ascending rank, float64 [N]; they sum to 1.

    Raises:
        ValueError: n is not between 1 and N.

    Source: Coste et al. 2310.02743 (the estimator of Nakano et al. 2112.09332).

    Example:
        >>> best_of_n_weights(2, 4).round(4).tolist()
        [0.0, 0.1667, 0.3333, 0.5]
    """
    if not 1 <= n <= answers:
        raise ValueError(f"n must be between 1 and the {answers} answers that were scored; n is {n}")
    rank = np.arange(answers, n, -1, dtype=np.float64)
    falling = np.cumprod((rank - n) / (rank - 1.0))
    weights = np.zeros(answers)
    weights[n - 1 :] = n / answers * np.concatenate([falling[::-1], np.ones(1)])
    return weights


def best_of_n_curve(
    proxy: Float[np.ndarray, "P N"], gold: Float[np.ndarray, "P N"], ns: Sequence[int] | np.ndarray
) -> BestOfNCurve:
    """Expected proxy and gold reward of the answer that the proxy likes best out of n.

    Answers are sorted by proxy, gold is permuted with the same indices, and both are weighted with `best_of_n_weights`.
    Ties are broken once and stably: of equal scores, the earlier answer ranks lower.

    Args:
        proxy: proxy score of each answer, float [P, N]; for an ensemble, the aggregated score (aggregate first, then
            rank).
        gold: gold score of the same answers, float [P, N].
        ns: the values of n, int [J].

    Returns:
        The curves over n.

    Raises:
        ValueError: a score is NaN or infinite (the prompt is named), or an n is not between 1 and N.

    Source: Coste et al. 2310.02743.

    Example:
        >>> proxy = np.array([[1.0, 3.0, 2.0]])
        >>> gold = np.array([[10.0, 0.0, 20.0]])
        >>> best_of_n_curve(proxy, gold, [1, 3]).gold.round(9).tolist()
        [10.0, 0.0]
    """
    for name, scores in (("proxy", proxy), ("gold", gold)):
        bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
        if bad.size:
            raise ValueError(f"the {name} scores of prompt {bad[0]} are not all finite; score them or drop them")
    order = np.argsort(proxy, axis=1, kind="stable")
    ranked_proxy = np.take_along_axis(proxy, order, axis=1).astype(np.float64)
    ranked_gold = np.take_along_axis(gold, order, axis=1).astype(np.float64)
    sizes = np.asarray([int(n) for n in ns], dtype=np.int64)
    weights = np.stack([best_of_n_weights(int(n), proxy.shape[1]) for n in sizes])
    proxy_by_prompt = weights @ ranked_proxy.T
    gold_by_prompt = weights @ ranked_gold.T
    return BestOfNCurve(
        n=sizes,
        kl=np.array([best_of_n_kl(int(n)) for n in sizes]),
        proxy=proxy_by_prompt.mean(axis=1),
        gold=gold_by_prompt.mean(axis=1),
        proxy_by_prompt=proxy_by_prompt,
        gold_by_prompt=gold_by_prompt,
    )
