"""The lazy Jacobian of several losses, and how to get one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mtl_optax._ghost import Sketch, Taps, tap, total
from mtl_optax._linear_map import ROW_MODES, LinearMap, RowMode, once
from mtl_optax._rows import mix, scale_rows, scaled_products, varying_axes

GramianMode = Literal["rows", "ghost", "columns"] | Sketch
GRAMIAN_MODES = ("rows", "ghost", "columns")

# A mask over the parameters: a tree (or prefix) of bools, or a function of the parameters to one.
Mask = Any | Callable[[Any], Any]


_REMEDY = (
    "one gradient a task, not yet combined: an optimizer expects one gradient shaped as the "
    "parameters, so put an aggregator such as mtl.sum_tasks() before it in the optax.chain"
)


class _JacobianType(type):
    # JAX prints the type, or the node, that another tree does not match. An optimizer that meets a
    # Jacobian fails just there, so both say what to do.
    def __repr__(cls) -> str:
        return f"mtl_optax.Jacobian ({_REMEDY})"


class Jacobian(metaclass=_JacobianType):
    r"""The Jacobian J of K losses, one row a task, computed only as far as it is used.

    Law: `rows()` are the gradients of `losses`, before and after any balancer. A `Jacobian` is a
    pytree: it crosses the boundaries of `jit`, `vmap` and `scan`. `name in jacobian` answers by
    task name.

    Attributes:
      losses: the K task losses, as the loss function returned them, scaled along with the rows.
    """

    def __init__(
        self,
        losses: Any,
        linear_map: "LinearMap | _DenseMap | _GuardedMap",
        layout: "_Layout",
        scales: jax.Array | None = None,
        probe: "LinearMap | _GuardedMap | None" = None,
        sketch: Sketch | None = None,
        memo: dict | None = None,
    ):
        """Made by `value_and_jac`, `value_and_feature_jac` and `as_jacobian`."""
        self.losses = losses
        self._map = linear_map
        self._layout = layout
        self._scales = scales  # (K,), or None for all ones
        self._probe = probe  # measures the Gramian in place of the parameters' rows
        self._sketch = sketch  # how the Gramian is approximated, if it is
        self._memo = {} if memo is None else memo

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each row, from the pytree path of its loss."""
        return task_names(self.losses)

    @property
    def num_tasks(self) -> int:
        """The number of tasks K."""
        return sum(jnp.size(leaf) for leaf in jax.tree.leaves(self.losses))

    @property
    def dtype(self) -> Any:
        """The precision of everything K-sized: float32, or float64 for float64 losses."""
        return jnp.promote_types(jnp.float32, jnp.result_type(*jax.tree.leaves(self.losses)))

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __repr__(self) -> str:
        return f"mtl_optax.Jacobian of {self.names} ({_REMEDY})"

    def __radd__(self, other: Any) -> Any:
        # optax.apply_updates does this where a chain has no aggregator.
        raise TypeError(f"{self!r}, can't be added to parameters")

    __add__ = __radd__

    @property
    def shared(self) -> Any:
        """Which parameters the tasks share: a tree of bools like the parameters."""
        return self._layout.unflatten(self._layout.shared)

    def loss_vector(self) -> jax.Array:
        """The losses as one `(K,)` array, at least float32."""
        return flatten_losses(self.losses)

    def pullback(self, weights: jax.Array) -> Any:
        """Jᵀw, shaped as the parameters: one backward pass.

        Args:
          weights: `(K,)`.
        """
        return self._layout.unflatten(self._pull(self._as_weights(weights)))

    def rows(self) -> Any:
        """The K gradients, leaves `(K, *param.shape)`: K backward passes."""
        return self._layout.unflatten(self._rescaled(self._map.rows(self._layout.row_mode)))

    def shared_rows(self) -> list[jax.Array]:
        """The K gradients on the shared parameters alone, a list of `(K, *param.shape)`."""
        layout = self._layout
        if self._probe is None and layout.measured == layout.shared:
            return self._rescaled(self._once("measured_rows", self._measured_rows))
        rows = self._map.rows(layout.row_mode)
        return self._rescaled([r for r, s in zip(rows, layout.shared, strict=True) if s])

    def gramian(self) -> jax.Array:
        """J Jᵀ over the shared parameters, or where `gramian_at` says: `(K, K)`, float32.

        Its entries are squares: norms beyond 1e19 overflow float32. The two below are safe.
        """
        products, scales = self.scaled_gramian()
        return products * (scales[:, None] * scales[None, :])

    def scaled_gramian(self) -> tuple[jax.Array, jax.Array]:
        """The Gramian at any scale of the rows: G = diag(s) M diag(s).

        Returns:
          `(M, s)`: `(K, K)` and `(K,)`, s > 0 but for zero rows, both float32, or float64 for
          float64 losses. Before any balancer s are powers of two, which do not round.
        """
        products, scales = self._once("scaled_gramian", self._scaled_gramian)
        if self._scales is None:
            return products, scales
        weights = self._scales.astype(scales.dtype)
        signs = jnp.sign(weights)
        return products * (signs[:, None] * signs[None, :]), scales * jnp.abs(weights)

    def correlation(self) -> tuple[jax.Array, jax.Array]:
        """The Gramian as cosines and norms: G = diag(n) C diag(n).

        Returns:
          `(C, n)`: `(K, K)` cosines between the rows, where a zero row has zeros, its diagonal
          included; `(K,)` norms. Safe at any scale, and of the precision of `scaled_gramian`.
        """
        products, scales = self.scaled_gramian()
        lengths = jnp.sqrt(jnp.diagonal(products))
        divisor = jnp.where(lengths > 0, lengths, 1)
        return products / (divisor[:, None] * divisor[None, :]), scales * lengths

    def cross_gramian(self, other: "Jacobian") -> tuple[jax.Array, jax.Array, jax.Array]:
        """J J'ᵀ with the Jacobian of the same tasks on another batch, where `gramian` measures.

        Returns:
          `(M, s, t)` of diag(s) M diag(t): `(K, K)`, not symmetric, and two `(K,)` of powers of two
          times any balancer's weights. M is safe at any scale of the rows.
        """
        dtype = jnp.promote_types(self.dtype, other.dtype)
        rows = self._once("measured_rows", self._measured_rows)
        others = other._once("measured_rows", other._measured_rows)
        shapes, expected = [r.shape for r in others], [r.shape for r in rows]
        if shapes != expected:
            raise ValueError(
                f"the Jacobians of two batches have rows of shapes {expected} and {shapes}, "
                "expected the same tasks, parameters and options of value_and_jac"
            )
        products, scales, other_scales = scaled_products(rows, others, self.num_tasks, dtype)
        return products, self._scaled(scales), other._scaled(other_scales)

    def scale(self, weights: jax.Array, *, losses: Any = None) -> "Jacobian":
        """diag(w) J, still lazy.

        Args:
          weights: `(K,)`.
          losses: what the rows are the gradients of now; w times the losses by default.
        """
        weights = self._as_weights(weights)
        if losses is None:
            losses = unflatten_losses(weights * self.loss_vector(), self.losses)
        scales = self._scaled(weights)
        return Jacobian(
            losses, self._map, self._layout, scales, self._probe, self._sketch, self._memo
        )

    def replace_rows(self, rows: Any, *, losses: Any = None) -> "Jacobian":
        """The same tasks and layout with these rows; the Gramian is then theirs.

        Args:
          rows: leaves `(K, *param.shape)` in the order of `rows()`, in any tree.
          losses: what they are the gradients of; those of this Jacobian by default.
        """
        leaves = jax.tree.leaves(rows)
        if len(leaves) != self._layout.params_def.num_leaves:
            raise ValueError(
                f"got {len(leaves)} leaves of rows, expected one for each of the "
                f"{self._layout.params_def.num_leaves} parameters: change the leaves of rows()"
            )
        losses = self.losses if losses is None else losses
        return Jacobian(losses, _DenseMap(leaves), self._layout)

    def finite_tasks(self) -> jax.Array:
        """Which tasks have a finite loss and a finite row: `(K,)` bool.

        One backward pass while all are finite, K isolated ones where the sum of the rows is not.
        """
        finite = jnp.isfinite(self.loss_vector())
        if self._scales is not None:
            finite &= jnp.isfinite(self._scales)
        ones = jnp.ones(self.num_tasks, self.dtype)
        total = _pullback_all(self._map, self._probe, ones)
        none_wrong = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in total]))

        def one_by_one():
            maps = [self._map] if self._probe is None else [self._map, self._probe]
            rows = [row for each in maps for row in each.rows("isolated")]
            per_leaf = [jnp.all(jnp.isfinite(r), axis=tuple(range(1, r.ndim))) for r in rows]
            return jnp.all(jnp.stack(per_leaf), axis=0)

        return finite & jax.lax.cond(none_wrong, lambda: jnp.ones_like(finite), one_by_one)

    def keep(self, tasks: jax.Array, *, losses: Any = None) -> "Jacobian":
        """The rows of some tasks, the others exactly 0 whatever they held, still lazy.

        Unlike `scale` by 0, which leaves 0 * NaN = NaN. While all are kept it costs nothing.

        Args:
          tasks: `(K,)` bool.
          losses: what the rows are the gradients of now; 0 for the others by default.
        """
        if losses is None:
            losses = unflatten_losses(jnp.where(tasks, self.loss_vector(), 0), self.losses)
        scales = None if self._scales is None else jnp.where(tasks, self._scales, 0)
        probe = None if self._probe is None else _GuardedMap(self._probe, tasks)
        guarded = _GuardedMap(self._map, tasks)
        return Jacobian(losses, guarded, self._layout, scales, probe, self._sketch)

    def reduce(self, fn: Callable[[list[jax.Array]], list[jax.Array]]) -> Any:
        """What an aggregator that works on entries returns; each head gets its own row.

        Args:
          fn: from `shared_rows()` to one gradient: a list of `(K, *param.shape)`, at least float32,
            to a list of `(*param.shape,)`.
        """
        shared = self._layout.shared
        leaves = jax.tree.leaves(self.rows())
        wide = [
            leaf.astype(jnp.promote_types(jnp.float32, leaf.dtype))
            for leaf, is_shared in zip(leaves, shared, strict=True)
            if is_shared
        ]
        reduced = iter(fn(wide))
        # A head has one row that is not zero.
        return self._layout.unflatten(
            [
                next(reduced).astype(leaf.dtype) if is_shared else jnp.sum(leaf, axis=0)
                for leaf, is_shared in zip(leaves, shared, strict=True)
            ]
        )

    def combine(self, weights: jax.Array | float) -> Any:
        """What an aggregator returns: Jᵀw on shared leaves, each head's own row on head leaves.

        Args:
          weights: `(K,)`, or a number for all tasks alike.
        """
        ones = jnp.ones(self.num_tasks, self.dtype)
        if not isinstance(weights, int | float):
            return self._layout.unflatten(self._combine(self._as_weights(weights), ones))
        leaves = self._pull(ones)
        if weights == 1:
            return self._layout.unflatten(leaves)
        mixed = [(weights * g).astype(g.dtype) for g in leaves]
        return self._layout.unflatten(_choose(self._layout.shared, mixed, leaves))

    # What follows is how, not what.

    def _as_weights(self, weights: Any) -> jax.Array:
        weights = jnp.asarray(weights)
        if weights.shape != (self.num_tasks,):
            raise ValueError(
                f"weights have shape {weights.shape}, expected ({self.num_tasks},): one weight for "
                f"each of the tasks {self.names}"
            )
        return weights.astype(self.dtype)

    def _scaled(self, weights: jax.Array) -> jax.Array:
        return weights if self._scales is None else weights * self._scales.astype(weights.dtype)

    def _rescaled(self, rows: list[jax.Array]) -> list[jax.Array]:
        scales = self._scales
        return rows if scales is None else [scale_rows(row, scales) for row in rows]

    def _measured_rows(self) -> list[jax.Array]:
        layout = self._layout
        if self._probe is not None:
            rows = self._probe.rows(layout.row_mode)
            # The probe's domain is (parameters, features): only the features are measured.
            return jax.lax.optimization_barrier(rows[len(layout.shared) :])
        rows = self._map.rows(layout.row_mode)
        # Without the barrier XLA may compute a row once for the Gramian and again for the update.
        return jax.lax.optimization_barrier(
            [row for row, measured in zip(rows, layout.measured, strict=True) if measured]
        )

    def _scaled_gramian(self) -> tuple[jax.Array, jax.Array]:
        if self._probe is None and self._layout.gramian == "columns":
            return self._map.columns(self._layout.measured)
        if self._probe is None and self._layout.gramian == "ghost":
            return self._once("tapped", self._tapped).gramian(self.num_tasks, self.dtype)
        rows = self._once("measured_rows", self._measured_rows)
        products, scales, _ = scaled_products(rows, rows, self.num_tasks, self.dtype)
        return products, scales

    def _tapped(self) -> "_Tapped":
        layout = self._layout
        source, taps, scales = _tap(self._map, layout.measured, self._sketch)
        rows = source.rows(layout.row_mode)
        measured = [i for i, here in enumerate(layout.measured) if here]
        plain = {i: rows[i] for i in measured if taps is None or i not in taps.leaves}
        # One barrier each: together they would all be held at once.
        plain = {i: jax.lax.optimization_barrier(row) for i, row in plain.items()}
        tapped = [jax.lax.optimization_barrier(row) for row in rows[len(layout.measured) :]]
        return _Tapped(plain, taps, tapped, scales)

    def _at_hand(self, weights: jax.Array) -> dict[int, jax.Array]:
        """The leaves of Jᵀw that are combined from rows which the Gramian left."""
        if self._probe is not None:
            return {}
        if "tapped" in self._memo:
            return self._once("tapped", self._tapped).mix(weights)
        if "measured_rows" in self._memo:
            rows = self._once("measured_rows", self._measured_rows)
            leaves = [i for i, measured in enumerate(self._layout.measured) if measured]
            return {i: mix(weights, row) for i, row in zip(leaves, rows, strict=True)}
        return {}

    def _pull(self, weights: jax.Array) -> list[Any]:
        """Jᵀw with the scales applied."""
        weights = self._scaled(weights)
        known = self._at_hand(weights)
        num_leaves = len(self._layout.shared)
        pulled = [None] * num_leaves if len(known) == num_leaves else self._map.pullback(weights)
        return [known.get(i, leaf) for i, leaf in enumerate(pulled)]

    def _combine(self, weights: jax.Array, own: jax.Array) -> list[Any]:
        """Jᵀw on shared leaves, Jᵀown on the others, with the scales applied."""
        weights, own, shared = self._scaled(weights), self._scaled(own), self._layout.shared
        known = {i: leaf for i, leaf in self._at_hand(weights).items() if shared[i]}
        wanted = [i not in known for i in range(len(shared))]
        pulled = self._map.combine(weights, own, shared, wanted) if any(wanted) else wanted
        return [known.get(i, leaf) for i, leaf in enumerate(pulled)]

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        return once(self._memo, name, compute)


