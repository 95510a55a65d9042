"""What is sampled from: temperature, then top-k, top-p and min-p."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.models.quantised import STORAGES, Storage


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    Attributes:
        max_new_tokens: the longest response, T, in tokens.
        stop_tokens: token ids that end a response (they belong to it).
        pad_token: id written after the end.
        temperature: logits are divided by it; 0 takes the most likely token (log-probabilities are then those of
            temperature 1).
        top_k: only the k most likely tokens; None keeps all.
        top_p: only the smallest set of most likely tokens with at least this mass; 1 keeps all.
        min_p: only tokens at least this fraction as likely as the most likely one; 0 keeps all.
        decode: the loop that draws: None: `generate.draw_together`, every response at once; `queue.InTurns`: a few at
            a time. It does not change a sample.
        cache: how keys and values are kept while drawing: as computed, or in 16 or 8 bits.
        weights: how the policy's matrices are kept while drawing, likewise. Both change the policy that draws by their
            rounding, so that log-probabilities differ from those of training, see `policy/max_logprob_gap`.

    Raises:
        ValueError: an option is out of its range.
    """

    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    pad_token: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    decode: Callable | None = None
    cache: Storage = "computation"
    weights: Storage = "computation"

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or positive"),
            "top_k": (self.top_k is None or self.top_k >= 1, "None or at least 1"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "cache": (self.cache in STORAGES, f"one of {', '.join(STORAGES)}"),
            "weights": (self.weights in STORAGES, f"one of {', '.join(STORAGES)}"),
        }
        for name, (fine, remedy) in checks.items():
            if not fine:
                raise ValueError(f"SamplingConfig.{name} is {getattr(self, name)}; it must be {remedy}.")

    @property
    def filtered(self) -> bool:
        """Whether some tokens may be excluded, so that sampling and policy distributions differ."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0 or self.temperature == 0

    @property
    def logprob_temperature(self) -> float:
        """The temperature of the policy's log-probabilities."""
        return self.temperature or 1.0


def filter_logits(logits: Float[Array, "B V"], sampling: SamplingConfig) -> Float[Array, "B V"]:
    """Temperature-scaled logits with excluded tokens at minus infinity.

    Each filter looks at the distribution that the ones before it left: temperature, top-k, top-p (Holtzman et al. 2019,
    1904.09751), min-p (Nguyen et al. 2024, 2407.01082). The most likely token always stays, and so do tokens tied with
    the least likely one that is kept; greedy takes the first of tied tokens.

    Example:
        >>> import jax.numpy as jnp
        >>> sampling = SamplingConfig(max_new_tokens=1, stop_tokens=(0,), top_k=2)
        >>> filter_logits(jnp.array([[1.0, 3.0, 2.0]]), sampling).tolist()
        [[-inf, 3.0, 2.0]]
    """
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1)
        return jnp.where(jax.nn.one_hot(best, logits.shape[-1], dtype=bool), 0.0, -jnp.inf).astype(logits.dtype)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p).astype(logits.dtype)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits
