"""The family of GRPO: policy gradients without a value net, each a choice of pieces.

Pieces are the functions of `losses`: advantages (`losses.credit`), a ratio and a surrogate (`losses.policy`), a
reduction (`losses.reduce`), and where the KL from the reference goes. `METHODS` holds those of the literature; another
one is `method("grpo", ratio=sequence_log_ratio)`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from jaxtyping import Array

from rlhf_jax.algorithms.on_policy import check_kl
from rlhf_jax.losses.credit import (
    greedy_difference,
    group_centred,
    group_standardised,
    leave_one_out,
    whitened_return,
)
from rlhf_jax.losses.policy import (
    capped_surrogate,
    check_clips,
    clipped_surrogate,
    reinforce_surrogate,
    sequence_log_ratio,
    token_log_ratio,
    total_log_ratio,
)
from rlhf_jax.losses.reduce import REDUCTIONS


@dataclasses.dataclass(frozen=True)
class Method:
    """The pieces of a policy gradient without a value net.

    Attributes:
        advantages: `(rewards [B, T], mask, samples) -> [B, T]`, see `losses.credit`.
        ratio: `(logprob, old_logprob, mask) -> log-ratio [B, T]`, see `losses.policy`.
        surrogate: `(logprob, log_ratio, advantages, clip_low, clip_high) -> [B, T]`, see `losses.policy`.
        reduction: how the losses of tokens are averaged, a name of `losses.reduce`; the `constant` is the longest
            response that is sampled.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        kl_in: the KL from the reference is subtracted from the "reward" of each token, or is a term of the "loss".
        kl_estimate: how it is estimated there, see `losses.kl`.
        baseline: what a response is compared with: the others of its "group", all of the "batch", or a "greedy" one,
            which is drawn beside the sampled ones and not trained on.
        centre_scores: the mean score of a group is subtracted from each of its scores first, before the KL is.
        mask_unfinished: responses that did not end by themselves are not trained on.
        drop_equal: groups whose rewards are all equal, before any penalty for their length, are not trained on.

    Raises:
        ValueError: an unknown reduction, baseline or place of the KL, a negative clip, or k1 in the loss.
    """

    advantages: Callable[[Array, Array, int], Array]
    ratio: Callable[[Array, Array, Array], Array] = token_log_ratio
    surrogate: Callable[..., Array] = clipped_surrogate
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "sequence_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_in: Literal["reward", "loss"] = "loss"
    kl_estimate: Literal["k1", "k2", "k3"] = "k3"
    baseline: Literal["group", "batch", "greedy"] = "group"
    centre_scores: bool = False
    mask_unfinished: bool = False
    drop_equal: bool = False

    def __post_init__(self):
        check_kl(self.kl_in, self.kl_estimate)
        check_clips(self.clip_low, self.clip_high, None)
        if self.baseline not in ("group", "batch", "greedy"):
            raise ValueError(f"baseline is {self.baseline!r}: choose group, batch or greedy.")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {self.reduction!r}: choose one of {', '.join(REDUCTIONS)}.")
        if (self.advantages is greedy_difference) != (self.baseline == "greedy"):
            raise ValueError("greedy_difference compares with a greedy response: give it the baseline 'greedy', alone.")
        if self.advantages in (group_standardised, group_centred, leave_one_out) and self.baseline != "group":
            raise ValueError(f"{self.advantages.__name__} compares within groups: leave its baseline at 'group'.")
        if self.centre_scores and self.baseline != "group":
            raise ValueError("centre_scores subtracts the mean of a group: it needs the baseline 'group'.")


_UNCLIPPED = {"clip_low": float("inf"), "clip_high": float("inf")}
_IN_REWARD = {"kl_in": "reward", "kl_estimate": "k1"}

METHODS = {
    "grpo": Method(group_standardised),
    "dr_grpo": Method(group_centred, reduction="constant"),
    "dapo": Method(group_standardised, reduction="token_mean", clip_high=0.28, mask_unfinished=True, drop_equal=True),
    "gspo": Method(group_standardised, ratio=sequence_log_ratio, clip_low=3e-4, clip_high=4e-4),
    "cispo": Method(
        group_standardised, surrogate=capped_surrogate, reduction="token_mean", clip_low=1.0, clip_high=4.0
    ),
    "rloo": Method(leave_one_out, ratio=total_log_ratio, **_IN_REWARD),
    "reinforce++": Method(whitened_return, reduction="token_mean", baseline="batch", **_IN_REWARD),
    "reinforce++_baseline": Method(whitened_return, reduction="token_mean", centre_scores=True, **_IN_REWARD),
    "remax": Method(
        greedy_difference,
        surrogate=reinforce_surrogate,
        reduction="sequence_sum",
        baseline="greedy",
        **_UNCLIPPED,
        **_IN_REWARD,
    ),
}
"""Methods by name.

| name                   | source                                                                       |
|------------------------|------------------------------------------------------------------------------|
| `grpo`                 | Shao et al. 2024 (arXiv:2402.03300)                                          |
| `dr_grpo`              | Liu et al. 2025 (arXiv:2503.20783)                                           |
| `dapo`                 | Yu et al. 2025 (arXiv:2503.14476); see `oversample` and `overlong_buffer`    |
| `gspo`                 | Zheng et al. 2025 (arXiv:2507.18071)                                         |
| `cispo`                | MiniMax 2025 (arXiv:2506.13585)                                              |
| `rloo`                 | Ahmadian et al. 2024 (arXiv:2402.14740)                                      |
| `reinforce++`          | Hu et al. 2025 (arXiv:2501.03262), also its form with a group's baseline     |
| `remax`                | Li et al. 2023 (arXiv:2310.10505)                                            |
"""


def method(name: str, dual_clip: float | None = None, **changes: Any) -> Method:
    """A method of the table, with some of its pieces changed.

    Args:
        name: one of `METHODS`.
        dual_clip: c > 1: where the advantage is negative, the loss of a token is at most c times its size; None: no
            bound. For methods with a clipped surrogate.
        changes: attributes of `Method`.

    Raises:
        ValueError: no such method, dual_clip for one without a clipped surrogate, or not above 1.

    Example:
        >>> method("grpo", clip_high=0.28).clip_high
        0.28
        >>> method("grop")
        Traceback (most recent call last):
            ...
        ValueError: no method 'grop': choose one of grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce++, ...
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}: choose one of {', '.join(METHODS)}.")
    chosen = dataclasses.replace(METHODS[name], **changes)
    if dual_clip is None:
        return chosen
    if chosen.surrogate is not clipped_surrogate:
        raise ValueError(f"the method {name} does not clip its surrogate: leave out dual_clip.")
    check_clips(chosen.clip_low, chosen.clip_high, dual_clip)
    return dataclasses.replace(chosen, surrogate=partial(clipped_surrogate, dual_clip=dual_clip))