jax.tree_util.register_pytree_node(
    Jacobian,
    lambda jac: ((jac.losses, jac._map, jac._scales, jac._probe, jac._sketch), jac._layout),
    lambda layout, children: Jacobian(*children[:2], layout, *children[2:]),
)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What is static about a Jacobian: the parameters' tree and which leaves are which."""

    params_def: Any
    shared: tuple[bool, ...]
    measured: tuple[bool, ...]
    row_mode: RowMode
    gramian: Literal["rows", "ghost", "columns"]

    @classmethod
    def of(
        cls,
        params: Any,
        losses: Any,
        touches: Callable[[], list[int]] | None,
        shared: Mask | None,
        gramian_at: Mask | None,
        row_mode: RowMode,
        gramian: GramianMode = "rows",
    ) -> "_Layout":
        params_def = jax.tree.structure(params)
        everywhere = (True,) * params_def.num_leaves
        if isinstance(shared, str):
            if shared != "auto" or touches is None:
                raise ValueError(
                    f"shared={shared!r} is not known here: expected a mask over the parameters, a "
                    'function from the parameters to one, or None; value_and_jac also takes "auto"'
                )
            # With one task nothing is shared, and its gradient is the whole update.
            alone = len(task_names(losses)) == 1
            is_shared = everywhere if alone else tuple(n > 1 for n in touches())
        else:
            is_shared = everywhere if shared is None else _resolve(shared, params, "shared")
        measured = is_shared if gramian_at is None else _resolve(gramian_at, params, "gramian_at")
        mode = "ghost" if isinstance(gramian, Sketch) else gramian
        return cls(params_def, is_shared, measured, row_mode, mode)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return self.params_def.unflatten(leaves)


