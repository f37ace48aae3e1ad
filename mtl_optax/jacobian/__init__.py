"""The lazy Jacobian of several losses, and how to get one.

| file | what it holds |
|---|---|
| `_jacobian.py` | `Jacobian`: what links see |
| `_differentiate.py` | `value_and_jac`, `value_and_feature_jac`, `as_jacobian` |
| `_arguments.py`, `_losses.py`, `_layout.py` | reading the call, the losses, the parameters |
| `_program.py` | the linear program as a jaxpr: read, cut, transposed, compared |
| `_linear_map.py`, `_mapped.py`, `_given.py` | where rows come from: programs or arrays |
| `_rows.py` | what is done to rows at hand |
| `ways/` | the ways to measure the Gramian, one file each |
| `_opaque.py`, `_memo.py`, `_plan.py` | what keeps others out; what is kept; what is shown |
"""

from mtl_optax.jacobian._differentiate import (
    as_jacobian as as_jacobian,
    value_and_feature_jac as value_and_feature_jac,
    value_and_jac as value_and_jac,
)
from mtl_optax.jacobian._jacobian import Jacobian as Jacobian
from mtl_optax.jacobian._losses import (
    flatten_losses as flatten_losses,
    task_names as task_names,
    unflatten_losses as unflatten_losses,
)
from mtl_optax.jacobian._plan import LeafPlan as LeafPlan, Plan as Plan
from mtl_optax.jacobian.ways.sketch import Sketch as Sketch
