"""Balanced residual decay rate: more weight where the residual decays slowly."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mtl_optax._numerics import divide
from mtl_optax._options import BELOW_ONE, check_option
from mtl_optax.losses._points import PointWeights, in_types_of, sizes, start


class BrdrState(NamedTuple):
    """State of `brdr`."""

    weights: Any  # like the residuals, at least float32
    squares: Any  # like the residuals: root of the running mean of r⁴, not debiased
    count: jax.Array  # () int32, updates so far


def brdr(*, decay: ArrayLike = 0.999, residual_decay: ArrayLike = 0.999) -> PointWeights:
    r"""Weights each point by how slowly its residual decays, 1 on average over all points.

    .. math:: m_i \leftarrow \beta_c m_i + (1 - \beta_c) r_i^4, \quad
              \rho_i = \frac{r_i^2}{\sqrt{m_i / (1 - \beta_c^t)}}, \quad
              w_i \leftarrow \beta_w w_i + (1 - \beta_w) \frac{\rho_i}{\mathrm{mean}(\rho)}

    The inverse decay rate ρ is 1 for a residual that stays as it was, less for one that falls. Its
    mean is over the points of all arrays in a tree of residuals: give the equation's and the
    boundary's to one rule, so that they balance each other.

    Args:
      decay: :math:`\beta_w` in [0, 1).
      residual_decay: :math:`\beta_c` in [0, 1).

    Returns:
      Two functions, `init` and `update`.

    Raises:
      TypeError: by `init` and `update`, if the residuals are not floating.
      ValueError: if a decay is not in [0, 1); by `update`, if the residuals have other shapes than
        `init` saw.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> rule = mtl.losses.brdr(decay=0.5, residual_decay=0.5)
      >>> state = rule.init({"pde": jnp.ones(2)})
      >>> for fast in (1.0, 0.1):
      ...     weights, state = rule.update({"pde": jnp.array([fast, 1.0])}, state)
      >>> [round(w, 2) for w in weights["pde"].tolist()]
      [0.52, 1.48]

    Differs from:
      The paper also multiplies the whole loss by a factor that keeps the learning rate at its
      largest stable value. That is the optimizer's: it is left out.

    References:
      Chen, Howard and Stinis, `Self-adaptive weights based on balanced residual decay rate
      <https://arxiv.org/abs/2407.01613>`_, 2024.
    """
    for name, value in (("decay", decay), ("residual_decay", residual_decay)):
        check_option(name, value, *BELOW_ONE)

    def init(residuals):
        count = jnp.zeros([], jnp.int32)
        return BrdrState(start(residuals, 1.0), start(residuals, 0.0), count)

    def update(residuals, state):
        def squared(size):
            return jnp.minimum(size**2, jnp.finfo(size.dtype).max / 4)  # room for their hypotenuse

        square = jax.tree.map(squared, sizes(residuals, state.weights))
        count = state.count + 1
        old, new = jnp.sqrt(residual_decay), jnp.sqrt(1 - jnp.asarray(residual_decay))
        # The root is kept: r⁴ would leave the range of float32 long before r² does.
        squares = jax.tree.map(
            lambda m, s: jnp.hypot(old * m, new * s).astype(m.dtype), state.squares, square
        )
        debias = jnp.sqrt(1 - residual_decay ** count.astype(jnp.float32))
        rates = jax.tree.map(lambda s, m: divide(s, m) * debias, square, squares)
        leaves = jax.tree.leaves(rates)
        mean = jnp.mean(jnp.concatenate([jnp.ravel(rate) for rate in leaves]))
        weights = jax.tree.map(
            lambda w, rate: (decay * w + (1 - decay) * divide(rate, mean, 1)).astype(w.dtype),
            state.weights,
            rates,
        )
        return in_types_of(residuals, weights), BrdrState(weights, squares, count)

    return PointWeights(init, update)
