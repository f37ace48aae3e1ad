"""The aggregators that need the Gramian and a solver, against formulas and reference solutions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from mtl_optax import (
    aligned_mtl,
    cagrad,
    conflict_free,
    dualproj,
    fairgrad,
    gradvac,
    imtl_g,
    nash_mtl,
    pcgrad,
    upgrad,
)
from tests.problems import a_fifth, compiled_update, oracle_cases, relative_error

GOLDEN = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], np.float32)
SOLVED = (upgrad, dualproj, cagrad, imtl_g, conflict_free, aligned_mtl, nash_mtl, fairgrad)
names = lambda factory: factory.__name__  # noqa: E731


def aggregate(factory, matrix, **options):
    """The update in float64 and the state, as NumPy arrays."""
    losses = np.ones(len(matrix), matrix.dtype)
    update, state = compiled_update(factory, len(matrix), **options)(matrix, losses)
    return np.asarray(update, np.float64), state


@functools.cache
def compiled_with_preference(factory, num_tasks, **options):
    @jax.jit
    def update(matrix, preference):
        tx = factory(num_tasks, preference=preference, **options)
        return tx.update(matrix, tx.init(None), losses=jnp.ones(num_tasks, matrix.dtype))

    return update


def aggregate_padded(factory, matrix, **options):
    """As `aggregate`, but for the programs of other shapes.

    Zero columns and rows must change nothing; nor for CAGrad, whose mean zero rows shrink, must
    repeating every task as often.
    """
    rows, width = matrix.shape
    matrix = np.pad(matrix, [(0, 0), (0, 60 - width)])
    if factory is cagrad:
        assert 12 % rows == 0
        update, state = aggregate(factory, np.tile(matrix, (12 // rows, 1)), **options)
        return update, state
    padded = np.pad(matrix, [(0, 12 - rows), (0, 0)])
    if factory in (upgrad, dualproj, aligned_mtl):
        preference = (np.arange(12) < len(matrix)).astype(matrix.dtype) / len(matrix)
        update, state = compiled_with_preference(factory, 12, **options)(padded, preference)
        return np.asarray(update, np.float64), state
    return aggregate(factory, padded, **options)


@pytest.mark.parametrize(
    ("factory", "options", "expected"),
    [
        (upgrad, {}, (0.2923977, 1.9005848)),
        (dualproj, {}, (5 / 9, 10 / 9)),
        (cagrad, {}, (0.1835034, 1.2041241)),
        (imtl_g, {}, (0.0767, 1.0)),
        (conflict_free, {}, (0.1588, 2.0706)),
        (aligned_mtl, {}, (0.2132787, 0.9673330)),
        (aligned_mtl, {"scale": "rmse"}, (0.5763758, 2.6141720)),
        (nash_mtl, {}, (0.0765843, 0.9985326)),
        (fairgrad, {}, (0.0765843, 0.9985326)),
    ],
)
def test_golden_values(factory, options, expected):
    update, _ = aggregate_padded(factory, GOLDEN, **options)
    a, b = expected
    np.testing.assert_allclose(update[:3], (a, b, b), atol=5e-5)


# The reference solutions.

TOLERANCES = [
    pytest.param(np.float32, 2e-4, id="float32"),
    pytest.param(np.float64, 1e-9, id="float64"),
]


def check_dual_cone(factory, matrix, update, dtype):
    """Dependent rows: the references satisfy their constraints only to 1e-8, so test optimality."""
    units = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    rounding = 100 * np.finfo(dtype).eps * np.linalg.norm(matrix, axis=1).max()
    assert np.min(units @ update) >= -rounding
    if factory is dualproj:
        # Moreau: what the projection takes away is orthogonal to what it leaves.
        mean = matrix.mean(0)
        assert abs(update @ (mean - update)) <= rounding * np.linalg.norm(mean)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("factory", [upgrad, dualproj], ids=names)
def test_projections_match_the_references(factory, dtype, tolerance):
    for case, matrix, expected in (p.values for p in oracle_cases(factory.__name__)):
        with jax.enable_x64(dtype == np.float64):
            update, state = aggregate_padded(factory, matrix.astype(dtype))
        assert state.fallbacks == 0, case
        check_dual_cone(factory, matrix, update, dtype)
        scale = np.linalg.norm(matrix, axis=1).max()
        dependent = case.startswith(("rank2", "duplicate"))
        allowed = 1e-7 * scale if dependent else tolerance * np.linalg.norm(expected)
        assert np.linalg.norm(update - expected) <= max(allowed, dependent * tolerance * scale), (
            case
        )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(
    ("factory", "options", "name"),
    [
        (imtl_g, {}, "imtl_g"),
        (conflict_free, {}, "config"),
        (aligned_mtl, {"scale": "min"}, "aligned_mtl_min"),
        (aligned_mtl, {"scale": "median"}, "aligned_mtl_median"),
        (aligned_mtl, {"scale": "rmse"}, "aligned_mtl_rmse"),
    ],
)
def test_closed_forms_match_the_references(factory, options, name, dtype, tolerance):
    for case, matrix, expected in (p.values for p in oracle_cases(name)):
        with jax.enable_x64(dtype == np.float64):
            update, state = aggregate_padded(factory, matrix.astype(dtype), **options)
        assert state.fallbacks == 0, case
        assert relative_error(update, expected) <= tolerance, case


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("num_tasks", [12, 8])
def test_cagrad_matches_the_references(num_tasks, dtype, tolerance):
    # Repeating every task as often changes neither the mean nor the worst task.
    for case, matrix, expected in (p.values for p in oracle_cases("cagrad_c0.5")):
        repeats, rest = divmod(num_tasks, len(matrix))
        if rest:
            continue
        with jax.enable_x64(dtype == np.float64):
            update, state = aggregate(cagrad, np.tile(matrix, (repeats, 1)).astype(dtype))
        assert state.fallbacks == 0, case
        assert relative_error(update, expected) <= tolerance, case


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(
    ("factory", "options", "name"),
    [
        (nash_mtl, {}, "nash_mtl_weights"),
        (fairgrad, {"alpha": 2.0}, "fairgrad_alpha2_weights"),
    ],
)
def test_equilibria_match_the_references(factory, options, name, dtype, tolerance):
    for case, matrix, padded in (p.values for p in oracle_cases(name)):
        expected = padded[: len(matrix)]
        with jax.enable_x64(dtype == np.float64):
            update, state = aggregate_padded(factory, matrix.astype(dtype), **options)
        assert state.fallbacks == 0, case
        assert relative_error(update, expected @ matrix) <= tolerance, case
        # The state holds float32.
        weights = np.asarray(state.weights)[: len(matrix)]
        assert relative_error(weights, expected) <= max(tolerance, 1e-7), case


# What the papers promise, and where the peers break it.

HARD = {
    "almost opposed": [[4e-3, 0, 0], [-5e-3, 1e-3, 0]],
    "opposed and unequal": [[1, 0, 0], [-1e-3, 1e-4, 0]],
    "short rows": [[4e-3, 0, 0], [1e-3, 5e-3, 0]],
    "unequal rows": [[1e-3, 0, 0], [0, 1e3, 0]],
    "three short rows": [[1e-4, 0, 0], [-0.9e-4, 0.2e-4, 0], [0, -0.5e-4, 1e-4]],
    "short and opposed": [[1e-3, 0, 0], [-9e-4, 2e-4, 0]],
    "three unequal rows": [[1e-4, 0, 0], [0, 1, 0], [0, 0, 1e4]],
    "long rows": [[2e4, 0, 0], [0, 2e4, 0]],
    "norms of 1e20": [[1e20, 0, 0], [-5e19, 1e20, 0]],
    "spread": [[1e-4, 2e-5, 0], [-3, 1, 1], [-5e3, 2e3, 1e3]],
}


def hard_cases():
    for matrix in HARD.values():
        yield np.array(matrix, np.float32)
    rng = np.random.default_rng(0)
    for _ in range(30):
        conflicting = rng.standard_normal((3, 3)) - 0.3
        yield (conflicting * 10.0 ** rng.uniform(-4, 4, (3, 1))).astype(np.float32)


@pytest.mark.parametrize("factory", [upgrad, dualproj, nash_mtl, fairgrad], ids=names)
def test_conflicts_with_no_task(factory):
    for matrix in hard_cases():
        update, state = aggregate_padded(factory, matrix)
        update, matrix = update[:3], matrix.astype(np.float64)
        assert state.fallbacks == 0
        cosines = matrix @ update / np.linalg.norm(matrix, axis=1) / np.linalg.norm(update)
        assert np.all(cosines >= -1e-5), matrix


def test_cagrad_solves_what_the_peers_return_zero_or_the_mean_for():
    for matrix in hard_cases():
        rows = matrix.astype(np.float64)
        rows = rows / np.linalg.norm(rows, axis=1).max()
        update, state = aggregate_padded(cagrad, matrix)
        update = update[:3] / np.linalg.norm(matrix.astype(np.float64), axis=1).max()
        assert state.fallbacks == 0
        mean = rows.mean(0)
        radius = 0.5 * np.linalg.norm(mean)
        assert np.linalg.norm(update - mean) <= radius * (1 + 1e-5)
        # Weak duality: <g_w, g0> + radius |g_w| bounds the least improvement; w from a fine grid.
        best = np.min(rows @ update)
        grid = np.linspace(0, 1, 41)
        if len(rows) == 2:
            w = np.stack([grid, 1 - grid], 1)
        else:
            w = np.array([(a, b, 1 - a - b) for a in grid for b in grid if a + b <= 1])
        combined = np.concatenate([w, np.eye(len(rows))]) @ rows
        bound = combined @ mean + radius * np.linalg.norm(combined, axis=1)
        assert best <= np.min(bound) + 1e-5 * radius
        assert best >= np.min(rows @ mean) - 1e-5 * radius


def test_cagrad_of_a_traced_radius_and_rescaled():
    @jax.jit
    def update(c):
        tx = cagrad(2, c=c, rescale="1+c2")
        return tx.update(GOLDEN, tx.init(None), losses=jnp.ones(2))[0]

    np.testing.assert_allclose(update(0.0), GOLDEN.mean(0), rtol=1e-5)
    plain, _ = aggregate_padded(cagrad, GOLDEN)
    np.testing.assert_allclose(update(0.5) * 1.25, plain[:3], rtol=1e-5)


def test_cagrad_of_rows_that_admit_no_improvement_harms_none():
    matrix = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0]], np.float32)
    update, state = aggregate_padded(cagrad, matrix)
    np.testing.assert_allclose(update[:3], [0, 1 / 3, 0], atol=1e-6)
    assert state.fallbacks == 0


def test_aligned_mtl_keeps_the_small_singular_values_of_unequal_rows():
    for matrix in hard_cases():
        left, singular, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        exact = np.full(len(matrix), 1 / len(matrix)) @ left @ right
        update, _ = aggregate_padded(aligned_mtl, matrix, scale="rmse")
        update = update[:3] / np.sqrt(np.mean(singular**2))
        assert np.linalg.norm(update - exact) < 3e-4


def config_by_pinv(rows):
    """The authors' rule, float64."""
    rows = np.asarray(rows, np.float64)
    v = np.linalg.pinv(rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ np.ones(len(rows))
    return (rows @ v).sum() / (v @ v) * v


def aligned_by_svd(rows):
    left, singular, right = np.linalg.svd(np.asarray(rows, np.float64), full_matrices=False)
    return singular[-1] * np.ones(len(rows)) / len(rows) @ left @ right


@pytest.mark.parametrize(
    ("factory", "rule"), [(conflict_free, config_by_pinv), (aligned_mtl, aligned_by_svd)]
)
@pytest.mark.parametrize("condition", [10, 1e3, 1e4])
def test_rows_at_hand_keep_their_conditioning(factory, rule, condition):
    """float32 loses what the rows do, not its square: at 1e4 their Gramian holds nothing of it."""
    rng = np.random.default_rng(5)
    axes = np.linalg.qr(rng.standard_normal((40, 3)))[0] * np.geomspace(1, 1 / condition, 3)
    rows = np.linalg.qr(rng.standard_normal((3, 3)))[0] @ axes.T
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    matrix = (rows * np.array([[0.1], [1.0], [5.0]])).astype(np.float32)
    update, state = aggregate(factory, matrix)
    assert state.fallbacks == 0
    exact = rule(matrix)
    bound = 20 * np.finfo(np.float32).eps * np.linalg.cond(rows)
    assert np.linalg.norm(update - exact) < bound * np.linalg.norm(exact)


def test_two_tasks_that_are_one_but_for_rounding_count_as_one():
    rng = np.random.default_rng(6)
    for noise in (0, 1e-7, 1e-6):
        matrix = rng.standard_normal((3, 40))
        matrix[1] = matrix[0] * (1 + noise * rng.standard_normal(40))
        update, state = aggregate(conflict_free, matrix.astype(np.float32))
        twice = matrix[[0, 2]] * np.array([[2.0], [1.0]])
        expected = config_by_pinv(twice)
        assert state.fallbacks == 0
        assert np.linalg.norm(update - expected) < 1e-4 * np.linalg.norm(expected)


def test_imtl_g_projects_equally_on_every_row():
    matrix = np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32)
    update, state = aggregate(imtl_g, matrix)
    projections = matrix @ update / np.linalg.norm(matrix, axis=1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-4)
    np.testing.assert_allclose(np.sum(state.weights), 1, rtol=1e-5)


