"""Each balancer against its paper's formula."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import mtl_optax as mtl
from tests.problems import a_fifth, compiled_update, oracle_cases, relative_error

EYE = jnp.eye(2)


def run(tx, losses_seq, matrix=EYE, **extra_args):
    """The states after each of a sequence of losses, with a constant Jacobian."""
    state, states = tx.init(matrix[0]), []
    step = jax.jit(lambda state, losses: tx.update(matrix, state, losses=losses, **extra_args))
    for losses in losses_seq:
        jac, state = step(state, jnp.asarray(losses))
        states.append(state)
    return jac, states


# Given weights.


def test_weights_fit_names_orders_and_schedules():
    losses = {"b": jnp.float32(1.0), "a": jnp.float32(1.0)}
    grads = {"b": jnp.ones(3), "a": jnp.ones(3)}
    for weights in ({"a": 2.0, "b": 3.0}, [2.0, 3.0], jnp.array([2.0, 3.0])):
        tx = mtl.scale_by_weights(weights)
        jac, state = tx.update(grads, tx.init(None), losses=losses)
        assert {k: float(v) for k, v in jac.losses.items()} == {"a": 2.0, "b": 3.0}
        np.testing.assert_array_equal(state.weights, [2.0, 3.0])
    for whole in ([2, 3], {"a": 2, "b": 3}, np.array([2, 3])):
        tx = mtl.scale_by_weights(whole)
        jac, state = tx.update(grads, tx.init(None), losses=losses)
        np.testing.assert_array_equal(state.weights, [2.0, 3.0])
    for wrong in (None, [], {"a": None}, [1.0, np.nan], "no"):
        with pytest.raises(ValueError, match="weights="):
            mtl.scale_by_weights(wrong)
    tx = mtl.scale_by_weights(2.0)
    with pytest.raises(ValueError, match=r"weights=2\.0 .* expected one for each of the 2 tasks"):
        tx.update(grads, tx.init(None), losses=losses)
    tx = mtl.scale_by_weights(
        lambda count: {"a": 1.0, "b": optax.linear_schedule(0.0, 1.0, 2)(count)}
    )
    state = tx.init(None)
    seen = []
    for _ in range(3):
        jac, state = tx.update(grads, state, losses=losses)
        seen.append(float(jac.losses["b"]))
    np.testing.assert_allclose(seen, [0.0, 0.5, 1.0])


def test_aliases_are_the_balancer_and_a_sum():
    matrix, losses = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.array([1.0, 4.0])
    alias, pieces = mtl.uwso(2), optax.chain(mtl.scale_by_uwso(2), mtl.sum_tasks())
    got, _ = alias.update(matrix, alias.init(None), losses=losses)
    expected, state = pieces.update(matrix, pieces.init(None), losses=losses)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(got, state[0].weights @ matrix, rtol=1e-6)
    assert mtl.dwa.__name__ == "dwa"


WHOLE = [n.removeprefix("scale_by_") for n in dir(mtl) if n.startswith("scale_by_")]


@pytest.mark.parametrize("name", WHOLE)
def test_help_of_a_whole_strategy_says_all_that_its_balancer_says(name):
    whole, balancer = getattr(mtl, name), getattr(mtl, f"scale_by_{name}")
    assert inspect.signature(whole) == inspect.signature(balancer)
    first = whole.__doc__.splitlines()[0]
    assert first.endswith(f"`scale_by_{name}` followed by `sum_tasks()`.")
    assert "A whole strategy: Jacobian in, gradient out." in whole.__doc__
    assert ">>>" not in whole.__doc__
    for section in ("Args:", "Returns:", "Raises:", "Differs from:", "References:"):
        assert (f"\n{section}\n" in whole.__doc__) == (section in balancer.__doc__), section
    options = inspect.signature(whole).parameters
    assert all(f"\n  {option}: " in whole.__doc__ for option in options)


# Tasks of no use for a while or for ever.

SGD = optax.sgd(1e-2)
LASTING = {
    "uncertainty": mtl.uncertainty,
    "uncertainty_sgd": lambda k: mtl.uncertainty(k, optimizer=SGD),
    "imtl_l": mtl.imtl_l,
    "gradnorm": mtl.gradnorm,
    "famo": mtl.famo,
    "gls": mtl.gls,
    "uwso": mtl.uwso,
    "dwa": lambda k: mtl.dwa(k, window=10),
    "softadapt": lambda k: mtl.softadapt(k, normalize=True, loss_weighted=True),
    "relobralo": lambda k: mtl.relobralo(k, key=jax.random.key(0)),
    "cov": mtl.cov,
    "encodec": mtl.encodec,
    "lr_annealing": mtl.lr_annealing,
    "ntk": mtl.ntk,
    "scale_invariant": mtl.scale_invariant,
}


@pytest.mark.parametrize("name", a_fifth(LASTING))
def test_trains_for_20_000_steps_beside_tasks_without_a_loss(name):
    """One loss is 0, one negative, one NaN and absent for 1,000 steps."""
    tx = optax.chain(LASTING[name](5), optax.adam(1e-2))
    centres = jnp.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])

    def step(carry, t):
        w, state = carry
        away = (t >= 5000) & (t < 6000)

        def task_losses(w):
            first, second = (0.2 + jnp.sum((w - c) ** 2) for c in centres)
            third = jnp.where(away, jnp.nan, 0.1 + jnp.sum((w - 0.5) ** 2))
            return [first, second, 0 * jnp.sum(w), 0.05 * jnp.sum(w**2) - 9, third]

        losses, jac = mtl.value_and_jac(task_losses)(w)
        updates, state = tx.update(jac, state, w, present=[True] * 4 + [~away])
        return (optax.apply_updates(w, updates), state), jnp.stack(losses)

    w = jnp.array([3.0, -2.0, 4.0])
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(20_000)))
    (w, state), losses = run((w, tx.init(w)))
    for leaf in jax.tree.leaves((w, state)):
        assert jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or jnp.isfinite(leaf).all()
    assert (losses[-1, :2] < losses[0, :2] / 5).all()


UNUSABLE = {
    "uncertainty": (mtl.scale_by_uncertainty, [0, 3, 3, 3]),
    "imtl_l": (mtl.scale_by_imtl_l, [0, 3, 3, 3]),
    "gradnorm": (mtl.scale_by_gradnorm, [0, 3, 3, 3]),
    "famo": (mtl.scale_by_famo, [0, 3, 3, 3]),
    "gls": (mtl.scale_by_gls, [0, 3, 3, 3]),
    "uwso": (mtl.scale_by_uwso, [0, 3, 3, 3]),
    "log_losses": (mtl.log_losses, [0, 3, 3, 3]),
    "stch": (mtl.scale_by_stch, [0, 0, 0, 3]),
    "stch_log": (lambda k: mtl.scale_by_stch(k, kind="log"), [0, 3, 3, 3]),
    "softadapt": (lambda k: mtl.scale_by_softadapt(k, loss_weighted=True), [0, 2, 2, 2]),
    "cosmos": (mtl.scale_by_cosmos, [0, 0, 0, 3]),
    "pbi": (mtl.scale_by_pbi, [0, 0, 0, 3]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_losses_that_could_not_be_used_are_counted(name):
    factory, expected = UNUSABLE[name]
    _, states = run(factory(4), [[1.0, 0.0, -1.0, np.nan]] * 3, jnp.eye(4))
    np.testing.assert_array_equal(states[-1].unusable, expected)
    # Those of absent tasks are not.
    absent = jnp.array([False, True, True, True])
    _, states = run(factory(4), [[np.nan, 1.0, 2.0, 3.0]] * 3, jnp.eye(4), present=absent)
    np.testing.assert_array_equal(states[-1].unusable, 0)


@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("regularizer", ["log", "log1p"])
def test_uncertainty_keeps_its_variance_where_no_loss_is_positive(optimizer, regularizer):
    tx = mtl.scale_by_uncertainty(4, regularizer=regularizer, optimizer=optimizer)
    _, states = run(tx, [[2.0, 2.0, 2.0, 2.0], [1.0, 0.0, -3.0, np.inf]], jnp.eye(4))
    before, after = (state.log_variances for state in states)
    np.testing.assert_array_equal(after[1:], before[1:])
    assert after[0] != before[0]
    _, (state,) = run(mtl.scale_by_uncertainty(2, optimizer=optax.sgd(1.0)), [[1e30, 1e-30]])
    assert state.log_variances[0] == np.float32(np.log(1e12))


def test_an_optimizer_of_its_own_starts_with_its_task():
    """Adam's debiasing counts the updates of a task, not those of all."""
    for factory in (mtl.scale_by_uncertainty, mtl.scale_by_imtl_l):
        late = jnp.array([[True, False]] * 5 + [[True, True]] * 3)
        tx = factory(2)
        state = tx.init(None)
        for present in late:
            _, state = tx.update(EYE, state, losses=jnp.array([2.0, 3.0]), present=present)
        _, states = run(tx, [[3.0, 3.0]] * 3)
        np.testing.assert_allclose(state[1][1], states[-1][1][1], rtol=1e-6)


