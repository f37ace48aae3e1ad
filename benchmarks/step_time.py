"""How long a train step takes, against the plain summed-loss step of the same framework.

Every step of a workload is timed in turns with all others, ours and TorchJD's, in one process; each
ratio is the median over the rounds. A second plain step takes its turns as well: where the two
differ by more than 3 %, the machine is too busy and the workload is left out.
`python -m benchmarks.cost_report` draws them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

from rich.console import Console
from rich.progress import track

from benchmarks import peers, tables, timing
from benchmarks.steps import CONTROL, EVERY, PLAIN, WAYS, Program
from benchmarks.tables import Cells
from benchmarks.timing import OURS, PEER
from benchmarks.workloads import WORKLOADS

GROUPS = {
    OURS: {PLAIN: PLAIN, CONTROL: PLAIN, **{name: way.group for name, way in WAYS.items()}},
    PEER: peers.GROUPS,
}
# The most a row of ours may take on a CPU, in plain steps, by group and workload.
TARGETS: dict[str, dict[str, float]] = {
    "losses": {"mlp-2": 1.03, "mlp-8": 1.03, "mlp-40": 1.03, "cnn-2": 1.03, "transformer-3": 1.03},
    "features": {"mlp-2": 1.05, "mlp-8": 1.15, "mlp-40": 1.4},
    "last layer": {"mlp-2": 1.25, "mlp-8": 2.7},
    "exact": {"mlp-2": 1.6, "mlp-8": 3.8, "mlp-40": 7.0, "cnn-2": 1.35, "transformer-3": 2.35},
    f"every {EVERY}": {"mlp-8": 1.4},
}
OFF = 0.03  # by how much the two plain steps may differ
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
# These differ little from their neighbours: a short run has them at one number of tasks.
ONLY_AT = "mlp-8"
ONLY_THERE = ("dtp", "gls", "rlw", "mgda, features", f"upgrad, every {EVERY}")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.step_time` takes."""

    workloads: tuple[Literal[tuple(WORKLOADS)], ...] = (  # pyright: ignore[reportInvalidTypeForm]
        "mlp-2", "mlp-8", "mlp-40", "cnn-2", "transformer-3",
    )  # fmt: skip
    """What to train."""
    rows: tuple[Literal[tuple(WAYS)], ...] = ()  # pyright: ignore[reportInvalidTypeForm]
    """Which of our rows; by default all, a few of them at mlp-8 only."""
    peers: bool = True
    """Whether TorchJD takes its turns, where it is installed."""
    rounds: int = 20
    """The most turns a step gets."""
    seconds: float = 120.0
    """When a workload's last round begins, at the latest."""
    clock: Literal["wall", "processor"] = "wall"
    """What tells the time. On a busy machine, hold the process to one core (`taskset -c 0`) and let
    the processor's own seconds count, which leave out what other processes take."""
    busy: bool = False
    """Write results even if the two plain steps differ."""
    name: str = "step_time"
    """Name of the file of results; give another one on another machine."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """The results of every workload, ready for JSON."""
    peer = timing.load_peer() if options.peers else None
    found = {name: _measure(name, options, peer, console) for name in options.workloads}
    workloads = {name: measured for name, measured in found.items() if measured is not None}
    if not workloads:
        raise SystemExit("nothing was measured that could be trusted: nothing is written")
    return {"settings": dataclasses.asdict(options), "workloads": workloads}


def _measure(name: str, options: Options, peer: Any, console: Console) -> dict[str, Any] | None:
    workload = WORKLOADS[name]()
    names = options.rows or [n for n in WAYS if name == ONLY_AT or n not in ONLY_THERE]
    programs = {
        row: Program(workload, row)
        for row in track((PLAIN, CONTROL, *names), f"{name}: compiling", console=console)
    }
    calls: dict[str, Any] = {f"{OURS}: {row}": program for row, program in programs.items()}
    if peer is not None:
        torch, _ = peer
        steps = peers.steps(torch, workload)
        calls |= {f"{PEER}: {row}": step for row, step in steps.items()}
    with console.status(f"{name}: timing {len(calls)} steps in turns"):
        times = timing.interleave(
            calls,
            rounds=options.rounds,
            max_seconds=options.seconds,
            clock=CLOCKS[options.clock],
        )
    rows = {}
    for label in calls:
        framework, row = label.split(": ")
        plain = f"{framework}: {PLAIN}"
        ratios = [a / b for a, b in zip(times[label], times[plain], strict=True)]
        # Within what was measured: the default goes beyond it, of few rounds even below 0.
        pair = ratios if len(ratios) > 1 else ratios * 2
        quarters = statistics.quantiles(pair, n=4, method="inclusive")
        # Of a link that rests the mean step counts; of all others the usual one.
        rests = GROUPS[framework][row].startswith("every")
        typical = statistics.mean if rests else statistics.median
        rows[label] = {
            "group": GROUPS[framework][row],
            "seconds": typical(times[label]),
            "ratio": typical(ratios),
            "quartiles": quarters[::2],
        }
        if framework == OURS:
            program = programs[row]
            rows[label]["flops_ratio"] = program.flops / programs[PLAIN].flops
            rows[label]["temp_bytes"] = program.temp_bytes
    off = rows[f"{OURS}: {CONTROL}"]["ratio"] - 1
    if abs(off) > OFF and not options.busy:
        console.print(
            f"{name}: left out, one plain step took {100 * off:+.1f} % longer than another, which "
            "is the same: no ratio could be trusted. Run again when the machine is idle, or with "
            "more --rounds; --busy keeps whatever comes"
        )
        return None
    return {
        "num_tasks": workload.num_tasks,
        "parameters": workload.num_params,
        "rounds": len(times[f"{OURS}: {PLAIN}"]),
        "rows": rows,
    }


def labels_of(workloads: dict[str, Any]) -> list[str]:
    """The rows that any of the workloads has, in the order of `GROUPS`."""
    labels = [f"{framework}: {row}" for framework, rows in GROUPS.items() for row in rows]
    return [label for label in labels if any(label in w["rows"] for w in workloads.values())]


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """What was measured, and how far it is from the targets."""
    workloads = results["workloads"]
    labels = labels_of(workloads)

    def each(title: str, cell: Callable[[dict[str, Any]], str], shown: list[str]) -> Cells:
        body = [
            [
                label,
                *(cell(w["rows"][label]) if label in w["rows"] else "" for w in workloads.values()),
            ]
            for label in shown
        ]
        return Cells(title, ["step", *workloads], body)

    def seconds(row: dict[str, Any]) -> str:
        ms = 1e3 * row["seconds"]
        return f"{row['ratio']:.2f}, {ms:.{0 if ms >= 20 else 2}f} ms"

    note = "" if results["settings"]["clock"] == "wall" else ", in the processor's seconds"
    ours = [label for label in labels if label.startswith(OURS)]
    tables = [
        each(
            f"Time of a step, in plain steps of its framework and in milliseconds{note}",
            seconds,
            labels,
        ),
        each(
            "Operations in plain steps, loops counted, and temporary memory",
            lambda row: f"{row['flops_ratio']:.3f}, {row['temp_bytes'] / 1e6:.0f} MB",
            ours,
        ),
    ]
    targets = targets_for(results)
    return [*tables, _against(targets, workloads)] if targets else tables


def targets_for(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The targets that hold where the results were measured."""
    return TARGETS if results["versions"]["device"].endswith("cpu") else {}