def test_imtl_g_has_a_derivative_where_rows_are_orthogonal():
    def in_closed_form(matrix):  # of two tasks, eq. 5
        first, second = matrix
        apart = first / np.linalg.norm(first) - second / np.linalg.norm(second)
        share = first @ apart / ((first - second) @ apart)
        return (1 - share) * first + share * second

    matrix, along = np.array([[2.0, 0, 0], [0, 1, 0]]), np.array([[0.3, -0.2, 0.1], [0.5, 0.4, 1]])
    tx = imtl_g(2)
    update = lambda m: tx.update(m, tx.init(None), losses=jnp.ones(2))[0]  # noqa: E731
    _, slope = jax.jvp(update, (jnp.float32(matrix),), (jnp.float32(along),))
    h = 1e-6
    change = in_closed_form(matrix + h * along) - in_closed_form(matrix - h * along)
    np.testing.assert_allclose(slope, change / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("factory", "by_hand"), [(aligned_mtl, aligned_by_svd), (conflict_free, config_by_pinv)]
)
def test_derivatives_through_decompositions_are_numbers(factory, by_hand):
    """The rows that are decomposed are mixed to orthogonal ones on the way: of equal values."""
    draws = np.random.default_rng(0)
    matrices, along = draws.standard_normal((2, 200, 3, 7))
    tx, h = factory(3), 1e-6
    update = lambda m: tx.update(m, tx.init(None), losses=jnp.ones(3))[0]  # noqa: E731
    forth = jax.jit(jax.vmap(lambda m, t: jax.jvp(update, (m,), (t,))[1]))
    back = jax.jit(jax.vmap(lambda m, t: jnp.sum(t * jax.grad(lambda m: jnp.sum(update(m)))(m))))
    slopes = np.asarray(forth(jnp.float32(matrices), jnp.float32(along)))
    changes = np.stack(
        [
            (by_hand(m + h * t) - by_hand(m - h * t)) / (2 * h)
            for m, t in zip(matrices, along, strict=True)
        ]
    )
    errors = np.linalg.norm(slopes - changes, axis=1) / np.linalg.norm(changes, axis=1)
    assert np.quantile(errors, 0.95) < 1e-3
    assert errors.max() < 0.1
    total = back(jnp.float32(matrices), jnp.float32(along))
    np.testing.assert_allclose(total, slopes.sum(axis=1), rtol=1e-2, atol=1e-2)


