"""Gradient accumulation over micro-batches, at the level of the Jacobian."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import check_count, check_num_tasks
from mtl_optax.conditioning._base import run
from mtl_optax.jacobian import unflatten_losses
from mtl_optax.jacobian._rows import keep_rows, scale_rows
from mtl_optax.links import receive, task_zeros
from mtl_optax.states import PerTask, check_state


class MultiStepsState(NamedTuple):
    """State of `multi_steps`."""

    mini_step: jax.Array  # () int32, micro-batches since the last update; 0 right after one
    gradient_step: jax.Array  # () int32, updates made
    counts: PerTask  # (K,) int32, micro-batches in the averages
    losses: PerTask  # (K,) float32, averages
    rows: PerTask  # like the parameters, leaves (K, *param.shape), at least float32, averages
    inner_state: optax.OptState


def multi_steps(
    tx: optax.GradientTransformation, every_k: int, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    r"""Averages losses and rows over k micro-batches, and only then runs the strategy.

    .. math:: \bar L_k = \frac1{n_k} \sum_b L_k^{(b)}, \quad
              \bar g_k = \frac1{n_k} \sum_b g_k^{(b)}

    The strategy sees the Jacobian of the whole batch, so a step is the one that it would take on
    the k micro-batches in one (for losses that are means over examples). A mean is over the
    micro-batches that had the task, as `present=` tells: those of one task each make the step of
    all tasks at once. A task that none of them had is absent from it, and a micro-batch without any
    task does not count. In between the updates are zero and the state of `tx` stands still.
    `optax.MultiSteps` can't do this: it averages what has the shape of the parameters, but a
    strategy must see each task's average. Around the whole chain:

        tx = mtl.multi_steps(optax.chain(mtl.mgda(2), optax.adam(1e-3)), every_k=4, num_tasks=2)

    Links that should see each micro-batch stand before it, as in
    `optax.chain(mtl.drop_nonfinite_tasks(2), tx)`. Extra arguments reach `tx` as the last
    micro-batch of a step has them. The state holds K rows, heads included, and each micro-batch
    costs K backward passes. A feature-level Jacobian keeps no features of the batches before: the
    Gramian is then that of the averaged rows.

    Args:
      tx: a strategy with its optimizer: Jacobian in, update out.
      every_k: micro-batches a step; static, at least 1.
      num_tasks: number of tasks K; static, at least 1.

    Returns:
      A transformation from a Jacobian to an update. Update scale: that of `tx`.

    Raises:
      TypeError: if `tx` returns a Jacobian.
      ValueError: if `every_k` < 1, `num_tasks` < 1, the losses are not K, or `init` gets no
        parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> task_losses = lambda w, x: {"a": jnp.mean(w * x), "b": jnp.mean((w * x) ** 2)}
      >>> w = jnp.float32(1.0)
      >>> tx = mtl.multi_steps(mtl.sum_tasks(), every_k=2, num_tasks=2)
      >>> state = tx.init(w)
      >>> for x in (jnp.ones(2), 3 * jnp.ones(2)):
      ...     _, jac = mtl.value_and_jac(task_losses)(w, x)
      ...     update, state = tx.update(jac, state, w)
      ...     print(update)
      0.0
      12.0
    """
    check_num_tasks(num_tasks)
    check_count("every_k", every_k)
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        zeros = jnp.zeros([2], jnp.int32)  # no buffer twice, or it can't be donated
        counts, losses = jnp.zeros(num_tasks, jnp.int32), jnp.zeros(num_tasks, jnp.float32)
        rows = task_zeros(num_tasks, params)
        return MultiStepsState(zeros[0], zeros[1], counts, losses, rows, tx.init(params))

    def update_fn(
        updates, state, params=None, *, losses=None, shared=None, present=None, **extra_args
    ):
        check_state(state, set(), MultiStepsState, num_tasks)
        jacobian = receive(updates, losses, num_tasks, shared, present)
        here = jacobian.present
        count = state.mini_step + jnp.any(here)
        counts = state.counts + here

        def mean(old: jax.Array, new: jax.Array) -> jax.Array:
            share = scale_rows(new - old, 1 / jnp.maximum(counts, 1))
            return keep_rows(share, here).astype(old.dtype) + old

        rows = jax.tree.leaves(jacobian.rows())
        averages, treedef = jax.tree.flatten(state.rows)
        averages = [mean(old, row) for old, row in zip(averages, rows, strict=True)]
        mean_losses = mean(state.losses, jacobian.loss_vector())

        def step(inner_state):
            batch = jacobian.replace_rows(
                [average.astype(row.dtype) for average, row in zip(averages, rows, strict=True)],
                losses=unflatten_losses(mean_losses, jacobian.losses),
                present=None if jacobian.everyone else counts > 0,
            )
            return run(tx, batch, inner_state, params, extra_args)

        def wait(inner_state):
            like, treedef = jax.tree.flatten(jax.eval_shape(step, inner_state)[0])
            # Of the rows, as they lie on the devices of a `shard_map`.
            zeros = [jnp.zeros_like(row[0], x.dtype) for row, x in zip(rows, like, strict=True)]
            return treedef.unflatten(zeros), inner_state

        full = (count >= every_k) & (count > state.mini_step)
        update, inner_state = jax.lax.cond(full, step, wait, state.inner_state)
        clear = lambda leaf: jnp.where(full, 0, leaf)  # noqa: E731
        new_state = MultiStepsState(
            mini_step=clear(count),
            gradient_step=state.gradient_step + full.astype(jnp.int32),
            counts=clear(counts),
            losses=clear(mean_losses),
            rows=treedef.unflatten([clear(leaf) for leaf in averages]),
            inner_state=inner_state,
        )
        return update, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
