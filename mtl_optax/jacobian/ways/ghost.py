"""The Gramian of weight gradients that are never formed.

For y = x W, task k's weight gradient is xᵀδ_k, with δ_k the cotangent of y. The inner products

    <xᵀδ_i, xᵀδ_j> = <δ_i, (x xᵀ) δ_j>

need the cotangents alone: half of each backward pass, and no K copies of W. An equation of that
form is *tapped*: cut out of the program, its y becomes an input, whose "row" is δ_k.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax._numerics import EXACT, divide, is_fewer, power_of_two, wide
from mtl_optax.jacobian import _program
from mtl_optax.jacobian._layout import Layout
from mtl_optax.jacobian._linear_map import Heads, LinearMap, one_by_one
from mtl_optax.jacobian._program import ISOMETRIES, Program, fed, is_var, variables
from mtl_optax.jacobian._rows import (
    gathered,
    max_over_shards,
    mix,
    scaled_products,
    sum_over_shards,
)
from mtl_optax.jacobian.ways._base import (
    Cost,
    Measurement,
    RowsOf,
    Way,
    product_cost,
    without_noise,
)

# With more tasks than these, one more pass through the trunk costs less than it takes to keep the
# cotangents of all its layers until the weights are known.
MOST_TASKS_HELD = 8


class Use(NamedTuple):
    """An equation y = x W or y = W[x], with W a view of a parameter and x constant."""

    steps: tuple[Any, ...]  # from the parameter to y
    x: Any
    size: tuple[int, int, int, int]  # batches e, examples n, inputs c and outputs f of a layer
    layout: tuple[Any, ...]  # which uses of a parameter can be stacked: the same view of it
    x_dims: tuple[int, ...] | None  # of x: batch, example, input; None for a look-up
    output_first: bool  # whether y has its outputs before its examples

    @property
    def y(self) -> Any:
        """The variable that it computes."""
        return self.steps[-1].outvars[0]


Uses = tuple[Use, ...]  # all of one parameter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ghost(Way):
    """Tapped layers by their cotangents, the other leaves by their rows, whichever is cheaper."""

    title = "ghost"

    def measure(self, heads: Heads, layout: Layout, rows_of: RowsOf) -> Measurement:
        """The Gramian, see `Way`."""
        del rows_of  # the cotangents of all layers come from one set of passes
        linear, taps = heads.linear, self.taps(heads.linear, layout.measured)
        uses = list(itertools.chain(*taps.values()))
        from_rows = [i for i in layout.measured_leaves if i not in taps]
        cut_leaves = range(layout.num_leaves, layout.num_leaves + len(uses))
        cut_heads, unit = _cut(heads, uses).unit([*from_rows, *cut_leaves])
        rows = cut_heads.rows(layout.row_mode)
        # One barrier each: together they would all be held at once.
        rows = [jax.lax.optimization_barrier(row) for row in rows]
        plain = {i: rows[i] for i in from_rows}
        deltas = rows[layout.num_leaves :]

        held = list(plain.values())
        products, scales, _ = scaled_products(held, held, layout.num_tasks, layout.dtype)
        tapped = self._shares(linear, taps, deltas)
        products, scales = sum_of_gramians([(products, scales), *tapped])
        products, scales = without_noise(products, scales * unit)

        def mixed(weights: jax.Array) -> dict[int, jax.Array]:
            if layout.num_tasks > MOST_TASKS_HELD:
                return {}
            weights = weights * unit
            at_hand = {i: mix(weights, row) for i, row in plain.items()}
            return at_hand | _gradients(linear, taps, [mix(weights, row) for row in deltas])

        return Measurement(products, scales, mixed)

    def costs(self, linear: LinearMap, layout: Layout) -> dict[int, Cost]:
        """What each measured leaf takes."""
        taps, num_tasks = self.taps(linear, layout.measured), layout.num_tasks
        costs = {}
        for i in layout.measured_leaves:
            aval = layout.leaf_avals[i]
            costs[i] = product_cost("rows", num_tasks, aval, linear.forming[i])
            if i in taps:
                held = num_tasks * sum(use.y.aval.size for use in taps[i])
                cost = self.tap_cost(taps[i], linear)
                costs[i] = Cost(self.title, cost, held * aval.dtype.itemsize)
        return costs

    def taps(self, linear: LinearMap, measured: Sequence[bool]) -> dict[int, Uses]:
        """The uses of the leaves that are tapped, since that makes their products cheaper."""
        return {
            leaf: uses
            for leaf, uses in find(linear.program, measured).items()
            if is_fewer(self.tap_cost(uses, linear), rows_cost(uses, linear.num_tasks))
        }

    def tap_cost(self, uses: Uses, linear: LinearMap) -> int:
        """How many multiplications the products of one leaf take from its cotangents."""
        return ghost_cost(uses, linear.num_tasks)

    def layer(
        self, leaf: int, uses: Uses, x: jax.Array, delta: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One leaf's share of the Gramian, as M and s of diag(s) M diag(s).

        Args:
          leaf: its position.
          uses: all of it.
          x: their inputs `(e, n, c)`; of look-ups the indices, `(1, n, 1)`, -1 for none.
          delta: their cotangents `(K, e, n, f)`.
        """
        del leaf
        return ghost_products(x, delta, is_lookup=uses[0].x_dims is None)

    def _shares(
        self, linear: LinearMap, taps: dict[int, Uses], deltas: Sequence[jax.Array]
    ) -> list[tuple[jax.Array, jax.Array]]:
        values = dict(zip(linear.program.jaxpr.constvars, linear.residuals, strict=True))
        left, shares = iter(deltas), []
        for leaf, uses in taps.items():
            delta = _concatenate([cotangents_of(next(left), use) for use in uses], axis=2)
            x = _concatenate([inputs_of(values[use.x], use) for use in uses], axis=1)
            shares.append(self.layer(leaf, uses, gathered(x), gathered(delta)))
        return shares