def test_preferences_scale_the_rows_shares():
    matrix = np.array([[1, 0.5, 0], [-0.5, 1, 0], [0, 0, 2]], np.float32)  # orthogonal
    preference = np.array([0.2, 0.3, 0.5], np.float32)
    padded = np.pad(matrix, [(0, 9), (0, 57)]), np.pad(preference, (0, 9))
    for factory in (upgrad, dualproj):
        update, _ = compiled_with_preference(factory, 12)(*padded)
        np.testing.assert_allclose(update[:3], preference @ matrix, rtol=1e-6)
    update, _ = compiled_with_preference(conflict_free, 3)(matrix, preference)
    cosines = matrix @ update / np.linalg.norm(matrix, axis=1) / np.linalg.norm(update)
    np.testing.assert_allclose(cosines, preference / np.linalg.norm(preference), rtol=1e-5)


def test_nash_fixes_the_norm_and_shortens_to_max_norm():
    matrix = np.random.default_rng(2).standard_normal((3, 3)).astype(np.float32)
    update, state = aggregate(nash_mtl, matrix)
    np.testing.assert_allclose(np.linalg.norm(update), 3**0.5, rtol=1e-5)
    np.testing.assert_allclose(matrix @ update * np.asarray(state.weights), 1, rtol=1e-4)
    shortened, _ = aggregate(nash_mtl, matrix, max_norm=0.5)
    np.testing.assert_allclose(shortened, update * 0.5 / 3**0.5, rtol=1e-5)


