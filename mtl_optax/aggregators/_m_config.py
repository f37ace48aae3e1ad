"""M-ConFIG: conflict-free directions from the momenta of the tasks, one backward pass a step."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide, safe_sqrt
from mtl_optax._options import BELOW_ONE, check_num_tasks, check_option
from mtl_optax.aggregators._conflict_free import conflict_free
from mtl_optax.jacobian._rows import all_finite, per_row
from mtl_optax.links import link, task_zeros
from mtl_optax.states import PerTask


class CycleTasksState(NamedTuple):
    """State of the first link of `m_config`: the momenta of the rows."""

    rows: PerTask  # like the parameters, leaves (K, *param.shape), at least float32, not debiased
    decay_products: Annotated[PerTask, 1.0]  # (K,) float32, the weight of the 0s in each row
    last_turns: PerTask  # (K,) int32, the update in which each row was renewed last, from 1 on
    count: jax.Array  # () int32, updates so far
    started: jax.Array  # () int32, 1 once every task present has had its first turn


class PseudoMomentState(NamedTuple):
    """State of the last link of `m_config`: Adam's moments, of an implied gradient."""

    momentum: Any  # like the parameters, at least float32, not debiased
    second_moment: Any  # like the parameters, at least float32, not debiased
    count: jax.Array  # () int32, updates since all tasks had their first turn
    inner_state: Any  # of `conflict_free`


def m_config(
    num_tasks: int,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""ConFIG on moving averages of the rows, one of which is renewed an update.

    .. math:: m_k \leftarrow \beta_1 m_k + (1 - \beta_1) g_k \;\; (k = t \bmod K), \quad
              d_t = \mathrm{ConFIG}(\hat m_1, \dots, \hat m_K)

    .. math:: g_t^c = \frac{d_t (1 - \beta_1^t) - \beta_1 d_{t-1} (1 - \beta_1^{t-1})}{1 - \beta_1},
              \quad v \leftarrow \beta_2 v + (1 - \beta_2) (g_t^c)^2, \quad
              \Delta\theta \propto d_t / (\sqrt{\hat v} + \epsilon)

    where :math:`g^c` is the gradient whose Adam momentum would be d. A step costs one backward pass
    whatever K, and takes in one task: of those present the one whose last turn is longest ago, so
    that within K steps each has had its turn. The update is 0 until every task present has had its
    first, for K - 1 steps, and t counts from then on. A task that joins later is left out until its
    turn comes, as is an absent one; a gradient that is not finite leaves the momenta as they were.
    It holds Adam's momentum already: follow it by `optax.sgd(rate)`. The state holds K rows; a head
    too moves by its momentum.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      b1: in [0, 1), decay of the rows' averages.
      b2: in [0, 1), decay of the second moment.
      eps: added to its root, in units of the gradients.

    Returns:
      An aggregator: Jacobian in, preconditioned update out. Update scale: unit-like, as Adam's.

    Raises:
      ValueError: if `num_tasks` < 1, an option is out of range, the losses are not K, or `init`
        gets no parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> tx = optax.chain(mtl.m_config(num_tasks=2), optax.sgd(0.1))
      >>> state = tx.init(jnp.zeros(2))
      >>> J = jnp.array([[3.0, 0.0], [0.0, 0.5]])
      >>> for _ in range(2):
      ...     update, state = tx.update(J, state, losses=jnp.ones(2))
      ...     print([round(abs(x), 2) for x in update.tolist()])
      [0.0, 0.0]
      [0.1, 0.1]

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2408.11104>`_, 2024, algorithm 1.
    """
    check_num_tasks(num_tasks)
    for name, beta in (("b1", b1), ("b2", b2)):
        check_option(name, beta, *BELOW_ONE)
    check_option("eps", eps, lambda e: e >= 0, "at least 0")
    return optax.chain(_cycle_tasks(num_tasks, b1), _pseudo_moment(num_tasks, b1, b2, eps))


def _cycle_tasks(num_tasks, b1):
    def init_fn(params):
        return CycleTasksState(
            rows=task_zeros(num_tasks, params),
            decay_products=jnp.ones(num_tasks, jnp.float32),
            last_turns=jnp.zeros(num_tasks, jnp.int32),
            count=jnp.zeros([], jnp.int32),
            started=jnp.zeros([], jnp.int32),
        )

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        never = jnp.iinfo(jnp.int32).max
        index = jnp.argmin(jnp.where(jacobian.present, state.last_turns, never))
        turn = jnp.arange(num_tasks) == index
        newest = jax.tree.leaves(jacobian.pullback(turn))
        averages, treedef = jax.tree.flatten(state.rows)
        squares = [g.astype(m.dtype) ** 2 for g, m in zip(newest, averages, strict=True)]
        good = jnp.all(jnp.stack([all_finite(square) for square in squares]))
        averages = [
            m.at[index].set(jnp.where(good, b1 * m[index] + (1 - b1) * g, m[index]))
            for m, g in zip(averages, newest, strict=True)
        ]
        products = jnp.where(turn & good, b1 * state.decay_products, state.decay_products)
        seen = 1 - products
        rows = [
            divide(m, per_row(seen, m), m).astype(g.dtype)
            for m, g in zip(averages, newest, strict=True)
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        last_turns = jnp.where(turn, count, state.last_turns)
        waiting = jnp.any(jacobian.present & (last_turns == 0))
        started = jnp.where(waiting, state.started, 1)
        new_state = CycleTasksState(
            treedef.unflatten(averages), products, last_turns, count, started
        )
        # Where no task is present the next link moves nothing.
        present = jacobian.present & (started > 0)
        return jacobian.replace_rows(rows, present=present), new_state

    return link(init_fn, update_fn, num_tasks)


def _pseudo_moment(num_tasks, b1, b2, eps):
    inner = conflict_free(num_tasks)

    def init_fn(params):
        zeros = jax.tree.map(lambda rows: rows[0], task_zeros(1, params))
        return PseudoMomentState(zeros, zeros, jnp.zeros([], jnp.int32), inner.init(params))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        updates, inner_state = inner.update(jacobian, state.inner_state)
        count = jnp.asarray(optax.safe_increment(state.count))
        leaves, treedef = jax.tree.flatten(updates)
        new = []
        for d, m, v in zip(
            leaves,
            jax.tree.leaves(state.momentum),
            jax.tree.leaves(state.second_moment),
            strict=True,
        ):
            momentum = d * (1 - b1**count)
            implied = (momentum - b1 * m) / (1 - b1)
            second = b2 * v + (1 - b2) * implied**2
            # A square may overflow: a step of it would be divided by nothing.
            good = jnp.isfinite(second)
            momentum, second = jnp.where(good, momentum, m), jnp.where(good, second, v)
            root = safe_sqrt(second / (1 - b2**count))
            step = jnp.where(good, divide(d, root + eps, d), 0).astype(d.dtype)
            new.append((step, momentum.astype(m.dtype), second.astype(v.dtype)))
        steps, momenta, seconds = zip(*new, strict=True)
        like = jax.tree.structure(state.momentum).unflatten
        new_state = PseudoMomentState(like(momenta), like(seconds), count, inner_state)
        return treedef.unflatten(steps), new_state

    return link(init_fn, update_fn, num_tasks)
