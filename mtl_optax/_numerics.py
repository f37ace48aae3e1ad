"""What all K×K algebra uses: full-precision products, exact scales, division by what may be 0."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The dtype, or float32 where it is narrower: what sums of it are kept in."""
    # Not `promote_types`: float8 has no promotion path.
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def focal(kpi: jax.Array, gamma: jax.Array) -> jax.Array:
    """-(1 - κ)^γ log κ, of κ kept within 1e-6 of 0 and 1: nothing and no slope is infinite."""
    kappa = jnp.clip(kpi, 1e-6, 1 - 1e-6)
    return -((1 - kappa) ** gamma) * jnp.log(kappa)


def underflows(dtype: DTypeLike) -> bool:
    """Whether the dtype has no small numbers, as float16 and float8 have none."""
    return bool(jnp.finfo(dtype).minexp > -100)


def is_real(dtype: DTypeLike) -> bool:
    """Whether numbers of the dtype are real: of any precision, integers, or bools."""
    kinds = jnp.integer, jnp.floating, jnp.bool_
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def is_integer(value: Any) -> bool:
    """Whether a value is a Python or NumPy integer, which True and False are not here."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_fewer(a: Any, b: Any) -> bool:
    """Whether count a < b; not where one is unknown, as it has a symbol of `jax.export` in it."""
    return all(isinstance(count, int | float) for count in (a, b)) and a < b


# The default of a TPU is bfloat16, of many a GPU TensorFloat-32.
EXACT = jax.lax.Precision.HIGHEST


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product in full precision."""
    return jnp.dot(a, b, precision=EXACT)


def divide(a: ArrayLike, b: jax.Array, otherwise: ArrayLike = 0) -> jax.Array:
    """A / b where b > 0, else `otherwise`: b is a norm, a scale or a count that may be 0."""
    positive = b > 0
    return jnp.where(positive, a / jnp.where(positive, b, 1), otherwise)


def safe_sqrt(x: ArrayLike) -> jax.Array:
    """The square root, 0 of what is not positive and of derivative 0 there; NaN stays NaN."""
    nothing = jnp.asarray(x) <= 0
    return jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, x)))


def bounded(x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """What left the range of its dtype, or of another that it is cast to, at the end of it.

    A weight is a quotient of norms and may, where the row that it weighs is tiny. NaN stays NaN.
    """
    limits = jnp.finfo(dtype or x.dtype)
    return jnp.clip(x, float(limits.min), float(limits.max)).astype(limits.dtype)


def power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two up to x > 0, else 1: a scale that divides without rounding.

    The bits of x less its mantissa; `jnp.frexp` and `jnp.ldexp` would compile to sixty operations.
    """
    limits, bits = jnp.finfo(x.dtype), jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    sign_and_exponent = jax.lax.bitcast_convert_type(x, bits) >> limits.nmant << limits.nmant
    power = jnp.maximum(jax.lax.bitcast_convert_type(sign_and_exponent, x.dtype), limits.tiny)
    return jnp.where((x > 0) & (x <= limits.max), power, 1)
