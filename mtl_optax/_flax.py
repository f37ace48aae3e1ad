"""Lets a Jacobian pass through `flax.nnx.Optimizer.update`.

The optimizer filters what it is given for the variables that it trains. Seen by nnx, a Jacobian is
therefore the state of its parameters, every variable under its own path and of its own type, of
which the first holds the Jacobian and the others hold nothing.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from flax.nnx import graph

from mtl_optax.jacobian import Jacobian


def _flatten(jacobian: Jacobian) -> tuple[list[tuple[Any, Any]], None]:
    layout = jacobian._layout
    params = layout.params_def.unflatten([jacobian, *[None] * (len(layout.avals) - 1)])
    parts = dict(enumerate(params)) if isinstance(params, tuple) else params
    if isinstance(parts, Mapping) and all(map(_is_state, parts.values())):
        return list(parts.items()), None
    return [("jacobian", nnx.Param(jacobian))], None


def _is_state(x: Any) -> bool:
    return isinstance(x, nnx.State | nnx.Variable)


def _unflatten(children: Any, _: None) -> Any:
    return dict(children)


graph.register_pytree_node_type(Jacobian, flatten=_flatten, unflatten=_unflatten)