class _DenseMap:
    """Rows that are given, in the place of a `LinearMap`."""

    def __init__(self, rows: Sequence[jax.Array]):
        self._rows = rows

    def pullback(self, weights: jax.Array) -> list[jax.Array]:
        return [mix(weights, row) for row in self._rows]

    def rows(self, mode: RowMode) -> list[jax.Array]:
        del mode
        return list(self._rows)

    def combine(
        self, weights: jax.Array, own: jax.Array, shared: Sequence[bool], wanted: Sequence[bool]
    ) -> list[jax.Array]:
        del wanted
        return [mix(weights if s else own, r) for s, r in zip(shared, self._rows, strict=True)]

    def columns(self, measured: Sequence[bool]) -> tuple[jax.Array, jax.Array]:
        rows = [row for row, wanted in zip(self._rows, measured, strict=True) if wanted]
        products, scales, _ = scaled_products(rows, rows, len(rows[0]), jnp.float32)
        return products, scales


jax.tree_util.register_pytree_node(
    _DenseMap, lambda dense: ((dense._rows,), None), lambda _, children: _DenseMap(*children)
)


class _GuardedMap:
    """A map whose rows count only where `tasks` says; elsewhere they are 0 even if NaN."""

    def __init__(self, inner: "LinearMap | _DenseMap | _GuardedMap", tasks: jax.Array):
        self._inner = inner
        self._tasks = tasks

    def pullback(self, weights: jax.Array) -> list[jax.Array]:
        return jax.lax.cond(
            jnp.all(self._tasks),
            self._inner.pullback,
            lambda w: [mix(w, row) for row in self.rows("isolated")],
            weights,
        )

    def combine(
        self, weights: jax.Array, own: jax.Array, shared: Sequence[bool], wanted: Sequence[bool]
    ) -> list[jax.Array | None]:
        def one_by_one():
            rows = zip(self.rows("isolated"), shared, wanted, strict=True)
            return [mix(weights if s else own, row) if want else None for row, s, want in rows]

        return jax.lax.cond(
            jnp.all(self._tasks),
            lambda: self._inner.combine(weights, own, shared, wanted),
            one_by_one,
        )

    def columns(self, measured: Sequence[bool]) -> tuple[jax.Array, jax.Array]:
        products, scales = self._inner.columns(measured)
        both = self._tasks[:, None] & self._tasks[None, :]
        return jnp.where(both, products, 0), jnp.where(self._tasks, scales, 0)

    def rows(self, mode: RowMode) -> list[jax.Array]:
        # Only rows that were differentiated alone can be told apart.
        del mode
        return [
            jnp.where(self._tasks.reshape(-1, *[1] * (row.ndim - 1)), row, 0)
            for row in self._inner.rows("isolated")
        ]


