"""The way that is chosen by what each of them would take."""

import dataclasses
from collections.abc import Sequence

import jax

from mtl_optax._numerics import is_fewer
from mtl_optax.jacobian._layout import Layout
from mtl_optax.jacobian._linear_map import Heads, LinearMap
from mtl_optax.jacobian._program import ISOMETRIES, Program, variables
from mtl_optax.jacobian.ways import _walk, ghost, streamed
from mtl_optax.jacobian.ways._base import Cost, Measurement, RowsOf, Way
from mtl_optax.jacobian.ways.rows import Rows

# Rows of so many bytes are held as they are: nothing of that size is worth rounding more.
SMALL = 2**20
# What a step may take that holds one layer in place of K rows, in percent of the multiplications.
_FOR_MEMORY = 110


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Auto(Way):
    """Rows where they are small, or a backward rule is not linear; else ghost, or streamed.

    Streamed is for models with layers that ghost has no access to and takes by rows: those in a
    loop, in a checkpoint, or in a stack. It takes half a backward pass or a whole one more than
    ghost; what its own ghosts save there has to make up for it.
    """

    def measure(self, heads: Heads, layout: Layout, rows_of: RowsOf) -> Measurement:
        """The Gramian, see `Way`."""
        return _chosen(heads.linear, layout).measure(heads, layout, rows_of)

    def costs(self, linear: LinearMap, layout: Layout) -> dict[int, Cost]:
        """What each measured leaf takes."""
        return _chosen(linear, layout).costs(linear, layout)

    def holds_rows(self, layout: Layout) -> bool:
        """Where they are small."""
        return _are_small(layout)


def _are_small(layout: Layout) -> bool:
    avals = [layout.leaf_avals[i] for i in layout.measured_leaves]
    return layout.num_tasks * sum(a.size * a.dtype.itemsize for a in avals) <= SMALL


def _chosen(linear: LinearMap, layout: Layout) -> Way:
    """The way, by the multiplications of a whole step in which Jᵀw follows the Gramian."""
    if _are_small(layout) or linear.is_bent:
        return Rows()
    tapped = ghost.Ghost().taps(linear, layout.measured)
    rest = [i for i in layout.measured_leaves if i not in tapped]
    if not _stand_inside(linear.program, rest):
        return ghost.Ghost()
    try:
        found = streamed.Streamed().found(linear, layout)
    except NotImplementedError:  # not everything can be mapped over the K cotangents
        return ghost.Ghost()
    by_ghost = by_stream = forward = 0
    for (leaf, _), (layer, turns) in found.items():
        forward += turns * layer.forming
        by_stream += turns * layer.cost.multiplications
        by_ghost += turns * (layer.cost.multiplications if leaf in tapped else layer.by_rows)
    # A pass forth is about half of one back: K cotangents, then the gradients that they leave.
    passes = 1 + layout.num_tasks
    by_stream += (passes + 2) * forward
    by_ghost += (passes + (1 if layout.num_tasks <= ghost.MOST_TASKS_HELD else 2)) * forward
    too_many = is_fewer(_FOR_MEMORY * by_ghost, 100 * by_stream)
    return ghost.Ghost() if too_many else streamed.Streamed()


def _stand_inside(program: Program, leaves: Sequence[int]) -> bool:
    """Whether one of the leaves is read by what only streaming looks into."""
    views = {program.leaves[i] for i in leaves}
    for eqn in program.jaxpr.eqns:
        if views.isdisjoint(variables(eqn)):
            continue
        if eqn.primitive.name in (*_walk.OPENED, "slice"):
            return True
        if eqn.primitive.name in ISOMETRIES:
            views.add(eqn.outvars[0])
    return False
