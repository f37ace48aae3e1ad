"""How many kernels the K x K algebra of each strategy launches, counted in the compiled program.

On a GPU each takes about 10 microseconds to launch, however little it computes. What is counted are
the operations that the compiler leaves: outside of all loops, and in each turn of a loop.
"""

import collections
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import mtl_optax as mtl
from benchmarks import tables
from benchmarks.tables import Cells

LAUNCH = 10e-6  # seconds
COLUMNS = ("strategy", "num_tasks", "outside", "turn")
# What computes nothing, or calls what is counted by itself.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.kernels` takes."""

    tasks: tuple[int, ...] = (3, 40)
    """Numbers of tasks K."""
    strategies: tuple[str, ...] = (
        "mgda", "upgrad", "dualproj", "cagrad", "nash_mtl", "fairgrad", "imtl_g", "aligned_mtl",
        "conflict_free", "pcgrad",
    )  # fmt: skip
    """Names in the catalog."""
    name: str = "kernels"
    """Name of the file of results."""


def count(hlo: str) -> tuple[int, int]:
    """Operations outside of all loops, and in one turn of the loop with the most."""
    computations: dict[str, list[str]] = collections.defaultdict(list)
    current, entry = "", ""
    for line in hlo.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = start[2]
            entry = current if start[1] else entry
        elif current:
            computations[current].append(line)

    def within(name: str) -> int:
        total = 0
        for line in computations[name]:
            if not (found := re.search(r"= .*? ([a-z][\w\-]*)\(", line)):
                continue
            total += found[1] not in _FREE
            if found[1] in ("call", "conditional"):
                branches = re.findall(r"(?:to_apply=|_computation=|[{,] ?)%([\w.\-]+)", line)
                total += max(map(within, filter(computations.__contains__, branches)), default=0)
        return total

    loops = set(re.findall(r"body=%?([\w.\-]+)", hlo))
    return within(entry), max(map(within, loops), default=0)


def run(options: Options, console: Console) -> dict[str, Any]:
    """The counts, ready for JSON."""
    rows = []
    for name in options.strategies:
        for num_tasks in options.tasks:
            with console.status(f"{name}, K = {num_tasks}: compiling"):
                tx = mtl.make(name, num_tasks, key=jax.random.key(0))
                state = tx.init(jnp.zeros(num_tasks))

                def weights(gramian: jax.Array, tx: Any = tx, state: Any = state) -> Any:
                    # Rows of K columns, whose products cost next to nothing.
                    return tx.update(gramian, state, losses=jnp.ones(len(gramian)))

                draw = jax.random.normal(jax.random.key(1), (num_tasks, num_tasks))
                hlo = jax.jit(weights).lower(draw).compile().as_text()
                outside, turn = count(hlo or "")
                rows.append(dict(zip(COLUMNS, (name, num_tasks, outside, turn), strict=True)))
    return {"settings": dataclasses.asdict(options), "rows": rows}


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """Kernels, and the milliseconds that launching them takes."""
    body = [
        [
            f"{row['strategy']}, {row['num_tasks']}",
            f"{row['outside']}",
            f"{row['turn']}",
            f"{1e3 * LAUNCH * row['outside']:.2f} + {1e3 * LAUNCH * row['turn']:.2f} a turn",
        ]
        for row in results["rows"]
    ]
    header = ["strategy, K", "outside of loops", "a turn of a loop", "launches, ms"]
    title = "Kernels of the K x K algebra, and milliseconds to launch them at 10 µs each"
    return [Cells(title, header, body)]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    tables.command(Options, run, tables_of, argv)


if __name__ == "__main__":
    main()
