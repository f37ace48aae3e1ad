"""Conditioning links and wrappers: what they make of rows, losses, NaN and micro-batches."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from mtl_optax import (
    clip_tasks,
    drop_nonfinite_tasks,
    ema_tasks,
    log_losses,
    match_norm,
    monitor_tasks,
    multi_steps,
    normalize_tasks,
    skip_nonfinite,
)
from tests.problems import mlp_batch, mlp_losses, mlp_params, relative_error

TASKS = ("a", "b", "c")
MATRIX = jax.random.normal(jax.random.key(7), (3, 10)) - 0.3
LOSSES = jnp.array([0.7, 1.1, 2.0])


@pytest.fixture(name="problem")
def _problem():
    return mlp_params(jax.random.key(0), (6, 5)), *mlp_batch(jax.random.key(1))


def rows_of(tx, matrix=MATRIX, losses=LOSSES, state=None):
    state = tx.init(matrix[0]) if state is None else state
    jac, state = tx.update(matrix, state, matrix[0], losses=losses)
    return jac, np.asarray(jac.rows(), np.float64), state


def raw(tree):
    """The tree with random keys as their data, which can be compared."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda k: jax.random.key_data(k) if is_key(k) else k, tree)


# Rows made anew.


def test_replaced_rows_keep_the_layout(problem):
    _, jac = mtl.value_and_jac(mlp_losses)(*problem)
    doubled = jac.replace_rows(jax.tree.map(lambda r: 2 * r, jac.rows()))
    w = jnp.array([0.5, -1.0, 2.0])
    expected = jax.tree.map(lambda u: 2 * u, jac.combine(w))
    chex.assert_trees_all_close(doubled.combine(w), expected, atol=1e-5)
    chex.assert_trees_all_close(doubled.losses, jac.losses)
    np.testing.assert_allclose(doubled.gramian(), 4 * jac.gramian(), rtol=1e-5)
    with pytest.raises(ValueError, match="one for each of the 5"):
        jac.replace_rows(jnp.ones(3))


@pytest.mark.parametrize("after_gramian", [False, True])
def test_reduce_sees_shared_rows_and_leaves_heads_alone(problem, after_gramian):
    _, jac = mtl.value_and_jac(mlp_losses)(*problem)
    jac = jac.scale(jnp.array([1.0, 2.0, -1.0]))
    if after_gramian:
        jac.gramian()
    reduced = jac.reduce(lambda leaves: [jnp.sum(rows, axis=0) for rows in leaves])
    chex.assert_trees_all_close(reduced, jac.combine(1.0), atol=1e-6)
    trunk = jax.tree.leaves(jac.rows()["trunk"])
    chex.assert_trees_all_close(jac.shared_rows(), trunk, atol=1e-6)
    assert jac.shared["heads"] == dict.fromkeys(TASKS, False)


def test_cross_gramian_of_two_batches(problem):
    params, x, y = problem
    _, first = mtl.value_and_jac(mlp_losses)(params, x, y)
    _, second = mtl.value_and_jac(mlp_losses)(params, 2 * x, y)
    second = second.scale(jnp.array([1.0, -3.0, 1e-3]))
    products, s, t = first.cross_gramian(second)
    flat = [
        np.concatenate([np.reshape(r, (3, -1)) for r in jac.shared_rows()], axis=1)
        for jac in (first, second)
    ]
    np.testing.assert_allclose(
        products * s[:, None] * t[None, :], flat[0] @ flat[1].T, rtol=2e-5, atol=1e-7
    )
    with pytest.raises(ValueError, match="two batches"):
        first.cross_gramian(mtl.as_jacobian(MATRIX, LOSSES))


# Conditioning the rows.


def test_log_losses_are_logarithms_with_their_gradients(problem):
    tx = log_losses()
    _, jac = mtl.value_and_jac(mlp_losses)(*problem)
    got, _ = tx.update(jac, tx.init(problem[0]))
    logs = lambda *args: jax.tree.map(jnp.log, mlp_losses(*args))  # noqa: E731
    chex.assert_trees_all_close(got.losses, logs(*problem), rtol=1e-6)
    grads = jax.jacrev(logs)(*problem)
    expected = jax.tree.map(lambda *r: jnp.stack(r), *[grads[task] for task in TASKS])
    chex.assert_trees_all_close(got.rows(), expected, atol=1e-5)
    # Followed by the sum it is the scale-invariant loss.
    scaled, _ = tx.update(jac.scale(jnp.array([1e-3, 1.0, 1e4])), tx.init(problem[0]))
    chex.assert_trees_all_close(scaled.combine(1.0), got.combine(1.0), rtol=1e-4, atol=1e-6)


