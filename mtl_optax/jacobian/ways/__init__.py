"""The ways to measure the Gramian, one file each. `named` lists those that have a name."""

from typing import Literal

from mtl_optax.jacobian.ways._base import Measurement, Way
from mtl_optax.jacobian.ways.auto import Auto
from mtl_optax.jacobian.ways.columns import Columns
from mtl_optax.jacobian.ways.ghost import Ghost
from mtl_optax.jacobian.ways.rows import Rows
from mtl_optax.jacobian.ways.streamed import Streamed

Gramian = Literal["auto", "rows", "ghost", "streamed", "columns"] | Way
NAMED: dict[str, type[Way]] = {
    "auto": Auto,
    "rows": Rows,
    "ghost": Ghost,
    "streamed": Streamed,
    "columns": Columns,
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
