"""What is done to the K rows of a Jacobian that are at hand: mix, scale, multiply."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax.solvers._base import power_of_two


def mix(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Σ w_k rows_k of one leaf, accumulated in at least float32."""
    weights = weights.astype(jnp.promote_types(jnp.float32, rows.dtype))
    wide = rows.astype(weights.dtype)
    mixed = jnp.tensordot(weights, wide, 1, precision=jax.lax.Precision.HIGHEST)
    return mixed.astype(rows.dtype)


def scale_rows(rows: jax.Array, scales: jax.Array) -> jax.Array:
    scales = scales.reshape(-1, *[1] * (rows.ndim - 1))
    return (rows.astype(scales.dtype) * scales).astype(rows.dtype)


def scaled_products(
    rows: Sequence[jax.Array], others: Sequence[jax.Array], num_tasks: int, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """M, s and t of diag(s) M diag(t), the inner products of two sets of rows."""
    products = jnp.zeros((num_tasks, num_tasks), dtype)
    if not rows:
        return products, jnp.zeros(num_tasks, dtype), jnp.zeros(num_tasks, dtype)
    dtype = jnp.promote_types(dtype, jnp.result_type(*rows))

    def unit(rows):
        wide = [row.astype(dtype) for row in rows]
        scales = jnp.zeros(num_tasks, dtype)
        for row in wide:
            scales = jnp.maximum(scales, jnp.max(jnp.abs(row), axis=range(1, row.ndim), initial=0))
        divisor = power_of_two(scales)
        units = [row / divisor.reshape(-1, *[1] * (row.ndim - 1)) for row in wide]
        return units, jnp.where(scales == 0, 0, divisor)

    left, scales = unit(rows)
    right, other_scales = (left, scales) if others is rows else unit(others)
    for a, b in zip(left, right, strict=True):
        # Contracting every axis of the parameter in place keeps a sharded leaf sharded.
        axes = tuple(range(1, a.ndim))
        products += jax.lax.dot_general(
            a, b, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST
        )
    return products, scales, other_scales
