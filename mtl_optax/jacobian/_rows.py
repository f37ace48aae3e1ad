"""What is done to the K rows of a Jacobian that are at hand: mix, scale, multiply."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mtl_optax._branch import fallback
from mtl_optax._compat import explicit_mesh, varying_axes
from mtl_optax._numerics import EXACT, dot, is_fewer, power_of_two, safe_sqrt, wide

# Columns that a CPU multiplies at a time.
_BLOCK = 8192
# Entries that are read twice more in less time than a branch takes.
_FEW = 2**16


def mix(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Σ w_k rows_k of one leaf, accumulated in at least float32."""
    dtype = wide(rows.dtype)
    mixed = jnp.tensordot(weights.astype(dtype), rows.astype(dtype), 1, precision=EXACT)
    return mixed.astype(rows.dtype)


def combine_rows(
    rows: Sequence[jax.Array],
    weights: jax.Array,
    own: jax.Array,
    shared: Sequence[bool],
    wanted: Sequence[bool],
) -> list[jax.Array | None]:
    """Jᵀw on the leaves that are `shared`, Jᵀown on the others, None where not `wanted`."""
    leaves = zip(rows, shared, wanted, strict=True)
    return [mix(weights if s else own, row) if want else None for row, s, want in leaves]


def if_finite(
    leaves: list[jax.Array | None], otherwise: Callable[[], list[jax.Array | None]]
) -> list[jax.Array | None]:
    """The leaves where all of them are finite, else what takes longer and is."""
    finite = [all_finite(leaf) for leaf in leaves if leaf is not None]
    everything = functools.reduce(jnp.logical_and, finite, jnp.bool_(True))
    return fallback(~everything, otherwise, lambda: leaves)


def per_row(values: jax.Array, rows: jax.Array) -> jax.Array:
    """One value a row, in a shape that broadcasts over the rows of a leaf."""
    return values.reshape(-1, *[1] * (rows.ndim - 1))


def scale_rows(rows: jax.Array, scales: jax.Array) -> jax.Array:
    """diag(s) rows, of one leaf, in their dtype."""
    return (rows.astype(wide(rows.dtype)) * per_row(scales, rows)).astype(rows.dtype)


def magnitudes(
    rows: Sequence[jax.Array], num_tasks: int, *, layerwise: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The largest and the mean of the entries' absolute values in each row, `(K,)` float32.

    Args:
      rows: a leaf each.
      num_tasks: K, also where there are no leaves.
      layerwise: whether the mean is that of the leaves' means, not that of all entries.
    """
    largest = total = jnp.zeros(num_tasks, jnp.float32)
    size = 0
    for row in rows:
        entries, axes = jnp.abs(row.astype(jnp.float32)), tuple(range(1, row.ndim))
        top = max_over_shards(jnp.max(entries, axis=axes, initial=0))
        largest = jnp.maximum(largest, top)
        part = max(row_size(row), 1) if layerwise else 1
        total += sum_over_shards(jnp.sum(entries, axis=axes)) / part
        size += min(row_size(row), 1) if layerwise else row_size(row)
    return largest, total / max(size, 1)


def row_norms(rows: jax.Array) -> jax.Array:
    """The norms of the rows of one leaf, `(K,)`, at any scale of theirs."""
    (unit,), scales = _unit_rows([rows], wide(rows.dtype))
    squares = jnp.sum(unit**2, axis=tuple(range(1, rows.ndim)))
    return scales * safe_sqrt(sum_over_shards(squares))


def keep_rows(rows: jax.Array, tasks: jax.Array) -> jax.Array:
    """The rows of some tasks, the others 0 even if they were NaN."""
    return jnp.where(per_row(tasks, rows), rows, 0)


def sum_over_shards(x: jax.Array) -> jax.Array:
    """The sum over the mesh axes that x varies over inside `shard_map`."""
    return _over_shards(jax.lax.psum, x)


def max_over_shards(x: jax.Array) -> jax.Array:
    """The maximum over the mesh axes that x varies over inside `shard_map`."""
    return _over_shards(jax.lax.pmax, x)


def row_size(rows: jax.Array) -> int:
    """How many entries a row of one leaf has, on all devices of a `shard_map` that hold some."""
    axes = tuple(varying_axes(rows))
    return rows[0].size * (jax.lax.psum(1, axes) if axes else 1)


def all_finite(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Whether all entries along some axes are finite, on all devices of a `shard_map`."""
    return on_all_shards(jnp.all(jnp.isfinite(x), axis=axes))


def finite_rows(rows: Sequence[jax.Array]) -> jax.Array:
    """Which rows are finite in all leaves, `(K,)`."""
    per_leaf = [all_finite(row, tuple(range(1, row.ndim))) for row in rows]
    return jnp.all(jnp.stack(per_leaf), axis=0)


def on_all_shards(flags: jax.Array) -> jax.Array:
    """What holds on all devices of a `shard_map`, so that they decide alike."""
    return _over_shards(jax.lax.pmin, flags.astype(jnp.int32)) > 0


def gathered(x: jax.Array) -> jax.Array:
    """The array whole on every device of a mesh whose axes are Explicit."""
    return _resharded(x, lambda spec: PartitionSpec())


def gathered_tasks(rows: jax.Array) -> jax.Array:
    """The rows of all tasks on every device of such a mesh, each split as it was."""
    return _resharded(rows, lambda spec: PartitionSpec(None, *spec[1:]))


def _resharded(x: jax.Array, change: Callable[[PartitionSpec], PartitionSpec]) -> jax.Array:
    mesh = explicit_mesh(x)
    if mesh is None or not any(spec := jax.typeof(x).sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, change(spec)))