# Uncertainty: the objective of Kendall et al. 2018 and its variant, differentiated by JAX.

OBJECTIVES = {
    ("regression", "log"): lambda s, loss: 0.5 * jnp.exp(-s) * loss + 0.5 * s,
    ("classification", "log"): lambda s, loss: jnp.exp(-s) * loss + 0.5 * s,
    ("regression", "log1p"): lambda s, loss: 0.5 * jnp.exp(-s) * loss + jnp.log1p(jnp.exp(s)),
    ("classification", "log1p"): lambda s, loss: jnp.exp(-s) * loss + jnp.log1p(jnp.exp(s)),
}


@pytest.mark.parametrize(("kind", "regularizer"), OBJECTIVES)
def test_uncertainty_descends_its_objective(kind, regularizer):
    objective = OBJECTIVES[kind, regularizer]
    tx = mtl.scale_by_uncertainty(2, kind=kind, regularizer=regularizer, optimizer=optax.sgd(0.3))
    losses_seq = [[1.0, 5.0], [0.2, 4.0], [0.1, 3.0]]
    jac, states = run(tx, losses_seq)
    s = jnp.zeros(2)
    for losses, state in zip(losses_seq, states, strict=True):
        losses = jnp.array(losses)
        weights = jax.vmap(jax.grad(objective, argnums=1))(s, losses)
        np.testing.assert_allclose(state.weights, weights, rtol=1e-6)
        s = s - 0.3 * jax.vmap(jax.grad(objective))(s, losses)
        np.testing.assert_allclose(state.log_variances, s, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jac.rows(), np.diag(states[-1].weights), rtol=1e-6)


