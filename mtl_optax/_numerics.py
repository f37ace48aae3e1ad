"""What all K×K algebra uses: full-precision products, exact scaling, division by what may be 0."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The dtype, or float32 where it is narrower: what sums of it are kept in."""
    # Not `promote_types`: float8 has no promotion path.
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product in full precision (the TPU default is bfloat16)."""
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def divide(a: ArrayLike, b: jax.Array, otherwise: ArrayLike = 0) -> jax.Array:
    """A / b where b > 0, else `otherwise`: b is a norm, a scale or a count that may be 0."""
    positive = b > 0
    return jnp.where(positive, a / jnp.where(positive, b, 1), otherwise)


def power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two up to x > 0, else 1: a scale that divides without rounding.

    The bits of x less its mantissa; `jnp.frexp` and `jnp.ldexp` would compile to sixty operations.
    """
    limits, bits = jnp.finfo(x.dtype), jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    sign_and_exponent = jax.lax.bitcast_convert_type(x, bits) >> limits.nmant << limits.nmant
    power = jnp.maximum(jax.lax.bitcast_convert_type(sign_and_exponent, x.dtype), limits.tiny)
    return jnp.where((x > 0) & (x <= limits.max), power, 1)
