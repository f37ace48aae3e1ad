"""GradNorm: learn weights that make the tasks train at similar rates."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import check_num_tasks, check_option, per_task
from mtl_optax._typing import TaskOption
from mtl_optax._usable import step_each
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask

# A weight at 0 would have no gradient norm left to come back with.
_SMALLEST_WEIGHT = 1e-6


class GradnormState(NamedTuple):
    """State of `scale_by_gradnorm`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    next_weights: Annotated[PerTask, 1.0]  # (K,) float32, what is learned: positive, sum K
    initial_losses: PerTask  # (K,) float32, L(0), 0 until a positive loss is seen
    opt_state: PerTask  # of the optimizer of each weight
    unusable: PerTask  # (K,) int32, updates in which its loss was not positive or not finite


def scale_by_gradnorm(
    num_tasks: int,
    *,
    alpha: float | jax.Array = 1.5,
    optimizer: optax.GradientTransformation | None = None,
    initial_losses: TaskOption | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns weights that bring all weighted gradient norms to a common, rate-adjusted scale.

    .. math:: G_k = w_k n_k, \quad r_k = \frac{L_k / L_k(0)}{\mathrm{mean}_j\, L_j / L_j(0)}, \quad
              \min_w \sum_k \left|G_k - \mathrm{sg}(\bar G\, r_k^\alpha)\right|

    where :math:`n_k` is the gradient norm of task k. The target is held fixed, so the gradient is
    :math:`\mathrm{sign}(G_k - \bar G r_k^\alpha)\, n_k`: no second derivative, only the diagonal of
    the Gramian. An update uses w(t); then w takes a step of its own optimizer, is kept positive and
    rescaled to sum to K. With frozen norms and :math:`\alpha = 1` it settles at
    :math:`w_k \propto r_k / n_k`.

    Losses must be positive: a task whose loss is 0, negative or not finite has no rate, so it stays
    out of the means and keeps its weight, as an absent task does, and `unusable` counts it. The
    weights of the others sum to the rest of K.

    The paper measures the norms at the last shared layer: pass it as `gramian_at=` to
    `value_and_jac`, which also makes this cheap.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      alpha: strength of the pull towards equal training rates, >= 0; larger for more different
        tasks.
      optimizer: updates w; `optax.adam(0.025)` with a tiny `eps` by default, as in the paper.
      initial_losses: L(0), positive, one for all or a tree like the losses, such as log C for a
        task of C classes; None, for all or for a task in the tree, is its first loss that is
        positive and finite: `{"class": math.log(10), "reg": None}`.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like (weights sum to K).

    Raises:
      ValueError: if `num_tasks` < 1, `alpha` < 0, an initial loss is not positive, or the losses
        are not K.

    Examples:
      Fed by `jax.jacrev` over the shared parameters alone:

      >>> import jax, jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> def task_losses(shared):
      ...     return {"a": jnp.sum(shared**2), "b": 10 * jnp.sum((shared - 1) ** 2)}
      >>> shared = jnp.array([2.0, 3.0])
      >>> tx = optax.chain(mtl.gradnorm(num_tasks=2), optax.sgd(0.01))
      >>> opt_state = tx.init(shared)
      >>> grads = jax.jacrev(task_losses)(shared)
      >>> updates, opt_state = tx.update(grads, opt_state, shared, losses=task_losses(shared))
      >>> [round(w, 3) for w in optax.tree.get(opt_state, "next_weights").tolist()]
      [1.025, 0.975]

    References:
      Chen et al., `GradNorm <https://arxiv.org/abs/1711.02257>`_, 2018, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_option("alpha", alpha, lambda a: a >= 0, "at least 0")
    not_below = lambda loss: ~(loss <= 0)  # noqa: E731, NaN passes
    check_option("initial_losses", initial_losses, not_below, "positive losses", each=True)
    # Adam's own eps of 1e-8 would slow the weights down where gradient norms are small.
    optimizer = optimizer or optax.adam(0.025, eps=1e-15)

    def init_fn(params):
        del params
        w = jnp.ones(num_tasks, jnp.float32)
        return GradnormState(
            weights=w,
            next_weights=w,
            initial_losses=jnp.zeros(num_tasks, jnp.float32),
            opt_state=jax.vmap(optimizer.init)(w),
            unusable=jnp.zeros(num_tasks, jnp.int32),
        )

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss = jacobian.loss_vector().astype(jnp.float32)
        positive = (loss > 0) & jnp.isfinite(loss)
        first = jnp.where(positive, loss, 0)
        known = per_task("initial_losses", initial_losses, jacobian, jnp.nan).astype(jnp.float32)
        first = jnp.where(jnp.isnan(known), first, known)
        initial = jnp.where(state.initial_losses > 0, state.initial_losses, first)

        w = state.next_weights
        norms = jacobian.norms().astype(jnp.float32)
        usable = positive & jnp.isfinite(norms) & (initial > 0)
        progress = jnp.where(usable, loss / initial, 0)
        rate = progress / _mean(progress, usable)
        weighted = jnp.where(usable, w * norms, 0)
        target = _mean(weighted, usable) * rate**alpha
        gradient = jnp.sign(weighted - target) * norms
        next_w, opt_state = step_each(optimizer, state.opt_state, w, gradient, usable)
        next_w = jnp.maximum(next_w, _SMALLEST_WEIGHT)
        # Those that moved share what the others leave of K.
        room = jnp.maximum(num_tasks - jnp.sum(jnp.where(usable, 0, w)), _SMALLEST_WEIGHT)
        total = jnp.sum(jnp.where(usable, next_w, 0))
        next_w = jnp.where(usable, divide(room * next_w, total), w)
        new_state = GradnormState(w, next_w, initial, opt_state, state.unusable + ~positive)
        return jacobian.scale(w), new_state

    return link(init_fn, update_fn, num_tasks)


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
    """The mean over the usable tasks, 1 where it would be 0."""
    mean = jnp.sum(x) / jnp.maximum(jnp.sum(where), 1)
    return jnp.where(mean > 0, mean, 1)


gradnorm = summed(scale_by_gradnorm)
