"""Each aggregator against its paper's formula and the reference solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from tests.problems import a_fifth, compiled_update, oracle_cases, relative_error

GOLDEN = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


def aggregate(tx, matrix, losses=None):
    matrix = jnp.asarray(matrix)
    losses = jnp.ones(matrix.shape[0], matrix.dtype) if losses is None else losses
    return tx.update(matrix, tx.init(matrix[0]), matrix[0], losses=losses)


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (mtl.sum_tasks(), (2.0, 2.0, 2.0)),
        (mtl.mean_tasks(), (1.0, 1.0, 1.0)),
        (mtl.sum(2), (2.0, 2.0, 2.0)),
        (mtl.mean(2), (1.0, 1.0, 1.0)),
        (mtl.mgda(2), (0.0, 1.0, 1.0)),
        (mtl.pcgrad(2, key=jax.random.key(0)), (0.5848, 3.8012, 3.8012)),
    ],
    ids=["sum_tasks", "mean_tasks", "sum", "mean", "mgda", "pcgrad"],
)
def test_golden_values(tx, expected):
    np.testing.assert_allclose(aggregate(tx, GOLDEN)[0], expected, atol=5e-5)


# MGDA.


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-9)])
@pytest.mark.parametrize(("case", "matrix", "expected"), a_fifth(oracle_cases("mgda")))
def test_mgda_matches_the_reference(case, matrix, expected, dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        update, state = compiled_update(mtl.mgda, len(matrix))(
            jnp.asarray(matrix, dtype), jnp.ones(len(matrix), dtype)
        )
    assert state.fallbacks == 0
    assert state.weights.dtype == jnp.float32
    update = np.asarray(update, np.float64)
    if not case.startswith("rank2"):
        # The rounding of its float32 Gramian alone moves this one by up to 1.9e-5, by the order in
        # which a processor sums.
        slack = 2 if case == "conflict_12x50" and dtype == np.float32 else 1
        assert relative_error(update, expected) < slack * tolerance
    # Dependent rows: the reference's own weights sum to 1 only to 1e-8, so ask for optimality.
    rounding = 8 * np.finfo(dtype).eps * np.linalg.norm(matrix, axis=1).max() ** 2
    assert update @ update - (matrix @ update).min() <= tolerance * (update @ update) + rounding


@pytest.mark.parametrize("num_tasks", [8, 32, 100])
def test_mgda_closes_the_duality_gap(num_tasks):
    matrix = jax.random.normal(jax.random.key(num_tasks), (num_tasks, 3 * num_tasks)) + 0.1
    update, _ = compiled_update(mtl.mgda, num_tasks)(matrix, jnp.ones(num_tasks))
    matrix, update = np.asarray(matrix, np.float64), np.asarray(update, np.float64)
    # At the min-norm point <d, g_k> >= |d|^2 for every task.
    gap = update @ update - (matrix @ update).min()
    assert gap <= 1e-6 * (update @ update)


def test_mgda_normalizations_solve_on_scaled_rows_and_apply_to_raw_ones():
    matrix = np.array([[3.0, 0.0, 1.0], [0.2, 0.4, -0.1], [-1.0, 2.0, 0.5]], np.float32)
    losses = np.array([2.0, 0.1, 0.7], np.float32)
    norms = np.linalg.norm(matrix, axis=1)
    for normalize, scale in (("l2", norms), ("loss", losses), ("loss+", losses * norms)):
        _, plain = aggregate(mtl.mgda(3), matrix / scale[:, None])
        update, state = aggregate(mtl.mgda(3, normalize=normalize), matrix, jnp.asarray(losses))
        np.testing.assert_allclose(state.weights, plain.weights, atol=1e-5)
        np.testing.assert_allclose(update, plain.weights @ matrix, atol=1e-5)


def test_mgda_returns_zero_where_a_task_is_stationary():
    update, state = aggregate(mtl.mgda(3), GOLDEN[jnp.array([0, 1, 1])].at[2].set(0))
    np.testing.assert_allclose(update, 0, atol=1e-6)
    np.testing.assert_allclose(state.weights, [0, 0, 1], atol=1e-6)


def test_mgda_counts_what_it_could_not_solve():
    _, state = aggregate(mtl.mgda(2), GOLDEN.at[0, 0].set(jnp.nan))
    assert state.fallbacks == 1
    np.testing.assert_array_equal(state.weights, [0.5, 0.5])


# PCGrad.


def pcgrad_by_hand(matrix, orders):
    projected = matrix.astype(np.float64).copy()
    for i, order in enumerate(orders):
        for j in order:
            product = projected[i] @ matrix[j]
            if j != i and product < 0:
                projected[i] -= product / (matrix[j] @ matrix[j]) * matrix[j]
    return projected.sum(0)


@pytest.mark.parametrize(("case", "matrix", "expected"), oracle_cases("pcgrad"))
def test_pcgrad_of_two_tasks_matches_the_reference(case, matrix, expected):
    tx = mtl.pcgrad(2, key=jax.random.key(0))
    assert relative_error(aggregate(tx, matrix.astype(np.float32))[0], expected) < 1e-5, case


def test_pcgrad_projects_in_one_of_the_orders_and_draws_a_new_one_each_time():
    matrix = np.array([[1.0, 0.0, 0.2], [-0.8, 0.7, 0.0], [-0.5, -0.9, 0.3]], np.float32)
    both = [(1, 2), (2, 1)], [(0, 2), (2, 0)], [(0, 1), (1, 0)]
    possible = [
        pcgrad_by_hand(matrix, (a, b, c)) for a in both[0] for b in both[1] for c in both[2]
    ]
    tx = mtl.pcgrad(3, key=jax.random.key(3))
    state = tx.init(None)
    step = jax.jit(lambda state: tx.update(jnp.asarray(matrix), state, losses=jnp.ones(3)))
    seen = set()
    for _ in range(40):
        update, state = step(state)
        distances = [relative_error(update, p) for p in possible]
        assert min(distances) < 1e-5
        seen.add(int(np.argmin(distances)))
    assert len(seen) > 1


def test_pcgrad_leaves_rows_without_conflict_alone():
    matrix = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1e-4]])
    update, state = aggregate(mtl.pcgrad(3, key=jax.random.key(0)), matrix)
    np.testing.assert_allclose(update, matrix.sum(0), rtol=1e-6)
    np.testing.assert_allclose(state.weights, 1.0, rtol=1e-6)


def test_mean_tasks_leaves_heads_their_own_gradient():
    def losses(params):
        return {k: jnp.sum(params["trunk"] * params[k]) for k in ("a", "b")}

    params = {"trunk": jnp.ones(2), "a": jnp.full(2, 3.0), "b": jnp.full(2, 5.0)}
    tx = optax.chain(mtl.mean_tasks(), optax.identity())
    _, jac = mtl.value_and_jac(losses)(params)
    update, _ = tx.update(jac, tx.init(params), params)
    np.testing.assert_array_equal(update["trunk"], [4.0, 4.0])
    np.testing.assert_array_equal(update["a"], [1.0, 1.0])
    _, jac = mtl.value_and_jac(losses, shared=None)(params)
    update, _ = tx.update(jac, tx.init(params), params)
    expected = jax.grad(lambda p: jnp.mean(jnp.stack(list(losses(p).values()))))(params)
    jax.tree.map(np.testing.assert_array_equal, update, expected)


def test_sum_and_mean_know_their_tasks():
    for factory in (mtl.sum, mtl.mean):
        with pytest.raises(ValueError, match="expects 3 losses"):
            aggregate(factory(3), GOLDEN)
        with pytest.raises(ValueError, match="at least 1"):
            factory(0)


def test_the_mean_is_over_those_present():
    present, losses = jnp.array([True, False]), jnp.ones(2)
    for tx in (mtl.mean_tasks(), mtl.mean(2), mtl.match_norm(mtl.sum_tasks())):
        state = tx.init(GOLDEN[0])
        update, _ = tx.update(GOLDEN, state, GOLDEN[0], losses=losses, present=present)
        np.testing.assert_allclose(update, GOLDEN[0], rtol=1e-6)