jax.tree_util.register_pytree_node(
    _GuardedMap,
    lambda guarded: ((guarded._inner, guarded._tasks), None),
    lambda _, children: _GuardedMap(*children),
)


def _tap(
    source: Any, measured: Sequence[bool], sketch: Sketch | None
) -> tuple[Any, Taps | None, jax.Array | float]:
    """`tap` of a map that may be guarded; given rows are all there is to them."""
    if isinstance(source, _GuardedMap):
        inner, taps, scales = _tap(source._inner, measured, sketch)
        return _GuardedMap(inner, source._tasks), taps, scales
    return tap(source, measured, sketch) if isinstance(source, LinearMap) else (source, None, 1.0)


# With more tasks than these, one more pass through the trunk costs less than it takes to keep the
# cotangents of all its layers until the weights are known.
_MOST_TASKS_HELD = 8


@dataclasses.dataclass(frozen=True)
class _Tapped:
    """What the Gramian was measured on: the rows of some leaves, and of the y of the others."""

    plain: dict[int, jax.Array]
    taps: Taps | None
    rows: list[jax.Array]
    scales: jax.Array | float  # of all these rows

    def gramian(self, num_tasks: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        plain = list(self.plain.values())
        products, scales, _ = scaled_products(plain, plain, num_tasks, dtype)
        shares = [] if self.taps is None else self.taps.gramians(self.rows)
        products, scales = total([(products, scales), *shares])
        scales = scales * self.scales
        return products, jnp.where(jnp.diagonal(products) == 0, 0, scales)

    def mix(self, weights: jax.Array) -> dict[int, jax.Array]:
        if weights.size > _MOST_TASKS_HELD:
            return {}
        weights = weights * self.scales
        mixed = {i: mix(weights, row) for i, row in self.plain.items()}
        if self.taps is None:
            return mixed
        return mixed | self.taps.gradients([mix(weights, row) for row in self.rows])


def value_and_jac(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    shared: Mask | None = "auto",
    gramian_at: Mask | None = None,
    rows: RowMode = "isolated",
    gramian: GramianMode = "rows",
) -> Callable[..., tuple[Any, Jacobian]]:
    r"""Like `jax.value_and_grad`, for a function that returns several losses.

    The losses are evaluated and linearised once. What is computed beyond depends on what the
    strategy asks of the `Jacobian`: a loss-only strategy runs one backward pass, so its step costs
    what the plain summed-loss step costs; a strategy that needs the Gramian runs K, unless
    `gramian` says otherwise.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` returns the K losses: a dict of scalars, any
        other pytree of scalars, or an array of which each element is a task.
      has_aux: whether `loss_fn` returns `(losses, aux)`.
      shared: which parameters the tasks share: aggregators combine the rows there, elsewhere each
        head follows its own loss. `"auto"` reads it off the program: a leaf is shared when two or
        more losses depend on it. Or a tree of bools like the parameters (a prefix will do), a
        function from the parameters to one, or None for all.
      gramian_at: where the Gramian is measured, in the same forms, such as the last shared layer
        for GradNorm. None measures it over all shared parameters.
      rows: how the K rows are computed. Every head is differentiated alone, whatever the mode.
        `"isolated"`: the trunk once a task, so that a NaN in one task can't reach another's row
        (losses returned as one array computed together are told apart where they were stacked from
        scalars, else vmapped). `"batched"`: the trunk's K passes vmapped into one, for accelerators
        and convolutions. `"sequential"`: one pass after another by `jax.lax.map`, the smallest
        program and the least memory; on CPU as fast as `"isolated"` for dense layers, several times
        slower for convolutions.
      gramian: how the Gramian is computed. `"rows"`: from the rows, K × P numbers. `"ghost"`: dense
        layers and embeddings by the identity :math:`\langle x^\top\delta_i, x^\top\delta_j\rangle
        = \langle\delta_i, (x x^\top)\,\delta_j\rangle`, without their weight gradients, the rest
        from its rows; chosen layer by layer, by counted cost. Exact, but its rounding error is that
        of the sum over pairs of examples, eps :math:`(\sum_b \|x_b\| \|\delta_b\| /
        \|x^\top\delta\|)^2`: prefer `"rows"` where a large batch's gradient nearly cancels.
        `"columns"`: :math:`G e_j = J (J^\top e_j)`, one pass back and one forth a task, for models
        of which two rows do not fit. Or a `Sketch`, an approximate ghost.

    Returns:
      A function of the arguments of `loss_fn` that returns `(losses, jacobian)`, or
      `((losses, aux), jacobian)`.

    Raises:
      TypeError: if a parameter or a loss is not of a real floating-point type.
      ValueError: if a named loss is not a scalar, a mask does not fit the parameters, or a loss
        inside `jax.shard_map` was not reduced over the devices.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> def task_losses(params, x):
      ...     h = jnp.tanh(x @ params["trunk"])
      ...     return {"click": jnp.mean((h @ params["click"]) ** 2),
      ...             "buy": jnp.mean((h @ params["buy"] - 1) ** 2)}
      >>> params = {"trunk": jnp.ones((3, 2)), "click": jnp.ones(2), "buy": jnp.ones(2)}
      >>> losses, jac = mtl.value_and_jac(task_losses)(params, jnp.ones((4, 3)))
      >>> jac.names
      ('buy', 'click')
      >>> jac.gramian().shape
      (2, 2)
    """
    _check_row_mode(rows)
    _check_gramian_mode(gramian)

    @functools.wraps(loss_fn)
    def value_and_jac_fn(params, *args, **kwargs):
        _check_params(params)
        losses, linear_fn, *aux = jax.linearize(
            lambda p: loss_fn(p, *args, **kwargs), params, has_aux=has_aux
        )
        check_losses(losses)
        _check_reduced(losses, params)
        linear_map = LinearMap.of(linear_fn, params)
        layout = _Layout.of(params, losses, linear_map.touches, shared, gramian_at, rows, gramian)
        sketch = gramian if isinstance(gramian, Sketch) else None
        jacobian = Jacobian(losses, linear_map, layout, sketch=sketch)
        return (losses, *aux) if has_aux else losses, jacobian

    return value_and_jac_fn


def value_and_feature_jac(
    encode_fn: Callable[..., Any],
    decode_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    shared: Mask | None = "auto",
    rows: RowMode = "isolated",
) -> Callable[..., tuple[Any, Jacobian]]:
    r"""`value_and_jac` with the Gramian measured on the features, at the cost of a plain step.

    .. math:: G = F F^\top, \quad F_k = \partial L_k / \partial Z, \quad Z = \mathrm{encode}(params)

    The K backward passes stop at the features; one backward pass then goes through the trunk.
    Pullback and rows are exact. Only the Gramian is an approximation of :math:`J J^\top`: it is
    exact, up to a common factor, when the encoder's Jacobian :math:`\partial Z / \partial\theta`
    maps feature gradients to parameter gradients isometrically up to scale (as when Z is itself the
    parameters). The solution MGDA finds with it bounds that of the true Gramian from above.

    Args:
      encode_fn: `encode_fn(params, *args, **kwargs)` returns the features, any pytree of arrays.
      decode_fn: `decode_fn(params, features, *args, **kwargs)` returns the K losses.
      has_aux: whether `decode_fn` returns `(losses, aux)`.
      shared: as in `value_and_jac`.
      rows: as in `value_and_jac`.

    Returns:
      A function of the arguments of `decode_fn` less the features that returns
      `(losses, jacobian)`, or `((losses, aux), jacobian)`.

    Raises:
      TypeError: if a parameter or a loss is not of a real floating-point type.
      ValueError: if a named loss is not a scalar, a mask does not fit the parameters, or a loss
        inside `jax.shard_map` was not reduced over the devices.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> encode = lambda params, x: jnp.tanh(x @ params["trunk"])
      >>> decode = lambda params, z, x: {"a": jnp.mean(z @ params["a"]), "b": jnp.mean(z**2)}
      >>> params = {"trunk": jnp.ones((3, 2)), "a": jnp.ones(2)}
      >>> losses, jac = mtl.value_and_feature_jac(encode, decode)(params, jnp.ones((4, 3)))
      >>> jac.gramian().shape
      (2, 2)

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, 2018, section 3.3 (MGDA-UB).
    """
    _check_row_mode(rows)

    @functools.wraps(decode_fn)
    def value_and_feature_jac_fn(params, *args, **kwargs):
        _check_params(params)
        features, encode_linear = jax.linearize(lambda p: encode_fn(p, *args, **kwargs), params)
        losses, decode_linear, *aux = jax.linearize(
            lambda p, z: decode_fn(p, z, *args, **kwargs), params, features, has_aux=has_aux
        )
        check_losses(losses)
        _check_reduced(losses, params)
        linear_map = LinearMap.of(lambda t: decode_linear(t, encode_linear(t)), params)
        probe = LinearMap.of(lambda t: decode_linear(*t), (params, features))
        layout = _Layout.of(params, losses, linear_map.touches, shared, None, rows)
        jacobian = Jacobian(losses, linear_map, layout, probe=probe)
        return (losses, *aux) if has_aux else losses, jacobian

    return value_and_feature_jac_fn


def as_jacobian(grads: Any, losses: Any, *, shared: Mask | None = None) -> Jacobian:
    """Wraps what `jax.jacrev(loss_fn)` returns.

    Every strategy's `update` does this to a `jax.jacrev` tree that comes with `losses=`.

    Args:
      grads: a tree of losses over a tree of parameters, leaves `loss.shape + param.shape`. A
        `Jacobian` is returned as it is.
      losses: the losses, a pytree as in `value_and_jac`.
      shared: as in `value_and_jac`, less `"auto"`; None takes all parameters as shared.

    Returns:
      A `Jacobian` that holds the K rows.

    Raises:
      TypeError: if a loss is not of a real floating-point type.
      ValueError: if a named loss is not a scalar, or `grads` does not fit the losses.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> task_losses = lambda w: {"a": jnp.sum(w**2), "b": jnp.sum((w - 1) ** 2)}
      >>> w = jnp.array([1.0, 2.0])
      >>> jac = mtl.as_jacobian(jax.jacrev(task_losses)(w), task_losses(w))
      >>> jac.gramian().tolist()
      [[20.0, 8.0], [8.0, 4.0]]
    """
    if isinstance(grads, Jacobian):
        return grads
    check_losses(losses)
    loss_leaves, losses_def = jax.tree.flatten(losses)
    try:
        per_loss = losses_def.flatten_up_to(grads)
    except ValueError as error:
        raise ValueError(
            f"the gradients do not have the structure of the losses {task_names(losses)}: pass "
            "exactly what jax.jacrev(loss_fn) returns, a tree of losses over a tree of parameters "
            "(a single gradient, as jax.grad returns it, has no rows to combine; neither has the "
            "update of an aggregator that stands earlier in the chain)"
        ) from error
    params_def = jax.tree.structure(per_loss[0])
    blocks = []
    for loss, tree in zip(loss_leaves, per_loss, strict=True):
        shape = jnp.shape(loss)
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != params_def or any(leaf.shape[: len(shape)] != shape for leaf in leaves):
            raise ValueError(
                f"the gradients of the losses {task_names(losses)} are not trees of the same "
                f"parameters with leaves of shape {shape} + param.shape (got "
                f"{[leaf.shape for leaf in leaves]}): pass exactly what jax.jacrev(loss_fn) "
                "returns; a chain has one aggregator, and nothing after it takes rows"
            )
        blocks.append([leaf.reshape(-1, *leaf.shape[len(shape) :]) for leaf in leaves])
    rows = [
        leaf[0] if len(leaf) == 1 else jnp.concatenate(leaf) for leaf in zip(*blocks, strict=True)
    ]
    params = params_def.unflatten([jax.ShapeDtypeStruct(r.shape[1:], r.dtype) for r in rows])
    layout = _Layout.of(params, losses, None, shared, None, "batched")
    return Jacobian(losses, _DenseMap(rows), layout)


# Losses: any pytree of scalars, or arrays of which each element is a task.


def task_names(losses: Any) -> tuple[str, ...]:
    """The name of each task: the path of its loss, and its index in an array of several."""
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(losses):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if jnp.shape(leaf) == ():
            names.append(name or "0")
        else:
            prefix = f"{name}/" if name else ""
            names.extend(f"{prefix}{i}" for i in range(jnp.size(leaf)))
    return tuple(names)


def check_losses(losses: Any) -> None:
    """Raises unless the tree is one of real, floating-point task losses."""
    leaves = jax.tree_util.tree_leaves_with_path(losses)
    if not leaves:
        raise ValueError(
            "the loss function returned no losses, expected a pytree of at least one scalar: "
            'return a dict such as {"click": click_loss, "buy": buy_loss}'
        )
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "0"
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"task {name!r} has dtype {jnp.result_type(leaf)}, expected a real floating-point "
                "loss: convert it with jnp.asarray(loss, jnp.float32) before it loses its gradient"
            )
        named = path and not isinstance(
            path[-1], jax.tree_util.SequenceKey | jax.tree_util.FlattenedIndexKey
        )
        if named and jnp.shape(leaf) != ():
            raise ValueError(
                f"task {name!r} has shape {jnp.shape(leaf)}, expected a scalar: reduce the loss "
                f"with jnp.mean, or, if its {jnp.size(leaf)} elements are tasks of their own, "
                "return them as a list of scalars"
            )


