"""Reading what the links of a chain recorded in their state."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax.jacobian import Jacobian, task_names
from mtl_optax.states import kind_of_leaf, link_states, num_tasks_of


def summarize(opt_state: Any, losses: Any) -> dict[str, jax.Array]:
    """Flattens the numbers in the states of this library's links into named scalars.

    Ready for TensorBoard, W&B or a plot, inside `jit` and `scan` too.

    Args:
      opt_state: the state of any `optax.chain` with links of this library in it.
      losses: the losses that the loss function returned, or their Jacobian: they say which number
        is whose. Or the names alone, `Jacobian.names`, in the order in which JAX flattens losses:
        the sorted one for a dict.

    Returns:
      A dict of scalars: `"weights/click"` for what is kept a task, `"cosine/buy-click"` for each
      pair of tasks (`"cosine/'a-b'-'c'"` where plain names could be read in two ways),
      `"fallbacks"` for counters. Where two links keep a field of the same name, the later one's
      gets its position among them, `"weights.2/click"`.

    Raises:
      ValueError: if the losses are not as many as the tasks of the state, or names are not in the
        order of the losses of a dict.

    Examples:
      >>> import mtl_optax as mtl
      >>> state = mtl.pareto(num_tasks=2).init(None)
      >>> mtl.summarize(state, {"click": 0.3, "buy": 2.0})
      {'weights/buy': Array(0.5, dtype=float32), 'weights/click': Array(0.5, dtype=float32),
       'fallbacks': Array(0, dtype=int32)}
    """
    names = _names(losses)
    summary, seen = {}, {}
    for state in link_states(opt_state):
        made_for = num_tasks_of(state)
        if made_for is not None and made_for != len(names):
            raise ValueError(
                f"got {len(names)} tasks {names}, and the {type(state).__name__} is of {made_for}: "
                "pass the losses that the strategy was updated with"
            )
        for field in state._fields:
            entries = _entries(state, field, names)
            if entries:
                seen[field] = seen.get(field, 0) + 1
                title = field if seen[field] == 1 else f"{field}.{seen[field]}"
                summary |= {f"{title}/{name}" if name else title: x for name, x in entries.items()}
    return summary


def _names(losses: Any) -> tuple[str, ...]:
    if isinstance(losses, Jacobian):
        return losses.names
    if isinstance(losses, str) or not (
        isinstance(losses, Sequence) and all(isinstance(name, str) for name in losses)
    ):
        return task_names(losses)
    names = tuple(losses)
    in_order = tuple(sorted(names, key=_place))
    # Numbers may be places of a list or keys of a dict that are strings, which JAX sorts as text.
    orders = in_order, tuple(sorted(names, key=lambda name: name.split("/")))
    if names not in orders or len(set(names)) != len(names):
        raise ValueError(
            f"the names {names} are not those of a dict of losses, whose order is {in_order}: "
            "which number is whose can't be told. Pass the losses or their Jacobian"
        )
    return names


def _place(name: str) -> list[tuple[bool, int, str]]:
    """Sorts paths as JAX sorts the keys along them."""
    parts = name.split("/")
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def _entries(state: Any, field: str, names: Sequence[str]) -> dict[str, jax.Array]:
    value, num_tasks = getattr(state, field), len(names)
    if not hasattr(value, "dtype") or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return {}
    kind = kind_of_leaf(state, field, num_tasks)
    if kind == "task" and value.shape == (num_tasks,):
        return dict(zip(names, value, strict=True))
    if kind == "pair" and value.shape == (num_tasks, num_tasks):
        pairs = list(itertools.combinations(range(num_tasks), 2))
        return dict(zip(pair_names(names), [value[i, j] for i, j in pairs], strict=True))
    return {"": value} if kind == "step" and value.shape == () else {}


def pair_names(names: Sequence[str]) -> list[str]:
    """A name for each pair of tasks, in quotes where plain ones could be read in two ways."""
    plain = [f"{a}-{b}" for a, b in itertools.combinations(names, 2)]
    if len(set(plain)) == len(plain):
        return plain
    return [f"{a!r}-{b!r}" for a, b in itertools.combinations(names, 2)]
