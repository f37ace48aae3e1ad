"""How long an aggregator takes on a given Jacobian, and how far from its optimum it stops.

The whole update of a Jacobian of a million columns, where the products and the mixing of the rows
dominate; and the K x K algebra alone, where TorchJD is handed the Gramian and ours makes it from a
Jacobian of 2 K columns. Ours and TorchJD's take turns in one process. Of many tasks ours alone, on
Gaussian rows, where the others are of rows that were mixed and are harder to tell apart.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import mtl_optax as mtl
from benchmarks import tables, timing
from benchmarks.gaps import FAIRNESS, GAPS, RADIUS
from benchmarks.tables import Cells
from benchmarks.timing import OURS, PEER

STRATEGIES: dict[str, Callable[[int], optax.GradientTransformationExtraArgs]] = {
    "upgrad": mtl.upgrad,
    "dualproj": mtl.dualproj,
    "mgda": mtl.mgda,
    "cagrad": lambda num_tasks: mtl.cagrad(num_tasks, c=RADIUS),
    "nash_mtl": mtl.nash_mtl,
    "fairgrad": lambda num_tasks: mtl.fairgrad(num_tasks, alpha=FAIRNESS),
    "aligned_mtl": mtl.aligned_mtl,
    "pcgrad": lambda num_tasks: mtl.pcgrad(num_tasks, key=jax.random.key(0)),
}
AT_LENGTH = ("upgrad", "mgda")  # with a long Jacobian the rest differ from these by noise
AT_MANY = ("upgrad", "dualproj", "mgda", "cagrad")
TARGET, TARGET_GAP = 1.0, 1e-5
MIXED, GAUSSIAN = "mixed", "gaussian"


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.aggregate_time` takes."""

    tasks: tuple[int, ...] = (2, 8, 32)
    """Numbers of tasks of the long Jacobians."""
    columns: int = 1_000_000
    """Columns of the long Jacobians."""
    gramian_tasks: tuple[int, ...] = (32, 128)
    """Numbers of tasks where the Gramian is given."""
    many_tasks: tuple[int, ...] = (64, 128, 256, 512)
    """Numbers of tasks where the Gramian of Gaussian rows is given to ours alone."""
    peers: bool = True
    """Whether TorchJD takes its turns, where it is installed."""
    rounds: int = 20
    """The most turns a call gets."""
    seconds: float = 8.0
    """When the last round of one Jacobian begins, at the latest."""
    name: str = "aggregate_time"
    """Name of the file of results; give another one on another machine."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """The results of every Jacobian, ready for JSON."""
    peer = timing.load_peer() if options.peers else None
    sizes = [(K, options.columns, AT_LENGTH, peer, MIXED) for K in options.tasks]
    sizes += [(K, 2 * K, tuple(STRATEGIES), peer, MIXED) for K in options.gramian_tasks]
    sizes += [(K, 2 * K, AT_MANY, None, GAUSSIAN) for K in options.many_tasks]
    rows = []
    for num_tasks, columns, names, opponent, kind in sizes:
        with console.status(f"{num_tasks} x {columns}"):
            rows += _measure(num_tasks, columns, names, opponent, kind, options)
    return {"settings": dataclasses.asdict(options), "rows": rows}


def _measure(
    num_tasks: int, columns: int, names: tuple[str, ...], peer: Any, kind: str, options: Options
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(num_tasks)
    # Half of the pairs conflict, whatever the number of columns.
    mixture = np.eye(num_tasks) + rng.standard_normal((num_tasks,) * 2) / (2 * num_tasks**0.5)
    jacobian = rng.standard_normal((num_tasks, columns), dtype=np.float32)
    if kind == MIXED:
        jacobian = mixture.astype(np.float32) @ jacobian
    wide = jacobian.astype(np.float64)
    exact = wide @ wide.T
    del wide
    calls, weights = {}, {}
    for name in names:
        label = f"{OURS}: {name}"
        calls[label] = ours = _ours(name, jacobian)
        weights[label] = optax.tree.get(ours()[1], "weights")
        if peer is not None:
            label = f"{PEER}: {name}"
            calls[label], weigh = _peers(*peer, name, jacobian, given=columns < options.columns)
            weights[label] = weigh()
    times = timing.interleave(calls, rounds=options.rounds, max_seconds=options.seconds)
    seconds = timing.medians(times)
    rows = []
    for name in names:
        labels = [f"{who}: {name}" for who in (OURS, PEER) if f"{who}: {name}" in calls]
        rows.append(
            {
                "strategy": name,
                "num_tasks": num_tasks,
                "columns": columns,
                "kind": kind,
                "rounds": len(times[labels[0]]),
                "seconds": [seconds[label] for label in labels],
                "ratio": timing.ratio(times, *labels) if len(labels) == 2 else None,
                "gaps": [
                    GAPS[name](exact, np.asarray(weights[label], np.float64))
                    for label in labels
                    if name in GAPS
                ],
            }
        )
    return rows


def _ours(name: str, jacobian: np.ndarray) -> Callable[[], Any]:
    num_tasks, columns = jacobian.shape
    aggregator = STRATEGIES[name](num_tasks)
    rows, losses = jnp.asarray(jacobian), jnp.ones(num_tasks)
    state = aggregator.init(jnp.zeros(columns))

    @jax.jit
    def update(rows, state, losses):
        return aggregator.update(rows, state, losses=losses)

    return lambda: update(rows, state, losses)


def _peers(
    torch: Any, torchjd: Any, name: str, jacobian: np.ndarray, *, given: bool
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What to time, and the weights alone, which are the same where the Gramian is `given`."""
    aggregation = torchjd.aggregation
    make = {
        "upgrad": aggregation.UPGrad,
        "dualproj": aggregation.DualProj,
        "mgda": aggregation.MGDA,
        "cagrad": lambda: aggregation.CAGrad(c=RADIUS),
        "nash_mtl": lambda: aggregation.NashMTL(n_tasks=len(jacobian)),
        "fairgrad": lambda: aggregation.FairGrad(alpha=FAIRNESS),
        "aligned_mtl": aggregation.AlignedMTL,
        "pcgrad": aggregation.PCGrad,
    }
    aggregator, rows = make[name](), torch.tensor(jacobian)
    gramian = rows @ rows.T
    if hasattr(aggregator, "gramian_weighting"):
        weigh = functools.partial(aggregator.gramian_weighting, gramian)
    else:
        weigh = functools.partial(aggregator.weighting, rows)
    return (weigh if given else lambda: aggregator(rows)), weigh


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """What was measured, and how far it is from the targets."""
    options = results["settings"]
    peer = any(row["ratio"] is not None for row in results["rows"])
    body = []
    for row in results["rows"]:
        whole = row["columns"] == options["columns"]
        size = f"{row['num_tasks']} x {row['columns']}" if whole else f"{row['num_tasks']}"
        size += " Gaussian" * (row["kind"] == GAUSSIAN)
        ratio = row["ratio"]
        missed = [
            *([f"no, by {100 * (ratio / TARGET - 1):.0f} %"] if ratio and ratio > TARGET else []),
            *(
                [f"no, gap {row['gaps'][0]:.0e}"]
                if row["gaps"] and row["gaps"][0] > TARGET_GAP
                else []
            ),
        ]
        body.append(
            [
                f"{row['strategy']}, {size}",
                *(f"{1e3 * s:.2f}" for s in row["seconds"]),
                *([] if ratio is None else [f"{ratio:.2f}"]),
                *(["", ""] if peer and ratio is None else []),
                "" if not row["gaps"] else " / ".join(f"{gap:.0e}" for gap in row["gaps"]),
                ", ".join(missed) or "yes",
            ]
        )
    header = ["aggregator", f"{OURS}, ms", *([f"{PEER}, ms", "ratio"] if peer else [])]
    header += ["gaps" if peer else "gap", "reached"]
    title = (
        "Aggregating a given K x P Jacobian, and a given K x K Gramian "
        f"(targets: ratio {TARGET:g}, gap {TARGET_GAP:g})"
    )
    return [Cells(title, header, body)]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    tables.command(Options, run, tables_of, argv)


if __name__ == "__main__":
    main()
