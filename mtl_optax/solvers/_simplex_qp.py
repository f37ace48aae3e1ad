"""Convex quadratic programs over a simplex: the problem of MGDA and of PE-LTR."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from mtl_optax._numerics import divide, dot, power_of_two
from mtl_optax.solvers import _base

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def simplex_qp(
    Q: Float[ArrayLike, "K K"],
    q: Float[ArrayLike, " K"] | None = None,
    *,
    floors: ArrayLike = 0.0,
    total: ArrayLike = 1.0,
    present: Bool[ArrayLike, " K"] | None = None,
    max_steps: int | None = None,
) -> _base.SolverResult:
    r"""Minimises a convex quadratic over a simplex with floors.

    .. math:: \min_x \tfrac12 x^T Q x + q^T x \quad \text{s.t.}\; \sum_i x_i = \text{total},\;
              x_i \ge \text{floor}_i

    With a Gramian for Q this is the min-norm point in the convex hull of gradients. An exact
    active-set method: a few linear systems, then machine precision. Q may be singular, zero, have
    duplicate rows or a diagonal of very unequal entries: it is scaled to about unit diagonal with
    powers of two, hence without rounding, and x does not depend on the scale of (Q, q). Where the
    minimiser is not unique, x is one of them.

    A Gramian rounded to float32 limits the relative accuracy of Jᵀx to about eps · κ(J)². Where J
    is at hand, a second call on the gradient g = J(Jᵀx) wins back what the rounding lost:
    `x += simplex_qp(Q, g, floors=floors - x, total=0.0).x`.

    Args:
      Q: matrix (K, K), symmetric positive semi-definite; only its symmetric part matters.
      q: vector (K,), or None for 0.
      floors: lower bounds, a scalar or (K,), of any sign. At a bound x equals its floor exactly.
      total: scalar, the sum of x.
      present: (K,) bool, the variables that there are: x is 0 elsewhere, and what Q, q and floors
        say there counts for nothing. None for all.
      max_steps: the most linear systems to solve, static; None is 10 K + 50.

    Returns:
      A `SolverResult`, x of shape (K,) in the wider of the types of Q and q, at least float32.
      With g = Qx + q, y = x - floors, τ = total - Σ floors and i the least entry of g its residual
      is the duality gap over the magnitude of the terms that cancel in it,

      .. math:: \frac{y^T g - \tau g_i}{y^T h + \tau h_i}, \quad
                h = |Q| (|x| + \varepsilon \tau) + |q|,

      with ε the machine epsilon; or, if larger, the violation of the sum, |Σx - total| over
      Σ|x| + |total|. Floors whose sum exceeds the total, when traced, give x = floors, not
      converged.

    Raises:
      ValueError: if the shapes do not fit, if `max_steps` < 1, or if the sum of the floors exceeds
        `total` (checked only where both are concrete).

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtl_optax import solvers
      >>> J = jnp.array([[3.0, 0.0], [1.0, 1.0], [1.5, 0.2]])
      >>> [round(float(x), 4) for x in solvers.simplex_qp(J @ J.T).x]
      [0.0, 0.6629, 0.3371]
      >>> [round(float(x), 4) for x in solvers.simplex_qp(J @ J.T, floors=0.1).x]
      [0.1, 0.7652, 0.1348]

    References:
      Lawson and Hanson, `Solving Least Squares Problems <https://doi.org/10.1137/1.9781611971217>`_,
      1974, ch. 23.

      Kim and Park, `Fast Nonnegative Matrix Factorization: An Active-Set-Like Method and
      Comparisons <https://doi.org/10.1137/110821172>`_, 2011, sec. 4.
    """
    Q = jnp.asarray(Q)
    K = Q.shape[0] if Q.ndim else 0
    if Q.shape != (K, K) or K == 0:
        raise ValueError(
            f"Q has shape {Q.shape}, expected (K, K) with K >= 1: "
            "use jax.vmap for a batch of problems."
        )
    q = jnp.zeros(K, Q.dtype) if q is None else jnp.asarray(q)
    if q.shape != (K,):
        raise ValueError(f"q has shape {q.shape}, expected {(K,)} to match Q of shape {Q.shape}.")
    if jnp.shape(floors) not in ((), (K,)):
        raise ValueError(f"floors has shape {jnp.shape(floors)}, expected a scalar or {(K,)}.")
    if jnp.shape(total) != ():
        raise ValueError(f"total has shape {jnp.shape(total)}, expected a scalar.")
    if present is not None and jnp.shape(present) != (K,):
        raise ValueError(
            f"present has shape {jnp.shape(present)}, expected {(K,)}: a bool a variable."
        )
    _check_feasible(floors, total, present, K)
    floors, total = jnp.asarray(floors), jnp.asarray(total)
    present = jnp.ones(K, bool) if present is None else jnp.asarray(present, bool)
    return _solve(Q, q, floors, total, present, max_steps=_base.step_limit(max_steps, K))


def _check_feasible(floors, total, present, K):
    if any(isinstance(x, Tracer) for x in (floors, total, present)):
        return
    values = [float(floors)] * K if jnp.shape(floors) == () else np.asarray(floors).tolist()
    if present is not None:
        here = np.asarray(present)  # inside `jit` an array's bool would be traced
        values = [floor for floor, h in zip(values, here, strict=True) if h]
    least, total = math.fsum(values), float(total)
    # The slack is for floors such as 1/K, whose float32 sum may pass 1.
    if least > total + 1e-6 * math.fsum(map(abs, values)):
        raise ValueError(
            f"the floors sum to {least:g}, expected at most total = {total:g}: "
            "lower the floors or raise total."
        )


@functools.partial(jax.jit, static_argnames="max_steps")
def _solve(Q, q, floors, total, present, *, max_steps):
    dtype = _base.solver_dtype(Q, q)
    eps = jnp.finfo(dtype).eps
    Q, q, total = Q.astype(dtype), q.astype(dtype), total.astype(dtype)
    Q = jnp.where(present[:, None] & present[None, :], Q, 0)
    q, floors = jnp.where(present, q, 0), jnp.where(present, floors.astype(dtype), 0)

    size = jnp.sum(jnp.abs(floors)) + jnp.abs(total)
    room = total - jnp.sum(floors)
    room = jnp.where(room > eps * size, room, 0)
    span = jnp.where(room > 0, room, 1)

    unit = power_of_two(jnp.maximum(jnp.max(jnp.abs(Q)), jnp.max(jnp.abs(q))))
    Q, q = Q / unit, q / unit
    # s² is the curvature, but at least slope / span: this bounds a step over null directions (slope
    # / s² / ridge), and curvature below ridge × slope / span is lost in the rounding of the slope.
    slope = (dot(jnp.abs(Q), jnp.abs(floors)) + jnp.abs(q)) / span
    smallest = 2.0 ** (2 * (jnp.finfo(dtype).minexp // 3))
    s = jnp.maximum(jnp.maximum(jnp.diagonal(Q), slope), smallest)
    s = power_of_two(jnp.sqrt(s))
    # From here on variables are s x and the constraint reads aᵀx = total.
    a = 1 / s
    C = Q * a[:, None] * a[None, :]
    C, q, lower = (C + C.T) / 2, q * a, floors * s
    ridge = _base.smallest_ridge(C)

    def gradient(x):
        return dot(C, x) + q

    def target(x, free):
        # aaᵀ changes nothing on the constraint and makes the system regular where the problem is.
        free = free & present
        normal = jnp.where(free, a, 0)
        normal = divide(normal, jnp.linalg.norm(normal), normal)
        M = C + normal[:, None] * normal[None, :]
        # Free of its multiple of a, which the constraint absorbs, the slope is small near the end.
        slope = gradient(x)
        slope = slope - dot(x - lower, slope) / span * a
        u, v = _base.solve_free(M, ridge, free, jnp.stack([slope, a], axis=1)).T
        v = divide(v, dot(a, v), v)
        missing = total - dot(a, x)
        step = (missing + dot(a, u)) * v - u
        # Where u is large the sum was rounded away; once more restores it.
        return x + step + (missing - dot(a, step)) * v

    def violation(x):
        y = a * (x - lower) / span
        g = s * gradient(x)
        h = s * (dot(jnp.abs(C), jnp.abs(x) + eps * room * s) + jnp.abs(q))
        least = jnp.min(jnp.where(present, g, jnp.inf))
        multiplier = jnp.where(room > 0, dot(y, g), least)
        rounding = dot(jnp.abs(y), h) + h
        rise = jnp.where(present, multiplier - g, 0)
        return divide(rise, rounding, rise)

    free, steps = _base.guess(lower, target, violation, max_steps)
    y = jnp.maximum(target(lower, free) - lower, 0)
    mass = dot(a, y)
    even = jnp.where(present, s * divide(room, jnp.sum(present), room), 0)
    y = jnp.where(mass > 0, y * divide(room, mass), even)
    x, steps = _base.active_set(lower + y, lower, target, violation, steps, max_steps)
    # Of many minimisers, as where all rows are 0 or alike, the even one: it is the same for any K.
    evenly = lower + even
    x = jnp.where(jnp.max(violation(evenly)) <= eps, evenly, x)

    gap = jnp.maximum(jnp.max(violation(x)), 0)
    x = a * x
    size = jnp.sum(jnp.abs(x)) + jnp.abs(total)
    missing = jnp.abs(jnp.sum(x) - total)
    return _base.result(x, jnp.maximum(gap, divide(missing, size, missing)), steps)
