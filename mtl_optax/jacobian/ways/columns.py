"""The Gramian a column at a time, for models of which two rows do not fit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mtl_optax._numerics import divide, power_of_two, wide
from mtl_optax.jacobian._layout import Layout
from mtl_optax.jacobian._linear_map import Heads, LinearMap, add, one_by_one
from mtl_optax.jacobian._rows import contract, over_shards
from mtl_optax.jacobian.ways._base import Cost, Measurement, RowsOf, Way


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns(Way):
    """The column of task j is G e_j = J(Jᵀe_j): one pass back and one forth, one row held.

    From where its head meets the trunk back to the leaves, forth again, and there the inner
    products with what all the heads left.
    """

    def measure(self, heads: Heads, layout: Layout, rows_of: RowsOf) -> Measurement:
        """The Gramian, see `Way`."""
        del rows_of
        leaves = heads.linear.program.leaves
        dtypes = [wide(leaf.aval.dtype) for leaf in leaves]
        dtype = functools.reduce(jnp.promote_types, dtypes, layout.dtype)
        met, own = heads.met(), heads.joined_at_leaves()
        own = [rows if here else None for rows, here in zip(own, layout.measured, strict=True)]
        zeros = jnp.zeros(layout.num_tasks, dtype)
        if not jax.tree.leaves((met, own)):  # no loss depends on what is measured
            return Measurement(jnp.zeros((zeros.size, zeros.size), dtype), zeros)
        pull, push = _pull_and_push(heads)

        def column(of_task):
            met_j, own_j = of_task
            row = [
                add(a if here else None, b, leaf.aval.shape, leaf.aval.dtype)
                for a, b, here, leaf in zip(
                    pull(met_j), own_j, layout.measured, leaves, strict=True
                )
            ]
            largest = [jnp.max(jnp.abs(x.astype(wide(x.dtype))), initial=0) for x in row]
            largest = functools.reduce(jnp.maximum, [x.astype(dtype) for x in largest])
            largest = over_shards(jax.lax.pmax, largest)
            scale = power_of_two(largest)
            unit = [(x.astype(wide(x.dtype)) / scale).astype(x.dtype) for x in row]
            pairs = [*zip(met, push(unit), strict=True), *zip(own, unit, strict=True)]
            column = sum((_inner(a, b, dtype) for a, b in pairs if a is not None), zeros)
            return column, jnp.where(largest == 0, 0, scale)

        columns, scales = one_by_one(column)((met, own))
        products = divide(columns, scales[None, :], columns)
        if heads.linear.present is not None:
            both = heads.linear.present[:, None] & heads.linear.present[None, :]
            products, scales = jnp.where(both, products, 0), scales * heads.linear.present
        return Measurement((products + products.T) / 2, scales)

    def costs(self, linear: LinearMap, layout: Layout) -> dict[int, Cost]:
        """What each measured leaf takes."""
        return {
            i: Cost("columns", layout.num_tasks * aval.size, aval.size * aval.dtype.itemsize)
            for i in layout.measured_leaves
            for aval in [linear.program.leaves[i].aval]
        }


def _pull_and_push(heads: Heads):
    try:
        return heads.pull_and_push()
    except Exception as error:
        raise TypeError(
            'gramian="columns" goes forth through the trunk as well as back, and some function in '
            "it, such as one with a custom_vjp, has a backward rule that is not linear in the "
            'cotangent or can\'t be transposed: use gramian="ghost" or gramian="rows", with '
            'rows="sequential" where memory is short'
        ) from error


def _inner(rows: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The real inner product of each row with x, as a cotangent and a tangent have it."""
    dtype = functools.reduce(jnp.promote_types, [wide(rows.dtype), wide(x.dtype)], dtype)
    axes = list(range(x.ndim))
    products = contract(rows.astype(dtype), x.astype(dtype), ([i + 1 for i in axes], axes))
    return jnp.real(products)