def test_log_losses_survive_losses_without_a_logarithm():
    jac, rows, _ = rows_of(log_losses(), losses=jnp.array([0.0, -1.0, 1e-30]))
    chex.assert_tree_all_finite((rows, jac.losses))
    np.testing.assert_array_equal(rows[:2], 0)
    np.testing.assert_allclose(rows[2], np.asarray(MATRIX[2]) / 1e-30, rtol=1e-6)


def test_normalize_tasks():
    matrix = np.asarray(MATRIX, np.float64) * [[1e-12], [1.0], [1e12]]
    norms, losses = np.linalg.norm(matrix, axis=1), np.asarray(LOSSES, np.float64)
    expected = {
        "l2": 1 / norms,
        "loss": 1 / losses,
        "loss+": 1 / (losses * norms),
        "max": norms.max() / norms,
    }
    for kind, weights in expected.items():
        jac, rows, _ = rows_of(normalize_tasks(kind), jnp.asarray(matrix, jnp.float32))
        np.testing.assert_allclose(rows, weights[:, None] * matrix, rtol=1e-5)
        np.testing.assert_allclose(jac.losses, weights * losses, rtol=1e-5)
        _, rows, _ = rows_of(normalize_tasks(kind), MATRIX.at[1].set(0), LOSSES.at[0].set(0))
        assert np.isfinite(rows).all()
        np.testing.assert_array_equal(rows[1], 0)


def test_clip_tasks_clips_each_alone():
    matrix = MATRIX * jnp.array([[1e-3], [1.0], [1e3]])
    norms = np.linalg.norm(matrix, axis=1)
    _, rows, _ = rows_of(clip_tasks([1.0, 2.0, 3.0]), matrix)
    np.testing.assert_allclose(
        np.linalg.norm(rows, axis=1), np.minimum(norms, [1.0, 2.0, 3.0]), rtol=1e-5
    )
    np.testing.assert_array_equal(rows[0], matrix[0])
    with pytest.raises(ValueError, match="max_norm=0"):
        clip_tasks(0)


def test_ema_tasks_before_the_sum_is_optax_ema_after_it(problem):
    before = optax.chain(ema_tasks(3, decay=0.8), mtl.sum_tasks())
    after = optax.chain(mtl.sum_tasks(), optax.ema(0.8))
    params, x, y = problem

    def updates_of(tx):
        def body(state, scale):
            _, jac = mtl.value_and_jac(mlp_losses)(params, scale * x, y)
            update, state = tx.update(jac, state, params)
            return state, update

        return jax.jit(lambda: jax.lax.scan(body, tx.init(params), jnp.arange(1.0, 5.0))[1])()

    chex.assert_trees_all_close(updates_of(before), updates_of(after), rtol=1e-4, atol=1e-6)


