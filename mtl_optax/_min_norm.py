"""The shortest convex combination of rows: the program behind MGDA and PE-LTR."""

import jax
import jax.numpy as jnp

from mtl_optax._numerics import divide
from mtl_optax.solvers import simplex_qp


def min_norm_weights(
    products: jax.Array, scales: jax.Array, floors: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Solves min ‖Σ w_k g_k‖² over Σ w = 1, w >= floors.

    Args:
      products: `(K, K)`, M of the Gramian diag(s) M diag(s), as `Jacobian.scaled_gramian` gives it.
      scales: `(K,)`, s.
      floors: `(K,)` or a number.

    Returns:
      `(weights, solved)`; where not solved, the room above the floors is shared evenly.
    """
    gramian = relative_gramian(products, scales)
    floors = jnp.broadcast_to(floors, scales.shape)
    result = simplex_qp(gramian, floors=floors)
    even = floors + (1 - jnp.sum(floors)) / floors.size
    # Non-finite rows leave a solution that is not one; comparing says so.
    solved = result.converged & jnp.all(jnp.isfinite(result.x))
    return jnp.where(solved, result.x, even), solved


def relative_gramian(products: jax.Array, scales: jax.Array) -> jax.Array:
    """The Gramian up to a common factor, where its own entries might overflow."""
    relative = divide(scales, jnp.max(scales), scales)
    return products * (relative[:, None] * relative[None, :])
