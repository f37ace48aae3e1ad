"""Uncertainty weighting: learn each task's noise, and weight by its inverse."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import FINITE, check_choice, check_num_tasks, check_option, per_task_leaves
from mtl_optax._usable import step_each
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask

Kind = Literal["regression", "classification"]
KINDS = ("regression", "classification")
REGULARIZERS = ("log", "log1p")
# Of a variance or its inverse: further out one task alone would be left.
_LARGEST = 1e12


class UncertaintyState(NamedTuple):
    """State of `scale_by_uncertainty`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    log_variances: PerTask  # (K,) float32, s = log sigma^2, for the next update
    opt_state: PerTask  # of the optimizer of each s
    unusable: PerTask  # (K,) int32, updates in which its loss was not positive or not finite
    total: jax.Array  # () float32, the loss with its regulariser at the last update


def scale_by_uncertainty(
    num_tasks: int,
    *,
    kind: Kind | Sequence[Kind] | Mapping[str, Kind] = "regression",
    regularizer: Literal["log", "log1p"] = "log",
    optimizer: optax.GradientTransformation | None = None,
    initial_log_variance: float | jax.Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by the inverse of a learned noise variance.

    .. math:: \mathcal L = \sum_k c_k e^{-s_k} L_k + R(s_k), \quad s_k = \log\sigma_k^2, \quad
              \lambda_k = c_k e^{-s_k}

    with :math:`c = 1/2` for regression and 1 for classification, and :math:`R(s) = s/2`, or
    :math:`\log(1 + e^s)`. Each s takes a step of its own optimizer along the closed-form gradient
    :math:`R'(s) - c e^{-s} L` after its weight is used. For a fixed L, `"log"` settles where
    :math:`\lambda L = 1/2`: a large loss gets a small weight. The state's `total` is
    :math:`\mathcal L` over the tasks present whose losses are finite, which with `"log"` goes below
    0 as the losses fall; `summarize` reads it.

    Losses must be positive: where one is 0, negative or not finite, no s is its optimum, so its s
    and its weight stay as they are, and `unusable` counts it. :math:`e^s` is kept within 1e-12 and
    1e12.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      kind: `"regression"` or `"classification"`, for all tasks or a tree like the losses.
      regularizer: `"log"` is Kendall's, whose total can go negative; `"log1p"` stays positive.
      optimizer: updates each s; `optax.adam(1e-2)` by default.
      initial_log_variance: the s that all tasks start from.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like at first (1/2 for regression),
      then free.

    Raises:
      ValueError: if `num_tasks` < 1, `kind` or `regularizer` is unknown, an initial log variance is
        not finite, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.scale_by_uncertainty(2, kind={"a": "regression", "b": "classification"})
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> state.weights.tolist()
      [0.5, 1.0]

    Differs from:
      The paper trains s with the model's optimizer; here its step is free of the model's learning
      rate and weight decay. There a loss of 0 or less lets the weight grow without end.

    References:
      Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses
      <https://arxiv.org/abs/1705.07115>`_, 2018, eqs. 7 and 10; Liebel and Körner, `Auxiliary
      Tasks in Multi-task Learning <https://arxiv.org/abs/1805.06334>`_, 2018, eq. 6.
    """
    check_num_tasks(num_tasks)
    check_option("initial_log_variance", initial_log_variance, *FINITE)
    check_choice("kind", kind, KINDS)
    check_choice("regularizer", regularizer, REGULARIZERS)
    optimizer = optimizer or optax.adam(1e-2)

    def init_fn(params):
        del params
        s = jnp.full(num_tasks, initial_log_variance, jnp.float32)
        return UncertaintyState(
            weights=jnp.ones(num_tasks, jnp.float32),
            log_variances=s,
            opt_state=jax.vmap(optimizer.init)(s),
            unusable=jnp.zeros(num_tasks, jnp.int32),
            total=jnp.zeros([], jnp.float32),
        )

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        kinds = per_task_leaves("kind", kind, jacobian.losses)
        factors = jnp.array([0.5 if k == "regression" else 1.0 for k in kinds], jnp.float32)
        loss = jacobian.loss_vector().astype(jnp.float32)
        usable = (loss > 0) & jnp.isfinite(loss)
        s = state.log_variances
        weights = factors * jnp.exp(-s)
        is_log = regularizer == "log"
        slope = jnp.full_like(s, 0.5) if is_log else jax.nn.sigmoid(s)
        terms = weights * loss + (s / 2 if is_log else jax.nn.softplus(s))
        total = jnp.sum(jnp.where(jacobian.present & jnp.isfinite(terms), terms, 0))
        gradient = slope - weights * loss
        next_s, opt_state = step_each(optimizer, state.opt_state, s, gradient, usable)
        limit = math.log(_LARGEST)
        next_s = jnp.clip(next_s, -limit, limit)
        new_state = UncertaintyState(weights, next_s, opt_state, state.unusable + ~usable, total)
        return jacobian.scale(weights), new_state

    return link(init_fn, update_fn, num_tasks)


uncertainty = summed(scale_by_uncertainty)