@pytest.mark.parametrize(("kind", "factor"), [("regression", 1.0), ("classification", 2.0)])
def test_uncertainty_settles_where_the_closed_form_says(kind, factor):
    losses = jnp.array([0.1, 7.0])
    tx = mtl.scale_by_uncertainty(2, kind=kind, optimizer=optax.adam(0.1))
    step = lambda state, _: (tx.update(EYE, state, losses=losses)[1], None)  # noqa: E731
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=500))(tx.init(None))
    np.testing.assert_allclose(state.log_variances, jnp.log(factor * losses), atol=1e-3)


@pytest.mark.parametrize(("regularizer", "first"), [("log", 1.1), ("log1p", 1.1 + 2 * np.log(2))])
def test_uncertainty_shows_its_total(regularizer, first):
    """Kendall's eq. 7, and Liebel and Körner's, after one step of s by SGD: Σ ½ e⁻ˢ L + R(s)."""
    tx = mtl.scale_by_uncertainty(2, regularizer=regularizer, optimizer=optax.sgd(1.0))
    _, states = run(tx, [[2.0, 0.2], [2.0, 0.2]])
    s = np.zeros(2)
    for state in states:
        is_log = regularizer == "log"
        terms = np.exp(-s) * [1.0, 0.1] + (s / 2 if is_log else np.log1p(np.exp(s)))
        np.testing.assert_allclose(state.total, terms.sum(), rtol=1e-5)
        s = s - ((0.5 if is_log else 1 / (1 + np.exp(-s))) - np.exp(-s) * [1.0, 0.1])
    np.testing.assert_allclose(states[0].total, first, rtol=1e-6)
    _, absent = run(tx, [[2.0, np.nan]], present=[True, False])
    np.testing.assert_allclose(absent[0].total, 1.0 if is_log else 1 + np.log(2), rtol=1e-6)


