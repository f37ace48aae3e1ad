"""What keeps others from computing on a Jacobian: two of its leaves on which nothing is defined.

A Jacobian is a pytree, so `jax.tree.map` hands its leaves to whatever function it is given, and on
the residuals of a backward pass almost any arithmetic would succeed and mean nothing. The two seals
make it fail instead, with the remedy in the text: a typed random key, whose dtype is named by the
remedy, and, for methods of arrays outside of `jit` that keys don't have, a NumPy array that refuses
them. Both cross `jit`, `vmap`, `scan`, `cond` and `shard_map` as arrays do.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.extend import random as jex_random

REMEDY = (
    "one gradient a task, not yet combined, on which only links of mtl_optax can compute: an "
    "optimizer expects one gradient shaped as the parameters, so put an aggregator such as "
    "mtl.sum_tasks() before it in the optax.chain, and Optax's own transformations after the "
    "aggregator; before it stand mtl.clip_tasks, mtl.normalize_tasks, mtl.ema_tasks. In place of "
    "an Optax wrapper around the strategy take mtl.multi_steps, mtl.skip_nonfinite, or "
    "mtl.value_and_jac(wrt=...) for a part that is frozen; masked, partition or SAM move outside, "
    "around the optimizer after the aggregator; L-BFGS takes grad=jac.pullback(jnp.ones(K)). To "
    "read it: jac.pullback(weights), jac.rows(), jac.gramian(), jac.norms()"
)


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise TypeError(f"this is an mtl_optax.Jacobian: {REMEDY}")


class _Guard(np.ndarray):
    """An array that can be handed on, and nothing else."""

    __array_ufunc__ = _refuse
    real = imag = property(_refuse)
    astype = conj = conjugate = sum = mean = max = min = prod = std = var = dot = clip = _refuse


# Of two dimensions, since some transformations look at matrices only.
_SHAPE = (1, 1)
_IMPL = jex_random.define_prng_impl(
    key_shape=(1,),
    seed=_refuse,
    split=_refuse,
    random_bits=_refuse,
    fold_in=_refuse,
    name="mtl_optax.Jacobian",
    tag=f"mtl_optax.Jacobian ({REMEDY})",
)


def new_seals() -> tuple[Any, Any]:
    """The guard and the key."""
    key = jax.random.wrap_key_data(jnp.ones((*_SHAPE, 1), jnp.uint32), impl=_IMPL)
    return np.ones(_SHAPE, np.uint8).view(_Guard), key


def renewed(seals: tuple[Any, Any]) -> tuple[Any, Any]:
    """The seals as they came back, the guard on guard again."""
    guard, key = seals
    if isinstance(guard, jax.Array) and not isinstance(guard, Tracer):
        guard = np.ones(guard.shape, np.uint8).view(_Guard)
    return guard, key


def check(seals: tuple[Any, Any]) -> None:
    """Raises where what came back is an array, but not the key that went out."""
    key = seals[1]
    dtype = getattr(key, "dtype", None)
    # JAX's own machinery puts other things than arrays in a tree, and float0 for its tangent.
    foreign = dtype is not None and dtype not in (jax.dtypes.float0, _key_dtype())
    if foreign or isinstance(key, optax.MaskedNode):
        _refuse()


@functools.cache
def _key_dtype() -> Any:
    return jax.eval_shape(lambda: new_seals()[1]).dtype
