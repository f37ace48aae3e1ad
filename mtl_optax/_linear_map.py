"""The differential of K losses as data: linearised once, transposed as a strategy asks.

`jax.linearize` gives the tangent program of a loss function at a point. Kept as a jaxpr, that one
program answers everything: its transpose is the pullback, and its data flow says which parameter
feeds which task. What feeds one task alone is that task's *head*, what feeds more is the *trunk*.
Each head is transposed by itself, once. It leaves a cotangent where it meets the trunk, and those K
cotangents are all that the trunk needs, for the K rows as for any combination of them.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mtl_optax import _program as program
from mtl_optax._numerics import power_of_two
from mtl_optax._rows import mix, over_shards, scale_rows

RowMode = Literal["isolated", "batched", "sequential"]
ROW_MODES = get_args(RowMode)

# In jax.core up to JAX 0.9, in jax.extend.core since.
_trace_state = getattr(jex, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state  # pyright: ignore


def once(memo: dict[str, Any], name: str, compute: Callable[[], Any]) -> Any:
    """Computes a value once a trace: a value of an inner trace must not be used in an outer."""
    trace = _trace_state(convention="nnx")
    if name not in memo or memo[name][0] != trace:
        memo[name] = (trace, compute())
    return memo[name][1]


class _Parts(NamedTuple):
    """A program cut where its tasks part."""

    heads: list[list[Any]]  # for each group, the equations that feed it and no other task
    trunk: list[Any]  # the equations that feed several tasks
    meets: list[Any]  # the variables of the trunk that heads read, or that are losses themselves


class _Heads(NamedTuple):
    """What the heads pass back from a cotangent of 1 at each loss.

    For each variable, the rows (n, *shape) of the groups whose heads read it, by their position.
    """

    at_leaves: list[dict[int, jax.Array]]
    at_trunk: list[dict[int, jax.Array]]


class LinearMap:
    """A linear map from the flat leaves of a pytree to K loss tangents.

    Its outputs are *groups*: a scalar for a loss that was computed alone, an array for losses that
    were computed together. The residuals of the forward pass are its pytree children, so it crosses
    `jit`, `vmap` and `scan`.
    """

    def __init__(self, jaxpr: Any, residuals: Sequence[Any]):
        self.jaxpr = jaxpr
        self.residuals = residuals
        self._memo: dict[str, Any] = {}

    @classmethod
    def of(cls, linear_fn: Callable, primals: Any) -> "LinearMap":
        """Stages out `linear_fn`, which is linear in the tree `primals`."""
        jaxpr, residuals = program.sort_out(jax.make_jaxpr(linear_fn)(primals))
        return cls(program.unstack_outputs(jaxpr), residuals)

    @functools.cached_property
    def num_tasks(self) -> int:
        """The number of tasks K."""
        return sum(group.aval.size for group in self.jaxpr.outvars)

    def pullback(self, weights: jax.Array) -> list[jax.Array]:
        """Jᵀw, one array a leaf: one backward pass."""
        return self._transpose(self.jaxpr)(
            [
                weights[tasks.start : tasks.stop].reshape(group.aval.shape).astype(group.aval.dtype)
                for group, tasks in zip(self.jaxpr.outvars, self._tasks, strict=True)
            ]
        )

    def rows(self, mode: RowMode) -> list[jax.Array]:
        """The K rows, leaves `(K, *shape)`: K backward passes through the trunk."""
        if mode == "isolated":
            groups = [self._rows_of_group(i) for i in range(len(self._tasks))]
            from_trunk = [self._join(dict(enumerate(rows))) for rows in zip(*groups, strict=True)]
        elif not self._parts.meets:
            from_trunk = [None] * len(self.jaxpr.invars)
        else:
            over_tasks = jax.vmap if mode == "batched" else _map
            from_trunk = self._known(
                self._trunk, over_tasks(self._transpose(self._trunk))(self.met())
            )
        leaves = zip(from_trunk, self._heads.at_leaves, self.jaxpr.invars, strict=True)
        return [
            _sum(rows, self._join(blocks), (self.num_tasks, *leaf.aval.shape), leaf.aval.dtype)
            for rows, blocks, leaf in leaves
        ]

    def combine(
        self,
        weights: jax.Array,
        own: jax.Array,
        shared: Sequence[bool],
        wanted: Sequence[bool],
    ) -> list[jax.Array | None]:
        """Jᵀw on the leaves that are `shared`, Jᵀown on the others: one backward pass.

        Nothing is computed for leaves that are not `wanted`.
        """
        met, heads, leaves = self.met(), self._heads, self.jaxpr.invars

        def pull(w: jax.Array, wanted: Sequence[bool]) -> list[jax.Array | None]:
            from_trunk = [None] * len(leaves)
            read = self._read(self._trunk)
            if any(want and leaf in read for want, leaf in zip(wanted, leaves, strict=True)):
                pulled = self._transpose(self._trunk)([mix(w, cotangents) for cotangents in met])
                from_trunk = self._known(self._trunk, pulled)
            return [
                _sum(row, self._mix(w, blocks), leaf.aval.shape, leaf.aval.dtype) if want else None
                for row, blocks, leaf, want in zip(
                    from_trunk, heads.at_leaves, leaves, wanted, strict=True
                )
            ]

        mixed = pull(weights, [w and s for w, s in zip(wanted, shared, strict=True)])
        apart = pull(own, [w and not s for w, s in zip(wanted, shared, strict=True)])
        return [a if is_shared else b for a, b, is_shared in zip(mixed, apart, shared, strict=True)]

    def columns(self, measured: Sequence[bool]) -> tuple[jax.Array, jax.Array]:
        """M and s of the Gramian diag(s) M diag(s) over some leaves, one row held at a time.

        The column of task j is G e_j = J(Jᵀe_j): from where its head meets the trunk back to the
        leaves, forth again, and there the inner products with what all the heads left.
        """
        met, leaves = self.met(), self.jaxpr.invars
        own = [
            self._join(blocks) if wanted else None
            for blocks, wanted in zip(self._heads.at_leaves, measured, strict=True)
        ]
        dtype = jnp.promote_types(jnp.float32, jnp.result_type(*(v.aval.dtype for v in leaves)))
        zeros = jnp.zeros(self.num_tasks, dtype)
        if not jax.tree.leaves((met, own)):  # no loss depends on what is measured
            return jnp.zeros((self.num_tasks, self.num_tasks), dtype), zeros

        def column(of_task):
            met_j, own_j = of_task
            from_trunk = self._known(self._trunk, self._transpose(self._trunk)(met_j))
            row = [
                _sum(a if wanted else None, b, leaf.aval.shape, leaf.aval.dtype)
                for a, b, wanted, leaf in zip(from_trunk, own_j, measured, leaves, strict=True)
            ]
            largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in row])
            largest = over_shards(jax.lax.pmax, largest)
            scale = power_of_two(largest.astype(dtype))
            unit = [(x / scale).astype(x.dtype) for x in row]
            pushed = program.evaluate(self._trunk, self.residuals, *unit)
            pairs = [*zip(met, pushed, strict=True), *zip(own, unit, strict=True)]
            column = sum((_inner(a, b, dtype) for a, b in pairs if a is not None), zeros)
            return column, jnp.where(largest == 0, 0, scale)

        columns, scales = _map(column)((met, own))
        products = columns / jnp.where(scales == 0, 1, scales)[None, :]
        return (products + products.T) / 2, scales

    def touches(self) -> list[int]:
        """How many tasks each leaf touches, by the data flow of the tangent program."""
        leaves = range(len(self.jaxpr.invars))
        reached = program.reachable(self.jaxpr, [1 << i for i in leaves])
        sizes = [group.aval.size for group in self.jaxpr.outvars]
        return [
            sum(size for size, mask in zip(sizes, reached, strict=True) if mask >> i & 1)
            for i in leaves
        ]

    def met(self) -> list[jax.Array]:
        """The K cotangents at each variable where heads meet the trunk, `(K, *shape)`."""
        return once(
            self._memo, "met", lambda: [self._join(blocks) for blocks in self._heads.at_trunk]
        )

    def of_unit_cotangents(self) -> tuple["LinearMap", jax.Array]:
        """The map diag(1/s) J whose heads pass back entries of at most 2, and s `(K,)`.

        All s are powers of two, so nothing is rounded; squares of what follows do not overflow.
        """
        dtype = jnp.promote_types(
            jnp.float32, jnp.result_type(*(g.aval for g in self.jaxpr.outvars))
        )
        largest = [jnp.zeros(len(tasks), dtype) for tasks in self._tasks]
        for i, block in itertools.chain.from_iterable(
            map(dict.items, itertools.chain(*self._heads))
        ):
            here = jnp.max(jnp.abs(block), axis=range(1, block.ndim), initial=0)
            largest[i] = jnp.maximum(largest[i], here.astype(dtype))
        scales = [power_of_two(over_shards(jax.lax.pmax, each)) for each in largest]

        def unit(blocks: dict[int, jax.Array]) -> dict[int, jax.Array]:
            return {i: scale_rows(block, 1 / scales[i]) for i, block in blocks.items()}

        scaled = LinearMap(self.jaxpr, self.residuals)
        heads = _Heads(*([unit(blocks) for blocks in each] for each in self._heads))
        once(scaled._memo, "heads", lambda: heads)
        return scaled, jnp.concatenate(scales)

    # The program, its parts, and what is known of their rows before anything is computed.

    @functools.cached_property
    def _tasks(self) -> list[range]:
        """The tasks of each group."""
        ends = itertools.accumulate((g.aval.size for g in self.jaxpr.outvars), initial=0)
        return [range(i, j) for i, j in itertools.pairwise(ends)]

    @functools.cached_property
    def _parts(self) -> _Parts:
        groups, feeds = self.jaxpr.outvars, program.feeds(self.jaxpr)
        owners = {tasks.start: i for i, tasks in enumerate(self._tasks)}
        heads, trunk = [[] for _ in groups], []
        for eqn in self.jaxpr.eqns:
            mask = program.fed(eqn, feeds)
            if mask.bit_count() > 1:
                trunk.append(eqn)
            elif mask:
                heads[owners[mask.bit_length() - 1]].append(eqn)
        read = {v for eqn in itertools.chain(*heads) for v in program.variables(eqn)}
        read.update(filter(program.is_var, groups))
        return _Parts(heads, trunk, [v for eqn in trunk for v in eqn.outvars if v in read])

    @functools.cached_property
    def _trunk(self) -> Any:
        return self.jaxpr.replace(eqns=self._parts.trunk, outvars=self._parts.meets)

    @property
    def _heads(self) -> _Heads:
        return once(self._memo, "heads", self._pull_heads)

    def _pull_heads(self) -> _Heads:
        leaves, meets = self.jaxpr.invars, self._parts.meets
        blocks = {v: {} for v in [*leaves, *meets]}
        for i, (group, head) in enumerate(zip(self.jaxpr.outvars, self._parts.heads, strict=True)):
            shape, dtype = group.aval.shape, group.aval.dtype
            if head:
                read = list(
                    dict.fromkeys(v for eqn in head for v in program.variables(eqn) if v in blocks)
                )
                pull = self._transpose(self.jaxpr.replace(eqns=head, invars=read, outvars=[group]))
                for v, row in zip(read, pull([jnp.ones(shape, dtype)]), strict=True):
                    blocks[v][i] = row[None]
            elif program.is_var(group) and group in blocks:
                # Losses that the trunk computes, or that are parameters themselves.
                blocks[group][i] = jnp.eye(group.aval.size, dtype=dtype).reshape(-1, *shape)
        return _Heads([blocks[v] for v in leaves], [blocks[v] for v in meets])

    def _rows_of_group(self, i: int) -> list[jax.Array | None]:
        """The rows of one group's tasks through the trunk, `(n, *shape)`."""
        meets = zip(self._parts.meets, self._heads.at_trunk, strict=True)
        met = {v: blocks[i] for v, blocks in meets if i in blocks}
        if not met:
            return [None] * len(self.jaxpr.invars)
        # A slice holds no operation of another task, so 0 * NaN can't reach these rows.
        slice_ = program.cut(self._trunk, list(met))
        pull, cotangents = self._transpose(slice_), list(met.values())
        if len(self._tasks[i]) == 1:
            return self._known(slice_, [row[None] for row in pull([c[0] for c in cotangents])])
        return self._known(slice_, jax.vmap(pull)(cotangents))

    def _transpose(self, jaxpr: Any) -> Callable[[list[jax.Array]], list[jax.Array]]:
        return program.transpose(jaxpr, self.residuals)

    def _read(self, jaxpr: Any) -> set[Any]:
        return {v for eqn in jaxpr.eqns for v in program.variables(eqn)}

    def _known(self, jaxpr: Any, values: Sequence[jax.Array]) -> list[jax.Array | None]:
        """None for the leaves that a part of the program does not read: their rows are zero."""
        read, pairs = self._read(jaxpr), zip(self.jaxpr.invars, values, strict=True)
        return [value if leaf in read else None for leaf, value in pairs]

    def _mix(self, weights: jax.Array, blocks: dict[int, jax.Array]) -> jax.Array | None:
        parts = [mix(weights[self._tasks[i].start :][: len(b)], b) for i, b in blocks.items()]
        return functools.reduce(jnp.add, parts) if parts else None

    def _join(self, blocks: Mapping[int, jax.Array | None]) -> jax.Array | None:
        """All rows `(K, *shape)` from those of some groups; None where all are zero."""
        known = [block for block in blocks.values() if block is not None]
        if not known:
            return None

        def rows(i: int) -> jax.Array:
            block = blocks.get(i)
            if block is None:
                return jnp.zeros((len(self._tasks[i]), *known[0].shape[1:]), known[0].dtype)
            return block

        return jnp.concatenate([rows(i) for i in range(len(self._tasks))])


jax.tree_util.register_pytree_node(
    LinearMap,
    lambda linear: ((linear.residuals,), linear.jaxpr),
    lambda jaxpr, children: LinearMap(jaxpr, *children),
)


def _map(fn: Callable) -> Callable:
    return lambda xs: jax.lax.map(fn, xs)


def _sum(a: jax.Array | None, b: jax.Array | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The sum, where None is zero."""
    known = [x for x in (a, b) if x is not None]
    return functools.reduce(jnp.add, known) if known else jnp.zeros(shape, dtype)


def _inner(rows: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """The inner product of each row with x."""
    axes = list(range(x.ndim))
    products = jax.lax.dot_general(
        rows.astype(dtype),
        x.astype(dtype),
        (([axis + 1 for axis in axes], axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    return over_shards(jax.lax.psum, products)