def test_uncertainty_total_goes_below_0_and_is_logged():
    tx = mtl.uncertainty(2, optimizer=optax.sgd(0.5))
    state = tx.init(None)
    for _ in range(30):
        _, state = tx.update(EYE[:2], state, losses=jnp.array([1e-3, 1e-3]))
    assert mtl.summarize(state, ["a", "b"])["total"] < -1


def test_uncertainty_takes_a_kind_a_task():
    tx = mtl.scale_by_uncertainty(2, kind={"a": "classification", "b": "regression"})
    grads, losses = {"a": jnp.ones(2), "b": jnp.ones(2)}, {"a": jnp.float32(1), "b": jnp.float32(1)}
    _, state = tx.update(grads, tx.init(None), losses=losses)
    np.testing.assert_array_equal(state.weights, [1.0, 0.5])


def test_uwso_is_the_softmax_of_inverse_losses():
    losses = np.array([0.5, 1.0, 4.0])
    _, (state,) = run(mtl.scale_by_uwso(3, temperature=0.7), [losses], jnp.eye(3))
    logits = np.exp(1 / (0.7 * losses))
    np.testing.assert_allclose(state.weights, 3 * logits / logits.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1e-45, 1.0], [2.0, 0.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([np.nan, 1.0], [0.0, 2.0]),
        ([np.nan] * 2, [0.0, 0.0]),
    ],
)
def test_uwso_at_the_edges(losses, expected):
    _, (state,) = run(mtl.scale_by_uwso(2), [np.array(losses, np.float32)])
    np.testing.assert_allclose(state.weights, expected)


# GradNorm.


def gradnorm_objective(w, norms, losses, initial, alpha):
    g = w * norms
    ratio = losses / initial
    return jnp.sum(
        jnp.abs(g - jax.lax.stop_gradient(jnp.mean(g) * (ratio / jnp.mean(ratio)) ** alpha))
    )


def test_gradnorm_descends_its_objective_after_using_its_weights():
    matrix = jnp.array([[3.0, 0.0], [0.0, 0.5]])
    norms = jnp.array([3.0, 0.5])
    tx = mtl.scale_by_gradnorm(2, alpha=1.5, optimizer=optax.sgd(0.05))
    losses_seq = [[2.0, 3.0], [1.0, 2.9], [0.5, 2.8]]
    state, w = tx.init(None), jnp.ones(2)
    for losses in jnp.array(losses_seq):
        jac, state = tx.update(matrix, state, losses=losses)
        np.testing.assert_allclose(jac.rows(), w[:, None] * matrix, rtol=1e-6)  # w(t) is used
        np.testing.assert_array_equal(state.weights, w)
        grad = jax.grad(gradnorm_objective)(w, norms, losses, jnp.array(losses_seq[0]), 1.5)
        w = w - 0.05 * grad
        w = 2 * w / jnp.sum(w)
        np.testing.assert_allclose(state.next_weights, w, rtol=1e-5)
    np.testing.assert_array_equal(state.initial_losses, losses_seq[0])


def test_gradnorm_takes_the_first_loss_of_some_tasks_as_given():
    """The unspecified one is that of the task's first batch, the given one is not seen."""
    given = {"class": float(np.log(10)), "reg": None}
    tx = mtl.scale_by_gradnorm(2, initial_losses=given)
    state = tx.init(None)
    for unit in (1.0, 2.0):
        losses = {"class": jnp.float32(1.7 * unit), "reg": jnp.float32(0.4 * unit)}
        _, state = tx.update({"class": EYE[0], "reg": EYE[1]}, state, losses=losses)
    np.testing.assert_allclose(state.initial_losses, [np.log(10), 0.4], rtol=1e-6)
    with pytest.raises(ValueError, match="expected positive losses"):
        mtl.scale_by_gradnorm(2, initial_losses={"class": -1.0, "reg": None})


def test_gradnorm_settles_at_its_closed_form():
    norms = jnp.array([1.0, 4.0, 0.2])
    initial, losses = jnp.array([1.0, 2.0, 4.0]), jnp.array([0.5, 1.6, 1.0])
    tx = mtl.scale_by_gradnorm(
        3,
        alpha=1.0,
        initial_losses=initial,
        optimizer=optax.adam(optax.exponential_decay(0.05, 100, 0.5)),
    )
    step = lambda state, _: (tx.update(jnp.diag(norms), state, losses=losses)[1], None)  # noqa: E731
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=2000))(tx.init(None))
    expected = (losses / initial) / norms
    np.testing.assert_allclose(state.next_weights, 3 * expected / jnp.sum(expected), rtol=2e-3)


