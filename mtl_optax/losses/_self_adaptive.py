"""Self-adaptive weights: the loss is minimised over parameters, maximised over weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.losses._points import PointWeights, in_types_of, sizes, start

# An optimizer such as Adam squares the gradient, of squares, and an infinite average is infinite
# for good.
_LARGEST = 1e9


class SelfAdaptiveState(NamedTuple):
    """State of `self_adaptive`."""

    multipliers: Any  # like the residuals, at least float32: λ
    opt_state: Any  # of the optimizer that lets λ ascend


def self_adaptive(
    *,
    optimizer: optax.GradientTransformation | None = None,
    mask: Callable[[jax.Array], jax.Array] = jnp.square,
    initial: Any = 1.0,
) -> PointWeights:
    r"""Weights each point by a number that ascends the loss while the parameters descend it.

    .. math:: w_i = m(\lambda_i), \quad
              \lambda_i \leftarrow \lambda_i + \mathrm{opt}\big(m'(\lambda_i)\, r_i^2 / N\big)

    with :math:`m(\lambda) = \lambda^2` by default: the loss, the mean of :math:`w r^2`, is that of
    :math:`(\lambda r)^2`. Its gradients over parameters and weights are taken at the same λ; the
    slope over λ needs no differentiation of the model. The weights have no upper bound.

    Args:
      optimizer: descends minus the loss; `optax.adam(5e-3)` by default.
      mask: m, elementwise, not negative and increasing, such as `jax.nn.softplus`.
      initial: the first λ, one for all points or a tree of arrays like the residuals. The paper
        draws them, as by `jax.random.uniform(key, residuals.shape)`.

    Returns:
      Two functions, `init` and `update`.

    Raises:
      TypeError: by `init` and `update`, if the residuals are not floating.
      ValueError: by `init`, if `initial` does not fit the residuals; by `update`, if they have
        other shapes than `init` saw.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> rule = mtl.losses.self_adaptive()
      >>> residuals = jnp.array([0.1, 2.0])
      >>> state = rule.init(residuals)
      >>> for _ in range(2):
      ...     weights, state = rule.update(residuals, state)
      >>> [round(w, 4) for w in weights.tolist()]
      [1.01, 1.01]

    Differs from:
      The paper starts from random λ; here all start alike, so that a run says what it depends on.

    References:
      McClenny and Braga-Neto, `Self-Adaptive Physics-Informed Neural Networks using a Soft
      Attention Mechanism <https://arxiv.org/abs/2009.04544>`_, 2020.
    """
    opt = optax.adam(5e-3) if optimizer is None else optimizer

    def init(residuals):
        multipliers = start(residuals, initial)
        return SelfAdaptiveState(multipliers, opt.init(multipliers))

    def update(residuals, state):
        weights, slope = jax.vjp(lambda m: jax.tree.map(mask, m), state.multipliers)
        bounded = jax.tree.map(
            lambda s: jnp.minimum(s, _LARGEST), sizes(residuals, state.multipliers)
        )
        (down,) = slope(jax.tree.map(lambda s: -(s**2) / s.size, bounded))
        steps, opt_state = opt.update(down, state.opt_state, state.multipliers)
        multipliers = optax.apply_updates(state.multipliers, steps)
        return in_types_of(residuals, weights), SelfAdaptiveState(multipliers, opt_state)

    return PointWeights(init, update)
