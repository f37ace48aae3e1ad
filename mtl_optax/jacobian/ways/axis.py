"""The Gramian of tasks along an axis, by one backward pass of the whole batch.

Task i's weight gradient at a dense layer is the sum over its own rows, x_iᵀδ_i, so that

    <x_iᵀδ_i, x_jᵀδ_j> = Σ_ab (x_ia · x_jb) (δ_ia · δ_jb),

for one row a task the product, entry by entry, of two matrices A Aᵀ and D Dᵀ.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax._numerics import EXACT, power_of_two, wide
from mtl_optax.jacobian._layout import Layout
from mtl_optax.jacobian._mapped import MappedMap
from mtl_optax.jacobian._rows import (
    gathered,
    keep_rows,
    max_over_shards,
    scaled_products,
    sum_over_shards,
)
from mtl_optax.jacobian.ways import ghost
from mtl_optax.jacobian.ways._base import Measurement, RowsOf, mix_rows, without_noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Axis(ghost.Ghost):
    """Dense layers and look-ups from inputs and cotangents, the other leaves from their rows."""

    title = "pairs of tasks"

    def measure(self, heads: Any, layout: Layout, rows_of: RowsOf) -> Measurement:
        """The Gramian, see `Way`."""
        del rows_of  # rows and cotangents come from one pass
        linear: MappedMap = heads
        taps = self.taps(linear, layout.measured)
        uses = [use for found in taps.values() for use in found]
        cut = dataclasses.replace(
            linear,
            program=ghost.cut_program(linear.program, uses),
            stacked=(*linear.stacked, *(False for _ in uses)),
        )
        rows = jax.lax.optimization_barrier(cut.rows(layout.row_mode))
        plain = {i: rows[i] for i in layout.measured_leaves if i not in taps}
        held, left = list(plain.values()), iter(rows[layout.num_leaves :])
        products, scales, _ = scaled_products(held, held, layout.num_tasks, layout.dtype)
        shares = [(products, scales)]
        for found in taps.values():
            delta = [ghost.cotangents_of(next(left), use) for use in found]
            shares.append(_layer(linear, found, jnp.concatenate(delta, axis=2)))
        products, scales = without_noise(*ghost.sum_of_gramians(shares))
        return Measurement(products, scales, mix_rows(plain))

    def taps(self, linear: Any, measured: Sequence[bool]) -> dict[int, ghost.Uses]:
        """The uses of the shared leaves that are tapped."""
        shared = [m and not s for m, s in zip(measured, linear.stacked, strict=True)]
        return super().taps(linear, shared)

    def tap_cost(self, uses: ghost.Uses, linear: Any) -> int:
        """How many multiplications the products of all pairs of rows take."""
        e, _, c, f = uses[0].size
        n = sum(use.size[1] for use in uses)
        inputs = 1 if uses[0].x_dims is None else c
        return e * n**2 * (linear.size**2 * inputs + linear.num_tasks**2 * f)


def _layer(linear: MappedMap, uses: ghost.Uses, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One leaf's share, as M and s of diag(s) M diag(s), from its cotangents `(K, e, n, f)`."""
    values = dict(zip(linear.program.jaxpr.constvars, linear.residuals, strict=True))
    axes = dict(zip(linear.program.jaxpr.constvars, linear.axes, strict=True))
    size = linear.size

    def inputs(use: ghost.Use) -> jax.Array:
        each = jax.vmap(lambda x: ghost.inputs_of(x, use), axes[use.x], axis_size=size)
        return each(values[use.x])

    x, delta = gathered(jnp.concatenate([inputs(use) for use in uses], axis=2)), gathered(delta)
    if linear.present is not None:
        x = keep_rows(x, jnp.any(linear.present.reshape(-1, size), axis=0))
    delta = delta.astype(wide(delta.dtype))
    scales = power_of_two(jnp.max(jnp.abs(delta), axis=(1, 2, 3), initial=0))
    scales = max_over_shards(scales)
    delta = delta / scales[:, None, None, None]
    if uses[0].x_dims is None:
        flat = x.reshape(size, -1)
        alike = (flat[:, :, None, None] == flat[None, None]) & (flat >= 0)[:, :, None, None]
        square, unit = alike.astype(delta.dtype)[None], jnp.ones((), delta.dtype)
    else:
        x = x.astype(delta.dtype)
        unit = max_over_shards(power_of_two(jnp.max(jnp.abs(x), initial=0)))
        square = _gram(x / unit)
    blocks = delta.shape[0] // size
    pairs = _gram(delta)  # (e, K, n, K, n)
    e, num_tasks, n = pairs.shape[:3]
    pairs = pairs.reshape(e, blocks, size, n, blocks, size, n)
    products = jnp.einsum("eiajb,eliamjb->limj", square, pairs, precision=EXACT)
    products = sum_over_shards(products.reshape(num_tasks, num_tasks))
    return (products + products.T) / 2, scales * unit


def _gram(x: jax.Array) -> jax.Array:
    """Products of all rows, `(e, N, n, N, n)` of `(N, e, n, c)`."""
    size, e, n, c = x.shape
    flat = jnp.moveaxis(x, 1, 0).reshape(e, size * n, c)
    products = jnp.matmul(flat, flat.mT, precision=EXACT)
    return products.reshape(e, size, n, size, n)
