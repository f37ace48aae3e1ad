"""Reading what the links of a chain recorded in their state."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax.links import STATE_TYPES


def summarize(opt_state: Any, names: Sequence[str]) -> dict[str, jax.Array]:
    """Flattens the numbers in the states of this library's links into named scalars.

    Ready for TensorBoard, W&B or a plot, inside `jit` and `scan` too.

    Args:
      opt_state: the state of any `optax.chain` with links of this library in it.
      names: the K task names, as `Jacobian.names` gives them.

    Returns:
      A dict of scalars: `"weights/click"` for what is kept a task, `"cosine/buy-click"` for each
      pair of tasks, `"fallbacks"` for counters. Where two links keep a field of the same name, the
      later one's gets its position among them, `"weights.2/click"`.

    Examples:
      >>> import mtl_optax as mtl
      >>> state = mtl.pareto(num_tasks=2).init(None)
      >>> mtl.summarize(state, ("buy", "click"))
      {'weights/buy': Array(0.5, dtype=float32), 'weights/click': Array(0.5, dtype=float32),
       'fallbacks': Array(0, dtype=int32)}
    """
    num_tasks, summary, seen = len(names), {}, {}
    for state in filter(_is_link_state, jax.tree.leaves(opt_state, is_leaf=_is_link_state)):
        for field, value in state._asdict().items():
            entries = _entries(value, num_tasks, names)
            if entries:
                seen[field] = seen.get(field, 0) + 1
                title = field if seen[field] == 1 else f"{field}.{seen[field]}"
                summary |= {f"{title}/{name}" if name else title: x for name, x in entries.items()}
    return summary


def _is_link_state(node: Any) -> bool:
    ours = type(node).__module__.startswith(f"{__package__}.") or type(node) in STATE_TYPES
    return ours and hasattr(node, "_asdict")


def _entries(value: Any, num_tasks: int, names: Sequence[str]) -> dict[str, jax.Array]:
    if not hasattr(value, "dtype") or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return {}
    if value.shape == ():
        return {"": value}
    if value.shape == (num_tasks,):
        return dict(zip(names, value, strict=True))
    if value.shape == (num_tasks, num_tasks):
        pairs = [(i, j) for i in range(num_tasks) for j in range(i + 1, num_tasks)]
        return {f"{names[i]}-{names[j]}": value[i, j] for i, j in pairs}
    return {}
