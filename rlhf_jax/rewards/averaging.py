"""Weight-averaged reward models: one model in place of an ensemble.

Source: Ramé et al., "WARM: On the Benefits of Weight Averaged Reward Models", arXiv:2401.12187.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.types import Params, at_least_float32


def average_weights(members: Params) -> Params:
    """The average of the parameters of M reward models, `phi = (1/M) sum_i phi_i`.

    It means something where the members were fine-tuned from one start, so that the weights between them are good
    models too. It costs what one model costs and says nothing of uncertainty.

    Args:
        members: a tree whose leaves have the M members on axis 0, from `stack_members` or a `vmap` of training.

    Returns:
        The tree of one model; summed in at least float32, in the dtypes of the members.

    Raises:
        ValueError: the leaves have different numbers of members, or none.

    Source: arXiv:2401.12187.

    Example:
        >>> average_weights({"kernel": jnp.array([[1.0, 2.0], [3.0, 6.0]])})["kernel"].tolist()
        [2.0, 4.0]
    """
    counts = {
        jax.tree_util.keystr(path): leaf.shape[0] if leaf.ndim else 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(members)
    }
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"the leaves have {counts} members on axis 0; stack reward models of one shape on it.")
    return jax.tree.map(lambda leaf: at_least_float32(leaf).mean(axis=0).astype(leaf.dtype), members)


def stack_members(trees: Sequence[Params]) -> Params:
    """Reward models of one shape as one tree, with the members on axis 0 of every leaf.

    Args:
        trees: parameters of each.

    Raises:
        ValueError: there are none, or two differ in their leaves, shapes or dtypes; the sentence names the first leaf
            that differs.

    Example:
        >>> stack_members([{"bias": jnp.zeros(())}, {"bias": jnp.ones(())}])["bias"].tolist()
        [0.0, 1.0]
    """
    if not trees:
        raise ValueError("there are no reward models to stack; give at least one.")
    first = _shapes(trees[0])
    for number, tree in enumerate(trees[1:], start=1):
        found = _shapes(tree)
        for name in sorted(first.keys() | found.keys()):
            if first.get(name) != found.get(name):
                raise ValueError(
                    f"reward model {number} (counting from 0) has {found.get(name, 'nothing')} at {name}, and the "
                    f"first has {first.get(name, 'nothing')}: only models of one shape can be stacked."
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _shapes(tree: Params) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