def contract(a: jax.Array, b: jax.Array, axes: tuple[Sequence[int], Sequence[int]]) -> jax.Array:
    """Products over some axes of each, in full precision, summed over all shards."""
    mesh = explicit_mesh(a)
    products = jax.lax.dot_general(
        a,
        b,
        (axes, ((), ())),
        precision=EXACT,
        out_sharding=None if mesh is None else NamedSharding(mesh, PartitionSpec()),
    )
    return sum_over_shards(products)


def scaled_products(
    rows: Sequence[jax.Array], others: Sequence[jax.Array], num_tasks: int, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """M, s and t of diag(s) M diag(t), the inner products of two sets of rows."""
    if not rows:
        zeros = jnp.zeros(num_tasks, dtype)
        return jnp.zeros((num_tasks, num_tasks), dtype), zeros, zeros
    dtype = functools.reduce(jnp.promote_types, [wide(row.dtype) for row in rows], dtype)
    same = others is rows
    if jax.device_count() == 1:
        # One shape for all that reads them, or a CPU keeps a copy in each. It would gather a leaf
        # that is sharded; on one device none is.
        rows = [_flat(row) for row in rows]
        others = rows if same else [_flat(row) for row in others]

    def in_units():
        left, scales = _unit_rows(rows, dtype)
        right, other_scales = (left, scales) if same else _unit_rows(others, dtype)
        products = sum(map(_products, left, right), jnp.zeros((num_tasks, num_tasks), dtype))
        return products, scales, other_scales

    if not same or not is_fewer(_FEW, sum(row.size for row in rows)):
        return in_units()
    # To find the scales first would read the rows twice more. They come from the products instead,
    # unless those leave the range of the type or are so small that what underflowed counts.
    products = sum(_own_products(row.astype(dtype)) for row in rows)
    squares = jnp.diagonal(products)
    limits, size = jnp.finfo(dtype), sum(row[0].size for row in rows)
    in_range = (squares > size * float(limits.tiny) / float(limits.eps)) & (squares <= limits.max)

    def as_they_are():
        scales = power_of_two(safe_sqrt(squares))
        return products / scales[:, None] / scales[None, :], scales, scales

    return fallback(~jnp.all(in_range), in_units, as_they_are)


def mixed_products(rows: Sequence[jax.Array], mixing: jax.Array, units: jax.Array) -> jax.Array:
    """The Gramian of T U, for the rows U over their units, from the entries of T U themselves.

    Where T makes them nearly orthogonal it has the conditioning of U, not its square. One leaf of
    T U at a time, and each sharded as its rows are.
    """
    total = jnp.zeros_like(mixing)
    for row in rows:
        units_of = per_row(jnp.where(units > 0, units, 1), row)
        mixed = jnp.tensordot(mixing, row.astype(mixing.dtype) / units_of, 1, precision=EXACT)
        total += _products(mixed, mixed)
    return total


def _over_shards(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    axes = varying_axes(x)
    return reduce(x, tuple(axes)) if axes else x


def _flat(row: jax.Array) -> jax.Array:
    return row.reshape(len(row), math.prod(row.shape[1:]))


def _unit_rows(rows: Sequence[jax.Array], dtype: Any) -> tuple[list[jax.Array], jax.Array]:
    """The rows over powers of two, entries below 2, and those powers; 0 for a zero row."""
    rows = [row.astype(dtype) for row in rows]
    largest = jnp.zeros(len(rows[0]), dtype)
    for row in rows:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(row), range(1, row.ndim), initial=0))
    largest = max_over_shards(largest)
    divisor = power_of_two(largest)
    units = [row / per_row(divisor, row) for row in rows]
    return units, jnp.where(largest == 0, 0, divisor)


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    """⟨a_i, b_j⟩ of one leaf."""
    # Contracting every axis of the parameter in place keeps a sharded leaf sharded.
    axes = tuple(range(1, a.ndim))
    return contract(a, b, (axes, axes))


def _own_products(a: jax.Array) -> jax.Array:
    """⟨a_i, a_j⟩ of one leaf."""
    blocks = a.ndim == 2 and a.shape[1] >= 2 * _BLOCK and jax.device_count() == 1
    cpu = {"cpu": _products_by_columns} if blocks else {}
    return jax.lax.platform_dependent(a, **cpu, default=lambda a: _products(a, a))


def _products_by_columns(a: jax.Array) -> jax.Array:
    """On a CPU 2 to 3 times faster than one product of so few rows and so many columns."""
    if len(a) == 2:
        x, y = a
        return jnp.stack([dot(x, x), dot(x, y), dot(x, y), dot(y, y)]).reshape(2, 2)
    num_blocks, rest = divmod(a.shape[1], _BLOCK)

    def add(total, start):
        return total + _lower_half(jax.lax.dynamic_slice_in_dim(a, start, _BLOCK, axis=1)), None

    tail = _products(a[:, -rest:], a[:, -rest:]) if rest else jnp.zeros((len(a), len(a)), a.dtype)
    return jax.lax.scan(add, tail, _BLOCK * jnp.arange(num_blocks))[0]


def _lower_half(a: jax.Array) -> jax.Array:
    """⟨a_i, a_j⟩ without computing both triangles, where that saves more than it costs."""
    half = len(a) // 2
    if half < 16:
        return _products(a, a)
    upper, lower = a[:half], a[half:]
    corner = _products(lower, upper)
    return jnp.block([[_lower_half(upper), corner.T], [corner, _lower_half(lower)]])
