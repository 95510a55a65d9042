"""What an algorithm trains: a whole model, or an adapter on a model that stays as it was.

Every algorithm takes `adapter: AdapterConfig | None`. Without one, the trained tree is the model. With one, the trained
tree (and so the optimiser's state) is the adapter alone; the base travels beside it, is never changed and is held once:
where there is a reference policy, it is the base itself.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.models.adapters import AdapterConfig, attach, init_adapter
from rlhf_jax.types import Params

State = TypeVar("State")


def trainable(model: Params, adapter: AdapterConfig | None, key: Array) -> Params:
    """The tree to train at the start: the model itself, or a fresh adapter for it.

    Args:
        model: a tree with a `trunk`.
        adapter: which adapter; None: none.
        key: a typed key; without adapter it is not used.
    """
    return model if adapter is None else init_adapter(adapter, model, jax.random.fold_in(key, 1))


def assemble(base: Params | None, trained: Params, adapter: AdapterConfig | None) -> Params:
    """The model to run: the trained tree itself, or the base with the trained adapter attached to it.

    Args:
        base: the frozen model; without adapter it is not used.
        trained: a tree that began as `trainable(base, adapter, key)`.
        adapter: the configuration that `trained` was made with.
    """
    return trained if adapter is None else attach(base, trained, adapter)


def check_roles(given: Params, known: tuple[str, ...]) -> None:
    """Refuses pretrained trees under a role that an algorithm does not have: it would train a fresh model in silence.

    Raises:
        ValueError: the sentence names the role, and those that there are.

    Example:
        >>> check_roles({"polcy": {}}, ("policy", "reference"))
        Traceback (most recent call last):
            ...
        ValueError: there is no role 'polcy' in this algorithm: name the trees policy, reference.
    """
    for role in given:
        if role not in known:
            raise ValueError(f"there is no role {role!r} in this algorithm: name the trees {', '.join(known)}.")


def reference_policy(given: Params, policy: Params, adapter: AdapterConfig | None) -> Params:
    """The frozen policy that a trained one is compared with: `given["reference"]`, or the policy at the start.

    Args:
        given: pretrained trees by role.
        policy: the policy at the start.
        adapter: which adapter is trained on the policy; None: none.

    Raises:
        ValueError: a reference is given beside an adapter, whose base already is one.
    """
    if adapter is None:
        return given.get("reference", policy)
    if "reference" in given:
        raise ValueError("An adapter's base is the reference policy; leave out params['reference'].")
    return policy


def without_shared_arrays(state: State) -> State:
    """The state with a copy of every array that stands in it before: a step may donate a state only if none does.

    So the copies are those that are needed: a reference policy beside the policy that began as it and is trained, but
    not one read from another folder, and not the base of an adapter.

    Example:
        >>> array = jnp.ones(2)
        >>> first, second = without_shared_arrays([array, array])
        >>> first is array, second is array
        (True, False)
    """
    seen = set()

    def own(leaf: Array) -> Array:
        if id(leaf) in seen:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, state)
