"""Log-probabilities of the tokens of whole sequences under a policy."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import token_scores
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.types import Params


def next_token_logprob(
    config: ModelConfig,
    policy: Params,
    tokens: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    segments: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S-1"]:
    """log pi(token | tokens before it) of every token but the first of each row, in nats.

    What stands at padding means nothing; mask it.

    Args:
        config: the policy's shape.
        policy: its parameters.
        tokens: token ids, int32 [B, S]; padding may stand on either side.
        mask: True on real tokens.
        segments: ids of the sequences that are packed into a row, see `Demonstrations`.

    Returns:
        [B, S - 1], float32 or better; entry t belongs to token t + 1.
    """
    states = apply_trunk(config, policy["trunk"], tokens, mask, segments=segments).final
    # The last state predicts nothing; it is scored since S divides over devices and blocks where S - 1 does not.
    logprob, _ = token_scores(config, policy, states, jnp.roll(tokens, -1, axis=1))
    return logprob[:, :-1]
