"""The Gramian a column at a time, for models of which two rows do not fit."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtl_optax._numerics import divide, power_of_two, wide
from mtl_optax.jacobian._layout import Layout
from mtl_optax.jacobian._linear_map import Heads, LinearMap, one_by_one
from mtl_optax.jacobian._rows import contract, max_over_shards
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
        linear, zeros = heads.linear, jnp.zeros(layout.num_tasks, layout.dtype)
        met, own = heads.met(), heads.own(layout.measured_leaves)
        read = heads.read_by_trunk(layout.measured_leaves)
        if not own and not read:  # no loss depends on what is measured
            return Measurement(jnp.zeros((zeros.size, zeros.size), layout.dtype), zeros)
        pull, push = heads.pull_and_push(read)

        def column(of_task):
            met_j, row = of_task
            for i, pulled in zip(read, pull(*met_j), strict=True):
                row = row | {i: pulled + row[i] if i in row else pulled}
            dtypes = [wide(x.dtype) for x in row.values()]
            dtype = functools.reduce(jnp.promote_types, dtypes, layout.dtype)
            largest = [jnp.max(jnp.abs(x.astype(dtype)), initial=0) for x in row.values()]
            largest = max_over_shards(functools.reduce(jnp.maximum, largest))
            scale = power_of_two(largest)
            unit = {i: (x.astype(dtype) / scale).astype(x.dtype) for i, x in row.items()}
            pairs = [*zip(met, _forth(push, [unit[i] for i in read]), strict=True)] if read else []
            pairs += [(rows, unit[i]) for i, rows in own.items()]
            column = sum((_inner(rows, x, dtype) for rows, x in pairs), zeros)
            return column, jnp.where(largest == 0, 0, scale)

        columns, scales = one_by_one(column)((met, own))
        products = divide(columns, scales[None, :], columns)
        if linear.present is not None:
            both = linear.present[:, None] & linear.present[None, :]
            products, scales = jnp.where(both, products, 0), scales * linear.present
        return Measurement((products + products.T) / 2, scales)

    def costs(self, linear: LinearMap, layout: Layout) -> dict[int, Cost]:
        """What each measured leaf takes."""
        return {
            # Back and forth again.
            i: Cost(
                "columns", 2 * layout.num_tasks * linear.forming[i], aval.size * aval.dtype.itemsize
            )
            for i in layout.measured_leaves
            for aval in [layout.leaf_avals[i]]
        }


def _forth(push: Callable, rows: list[jax.Array]) -> list[jax.Array]:
    try:
        return list(push(rows))
    except Exception as error:
        raise TypeError(
            'gramian="columns" goes forth through the trunk as well as back, and some function in '
            "it, such as one with a custom_vjp, has a backward rule that is not linear in the "
            'cotangent or can\'t be transposed: use gramian="auto" or gramian="rows", with '
            'rows="sequential" where memory is short'
        ) from error


def _inner(rows: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The real inner product of each row with x, as a cotangent and a tangent have it."""
    dtype = functools.reduce(jnp.promote_types, [wide(rows.dtype), wide(x.dtype)], dtype)
    axes = list(range(x.ndim))
    products = contract(rows.astype(dtype), x.astype(dtype), ([i + 1 for i in axes], axes))
    return jnp.real(products)