# Laws.


@pytest.mark.parametrize("factory", SOLVED, ids=names)
def test_scales_with_the_jacobian(factory):
    matrix = np.random.default_rng(3).standard_normal((3, 3)).astype(np.float32)
    update, _ = aggregate(factory, matrix)
    for scale in np.float32([1e-15, 1e-6, 1e-3, 1e3, 1e6, 1e15]):
        scaled, state = aggregate(factory, scale * matrix)
        assert state.fallbacks == 0
        if factory in (nash_mtl, fairgrad):  # of degree 0, at alpha = 1
            scale = 1
        assert relative_error(scaled / np.float64(scale), update) < 1e-4
    if factory is fairgrad:
        update, _ = aggregate_padded(fairgrad, matrix, alpha=2.0)
        scaled, _ = aggregate_padded(fairgrad, np.float32(1e6) * matrix, alpha=2.0)
        assert relative_error(scaled * 1e6 ** (1 / 3), update) < 1e-4


@pytest.mark.parametrize("factory", SOLVED, ids=names)
def test_permuting_the_tasks_permutes_the_weights(factory):
    matrix = np.random.default_rng(4).standard_normal((3, 3)).astype(np.float32)
    order = np.array([2, 0, 1])
    update, state = aggregate(factory, matrix)
    permuted, permuted_state = aggregate(factory, matrix[order])
    assert relative_error(permuted, update) < 1e-5
    np.testing.assert_allclose(permuted_state.weights, state.weights[order], rtol=1e-4)


