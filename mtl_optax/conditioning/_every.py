"""Weights that rest: a link that is asked every n-th update only."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax._branch import where_needed
from mtl_optax._numerics import bounded, is_integer
from mtl_optax._options import check_num_tasks, is_traced
from mtl_optax._typing import Schedule
from mtl_optax.jacobian import Jacobian
from mtl_optax.links import conform, link
from mtl_optax.states import PerTask, link_states, num_tasks_of


class EveryState(NamedTuple):
    """State of `every`."""

    count: jax.Array  # () int32, updates so far
    wait: jax.Array  # () int32, updates until the link is asked again
    held_scales: Annotated[PerTask, 1.0]  # (K,) float32, of the rows, heads too
    held_weights: PerTask  # (K,) float32, of the rows in the update of the shared parameters
    held_norms: PerTask  # (K,) float32, of the rows it scaled, 0 if the link did not measure them
    weighed: PerTask  # (K,) bool, whether the task was present when the link was asked
    inner_state: Any  # of the link


def every(
    n: int | Schedule, tx: optax.GradientTransformation, *, num_tasks: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Refreshes the weights of a link every n updates, and holds them in between.

    .. math:: d_t = J_t^\top w_{s}, \quad s = \text{the last update at which the link was asked}

    for whatever weighs rows: a balancer, an aggregator, or a chain of them that ends in one. What
    it needs of the Jacobian, K backward passes for a Gramian, is computed in the updates that
    refresh; in all others the step costs one pullback, as with fixed weights. A strategy that
    learns over the updates sees those that refresh. A task that was not yet present in one is a
    reason to refresh: it never waits for its first weight.

        tx = optax.chain(mtl.every(10, mtl.upgrad(8)), optax.adam(1e-3))

    Args:
      n: updates from one refresh to the next, at least 1; or a schedule, a function of the number
        of updates so far.
      tx: the link. It must weigh the rows that it is given: stand `drop_nonfinite_tasks` and
        `ema_tasks` before `every`, and the optimizer after it.
      num_tasks: number of tasks K, static; needed where the state of the link does not tell it, as
        with `normalize_tasks` and `sum_tasks`.

    Returns:
      A link as `tx` is, balancer or aggregator. Update scale: that of `tx`. A balancer's losses are
      the weighted ones.

    Raises:
      ValueError: if `n` < 1, K is not known, or the update of `tx` is not a weighted sum of the
        rows, as that of `graddrop` and `trimmed_mean`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.every(2, mtl.mgda(num_tasks=2))
      >>> state = tx.init(jnp.zeros(2))
      >>> for k in (1.0, 2.0, 2.0):
      ...     J = jnp.diag(jnp.array([1.0, k]))
      ...     update, state = tx.update(J, state, losses=jnp.ones(2))
      ...     print([round(x, 2) for x in update.tolist()])
      [0.5, 0.5]
      [0.5, 1.0]
      [0.8, 0.4]
    """
    is_number = is_integer(n) or isinstance(n, jax.Array)
    is_whole = is_number and jnp.issubdtype(jnp.result_type(n), jnp.integer)
    if not callable(n) and not is_traced(n) and not (is_whole and np.asarray(n) >= 1):
        raise ValueError(
            f"n={n!r}, expected at least 1 update from one refresh to the next, a whole number, or "
            "a schedule"
        )
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        inner_state = tx.init(params)
        known = [num_tasks, *map(num_tasks_of, link_states(inner_state))]
        tasks = next((k for k in known if k is not None), None)
        if tasks is None:
            raise ValueError(
                "every can't tell the number of tasks from the state of the link: pass "
                "every(n, link, num_tasks=K)"
            )
        check_num_tasks(tasks)
        zero, ones = jnp.zeros([], jnp.int32), jnp.ones(tasks, jnp.float32)
        held = ones, ones / tasks, 0 * ones
        return EveryState(zero, zero, *held, jnp.zeros(tasks, bool), inner_state)

    def update_fn(jacobian, state, *, params=None, **extra_args):
        due = (state.wait <= 0) | jnp.any(jacobian.present & ~state.weighed)
        held = state.held_scales, state.held_weights, state.held_norms
        held = [each.astype(jacobian.dtype) for each in held]

        is_balancer = []  # known once the link was asked

        def refresh():
            asked = jacobian.watched()
            result, inner_state = tx.update(asked, state.inner_state, params, **extra_args)
            is_balancer.append(isinstance(result, Jacobian))
            scales, weights = asked.weighing(result)
            norms = jnp.zeros_like(scales)
            if asked.is_measured:
                norms = bounded(jnp.abs(scales) * asked.norms())
            found = [
                jnp.where(jacobian.present, new, old).astype(jacobian.dtype)
                for new, old in zip((scales, weights, norms), held, strict=True)
            ]
            return *found, state.weighed | jacobian.present, inner_state

        def rest():
            return *held, state.weighed, state.inner_state

        # The update is made outside, in one place, whatever is due.
        scales, weights, norms, weighed, inner_state = where_needed(due, refresh, rest)
        if not is_balancer:  # with `jax.disable_jit` only the branch that is taken is run
            jax.eval_shape(refresh)
        period = jnp.asarray(n(state.count) if callable(n) else n, jnp.int32)
        new_state = EveryState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            wait=jnp.where(due, period, state.wait) - 1,
            held_scales=bounded(scales, jnp.float32),
            held_weights=bounded(weights, jnp.float32),
            held_norms=bounded(norms, jnp.float32),
            weighed=weighed,
            inner_state=inner_state,
        )
        rows = jacobian.scale(scales)
        if is_balancer[0]:
            return rows, new_state
        return conform(rows.combine(weights, norms=norms), params), new_state

    return link(init_fn, update_fn)
