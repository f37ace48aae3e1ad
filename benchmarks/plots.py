"""The pictures of a comparison, from results alone; they read in grey as well as in colour."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks import curves, summary
from benchmarks.style import COLOURS, MARKERS, STYLE

MAX_MARKED = 14  # strategies with their own marker; the others are grey dots


def draw(results: dict[str, Any], out: Path) -> dict[str, Path]:
    """Writes every picture into `out`; returns their paths by what they show."""
    pictures = {
        "metrics": metrics,
        "ranks": ranks,
        "plane": plane,
        "losses": curves.losses,
        "weights": curves.weights,
        "cosines": curves.cosines,
    }
    paths = {}
    with plt.rc_context(STYLE):
        for name, picture in pictures.items():
            figure = picture(results)
            if figure is not None:
                paths[name] = out / f"{name}.png"
                figure.savefig(paths[name])
                plt.close(figure)
    return paths


def metrics(results: dict[str, Any]) -> Figure:
    """The test metric of every strategy: a panel a task, or a map where tasks are many."""
    if len(results["dataset"]["measured"]) > summary.MAX_COLUMNS:
        return _map_of_metrics(results)
    lines, measured = summary.rows(results), results["dataset"]["measured"]
    strategies = [r for r in lines if r.name != summary.SINGLE_TASK]
    figure, axes = plt.subplots(
        1,
        len(measured),
        sharey=True,
        squeeze=False,
        figsize=(1.8 + 3.2 * max(len(measured), 1.5), 1.6 + 0.26 * len(strategies)),
    )
    heights = np.arange(len(strategies))[::-1]
    for i, (axis, task) in enumerate(zip(axes[0], measured, strict=True)):
        _reference_lines(axis.axvline, results, lines, task)
        scale = _scale(results, task)
        axis.errorbar(
            [scale * r.metrics[task].mean for r in strategies],
            heights,
            xerr=[scale * np.nan_to_num(r.metrics[task].error) for r in strategies],
            fmt="o",
            color=COLOURS[i],
            capsize=3,
        )
        ends = [
            m.mean + s * np.nan_to_num(m.error)
            for m in (r.metrics[task] for r in lines)
            for s in (-1, 1)
        ]
        _limit(axis.set_xlim, scale * np.array(ends))
        axis.set_title(task)
        axis.set_xlabel(_label(results, task))
        axis.set_ylim(-0.7, len(strategies) - 0.3)
    axes[0, 0].set_yticks(heights, [r.label for r in strategies])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _map_of_metrics(results: dict[str, Any]) -> Figure:
    lines, measured = summary.rows(results), results["dataset"]["measured"]
    table = 100 * np.array([[r.metrics[t].mean for t in measured] for r in lines])
    figure, axis = plt.subplots(figsize=(2.2 + 0.62 * len(measured), 1.8 + 0.26 * len(lines)))
    low = max(0.0, np.nanmin(table))
    shown = axis.imshow(np.clip(table, low, 100), aspect="auto", cmap="cividis", vmin=low, vmax=100)
    for (i, j), value in np.ndenumerate(table):
        text = f"{value:.0f}" if value > -1000 else "≪ 0"
        axis.text(
            j, i, text, ha="center", va="center", fontsize=8,
            color="white" if value < (low + 100) / 2 else "black",
        )  # fmt: skip
    axis.set_xticks(range(len(measured)), measured, rotation=45, ha="right")
    axis.set_yticks(range(len(lines)), [r.label for r in lines])
    axis.grid(visible=False)
    name = results["dataset"]["metric"][measured[0]]
    figure.colorbar(shown, label=f"test {name} (%), mean of the seeds", shrink=0.6)
    axis.set_xlabel("task")
    return figure


def ranks(results: dict[str, Any]) -> Figure | None:
    """Mean ranks over tasks and seeds, and how far apart chance alone would put them."""
    ranked = [(r, r.rank) for r in summary.rows(results) if r.rank]
    if len(ranked) < 3:
        return None
    ranked.sort(key=lambda pair: pair[1].mean)
    seeds, tasks = results["settings"]["seeds"], len(results["dataset"]["measured"])
    figure, axis = plt.subplots(figsize=(7.2, 1.4 + 0.26 * len(ranked)))
    distance = critical_difference(len(ranked), seeds * tasks)
    best = ranked[0][1].mean
    axis.axvspan(
        best, best + distance, color="#dddddd", lw=0,
        label=f"within {distance:.1f} of the best: not told apart (Nemenyi, 5 %)",
    )  # fmt: skip
    for kind, colour in (("balancer", "#0072B2"), ("aggregator", "white"), ("baseline", "black")):
        chosen = [(i, rank) for i, (r, rank) in enumerate(ranked) if _kind(results, r) == kind]
        axis.errorbar(
            [rank.mean for _, rank in chosen],
            [i for i, _ in chosen],
            xerr=[np.nan_to_num(rank.error) for _, rank in chosen],
            fmt="o",
            color="#0072B2" if kind != "baseline" else "black",
            markerfacecolor=colour,
            markersize=7,
            capsize=3,
            label=kind,
        )
    axis.set_yticks(range(len(ranked)), [r.label for r, _ in ranked])
    axis.set_ylim(len(ranked) - 0.3, -0.7)
    axis.set_xlabel(f"mean rank over {tasks} metric(s), mean ± s.e. of {seeds} seeds; 1 is best")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def critical_difference(num_methods: int, num_blocks: int) -> float:
    """Nemenyi's critical difference of mean ranks at 5 %, its quantile by simulation."""
    draws = np.random.default_rng(0).normal(size=(20_000, num_methods))
    quantile = np.quantile(np.ptp(draws, axis=1), 0.95) / np.sqrt(2)
    return float(quantile * np.sqrt(num_methods * (num_methods + 1) / (6 * num_blocks)))