def test_gradnorm_weights_stay_positive_and_sum_to_k():
    matrix = jnp.diag(jnp.array([1e6, 1e-6, 0.0]))
    tx = mtl.scale_by_gradnorm(3, optimizer=optax.adam(0.9))
    _, states = run(tx, [[1.0, 1.0, 1.0]] * 20, matrix)
    for state in states:
        assert (state.next_weights > 0).all()
        np.testing.assert_allclose(jnp.sum(state.next_weights), 3, rtol=1e-6)


def test_gradnorm_outlives_a_norm_whose_square_is_infinite():
    tx = mtl.scale_by_gradnorm(2)
    state = tx.init(None)
    for scale in (1e30, 1.0):
        rows = jnp.array([[scale, 0.0], [0.0, 1.0]])
        _, state = tx.update(rows, state, losses=jnp.ones(2))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_gradnorm_weights_do_not_depend_on_the_unit_of_the_losses():
    matrix = jnp.array([[3.0, 0.0], [0.0, 0.5]])

    def weights_in(unit):
        losses = unit * np.array([[2.0, 3.0], [1.0, 1.0]] * 5)
        return run(mtl.scale_by_gradnorm(2), losses, unit * matrix)[1][-1].next_weights

    np.testing.assert_allclose(weights_in(1e-6), weights_in(1.0), rtol=1e-4)


@pytest.mark.parametrize("optimizer", [None, SGD])
def test_gradnorm_starts_a_task_with_its_first_positive_loss(optimizer):
    matrix = jnp.array([[3.0, 0.0], [0.0, 0.5]])
    losses = np.array([[2.0, 3.0]] + [[1.0, 2.9]] * 100)
    unusable = np.array([[2.0, 0.0], [2.0, -1.0], [2.0, np.nan]])
    tx = mtl.scale_by_gradnorm(2, optimizer=optimizer)
    step = lambda state, x: (tx.update(matrix, state, losses=x)[1], None)  # noqa: E731
    train = jax.jit(lambda x: jax.lax.scan(step, tx.init(None), x)[0])
    expected, got = train(losses), train(np.concatenate([unusable, losses]))
    np.testing.assert_array_equal(got.initial_losses, [2.0, 3.0])
    np.testing.assert_allclose(got.next_weights, expected.next_weights, rtol=0.05)
    assert got.next_weights[1] > 1.1


def test_gradnorm_shares_what_absent_tasks_leave():
    tx, losses = mtl.scale_by_gradnorm(3), jnp.array([0.5, 2.0, 3.0])
    matrix = jnp.diag(jnp.array([3.0, 1.0, 0.2]))
    step = jax.jit(lambda state, present: tx.update(matrix, state, losses=losses, present=present))
    state = tx.init(None)
    for _ in range(20):
        _, state = step(state, jnp.array([True, True, True]))
    for present in ([True, False, False], [False, True, True]):
        _, after = step(state, jnp.array(present))
        np.testing.assert_allclose(jnp.sum(after.next_weights), 3, rtol=1e-6)
        np.testing.assert_allclose(after.next_weights[0], state.next_weights[0], rtol=1e-6)
    assert after.next_weights[1] != state.next_weights[1]