def _against(targets: dict[str, dict[str, float]], workloads: dict[str, Any]) -> Cells:
    rows = []
    for group, limits in targets.items():
        for name, limit in limits.items():
            if name not in workloads:
                continue
            measured = {
                framework: {
                    label.removeprefix(f"{framework}: "): row["ratio"]
                    for label, row in workloads[name]["rows"].items()
                    if row["group"] == group and label.startswith(framework)
                }
                for framework in (OURS, PEER)
            }
            # Of modes with one result the best counts; of strategies that each have one, the worst.
            pick = max if group == "losses" else min
            best = {
                framework: pick(ratios, key=lambda row, ratios=ratios: ratios[row])
                for framework, ratios in measured.items()
                if ratios
            }
            if OURS not in best:
                continue
            ratio = measured[OURS][best[OURS]]
            theirs = f"{measured[PEER][best[PEER]]:.2f} ({best[PEER]})" if PEER in best else ""
            if PEER in best:
                seconds = [workloads[name]["rows"][f"{f}: {best[f]}"]["seconds"] for f in best]
                theirs += f", of whose time ours takes {seconds[0] / seconds[1]:.2f}"
            verdict = "yes" if ratio <= limit else f"no, by {100 * (ratio / limit - 1):.0f} %"
            rows.append(
                [f"{group}, {name}", f"{limit}", f"{ratio:.2f} ({best[OURS]})", verdict, theirs]
            )
    header = ["steps", "target", OURS, "reached", PEER]
    return Cells(
        "Against the targets (loss-only: the slowest strategy; else the best)", header, rows
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    tables.command(Options, run, tables_of, argv)


if __name__ == "__main__":
    timing.keep_memory()
    main()
