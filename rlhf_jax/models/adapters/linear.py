"""One linear layer with an adapter: what it computes, and the plain layer that computes the same.

An adapter is a dictionary of arrays beside the kernel; its keys say what is done (I inputs, O outputs, R rank):

- `input_scale` [I]: the inputs are multiplied (SSL, SSB; IA³ where it scales what a layer reads);
- `a` [I, R], `b` [R, O], `scale` []: scale a b is added to the kernel (LoRA), with `middle` between the two: a diagonal
  [R] (TriLoRA) or a matrix [R, R] (FLoRA);
- `magnitude` [O]: the columns of kernel + scale a b, whose `lengths` [O] are beside it, are brought to these (DoRA);
- `output_scale` [O]: the product is multiplied before the bias is added (SSB);
- `activation_scale` [O]: the output is multiplied, its bias included (IA³ where it scales what a layer writes);
- `reduce` [I, R], `expand` [R, O], `scale` []: scale relu(x reduce) expand is added (a parallel adapter, which no
  kernel can hold).

Sources: LoRA 2106.09685, DoRA 2402.09353, IA³ 2205.05638; SSL, SSB and the parallel view 2407.05417.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.types import Params, at_least_float32, wide


def adapted(x: Float[Array, "*batch I"], params: Params) -> Float[Array, "*batch O"]:
    """The output of a linear layer, with its adapter if it has one.

    Args:
        x: inputs, [..., I].
        params: `{"kernel" [I, O], "kernel_scale"? [O], "bias"? [O], "adapter"?}`; all but the adapter in the dtype of
            `x`. A scale multiplies the outputs of the kernel, which is quantised then. An adapter may be in
            a wider one: its matrices are cast, but products with its multipliers, and the sums that are their
            gradients, are taken in at least float32, as bfloat16 knows no number between 1 and 1.0078.

    Returns:
        Outputs in the dtype of `x`, [..., O]; without adapter exactly `x @ kernel + bias`.

    Example:
        >>> kernel, x = jnp.eye(2), jnp.array([[1.0, 2.0]])
        >>> adapted(x, {"kernel": kernel, "adapter": {"input_scale": jnp.array([3.0, 1.0])}}).tolist()
        [[3.0, 2.0]]
        >>> lora = {"a": jnp.ones((2, 1)), "b": jnp.array([[1.0, 0.0]]), "scale": jnp.array(2.0)}
        >>> adapted(x, {"kernel": kernel, "adapter": lora}).tolist()
        [[7.0, 2.0]]
    """
    adapter = _cast(params.get("adapter", {}), wide(x))
    scaled = _times(x, adapter["input_scale"]) if "input_scale" in adapter else x
    y = scaled @ params["kernel"]
    if "kernel_scale" in params:
        y = y * _last_axis(params["kernel_scale"], y.ndim)
    if "a" in adapter:
        y = y + _through(_product(scaled, adapter["a"]), adapter) @ (adapter["scale"] * adapter["b"]).astype(x.dtype)
    if "reduce" in adapter:
        inner = jax.nn.relu(_product(scaled, adapter["reduce"]))
        y = y + inner @ (adapter["scale"] * adapter["expand"]).astype(x.dtype)
    if "magnitude" in adapter:
        y = _times(y, adapter["magnitude"] / adapter["lengths"])
    if "output_scale" in adapter:
        y = _times(y, adapter["output_scale"])
    if "bias" in params:
        y = y + _last_axis(params["bias"], y.ndim)
    return _times(y, adapter["activation_scale"]) if "activation_scale" in adapter else y


def merged(params: Params) -> Params:
    """The layer without adapter, `{"kernel", "bias"?}`, that computes what this one does.

    Args:
        params: `{"kernel" [I, O], "bias"? [O], "adapter"?}`.

    Returns:
        Kernel and bias in the dtypes they have; the arithmetic is in at least float32 at the highest precision.

    Raises:
        ValueError: a parallel adapter, whose nonlinearity no kernel can hold.
    """
    adapter = _cast(params.get("adapter", {}), wide(params["kernel"]))
    if "reduce" in adapter:
        raise ValueError("A parallel adapter has a nonlinearity and cannot be merged; attach it instead.")
    plain = {name: at_least_float32(leaf) for name, leaf in params.items() if name != "adapter"}
    if "a" in adapter:
        plain["kernel"] = plain["kernel"] + _low_rank(adapter)
    if "magnitude" in adapter:
        plain["kernel"] = plain["kernel"] * (adapter["magnitude"] / adapter["lengths"])[None, :]
    if "input_scale" in adapter:
        plain["kernel"] = plain["kernel"] * adapter["input_scale"][:, None]
    if "output_scale" in adapter:
        plain["kernel"] = plain["kernel"] * adapter["output_scale"][None, :]
    if "activation_scale" in adapter:
        plain = {name: _times(leaf, adapter["activation_scale"]) for name, leaf in plain.items()}
    return {name: leaf.astype(params[name].dtype) for name, leaf in plain.items()}


def column_lengths(kernel: Float[Array, "I O"]) -> Float[Array, " O"]:
    """The Euclidean length of each column, in at least float32: DoRA's magnitudes at the start."""
    return jnp.linalg.norm(at_least_float32(kernel), axis=0)


def changed_lengths(kernel: Float[Array, "I O"], adapter: dict[str, Array]) -> Float[Array, " O"]:
    """The lengths of the columns of kernel + scale a b, and 1 where a column is 0: DoRA's `lengths`.

    They count as constants in its gradient (DoRA, section 4.3).
    """
    adapter = _cast(adapter, wide(kernel))
    lengths = column_lengths(at_least_float32(kernel) + _low_rank(adapter))
    return jnp.where(lengths > 0, lengths, 1.0)


def _low_rank(adapter: dict[str, Array]) -> Float[Array, "I O"]:
    """What a low-rank adapter adds to the kernel: scale a b, or scale a middle b."""
    left = _through(adapter["a"], adapter)
    return adapter["scale"] * jnp.matmul(left, adapter["b"], precision="highest")


def _through(x: Float[Array, "*batch R"], adapter: dict[str, Array]) -> Float[Array, "*batch R"]:
    if "middle" not in adapter:
        return x
    middle = adapter["middle"]
    return _times(x, middle) if middle.ndim == 1 else _product(x, middle)


def _product(x: Float[Array, "*batch N"], matrix: Float[Array, "N K"]) -> Float[Array, "*batch K"]:
    return x @ matrix.astype(x.dtype)


def _cast(adapter: dict[str, Array], dtype: jnp.dtype) -> dict[str, Array]:
    return {name: leaf.astype(dtype) for name, leaf in adapter.items()}


def _last_axis(vector: Float[Array, " O"], ndim: int) -> Float[Array, "*ones O"]:
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def _times(x: Float[Array, "*batch O"], vector: Float[Array, " O"]) -> Float[Array, "*batch O"]:
    """The product in the dtype of `x`, multiplied (and its gradient added over the batch) in that of the vector."""
    return (x.astype(vector.dtype) * _last_axis(vector, x.ndim)).astype(x.dtype)
