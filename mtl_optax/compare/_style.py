"""How the pictures look."""

from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by all; lines also differ in style, points in shape.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES: Any = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "osD^vP<X>phd*8H"
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


def plain(text: str) -> str:
    """A user's text, in which Matplotlib reads no formula and from which it hides no label."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def subplots(*shape: int, figsize: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure that no window shows, and its axes."""
    figure = Figure(figsize=figsize)
    return figure, figure.subplots(*shape, **options)
