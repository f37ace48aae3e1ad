"""The Gramian accumulated layer by layer, wherever in the program the layers are."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax._branch import fallback
from mtl_optax._numerics import wide
from mtl_optax.jacobian._layout import Layout
from mtl_optax.jacobian._linear_map import Heads, LinearMap
from mtl_optax.jacobian._rows import keep_rows, scaled_products
from mtl_optax.jacobian.ways._base import (
    Cost,
    Measurement,
    RowsOf,
    Way,
    product_cost,
    without_noise,
)
from mtl_optax.jacobian.ways._walk import ZERO, Found, View, Walk, costs_by_leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streamed(Way):
    """K cotangents go back through the trunk at once, and each layer adds its share as they pass.

    By its ghost or by its rows, whichever takes less: inside `lax.scan`, `jax.checkpoint`, `jit`,
    `lax.cond` and views of stacked parameters as well. What is held is K cotangents and one layer.

    The K cotangents pass together, whatever `rows=` says: a NaN of one task, where a part of the
    trunk computes it that not all tasks read, is in the products of all until that task is absent.
    """

    def measure(self, heads: Heads, layout: Layout, rows_of: RowsOf) -> Measurement:
        """The Gramian, see `Way`."""
        del rows_of
        products, scales = _stream(heads, layout)
        present = heads.linear.present
        if present is None:
            return Measurement(products, scales)
        products = jnp.where(present[:, None] & present[None, :], products, 0)

        def one_by_one():
            rows = heads.rows(layout.row_mode)
            rows = [rows[i] for i in layout.measured_leaves]
            exact, units, _ = scaled_products(rows, rows, layout.num_tasks, layout.dtype)
            return exact.astype(products.dtype), units.astype(scales.dtype)

        # Where the trunk itself is not finite, only rows that were differentiated alone can be told
        # apart.
        finite = jnp.all(jnp.isfinite(products))
        return Measurement(*fallback(~finite, one_by_one, lambda: (products, scales * present)))

    def costs(self, linear: LinearMap, layout: Layout) -> dict[int, Cost]:
        """What each measured leaf takes."""
        found = costs_by_leaf(self.found(linear, layout))
        return {
            i: found.get(i, product_cost("streamed rows", layout.num_tasks, layout.leaf_avals[i]))
            for i in layout.measured_leaves
        }

    def found(self, linear: LinearMap, layout: Layout) -> Found:
        """What it taps."""
        walks: list[Walk] = []
        jax.eval_shape(lambda linear: _stream(linear.heads(), layout, walks), linear)
        return walks[0].found if walks else {}


def _stream(
    heads: Heads, layout: Layout, walks: list[Walk] | None = None
) -> tuple[jax.Array, jax.Array]:
    """M and s of the Gramian diag(s) M diag(s); what it takes is noted in `walks`."""
    num_tasks, present = layout.num_tasks, heads.linear.present
    measured = [i for i in layout.measured_leaves if layout.leaf_avals[i].size]
    heads, scales = heads.unit(measured)
    dtypes = [wide(layout.leaf_avals[i].dtype) for i in measured]
    dtype = functools.reduce(jnp.promote_types, dtypes, layout.dtype)
    met, own = heads.met(), heads.own(measured)
    if present is not None:
        met = [keep_rows(rows, present) for rows in met]
        own = {i: keep_rows(rows, present) for i, rows in own.items()}
    read = heads.read_by_trunk(measured)
    products = jnp.zeros((num_tasks, num_tasks), dtype)
    if read:
        own_of_read = {i: own.pop(i) for i in read if i in own}
        stream = _streamer(heads.linear, read, own_of_read, products[0], walks)
        try:
            products += jax.vmap(stream)(jnp.arange(num_tasks), met)
        except NotImplementedError as error:
            raise NotImplementedError(
                'gramian="streamed" passes the K cotangents back together, by jax.vmap, which '
                f'something in the loss function does not take ({error}): use gramian="ghost", or '
                '"auto", which does'
            ) from error
    for rows in own.values():
        alone, units, _ = scaled_products([rows], [rows], num_tasks, dtype)
        products += alone * (units[:, None] * units[None, :])
    products = (products + products.T) / 2
    return without_noise(products, scales.astype(dtype))


def _streamer(
    linear: LinearMap,
    leaves: list[int],
    own: dict[int, jax.Array],
    hole: jax.Array,
    walks: list[Walk] | None,
) -> Any:
    """From a task's index and its cotangents where heads meet the trunk to a row of the Gramian."""
    trunk = linear.program.parts.trunk

    def stream(task: jax.Array, met: list[jax.Array]) -> jax.Array:
        walk = Walk(len(hole), hole.dtype, task)

        def forth(hole: jax.Array) -> list[jax.Array]:
            args: list[Any] = [ZERO] * len(trunk.invars)
            for i in leaves:
                leaf = trunk.invars[i].aval
                args[i] = walk.tap_rows(i, leaf, own[i], hole) if i in own else View(i)
            return walk.arrays(trunk, linear.residuals, args, hole)

        (row,) = jax.linear_transpose(forth, jax.typeof(hole))(met)
        if walks is not None:
            walks.append(walk)
        return row

    return stream
