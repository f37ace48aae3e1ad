"""What a GPU launches in one step, how long it computes, and how much of that is K x K algebra.

A step of UPGrad stands beside the same step that asks for the Gramian but solves nothing: the
difference is the K x K program, of kernels so small that launching them is what takes time. Runs on
a GPU alone.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

import mtl_optax as mtl
from benchmarks import tables, timing
from benchmarks.steps import PLAIN, WAYS, Program
from benchmarks.tables import Cells
from benchmarks.workloads import WORKLOADS

STEPS = 5  # under the profiler
UNSOLVED = "the same, nothing solved"


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.launches` takes."""

    workloads: tuple[Literal[tuple(WORKLOADS)], ...] = (  # pyright: ignore[reportInvalidTypeForm]
        "transformer-3", "mlp-8", "mlp-40", "large-mlp-8", "large-transformer-3",
    )  # fmt: skip
    """What to train."""
    row: Literal[tuple(WAYS)] = "upgrad, ghost"  # pyright: ignore[reportInvalidTypeForm]
    """Which step."""
    rounds: int = 20
    """How often each step is timed."""
    name: str = "gpu/launches"
    """Name of the file of results."""


def _asks_only(_: str, num_tasks: int, **options: Any) -> Any:
    """A strategy that uses the cosines and norms of the rows and solves nothing."""
    del options

    def update(jacobian, state, **extra_args):
        del extra_args
        cosines, norms = jacobian.correlation()
        whole = jnp.isfinite(jnp.sum(cosines) + jnp.sum(norms))
        return jacobian.combine(jnp.where(whole, jnp.full(num_tasks, 1 / num_tasks), 0)), state

    return mtl.link(lambda params: (), update, num_tasks)


def run(options: Options, console: Console) -> dict[str, Any]:
    """The results of every workload, ready for JSON."""
    if jax.default_backend() != "gpu":
        raise SystemExit("no GPU is at hand: benchmarks.kernels counts kernels without one")
    workloads = {}
    for name in options.workloads:
        with console.status(name):
            workload = WORKLOADS[name]()
            steps = {
                PLAIN: Program(workload, PLAIN),
                options.row: Program(workload, options.row),
                UNSOLVED: Program(workload, options.row, _asks_only),
            }
            times = timing.medians(timing.interleave(steps, rounds=options.rounds))
            rows = {row: {"seconds": times[row], **_profiled(step)} for row, step in steps.items()}
            workloads[name] = {"num_tasks": workload.num_tasks, "rows": rows}
    return {"settings": dataclasses.asdict(options), "workloads": workloads}


def _profiled(step: Program) -> dict[str, float]:
    """Kernels and copies of a step, and the seconds in which the device was at them."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                losses = step()
            jax.block_until_ready(losses)
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    events = [
        event
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    busy = sum(event.duration_ns for event in events) * 1e-9
    return {"busy_seconds": busy / STEPS, "launches": len(events) / STEPS}


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """A row a step, and what share of it the K x K program takes."""
    body = []
    for name, measured in results["workloads"].items():
        rows = measured["rows"]
        solved, unsolved = rows[results["settings"]["row"]], rows[UNSOLVED]
        share = 1 - unsolved["seconds"] / solved["seconds"]
        for row, found in rows.items():
            body.append(
                [
                    f"{name}, K = {measured['num_tasks']}: {row}",
                    f"{1e3 * found['seconds']:.2f}",
                    f"{1e3 * found['busy_seconds']:.2f}",
                    f"{found['launches']:.0f}",
                    f"{100 * share:.0f} %" if found is solved else "",
                ]
            )
    header = ["step", "ms", "ms computing", "kernels and copies", "K x K program"]
    return [Cells("What a step launches, and the share of the K x K program in it", header, body)]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    tables.command(Options, run, tables_of, argv)


if __name__ == "__main__":
    main()