def test_ema_tasks_follows_a_schedule_and_ignores_what_is_not_finite():
    tx = ema_tasks(3, decay=lambda count: 0.9 / (count + 1.0))
    _, rows, state = rows_of(tx)
    np.testing.assert_allclose(rows, MATRIX, rtol=1e-6)
    _, rows, state = rows_of(tx, MATRIX.at[1].set(jnp.nan), state=state)
    np.testing.assert_allclose(rows[0], MATRIX[0], rtol=1e-6)
    _, rows, state = rows_of(tx, 3 * MATRIX, state=state)
    # Weights of the three rows: .9*.45*.3 of nothing, then .1*.45*.3, .55*.3, .7.
    weights = np.array([0.1 * 0.45 * 0.3, 0.55 * 0.3, 0.7])
    mean = weights @ [1, 1, 3] / weights.sum()
    np.testing.assert_allclose(rows[0], mean * np.asarray(MATRIX[0]), rtol=1e-5)
    chex.assert_tree_all_finite(state)
    with pytest.raises(ValueError, match="parameters"):
        tx.init(None)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_links_that_make_rows_keep_dtypes(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params = mlp_params(jax.random.key(0), (6, 5), dtype=dtype)
        batch = mlp_batch(jax.random.key(1), dtype=dtype)
        strategy = optax.chain(
            drop_nonfinite_tasks(3), log_losses(), normalize_tasks(), ema_tasks(3), mtl.sum_tasks()
        )
        tx = skip_nonfinite(multi_steps(optax.chain(strategy, optax.sgd(0.1)), 2, 3))
        state = tx.init(params)

        def step(state):
            return tx.update(mtl.value_and_jac(mlp_losses)(params, *batch)[1], state, params)

        update, new_state = jax.eval_shape(step, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(update, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


# Tasks and steps that are not finite.


@pytest.mark.parametrize(
    ("name", "mode"),
    [("sum", "isolated"), ("sum", "batched"), ("gradnorm", "isolated")],
)
def test_a_dropped_task_contributes_truly_nothing(problem, name, mode):
    params, x, y = problem
    strategy = mtl.make(name, 3)
    tx = optax.chain(drop_nonfinite_tasks(3), strategy)

    @jax.jit
    def update(state, y):
        _, jac = mtl.value_and_jac(mlp_losses, rows=mode)(params, x, y)
        return tx.update(jac, state, params)

    good, state = update(tx.init(params), y)
    np.testing.assert_array_equal(state[0].dropped, 0)
    plain, _ = jax.jit(strategy.update)(
        mtl.value_and_jac(mlp_losses)(params, x, y)[1], strategy.init(params)
    )
    chex.assert_trees_all_close(good, plain, rtol=1e-5, atol=1e-6)

    poisoned, state = update(state, {**y, "b": y["b"].at[3].set(jnp.nan)})
    np.testing.assert_array_equal(state[0].dropped, [0, 1, 0])
    chex.assert_tree_all_finite((poisoned, state))
    np.testing.assert_array_equal(poisoned["heads"]["b"], 0)
    assert np.any(poisoned["heads"]["a"] != 0)
    if name == "sum":
        rest = jax.grad(lambda p: sum(v for k, v in mlp_losses(p, x, y).items() if k != "b"))
        chex.assert_trees_all_close(poisoned, rest(params), atol=1e-6)
    # The next good step is as if nothing had been.
    again, state = update(state, y)
    chex.assert_tree_all_finite((again, state))


def test_a_finite_loss_with_an_infinite_gradient_is_dropped_too():
    losses = lambda w: {"root": jnp.sqrt(jnp.sum(w**2)), "square": jnp.sum((w - 1) ** 2)}  # noqa: E731
    tx = optax.chain(drop_nonfinite_tasks(2), mtl.sum_tasks())
    _, jac = mtl.value_and_jac(losses)(jnp.zeros(2))
    update, state = tx.update(jac, tx.init(None))
    np.testing.assert_array_equal(update, [-2, -2])
    np.testing.assert_array_equal(state[0].dropped, [1, 0])


def test_a_row_that_a_weight_takes_out_of_range_is_dropped():
    weigh = mtl.scale_by_weights([1e20, 1.0])
    tx = optax.chain(weigh, drop_nonfinite_tasks(2), mtl.sum_tasks())
    rows = jnp.array([[1e30, 0.0], [0.0, 1.0]])
    update, state = tx.update(rows, tx.init(jnp.ones(2)), losses=jnp.ones(2))
    assert (update.tolist(), state[1].dropped.tolist()) == ([0, 1], [1, 0])


def test_rows_of_a_nearly_solved_task_stay_in_range():
    tx, rows = normalize_tasks("loss+"), jnp.array([[1e-19, 0.0], [0.0, 1.0]])
    jac, _ = tx.update(rows, tx.init(jnp.ones(2)), losses=jnp.array([1e-26, 1.0]))
    assert np.all(np.isfinite(jac.rows()))
    assert np.all(np.isfinite(jac.loss_vector()))
    np.testing.assert_array_equal(jac.rows()[1], [0, 1])


def test_drop_works_on_the_feature_jacobian_and_on_given_rows(problem):
    params, x, y = problem
    poisoned = {**y, "b": y["b"].at[3].set(jnp.nan)}

    def encode(params, x, y):
        del y
        return jnp.tanh(x @ params["trunk"][0]["w"])

    def decode(params, z, x, y):
        del x
        return {t: jnp.mean((z @ w - y[t]) ** 2) for t, w in params["heads"].items()}

    tx = optax.chain(drop_nonfinite_tasks(3), mtl.mgda(3))

    @jax.jit
    def update_from_features(state):
        _, jac = mtl.value_and_feature_jac(encode, decode)(params, x, poisoned)
        return tx.update(jac, state)

    update, state = update_from_features(tx.init(params))
    chex.assert_tree_all_finite((update, state))
    update, state = jax.jit(tx.update)(MATRIX.at[1].set(jnp.inf), tx.init(None), losses=LOSSES)
    chex.assert_tree_all_finite((update, state))
    np.testing.assert_array_equal(state[0].dropped, [0, 1, 0])


def test_dropping_everything_leaves_a_zero_update():
    tx = optax.chain(drop_nonfinite_tasks(1), mtl.sum_tasks())
    _, jac = mtl.value_and_jac(lambda w: jnp.sum(w) * jnp.nan)(jnp.ones(3))
    update, state = tx.update(jac, tx.init(None))
    np.testing.assert_array_equal(update, 0)
    np.testing.assert_array_equal(state[0].dropped, 1)


def test_keeping_every_task_is_the_plain_pullback(problem):
    _, jac = mtl.value_and_jac(mlp_losses)(*problem)
    kept = jac.keep(jac.finite_tasks())
    chex.assert_trees_all_close(kept.combine(1.0), jac.combine(1.0), atol=1e-6)
    assert kept.names == jac.names


@pytest.mark.parametrize("where", ["loss", "strategy"])
def test_skip_nonfinite_keeps_all_state_bit_for_bit(problem, where):
    params, x, y = problem
    bad = {**y, "b": y["b"].at[3].set(jnp.nan)}
    strategy = mtl.pcgrad(3, key=jax.random.key(1))
    if where == "strategy":  # finite losses, an update that is not
        strategy = optax.chain(strategy, optax.scale_by_schedule(lambda n: jnp.nan ** (n == 1)))
        bad = y
    tx = skip_nonfinite(optax.chain(mtl.scale_by_gradnorm(3), strategy, optax.adam(0.1)))

    @jax.jit
    def update(state, y):
        return tx.update(mtl.value_and_jac(mlp_losses)(params, x, y)[1], state, params)

    first, state = update(tx.init(params), y)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(first))
    zero, after = update(state, bad)
    chex.assert_trees_all_equal(zero, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(raw(after.inner_state), raw(state.inner_state))
    assert (after.skipped, after.skipped_in_a_row) == (1, 1)
    if where == "loss":
        _, after = update(after, y)
        assert (after.skipped, after.skipped_in_a_row) == (1, 0)


def test_skip_nonfinite_sees_a_state_that_would_overflow():
    tx = skip_nonfinite(optax.chain(mtl.sum_tasks(), optax.adam(0.1)))
    state = tx.init(MATRIX[0])
    _, state = tx.update(MATRIX, state, losses=LOSSES)
    update, after = tx.update(1e25 * MATRIX, state, losses=LOSSES)  # its square is infinite
    np.testing.assert_array_equal(update, 0)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_skip_nonfinite_leaves_a_nan_task_to_what_drops_it_inside():
    strategy = optax.chain(drop_nonfinite_tasks(3), mtl.mgda(3))
    tx = skip_nonfinite(optax.chain(strategy, optax.sgd(0.1, momentum=0.9)))
    step = jax.jit(lambda rows, state, losses: tx.update(rows, state, losses=losses))
    start = tx.init(MATRIX[0])
    update, state = step(MATRIX, start, LOSSES.at[1].set(jnp.nan))
    alone = mtl.mgda(2).update(MATRIX[::2], mtl.mgda(2).init(None), losses=LOSSES[::2])[0]
    np.testing.assert_allclose(update, -0.1 * alone, rtol=1e-5)
    assert state.skipped == 0
    # The momentum stands still where nothing is left.
    update, after = step(MATRIX, state, jnp.full(3, jnp.nan))
    np.testing.assert_array_equal(update, 0)
    assert after.skipped == 1
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_skip_nonfinite_stands_still_where_all_who_are_present_are_dropped():
    tx = skip_nonfinite(optax.chain(drop_nonfinite_tasks(3), mtl.sum_tasks(), optax.adam(0.1)))
    _, state = tx.update(MATRIX, tx.init(MATRIX[0]), losses=LOSSES)
    losses, present = jnp.array([jnp.nan, jnp.nan, 1.0]), [True, True, False]
    update, after = tx.update(MATRIX, state, losses=losses, present=present)
    np.testing.assert_array_equal(update, 0)
    assert after.skipped == 1
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


@pytest.mark.parametrize(
    "tx",
    [
        skip_nonfinite(mtl.sum_tasks()),
        multi_steps(mtl.sum_tasks(), every_k=2, num_tasks=3),
        mtl.partition({"": mtl.sum_tasks()}, ""),
        mtl.every(2, mtl.sum_tasks(), num_tasks=3),
    ],
    ids=["skip_nonfinite", "multi_steps", "partition", "every"],
)
def test_a_wrapper_names_a_state_that_is_not_its_own(tx):
    for state in (mtl.mgda(3).init(None), (optax.EmptyState(), optax.EmptyState())):
        with pytest.raises(ValueError, match=f"{type(state).__name__}.*another strategy"):
            tx.update(MATRIX, state, MATRIX[0], losses=LOSSES)


def test_multi_steps_names_a_state_of_other_tasks():
    tx = multi_steps(mtl.sum_tasks(), every_k=2, num_tasks=3)
    state = multi_steps(mtl.sum_tasks(), every_k=2, num_tasks=2).init(MATRIX[0])
    with pytest.raises(ValueError, match=r"of 2 tasks.*num_tasks=3.*resize_state"):
        tx.update(MATRIX, state, MATRIX[0], losses=LOSSES)


@pytest.mark.parametrize("wrap", [skip_nonfinite, match_norm, lambda tx: multi_steps(tx, 1, 3)])
def test_a_wrapped_balancer_is_told_that_it_needs_an_aggregator(wrap):
    tx = wrap(mtl.scale_by_dwa(3))
    with pytest.raises(TypeError, match="aggregator"):
        tx.update(MATRIX, tx.init(MATRIX[0]), losses=LOSSES)


# Watching.


def test_monitor_records_cosines_norms_and_the_rate_of_conflicts():
    tx = monitor_tasks(2)
    state = tx.init(None)
    second = [[0.6, 0.8], [-0.6, 0.8], [-1.0, 0.0], [1.0, 0.0]]
    step = jax.jit(lambda state, rows: tx.update(rows, state, losses=jnp.ones(2)))
    for row in second:
        jac, state = step(state, jnp.array([[2.0, 0.0], row]))
    np.testing.assert_array_equal(jac.rows()[0], [2.0, 0.0])
    summary = mtl.summarize(state, ("a", "b"))
    assert summary["cosine/a-b"] == 1.0
    assert summary["norm/a"] == 2.0
    np.testing.assert_allclose(summary["conflict_rate/a-b"], 0.5)
    assert summary["count/a-b"] == 4


# Micro-batches.


@pytest.mark.parametrize("strategy", [mtl.gradnorm(3), mtl.pcgrad(3, key=jax.random.key(0))])
def test_micro_batches_make_the_step_of_the_whole_batch(problem, strategy):
    params, x, y = problem
    tx = optax.chain(strategy, optax.adam(0.1))
    wrapped = multi_steps(tx, every_k=4, num_tasks=3)

    def step(carry, batch):
        params, state = carry
        _, jac = mtl.value_and_jac(mlp_losses)(params, *batch)
        updates, state = wrapped.update(jac, state, params)
        return (optax.apply_updates(params, updates), state), updates

    parts = jax.tree.map(lambda leaf: leaf.reshape(4, 4, *leaf.shape[1:]), (x, y))
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), parts)
    (got, state), updates = jax.jit(
        lambda: jax.lax.scan(step, (params, wrapped.init(params)), twice)
    )()
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf[np.array([0, 1, 2, 4, 5, 6])], 0)

    whole = jax.jit(lambda p: mtl.value_and_jac(mlp_losses)(p, x, y)[1])
    expected, inner = params, tx.init(params)
    for _ in range(2):
        update, inner = tx.update(whole(expected), inner, expected)
        expected = optax.apply_updates(expected, update)
    chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-4)
    assert (state.mini_step, state.gradient_step) == (0, 2)
    chex.assert_trees_all_equal(state.rows, jax.tree.map(jnp.zeros_like, state.rows))