ROW, OTHER = np.float32([[1, 2, -1], [0.5, -1, 1]])
# Rows, and the update of each method where theory gives one.
DEGENERATE = {
    "duplicate rows": [ROW, ROW, OTHER],
    "a zero row": [ROW, 0 * ROW, OTHER],
    "all zero": [0 * ROW] * 3,
    "antiparallel rows": [ROW, -ROW, OTHER],
    "antiparallel rows of unlike norms": [ROW, -3 * ROW, 0 * ROW],
    "rank one": [ROW, -2 * ROW, 0.5 * ROW],
    "rank one, aligned": [ROW, 2 * ROW, 0.5 * ROW],
    "norms of 1e15": [1e15 * ROW, 1e15 * OTHER, -1e14 * ROW + 1e15 * OTHER],
    "two directions, three tasks": [ROW, OTHER, -0.5 * (ROW + OTHER)],
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("factory", SOLVED, ids=names)
def test_degenerate_rows_are_normal_input(factory, case):
    matrix = np.stack(DEGENERATE[case]).astype(np.float32)
    update, state = aggregate(factory, matrix)
    assert np.all(np.isfinite(update))
    assert np.all(np.isfinite(state.weights))
    lost = factory in (imtl_g, conflict_free) and case.startswith("antiparallel rows of")
    assert state.fallbacks == lost
    norms = np.linalg.norm(matrix.astype(np.float64), axis=1)
    if factory in (upgrad, dualproj):
        limit = 1e-6 * norms.max() * norms
        assert np.all(matrix @ update >= -limit)
        if case in ("antiparallel rows of unlike norms", "rank one"):
            np.testing.assert_allclose(update, 0, atol=1e-6 * norms.max())
    if case == "all zero":
        np.testing.assert_array_equal(update, 0)


@pytest.mark.parametrize("factory", SOLVED, ids=names)
def test_one_task_is_its_own_update(factory):
    update, state = aggregate_padded(factory, ROW[None])
    update = update[:3]
    if factory in (nash_mtl, fairgrad):
        update = update * np.linalg.norm(ROW)
    if factory is cagrad:
        # The best of the ball around the only gradient.
        update = update / 1.5
    np.testing.assert_allclose(update, ROW, rtol=1e-6)
    assert state.fallbacks == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("factory", SOLVED, ids=names)
def test_counts_what_it_could_not_solve_and_recovers(factory, bad):
    matrix = np.stack([ROW, OTHER, ROW + OTHER]).astype(np.float32)
    broken = matrix.copy()
    broken[1, 0] = bad
    update = compiled_update(factory, 3)
    _, state = update(broken, np.ones(3, np.float32))
    assert state.fallbacks == 1
    np.testing.assert_allclose(state.weights, 1 if factory is conflict_free else 1 / 3)
    _, state = update(matrix, np.ones(3, np.float32))
    assert np.all(np.isfinite(state.weights))


# Many tasks: more than are solved for by factorisation.


@pytest.mark.parametrize(
    ("factory", "num_tasks"),
    [(upgrad, 40), (dualproj, 140), (cagrad, 140)],
    ids=["upgrad", "dualproj", "cagrad"],
)
def test_many_tasks_of_which_few_are_present_get_what_the_few_get(factory, num_tasks):
    rng = np.random.default_rng(5)
    rows = np.full((num_tasks, 60), np.nan, np.float32)
    present = np.arange(num_tasks) % (num_tasks // 20) == 0
    rows[present] = rng.standard_normal((np.sum(present), 60)) - 0.1
    few = rows[present]
    # A task that asks for nothing leaves CAGrad no direction that improves all.
    few[3], few[7] = 0 if factory is upgrad else few[5], few[6]
    few[8:12] *= 10.0 ** np.array([-4, -2, 2, 4])[:, None]
    rows[present] = few
    tx = factory(num_tasks)
    update = jax.jit(
        lambda rows, state, present: tx.update(
            mtl.as_jacobian(rows, np.ones(num_tasks, np.float32)), state, present=present
        )
    )
    got, state = update(rows, tx.init(None), present)
    expected, _ = aggregate(factory, few)
    assert state.fallbacks == 0
    assert relative_error(got, expected) < 1e-5
    _, state = update(rows, state, np.ones(num_tasks, bool))
    assert state.fallbacks == 1
    np.testing.assert_allclose(state.weights, 1 / num_tasks)


# GradVac.


def gradvac_by_hand(matrix, targets, beta):
    """Two tasks: one order. The update, and the new targets."""
    altered, targets = matrix.astype(np.float64).copy(), targets.copy()
    for i, j in ((0, 1), (1, 0)):
        norms = np.linalg.norm(altered[i]), np.linalg.norm(matrix[j])
        cosine, aim = altered[i] @ matrix[j] / norms[0] / norms[1], targets[i, j]
        if cosine < aim:
            step = norms[0] * (aim * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - aim**2))
            altered[i] += step / (norms[1] * np.sqrt(1 - aim**2)) * matrix[j]
            reached = altered[i] @ matrix[j] / np.linalg.norm(altered[i]) / norms[1]
            np.testing.assert_allclose(reached, aim, atol=1e-12)
        targets[i, j] += beta * (cosine - aim)
    return altered.sum(0), targets


def test_gradvac_turns_rows_to_their_running_cosine():
    rng = np.random.default_rng(5)
    tx = gradvac(2, key=jax.random.key(0), decay=0.7)
    step = jax.jit(lambda matrix, state: tx.update(matrix, state, losses=jnp.ones(2)))
    state, targets = tx.init(None), np.zeros((2, 2))
    for _ in range(10):
        matrix = (rng.standard_normal((2, 4)) + 1).astype(np.float32)
        update, state = step(matrix, state)
        expected, targets = gradvac_by_hand(matrix, targets, 0.3)
        assert relative_error(update, expected) < 1e-5
        np.testing.assert_allclose(state.targets, targets, atol=1e-6)


def test_gradvac_begins_as_pcgrad_and_stays_it_at_a_decay_of_1():
    matrix = np.random.default_rng(6).standard_normal((3, 3)).astype(np.float32)
    txs = [gradvac(3, key=jax.random.key(1), decay=1.0), pcgrad(3, key=jax.random.key(1))]
    updates = []
    for tx in txs:
        state, total = tx.init(None), 0
        for _ in range(2):
            update, state = tx.update(matrix, state, losses=jnp.ones(3))
            total = total + update
        updates.append(total)
    assert relative_error(*updates) < 1e-5


def test_gradvac_survives_rows_that_agree_oppose_vanish_or_are_nan():
    tx = gradvac(3, key=jax.random.key(0), decay=0.1)
    step = jax.jit(lambda matrix, state: tx.update(matrix, state, losses=jnp.ones(3)))
    state = tx.init(None)
    agreeing = np.stack([ROW, 3 * ROW, 0.1 * ROW])
    for _ in range(20):
        update, state = step(agreeing, state)
        np.testing.assert_allclose(update, agreeing.sum(0), rtol=1e-4)
    for case in DEGENERATE.values():
        update, state = step(np.stack(case).astype(np.float32), state)
        assert np.all(np.isfinite(update))
    _, state = step(agreeing * np.float32([[1], [np.nan], [1]]), state)
    assert np.all(np.isfinite(state.targets))
    assert np.all(np.abs(state.targets) <= 1)


# Options.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cagrad(2, c=-1.0), "c=-1.0"),
        (lambda: cagrad(2, rescale="c"), "rescale='c'"),
        (lambda: fairgrad(2, alpha=0.0), "alpha=0.0"),
        (lambda: nash_mtl(2, max_norm=0.0), "max_norm=0.0"),
        (lambda: aligned_mtl(2, scale="max"), "scale='max'"),
        (lambda: upgrad(2, preference=[1.0, -1.0]), "preference="),
        (lambda: gradvac(2, key=jax.random.key(0), decay=2.0), "decay=2.0"),
        (lambda: dualproj(0), "num_tasks=0"),
    ],
)
def test_options_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Absent tasks.

