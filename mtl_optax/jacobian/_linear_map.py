"""The differential of K losses: linearised once, transposed as a strategy asks.

Each head is transposed by itself, once. It leaves a cotangent where it meets the trunk, and those K
cotangents are all that the trunk needs, for the K rows as for any combination of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from mtl_optax._numerics import power_of_two, wide
from mtl_optax.jacobian import _program
from mtl_optax.jacobian._linearity import has_bent_rule
from mtl_optax.jacobian._opaque import check_residuals
from mtl_optax.jacobian._program import (
    Program,
    all_read,
    forward_as_backward,
    is_var,
    variables,
)
from mtl_optax.jacobian._rows import (
    combine_rows,
    if_finite,
    keep_rows,
    max_over_shards,
    mix,
    scale_rows,
)

RowMode = Literal["isolated", "batched", "sequential"]
ROW_MODES = get_args(RowMode)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A linear map from the leaves of the parameters to K loss tangents."""

    program: Program = dataclasses.field(metadata={"static": True})
    residuals: Sequence[Any]
    present: jax.Array | None = None  # (K,) bool, which rows are not 0; None for all

    @classmethod
    def of(cls, linear_fn: Callable, *primals: Any) -> "LinearMap":
        """Stages out `linear_fn`, which is linear in the trees `primals`."""
        return cls(*Program.of(linear_fn, *primals))

    @property
    def num_tasks(self) -> int:
        """The number of tasks K."""
        return self.program.num_tasks

    @property
    def touches(self) -> list[int]:
        """How many tasks each leaf touches."""
        return self.program.touches

    @property
    def forming(self) -> list[int]:
        """The multiplications that a row of each leaf takes."""
        return self.program.forming

    @property
    def is_bent(self) -> bool:
        """Whether a backward rule in the trunk is known not to be linear in the cotangent."""
        return has_bent_rule(self.program.parts.trunk)

    @property
    def underflows(self) -> bool:
        """Whether a leaf or a loss is of a type that has no small numbers, as float16."""
        return self.program.underflows

    def keep(self, tasks: jax.Array) -> "LinearMap":
        """The map with the rows of the other tasks exactly 0, whatever they hold."""
        present = tasks if self.present is None else tasks & self.present
        return dataclasses.replace(self, present=present)

    def pullback(self, weights: jax.Array) -> list[jax.Array]:
        """Jᵀw, one array a leaf: one backward pass."""
        self._check()
        if self.present is not None:
            return self.heads().mix(weights)
        return self._transpose(self.program.jaxpr)(self._split(weights))

    def heads(self) -> "Heads":
        """The map with its heads transposed."""
        self._check()
        program, blocks = self.program, {}
        for v in (*program.leaves, *program.parts.meets):
            blocks[v] = {}
        for i, (group, head) in enumerate(zip(program.groups, program.parts.heads, strict=True)):
            shape, dtype = group.aval.shape, group.aval.dtype
            if head:
                read = list(dict.fromkeys(v for e in head for v in variables(e) if v in blocks))
                pull = self._transpose(
                    program.jaxpr.replace(eqns=head, invars=read, outvars=[group])
                )
                for v, row in zip(read, pull([jnp.ones(shape, dtype)]), strict=True):
                    blocks[v][i] = row[None]
            elif is_var(group) and group in blocks:
                # Losses that the trunk computes, or that are parameters themselves.
                blocks[group][i] = jnp.eye(group.aval.size, dtype=dtype).reshape(-1, *shape)
        at_leaves = [blocks[v] for v in program.leaves]
        return Heads(self, at_leaves, [blocks[v] for v in program.parts.meets])

    def _split(self, weights: jax.Array) -> list[jax.Array]:
        return [
            weights[tasks.start : tasks.stop].reshape(group.aval.shape).astype(group.aval.dtype)
            for group, tasks in zip(self.program.groups, self.program.tasks, strict=True)
        ]

    def _check(self) -> None:
        check_residuals(self.residuals, [v.aval for v in self.program.jaxpr.constvars])

    def _transpose(self, jaxpr: Any) -> Callable[[list[jax.Array]], list[jax.Array]]:
        return _program.transpose(jaxpr, self.residuals)