@pytest.mark.long
def test_gradnorm_beats_equal_weights_on_its_own_toy_problem():
    """Chen et al. 2018, section 4: two regressions whose scales differ 100-fold."""
    sigmas, steps, batch = jnp.array([1.0, 100.0]), 1000, 100
    base_key, task_key, data_key, net_key = jax.random.split(jax.random.key(0), 4)
    basis = 10**0.5 * jax.random.normal(base_key, (100, 250))
    own = 3.5**0.5 * jax.random.normal(task_key, (2, 100, 250))

    def task_losses(params, x):
        h = x
        for w in params["trunk"]:
            h = jax.nn.relu(h @ w)
        targets = [s * jnp.tanh(x @ (basis + e).T) for s, e in zip(sigmas, own, strict=True)]
        pairs = zip(params["heads"], targets, strict=True)
        return [jnp.mean((h @ head - target) ** 2) for head, target in pairs]

    keys = jax.random.split(net_key, 6)
    init = jax.nn.initializers.he_normal()
    sizes = [(250, 100), (100, 100), (100, 100), (100, 100)]
    params = {
        "trunk": [init(k, size) for k, size in zip(keys, sizes, strict=False)],
        "heads": [init(k, (100, 100)) for k in keys[4:]],
    }
    last = lambda p: {"trunk": [False, False, False, True], "heads": False}  # noqa: E731

    def train(strategy):
        tx = optax.chain(strategy, optax.adam(2e-3))

        def step(carry, key):
            params, opt_state = carry
            x = jax.random.normal(key, (batch, 250))
            losses, jac = mtl.value_and_jac(task_losses, gramian_at=last)(params, x)
            updates, opt_state = tx.update(jac, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), jnp.stack(losses)

        keys = jax.random.split(data_key, steps)
        losses = jax.jit(lambda c: jax.lax.scan(step, c, keys)[1])((params, tx.init(params)))
        return float(jnp.sum(jnp.mean(losses[-100:], axis=0) / losses[0]))

    assert train(mtl.gradnorm(2, alpha=0.12)) < train(mtl.sum_tasks())


# DWA.


def test_dwa_golden_values_with_windows():
    """Temperature 2, window means [2, 2] then [1, 2]."""
    tx = mtl.scale_by_dwa(2, temperature=2.0, window=2)
    _, states = run(
        tx, [[3.0, 1.0], [1.0, 3.0], [0.5, 2.0], [1.5, 2.0], [9.0, 9.0], [9.0, 9.0], [0.0, 0.0]]
    )
    weights = np.stack([state.weights for state in states])
    np.testing.assert_array_equal(weights[:4], 1.0)
    np.testing.assert_allclose(weights[4], [0.8756, 1.1244], atol=5e-5)
    np.testing.assert_array_equal(weights[5], weights[4])
    ratios = np.exp(np.array([9.0 / 1.0, 9.0 / 2.0]) / 2.0)
    np.testing.assert_allclose(weights[6], 2 * ratios / ratios.sum(), rtol=1e-5)


def test_dwa_skips_a_loss_that_is_not_finite():
    tx = mtl.scale_by_dwa(2)
    _, states = run(tx, [[2.0, 2.0], [np.nan, 2.0], [1.0, 2.0], [1.0, 2.0]])
    assert all(np.isfinite(state.weights).all() for state in states)
    np.testing.assert_allclose(states[-1].weights, [0.8756, 1.1244], atol=5e-5)


def test_a_late_task_has_its_own_first_windows():
    """Its weight is 1 in them; the others share theirs as if they were all."""
    losses = np.array([[2.0, 2.0, 2.0], [1.0, 2.0, 1.0], [0.5, 2.0, 3.0], [0.1, 1.0, 2.0]])
    late = np.arange(4)[:, None] >= np.array([0, 0, 2])
    for factory, first in ((mtl.scale_by_dwa, 2), (mtl.scale_by_softadapt, 1)):
        tx, pair = factory(3), factory(2)
        state, alone = tx.init(None), pair.init(None)
        step, step_alone = jax.jit(tx.update), jax.jit(pair.update)
        for t in range(4):
            _, state = step(jnp.eye(3), state, losses=losses[t], present=late[t])
            _, alone = step_alone(EYE, alone, losses=losses[t, :2])
            if t < 2 + first:
                np.testing.assert_allclose(state.weights[:2], alone.weights, rtol=1e-6)
                assert state.weights[2] == 1
            np.testing.assert_allclose(jnp.sum(state.weights), 3, rtol=1e-6)
        np.testing.assert_array_equal(state.count, [4, 4, 2])


# DTP.


def test_dtp_follows_its_moving_average():
    gamma, a = np.array([0.5, 2.0]), 0.3
    tx = mtl.scale_by_dtp(2, gamma=gamma, decay=1 - a)
    state, average = tx.init(None), None
    for kpis in ([0.2, 0.9], [0.4, 0.8], [0.9, 0.1]):
        average = np.array(kpis) if average is None else a * np.array(kpis) + (1 - a) * average
        jac, state = tx.update(EYE, state, losses=jnp.ones(2), kpis=jnp.array(kpis))
        expected = -((1 - average) ** gamma) * np.log(average)
        np.testing.assert_allclose(state.weights, expected, rtol=1e-5)
        np.testing.assert_allclose(jac.rows(), np.diag(expected), rtol=1e-5)
    np.testing.assert_array_equal(state.invalid, 0)


