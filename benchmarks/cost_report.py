"""Draws what the cost benchmarks measured, and writes their tables into the pages of the docs.

Reads benchmarks/results alone; a benchmark that has not run leaves its part as it is.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import (
    accuracy,
    aggregate_time,
    compile_time,
    helmholtz,
    launches,
    memory,
    scaling,
    step_time,
    tables,
    timing,
)
from benchmarks.steps import CONTROL, PLAIN, WAYS
from benchmarks.timing import OURS, PEER
from mtl_optax.compare._style import COLOURS, MARKERS, STYLE, look

DOCS = Path(__file__).parent.parent / "docs"
# Dark and plain against light and hatched: the two are told apart in grey.
BARS: dict[str, dict[str, Any]] = {
    OURS: {"color": COLOURS[0]},
    PEER: {"color": COLOURS[5], "hatch": "///", "edgecolor": "white"},
}
TARGET: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.4}


def draw_step_time(results: dict[str, Any]) -> Figure:
    """A panel a workload, a bar a step; the target of each group across its bars."""
    return _draw_steps(results, results["workloads"])


def draw_gpu_step_time(results: dict[str, Any]) -> Figure:
    """The same in milliseconds, which say more where launching is what takes time."""
    shown = ("mlp-8", "large-mlp-8", "large-transformer-3")
    return _draw_steps(results, {name: results["workloads"][name] for name in shown}, ms=True)


def _draw_steps(results: dict[str, Any], workloads: dict[str, Any], *, ms: bool = False) -> Figure:
    groups = {label: row["group"] for w in workloads.values() for label, row in w["rows"].items()}
    order = list(dict.fromkeys([PLAIN, *(way.group for way in WAYS.values())]))
    labels = [
        label
        for label in step_time.labels_of(workloads)
        if CONTROL not in label and (ms or groups[label] != PLAIN)
    ]
    shown = sorted(labels, key=lambda label: order.index(groups[label]))
    figure, axes = _panels(len(workloads), len(shown))
    for axis, (name, workload) in zip(axes, workloads.items(), strict=True):
        for framework, bar in BARS.items():
            rows = {
                y: workload["rows"][label]
                for y, label in enumerate(shown)
                if label in workload["rows"] and label.startswith(framework)
            }
            plain = 1e3 * workload["rows"][f"{framework}: {PLAIN}"]["seconds"] if ms else 1.0
            ratios = plain * np.array([row["ratio"] for row in rows.values()])
            quartiles = plain * np.array([row["quartiles"] for row in rows.values()]).reshape(-1, 2)
            spread = np.abs(quartiles.T - ratios)
            axis.barh(list(rows), ratios, xerr=spread, label=framework, ecolor="#444444", **bar)
        for group, limits in step_time.targets_for(results).items():
            if name in limits:
                ys = [y for y, label in enumerate(shown) if groups[label] == group]
                axis.vlines(limits[name], min(ys) - 0.5, max(ys) + 0.5, label="target", **TARGET)
        axis.set_title(f"{name}, K = {workload['num_tasks']}")
        axis.set_xlim(left=0)
        axis.margins(y=0.01)
    axes[0].set_yticks(range(len(shown)), [label.split(": ")[1] for label in shown])
    axes[0].invert_yaxis()
    handles = {
        label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    unit = "milliseconds" if ms else "in plain summed-loss steps of the same framework"
    figure.supxlabel(f"time of a step, {unit}", fontsize=10)
    return figure


def draw_aggregate_time(results: dict[str, Any]) -> Figure:
    """A bar a call for ours and for TorchJD's where it took a turn, on a logarithmic scale."""
    rows = results["rows"]
    figure, (axis,) = _panels(1, round(1.6 * len(rows)))
    heights = np.arange(len(rows))
    for i, (framework, bar) in enumerate(BARS.items()):
        timed = [k for k, row in enumerate(rows) if i < len(row["seconds"])]
        if timed:
            ms = 1e3 * np.array([rows[k]["seconds"][i] for k in timed])
            places = heights[timed] + 0.4 * i - 0.2
            axis.barh(places, ms, 0.38, label=framework, log=True, **bar)
    names = [
        f"{row['strategy']}, {row['num_tasks']} x {row['columns']:,} {row['kind']}" for row in rows
    ]
    axis.set_yticks(heights, names)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set_xlabel("ms a call; of a Jacobian with 2 K columns, TorchJD is given the Gramian")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def draw_memory(results: dict[str, Any]) -> Figure:
    """Two bars a step: memory as compiled, and as the process grows."""
    rows = results["rows"]
    figure, (axis,) = _panels(1, round(1.6 * len(rows)))
    heights = np.arange(len(rows))
    temp = [row["temp_bytes"] / 1e6 for row in rows.values()]
    growth = [(row["growth_bytes"] or 0) / 1e6 for row in rows.values()]
    looks = list(BARS.values())
    axis.barh(heights - 0.2, temp, 0.38, label="temporary memory, as compiled", **looks[0])
    axis.barh(heights + 0.2, growth, 0.38, label="growth of the process", **looks[1])
    if memory.HELD in rows:
        limit = memory.TARGET * rows[memory.HELD]["temp_bytes"] / 1e6
        axis.axvline(limit, label="target for an exact Gramian, as compiled", **TARGET)
    axis.set_yticks(heights, list(rows))
    axis.invert_yaxis()
    axis.set_xlabel(f"MB, a step of {results['settings']['workload']}")
    figure.legend(loc="outside upper center", ncols=1)
    return figure