@dataclasses.dataclass(frozen=True)
class Heads:
    """What the heads of a linear map pass back from a cotangent of 1 at each loss.

    For each leaf, and each variable where heads meet the trunk, the rows `(n, *shape)` of the
    groups whose heads read it, by their position.
    """

    linear: LinearMap
    at_leaves: list[dict[int, jax.Array]]
    at_trunk: list[dict[int, jax.Array]]

    def rows(self, mode: RowMode) -> list[jax.Array]:
        """The K rows, leaves `(K, *shape)`: K backward passes through the trunk."""
        program, present = self._program, self.linear.present
        if present is not None:
            mode = "isolated"  # only rows that were differentiated alone can be told apart
        if mode == "isolated":
            groups = [self._rows_of_group(i) for i in range(len(program.tasks))]
            from_trunk = [self._join(dict(enumerate(rows))) for rows in zip(*groups, strict=True)]
        elif not program.parts.meets:
            from_trunk = [None] * len(program.leaves)
        else:
            over_tasks = jax.vmap if mode == "batched" else one_by_one
            from_trunk = self._known(over_tasks(self._pull_trunk())(self.met()))
        rows = [
            add(row, self._join(blocks), (self.linear.num_tasks, *leaf.aval.shape), leaf.aval.dtype)
            for row, blocks, leaf in zip(from_trunk, self.at_leaves, program.leaves, strict=True)
        ]
        return rows if present is None else [keep_rows(row, present) for row in rows]

    def combine(
        self, weights: jax.Array, own: jax.Array, shared: Sequence[bool], wanted: Sequence[bool]
    ) -> list[jax.Array | None]:
        """Jᵀw on the leaves that are `shared`, Jᵀown on the others: one backward pass.

        Nothing is computed for leaves that are not `wanted`: None.
        """
        present = self.linear.present
        if present is None:
            return self._combine(weights, own, shared, wanted)
        # Nothing of an absent task leaves its head. Where the trunk itself is not finite, and 0
        # times it is NaN, only rows that were differentiated alone can be told apart.
        return if_finite(
            self._keep(present)._combine(weights, own, shared, wanted),
            lambda: combine_rows(self.rows("isolated"), weights, own, shared, wanted),
        )

    def mix(self, weights: jax.Array) -> list[jax.Array]:
        """Jᵀw, one array a leaf."""
        everywhere = [True] * len(self.at_leaves)
        mixed = self.combine(weights, weights, everywhere, everywhere)
        return [leaf for leaf in mixed if leaf is not None]

    def met(self) -> list[jax.Array]:
        """The K cotangents at each variable where heads meet the trunk, `(K, *shape)`."""
        return [rows for rows in map(self._join, self.at_trunk) if rows is not None]

    def own(self, leaves: Sequence[int]) -> dict[int, jax.Array]:
        """The K rows at those of the leaves that heads read, as far as they come from heads."""
        joined = {i: self._join(self.at_leaves[i]) for i in leaves}
        return {i: rows for i, rows in joined.items() if rows is not None}

    def pull_and_push(self, leaves: Sequence[int]) -> tuple[Callable, Callable]:
        """The trunk from its K cotangents, one task's each, to those leaves, and forth again.

        Forth is the transpose of the transpose: not everything is differentiated forwards as it is
        backwards, and a custom backward rule has no forward one.
        """
        trunk = forward_as_backward(self._program.parts.trunk)
        back, meets = self.linear._transpose(trunk), [v.aval for v in trunk.outvars]

        def pull(*cotangents: jax.Array) -> list[jax.Array]:
            pulled = back(list(cotangents))
            return [pulled[i] for i in leaves]

        return pull, jax.linear_transpose(pull, *meets)

    def read_by_trunk(self, leaves: Sequence[int]) -> list[int]:
        """Those of the leaves that the trunk reads."""
        read = all_read(self._program.parts.trunk)
        return [i for i in leaves if self._program.leaves[i] in read]

    def unit(self, leaves: Sequence[int]) -> tuple["Heads", jax.Array]:
        """The heads of diag(1/s) J, whose entries are at most 2, and s `(K,)`.

        All s are powers of two, so nothing is rounded; squares of what follows do not overflow.
        What the heads pass back to other leaves than those is left out.

        Raises:
          TypeError: if a backward rule in the trunk is not linear: what it makes of scaled
            cotangents is no row.
        """
        if self.linear.is_bent:
            raise TypeError(
                "some function in the model has a backward rule that is not linear in the "
                "cotangent, such as a custom_vjp that clips gradients: only whole rows are exact "
                'there, by gramian="rows" or "auto", with rows="sequential" where memory is short'
            )
        at_leaves = [blocks if i in leaves else {} for i, blocks in enumerate(self.at_leaves)]
        dtypes = [wide(group.aval.dtype) for group in self._program.groups]
        dtype = functools.reduce(jnp.promote_types, dtypes)
        largest = [jnp.zeros(len(tasks), dtype) for tasks in self._program.tasks]
        for blocks in (*at_leaves, *self.at_trunk):
            for i, block in blocks.items():
                here = jnp.max(jnp.abs(block), axis=range(1, block.ndim), initial=0)
                largest[i] = jnp.maximum(largest[i], here.astype(dtype))
        scales = [power_of_two(max_over_shards(each)) for each in largest]

        def scaled(at: list[dict[int, jax.Array]]) -> list[dict[int, jax.Array]]:
            return [{i: scale_rows(b, 1 / scales[i]) for i, b in each.items()} for each in at]

        heads = Heads(self.linear, scaled(at_leaves), scaled(self.at_trunk))
        return heads, jnp.concatenate(scales)

    @property
    def _program(self) -> Program:
        return self.linear.program

    def _pull_trunk(self) -> Callable[[list[jax.Array]], list[jax.Array]]:
        return self.linear._transpose(self._program.parts.trunk)

    def _combine(
        self, weights: jax.Array, own: jax.Array, shared: Sequence[bool], wanted: Sequence[bool]
    ) -> list[jax.Array | None]:
        program, met, read = self._program, self.met(), all_read(self._program.parts.trunk)

        def pull(w: jax.Array, wanted: Sequence[bool]) -> list[jax.Array | None]:
            from_trunk = [None] * len(program.leaves)
            if any(want and v in read for want, v in zip(wanted, program.leaves, strict=True)):
                pulled = self._pull_trunk()([mix(w, cotangents) for cotangents in met])
                from_trunk = self._known(pulled)
            leaves = zip(from_trunk, self.at_leaves, program.leaves, wanted, strict=True)
            return [
                add(row, self._mix(w, blocks), leaf.aval.shape, leaf.aval.dtype) if want else None
                for row, blocks, leaf, want in leaves
            ]

        mixed = pull(weights, [w and s for w, s in zip(wanted, shared, strict=True)])
        apart = pull(own, [w and not s for w, s in zip(wanted, shared, strict=True)])
        return [a if is_shared else b for a, b, is_shared in zip(mixed, apart, shared, strict=True)]

    def _keep(self, tasks: jax.Array) -> "Heads":
        """The heads with what those of the other tasks pass back exactly 0."""

        def kept(at: list[dict[int, jax.Array]]) -> list[dict[int, jax.Array]]:
            each = [tasks[t.start : t.stop] for t in self._program.tasks]
            return [{i: keep_rows(b, each[i]) for i, b in blocks.items()} for blocks in at]

        return Heads(self.linear, kept(self.at_leaves), kept(self.at_trunk))

    def _rows_of_group(self, i: int) -> list[jax.Array | None]:
        """The rows of one group's tasks through the trunk, `(n, *shape)`."""
        parts = self._program.parts
        met = {v: at[i] for v, at in zip(parts.meets, self.at_trunk, strict=True) if i in at}
        if not met:
            return [None] * len(self._program.leaves)
        # A slice holds no operation of another task, so 0 * NaN can't reach these rows. It is
        # transposed for the leaves that it reads: of many heads each reads its own.
        slice_ = _program.cut(parts.trunk, list(met))
        read = all_read(slice_)
        leaves = [leaf for leaf in self._program.leaves if leaf in read]
        pull = self.linear._transpose(slice_.replace(invars=leaves))
        cotangents = list(met.values())
        if len(self._program.tasks[i]) == 1:
            rows = [row[None] for row in pull([c[0] for c in cotangents])]
        else:
            rows = jax.vmap(pull)(cotangents)
        known = dict(zip(leaves, rows, strict=True))
        return [known.get(leaf) for leaf in self._program.leaves]

    def _known(self, values: Sequence[jax.Array]) -> list[jax.Array | None]:
        """None for the leaves that the trunk does not read: their rows are zero."""
        read = all_read(self._program.parts.trunk)
        pairs = zip(self._program.leaves, values, strict=True)
        return [value if leaf in read else None for leaf, value in pairs]

    def _mix(self, weights: jax.Array, blocks: dict[int, jax.Array]) -> jax.Array | None:
        tasks = self._program.tasks
        parts = [mix(weights[tasks[i].start :][: len(b)], b) for i, b in blocks.items()]
        return functools.reduce(jnp.add, parts) if parts else None

    def _join(self, blocks: Mapping[int, jax.Array | None]) -> jax.Array | None:
        """All rows `(K, *shape)` from those of some groups; None where all are zero."""
        known = [block for block in blocks.values() if block is not None]
        if not known:
            return None

        def zeros(count: int) -> jax.Array:
            zero = jnp.zeros_like(known[0])[:1]  # split over devices as it is
            return jnp.broadcast_to(zero, (count, *zero.shape[1:]))

        rows, missing = [], 0  # a head's rows are zero but for its own
        for i, tasks in enumerate(self._program.tasks):
            block = blocks.get(i)
            if block is None:
                missing += len(tasks)
                continue
            rows += [zeros(missing), block] if missing else [block]
            missing = 0
        return jnp.concatenate([*rows, zeros(missing)] if missing else rows)


def one_by_one(fn: Callable) -> Callable:
    """`fn` over the first axis, one turn after another."""
    return lambda xs: jax.lax.map(fn, xs)


def add(a: jax.Array | None, b: jax.Array | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The sum, where None is zero."""
    known = [x for x in (a, b) if x is not None]
    return functools.reduce(jnp.add, known) if known else jnp.zeros(shape, dtype)