MANY = jax.random.normal(jax.random.key(11), (5, 9)) - 0.2
PRESENT = np.array([True, False, True, True, False])
# What draws, takes turns or ranks, and one of each solver; tests/test_present.py has them all.
DEALT = (
    "pcgrad", "gradvac", "graddrop", "rgw", "krum", "trimmed_mean", "m_config", "modo", "sdmgrad",
    "pcd", "epo", "mgda", "upgrad", "aligned_mtl", "nash_mtl",
)  # fmt: skip


def steps_of(tx, matrices, losses, state, several=False, **present):
    updates = []
    for matrix in matrices:
        jac = mtl.as_jacobian(matrix, losses)
        given = (jac, mtl.as_jacobian(1.3 * matrix[..., ::-1], losses)) if several else jac
        update, state = jax.jit(tx.update)(given, state, matrix[0], **present)
        updates.append(np.asarray(update, np.float64))
    return updates, state


@pytest.mark.parametrize("name", a_fifth(DEALT))
def test_those_present_get_what_they_would_get_alone(name):
    """Draws and turns are dealt in the order of those present; NaN of the others reaches nobody."""
    key, several = jax.random.key(4), mtl.STRATEGIES[name].needs == "batches"
    tx, alone = mtl.make(name, 5, key=key), mtl.make(name, 3, key=key)
    losses = jnp.array([0.4, jnp.nan, 1.2, 0.7, jnp.inf])
    matrices = [jnp.where(PRESENT[:, None], s * MANY + t, jnp.nan) for s, t in ((1, 0), (2, 0.3))]
    rows = [matrix[PRESENT] for matrix in matrices]
    expected, _ = steps_of(alone, rows, losses[PRESENT], alone.init(MANY[0]), several)
    # EPO's program, steep a hundredfold, lets as much rounding of the Gramian through.
    tolerance = 5e-5 if name == "epo" else 5e-6
    updates, state = steps_of(tx, matrices, losses, tx.init(MANY[0]), several, present=PRESENT)
    for update, wanted in zip(updates, expected, strict=True):
        assert relative_error(update, wanted) < tolerance
    if not several:
        dropped = optax.chain(mtl.drop_nonfinite_tasks(5), tx)
        updates, state = steps_of(dropped, matrices, losses, dropped.init(MANY[0]))
        for update, wanted in zip(updates, expected, strict=True):
            assert relative_error(update, wanted) < tolerance
    assert all(x == 0 for _, x in optax.tree.get_all_with_path(state, "fallbacks"))


