"""The Gramian of the features: the K backward passes stop at a representation of all tasks."""

import dataclasses

import jax
import jax.numpy as jnp

from mtl_optax.jacobian._layout import Layout
from mtl_optax.jacobian._linear_map import Heads, LinearMap
from mtl_optax.jacobian._rows import scaled_products
from mtl_optax.jacobian.ways._base import Cost, Measurement, RowsOf, Way, product_cost


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features(Way):
    """Measures on the last leaves of another linear map, whose first are the parameters."""

    probe: LinearMap

    at_parameters = False

    def measure(self, heads: Heads, layout: Layout, rows_of: RowsOf) -> Measurement:
        """The Gramian, see `Way`."""
        rows = self.rows(layout, rows_of)
        products, scales, _ = scaled_products(rows, rows, layout.num_tasks, layout.dtype)
        return Measurement(products, scales)

    def rows(self, layout: Layout, rows_of: RowsOf) -> list[jax.Array]:
        """The rows whose products the Gramian holds."""
        features = self.probe.heads().rows(layout.row_mode)[layout.num_leaves :]
        # The real and the imaginary parts of a complex feature are two real ones.
        real = [jnp.real(f) for f in features]
        imaginary = [jnp.imag(f) for f in features if jnp.iscomplexobj(f)]
        return jax.lax.optimization_barrier([*real, *imaginary])

    def costs(self, linear: LinearMap, layout: Layout) -> dict[int, Cost]:
        """What each measured leaf takes."""
        avals = [v.aval for v in self.probe.program.leaves[layout.num_leaves :]]
        each = [product_cost("features", layout.num_tasks, aval) for aval in avals]
        total = Cost(
            "features", sum(c.multiplications for c in each), sum(c.bytes_held for c in each)
        )
        # What the features take is counted once, at the first leaf.
        free = Cost("features", 0, 0)
        return {i: free if n else total for n, i in enumerate(layout.measured_leaves)}

    def linear_maps(self) -> list[LinearMap]:
        """The probe."""
        return [self.probe]

    def keep(self, tasks: jax.Array) -> "Features":
        """The way with the rows of the other tasks 0."""
        return Features(self.probe.keep(tasks))
