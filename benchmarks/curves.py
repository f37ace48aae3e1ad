"""Pictures of what happens during training: losses, weights and cosines over the steps."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks import summary
from benchmarks.style import look

MAX_PANELS = 12
MAX_LINES = 5  # strategies in a picture of losses


def losses(results: dict[str, Any]) -> Figure | None:
    """A panel a task: the training loss of the baselines and the best strategies."""
    references = (results["equal_weights"], results["tuned_weights"])
    strategies = [r for r in summary.rows(results) if r.name in results["strategies"]]
    best = [r for r in strategies if r.name not in references][: MAX_LINES - len(references)]
    shown = [r for r in strategies if r.name in references] + best
    figure, panels = _panels(results["dataset"]["tasks"], results)
    for task, axis in panels.items():
        runs = {r.label: results["strategies"][r.name]["train_loss"][task] for r in shown}
        if task in results["single_task"]:
            runs["single task"] = results["single_task"][task]["train_loss"][task]
        for i, (name, curve) in enumerate(runs.items()):
            axis.plot(results["window_steps"], np.mean(curve, axis=0), label=name, **look(i))
        axis.set_yscale("log")
    _finish(figure, panels, "training loss, mean of the seeds")
    return figure


def weights(results: dict[str, Any]) -> Figure | None:
    """A panel a strategy: each task's share of the weights."""
    tasks = results["dataset"]["tasks"]
    shown = _those_with(results, "weights")
    if not shown:
        return None
    figure, panels = _panels(shown, results, sharey=True)
    for name, axis in panels.items():
        recorded = results["strategies"][name]["weights"]
        shares = np.stack([np.array(recorded[task]) for task in tasks])  # (K, S, windows)
        shares = shares / shares.sum(axis=0)
        _lines(axis, results["window_steps"], dict(zip(tasks, shares, strict=True)))
        if len(tasks) <= summary.MAX_COLUMNS:
            axis.set_ylim(0, 1)
    _finish(figure, panels, "share of the weights, Σ = 1 (band: all seeds)")
    return figure


def cosines(results: dict[str, Any]) -> Figure | None:
    """A panel a strategy: the cosine of each pair of tasks, or their spread if pairs are many."""
    shown = _those_with(results, "cosine")
    if not shown:
        return None
    figure, panels = _panels(shown, results, sharey=True)
    for name, axis in panels.items():
        pairs = {pair: np.array(c) for pair, c in results["strategies"][name]["cosine"].items()}
        if len(pairs) > summary.MAX_COLUMNS:
            flat = np.concatenate(list(pairs.values()))
            pairs = {
                f"{share} % of the pairs are below": np.nanpercentile(flat, share, axis=0)[None]
                for share in (10, 50, 90)
            }
        _lines(axis, results["checkpoint_steps"], pairs)
        axis.axhline(0, color="black", linewidth=0.8)
    _finish(figure, panels, "cosine of the tasks' gradients (band: all seeds)")
    return figure


def _those_with(results: dict[str, Any], what: str) -> list[str]:
    """The names of the baselines, then of the best strategies, that have recorded something."""
    references = (results["equal_weights"], results["tuned_weights"])
    names = [r.name for r in summary.rows(results) if r.name in results["strategies"]]
    names.sort(key=lambda name: name not in references)
    return [name for name in names if results["strategies"][name][what]][:MAX_PANELS]


def _panels(
    names: list[str], results: dict[str, Any], *, sharey: bool = False
) -> tuple[Figure, dict[str, Any]]:
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        sharex=True,
        sharey=sharey,
        squeeze=False,
        figsize=(1.2 + 2.5 * max(columns, 2), 1.4 + 1.9 * lines),
    )
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis in axes.flat[max(len(names) - columns, 0) : len(names)]:
        axis.tick_params(labelbottom=True)  # the last panel of its column
    panels = dict(zip(names, axes.flat, strict=False))
    for name, axis in panels.items():
        axis.set_title("sum (equal)" if name == results["equal_weights"] else name)
    return figure, panels


def _lines(axis: Any, steps: list[float], curves: dict[str, np.ndarray]) -> None:
    for i, (name, curve) in enumerate(curves.items()):
        style = look(i)
        band = np.nan_to_num(curve)
        axis.fill_between(
            steps, band.min(axis=0), band.max(axis=0), color=style["color"], alpha=0.15, lw=0
        )
        axis.plot(steps, band.mean(axis=0), label=name, **style)


def _finish(figure: Figure, panels: dict[str, Any], label: str) -> None:
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel(label, fontsize=10)
    handles, names = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))
