"""The non-negative QP and the power equilibrium, by their optimality conditions."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from mtl_optax.solvers import nonnegative_qp
from mtl_optax.solvers._block_pivoting import solve_together
from mtl_optax.solvers._power_equilibrium import power_equilibrium

K = 8


@functools.cache
def compiled(solver, **options):
    return jax.jit(functools.partial(solver, **options))


def normals(*shape, seed=0):
    """A fresh draw at each call: what a test gets must not depend on which ran before it."""
    return np.random.default_rng(seed).standard_normal(shape)


def matrices():
    """Rows of every kind, (K, P)."""
    normal = normals(K, 20)
    spread = 10.0 ** np.linspace(-4, 4, K)[:, None]
    yield "normal", normal
    yield "conflicting", normal - 0.95 * normal.mean(0)
    yield "ill-conditioned", normal * 10.0 ** -np.linspace(0, 5, 20)[None, :]
    yield "badly scaled", normal * spread
    yield "duplicates", normal[[0, 0, 1, 1, 2, 3, 3, 3]]
    yield "rank 3", normals(K, 3, seed=1) @ normals(3, 20, seed=2)
    yield "rank 1", normals(K, 1, seed=3) * normal[:1]
    yield "antiparallel", normal[[0, 1, 2, 3, 0, 4, 5, 6]] * np.r_[[1.0] * 4, -1, 1, 1, 1][:, None]
    yield "zero rows", normal * (np.arange(K) % 3 > 0)[:, None]
    yield "zero", np.zeros((K, 20))


MATRICES = [pytest.param(matrix, id=name) for name, matrix in matrices()]


def kkt_residual(Q, q, x):
    """The docstring's residual, anew and in float64."""
    Q, q, x = (np.asarray(a, np.float64) for a in (Q, q, x))
    g, n = Q @ x + q, np.sqrt(np.diag(Q))
    assert np.all(x >= 0)
    violation = np.where(x > 0, np.abs(g), np.maximum(-g, 0))
    steepest = np.max(np.abs(q)[n > 0] / n[n > 0], initial=0)
    rounding = np.where(n > 0, n * (steepest + n @ x), np.abs(q))
    return np.max(violation / np.where(rounding > 0, rounding, 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("matrix", MATRICES)
def test_satisfies_the_optimality_conditions(matrix, dtype):
    target = normals(matrix.shape[1], seed=4)
    with jax.enable_x64(dtype == np.float64):
        J, b = matrix.astype(dtype), target.astype(dtype)
        Q, q = J @ J.T, -J @ b
        solution = jax.tree.map(np.asarray, compiled(nonnegative_qp)(Q, q))
    eps = np.finfo(dtype).eps
    assert solution.x.dtype == dtype
    assert solution.converged
    assert solution.num_steps <= 3 * K
    assert kkt_residual(Q, q, solution.x) <= 64 * eps
    np.testing.assert_allclose(solution.residual, kkt_residual(Q, q, solution.x), atol=8 * eps)
    if dtype == np.float64:
        x, distance = scipy.optimize.nnls(matrix.T, target)
        np.testing.assert_allclose(np.linalg.norm(matrix.T @ solution.x - target), distance)
        if np.linalg.cond(matrix) < 1e3:
            np.testing.assert_allclose(solution.x, x, atol=1e-12 * x.max())


def test_no_entry_is_ever_negative():
    """A step that rounding let pass a bound was taken whole: 3 of these were, and converged."""
    rows = normals(4000, 10, 3).astype("f4")
    q = np.einsum("nkr,nr->nk", rows, 100 * normals(4000, 3, seed=1).astype("f4"))
    Q = np.einsum("nkr,njr->nkj", rows, rows)
    solution = jax.jit(jax.vmap(nonnegative_qp))(Q, q)
    assert np.all(solution.x >= 0)
    assert np.all(solution.converged)
    assert max(map(kkt_residual, Q, q, solution.x)) <= 64 * np.finfo("f4").eps


def test_agrees_with_trying_every_active_set():
    for seed in range(20):
        J = normals(4, 6, seed=seed) - 0.4
        Q, q = J @ J.T, normals(4, seed=100 + seed)
        best = np.inf
        for mask in range(16):
            free = np.array([mask >> i & 1 for i in range(4)], bool)
            x = np.zeros(4)
            x[free] = np.linalg.solve(Q[np.ix_(free, free)], -q[free])
            if np.all(x >= 0):
                best = min(best, x @ Q @ x / 2 + q @ x)
        with jax.enable_x64(True):
            x = np.asarray(compiled(nonnegative_qp)(Q, q).x)
        np.testing.assert_allclose(x @ Q @ x / 2 + q @ x, best, atol=1e-13)


@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_scaling_the_problem_scales_the_solution(power):
    J = normals(K, 20).astype(np.float32)
    Q, q = J @ J.T, J @ normals(20, seed=1).astype(np.float32)
    factor = np.float32(2.0**power)
    x = compiled(nonnegative_qp)(Q, q).x
    np.testing.assert_array_equal(compiled(nonnegative_qp)(factor * Q, factor * q).x, x)
    np.testing.assert_array_equal(compiled(nonnegative_qp)(Q, factor * q).x, factor * x)
    rows = np.float32(2.0) ** np.array([-20, 13, 3, 19, -7, -11, 0, 8], np.float32)
    scaled = compiled(nonnegative_qp)(rows[:, None] * Q * rows[None, :], rows * q).x
    np.testing.assert_allclose(scaled * rows, x, rtol=1e-6, atol=1e-6)


def test_an_unbounded_problem_gives_a_finite_point():
    Q = np.diag([1.0] * (K - 1) + [0.0]).astype(np.float32)
    solution = compiled(nonnegative_qp)(Q, -np.ones(K, np.float32))
    np.testing.assert_array_equal(solution.x, [1.0] * (K - 1) + [0.0])
    assert not solution.converged
    v = np.ones(K, np.float32)
    solution = compiled(nonnegative_qp)(np.eye(K, dtype=np.float32) - np.outer(v, v) / K, -v)
    assert np.all(np.isfinite(solution.x))


def test_reports_when_the_steps_are_too_few_or_the_input_is_nan():
    # The first system frees the variables of negative q, here one. Its minimum (1, 0, ...) leaves
    # the second variable a slope of -1/4: the answer frees both.
    Q, q = np.eye(K, dtype=np.float32), np.ones(K, np.float32)
    Q[0, 1] = Q[1, 0] = -0.5
    q[:2] = -1, 0.25
    assert not compiled(nonnegative_qp, max_steps=1)(Q, q).converged
    solution = compiled(nonnegative_qp)(Q, q)
    assert solution.converged
    np.testing.assert_allclose(solution.x, [7 / 6, 1 / 3] + [0] * (K - 2), rtol=1e-6)
    assert not compiled(nonnegative_qp)(Q * np.float32(np.nan), q).converged


def test_many_right_sides_at_once_and_as_many_as_128_tasks():
    J = normals(128, 200).astype(np.float32)
    Q = J @ J.T
    solve = jax.jit(jax.vmap(nonnegative_qp, in_axes=(None, 0)))
    solutions = solve(Q, Q[:4])
    assert np.all(solutions.converged)
    assert np.max(solutions.num_steps) <= 20
    for x, q in zip(solutions.x, Q[:4], strict=True):
        assert kkt_residual(Q, q, x) <= 64 * np.finfo(np.float32).eps


@pytest.mark.parametrize("solver", [nonnegative_qp, power_equilibrium])
def test_lowers_for_every_platform(solver):
    args = jnp.eye(3), jnp.ones(3)
    exported = jax.export.export(jax.jit(solver), platforms=("cpu", "cuda", "tpu"))(*args)
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}


@pytest.mark.parametrize("solver", [nonnegative_qp, power_equilibrium])
def test_shapes_are_checked(solver):
    with pytest.raises(ValueError, match=r"Q has shape \(2, 3\)"):
        solver(jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match=r"expected \(K, K\) and \(K,\)"):
        solver(jnp.eye(3), jnp.ones(2))
    with pytest.raises(ValueError, match="max_steps is 0"):
        solver(jnp.eye(2), jnp.ones(2), max_steps=0)


# Many programs of one matrix.


def many_rows(kind, size, seed=0):
    """(size, P) rows of unit length, or zero."""
    rng = np.random.default_rng([seed, size])
    normal = rng.standard_normal((size, 2 * size))
    match kind:
        case "normal":
            rows = normal
        case "square":
            rows = normal[:, :size]
        case "half the rank":
            rows = normal[:, : size // 2]
        case "rank 3":
            rows = normal[:, :3]
        case "duplicates":
            rows = normal[rng.integers(0, size // 2, size)]
        case "antiparallel":
            rows = np.concatenate([normal[: size // 2], -normal[: size - size // 2]])
        case "zero rows":
            rows = normal * (rng.random((size, 1)) < 0.6)
        case "nearly parallel":
            rows = 0.01 * normal + normal[0]
        case "conflicting":
            rows = 0.05 * normal + rng.choice([-1, 1], (size, 1)) * normal[0]
        case "badly scaled":
            rows = normal * 10.0 ** rng.uniform(-6, 6, (size, 1))
        case "decaying spectrum":
            rows = normal / np.arange(1, 2 * size + 1)
        case "ill-conditioned":
            left, _, right = np.linalg.svd(normal, full_matrices=False)
            rows = left * np.logspace(0, -4, size) @ right
        case "per example":  # of a softmax regression of 5 classes on 20 features
            wrong = rng.dirichlet(np.ones(5), size) - np.eye(5)[rng.integers(0, 5, size)]
            rows = np.einsum("ki,kj->kij", normal[:, :20], wrong).reshape(size, -1)
        case "zero":
            rows = 0 * normal
        case _:
            raise ValueError(kind)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


# Where rounding does not matter, and where the rounding of the Gramian is amplified.
PLAIN = ("normal", "duplicates", "zero rows", "badly scaled", "per example", "nearly parallel")
HARD = (
    "square",
    "half the rank",
    "rank 3",
    "antiparallel",
    "conflicting",
    "decaying spectrum",
    "ill-conditioned",
    "zero",
)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", PLAIN + HARD)
def test_many_programs_satisfy_the_optimality_conditions(kind, dtype):
    with jax.enable_x64(dtype == np.float64):
        rows = many_rows(kind, 48).astype(dtype)
        C = rows @ rows.T
        solutions = jax.tree.map(np.asarray, compiled(solve_together)(C, C))
    eps = np.finfo(dtype).eps
    assert solutions.x.dtype == dtype
    # Jaxlib 0.9 leaves two of the 48 ill-conditioned ones above 64 eps, and says so.
    few = 0.9 if kind == "ill-conditioned" else 1.0
    assert np.mean(solutions.converged) >= few
    for x, q, reported, converged in zip(
        solutions.x, C, solutions.residual, solutions.converged, strict=True
    ):
        residual = kkt_residual(C, q, x)
        assert residual <= (64 if converged else 1024) * eps
        np.testing.assert_allclose(reported, residual, atol=4 * eps)


@pytest.mark.parametrize("kind", PLAIN)
def test_many_projections_agree_with_scipy(kind):
    rows = many_rows(kind, 48)
    single = rows.astype(np.float32)
    C = single @ single.T
    projected = rows + np.asarray(compiled(solve_together)(C, C).x, np.float64) @ rows
    expected = [row + scipy.optimize.nnls(rows.T, -row)[0] @ rows for row in rows]
    np.testing.assert_allclose(np.linalg.norm(projected - expected, axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("kind", ["antiparallel", "rank 3"])
def test_a_null_direction_of_many_rows_does_not_run_away(kind):
    C = [many_rows(kind, 128, seed) for seed in range(3)]
    for rows in C:
        products = (rows @ rows.T).astype(np.float32)
        solutions = compiled(solve_together)(products, products)
        assert np.all(solutions.converged)
        assert np.max(solutions.num_steps) <= 400
        assert np.max(np.sum(solutions.x, axis=1)) < 1e4


@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_scaling_many_linear_terms_scales_the_solutions(power):
    rows = many_rows("normal", 48).astype(np.float32)
    C = rows @ rows.T
    factors = np.where(np.arange(48) % 2 > 0, np.float32(2.0**power), 1)[:, None]
    x = compiled(solve_together)(C, C).x
    np.testing.assert_array_equal(compiled(solve_together)(C, factors * C).x, factors * x)


def test_the_programs_that_have_no_solution_are_told_from_those_that_have():
    rows = many_rows("normal", 48).astype(np.float32)
    C = rows @ rows.T
    q = C.copy()
    q[3, 5], q[7, 0] = np.nan, np.inf
    solutions = compiled(solve_together)(C, q)
    np.testing.assert_array_equal(solutions.converged, ~np.isin(np.arange(48), [3, 7]))
    assert np.all(np.isfinite(solutions.x))
    assert not np.any(compiled(solve_together)(C * np.float32(np.nan), C).converged)
    # Without a lower bound along (1, ..., 1), but for rounding.
    flat = np.eye(48, dtype=np.float32) - np.float32(1 / 48)
    solutions = compiled(solve_together)(flat, -np.eye(48, dtype=np.float32) - 1)
    assert np.all(np.isfinite(solutions.x))
    assert np.all(~solutions.converged | (np.sum(solutions.x, axis=1) > 1e6))


# The equilibrium.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("power", [0.2, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("matrix", MATRICES)
def test_the_image_of_the_equilibrium_is_its_inverse_power(matrix, power, dtype):
    with jax.enable_x64(dtype == np.float64):
        norms = np.linalg.norm(matrix, axis=1)
        unit = (matrix / np.where(norms > 0, norms, 1)[:, None]).astype(dtype)
        solution = compiled(power_equilibrium)(unit @ unit.T, norms.astype(dtype), power=power)
    x = np.asarray(solution.x, np.float64)
    assert solution.converged
    assert solution.num_steps <= 60
    np.testing.assert_array_equal(x > 0, norms > 0)
    eps = np.finfo(dtype).eps
    inverse_power = np.where(x > 0, np.where(x > 0, x, 1) ** -power, 0)
    imbalance = np.abs(matrix @ (x @ matrix) - inverse_power)
    magnitude = np.abs(matrix @ matrix.T) @ x + inverse_power
    assert np.all(imbalance <= 64 * eps * magnitude)
    if np.linalg.cond(unit) < 1e3 and np.ptp(np.log(norms)) < 3:
        # The rounding of the Gramian, amplified where rows nearly cancel.
        rounding = 32 * np.linalg.cond(unit) ** 2 * eps
        np.testing.assert_allclose(imbalance / inverse_power, 0, atol=rounding)


def test_the_equilibrium_of_stationary_rows_is_large_and_finite():
    antiparallel = np.array([[1.0, -1.0], [-1.0, 1.0]], np.float32)
    solution = compiled(power_equilibrium)(antiparallel, np.ones(2, np.float32))
    assert solution.converged
    assert np.all(np.isfinite(solution.x))
    assert np.min(solution.x) > 100


def test_the_equilibrium_reports_nan():
    assert not compiled(power_equilibrium)(np.full((2, 2), np.nan, np.float32)).converged
