"""How long a train step takes to compile, without any cache.

Seconds of the clock, and seconds of the processor on all its cores, which neighbours disturb less:
the tables and ratios are of the latter. `python -m benchmarks.cost_report` draws the results.
"""

import dataclasses
import statistics
import time
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import Progress

from benchmarks import tables
from benchmarks.steps import PLAIN, WAYS, train_step
from benchmarks.tables import Cells
from benchmarks.workloads import WORKLOADS

TARGET = 2.0  # plain steps, for heads in a dict
STAGES = ("trace", "lower", "compile")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.compile_time` takes."""

    workloads: tuple[Literal[tuple(WORKLOADS)], ...] = (  # pyright: ignore[reportInvalidTypeForm]
        "mlp-8", "mlp-40", "stacked-mlp-40",
    )  # fmt: skip
    """What to train."""
    rows: tuple[Literal[tuple(WAYS)], ...] = (  # pyright: ignore[reportInvalidTypeForm]
        "uncertainty", "upgrad, features", "upgrad, isolated rows", "upgrad, batched rows",
        "upgrad, columns", "upgrad, ghost",
    )  # fmt: skip
    """Which steps beside the plain one."""
    name: str = "compile_time"
    """Name of the file of results; give another one on another machine."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """The results of every workload, ready for JSON."""
    jax.config.update("jax_enable_compilation_cache", False)
    stages(options.workloads[0], PLAIN)  # what is traced once for all would count for the first
    workloads = {}
    with Progress(console=console) as progress:
        for name in options.workloads:
            # The plain step takes a turn before, amid and after the others.
            half = len(options.rows) // 2
            turns = [PLAIN, *options.rows[:half], PLAIN, *options.rows[half:], PLAIN]
            found: dict[str, list[dict[str, float]]] = {row: [] for row in (PLAIN, *options.rows)}
            for row in progress.track(turns, description=f"{name}: compiling"):
                found[row].append(stages(name, row))
            workloads[name] = {
                row: {key: statistics.median(t[key] for t in taken) for key in taken[0]}
                for row, taken in found.items()
            }
    return {"settings": dataclasses.asdict(options), "workloads": workloads}


def stages(workload: str, row: str) -> dict[str, float]:
    """The seconds of each stage, of all of them, and of the processor."""
    step, state = train_step(WORKLOADS[workload](), row)
    arguments = jax.device_put((WORKLOADS[workload]().batch, jax.random.key(0)))
    processor, clock = time.process_time(), [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=0).trace(state, *arguments)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    lowered.compile()
    clock.append(time.perf_counter())
    seconds = {s: b - a for s, a, b in zip(STAGES, clock[:-1], clock[1:], strict=True)}
    total = clock[-1] - clock[0]
    return {**seconds, "total": total, "processor": time.process_time() - processor}


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """Seconds and ratios of each step and workload."""
    workloads = results["workloads"]

    def cell(rows: dict[str, Any], name: str) -> str:
        taken = rows[name]
        ratio = taken["processor"] / rows[PLAIN]["processor"]
        return f"{taken['processor']:.1f} s" + ("" if name == PLAIN else f", {ratio:.2f}")

    body = [
        [name, *(cell(rows, name) for rows in workloads.values())]
        for name in (PLAIN, *results["settings"]["rows"])
    ]
    title = "Processor seconds to trace, lower and compile a step, and in plain steps"
    return [Cells(title, ["step", *workloads], body)]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    tables.command(Options, run, tables_of, argv)


if __name__ == "__main__":
    main()
