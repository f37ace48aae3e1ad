"""Smooth Tchebycheff scalarisation: descend a smooth maximum of the losses."""

from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax._options import (
    COUNT,
    FINITE,
    check_choice,
    check_num_tasks,
    check_option,
    check_preference,
    is_traced,
    per_task,
)
from mtl_optax._typing import TaskOption
from mtl_optax._usable import (
    bounded_exp,
    positive_log,
    softmax_over,
    softmax_when,
)
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask

KINDS = ("plain", "log")


class StchState(NamedTuple):
    """State of `scale_by_stch`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    nadir: PerTask  # (K,) float32, means of the positive losses of the window, 0 before
    nadir_count: PerTask  # (K,) int32, how many they are
    count: PerTask  # (K,) int32, updates so far
    unusable: PerTask  # (K,) int32, updates in which its loss could not be used


def scale_by_stch(
    num_tasks: int,
    *,
    mu: float | jax.Array = 0.1,
    preference: TaskOption = 1.0,
    reference: TaskOption = 0.0,
    kind: Literal["plain", "log"] = "plain",
    nadir: TaskOption | None = None,
    warmup: int | jax.Array = 1,
    window: int | jax.Array = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task so that their sum descends a smooth maximum of the losses.

    .. math:: S = K \mu \log\sum_k \exp\frac{p_k f_k}{\mu}, \quad
              \lambda_k = K p_k\, \mathrm{softmax}_k\!\left(\frac{p f}{\mu}\right)
              \frac{\partial f_k}{\partial L_k}

    with :math:`f = L - z` for `kind="plain"`, and :math:`f = \log(L / n)` for `"log"`, as the paper
    trains networks. Unlike a sum, a maximum reaches every Pareto-optimal point, where the front is
    not convex too; the preference p chooses which: at the optimum for small :math:`\mu`, all
    :math:`p_k f_k` are equal.

    The nadir n of `"log"` makes S free of the units of the losses. Unless given it is the mean of
    each loss over the last `window` steps of a warm-up, during which the sum of log L is descended;
    each task warms up in the first updates in which it is present.

    A task whose loss is not finite (for `"log"`: or not positive) gets weight 0, and `unusable`
    counts it.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      mu: smoothing, > 0, in the unit of the losses times the preference (unitless for `"log"`);
        smaller is closer to the maximum, larger to the sum.
      preference: p, >= 0, not all 0, one for all tasks or a tree like the losses. One that comes
        with an update as the extra argument `preference=` takes its place.
      reference: the ideal point z of `"plain"`, in the unit of the losses, in the same forms.
      kind: `"plain"` or `"log"`.
      nadir: n of `"log"`, positive, in the unit of the losses, in the same forms; there is no
        warm-up then.
      warmup: steps of warm-up, >= 1.
      window: steps averaged into the nadir, from 1 to `warmup`; the paper takes one epoch.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like for `"plain"` (weights sum to K
      for preferences of 1); free for `"log"`, like the sum of the log losses.

    Raises:
      ValueError: if `num_tasks` < 1, `mu` <= 0, a preference is negative or all are 0, `kind` is
        unknown, the nadir is not positive, 1 <= `window` <= `warmup` does not hold, or the losses
        are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.scale_by_stch(num_tasks=2, mu=1.0, reference={"a": 0.0, "b": 1.0})
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [1.4621, 0.5379]

    Differs from:
      The paper's S has no factor K, and its preferences sum to 1: 1/K for all at its mu is 1 for
      all at K mu.

    References:
      Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
      <https://arxiv.org/abs/2402.19078>`_, ICML 2024, eq. 7.
    """
    check_num_tasks(num_tasks)
    check_option("mu", mu, lambda m: m > 0, "more than 0")
    check_preference(preference)
    check_option("reference", reference, *FINITE, each=True)
    check_choice("kind", kind, KINDS)
    if nadir is not None:
        check_option("nadir", nadir, lambda n: n > 0, "positive losses", each=True)
    check_option("warmup", warmup, *COUNT)
    check_option("window", window, *COUNT)
    if not is_traced((warmup, window)) and np.asarray(window) > np.asarray(warmup):
        raise ValueError(
            f"window={window} is longer than warmup={warmup}, expected at most that: the nadir is "
            "averaged over the last steps of the warm-up"
        )
    usual_preference = preference

    def init_fn(params):
        del params
        return StchState(
            weights=jnp.ones(num_tasks, jnp.float32),
            nadir=jnp.zeros(num_tasks, jnp.float32),
            nadir_count=jnp.zeros(num_tasks, jnp.int32),
            count=jnp.zeros(num_tasks, jnp.int32),
            unusable=jnp.zeros(num_tasks, jnp.int32),
        )

    def update_fn(jacobian, state, *, preference=None, **extra_args):
        del extra_args
        usual = per_task("preference", usual_preference, jacobian, 1.0)
        p = per_task("preference", preference, jacobian, usual)
        loss, present = jacobian.loss_vector(), jacobian.present
        if kind == "plain":
            gap = loss - per_task("reference", reference, jacobian, 0.0)
            usable = jnp.isfinite(gap)
            share = softmax_over(usable & present, p * gap / mu, present)
            weights = jacobian.num_present * p * share
        else:
            log, usable = positive_log(loss)
            state = _with_nadir(state, loss, usable)
            if nadir is None:
                log_nadir, _ = positive_log(state.nadir)
                warm = state.count >= warmup
            else:
                log_nadir, warm = jnp.log(per_task("nadir", nadir, jacobian)), True
            share = softmax_when(warm & present, usable, p * (log - log_nadir) / mu)
            factor = jnp.where(warm, p * share, 1)
            weights = jnp.where(usable, bounded_exp(jnp.log(factor) - log), 0)
        count = jnp.asarray(optax.safe_increment(state.count))
        return jacobian.scale(weights), state._replace(
            weights=weights.astype(jnp.float32), count=count, unusable=state.unusable + ~usable
        )

    def _with_nadir(state, loss, usable):
        # A task without a positive loss in the window takes the first that comes after it.
        in_window = (state.count >= warmup - window) & (state.count < warmup)
        late = (state.count >= warmup) & (state.nadir_count == 0)
        seen = usable & (in_window | late)
        count = state.nadir_count + seen
        step = (loss.astype(jnp.float32) - state.nadir) / jnp.maximum(count, 1)
        return state._replace(nadir=state.nadir + jnp.where(seen, step, 0), nadir_count=count)

    return link(init_fn, update_fn, num_tasks)


stch = summed(scale_by_stch)
