"""A tap: 0 in place of what a layer adds to y, which in a backward pass catches y's cotangents.

A tap is linear in a *hole*, an input `(K,)` of the linear program. Its transpose gives the hole one
row of the layer's Gramian, and what transposes the program adds them up: through loops, checkpoints
and branches, with no more than one layer's cotangents alive.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import ad, mlir

from mtl_optax._numerics import wide
from mtl_optax.jacobian._rows import contract, gathered
from mtl_optax.jacobian.ways import ghost
from mtl_optax.jacobian.ways._base import Cost


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is tapped.

    Attributes:
      num_tasks: the number of tasks K.
      dtype: of the Gramian.
      aval: y as a type: its shape, its dtype, how it is split over devices.
      use: y = x W, measured by its ghost; None for a parameter itself, measured by its rows.
      forming: the multiplications that a row of the parameter takes.
    """

    num_tasks: int
    dtype: Any
    aval: Any
    use: ghost.Use | None = None
    forming: int = 0

    @property
    def cost(self) -> Cost:
        """What measuring it once takes."""
        held = self.num_tasks * self.aval.size * self.aval.dtype.itemsize
        if self.use is not None:
            return Cost("streamed ghost", ghost.ghost_cost((self.use,), self.num_tasks), held)
        return Cost("streamed rows", self.by_rows, held)

    @property
    def by_rows(self) -> int:
        """How many multiplications measuring it once by its rows takes."""
        if self.use is not None:
            return ghost.rows_cost((self.use,), self.num_tasks)
        return self.num_tasks * (self.forming + self.num_tasks * self.aval.size)

    def products(self, cotangents: jax.Array, residuals: list[jax.Array]) -> jax.Array:
        """Its Gramian `(K, K)`.

        Args:
          cotangents: `(K, *y.shape)`.
          residuals: x of a ghost; of rows what heads left at the parameter, if any did.
        """
        if self.use is None:
            rows = cotangents.astype(wide(cotangents.dtype))
            rows = rows + sum(own.astype(rows.dtype) for own in residuals)
            axes = range(1, rows.ndim)
            return contract(rows, rows, (axes, axes)).astype(self.dtype)
        x = ghost.inputs_of(gathered(residuals[0]), self.use)
        delta = ghost.cotangents_of(gathered(cotangents), self.use)
        products, scales = ghost.ghost_products(
            x, delta, is_lookup=self.use.x_dims is None, in_turn=False
        )
        return (products * (scales[:, None] * scales[None, :])).astype(self.dtype)


def tap(layer: Layer, residuals: list[jax.Array], task: jax.Array, hole: jax.Array) -> jax.Array:
    """Y of a layer whose parameter is 0, as it depends on the hole.

    Args:
      layer: what is tapped.
      residuals: what its products take beside the cotangents.
      task: of which task the cotangents are: an index, over which all of it is mapped.
      hole: `(K,)`, 0, whose cotangent is a row of the Gramian.
    """
    return _tap_p.bind(*residuals, task, hole, aval=layer.aval, layer=layer)


def zeros(aval: Any) -> jax.Array:
    """An array of a type of a jaxpr's variable, which may say how it is split over devices."""
    return _tap_p.bind(aval=aval, layer=None)


def _zeros(*_: Any, aval: Any, layer: Layer | None) -> jax.Array:
    del layer
    return jnp.zeros(aval.shape, aval.dtype)


def _transpose(cotangent: Any, *operands: Any, aval: Any, layer: Layer) -> list[Any]:
    del aval
    *residuals, task, hole = operands
    nothing = [None] * (len(operands) - 1)
    if type(cotangent) is ad.Zero:
        return [*nothing, ad.Zero(hole.aval)]
    return [*nothing, _row(layer)(task, cotangent, *residuals)]


def _row(layer: Layer) -> Any:
    """The row of a task in the Gramian of a layer; only all of them at once are computed."""

    @jax.custom_batching.custom_vmap
    def row(task: jax.Array, cotangent: jax.Array, *residuals: jax.Array) -> jax.Array:
        del task, cotangent, residuals
        return jnp.zeros(layer.num_tasks, layer.dtype)

    @row.def_vmap
    def rows(size, mapped, task, cotangents, *residuals):
        # The index is mapped over tasks alone, so this is never an axis of the user's.
        del size, task
        if not mapped[1]:  # what is every task's cotangent is 0
            return jnp.zeros((layer.num_tasks,) * 2, layer.dtype), True
        return layer.products(cotangents, [*residuals]), True

    return row


_tap_p = jex.Primitive("gramian_tap")
_tap_p.def_impl(_zeros)
_tap_p.def_abstract_eval(lambda *_, aval, layer: aval)
ad.primitive_transposes[_tap_p] = _transpose
mlir.register_lowering(_tap_p, mlir.lower_fun(_zeros, multiple_results=False))


def layer_of(eqn: Any, w: Any, num_tasks: int, dtype: Any) -> tuple[Layer, Any] | None:
    """The layer y = x W that an equation is and its x, where its ghost is the cheaper way."""
    x = {v for v in eqn.invars if isinstance(v, jex.Var) and v is not w}
    use = ghost.use_of(eqn, w, (), x)
    if use is None or not ghost.is_cheaper((use,), num_tasks):
        return None
    return Layer(num_tasks, dtype, use.y.aval, use, ghost.forming_cost((use,))), use.x
