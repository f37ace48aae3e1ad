"""Problems whose answers are known, solved by many strategies from many starts at once.

`python -m benchmarks.known_answers` solves CAGrad's toy problem, VLMOP2 and ZDT1, says which
strategy reached the known answer, and draws the paths. A minute or two on two cores.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mtl_optax as mtl
from mtl_optax.compare import Draw, Problem

STARTS = jnp.array([[-8.5, 7.5], [-8.5, -5.0], [9.0, 9.0]])
FRONT_Y = -8.355  # of CAGrad's toy, for x1 in [-7, 7]
TRACE = 200  # points kept of a path


def cagrad_toy(x: jax.Array) -> dict[str, jax.Array]:
    """Two losses with a valley in which their sum gets stuck (Liu et al. 2021, appendix B).

    Their Pareto front is x1 in [-7, 7], x2 = -8.355; the sum is least in its middle, (0, -8.355).
    """
    x1, x2 = x
    lower = 5e-6
    f1 = jnp.log(jnp.maximum(jnp.abs(0.5 * (-x1 - 7) - jnp.tanh(-x2)), lower)) + 6
    f2 = jnp.log(jnp.maximum(jnp.abs(0.5 * (-x1 + 3) + jnp.tanh(-x2) + 2), lower)) + 6
    s1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    s2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    c1, c2 = jnp.maximum(jnp.tanh(x2 / 2), 0), jnp.maximum(jnp.tanh(-x2 / 2), 0)
    return {"first": f1 * c1 + s1 * c2, "second": f2 * c1 + s2 * c2}


def cagrad_problem() -> Problem:
    """`mtl-compare benchmarks.known_answers:cagrad_problem`: who reaches the front of the toy.

    The start is one from which equal weights get stuck.
    """

    def distance(x: jax.Array, _: Any) -> dict[str, jax.Array]:
        beside = jnp.maximum(jnp.abs(x[0]) - 7, 0.0)
        return {"distance to the front": jnp.hypot(beside, x[1] - FRONT_Y)}

    return Problem(
        init=lambda key: STARTS[0] + 0.1 * jax.random.normal(key, (2,)),
        loss_fn=lambda x, batch: cagrad_toy(x),
        train=Draw(lambda key: ()),
        validation=(),
        test=(),
        metrics=distance,
        higher_is_better=False,
        steps=2000,
        learning_rates=(0.01, 0.03, 0.1),
        optimizer=lambda rate, steps: optax.adam(rate),
        title="CAGrad's toy problem",
    )


def vlmop2(x: jax.Array) -> dict[str, jax.Array]:
    """Two bumps in any dimension; concave front f = 1 - exp(-(s ∓ 1)²), s in [-1, 1]."""
    bump = x.size**-0.5
    return {
        "first": 1 - jnp.exp(-jnp.sum((x - bump) ** 2)),
        "second": 1 - jnp.exp(-jnp.sum((x + bump) ** 2)),
    }


def zdt1(x: jax.Array) -> dict[str, jax.Array]:
    """Zitzler, Deb and Thiele's first problem on [0, 1]ⁿ; front f2 = 1 - sqrt(f1)."""
    return _zdt(x, lambda f1, g: 1 - jnp.sqrt(f1 / g))


def zdt2(x: jax.Array) -> dict[str, jax.Array]:
    """Their second; concave front f2 = 1 - f1²."""
    return _zdt(x, lambda f1, g: 1 - (f1 / g) ** 2)


def zdt3(x: jax.Array) -> dict[str, jax.Array]:
    """Their third; front f2 = 1 - sqrt(f1) - f1 sin(10π f1) where it falls below all before."""
    return _zdt(x, lambda f1, g: 1 - jnp.sqrt(f1 / g) - f1 / g * jnp.sin(10 * jnp.pi * f1))


def _zdt(x: jax.Array, h: Callable[[jax.Array, jax.Array], jax.Array]) -> dict[str, jax.Array]:
    g = 1 + 9 * jnp.mean(x[1:])
    return {"first": x[0], "second": g * h(x[0], g)}


