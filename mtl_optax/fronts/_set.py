"""What the strategies of a set share: they see the Jacobians of n models, stacked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import check_num_tasks
from mtl_optax.jacobian import Jacobian
from mtl_optax.links import conform, receive


def set_link(
    num_tasks: int,
    init_fn: Callable[[int], Any],
    update_fn: Callable[[Jacobian, Any], tuple[Any, Any]],
) -> optax.GradientTransformationExtraArgs:
    """A link of an `optax.chain` from what it does to the stacked Jacobians of n models.

    Args:
      num_tasks: the K that each Jacobian must have.
      init_fn: from the number of models n to the state.
      update_fn: `update_fn(jacobians, state)` returns n stacked gradients and the new state. What
        it asks of the Jacobians, it asks under `jax.vmap`.
    """
    check_num_tasks(num_tasks)

    def init(params):
        leaves = jax.tree.leaves(params)
        if not leaves or min(jnp.ndim(leaf) for leaf in leaves) == 0:
            raise ValueError(
                "init got the parameters of one model, expected those of n, stacked along the "
                "first axis of every leaf, as jax.vmap(init_model)(keys) makes them"
            )
        return init_fn(len(leaves[0]))

    def update(updates, state, params=None, *, losses=None, present=None, **extra_args):
        del extra_args
        is_jacobian = lambda x: isinstance(x, Jacobian)  # noqa: E731
        for jacobian in filter(is_jacobian, jax.tree.leaves(updates, is_leaf=is_jacobian)):
            if min(jnp.ndim(loss) for loss in jax.tree.leaves(jacobian.losses)) == 0:
                raise ValueError(
                    "a strategy of a set got the Jacobian of one model, expected those of n: "
                    "jax.vmap(mtl.value_and_jac(loss_fn), ...)(params, ...), of stacked parameters"
                )
        read = lambda jac, losses: receive(jac, losses, num_tasks, None, present)  # noqa: E731
        gradients, state = update_fn(jax.vmap(read)(updates, losses), state)
        return conform(gradients, params), state

    return optax.GradientTransformationExtraArgs(init, update)
