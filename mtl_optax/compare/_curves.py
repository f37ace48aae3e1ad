"""Pictures of what happens during training: losses, weights and cosines over the steps."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mtl_optax.compare import _summary as summary
from mtl_optax.compare._selection import EQUAL_WEIGHTS, TUNED
from mtl_optax.compare._statistics import of_finite
from mtl_optax.compare._style import look, subplots
from mtl_optax.plots import plain

MAX_PANELS = 12
MAX_LINES = 5  # strategies in a picture of losses


def losses(results: dict[str, Any]) -> Figure | None:
    """A panel a task: the training loss of the baselines and the best strategies."""
    references = (EQUAL_WEIGHTS, TUNED)
    strategies = [r for r in summary.rows(results) if r.name in results["strategies"]]
    best = [r for r in strategies if r.name not in references][: MAX_LINES - len(references)]
    shown = [r for r in strategies if r.name in references] + best
    tasks = results["problem"]["tasks"][:MAX_PANELS]
    figure, panels = _panels(tasks, results)
    for task, axis in panels.items():
        runs = {r.label: results["strategies"][r.name]["train_loss"][task] for r in shown}
        if task in results["single_task"]:
            runs["single task"] = results["single_task"][task]["train_loss"][task]
        for i, (name, curve) in enumerate(runs.items()):
            axis.plot(results["window_steps"], _mean(curve), label=plain(name), **look(i))
        if not _has_zero(runs):
            axis.set_yscale("log")
    _finish(figure, panels, "training loss, mean of the seeds")
    return figure


def weights(results: dict[str, Any]) -> Figure | None:
    """A panel a strategy: each task's share of the weights."""
    tasks = results["problem"]["tasks"]
    shown = _those_with(results, "weights")
    if not shown:
        return None
    figure, panels = _panels(shown, results, sharey=True)
    for name, axis in panels.items():
        recorded = results["strategies"][name]["weights"]
        shares = np.stack([np.array(recorded[task], float) for task in tasks])  # (K, S, windows)
        total = shares.sum(axis=0)
        shares = shares / np.where(total == 0, np.nan, total)
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
        recorded = results["strategies"][name]["cosine"]
        pairs = {pair: np.array(cosine, float) for pair, cosine in recorded.items()}
        _lines(axis, results["checkpoint_steps"], pairs)
        axis.axhline(0, color="black", linewidth=0.8)
    _finish(figure, panels, "cosine of the tasks' gradients (band: all seeds)")
    return figure


def norms(results: dict[str, Any]) -> Figure | None:
    """A panel a strategy: the norm of each task's gradient."""
    shown = _those_with(results, "norm")[:4]
    figure, panels = _panels(shown, results, sharey=True)
    for name, axis in panels.items():
        recorded = results["strategies"][name]["norm"]
        _lines(
            axis,
            results["checkpoint_steps"],
            {task: np.array(norm, float) for task, norm in recorded.items()},
        )
        axis.set_yscale("symlog" if _has_zero(recorded) else "log")
    _finish(figure, panels, "norm of the tasks' gradients (band: all seeds)")
    return figure


def _has_zero(recorded: dict[str, Any]) -> bool:
    """Whether something is 0 or less, or no number at all: no logarithm can show it."""
    values = [np.array(value, float) for value in recorded.values()]
    return any(np.any(value <= 0) or not np.isfinite(value).any() for value in values)


def _mean(curve: Any) -> np.ndarray:
    return of_finite(np.nanmean, np.array(curve, float))


def _those_with(results: dict[str, Any], what: str) -> list[str]:
    """The names of the baselines, then of the best strategies, that have recorded something."""
    references = (EQUAL_WEIGHTS, TUNED)
    names = [r.name for r in summary.rows(results) if r.name in results["strategies"]]
    names.sort(key=lambda name: name not in references)
    return [name for name in names if results["strategies"][name][what]][:MAX_PANELS]


def _panels(
    names: list[str], results: dict[str, Any], *, sharey: bool = False
) -> tuple[Figure, dict[str, Any]]:
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = subplots(
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
        axis.set_title("sum (equal)" if name == EQUAL_WEIGHTS else plain(name))
    return figure, panels


def _lines(axis: Any, steps: list[float], curves: dict[str, np.ndarray]) -> None:
    for i, (name, curve) in enumerate(curves.items()):
        style = look(i)
        low, middle, high = (of_finite(s, curve) for s in (np.nanmin, np.nanmean, np.nanmax))
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)
        axis.plot(steps, middle, label=plain(name), **style)


def _finish(figure: Figure, panels: dict[str, Any], label: str) -> None:
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel(label, fontsize=10)
    handles, names = next(iter(panels.values())).get_legend_handles_labels()
    handles, names = handles[:MAX_PANELS], names[:MAX_PANELS]
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))
