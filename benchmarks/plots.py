"""The pictures of a comparison, from results alone; they read in grey as well as in colour."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks import summary

# Okabe and Ito's colours, told apart by all; lines also differ in style, points in shape.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = "os^vDPX<>phd*8H"
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
    "savefig.dpi": 160,
}


def draw(results: dict[str, Any], out: Path) -> dict[str, Path]:
    """Writes every picture into `out`; returns their paths by what they show."""
    pictures = {"accuracy": accuracy, "plane": plane, "weights": weights}
    paths = {}
    with plt.rc_context(STYLE):
        for name, picture in pictures.items():
            figure = picture(results)
            if figure is not None:
                paths[name] = out / f"{name}.png"
                figure.savefig(paths[name])
                plt.close(figure)
    return paths


def accuracy(results: dict[str, Any]) -> Figure:
    """A panel a task: the test metric of every strategy with its standard error."""
    reference, *strategies = summary.rows(results)
    equal = next(r for r in strategies if r.name == results["equal_weights"])
    tasks = results["dataset"]["tasks"]
    figure, axes = plt.subplots(
        1,
        len(tasks),
        sharey=True,
        squeeze=False,
        figsize=(1.6 + 3.4 * len(tasks), 1.4 + 0.3 * len(strategies)),
    )
    heights = np.arange(len(strategies))[::-1]
    for axis, task, colour in zip(axes[0], tasks, _cycle(COLOURS, len(tasks)), strict=True):
        _reference_lines(axis.axvline, reference, equal, task)
        estimates = [r.metrics[task] for r in strategies]
        axis.errorbar(
            [100 * e.mean for e in estimates],
            heights,
            xerr=[100 * np.nan_to_num(e.error) for e in estimates],
            fmt="o",
            color=colour,
            capsize=3,
        )
        axis.set_title(f"task: {task}")
        axis.set_xlabel(_metric_label(results, task))
    axes[0, 0].set_yticks(heights, [r.label for r in strategies])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def plane(results: dict[str, Any]) -> Figure | None:
    """The first two tasks against each other: up and to the right is better on both."""
    if len(results["dataset"]["tasks"]) < 2:
        return None
    x_task, y_task = results["dataset"]["tasks"][:2]
    reference, *strategies = summary.rows(results)
    equal = next(r for r in strategies if r.name == results["equal_weights"])
    figure, axis = plt.subplots(figsize=(8.2, 5.2))
    _reference_lines(axis.axvline, reference, equal, x_task)
    _reference_lines(axis.axhline, reference, equal, y_task, labelled=False)
    for i, row in enumerate(strategies):
        x, y = row.metrics[x_task], row.metrics[y_task]
        colour = COLOURS[i % len(COLOURS)]
        axis.errorbar(
            100 * x.mean,
            100 * y.mean,
            xerr=100 * np.nan_to_num(x.error),
            yerr=100 * np.nan_to_num(y.error),
            fmt=MARKERS[i % len(MARKERS)],
            color=colour,
            ecolor="#999999",
            elinewidth=0.8,
            markersize=8,
            markerfacecolor=colour if row.kind == "balancer" else "white",
            markeredgewidth=1.5,
            label=row.label,
        )
    axis.set_xlabel(f"{x_task}: {_metric_label(results, x_task)}")
    axis.set_ylabel(f"{y_task}: {_metric_label(results, y_task)}")
    figure.legend(
        loc="outside right center", title="best Δm first;\nfilled: balancer, hollow: aggregator"
    )
    return figure


def weights(results: dict[str, Any]) -> Figure | None:
    """A panel a strategy: each task's share of the weights during training."""
    tasks = results["dataset"]["tasks"]
    shown = [r for r in summary.rows(results)[1:] if results["strategies"][r.name]["weights"]]
    if not shown:
        return None
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(0.8 + 2.4 * columns, 1.1 + 1.9 * lines),
    )
    steps = results["window_steps"]
    for axis, row in zip(axes.flat, shown, strict=False):
        recorded = results["strategies"][row.name]["weights"]
        curves = np.stack([np.asarray(recorded[task]) for task in tasks])  # (K, S, windows)
        shares = curves / curves.sum(axis=0)
        for i, (task, share) in enumerate(zip(tasks, shares, strict=True)):
            colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
            axis.fill_between(
                steps, share.min(axis=0), share.max(axis=0), color=colour, alpha=0.2, lw=0
            )
            axis.plot(steps, share.mean(axis=0), line, color=colour, label=task)
        axis.set_title(row.label)
        axis.set_ylim(0, 1)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis in axes.flat[len(shown) - columns : len(shown)]:
        axis.tick_params(labelbottom=True)  # the last panel of its column
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("share of the weights, Σ = 1", fontsize=10)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(tasks),
        title="task (line: mean of the seeds; band: all of them)",
    )
    return figure


def _reference_lines(
    draw_line: Any, reference: summary.Row, equal: summary.Row, task: str, *, labelled: bool = True
) -> None:
    for row, style, label in ((reference, "--", "single task"), (equal, ":", "equal weights")):
        draw_line(
            100 * row.metrics[task].mean,
            color="black",
            linestyle=style,
            linewidth=1.2,
            label=label if labelled else None,
        )


def _metric_label(results: dict[str, Any], task: str) -> str:
    seeds = results["settings"]["seeds"]
    error = f", mean ± s.e. of {seeds} seeds" if seeds > 1 else ""
    return f"test {results['dataset']['metric'][task]} (%){error}"


def _cycle(values: tuple[str, ...], count: int) -> list[str]:
    return [values[i % len(values)] for i in range(count)]