def test_dtp_clamps_and_counts_invalid_kpis():
    tx = mtl.scale_by_dtp(3)
    state = tx.init(None)
    for kpis in ([1.5, np.nan, -0.1], [0.5, np.nan, 0.0], [0.5, 0.5, 1.0]):
        _, state = tx.update(jnp.eye(3), state, losses=jnp.ones(3), kpis=jnp.array(kpis))
        assert np.isfinite(state.weights).all()
    np.testing.assert_array_equal(state.invalid, [1, 2, 1])
    np.testing.assert_allclose(state.kpis[1], 0.5)


@pytest.mark.parametrize("kpis", [70, [0.5, 70.0], np.array([-0.1, 0.5]), {"a": 0.5, "b": 1.5}])
def test_dtp_refuses_numbers_that_are_no_share(kpis):
    losses, rows = {"a": jnp.ones([]), "b": jnp.ones([])}, {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = mtl.scale_by_dtp(2)
    for update in (
        tx.update,
        jax.jit(lambda *args, **kw: tx.update(*args, **(kw | {"kpis": kpis}))),
    ):
        with pytest.raises(
            ValueError, match=r"kpis=.*, expected in \[0, 1\]: a share, not percent"
        ):
            update(rows, tx.init(None), losses=losses, kpis=kpis)
    _, state = tx.update(rows, tx.init(None), losses=losses, kpis=np.array([np.nan, 1.0]))
    np.testing.assert_array_equal(state.invalid, [1, 0])


def test_dtp_does_not_differentiate_its_kpis():
    def weight(kpi):
        tx = mtl.scale_by_dtp(1)
        return tx.update(jnp.ones((1, 2)), tx.init(None), losses=jnp.ones(1), kpis=kpi)[1].weights[
            0
        ]

    assert jax.grad(weight)(0.5) == 0


# NTK and learning-rate annealing.


def test_ntk_holds_the_weights_of_the_last_traces():
    matrix, tx = jnp.array([[3.0, 0.0], [0.0, 0.5]]), mtl.scale_by_ntk(2)
    step = jax.jit(tx.update)
    _, state = step(matrix, tx.init(None), losses=jnp.ones(2))
    np.testing.assert_allclose(state.weights, [9.25 / 9, 9.25 / 0.25], rtol=1e-5)
    _, state = step(matrix, state, losses=jnp.ones(2), ntk_traces=[1.0, 4.0])
    for scale in (1.0, 5.0):
        jac, state = step(matrix * jnp.array([[1.0], [scale]]), state, losses=jnp.ones(2))
        np.testing.assert_array_equal(state.weights, [5.0, 1.25])
        np.testing.assert_allclose(jac.losses, [5.0, 1.25])
    # The trace of an absent task counts for nothing.
    present = jnp.array([True, False])
    _, state = step(
        matrix, state, losses=jnp.ones(2), ntk_traces=jnp.array([2.0, 9.0]), present=present
    )
    np.testing.assert_array_equal(state.weights, [1.0, 1.25])


def test_ntk_measures_nothing_while_it_holds():
    tx = mtl.scale_by_ntk(2)
    update = lambda state: tx.update(EYE, state, losses=jnp.ones(2))[1]  # noqa: E731
    equations = jax.make_jaxpr(update)(tx.init(None)).eqns
    (cond,) = [equation for equation in equations if equation.primitive.name == "cond"]
    held, measured = (branch.jaxpr.eqns for branch in cond.params["branches"])
    assert measured
    assert not held


def test_lr_annealing_holds_all_weights_while_the_reference_gives_no_measure():
    tx = mtl.scale_by_lr_annealing(3, reference=0)
    matrix = jnp.array([[4.0, 1.0], [1.0, 1.0], [0.5, 2.0]])
    _, (state,) = run(tx, [[1.0] * 3], matrix)
    present = jnp.array([False, True, True])
    _, held = tx.update(matrix, state, losses=jnp.ones(3), present=present)
    np.testing.assert_array_equal(held.weights, state.weights)
    _, held = tx.update(matrix.at[0].set(0), state, losses=jnp.ones(3))
    np.testing.assert_array_equal(held.weights, state.weights)


# PE-LTR.

GOLDEN = jnp.array([[3.0, 0.0], [1.0, 1.0], [1.5, 0.2]])


@pytest.mark.parametrize(
    ("floors", "solver", "weights", "squared_norm"),
    [
        (0.0, "exact", (0.0, 0.66292, 0.33708), 1.898876),
        (0.0, "two_step", (0.0, 0.0, 1.0), 2.29),
        (0.1, "exact", (0.1, 0.76517, 0.13483), 2.233820),
        (0.1, "two_step", (0.1, 0.1, 0.8), 2.6276),
    ],
)
def test_pareto_golden_values(floors, solver, weights, squared_norm):
    tx = mtl.scale_by_pareto(3, floors=floors, solver=solver)
    jac, state = tx.update(GOLDEN, tx.init(None), losses=jnp.ones(3))
    np.testing.assert_allclose(state.weights, weights, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(jac.combine(1.0) ** 2), squared_norm, rtol=1e-5)
    assert state.fallbacks == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-9)])
