"""Residual-based attention: more weight where the residual has been large."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mtl_optax._numerics import divide
from mtl_optax._options import UP_TO_ONE, check_option
from mtl_optax.losses._points import PointWeights, in_types_of, sizes, start


class RbaState(NamedTuple):
    """State of `rba`."""

    multipliers: Any  # like the residuals, at least float32: λ


def rba(
    *, decay: ArrayLike = 0.999, learning_rate: ArrayLike = 0.001, initial: Any = 0.0
) -> PointWeights:
    r"""Weights each point by a running sum of its residual, relative to the largest.

    .. math:: \lambda_i \leftarrow \gamma \lambda_i + \eta \frac{|r_i|}{\max_j |r_j|}, \quad
              w_i = \lambda_i^2

    so that the loss, the mean of :math:`w r^2`, is that of :math:`(\lambda r)^2`. Each array of a
    tree of residuals has a maximum of its own. From below, λ never exceeds
    :math:`\eta / (1 - \gamma)`, 1 by default.

    Args:
      decay: γ, from 0 to 1.
      learning_rate: η, more than 0; unitless.
      initial: the first λ, one for all points or a tree of arrays like the residuals.

    Returns:
      Two functions, `init` and `update`.

    Raises:
      TypeError: by `init` and `update`, if the residuals are not floating.
      ValueError: if `decay` or `learning_rate` is out of range; by `init`, if `initial` does not
        fit the residuals; by `update`, if they have other shapes than `init` saw.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> rule = mtl.losses.rba(decay=0.9, learning_rate=0.1)
      >>> def task_losses(w, x, state):
      ...     residuals = w * x - x**2
      ...     weights, state = rule.update(residuals, state)
      ...     return {"pde": jnp.mean(weights * residuals**2), "edge": w**2}, state
      >>> x = jnp.array([1.0, 2.0])
      >>> (losses, state), jac = mtl.value_and_jac(task_losses, has_aux=True)(0.0, x, rule.init(x))
      >>> [round(m, 4) for m in state.multipliers.tolist()]
      [0.025, 0.1]

    References:
      Anagnostopoulos et al., `Residual-based attention in physics-informed neural networks
      <https://arxiv.org/abs/2307.00379>`_, 2023, algorithm 1.
    """
    check_option("decay", decay, *UP_TO_ONE)
    check_option("learning_rate", learning_rate, lambda r: r > 0, "more than 0")

    def init(residuals):
        return RbaState(start(residuals, initial))

    def update(residuals, state):
        def step(multiplier, size):
            relative = divide(size, jnp.max(size, initial=0))
            return (decay * multiplier + learning_rate * relative).astype(multiplier.dtype)

        multipliers = jax.tree.map(step, state.multipliers, sizes(residuals, state.multipliers))
        weights = in_types_of(residuals, jax.tree.map(jnp.square, multipliers))
        return weights, RbaState(multipliers)

    return PointWeights(init, update)
