"""The law of absent tasks: they change nothing, and nothing changes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from tests.problems import a_fifth, told

NAMES = sorted(mtl.STRATEGIES)
STEPS, WIDTH = 4, 7
GARBAGE = [(0.0, 0.0), (np.nan, np.nan), (np.inf, 1e30), (1e30, np.inf), (-5.0, -3.0)]
ROWS = np.random.default_rng(0).normal(size=(STEPS, 3, WIDTH)).astype(np.float32)
LOSSES = np.random.default_rng(1).uniform(0.3, 3, size=(STEPS, 3)).astype(np.float32)
KPIS = np.array([0.3, 0.9, 0.6], np.float32)


@functools.lru_cache(maxsize=4)
def compiled_run(name, num_tasks):
    """`(rows, losses, present, kpis) -> updates and states`, of all steps, and the first state."""
    tx = mtl.make(name, num_tasks, key=jax.random.key(0))
    batches = mtl.STRATEGIES[name].needs == "batches"
    start = tx.init(jnp.zeros(WIDTH))

    def step(carry, at):
        rows, losses, present, kpis = at
        jac = mtl.as_jacobian(rows, losses)
        jac = (jac, mtl.as_jacobian(1.5 * rows[..., ::-1], losses)) if batches else jac
        more = told(rows, losses) | {"kpis": kpis}
        update, state = tx.update(jac, carry, jnp.zeros(WIDTH), present=present, **more)
        return state, (update, plain(state))

    def run(rows, losses, present, kpis):
        kpis = jnp.broadcast_to(kpis, (STEPS, num_tasks))
        return jax.lax.scan(step, start, (rows, losses, present, kpis))[1]

    return jax.jit(run), plain(start)


def plain(state):
    """The state with its random keys as numbers."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)


def with_garbage(rows, losses, present, loss, entry):
    rows, losses = np.where(present[..., None], rows, entry), np.where(present, losses, loss)
    return rows.astype(np.float32), losses.astype(np.float32)


@pytest.mark.parametrize("name", a_fifth(NAMES))
def test_a_task_that_is_always_absent_is_as_if_it_were_not_there(name):
    run, _ = compiled_run(name, 3)
    alone, _ = compiled_run(name, 2)
    for absent in range(3):
        if absent == 0 and {"primary", "reference"} & mtl.STRATEGIES[name].options.keys():
            continue  # there is none then
        others = [k for k in range(3) if k != absent]
        expected, _ = alone(
            ROWS[:, others], LOSSES[:, others], np.ones((STEPS, 2), bool), KPIS[others]
        )
        present = np.broadcast_to(np.arange(3) != absent, (STEPS, 3))
        for garbage in GARBAGE:
            rows, losses = with_garbage(ROWS, LOSSES, present, *garbage)
            updates, _ = run(rows, losses, present, KPIS)
            for got, want in zip(np.asarray(updates), np.asarray(expected), strict=True):
                assert np.max(np.abs(got - want)) <= 2e-6 * np.max(np.abs(want)) + 1e-30


@functools.lru_cache(maxsize=2)
def compiled_slope(name, num_tasks):
    """The derivative of the first update along a direction of rows and losses."""
    run, _ = compiled_run(name, num_tasks)

    def slope(rows, losses, present, kpis):
        update = lambda *given: run(*given, present, kpis)[0][0]  # noqa: E731
        return jax.jvp(update, (rows, losses), (jnp.cos(rows), jnp.sin(losses)))[1]

    return jax.jit(slope)


@pytest.mark.parametrize("name", a_fifth(NAMES, 3))
def test_a_derivative_of_an_update_knows_nothing_of_an_absent_task(name):
    others, absent = [0, 2], 1
    present = np.broadcast_to(np.arange(3) != absent, (STEPS, 3))
    expected = compiled_slope(name, 2)(
        ROWS[:, others], LOSSES[:, others], np.ones((STEPS, 2), bool), KPIS[others]
    )
    for garbage in [(0.0, 0.0), (np.nan, np.nan)]:
        rows, losses = with_garbage(ROWS, LOSSES, present, *garbage)
        slope = compiled_slope(name, 3)(rows, losses, present, KPIS)
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", a_fifth(NAMES, 1))
def test_what_a_state_holds_of_an_absent_task_stays_and_of_nobody_all(name):
    run, start = compiled_run(name, 3)
    present = np.array([[True, False, True], [False] * 3, [False, True, True], [True] * 3])
    rows, losses = with_garbage(ROWS, LOSSES, present, np.nan, np.inf)
    updates, states = run(rows, losses, present, KPIS)
    assert np.all(np.isfinite(updates))
    assert not np.any(updates[1])
    leaves = [
        np.concatenate([np.asarray(first)[None], np.asarray(rest)])
        for first, rest in zip(jax.tree.leaves(start), jax.tree.leaves(states), strict=True)
    ]
    for leaf in leaves:
        np.testing.assert_array_equal(leaf[2], leaf[1])  # after nobody
        if leaf.shape[1:2] == (3,):
            np.testing.assert_array_equal(leaf[1][1], leaf[0][1])
            np.testing.assert_array_equal(leaf[3][0], leaf[2][0])
        if leaf.shape[1:] == (3, 3):
            np.testing.assert_array_equal(leaf[1][:, 1], leaf[0][:, 1])


