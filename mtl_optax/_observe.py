"""Telling a strategy what its last update led to."""

from typing import Any

import jax


def observe_losses(opt_state: Any, losses_after: Any, *, present: Any = None) -> Any:
    """Hands the losses after an update to the strategies that learn from them.

    `famo` compares the losses before and after its update. By default it takes those of the next
    update, on another batch; this makes it exact, for one more forward pass. Call it after the
    parameters are updated, with their losses on the same batch; the last call before the next
    update counts. Works inside `jit`, `scan` and `vmap`.

    With `flax.nnx.Optimizer`, read its state by `nnx.as_pure(optimizer.opt_state)` and write the
    result back by `nnx.update(optimizer.opt_state, nnx.state(observed))`.

    Args:
      opt_state: the state of any `optax.chain` with such a strategy in it, however deep.
      losses_after: the K losses, a tree like those of the update.
      present: which tasks the batch has labels of, bools in a tree like the losses, as for
        `update`; None if all. Of the others nothing is learned.

    Returns:
      The new `opt_state`.

    Raises:
      TypeError: if no link of the chain learns from losses after its update, or `present` is not
        of bools.
      ValueError: if the losses are not K, or `present` does not fit them.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> task_losses = lambda w: {"a": jnp.sum(w**2), "b": jnp.sum((w - 1) ** 2)}
      >>> params = jnp.array([2.0, 3.0])
      >>> tx = optax.chain(mtl.famo(num_tasks=2), optax.sgd(0.1))
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     losses, jac = mtl.value_and_jac(task_losses)(params)
      ...     updates, opt_state = tx.update(jac, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     opt_state = mtl.observe_losses(opt_state, task_losses(params))
    """
    observers = [node for node in jax.tree.leaves(opt_state, is_leaf=_observes) if _observes(node)]
    if not observers:
        raise TypeError(
            f"no link of this optimizer state, a {type(opt_state).__name__}, learns from losses "
            "after its update: build the chain with mtl.famo(num_tasks), and pass the state that "
            "its init and update return; other strategies need no observe_losses"
        )
    return jax.tree.map(
        lambda node: node.observe(losses_after, present) if _observes(node) else node,
        opt_state,
        is_leaf=_observes,
    )


def _observes(node: Any) -> bool:
    return hasattr(node, "_fields") and hasattr(node, "observe")
