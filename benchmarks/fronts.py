"""Sets of models on problems whose fronts are known: how much of the front they cover.

`python -m benchmarks.fronts` trains 11 models in one program on VLMOP2, ZDT1-3 and DTLZ2, from
several starts, and prints their hypervolume over the best that 11 points can have, which is found
without this library, and their distance to the front; and what 11 preferences cost in one program.
About ten minutes on two cores.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from scipy.optimize import minimize

import mtl_optax as mtl
from benchmarks import known_answers
from benchmarks.flops import flops

POINTS = 11


class Problem(NamedTuple):
    """Losses whose front is known.

    Attributes:
      losses: of a point.
      num_tasks: K.
      dimensions: of a point.
      box: bounds of every coordinate.
      starts: the range that starts are drawn from.
      reference: down to which volumes are measured.
      front: from `(N, K - 1)` numbers in [0, 1] to points `(N, K)` of the front, in NumPy.
      learning_rate: Adam's, which falls to 0 by a cosine.
    """

    losses: Callable[[jax.Array], Any]
    num_tasks: int
    dimensions: int
    box: tuple[float, float]
    starts: tuple[float, float]
    reference: tuple[float, ...]
    front: Callable[[np.ndarray], np.ndarray]
    learning_rate: float = 5e-3


def _vlmop2(u: np.ndarray) -> np.ndarray:
    s = 2 * u[:, 0] - 1
    return np.stack([1 - np.exp(-((s - 1) ** 2)), 1 - np.exp(-((s + 1) ** 2))], 1)


def _zdt(h: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda u: np.stack([u[:, 0], h(u[:, 0])], axis=1)


def _sphere(u: np.ndarray) -> np.ndarray:
    a, b = u.T * np.pi / 2
    return np.stack([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)], axis=1)


def _on_unit_box(losses: Callable[[jax.Array], Any], h: Callable[[np.ndarray], Any]) -> Problem:
    # The slope of a root is infinite at 0.
    return Problem(losses, 2, 30, (1e-6, 1.0), (0.05, 0.95), (1.1, 1.1), _zdt(h))


PROBLEMS = {
    "VLMOP2": Problem(known_answers.vlmop2, 2, 20, (-2.0, 2.0), (-0.3, 0.3), (1.1, 1.1), _vlmop2),
    "ZDT1": _on_unit_box(known_answers.zdt1, lambda f: 1 - np.sqrt(f)),
    "ZDT2": _on_unit_box(known_answers.zdt2, lambda f: 1 - f**2),
    "ZDT3": _on_unit_box(known_answers.zdt3, lambda f: 1 - np.sqrt(f) - f * np.sin(10 * np.pi * f)),
    # From wide starts two models may end in one corner of the sphere, where both angles that lead
    # there are at their bounds.
    "DTLZ2": Problem(
        known_answers.dtlz2, 3, 12, (0.0, 1.0), (0.3, 0.7), (1.1,) * 3, _sphere, learning_rate=1e-2
    ),
}


def volume(points: np.ndarray, reference: np.ndarray) -> float:
    """The hypervolume for losses, by exclusive volumes (While et al. 2012), in float64."""
    points = points[np.all(points < reference, axis=1)]
    points = points[np.argsort(points[:, 0])]
    total = 0.0
    for i, point in enumerate(points):
        behind = np.maximum(point, points[i + 1 :])
        beaten = [np.all(behind <= p, 1) & np.any(behind < p, 1) for p in behind]
        kept = np.unique(behind[[not b.any() for b in beaten]], axis=0)
        total += np.prod(reference - point) - (volume(kept, reference) if len(kept) else 0.0)
    return float(total)


@functools.cache
def best_volume(name: str) -> float:
    """The largest volume of points on the front, found by SciPy from good or random ones."""
    problem, rng = PROBLEMS[name], np.random.default_rng(0)
    size = POINTS * (problem.num_tasks - 1)
    starts = [_best_on_a_grid(problem)] if problem.num_tasks == 2 else rng.uniform(size=(6, size))

    def lacking(u: np.ndarray) -> float:
        return -volume(problem.front(u.reshape(POINTS, -1)), np.array(problem.reference))

    bounds = [(0, 1)] * size
    return -min(minimize(lacking, u, method="L-BFGS-B", bounds=bounds).fun for u in starts)


def _best_on_a_grid(problem: Problem) -> np.ndarray:
    """The best points among 2,001 of a curve, by dynamic programming."""
    u = np.linspace(0, 1, 2001)
    points = problem.front(u[:, None])
    order = np.argsort(points[:, 0])
    first, second = points[order].T
    falls = second < np.minimum.accumulate(np.concatenate([[np.inf], second[:-1]]))
    falls &= (first < problem.reference[0]) & (second < problem.reference[1])
    u, first, second = u[order][falls], first[falls], second[falls]
    wide = problem.reference[0] - first
    # In slices of the second loss: what a point adds below the one before it.
    adds = np.where(np.tri(len(u), k=-1, dtype=bool), second[None] - second[:, None], -np.inf)
    best, before = wide * (problem.reference[1] - second), []
    for _ in range(POINTS - 1):
        totals = best[None] + wide[:, None] * adds
        before.append(np.argmax(totals, axis=1))
        best = np.max(totals, axis=1)
    chosen = [int(np.argmax(best))]
    for choice in reversed(before):
        chosen.append(int(choice[chosen[-1]]))
    return u[chosen]


def losses_of(problem: Problem, x: jax.Array) -> np.ndarray:
    """The losses of points `(..., n, D)` as `(..., n, K)`."""
    losses = jnp.vectorize(
        lambda one: jnp.stack(jax.tree.leaves(problem.losses(one))), signature="(d)->(k)"
    )
    return np.asarray(losses(x), float)


def distance(name: str, points: np.ndarray) -> np.ndarray:
    """How far points `(N, K)` are from the front."""
    problem = PROBLEMS[name]
    if problem.num_tasks == 3:
        return np.abs(np.linalg.norm(points, axis=1) - 1)
    front = problem.front(np.linspace(0, 1, 100_001)[:, None])
    return np.array([np.min(np.linalg.norm(front - p, axis=1)) for p in points])


def train_set(
    problem: Problem, strategy: optax.GradientTransformationExtraArgs, *, seeds: int, steps: int
) -> jax.Array:
    """Where the models of a set end, from several starts at once: `(seeds, n, D)`."""
    rate = optax.cosine_decay_schedule(problem.learning_rate, steps)
    tx = optax.chain(strategy, optax.adam(rate))
    value_and_jac = jax.vmap(mtl.value_and_jac(problem.losses, shared=None))
    low, high = problem.starts

    def train(key):
        x = jax.random.uniform(key, (POINTS, problem.dimensions), minval=low, maxval=high)

        def step(carry, _):
            x, state = carry
            _, jac = value_and_jac(x)
            update, state = tx.update(jac, state, x)
            return (jnp.clip(x + update, *problem.box), state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[0][0]

    return jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), seeds))


def preferences_step(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformationExtraArgs
) -> Callable[..., Any]:
    """One step of one model with its preference, to be mapped over both."""

    def step(params, state, preference):
        _, jac = mtl.value_and_jac(loss_fn)(params)
        updates, state = tx.update(jac, state, params, preference=preference)
        return optax.apply_updates(params, updates), state

    return step


def train_preferences(problem: Problem, *, steps: int = 4000) -> np.ndarray:
    """The losses `(11, 2)` of a model a preference, trained in one program."""
    rate = optax.cosine_decay_schedule(5e-3, steps)
    tx = optax.chain(mtl.stch(2, mu=0.01), optax.adam(rate))
    one = preferences_step(problem.losses, tx)
    low, high = problem.starts

    def train(key, preference):
        x = jax.random.uniform(key, (problem.dimensions,), minval=low, maxval=high)
        step = lambda carry, _: (one(*carry, preference), None)  # noqa: E731
        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[0][0]

    grid = jnp.asarray(0.9 * mtl.fronts.simplex_grid(2, POINTS - 1) + 0.05)
    keys = jax.random.split(jax.random.key(0), POINTS)
    return losses_of(problem, jax.jit(jax.vmap(train))(keys, grid))


def cost_of_preferences() -> float:
    """Products of a step of 11 preferences, over those of 11 steps of one: a network of two heads.

    The points of the known fronts have no matrix products, so a small network stands for models.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"in": (16, 64), "mid": (64, 64), "out": (64, 2)}
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    x = jnp.ones((128, 16))

    def task_losses(params):
        h = jnp.tanh(jnp.tanh(x @ params["in"]) @ params["mid"]) @ params["out"]
        return {"a": jnp.mean(h[:, 0] ** 2), "b": jnp.mean((h[:, 1] - 1) ** 2)}

    tx = optax.chain(mtl.stch(2, mu=0.01), optax.adam(1e-3))
    step = preferences_step(task_losses, tx)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * POINTS), params)
    grid = jnp.asarray(mtl.fronts.simplex_grid(2, POINTS - 1))
    together = flops(jax.vmap(step), stacked, jax.vmap(tx.init)(stacked), grid)
    return together / (POINTS * flops(step, params, tx.init(params), grid[0]))


