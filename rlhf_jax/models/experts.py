"""A mixture of experts in place of the feed-forward block: dropless, every token gets the experts that it chose.

A token's path: the router gives it k of E experts and their weights; its k copies are sorted by expert, so that each
expert multiplies one contiguous group of rows (`jax.lax.ragged_dot`); the products are put back and added by weight.
`vmap` over whole mixtures (an ensemble) works. One that shares the kernels (many adapters over one base, a Jacobian)
does not, as `ragged_dot` batches only all its arguments together: use `jax.lax.map` there.

On a mesh every device does the same for its own experts and adds nothing for those of others. The devices along
`expert` first gather each other's tokens and at last share out the sums, so no token is dropped however uneven the
choice is. The price: shapes cannot depend on the choice, so with e devices along `expert` a device sorts, holds and
activates the k copies of e times its own tokens, though it multiplies 1/e of them on average. `ragged_dot` becomes a
kernel on TPUs that multiplies a row once at most; on a CPU it multiplies all rows by each of the device's E/e kernels.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, Int, Shaped

from rlhf_jax.models.config import Experts, ModelConfig
from rlhf_jax.models.layers import ACTIVATIONS, Linear
from rlhf_jax.models.partitioning import axes_of, divided, mesh_sizes
from rlhf_jax.models.shares import on_shares
from rlhf_jax.types import at_least_float32, wide

AXES = {
    "gate": ("expert", "width", "feed_forward"),
    "up": ("expert", "width", "feed_forward"),
    "down": ("expert", "feed_forward", "width"),
}
"""The logical axes of the experts' kernels."""


def route(
    logits: Float[Array, "*tokens E"], experts: Experts
) -> tuple[Float[Array, "*tokens {experts.active}"], Int[Array, "*tokens {experts.active}"]]:
    """The experts of each token and their weights, the largest first.

    Weights are softmax probabilities over all experts in at least float32, divided by their sum over the chosen ones
    where `experts.normalise` (Jiang et al. 2024, 2401.04088).

    Args:
        logits: of every expert for every token.
        experts: how many are chosen.

    Returns:
        Weights [..., k] and numbers of experts, int32 [..., k].

    Example:
        >>> weights, chosen = route(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), Experts(count=3, active=2))
        >>> (100 * weights).round().tolist(), chosen.tolist()
        ([[67.0, 33.0]], [[1, 2]])
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(at_least_float32(logits), axis=-1), experts.active)
    return weights / weights.sum(axis=-1, keepdims=True) if experts.normalise else weights, chosen


class ExpertKernels(nn.Module):
    """The feed-forward blocks of all experts: `gate` [E, D, F] (unless "plain"), `up` [E, D, F], `down` [E, F, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, Float[Array, "E _ _"]]:
        """The kernels in the dtype of the computation."""
        config = self.config
        sizes = {"expert": config.experts.count, "width": config.width, "feed_forward": config.feed_forward_width}

        def kernel(name: str) -> Float[Array, "E _ _"]:
            init = nn.with_logical_partitioning(nn.initializers.normal(config.initializer_range), AXES[name])
            shape = tuple(sizes[axis] for axis in AXES[name])
            return self.param(name, init, shape, config.param_dtype).astype(config.dtype)

        return {name: kernel(name) for name in AXES if name != "gate" or config.feed_forward == "gated"}


