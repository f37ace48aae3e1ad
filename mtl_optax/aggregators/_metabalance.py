"""MetaBalance: bring the gradients of auxiliary tasks towards the size of the primary one's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import BELOW_ONE, UP_TO_ONE, check_num_tasks, check_option, task_position
from mtl_optax.aggregators._base import towards
from mtl_optax.jacobian._rows import mix, row_norms
from mtl_optax.links import check_params, link, running_mean
from mtl_optax.states import PerTask


class MetabalanceState(NamedTuple):
    """State of `metabalance`."""

    norms: PerTask  # like the parameters, leaves (K,) float32, averages, not debiased
    masses: PerTask  # like the parameters, leaves (K,) float32, the weights of all norms in them


def metabalance(
    num_tasks: int,
    *,
    primary: int | str = 0,
    relax_factor: float | jax.Array = 0.7,
    decay: float | jax.Array = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales each auxiliary gradient, parameter by parameter, towards the primary one's norm.

    .. math:: m_k \leftarrow \beta m_k + (1 - \beta) \|g_k\|, \quad
              d = \sum_k \Big(r \frac{m_p}{m_k} + 1 - r\Big)\, g_k

    for each array of shared parameters by itself, since which task dominates differs from layer to
    layer; p is the primary task. An auxiliary gradient is so enlarged where it is too weak to help,
    and shrunk where it drowns the primary one. Where the primary task has had no gradient yet the
    others are left as they are, and while it is absent its last average counts.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      primary: the task p, by its name or its position in the order of the losses.
      relax_factor: r in [0, 1], 1 for norms equal to the primary one's, 0 for the plain sum.
      decay: beta in [0, 1), weight of the past.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: sum-like (of K rows of about the
      primary one's norm).

    Raises:
      ValueError: if `num_tasks` < 1, an option is out of range, no task is the primary one, the
        losses are not K, or `init` gets no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> params = {"u": jnp.ones(1), "v": jnp.ones(1)}
      >>> tx = mtl.metabalance(num_tasks=2, primary="main", relax_factor=1.0)
      >>> losses, jac = mtl.value_and_jac(lambda p: {
      ...     "aux": p["u"][0] + 8 * p["v"][0], "main": 4 * p["u"][0] - 2 * p["v"][0]})(params)
      >>> update, state = tx.update(jac, tx.init(params), params)
      >>> {name: leaf.tolist() for name, leaf in update.items()}
      {'u': [8.0], 'v': [0.0]}

    References:
      He et al., `MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes
      of Auxiliary Tasks <https://arxiv.org/abs/2203.06801>`_, 2022, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_option("relax_factor", relax_factor, *UP_TO_ONE)
    check_option("decay", decay, *BELOW_ONE)

    def init_fn(params):
        check_params(params)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(num_tasks, jnp.float32), params)
        return MetabalanceState(zeros, zeros)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        first = task_position("primary", primary, jacobian.names)
        sums, treedef = jax.tree.flatten(state.norms)
        masses = jax.tree.leaves(state.masses)
        shared = [i for i, is_shared in enumerate(jax.tree.leaves(jacobian.shared)) if is_shared]

        def balanced(rows: list[jax.Array]) -> list[jax.Array]:
            gradients = []
            for i, row in zip(shared, rows, strict=True):
                norm, sums[i], masses[i] = running_mean(
                    row_norms(row), sums[i], masses[i], decay, jacobian.present
                )
                weights = towards(norm[first], norm, relax_factor)
                gradients.append(mix(jnp.where(norm[first] > 0, weights, 1), row))
            return gradients

        update = jacobian.reduce(balanced)
        return update, MetabalanceState(treedef.unflatten(sums), treedef.unflatten(masses))

    return link(init_fn, update_fn, num_tasks)