def strategies(problem: Problem) -> dict[str, optax.GradientTransformationExtraArgs]:
    """The strategies of a set."""
    k = problem.num_tasks
    return {
        "hypervolume_gradient": mtl.fronts.hypervolume_gradient(k, reference=problem.reference),
        "moo_svgd": mtl.fronts.moo_svgd(k, bandwidth=0.01),
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.fronts` takes."""

    out: Path = Path("results/fronts")
    """Folder for the pictures."""
    steps: int = 3000
    """Steps of each set."""
    seeds: int = 6
    """Starts of each set."""
    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Which problems."""


def main() -> None:
    """Runs the command line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    options = tyro.cli(Options, description=__doc__)
    console = Console()
    console.print(f"{POINTS} models, {options.steps:,} steps, {options.seeds} starts")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.problems:
        problem = PROBLEMS[name]
        for title, strategy in strategies(problem).items():
            ends = train_set(problem, strategy, seeds=options.seeds, steps=options.steps)
            sets = losses_of(problem, ends)
            shares = [volume(s, np.array(problem.reference)) / best_volume(name) for s in sets]
            off = max(float(np.max(distance(name, s))) for s in sets)
            console.print(
                f"{name} {title}: volume over the best {min(shares):.4f} (least), "
                f"{np.mean(shares):.4f} (mean); at most {off:.1e} off the front",
                soft_wrap=True,
            )
            tasks = ("first", "second", "third")[: problem.num_tasks]
            figure, ax = plt.subplots(layout="constrained")
            solutions = {task: sets[0, :, k] for k, task in enumerate(tasks)}
            mtl.plots.front(solutions, reference=np.array(problem.reference), ax=ax)
            figure.savefig(options.out / f"{name.lower()}_{title}.png", dpi=120)
            plt.close(figure)
    ends = train_preferences(PROBLEMS["VLMOP2"])
    off = float(np.max(distance("VLMOP2", ends)))
    console.print(f"VLMOP2, {POINTS} preferences in one program: within {off:.1e} of the front")
    console.print(
        f"products of that step over those of {POINTS} single ones: {cost_of_preferences():.3f}"
    )


if __name__ == "__main__":
    main()
