"""How a Jacobian is measured, as a table."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from mtl_optax.jacobian._layout import Layout


class LeafPlan(NamedTuple):
    """One parameter's row of a `Plan`.

    Attributes:
      name: its path in the tree.
      shape: its shape.
      trained: whether it is differentiated; the rest of a frozen parameter's row is empty.
      shared: whether two or more losses depend on it, or a mask says so.
      way: how its part of the Gramian is measured; empty where it is not.
      multiplications: to measure it, of matrix products, beyond the K cotangents of its layer.
      bytes_held: of what exists once a task to measure it.
      note: what to look at.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool
    shared: bool
    way: str = ""
    multiplications: int = 0
    bytes_held: int = 0
    note: str = ""


class Plan(NamedTuple):
    """What `Jacobian.plan` returns: print it, or read its rows."""

    leaves: tuple[LeafPlan, ...]

    def __str__(self) -> str:
        title = ("parameter", "shape", "", "measured by", "multiplications", "bytes held", "")
        body = [
            (
                leaf.name,
                str(leaf.shape),
                "frozen" if not leaf.trained else "shared" if leaf.shared else "head",
                leaf.way or "-",
                f"{leaf.multiplications:,}" if leaf.way else "-",
                f"{leaf.bytes_held:,}" if leaf.way else "-",
                leaf.note,
            )
            for leaf in self.leaves
        ]
        total = (
            "total", "", "", "",
            f"{sum(leaf.multiplications for leaf in self.leaves):,}",
            f"{sum(leaf.bytes_held for leaf in self.leaves):,}",
            "",
        )  # fmt: skip
        lines = [title, *body, total]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def plan(source: Any, way: Any, layout: Layout) -> Plan:
    """The table of a Jacobian's parts."""
    costs, touches = way.costs(source, layout), source.touches
    indices = iter(range(layout.num_leaves))
    leaves = []
    for name, is_trained, aval in zip(_names(layout), layout.trained, layout.avals, strict=True):
        shape = aval.shape
        if not is_trained:
            leaves.append(LeafPlan(name, shape, trained=False, shared=False))
            continue
        i = next(indices)
        row = LeafPlan(name, shape, trained=True, shared=layout.shared[i])
        if i in costs:
            row = row._replace(**costs[i]._asdict())
        stacked = layout.num_tasks > 1 and shape[:1] == (layout.num_tasks,)
        if row.shared and stacked and touches[i] == layout.num_tasks:
            row = row._replace(
                note=f"as many slices as tasks, taken as shared: if they are heads stacked in one "
                f"leaf, say so by value_and_jac(in_axes=...) with 0 for {name!r}, or shared="
                "... with False"
            )
        elif not touches[i]:
            row = row._replace(note="no loss depends on it")
        leaves.append(row)
    return Plan(tuple(leaves))


def _names(layout: Layout) -> list[str]:
    positions = layout.params_def.unflatten(range(len(layout.avals)))
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    # A variable's first key is the attribute that holds its value.
    paths = [
        (*path, *inner[1:])
        for path, node in jax.tree_util.tree_leaves_with_path(positions, is_leaf=is_variable)
        for inner, _ in jax.tree_util.tree_leaves_with_path(node)
    ]
    return [jax.tree_util.keystr(path, simple=True, separator="/") or "0" for path in paths]
