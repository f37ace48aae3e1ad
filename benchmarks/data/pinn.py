"""Physics-informed networks: the losses of an equation, its boundary and its start.

The network is u(x); the losses ask that it solve the equation inside the domain and take the given
values on its border. What is measured is the error of u against a reference solution, so these
problems have tasks to train on and another one to be judged by.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.data.base import Recipe, Split, Task, hard_sharing
from mtl_optax import models
from mtl_optax.compare import Problem

Field = Callable[[jax.Array], jax.Array]  # a point (2,) -> u ()
VISCOSITY = 0.01 / np.pi
WAVES = (1, 2)  # of the Helmholtz solution in x and y
RECIPE = Recipe(steps=2000, batch_size=128, hidden=(32, 32, 32), learning_rates=(3e-3, 1e-2, 3e-2))


def tanh_encoder(example: Split, hidden: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
    """Dense layers with tanh: the equation needs second derivatives."""
    return models.MLP((2, *hidden), activation=jnp.tanh, activate_final=True, rngs=rngs)


def along(field: Field, axis: int) -> Field:
    """The derivative of a field along a coordinate, by forward mode, which nests cheaply."""
    direction = jnp.eye(2)[axis]
    return lambda point: jax.jvp(field, (point,), (direction,))[1]


def burgers_residual(u: Field, point: jax.Array) -> jax.Array:
    r""":math:`u_t + u\,u_x - \nu u_{xx}` at a point (x, t)."""
    u_x = along(u, 0)
    return along(u, 1)(point) + u(point) * u_x(point) - VISCOSITY * along(u_x, 0)(point)


def helmholtz_residual(u: Field, point: jax.Array) -> jax.Array:
    r""":math:`u_{xx} + u_{yy} + u` at a point (x, y)."""
    return along(along(u, 0), 0)(point) + along(along(u, 1), 1)(point) + u(point)


def predictor(residual: Callable[[Field, jax.Array], jax.Array]) -> Callable[..., Any]:
    """What the losses compare with the labels: the residual for `pde`, u itself elsewhere."""

    def predict(model: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def u(point: jax.Array) -> jax.Array:
            return model(point)["u"][0]

        return {
            name: jax.vmap(lambda point: residual(u, point))(points)[:, None]
            if name == "pde"
            else model(points)["u"]
            for name, points in inputs.items()
        }

    return predict


def burgers_solution(points: np.ndarray) -> np.ndarray:
    r"""Burgers' equation from :math:`-\sin \pi x`, by the Cole-Hopf integral, in float64.

    .. math:: u = -\frac{\int \sin(\pi y) E\,dη}{\int E\,dη}, \quad y = x - η, \quad
              E = \exp\Big(-\frac{\cos \pi y}{2\pi\nu} - \frac{η^2}{4\nu t}\Big)
    """
    x, t = points[:, :1].astype(float), np.maximum(points[:, 1:].astype(float), 1e-9)
    z = np.linspace(-12, 12, 4001)
    y = x - z * np.sqrt(4 * VISCOSITY * t)
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY) - z**2
    E = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(np.sin(np.pi * y) * E).sum(axis=1) / E.sum(axis=1)


def helmholtz_solution(points: np.ndarray) -> np.ndarray:
    r""":math:`\sin(a \pi x) \sin(b \pi y)`."""
    a, b = WAVES
    return np.sin(a * np.pi * points[:, 0]) * np.sin(b * np.pi * points[:, 1])


def burgers(*, num_points: int = 10_000) -> Problem:
    """Burgers' equation on x in [-1, 1], t in [0, 1], where a shock forms at x = 0.

    References:
      Raissi et al., `Physics-informed neural networks <https://arxiv.org/abs/1711.10561>`_, 2019.
    """
    rng = np.random.default_rng(0)
    x, t = rng.uniform(-1, 1, num_points), rng.uniform(0, 1, num_points)
    side, zero = rng.choice([-1.0, 1.0], num_points), np.zeros(num_points)
    points = {"boundary": (side, t), "initial": (x, zero), "pde": (x[::-1], t)}
    values = {"boundary": zero, "initial": -np.sin(np.pi * x), "pde": zero}
    grid = _grid((-1, 1), (0, 1))
    return _problem(
        "Burgers' equation: residual, boundary and initial values",
        points,
        values,
        (grid, burgers_solution(grid)),
        burgers_residual,
    )


def helmholtz(*, num_points: int = 10_000) -> Problem:
    """The Helmholtz equation on a square, with a known solution and a source that makes it so.

    References:
      Wang et al., `Understanding and mitigating gradient pathologies in physics-informed neural
      networks <https://arxiv.org/abs/2001.04536>`_, 2020, section 4.1.
    """
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (2, num_points))
    side, vertical = rng.choice([-1.0, 1.0], num_points), rng.random(num_points) < 0.5
    points = {
        "boundary": (np.where(vertical, side, x), np.where(vertical, y, side)),
        "pde": (x[::-1], y),
    }
    source = 1 - np.pi**2 * (WAVES[0] ** 2 + WAVES[1] ** 2)
    values = {
        "boundary": np.zeros(num_points),
        "pde": source * helmholtz_solution(np.stack(points["pde"], axis=1)),
    }
    grid = _grid((-1, 1), (-1, 1))
    return _problem(
        "Helmholtz equation: residual and boundary values",
        points,
        values,
        (grid, helmholtz_solution(grid)),
        helmholtz_residual,
    )


def _grid(x: tuple[float, float], y: tuple[float, float], count: int = 64) -> np.ndarray:
    axes = np.meshgrid(np.linspace(*x, count), np.linspace(*y, count), indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, 2)


def chessboard(grid: np.ndarray) -> list[np.ndarray]:
    """What lies on a square grid by colour: one chooses, the error is that of the other."""
    places = np.arange(len(grid))
    colour = (places + places // round(len(grid) ** 0.5)) % 2
    return [grid[colour == c] for c in (0, 1)]


def _problem(
    title: str,
    points: dict[str, tuple[np.ndarray, np.ndarray]],
    values: dict[str, np.ndarray],
    reference: tuple[np.ndarray, np.ndarray],
    residual: Callable[[Field, jax.Array], jax.Array],
) -> Problem:
    def labelled(inputs: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> Split:
        return Split(
            {task: array.astype(np.float32) for task, array in inputs.items()},
            {task: array[:, None].astype(np.float32) for task, array in labels.items()},
        )

    halves = zip(*map(chessboard, reference), strict=True)
    validation, test = (labelled({"u": points}, {"u": values}) for points, values in halves)
    return hard_sharing(
        title=title,
        source="random points inside and on the border; judged on a 64x64 grid of the solution",
        tasks=tuple(Task(task, 1, "field") for task in points),
        train=labelled({task: np.stack(pair, axis=1) for task, pair in points.items()}, values),
        validation=validation,
        test=test,
        recipe=RECIPE,
        encoder=tanh_encoder,
        predict=predictor(residual),
        heads={"u": 1},
        judged=(Task("u", 1, "field"),),
    )
