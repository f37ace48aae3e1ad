"""Krum: the gradient that its neighbours vouch for."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from mtl_optax._min_norm import relative_gramian
from mtl_optax._options import check_count, check_num_tasks, check_option
from mtl_optax.links import link
from mtl_optax.states import PerTask


class KrumState(NamedTuple):
    """State of `krum`."""

    weights: PerTask  # (K,) float32, of the last update


def krum(
    num_tasks: int, *, num_byzantine: int = 0, num_selected: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the rows that lie closest to their neighbours.

    .. math:: s_k = \sum_{j \in N_k} \|g_k - g_j\|^2, \quad
              d = \frac1m \sum_{k \in S} g_k

    :math:`N_k` are the K - f - 2 rows nearest to row k, S the m rows of the least scores. Up to f
    rows may be anything. A row that is not finite is never selected nor a neighbour. Rows of equal
    score are selected together, so that the order of the tasks has no say (with f = 0 and K = 3 the
    two nearest always tie). K counts the tasks present: where they are so few that f leaves no
    neighbour, each has one.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      num_byzantine: f, the rows not to be trusted; static, at most K - 3.
      num_selected: m, the rows to average; static, in [1, K].

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like (weights sum to 1).

    Raises:
      ValueError: if `num_tasks` < 1, the other two are out of range, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[1.0, 0.0], [1.0, 0.2], [0.9, 0.1], [-50.0, 9.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(2))
      >>> tx = mtl.krum(num_tasks=4, num_byzantine=1, num_selected=3)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(2)))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.3333, 0.3333, 0.3333, 0.0]

    Differs from:
      The paper requires 2f + 2 < K for its guarantee; here any f that leaves a neighbour. With
      fewer than three tasks, where none is left, all are averaged.

    References:
      Blanchard et al., `Machine Learning with Adversaries <https://arxiv.org/abs/1703.02757>`_,
      2017, section 4.
    """
    check_num_tasks(num_tasks)
    check_count("num_byzantine", num_byzantine, least=0)
    check_option(
        "num_byzantine", num_byzantine, lambda f: f <= max(num_tasks - 3, 0),
        f"at most num_tasks - 3 = {num_tasks - 3}: each row needs a neighbour",
    )  # fmt: skip
    check_count("num_selected", num_selected)
    check_option("num_selected", num_selected, lambda m: m <= num_tasks, f"at most {num_tasks}")

    def init_fn(params):
        del params
        return KrumState(jnp.ones(num_tasks, jnp.float32) / num_tasks)

    def update_fn(jacobian, state, **extra_args):
        del state, extra_args
        products, scales = jacobian.scaled_gramian()
        finite = jacobian.present & jnp.isfinite(jnp.diagonal(products) * scales)
        gramian = relative_gramian(products, jnp.where(finite, scales, 0))
        square = jnp.diagonal(gramian)
        # Symmetric to the last bit, or mutual neighbours would not tie.
        inner = (gramian + gramian.T) / 2
        distances = jnp.maximum(square[:, None] + square[None, :] - 2 * inner, 0)
        apart = ~finite[:, None] | ~finite[None, :] | jnp.eye(num_tasks, dtype=bool)
        nearest = jnp.sort(jnp.where(apart, jnp.inf, distances), axis=1)
        num_present = jnp.sum(jacobian.present)
        neighbours = jnp.maximum(num_present - num_byzantine - 2, num_present > 2)
        sums = jnp.sum(nearest, axis=1, where=jnp.arange(num_tasks) < neighbours)
        scores = jnp.where(finite, sums, jnp.inf)
        selected = finite & (scores <= jnp.sort(scores)[num_selected - 1])
        # None selected where no row is finite.
        weights = selected / jnp.maximum(jnp.sum(selected), 1).astype(scores.dtype)
        kept = jacobian.keep(finite)
        return kept.combine(weights), KrumState(weights.astype(jnp.float32))

    return link(init_fn, update_fn, num_tasks)