def test_a_nan_task_of_one_micro_batch_is_dropped_before_the_average():
    inner = multi_steps(mtl.sum_tasks(), every_k=2, num_tasks=3)
    tx = optax.chain(drop_nonfinite_tasks(3), inner)
    state = tx.init(MATRIX[0])
    _, state = tx.update(MATRIX.at[1].set(jnp.nan), state, losses=LOSSES)
    update, state = tx.update(MATRIX, state, losses=LOSSES)
    np.testing.assert_allclose(update, jnp.ones(3) @ MATRIX, rtol=1e-5)


def test_micro_batches_of_one_task_each_make_the_step_of_all_tasks():
    tx = multi_steps(optax.chain(monitor_tasks(3), mtl.mgda(3)), every_k=3, num_tasks=3)
    state = tx.init(MATRIX[0])
    for k in range(3):
        jac_rows = jnp.full_like(MATRIX, jnp.nan).at[k].set(MATRIX[k])
        losses = jnp.full(3, jnp.inf).at[k].set(LOSSES[k])
        update, state = tx.update(jac_rows, state, losses=losses, present=jnp.arange(3) == k)
    alone = mtl.mgda(3)
    expected, _ = alone.update(MATRIX, alone.init(None), losses=LOSSES)
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6)
    # A window without one task is the step of the others; one without any does not count.
    for present in ([True, False, True], [False] * 3, [True, False, True], [True, False, True]):
        update, state = tx.update(MATRIX, state, losses=LOSSES, present=present)
        assert int(state.mini_step) == 0 or not np.any(update)
    rest = mtl.mgda(2)
    rows = MATRIX[jnp.array([0, 2])]
    expected, _ = rest.update(rows, rest.init(None), losses=jnp.ones(2))
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6)
    assert int(state.inner_state[0].count[0, 1]) == 1


