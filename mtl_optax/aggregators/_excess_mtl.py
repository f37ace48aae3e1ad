"""ExcessMTL: weight a task by how far it still is from its own optimum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import COUNT, check_choice, check_num_tasks, check_option
from mtl_optax.aggregators._base import HEADS, Heads, combined
from mtl_optax.aggregators._simplex_steps import exchange
from mtl_optax.jacobian._rows import sum_over_shards
from mtl_optax.links import keep_finite, link, task_zeros
from mtl_optax.states import PerTask


class ExcessMtlState(NamedTuple):
    """State of `excess_mtl`."""

    weights: PerTask  # (K,) float32, of the last update
    log_weights: PerTask  # (K,) float32, of which they are the softmax over the tasks present
    initial_risk: PerTask  # (K,) float32, mean excess risk of the warm-up
    root_sums: PerTask  # like the parameters, leaves (K, *param.shape), roots of sums of squares
    count: PerTask  # (K,) int32, updates of each task's warm-up so far


def excess_mtl(
    num_tasks: int,
    *,
    step_size: float | jax.Array = 1.0,
    warmup: int = 1,
    heads: Heads = "own",
) -> optax.GradientTransformationExtraArgs:
    r"""Raises the weights of tasks with a high excess risk, by exponentiated gradient.

    .. math:: H_k = \sqrt{\textstyle\sum_{s \le t} g_{k,s}^2}, \quad
              E_k = g_k^\top \mathrm{diag}(H_k)^{-1} g_k, \quad
              w_k \leftarrow \frac{w_k e^{\eta E_k / E_k(0)}}{\sum_j w_j e^{\eta E_j / E_j(0)}}

    The excess risk E, a second-order estimate of the loss less the least that the task could reach,
    does not grow with label noise as the loss does. Sums run over the shared parameters. A task's
    weight is that of the start during its warm-up, whose mean risk is E(0): its first updates with
    any risk, so neither those where it is absent nor those where its gradient is 0. The others
    exchange their weights with one another only. The state holds K rows.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      step_size: eta > 0.
      warmup: updates of each task's warm-up, at least 1; the paper takes three epochs.
      heads: `"own"`, each head follows its own loss, or `"weighted"`, its weighted one: see
        `mtl_optax.aggregators`.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like (weights sum to 1).

    Raises:
      ValueError: if `num_tasks` < 1, an option is out of range, the losses are not K, or `init`
        gets no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.excess_mtl(num_tasks=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for J in ([[1.0], [1.0]], [[1.0], [0.1]]):
      ...     update, state = tx.update(jnp.array(J), state, losses=jnp.ones(2))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.6676, 0.3324]

    Differs from:
      The paper's H has an epsilon inside the root, so its weights depend on the units of the
      losses; here an entry without any gradient so far counts 0. The weights of the authors' code
      sum to K at every step, K times ours; its step size is 0.01, and it has `heads="weighted"`.

    References:
      He et al., `Robust Multi-Task Learning with Excess Risks <https://arxiv.org/abs/2402.02009>`_,
      ICML 2024, eqs. 6-9.
    """
    check_num_tasks(num_tasks)
    check_option("step_size", step_size, lambda x: x > 0, "more than 0")
    check_option("warmup", warmup, *COUNT)
    check_choice("heads", heads, HEADS)

    def init_fn(params):
        zeros = jnp.zeros(num_tasks, jnp.float32)
        roots = task_zeros(num_tasks, params)
        return ExcessMtlState(zeros + 1 / num_tasks, zeros, zeros, roots, zeros.astype(jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        roots, treedef = jax.tree.flatten(state.root_sums)
        shared = jax.tree.leaves(jacobian.shared)
        rows, risk = iter(jacobian.shared_rows()), jnp.zeros(num_tasks, jnp.float32)
        for i, is_shared in enumerate(shared):
            if is_shared:
                g = next(rows).astype(roots[i].dtype)
                roots[i] = keep_finite(_hypot(roots[i], g), roots[i])
                part = jnp.abs(g) * divide(jnp.abs(g), roots[i])
                part = jnp.sum(part, axis=tuple(range(1, g.ndim)), dtype=jnp.float32)
                risk += sum_over_shards(part)

        finite, warm = jnp.isfinite(risk), state.count < warmup
        starts = warm & finite & (risk > 0)
        initial = state.initial_risk + jnp.where(starts, risk / warmup, 0)
        moves = jacobian.present & finite & ~warm
        log_weights = exchange(state.log_weights, step_size * divide(risk, initial, 1), moves)
        weights = jax.nn.softmax(log_weights, where=jacobian.present)
        new_state = ExcessMtlState(
            weights, log_weights, initial, treedef.unflatten(roots), state.count + starts
        )
        return combined(jacobian, weights, heads), new_state

    return link(init_fn, update_fn, num_tasks)


def _hypot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The root of a² + b², where the squares may leave the range of the type."""
    large = jnp.maximum(jnp.abs(a), jnp.abs(b))
    ratio = divide(jnp.minimum(jnp.abs(a), jnp.abs(b)), large)
    return large * jnp.sqrt(1 + ratio**2)
