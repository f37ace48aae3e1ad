"""The plain sum and mean of the task gradients."""

import optax

from mtl_optax.links import link


def sum_tasks() -> optax.GradientTransformationExtraArgs:
    r"""Sums the task gradients: the gradient of the summed losses, by one backward pass.

    .. math:: d = \sum_k g_k

    After balancers this is the weighted sum that scalarising strategies prescribe.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: sum-like.

    Raises:
      TypeError: if it gets a plain gradient, or a `jax.jacrev` tree without `losses=`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.sum_tasks()
      >>> tx.update(jac, tx.init(jnp.ones(2)))[0].tolist()
      [3.0, 3.0]
    """
    return _uniform(lambda num_tasks: 1.0)


def mean_tasks() -> optax.GradientTransformationExtraArgs:
    r"""Averages the task gradients on the shared parameters, by one backward pass.

    .. math:: d = \frac1K \sum_k g_k

    Like every aggregator it acts on the shared parameters; a head follows its own loss. With
    `value_and_jac(..., shared=None)` all is shared, and this is the gradient of the mean loss.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like.

    Raises:
      TypeError: if it gets a plain gradient, or a `jax.jacrev` tree without `losses=`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.mean_tasks()
      >>> tx.update(jac, tx.init(jnp.ones(2)))[0].tolist()
      [1.5, 1.5]
    """
    return _uniform(lambda num_tasks: 1.0 / num_tasks)


def _uniform(weight):
    def update_fn(jacobian, state, **extra_args):
        del extra_args
        return jacobian.combine(weight(jacobian.num_tasks)), state

    return link(optax.init_empty_state, update_fn)
