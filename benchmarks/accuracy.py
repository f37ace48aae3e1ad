"""How far rounding moves an update, by the condition number of the rows brought to unit norm.

Every aggregator that solves for weights on Jacobians of a chosen condition, in float32 and in
float64, ours and TorchJD's. The error in float32 is against the float64 answer of the same program
on the same numbers; that in float64, which has none above it here, is how far another order of the
tasks and other axes of the parameters move the answer. The worst of all draws.
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
from rich.progress import track

import mtl_optax as mtl
from benchmarks import tables, timing
from benchmarks.tables import Cells
from benchmarks.timing import OURS, PEER

# Our names, and TorchJD's classes with their arguments.
AGGREGATORS: dict[str, tuple[Callable[[int], Any], str | None, dict[str, Any]]] = {
    "mgda": (mtl.mgda, "MGDA", {}),
    "pareto": (mtl.pareto, None, {}),
    "cagrad": (mtl.cagrad, "CAGrad", {"c": 0.5}),
    "upgrad": (mtl.upgrad, "UPGrad", {}),
    "dualproj": (mtl.dualproj, "DualProj", {}),
    "conflict_free": (mtl.conflict_free, "ConFIG", {}),
    "conflict_free, by the Gramian": (mtl.conflict_free, None, {}),
    "imtl_g": (mtl.imtl_g, "IMTLG", {}),
    "aligned_mtl": (mtl.aligned_mtl, "AlignedMTL", {}),
    "nash_mtl": (lambda k: mtl.nash_mtl(k, max_norm=1.0), "NashMTL", {"n_tasks": "K"}),
    "fairgrad": (lambda k: mtl.fairgrad(k, alpha=1.0), "FairGrad", {"alpha": 1.0}),
    "pcgrad": (lambda k: mtl.pcgrad(k, key=jax.random.key(0)), None, {}),
    "gradvac": (lambda k: mtl.gradvac(k, key=jax.random.key(0)), None, {}),
    "epo": (mtl.epo, None, {}),
    "krum": (mtl.krum, "Krum", {"n_byzantine": 0}),
}
PRECISIONS = ("float32", "float64")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.accuracy` takes."""

    conditions: tuple[float, ...] = (1, 10, 100, 1e3, 1e4)
    """Condition numbers of the unit rows."""
    tasks: int = 4
    """Rows."""
    columns: int = 40
    """Their entries."""
    draws: int = 8
    """Jacobians of each condition."""
    aggregators: tuple[str, ...] = tuple(AGGREGATORS)
    """Which ones."""
    peers: bool = True
    """Whether TorchJD aggregates too, where it is installed."""
    name: str = "accuracy"
    """Name of the file of results."""


def jacobian(condition: float, num_tasks: int, columns: int, seed: int) -> np.ndarray:
    """Rows of norms from .1 to 10, of which the unit rows have that condition number.

    Rotations in the plane of two rows bring the squared singular values to a matrix with ones on
    the diagonal, one row a time.
    """
    rng = np.random.default_rng(seed)
    values = np.geomspace(1, condition**-2.0, num_tasks)
    basis = np.linalg.qr(rng.standard_normal((num_tasks, num_tasks)))[0]
    rows = basis * np.sqrt(values * num_tasks / values.sum())
    for _ in range(num_tasks - 1):
        squares = (rows**2).sum(1)
        i, j = np.argmin(squares), np.argmax(squares)
        a, b, c = squares[i], squares[j], rows[i] @ rows[j]
        # The tangent t for which (row_i + t row_j) / sqrt(1 + t²) has norm 1.
        t = (-c + np.sqrt(max(c**2 - (a - 1) * (b - 1), 0))) / (b - 1) if b - 1 > 1e-15 else 0
        rows[[i, j]] = np.array([rows[i] + t * rows[j], rows[j] - t * rows[i]]) / np.hypot(1, t)
    axes = np.linalg.qr(rng.standard_normal((columns, num_tasks)))[0]
    norms = 10 ** rng.uniform(-1, 1, size=(num_tasks, 1))
    return norms * (rows @ axes.T)


