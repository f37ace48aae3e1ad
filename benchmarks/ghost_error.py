"""What the rounding of the ghost Gramian does to updates, on real data, early and late in training.

The ghost adds products of pairs of examples, of which most cancels where the gradients of examples
do: its rounding error is that of rows times the square of ρ, the mean norm of an example's gradient
over the norm of their mean. Shown are ρ, and how far Gramian and updates in float32 are from those
of rows in float64, by ghost and by rows.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import mtl_optax as mtl
from benchmarks import tables
from benchmarks.data import DATASETS
from benchmarks.tables import Cells
from mtl_optax.compare import Draw, Problem

WAYS = ("ghost", "rows")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.ghost_error` takes."""

    data: tuple[Literal[tuple(DATASETS)], ...] = tuple(DATASETS)  # pyright: ignore[reportInvalidTypeForm]
    """Which problems; one whose files are not here is left out."""
    steps: int = 500
    """Steps of equal weights and Adam before the late measurement."""
    strategies: tuple[str, ...] = ("upgrad", "mgda")
    """Whose updates are compared."""
    name: str = "ghost_error"
    """Name of the file of results."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """The errors of each problem, ready for JSON."""
    rows = []
    for name in options.data:
        try:
            problem = DATASETS[name]()
        except (ImportError, FileNotFoundError, ModuleNotFoundError) as error:
            console.print(f"{name}: left out, {error}")
            continue
        with console.status(f"{name}: training {options.steps} steps"):
            early = problem.init(jax.random.key(0))
            late = _trained(problem, early, options.steps)
            for when, params in (("early", early), ("late", late)):
                found = measure(problem, params, options.strategies)
                rows.append({"data": name, "when": when, **found})
    return {"settings": dataclasses.asdict(options), "rows": rows}


def measure(problem: Problem, params: Any, strategies: tuple[str, ...]) -> dict[str, Any]:
    """ρ of a batch, and the errors of each way: of the Gramian, and of each strategy's update."""
    batch = _batch(problem, jax.random.key(1))
    with jax.enable_x64(True):
        exact = _read(problem, strategies, "rows")(*jax.tree.map(_double, (params, batch)))
    errors = {way: _errors(_read(problem, strategies, way)(params, batch), exact) for way in WAYS}
    return {"rho": _rho(problem, params, batch), **errors}


def _read(problem: Problem, strategies: tuple[str, ...], gramian: Any) -> Any:
    @jax.jit
    def read(params, batch):
        losses, jac = mtl.value_and_jac(problem.loss_fn, gramian=gramian, **problem.jac)(
            params, batch
        )
        links = [mtl.make(name, len(jax.tree.leaves(losses))) for name in strategies]
        updates = [tx.update(jac, tx.init(params), params)[0] for tx in links]
        return jac.correlation(), updates

    return read


def _errors(found: Any, exact: Any) -> list[float]:
    """Of the Gramian relative to its rows' norms, then of each update relative to its norm."""
    (cosines, norms), updates = jax.device_get(found)
    (cosines64, norms64), updates64 = jax.device_get(exact)
    products = np.outer(norms, norms) * cosines
    scale = np.outer(norms64, norms64)
    gramian = np.max(np.abs(products - scale * cosines64) / np.where(scale > 0, scale, 1))
    return [float(gramian), *map(_distance, updates, updates64)]


def _distance(update: Any, exact: Any) -> float:
    pairs = zip(jax.tree.leaves(update), jax.tree.leaves(exact), strict=True)
    parts = [(np.sum((a.astype(float) - b) ** 2), np.sum(b**2)) for a, b in pairs]
    error, size = np.sum(parts, axis=0)
    return float(np.sqrt(error / size)) if size else 0.0


def _rho(problem: Problem, params: Any, batch: Any) -> float | None:
    """The largest of the tasks; None where batches are drawn and have no examples."""
    if isinstance(problem.train, Draw):
        return None
    gradients = lambda batch: mtl.value_and_jac(problem.loss_fn)(params, batch)[1].rows()  # noqa: E731

    @jax.jit
    def norms():
        one = lambda example: _norms(gradients(jax.tree.map(lambda x: x[None], example)))  # noqa: E731
        return jax.lax.map(one, batch), _norms(gradients(batch))

    each, together = jax.device_get(norms())
    return float(np.nanmax(np.nanmean(each, axis=0) / np.where(together > 0, together, np.nan)))


def _norms(rows: Any) -> jax.Array:
    return jnp.sqrt(
        sum(jnp.sum(jnp.reshape(r, (len(r), -1)) ** 2, 1) for r in jax.tree.leaves(rows))
    )


def _batch(problem: Problem, key: jax.Array) -> Any:
    if isinstance(problem.train, Draw):
        return problem.train.batch(key)
    size = len(jax.tree.leaves(problem.train)[0])
    picked = np.asarray(jax.random.choice(key, size, (problem.batch_size,), replace=False))
    return jax.tree.map(lambda x: jnp.asarray(x[picked]), problem.train)


def _trained(problem: Problem, params: Any, steps: int) -> Any:
    tx = problem.optimizer(jnp.float32(problem.learning_rates[0]), steps)

    @jax.jit
    def step(params, state, batch):
        total = lambda p: sum(map(jnp.sum, jax.tree.leaves(problem.loss_fn(p, batch))))  # noqa: E731
        updates, state = tx.update(jax.grad(total)(params), state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state

    state = tx.init(params)
    for key in jax.random.split(jax.random.key(2), steps):
        params, state = step(params, state, _batch(problem, key))
    return params


def _double(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    return leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """A row a problem and moment: ρ, then each error by ghost / by rows."""
    header = ["data", "ρ", "Gramian", *results["settings"]["strategies"]]
    body = [
        [
            f"{row['data']}, {row['when']}",
            "" if row["rho"] is None else f"{row['rho']:.1f}",
            *(f"{a:.0e} / {b:.0e}" for a, b in zip(row["ghost"], row["rows"], strict=True)),
        ]
        for row in results["rows"]
    ]
    return [Cells("Relative error in float32, by ghost / by rows", header, body)]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    tables.command(Options, run, tables_of, argv)


if __name__ == "__main__":
    main()
