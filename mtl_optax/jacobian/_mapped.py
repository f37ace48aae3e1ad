"""Tasks along an axis: one element's program, whose residuals are mapped over the elements.

A task depends on its own slice of the batch alone, so the K rows together take one backward pass of
the whole batch, as `jax.vmap(jax.grad(loss_fn))` does.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mtl_optax.jacobian import _program
from mtl_optax.jacobian._arguments import Arguments, is_object
from mtl_optax.jacobian._linear_map import RowMode
from mtl_optax.jacobian._losses import check_losses, check_reduced
from mtl_optax.jacobian._opaque import check_residuals
from mtl_optax.jacobian._program import Program, is_var, reachable
from mtl_optax.jacobian._rows import combine_rows, gathered, gathered_tasks, if_finite, keep_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MappedMap:
    """A linear map from the leaves of the parameters to one loss, or several, of each element.

    It is its own heads: nothing is left to transpose alone. The tasks are those of the first loss
    of all elements, then those of the second.
    """

    program: Program = dataclasses.field(metadata={"static": True})  # of one element
    residuals: Sequence[Any]
    axes: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})  # of the residuals
    stacked: tuple[bool, ...] = dataclasses.field(metadata={"static": True})  # leaves of slices
    size: int = dataclasses.field(metadata={"static": True})  # of the axis
    present: jax.Array | None = None  # (K,) bool, which rows are not 0; None for all

    @property
    def num_tasks(self) -> int:
        """The number of tasks K."""
        return self.size * self.program.num_tasks

    @property
    def touches(self) -> list[int]:
        """How many tasks each leaf touches; a slice those of its element."""
        touches = zip(self.program.touches, self.stacked, strict=True)
        return [n if is_stacked else n * self.size for n, is_stacked in touches]

    @property
    def forming(self) -> list[int]:
        """The multiplications that a row of each leaf takes."""
        return self.program.forming

    @property
    def underflows(self) -> bool:
        """Whether a leaf or a loss is of a type that has no small numbers, as float16."""
        return self.program.underflows

    def keep(self, tasks: jax.Array) -> "MappedMap":
        """The map with the rows of the other tasks exactly 0, whatever they hold."""
        present = tasks if self.present is None else tasks & self.present
        return dataclasses.replace(self, present=present)

    def heads(self) -> "MappedMap":
        """Itself."""
        return self

    def pullback(self, weights: jax.Array) -> list[jax.Array]:
        """Jᵀw, one array a leaf: one backward pass."""
        return self.mix(weights)

    def mix(self, weights: jax.Array) -> list[jax.Array]:
        """Jᵀw, one array a leaf."""
        everywhere = [True] * len(self.stacked)
        mixed = self.combine(weights, weights, everywhere, everywhere)
        return [leaf for leaf in mixed if leaf is not None]

    def combine(
        self, weights: jax.Array, own: jax.Array, shared: Sequence[bool], wanted: Sequence[bool]
    ) -> list[jax.Array | None]:
        """Jᵀw on the leaves that are `shared`, Jᵀown on the others, None where not `wanted`."""
        if self.present is not None:
            weights, own = (jnp.where(self.present, w, 0) for w in (weights, own))
        nothing = [None] * len(shared)
        mixed = self._pull(weights) if any(shared) else nothing
        apart = nothing if all(shared) else self._pull(own)
        pairs = zip(mixed, apart, shared, wanted, strict=True)
        kept = [(a if s else b) if want else None for a, b, s, want in pairs]
        if self.present is None:
            return kept
        return if_finite(
            kept, lambda: combine_rows(self.rows("isolated"), weights, own, shared, wanted)
        )

    def rows(self, mode: RowMode) -> list[jax.Array]:
        """The K rows, leaves `(K, *shape)`: one backward pass of each element."""
        del mode
        blocks = [self._rows_of_loss(group) for group in self.program.groups]
        joined = [jnp.concatenate(each) for each in zip(*blocks, strict=True)]
        rows = [gathered_tasks(row) for row in joined]
        return rows if self.present is None else [keep_rows(row, self.present) for row in rows]

    def mapped(self, fn: Callable[..., Any], *along: Any) -> Any:
        """`fn(residuals, *slices)` of each element, with its slices of `along`: a first axis."""
        avals = [v.aval for v in self.program.jaxpr.constvars]
        shapes = [
            jax.ShapeDtypeStruct(a.shape if axis is None else (self.size, *a.shape), a.dtype)
            for a, axis in zip(avals, self.axes, strict=True)
        ]
        check_residuals(self.residuals, shapes)
        in_axes = (self.axes, *[0] * len(along))
        return jax.vmap(fn, in_axes, axis_size=self.size)(tuple(self.residuals), *along)

    def _pull(self, weights: jax.Array) -> list[jax.Array]:
        """Jᵀw as the transpose of all elements at once: no row is formed."""
        program, size = self.program, self.size

        def losses(*leaves: jax.Array) -> list[jax.Array]:
            def one(residuals: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
                return _program.evaluate(program.jaxpr, residuals, *leaves)

            in_axes = (self.axes, tuple(0 if s else None for s in self.stacked))
            each = jax.vmap(one, in_axes, axis_size=size)(tuple(self.residuals), leaves)
            return [gathered(loss) for loss in each]

        wholes = [self._whole(i) for i in range(len(self.stacked))]
        groups = zip(weights.reshape(-1, size), program.groups, strict=True)
        cotangents = [w.astype(group.aval.dtype) for w, group in groups]
        try:
            return list(jax.linear_transpose(losses, *wholes)(cotangents))
        except (NotImplementedError, TypeError):
            # Not everything that one element transposes can be mapped and then transposed: branches
            # that differ become a `stop_gradient`, a backward rule of one's own is known for one.
            return self._pull_each(cotangents)

    def _pull_each(self, cotangents: Sequence[jax.Array]) -> list[jax.Array]:
        """Jᵀw as the sum over the elements, each transposed by itself."""

        def one(residuals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
            return _program.transpose(self.program.jaxpr, residuals)(cotangents)

        pulled = self.mapped(one, list(cotangents))
        return [
            leaf if is_stacked else jnp.sum(leaf, axis=0)
            for leaf, is_stacked in zip(pulled, self.stacked, strict=True)
        ]

    def _rows_of_loss(self, group: Any) -> list[jax.Array]:
        """The rows of one loss of all elements."""
        jaxpr = _program.cut(self.program.jaxpr, [group])
        if not is_var(group):
            leaves = range(len(self.stacked))
            shapes = [self._whole(i) for i in leaves]
            return [jnp.zeros((self.size, *s.shape), s.dtype) for s in shapes]
        one = jnp.ones((), group.aval.dtype)
        rows = self.mapped(lambda residuals: _program.transpose(jaxpr, residuals)([one]))
        return [
            _diagonal(row) if is_stacked else row
            for row, is_stacked in zip(rows, self.stacked, strict=True)
        ]

    def _whole(self, leaf: int) -> Any:
        aval = self.program.leaves[leaf].aval
        if not self.stacked[leaf]:
            return aval
        # With the mesh axes that it varies over inside `shard_map`.
        stack = lambda x: jnp.broadcast_to(x, (self.size, *aval.shape))  # noqa: E731
        return jax.make_jaxpr(stack)(aval).out_avals[0]


def _diagonal(row: jax.Array) -> jax.Array:
    """`(N, *shape)` slices as the rows `(N, N, *shape)` of a leaf that holds one for each task."""
    size = len(row)
    own = jnp.eye(size, dtype=bool).reshape(size, size, *[1] * (row.ndim - 1))
    return jnp.where(own, row[:, None], 0)


def linearize_mapped(
    loss_fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    in_axes: Any,
    argnums: int | Sequence[int],
    wrt: Any,
    has_aux: bool,
) -> tuple[Any, list[Any], MappedMap]:
    """The losses of all elements, what else the function returns, and the linear map.

    Args:
      loss_fn: of one element.
      args: the arguments of all.
      kwargs: the keyword arguments, mapped over their first axis as `jax.vmap` does.
      in_axes: as of `jax.vmap`.
      argnums: as of `value_and_jac`.
      wrt: as of `value_and_jac`.
      has_aux: as of `value_and_jac`.
    """
    leaves, treedef = jax.tree.flatten((list(args), kwargs), is_leaf=is_object)
    axes_of_args = _axes_of_args(args, in_axes)
    axes = [axis for each in axes_of_args for axis in each]
    axes += [0] * (len(leaves) - len(axes))
    mapped = {i: axis for i, axis in enumerate(axes) if axis is not None}
    size = _size([(leaves[i], axis) for i, axis in mapped.items()])
    programs = []

    def one(slices: Sequence[Any]) -> Any:
        filled = dict(zip(mapped, slices, strict=True))
        own_args, own_kwargs = treedef.unflatten([filled.get(i, x) for i, x in enumerate(leaves)])
        arguments = Arguments.of(own_args, own_kwargs, argnums, wrt)

        losses, linear_fn, aux, changes = arguments.linearize(loss_fn, has_aux)
        if jax.tree.leaves(changes):
            raise ValueError(
                "the loss function changes an nnx module, such as batch statistics or a random "
                "stream, which would have another value for each task along an axis: leave "
                "in_axes out and return an array of losses, or use model.eval()"
            )
        check_losses(losses)
        check_reduced(losses, arguments.params)
        if any(jnp.shape(loss) for loss in jax.tree.leaves(losses)):
            raise ValueError(
                "with in_axes= the loss function is written for one element, and each of its "
                f"losses is a scalar: got shapes {[jnp.shape(x) for x in jax.tree.leaves(losses)]}"
            )
        program, residuals = Program.of(linear_fn, arguments.leaves)
        programs.append((program, _stacked(args, axes_of_args, argnums, arguments)))
        return (losses, aux), residuals

    slices = _slices([leaves[i] for i in mapped], tuple(mapped.values()), size)
    closed, (whole, _) = jax.make_jaxpr(one, return_shape=True)(slices)
    depends = reachable(closed.jaxpr, [1] * len(mapped))
    num_whole = len(jax.tree.leaves(whole))
    # What is the same for all elements is not repeated.
    out_axes = [0] * num_whole + [0 if mask else None for mask in depends[num_whole:]]
    outputs = jax.vmap(jex.jaxpr_as_fun(closed), tuple(mapped.values()), out_axes, axis_size=size)(
        *(leaves[i] for i in mapped)
    )
    losses, aux = jax.tree.unflatten(jax.tree.structure(whole), outputs[:num_whole])
    program, stacked = programs[-1]
    linear = MappedMap(
        program=program,
        residuals=[jnp.asarray(output) for output in outputs[num_whole:]],
        axes=tuple(out_axes[num_whole:]),
        stacked=stacked,
        size=size,
    )
    return losses, aux, linear


def _axes_of_args(args: Sequence[Any], in_axes: Any) -> list[list[int | None]]:
    """For each argument, the axis of each of its leaves."""
    each = list(in_axes) if isinstance(in_axes, list | tuple) else [in_axes] * len(args)
    if len(each) != len(args):
        raise ValueError(
            f"in_axes={in_axes} has {len(each)} entries for {len(args)} positional arguments: "
            "expected one axis, or None, for each"
        )
    found = []
    for axis, arg in zip(each, args, strict=True):
        spread = jax.tree.map(
            lambda a, part: [a] * len(jax.tree.leaves(part, is_leaf=is_object)),
            axis,
            arg,
            is_leaf=lambda x: x is None,
        )
        found.append(jax.tree.leaves(spread, is_leaf=lambda x: x is None))
    return found


def _stacked(
    args: Sequence[Any],
    axes: Sequence[Sequence[int | None]],
    argnums: int | Sequence[int],
    arguments: Arguments,
) -> tuple[bool, ...]:
    """Which of the trained leaves of the parameters hold a slice for each element."""
    one = isinstance(argnums, int)
    positions, params = ([argnums], [arguments.params]) if one else (argnums, arguments.params)
    stacked = []
    for i, part in zip(positions, params, strict=True):
        places = jax.tree.structure(args[i], is_leaf=is_object).flatten_up_to(part)
        for axis, place in zip(axes[i], places, strict=True):
            if axis not in (None, 0):
                raise ValueError(
                    f"in_axes names axis {axis} of a parameter, expected None, or 0 where a leaf "
                    "holds a head for each task"
                )
            stacked += [axis == 0] * len(jax.tree.leaves(place))
    return tuple(s for s, is_trained in zip(stacked, arguments.trained, strict=True) if is_trained)


def _size(mapped: Sequence[tuple[Any, Any]]) -> int:
    for x, _ in mapped:
        if is_object(x):
            raise ValueError("in_axes maps over an nnx module, expected None there")
    sizes = {jnp.shape(x)[a] for x, a in mapped if -jnp.ndim(x) <= a < jnp.ndim(x)}
    if len(sizes) != 1 or not all(-jnp.ndim(x) <= a < jnp.ndim(x) for x, a in mapped):
        shapes = [jnp.shape(x) for x, _ in mapped]
        raise ValueError(
            f"in_axes maps over axes {[a for _, a in mapped]} of arrays of shapes {shapes}, "
            "expected axes that they have, of one common size, and at least one array"
        )
    return sizes.pop()


def _slices(arrays: Sequence[Any], axes: tuple[int, ...], size: int) -> list[Any]:
    """What one element's slices are: as `jax.vmap` says, with how they are split over devices."""
    found = []
    note = lambda *slices: found.extend(map(jax.typeof, slices))  # noqa: E731
    jax.vmap(note, axes, None, axis_size=size)(*arrays)
    return found