def ours(name: str, num_tasks: int, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """The update of a Jacobian in a precision."""
    with jax.enable_x64(dtype == "float64"):
        tx = AGGREGATORS[name][0](num_tasks)
        lazily = "by the Gramian" in name

        @jax.jit
        def update(matrix: jax.Array) -> Any:
            losses = jnp.ones(num_tasks, matrix.dtype)
            params = jnp.zeros(matrix.shape[1], matrix.dtype)
            if lazily:
                loss_fn = lambda w: matrix @ w + 1  # noqa: E731
                jac = mtl.value_and_jac(loss_fn, shared=None, gramian="columns")(params)[1]
            else:
                jac = mtl.as_jacobian(matrix, losses)
            return tx.update(jac, tx.init(params), params)[0]

    def call(matrix: np.ndarray) -> np.ndarray:
        with jax.enable_x64(dtype == "float64"):
            return np.asarray(update(jnp.asarray(matrix, dtype)), np.float64)

    return call


def theirs(torch: Any, torchjd: Any, name: str, num_tasks: int, dtype: str) -> Any:
    """The same of TorchJD, None where it has none."""
    _, kind, arguments = AGGREGATORS[name]
    if kind is None:
        return None
    arguments = {k: num_tasks if v == "K" else v for k, v in arguments.items()}
    type_ = getattr(torch, dtype)

    def call(matrix: np.ndarray) -> np.ndarray:
        aggregator = getattr(torchjd.aggregation, kind)(**arguments)
        return aggregator(torch.tensor(matrix, dtype=type_)).double().numpy()

    return call


def errors(calls: dict[str, Any], matrices: list[np.ndarray], turns: bool) -> dict[str, float]:
    """The worst error of each precision."""
    worst: dict[str, float] = dict.fromkeys(PRECISIONS, 0.0)
    for seed, matrix in enumerate(matrices):
        rounded = matrix.astype(np.float32).astype(np.float64)
        exact = calls["float64"](rounded)
        worst["float32"] = max(worst["float32"], gap(calls["float32"](rounded), exact))
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(matrix)) if turns else np.arange(len(matrix))
        axis = rng.standard_normal(matrix.shape[1])
        mirror = lambda x, v=axis: x - 2 * np.multiply.outer(x @ v, v) / (v @ v)  # noqa: E731
        again = mirror(calls["float64"](mirror(rounded)[order]))
        worst["float64"] = max(worst["float64"], gap(again, exact))
    return worst


def gap(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative, inf where it is not a number."""
    error = float(optax.tree.norm(got - expected) / optax.tree.norm(expected))
    return error if np.isfinite(error) else float("inf")


def run(options: Options, console: Console) -> dict[str, Any]:
    """The errors of all, ready for JSON."""
    peer = timing.load_peer() if options.peers else None
    draw = functools.partial(jacobian, num_tasks=options.tasks, columns=options.columns)
    matrices = {c: [draw(c, seed=s) for s in range(options.draws)] for c in options.conditions}
    rows = []
    for name in track(options.aggregators, "aggregators", console=console):
        sides: dict[str, dict[str, Any]] = {
            OURS: {dtype: ours(name, options.tasks, dtype) for dtype in PRECISIONS}
        }
        if peer is not None and AGGREGATORS[name][1]:
            sides[PEER] = {d: theirs(*peer, name, options.tasks, d) for d in PRECISIONS}
        # An order that is drawn is no symmetry.
        turns = name not in ("pcgrad", "gradvac")
        for who, calls in sides.items():
            found = [errors(calls, matrices[c], turns) for c in options.conditions]
            for dtype in PRECISIONS:
                values = [error[dtype] for error in found]
                rows.append({"aggregator": name, "by": who, "dtype": dtype, "errors": values})
    return {"settings": dataclasses.asdict(options), "rows": rows}


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """A table a precision."""
    conditions = [f"{condition:.0e}" for condition in results["settings"]["conditions"]]
    cells = []
    for dtype in PRECISIONS:
        by = {
            (r["aggregator"], r["by"]): r["errors"] for r in results["rows"] if r["dtype"] == dtype
        }
        names = dict.fromkeys(name for name, _ in by)
        peer = any(who == PEER for _, who in by)
        cell = lambda name, i, by=by: " / ".join(  # noqa: E731
            f"{by[name, who][i]:.0e}" for who in (OURS, PEER) if (name, who) in by
        )
        body = [[name, *(cell(name, i) for i in range(len(conditions)))] for name in names]
        title = (
            f"Relative error in {dtype}, ours{' / TorchJD' * peer}, by condition of the unit rows"
        )
        cells.append(Cells(title, ["aggregator", *conditions], body))
    return cells


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    tables.command(Options, run, tables_of, argv)


if __name__ == "__main__":
    main()
