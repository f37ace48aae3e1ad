"""Rows that are given, in the place of a linear map and its heads."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from mtl_optax.jacobian._linear_map import RowMode
from mtl_optax.jacobian._rows import combine_rows, keep_rows, mix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GivenRows:
    """The K rows of each leaf, `(K, *shape)`."""

    given: Sequence[jax.Array]
    present: jax.Array | None = None  # (K,) bool, which rows are not 0; None for all

    underflows = False

    @property
    def touches(self) -> list[int]:
        """How many tasks each leaf may touch: all of them."""
        return [len(row) for row in self.given]

    @property
    def forming(self) -> list[int]:
        """The multiplications that a row of each leaf takes: none."""
        return [0 for _ in self.given]

    def keep(self, tasks: jax.Array) -> "GivenRows":
        """The rows with those of the other tasks exactly 0, whatever they hold."""
        present = tasks if self.present is None else tasks & self.present
        return GivenRows([keep_rows(row, tasks) for row in self.given], present)

    def pullback(self, weights: jax.Array) -> list[jax.Array]:
        """Jᵀw, one array a leaf."""
        return [mix(weights, row) for row in self.given]

    def heads(self) -> "GivenRows":
        """Itself: nothing is left to transpose."""
        return self

    def mix(self, weights: jax.Array) -> list[jax.Array]:
        """Jᵀw, one array a leaf."""
        return self.pullback(weights)

    def rows(self, mode: RowMode) -> list[jax.Array]:
        """The rows."""
        del mode
        return list(self.given)

    def combine(
        self, weights: jax.Array, own: jax.Array, shared: Sequence[bool], wanted: Sequence[bool]
    ) -> list[Any]:
        """Jᵀw on the leaves that are `shared`, Jᵀown on the others, None where not `wanted`."""
        return combine_rows(self.given, weights, own, shared, wanted)
