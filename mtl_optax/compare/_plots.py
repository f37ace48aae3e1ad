"""The pictures of a comparison, from results alone; they read in grey as well as in colour."""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from mtl_optax.compare import _curves as curves, _summary as summary
from mtl_optax.compare._selection import EQUAL_WEIGHTS, TUNED
from mtl_optax.compare._style import COLOURS, STYLE, subplots
from mtl_optax.plots import plain

MAX_LABELLED = 5  # strategies with a name in the plane; the others are grey dots
UP, DOWN, LEVEL = COLOURS[0], COLOURS[1], "#777777"


def draw(results: dict[str, Any], only: str | None = None) -> dict[str, bytes]:
    """Every picture as a PNG, or one of them, by what it shows."""
    pictures: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
        "gains": gains,
        "plane": plane,
        "metrics": metrics,
        "losses": curves.losses,
        "norms": curves.norms,
        "cosines": curves.cosines,
        "weights": curves.weights,
    }
    drawn = {n: _png(draw, results) for n, draw in pictures.items() if only in (None, n)}
    return {name: content for name, content in drawn.items() if content is not None}


def draw_together(several: Sequence[dict[str, Any]]) -> bytes:
    """The gains of several comparisons side by side, as a PNG."""
    content = _png(gains, *several)
    assert content is not None
    return content


def _png(picture: Callable[..., Figure | None], *results: dict[str, Any]) -> bytes | None:
    # A name may have letters that no font has; they are drawn as boxes.
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = picture(*results)
        if figure is None:
            return None
        content = io.BytesIO()
        figure.savefig(content, format="png")
        return content.getvalue()


def gains(*several: dict[str, Any]) -> Figure:
    """How much better than equal weights each strategy is, with its interval: a panel a problem."""
    counts = [len(_compared(results)) for results in several]
    size = (7.6, 1.3 + 0.27 * max(counts))
    if len(several) > 1:
        size = (5.2 * len(several), size[1] + 0.5)
    figure, axes = subplots(1, len(several), squeeze=False, figsize=size)
    for axis, results in zip(axes[0], several, strict=True):
        _gains_of(axis, results)
        if len(several) > 1:
            axis.set_title(plain(results["problem"]["title"]))
            axis.set_xlabel(axis.get_xlabel().replace(", ", "\n"))
    return figure


def _compared(results: dict[str, Any]) -> list[summary.Row]:
    others = (EQUAL_WEIGHTS, summary.SINGLE_TASK)
    return [row for row in summary.rows(results) if row.name not in others]


def _gains_of(axis: Any, results: dict[str, Any]) -> None:
    lines, ends = _compared(results), []
    for height, row in zip(range(len(lines))[::-1], lines, strict=True):
        arrow = row.verdicts.get(summary.EQUAL, "")
        colour = {"↑": UP, "↓": DOWN}.get(arrow, LEVEL)
        half = float(np.nan_to_num(row.gain.half))
        axis.errorbar(
            row.gain.mean, height, xerr=half, fmt="o", color=colour, capsize=3,
            markerfacecolor=colour if arrow else "white",
        )  # fmt: skip
        ends += [row.gain.mean - half, row.gain.mean + half]
    axis.axvline(0, color="black", linewidth=1)
    if lines:
        _limit(axis.set_xlim, np.array([*ends, 0.0]))
    axis.set_yticks(range(len(lines))[::-1], [plain(row.label) for row in lines])
    axis.set_ylim(-0.7, len(lines) - 0.3)
    seeds = results["settings"]["seeds"]
    axis.set_xlabel(f"points of Δm better than equal weights, 95 % interval of {seeds} seeds")


def metrics(results: dict[str, Any]) -> Figure:
    """The test metric of every strategy: a panel a task, or a map where tasks are many."""
    names = results["problem"]["metrics"]
    if len(names) > summary.MAX_COLUMNS:
        return _map_of_metrics(results)
    lines = summary.rows(results)
    strategies = [r for r in lines if r.name != summary.SINGLE_TASK]
    figure, axes = subplots(
        1,
        len(names),
        sharey=True,
        squeeze=False,
        figsize=(1.8 + 3.2 * max(len(names), 1.5), 1.6 + 0.26 * len(strategies)),
    )
    heights = np.arange(len(strategies))[::-1]
    for i, (axis, name) in enumerate(zip(axes[0], names, strict=True)):
        _reference_lines(axis.axvline, results, lines, name)
        scale = _scale(results, name)
        axis.errorbar(
            [scale * r.metrics[name].mean for r in strategies],
            heights,
            xerr=[scale * np.nan_to_num(r.metrics[name].half) for r in strategies],
            fmt="o",
            color=COLOURS[i],
            capsize=3,
        )
        ends = [
            m.mean + s * np.nan_to_num(m.half)
            for m in (r.metrics[name] for r in lines)
            for s in (-1, 1)
        ]
        _limit(axis.set_xlim, scale * np.array(ends))
        axis.set_title(plain(name))
        axis.set_xlabel(_label(results, name))
        axis.set_ylim(-0.7, len(strategies) - 0.3)
    axes[0, 0].set_yticks(heights, [plain(r.label) for r in strategies])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _map_of_metrics(results: dict[str, Any]) -> Figure:
    lines, names = summary.rows(results), results["problem"]["metrics"]
    table = np.array([[_scale(results, m) * r.metrics[m].mean for m in names] for r in lines])
    # The colour is the place among the strategies, whatever the unit of a metric is.
    higher = [results["problem"]["higher_is_better"][m] for m in names]
    signs = np.where(higher, 1, -1)
    good = np.where(np.isfinite(table), signs * table, -np.inf)
    places = (good[:, None] > good[None]).sum(axis=1)  # over how many
    figure, axis = subplots(figsize=(2.2 + 0.7 * len(names), 1.8 + 0.26 * len(lines)))
    axis.imshow(places, aspect="auto", cmap="cividis")
    for (i, j), value in np.ndenumerate(table):
        text = f"{value:.3g}" if abs(value) < 1000 else ("≪ 0" if value < 0 else "≫ 0")
        colour = "white" if places[i, j] < len(lines) / 2 else "black"
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(names)), map(plain, names), rotation=45, ha="right")
    axis.set_yticks(range(len(lines)), [plain(r.label) for r in lines])
    axis.grid(visible=False)
    axis.set_xlabel("test metric, mean of the seeds; lighter is better among the strategies")
    return figure


