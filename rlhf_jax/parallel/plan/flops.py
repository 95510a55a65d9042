"""FLOPs of a model by arithmetic from its shape: 2 for each multiply-add of a matrix product.

Norms, activations, softmaxes, rotations and the lookup of embeddings are left out (below 1 % at the widths that are
planned for). Of a mixture only the experts that a token is routed to count. With D, F, V, W the widths of residual
stream, feed-forward block, vocabulary and head, Q and K the query and key-value heads, E experts of which k are active:

    per token and layer   2 D W (2 Q + 2 K) + 2 · 3 D F          (3: gated; 2: plain; mixture: k · 3 D F + D E)
    attention             4 Q W a token and slot that it is multiplied with
    unembedding           2 D V a position

A backward pass costs twice its forward pass. A block that is rematerialised in full costs its forward pass once more
(but for its last product, where nothing follows that a gradient goes through), one of which only projections are kept
its attention; and logits are always computed again.
"""

from rlhf_jax.models.attention_choice import chosen_attention
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.row_attention import parts
from rlhf_jax.sampling.generate import rooms


def projection_flops(config: ModelConfig) -> float:
    """FLOPs of the matrix products of all layers with parameters, for one token.

    Example:
        >>> config = ModelConfig(vocab_size=8, width=4, layers=2, heads=2, key_value_heads=1, feed_forward_width=8,
        ...                      context_length=8)
        >>> projection_flops(config)  # a layer: 2 (4·4 + 2·4·2 + 4·4 + 3·4·8) = 288
        576.0
    """
    width, size = config.width, config.head_size
    attention = 2.0 * width * size * (2 * config.heads + 2 * config.key_value_heads)
    feed_forward = 2.0 * width * config.feed_forward_width * (3 if config.feed_forward == "gated" else 2)
    if config.experts is not None:
        feed_forward = feed_forward * config.experts.active + 2.0 * width * config.experts.count
    return config.layers * (attention + feed_forward)


def attention_flops(config: ModelConfig, slots: int) -> float:
    """FLOPs of one token's scores and weighted sum over so many slots, in all layers."""
    return config.layers * 4.0 * config.heads * config.head_size * slots


def forward_flops(config: ModelConfig, rows: int, tokens: int) -> float:
    """FLOPs of one forward pass of the trunk.

    The reference and the ring attention multiply whole squares and mask the upper half; "rows" skips most of it; the
    kernels ("splash", "cudnn") skip what is above the diagonal and outside a local layer's window. "auto" is what it
    stands for on the devices that there are.

    Args:
        config: the model's shape.
        rows: sequences.
        tokens: tokens of each, padding included.
    """
    return rows * tokens * (projection_flops(config) + _scores(config, tokens))


def unembedding_flops(config: ModelConfig, positions: int) -> float:
    """FLOPs of the logits of so many positions."""
    return 2.0 * positions * config.width * config.vocab_size


def training_flops(config: ModelConfig, rows: int, tokens: int, scored: int) -> float:
    """FLOPs of a forward and a backward pass, with what is computed again.

    Args:
        config: the model's shape, and its `remat`.
        rows: sequences.
        tokens: tokens of each, padding included.
        scored: positions of each whose logits are computed.
    """
    forward, again = forward_flops(config, rows, tokens), 0.0
    if config.remat.startswith("full"):
        plain = config.experts is None and config.norm_placement == "pre"
        last = 2.0 * config.layers * config.width * config.feed_forward_width if plain else 0.0
        again = forward - rows * tokens * last
    elif config.remat.startswith("projections"):
        again = rows * tokens * _scores(config, tokens)
    return 3.0 * forward + again + 4.0 * unembedding_flops(config, rows * scored)


def scoring_flops(config: ModelConfig, rows: int, tokens: int, scored: int = 0) -> float:
    """FLOPs of a forward pass and the logits of `scored` positions a row."""
    return forward_flops(config, rows, tokens) + unembedding_flops(config, rows * scored)


def generation_flops(config: ModelConfig, rows: int, prompt: int, new: int) -> float:
    """FLOPs of a prefill and `new` drawn tokens a row; one is multiplied with every slot that the cache has by then."""
    ends = rooms(new)
    steps = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    slots = sum(count * (prompt + end + 1) for count, end in zip(steps, ends, strict=True))
    decoded = (new - 1) * projection_flops(config) + attention_flops(config, slots)
    return forward_flops(config, rows, prompt) + rows * decoded + unembedding_flops(config, rows * new)


def _scores(config: ModelConfig, tokens: int) -> float:
    """FLOPs of attention for one token of a forward pass, on average."""
    kind = chosen_attention(config, tokens)
    if kind in ("reference", "ring"):
        return attention_flops(config, tokens)
    if kind == "rows":
        return attention_flops(config, 1) * sum((part.stop - part.start) * part.stop for part in parts(tokens)) / tokens
    seen = [min(config.window, tokens) if local else (tokens + 1) / 2 for local in config.is_local]
    return 4.0 * config.heads * config.head_size * sum(seen)
