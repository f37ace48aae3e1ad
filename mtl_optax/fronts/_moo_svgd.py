"""MOO-SVGD: n models that descend to the front and push each other apart along it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._min_norm import min_norm_weights
from mtl_optax._numerics import divide, power_of_two
from mtl_optax._options import check_option
from mtl_optax.fronts._set import set_link
from mtl_optax.jacobian._rows import mix


class MooSvgdState(NamedTuple):
    """State of `moo_svgd`."""

    weights: jax.Array  # (n, K) float32, of the min-norm points in the last update
    bandwidth: jax.Array  # () float32, of the last update


def moo_svgd(
    num_tasks: int,
    *,
    bandwidth: float | jax.Array | None = None,
    repulsion: float | jax.Array = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Stein variational gradient descent with a min-norm gradient in place of a score.

    .. math:: d_i = \frac1n \sum_j \Big( k(L_i, L_j)\, g^*_j
              + c \sqrt h\, \nabla_{\theta_i} k(L_i, L_j) \Big), \quad
              k(L, L') = \exp\big(- \|L - L'\|^2 / h\big)

    with :math:`g^*_j` the rows of model j, combined as by `mtl.mgda` with `normalize="l2"`. It
    vanishes on the front, where only the push of models with similar losses is left. That push is
    also off the front: `hypervolume_gradient` covered each front better that we measured. A
    model whose losses or gradients are not finite is not seen by the others.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      bandwidth: h, in the unit of the losses, squared: how near models are that see each other. The
        square of the distance that they should keep is a good one. By default the median of the
        squared distances over n, which follows the set.
      repulsion: c, unitless; models that push too hard stay above the front.

    Returns:
      A link from the stacked Jacobians of n models,
      ``jax.vmap(mtl.value_and_jac(loss_fn))(params)``, to n gradients. Update scale: free.

    Raises:
      TypeError: if `num_tasks` is no Python int; by `update`, if it got no Jacobian, or `present`
        is not of bools.
      ValueError: if `num_tasks` < 1, `bandwidth` is not above 0 or `repulsion` not at least 0; by
        `init` and `update`, if the models are not stacked; by `update`, if the losses are not K.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> def task_losses(x):
      ...     return {"near": x**2, "far": (x - 1) ** 2}
      >>> x = jnp.array([0.45, 0.55])
      >>> tx = mtl.fronts.moo_svgd(2)
      >>> @jax.jit
      ... def step(x, state):
      ...     losses, jac = jax.vmap(mtl.value_and_jac(task_losses))(x)
      ...     return tx.update(jac, state, x)
      >>> update, state = step(x, tx.init(x))
      >>> bool(update[0] > 0 > update[1])  # apart: descent subtracts
      True

    Differs from:
      The authors' code fixes the width of the kernel by a number tuned to ZDT, and normalises each
      coordinate of the rows over the set before it solves. Its factor c has the unit of the losses,
      1; times the root of h, an update does not depend on that unit. The paper writes the push as
      the gradient over :math:`\theta_j`; for a kernel of losses, the code takes the one above.

    References:
      Liu, Tong and Liu, `Profiling Pareto Front With Multi-Objective Stein Variational Gradient
      Descent <https://openreview.net/forum?id=S2-j0ZegyrE>`_, NeurIPS 2021.
    """
    if bandwidth is not None:
        check_option("bandwidth", bandwidth, lambda h: h > 0, "more than 0")
    check_option("repulsion", repulsion, lambda c: c >= 0, "at least 0")

    def init_fn(num_models):
        weights = jnp.full((num_models, num_tasks), 1 / num_tasks, jnp.float32)
        return MooSvgdState(weights, jnp.zeros([], jnp.float32))

    def update_fn(jacobians, state):
        del state

        def shortest(jac):
            cosines, norms = jac.correlation()
            weights, _ = min_norm_weights(cosines, jnp.sign(norms), jac.present)
            return weights, jac.combine(weights), jac.loss_vector()

        weights, descents, losses = jax.vmap(shortest)(jacobians)
        n, finite = len(losses), jnp.all(jnp.isfinite(losses), axis=1)
        for descent in jax.tree.leaves(descents):
            finite &= jnp.all(jnp.isfinite(descent), axis=tuple(range(1, descent.ndim)))
        seen = finite[:, None] & finite[None]
        apart = jnp.where(seen[..., None], losses[:, None] - losses[None], 0)
        count = jnp.maximum(jnp.sum(finite), 1)
        if bandwidth is None:  # the square of a loss may be out of range
            unit = power_of_two(jnp.max(jnp.abs(apart)))
            squares = jnp.where(seen, jnp.sum((apart / unit) ** 2, axis=2), jnp.nan)
            root = unit * jnp.sqrt(jnp.nanmedian(squares) / count)
        else:
            root = jnp.sqrt(jnp.asarray(bandwidth, losses.dtype))
        apart = divide(apart, root)
        kernel = jnp.where(seen, jnp.exp(-jnp.sum(apart**2, axis=2)), 0)
        slopes = -2 * jnp.sum(kernel[..., None] * apart, axis=1)
        pushes = jax.vmap(lambda jac, w: jac.pullback(w))(jacobians, repulsion * slopes)

        def mixed(descent, push):
            alone = (n,) + (1,) * (descent.ndim - 1)
            descent = jnp.where(finite.reshape(alone), descent, 0)
            drawn = mix(kernel, descent)
            return ((drawn + push) / count).astype(descent.dtype)

        return jax.tree.map(mixed, descents, pushes), MooSvgdState(
            weights.astype(jnp.float32), (root**2).astype(jnp.float32)
        )

    return set_link(num_tasks, init_fn, update_fn)
