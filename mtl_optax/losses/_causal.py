"""Causal weights: a stretch of time counts once those before it are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mtl_optax._numerics import wide
from mtl_optax._options import check_option

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def causal_weights(
    losses: Float[ArrayLike, "*batch C"], *, tolerance: ArrayLike = 1.0
) -> Float[Array, "*batch C"]:
    r"""Weights the losses of C stretches of time by how well the earlier ones are learned.

    .. math:: w_c = \exp\Big(-\epsilon \sum_{b < c} L_b\Big)

    for the loss `jnp.mean(weights * losses)`. The first weight is 1; the last tells when a training
    is done: the authors raise the tolerance, from 0.01 to 100, each time it exceeds 0.99. The
    weights are constants under differentiation and have no state.

    Args:
      losses: the mean squared residual of each stretch, in the order of time, `(..., C)`. Of points
        that are sorted by time it is `jnp.mean(residuals.reshape(C, -1) ** 2, axis=1)`. The loss of
        the initial condition may stand first.
      tolerance: ε, in one over the unit of the losses, >= 0; larger waits longer, 0 not at all.

    Returns:
      `(..., C)`, in the type of the losses, if that is floating.

    Raises:
      ValueError: if the losses are a scalar, or `tolerance` is not at least 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> weights = mtl.losses.causal_weights(jnp.array([0.1, 2.0, 3.0]))
      >>> [round(w, 4) for w in weights.tolist()]
      [1.0, 0.9048, 0.1225]

    References:
      Wang, Sankaran and Perdikaris, `Respecting causality is all you need for training
      physics-informed neural networks <https://arxiv.org/abs/2203.07404>`_, 2022.
    """
    check_option("tolerance", tolerance, lambda t: t >= 0, "at least 0")
    losses, tolerance = jnp.asarray(losses), jnp.asarray(tolerance)
    losses = jax.lax.stop_gradient(losses.astype(jnp.result_type(float, losses)))
    if losses.ndim == 0:
        raise ValueError("losses is a scalar, expected (..., C): one loss a stretch of time")
    before = jnp.cumsum(losses[..., :-1], axis=-1, dtype=wide(losses.dtype))
    zero = jnp.zeros_like(losses[..., :1], before.dtype)
    before = jnp.concatenate([zero, before], axis=-1)  # exclusive, without inf - inf
    waits = jnp.where(tolerance > 0, tolerance * before, 0)  # also for what is infinite
    return jnp.exp(-waits).astype(losses.dtype)
