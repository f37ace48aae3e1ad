"""Multi-task architectures for `flax.nnx`: which parameters do the tasks share?

| model | the tasks share |
|---|---|
| `HardSharing` | one encoder |
| `Hierarchical` | one encoder or its lower layers, and easier heads that feed harder ones |
| `MTAN` | one network, whose blocks each task reads through its own attention masks |
| `CrossStitch` | the features of one network a task, mixed after every block |
| `LTB` | the blocks of a tree that is learned: each block chooses which one to read |
| `MMoE` | one encoder and a pool of experts, mixed by one gate a task |
| `DSelectK` | as `MMoE`, with gates that learn to use at most k experts |
| `CGC` | one encoder and shared experts, next to experts of each task |
| `PLE` | one encoder and shared experts, next to experts of each task, over several levels |

Every model takes an encoder and a head for each task, as layer sizes or as modules of any kind,
and returns a dictionary of outputs keyed by task name, in sorted order, the order in which JAX
flattens a dictionary of losses. Each parameter array belongs to one group of tasks, never to
parts of several, so that ``mtl_optax.value_and_jac(loss_fn, shared="auto")`` finds the groups.
Where tasks weight experts, columns or branches, ``model.utilization(x)`` reads out, for each task,
an array of how much it uses of each, level by level.
"""

from mtl_optax.models._base import MLP
from mtl_optax.models._cgc import CGC
from mtl_optax.models._cross_stitch import CrossStitch
from mtl_optax.models._dselect_k import DSelectK
from mtl_optax.models._experts import Experts
from mtl_optax.models._hard_sharing import HardSharing
from mtl_optax.models._hierarchical import Hierarchical
from mtl_optax.models._ltb import LTB
from mtl_optax.models._mmoe import MMoE
from mtl_optax.models._mtan import MTAN
from mtl_optax.models._ple import PLE

__all__ = [
    "CGC",
    "LTB",
    "MLP",
    "MTAN",
    "PLE",
    "CrossStitch",
    "DSelectK",
    "Experts",
    "HardSharing",
    "Hierarchical",
    "MMoE",
]
