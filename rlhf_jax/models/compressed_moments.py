"""Adam whose two moments are stored in 2 bytes or in 1 byte a parameter, after Dettmers et al. 2021 (2110.02861).

As there, the state holds narrow numbers, a step computes with float32 ones, and 8-bit codes have a scale for each group
of neighbours, so that one outlier costs only its group. Three things differ.

*Codes are logarithmic*: levels are an eighth of an octave, 9 %, apart everywhere. The first moment (a sign and 127
levels) reaches 2^-15.75 of its scale, the second one (255 levels) 2^-31.75, so it spans the range of the first one's
square; what is below that is rounded up, so that no second moment is 0 beside a first one that is not. No table is
looked up, which accelerators do slowly.

*A scale belongs to a row* (the entries that share all axes but the last) *and is a bound*, not the maximum: the moving
average of the row's largest gradient (or square), with the decay of the moment. So one pass over the arrays makes the
new codes, and nothing of the size of the parameters is held besides.

*Rounding is stochastic*: up or down with the odds that make the expected value the value itself. With b2 = 0.999 a step
changes the second moment by about 0.1 %; rounded to the nearest of levels that are 0.8 % (bfloat16) or 9 % apart, it
would never follow gradients that become smaller. The noise comes from a fixed key and the number of the step: a resumed
run repeats it.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Float32, Int, Int8, UInt8, UInt16

from rlhf_jax.types import Params, at_least_float32

Moments = Literal["float32", "bfloat16", "int8"]
SHORTEST_ROW = 16
LEVELS_PER_OCTAVE = 8


class Coded(NamedTuple):
    """An array in 8-bit codes.

    Attributes:
        codes: the level of each entry, int8 with the entry's sign, or uint8 where no entry is negative; 0 is exactly 0.
        scales: for each row (all but the last axis) a bound of the sizes of its entries, float32.
    """

    codes: Int8[Array, "*rows N"] | UInt8[Array, "*rows N"]
    scales: Float32[Array, "*rows"]


def encode(
    values: Float[Array, "*rows N"], scales: Float32[Array, "*rows"], noise: UInt16[Array, "*rows N"], signed: bool
) -> Coded:
    """The array in 8-bit codes, rounded at random so that the expectation of `decode` is the array.

    Args:
        values: the array.
        scales: for each row a bound of the sizes of its entries; a larger bound than needed costs range, not precision.
        noise: random bits; an entry is rounded up where they, read as a number in [0, 1), are below the way from its
            lower to its upper neighbour.
        signed: whether entries may be negative. If not, an entry that is not 0 gets a code that is not 0: what is below
            2^-31.75 of the scale of its row is rounded up to it.

    Example:
        >>> coded = encode(jnp.array([4.0, -2.0, 0.0, 1.0]), jnp.array(8.0), jnp.zeros(4, jnp.uint16), signed=True)
        >>> coded.codes.tolist()
        [119, -111, 0, 103]
        >>> decode(coded).tolist()
        [4.0, -2.0, 0.0, 1.0]
    """
    top = 127 if signed else 255
    size = jnp.abs(values.astype(jnp.float32))
    ratio = size / jnp.where(scales == 0, 1.0, scales)[..., None]
    below = jnp.clip(jnp.floor(top + LEVELS_PER_OCTAVE * jnp.log2(ratio)), 0.0, top - 1.0)
    low, high = _level(below, top), _level(below + 1, top)
    up = noise.astype(jnp.float32) / 2**16 < (ratio - low) / (high - low)
    codes = below + up.astype(jnp.float32)
    if not signed:
        codes = jnp.where(size > 0, jnp.maximum(codes, 1.0), 0.0)
        return Coded(codes=codes.astype(jnp.uint8), scales=scales)
    return Coded(codes=jnp.where(values < 0, -codes, codes).astype(jnp.int8), scales=scales)


def decode(coded: Coded) -> Float32[Array, "*rows N"]:
    """The array that the codes stand for."""
    top = 127 if coded.codes.dtype == jnp.int8 else 255
    codes = coded.codes.astype(jnp.float32)
    return jnp.sign(codes) * _level(jnp.abs(codes), top) * coded.scales[..., None]


def narrow(values: Float[Array, "*axes"], noise: UInt16[Array, "*axes"]) -> BFloat16[Array, "*axes"]:
    """The array in bfloat16, rounded away from or towards 0 at random so that its expectation is the array.

    Args:
        values: the array.
        noise: random bits: what is added below the bits that bfloat16 keeps.

    Example:
        >>> values = jnp.full(2, 1.0 + 2.0**-8)  # halfway between neighbours
        >>> narrow(values, jnp.array([0x7FFF, 0x8000], jnp.uint16)).tolist()
        [1.0, 1.0078125]
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    kept = (bits + noise.astype(jnp.uint32)) >> 16
    return jax.lax.bitcast_convert_type(kept.astype(jnp.uint16), jnp.bfloat16)


