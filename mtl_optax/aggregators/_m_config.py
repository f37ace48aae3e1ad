"""M-ConFIG: conflict-free directions from the momenta of the tasks, one backward pass a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide, wide
from mtl_optax.aggregators._conflict_free import conflict_free
from mtl_optax.links import check_num_tasks, check_option, keep_finite, link, task_zeros


class CycleTasksState(NamedTuple):
    """State of the first link of `m_config`: the momenta of the rows."""

    rows: Any  # like the parameters, leaves (K, *param.shape), at least float32, not debiased
    decay_products: jax.Array  # (K,) float32, the weight of the first zeros in each row
    count: jax.Array  # () int32, updates so far


class PseudoMomentState(NamedTuple):
    """State of the last link of `m_config`: Adam's second moment, of an implied gradient."""

    momentum: Any  # like the parameters, at least float32, not debiased
    second_moment: Any  # like the parameters, at least float32, not debiased
    count: jax.Array  # () int32, updates so far


def m_config(
    num_tasks: int, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""ConFIG on moving averages of the rows, one of which is renewed an update.

    .. math:: m_k \leftarrow \beta_1 m_k + (1 - \beta_1) g_k \;\; (k = t \bmod K), \quad
              d_t = \mathrm{ConFIG}(\hat m_1, \dots, \hat m_K)

    .. math:: g_t^c = \frac{d_t (1 - \beta_1^t) - \beta_1 d_{t-1} (1 - \beta_1^{t-1})}{1 - \beta_1},
              \quad v \leftarrow \beta_2 v + (1 - \beta_2) (g_t^c)^2, \quad
              \Delta\theta \propto d_t / (\sqrt{\hat v} + \epsilon)

    where :math:`g^c` is the gradient whose Adam momentum would be d. A step costs one backward pass
    whatever K, and takes in one task; within K steps each has had its turn. A task whose turn has
    not come yet is left out; a gradient that is not finite leaves the momenta as they were. It
    holds Adam's momentum already: follow it by `optax.sgd(rate)`. The state holds K rows; a head
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
      >>> bool((update < 0).all())
      True

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2408.11104>`_, 2024, algorithm 1.
    """
    check_num_tasks(num_tasks)
    for name, beta in (("b1", b1), ("b2", b2)):
        check_option(name, beta, lambda b: (b >= 0) & (b < 1), "in [0, 1)")
    check_option("eps", eps, lambda e: e >= 0, "at least 0")
    return optax.chain(
        _cycle_tasks(num_tasks, b1), conflict_free(num_tasks), _pseudo_moment(b1, b2, eps)
    )


def _cycle_tasks(num_tasks, b1):
    def init_fn(params):
        ones = jnp.ones(num_tasks, jnp.float32)
        return CycleTasksState(task_zeros(num_tasks, params), ones, jnp.zeros([], jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        turn = jnp.arange(num_tasks) == state.count % num_tasks
        newest = jax.tree.leaves(jacobian.pullback(turn))
        averages, treedef = jax.tree.flatten(state.rows)
        index = state.count % num_tasks
        good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in newest]))
        averages = [
            m.at[index].set(jnp.where(good, b1 * m[index] + (1 - b1) * g, m[index]))
            for m, g in zip(averages, newest, strict=True)
        ]
        products = jnp.where(turn & good, b1 * state.decay_products, state.decay_products)
        seen = 1 - products
        rows = [
            divide(m, seen.reshape(-1, *[1] * (m.ndim - 1)), m).astype(g.dtype)
            for m, g in zip(averages, newest, strict=True)
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        new_state = CycleTasksState(treedef.unflatten(averages), products, count)
        return jacobian.replace_rows(rows), new_state

    return link(init_fn, update_fn, num_tasks)


def _pseudo_moment(b1, b2, eps):
    def init_fn(params):
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p.dtype)), params)
        # Not the same arrays twice: a donated buffer may occur once.
        return PseudoMomentState(zeros, jax.tree.map(jnp.copy, zeros), jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        leaves, treedef = jax.tree.flatten(updates)
        new = []
        for d, m, v in zip(
            leaves,
            jax.tree.leaves(state.momentum),
            jax.tree.leaves(state.second_moment),
            strict=True,
        ):
            momentum = keep_finite(d * (1 - b1**count), m)
            implied = (momentum - b1 * m) / (1 - b1)
            second = keep_finite(b2 * v + (1 - b2) * implied**2, v)
            root = jnp.sqrt(second / (1 - b2**count))
            step = divide(d, root + eps, d).astype(d.dtype)
            new.append((step, momentum.astype(m.dtype), second.astype(v.dtype)))
        steps, momenta, seconds = zip(*new, strict=True)
        like = jax.tree.structure(state.momentum).unflatten
        return treedef.unflatten(steps), PseudoMomentState(like(momenta), like(seconds), count)

    return optax.GradientTransformation(init_fn, update_fn)
