"""The solvers against SciPy, brute force over active sets, and the optimality conditions."""

import contextlib
import functools
import importlib
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from mtl_optax import solvers
from mtl_optax._numerics import dot
from mtl_optax.solvers._base import by_elimination

DATA = np.load(pathlib.Path(__file__).parent / "data" / "aggregators.npz")
CASES = [key.removesuffix("/jacobian") for key in DATA if key.endswith("/jacobian")]
PLATFORMS = ("cpu", "cuda", "tpu")
norm = np.linalg.norm

both_precisions = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def precision_of(dtype):
    if dtype != np.float64:
        return contextlib.nullcontext()
    # jax < 0.8 has the context manager in jax.experimental only.
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64()


def tolerance(dtype, epsilons):
    return epsilons * float(np.finfo(dtype).eps)


def solve_in(dtype, solver, *arrays):
    """The solver's result for float64 arrays rounded to `dtype`; its arrays in float64."""
    with precision_of(dtype):
        result = solver(*(jnp.asarray(np.asarray(array), dtype) for array in arrays))
        assert result.x.dtype == result.residual.dtype == dtype
        assert result.num_steps.dtype == jnp.int32
        return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), result)


@jax.jit
@jax.vmap
def batched_simplex(Q, q, floors):
    return solvers.simplex_qp(Q, q, floors=floors)


def solve_simplex(dtype, *arrays):
    """`solve_in` for simplex problems, in batches of 24: one compilation for each K."""
    count = len(arrays[0])
    filled = [np.resize(np.asarray(array), (24, *np.shape(array)[1:])) for array in arrays]
    return jax.tree.map(lambda leaf: leaf[:count], solve_in(dtype, batched_simplex, *filled))


batched_nnls = jax.jit(jax.vmap(solvers.nnls))


# Problems --------------------------------------------------------------------------------------


