"""Rows of comparable size, by their norms or their losses."""

from typing import Literal

import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide
from mtl_optax._options import check_choice
from mtl_optax.links import link

KINDS = ("l2", "loss", "loss+", "max")


def normalize_tasks(
    kind: Literal["l2", "loss", "loss+", "max"] = "l2",
) -> optax.GradientTransformationExtraArgs:
    r"""Divides each row by its norm, its loss, or both.

    .. math:: g_k \to g_k / \|g_k\|, \quad g_k / L_k, \quad g_k / (L_k \|g_k\|), \quad
              g_k \max_j \|g_j\| / \|g_k\|

    for `"l2"`, `"loss"`, `"loss+"` and `"max"`. Losses are divided alike. Norms are those of the
    Gramian (the shared parameters, or where `gramian_at` says); whole rows are scaled, heads too. A
    row of norm 0 stays as it is, and nothing is divided by a loss that is not positive.

    Args:
      kind: one of the four. `"loss"` costs no backward pass; the losses of `"loss"` and `"loss+"`
        must be positive.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: unit-like for `"l2"`, that of the largest
      row for `"max"`, else free.

    Raises:
      ValueError: if `kind` is none of the four.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.ones(2))
      >>> tx = mtl.normalize_tasks("max")
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> jac.rows().round(4).tolist()
      [[3.0, 4.0], [0.0, 5.0]]
    """
    check_choice("kind", kind, KINDS)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        weights = jnp.ones(jacobian.num_tasks, jacobian.dtype)
        if kind != "loss":
            norms = jacobian.norms()
            length = jnp.max(jnp.where(jnp.isfinite(norms), norms, 0)) if kind == "max" else 1
            # Norm over norm: the product of the largest and an inverse may leave the range.
            weights = divide(length, norms, 1)
        if kind in ("loss", "loss+"):
            loss = jacobian.loss_vector()
            weights = bounded(divide(weights, loss, weights))
        return jacobian.scale(weights), state

    return link(optax.init_empty_state, update_fn)
