"""The shape of a decoder-only transformer."""

import dataclasses
from typing import Literal

REMAT_POLICIES = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-shaped decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

    Attributes:
        vocab_size: number of token ids, V.
        width: width of the residual stream, D.
        layers: number of blocks, L.
        heads: number of query heads.
        key_value_heads: number of key and value heads; divides `heads`.
        feed_forward_width: inner width of the SwiGLU block.
        context_length: the longest sequence (prompt and response) the model may see, in tokens.
        head_width: width of one head; None means `width // heads`.
        norm_epsilon: added to the mean square in RMSNorm.
        rope_theta: base of the rotary frequencies.
        tied_embeddings: whether the unembedding is the transposed embedding.
        initializer_range: standard deviation of the normal initialisation of all matrices.
        dtype: dtype of the computation ("float32", "bfloat16", "float64"); norms' statistics, logits and losses have at
            least float32.
        param_dtype: dtype in which parameters are stored.
        remat: what a block keeps for the backward pass: "none" = everything is kept, "dots" = only matrix products,
            "full" = only the block's input.

    Raises:
        ValueError: when the sizes do not fit together or a name is unknown.

    Example:
        >>> config = ModelConfig(vocab_size=512, width=64, layers=5, heads=8, key_value_heads=4,
        ...                      feed_forward_width=172, context_length=512)
        >>> config.head_size
        8
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    feed_forward_width: int
    context_length: int
    head_width: int | None = None
    norm_epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    tied_embeddings: bool = True
    initializer_range: float = 0.02
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self):
        sizes = ("vocab_size", "width", "layers", "heads", "key_value_heads", "feed_forward_width", "context_length")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.heads % self.key_value_heads:
            raise ValueError(
                f"ModelConfig.key_value_heads = {self.key_value_heads} does not divide heads = {self.heads}; "
                "choose a divisor."
            )
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"ModelConfig.heads = {self.heads} does not divide width = {self.width}; give head_width as well."
            )
        if self.head_size % 2:
            raise ValueError(f"ModelConfig heads are {self.head_size} wide; rotary positions need an even width.")
        for name, choices in {"remat": REMAT_POLICIES, "dtype": DTYPES, "param_dtype": DTYPES}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"ModelConfig.{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads
