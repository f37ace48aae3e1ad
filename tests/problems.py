"""Small problems that the tests share."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@functools.cache
def compiled_update(factory, num_tasks, **options):
    """`(matrix, losses) -> (update, state)` of a fresh strategy, one program a shape."""
    tx = factory(num_tasks, **options)
    return jax.jit(lambda matrix, losses: tx.update(matrix, tx.init(None), losses=losses))


def oracle_cases(*names):
    """The reference Jacobians with the named solutions, as pytest parameters.

    What has P columns gets zero columns up to a common width: the Gramians stay, and fewer shapes
    are compiled.
    """
    oracle = np.load(pathlib.Path(__file__).parent / "data" / "aggregators.npz")

    def arrays(case):
        width = oracle[f"{case}/jacobian"].shape[1]
        for name in ("jacobian", *names):
            array = oracle[f"{case}/{name}"]
            extra = 60 - width if array.shape[-1] == width else 0
            yield np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, extra)])

    found = sorted(key.split("/")[0] for key in oracle if key.endswith(f"/{names[0]}"))
    return [pytest.param(case, *arrays(case), id=case) for case in found]


def a_fifth(cases, turn=0):
    """All the cases, of which `make test` runs every fifth, from another one each `turn`.

    What a law asks of each strategy takes minutes to compile; `make test-long` runs the others.
    """
    found = []
    for i, case in enumerate(cases):
        plain = case if isinstance(case, tuple) else (case,)
        values, marks, name = case if hasattr(case, "marks") else (plain, (), None)
        marks = [*marks, pytest.mark.long] if (i - turn) % 5 else marks
        found.append(pytest.param(*values, marks=marks, id=name))
    return found


def mlp_params(key, sizes=(6, 8, 8), tasks=("a", "b", "c"), dtype=jnp.float32):
    keys = iter(jax.random.split(key, len(sizes) + len(tasks)))
    trunk = [
        {"w": jax.random.normal(next(keys), (m, n), dtype) * m**-0.5, "b": jnp.zeros(n, dtype)}
        for m, n in itertools.pairwise(sizes)
    ]
    heads = {task: jax.random.normal(next(keys), (sizes[-1],), dtype) for task in tasks}
    return {"trunk": trunk, "heads": heads}


def mlp_losses(params, x, y):
    """One squared error a head; y maps task names to targets."""
    h = x
    for layer in params["trunk"]:
        h = jnp.tanh(h @ layer["w"] + layer["b"][None, :])
    return {task: jnp.mean((h @ w - y[task]) ** 2) for task, w in params["heads"].items()}


def mlp_batch(key, tasks=("a", "b", "c"), size=16, width=6, dtype=jnp.float32):
    x_key, *keys = jax.random.split(key, len(tasks) + 1)
    x = jax.random.normal(x_key, (size, width), dtype)
    y = {task: jax.random.normal(k, (size,), dtype) for task, k in zip(tasks, keys, strict=True)}
    return x, y


def told(rows, losses):
    """What strategies ask for beside a given Jacobian: that of losses linear in the parameters."""
    linear = lambda w: [loss + jnp.sum(row * w) for loss, row in zip(losses, rows, strict=True)]  # noqa: E731
    return {"kpis": losses / 10, "validation_fn": linear, "losses_fn": linear}


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-300)
