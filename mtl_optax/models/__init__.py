"""Multi-task architectures for `flax.nnx`: which parameters do the tasks share?

| model | the tasks share |
|---|---|
| `HardSharing` | one encoder |
| `Hierarchical` | one encoder, and the layers of easier tasks that feed harder ones |
| `MMoE` | one encoder and a pool of experts, mixed by one gate a task |
| `PLE` | one encoder and shared experts, next to experts of each task, over several levels |

Every model takes an encoder and a head for each task, as layer sizes or as modules of any kind,
and returns a dictionary of outputs keyed by task name, in sorted order, the order in which JAX
flattens a dictionary of losses. Each parameter array belongs to one group of tasks, never to
parts of several, so that ``mtl_optax.value_and_jac(loss_fn, shared="auto")`` finds the groups.
"""

from mtl_optax.models._base import MLP
from mtl_optax.models._experts import Experts
from mtl_optax.models._hard_sharing import HardSharing
from mtl_optax.models._hierarchical import Hierarchical
from mtl_optax.models._mmoe import MMoE
from mtl_optax.models._ple import PLE

__all__ = ["MLP", "PLE", "Experts", "HardSharing", "Hierarchical", "MMoE"]
