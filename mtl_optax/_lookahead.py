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

    Its tasks are those of `like`, and those absent there are absent here, as frozen parameters are
    frozen.
    """
    if not callable(losses_fn) or params is None:
        raise TypeError(
            f"got {option}={losses_fn!r} and params of type {type(params).__name__}, expected a "
            "function from parameters to the losses of a batch, and the parameters: call "
            f"tx.update(jac, opt_state, params, {option}=lambda p: task_losses(p, batch))"
        )

    def at(params: Any) -> Jacobian:
        treedef, trained = jax.tree.structure(params), like.trained
        wrt = None if all(trained) else treedef.unflatten(trained)
        jacobian = value_and_jac(losses_fn, wrt=wrt)(params)[1]
        if not _are_alike(jacobian.names, like.names):
            raise ValueError(
                f"{option} returns the losses {jacobian.names}, expected those of the tasks "
                f"{like.names}: return all of them, as the loss function does"
            )
        return jacobian if like.everyone else jacobian.keep(like.present)

    return at


def _are_alike(names: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether they name the same tasks; losses of a list or an array are known by their place."""
    places = tuple(map(str, range(len(others))))
    return names == others or (len(names) == len(others) and places in (names, others))


def trial_step(
    jacobian: Jacobian, params: Any, weights: jax.Array, learning_rate: Any
) -> tuple[Any, Callable[[Any], jax.Array]]:
    """A gradient step with these weights, and how losses after it depend on them.

    Returns:
      `(stepped, slope)`: the parameters, and from the gradient there of a loss to its derivative by
      the weights, `(K,)`. That is -learning_rate J times the gradient: the pullback, forth again.
    """

    def trained(tree: Any) -> list[jax.Array]:
        pairs = zip(jax.tree.leaves(tree), jacobian.trained, strict=True)
        return [leaf for leaf, is_trained in pairs if is_trained]

    def pull(weights: jax.Array) -> tuple[list[jax.Array], Any]:
        update = conform(jacobian.pullback(weights), params)
        return trained(update), update

    pulled, push, update = jax.vjp(pull, weights, has_aux=True)
    stepped = optax.apply_updates(params, optax.tree.scale(-learning_rate, update))

    def slope(gradient: Any) -> jax.Array:
        pairs = zip(trained(gradient), pulled, strict=True)
        return -learning_rate * push([g.astype(u.dtype) for g, u in pairs])[0]

    return stepped, slope
