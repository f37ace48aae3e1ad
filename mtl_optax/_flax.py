"""Lets a Jacobian pass through `flax.nnx.Optimizer.update`.

The optimizer filters what it is given for `nnx.Param`, which a Jacobian's leaves are not. Seen by
nnx, a Jacobian is therefore one `nnx.Param` that holds it whole.
"""

from flax import nnx
from flax.nnx import graph

from mtl_optax.jacobian import Jacobian

graph.register_pytree_node_type(
    Jacobian,
    flatten=lambda jacobian: ([("jacobian", nnx.Param(jacobian))], None),
    unflatten=lambda values, _: dict(values)["jacobian"],
)
