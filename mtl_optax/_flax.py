"""Lets a Jacobian pass through `flax.nnx.Optimizer.update`.

The optimizer filters what it is given for the variables that it trains. Seen by nnx, a Jacobian is
therefore the state of its parameters, every variable under its own path and of its own type, of
which the first holds the Jacobian and the others hold nothing.
"""

from typing import Any

from flax import nnx
from flax.nnx import graph

from mtl_optax.jacobian import Jacobian


def _flatten(jacobian: Jacobian) -> tuple[list[tuple[Any, Any]], None]:
    layout = jacobian._layout
    state = layout.params_def.unflatten([jacobian, *[None] * (len(layout.avals) - 1)])
    if isinstance(state, nnx.State):
        return list(state.items()), None
    return [("jacobian", nnx.Param(jacobian))], None


def _unflatten(children: Any, _: None) -> Any:
    return dict(children)


graph.register_pytree_node_type(Jacobian, flatten=_flatten, unflatten=_unflatten)
