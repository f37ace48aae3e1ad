"""The shortest convex combination of rows: the program behind MGDA and PE-LTR."""

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax.solvers import simplex_qp


def min_norm_weights(
    products: jax.Array,
    scales: jax.Array,
    present: jax.Array,
    floors: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Solves min ‖Σ w_k g_k‖² over Σ w = 1, w >= floors.

    Args:
      products: `(K, K)`, M of the Gramian diag(s) M diag(s), as `Jacobian.scaled_gramian` gives it.
      scales: `(K,)`, s.
      present: `(K,)` bool, the rows that there are; the others have the weight 0.
      floors: `(K,)` or a number.

    Returns:
      `(weights, solved)`; where not solved, the room above the floors is shared evenly.
    """
    gramian = relative_gramian(products, jnp.where(present, scales, 0))
    floors = jnp.where(present, floors, 0).astype(scales.dtype)
    result = simplex_qp(gramian, floors=floors, present=present)
    even = floors + divide(1 - jnp.sum(floors), jnp.sum(present))
    # Non-finite rows leave a solution that is not one; comparing says so.
    solved = result.converged & jnp.all(jnp.isfinite(result.x))
    return jnp.where(solved, result.x, jnp.where(present, even, 0)), solved


def relative_gramian(products: jax.Array, scales: jax.Array) -> jax.Array:
    """The Gramian up to a common factor, where its own entries might overflow."""
    relative = divide(scales, jnp.max(scales), scales)
    return products * (relative[:, None] * relative[None, :])


def project_on_simplex(
    x: jax.Array, present: jax.Array, total: jax.Array | float = 1.0
) -> jax.Array:
    """The nearest point with x >= 0 and Σ x = total whose absent entries are 0."""
    # Optax counts in the default type, which its derivative of another one would not have.
    masked = jnp.where(present, x, -jnp.inf).astype(jnp.result_type(float))
    return optax.projections.projection_simplex(masked, total).astype(x.dtype)
