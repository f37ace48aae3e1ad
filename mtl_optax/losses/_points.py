"""What the weights of points share: a pair of functions, and sizes that carry no gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax._numerics import wide


class PointWeights(NamedTuple):
    """A rule that weights points by their residuals: two pure functions, as in Optax.

    The weights belong to points that stay the same from step to step. The state is a pytree of
    arrays: it goes through the loss function as `aux`, and crosses `jit`, `scan`, `vmap` and
    checkpoints as any other. The weights are constants under differentiation.

    Attributes:
      init: `init(residuals)` returns the state. Only shapes and types of the residuals are read,
        so `jax.eval_shape` of the function that makes them will do.
      update: `update(residuals, state)` returns `(weights, state)`: weights shaped as the
        residuals, of the loss `jnp.mean(weights * residuals**2)`, and the next state.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], tuple[Any, Any]]


def sizes(residuals: Any, like: Any) -> Any:
    """The absolute residuals, at least float32, cut off from differentiation.

    One that is not finite counts as 0: it must not poison the weights of the others.

    Args:
      residuals: of the points that `init` saw.
      like: a tree of the state, which has their shapes.
    """
    shapes, expected = (jax.tree.map(jnp.shape, tree) for tree in (residuals, like))
    if shapes != expected:
        raise ValueError(
            f"residuals have shapes {shapes}, expected {expected}, of those that init saw: the "
            "weights belong to points that stay the same from step to step"
        )

    def size(r):
        r = jnp.asarray(r)
        _check_floating(r)
        r = jnp.abs(jax.lax.stop_gradient(r)).astype(wide(r.dtype))
        return jnp.where(jnp.isfinite(r), r, 0)

    return jax.tree.map(size, residuals)


def _check_floating(residual: Any) -> None:
    dtype = jnp.result_type(residual)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"residuals have dtype {dtype}, expected floating")


def start(residuals: Any, value: Any) -> Any:
    """A state shaped as the residuals: one value for all points, or a tree of them."""
    jax.tree.map(_check_floating, residuals)
    structure = jax.tree.structure(residuals)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(value)):
        value = jax.tree.map(lambda _: value, residuals)
    shapes = jax.tree.map(jnp.shape, residuals)
    given = jax.tree.map(jnp.shape, value)
    fits = jax.tree.structure(value) == structure and all(
        _spreads(jnp.shape(v), jnp.shape(r))
        for v, r in zip(jax.tree.leaves(value), jax.tree.leaves(residuals), strict=True)
    )
    if not fits:
        raise ValueError(
            f"initial has the shapes {given}, expected {shapes}, those of the residuals, or one "
            "number for all points"
        )

    def full(r, v):
        return jnp.broadcast_to(v, jnp.shape(r)).astype(wide(jnp.result_type(r)))

    return jax.tree.map(full, residuals, value)


def _spreads(shape: tuple[int, ...], over: tuple[int, ...]) -> bool:
    """Whether an array broadcasts to a shape."""
    try:
        return jnp.broadcast_shapes(shape, over) == over
    except ValueError:
        return False


def in_types_of(residuals: Any, weights: Any) -> Any:
    """The weights in the types of the residuals."""
    return jax.tree.map(lambda w, r: w.astype(jnp.asarray(r).dtype), weights, residuals)
