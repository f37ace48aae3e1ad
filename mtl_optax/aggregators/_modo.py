"""MoDo: move the weights along an unbiased slope, from two independent batches."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import dot
from mtl_optax._options import check_num_tasks, check_option
from mtl_optax.aggregators._simplex_steps import relative_products, shared_out, simplex_step
from mtl_optax.links import link, presence
from mtl_optax.states import PerTask


class ModoState(NamedTuple):
    """State of `modo`."""

    weights: PerTask  # (K,) float32, of the last update
    shares: Annotated[PerTask, 1.0]  # (K,) float32, up to a factor where the next update starts


def modo(
    num_tasks: int, *, gamma: float | jax.Array = 0.1, rho: float | jax.Array = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Moves the weights towards the min-norm point by double sampling.

    .. math:: \lambda \leftarrow \Pi_\Delta\!\left(\lambda - \gamma (J_1 J_2^\top + \rho I)
              \lambda\right), \quad d = \tfrac12 (J_1 + J_2)^\top \lambda

    The Gramian of one batch is a biased estimate of that of the data; the product of two
    independent ones is not. `update` takes a tuple of Jacobians, one a batch:

        tx.update((jac_1, jac_2), opt_state, params)          # the direction from both, their mean
        tx.update((jac_1, jac_2, jac_3), opt_state, params)   # or from a third alone

    A task that is absent from one batch is so from all: the weights move on the simplex of the
    others, and it keeps its share of them. One Jacobian alone serves for all, with the bias.
    Balancers take one Jacobian, so none may stand before this link where it gets several.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      gamma: > 0, step size of the weights, relative to the mean squared norm of the rows.
      rho: >= 0, pull towards even weights, in the same units.

    Returns:
      An aggregator: Jacobians in, gradient out. Update scale: mean-like (weights sum to 1).

    Raises:
      ValueError: if `num_tasks` < 1, an option is out of range, the losses are not K, or there are
        more than three batches.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> task_losses = lambda w, x: {"a": jnp.mean(2 * w[0] * x), "b": jnp.mean(w[1] * x)}
      >>> w, batches = jnp.ones(2), (jnp.ones(3), 1.1 * jnp.ones(3))
      >>> jacs = tuple(mtl.value_and_jac(task_losses)(w, batch)[1] for batch in batches)
      >>> tx = mtl.modo(num_tasks=2)
      >>> update, state = tx.update(jacs, tx.init(w), w)
      >>> [round(x, 4) for x in state.weights.tolist()]
      [0.47, 0.53]

    Differs from:
      The paper's step size is absolute; here :math:`J_1 J_2^\top` is divided by the mean of
      :math:`\|g_k\| \|g'_k\|`, so that the units of the losses have no say. The authors' code
      takes the sum of both batches, twice the mean of the paper's eq. 2.9b, and rho = 0.1.

    References:
      Chen et al., `Three-Way Trade-Off in Multi-Objective Learning
      <https://arxiv.org/abs/2305.20057>`_, 2023, algorithm 2 and eq. 2.9.
    """
    check_num_tasks(num_tasks)
    check_option("gamma", gamma, lambda g: g > 0, "more than 0")
    check_option("rho", rho, lambda r: r >= 0, "at least 0")

    def init_fn(params):
        del params
        ones = jnp.ones(num_tasks, jnp.float32)
        return ModoState(ones / num_tasks, ones)

    def update_fn(jacobians, state, **extra_args):
        del extra_args
        first, second, _ = batches(jacobians)
        _, present = presence(jacobians)
        w, mass = shared_out(state.shares, present)
        products = relative_products(first, second, present).astype(jnp.float32)
        weights = simplex_step(w, dot(products, w) + rho * w, gamma, present)
        # Two batches share the direction; a third, or one that is alone, has it for itself.
        direct = jacobians if len(jacobians) == 2 else jacobians[-1:]
        updates = [jacobian.combine(weights) for jacobian in direct]
        return _mean(*updates), ModoState(weights, mass * weights)

    return link(init_fn, update_fn, num_tasks, several=True)


def _mean(first, *second):
    """The mean of one or two updates, where the sum of small numbers or large ones is one too."""
    return jax.tree.map(lambda a, *b: a / 2 + b[0] / 2 if b else a, first, *second)


def batches(jacobians):
    """Three Jacobians of one, two or three: the product's two, and the direction's."""
    if len(jacobians) > 3:
        raise ValueError(
            f"got the Jacobians of {len(jacobians)} batches, expected at most 3: two for the "
            "weights and one for the direction"
        )
    return jacobians[0], jacobians[min(1, len(jacobians) - 1)], jacobians[-1]
