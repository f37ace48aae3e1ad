"""What a train step allocates: as compiled, and as the process grows.

Each step runs in a fresh process that compiles it, forgets its highest resident memory, and trains
a few steps (the growth needs Linux). `python -m benchmarks.cost_report` draws the results.
"""

import ctypes
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.progress import track

from benchmarks import tables
from benchmarks.steps import PLAIN, WAYS, Program
from benchmarks.tables import Cells
from benchmarks.workloads import WORKLOADS

STATUS = Path("/proc/self/status")
HELD = "upgrad, isolated rows"  # which holds all K: what the others are held against
TARGET = 0.25  # of its temporary memory, for an exact Gramian at K = 40


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.memory` takes."""

    workload: Literal[tuple(WORKLOADS)] = "mlp-40"  # pyright: ignore[reportInvalidTypeForm]
    """What to train."""
    rows: tuple[Literal[(PLAIN, *WAYS)], ...] = (  # pyright: ignore[reportInvalidTypeForm]
        PLAIN, "uncertainty",
        *(name for name, way in WAYS.items() if way.strategy == "upgrad"),
    )  # fmt: skip
    """Which steps."""
    steps: int = 2
    """Steps that each trains."""
    name: str = "memory"
    """Name of the file of results; give another one on another machine."""
    alone: bool = False
    """Measure the steps in this process, and print JSON: what the fresh processes do."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """The results of every step, each from a process of its own, ready for JSON."""
    rows = {}
    for row in track(options.rows, f"{options.workload}: memory", console=console):
        command = [sys.executable, "-m", "benchmarks.memory", "--alone", "--rows", row]
        command += ["--workload", options.workload, "--steps", str(options.steps)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows[row] = json.loads(output.splitlines()[-1])
    return {"settings": dataclasses.asdict(options), "rows": rows}


def measure(workload: str, row: str, steps: int) -> dict[str, Any]:
    """The temporary memory of a step, and the growth of this process while it trains, in bytes."""
    program = Program(WORKLOADS[workload](), row)
    before = _forget_peak()
    for _ in range(steps):
        jax.block_until_ready(program())
    growth = None if before is None else _status("VmHWM") - before
    return {"temp_bytes": program.temp_bytes, "growth_bytes": growth}


def _forget_peak() -> int | None:
    """Resets the process's highest resident memory; returns the present one, None off Linux."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what compiling left free would hide growth
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    return _status("VmRSS")


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return 1024 * int(match[1])


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """What each step allocates, and its share of what holding the rows takes."""
    rows = results["rows"]
    held = rows.get(HELD, {}).get("temp_bytes")
    body = []
    for name, row in rows.items():
        growth = row["growth_bytes"]
        body.append(
            [
                name,
                f"{row['temp_bytes'] / 1e6:.0f}",
                f"{row['temp_bytes'] / held:.2f}" if held else "",
                "" if growth is None else f"{growth / 1e6:.0f}",
            ]
        )
    title = f"Memory of a step of {results['settings']['workload']}, MB"
    header = ["step", "temporary, as compiled", "of what rows take", "growth of the process"]
    return [Cells(title, header, body)]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.memory", description=__doc__)
    if options.alone:
        for row in options.rows:
            print(json.dumps(measure(options.workload, row, options.steps)))
        return
    tables.report(options.name, run, tables_of, options)


if __name__ == "__main__":
    main()
