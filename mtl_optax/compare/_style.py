"""How the pictures look."""

from typing import Any

from matplotlib.figure import Figure

from mtl_optax import plots

# Those of `mtl.plots`, with black last, since references are drawn in it.
COLOURS = sorted(plots._COLOURS, key="#000000".__eq__)
LINES: Any = plots._LINES
MARKERS = f"{plots._MARKERS}phd*8H"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
}


def look(i: int) -> dict[str, Any]:
    """Colour and line style number `i`."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}


def subplots(*shape: int, figsize: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure that no window shows, and its axes."""
    figure = Figure(figsize=figsize)
    return figure, figure.subplots(*shape, **options)
