"""The Gramian from the K rows themselves."""

import dataclasses

import jax

from mtl_optax.jacobian._layout import Layout
from mtl_optax.jacobian._linear_map import Heads, LinearMap
from mtl_optax.jacobian._rows import scaled_products
from mtl_optax.jacobian.ways._base import (
    Cost,
    Measurement,
    RowsOf,
    Way,
    mix_rows,
    product_cost,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows(Way):
    """K gradients, held until the update is combined from them."""

    def measure(self, heads: Heads, layout: Layout, rows_of: RowsOf) -> Measurement:
        """The Gramian, see `Way`."""
        rows = self.rows(layout, rows_of)
        products, scales, _ = scaled_products(rows, rows, layout.num_tasks, layout.dtype)
        at_hand = dict(zip(layout.measured_leaves, rows, strict=True))
        return Measurement(products, scales, mix_rows(at_hand))

    def holds_rows(self, layout: Layout) -> bool:
        """They are."""
        del layout
        return True

    def costs(self, linear: LinearMap, layout: Layout) -> dict[int, Cost]:
        """What each measured leaf takes."""
        return {
            i: product_cost("rows", layout.num_tasks, layout.leaf_avals[i], linear.forming[i])
            for i in layout.measured_leaves
        }
