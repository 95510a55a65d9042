"""The shape of a decoder-only transformer of any family: what differs between families is data here.

`models.huggingface` translates the `config.json` of every family into a `ModelConfig`.
"""

import dataclasses
from typing import Literal

Attention = Literal["auto", "reference", "rows", "ring", "splash", "cudnn"]
Remat = Literal["none", "dots", "projections", "full", "projections_on_host", "full_on_host"]


def _check_names(options) -> None:
    """Refuses a name that the annotation of its field does not list."""
    for field in dataclasses.fields(options):
        choices = getattr(field.type, "__args__", ())
        if getattr(field.type, "__origin__", None) is Literal and getattr(options, field.name) not in choices:
            raise ValueError(
                f"{type(options).__name__}.{field.name} is {getattr(options, field.name)!r}; "
                f"choose one of {', '.join(choices)}."
            )


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than the one trained on.

    Attributes:
        kind: "linear" (Chen et al. 2023, 2306.15595), "dynamic" (NTK by length), "yarn" (Peng et al. 2023, 2309.00071)
            or "llama3" (Llama 3.1).
        factor: by how much the context grows.
        original_context: the context trained on, in tokens ("dynamic", "yarn", "llama3").
        low_frequency_factor: "llama3": wavelengths above original_context / this are scaled fully.
        high_frequency_factor: "llama3": wavelengths below original_context / this are not scaled.
        beta_fast: "yarn": rotations within the original context above which a frequency is kept.
        beta_slow: "yarn": rotations below which a frequency is scaled fully.
        attention_factor: "yarn": multiplies cos and sin; None: 0.1 ln(factor) + 1.
        truncate: "yarn": whether the bounds of the ramp are rounded to whole frequencies.

    Raises:
        ValueError: a factor below 1, no original context where one is needed, or bounds in the wrong order.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float
    original_context: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check_names(self)
        if not self.factor >= 1:
            raise ValueError(f"RopeScaling.factor is {self.factor}; it must be at least 1.")
        if self.kind != "linear" and not (self.original_context or 0) >= 1:
            raise ValueError(
                f'RopeScaling.original_context is {self.original_context}; kind "{self.kind}" needs the number of '
                "tokens of the context trained on."
            )
        if self.kind == "llama3" and not self.high_frequency_factor > self.low_frequency_factor:
            raise ValueError(
                f"RopeScaling.high_frequency_factor is {self.high_frequency_factor}; it must exceed "
                f"low_frequency_factor = {self.low_frequency_factor}."
            )


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward block (Mixtral, Qwen3-MoE): dropless, top-k by softmax.

    Attributes:
        count: number of experts, E.
        active: experts a token, k.
        normalise: whether the k weights are divided by their sum.
    """

    count: int
    active: int
    normalise: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder; the defaults are a Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

    Attributes:
        vocab_size: number of token ids, V.
        width: width of the residual stream, D.
        layers: number of blocks, L.
        heads: number of query heads.
        key_value_heads: number of key and value heads; divides `heads`.
        feed_forward_width: inner width of the feed-forward block (of one expert, in a mixture).
        context_length: the longest sequence (prompt and response) the model may see, in tokens.
        head_width: width of one head; None means `width // heads`.
        norm: "rms" (x / rms(x) * scale), "rms_plus_one" (* (1 + scale), Gemma) or "layer" (LayerNorm with bias).
        norm_placement: "pre" (before attention and feed-forward), "post" (after them, before the residual is added;
            OLMo 2) or "both" (Gemma 2 and 3).
        norm_epsilon: added to the mean square (variance) in norms.
        parallel_residual: attention and feed-forward read the same residual stream and are added at once (GPT-NeoX).
        positions: "rotary" or "learned" (a table added to the embedding; GPT-2, OPT).
        rope_theta: base of the rotary frequencies.
        rope_scaling: how the frequencies are changed for long contexts; None: not at all.
        rotary_width: leading channels of a head that are rotated (GPT-NeoX: a part); None: all.
        local_rope_theta: base of the frequencies in local layers, which are never scaled (Gemma 3); None: as in
            global layers.
        window: tokens a local layer looks back on, itself included; None: no layer is local.
        local_layers: one bool a layer, True where attention is local; empty: all, if there is a window.
        query_scale: multiplies attention logits; None means `head_size ** -0.5`.
        attention_softcap: c in c tanh(logits / c) of attention; None: none.
        attention: how it is computed, never what: "reference" (all products of queries and keys at once), "rows" (one
            row after the other, for CPUs), "ring" (`attention_block` keys at a time, which travel round the devices of
            the mesh's `sequence` axis; for long contexts; with `remat` "dots" its products are kept after all),
            "splash" (the kernel for TPUs), "cudnn" (that for GPUs), or "auto", see `attention_choice`. Tokens that
            follow a cache always take "reference", and so must what is differentiated forwards (`jax.jvp`).
        attention_block: keys that "ring" looks at in one step, in tokens.
        logit_softcap: the same for token logits.
        query_key_norm: "none", "head" (a norm over each head; Qwen3, Gemma 3) or "projection" (over all heads at
            once; OLMo 2), before the rotation.
        query_key_value_bias: whether query, key and value projections have biases.
        attention_output_bias: whether the output projection has one.
        feed_forward: "gated" (down(act(gate(x)) * up(x))) or "plain" (down(act(up(x)))).
        activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".
        feed_forward_bias: whether the feed-forward projections have biases.
        experts: a mixture of experts in every layer; None: one feed-forward block.
        embedding_scale: multiplies embeddings, rounded to the computation's dtype (Gemma: sqrt(D)); None: 1.
        tied_embeddings: whether the unembedding is the transposed embedding.
        initializer_range: standard deviation of the normal initialisation of all matrices.
        dtype: dtype of the computation ("float32", "bfloat16", "float64"); norms' statistics, logits and losses have at
            least float32.
        param_dtype: dtype in which parameters are stored.
        remat: what a block keeps for the backward pass; the rest is computed again. "none": everything. "dots":
            results of matrix products, attention logits [B, H, N, S] among them. "projections": results of products
            with parameters, so no attention logits. "full": the block's input. "projections_on_host" and
            "full_on_host": the same two in the host's memory (pinned), fetched block by block.

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
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_placement: Literal["pre", "post", "both"] = "pre"
    norm_epsilon: float = 1e-5
    parallel_residual: bool = False
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_width: int | None = None
    local_rope_theta: float | None = None
    window: int | None = None
    local_layers: tuple[bool, ...] = ()
    query_scale: float | None = None
    attention_softcap: float | None = None
    attention: Attention = "auto"
    attention_block: int = 512
    logit_softcap: float | None = None
    query_key_norm: Literal["none", "head", "projection"] = "none"
    query_key_value_bias: bool = False
    attention_output_bias: bool = False
    feed_forward: Literal["gated", "plain"] = "gated"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    feed_forward_bias: bool = False
    experts: Experts | None = None
    embedding_scale: float | None = None
    tied_embeddings: bool = True
    initializer_range: float = 0.02
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Remat = "none"

    def __post_init__(self):
        _check_names(self)
        sizes = ("vocab_size", "width", "layers", "heads", "key_value_heads", "feed_forward_width", "context_length")
        for name in (*sizes, "attention_block"):
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
        if self.positions == "rotary" and (self.rotary_size % 2 or not 0 < self.rotary_size <= self.head_size):
            raise ValueError(
                f"ModelConfig rotates {self.rotary_size} of the {self.head_size} channels of a head; rotary positions "
                "need an even number of them."
            )
        if self.rope_scaling is not None and self.rope_scaling.kind == "dynamic" and self.rotary_size < 4:
            raise ValueError(
                f'ModelConfig rotates {self.rotary_size} channels a head; rope scaling "dynamic" needs at least 4.'
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"ModelConfig.window is {self.window}; it must be at least 1.")
        if self.local_layers and (self.window is None or len(self.local_layers) != self.layers):
            raise ValueError(
                f"ModelConfig.local_layers has {len(self.local_layers)} entries and window is {self.window}; "
                f"give one entry for each of the {self.layers} layers, and a window."
            )
        if self.experts is not None and self.feed_forward_bias:
            raise ValueError("ModelConfig.feed_forward_bias is True; experts have no biases: set it to False.")
        if self.experts is not None and not 1 <= self.experts.active <= self.experts.count:
            raise ValueError(f"{self.experts.active} of {self.experts.count} experts cannot be active; give 1 to all.")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def rotary_size(self) -> int:
        """Channels of a head that are rotated."""
        return self.head_size if self.rotary_width is None else self.rotary_width

    @property
    def is_local(self) -> tuple[bool, ...]:
        """For every layer, whether it attends within the window only."""
        return self.local_layers or (self.window is not None,) * self.layers