def plane(results: dict[str, Any]) -> Figure | None:
    """The first two metrics against each other, and where random static weights lead."""
    names, lines = results["problem"]["metrics"], summary.rows(results)
    if not 2 <= len(names) <= 3:
        return None
    x_name, y_name = names[:2]
    first = (summary.SINGLE_TASK, EQUAL_WEIGHTS, TUNED)
    labelled = sorted(lines, key=lambda r: r.name not in first)[:MAX_LABELLED]
    figure, axis = subplots(figsize=(7.6, 5.0))

    def both(values: Callable[[str], Any]) -> list[np.ndarray]:
        return [_scale(results, m) * np.array(values(m), float) for m in (x_name, y_name)]

    ends = both(
        lambda m: [
            r.metrics[m].mean + sign * np.nan_to_num(r.metrics[m].half)
            for r in labelled
            for sign in (-1, 1)
        ]
    )
    for set_limits, values in zip((axis.set_xlim, axis.set_ylim), ends, strict=True):
        _limit(set_limits, values, reach=30.0)
    axis.plot(*both(lambda m: results["candidates"][m]), "+", color="#bbbbbb", zorder=1)
    names_at: dict[tuple[float, float, str], list[str]] = {}
    for row in lines:
        x, y = both(lambda m, row=row: row.metrics[m].mean)
        if row not in labelled:
            axis.plot(x, y, ".", color="#999999", zorder=1)
            continue
        x_half, y_half = both(lambda m, row=row: np.nan_to_num(row.metrics[m].half))
        colour = "black" if row.kind in ("reference", "baseline") or row.name in first else UP
        axis.errorbar(x, y, xerr=x_half, yerr=y_half, fmt="o", color=colour, elinewidth=0.8)
        names_at.setdefault((float(x), float(y), colour), []).append(plain(row.label))
    _name_points(axis, names_at)
    axis.set_xlabel(f"{plain(x_name)}: {_label(results, x_name)}")
    axis.set_ylabel(f"{plain(y_name)}: {_label(results, y_name)}")
    return figure


def _name_points(axis: Any, names_at: dict[tuple[float, float, str], list[str]]) -> None:
    """Writes the names beside their points, where they cover no other if there is room."""
    middle = np.mean(axis.get_xlim())
    points = axis.transData.transform([(x, y) for x, y, _ in names_at])
    taken = [Bbox.from_extents(*(point - 5), *(point + 5)) for point in points]
    halo = withStroke(linewidth=2, foreground="white")
    for (x, y, colour), names in names_at.items():
        sides = ("left", "right") if x <= middle else ("right", "left")
        places = [(side, height) for side in sides for height in (5, -14)]
        for i, (side, height) in enumerate([*places, places[0]]):
            note = axis.annotate(
                ", ".join(names), (x, y), xytext=(6 if side == "left" else -6, height),
                textcoords="offset points", ha=side, color=colour,
                annotation_clip=True, clip_on=True, path_effects=[halo],
            )  # fmt: skip
            box = note.get_window_extent()
            if i == len(places) or not any(box.overlaps(other) for other in taken):
                break
            note.remove()
        taken.append(box)


def _reference_lines(
    draw_line: Any, results: dict[str, Any], lines: list[summary.Row], name: str
) -> None:
    names = {
        summary.SINGLE_TASK: ("single task", "--"),
        EQUAL_WEIGHTS: ("equal weights", ":"),
        TUNED: ("tuned static weights", "-."),
    }
    for row in lines:
        if row.name in names:
            label, style = names[row.name]
            draw_line(
                _scale(results, name) * row.metrics[name].mean,
                color="black",
                linestyle=style,
                linewidth=1.1,
                label=label,
            )


def _limit(set_limits: Any, values: np.ndarray, reach: float = 4.0) -> None:
    """Keeps a strategy that failed from squeezing all others into a corner."""
    values = values[np.isfinite(values)]
    if not values.size:
        return
    low, high = np.percentile(values, [15, 85])
    away = reach * (high - low)
    shown = values[(values >= low - away) & (values <= high + away)]
    edge = 0.1 * np.ptp(shown)
    if edge > 0:
        set_limits(shown.min() - edge, shown.max() + edge)


def _scale(results: dict[str, Any], name: str) -> float:
    return 100.0 if summary.percent(results, name) else 1.0


def _label(results: dict[str, Any], name: str) -> str:
    problem, seeds = results["problem"], results["settings"]["seeds"]
    better = "higher" if problem["higher_is_better"][name] else "lower"
    unit = plain(problem["unit"][name] or "metric")
    return f"test {unit}, {better} is better\n95 % interval of {seeds} seeds"
