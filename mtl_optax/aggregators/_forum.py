"""FORUM: improve on other data, along directions in which the weighted training loss falls too."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._lookahead import jacobian_of
from mtl_optax._numerics import EXACT, divide, dot, safe_sqrt
from mtl_optax._options import COUNT, check_count, check_num_tasks, check_option
from mtl_optax._usable import softmax_over, step_each
from mtl_optax.aggregators._simplex_steps import shared_out
from mtl_optax.jacobian._rows import max_over_shards, mix, per_row, sum_over_shards
from mtl_optax.links import conform, link
from mtl_optax.solvers import simplex_qp
from mtl_optax.states import PerTask


class ForumState(NamedTuple):
    """State of `forum`."""

    weights: PerTask  # (K,) float32, of the training losses in the last update
    logits: PerTask  # (K,) float32, for the next update
    opt_state: PerTask  # of the optimizer of each logit
    shares: PerTask  # (K,) float32, of the validation gradients, running means
    count: jax.Array  # () int32, updates so far
    fallbacks: jax.Array  # () int32, updates whose solver did not converge


def forum(
    num_tasks: int,
    *,
    learning_rate: float | jax.Array = 0.1,
    inner_steps: int = 5,
    rho: float | jax.Array = 0.1,
    window: int = 1,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Improves all tasks on another batch while the weighted training loss falls.

    .. math:: q(a, \theta) = \sum_k \sigma_k(a) \big(L_k(\theta) - L_k(\theta^T)\big), \quad
              d = \sum_k s_k u_k + \nu \nabla q, \quad
              \nu = \max\Big(0, \sum_k s_k \big(\rho - \tfrac{u_k^\top \nabla q}{\|\nabla q\|^2}
              \big)\Big)

    where :math:`\theta^T` is what some steps of gradient descent on the weighted training loss lead
    to, so q is how far it is from its minimum; :math:`u_k` are the gradients of the validation
    losses, made unit; and s, on the simplex, minimises :math:`\tfrac12 \|d\|^2 - \nu\rho
    \|\nabla q\|^2`: d is the steepest descent of the worst of them among those that lower q by at
    least :math:`\rho\|\nabla q\|^2`. The update uses a running mean of s, whose newest entry counts
    :math:`t^{-3/4}`. The part of d for a steps the weights' own optimizer, the rest is the update,
    of all parameters.

    `update` takes two functions from parameters to losses: `losses_fn=` of the batch that the
    Jacobian is of, and `validation_fn=` of another one. Put no balancer before this link.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      learning_rate: > 0, of the inner steps.
      inner_steps: how many of them, at least 1; static.
      rho: > 0, how much of the steepest descent of q is asked for.
      window: updates over which t stays, such as those of an epoch, as in the authors' code.
      optimizer: updates each logit; `optax.adam(1e-3)` by default.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: free (of unit gradients, plus
      :math:`\nu` times the weighted mean).

    Raises:
      TypeError: if `losses_fn=`, `validation_fn=` or the parameters are missing.
      ValueError: if `num_tasks` < 1, an option is out of range, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses_fn = lambda w: {"a": jnp.sum((w - 1) ** 2), "b": jnp.sum((w - 3) ** 2)}
      >>> w = jnp.zeros(2)
      >>> losses, jac = mtl.value_and_jac(losses_fn)(w)
      >>> tx = mtl.forum(2)
      >>> update, _ = tx.update(jac, tx.init(w), w, losses_fn=losses_fn, validation_fn=losses_fn)
      >>> [round(x, 3) for x in update.tolist()]
      [-0.707, -0.707]

    Differs from:
      In the authors' code the quadratic program has no 1/2, so that its s is another one where
      :math:`\nu > 0`, and 1e-8 is added to :math:`\|\nabla q\|^2`.

    References:
      Ye et al., `A First-Order Multi-Gradient Algorithm for Multi-Objective Bi-Level Optimization
      <https://arxiv.org/abs/2401.09257>`_, 2024, algorithm 1.
    """
    check_num_tasks(num_tasks)
    for name, value in (("learning_rate", learning_rate), ("rho", rho)):
        check_option(name, value, lambda x: x > 0, "more than 0")
    check_count("inner_steps", inner_steps)
    check_option("window", window, *COUNT)
    optimizer = optimizer or optax.adam(1e-3)

    def init_fn(params):
        del params
        logits = jnp.zeros(num_tasks, jnp.float32)
        return ForumState(
            weights=jnp.full(num_tasks, 1 / num_tasks, jnp.float32),
            logits=logits,
            opt_state=jax.vmap(optimizer.init)(logits),
            shares=logits,
            count=jnp.zeros([], jnp.int32),
            fallbacks=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        jacobian, state, *, params=None, losses_fn=None, validation_fn=None, **extra_args
    ):
        del extra_args
        training = jacobian_of("losses_fn", losses_fn, jacobian, params)
        validation = jacobian_of("validation_fn", validation_fn, jacobian, params)
        present = jacobian.present
        weights, by_logits = jax.vjp(lambda a: softmax_over(present, a, present), state.logits)

        def descend(params, gradient):
            return optax.apply_updates(params, optax.tree.scale(-learning_rate, gradient))

        fall = conform(jacobian.pullback(weights), params)
        settled = jax.lax.fori_loop(
            1,
            inner_steps,
            lambda _, at: descend(at, training(at).pullback(weights)),
            descend(params, fall),
        )
        above = jacobian.loss_vector() - training(settled).loss_vector()
        (rise,) = by_logits(above.astype(jnp.float32))

        rows = jax.tree.leaves(validation(params).rows())
        units, usable = _unit_rows(rows, present)
        falls = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(fall)]
        along = jnp.zeros(num_tasks, jnp.float32)
        for u, f in zip(units, falls, strict=True):
            along += sum_over_shards(jnp.tensordot(u, f, axes=f.ndim, precision=EXACT))
        square = sum(sum_over_shards(jnp.sum(f**2)) for f in falls) + jnp.sum(rise**2)
        along_per_square = divide(along, square)

        flat = [u.reshape(num_tasks, -1) for u in units]
        gramian = sum(sum_over_shards(dot(u, u.T)) for u in flat)
        chosen, solved = _shares(gramian, along, along_per_square, rho, usable)
        even = divide(present, jnp.sum(present))
        newest = (1.0 + state.count // window) ** -0.75
        shares = jnp.where(solved, chosen, even).astype(jnp.float32)
        shares, _ = shared_out(state.shares + newest * (shares - state.shares), present)

        nu = jnp.maximum(dot(shares, rho - along_per_square), 0)
        leaves = [
            (mix(shares, u) + nu * f).astype(leaf.dtype)
            for u, f, leaf in zip(units, falls, jax.tree.leaves(fall), strict=True)
        ]
        gradient = nu * rise
        logits, opt_state = step_each(
            optimizer, state.opt_state, state.logits, gradient, ~jnp.isnan(gradient)
        )
        new_state = ForumState(
            weights=weights,
            logits=logits,
            opt_state=opt_state,
            shares=shares,
            count=jnp.asarray(optax.safe_increment(state.count)),
            fallbacks=state.fallbacks + (jnp.any(usable) & ~solved),
        )
        return jax.tree.structure(fall).unflatten(leaves), new_state

    return link(init_fn, update_fn, num_tasks)


def _shares(gramian, along, along_per_square, rho, usable):
    """The s of the steepest descent, and whether it was found: with nu above 0, or with nu = 0.

    The value has one slope where the two meet, so that the minimiser of either is that of both if
    it lies on its own side.
    """
    inside = simplex_qp(
        gramian - along[:, None] * along_per_square[None, :], rho * along, present=usable
    )
    outside = simplex_qp(gramian, present=usable)
    is_asked = dot(inside.x, along_per_square) < rho
    chosen = jnp.where(is_asked, inside.x, outside.x)
    solved = jnp.where(is_asked, inside.converged, outside.converged)
    return chosen, solved & jnp.all(jnp.isfinite(chosen))


def _unit_rows(rows: list[jax.Array], present: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Rows over their norms, over all leaves, and which of them are neither zero nor NaN."""

    def largest(row):
        top = jnp.max(jnp.abs(row), axis=tuple(range(1, row.ndim)), initial=0)
        return max_over_shards(top)

    def over(row, by):
        return jnp.where(per_row(usable, row), row / per_row(jnp.where(usable, by, 1), row), 0)

    rows = [row.astype(jnp.float32) for row in rows]
    top = functools.reduce(jnp.maximum, map(largest, rows))
    usable = present & (top > 0) & jnp.isfinite(top)
    rows = [over(row, top) for row in rows]
    squares = [sum_over_shards(jnp.sum(row**2, axis=tuple(range(1, row.ndim)))) for row in rows]
    norms = safe_sqrt(sum(squares))
    return [over(row, norms) for row in rows], usable
