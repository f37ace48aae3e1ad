"""What balancers share: weights over the tasks whose losses can be used, and learned ones."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide, power_of_two, safe_sqrt

# An optimizer such as Adam squares the gradient, and an infinite average is infinite for good.
_LARGEST_GRADIENT = 1e18


def positive_log(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logarithm where it exists, down to the smallest subnormal number.

    Args:
      x: `(K,)`, of a floating-point type of 32 or 64 bits.

    Returns:
      `(log, usable)`: log x where x is positive and finite, else 0; and where that is.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32 if x.dtype.itemsize == 4 else jnp.int64)
    usable = (bits > 0) & jnp.isfinite(x)
    # Hardware may take a subnormal number for 0. Its bits are the multiple of the smallest one.
    subnormal = usable & (bits < jax.lax.bitcast_convert_type(jnp.finfo(x.dtype).tiny, bits.dtype))
    smallest = jnp.finfo(x.dtype).minexp - jnp.finfo(x.dtype).nmant
    small = jnp.log(jnp.where(subnormal, bits, 1).astype(x.dtype)) + smallest * math.log(2)
    log = jnp.log(jnp.where(usable & ~subnormal, x, 1))
    return jnp.where(subnormal, small.astype(x.dtype), log), usable


def bounded_exp(x: jax.Array) -> jax.Array:
    """The exponential, the largest float where it would overflow: inf times 0 would be NaN."""
    return bounded(jnp.exp(x))


def softmax_over(usable: jax.Array, logits: jax.Array, others: jax.Array) -> jax.Array:
    """Softmax over the usable tasks, 0 elsewhere; even over the `others` where none is usable."""
    logits = jnp.where(usable, bounded(logits), -jnp.inf)
    even = others / jnp.maximum(jnp.sum(others), 1).astype(logits.dtype)
    return jnp.where(jnp.any(usable), jax.nn.softmax(logits), even)


def softmax_when(ready: jax.Array, usable: jax.Array, logits: jax.Array) -> jax.Array:
    """Weights of 1 until a task is ready; those that are share their number, if they are usable."""
    weights = jnp.sum(ready) * softmax_over(usable & ready, logits, ready)
    return jnp.where(ready, weights, 1)


def step_each(
    optimizer: optax.GradientTransformation,
    opt_state: Any,
    values: jax.Array,
    gradients: jax.Array,
    moves: jax.Array,
) -> tuple[jax.Array, Any]:
    """One step of each task's number by an optimizer of its own, where it moves at all.

    The state is `jax.vmap(optimizer.init)(values)` at first. Gradients are bounded. Returns the new
    values and state.
    """
    gradients = jnp.clip(gradients, -_LARGEST_GRADIENT, _LARGEST_GRADIENT)

    def step(opt_state, value, gradient, moves):
        update, new_state = optimizer.update(gradient, opt_state, value)
        new, old = (value + update, new_state), (value, opt_state)
        return jax.tree.map(lambda new, old: jnp.where(moves, new, old), new, old)

    return jax.vmap(step)(opt_state, values, gradients, moves)


def unit_vector(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A vector as its direction and its length, at any scale; 0 has the direction 0."""
    divisor = power_of_two(jnp.max(jnp.abs(x)))
    near_one = x / divisor
    length = safe_sqrt(jnp.sum(near_one**2))
    return divide(near_one, length, near_one), length * divisor
