"""ConFIG: the conflict-free direction with chosen cosines to all task gradients."""

import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide, dot
from mtl_optax._options import check_preference, per_task
from mtl_optax._typing import TaskOption
from mtl_optax.aggregators._base import relative_norms, row_factors, solved_aggregator


def conflict_free(
    num_tasks: int, *, preference: TaskOption | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Combines the rows to one direction of equal cosine with all of them (ConFIG).

    .. math:: v = U^+ p, \quad d = \Big(\sum_k \big\langle g_k, \tfrac{v}{\|v\|}\big\rangle\Big)
              \frac{v}{\|v\|}, \quad u_k = g_k / \|g_k\|

    All cosines are positive wherever independent rows allow it. The length is the sum of the rows'
    projections, so it shrinks as rows conflict. In terms of the cosines C of the rows the direction
    is :math:`U^\top C^+ p`: the Gramian suffices. Zero rows have no direction and are left out.

    An inverse of C squares the condition number of the unit rows U, and loses the direction in
    float32 where it is beyond a thousand. Where rows are at hand, as with `jax.jacrev` and
    `gramian="rows"`, C is made orthogonal by way of the rows themselves, and the error is that of a
    pseudo-inverse of U.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      preference: p, the cosines asked for up to a common factor, a non-negative number or one a
        task; None is 1.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: sum-like, no longer than the rows'
      norms together. Its state counts the updates where the direction is lost in rounding
      (antiparallel rows, alone) or rows are NaN: uniform weights 1, the sum.

    Raises:
      ValueError: if `num_tasks` < 1, a preference is negative or all 0, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.conflict_free(num_tasks=2)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()]
      [0.1588, 2.0706, 2.0706]

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2408.11104>`_, 2024, eq. 2-3.
    """
    check_preference(preference)

    def solve(jacobian):
        cosines, norms = jacobian.correlation()
        relative = relative_norms(norms)
        aims = per_task("preference", preference, jacobian, 1.0).astype(norms.dtype)
        aims = jnp.where(norms > 0, aims, 0)
        values, vectors, kept = row_factors(jacobian, cosines)
        inverse = divide(1, jnp.where(kept, values, 0))
        components = jnp.where(kept, dot(aims, vectors), 0)
        reached = dot(vectors, components)
        square = jnp.sum(components * inverse * components)
        # By the rounding of the components.
        error = num_tasks * jnp.finfo(values.dtype).eps * jnp.linalg.norm(aims)
        noise = jnp.sum((2 * jnp.abs(components) + error) * error * inverse)
        solved = square > noise
        projection = dot(relative, reached)
        length = divide(projection, square, projection)
        nothing = (jnp.max(norms) == 0) | (jnp.max(aims) == 0)
        coefficients = length * dot(vectors, inverse * components)
        return divide(coefficients, relative), (solved | nothing) & jnp.all(jnp.isfinite(norms))

    return solved_aggregator(num_tasks, solve, 1.0)
