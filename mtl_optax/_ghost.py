"""The Gramian of weight gradients that are never formed.

For y = x W, task k's weight gradient is xᵀδ_k, with δ_k the cotangent of y. The inner products

    <xᵀδ_i, xᵀδ_j> = <δ_i, (x xᵀ) δ_j>

need the cotangents alone: half of each backward pass, and no K copies of W. An equation of that
form is *tapped*: cut out of the program, its y becomes an input, whose "row" is δ_k.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax import _program as program
from mtl_optax._linear_map import LinearMap
from mtl_optax._numerics import power_of_two
from mtl_optax._rows import scaled_products

_HIGHEST = jax.lax.Precision.HIGHEST
# What moves or widens the entries of a parameter and leaves all inner products as they are.
_ISOMETRIES = ("transpose", "reshape", "convert_element_type", "squeeze", "copy", "copy_p")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
    r"""An approximate Gramian from random projections: `value_and_jac(..., gramian=Sketch(key))`.

    As `gramian="ghost"`, but of each layer's weight gradient, c × f, only c × `columns` is formed:
    its product with a matrix of random signs R over :math:`\sqrt{columns}`. Unbiased, since the
    mean of :math:`R R^\top` is the identity; an entry of the Gramian has a standard deviation of at
    most :math:`\sqrt{2 / columns}` times the norms of the two rows. The update itself, a pullback,
    stays exact: only the weights that a strategy solves for feel the error.

    Measured by `python -m benchmarks.sketch_error` on a 512-1024-1024-512 network, batch 256, tasks
    with random labels: the least cosine of the sketched update to the exact one in 5 draws of 32
    columns is .983 (MGDA), .998 (UPGrad), .983 (CAGrad) and .996 (Nash-MTL) with 8 tasks, and .929,
    .990, .957 and .987 with 40; with 128 columns at least .999, and .994.

    Attributes:
      key: a typed random key; pass another one at each step.
      columns: how many columns of a gradient are kept, static, at least 1.
    """

    key: jax.Array
    columns: int = dataclasses.field(default=32, metadata={"static": True})


class _Use(NamedTuple):
    """An equation y = x W or y = W[x], with W a view of a parameter and x constant."""

    steps: tuple[Any, ...]  # from the parameter to y
    x: Any
    size: tuple[int, int, int, int]  # batches e, examples n, inputs c and outputs f of a layer
    layout: tuple[Any, ...]  # which uses of a parameter can be stacked: the same view of it
    x_dims: tuple[int, ...] | None  # of x: batch, example, input; None for a look-up
    output_first: bool  # whether y has its outputs before its examples

    @property
    def y(self) -> Any:
        return self.steps[-1].outvars[0]


class _Tap(NamedTuple):
    """A parameter whose uses are all tapped."""

    leaf: int
    uses: tuple[_Use, ...]


class Taps:
    """What was cut out of a linear map, and what it makes of the rows of the tapped y."""

    def __init__(self, linear_map: LinearMap, taps: Sequence[_Tap], sketch: Sketch | None):
        self._map = linear_map
        self._taps = taps
        self._sketch = sketch

    @property
    def leaves(self) -> set[int]:
        """The parameters that are tapped."""
        return {tap.leaf for tap in self._taps}

    def gramians(self, rows: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
        """Each tap's share of the Gramian, as M and s of diag(s) M diag(s).

        Args:
          rows: the rows of every use, `(K, *y.shape)`, in order.
        """
        jaxpr, shares, left = self._map.jaxpr, [], iter(rows)
        values = dict(zip(jaxpr.constvars, self._map.residuals, strict=True))
        for leaf, uses in self._taps:
            delta = _concatenate([_deltas(next(left), use) for use in uses], axis=2)
            x = _concatenate([_inputs(values[use.x], use) for use in uses], axis=1)
            sketch_cost = _sketch_cost(uses, len(delta), self._sketch)
            if self._sketch is not None and sketch_cost < _ghost_cost(uses, len(delta)):
                key = jax.random.fold_in(self._sketch.key, leaf)
                shares.append(_sketch_gramian(x, delta, key, self._sketch.columns))
            else:
                shares.append(_ghost_gramian(x, delta, is_lookup=uses[0].x_dims is None))
        return shares

    def gradients(self, cotangents: Sequence[jax.Array]) -> dict[int, jax.Array]:
        """The gradient of each tapped parameter from a cotangent of every y, in order."""
        jaxpr, gradients, left = self._map.jaxpr, {}, iter(cotangents)
        for leaf, uses in self._taps:
            parts: list[jax.Array] = []
            for use in uses:
                way = jaxpr.replace(
                    eqns=list(use.steps), invars=[jaxpr.invars[leaf]], outvars=[use.y]
                )
                parts += program.transpose(way, self._map.residuals)([next(left)])
            gradients[leaf] = functools.reduce(jnp.add, parts)
        return gradients


def tap(
    linear_map: LinearMap, wanted: Sequence[bool], sketch: Sketch | None
) -> tuple[LinearMap, Taps, jax.Array]:
    """Cuts the `wanted` parameters out of a linear map where that makes their Gramian cheaper.

    Returns:
      The map without them, every tapped y appended to its leaves; the taps; and the scales s of its
      rows, which are those of diag(1/s) J.
    """
    jaxpr, num_tasks = linear_map.jaxpr, linear_map.num_tasks
    taps = [
        each
        for each in _find(jaxpr, wanted, num_tasks)
        if min(_ghost_cost(each.uses, num_tasks), _sketch_cost(each.uses, num_tasks, sketch))
        < _rows_cost(each.uses, num_tasks)
    ]
    uses = [use for each in taps for use in each.uses]
    cut = {id(use.steps[-1]) for use in uses}
    tapped = jaxpr.replace(
        eqns=[eqn for eqn in jaxpr.eqns if id(eqn) not in cut],
        invars=[*jaxpr.invars, *(use.y for use in uses)],
    )
    unit, scales = LinearMap(tapped, linear_map.residuals).of_unit_cotangents()
    return unit, Taps(linear_map, taps, sketch), scales


def total(shares: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """The sum of Gramians diag(s) M diag(s), as one of them; all s are powers of two."""
    scales = functools.reduce(jnp.maximum, [s for _, s in shares])
    relative = [(M, s / jnp.where(scales == 0, 1, scales)) for M, s in shares]
    products = [M * (r[:, None] * r[None, :]) for M, r in relative]
    return functools.reduce(jnp.add, products), scales


def _find(jaxpr: Any, wanted: Sequence[bool], num_tasks: int) -> list[_Tap]:
    """The wanted leaves of which every use has the form of `_Use`, with their uses."""
    feeds, constants = program.feeds(jaxpr), set(jaxpr.constvars)
    views: dict[Any, tuple[int, tuple[Any, ...]]] = {
        v: (i, ()) for i, v in enumerate(jaxpr.invars) if wanted[i]
    }
    uses: dict[int, list[_Use]] = {}
    other = {views[v][0] for v in filter(program.is_var, jaxpr.outvars) if v in views}
    for eqn in jaxpr.eqns:
        read = [v for v in program.variables(eqn) if v in views]
        if len(read) == 1 and eqn.primitive.name in _ISOMETRIES:
            leaf, steps = views[read[0]]
            views[eqn.outvars[0]] = leaf, (*steps, eqn)
            continue
        for v in read:
            leaf, steps = views[v]
            # What feeds some tasks alone could carry their NaN into the products of the others.
            use = _use(eqn, v, steps, constants) if len(read) == 1 else None
            if use is None or program.fed(eqn, feeds).bit_count() < num_tasks:
                other.add(leaf)
            else:
                uses.setdefault(leaf, []).append(use)
    return [
        _Tap(leaf, tuple(found))
        for leaf, found in uses.items()
        if leaf not in other and len({use.layout for use in found}) == 1
    ]


def _use(eqn: Any, w: Any, steps: tuple[Any, ...], constants: set[Any]) -> _Use | None:
    if eqn.primitive.name not in ("dot_general", "gather"):
        return None
    side = eqn.invars.index(w)
    x = eqn.invars[1 - side]
    if not (program.is_var(x) and x in constants):
        return None
    shape, path = w.aval.shape, tuple(str(step.params) for step in steps)
    if eqn.primitive.name == "dot_general":
        contract, batch = eqn.params["dimension_numbers"]
        free = [d for d in range(x.aval.ndim) if d not in (*contract[1 - side], *batch[1 - side])]
        count = lambda dims: math.prod(shape[d] for d in dims)  # noqa: E731
        e, c = count(batch[side]), count(contract[side])
        n = math.prod(x.aval.shape[d] for d in free)
        return _Use(
            steps=(*steps, eqn),
            x=x,
            size=(e, n, c, math.prod(shape) // (e * c)),
            layout=("dot_general", path, tuple(batch[side]), tuple(contract[side])),
            x_dims=(*batch[1 - side], *free, *contract[1 - side]),
            output_first=side == 0,
        )
    if side == 0:
        numbers, y_ndim = eqn.params["dimension_numbers"], eqn.outvars[0].aval.ndim
        is_lookup = (
            numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
            and not numbers.operand_batching_dims
            and tuple(eqn.params["slice_sizes"]) == (1, *shape[1:])
            and numbers.offset_dims == tuple(range(x.aval.ndim - 1, y_ndim))
        )
        if is_lookup:
            size = (1, x.aval.size, shape[0], math.prod(shape[1:]))
            return _Use((*steps, eqn), x, size, ("gather", path), None, False)
    return None


# How many multiplications the three ways take.


def _rows_cost(uses: tuple[_Use, ...], num_tasks: int) -> float:
    e, _, c, f = uses[0].size
    n = sum(use.size[1] for use in uses)
    form = n * f if uses[0].x_dims is None else n * c * f
    return num_tasks * e * (form + num_tasks * c * f)


def _ghost_cost(uses: tuple[_Use, ...], num_tasks: int) -> float:
    e, _, c, f = uses[0].size
    n = sum(use.size[1] for use in uses)
    square = n * n * (1 if uses[0].x_dims is None else c)
    return e * (square + num_tasks * n * f * (n + num_tasks))


def _sketch_cost(uses: tuple[_Use, ...], num_tasks: int, sketch: Sketch | None) -> float:
    e, _, c, f = uses[0].size
    if sketch is None or uses[0].x_dims is None or sketch.columns >= f:
        return math.inf
    n = sum(use.size[1] for use in uses)
    return num_tasks * e * sketch.columns * (n * (c + f) + num_tasks * c)


def _sketch_gramian(
    x: jax.Array, delta: jax.Array, key: jax.Array, columns: int
) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.promote_types(jnp.float32, delta.dtype)
    signs = jax.random.rademacher(key, (delta.shape[-1], columns), dtype) / math.sqrt(columns)
    narrow = jnp.matmul(delta.astype(dtype), signs, precision=_HIGHEST)
    rows = [jnp.einsum("enc,kenm->kecm", x.astype(dtype), narrow, precision=_HIGHEST)]
    products, scales, _ = scaled_products(rows, rows, len(delta), dtype)
    return products, scales


def _ghost_gramian(
    x: jax.Array, delta: jax.Array, *, is_lookup: bool
) -> tuple[jax.Array, jax.Array]:
    delta = delta.astype(jnp.promote_types(jnp.float32, delta.dtype))
    if is_lookup:
        # Row n of a look-up is a unit vector, or 0 where its index is -1: out of bounds.
        square = ((x == x.mT) & (x >= 0)).astype(delta.dtype)
        unit = jnp.ones((), delta.dtype)
    else:
        x = x.astype(delta.dtype)
        unit = power_of_two(jnp.max(jnp.abs(x), initial=0))
        x = x / unit
        square = jnp.einsum("enc,emc->enm", x, x, precision=_HIGHEST)

    def gramian(square: jax.Array, delta: jax.Array) -> jax.Array:
        # One product at a time and one for all pairs: on CPU a contraction of several axes at once,
        # or products of vectors, cost several times as much.
        mixed = jax.lax.map(lambda one: jnp.matmul(square, one, precision=_HIGHEST), delta)
        flat = (len(delta), -1)
        return jnp.matmul(mixed.reshape(flat), delta.reshape(flat).T, precision=_HIGHEST)

    if len(square) == 1:
        matrix = gramian(square[0], delta.reshape(-1, *delta.shape[2:]))
    else:
        matrix = jnp.sum(jax.vmap(gramian, (0, 1))(square, delta), axis=0)
    return (matrix + matrix.T) / 2, jnp.full(len(delta), unit)


def _deltas(rows: jax.Array, use: _Use) -> jax.Array:
    """The cotangents of y as `(K, e, n, f)`."""
    e, n, _, f = use.size
    if use.output_first:
        return rows.reshape(-1, e, f, n).mT
    return rows.reshape(-1, e, n, f)


def _inputs(x: jax.Array, use: _Use) -> jax.Array:
    """The inputs as `(e, n, c)`; of a look-up the indices, `(1, n, 1)`, -1 for none."""
    e, n, c, _ = use.size
    if use.x_dims is not None:
        return jnp.transpose(x, use.x_dims).reshape(e, n, c)
    x, mode = x.reshape(1, n, 1), use.steps[-1].params["mode"]
    if mode == jax.lax.GatherScatterMode.CLIP:
        return jnp.clip(x, 0, c - 1)
    return jnp.where((x >= 0) & (x < c), x, -1)


def _concatenate(arrays: list[jax.Array], axis: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)