def test_a_floor_of_an_absent_task_is_room_for_the_others():
    for solver in ("exact", "two_step"):
        tx = mtl.scale_by_pareto(3, floors=[0.5, 0.2, 0.2], solver=solver)
        alone = mtl.scale_by_pareto(2, floors=[0.2, 0.2], solver=solver)
        present = jnp.array([False, True, True])
        _, state = tx.update(MANY[:3], tx.init(None), losses=jnp.ones(3), present=present)
        _, expected = alone.update(MANY[1:3], alone.init(None), losses=jnp.ones(2))
        np.testing.assert_allclose(state.weights[1:], expected.weights, rtol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "l2", "loss", "loss+"])
def test_mgda_leaves_a_zero_loss_out_where_it_is_absent(normalize):
    losses = jnp.array([0.5, 0.0, 2.0])
    tx, alone = mtl.mgda(3, normalize=normalize), mtl.mgda(2, normalize=normalize)
    matrix = MANY[:3].at[1].set(0)
    present = jnp.array([True, False, True])
    update, state = tx.update(matrix, tx.init(None), losses=losses, present=present)
    expected, _ = alone.update(matrix[::2], alone.init(None), losses=losses[::2])
    assert relative_error(update, np.asarray(expected)) < 1e-6
    assert state.fallbacks == 0


# Where the rows cancel.


