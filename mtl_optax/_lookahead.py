"""A trial step and what it does to losses of another batch: what bilevel methods learn from."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from mtl_optax.jacobian import Jacobian, value_and_jac
from mtl_optax.links import conform


def jacobian_of(
    option: str, losses_fn: Any, like: Jacobian, params: Any
) -> Callable[[Any], Jacobian]:
    """`params -> Jacobian` of the losses function that is the extra argument `option`.

    Its tasks are those of `like`, and those absent there are absent here.
    """
    if not callable(losses_fn) or params is None:
        raise TypeError(
            f"got {option}={losses_fn!r} and params of type {type(params).__name__}, expected a "
            "function from parameters to the losses of a batch, and the parameters: call "
            f"tx.update(jac, opt_state, params, {option}=lambda p: task_losses(p, batch))"
        )

    def at(params: Any) -> Jacobian:
        jacobian = value_and_jac(losses_fn)(params)[1]
        if jacobian.num_tasks != like.num_tasks:
            raise ValueError(
                f"{option} returns the losses {jacobian.names}, expected those of the tasks "
                f"{like.names}: return all of them, as the loss function does"
            )
        return jacobian if like.everyone else jacobian.keep(like.present)

    return at


def trial_step(
    jacobian: Jacobian, params: Any, weights: jax.Array, learning_rate: Any
) -> tuple[Any, Callable[[Any], jax.Array]]:
    """A gradient step with these weights, and how losses after it depend on them.

    Returns:
      `(stepped, slope)`: the parameters, and from the gradient there of a loss to its derivative by
      the weights, `(K,)`. That is -learning_rate J times the gradient: the pullback, forth again.
    """
    update, push = jax.vjp(lambda w: conform(jacobian.pullback(w), params), weights)
    stepped = optax.apply_updates(params, optax.tree.scale(-learning_rate, update))

    def slope(gradient: Any) -> jax.Array:
        like = jax.tree.map(lambda g, u: g.astype(u.dtype), gradient, update)
        return -learning_rate * push(like)[0]

    return stepped, slope