def draw_compile_time(results: dict[str, Any]) -> Figure:
    """A panel a workload, a bar a step."""
    workloads = results["workloads"]
    rows = results["settings"]["rows"]
    figure, axes = _panels(len(workloads), len(rows))
    for axis, (name, taken) in zip(axes, workloads.items(), strict=True):
        ratios = [taken[row]["processor"] / taken[PLAIN]["processor"] for row in rows]
        axis.barh(range(len(rows)), ratios, **BARS[OURS])
        if not name.startswith("stacked"):
            axis.axvline(compile_time.TARGET, **TARGET)
        axis.set_title(f"{name}: plain {taken[PLAIN]['processor']:.1f} s")
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    figure.supxlabel("processor time to compile, in plain steps; dashed: target", fontsize=10)
    return figure


def draw_scaling(results: dict[str, Any]) -> Figure:
    """Three panels: time against K, memory against P, memory a device against devices."""
    panels = (("tasks", "seconds"), ("params", "temp_bytes"), ("devices", "temp_bytes"))
    figure, axes = plt.subplots(1, len(panels), figsize=(11.5, 4.2))
    for axis, (part, key) in zip(axes, panels, strict=True):
        xs = results[part]["x"]
        for i, (way, ys) in enumerate(results[part][key].items()):
            axis.loglog(xs, ys, marker=MARKERS[i], label=way, **look(i))
        axis.set_xlabel(scaling.X_LABELS[part])
        axis.set_title(scaling.QUANTITIES[key])
        if part != "params":
            axis.set_xticks(xs, [str(x) for x in xs])
            axis.xaxis.set_minor_locator(NullLocator())
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


class Part(NamedTuple):
    """A benchmark, its picture, and the page that shows both."""

    benchmark: Any
    draw: Callable[[dict[str, Any]], Figure] | None
    page: str = "performance.md"


PARTS = {
    "step_time": Part(step_time, draw_step_time),
    "aggregate_time": Part(aggregate_time, draw_aggregate_time),
    "memory": Part(memory, draw_memory),
    "compile_time": Part(compile_time, draw_compile_time),
    "scaling": Part(scaling, draw_scaling, "scaling.md"),
    "accuracy": Part(accuracy, None),
    "helmholtz_full": Part(helmholtz, None, "results.md"),
    "gpu/step_time": Part(step_time, draw_gpu_step_time, "gpu.md"),
    "gpu/launches": Part(launches, None, "gpu.md"),
}


def main() -> None:
    """Runs the command line."""
    for name, (benchmark, draw, page) in PARTS.items():
        file = timing.RESULTS / f"{name}.json"
        if not file.exists():
            print(f"{file} is missing: run python -m {benchmark.__name__} --name {name}")
            continue
        results = json.loads(file.read_text(encoding="utf-8"))
        if draw is not None:
            with plt.rc_context(STYLE):
                figure = draw(results)
                figure.savefig(DOCS / "images" / f"{name.replace('/', '_')}.png")
                plt.close(figure)
        where = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
        parts = [tables.markdown(cells) for cells in benchmark.tables_of(results)]
        text = "\n\n".join([*parts, f"Measured with {where}."])
        document = (DOCS / page).read_text(encoding="utf-8")
        (DOCS / page).write_text(tables.fill(document, name, text), encoding="utf-8")
        print(f"written: {name} in {DOCS / page}" + ", and its picture" * (draw is not None))


def _panels(count: int, bars: int) -> tuple[Figure, list[Axes]]:
    size = (2.6 + (2.2 if count > 1 else 5) * count, 1.5 + 0.24 * bars)
    figure, axes = plt.subplots(1, count, sharey=True, squeeze=False, figsize=size)
    for axis in axes[0]:
        axis.locator_params(axis="x", nbins=6)
    return figure, list(axes[0])


if __name__ == "__main__":
    main()
