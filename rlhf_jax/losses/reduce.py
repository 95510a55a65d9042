"""Named reductions: how a [B, T] array of per-token values becomes one number.

Every reduction is a total and a weight. Totals and weights add over microbatches, packed rows and devices; dividing
once, at the end, gives the number that one big batch would have given. (A mean of per-device means is another number
where lengths differ.) An empty response, a row whose mask is nowhere set, has weight 0 under every rule.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.types import at_least_float32

REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")


def reduce(
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
    rule: str,
    constant: float | int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Total and weight of per-token values under a named rule; the reduced value is their quotient.

    With m the mask, n_i = sum_t m_it, and B counting the rows with n_i > 0:

    | rule            | total                        | weight       | the quotient is                      |
    |-----------------|------------------------------|--------------|--------------------------------------|
    | `token_mean`    | sum_it m_it x_it             | sum_it m_it  | the mean over tokens                 |
    | `sequence_mean` | sum_i (1/n_i) sum_t m_it x_it | B           | the mean of the sequences' means     |
    | `sequence_sum`  | sum_it m_it x_it             | B            | the mean of the sequences' sums      |
    | `constant`      | sum_it m_it x_it             | B * constant | the sum over B responses of a fixed length |

    What stands at masked positions, NaN and infinities included, enters neither the result nor the gradient with
    respect to `values`.

    Args:
        values: per-token values, [B, T]; bfloat16 and float16 are summed in float32.
        mask: which tokens count, [B, T]; a float mask weighs them.
        rule: one of `REDUCTIONS`.
        constant: the fixed length in tokens (usually the longest response allowed); for the rule `constant` only.

    Returns:
        `(total, weight)`, two scalars of the same float dtype.

    Raises:
        ValueError: the rule is unknown, or `constant` is missing, not positive, or given to a rule that takes none.

    Source: `token_mean` is DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 8), `sequence_mean` GRPO (Shao et al. 2024,
    arXiv:2402.03300, eq. 3), `constant` Dr. GRPO (Liu et al. 2025, arXiv:2503.20783).

    Example:
        >>> import jax.numpy as jnp
        >>> values = jnp.array([[1.0, 2.0, 3.0], [10.0, jnp.nan, jnp.nan]])
        >>> mask = jnp.array([[True, True, True], [True, False, False]])
        >>> [float(x) for x in reduce(values, mask, "token_mean")]
        [16.0, 4.0]
        >>> [float(x) for x in reduce(values, mask, "sequence_mean")]
        [12.0, 2.0]
    """
    _check_rule(rule, constant)
    values = at_least_float32(values)
    weights = mask.astype(values.dtype)
    kept = jnp.where(weights != 0, values, 0.0) * weights
    row_tokens = jnp.sum(weights, axis=1)
    row_totals = jnp.sum(kept, axis=1)
    occupied = row_tokens > 0
    rows = jnp.sum(occupied.astype(values.dtype))
    if rule == "token_mean":
        return jnp.sum(row_totals), jnp.sum(row_tokens)
    if rule == "sequence_mean":
        return jnp.sum(row_totals / jnp.where(occupied, row_tokens, 1.0)), rows
    if rule == "sequence_sum":
        return jnp.sum(row_totals), rows
    return jnp.sum(row_totals), rows * constant


def mean(
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
    rule: str = "token_mean",
    constant: float | int | None = None,
    whole: Bool[Array, "N T"] | Float[Array, "N T"] | None = None,
) -> Float[Array, ""]:
    """Per-token values reduced to one number: total / weight, and 0 where nothing counts.

    Values of some rows of a batch, with the mask of the `whole`, give these rows' part of the batch's number: the parts
    of all rows add up to it.

    Args:
        values: per-token values, [B, T].
        mask: which tokens count, [B, T].
        rule: one of `REDUCTIONS`; see `reduce`.
        constant: the fixed length in tokens, for the rule `constant` only.
        whole: mask of the batch that the rows are a part of, [N, T]; None: they are all of it.

    Returns:
        A float scalar.

    Raises:
        ValueError: as `reduce`.

    Example:
        >>> import jax.numpy as jnp
        >>> values, mask = jnp.array([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]]), jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
        >>> {rule: float(mean(values, mask, rule)) for rule in ("token_mean", "sequence_mean", "sequence_sum")}
        {'token_mean': 4.0, 'sequence_mean': 6.0, 'sequence_sum': 8.0}
        >>> float(mean(values, mask, "constant", constant=4))
        2.0
        >>> [float(mean(values[row], mask[row], whole=mask)) for row in (slice(0, 1), slice(1, 2))]
        [1.5, 2.5]
    """
    total, weight = reduce(values, mask, rule, constant)
    if whole is not None:
        _, weight = reduce(jnp.zeros(whole.shape, total.dtype), whole, rule, constant)
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def _check_rule(rule: str, constant: float | int | None) -> None:
    """Raise a ValueError unless the rule exists and has the constant it needs, and no other."""
    if rule not in REDUCTIONS:
        raise ValueError(f"unknown reduction {rule!r}: choose one of {', '.join(REDUCTIONS)}")
    if rule == "constant" and (constant is None or constant <= 0):
        raise ValueError(f"the reduction 'constant' needs a positive constant (a length in tokens), got {constant!r}")
    if rule != "constant" and constant is not None:
        raise ValueError(
            f"the reduction {rule!r} takes no constant, got {constant!r}: leave it out, or choose 'constant'"
            f" (of {', '.join(REDUCTIONS)})"
        )
