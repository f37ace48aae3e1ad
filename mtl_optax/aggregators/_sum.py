"""The plain sum and mean of the task gradients."""

from typing import Any

import jax.numpy as jnp
import optax

from mtl_optax._options import check_num_tasks
from mtl_optax.jacobian import Jacobian
from mtl_optax.links import link


def sum_tasks(num_tasks: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Sums the task gradients: the gradient of the summed losses, by one backward pass.

    .. math:: d = \sum_k g_k

    After balancers this is the weighted sum that scalarising strategies prescribe.

    Args:
      num_tasks: number of tasks K, static, to hold the losses to it; None takes any.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: sum-like.

    Raises:
      TypeError: if it gets a plain gradient, or a `jax.jacrev` tree without `losses=`.
      ValueError: if `num_tasks` < 1, or the losses are not as many.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.sum_tasks()
      >>> tx.update(jac, tx.init(jnp.ones(2)))[0].tolist()
      [3.0, 3.0]
    """
    return _uniform(lambda jacobian: jacobian.combine(1.0), num_tasks)


def mean_tasks(num_tasks: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Averages the task gradients on the shared parameters, by one backward pass.

    .. math:: d = \frac1K \sum_k g_k

    K counts the tasks present. Like every aggregator it acts on the shared parameters; a head
    follows its own loss. With `value_and_jac(..., shared=None)` all is shared, and this is the
    gradient of the mean loss.

    Args:
      num_tasks: number of tasks K, static, to hold the losses to it; None takes any.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like.

    Raises:
      TypeError: if it gets a plain gradient, or a `jax.jacrev` tree without `losses=`.
      ValueError: if `num_tasks` < 1, or the losses are not as many.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.mean_tasks()
      >>> tx.update(jac, tx.init(jnp.ones(2)))[0].tolist()
      [1.5, 1.5]
    """
    return _uniform(mean_of, num_tasks)


def sum(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Sums the task gradients, as `sum_tasks`, of a known number of tasks: the plain baseline.

    .. math:: d = \sum_k g_k

    Args:
      num_tasks: number of tasks K; static, at least 1.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: sum-like.

    Raises:
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.sum(num_tasks=2)
      >>> tx.update(jac, tx.init(jnp.ones(2)))[0].tolist()
      [3.0, 3.0]
    """
    check_num_tasks(num_tasks)
    return sum_tasks(num_tasks)


def mean(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Averages the task gradients, as `mean_tasks`, of a known number of tasks.

    .. math:: d = \frac1K \sum_k g_k

    K counts the tasks present.

    Args:
      num_tasks: number of tasks K; static, at least 1.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like.

    Raises:
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.mean(num_tasks=2)
      >>> tx.update(jac, tx.init(jnp.ones(2)))[0].tolist()
      [1.5, 1.5]
    """
    check_num_tasks(num_tasks)
    return mean_tasks(num_tasks)


def mean_of(jacobian: Jacobian) -> Any:
    """The mean of the rows present on the shared parameters; each head its own row."""
    if jacobian.everyone:
        return jacobian.combine(1 / jacobian.num_tasks)
    return jacobian.combine(jnp.full(jacobian.num_tasks, 1 / jacobian.num_present))


def _uniform(combine, num_tasks):
    if num_tasks is not None:
        check_num_tasks(num_tasks)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        return combine(jacobian), state

    return link(optax.init_empty_state, update_fn, num_tasks)
