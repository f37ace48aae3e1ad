"""Aggregators and balancers that work on rows, keep rows in state, or take several batches."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import mtl_optax as mtl
from mtl_optax import (
    cr_mogm,
    db_mtl,
    excess_mtl,
    graddrop,
    krum,
    lr_annealing,
    m_config,
    moco,
    modo,
    ntk_traces,
    pcd,
    scale_by_encodec,
    scale_by_lr_annealing,
    scale_by_ntk,
    sdmgrad,
    trimmed_mean,
)
from tests.problems import a_fifth, compiled_update, relative_error

MATRIX = jax.random.normal(jax.random.key(7), (3, 10)) - 0.3
LOSSES = jnp.array([0.7, 1.1, 2.0])
KEY = jax.random.key(0)


def run(tx, *matrices, losses=None, state=None, **extra_args):
    """The last update and state of one step a matrix, and the updates of all."""
    state = tx.init(matrices[0][0]) if state is None else state
    given = jnp.ones(len(matrices[0])) if losses is None else losses
    step = jax.jit(lambda m, state: tx.update(m, state, m[0], losses=given, **extra_args))
    updates = []
    for matrix in matrices:
        update, state = step(matrix, state)
        updates.append(np.asarray(update, np.float64))
    return updates[-1], state, updates


# GradDrop.


def test_graddrop_keeps_one_sign_an_entry_with_the_right_probability():
    """Equation 1 of the paper, by frequency."""
    matrix = jnp.array([[3.0, -1.0, 2.0, 0.0], [-1.0, -4.0, 2.0, 0.0]])
    keys = jax.random.split(jax.random.key(1), 4000)

    def draw(key):
        tx = graddrop(2, key=key)
        return tx.update(matrix, tx.init(None), losses=jnp.ones(2))[0]

    updates = np.asarray(jax.jit(jax.vmap(draw))(keys))
    assert set(np.unique(updates[:, 0])) == {3.0, -1.0}
    assert abs((updates[:, 0] == 3.0).mean() - 0.75) < 0.03
    np.testing.assert_array_equal(updates[:, 1:], np.broadcast_to([-5.0, 4.0, 0.0], (4000, 3)))


def test_graddrop_leaks():
    matrix = jnp.array([[3.0], [-1.0]])
    update, _, updates = run(graddrop(2, key=KEY, leak=1.0), matrix)
    np.testing.assert_array_equal(update, [2.0])
    update, _, updates = run(graddrop(2, key=KEY, leak=[0.0, 0.5]), *[matrix] * 20)
    assert {float(u[0]) for u in updates} == {2.5, -1.0}


# Random gradient weighting.


def test_rgw_draws_as_rlw_does_and_leaves_heads_alone():
    params = {"w": jnp.array([1.0, -2.0]), "a": jnp.array(3.0), "b": jnp.array(0.5)}
    _, jac = mtl.value_and_jac(lambda p: {k: p[k] * jnp.sum(p["w"]) for k in ("a", "b")})(params)
    tx, weigh = mtl.rgw(2, key=KEY), mtl.scale_by_rlw(2, key=KEY)
    update, state = tx.update(jac, tx.init(params), params)
    weights = weigh.update(jac, weigh.init(params), params)[1].weights
    np.testing.assert_array_equal(state.weights, weights)
    assert abs(weights[0] - weights[1]) > 0.1
    np.testing.assert_allclose(update["w"], [weights @ np.array([3.0, 0.5])] * 2, rtol=1e-6)
    np.testing.assert_array_equal([update["a"], update["b"]], [-1.0, -1.0])


# Krum and the trimmed mean.


def krum_by_hand(matrix, num_byzantine, num_selected):
    """Blanchard et al. 2017, section 4, in NumPy float64, from the differences themselves."""
    rows = np.asarray(matrix, np.float64)
    distances = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    count = len(rows) - num_byzantine - 2
    scores = [np.sort(np.delete(d, i))[:count].sum() for i, d in enumerate(distances)]
    return rows[np.argsort(scores)[:num_selected]].mean(0)


@pytest.mark.parametrize(("num_byzantine", "num_selected"), [(0, 1), (1, 3), (2, 2)])
def test_krum_matches_the_definition(num_byzantine, num_selected):
    matrix = jax.random.normal(jax.random.key(3), (7, 5)).at[2].multiply(1e4)
    options = {"num_byzantine": num_byzantine, "num_selected": num_selected}
    update, state, _ = run(krum(7, **options), matrix)
    np.testing.assert_allclose(update, krum_by_hand(matrix, **options), rtol=1e-4)
    np.testing.assert_allclose(jnp.sum(state.weights), 1, rtol=1e-6)


def test_krum_never_selects_what_is_not_finite():
    matrix = jnp.concatenate([MATRIX, jnp.full((1, 10), jnp.nan)])
    update, state, _ = run(krum(4, num_byzantine=1, num_selected=3), matrix)
    np.testing.assert_allclose(update, np.asarray(MATRIX).mean(0), rtol=1e-5)
    assert state.weights[3] == 0
    with pytest.raises(ValueError, match="num_byzantine=2"):
        krum(4, num_byzantine=2)


def test_krum_ties_are_shared():
    update, _, _ = run(krum(2), jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    np.testing.assert_array_equal(update, [0.5, 0.5])


def test_trimmed_mean_drops_extremes_of_each_entry():
    matrix = np.asarray(jax.random.normal(jax.random.key(3), (7, 5)))
    for trim in range(4):
        update, _, _ = run(trimmed_mean(7, trim=trim), jnp.asarray(matrix))
        np.testing.assert_allclose(
            update, np.sort(matrix, axis=0)[trim : 7 - trim].mean(0), atol=1e-6
        )
    np.testing.assert_allclose(update, np.median(matrix, axis=0), atol=1e-6)
    update, _, _ = run(trimmed_mean(3), MATRIX.at[1].set(jnp.nan))
    np.testing.assert_allclose(update, np.max(np.asarray(MATRIX)[[0, 2]], axis=0), atol=1e-6)
    with pytest.raises(ValueError, match="trim=2"):
        trimmed_mean(4, trim=2)


# Methods that track rows.


def test_db_mtl_matches_its_algorithm():
    """Algorithm 1 in NumPy float64, with the average debiased."""
    matrices = [MATRIX, 2 * MATRIX[::-1], MATRIX - 1]
    _, _, updates = run(db_mtl(3, decay=0.8, decay_sigma=0.5), *matrices, losses=LOSSES)
    average, product = np.zeros((3, 10)), 1.0
    for step, matrix in enumerate(matrices, 1):
        beta = 0.8 / step**0.5
        average = beta * average + (1 - beta) * np.asarray(matrix) / np.asarray(LOSSES)[:, None]
        product *= beta
        rows = average / (1 - product)
        norms = np.linalg.norm(rows, axis=1)
        expected = norms.max() * (rows / norms[:, None]).sum(0)
        assert relative_error(updates[step - 1], expected) < 1e-5


def test_db_mtl_leaves_heads_their_log_loss():
    losses = lambda p: {k: jnp.sum(p["w"] * p[k] ** 2) for k in ("a", "b")}  # noqa: E731
    params = {"w": jnp.ones(2), "a": jnp.ones(2), "b": jnp.full(2, 3.0)}
    _, jac = mtl.value_and_jac(losses)(params)
    tx = db_mtl(2)
    update, _ = tx.update(jac, tx.init(params), params)
    np.testing.assert_allclose(update["b"], [6 / 18, 6 / 18], rtol=1e-6)
    np.testing.assert_allclose(update["w"], [1.0, 1.0], rtol=1e-6)


def project_to_simplex(v):
    top = np.sort(v)[::-1]
    sums = np.cumsum(top) - 1
    rho = np.nonzero(top - sums / np.arange(1, len(v) + 1) > 0)[0][-1]
    return np.maximum(v - sums[rho] / (rho + 1), 0)


def test_moco_matches_its_algorithm():
    matrices = [MATRIX, 2 * MATRIX[::-1], MATRIX - 1]
    tx = moco(3, decay=0.4, decay_sigma=0.3, gamma=0.5, gamma_sigma=0.2, rho=0.1)
    _, state, updates = run(tx, *matrices)
    track, product, w = np.zeros((3, 10)), 1.0, np.full(3, 1 / 3)
    for step, matrix in enumerate(matrices, 1):
        beta = 0.6 / step**0.3
        track, product = track + beta * (np.asarray(matrix) - track), product * (1 - beta)
        rows = track / (1 - product)
        gramian = rows @ rows.T
        slope = gramian @ w / np.mean(np.diag(gramian)) + 0.1 * w
        w = project_to_simplex(w - 0.5 / step**0.2 * slope)
        assert relative_error(updates[step - 1], w @ rows) < 1e-5
    np.testing.assert_allclose(state[1].weights, w, atol=1e-5)


def test_moco_reaches_the_min_norm_point_on_a_fixed_jacobian():
    tx = moco(3, gamma=0.3, gamma_sigma=0.0)
    body = lambda state, _: tx.update(MATRIX, state, losses=LOSSES)[::-1]  # noqa: E731
    _, updates = jax.jit(lambda: jax.lax.scan(body, tx.init(MATRIX[0]), None, length=300))()
    assert relative_error(updates[-1], compiled_update(mtl.mgda, 3)(MATRIX, LOSSES)[0]) < 1e-3


def test_cr_mogm_smooths_the_weights_of_any_aggregator():
    matrices = [MATRIX, 2 * MATRIX[::-1], MATRIX - 1]
    _, state, updates = run(cr_mogm(3, decay=0.7), *matrices)
    mgda, smoothed = compiled_update(mtl.mgda, 3), None
    for matrix, update in zip(matrices, updates, strict=True):
        found = np.asarray(mgda(matrix, jnp.ones(3))[1].weights)
        smoothed = found if smoothed is None else 0.7 * smoothed + 0.3 * found
        assert relative_error(update, smoothed @ np.asarray(matrix)) < 1e-5
    np.testing.assert_allclose(state.weights, smoothed, atol=1e-6)
    shown = mtl.summarize(state, ["a", "b", "c"])
    np.testing.assert_allclose([shown[f"weights/{k}"] for k in "abc"], smoothed, atol=1e-6)

    pcgrad = mtl.pcgrad(3, key=KEY)
    update, _, _ = run(cr_mogm(3, aggregator=pcgrad), MATRIX)
    assert relative_error(update, run(pcgrad, MATRIX)[0]) < 1e-5
    with pytest.raises(TypeError, match="0 fields 'weights'"):
        run(cr_mogm(3, aggregator=mtl.sum_tasks()), MATRIX)


def test_excess_mtl_matches_its_equations():
    """Equations 6, 7 and 9 in NumPy float64, warm-up of two updates."""
    matrices = [MATRIX, 0.5 * MATRIX[::-1], MATRIX - 1, 0.1 * MATRIX]
    _, state, updates = run(excess_mtl(3, step_size=0.7, warmup=2), *matrices)
    squares, initial, w = np.zeros((3, 10)), np.zeros(3), np.full(3, 1 / 3)
    for step, matrix in enumerate(matrices):
        g = np.asarray(matrix, np.float64)
        squares += g**2
        risk = (g**2 / np.sqrt(squares)).sum(1)
        if step < 2:
            initial += risk / 2
        else:
            w = w * np.exp(0.7 * risk / initial)
            w /= w.sum()
        assert relative_error(updates[step], w @ g) < 1e-5
    np.testing.assert_allclose(state.weights, w, atol=1e-6)


def test_excess_mtl_outlives_a_huge_risk():
    tx = excess_mtl(2)
    _, state, _ = run(tx, jnp.array([[1e-20], [1.0]]), *[jnp.array([[1e15], [1.0]])] * 3)
    np.testing.assert_array_equal(state.weights, [1.0, 0.0])
    chex.assert_tree_all_finite(state)


# M-ConFIG.


def config_by_pinv(rows):
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    v = np.linalg.pinv(units) @ np.ones(len(rows))
    return (rows @ v).sum() / (v @ v) * v


def test_m_config_matches_its_algorithm():
    """Algorithm 1 in NumPy float64; the tasks take turns, and it starts when all have had one."""
    b1, b2, eps = 0.8, 0.9, 1e-3
    matrices = [np.asarray(MATRIX, np.float64) * s + t for s, t in ((1, 0), (2, 0.1), (1, -0.2))]
    matrices = matrices * 2
    tx = m_config(3, b1=b1, b2=b2, eps=eps)
    _, state, updates = run(tx, *(jnp.asarray(m, jnp.float32) for m in matrices))
    rows, counts, m, v = np.zeros((3, 10)), np.zeros(3), np.zeros(10), np.zeros(10)
    for i, matrix in enumerate(matrices):
        k, step = i % 3, i - 1
        rows[k] = b1 * rows[k] + (1 - b1) * matrix[k]
        counts[k] += 1
        if step < 1:
            np.testing.assert_array_equal(updates[i], 0)
            continue
        d = config_by_pinv(rows / (1 - b1**counts)[:, None])
        implied = (d * (1 - b1**step) - b1 * m) / (1 - b1)
        m = b1 * m + (1 - b1) * implied
        v = b2 * v + (1 - b2) * implied**2
        expected = d / (np.sqrt(v / (1 - b2**step)) + eps)
        assert relative_error(updates[i], expected) < 1e-4
    assert state[0].count == 6
    assert state[1].count == 4


# Six steps of `conflictfree.momentum_operator.PseudoMomentumOperator(3)` of the authors' package in
# float64, on rows (1 + t / 2) g_(t mod 3).
M_CONFIG_ROWS = jnp.array([[3.0, 0.0, 1.0, -1.0], [0.0, 0.5, -0.25, 1.0], [1.0, 2.0, 0.0, 0.5]])
M_CONFIG_STEPS = (0.0, 0.0, 1.0, 0.99002931, 0.99686855, 0.99860360)


def test_m_config_takes_the_steps_of_the_authors_code():
    _, _, updates = run(m_config(3), *(M_CONFIG_ROWS * (1 + t / 2) for t in range(6)))
    for update, expected in zip(updates, M_CONFIG_STEPS, strict=True):
        np.testing.assert_allclose(update, np.full(4, expected), rtol=2e-5)


def test_m_config_waits_for_no_task_that_is_away():
    tx, there = m_config(3), jnp.array([True, False, True])
    _, state, updates = run(tx, *[MATRIX] * 3, present=there)
    np.testing.assert_array_equal([u.any() for u in updates], [False, True, True])
    update, state, _ = run(tx, MATRIX, state=state)  # the third's first turn makes no pause
    assert update.any()
    np.testing.assert_array_equal(state[0].last_turns, [3, 4, 2])


def test_m_config_waits_where_a_gradient_is_not_finite():
    tx = m_config(3)
    update, state, _ = run(tx, MATRIX, MATRIX.at[1].set(jnp.nan), MATRIX, MATRIX)
    chex.assert_tree_all_finite((update, state))
    np.testing.assert_array_equal(state[0].decay_products == 1, [False, True, False])
    update, state, _ = run(m_config(1), *[jnp.zeros((1, 4))] * 2)
    np.testing.assert_array_equal(update, 0)


# PCD.


def pcd_by_scipy(matrix, tau):
    """The program of the paper on unit rows (a first update), by SLSQP."""
    rows = np.asarray(matrix, np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    solution = scipy.optimize.minimize(
        lambda d: 0.5 * np.sum((d - unit[0]) ** 2),
        unit.mean(0),
        jac=lambda d: d - unit[0],
        constraints=[
            {"type": "ineq", "fun": lambda d: unit[1:] @ d - tau, "jac": lambda d: unit[1:]}
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solution.success
    return np.linalg.norm(rows[0]) * solution.x / np.linalg.norm(solution.x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_pcd_solves_its_program(seed, tau):
    scales = jnp.array([[1e-3], [1.0], [1e4], [3.0]])
    matrix = scales * jax.random.normal(jax.random.key(seed), (4, 6))
    update, state = compiled_update(pcd, 4, tau=tau)(matrix, jnp.ones(4))
    assert state.fallbacks == 0
    assert relative_error(update, pcd_by_scipy(matrix, tau)) < 1e-4


def test_pcd_normalises_by_running_norms_and_knows_its_primary():
    losses = {"task": 1.0, "aux": 1.0}
    rows = {"aux": jnp.array([1.0, 0.0]), "task": jnp.array([0.0, 2.0])}
    tx = pcd(2, primary="task", tau=1.0, decay=0.5)
    update, state, _ = run_dict(tx, rows, losses)
    # d = g1 + mu g2 on unit rows, mu = 1: the diagonal, with the primary's norm.
    np.testing.assert_allclose(update, [2**0.5, 2**0.5], rtol=1e-5)
    update, state, _ = run_dict(tx, {**rows, "aux": jnp.array([3.0, 0.0])}, losses, state)
    # <norm^2> = (0.25 * 1 + 0.5 * 9) / 0.75, so the unit of aux is its root.
    length = 3 / (4.75 / 0.75) ** 0.5
    expected = np.array([length, 1.0]) / np.hypot(length, 1.0) * 2
    np.testing.assert_allclose(update, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="primary='other'"):
        run_dict(pcd(2, primary="other"), rows, losses)


def run_dict(tx, rows, losses, state=None):
    state = tx.init(rows["aux"]) if state is None else state
    losses = jax.tree.map(jnp.float32, losses)
    return *tx.update(rows, state, losses=losses), None


def test_pcd_follows_the_primary_where_the_others_contradict():
    matrix = jnp.array([[1.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    update, state, _ = run(pcd(3, tau=0.1), matrix)
    np.testing.assert_allclose(update, [1.0, 1.0], rtol=1e-6)
    assert state.fallbacks == 1
    update, state, _ = run(pcd(2), jnp.array([[0.0, 0.0], [1.0, 0.0]]))
    np.testing.assert_array_equal(update, 0)


# Several batches.


def jacobians(*matrices):
    return tuple(mtl.as_jacobian(matrix, jnp.ones(len(matrix))) for matrix in matrices)


def test_modo_matches_its_algorithm_on_two_and_three_batches():
    batches = jacobians(MATRIX, MATRIX + 0.3, 2 * MATRIX)
    tx = modo(3, gamma=0.4, rho=0.1)
    update_fn = jax.jit(tx.update)
    a, b, c = (np.asarray(jac.rows(), np.float64) for jac in batches)
    size = np.mean(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    start = np.full(3, 1 / 3)
    w = project_to_simplex(start - 0.4 * (a @ b.T @ start / size + 0.1 * start))
    for count, last in ((2, (a + b) / 2), (3, c), (1, a)):
        if count == 1:  # which then is its own second batch
            w = project_to_simplex(
                start
                - 0.4 * (a @ a.T @ start / np.mean(np.linalg.norm(a, axis=1) ** 2) + 0.1 * start)
            )
        update, state = update_fn(batches[:count], tx.init(None))
        assert relative_error(update, w @ last) < 1e-5
        np.testing.assert_allclose(state.weights, w, atol=1e-6)
    with pytest.raises(ValueError, match="4 batches"):
        tx.update(batches + batches[:1], tx.init(None))
    with pytest.raises(TypeError, match="expected one"):
        mtl.mgda(3).update(batches, mtl.mgda(3).init(None))


def test_sdmgrad_solves_its_program_with_a_small_step():
    """The KKT conditions of the direction-oriented program of eq. 6, on one batch."""
    pull, preference = 0.5, np.array([0.2, 0.5, 0.3])
    tx = sdmgrad(3, pull=pull, preference=10 * preference, learning_rate=0.6, num_steps=500)
    update, state, _ = run(tx, MATRIX)
    J = np.asarray(MATRIX, np.float64)
    w = np.asarray(state.shares, np.float64) / 3
    slope = J @ J.T @ (w + pull * preference)
    gap = w @ slope - slope.min()
    assert gap < 1e-4 * np.abs(slope).max()
    assert relative_error(update, (w + pull * preference) @ J / (1 + pull)) < 1e-5


def test_sdmgrad_takes_the_steps_of_its_algorithm():
    batches = jacobians(MATRIX, MATRIX + 0.3, 2 * MATRIX)
    tx = sdmgrad(3, learning_rate=2.1, num_steps=3)
    _, state = jax.jit(tx.update)(batches, tx.init(None))
    a, b = (np.asarray(jac.rows(), np.float64) for jac in batches[:2])
    products = a @ b.T / np.mean(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    w, velocity = np.full(3, 1 / 3), np.zeros(3)
    for _ in range(3):
        velocity = 0.5 * velocity + products @ (w + 0.3 / 3)
        w = project_to_simplex(w - 0.7 * velocity)
    np.testing.assert_allclose(state.shares / 3, w, atol=1e-5)


def test_several_batches_train_under_jit():
    def losses(w, x):
        return {"a": jnp.mean((w * x - 1) ** 2), "b": jnp.mean((w + x) ** 2)}

    tx = optax.chain(modo(2), optax.adam(0.1))

    @jax.jit
    def step(w, state, batches):
        jacs = tuple(mtl.value_and_jac(losses)(w, x)[1] for x in batches)
        update, state = tx.update(jacs, state, w)
        return optax.apply_updates(w, update), state

    w, state = jnp.ones(3), tx.init(jnp.ones(3))
    for _ in range(3):
        w, state = step(w, state, (jnp.full(3, 0.4), jnp.full(3, 0.6)))
    chex.assert_tree_all_finite(w)


# Balancers of physics-informed networks and of EnCodec.


def test_ntk_traces_of_a_narrow_type_are_sums_of_a_wider_one():
    traces = ntk_traces(lambda w: {"a": 300 * w, "b": w[:1] / 300})(jnp.ones(3, jnp.float16))
    np.testing.assert_allclose([traces["a"], traces["b"]], [3 * 300.0**2, 300.0**-2], rtol=2e-3)


def test_ntk_traces_are_squared_norms_of_the_residual_jacobian():
    def residuals(params, x):
        u = jnp.tanh(x[:, None] * params["w"][None]) @ params["v"]
        return {"pde": u**2 - x, "boundary": u[:2]}

    params = {"w": jnp.array([0.3, -1.0]), "v": jnp.array([1.0, 0.4])}
    x = jnp.linspace(-1, 1, 5)
    jac = jax.jit(jax.jacrev(residuals))(params, x)
    expected = {k: sum(float(jnp.sum(g**2)) for g in jac[k].values()) for k in jac}
    got = jax.jit(ntk_traces(residuals))(params, x)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
    estimate = jax.jit(ntk_traces(residuals, num_probes=2000))(params, x, key=KEY)
    chex.assert_trees_all_close(estimate, expected, rtol=0.1)
    with pytest.raises(TypeError, match=r"key=None.*pass key="):
        ntk_traces(residuals, num_probes=1)(params, x)
    with pytest.raises(ValueError, match="num_probes=0"):
        ntk_traces(residuals, num_probes=0)

    tx = scale_by_ntk(2)
    state = tx.update(MATRIX[:2], tx.init(None), losses=LOSSES[:2], ntk_traces=[1.0, 4.0])[1]
    np.testing.assert_array_equal(state.weights, [5.0, 1.25])


def test_ntk_without_traces_uses_the_gramian():
    _, state = scale_by_ntk(3).update(MATRIX, scale_by_ntk(3).init(None), losses=LOSSES)
    squares = np.sum(np.asarray(MATRIX, np.float64) ** 2, axis=1)
    np.testing.assert_allclose(state.weights, squares.sum() / squares, rtol=1e-5)


def test_lr_annealing_matches_its_algorithm():
    """Largest over mean absolute entry of the weighted row: the mean of |entries|, not |mean|."""
    tx = scale_by_lr_annealing(3, reference=1, decay=0.9)
    state, w = tx.init(None), np.ones(3)
    step = jax.jit(tx.update)
    for matrix in (MATRIX, MATRIX - 1, 5 * MATRIX[::-1]):
        _, state = step(matrix, state, losses=LOSSES)
        entries = np.abs(np.asarray(matrix, np.float64))
        w = 0.9 * w + 0.1 * entries[1].max() / (w * entries.mean(1))
        w[1] = 1
        np.testing.assert_allclose(state.weights, w, rtol=1e-5)
    with pytest.raises(ValueError, match="reference='pde'"):
        run(lr_annealing(3, reference="pde"), MATRIX)


def test_lr_annealing_takes_the_authors_measure():
    """Of the weight matrices alone, the mean of their means, refreshed every third step here."""

    def losses(params, t):
        h = jnp.tanh(params["w"] @ (jnp.arange(2.0) + t) + params["b"])
        return {"bc": jnp.sum((params["v"] @ h) ** 2), "pde": jnp.sum((params["v"] @ h - 3) ** 4)}

    params = {
        "w": jnp.array([[0.1, -0.2], [0.3, 0.1], [-0.4, 0.2]]),
        "b": jnp.array([0.5, -1.0, 2.0]),
        "v": jnp.array([[1.0, -0.7, 0.2]]),
    }
    matrices = {"w": True, "b": False, "v": True}
    tx = mtl.every(3, scale_by_lr_annealing(2, reference="pde", layerwise=True))

    @jax.jit
    def step(state, t):
        _, jac = mtl.value_and_jac(losses, gramian_at=matrices)(params, t)
        return tx.update(jac, state)[1], jac.rows()

    state, weight = tx.init(params), 1.0
    for t in range(6):
        state, rows = step(state, float(t))
        if t % 3 == 0:
            bc, pde = ([np.abs(np.asarray(rows[k][i], float)) for k in "wv"] for i in (0, 1))
            ratio = max(a.max() for a in pde) / np.mean([weight * a.mean() for a in bc])
            weight = 0.9 * weight + 0.1 * ratio
        np.testing.assert_allclose(state.held_scales, [weight, 1], rtol=1e-5)


def test_lr_annealing_does_not_run_away_where_the_terms_conflict():
    """Where pde + λ bc is least λ g_bc = -g_pde, so that the plain ratio is λ times 3/2.

    It grows by 5 % a step for ever. That of the weighted gradient is 3/2, where λ settles.
    """
    tx = optax.chain(lr_annealing(2, reference="pde"), optax.sgd(0.2))

    def losses(w):
        return {"bc": jnp.sum((w[:2] - 1) ** 2), "pde": jnp.sum((w - jnp.array([2, 2, 3.0])) ** 2)}

    def step(carry, _):
        w, state = carry
        _, jac = mtl.value_and_jac(losses)(w)
        update, state = tx.update(jac, state, w)
        return (optax.apply_updates(w, update), state), state[0][0].weights[0]

    start = jnp.zeros(3), tx.init(jnp.zeros(3))
    weights = jax.jit(lambda start: jax.lax.scan(step, start, None, length=400)[1])(start)
    assert weights.max() < 4
    np.testing.assert_allclose(weights[-1], 1.5, rtol=1e-3)


def test_encodec_gives_each_task_its_share_of_the_norm():
    tx = scale_by_encodec(3, shares=[1.0, 2.0, 1.0], total_norm=4.0, decay=0.5)
    jac, state = tx.update(MATRIX, tx.init(None), losses=LOSSES)
    np.testing.assert_allclose(np.linalg.norm(jac.rows(), axis=1), [1.0, 2.0, 1.0], rtol=1e-5)
    jac, state = tx.update(4 * MATRIX, state, losses=LOSSES)
    # The average of 1 and 4 with weights 1/2 and 1 is 3.
    np.testing.assert_allclose(
        np.linalg.norm(jac.rows(), axis=1), np.array([1.0, 2.0, 1.0]) * 4 / 3, rtol=1e-5
    )
    # By default an even sum of rows of the mean norm.
    default = scale_by_encodec(3)
    jac, _ = default.update(MATRIX, default.init(None), losses=LOSSES)
    norms = np.linalg.norm(MATRIX, axis=1)
    np.testing.assert_allclose(np.linalg.norm(jac.rows(), axis=1), norms.mean(), rtol=1e-5)


def test_encodec_measures_at_the_output_of_the_feature_jacobian():
    w, x = jnp.array([0.5, -1.0]), jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
    encode = lambda w, x: x @ w  # noqa: E731
    decode = lambda w, z, x: {"l1": jnp.sum(jnp.abs(z - 1)), "l2": 100 * jnp.sum(z**2)}  # noqa: E731
    losses, jac = mtl.value_and_feature_jac(encode, decode)(w, x)
    tx = scale_by_encodec(2, total_norm=1.0)
    jac, _ = tx.update(jac, tx.init(w))
    # The mean of the norms of three examples with one feature each.
    means = [np.mean(np.abs(row)) for row in jac.measured_rows()[0]]
    np.testing.assert_allclose(means, [0.5, 0.5], rtol=1e-5)
    assert list(losses) == ["l1", "l2"]


# Three updates of `encodec.balancer.Balancer({"l1": 1, "l2": 3}, per_batch_item=...)` of the
# authors' package in float64, with `total_norm=1`, on the losses below.
ENCODEC_STEPS = {
    True: ((-2.2953404, -38.3470774), (-12.51085661, -233.86043639), (-31.32942168, -629.26793955)),
    False: ((-1.09140958, -17.249257), (-5.82034086, -101.56247308), (-14.27096064, -269.68655605)),
}


@pytest.mark.parametrize("per_example", [True, False])
def test_encodec_takes_the_steps_of_the_authors_code(per_example):
    w, x = jnp.array([0.5, -1.0]), jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
    encode = lambda w, x: jnp.stack([x @ w, (x @ w) ** 2], axis=1)  # noqa: E731
    decode = lambda w, z, x: {"l1": jnp.sum(jnp.abs(z - 0.9)), "l2": 100 * jnp.mean(z**2)}  # noqa: E731
    tx = mtl.encodec(2, shares=[1.0, 3.0], total_norm=1.0, per_example=per_example)

    @jax.jit
    def step(state, x):
        return tx.update(mtl.value_and_feature_jac(encode, decode)(w, x)[1], state)

    state = tx.init(w)
    for t, expected in enumerate(ENCODEC_STEPS[per_example]):
        update, state = step(state, (1.0 + t) * x)
        np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_encodec_names_features_without_one_axis_of_examples():
    encode = lambda w: (w, jnp.ones(3) * w[0])  # noqa: E731
    decode = lambda w, z: {"a": jnp.sum(z[0]), "b": jnp.sum(z[1])}  # noqa: E731
    _, jac = mtl.value_and_feature_jac(encode, decode)(jnp.ones(2))
    tx = mtl.encodec(2)
    with pytest.raises(ValueError, match=r"first axes \[2, 3\]"):
        tx.update(jac, tx.init(None))


# Absent tasks, losses of 0 and below.


def test_excess_mtl_starts_a_task_when_it_first_has_risk():
    """An absent first batch, or one with a loss of 0, is as if it had not been for that task."""
    tx, rows = excess_mtl(2), [MATRIX[:2], 0.5 * MATRIX[:2], MATRIX[:2] - 1]
    first = MATRIX[:2].at[1].set(0)
    _, plain, _ = run(tx, *rows)
    _, zero, _ = run(tx, first, *rows)
    there = jnp.array([True, False])
    _, absent, _ = run(tx, first, present=there)
    assert absent.count.tolist() == [1, 0]
    _, absent, _ = run(tx, *rows, state=absent)
    for state in (zero, absent):
        np.testing.assert_allclose(state.initial_risk[1], plain.initial_risk[1], rtol=1e-6)
        assert np.all((state.weights > 0.01) & (state.weights < 0.99))
    _, never, _ = run(tx, *[first] * 50)
    np.testing.assert_allclose(never.weights, 0.5)


def test_excess_mtl_keeps_what_an_absent_task_has_of_the_weights():
    tx = excess_mtl(3, step_size=0.2)
    _, before, _ = run(tx, MATRIX, 0.7 * MATRIX)
    there = jnp.array([True, True, False])
    _, after, _ = run(tx, *[MATRIX] * 30, state=before, present=there)
    np.testing.assert_allclose(jnp.sum(after.weights[:2]), 1, rtol=1e-6)
    back = jax.nn.softmax(after.log_weights)
    np.testing.assert_allclose(back[2], before.weights[2], rtol=1e-5)


@pytest.mark.parametrize("factory", [modo, sdmgrad])
def test_batches_are_of_the_same_tasks(factory):
    def jacobian(names):
        return mtl.value_and_jac(lambda w: {k: jnp.sum(w**2) for k in names})(jnp.ones(3))[1]

    tx = factory(2)
    with pytest.raises(ValueError, match=r"\('a', 'b'\) and \('b', 'c'\), expected the same tasks"):
        tx.update((jacobian("ab"), jacobian("bc")), tx.init(jnp.ones(3)))


@pytest.mark.parametrize("factory", [moco, modo, sdmgrad])
def test_moved_weights_keep_what_an_absent_task_has_of_them(factory):
    tx = factory(3)
    _, before, _ = run(tx, MATRIX)
    there = jnp.array([True, False, True])
    _, after, _ = run(tx, *[MATRIX] * 30, state=before, present=there)
    before, after = (s[-1] if factory is moco else s for s in (before, after))
    np.testing.assert_allclose(jnp.sum(after.weights[::2]), 1, rtol=1e-6)
    assert after.shares[1] == before.shares[1]
    np.testing.assert_allclose(jnp.sum(after.shares), jnp.sum(before.shares), rtol=1e-5)


def test_db_mtl_counts_losses_that_have_no_logarithm():
    losses = jnp.array([0.7, 0.0, -2.0])
    _, state, _ = run(db_mtl(3), MATRIX, MATRIX, losses=losses)
    assert state[0].unusable.tolist() == [0, 2, 2]
    there = jnp.array([True, True, False])
    _, state, _ = run(db_mtl(3), MATRIX, losses=losses, present=there)
    assert state[0].unusable.tolist() == [0, 1, 0]


def test_m_config_gives_the_turn_to_whom_it_was_longest_ago():
    tx, state, turns = m_config(3), None, []
    pattern = [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 0, 0]]
    for present in pattern:
        there = jnp.array(present, bool)
        before = [0, 0, 0] if state is None else state[0].last_turns.tolist()
        _, state, _ = run(tx, MATRIX, state=state, present=there)
        after = state[0].last_turns.tolist()
        turns += [k for k in range(3) if after[k] != before[k]]
    assert turns == [0, 1, 0, 1, 2, 0, 0]


def test_pcd_puts_the_first_present_in_the_place_of_an_absent_primary():
    there = jnp.array([True, True, False])
    update, state, _ = run(pcd(3, primary=2), MATRIX, present=there)
    expected, alone, _ = run(pcd(2), MATRIX[:2])
    assert relative_error(update, expected) < 1e-6
    np.testing.assert_allclose(state.weights[:2], alone.weights, rtol=1e-6)


def test_robust_means_of_few_tasks_present():
    matrix = jnp.array([[1.0, 0.0], [1.1, 0.2], [0.9, 0.1], [-50.0, 9.0], [jnp.nan, 1.0]])
    there = jnp.array([True, True, False, True, False])
    # f = 2 would leave none of three a neighbour: each has one.
    _, state, _ = run(krum(5, num_byzantine=2), matrix, present=there)
    np.testing.assert_allclose(state.weights[:2], 0.5)
    assert state.weights[3] == 0
    update, _, _ = run(trimmed_mean(5, trim=2), matrix, present=there)
    np.testing.assert_allclose(update, [1.0, 0.2])
    two = there & (jnp.arange(5) < 3)
    update, _, _ = run(trimmed_mean(5, trim=2), matrix, present=two)
    np.testing.assert_allclose(update, [1.05, 0.1])


REMEMBERING = [
    "gradvac",
    "db_mtl",
    "moco",
    "cr_mogm",
    "excess_mtl",
    "pcd",
    "modo",
    "sdmgrad",
    "m_config",
]


@pytest.mark.parametrize("name", a_fifth(REMEMBERING))
def test_20_000_steps_with_a_loss_of_0_and_a_negative_one(name):
    """On quadratics; one task is NaN and absent for a thousand of them."""
    targets, start = jax.random.normal(KEY, (4, 6)), jnp.full(6, 3.0)
    tx = mtl.make(name, 4, key=KEY)
    several = mtl.STRATEGIES[name].needs == "batches"

    def task_losses(w, nan):
        h = jnp.sum((w[None] - targets) ** 2, axis=1)
        return [h[0], h[1] - 5, 0 * h[2], h[3] + nan]

    def step(carry, t):
        w, state = carry
        away = (t >= 5000) & (t < 6000)
        _, jac = mtl.value_and_jac(task_losses)(w, jnp.where(away, jnp.nan, 0.0))
        present = ~away | (jnp.arange(4) < 3)
        jacs = (jac, jac) if several else jac
        update, state = tx.update(jacs, state, w, present=present)
        norm = jnp.linalg.norm(update)
        return (w - 1e-3 * update / jnp.maximum(norm, 1), state), norm

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(20_000)))
    (w, state), norms = run((start, tx.init(start)))
    numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    chex.assert_tree_all_finite((w, norms, numbers))
    first, last = (jnp.stack(task_losses(x, 0.0)) for x in (start, w))
    if name == "cr_mogm":  # the zero row is the shortest of all
        np.testing.assert_array_equal(last, first)
    else:
        assert np.all(np.delete(last - first, 2) < 0)


@pytest.mark.parametrize(
    "params", [{"w": jnp.ones(3), "step": jnp.array(3)}, {"w": jnp.ones(3), "s": 2.0}]
)
def test_m_config_takes_a_frozen_integer_and_a_number(params):
    tx = mtl.m_config(2)
    losses = lambda p: [jnp.sum(p["w"] ** 2), jnp.sum(p["w"])]  # noqa: E731
    wrt = {name: name == "w" for name in params}
    _, jac = mtl.value_and_jac(losses, wrt=wrt)(params)
    update, _ = tx.update(jac, tx.init(params), params)
    assert jax.tree.map(jnp.shape, update) == jax.tree.map(jnp.shape, params)