def jacobian(kind, K, rng):
    J = rng.normal(size=(K, 2 * K))
    match kind:
        case "tall":
            return J
        case "low rank":
            return J[:, : max(1, K // 3)]
        case "duplicate rows":
            return J[rng.integers(0, K // 2, K)]
        case "unequal norms":
            return J * 10.0 ** rng.uniform(-6, 6, (K, 1))
        case "conflict":
            return 0.05 * J + rng.choice([-1, 1], (K, 1)) * rng.normal(size=2 * K)
        case "nearly parallel":
            return 1e-2 * J + rng.normal(size=2 * K)
        case "ill-conditioned":
            u, _, v = np.linalg.svd(J, full_matrices=False)
            return u * np.logspace(0, -6, K) @ v
        case "zero rows":
            return J * (rng.random((K, 1)) < 0.6)
        case "zero":
            return 0 * J
    raise ValueError(kind)


KINDS = (
    "tall",
    "low rank",
    "duplicate rows",
    "unequal norms",
    "conflict",
    "nearly parallel",
    "ill-conditioned",
    "zero rows",
    "zero",
)


def simplex_problems(kind, K, count, dtype, seed=0):
    """Q, q and floors, rounded to dtype; a third each with floors, with q, and with neither."""
    rng = np.random.default_rng([seed, K, KINDS.index(kind)])
    Q, q, floors = np.zeros((count, K, K)), np.zeros((count, K)), np.zeros((count, K))
    for i in range(count):
        J = jacobian(kind, K, rng)
        Q[i] = J @ J.T
        if i % 3 == 1:
            floors[i] = rng.random(K) * (rng.random(K) < 0.5)
            floors[i] /= floors[i].sum() + 0.3
        if i % 3 == 2:
            q[i] = rng.normal(size=K) * (norm(J, axis=1) if "zero" not in kind else 1)
    return tuple(array.astype(dtype).astype(np.float64) for array in (Q, q, floors))


def simplex_residual(Q, q, floors, x, eps):
    """The residual that the docstring of `simplex_qp` defines, in float64."""
    gradient, slack, room = Q @ x + q, x - floors, 1 - floors.sum()
    size = np.abs(Q) @ (np.abs(x) + eps * room) + np.abs(q)
    least = gradient.argmin()
    scale = slack @ size + room * size[least]
    gap = slack @ gradient - room * gradient[least]
    return max(gap / scale if scale > 0 else 0.0, abs(x.sum() - 1) / (np.abs(x).sum() + 1))


def best_vertex_or_face(Q, q, floors):
    """The least objective over all active sets: exact, exponential."""
    K, best = len(q), np.inf
    scale = np.sqrt(np.maximum(np.diagonal(Q), np.abs(Q).max() * 1e-30 + 1e-300))
    for size in range(1, K + 1):
        for support in map(list, itertools.combinations(range(K), size)):
            held = [i for i in range(K) if i not in support]
            x = floors.copy()
            s = scale[support]
            kkt = np.zeros((size + 1, size + 1))
            kkt[:size, :size] = Q[np.ix_(support, support)] / np.outer(s, s)
            kkt[:size, size] = kkt[size, :size] = s.min() / s
            linear = -(q[support] + Q[np.ix_(support, held)] @ floors[held]) / s
            right = np.append(linear, (1 - floors[held].sum()) * s.min())
            x[support] = np.linalg.lstsq(kkt, right, rcond=None)[0][:size] / s
            if abs(x.sum() - 1) < 1e-9 and np.all(x >= floors - 1e-9):
                slack = np.maximum(x - floors, 0)
                x = floors + slack * ((1 - floors.sum()) / slack.sum())
                best = min(best, x @ Q @ x / 2 + q @ x)
    return best


# simplex_qp: accuracy --------------------------------------------------------------------------


@functools.cache
def gramians(dtype):
    """{case: (float64 J, Gramian as an aggregator computes it in dtype)}."""
    jacobians = [DATA[f"{case}/jacobian"] for case in CASES]
    padded = np.zeros((len(CASES), 12, 60))
    for J, space in zip(jacobians, padded, strict=True):
        space[: J.shape[0], : J.shape[1]] = J
    with precision_of(dtype):
        rounded = jnp.asarray(padded, dtype)
        products = jnp.matmul(rounded, rounded.mT, precision=jax.lax.Precision.HIGHEST)
    products = np.asarray(products, np.float64)
    return {
        case: (J, Q[: len(J), : len(J)])
        for case, J, Q in zip(CASES, jacobians, products, strict=True)
    }


def solve_cases(dtype, floor_share):
    """{case: weights}, from one compilation for K = 4 and one for K = 12.

    The smaller cases repeat their first row: this changes neither the hull nor, with floor 0, what
    the weights can reach, and the copies' weights count for the row.
    """
    weights = {}
    for least, K in ((1, 4), (5, 12)):
        sizes = {case: len(J) for case, (J, _) in gramians(dtype).items() if least <= len(J) <= K}
        rows = [np.r_[:size, np.zeros(K - size, int)] for size in sizes.values()]
        Q = [gramians(dtype)[case][1][np.ix_(r, r)] for case, r in zip(sizes, rows, strict=True)]
        floors = [(np.arange(K) < size) * floor_share / size for size in sizes.values()]
        result = solve_simplex(dtype, Q, np.zeros((len(Q), K)), floors)
        assert result.converged.all()
        for case, row, x in zip(sizes, rows, result.x, strict=True):
            weights[case] = np.bincount(row, x)
    return weights


def reference_tolerance(case, dtype):
    if dtype == np.float32:
        # The exact solution of this float32 Gramian is itself 1.5e-5 away: eps κ², κ = 46.
        return 3e-5 if case == "conflict_12x50" else 1e-5
    # The stored weights of the rank-2 cases sum to 1 within 5e-10 only.
    return 5e-8 if case.startswith("rank2") else 1e-9


@both_precisions
def test_min_norm_point_matches_the_references(dtype):
    weights = solve_cases(dtype, 0.0)
    for case, (J, _) in gramians(dtype).items():
        direction, expected = J.T @ weights[case], DATA[f"{case}/mgda"]
        # The hull of rank2_8x40 contains 0; there the error counts relative to the rows.
        size = norm(expected) if case != "rank2_8x40" else norm(J, axis=1).max()
        assert norm(direction - expected) <= reference_tolerance(case, dtype) * size, case


@both_precisions
@pytest.mark.parametrize(
    ("name", "floor_share"), [("pareto_floor0", 0.0), ("pareto_floor_half", 0.5)]
)
def test_norm_with_floors_matches_the_references(dtype, name, floor_share):
    weights = solve_cases(dtype, floor_share)
    for case, (J, _) in gramians(dtype).items():
        reached, expected = norm(J.T @ weights[case]), norm(J.T @ DATA[f"{case}/{name}"])
        size = expected if (case, floor_share) != ("rank2_8x40", 0.0) else norm(J, axis=1).max()
        assert abs(reached - expected) <= reference_tolerance(case, dtype) * size, case


def test_second_call_on_the_exact_gradient_removes_the_rounding_of_the_gramian():
    first = solve_cases(np.float32, 0.0)

    @jax.jit
    def refine(J, Q, x):
        gradient = J @ (x @ J)
        return x + solvers.simplex_qp(Q, gradient, floors=-x, total=0.0).x

    J, Q = gramians(np.float32)["conflict_12x50"]
    x = refine(*(jnp.asarray(array, jnp.float32) for array in (J, Q, first["conflict_12x50"])))
    direction, expected = J.T @ np.asarray(x, np.float64), DATA["conflict_12x50/mgda"]
    assert norm(direction - expected) <= 2e-6 * norm(expected)


@both_precisions
@pytest.mark.parametrize("kind", KINDS)
def test_objective_is_the_least_over_all_active_sets(kind, dtype):
    Q, q, floors = simplex_problems(kind, 4, 24, dtype)
    result = solve_simplex(dtype, Q, q, floors)
    for Qi, qi, fi, x in zip(Q, q, floors, result.x, strict=True):
        excess = x @ Qi @ x / 2 + qi @ x - best_vertex_or_face(Qi, qi, fi)
        magnitude = x @ np.abs(Qi) @ (x + tolerance(dtype, 1)) + np.abs(qi) @ x
        # Rounded, a singular Q is concave by a few eps: no local method sees the other minimum.
        concave = max(0, -np.linalg.eigvalsh(Qi)[0])
        assert excess <= tolerance(dtype, 16) * magnitude + 2 * concave
    assert result.converged.all()


@both_precisions
@pytest.mark.parametrize("kind", KINDS)
def test_optimality_conditions_hold(kind, dtype):
    Q, q, floors = simplex_problems(kind, 32, 24, dtype)
    result = solve_simplex(dtype, Q, q, floors)
    eps = tolerance(dtype, 1)
    for Qi, qi, fi, x, reported in zip(Q, q, floors, result.x, result.residual, strict=True):
        assert np.all(x >= fi)
        assert simplex_residual(Qi, qi, fi, x, eps) <= 64 * eps
        assert reported <= 64 * eps
    assert result.converged.all()
    assert result.num_steps.max() <= 64


@pytest.mark.parametrize(("K", "limit"), [(8, 1e-6), (32, 2e-6), (100, 2e-6)])
def test_duality_gap_of_random_gramians_is_tiny(K, limit):
    rng = np.random.default_rng(K)
    # At a few eps the order of sums decides: optimised, as users run it, whatever the tests do.
    optimised = {"xla_backend_optimization_level": 3}
    shape = jax.ShapeDtypeStruct((K, K), np.float32)
    solve = jax.jit(solvers.simplex_qp).lower(shape).compile(compiler_options=optimised)
    for _ in range(4):
        J = rng.normal(size=(K, 2 * K)).astype(np.float32)
        x = np.asarray(solve(J @ J.T).x, np.float64)
        gradient = (J @ J.T).astype(np.float64) @ x
        assert x @ gradient - gradient.min() <= limit * (x @ gradient)


# simplex_qp: scale -----------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-40, 40])
def test_simplex_answer_is_bitwise_free_of_the_scale(exponent):
    Q, q, floors = simplex_problems("conflict", 4, 24, np.float32)
    result = solve_simplex(np.float32, Q, q, floors)
    scaled = solve_simplex(np.float32, Q * 2.0**exponent, q * 2.0**exponent, floors)
    np.testing.assert_array_equal(scaled.x, result.x)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_simplex_answer_is_free_of_extreme_scales(scale):
    Q, q, floors = simplex_problems("tall", 4, 24, np.float32)
    size = np.abs(Q).max(axis=(1, 2))
    Q, q = Q / size[:, None, None], q / size[:, None]
    result = solve_simplex(np.float32, Q, q, floors)
    scaled = solve_simplex(np.float32, Q * scale, q * scale, floors)
    np.testing.assert_allclose(scaled.x, result.x, atol=2e-6)


@both_precisions
def test_diagonal_from_1e_minus_12_to_1e12_is_weighted_inversely(dtype):
    diagonal = 10.0 ** np.array([-12, -9, -3, 0, 12])
    result = solve_in(dtype, solvers.simplex_qp, np.diag(diagonal))
    expected = (1 / diagonal) / (1 / diagonal).sum()
    np.testing.assert_allclose(result.x, expected, rtol=tolerance(dtype, 64))


# simplex_qp: degenerate input ------------------------------------------------------------------


@both_precisions
@pytest.mark.parametrize(
    ("Q", "q", "expected"),
    [
        ([[3.0]], [0.0], [1.0]),
        ([[0.0]], [-2.0], [1.0]),
        ([[0.0, 0.0], [0.0, 4.0]], [0.0, 0.0], [1.0, 0.0]),
        ([[1.0, -1.0], [-1.0, 1.0]], [0.0, 0.0], [0.5, 0.5]),
        ([[0.0, 0.0], [0.0, 0.0]], [1.0, 2.0], [1.0, 0.0]),
        ([[0.0, 0.0], [0.0, 1.0]], [1e6, 1.0], [0.0, 1.0]),
    ],
)
def test_degenerate_problem_has_its_exact_answer(Q, q, expected, dtype):
    result = solve_in(dtype, solvers.simplex_qp, Q, q)
    np.testing.assert_allclose(result.x, expected, atol=tolerance(dtype, 4))
    assert result.converged


def test_floors_that_leave_no_room_are_the_answer():
    floors = jnp.array([0.5, 0.25, 0.25])
    result = solvers.simplex_qp(jnp.diag(jnp.arange(3.0)), floors=floors)
    np.testing.assert_array_equal(result.x, floors)
    assert result.converged


def test_traced_floors_are_held_exactly():
    Q = jnp.array([[9.0, 3.0, 4.5], [3.0, 2.0, 1.7], [4.5, 1.7, 2.29]])
    floors = jnp.full(3, 0.1)
    result = jax.jit(lambda floors: solvers.simplex_qp(Q, floors=floors))(floors)
    assert result.x[0] == floors[0]
    np.testing.assert_allclose(result.x, [0.1, 0.76517, 0.13483], atol=1e-5)


def test_traced_infeasible_floors_are_reported_not_raised():
    floors = jnp.full((24, 4), 0.5)
    result = batched_simplex(jnp.ones((24, 4, 4)), jnp.zeros((24, 4)), floors)
    np.testing.assert_array_equal(result.x, floors)
    assert not result.converged.any()


def test_sum_is_the_total():
    result = solvers.simplex_qp(jnp.eye(3), floors=-1.0, total=6.0)
    np.testing.assert_allclose(result.x, 2.0, rtol=1e-6)


def test_indefinite_matrix_gives_finite_feasible_weights():
    result = solvers.simplex_qp(jnp.array([[1.0, 5.0], [5.0, 1.0]]))
    assert np.isfinite(result.x).all()
    assert np.isclose(result.x.sum(), 1)


def test_step_limit_is_kept_and_an_unfinished_answer_is_feasible():
    Q, q, floors = simplex_problems("ill-conditioned", 32, 24, np.float32)
    solve = jax.vmap(lambda Q, q, f: solvers.simplex_qp(Q, q, floors=f, max_steps=3))
    result = solve_in(np.float32, jax.jit(solve), Q, q, floors)
    assert (result.num_steps <= 3).all()
    assert not result.converged.all()
    assert (result.x >= floors).all()
    np.testing.assert_allclose(result.x.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("Q", "options", "message"),
    [
        (np.ones((2, 3)), {}, r"Q has shape \(2, 3\), expected \(K, K\)"),
        (np.ones((4, 2, 2)), {}, r"jax\.vmap"),
        (np.ones((0, 0)), {}, r"K >= 1"),
        (np.eye(3), {"q": np.ones(2)}, r"q has shape \(2,\), expected \(3,\)"),
        (np.eye(3), {"floors": np.zeros(2)}, r"floors has shape \(2,\)"),
        (np.eye(3), {"total": np.ones(3)}, r"total has shape \(3,\)"),
        (np.eye(3), {"floors": 0.5}, r"floors sum to 1\.5, expected at most total = 1: lower"),
        (np.eye(3), {"floors": np.array([0.9, 0.2, 0.0])}, r"floors sum to 1\.1"),
        (np.eye(3), {"max_steps": 0}, r"max_steps is 0"),
    ],
)
def test_simplex_mistakes_are_named(Q, options, message):
    with pytest.raises(ValueError, match=message):
        solvers.simplex_qp(Q, **options)


# nnls ------------------------------------------------------------------------------------------


def least_squares(kind, m, n, rng):
    A, b = rng.normal(size=(m, n)), rng.normal(size=m)
    match kind:
        case "unequal columns":
            A *= 10.0 ** rng.uniform(-6, 6, n)
        case "ill-conditioned":
            u, s, v = np.linalg.svd(A, full_matrices=False)
            A = u * np.logspace(0, -6, len(s)) @ v
        case "Hilbert":
            A = 1.0 / (1 + np.arange(m)[:, None] + np.arange(n)[None, :])
            b = A @ np.abs(rng.normal(size=n)) + 1e-3 * b
        case "duplicate columns":
            A = A[:, rng.integers(0, max(1, n // 2), n)]
        case "zero columns":
            A *= rng.random(n) < 0.7
        case "rank 2":
            A = rng.normal(size=(m, 2)) @ rng.normal(size=(2, n))
        case "consistent":
            A = np.abs(A)
            b = A @ (np.abs(rng.normal(size=n)) * (rng.random(n) < 0.5))
        case "b = 0":
            b = 0 * b
        case "A = 0":
            A = 0 * A
    return A, b


NNLS_KINDS = (
    "random",
    "unequal columns",
    "ill-conditioned",
    "Hilbert",
    "duplicate columns",
    "zero columns",
    "rank 2",
    "consistent",
    "b = 0",
    "A = 0",
)


def nnls_residual(A, b, x):
    """The residual that the docstring of `nnls` defines, in float64."""
    slope, lengths = A.T @ (b - A @ x), norm(A, axis=0)
    scale = lengths * (norm(b) + lengths @ x)
    wrong = np.where(x > 0, np.abs(slope), np.maximum(slope, 0))
    return np.max(wrong / np.where(scale > 0, scale, 1))


@both_precisions
def test_nnls_matches_the_references(dtype):
    # Rows and columns of zeros change no problem and make all of them one shape, compiled once.
    A, b = np.zeros((40, 20, 14)), np.zeros((40, 20))
    for i in range(40):
        m, n = DATA[f"nnls_{i}/A"].shape
        A[i, :m, :n], b[i, :m] = DATA[f"nnls_{i}/A"], DATA[f"nnls_{i}/b"]
    result = solve_in(dtype, batched_nnls, A, b)
    assert result.converged.all()
    assert (result.x >= 0).all()
    for i, (Ai, bi, x) in enumerate(zip(A, b, result.x, strict=True)):
        expected = float(DATA[f"nnls_{i}/residual"])
        # Some of the problems can be met exactly; there the error counts relative to b.
        size = expected if expected > 1e-10 * norm(bi) else norm(bi)
        limit = 1e-5 if dtype == np.float32 else 1e-9
        assert abs(norm(Ai @ x - bi) - expected) <= limit * size, i


@pytest.mark.parametrize(("m", "n"), [(1, 1), (12, 8), (6, 12), (40, 32)])
@pytest.mark.parametrize("kind", NNLS_KINDS)
def test_nnls_is_as_good_as_scipy(kind, m, n):
    rng = np.random.default_rng([m, n, NNLS_KINDS.index(kind)])
    A, b = map(np.stack, zip(*(least_squares(kind, m, n, rng) for _ in range(16)), strict=True))
    result = solve_in(np.float64, batched_nnls, A, b)
    assert result.converged.all()
    for Ai, bi, x in zip(A, b, result.x, strict=True):
        expected = scipy.optimize.nnls(Ai, bi, maxiter=100 * n)[1]
        floor = 1e-13 * (norm(bi) + norm(Ai, axis=0) @ x)
        assert norm(Ai @ x - bi) <= expected * (1 + 1e-9) + floor
        assert nnls_residual(Ai, bi, x) <= tolerance(np.float64, 64)


@pytest.mark.parametrize("kind", sorted({*NNLS_KINDS} - {"ill-conditioned", "Hilbert"}))
def test_nnls_in_float32_is_as_good_as_scipy_in_float64(kind):
    rng = np.random.default_rng(NNLS_KINDS.index(kind))
    A, b = map(np.stack, zip(*(least_squares(kind, 12, 8, rng) for _ in range(16)), strict=True))
    result = solve_in(np.float32, batched_nnls, A, b)
    assert result.converged.all()
    for Ai, bi, x in zip(A, b, result.x, strict=True):
        expected = scipy.optimize.nnls(Ai, bi)[1]
        floor = tolerance(np.float32, 2) * (norm(bi) + norm(Ai, axis=0) @ x)
        assert norm(Ai @ x - bi) <= expected * (1 + 1e-5) + floor
        assert nnls_residual(Ai, bi, x) <= tolerance(np.float32, 64)


def test_nearly_opposite_columns_of_a_rank_deficient_matrix_stay_bounded():
    # A basis that holds numerically dependent columns sends x to 1/eps.
    rng = np.random.default_rng(0)
    for _ in range(32):
        pairs = [least_squares("rank 2", 6, 12, rng) for _ in range(16)]
        A, b = map(np.stack, zip(*pairs, strict=True))
        assert solve_in(np.float64, batched_nnls, A, b).x.max() < 1e6


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_nnls_answer_follows_the_scales_of_its_input(scale):
    rng = np.random.default_rng(3)
    problems = [least_squares("random", 12, 8, rng) for _ in range(16)]
    A, b = map(np.stack, zip(*problems, strict=True))
    x = solve_in(np.float32, batched_nnls, A, b).x
    np.testing.assert_allclose(
        solve_in(np.float32, batched_nnls, A * scale, b * scale).x, x, rtol=1e-4, atol=1e-5
    )
    columns = np.where(np.arange(8) % 2, scale, 1.0)
    np.testing.assert_allclose(
        solve_in(np.float32, batched_nnls, A * columns, b).x * columns, x, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("A", "b", "options", "message"),
    [
        (np.ones(3), np.ones(3), {}, r"A has shape \(3,\) and b \(3,\)"),
        (np.ones((3, 2)), np.ones(2), {}, r"expected \(m, n\) and \(m,\)"),
        (np.ones((3, 0)), np.ones(3), {}, r"m, n >= 1"),
        (np.ones((5, 3, 2)), np.ones((5, 3)), {}, r"jax\.vmap"),
        (np.ones((3, 2)), np.ones(3), {"max_steps": 0}, r"max_steps is 0"),
    ],
)
def test_nnls_mistakes_are_named(A, b, options, message):
    with pytest.raises(ValueError, match=message):
        solvers.nnls(A, b, **options)


# Both: what JAX asks of a function -------------------------------------------------------------


def problems_of(solver, dtype):
    rng = np.random.default_rng(1)
    if solver is solvers.simplex_qp:
        rows = [jacobian(kind, 8, rng) for kind in KINDS]
        return (jnp.asarray(np.stack([J @ J.T for J in rows]), dtype),)
    pairs = [least_squares(kind, 12, 8, rng) for kind in NNLS_KINDS]
    return tuple(jnp.asarray(np.stack(arrays), dtype) for arrays in zip(*pairs, strict=True))


@pytest.mark.parametrize("K", [1, 2, 5, 8])
def test_elimination_solves_what_the_factorisation_does(K):
    rng = np.random.default_rng(K)
    J = rng.standard_normal((20, K, K + 1)) * 10 ** rng.uniform(-1, 1, (20, K, 1))
    Q, rhs = J @ J.transpose(0, 2, 1), rng.standard_normal((20, K, 2))
    found = jax.vmap(by_elimination)(jnp.asarray(Q, jnp.float32), jnp.asarray(rhs, jnp.float32))
    exact = np.linalg.solve(Q, rhs)
    error = np.linalg.norm(found - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    assert np.all(error <= 10 * np.finfo(np.float32).eps * np.linalg.cond(Q))
    indefinite = jnp.asarray(Q[0] - 1e3 * np.trace(Q[0]) * np.eye(K), jnp.float32)
    assert np.isnan(by_elimination(indefinite, jnp.ones((K, 1)))).all()


both_solvers = pytest.mark.parametrize("solver", [solvers.simplex_qp, solvers.nnls])


@both_solvers
def test_vmap_equals_a_loop(solver):
    arrays = problems_of(solver, jnp.float32)
    batch = jax.vmap(solver)(*arrays)
    unique = np.linalg.cond(arrays[0]) < 100
    assert unique.any()
    for i, x in enumerate(batch.x):
        matrix = arrays[0][i]
        single = solver(*(array[i] for array in arrays))
        # Of an ill-conditioned or singular matrix x is not unique, its image is.
        image = dot(matrix, single.x)
        limit = 1e-5 * float(jnp.linalg.norm(matrix) * jnp.linalg.norm(single.x))
        np.testing.assert_allclose(dot(matrix, x), image, rtol=1e-5, atol=limit)
        if unique[i]:
            np.testing.assert_allclose(x, single.x, rtol=1e-4, atol=1e-5)
        assert single.converged
        assert batch.converged[i]


@both_solvers
def test_new_values_do_not_retrace(solver):
    traces = []

    @jax.jit
    def solve(*arrays):
        traces.append(None)
        return solver(*arrays)

    arrays = problems_of(solver, jnp.float32)
    for i in range(4):
        solve(*(array[i] for array in arrays))
    assert len(traces) == 1


@both_solvers
@both_precisions
def test_lowers_for_every_platform(solver, dtype):
    with precision_of(dtype):
        arrays = [array[0] for array in problems_of(solver, dtype)]
        shapes = [jax.ShapeDtypeStruct(array.shape, dtype) for array in arrays]
        exported = jax.export.export(jax.jit(solver), platforms=PLATFORMS)(*shapes)
        assert exported.platforms == PLATFORMS


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_narrow_input_is_solved_in_float32(dtype):
    matrix, vector = jnp.eye(2, dtype=dtype), jnp.ones(2, dtype)
    simplex = functools.partial(solvers.simplex_qp, floors=0.1)
    for solver in (simplex, solvers.nnls):
        result = jax.eval_shape(solver, matrix, vector)
        assert result.x.dtype == result.residual.dtype == jnp.float32
        assert not any(leaf.weak_type for leaf in result)


def test_options_do_not_widen_the_result():
    with precision_of(np.float64):
        floors = jnp.full(2, 0.1, jnp.float64)
        solve = functools.partial(solvers.simplex_qp, floors=floors, total=1.0)
        result = jax.eval_shape(solve, jnp.eye(2, dtype=jnp.float32))
    assert result.x.dtype == jnp.float32


@both_precisions
def test_variables_that_are_not_there_change_nothing(dtype):
    """Whatever Q, q and floors say of them; and the answer is that of the others alone."""
    rng = np.random.default_rng(3)
    with precision_of(dtype):
        for K in (2, 3, 6):
            J = rng.normal(size=(K, 9)).astype(dtype)
            q = rng.normal(size=K).astype(dtype)
            floors = np.full(K, 0.3 / K, dtype)
            present = np.insert(np.ones(K, bool), [0, K // 2, K], False)
            Q = np.full((K + 3, K + 3), np.nan, dtype)
            Q[np.ix_(present, present)] = J @ J.T
            wide_q, wide_floors = np.full((2, K + 3), np.inf, dtype)
            wide_q[present], wide_floors[present] = q, floors
            result = solvers.simplex_qp(Q, wide_q, floors=wide_floors, present=present)
            alone = solvers.simplex_qp(J @ J.T, q, floors=floors)
            assert result.converged
            np.testing.assert_array_equal(result.x[~present], 0)
            np.testing.assert_allclose(result.x[present], alone.x, atol=tolerance(dtype, 64))
    nobody = solvers.simplex_qp(jnp.eye(2), present=jnp.zeros(2, bool))
    np.testing.assert_array_equal(nobody.x, 0)
    assert not nobody.converged
    with pytest.raises(ValueError, match="present has shape"):
        solvers.simplex_qp(jnp.eye(2), present=jnp.ones(3, bool))


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
@pytest.mark.parametrize("fill", [0.0, 1.3])
def test_the_even_minimiser_is_taken_where_all_rows_are_alike(num_tasks, fill):
    """So that a task that is not there does not change how the others are weighed."""
    x = solvers.simplex_qp(np.full((num_tasks, num_tasks), fill, "f4")).x
    np.testing.assert_allclose(x, np.full(num_tasks, 1 / num_tasks), rtol=1e-6)