def flatten_losses(losses: Any) -> jax.Array:
    """The losses, or anything shaped like them, as one `(K,)` array, at least float32."""
    leaves = jax.tree.leaves(losses)
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(*leaves))
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])


def unflatten_losses(vector: jax.Array, like: Any) -> Any:
    """A `(K,)` array as a tree with the structure, shapes and dtypes of the losses `like`."""
    leaves, treedef = jax.tree.flatten(like)
    parts, start = [], 0
    for leaf in leaves:
        part = vector[start : start + jnp.size(leaf)].reshape(jnp.shape(leaf))
        parts.append(part.astype(jnp.result_type(leaf)))
        start += jnp.size(leaf)
    return treedef.unflatten(parts)


# Leaves and masks.


def _resolve(mask: Mask, params: Any, option: str) -> tuple[bool, ...]:
    mask = mask(params) if callable(mask) else mask
    try:
        full = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: bool(m), sub), mask, params)
    except ValueError as error:
        raise ValueError(
            f"{option}= does not fit the parameters: expected a tree of bools with the structure "
            f"{jax.tree.structure(params)} or a prefix of it, got {jax.tree.structure(mask)}"
        ) from error
    resolved = tuple(jax.tree.leaves(full))
    if not any(resolved):
        raise ValueError(
            f"{option}= selects no parameter: expected at least one True in the mask; "
            f"leave {option} out for the default"
        )
    return resolved