def weighted_products(
    config: ModelConfig,
    kernels: Mapping[str, Float[Array, "_ _ _"]],
    first: Int[Array, ""] | int,
    tokens: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    chosen: Int[Array, "T K"],
) -> Float[Array, "T D"]:
    """What some of the experts make of the tokens that chose them, added by weight; other experts add nothing.

    Args:
        config: the model's shape.
        kernels: of the experts first, first + 1, …: from `ExpertKernels`, or a share of them.
        first: number of the first of those experts.
        tokens: the tokens.
        weights: of each token's experts, from `route`.
        chosen: the numbers of those experts.
    """
    count, active, here = config.experts.count, config.experts.active, kernels["up"].shape[0]
    groups = (chosen.reshape(-1) - first) % count  # these experts are the groups 0, 1, …
    order = _order(groups)
    group_sizes = jnp.bincount(groups, length=count)[:here].astype(jnp.int32)
    # `ragged_dot` does not say what stands in the rows behind the last group.
    in_a_group = (jnp.arange(len(order)) < group_sizes.sum())[:, None]

    def grouped(rows: Float[Array, "R _"]) -> Float[Array, "R _"]:
        return jnp.where(in_a_group, rows, jnp.zeros((), rows.dtype))

    def product(name: str, rows: Float[Array, "R _"]) -> Float[Array, "R _"]:
        return grouped(jax.lax.ragged_dot(rows, kernels[name], group_sizes))

    copies = grouped(repeat(tokens, "t d -> (t k) d", k=active)[order])
    activation, inner = ACTIVATIONS[config.activation], product("up", copies)
    inner = activation(product("gate", copies)) * inner if "gate" in kernels else activation(inner)
    products = rearrange(product("down", inner)[_order(order)], "(t k) d -> t k d", k=active)
    return jnp.einsum("tkd,tk->td", products.astype(wide(products)), weights).astype(tokens.dtype)


def _order(keys: Int[Array, " R"]) -> Int[Array, " R"]:
    """`jnp.argsort`, of which JAX 0.10 thinks that it is the same on all devices though the keys differ."""
    return jax.lax.sort_key_val(keys, jnp.arange(len(keys), dtype=keys.dtype) + 0 * keys)[1]


def mixture(config: ModelConfig, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """The weighted sum of what each token's experts make of it; padding is routed like any token.

    To be called inside a module, whose parameters `router` and `experts` become.

    Raises:
        ValueError: on a mesh that does not divide the experts.
    """
    count, sizes = config.experts.count, mesh_sizes()
    if divided(("expert",), (count,)) != ("expert",):
        raise ValueError(
            f"the mesh axis expert={sizes['expert']} does not divide the {count} experts; choose a divisor of {count}."
        )
    weights, chosen = route(Linear(config, count, ("width", "expert"), name="router")(x), config.experts)
    kernels = ExpertKernels(config, name="experts")()
    # Rows that the mesh does not divide (the one row of an initialisation) lie on every device; whole kernels then too.
    row_axes = (*divided(("batch", "tokens"), x.shape[:2]), None)
    split = row_axes[0] is not None
    kernel_axes = [tuple(axis if split or axis != "width" else None for axis in AXES[name]) for name in kernels]

    def gathered(share: Shaped[Array, "..."], dimension: int, name: str) -> Shaped[Array, "..."]:
        for axis in axes_of(name, sizes) if split else ():
            share = jax.lax.all_gather(share, axis, axis=dimension, tiled=True)
        return share

    def on_this_device(x: Float[Array, "B N D"], weights, chosen, *shares) -> Float[Array, "B N D"]:
        shares = zip(kernels, shares, strict=True)
        own = {name: gathered(share, AXES[name].index("width"), "width") for name, share in shares}
        first = sum(jax.lax.axis_index(axis) * own["up"].shape[0] for axis in axes_of("expert", sizes))
        tokens = [rearrange(gathered(array, 0, "expert"), "b n d -> (b n) d") for array in (x, weights, chosen)]
        out = rearrange(weighted_products(config, own, first, *tokens), "(b n) d -> b n d", n=x.shape[1])
        out = jax.lax.psum(out, axes_of("feed_forward", sizes))
        for axis in axes_of("expert", sizes):
            out = jax.lax.psum_scatter(out, axis, tiled=True) if split else jax.lax.psum(out, axis)
        return out

    return on_shares(on_this_device, (*[row_axes] * 3, *kernel_axes), row_axes)(x, weights, chosen, *kernels.values())