def cut_program(program: Program, uses: Sequence[Use]) -> Program:
    """The program without the tapped equations, every y appended to its leaves."""
    jaxpr, cut = program.jaxpr, {id(use.steps[-1]) for use in uses}
    return Program(
        jaxpr.replace(
            eqns=[eqn for eqn in jaxpr.eqns if id(eqn) not in cut],
            invars=[*jaxpr.invars, *(use.y for use in uses)],
        )
    )


def _cut(heads: Heads, uses: Sequence[Use]) -> Heads:
    """The heads of the program that is cut at its taps."""
    linear, program = heads.linear, cut_program(heads.linear.program, uses)
    tapped_linear = dataclasses.replace(linear, program=program)
    if linear.num_tasks == 1:
        return tapped_linear.heads()  # all of the program is one head
    # What is tapped feeds all tasks, so it is no part of any head.
    met = dict(zip(linear.program.parts.meets, heads.at_trunk, strict=True))
    return Heads(
        tapped_linear,
        [*heads.at_leaves, *(met.get(use.y, {}) for use in uses)],
        [met[v] for v in program.parts.meets],
    )


def _gradients(
    linear: LinearMap, taps: dict[int, Uses], cotangents: Sequence[jax.Array]
) -> dict[int, jax.Array]:
    """The gradient of each tapped parameter from a cotangent of every y, in order."""
    jaxpr, gradients, left = linear.program.jaxpr, {}, iter(cotangents)
    for leaf, uses in taps.items():
        parts: list[jax.Array] = []
        for use in uses:
            way = jaxpr.replace(eqns=list(use.steps), invars=[jaxpr.invars[leaf]], outvars=[use.y])
            parts += _program.transpose(way, linear.residuals)([next(left)])
        gradients[leaf] = functools.reduce(jnp.add, parts)
    return gradients


