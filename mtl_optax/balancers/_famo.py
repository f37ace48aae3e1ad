"""FAMO: decrease all losses at the same rate, at the cost of a plain step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import FINITE, check_num_tasks, check_option, per_task
from mtl_optax._typing import TaskOption
from mtl_optax._usable import positive_log, softmax_over, step_each
from mtl_optax.balancers._base import summed
from mtl_optax.jacobian import flatten_losses
from mtl_optax.links import link, present_tasks
from mtl_optax.states import PerTask


class FamoState(NamedTuple):
    """State of `scale_by_famo`."""

    weights: PerTask  # (K,) float32, of the last update
    logits: PerTask  # (K,) float32, xi, that the last update used
    opt_state: PerTask  # of the optimizer of each xi
    gaps: PerTask  # (K,) float32, losses above min_losses at the last update, 0 if unusable
    losses_after: PerTask  # (K,) float32, what observe_losses last brought
    observed: PerTask  # (K,) int32, 1 if it did since the last update
    unusable: PerTask  # (K,) int32, updates in which its loss was not above min_losses, or infinite

    def observe(self, losses_after: Any, present: Any = None) -> "FamoState":
        """The state that knows the losses after the last update: see `observe_losses`."""
        losses = flatten_losses(losses_after).astype(jnp.float32)
        if losses.shape != self.losses_after.shape:
            raise ValueError(
                f"losses_after has {losses.size} losses, expected {self.losses_after.size}: pass "
                "all losses of the same batch, as the loss function returns them"
            )
        seen = jnp.ones(losses.shape, bool)
        if present is not None:
            seen = present_tasks(present, losses_after)
        return self._replace(
            losses_after=jnp.where(seen, losses, self.losses_after),
            observed=jnp.where(seen, 1, self.observed),
        )


def scale_by_famo(
    num_tasks: int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    min_losses: TaskOption = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns weights under which all log losses fall equally fast.

    .. math:: \lambda_k = \frac{z_k / D_k}{\sum_j z_j / D_j}, \quad z = \mathrm{softmax}(\xi), \quad
              D_k = L_k - \min_k

    After an update, :math:`\xi` takes a step of its own optimizer along the gradient of
    :math:`\sum_k \mathrm{softmax}_k(\xi)\,(\log D_k^{before} - \log D_k^{after})`: a task that fell
    faster than the others loses weight.

    The losses after an update are by default those of the next one, on its own batch, which cost
    nothing. For the paper's exact method evaluate the losses again on the *same* batch with the new
    parameters and hand them over before the next update::

        opt_state = mtl.observe_losses(opt_state, task_losses(params, batch))

    The direction does not depend on the unit of any loss. Losses must be above `min_losses`: a
    task at or below its minimum, or whose loss is not finite, gets weight 0 while it is, keeps its
    :math:`\xi`, and `unusable` counts it. A task that was absent is compared with when it was last
    present; give NaN for it to `observe_losses`.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      optimizer: updates each xi; `chain(add_decayed_weights(1e-3), adam(0.025))` by default, as in
        the paper, where the decay is coupled and keeps the weights from drifting apart. Where they
        must go far apart to leave a valley, as on CAGrad's toy problem, use 1e-5.
      min_losses: the least value that each loss can take, in its unit, one for all tasks or a tree
        like the losses.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: mean-like (weights sum to 1).

    Raises:
      ValueError: if `num_tasks` < 1, `min_losses` are not finite, or they or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": 4 * w @ w})(jnp.ones(2))
      >>> tx = mtl.scale_by_famo(num_tasks=2)
      >>> _, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.8, 0.2]
      >>> state = mtl.observe_losses(state, {"a": 1.0, "b": 8.0})  # "a" fell faster
      >>> _, state = tx.update(jac, state)
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.7919, 0.2081]

    Differs from:
      The authors' code adds 1e-8 to D, which makes losses of about that size solved; here only 0
      is. It clips the gradient of the shared parameters to norm 1, which
      `optax.clip_by_global_norm(1.0)` behind `famo` does of all; its decay is 0.01 by default, the
      paper's 0.001.

    References:
      Liu et al., `FAMO: Fast Adaptive Multitask Optimization
      <https://arxiv.org/abs/2306.03792>`_, 2023, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_option("min_losses", min_losses, *FINITE, each=True)
    optimizer = optimizer or optax.chain(optax.add_decayed_weights(1e-3), optax.adam(0.025))

    def init_fn(params):
        del params
        logits = jnp.zeros(num_tasks, jnp.float32)
        return FamoState(
            weights=jnp.full(num_tasks, 1 / num_tasks, jnp.float32),
            logits=logits,
            opt_state=jax.vmap(optimizer.init)(logits),
            gaps=jnp.zeros(num_tasks, jnp.float32),
            losses_after=jnp.zeros(num_tasks, jnp.float32),
            observed=jnp.zeros(num_tasks, jnp.int32),
            unusable=jnp.zeros(num_tasks, jnp.int32),
        )

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss, present = jacobian.loss_vector(), jacobian.present
        least = per_task("min_losses", min_losses, jacobian, 0.0)
        before, was_usable = positive_log(state.gaps)
        observed = jnp.where(state.observed > 0, state.losses_after.astype(loss.dtype), loss)
        after, is_usable = positive_log((observed - least).astype(jnp.float32))

        z = softmax_over(present, state.logits, present)
        compared = was_usable & is_usable & present
        drop = jnp.where(compared, before - after, 0)
        share = jnp.where(compared, z, 0)
        mean_drop = jnp.sum(share * drop) / jnp.maximum(jnp.sum(share), jnp.finfo(z.dtype).tiny)
        # The softmax's Jacobian times the drops, a task without one standing at the others' mean.
        gradient = jnp.where(compared, z * (drop - mean_drop), 0)
        # There is nothing to learn from at the first update: decay and momentum wait too.
        logits, opt_state = step_each(
            optimizer, state.opt_state, state.logits, gradient, moves=compared
        )

        gap = loss - least
        log_gap, usable = positive_log(gap)
        weights = softmax_over(usable & present, logits - log_gap, present)
        new_state = FamoState(
            weights=weights.astype(jnp.float32),
            logits=logits,
            opt_state=opt_state,
            gaps=jnp.where(usable, gap, 0).astype(jnp.float32),
            losses_after=jnp.zeros_like(state.losses_after),
            observed=jnp.zeros_like(state.observed),
            unusable=state.unusable + ~usable,
        )
        return jacobian.scale(weights), new_state

    return link(init_fn, update_fn, num_tasks)


famo = summed(scale_by_famo)
