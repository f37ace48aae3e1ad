"""LDC-MTL: a learned router weighs the losses, and their discrepancy is a loss as well."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax._numerics import dot
from mtl_optax._options import check_choice, check_count, check_num_tasks, check_option, is_traced
from mtl_optax._usable import softmax_over, step_each
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class LdcMtlState(NamedTuple):
    """State of `scale_by_ldc_mtl`."""

    weights: PerTask  # (K,) float32, of the last update
    router: PerTask  # (K, num_features + 1) float32, the bias last, that the last update used
    opt_state: PerTask  # of the optimizer of each task's row


def scale_by_ldc_mtl(
    num_tasks: int,
    *,
    discrepancy: float | jax.Array = 0.1,
    between: Literal["losses", "weighted"] = "losses",
    num_features: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs by a learned router, and penalises how far apart the losses are.

    .. math:: \mathcal L = \sum_k \sigma_k L_k + \mu \sum_{k=1}^{K-1} |u_k - u_{k+1}|, \quad
              \sigma = \mathrm{softmax}(R\,[h, 1]), \quad
              \lambda_k = \frac{\partial \mathcal L}{\partial L_k}

    with u = L, or :math:`\sigma L` if `between` is `"weighted"`: the larger of two neighbours gains
    :math:`\mu`, the smaller loses it. The router R takes a step of its own optimizer along the
    gradient of the same :math:`\mathcal L` after its weights are used. h are features of the batch,
    the extra argument `features=` of `update`, averaged over all axes but the last; without any the
    router is a vector of logits. Bring losses of different units to one first, by `log_losses()` or
    `scale_by_weights` before this link.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      discrepancy: mu >= 0, weight of the differences.
      between: what the differences are of, `"losses"` or the `"weighted"` ones.
      num_features: how many features h has; static.
      bounds: what :math:`\sigma` is clipped to; the authors' scripts for two and three tasks take
        (0.2, 0.8), without which the task of the smallest loss can take it all.
      optimizer: updates the router; `optax.adam(1e-3)` by default.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: mean-like (weights sum to 1; with
      `discrepancy` above 0 one of them may be negative).

    Raises:
      TypeError: if `num_features` > 0 and `features=` is missing.
      ValueError: if `num_tasks` < 1, an option is out of range, `features=` has another width, or
        the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": 3 * w @ w})(jnp.ones(2))
      >>> tx = mtl.scale_by_ldc_mtl(2, num_features=4)
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)), features=jnp.ones((8, 4)))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.4, 0.6]

    Differs from:
      In the authors' code the router is part of the model: it starts at random and its gradient
      reaches the features. Here it starts at 0, with even weights, and only reads them.

    References:
      Xiao et al., `LDC-MTL: Balancing Multi-Task Learning through Scalable Loss Discrepancy Control
      <https://arxiv.org/abs/2502.08585>`_, 2025; `"losses"` is its script for Cityscapes,
      `"weighted"` those for NYU-v2, CelebA (0.01) and QM9 (0.05).
    """
    check_num_tasks(num_tasks)
    check_option("discrepancy", discrepancy, lambda mu: mu >= 0, "at least 0")
    check_choice("between", between, ("losses", "weighted"))
    check_count("num_features", num_features, least=0)
    in_order = lambda b: b.shape == (2,) and 0 <= b[0] <= b[1] <= 1  # noqa: E731
    if not is_traced(bounds):
        given = np.asarray(bounds)
        check_option("bounds", given, in_order, "two numbers in ascending order, 0 to 1", each=True)
    optimizer = optimizer or optax.adam(1e-3)

    def init_fn(params):
        del params
        router = jnp.zeros((num_tasks, num_features + 1), jnp.float32)
        weights = jnp.full(num_tasks, 1 / num_tasks, jnp.float32)
        return LdcMtlState(weights, router, jax.vmap(optimizer.init)(router))

    def update_fn(jacobian, state, *, features=None, **extra_args):
        del extra_args
        present, loss = jacobian.present, jacobian.loss_vector().astype(jnp.float32)
        usable = present & jnp.isfinite(loss)
        inputs = jnp.append(_pooled(features, num_features), 1.0)
        # Neighbours among those that can be compared.
        place = jnp.cumsum(usable)
        pairs = usable[:, None] & usable[None, :] & (place[None, :] == place[:, None] + 1)

        def objective(loss, router):
            shares = softmax_over(present, dot(router, inputs), present)
            shares = jnp.where(present, jnp.clip(shares, *bounds), 0)
            u = shares * loss if between == "weighted" else loss
            apart = jnp.sum(jnp.where(pairs, jnp.abs(u[:, None] - u[None, :]), 0))
            return dot(shares, loss) + discrepancy * apart

        finite = jnp.where(usable, loss, 0)
        weights, gradient = jax.grad(objective, argnums=(0, 1))(finite, state.router)
        moves = ~jnp.any(jnp.isnan(gradient), axis=1)
        router, opt_state = step_each(optimizer, state.opt_state, state.router, gradient, moves)
        return jacobian.scale(weights), LdcMtlState(weights, router, opt_state)

    return link(init_fn, update_fn, num_tasks)


def _pooled(features: jax.Array | None, width: int) -> jax.Array:
    """The features of a batch as one vector."""
    if not width:
        return jnp.zeros(0, jnp.float32)
    if features is None:
        raise TypeError(
            f"ldc_mtl got no features=, expected an array (..., {width}) for its router: call "
            "tx.update(jac, opt_state, params, features=h), or build it without num_features"
        )
    if jnp.shape(features)[-1:] != (width,):
        raise ValueError(
            f"features= has shape {jnp.shape(features)}, expected (..., {width}): num_features is "
            "the size of their last axis"
        )
    features = jax.lax.stop_gradient(jnp.asarray(features, jnp.float32))
    return jnp.mean(features.reshape(-1, width), axis=0)


ldc_mtl = summed(scale_by_ldc_mtl)