def sum_of_gramians(shares: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """The sum of Gramians diag(s) M diag(s), as one of them; all s are powers of two."""
    scales = functools.reduce(jnp.maximum, [s for _, s in shares])
    relative = [(M, divide(s, scales, s)) for M, s in shares]
    products = [M * (r[:, None] * r[None, :]) for M, r in relative]
    return functools.reduce(jnp.add, products), scales


def find(program: Program, wanted: Sequence[bool]) -> dict[int, Uses]:
    """The wanted leaves of which every use has the form of `Use`, with their uses."""
    jaxpr, constants = program.jaxpr, set(program.jaxpr.constvars)
    views: dict[Any, tuple[int, tuple[Any, ...]]] = {
        v: (i, ()) for i, v in enumerate(jaxpr.invars) if wanted[i] and v.aval.size
    }
    uses: dict[int, list[Use]] = {}
    other = {views[v][0] for v in filter(is_var, jaxpr.outvars) if v in views}
    for eqn in jaxpr.eqns:
        read = [v for v in variables(eqn) if v in views]
        if len(read) == 1 and eqn.primitive.name in ISOMETRIES:
            leaf, steps = views[read[0]]
            views[eqn.outvars[0]] = leaf, (*steps, eqn)
            continue
        for v in read:
            leaf, steps = views[v]
            # What feeds some tasks alone could carry their NaN into the products of the others.
            use = use_of(eqn, v, steps, constants) if len(read) == 1 else None
            if use is None or fed(eqn, program.feeds).bit_count() < program.num_tasks:
                other.add(leaf)
            else:
                uses.setdefault(leaf, []).append(use)
    return {
        leaf: tuple(found)
        for leaf, found in uses.items()
        if leaf not in other and len({use.layout for use in found}) == 1
    }


def use_of(eqn: Any, w: Any, steps: tuple[Any, ...], constants: set[Any]) -> Use | None:
    """The use y = x W that an equation makes of W, which `steps` lead to; None for another form."""
    if eqn.primitive.name not in ("dot_general", "gather"):
        return None
    side = eqn.invars.index(w)
    x, y = eqn.invars[1 - side], eqn.outvars[0]
    if not (is_var(x) and x in constants and x.aval.size):
        return None
    if any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in (x, y)):
        return None  # the row is the real part alone of xᵀδ
    shape, path = w.aval.shape, tuple(str(step.params) for step in steps)
    if eqn.primitive.name == "dot_general":
        contract, batch = eqn.params["dimension_numbers"]
        free = [d for d in range(x.aval.ndim) if d not in (*contract[1 - side], *batch[1 - side])]
        count = lambda dims: math.prod(shape[d] for d in dims)  # noqa: E731
        e, c = count(batch[side]), count(contract[side])
        n = math.prod(x.aval.shape[d] for d in free)
        return Use(
            steps=(*steps, eqn),
            x=x,
            size=(e, n, c, math.prod(shape) // (e * c)),
            layout=("dot_general", path, tuple(batch[side]), tuple(contract[side])),
            x_dims=(*batch[1 - side], *free, *contract[1 - side]),
            output_first=side == 0,
        )
    if side == 0:
        numbers, y_ndim = eqn.params["dimension_numbers"], y.aval.ndim
        is_lookup = (
            numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
            and not numbers.operand_batching_dims
            and tuple(eqn.params["slice_sizes"]) == (1, *shape[1:])
            and numbers.offset_dims == tuple(range(x.aval.ndim - 1, y_ndim))
        )
        if is_lookup:
            size = (1, x.aval.size, shape[0], math.prod(shape[1:]))
            return Use((*steps, eqn), x, size, ("gather", path), None, False)
    return None


# How many multiplications the ways take.


def is_cheaper(uses: Uses, num_tasks: int) -> bool:
    """Whether the products of a layer take less by the ghost's identity than by its rows."""
    return is_fewer(ghost_cost(uses, num_tasks), rows_cost(uses, num_tasks))


def rows_cost(uses: Uses, num_tasks: int) -> int:
    """Of the rows and their products."""
    e, _, c, f = uses[0].size
    return num_tasks * (forming_cost(uses) + num_tasks * e * c * f)


def forming_cost(uses: Uses) -> int:
    """Of one row."""
    e, _, c, f = uses[0].size
    n = sum(use.size[1] for use in uses)
    return e * n * f * (1 if uses[0].x_dims is None else c)


def ghost_cost(uses: Uses, num_tasks: int) -> int:
    """Of the products by the ghost's identity."""
    e, _, c, f = uses[0].size
    n = sum(use.size[1] for use in uses)
    square = n * n * (1 if uses[0].x_dims is None else c)
    return e * (square + num_tasks * n * f * (n + num_tasks))


def ghost_products(
    x: jax.Array, delta: jax.Array, *, is_lookup: bool, in_turn: bool = True
) -> tuple[jax.Array, jax.Array]:
    """M and s of a layer's share, diag(s) M diag(s), of its inputs and cotangents (`layer`).

    With `in_turn` a task at a time: faster on a CPU, but around a loop XLA orders layers so that
    all their cotangents are held.
    """
    delta = delta.astype(wide(delta.dtype))
    if is_lookup:
        # Row n of a look-up is a unit vector, or 0 where its index is -1: out of bounds.
        square = ((x == x.mT) & (x >= 0)).astype(delta.dtype)
        unit = jnp.ones((), delta.dtype)
    else:
        x = x.astype(delta.dtype)
        unit = max_over_shards(power_of_two(jnp.max(jnp.abs(x), initial=0)))
        x = x / unit
        square = jnp.einsum("enc,emc->enm", x, x, precision=EXACT)

    def gramian(square: jax.Array, delta: jax.Array) -> jax.Array:
        # One product at a time and one for all pairs: on CPU a contraction of several axes at once,
        # or products of vectors, cost several times as much.
        mix_one = lambda one: jnp.matmul(square, one, precision=EXACT)  # noqa: E731
        mixed = (one_by_one if in_turn else jax.vmap)(mix_one)(delta)
        flat = (len(delta), math.prod(delta.shape[1:]))
        return jnp.matmul(mixed.reshape(flat), delta.reshape(flat).T, precision=EXACT)

    if len(square) == 1:
        matrix = gramian(square[0], delta.reshape(len(delta), *delta.shape[2:]))
    else:
        matrix = jnp.sum(jax.vmap(gramian, (0, 1))(square, delta), axis=0)
    # Inside `jax.shard_map` a device may hold a part of the parameter, and of x or y with it.
    matrix = sum_over_shards(matrix)
    return (matrix + matrix.T) / 2, jnp.full(len(delta), unit)


def cotangents_of(rows: jax.Array, use: Use) -> jax.Array:
    """The cotangents of y as `(K, e, n, f)`."""
    e, n, _, f = use.size
    if use.output_first:
        return rows.reshape(len(rows), e, f, n).mT
    return rows.reshape(len(rows), e, n, f)


def inputs_of(x: jax.Array, use: Use) -> jax.Array:
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
