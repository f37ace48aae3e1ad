"""The Helmholtz equation as the paper on learning-rate annealing has it, to the relative L2 error.

Waves 1 and 4, a network 2-50-50-50-1 with tanh, Adam at 1e-3 · 0.9^(t / 1000), and at each step 128
points inside and 128 on each side, all of them new; inputs are normalised by the moments of uniform
points. Settings of the authors' repository, GradientPathologiesPINNs, model M1; 40,001 steps are
minutes a seed on a CPU.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

import mtl_optax as mtl
from benchmarks import tables
from benchmarks.data import kinds
from benchmarks.data.pinn import helmholtz_residual
from benchmarks.tables import Cells

WAVES, WIDTHS, BATCH = (1, 4), (2, 50, 50, 50, 1), 128
SPREAD = 3**-0.5  # the deviation of a uniform number in [-1, 1], whose mean is 0
SOURCE = 1 - jnp.pi**2 * (WAVES[0] ** 2 + WAVES[1] ** 2)

# The whole strategies, and what the Jacobian is measured on: None for all parameters.
STRATEGIES: dict[str, tuple[Callable[[], Any], Any]] = {
    "equal": (mtl.sum_tasks, None),
    "lr_annealing": (lambda: mtl.lr_annealing(2, reference="pde"), None),
    "lr_annealing, authors' measure": (
        lambda: mtl.every(10, mtl.lr_annealing(2, reference="pde", layerwise=True)),
        lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params),
    ),
    "relobralo": (lambda: mtl.relobralo(2, key=jax.random.key(0)), None),
    "uncertainty": (lambda: mtl.uncertainty(2), None),
    "conflict_free": (lambda: mtl.conflict_free(2), None),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.helmholtz` takes."""

    strategies: tuple[str, ...] = ("equal", "lr_annealing")
    """Of those in `STRATEGIES`."""
    steps: int = 40_001
    """Steps of Adam."""
    seeds: int = 3
    """Seeds of the start and of the points, all in one program."""
    name: str = "helmholtz_full"
    """Name of the file of results."""


def start(key: jax.Array) -> list[dict[str, jax.Array]]:
    """Weights by Xavier, biases of 0."""
    sizes = list(itertools.pairwise(WIDTHS))
    return [
        {"w": jax.random.normal(k, pair) * (2 / sum(pair)) ** 0.5, "b": jnp.zeros(pair[1])}
        for k, pair in zip(jax.random.split(key, len(sizes)), sizes, strict=True)
    ]


def field(params: Any, point: jax.Array) -> jax.Array:
    """The network's u at a point (2,)."""
    h = point / SPREAD
    for layer in params[:-1]:
        h = jnp.tanh(h @ layer["w"] + layer["b"])
    return (h @ params[-1]["w"] + params[-1]["b"])[0]


def solution(points: Any) -> Any:
    """sin(π x) sin(4 π y)."""
    return jnp.sin(WAVES[0] * jnp.pi * points[:, 0]) * jnp.sin(WAVES[1] * jnp.pi * points[:, 1])


def draw(key: jax.Array) -> dict[str, jax.Array]:
    """The points of a step."""
    inside, along = jax.random.split(key)
    free = jax.random.uniform(along, (4, BATCH), minval=-1, maxval=1)
    one = jnp.ones(BATCH)
    sides = [(free[0], -one), (one, free[1]), (free[2], one), (-one, free[3])]
    border = jnp.concatenate([jnp.stack(side, axis=1) for side in sides])
    return {
        "bc": border,
        "pde": jax.random.uniform(inside, (BATCH, 2), minval=-1, maxval=1),
    }


def residuals(params: Any, points: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What is left of the equation inside and of the values on the border, one a point."""
    u = lambda point: field(params, point)  # noqa: E731
    inside = jax.vmap(lambda point: helmholtz_residual(u, point))(points["pde"])
    return {
        "bc": jax.vmap(u)(points["bc"]) - solution(points["bc"]),
        "pde": inside - SOURCE * solution(points["pde"]),
    }


def losses_of(squares: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The mean of the squared residuals, and the sum over the four sides of the mean there."""
    return {"bc": 4 * jnp.mean(squares["bc"]), "pde": jnp.mean(squares["pde"])}


def task_losses(params: Any, points: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The losses of the border and of the equation."""
    return losses_of({term: r**2 for term, r in residuals(params, points).items()})


def relative_error(params: Any) -> jax.Array:
    """In the L2 norm over a grid of 100 x 100."""
    axis = jnp.linspace(-1, 1, 100)
    grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    found = jax.vmap(lambda point: field(params, point))(grid)
    return kinds.relative_error(found, solution(grid))


def train(name: str, steps: int, seeds: int) -> dict[str, list[float]]:
    """The error and the weight of the boundary after the last step, one a seed."""
    factory, measured = STRATEGIES[name]
    rate = optax.exponential_decay(1e-3, 1000, 0.9)
    tx: Any = optax.chain(factory(), optax.adam(rate))

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, *keys = jax.random.split(key, 2)
        params = start(first)

        def step(carry: Any, t: jax.Array) -> tuple[Any, None]:
            params, state = carry
            points = draw(jax.random.fold_in(keys[0], t))
            _, jac = mtl.value_and_jac(task_losses, shared=None, gramian_at=measured)(
                params, points
            )
            updates, state = tx.update(jac, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        record = mtl.summarize(state, ["bc", "pde"])
        weight = record.get("weights/bc", record.get("held_scales/bc", jnp.ones([])))
        return relative_error(params), weight

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds))
    return {k: np.asarray(v).tolist() for k, v in zip(("errors", "weights"), found, strict=True)}


def run(options: Options, console: Console) -> dict[str, Any]:
    """Of every strategy, ready for JSON."""
    names = track(options.strategies, "strategies", console=console)
    rows = {name: train(name, options.steps, options.seeds) for name in names}
    return {"settings": dataclasses.asdict(options), "rows": rows}


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """A row a strategy."""
    settings = results["settings"]
    body = [
        [
            name,
            f"{statistics.mean(row['errors']):.4f}",
            ", ".join(f"{error:.4f}" for error in row["errors"]),
            ", ".join(f"{weight:.1f}" for weight in row["weights"]),
        ]
        for name, row in results["rows"].items()
    ]
    title = f"Relative L2 error after {settings['steps']:,} steps"
    return [Cells(title, ["strategy", "mean", "of each seed", "weight of bc"], body)]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    tables.command(Options, run, tables_of, argv)


if __name__ == "__main__":
    main()
