"""Links in a chain: what comes in, what goes on, and what wrong chains are told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl

PARAMS = {"w": jnp.ones(3), "a": jnp.ones(3), "b": jnp.ones(3)}


def task_losses(params):
    return {k: jnp.sum(params["w"] * params[k] ** 2) for k in ("a", "b")}


def jacobian():
    return mtl.value_and_jac(task_losses)(PARAMS)[1]


def update(tx, updates, params=PARAMS, **extra_args):
    return tx.update(updates, tx.init(params), params, **extra_args)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_missing_aggregator_is_told(name):
    tx = optax.chain(mtl.scale_by_dwa(2), OPTIMIZERS[name])
    with pytest.raises((ValueError, TypeError)) as caught:
        optax.apply_updates(PARAMS, update(tx, jacobian())[0])
    for part in ("mtl_optax.Jacobian", "one gradient", "aggregator", "mtl.sum_tasks()"):
        assert part in str(caught.value)


def update_from_jacrev(tx):
    return update(tx, jax.jacrev(task_losses)(PARAMS), losses=task_losses(PARAMS))


CASES = {
    "wrong number of tasks": (
        lambda: update(mtl.dwa(3), jacobian()),
        ValueError,
        ["2 losses", "('a', 'b')", "num_tasks=3", "num_tasks=2"],
    ),
    "two aggregators": (
        lambda: update(optax.chain(mtl.mgda(2), mtl.sum_tasks()), jacobian()),
        TypeError,
        ["plain dict", "expected the Jacobian", "exactly one aggregator"],
    ),
    "two aggregators and losses": (
        lambda: update_from_jacrev(optax.chain(mtl.mgda(2), mtl.sum_tasks())),
        ValueError,
        ["('a', 'b')", "jax.jacrev", "aggregator"],
    ),
    "plain gradient": (
        lambda: update(mtl.pareto(2), jax.grad(lambda p: sum(task_losses(p).values()))(PARAMS)),
        TypeError,
        ["plain dict", "(3,)", "mtl.value_and_jac"],
    ),
    "jacrev without losses": (
        lambda: update(mtl.gradnorm(2), jax.jacrev(task_losses)(PARAMS)),
        TypeError,
        ["plain dict", "jax.jacrev", "losses="],
    ),
    "floors above one": (
        lambda: mtl.pareto(3, floors=0.4),
        ValueError,
        ["0.4", "1.2", "3 tasks", "at most 1"],
    ),
    "floors by name above one": (
        lambda: mtl.pareto(2, floors={"a": 0.8, "b": 0.3}),
        ValueError,
        ["1.1", "at most 1"],
    ),
    "negative floors": (lambda: mtl.pareto(2, floors=-0.1), ValueError, ["-0.1", "at least 0"]),
    "kpis missing": (
        lambda: update(mtl.dtp(2), jacobian()),
        TypeError,
        ["kpis=", "('a', 'b')", "tx.update("],
    ),
    "kpis of another shape": (
        lambda: update(mtl.dtp(2), jacobian(), kpis={"a": 0.1, "c": 0.2}),
        ValueError,
        ["kpis=", "('a', 'b')"],
    ),
    "weights of another shape": (
        lambda: update(mtl.weights([1.0, 2.0, 3.0]), jacobian()),
        ValueError,
        ["weights=", "('a', 'b')", "expected one value for all, or 2"],
    ),
    "no tasks": (lambda: mtl.mgda(0), ValueError, ["num_tasks=0", "at least 1"]),
    "num_tasks not static": (
        lambda: mtl.mgda(jnp.int32(2)),
        TypeError,
        ["Python int", "static_args"],
    ),
    "zero temperature": (lambda: mtl.dwa(2, temperature=0.0), ValueError, ["temperature=0.0"]),
    "zero window": (lambda: mtl.dwa(2, window=0), ValueError, ["window=0", "at least 1"]),
    "unknown normalization": (
        lambda: mtl.mgda(2, normalize="l1"),
        ValueError,
        ["normalize='l1'", "loss+"],
    ),
    "unknown kind": (
        lambda: mtl.uncertainty(2, kind={"a": "regression", "b": "ranking"}),
        ValueError,
        ["kind='ranking'", "classification"],
    ),
    "old-style key": (
        lambda: mtl.pcgrad(2, key=jax.random.PRNGKey(0)),
        TypeError,
        ["key=", "jax.random.key(0)"],
    ),
    "a name in place of who is present": (
        lambda: update(mtl.dwa(2), jacobian(), present="a"),
        TypeError,
        ["present='a'", "expected a bool", "('a', 'b')"],
    ),
    "a position that is traced": (
        lambda: update(
            optax.inject_hyperparams(mtl.lr_annealing, static_args="num_tasks")(2), jacobian()
        ),
        ValueError,
        ["reference=", "('a', 'b')", 'static_args=("num_tasks", \'reference\')'],
    ),
    "a flag in place of a position": (
        lambda: update(mtl.pcd(2, primary=True), jacobian()),
        ValueError,
        ["primary=True", "position"],
    ),
    "integer rows": (
        lambda: update(mtl.mgda(2), jnp.array([[1, 2], [3, 4]]), jnp.ones(2), losses=jnp.ones(2)),
        TypeError,
        ["int32", "real floating-point", "cast"],
    ),
    "complex rows": (
        lambda: update(mtl.mgda(2), 1j * jnp.ones((2, 2)), jnp.ones(2), losses=jnp.ones(2)),
        TypeError,
        ["complex64", "real", "two parameters"],
    ),
    "no parameters": (
        lambda: mtl.metabalance(2).init(None),
        ValueError,
        ["init got no parameters", "tx.init(params)"],
    ),
    "a negative number of weights": (
        lambda: mtl.make("weights", -1),
        ValueError,
        ["num_tasks=-1", "at least 1"],
    ),
    "params of another model": (
        lambda: update(mtl.mgda(2), jacobian(), params={"w": jnp.ones(3), "v": jnp.ones(4)}),
        ValueError,
        ["structure", "differentiated"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_mistakes_say_what_came_what_was_expected_and_what_to_do(case):
    call, error, parts = CASES[case]
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_balancers_stack_and_keep_the_law():
    tx = optax.chain(mtl.scale_by_weights({"a": 2.0, "b": 0.5}), mtl.scale_by_uwso(2))
    jac, state = update(tx, jacobian())
    weights = np.array([2.0, 0.5]) * state[1].weights
    rows = jax.jacrev(task_losses)(PARAMS)
    for i, task in enumerate(("a", "b")):
        np.testing.assert_allclose(jac.losses[task], weights[i] * 3.0, rtol=1e-6)
        np.testing.assert_allclose(jac.rows()["w"][i], weights[i] * rows[task]["w"], rtol=1e-6)


def test_jacrev_over_the_shared_parameters_alone():
    """GradNorm and PE-LTR fed without `value_and_jac`, as in their docstrings."""
    shared = PARAMS["w"]
    losses_of = lambda w: task_losses({**PARAMS, "w": w})  # noqa: E731
    _, jac = mtl.value_and_jac(losses_of)(shared)
    for strategy in (mtl.gradnorm(2), mtl.pareto(2, floors=0.1)):
        grads = jax.jacrev(losses_of)(shared)
        got, _ = update(strategy, grads, shared, losses=losses_of(shared))
        expected, _ = update(strategy, jac, shared)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_options_may_follow_schedules_through_inject_hyperparams():
    factory = optax.inject_hyperparams(mtl.dwa, static_args=("num_tasks", "window"))
    tx = factory(num_tasks=2, temperature=optax.linear_schedule(1.0, 3.0, 2))
    state = tx.init(PARAMS)
    step = jax.jit(lambda state: tx.update(jacobian(), state, PARAMS)[1])
    for _ in range(3):
        state = step(state)
    assert state.hyperparams["temperature"] == 3.0
    floored = optax.inject_hyperparams(mtl.pareto, static_args=("num_tasks", "solver"))
    tx = floored(num_tasks=2, floors=optax.constant_schedule(0.4))
    _, state = jax.jit(lambda s: tx.update(jacobian(), s, PARAMS))(tx.init(PARAMS))
    assert (optax.tree.get(state, "weights") >= 0.4 - 1e-6).all()


def test_summarize_reads_every_number_a_task_wherever_it_stands():
    scheduled = optax.inject_hyperparams(mtl.scale_by_uwso, static_args="num_tasks")
    tx = optax.chain(
        mtl.scale_by_weights([2.0, 0.5]),
        scheduled(num_tasks=2, temperature=1.0),
        mtl.mgda(2),
        optax.adam(0.1),
    )
    _, state = jax.jit(lambda: update(tx, jacobian()))()
    summary = mtl.summarize(state, ("a", "b"))
    assert summary["weights/a"] == 2.0
    assert summary["weights.2/b"] == state[1].inner_state.weights[1]
    assert summary["weights.3/a"] == state[2].weights[0]
    assert summary["fallbacks"] == 0
    assert all(value.shape == () for value in summary.values())


def test_options_are_checked_inside_jit_as_outside():
    two, x = jnp.float32(2.0), jnp.array([[2.0, -1.0]])

    def focal(gamma):
        return lambda x: mtl.losses.softmax_focal_loss(x, jnp.array([0]), gamma=gamma)

    def priority(gamma):
        return lambda kpi: mtl.losses.task_priority(kpi, gamma)

    np.testing.assert_allclose(jax.jit(focal(two))(x), focal(2.0)(x))
    for wrong in (-1.0, jnp.float32(-1.0)):
        with pytest.raises(ValueError, match="gamma=-1"):
            jax.jit(focal(wrong))(x)
    np.testing.assert_allclose(jax.jit(priority(two))(0.5), priority(2.0)(0.5), rtol=1e-6)
    with pytest.raises(ValueError, match="gamma=-2"):
        jax.jit(priority(-2.0))(0.5)

    def solve(Q):
        return mtl.solvers.simplex_qp(Q, present=jnp.array([True, False])).x

    np.testing.assert_allclose(jax.jit(solve)(jnp.eye(2)), [1.0, 0.0])
    made = jax.jit(lambda w: mtl.every(jnp.int32(2), mtl.mgda(2)).init(w))(jnp.ones(2))
    assert made.wait == 0
    jax.jit(lambda w: mtl.stch(2, kind="log", warmup=2, window=jnp.int32(2)).init(w))(jnp.ones(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: mtl.dwa(2, window=1.5),
        lambda: mtl.every(jnp.float32(2.5), mtl.mgda(2)),
        lambda: mtl.softadapt(2, window=0),
    ],
)
def test_what_counts_is_whole(make):
    with pytest.raises(ValueError, match="whole number"):
        make()


@pytest.mark.parametrize(
    ("factory", "option"),
    [
        (mtl.dwa, "num_tasks"),
        (mtl.trimmed_mean, "trim"),
        (mtl.krum, "num_selected"),
        (mtl.krum, "num_byzantine"),
        (mtl.go4align, "num_groups"),
        (mtl.ldc_mtl, "num_features"),
        (mtl.sdmgrad, "num_steps"),
        (mtl.forum, "inner_steps"),
        (functools.partial(mtl.multi_steps, mtl.sum_tasks()), "every_k"),
        (lambda num_tasks, **k: mtl.ntk_traces(lambda w: w, **k), "num_probes"),
        (lambda num_tasks, **k: mtl.fronts.simplex_grid(num_tasks, **k), "divisions"),
    ],
)
def test_what_shapes_the_program_is_an_integer(factory, option):
    for wrong in (2.0, True, "2", jnp.float32(2.0)):
        with pytest.raises(TypeError, match=rf"{option}=.*a Python int.*static_args"):
            factory(**{"num_tasks": 5, option: wrong})
    with pytest.raises(ValueError, match=f"{option}=-1, expected at least"):
        factory(**{"num_tasks": 5, option: -1})
    factory(**{"num_tasks": 5, option: np.int64(2)})


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "conflict_free", "aligned_mtl", "stch"])
def test_a_preference_for_nobody_is_refused(name):
    with pytest.raises(ValueError, match="at least one task above 0"):
        mtl.make(name, 2, preference=[0.0, 0.0])


def test_a_pair_is_expected_of_a_function_with_aux():
    with pytest.raises(TypeError, match=r"expected a pair \(losses, aux\)"):
        mtl.value_and_jac(lambda w: [jnp.sum(w), jnp.sum(w**2)], has_aux=True)(jnp.ones(2))
    with pytest.raises(TypeError, match=r"expected a pair \(losses, aux\)"):
        mtl.value_and_feature_jac(lambda w: w, lambda w, h: {"a": jnp.sum(h)}, has_aux=True)(
            jnp.ones(2)
        )
    with pytest.raises(ValueError, match="columns=0"):
        mtl.Sketch(jax.random.key(0), columns=0)