@pytest.mark.parametrize("name", a_fifth(NAMES, 2))
def test_a_task_first_seen_later_starts_there(name):
    """Its own entries in the state are then those of a first step."""
    run, start = compiled_run(name, 3)
    late = np.arange(STEPS)[:, None] >= np.array([0, 0, 2])
    rows, losses = with_garbage(ROWS, LOSSES, late, np.nan, np.nan)
    updates, states = run(rows, losses, late, KPIS)
    assert np.all(np.isfinite(updates))
    for first, leaf in zip(jax.tree.leaves(start), jax.tree.leaves(states), strict=True):
        if jnp.shape(first)[:1] == (3,):
            np.testing.assert_array_equal(leaf[1][2], first[2])


def test_present_is_read_by_name_and_checked():
    tx, w = mtl.sum_tasks(), jnp.ones(2)
    losses_fn = lambda w: {"buy": jnp.sum(w**2), "click": jnp.sum(3 * w)}  # noqa: E731
    _, jac = mtl.value_and_jac(losses_fn)(w)
    update, _ = tx.update(jac, tx.init(w), w, present={"click": True, "buy": False})
    assert update.tolist() == [3.0, 3.0]
    update, _ = tx.update(jac, tx.init(w), w, present=jnp.array([True, False]))
    assert update.tolist() == [2.0, 2.0]
    with pytest.raises(TypeError, match="expected a bool for each of the tasks"):
        tx.update(jac, tx.init(w), w, present={"click": 0.5, "buy": 1.0})
    with pytest.raises(ValueError, match="does not fit the tasks"):
        tx.update(jac, tx.init(w), w, present={"click": True})


def test_an_absent_task_keeps_to_itself_behind_a_shared_trunk_and_a_head():
    """NaN labels: heads stand still, the trunk gets what the others give."""
    params = {"trunk": jnp.array([1.0, -2.0]), "a": jnp.array(3.0), "b": jnp.array(0.5)}

    def losses_fn(p, y):
        h = jnp.sum(jnp.tanh(p["trunk"]))
        return {"a": (p["a"] * h - 1) ** 2, "b": (p["b"] * h - y) ** 2}

    _, jac = mtl.value_and_jac(losses_fn)(params, jnp.nan)
    tx = optax.chain(mtl.monitor_tasks(2), mtl.mgda(2))
    update, _ = tx.update(jac, tx.init(params), params, present={"a": True, "b": False})
    expected = jax.grad(lambda p: losses_fn(p, 0.0)["a"])(params)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, g, rtol=1e-6), update, expected)
    assert jac.here().restrict({"a": True}, lambda: jnp.array([True, False])).present.tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("gramian", ["rows", "ghost", "columns"])
def test_every_way_to_measure_leaves_absent_tasks_out(gramian):
    w = jax.random.normal(jax.random.key(0), (5, 4))
    x = jax.random.normal(jax.random.key(1), (3, 5))

    def losses_fn(w, bad):
        h = jnp.tanh(x @ w)
        return [jnp.mean(h**2), jnp.mean(h) * bad, jnp.mean((h - 1) ** 2)]

    _, jac = mtl.value_and_jac(losses_fn, gramian=gramian)(w, jnp.inf)
    tx = mtl.upgrad(3)
    update, state = tx.update(jac, tx.init(w), w, present=[True, False, True])
    rows = jax.jacrev(lambda w: [losses_fn(w, 0.0)[k] for k in (0, 2)])(w)
    alone = mtl.upgrad(2)
    expected, _ = alone.update(rows, alone.init(w), w, losses=[jnp.ones(())] * 2)
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-7)
    assert int(state.fallbacks) == 0