def _check_params(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"parameter {jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}, "
                "expected a real floating-point array: pass everything that is not trained as a "
                "further argument of the loss function"
            )


def _check_reduced(losses: Any, params: Any) -> None:
    """Raises where a loss differs between devices that hold the same parameters."""
    known = frozenset().union(*map(varying_axes, jax.tree.leaves(params)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(losses):
        if axes := varying_axes(leaf) - known:
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "0"
            raise ValueError(
                f"task {name!r} has another loss on each shard of the mesh axes {sorted(axes)}, "
                "where the parameters are the same: average it inside the loss function with "
                f"jax.lax.pmean(loss, {tuple(sorted(axes))})"
            )


def _check_row_mode(mode: str) -> None:
    if mode not in ROW_MODES:
        raise ValueError(f"rows={mode!r} is not a row mode: expected one of {ROW_MODES}")


def _check_gramian_mode(mode: Any) -> None:
    if not isinstance(mode, Sketch) and mode not in GRAMIAN_MODES:
        raise ValueError(
            f"gramian={mode!r} is not a way to the Gramian: expected one of {GRAMIAN_MODES}, or an "
            "mtl.Sketch(key) for an approximate one"
        )


def _choose(mask: Sequence[bool], if_true: Sequence[Any], if_false: Sequence[Any]) -> list[Any]:
    return [a if m else b for m, a, b in zip(mask, if_true, if_false, strict=True)]


def _pullback_all(linear_map: Any, probe: Any, weights: jax.Array) -> list[jax.Array]:
    return [*linear_map.pullback(weights), *([] if probe is None else probe.pullback(weights))]