def dtlz2(x: jax.Array) -> dict[str, jax.Array]:
    """Deb, Thiele, Laumanns and Zitzler's second, of three losses; front: the unit sphere."""
    radius = 1 + jnp.sum((x[2:] - 0.5) ** 2)
    a, b = x[:2] * jnp.pi / 2
    return {
        "first": radius * jnp.cos(a) * jnp.cos(b),
        "second": radius * jnp.cos(a) * jnp.sin(b),
        "third": radius * jnp.sin(a),
    }


def descend(
    losses_fn: Callable[[jax.Array], Any],
    strategy: optax.GradientTransformationExtraArgs,
    starts: jax.Array,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    box: tuple[float, float] | None = None,
    extra_args: dict[str, jax.Array] | None = None,
) -> jax.Array:
    """Adam under a strategy from every start at once: paths `(starts, TRACE + 1, n)`.

    Args:
      losses_fn: the losses of a point.
      strategy: Jacobian in, gradient out.
      starts: `(starts, n)`.
      steps: a multiple of `TRACE`.
      learning_rate: Adam's.
      box: bounds that every coordinate is projected back into.
      extra_args: what `update` takes further, each with a leading axis of starts.
    """
    tx: Any = optax.chain(strategy, optax.adam(learning_rate))

    def path(start, extra):
        def step(carry, _):
            x, state = carry
            _, jac = mtl.value_and_jac(losses_fn, shared=None)(x)
            update, state = tx.update(jac, state, x, **extra)
            x = jnp.asarray(optax.apply_updates(x, update))
            x = x if box is None else optax.projections.projection_box(x, *box)
            return (x, state), None

        def chunk(carry, _):
            carry, _ = jax.lax.scan(step, carry, None, length=steps // TRACE)
            return carry, carry[0]

        _, points = jax.lax.scan(chunk, (start, tx.init(start)), None, length=TRACE)
        return jnp.concatenate([start[None], points])

    return jax.jit(jax.vmap(path))(starts, extra_args or {})


def toy_strategies() -> dict[str, optax.GradientTransformationExtraArgs]:
    """The strategies that are held against the toy's front, and equal weights."""
    # The losses reach about -20.1; FAMO divides by their height above the least value, and its
    # default decay would keep the two weights too close to leave the valley.
    xi = optax.chain(optax.add_decayed_weights(1e-5), optax.adam(0.025))
    return {
        "sum": mtl.sum_tasks(),
        "cagrad": mtl.make("cagrad", 2, c=0.5),
        "mgda": mtl.mgda(2),
        "pcgrad": mtl.pcgrad(2, key=jax.random.key(0)),
        "nash_mtl": mtl.make("nash_mtl", 2),
        "famo": mtl.famo(2, min_losses=-21.0, optimizer=xi),
    }


def on_toy_front(points: np.ndarray) -> np.ndarray:
    """Which of the points `(..., 2)` lie on the toy's Pareto front."""
    return (np.abs(points[..., 1] - FRONT_Y) < 0.15) & (np.abs(points[..., 0]) < 7.1)


@functools.cache
def solve_vlmop2(steps: int = 4000) -> dict[str, np.ndarray]:
    """Where equal weights and the smooth Tchebycheff scalarisation end: losses `(starts, 2)`."""
    starts = 0.3 * jax.random.normal(jax.random.key(0), (5, 20))
    ends = {}
    for name, strategy in (("sum", mtl.sum_tasks()), ("stch", mtl.stch(2, mu=0.01))):
        paths = descend(vlmop2, strategy, starts, steps=steps, learning_rate=2e-3)
        losses = jax.vmap(vlmop2)(paths[:, -1])
        ends[name] = np.stack([losses["first"], losses["second"]], axis=1)
    return ends


@functools.cache
def solve_zdt1(steps: int = 4000) -> np.ndarray:
    """The front of ZDT1 by the smooth Tchebycheff scalarisation, a preference a point: `(S, 2)`."""
    shares = jnp.linspace(0.1, 0.9, 9)
    preference = jnp.stack([shares, 1 - shares], axis=1)
    starts = jax.random.uniform(jax.random.key(0), (9, 30), minval=0.1, maxval=0.9)
    paths = descend(
        zdt1,
        mtl.stch(2, mu=0.005),
        starts,
        steps=steps,
        learning_rate=2e-3,
        box=(1e-4, 1.0),  # the slope of the square root is infinite at 0
        extra_args={"preference": preference},
    )
    losses = jax.vmap(zdt1)(paths[:, -1])
    return np.stack([losses["first"], losses["second"]], axis=1)


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.known_answers` takes."""

    out: Path = Path("results/known_answers")
    """Folder for the picture."""
    steps: int = 100_000
    """Steps on the toy problem, a multiple of 200."""


def main() -> None:
    """Runs the command line."""
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    strategies = toy_strategies()
    paths = {
        name: np.asarray(descend(cagrad_toy, strategies[name], STARTS, steps=options.steps))
        for name in track(strategies, "CAGrad's toy", console=console)
    }
    vlmop2_ends, zdt1_ends = solve_vlmop2(), solve_zdt1()

    view = Table(title=f"CAGrad's toy after {options.steps:,} steps: where each start ended")
    for column in ("strategy", *(str(tuple(map(float, start))) for start in STARTS), "on front"):
        view.add_column(column, justify="left" if column == "strategy" else "right")
    for name, path in paths.items():
        ends = path[:, -1]
        count = f"{on_toy_front(ends).sum()} of {len(ends)}"
        view.add_row(name, *(f"({x:.2f}, {y:.2f})" for x, y in ends), count)
    console.print(view)
    for name, ends in vlmop2_ends.items():
        points = ", ".join(f"({a:.3f}, {b:.3f})" for a, b in ends)
        console.print(f"VLMOP2, {name}: {points}; the front's centre is (0.632, 0.632)")
    distance = np.abs(zdt1_ends[:, 1] - (1 - np.sqrt(zdt1_ends[:, 0]))).max()
    console.print(f"ZDT1, stch: 9 preferences end within {distance:.1e} of the front")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(paths, vlmop2_ends, zdt1_ends, options.out / "known_answers.png")
    console.print(f"picture: {options.out / 'known_answers.png'}", soft_wrap=True)


def draw(
    paths: dict[str, np.ndarray],
    vlmop2_ends: dict[str, np.ndarray],
    zdt1_ends: np.ndarray,
    file: Path,
) -> None:
    """Draws the toy's paths strategy by strategy, and the fronts of the other two problems."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(13, 6.5), layout="constrained")
    flat = list(axes.flat)
    x, y = np.meshgrid(np.linspace(-10, 10, 200), np.linspace(-10, 10, 200))
    losses = jax.vmap(cagrad_toy)(jnp.stack([x.ravel(), y.ravel()], axis=1))
    total = np.asarray(losses["first"] + losses["second"]).reshape(x.shape)
    for ax, (name, path) in zip(flat, paths.items(), strict=False):
        ax.contour(x, y, total, levels=15, colors="0.8", linewidths=0.7)
        ax.plot([-7, 7], [FRONT_Y] * 2, color="0.4", lw=5, solid_capstyle="butt")
        for one, style in zip(path, ("-", "--", ":"), strict=True):
            (line,) = ax.plot(*one.T, style, lw=1.8)
            ax.plot(*one[0], "o", color=line.get_color(), ms=6)
            ax.plot(*one[-1], "*", color=line.get_color(), ms=13, mec="black", mew=0.7)
        ax.set(title=f"toy: {name}", xlabel="x1", ylabel="x2", xlim=(-10, 10), ylim=(-10, 10))
    s = np.linspace(-1, 1, 100)
    ax = flat[6]
    ax.plot(1 - np.exp(-((s - 1) ** 2)), 1 - np.exp(-((s + 1) ** 2)), color="0.4", lw=2)
    for (name, ends), marker in zip(vlmop2_ends.items(), ("s", "*"), strict=True):
        ax.plot(*ends.T, marker, ms=10, mec="black", mew=0.7, label=name)
    ax.set(title="VLMOP2", xlabel="first loss", ylabel="second loss")
    ax.legend(title="ends of 5 starts")
    ax = flat[7]
    f1 = np.linspace(0, 1, 100)
    ax.plot(f1, 1 - np.sqrt(f1), color="0.4", lw=2)
    ax.plot(*zdt1_ends.T, "*", color="C1", ms=11, mec="black", mew=0.7, label="stch")
    ax.set(title="ZDT1", xlabel="first loss", ylabel="second loss")
    ax.legend(title="ends of 9 preferences")
    figure.suptitle("o start, ★ end, grey: Pareto front; toy problem with contours of the sum")
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
