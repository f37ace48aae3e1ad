"""Losses: any pytree of scalars, or of arrays of which each element is a task."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax._compat import varying_axes
from mtl_optax._numerics import wide


def task_names(losses: Any) -> tuple[str, ...]:
    """The name of each task: the path of its loss, and its index in an array of several.

    Where plain paths would name two alike, all are spelled out: `['a'][0]` is not `['a/0']`.
    """
    names = _paths(losses, {"simple": True, "separator": "/"})
    return names if len(set(names)) == len(names) else _paths(losses, {})


def _paths(losses: Any, style: dict[str, Any]) -> tuple[str, ...]:
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(losses):
        name = jax.tree_util.keystr(path, **style)
        if jnp.shape(leaf) == ():
            names.append(name or "0")
        else:
            prefix = f"{name}/" if name else ""
            names.extend(f"{prefix}{i}" for i in range(math.prod(jnp.shape(leaf))))
    return tuple(names)


def check_losses(losses: Any) -> None:
    """Raises unless the tree is one of real, floating-point task losses."""
    leaves = jax.tree_util.tree_leaves_with_path(losses)
    if not leaves:
        raise ValueError(
            "the loss function returned no losses, expected a pytree of at least one scalar: "
            'return a dict such as {"click": click_loss, "buy": buy_loss}'
        )
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "0"
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"task {name!r} has dtype {jnp.result_type(leaf)}, expected a real floating-point "
                "loss: convert it with jnp.asarray(loss, jnp.float32) before it loses its gradient"
            )
        named = path and not isinstance(
            path[-1], jax.tree_util.SequenceKey | jax.tree_util.FlattenedIndexKey
        )
        if named and jnp.shape(leaf) != ():
            raise ValueError(
                f"task {name!r} has shape {jnp.shape(leaf)}, expected a scalar: reduce the loss "
                f"with jnp.mean, or, if its {jnp.size(leaf)} elements are tasks of their own, "
                "return them as a list of scalars"
            )


def check_reduced(losses: Any, params: Any) -> None:
    """Raises where a loss differs between devices that hold the same parameters."""
    known = frozenset().union(*map(varying_axes, jax.tree.leaves(params)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(losses):
        if axes := varying_axes(leaf) - known:
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "0"
            raise ValueError(
                f"task {name!r} has another loss on each shard of the mesh axes {sorted(axes)}, "
                "where the parameters are the same: average it inside the loss function with "
                f"jax.lax.pmean(loss, {tuple(sorted(axes))})"
            )


def flatten_losses(losses: Any) -> jax.Array:
    """The losses, or anything shaped like them, as one `(K,)` array, at least float32."""
    leaves = jax.tree.leaves(losses)
    dtype = wide(jnp.result_type(*leaves))
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])


def unflatten_losses(vector: jax.Array, like: Any) -> Any:
    """A `(K,)` array as a tree with the structure, shapes and dtypes of the losses `like`."""
    leaves, treedef = jax.tree.flatten(like)
    parts, start = [], 0
    for leaf in leaves:
        part = vector[start : start + jnp.size(leaf)].reshape(jnp.shape(leaf))
        parts.append(part.astype(jnp.result_type(leaf)))
        start += jnp.size(leaf)
    return treedef.unflatten(parts)
