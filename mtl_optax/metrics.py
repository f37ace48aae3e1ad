"""Measures of a multi-task result, one number for K metrics, and of how the tasks get on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mtl_optax._numerics import power_of_two, safe_sqrt
from mtl_optax.jacobian import flatten_losses, value_and_jac

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Shaped

__all__ = [
    "affinity",
    "delta_m",
    "hypervolume",
    "igd",
    "mean_rank",
    "non_dominated",
    "spacing",
]


def __dir__() -> list[str]:
    return __all__


def delta_m(
    metrics: Shaped[ArrayLike, "*seeds K"],
    baseline: Shaped[ArrayLike, "*_"],
    *,
    higher_is_better: bool | Sequence[bool] = True,
) -> Float[Array, "*seeds"]:
    r"""Mean relative gain over a baseline, in percent; positive is better than the baseline.

    .. math:: \Delta_m = \frac{100}{K} \sum_{k=1}^K (-1)^{l_k} \frac{M_k - B_k}{B_k}

    with :math:`l_k = 1` where a lower metric is better. The baseline is usually K single-task
    models, one for each metric.

    Differs from:
      Maninis et al. write the ratio with :math:`B_k`; this divides by :math:`|B_k|`, so that a gain
      stays a gain for metrics that can be negative (R², log-likelihood).

    Args:
      metrics: the K metrics, ``(..., K)``; leading axes (seeds, methods) are kept.
      baseline: the baseline's K metrics, ``(K,)``, or the shape of `metrics` to pair every entry
        (such as a seed) with its own baseline; must not be 0.
      higher_is_better: one bool for all tasks, or K of them; static.

    Returns:
      An array shaped as `metrics` without its last axis, in percent.

    Raises:
      ValueError: if the shapes don't fit, there is no task, or `higher_is_better` is not K bools.

    Examples:
      >>> import mtl_optax as mtl
      >>> accuracy_and_error = [[0.90, 0.30], [0.99, 0.18]]
      >>> change = mtl.metrics.delta_m(
      ...     accuracy_and_error, [0.90, 0.20], higher_is_better=[True, False])
      >>> [round(float(percent), 3) for percent in change]
      [-25.0, 10.0]

    References:
      Maninis et al., `Attentive Single-Tasking of Multiple Tasks
      <https://arxiv.org/abs/1904.08918>`_, 2019, eq. 4.
    """
    metrics, baseline = _per_task(metrics), jnp.asarray(baseline, float)
    if baseline.shape not in (metrics.shape, metrics.shape[-1:]):
        raise ValueError(
            f"baseline has shape {baseline.shape}, expected {metrics.shape[-1:]} (one number a "
            f"task) or {metrics.shape} (the shape of the metrics)"
        )
    gain = _signs(higher_is_better, metrics) * (metrics - jnp.broadcast_to(baseline, metrics.shape))
    return 100.0 * jnp.mean(gain / jnp.broadcast_to(jnp.abs(baseline), metrics.shape), axis=-1)


def mean_rank(
    metrics: Shaped[ArrayLike, "M ... K"], *, higher_is_better: bool | Sequence[bool] = True
) -> Float[Array, "M ..."]:
    r"""The rank of each method among M, averaged over the tasks; 1 is best.

    .. math:: R_m = \frac1K \sum_{k=1}^K \Big(1 + \#\{j : M_{jk} \succ M_{mk}\} +
              \tfrac12 \#\{j \ne m : M_{jk} = M_{mk}\}\Big)

    Unlike `delta_m` it needs no baseline and one task's huge change counts no more than a small
    one. Ties share their ranks. NaN is last.

    Args:
      metrics: the K metrics of M methods, ``(M, ..., K)``; the axes between (seeds) are kept.
      higher_is_better: one bool for all tasks, or K of them; static.

    Returns:
      An array shaped as `metrics` without its last axis, between 1 and M.

    Raises:
      ValueError: if there is no axis of methods, no task, or `higher_is_better` is not K bools.

    Examples:
      >>> import mtl_optax as mtl
      >>> accuracy_and_error = [[0.9, 0.3], [0.8, 0.1], [0.7, 0.3]]
      >>> mtl.metrics.mean_rank(accuracy_and_error, higher_is_better=[True, False]).tolist()
      [1.75, 1.5, 2.75]
    """
    metrics = _per_task(metrics)
    if metrics.ndim < 2:
        raise ValueError(
            f"metrics have shape {metrics.shape}, expected (M, ..., K): put the methods on the "
            "first axis"
        )
    scores = _signs(higher_is_better, metrics) * metrics
    mine, theirs = scores[:, None], scores[None]
    missing, also = jnp.isnan(mine), jnp.isnan(theirs)
    better = (theirs > mine) | (missing & ~also)
    alike = (theirs == mine) | (missing & also)
    ahead = jnp.sum(better, axis=1) + 0.5 * (jnp.sum(alike, axis=1) - 1)
    return 1.0 + jnp.mean(ahead, axis=-1)


def hypervolume(
    points: Shaped[ArrayLike, "N K"],
    reference: Shaped[ArrayLike, " K"],
    *,
    higher_is_better: bool | Sequence[bool] = True,
) -> Float[Array, ""]:
    r"""The volume that a set of points dominates, down to a reference point.

    .. math:: H = \mathrm{vol}\Big(\bigcup_{n=1}^N \prod_{k=1}^K [r_k, p_{nk}]\Big)

    for metrics where higher is better, mirrored where lower is. It grows when a point of the front
    improves in any task. Points that are not better than the reference in every task add nothing,
    and neither do points with NaN. One that is, and infinitely so in a task, as by a loss of minus
    infinity, makes it infinite; an infinite loss adds nothing. Exact, by slicing; its cost grows as
    :math:`N^{K-1}`.

    Args:
      points: the metrics of N solutions, ``(N, K)``.
      reference: a point that solutions should beat, ``(K,)``.
      higher_is_better: one bool for all tasks, or K of them; static.

    Returns:
      A scalar, at least 0, in the product of the tasks' units.

    Raises:
      ValueError: if the shapes don't fit, there is no task, or `higher_is_better` is not K bools.

    Examples:
      >>> import mtl_optax as mtl
      >>> float(mtl.metrics.hypervolume([[3.0, 1.0], [1.0, 2.0]], [0.0, 0.0]))
      4.0

    References:
      Zitzler and Thiele, `Multiobjective Evolutionary Algorithms
      <https://doi.org/10.1109/4235.797969>`_, 1999.
    """
    points, reference = _per_task(points), jnp.asarray(reference, float)
    if points.ndim != 2 or reference.shape != points.shape[1:]:
        raise ValueError(
            f"points have shape {points.shape} and the reference {reference.shape}, expected "
            "(N, K) and (K,)"
        )
    gains = _signs(higher_is_better, points) * (points - reference[None])
    inside = jnp.all(gains > 0, axis=1, keepdims=True)  # False for NaN
    volume = _volume(jnp.where(inside, gains, 0.0))
    # Without NaN in the gains, only 0 * inf and inf - inf make one: of boxes without an end.
    return jnp.where(jnp.isnan(volume), jnp.inf, volume)


def affinity(
    loss_fn: Callable[..., Any], params: Any, *args: Any, learning_rate: ArrayLike
) -> Float[Array, "K K"]:
    r"""How much a gradient step for one task lowers the loss of another: whom to train together.

    .. math:: Z_{ij} = \frac{L_j(\theta_s,\, \theta_j)
              - L_j(\theta_s - \eta \nabla_{\theta_s} L_i,\, \theta_j)}
              {|L_j(\theta_s,\, \theta_j)|}

    The step is of the shared parameters alone, on the same batch. Above 0 task i helps task j,
    below 0 it harms it; the diagonal is what a task does for itself. Average it over the steps of a
    joint training, and train those tasks together whose columns are high in each other's rows. A
    loss of exactly 0 has no ratio: its column is 0.

    Args:
      loss_fn: `loss_fn(params, *args)` returns the K losses, as for `value_and_jac`.
      params: its parameters, a pytree of arrays; split a flax module first.
      *args: the batch.
      learning_rate: eta > 0, that of the training.

    Returns:
      ``(K, K)``: row i is what the step for task i does to each loss. Costs K backward passes and K
      evaluations, one after another.

    Raises:
      TypeError: as `value_and_jac`, if `loss_fn` is no function, or a parameter or a loss is not of
        a real floating-point type.
      ValueError: as `value_and_jac`, if a named loss is not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses_fn = lambda w: {"a": jnp.sum((w - 1) ** 2), "b": jnp.sum((w + 1) ** 2)}
      >>> Z = mtl.metrics.affinity(losses_fn, jnp.zeros(2), learning_rate=0.1)
      >>> [[round(float(z), 2) for z in row] for row in Z]
      [[0.36, -0.44], [-0.44, 0.36]]

    Differs from:
      Fifty et al. divide by :math:`L_j`; the size of it keeps a help a help where a loss is
      negative, as that of a density can be.

    References:
      Fifty et al., `Efficiently Identifying Task Groupings for Multi-Task Learning
      <https://arxiv.org/abs/2109.04617>`_, 2021, eq. 1.
    """
    _, jacobian = value_and_jac(loss_fn)(params, *args)

    def losses_after(weights: jax.Array) -> jax.Array:
        """The K losses after a step along the weighted gradients."""
        stepped = jax.tree.map(
            lambda p, g, is_shared: p - (learning_rate * g).astype(p.dtype) if is_shared else p,
            params,
            # A task of NaN is no part of another's step.
            jacobian.keep(weights > 0).pullback(weights),
            jacobian.shared,
        )
        return flatten_losses(loss_fn(stepped, *args))

    each = jnp.eye(jacobian.num_tasks, dtype=jacobian.dtype)
    after, before = jax.lax.map(losses_after, each), jacobian.loss_vector()[None, :]
    return jnp.where(before == 0, 0, (before - after) / jnp.where(before == 0, 1, abs(before)))


def non_dominated(
    points: Shaped[ArrayLike, "N K"], *, higher_is_better: bool | Sequence[bool] = True
) -> Bool[Array, " N"]:
    """Which points no other one beats: as good in every task, and better in one.

    Equal points do not beat each other. A point with NaN is dominated.

    Args:
      points: the metrics of N solutions, ``(N, K)``.
      higher_is_better: one bool for all tasks, or K of them; static.

    Returns:
      ``(N,)`` bool.

    Raises:
      ValueError: if the shape doesn't fit, or `higher_is_better` is not K bools.

    Examples:
      >>> import mtl_optax as mtl
      >>> mtl.metrics.non_dominated([[3.0, 1.0], [1.0, 2.0], [1.0, 1.0]]).tolist()
      [True, True, False]
    """
    points = _solutions(points)
    beaten = jnp.any(beats(_signs(higher_is_better, points) * points), axis=0)
    return ~beaten & ~jnp.any(jnp.isnan(points), axis=1)


def igd(
    points: Shaped[ArrayLike, "N K"],
    front: Shaped[ArrayLike, "M K"],
    *,
    plus: bool = True,
    higher_is_better: bool | Sequence[bool] = True,
) -> Float[Array, ""]:
    r"""Inverted generational distance: how far the points of a true front are from the nearest one.

    .. math:: \mathrm{IGD} = \frac1M \sum_{z} \min_n d(z, p_n), \quad
              d^+(z, p) = \big\| \max(z - p, 0) \big\|, \quad d(z, p) = \| z - p \|

    for metrics where higher is better, mirrored where lower is. The plus counts only what a point
    lacks: unlike the plain distance, it never rewards a set of which each point is worse.

    Args:
      points: the metrics of N solutions, ``(N, K)``; a point with NaN is infinitely far, and so is
        the nearest of none.
      front: points that cover the true front evenly, ``(M, K)``, M >= 1.
      plus: whether to take :math:`d^+`, IGD+, or d, IGD; static.
      higher_is_better: one bool for all tasks, or K of them; static.

    Returns:
      A scalar, at least 0, in the unit of the metrics.

    Raises:
      ValueError: if the shapes don't fit, the front is empty, or `higher_is_better` is not K bools.

    Examples:
      >>> import mtl_optax as mtl
      >>> float(mtl.metrics.igd([[0.0, 0.0]], [[3.0, -4.0]]))
      3.0
      >>> float(mtl.metrics.igd([[0.0, 0.0]], [[3.0, -4.0]], plus=False))
      5.0

    References:
      Ishibuchi et al., `Modified Distance Calculation in Generational Distance and Inverted
      Generational Distance <https://doi.org/10.1007/978-3-319-15892-1_8>`_, 2015.
    """
    points, front = _solutions(points), _solutions(front)
    if points.shape[1] != front.shape[1]:
        raise ValueError(
            f"points have shape {points.shape} and the front {front.shape}, expected (N, K) and "
            "(M, K)"
        )
    if not len(front):
        raise ValueError("the front has no points, expected at least 1 to be near to")
    lacking = _signs(higher_is_better, points)[None] * (front[:, None] - points[None])
    lacking = jnp.maximum(lacking, 0) if plus else lacking
    lacking = jnp.abs(jnp.where(jnp.isnan(lacking), jnp.inf, lacking))
    unit = power_of_two(jnp.max(jnp.where(jnp.isfinite(lacking), lacking, 0), initial=0))
    distances = unit * safe_sqrt(jnp.sum((lacking / unit) ** 2, axis=2))
    return jnp.mean(jnp.min(distances, axis=1, initial=jnp.inf))


def spacing(points: Shaped[ArrayLike, "N K"]) -> Float[Array, ""]:
    r"""How unevenly points are spread: the deviation of the distances to the nearest other one.

    .. math:: S = \sqrt{\frac{1}{N-1} \sum_n (\bar d - d_n)^2}, \quad
              d_n = \min_{m \ne n} \sum_k |p_{nk} - p_{mk}|

    0 is even. It says nothing about how much of a front is covered; the volume does.

    Args:
      points: the metrics of N >= 2 solutions, ``(N, K)``; one that is not finite is left out.

    Returns:
      A scalar, at least 0, in the unit of the metrics; NaN where no two are left.

    Raises:
      ValueError: if the shape doesn't fit, or there are less than two points.

    Examples:
      >>> import mtl_optax as mtl
      >>> float(mtl.metrics.spacing([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]))
      0.0

    References:
      Schott, `Fault Tolerant Design Using Single and Multicriteria Genetic Algorithm Optimization
      <https://hdl.handle.net/1721.1/11582>`_, 1995.
    """
    points = _solutions(points)
    if len(points) < 2:
        raise ValueError(f"got {len(points)} points, expected at least 2 to be apart")
    known = jnp.all(jnp.isfinite(points), axis=1)
    apart = jnp.sum(jnp.abs(points[:, None] - points[None]), axis=2)
    others = known[None, :] & ~jnp.eye(len(points), dtype=bool)
    nearest = jnp.min(jnp.where(others, apart, jnp.inf), axis=1)
    return safe_sqrt(jnp.var(nearest, ddof=1, where=known))


def _solutions(points: ArrayLike) -> jax.Array:
    points = _per_task(points)
    if points.ndim != 2:
        raise ValueError(
            f"points have shape {points.shape}, expected (N, K): solutions by their metrics"
        )
    return points


def beats(scores: jax.Array) -> jax.Array:
    """Which of the points (N, K), where higher is better, dominates which: (N, N) bool."""
    mine, theirs = scores[:, None], scores[None]
    return jnp.all(mine >= theirs, axis=2) & jnp.any(mine > theirs, axis=2)


def _volume(gains: jax.Array) -> jax.Array:
    """The volume of the union of the boxes from 0 to each row."""
    if gains.shape[1] == 1:
        return jnp.max(gains, initial=0.0)
    # Slices along the last axis: each is as wide as the union of the boxes that reach so high.
    gains = gains[jnp.argsort(-gains[:, -1])]
    heights = gains[:, -1] - jnp.append(gains[1:, -1], 0.0)
    reached = jnp.tril(jnp.ones((len(gains), len(gains)), bool))
    slices = jnp.where(reached[..., None], gains[None, :, :-1], 0.0)
    return jnp.sum(heights * jax.vmap(_volume)(slices))


def _per_task(metrics: ArrayLike) -> jax.Array:
    metrics = jnp.asarray(metrics, float)
    if metrics.ndim == 0 or metrics.shape[-1] == 0:
        raise ValueError(
            f"metrics have shape {metrics.shape}, expected (..., K) with K >= 1: "
            "put the tasks on the last axis"
        )
    return metrics


def _signs(higher_is_better: bool | Sequence[bool], metrics: jax.Array) -> jax.Array:
    better = np.asarray(higher_is_better)
    if better.dtype != bool or better.shape not in ((), metrics.shape[-1:]):
        raise ValueError(
            f"higher_is_better is {higher_is_better!r}, expected one bool or "
            f"{metrics.shape[-1]} of them, one a task"
        )
    return jnp.broadcast_to(np.where(better, 1.0, -1.0), metrics.shape)
