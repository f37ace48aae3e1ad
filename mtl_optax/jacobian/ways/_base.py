"""What a way to measure the Gramian is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax.jacobian._layout import Layout
from mtl_optax.jacobian._linear_map import Heads, LinearMap
from mtl_optax.jacobian._rows import mix

# The rows of some leaves, by their positions: measured once, whoever asks.
RowsOf = Callable[[Sequence[int]], list[jax.Array]]


class Measurement(NamedTuple):
    """What measuring the Gramian gives, and what it leaves for the update.

    Attributes:
      products: `(K, K)`, M of the Gramian diag(s) M diag(s).
      scales: `(K,)`, s, powers of two, 0 for a zero row.
      mix: from weights `(K,)` to those leaves of Jᵀw, by position, that are now cheaper than a
        backward pass.
    """

    products: jax.Array
    scales: jax.Array
    mix: Callable[[jax.Array], dict[int, jax.Array]] = lambda weights: {}


class Cost(NamedTuple):
    """What measuring one leaf takes.

    Attributes:
      way: its name.
      multiplications: of matrix products, beyond the K cotangents of its layer.
      bytes_held: of what exists once for each task.
    """

    way: str
    multiplications: int
    bytes_held: int


class Way:
    """A way to measure the Gramian: a frozen dataclass and a pytree.

    A subclass gives `measure` and `costs`; `rows` and `linear_maps` are for one that does not
    measure at the parameters. Nothing else in the library knows which way it has in hand.

    Attributes:
      at_parameters: whether the Gramian is that of the gradients of parameters.
    """

    at_parameters = True

    def measure(self, heads: Heads, layout: Layout, rows_of: RowsOf) -> Measurement:
        """The Gramian over the measured leaves.

        Args:
          heads: the linearised losses, from their heads on.
          layout: which leaves are measured, and how rows are computed.
          rows_of: what asks for rows of the parameters, which are then used for the update too.
        """
        raise NotImplementedError

    def costs(self, linear: LinearMap, layout: Layout) -> dict[int, Cost]:
        """What each measured leaf takes, by position."""
        raise NotImplementedError

    def rows(self, layout: Layout, rows_of: RowsOf) -> list[jax.Array]:
        """The rows whose products the Gramian holds."""
        return rows_of(layout.measured_leaves)

    def holds_rows(self, layout: Layout) -> bool:
        """Whether these rows are at hand once the Gramian is measured."""
        del layout
        return False

    def linear_maps(self) -> list[LinearMap]:
        """The linear maps that it holds, besides that of the parameters."""
        return []

    def keep(self, tasks: jax.Array) -> "Way":
        """The way with the rows of the other tasks 0."""
        del tasks
        return self


def without_noise(products: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gramian diag(s) M diag(s) with zero rows where rounding left no positive square."""
    seen = ~(jnp.diagonal(products) <= 0)  # a NaN stays
    return jnp.where(seen[:, None] & seen[None, :], products, 0), jnp.where(seen, scales, 0)


def mix_rows(rows: dict[int, jax.Array]) -> Callable[[jax.Array], dict[int, jax.Array]]:
    """The leaves of Jᵀw whose rows are at hand."""
    return lambda weights: {i: mix(weights, row) for i, row in rows.items()}


def product_cost(way: str, num_tasks: int, aval: Any, form: int = 0) -> Cost:
    """What it takes to form K rows of a leaf by `form` multiplications each, and their products."""
    size, itemsize = aval.size, aval.dtype.itemsize
    return Cost(way, num_tasks * (form + num_tasks * size), num_tasks * size * itemsize)
