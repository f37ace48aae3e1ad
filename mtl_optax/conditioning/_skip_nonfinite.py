"""Skipping a step that is not finite, with the state as it was."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.conditioning._base import run
from mtl_optax.conditioning._drop_nonfinite import DropNonfiniteTasksState
from mtl_optax.jacobian._rows import on_all_shards
from mtl_optax.links import receive
from mtl_optax.states import check_state, link_states


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`."""

    skipped: jax.Array  # () int32, steps skipped
    skipped_in_a_row: jax.Array  # () int32, of these since the last good step
    inner_state: optax.OptState


def skip_nonfinite(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes no step where a loss or the update is NaN or infinite, or no task is present.

    The update is then zero and the state of `tx`, strategy and optimizer alike, is bit for bit what
    it was; so it is too where a number of that state would stop being finite. Skipped steps are
    counted, but for those without any task. A task that a `drop_nonfinite_tasks` inside has dropped
    is no reason to skip. `optax.apply_if_finite` can't do this: it looks for NaN in the Jacobian it
    is given, not in what the strategy makes of it, and returns zeros of the Jacobian's structure.
    Around the whole chain:

        tx = mtl.skip_nonfinite(optax.chain(mtl.gradnorm(2), optax.adam(1e-3)))

    Args:
      tx: a strategy, best with its optimizer: Jacobian in, update out.

    Returns:
      A transformation from a Jacobian to an update. Update scale: that of `tx`.

    Raises:
      TypeError: if `tx` returns a Jacobian.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> tx = mtl.skip_nonfinite(optax.chain(mtl.dwa(2), optax.adam(1e-3)))
      >>> state = tx.init(jnp.ones(2))
      >>> losses, jac = mtl.value_and_jac(lambda w: w * jnp.nan)(jnp.ones(2))
      >>> update, state = tx.update(jac, state, jnp.ones(2))
      >>> update.tolist(), int(state.skipped)
      ([0.0, 0.0], 1)
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        zeros = jnp.zeros([2], jnp.int32)  # no buffer twice, or it can't be donated
        return SkipNonfiniteState(zeros[0], zeros[1], tx.init(params))

    def update_fn(
        updates, state, params=None, *, losses=None, shared=None, present=None, **extra_args
    ):
        check_state(state, set(), SkipNonfiniteState, None)
        jacobian = receive(updates, losses, None, shared, present)
        update, inner_state = run(tx, jacobian, state.inner_state, params, extra_args)
        pairs = zip(jax.tree.leaves(inner_state), jax.tree.leaves(state.inner_state), strict=True)
        # Some states are infinite until they have seen something.
        good = [~(_nonfinite(new) & ~_nonfinite(old)) for new, old in pairs]
        good += [~_nonfinite(leaf) for leaf in jax.tree.leaves(update)]
        dropped = ~jacobian.present
        counts = zip(_dropped(inner_state), _dropped(state.inner_state), strict=True)
        for now, before in counts:
            dropped |= now > before
        finite = jnp.all(jnp.isfinite(jacobian.loss_vector()) | dropped) & ~jnp.all(dropped)
        finite &= jnp.all(jnp.stack([on_all_shards(jnp.all(g)) for g in good]))
        anyone = jnp.any(jacobian.present)

        zeros = jax.tree.map(jnp.zeros_like, update)
        update, inner_state = jax.lax.cond(
            finite & anyone, lambda: (update, inner_state), lambda: (zeros, state.inner_state)
        )
        bad = (~finite & anyone).astype(jnp.int32)
        in_a_row = jnp.where(finite & anyone, 0, state.skipped_in_a_row + bad)
        return update, SkipNonfiniteState(state.skipped + bad, in_a_row, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _dropped(opt_state: Any) -> list[jax.Array]:
    """How often each task was dropped, by each link inside that does it."""
    states = [s for s in link_states(opt_state) if isinstance(s, DropNonfiniteTasksState)]
    return [state.dropped for state in states]


def _nonfinite(leaf: jax.Array) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros(leaf.shape, bool)
    return ~jnp.isfinite(leaf)
