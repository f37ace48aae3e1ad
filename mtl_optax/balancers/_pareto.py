"""PE-LTR: Pareto-efficient weights above the floors that the business sets."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax._min_norm import min_norm_weights, project_on_simplex, relative_gramian
from mtl_optax._numerics import divide, dot
from mtl_optax._options import check_choice, check_num_tasks, check_option, is_traced, per_task
from mtl_optax._typing import TaskOption
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask

SOLVERS = ("exact", "two_step")


class ParetoState(NamedTuple):
    """State of `scale_by_pareto`."""

    weights: PerTask  # (K,) float32, of the last update
    fallbacks: jax.Array  # () int32, updates whose program could not be solved: even weights


def scale_by_pareto(
    num_tasks: int,
    *,
    floors: TaskOption = 0.0,
    solver: Literal["exact", "two_step"] = "exact",
) -> optax.GradientTransformationExtraArgs:
    r"""Weights that make the scalarised gradient shortest, each at least its floor.

    .. math:: \min_w \|\textstyle\sum_k w_k g_k\|^2 \quad \text{s.t.} \quad
              \sum_k w_k = 1, \; w_k \ge c_k

    The floors c state which tasks matter most. They scalarise the whole loss, so heads are weighted
    like the trunk. An absent task's floor is room for the others. Where the program can't be
    solved, the room above the floors is shared evenly and `fallbacks` counts it.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      floors: the least weight of each task, in [0, 1] with a sum of at most 1; one for all, or a
        tree like the losses.
      solver: `"exact"` solves the program. `"two_step"` is the paper's: without the bounds first,
        then a projection onto them. Its answer is often not optimal.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: at most mean-like (weights sum to 1).

    Raises:
      ValueError: if `num_tasks` < 1, the floors are negative or sum to more than 1, `solver` is
        unknown, or the losses are not K.

    Examples:
      Fed by `jax.jacrev` over the shared parameters alone, click and purchase of a recommender:

      >>> import jax, jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[3.0, 0.0], [1.0, 1.0], [1.5, 0.2]])
      >>> tx = mtl.scale_by_pareto(num_tasks=3, floors=0.1)
      >>> state = tx.init(jnp.zeros(2))
      >>> grads = jax.jacrev(lambda shared: J @ shared)(jnp.zeros(2))
      >>> jac, state = tx.update(grads, state, losses=jnp.ones(3))
      >>> [round(w, 5) for w in state.weights.tolist()]
      [0.1, 0.76517, 0.13483]

    References:
      Lin et al., `A Pareto-Efficient Algorithm for Multiple Objective Optimization in E-Commerce
      Recommendation <https://doi.org/10.1145/3298689.3346998>`_, RecSys 2019, algorithm 2.
    """
    check_num_tasks(num_tasks)
    check_choice("solver", solver, SOLVERS)
    check_option("floors", floors, lambda c: c >= 0, "at least 0", each=True)
    _check_total(floors, num_tasks)

    def init_fn(params):
        del params
        return ParetoState(jnp.ones(num_tasks, jnp.float32) / num_tasks, jnp.zeros([], jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        c = per_task("floors", floors, jacobian, 0.0)
        solve = min_norm_weights if solver == "exact" else _two_step
        products, scales = jacobian.scaled_gramian()
        weights, solved = solve(products, scales, jacobian.present, c)
        fallbacks = state.fallbacks + ~solved
        return jacobian.scale(weights), ParetoState(weights.astype(jnp.float32), fallbacks)

    return link(init_fn, update_fn, num_tasks)


def _check_total(floors: TaskOption, num_tasks: int) -> None:
    if is_traced(floors):
        return
    leaves = jax.tree.leaves(floors)
    # NumPy: jnp would stage these constants out when the factory is called under jit.
    total = sum(np.sum(leaf) for leaf in leaves)
    if len(leaves) == 1 and leaves[0] is floors and np.size(leaves[0]) == 1:
        total *= num_tasks
    if total > 1 + 1e-6:
        raise ValueError(
            f"the floors {floors} sum to {total:.6g} over {num_tasks} tasks, expected at most 1, "
            "the sum of all weights: lower them"
        )


def _two_step(
    products: jax.Array, scales: jax.Array, present: jax.Array, floors: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The paper's solver: the stationary point without bounds, then the nearest within them."""
    num_tasks = scales.shape[0]
    gramian = relative_gramian(products, scales)
    floors = jnp.where(present, floors, 0)
    room = 1 - jnp.sum(floors)
    ones = present[:, None].astype(gramian.dtype)
    system = jnp.block([[gramian, ones], [ones.T, jnp.zeros((1, 1), gramian.dtype)]])
    target = jnp.append(-dot(gramian, floors), room)
    # Duplicate or zero rows make the system singular: the least-norm solution treats them alike.
    solution = dot(jnp.linalg.pinv(system, hermitian=True), target)
    excess = project_on_simplex(solution[:num_tasks], present, room)
    solved = jnp.all(jnp.isfinite(excess))
    even = jnp.where(present, divide(room, jnp.sum(present)), 0)
    return floors + jnp.where(solved, excess, even), solved


pareto = summed(scale_by_pareto)
