"""Groups of parameters with strategies of their own, and weights that rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from benchmarks.flops import parts
from tests.problems import a_fifth, mlp_batch, mlp_losses, mlp_params

LABELS = {"trunk": [{"w": "first", "b": "first"}, "second"], "heads": "second"}


@pytest.fixture(scope="module")
def problem():
    return mlp_params(jax.random.key(0)), *mlp_batch(jax.random.key(1))


def assert_close(got, expected, tol=1e-6):
    def close(a, b):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=tol * scale + 1e-30)

    jax.tree.map(close, got, expected)


# Groups.


def by_hand(params, x, y, wrap):
    """Each group differentiated alone, the others constants."""
    _, jac = mtl.value_and_jac(mlp_losses)(params, x, y)
    rows = jac.rows()
    first = lambda tree: tree["trunk"][0]  # noqa: E731
    second = lambda tree: tree["trunk"][1]  # noqa: E731
    update = {"heads": jax.tree.map(lambda row: row.sum(0), rows["heads"]), "trunk": []}
    for part, tx in ((first, wrap(mtl.upgrad(3))), (second, wrap(mtl.mgda(3)))):
        losses = jnp.stack(list(jac.losses.values()))
        each, _ = tx.update(part(rows), tx.init(part(params)), part(params), losses=losses)
        update["trunk"].append(each)
    return update


@pytest.mark.parametrize("gramian", a_fifth(["rows", "ghost", "columns"], 1))
def test_each_group_is_aggregated_over_its_own_gramian(problem, gramian):
    tx = mtl.partition({"first": mtl.upgrad(3), "second": mtl.mgda(3)}, LABELS)

    @jax.jit
    def update(params, x, y):
        _, jac = mtl.value_and_jac(mlp_losses, gramian=gramian)(params, x, y)
        return tx.update(jac, tx.init(params), params)

    got, state = update(*problem)
    assert_close(got, by_hand(*problem, lambda tx: tx), 2e-5)
    summary = mtl.summarize(state, ("a", "b", "c"))
    assert {"weights/a", "weights.2/a", "fallbacks", "fallbacks.2"} <= set(summary)


def test_groups_under_vmap_and_with_links_around_and_inside(problem):
    params, x, y = problem
    tx = optax.chain(
        mtl.log_losses(),
        mtl.partition(
            {
                "first": optax.chain(mtl.ema_tasks(3), mtl.sum_tasks(), optax.adam(1.0)),
                "second": mtl.every(2, mtl.mgda(3)),
            },
            lambda params: LABELS,
        ),
        optax.sgd(0.1),
    )

    def step(carry, scale):
        params, state = carry
        _, jac = mtl.value_and_jac(mlp_losses)(params, scale * x, y)
        update, state = tx.update(jac, state, params)
        return (optax.apply_updates(params, update), state), update

    def run(scale):
        return jax.lax.scan(step, (params, tx.init(params)), scale * jnp.ones(3))

    one, _ = jax.jit(run)(1.0)
    many, _ = jax.jit(jax.vmap(run))(jnp.array([0.5, 1.0]))
    assert_close(jax.tree.map(lambda leaf: leaf[1], many[0]), one[0], 1e-4)
    # Of the other group nothing is kept.
    rows = one[1][1].inner_states["first"][0].rows
    assert rows["trunk"][0]["w"].shape == (3, 6, 8)
    assert rows["trunk"][1]["w"].size == 0


@pytest.mark.parametrize("name", ["forum", "auto_lambda"])
def test_groups_look_ahead_each_with_the_others_at_rest(name):
    params = {"left": jnp.array([1.0, -2.0]), "right": jnp.array([0.5, 3.0])}

    def task_losses(p, shift=0.0):
        product = p["left"] * p["right"] + shift
        return {"a": jnp.sum((product - 1) ** 2), "b": jnp.sum(product**2) + jnp.sum(p["left"])}

    def alone(label):
        """The strategy on one group: the other parameters are constants."""
        bound = lambda shift: lambda own: task_losses({**params, label: own}, shift)  # noqa: E731
        return updated(bound, params[label])

    def updated(bound, params, wrap=lambda tx: tx):
        tx = wrap(mtl.make(name, 2))
        _, jac = mtl.value_and_jac(bound(0.0), shared=None)(params)
        functions = {"losses_fn": bound(0.0), "validation_fn": bound(0.3)}
        return tx.update(jac, tx.init(params), params, **functions)[0]

    grouped = lambda tx: mtl.partition(dict.fromkeys(params, tx), {k: k for k in params})  # noqa: E731
    got = updated(lambda shift: lambda p: task_losses(p, shift), params, grouped)
    for label in params:
        np.testing.assert_allclose(got[label], alone(label), rtol=1e-6)


def test_groups_leave_out_absent_tasks(problem):
    params, x, y = problem
    tx = mtl.partition({"first": mtl.upgrad(3), "second": mtl.mgda(3)}, LABELS)
    _, jac = mtl.value_and_jac(mlp_losses)(params, x, {**y, "b": jnp.nan * y["b"]})
    got, _ = tx.update(jac, tx.init(params), params, present={"a": True, "b": False, "c": True})
    two = {"trunk": params["trunk"], "heads": {k: params["heads"][k] for k in "ac"}}
    _, jac = mtl.value_and_jac(mlp_losses)(two, x, y)
    alone = mtl.partition({"first": mtl.upgrad(2), "second": mtl.mgda(2)}, LABELS)
    expected, _ = alone.update(jac, alone.init(two), two)
    assert not np.any(got["heads"].pop("b"))
    assert_close(got, expected, 1e-5)


def test_groups_name_what_does_not_fit(problem):
    params, x, y = problem
    _, jac = mtl.value_and_jac(mlp_losses)(params, x, y)
    with pytest.raises(ValueError, match="no strategy for the labels 'second'"):
        mtl.partition({"first": mtl.mgda(3)}, LABELS).init(params)
    with pytest.raises(ValueError, match="do not fit the parameters"):
        mtl.partition({"first": mtl.mgda(3)}, {"trunk": "first"}).init(params)
    with pytest.raises(ValueError, match="got no strategy"):
        mtl.partition({}, LABELS)
    balancer = mtl.partition({"first": mtl.sum_tasks(), "second": mtl.log_losses()}, LABELS)
    with pytest.raises(TypeError, match="returned a Jacobian"):
        balancer.update(jac, balancer.init(params), params)
    measured = lambda p: {"trunk": [True, False], "heads": False}  # noqa: E731
    _, jac = mtl.value_and_jac(mlp_losses, gramian_at=measured)(params, x, y)
    tx = mtl.partition({"first": mtl.mgda(3), "second": mtl.mgda(3)}, LABELS)
    with pytest.raises(ValueError, match="gramian_at measures none"):
        tx.update(jac, tx.init(params), params)


# Weights that rest.

# Not weights of these rows.
ONCE = {"graddrop", "trimmed_mean", "db_mtl", "moco", "m_config", "metabalance", "adatask"}
# One of each kind; the others weigh by the same calls, and their programs take long to compile.
WEIGHING = {
    "sum", "mean", "dwa", "uncertainty", "gradnorm", "pareto", "lr_annealing", "scale_invariant",
    "mgda", "pcgrad", "upgrad", "nash_mtl", "krum", "imtl", "excess_mtl", "modo",
}  # fmt: skip


@pytest.mark.parametrize("name", a_fifth(sorted(ONCE | WEIGHING)))
def test_weights_are_held_between_refreshes(name):
    row = mtl.STRATEGIES[name]
    J = jax.random.normal(jax.random.key(1), (3, 7))
    losses, w, key = jnp.array([1.0, 2.0, 3.0]), jnp.zeros(7), jax.random.key(0)
    tx = mtl.every(3, mtl.make(name, 3, key=key), num_tasks=3)
    update = jax.jit(lambda J, state: tx.update(J, state, w, losses=losses, kpis=losses / 4))
    if name in ONCE or row.needs == "batches":
        jac = mtl.as_jacobian(J, losses)
        args = ((jac, jac) if row.needs == "batches" else jac, tx.init(w))
        with pytest.raises((ValueError, TypeError), match=r"no weights to hold|2 batches"):
            update(*args)
        return
    plain = mtl.make(name, 3, key=key)
    once = jax.jit(lambda J: plain.update(J, plain.init(w), w, losses=losses, kpis=losses / 4)[0])
    expected = once(J)
    first, state = update(J, tx.init(w))
    assert_close(first, expected, 1e-5)
    # J Aᵀ and the weights of the first: the update is linear in J.
    for matrix in (J, 2 * J[::-1] + 1):
        got, state = update(matrix, state)
        weights = state.held_scales * (state.held_weights if row.kind == "aggregator" else 1)
        if name == "imtl":
            weights = state.held_scales * state.held_weights
        assert_close(got, weights @ matrix, 1e-5)
    before = state
    _, state = update(2 * J[::-1] + 1, state)  # the fourth is a refresh
    assert int(before.wait) == 0
    assert int(state.wait) == 2


def test_every_asks_its_link_once_a_trace_and_is_the_same_without_jit():
    traces, inner = [], mtl.mgda(2)

    def counted(jac, state, params=None, **extra_args):
        traces.append(None)
        return inner.update(jac, state, params, **extra_args)

    tx = mtl.every(2, optax.GradientTransformationExtraArgs(inner.init, counted), num_tasks=2)
    rows = [jnp.diag(jnp.array([1.0, k])) for k in (1, 2, 3)]

    def run(update):
        state, found = tx.init(jnp.zeros(2)), []
        for matrix in rows:
            step, state = update(matrix, state)
            found.append(step)
        return jnp.stack(found)

    jitted = run(jax.jit(lambda matrix, state: tx.update(matrix, state, losses=jnp.ones(2))))
    assert len(traces) == 1
    with jax.disable_jit():
        eager = run(lambda matrix, state: tx.update(matrix, state, losses=jnp.ones(2)))
    np.testing.assert_allclose(eager, jitted, rtol=1e-6)


def test_every_follows_a_schedule_and_meets_new_tasks_at_once():
    tx = mtl.every(lambda count: jnp.where(count < 2, 1, 3), mtl.mgda(2))
    state, waits = tx.init(None), []
    for _ in range(6):
        _, state = tx.update(jnp.eye(2), state, losses=jnp.ones(2))
        waits.append(int(state.wait))
    assert waits == [0, 0, 2, 1, 0, 2]
    state = tx.init(None)
    for present in ([True, False], [True, False], [True, True]):
        update, state = tx.update(jnp.eye(2), state, losses=jnp.ones(2), present=present)
    np.testing.assert_allclose(update, [0.5, 0.5], atol=1e-6)


def test_every_in_front_of_other_links_behaves_as_a_balancer():
    tx = optax.chain(mtl.every(2, mtl.normalize_tasks(), num_tasks=2), mtl.mgda(2))
    state = tx.init(jnp.ones(2))
    J = jnp.array([[3.0, 4.0], [0.0, 0.5]])
    for scale in (1.0, 2.0):
        update, state = tx.update(scale * J, state, losses=jnp.ones(2))
        expected = mtl.mgda(2)
        rows = scale * J / jnp.array([[5.0], [0.5]])
        want, _ = expected.update(rows, expected.init(None), losses=jnp.ones(2))
        np.testing.assert_allclose(update, want, rtol=1e-5)
    with pytest.raises(ValueError, match="num_tasks=K"):
        mtl.every(2, mtl.normalize_tasks()).init(None)
    with pytest.raises(ValueError, match=r"n=1\.5, expected at least 1 update"):
        mtl.every(1.5, mtl.mgda(2))
    for wrong in (0, "3", True, None, 2.0):
        with pytest.raises(ValueError, match="at least 1 update"):
            mtl.every(wrong, mtl.mgda(2))


def test_a_step_between_refreshes_costs_what_fixed_weights_cost():
    """The K passes stand in one branch of the cond; the other one holds one pullback."""
    tasks = tuple("abcdefgh")
    params = jax.eval_shape(lambda: mlp_params(jax.random.key(0), (256, 512, 512), tasks))
    batch = jax.eval_shape(lambda: mlp_batch(jax.random.key(1), tasks, 64, 256))

    def costs(tx):
        def step(params, state, batch):
            _, jac = mtl.value_and_jac(mlp_losses, gramian="ghost")(params, *batch)
            return tx.update(jac, state, params)

        state = jax.eval_shape(tx.init, params)
        return parts(step, params, state, batch)

    fixed, (outside, branches) = costs(mtl.weights([1.0] * 8)), costs(mtl.every(10, mtl.upgrad(8)))
    rest, refresh = sorted(max(branches, key=max))
    assert not any(max(branch) > 0.1 * fixed[0] for branch in fixed[1])
    assert outside + rest <= 1.02 * fixed[0]
    assert refresh > 2 * fixed[0]
