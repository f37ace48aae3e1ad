"""The ways to measure the Gramian, one file each. `named` lists those that have a name."""

from typing import Literal

from mtl_optax.jacobian.ways._base import Measurement, Way
from mtl_optax.jacobian.ways.columns import Columns
from mtl_optax.jacobian.ways.ghost import Ghost
from mtl_optax.jacobian.ways.rows import Rows
from mtl_optax.jacobian.ways.streamed import Streamed

Gramian = Literal["rows", "ghost", "columns", "streamed"] | Way
NAMED: dict[str, type[Way]] = {
    "rows": Rows,
    "ghost": Ghost,
    "columns": Columns,
    "streamed": Streamed,
}


def named(gramian: Gramian) -> Way:
    """The way that a user asks for, by its name or as an object."""
    if isinstance(gramian, Way):
        return gramian
    if gramian not in NAMED:
        raise ValueError(
            f"gramian={gramian!r} is not a way to the Gramian: expected one of {tuple(NAMED)}, or "
            "an mtl.Sketch(key) for an approximate one"
        )
    return NAMED[gramian]()


__all__ = ["Gramian", "Measurement", "Rows", "Way", "named"]