def scale_by_adam(b1: float, b2: float, moments: Moments = "float32") -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments stored in this format.

    The state is optax's (`count`, `mu`, `nu`). With "bfloat16" every moment is. With "int8" a moment is a `Coded` in
    the place of its array: 1 byte an entry and 4 a row; where rows are shorter than 16 entries it stays float32.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        moments: the format. "float32": at least that, whatever the dtype of the parameters.

    Raises:
        ValueError: an unknown format.
    """
    if moments not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"moments are {moments!r}; choose float32, bfloat16 or int8.")
    exact = optax.scale_by_adam(b1=b1, b2=b2)

    def init(params: Params) -> optax.ScaleByAdamState:
        state = exact.init(jax.tree.map(at_least_float32, params))
        zeros = lambda dtype: lambda leaf: _zeros(leaf, dtype, moments)  # noqa: E731
        return state._replace(mu=jax.tree.map(zeros("int8"), state.mu), nu=jax.tree.map(zeros("uint8"), state.nu))

    def update(gradients: Params, state: optax.ScaleByAdamState, params: Params | None = None):
        gradients = jax.tree.map(at_least_float32, gradients)
        updates, after = exact.update(gradients, state._replace(mu=_load(state.mu), nu=_load(state.nu)), params)
        if moments == "float32":
            return updates, after
        squares, noise = jax.tree.map(jnp.square, gradients), _noise(gradients, state.count)
        mu = _store(after.mu, state.mu, gradients, b1, jax.tree.map(lambda bits: bits.astype(jnp.uint16), noise))
        nu = _store(after.nu, state.nu, squares, b2, jax.tree.map(lambda bits: (bits >> 16).astype(jnp.uint16), noise))
        return updates, after._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _zeros(leaf: Array, codes: str, moments: Moments) -> Array | Coded:
    """A moment of 0 in its format."""
    if moments == "bfloat16":
        return leaf.astype(jnp.bfloat16)
    if moments == "float32" or leaf.ndim == 0 or leaf.shape[-1] < SHORTEST_ROW:
        return leaf
    return Coded(codes=leaf.astype(codes), scales=jnp.zeros(leaf.shape[:-1], jnp.float32))


def _load(moments: Params) -> Params:
    """The tree with all moments in at least float32."""
    whole = lambda leaf: decode(leaf) if isinstance(leaf, Coded) else at_least_float32(leaf)  # noqa: E731
    return jax.tree.map(whole, moments, is_leaf=lambda leaf: isinstance(leaf, Coded))


def _noise(tree: Params, count: Int[Array, ""]) -> Params:
    """32 random bits for each entry of a tree, other ones in every step: half of them for each moment."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
    return structure.unflatten(
        [jax.random.bits(key, leaf.shape, jnp.uint32) for key, leaf in zip(keys, leaves, strict=True)]
    )


def _store(whole: Params, before: Params, averaged: Params, decay: float, noise: Params) -> Params:
    """The new moments, moving averages of `averaged`, in the format of those before."""

    def store(leaf: Array, before: Array | Coded, averaged: Array, noise: Array) -> Array | Coded:
        if isinstance(before, Coded):
            # The same average of the largest entries bounds the averages of all: no second look at the new moment.
            largest = jnp.abs(averaged).max(axis=-1).astype(jnp.float32)
            scales = decay * before.scales + (1 - decay) * largest
            return encode(leaf, scales, noise, signed=before.codes.dtype == jnp.int8)
        return narrow(leaf, noise) if before.dtype == jnp.bfloat16 else leaf

    return jax.tree.map(store, whole, before, averaged, noise)


def _level(number: Float32[Array, "*axes"], top: int) -> Float32[Array, "*axes"]:
    """What a code stands for, as a share of the scale of its row."""
    return jnp.where(number == 0, 0.0, jnp.exp2((number - top) / LEVELS_PER_OCTAVE))
