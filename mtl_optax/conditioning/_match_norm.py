"""Updates of a known length, so that swapping strategies keeps the learning rate meaningful."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide, power_of_two, safe_sqrt, wide
from mtl_optax._options import check_choice
from mtl_optax.aggregators._sum import mean_of
from mtl_optax.conditioning._base import run
from mtl_optax.jacobian._jacobian import Made
from mtl_optax.jacobian._rows import max_over_shards, sum_over_shards
from mtl_optax.links import link

TARGETS = ("mean", "sum")
# What is left of rows that cancel to rounding is up to 15 machine epsilons of their lengths.
_NOISE = 64


class MatchNormState(NamedTuple):
    """State of `match_norm`."""

    factor: jax.Array  # () float32, by which the last update was scaled, 0 if it was rounding
    inner_state: Any  # of the aggregator


def match_norm(
    aggregator: optax.GradientTransformation, *, to: Literal["mean", "sum"] = "mean"
) -> optax.GradientTransformationExtraArgs:
    r"""Gives any aggregator's update the norm of the plain mean, or sum, of the rows.

    .. math:: d \to d\, \frac{\|\frac1K \sum_k g_k\|}{\|d\|}

    on the shared parameters; heads keep their own gradients. K counts the tasks present. A zero
    update stays zero, and so does one that is zero up to rounding: where a link looked at the
    Gramian, the weights that it finds may cancel the rows, as at a Pareto-stationary point, and
    what is left points anywhere. Weights that `every` holds are seen to cancel them as well. It
    costs one more backward pass, or none where the aggregator needs the rows anyway.

    Args:
      aggregator: any strategy: Jacobian in, gradient out.
      to: `"mean"` or `"sum"`, of the rows as the aggregator is given them.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean or sum, exactly.

    Raises:
      TypeError: by its `update`, if the aggregator returns a Jacobian.
      ValueError: if `to` is neither.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.match_norm(mtl.mgda(num_tasks=2), to="sum")
      >>> update, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> round(float(jnp.linalg.norm(update)), 4)  # the root of 12
      3.4641
    """
    check_choice("to", to, TARGETS)
    inner = optax.with_extra_args_support(aggregator)

    def init_fn(params):
        return MatchNormState(jnp.ones([], jnp.float32), inner.init(params))

    def update_fn(jacobian, state, *, params=None, **extra_args):
        watched = jacobian.watched()
        update, inner_state = run(inner, watched, state.inner_state, params, extra_args)
        shared = jax.tree.leaves(jacobian.shared)
        made = watched.how_made(update)
        # Without those that a link inside has dropped.
        rows = watched
        if made is not None and not made.jacobian.everyone:
            rows = watched.keep(made.jacobian.present)
        plain = rows.combine(1.0) if to == "sum" else mean_of(rows)
        (length, unit), (target, target_unit) = _norm(update, shared), _norm(plain, shared)
        # In this order nothing leaves the range before the result does.
        factor = jnp.where(length > 0, divide(target, length) * (target_unit / unit), 1)
        if made is not None:
            is_noise = (length > 0) & (length * unit <= _rounding(made, update, shared))
            factor = jnp.where(is_noise, 0, factor)
        leaves, treedef = jax.tree.flatten(update)
        leaves = [
            (leaf * factor.astype(jnp.promote_types(leaf.dtype, factor.dtype))).astype(leaf.dtype)
            if is_shared
            else leaf
            for leaf, is_shared in zip(leaves, shared, strict=True)
        ]
        new_state = MatchNormState(bounded(factor, jnp.float32), inner_state)
        return treedef.unflatten(leaves), new_state

    return link(init_fn, update_fn)


def _rounding(made: Made, update: Any, shared: list[bool]) -> jax.Array:
    """The length below which an update may be what rounding leaves of rows that cancel."""
    jacobian = made.jacobian
    # Not known, or norms of other units than an update's.
    if made.norms is None or not jacobian.at_parameters:
        return jnp.zeros([], jacobian.dtype)
    leaves = [leaf for leaf, s in zip(jax.tree.leaves(update), shared, strict=True) if s]
    eps = max([_NOISE * jnp.finfo(jacobian.dtype).eps, *(jnp.finfo(x.dtype).eps for x in leaves)])
    return eps * jnp.sum(jnp.abs(made.weights) * made.norms)


def _norm(tree: Any, shared: list[bool]) -> tuple[jax.Array, jax.Array]:
    """The norm over the shared leaves as a number times a power of two: squares may overflow."""
    leaves = [leaf for leaf, s in zip(jax.tree.leaves(tree), shared, strict=True) if s]
    leaves = [leaf.astype(wide(leaf.dtype)) for leaf in leaves]
    if not leaves:
        return jnp.zeros([], jnp.float32), jnp.ones([], jnp.float32)
    tops = [max_over_shards(jnp.max(jnp.abs(leaf), initial=0)) for leaf in leaves]
    unit = power_of_two(jnp.max(jnp.stack(tops)))
    squares = [sum_over_shards(jnp.sum((leaf / unit) ** 2)) for leaf in leaves]
    return safe_sqrt(sum(squares)), unit