def plane(results: dict[str, Any]) -> Figure | None:
    """The first two metrics against each other, and where random static weights lead."""
    dataset, lines = results["dataset"], summary.rows(results)
    if not 2 <= len(dataset["measured"]) <= 3:
        return None
    x_task, y_task = dataset["measured"][:2]
    references = (results["equal_weights"], results["tuned_weights"])
    strategies = [r for r in lines if r.name != summary.SINGLE_TASK]
    marked = [r for r in strategies if r.name in references]
    marked += [r for r in strategies if r.name not in references][: MAX_MARKED - len(marked)]
    figure, axis = plt.subplots(figsize=(8.6, 5.4))
    _reference_lines(axis.axvline, results, lines, x_task)
    _reference_lines(axis.axhline, results, lines, y_task, labelled=False)

    def both(values: Callable[[str], Any]) -> list[np.ndarray]:
        return [_scale(results, task) * np.array(values(task)) for task in (x_task, y_task)]

    def means(rows: list[summary.Row]) -> list[np.ndarray]:
        return both(lambda task: [r.metrics[task].mean for r in rows])

    def points(rows: list[summary.Row], **style: Any) -> None:
        x_error, y_error = both(lambda task: [r.metrics[task].error for r in rows])
        axis.errorbar(
            *means(rows),
            xerr=np.nan_to_num(x_error),
            yerr=np.nan_to_num(y_error),
            ecolor="#aaaaaa",
            elinewidth=0.8,
            linestyle="none",
            **style,
        )

    # The best are close together: they fill the picture, and what lies outside is counted.
    shown = [r for r in lines if r in marked or r.name == summary.SINGLE_TASK]
    for set_limits, values in zip((axis.set_xlim, axis.set_ylim), means(shown), strict=True):
        _limit(set_limits, values)
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()

    def counted(label: str, x: np.ndarray, y: np.ndarray) -> str:
        inside = (left <= x) & (x <= right) & (bottom <= y) & (y <= top)
        outside = len(x) - int(np.sum(inside))
        count = f"{outside} " if len(x) > 1 else ""
        return f"{label} ({count}outside)" if outside else label

    candidates = both(lambda task: results["candidates"][task])
    label = counted("random weights × rates", *candidates)
    axis.plot(*candidates, "+", color="#777777", label=label, zorder=1)
    if others := [r for r in strategies if r not in marked]:
        label = counted("other strategies", *means(others))
        points(others, marker=".", color="#999999", label=label, zorder=1)
    for i, row in enumerate(marked):
        colour = "black" if row.name in references else COLOURS[i % (len(COLOURS) - 1)]
        hollow = row.kind == "aggregator" and row.name not in references
        points(
            [row],
            marker=MARKERS[i % len(MARKERS)],
            color=colour,
            markersize=8,
            markerfacecolor="white" if hollow else colour,
            markeredgewidth=1.5,
            label=counted(row.label, *means([row])),
        )
    axis.set_xlabel(f"{x_task}: {_label(results, x_task)}")
    axis.set_ylabel(f"{y_task}: {_label(results, y_task)}")
    figure.legend(
        loc="outside right center", title="baselines, then best Δm first;\nhollow: aggregator"
    )
    return figure


def _kind(results: dict[str, Any], row: summary.Row) -> str:
    return "baseline" if row.name == results["equal_weights"] else row.kind


def _reference_lines(
    draw_line: Any,
    results: dict[str, Any],
    lines: list[summary.Row],
    task: str,
    *,
    labelled: bool = True,
) -> None:
    names = {
        summary.SINGLE_TASK: ("single task", "--"),
        results["equal_weights"]: ("equal weights", ":"),
        results["tuned_weights"]: ("tuned static weights", "-."),
    }
    for row in lines:
        if row.name in names:
            label, style = names[row.name]
            draw_line(
                _scale(results, task) * row.metrics[task].mean,
                color="black",
                linestyle=style,
                linewidth=1.1,
                label=label if labelled else None,
            )


def _limit(set_limits: Any, values: np.ndarray) -> None:
    """Keeps a strategy that failed from squeezing all others into a corner."""
    low, high = np.nanpercentile(values, [15, 85])
    reach = 4 * (high - low)
    shown = values[(values >= low - reach) & (values <= high + reach)]
    edge = 0.1 * np.ptp(shown)
    if edge > 0:
        set_limits(shown.min() - edge, shown.max() + edge)


def _scale(results: dict[str, Any], task: str) -> float:
    return 100.0 if results["dataset"]["percent"][task] else 1.0


def _label(results: dict[str, Any], task: str) -> str:
    dataset, seeds = results["dataset"], results["settings"]["seeds"]
    unit = " (%)" if dataset["percent"][task] else ""
    better = "higher" if dataset["higher_is_better"][task] else "lower"
    return f"test {dataset['metric'][task]}{unit}, {better} is better\nmean ± s.e. of {seeds} seeds"
