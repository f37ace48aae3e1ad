"""EPO: its linear programs against SciPy, and the point of the front that it reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import mtl_optax as mtl
from benchmarks.known_answers import vlmop2


@jax.jit
def weigh(matrix, losses, preference):
    tx = mtl.epo(len(losses), preference=preference)
    _, state = tx.update(matrix, tx.init(None), losses=losses)
    return state.weights, state.fallbacks


def program(matrix, losses, preference):
    """Equation 24 of the paper: the objective, and A and b of Aβ >= b on the simplex."""
    gramian, r = matrix @ matrix.T, preference / preference.sum()
    share = r * losses / (r @ losses)
    mu = share @ np.log(len(r) * share)
    a = r * (np.log(len(r) * share) - mu)
    pull = gramian @ a
    if mu <= 1e-4:
        return gramian.sum(0), gramian, np.zeros_like(r)
    if not (pull > 0).any():
        return pull, gramian, np.zeros_like(r)
    worst = r * losses == np.max(r * losses)
    kept = worst | (pull <= 0)
    return pull, gramian[kept], np.where(worst, 0, pull)[kept]


@pytest.mark.parametrize("mode", ["balance", "descent"])
def test_solves_the_linear_programs_of_the_paper(mode):
    rng, num_tasks = np.random.default_rng(0), 6
    regrets = []
    for _ in range(30):
        matrix = rng.standard_normal((num_tasks, num_tasks + 2)) - 0.3
        preference = rng.uniform(0.1, 1, num_tasks)
        noise = rng.uniform(-1, 1, num_tasks) * {"balance": 0.7, "descent": 1e-3}[mode]
        losses = (1 + noise) / preference
        objective, A, b = program(matrix, losses, preference)
        best = scipy.optimize.linprog(
            -objective, A_ub=-A, b_ub=-b, A_eq=np.ones((1, num_tasks)), b_eq=[1]
        )
        with jax.enable_x64(True):
            weights, fallbacks = weigh(matrix, losses, preference)
        weights = np.asarray(weights, np.float64)
        assert fallbacks == 0
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
        assert np.all(A @ weights - b >= -1e-5 * np.abs(A).max())
        regrets.append((-best.fun - objective @ weights) / np.abs(objective).max())
    # The proximal term costs at most 1 / 200, and most often nothing.
    assert np.max(regrets) <= 5e-3
    assert np.median(np.abs(regrets)) <= 1e-6


@pytest.mark.parametrize("along", ["vmap", "map"])
def test_meets_its_constraints_to_rounding_in_single_precision(along):
    """As a task that is absent then leaves no other rounding than its columns' own.

    However XLA fuses it: a sum that was computed twice, and rounded in two ways, was refined once.
    """
    rng, preference = np.random.default_rng(0), np.ones(3)
    matrices = rng.standard_normal((400, 3, 6)).astype("f4")
    losses = rng.uniform(0.3, 2, (400, 3)).astype("f4")
    one = lambda given: weigh(*given, preference)[0]  # noqa: E731
    several = jax.vmap(one) if along == "vmap" else lambda given: jax.lax.map(one, given)
    weights = jax.jit(several)((matrices, losses))
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, rtol=1e-6)
    for matrix, loss, w in zip(matrices, losses, weights, strict=True):
        _, A, b = program(matrix.astype(float), loss.astype(float), preference)
        assert np.all(A @ w - b >= -1e-6 * np.abs(A).max())


def test_reaches_the_point_of_the_front_on_the_preferred_ray():
    """VLMOP2: concave, so that no weighted sum reaches any but its ends."""
    shares = jnp.linspace(0.1, 0.9, 5)
    rays = jnp.stack([shares, 1 - shares], axis=1)
    starts = 0.3 * jax.random.normal(jax.random.key(0), (5, 20))

    def descend(x, ray):
        tx = optax.chain(mtl.epo(2, preference=ray, tolerance=1e-6), optax.sgd(0.05))

        def step(carry, _):
            x, state = carry
            _, jac = mtl.value_and_jac(vlmop2, shared=None)(x)
            updates, state = tx.update(jac, state)
            return (optax.apply_updates(x, updates), state), None

        (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), None, length=400)
        return vlmop2(x), state[0].fallbacks

    losses, fallbacks = jax.jit(jax.vmap(descend))(starts, rays)
    np.testing.assert_array_equal(fallbacks, 0)
    first, second = np.asarray(losses["first"]), np.asarray(losses["second"])
    # μ = 1e-6 leaves the ratio within the root of 8e-6.
    np.testing.assert_allclose(shares * first / ((1 - shares) * second), 1, atol=4e-3)
    np.testing.assert_allclose(np.sqrt(-np.log(1 - first)) + np.sqrt(-np.log(1 - second)), 2, 1e-3)


def test_counts_losses_that_have_no_ratio():
    matrix, even = np.float32([[1, 2], [-1, 1], [0, 1]]), np.ones(3, np.float32)
    for losses in ([1, -1, 2], [1, np.nan, 2], [1, np.inf, 2], [0, 0, 0]):
        weights, fallbacks = weigh(matrix, np.float32(losses), even)
        assert fallbacks == 1
        np.testing.assert_allclose(weights, 1 / 3)
    assert weigh(matrix * np.float32(np.nan), even, even)[1] == 1
    assert weigh(matrix, np.float32([1, 0, 2]), even)[1] == 0


def test_options_are_checked():
    with pytest.raises(ValueError, match="preference="):
        mtl.epo(2, preference=[1.0, 0.0])
    with pytest.raises(ValueError, match=r"tolerance=0\.0"):
        mtl.epo(2, tolerance=0.0)