def test_averages_and_records_begin_where_a_task_is_first_seen():
    tx = optax.chain(ema_tasks(2, decay=0.5), monitor_tasks(2), mtl.sum_tasks())
    state = tx.init(jnp.zeros(2))
    nan = jnp.array([[1.0, 0.0], [jnp.nan, jnp.inf]])
    for _ in range(3):
        update, state = tx.update(nan, state, losses=jnp.ones(2), present=[True, False])
    np.testing.assert_allclose(update, [1.0, 0.0])
    assert state[0].decay_products.tolist() == [0.125, 1.0]
    update, state = tx.update(jnp.eye(2), state, losses=jnp.ones(2))
    np.testing.assert_allclose(update, [1.0, 1.0])
    assert state[1].count.tolist() == [[4, 1], [1, 1]]


def test_skip_nonfinite_stands_still_where_there_is_no_task():
    tx = skip_nonfinite(optax.chain(mtl.sum_tasks(), optax.adam(1.0)))
    _, state = tx.update(MATRIX, tx.init(MATRIX[0]), losses=LOSSES)
    update, after = tx.update(MATRIX, state, losses=LOSSES, present=[False] * 3)
    assert not np.any(update)
    chex.assert_trees_all_equal(after, state)


# The norm of an update.


@pytest.mark.parametrize("to", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_match_norm_has_the_norm_of_the_plain_update(to, scale):
    tx = match_norm(mtl.mgda(3), to=to)
    matrix = scale * MATRIX
    update, state = tx.update(matrix, tx.init(matrix[0]), losses=LOSSES)
    inner, _ = mtl.mgda(3).update(matrix, mtl.mgda(3).init(None), losses=LOSSES)
    inner, update = np.asarray(inner, np.float64), np.asarray(update, np.float64)
    plain = np.asarray(matrix, np.float64).sum(0) / (3 if to == "mean" else 1)
    expected = inner / np.linalg.norm(inner) * np.linalg.norm(plain)
    assert relative_error(update, expected) < 1e-5
    np.testing.assert_allclose(
        state.factor, np.linalg.norm(plain) / np.linalg.norm(inner), rtol=1e-5
    )


def test_match_norm_leaves_heads_alone_and_zero_zero(problem):
    _, jac = mtl.value_and_jac(mlp_losses)(*problem)
    tx = match_norm(mtl.mgda(3))
    update, _ = tx.update(jac, tx.init(problem[0]), problem[0])
    plain = jac.combine(1.0)
    chex.assert_trees_all_close(update["heads"], plain["heads"], atol=1e-6)
    np.testing.assert_allclose(
        optax.tree.norm(update["trunk"]), optax.tree.norm(plain["trunk"]) / 3, rtol=1e-5
    )
    update, state = tx.update(jnp.zeros((3, 4)), tx.init(None), losses=LOSSES)
    np.testing.assert_array_equal(update, 0)
    assert state.factor == 1
    # Of the tasks that are left inside.
    tx = match_norm(optax.chain(drop_nonfinite_tasks(3), mtl.mgda(3)))
    update, _ = tx.update(MATRIX.at[1].set(jnp.nan), tx.init(None), losses=LOSSES)
    length = np.linalg.norm((MATRIX[0] + MATRIX[2]) / 2)
    np.testing.assert_allclose(np.linalg.norm(update), length, rtol=1e-5)


def test_a_product_of_weights_beyond_the_range_is_held_and_counted():
    big = mtl.scale_by_weights([1e30, 1.0])
    tx = optax.chain(big, big, monitor_tasks(2), mtl.mgda(2))
    _, jac = mtl.value_and_jac(lambda w: {"a": 1e-9 * w @ w, "b": jnp.sum(w)})(jnp.ones(2))
    update, state = tx.update(jac, tx.init(jnp.ones(2)), jnp.ones(2))
    assert np.all(np.isfinite(update))
    assert state[2].overflows.tolist() == [1, 0]


def test_a_state_of_more_micro_batches_goes_on_with_fewer():
    four, two = (multi_steps(mtl.sum_tasks(), every_k, 2) for every_k in (4, 2))
    rows, w = jnp.ones((2, 2)), jnp.ones(2)
    state = four.init(w)
    for _ in range(3):
        _, state = four.update(rows, state, w, losses=jnp.ones(2))
    update, state = two.update(rows, state, w, losses=jnp.ones(2))
    np.testing.assert_allclose(update, 2.0)
    assert state.mini_step == 0


@pytest.mark.parametrize("wrap", [skip_nonfinite, lambda tx: multi_steps(tx, 1, 2)])
def test_the_first_state_can_be_donated(wrap):
    tx = wrap(mtl.sum_tasks())
    step = jax.jit(lambda rows, state: tx.update(rows, state, losses=jnp.ones(2)), donate_argnums=1)
    update, _ = step(jnp.ones((2, 3)), tx.init(jnp.ones(3)))
    np.testing.assert_allclose(update, 2.0)


@pytest.mark.parametrize("name", ["ema", "adatask"])
def test_a_nan_row_counts_for_nothing(name):
    """As if the update with it had not been."""
    tx = mtl.adatask(2) if name == "adatask" else optax.chain(mtl.ema_tasks(2), mtl.sum_tasks())
    rows, w = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones(2)
    expected, _ = tx.update(rows, tx.init(w), w, losses=jnp.ones(2))
    _, state = tx.update(rows.at[:, 0].set(jnp.nan), tx.init(w), w, losses=jnp.ones(2))
    update, _ = tx.update(rows, state, w, losses=jnp.ones(2))
    np.testing.assert_allclose(update, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["adatask", "m_config", "moco"])
def test_rows_of_narrow_parameters_are_kept_in_float32(name):
    state = mtl.make(name, 2).init(jnp.ones(3, jnp.float8_e4m3fn))
    rows = [leaf for leaf in jax.tree.leaves(state) if jnp.shape(leaf) == (2, 3)]
    assert rows
    assert {leaf.dtype for leaf in rows} == {jnp.dtype("float32")}


@pytest.mark.parametrize("size", [1e18, 1e20, 1e30])
def test_m_config_outlives_a_gradient_whose_square_overflows(size):
    tx, rows, w = mtl.m_config(2), jnp.array([[1.0, 2.0, 0.5], [0.5, 1.0, 2.0]]), jnp.ones(3)
    step = jax.jit(lambda rows, state: tx.update(rows, state, w, losses=jnp.ones(2)))
    state = tx.init(w)
    for i in range(40):
        update, state = step(rows * (size if i == 3 else 1), state)
        assert np.max(np.abs(update)) < 10
    assert np.all(update != 0)


def test_adatask_outlives_a_gradient_whose_square_overflows():
    tx, rows, w = mtl.adatask(2), jnp.ones((2, 3)), jnp.ones(3)
    _, state = tx.update(rows, tx.init(w), w, losses=jnp.ones(2))
    update, after = tx.update(1e30 * rows, state, w, losses=jnp.ones(2))
    chex.assert_trees_all_equal(after, state)
    np.testing.assert_allclose(update, 2.0, rtol=1e-4)  # two steps of the gradients before
