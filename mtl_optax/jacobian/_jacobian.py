"""The lazy Jacobian of several losses."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from mtl_optax._branch import fallback
from mtl_optax._numerics import bounded, divide, power_of_two, safe_sqrt, underflows, wide
from mtl_optax.jacobian import _opaque
from mtl_optax.jacobian._given import GivenRows
from mtl_optax.jacobian._layout import Layout
from mtl_optax.jacobian._linear_map import LinearMap
from mtl_optax.jacobian._losses import flatten_losses, task_names, unflatten_losses
from mtl_optax.jacobian._mapped import MappedMap
from mtl_optax.jacobian._memo import Memo
from mtl_optax.jacobian._plan import Plan, plan
from mtl_optax.jacobian._rows import (
    all_finite,
    finite_rows,
    mixed_products,
    scale_rows,
    scaled_products,
)
from mtl_optax.jacobian.ways import Measurement, Rows, Way

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class Made(NamedTuple):
    """How an update was made: the Jacobian, the weights, and its norms if any link knows them."""

    jacobian: Jacobian
    weights: jax.Array  # (K,)
    norms: jax.Array | None  # (K,), of the rows that were weighed


class Jacobian:
    r"""The Jacobian J of K losses, one row a task, computed only as far as it is used.

    Law: `rows()` are the gradients of `losses`, before and after any balancer. A `Jacobian` is an
    immutable value and a pytree: it crosses the boundaries of `jit`, `vmap`, `scan` and `cond`, and
    two of the same program have the same tree structure. Only the methods below, and so the links
    of this library, may look inside: arithmetic on its leaves, as of an Optax transformation that
    stands before the aggregator, raises a `TypeError` that says what to do. Its zeros,
    `jax.tree.map(jnp.zeros_like, jacobian)`, are the Jacobian of losses and rows 0.

    `name in jacobian` answers by task name.

    Attributes:
      losses: the K task losses, as the loss function returned them, scaled along with the rows.
    """

    # Where two trees do not match JAX prints the type; an optimizer that meets a Jacobian fails
    # just there.
    __module__ = "mtl_optax"
    __qualname__ = f"Jacobian ({_opaque.REMEDY})"

    def __init__(
        self,
        losses: Any,
        source: LinearMap | MappedMap | GivenRows,
        way: Way,
        layout: Layout,
        *,
        scales: jax.Array | None = None,
        seals: tuple[Any, ...] | None = None,
        memo: Memo | None = None,
    ):
        """Made by `value_and_jac`, `value_and_feature_jac` and `as_jacobian`."""
        self.losses = losses
        self._source = source
        self._way = way
        self._layout = layout
        self._scales = scales  # (K,), or None for all ones
        self._seals = seals  # as they came back from a transformation, or None
        self._memo = Memo() if memo is None else memo  # of what does not depend on the scales

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each row, from the pytree path of its loss."""
        return task_names(self.losses)

    @property
    def num_tasks(self) -> int:
        """The number of tasks K."""
        return self._layout.num_tasks

    @property
    def dtype(self) -> Any:
        """The precision of everything K-sized: float32, or float64 for float64 losses."""
        return self._layout.dtype

    @property
    def shared(self) -> Any:
        """Which parameters the tasks share: a tree of bools like the parameters."""
        return self._layout.merge(self._layout.shared, lambda aval: False)

    @property
    def trained(self) -> tuple[bool, ...]:
        """Which parameters are trained, in the order in which JAX flattens them."""
        return self._layout.trained

    @property
    def present(self) -> Bool[Array, " K"]:
        """Which tasks take part: `(K,)` bool. The rows and losses of the others are 0."""
        present = self._source.present
        return jnp.ones(self.num_tasks, bool) if present is None else present

    @property
    def everyone(self) -> bool:
        """Whether no task can be absent, known while tracing."""
        return self._source.present is None

    @property
    def num_present(self) -> Float[Array, ""]:
        """How many tasks take part, at least 1: what a mean over them divides by."""
        return jnp.maximum(jnp.sum(self.present), 1).astype(self.dtype)

    @property
    def at_the_limit(self) -> Bool[Array, " K"]:
        """Where the product of the weights would have left the range of the losses' type."""
        scales = self._scales
        if scales is None:
            return jnp.zeros(self.num_tasks, bool)
        return jnp.abs(scales) == jnp.finfo(scales.dtype).max

    @property
    def at_parameters(self) -> bool:
        """Whether the Gramian is of gradients of parameters: its norms have an update's unit."""
        return self._way.at_parameters

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __repr__(self) -> str:
        return f"mtl_optax.Jacobian of {self.names} ({_opaque.REMEDY})"

    def __copy__(self) -> Jacobian:
        return self

    def __deepcopy__(self, memo: Any) -> Jacobian:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Jacobian is part of a program and can't be pickled: pickle jac.losses and jac.rows()"
        )

    def __radd__(self, other: Any) -> NoReturn:
        # optax.apply_updates does this where a chain has no aggregator.
        raise TypeError(f"{self!r}, can't be added to parameters")

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"this is {self!r}")

    __add__ = __radd__
    __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __abs__ = _refuse
    __matmul__ = __rmatmul__ = __pos__ = __lt__ = __le__ = __gt__ = __ge__ = __round__ = _refuse
    __float__ = __int__ = __complex__ = __iter__ = __getitem__ = __array__ = _refuse

    def loss_vector(self) -> Float[Array, " K"]:
        """The losses as one `(K,)` array, at least float32."""
        return flatten_losses(self.losses)

    def pullback(self, weights: Float[Array, " K"]) -> Any:
        """Jᵀw, shaped as the parameters: one backward pass.

        Args:
          weights: `(K,)`.
        """
        return self._layout.unflatten(self._pull(self._as_weights(weights)))

    def rows(self) -> Any:
        """The K gradients, leaves `(K, *param.shape)`: K backward passes.

        Those of float16 parameters are float32: what the type has no number for is there again once
        a loss scale is taken back by `scale`.
        """
        jac, layout = self.here(), self._layout
        known = dict(zip(layout.shared_leaves, jac._rows_of(layout.shared_leaves), strict=True))
        rows = [known.get(i, row) for i, row in enumerate(jac._every_row())]
        return layout.unflatten_rows([self._rescaled(row) for row in rows])

    def shared_rows(self) -> list[jax.Array]:
        """The K gradients on the shared parameters alone, a list of `(K, *param.shape)`."""
        return [self._rescaled(row) for row in self._rows_of(self._layout.shared_leaves)]

    def measured_rows(self) -> list[jax.Array]:
        """The K rows whose products the Gramian holds: at the parameters that `gramian_at` says.

        Those of `value_and_feature_jac` are at the features. A list of `(K, *shape)`.
        """
        jac = self.here()
        return [self._rescaled(row) for row in jac._way.rows(jac._layout, jac._rows_of)]

    def gramian(self) -> Float[Array, "K K"]:
        """J Jᵀ over the shared parameters, or where `gramian_at` says: `(K, K)`, float32.

        Its entries are squares: norms beyond 1e19 overflow float32. The ones below are safe.
        """
        products, scales = self.scaled_gramian()
        return products * (scales[:, None] * scales[None, :])

    def scaled_gramian(self) -> tuple[Float[Array, "K K"], Float[Array, " K"]]:
        """The Gramian at any scale of the rows: G = diag(s) M diag(s).

        Returns:
          `(M, s)`: `(K, K)` and `(K,)`, s > 0 but for zero rows, both float32, or float64 for
          float64 losses. Before any balancer s are powers of two, which do not round.
        """
        products, scales, _ = self._measured()
        if self._scales is None:
            return products, scales
        signs = jnp.sign(self._scales.astype(scales.dtype))
        return products * (signs[:, None] * signs[None, :]), self._scaled(scales) * signs

    def correlation(self) -> tuple[Float[Array, "K K"], Float[Array, " K"]]:
        """The Gramian as cosines and norms: G = diag(n) C diag(n).

        Returns:
          `(C, n)`: `(K, K)` cosines between the rows, where a zero row has zeros, its diagonal
          included; `(K,)` norms. Safe at any scale, and of the precision of `scaled_gramian`.
        """
        products, scales = self.scaled_gramian()
        lengths = safe_sqrt(jnp.diagonal(products))
        divisor = jnp.where(lengths > 0, lengths, 1)
        return products / (divisor[:, None] * divisor[None, :]), _times(scales, lengths)

    def norms(self) -> Float[Array, " K"]:
        """The norms of the rows where the Gramian is measured: `(K,)`, safe at any scale."""
        return self.correlation()[1]

    def cross_gramian(
        self, other: Jacobian
    ) -> tuple[Float[Array, "K K"], Float[Array, " K"], Float[Array, " K"]]:
        """J J'ᵀ with the Jacobian of the same tasks on another batch, where `gramian` measures.

        Returns:
          `(M, s, t)` of diag(s) M diag(t): `(K, K)`, not symmetric, and two `(K,)` of powers of two
          times any balancer's weights. M is safe at any scale of the rows.
        """
        pair = self.here(), other.here()
        rows, others = (jac._way.rows(jac._layout, jac._rows_of) for jac in pair)
        shapes, expected = [r.shape for r in others], [r.shape for r in rows]
        if shapes != expected:
            raise ValueError(
                f"the Jacobians of two batches have rows of shapes {expected} and {shapes}, "
                "expected the same tasks, parameters and options of value_and_jac"
            )
        dtype = jnp.promote_types(self.dtype, other.dtype)
        products, scales, other_scales = scaled_products(rows, others, self.num_tasks, dtype)
        return products, self._scaled(scales), other._scaled(other_scales)

    def mixed_products(self, mixing: Float[Array, "K K"]) -> Float[Array, "K K"] | None:
        """T U Uᵀ Tᵀ of the unit rows U from the rows T U, None where no rows are at hand.

        What a Gramian loses to rounding, the square of what the rows lose, is there again once T
        makes the rows nearly orthogonal. Rows are at hand where they are given or the Gramian is
        measured from them, at the price of that Gramian once more, and of T U.

        Args:
          mixing: T, `(K, K)`.
        """
        jac = self.here()
        if not jac._way.holds_rows(jac._layout):
            return None
        measured = jac._measured()
        lengths = safe_sqrt(jnp.diagonal(measured.products))
        scales = divide(1, lengths, 0)
        if jac._scales is not None:
            scales = scales * jnp.sign(jac._scales.astype(scales.dtype))
        rows = jac._way.rows(jac._layout, jac._rows_of)
        return mixed_products(rows, mixing * scales[None, :], measured.scales)

    def plan(self) -> Plan:
        """How this Jacobian is measured, leaf by leaf: a table to print. Computes nothing."""
        return plan(self._source, self._way, self._layout)

    def scale(self, weights: Float[Array, " K"], *, losses: Any = None) -> Jacobian:
        """diag(w) J, still lazy.

        Args:
          weights: `(K,)`; those of absent tasks count as 0, whatever they are.
          losses: what the rows are the gradients of now; w times the losses by default.
        """
        weights = self._as_weights(weights)
        if losses is None:
            losses = unflatten_losses(weights * self.loss_vector(), self.losses)
        scales = weights if self._scales is None else _times(weights, self._scales)
        return self._replace(losses=losses, scales=scales)

    def keep(self, tasks: Bool[Array, " K"]) -> Jacobian:
        """Only some tasks present: losses and rows of the others are exactly 0, still lazy.

        Unlike `scale` by 0, which leaves 0 * NaN = NaN.

        Args:
          tasks: `(K,)` bool.
        """
        return self._replace(
            losses=unflatten_losses(jnp.where(tasks, self.loss_vector(), 0), self.losses),
            source=self._source.keep(tasks),
            way=self._way.keep(tasks),
            scales=None if self._scales is None else jnp.where(tasks, self._scales, 0),
            memo=Memo(updates=self._memo.updates),
        )

    def part(self, chosen: Sequence[bool]) -> Jacobian:
        """The columns of some parameters, in trees in which the others are empty arrays.

        Args:
          chosen: a bool for each parameter, in the order in which JAX flattens them.

        Raises:
          ValueError: if tasks share some of them, and `gramian_at` measures none.
        """
        layout = self._layout.part(chosen)
        if any(layout.shared) and not any(layout.measured):
            raise ValueError(
                "gramian_at measures none of the shared parameters of a group: each group of "
                "mtl.partition is aggregated over its own Gramian, so leave gramian_at out"
            )
        return self._replace(layout=layout)

    def restrict(self, asked: Any, tasks: Callable[[], jax.Array]) -> Jacobian:
        """`keep(tasks())`, once for all the links that ask with the same object."""
        if asked is None or self._memo.known("restricted") is asked:
            return self
        kept = self.keep(tasks())
        kept._memo.once("restricted", lambda: asked)
        return kept

    def replace_rows(
        self, rows: Any, *, losses: Any = None, present: jax.Array | None = None
    ) -> Jacobian:
        """The same tasks and layout with these rows; the Gramian is then theirs.

        Args:
          rows: leaves `(K, *param.shape)` in the order of `rows()`, in any tree.
          losses: what they are the gradients of; those of this Jacobian by default.
          present: which tasks take part, `(K,)` bool; those of this Jacobian by default.
        """
        losses = self.losses if losses is None else losses
        present = self._source.present if present is None else present
        source = GivenRows(self._layout.leaves_of(rows))
        if present is not None:
            source = source.keep(present)
        return Jacobian(losses, source, Rows(), self._layout)

    def finite_tasks(self) -> Bool[Array, " K"]:
        """Which tasks have a finite loss and a finite row: `(K,)` bool.

        One backward pass while all are finite, K isolated ones where the sum of the rows is not.
        """
        finite = jnp.isfinite(self.loss_vector())
        if self._scales is not None:
            finite &= jnp.isfinite(self._scales)
        every = [self._heads(), *(linear.heads() for linear in self._way.linear_maps())]
        hidden = {i for i, is_shown in enumerate(self._layout.shown) if not is_shown}
        # As they are scaled: a weight may take a row out of range.
        scales = jnp.ones(self.num_tasks, self.dtype) if self._scales is None else self._scales

        def seen(leaves: list[list[jax.Array]]) -> list[jax.Array]:
            own, *others = leaves
            shown = [leaf for i, leaf in enumerate(own) if i not in hidden]
            return [*shown, *itertools.chain(*others)]

        total = seen([heads.mix(scales) for heads in every])
        none_wrong = jnp.all(jnp.stack([all_finite(leaf) for leaf in total]))

        def one_by_one():
            rows = seen([heads.rows("isolated") for heads in every])
            return finite_rows(
                rows if self._scales is None else [scale_rows(r, scales) for r in rows]
            )

        return finite & fallback(~none_wrong, one_by_one, lambda: jnp.ones_like(finite))

    def reduce(self, fn: Callable[[list[jax.Array]], list[jax.Array]]) -> Any:
        """What an aggregator that works on entries returns; each head gets its own row.

        Args:
          fn: from `shared_rows()` to one gradient: a list of `(K, *param.shape)`, at least float32,
            to a list of `(*param.shape,)`.
        """
        layout = self._layout
        rows = layout.leaves_of(self.rows())
        reduced = iter(fn([rows[i].astype(wide(rows[i].dtype)) for i in layout.shared_leaves]))
        # A head has one row that is not zero.
        leaves = [
            next(reduced) if is_shared else jnp.sum(row, axis=0)
            for row, is_shared in zip(rows, layout.shared, strict=True)
        ]
        return layout.unflatten(leaves)

    def combine(
        self, weights: Float[Array, " K"] | float, *, norms: Float[Array, " K"] | None = None
    ) -> Any:
        """What an aggregator returns: Jᵀw on shared leaves, each head's own row on head leaves.

        Args:
          weights: `(K,)`, or a number for all tasks alike.
          norms: `(K,)`, `norms()` when they were last measured, where they are not measured now.
        """
        layout, ones = self._layout, jnp.ones(self.num_tasks, self.dtype)
        if not isinstance(weights, int | float):
            leaves = self._combine(self._as_weights(weights), ones)
            return self._made(layout.unflatten(leaves), weights, norms)
        leaves = self._pull(ones)
        if weights != 1:
            leaves = [
                (weights * leaf).astype(leaf.dtype) if is_shared else leaf
                for leaf, is_shared in zip(leaves, layout.shared, strict=True)
            ]
        return self._made(layout.unflatten(leaves), weights * ones, norms)

    def watched(self) -> Jacobian:
        """The same, for a link of which `weighing` is asked then."""
        return self._replace(memo=Memo(self._memo, updates=[]))

    def weighing(self, result: Any) -> tuple[jax.Array, jax.Array]:
        """How a link weighed the rows of this Jacobian, which is `watched`.

        Args:
          result: what the link returned, a Jacobian or one gradient.

        Returns:
          `(scales, weights)`, both `(K,)`: of the rows, and of the scaled rows in their sum. The
          result is `scale(scales)`, or `scale(scales).combine(weights)`.

        Raises:
          ValueError: if that is not how the result was made.
        """
        ones = jnp.ones(self.num_tasks, self.dtype)
        if isinstance(result, Jacobian):
            found = Made(result, ones, None) if result._memo is self._memo else None
        else:
            found = self.how_made(result)
        if found is None:
            raise ValueError(
                "every got a link that returns neither its rows, weighed, nor their weighted sum, "
                "so that there are no weights to hold: put ema_tasks and drop_nonfinite_tasks "
                "before every, match_norm around it and the optimizer after it; graddrop and "
                "trimmed_mean have no weights"
            )
        scaled, weights, _ = found
        if scaled._scales is None or self._scales is None:
            return ones if scaled._scales is None else scaled._scales, weights
        before = jnp.where(self._scales == 0, 1, self._scales)
        return jnp.where(self._scales == 0, 1, scaled._scales / before), weights

    def is_combined(self, update: Any) -> bool:
        """Whether it is known to be what `combine` returned, for one that is watched."""
        return self.how_made(update) is not None

    def how_made(self, update: Any) -> Made | None:
        """What `combine` made an update of, if that is known."""
        leaves = jax.tree.leaves(update)
        for made, result in self._memo.updates or []:
            if all(map(operator.is_, leaves, jax.tree.leaves(result))):
                measured = made.norms is None and made.jacobian.is_measured
                return made._replace(norms=made.jacobian.norms()) if measured else made
        return None

    @property
    def is_measured(self) -> bool:
        """Whether its norms are at hand, for nothing."""
        return self._memo.known(self._what_is_measured) is not None

    # What follows is how, not what.

    def here(self) -> Jacobian:
        """The same in this trace, where what is computed of it can be kept."""
        return self if self._memo.is_of_this_trace() else self._replace(memo=Memo(self._memo))

    def _made(self, update: Any, weights: jax.Array, norms: jax.Array | None) -> Any:
        if self._memo.updates is not None:
            self._memo.updates.append((Made(self, weights, norms), update))
        return update

    def _replace(self, **changes: Any) -> Jacobian:
        now = {
            "losses": self.losses,
            "source": self._source,
            "way": self._way,
            "layout": self._layout,
            "scales": self._scales,
            "seals": self._seals,
            "memo": self._memo,
        }
        return Jacobian(**(now | changes))

    def _as_weights(self, weights: Any) -> jax.Array:
        weights = jnp.asarray(weights)
        if weights.shape != (self.num_tasks,):
            raise ValueError(
                f"weights have shape {weights.shape}, expected ({self.num_tasks},): one weight for "
                f"each of the tasks {self.names}"
            )
        weights = weights.astype(self.dtype)
        present = self._source.present
        return weights if present is None else jnp.where(present, weights, 0)

    def _scaled(self, weights: jax.Array) -> jax.Array:
        scales = self._scales
        return weights if scales is None else _times(weights, scales)

    def _rescaled(self, row: jax.Array) -> jax.Array:
        row = row.astype(wide(row.dtype)) if underflows(row.dtype) else row
        return row if self._scales is None else scale_rows(row, self._scales)

    def _heads(self) -> Any:
        return self._memo.once("heads", self._source.heads)

    def _every_row(self) -> list[jax.Array]:
        return self._memo.once("rows", lambda: self._heads().rows(self._layout.row_mode))

    def _rows_of(self, leaves: Sequence[int]) -> list[jax.Array]:
        """The rows of some leaves, computed once for all that reads them."""
        # Without the barrier XLA may compute a row once for the Gramian and again for the update.
        every, alone = self._every_row(), jax.lax.optimization_barrier
        return [self._memo.once(("row", i), lambda i=i: alone(every[i])) for i in leaves]

    @property
    def _what_is_measured(self) -> tuple[Any, ...]:
        return "measured", self._layout.measured

    def _measured(self) -> Measurement:
        jac = self.here()
        return jac._memo.once(
            jac._what_is_measured,
            lambda: jac._way.measure(jac._heads(), jac._layout, jac._rows_of),
        )

    def _at_hand(self, weights: jax.Array) -> dict[int, jax.Array]:
        """The leaves of Jᵀw that what was measured leaves to be combined."""
        measured = self._memo.known(self._what_is_measured)
        return {} if measured is None else measured.mix(weights)

    def _pull(self, weights: jax.Array) -> list[Any]:
        """Jᵀw with the factors applied."""

        def pull(weights: jax.Array) -> list[Any]:
            known = self._at_hand(weights)
            if all(i in known for i, is_shown in enumerate(self._layout.shown) if is_shown):
                return [known.get(i) for i in range(self._layout.num_leaves)]
            return [known.get(i, leaf) for i, leaf in enumerate(self._source.pullback(weights))]

        return self._in_range(pull, self._scaled(weights))

    def _combine(self, weights: jax.Array, own: jax.Array) -> list[Any]:
        """Jᵀw on shared leaves, Jᵀown on the others, with the factors applied."""
        shared = self._layout.shared

        def combine(weights: jax.Array, own: jax.Array) -> list[Any]:
            known = {i: leaf for i, leaf in self._at_hand(weights).items() if shared[i]}
            wanted = [i not in known and is_shown for i, is_shown in enumerate(self._layout.shown)]
            pulled = wanted
            if any(wanted):
                pulled = self._heads().combine(weights, own, shared, wanted)
            return [known.get(i, leaf) for i, leaf in enumerate(pulled)]

        return self._in_range(combine, self._scaled(weights), self._scaled(own))

    def _in_range(self, fn: Callable[..., list[Any]], *weights: jax.Array) -> list[Any]:
        """`fn` of the weights, by weights of at most 2 where small ones would underflow."""
        if not self._source.underflows:
            return fn(*weights)
        unit = power_of_two(functools.reduce(jnp.maximum, [jnp.max(jnp.abs(w)) for w in weights]))
        leaves = fn(*(w / unit for w in weights))
        return [
            None if leaf is None else (leaf.astype(wide(leaf.dtype)) * unit).astype(leaf.dtype)
            for leaf in leaves
        ]


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product, the largest number where that of finite numbers is not: inf times 0 is NaN."""
    product = a * b.astype(a.dtype)
    finite = jnp.isfinite(a) & jnp.isfinite(b)
    return jnp.where(finite, bounded(product), product)


def _flatten(jacobian: Jacobian) -> tuple[tuple[Any, ...], Layout]:
    scales = jacobian._scales
    # Scaled or not, one program has one structure; and its zeros are J = 0.
    scales = jnp.ones(jacobian.num_tasks, jacobian.dtype) if scales is None else scales
    seals = jacobian._seals
    seals = _opaque.new_seals() if seals is None else _opaque.renewed(seals)
    return (seals, jacobian.losses, jacobian._source, jacobian._way, scales), jacobian._layout


def _unflatten(layout: Layout, children: tuple[Any, ...]) -> Jacobian:
    seals, losses, source, way, scales = children
    if isinstance(seals, tuple):
        _opaque.check(seals)
        scales = _opaque.sealed(scales, seals)
    return Jacobian(losses, source, way, layout, scales=scales, seals=seals)


jax.tree_util.register_pytree_node(Jacobian, _flatten, _unflatten)
