"""GradCraft: gradients of like size, each freed of all its conflicts at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide
from mtl_optax._options import BELOW_ONE, UP_TO_ONE, check_num_tasks, check_option
from mtl_optax.aggregators._base import pseudo_solve, relative_norms, towards
from mtl_optax.links import link, running_mean
from mtl_optax.states import PerTask


class GradcraftState(NamedTuple):
    """State of `gradcraft`."""

    weights: PerTask  # (K,) float32, of the rows in the last update
    norms: PerTask  # (K,) float32, averages, not debiased
    masses: PerTask  # (K,) float32, the weights of all norms in them
    fallbacks: jax.Array  # () int32, updates with weights that are not finite: the plain mean


def gradcraft(
    num_tasks: int,
    *,
    relax_factor: float | jax.Array = 0.1,
    margin: float | jax.Array = 1e-10,
    decay: float | jax.Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Brings the rows towards the largest norm, projects each off all its conflicts, averages.

    .. math:: m_k \leftarrow \beta m_k + (1 - \beta) \|g_k\|, \quad
              a_k = \Big(r \frac{\max_j m_j}{m_k} + 1 - r\Big)\, g_k

    .. math:: v_i = a_i + A_i^\top (A_i A_i^\top)^+ (\epsilon \|a_i\| \|a_j\| -
              \langle a_i, a_j\rangle)_j, \quad d = \frac1K \sum_i v_i

    where the rows of :math:`A_i` are all the j with :math:`\langle a_i, a_j\rangle < 0`. PCGrad
    takes them one after the other, so the later ones bring the earlier conflicts back; here each
    :math:`v_i` ends up at the cosine ε, or about, to all of them, in no order. It costs the Gramian
    and no more. Rows of zero length change nothing.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      relax_factor: r in [0, 1]: 1 makes all norms equal, 0 leaves them. The paper tunes it.
      margin: epsilon >= 0, the positive cosine that is asked for, before the change of length.
      decay: beta in [0, 1), weight of the past in the norms; 0 in the authors' runs.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like, of rows raised towards the
      largest.

    Raises:
      ValueError: if `num_tasks` < 1, an option is out of range, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[1.0, 0.0], [-3.0, 4.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(2))
      >>> tx = mtl.gradcraft(num_tasks=2, relax_factor=1.0)
      >>> update, state = tx.update(jac, tx.init(jnp.zeros(2)))
      >>> [round(x, 4) for x in update.tolist()]
      [1.6, 3.2]

    Differs from:
      The authors' code inverts :math:`A_i A_i^\top`, which has no inverse for dependent rows. It
      takes trunk and head together for one row, so that the heads have a say in the norms and are
      weighed too, K times as much as the trunk.

    References:
      Bai et al., `GradCraft: Elevating Multi-task Recommendations through Holistic Gradient
      Crafting <https://arxiv.org/abs/2407.19682>`_, KDD 2024.
    """
    check_num_tasks(num_tasks)
    check_option("relax_factor", relax_factor, *UP_TO_ONE)
    check_option("margin", margin, lambda e: e >= 0, "at least 0")
    check_option("decay", decay, *BELOW_ONE)

    def init_fn(params):
        del params
        zeros = jnp.zeros(num_tasks, jnp.float32)
        return GradcraftState(zeros + 1 / num_tasks, zeros, zeros, jnp.zeros([], jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        cosines, norms = jacobian.correlation()
        present = jacobian.present
        mean, sums, masses = running_mean(norms, state.norms, state.masses, decay, present)
        largest = jnp.max(jnp.where(present, mean, 0))
        relative = relative_norms(norms)
        lengths = relative * towards(largest, mean, relax_factor).astype(norms.dtype)

        def freed(length, cosine):
            """The coefficients of the unit rows in one row freed of its conflicts, less itself."""
            conflict = cosine < 0
            among = jnp.where(conflict[:, None] & conflict[None, :], cosines, 0)
            lift, _ = pseudo_solve(among, jnp.where(conflict, margin - cosine, 0))
            return length * lift

        total = lengths + jnp.sum(jax.vmap(freed)(lengths, cosines), axis=0)
        weights = divide(total, relative, total) / jacobian.num_present
        solved = jnp.all(jnp.isfinite(weights))
        weights = jnp.where(solved, weights, 1 / jacobian.num_present)
        new_state = GradcraftState(
            bounded(weights, jnp.float32), sums, masses, state.fallbacks + ~solved
        )
        return jacobian.combine(weights), new_state

    return link(init_fn, update_fn, num_tasks)
