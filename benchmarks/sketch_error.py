"""How far a sketched Gramian turns an update: its cosine to the exact one, over the trunk.

Gradients of tasks that share nothing are nearly orthogonal, the case in which a solved-for update
is least sure of its direction; the labels here are random, so this is that case.
"""

import dataclasses
import functools
import statistics
from typing import Any, Literal

import jax
import optax
from rich.console import Console
from rich.progress import track

import mtl_optax as mtl
from benchmarks import tables
from benchmarks.tables import Cells
from benchmarks.workloads import WORKLOADS


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.sketch_error` takes."""

    workloads: tuple[Literal[tuple(WORKLOADS)], ...] = ("mlp-8", "mlp-40")  # pyright: ignore[reportInvalidTypeForm]
    """What to differentiate, at its initial parameters."""
    strategies: tuple[str, ...] = ("mgda", "upgrad", "cagrad", "nash_mtl")
    """Names in the catalog."""
    columns: tuple[int, ...] = (32, 128)
    """Columns of the sketch."""
    draws: int = 5
    """Sketches of each."""
    name: str = "sketch_error"
    """Name of the file of results."""


def cosines(
    workload: Any, strategies: tuple[str, ...], columns: int, keys: jax.Array
) -> dict[str, list[float]]:
    """For each strategy the cosine of its sketched update to the exact one, one a key."""
    params = jax.device_put(workload.params)
    links: dict[str, Any] = {name: mtl.make(name, workload.num_tasks) for name in strategies}

    @functools.partial(jax.jit, static_argnums=2)
    def updates(params: Any, batch: Any, columns: int | None, key: Any = None):
        gramian = "ghost" if columns is None else mtl.Sketch(key, columns)
        _, jac = mtl.value_and_jac(workload.losses, gramian=gramian)(params, batch)
        return {name: tx.update(jac, tx.init(params))[0]["trunk"] for name, tx in links.items()}

    @jax.jit
    def cosine(a, b):
        norms = optax.tree.norm(a) * optax.tree.norm(b)
        return optax.tree.vdot(a, b) / norms

    exact = updates(params, workload.batch, None)
    sketched = [updates(params, workload.batch, columns, key) for key in keys]
    return {name: [float(cosine(s[name], exact[name])) for s in sketched] for name in links}


def run(options: Options, console: Console) -> dict[str, Any]:
    """The cosines of every workload and sketch, ready for JSON."""
    keys = jax.random.split(jax.random.key(0), options.draws)
    cases = [(name, columns) for name in options.workloads for columns in options.columns]
    rows = {
        f"{name}, {columns} columns": cosines(WORKLOADS[name](), options.strategies, columns, keys)
        for name, columns in track(cases, "sketches", console=console)
    }
    return {"settings": dataclasses.asdict(options), "rows": rows}


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """The mean cosine, and the least."""
    header = ["sketch", *results["settings"]["strategies"]]
    cell = lambda xs: f"{statistics.mean(xs):.3f} ({min(xs):.3f})"  # noqa: E731
    body = [[name, *map(cell, row.values())] for name, row in results["rows"].items()]
    return [Cells("Cosine of the sketched update to the exact one, mean (least)", header, body)]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    tables.command(Options, run, tables_of, argv)


if __name__ == "__main__":
    main()