def stationary_rows(num_tasks, rng):
    rows, weights = rng.normal(size=(num_tasks, 7)), rng.uniform(0.2, 1, num_tasks)
    rows[-1] = -(weights[:-1] @ rows[:-1]) / weights[-1]
    return rows


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "name", a_fifth(["mgda", "pareto", "upgrad", "dualproj", "nash_mtl", "fairgrad"])
)
def test_match_norm_makes_no_step_of_what_rounding_leaves(name, dtype):
    rng = np.random.default_rng(5)
    gradient, aside = rng.normal(size=(2, 7))
    with jax.enable_x64(dtype == np.float64):
        for num_tasks in (2, 3, 4):
            tx = mtl.match_norm(mtl.make(name, num_tasks))
            losses = jnp.ones(num_tasks, dtype)

            @jax.jit
            def step(rows, tx=tx, losses=losses):
                return tx.update(rows, tx.init(rows[0]), rows[0], losses=losses)

            cases = [stationary_rows(num_tasks, rng) for _ in range(4)]
            if num_tasks == 2:
                cases.append(np.stack([gradient, -0.3 * gradient]))
            for rows in cases:
                for scale in (1e-6, 1e-3, 1.0, 1e6):
                    update, state = step(jnp.asarray(scale * rows, dtype))
                    np.testing.assert_array_equal(update, 0)
                    assert np.isfinite(state.factor)
                    # A little aside from there it steps.
                    tilted = rows + 2e-4 * aside * np.linalg.norm(rows)
                    update, _ = step(jnp.asarray(scale * tilted, dtype))
                    norms = [np.linalg.norm(x) for x in (update, scale * tilted.mean(axis=0))]
                    np.testing.assert_allclose(*norms, rtol=1e-4)


@pytest.mark.parametrize(
    "link",
    [
        lambda: mtl.gradvac(2, key=jax.random.key(0)),
        lambda: mtl.encodec(2),
        lambda: optax.chain(mtl.monitor_tasks(2), mtl.weights([0.3, 1.0])),
    ],
)
def test_match_norm_sees_rows_cancel_wherever_the_gramian_is_known(link):
    gradient = np.random.default_rng(5).normal(size=7).astype(np.float32)
    tx = mtl.match_norm(link())
    rows = jnp.stack([gradient, -0.3 * gradient])
    update, state = tx.update(rows, tx.init(rows[0]), rows[0], losses=jnp.ones(2))
    np.testing.assert_array_equal(update, 0)
    assert state.factor == 0 or not np.any(tx.update(rows, state, rows[0], losses=jnp.ones(2))[0])
    update, _ = tx.update(rows.at[0, 0].add(1.0), state, rows[0], losses=jnp.ones(2))
    assert np.any(update != 0)


@pytest.mark.parametrize(
    "link", [mtl.mgda, lambda k: optax.chain(mtl.scale_by_uwso(k), mtl.upgrad(k))]
)
def test_match_norm_sees_held_weights_cancel_the_rows(link):
    gradient = np.random.default_rng(5).normal(size=7).astype(np.float32)
    tx = mtl.match_norm(mtl.every(3, link(2)))
    rows = jnp.stack([gradient, -0.3 * gradient])
    update = jax.jit(lambda rows, state: tx.update(rows, state, rows[0], losses=jnp.ones(2)))
    state = tx.init(rows[0])
    for scale in (1.0, 1.0, 3.0, 1e-3):
        step, state = update(scale * rows, state)
        np.testing.assert_array_equal(step, 0)
    tilted = rows.at[0, 0].add(1.0)
    step, state = update(tilted, state)
    np.testing.assert_allclose(np.linalg.norm(step), np.linalg.norm(tilted.mean(0)), rtol=1e-5)


def test_match_norm_keeps_what_an_unsolvable_program_falls_back_to():
    gradient = np.random.default_rng(6).normal(size=7).astype(np.float32)
    tx = mtl.match_norm(mtl.imtl_g(2))
    rows = jnp.stack([gradient, -0.3 * gradient])
    update, state = tx.update(rows, tx.init(rows[0]), rows[0], losses=jnp.ones(2))
    np.testing.assert_allclose(update, 0.35 * gradient, rtol=1e-5)
    assert state.inner_state.fallbacks == 1


def test_conflict_free_counts_rows_that_are_all_nan():
    tx = mtl.conflict_free(2)
    _, state = tx.update(jnp.full((2, 3), jnp.nan), tx.init(jnp.ones(3)), losses=jnp.ones(2))
    assert state.fallbacks == 1
