"""What keeps others from computing on a Jacobian: leaves on which nothing is defined.

A Jacobian is a pytree, so `jax.tree.map` hands its leaves to whatever function it is given, and on
the residuals of a backward pass almost any arithmetic would succeed and mean nothing. The seals
make it fail instead, with the remedy in the text: typed random keys, whose dtype is named by the
remedy, and, outside of `jit`, a NumPy array that refuses arithmetic and the methods that keys don't
have. All cross `jit`, `vmap`, `scan`, `cond` and `shard_map` as arrays do.

What keeps the shape and the dtype of every leaf, and passes over what is no number or is defined on
keys too, raises nothing: `x * .5 if jnp.issubdtype(x.dtype, jnp.floating) else x`, `jnp.flip`. But
it changes the guard, whose numbers are known, and then every row is NaN.
"""

import functools
from collections.abc import Sequence
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
    __float__ = __int__ = __complex__ = __index__ = _refuse
    real = imag = at = property(_refuse)
    conj = conjugate = sum = mean = max = min = prod = std = var = dot = clip = _refuse
    round = all = any = argmax = argmin = sort = argsort = cumsum = cumprod = trace = _refuse
    nonzero = item = tolist = _refuse

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        # JAX 0.12 asks for the same type where it makes an array of it.
        return super().astype(dtype, *args, **kwargs) if dtype == self.dtype else _refuse()


# Keys of one, two and four dimensions, since some transformations look at matrices only, or at
# biases, or at convolutions.
_KEY_SHAPES = ((2,), (2, 2), (1, 1, 2, 2))
# Numbers of the type that most gradients have, since others look at the type.
_GUARD = np.array([[1, 2], [3, 4]], np.float32)
_IMPL = jex_random.define_prng_impl(
    key_shape=(1,),
    seed=_refuse,
    split=_refuse,
    random_bits=_refuse,
    fold_in=_refuse,
    name="mtl_optax.Jacobian",
    tag=f"mtl_optax.Jacobian ({REMEDY})",
)


def new_seals() -> tuple[Any, ...]:
    """The guard and the keys."""
    # Of NumPy's ones: three keys cost what one of JAX's does.
    data: list[Any] = [np.ones((*shape, 1), np.uint32) for shape in _KEY_SHAPES]
    return _new_guard(), *(jax.random.wrap_key_data(bits, impl=_IMPL) for bits in data)


def renewed(seals: tuple[Any, ...]) -> tuple[Any, ...]:
    """The seals as they came back, the guard on guard again."""
    guard, *keys = seals
    if isinstance(guard, jax.Array) and not isinstance(guard, Tracer):
        guard = _new_guard(guard.shape)
    return guard, *keys


def check(seals: tuple[Any, ...]) -> None:
    """Raises where what came back are arrays, but not the guard and the keys that went out."""
    key_dtype = _key_dtype()
    for seal, dtype in zip(seals, (_GUARD.dtype, *(key_dtype for _ in _KEY_SHAPES)), strict=True):
        now = getattr(seal, "dtype", None)
        # JAX's own machinery puts other things than arrays in a tree, and float0 for its tangent.
        foreign = now is not None and now not in (jax.dtypes.float0, dtype)
        if foreign or isinstance(seal, optax.MaskedNode):
            _refuse()


def sealed(scales: Any, seals: tuple[Any, ...]) -> Any:
    """The scales of the rows, NaN where somebody computed on the guard; 0 if it is zero."""
    guard, *keys = seals
    if all(isinstance(leaf, Tracer) for leaf in (scales, *keys)):
        # A `psum` of keys is refused only when it is compiled, and what is not used is not.
        scales, *_ = jax.lax.optimization_barrier((scales, *keys))
    came_back = isinstance(scales, jax.Array) and isinstance(guard, jax.Array)
    return _checked(scales, guard) if came_back and guard.shape[-2:] == _GUARD.shape else scales


@jax.jit
def _checked(scales: jax.Array, guard: jax.Array) -> jax.Array:
    same = jnp.all(guard == jnp.broadcast_to(_GUARD, guard.shape), axis=(-2, -1))
    zero = jnp.all(guard == 0, axis=(-2, -1))
    factor = jnp.where(same, 1, jnp.where(zero, 0, jnp.nan)).astype(scales.dtype)
    return scales * factor[..., None]


def check_residuals(residuals: Sequence[Any], avals: Sequence[Any]) -> None:
    """Raises where what a program is to be run with are not the arrays that it was made with."""
    for x, expected in zip(residuals, avals, strict=True):
        now: Any = jax.typeof(x)
        if (now.shape, now.dtype) != (expected.shape, expected.dtype):
            raise TypeError(
                f"an array inside of an mtl_optax.Jacobian is {now.str_short()}, expected "
                f"{expected.str_short()} (a stack of Jacobians is read inside jax.vmap): {REMEDY}"
            )


def _new_guard(shape: tuple[int, ...] = _GUARD.shape) -> _Guard:
    return np.broadcast_to(_GUARD, shape).view(_Guard)


@functools.cache
def _key_dtype() -> Any:
    return jax.eval_shape(lambda: new_seals()[1]).dtype