@pytest.mark.parametrize(
    ("case", "matrix", "at_zero", "at_half"),
    a_fifth(oracle_cases("pareto_floor0", "pareto_floor_half")),
)
def test_pareto_reaches_the_reference_norm(case, matrix, at_zero, at_half, dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        num_tasks = len(matrix)
        for floors, expected in ((0.0, at_zero), (0.5 / num_tasks, at_half)):
            update, state = compiled_update(mtl.pareto, num_tasks, floors=floors)(
                jnp.asarray(matrix, dtype), jnp.ones(num_tasks, dtype)
            )
            # The reference meets its constraint only to about 1e-8 where rows are dependent.
            best = np.linalg.norm(expected @ matrix) / expected.sum()
            norm = np.linalg.norm(np.asarray(update, np.float64))
            # Where the exact norm is 0, what is left is rounding of the rows.
            rounding = 4 * np.finfo(dtype).eps * np.linalg.norm(matrix, axis=1).max()
            assert norm - best <= tolerance * best + rounding, case
            weights = state[0].weights
            np.testing.assert_allclose(jnp.sum(weights), 1, rtol=1e-6)
            assert (weights >= floors - 1e-6).all(), case
            assert state[0].fallbacks == 0


def test_pareto_two_step_projects_the_unbounded_solution():
    """The paper's algorithm by NumPy and SciPy, on random Jacobians of full rank."""
    rng = np.random.default_rng(0)
    floors = np.array([0.05, 0.1, 0.0, 0.2])
    tx = mtl.scale_by_pareto(4, floors=floors, solver="two_step")
    for _ in range(10):
        matrix = rng.normal(size=(4, 6)).astype(np.float32)
        gramian = matrix.astype(np.float64) @ matrix.T
        system = np.block([[gramian, np.ones((4, 1))], [np.ones((1, 4)), np.zeros((1, 1))]])
        room = 1 - floors.sum()
        unbounded = np.linalg.solve(system, np.append(-gramian @ floors, room))[:4]
        heavy = 1e4  # the equality as a heavy row of a plain NNLS
        excess, _ = scipy.optimize.nnls(
            np.vstack([np.eye(4), heavy * np.ones(4)]), np.append(unbounded, heavy * room)
        )
        _, state = tx.update(jnp.asarray(matrix), tx.init(None), losses=jnp.ones(4))
        np.testing.assert_allclose(state.weights, floors + excess, atol=1e-4)


def test_pareto_counts_what_it_could_not_solve():
    tx = mtl.scale_by_pareto(2, floors=jnp.array([0.2, 0.4]))
    _, state = tx.update(EYE.at[0, 0].set(jnp.nan), tx.init(None), losses=jnp.ones(2))
    assert state.fallbacks == 1
    np.testing.assert_allclose(state.weights, [0.4, 0.6], rtol=1e-6)
    _, state = tx.update(EYE, state, losses=jnp.ones(2))
    assert state.fallbacks == 1
    assert relative_error(state.weights, [0.5, 0.5]) < 1e-6
