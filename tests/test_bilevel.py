"""Strategies that learn from another batch or a router: their papers' rules, step by step in NumPy.

The tasks are quadratics with a minimum on the training batch and another on the validation batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.optimize import minimize

import mtl_optax as mtl

K, P, STEPS, RATE = 3, 6, 5, 0.05
RNG = np.random.default_rng(3)
CURVATURES = RNG.uniform(0.5, 3, (K, P))
MINIMA = RNG.normal(size=(K, P))
HELD_OUT = MINIMA + 0.3 * RNG.normal(size=(K, P))
START = RNG.normal(size=P)


def losses_fn(minima):
    squares = lambda w, c, m: 0.5 * jnp.sum(jnp.float32(c) * (w - jnp.float32(m)) ** 2)  # noqa: E731
    return lambda w: {k: squares(w, CURVATURES[i], minima[i]) for i, k in enumerate("abc")}


def losses_at(w, minima=MINIMA):
    return 0.5 * np.sum(CURVATURES * (w - minima) ** 2, axis=1)


def rows_at(w, minima=MINIMA):
    return CURVATURES * (w - minima)


def trained(strategy):
    """Parameters and weights after each step of gradient descent, and the strategy's last state."""
    tx, training, validation = strategy, losses_fn(MINIMA), losses_fn(HELD_OUT)

    @jax.jit
    def step(w, state):
        _, jac = mtl.value_and_jac(training)(w)
        update, state = tx.update(
            jac, state, w, losses_fn=training, validation_fn=validation, unexpected=0
        )
        return w - RATE * update, state, mtl.summarize(state, jac)

    w, ws, weights = jnp.array(START, jnp.float32), [], []
    state = tx.init(w)
    for _ in range(STEPS):
        w, state, record = step(w, state)
        ws.append(w)
        weights.append([record[f"weights/{k}"] for k in "abc"])
    return np.array(ws), np.array(weights), state


class Adam:
    """In float64, as its paper has it."""

    def __init__(self, rate):
        self.rate, self.m, self.v, self.t = rate, 0.0, 0.0, 0

    def step(self, gradient):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        return (
            -self.rate
            * (self.m / (1 - 0.9**self.t))
            / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        )


def softmax(a):
    return np.exp(a - np.max(a)) / np.sum(np.exp(a - np.max(a)))


def softmax_slope(a):
    return np.diag(softmax(a)) - np.outer(softmax(a), softmax(a))


@pytest.mark.parametrize(
    ("softmaxed", "primary"),
    [(False, [1.0, 1.0, 1.0]), (True, [1.0, 0.0, 1.0])],
    ids=["authors", "libmtl, one auxiliary"],
)
def test_auto_lambda_follows_the_authors_finite_differences(softmaxed, primary):
    """Central differences of the training losses along the validation gradient, as in their code.

    For quadratics they are exact. LibMTL has the softmax, the start 1/K and the rate 1e-3.
    """
    alpha, rate = 0.1, 1e-3 if softmaxed else 1e-4
    options = {"optimizer": optax.adam(rate), "softmax": True} if softmaxed else {}
    got, weights, _ = trained(mtl.auto_lambda(K, learning_rate=alpha, primary=primary, **options))
    w, learned, adam = START, np.full(K, 1 / K if softmaxed else 0.1), Adam(rate)
    for at, lam in zip(got, weights, strict=True):
        used = softmax(learned) if softmaxed else learned
        ahead = w - alpha * used @ rows_at(w)
        d = np.array(primary) @ rows_at(ahead, HELD_OUT)
        eps = 0.01 / np.linalg.norm(d)
        change = (losses_at(w + eps * d) - losses_at(w - eps * d)) / (2 * eps)
        slope = softmax_slope(learned) @ change if softmaxed else change
        learned = learned + adam.step(-alpha * slope)
        used = softmax(learned) if softmaxed else learned
        w = w - RATE * used @ rows_at(w)
        np.testing.assert_allclose(lam, used, rtol=1e-5)
        np.testing.assert_allclose(at, w, rtol=1e-5, atol=1e-6)


def test_moml_moves_the_logits_where_all_validation_losses_agree():
    """LibMTL's rule, its min-norm problem solved by SLSQP in float64."""
    alpha = 0.1
    got, weights, state = trained(mtl.moml(K, learning_rate=alpha))
    w, a, adam, moved = START, np.zeros(K), Adam(1e-3), 0
    for at, lam in zip(got, weights, strict=True):
        train = rows_at(w)
        rows = -alpha * rows_at(w - alpha * softmax(a) @ train, HELD_OUT) @ train.T
        rows = rows @ softmax_slope(a)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        found = minimize(
            lambda s, rows=rows: np.sum((s @ rows) ** 2),
            np.full(K, 1 / K),
            bounds=[(0, 1)] * K,
            constraints={"type": "eq", "fun": lambda s: np.sum(s) - 1},
            options={"ftol": 1e-15},
        )
        gradient = found.x @ rows
        moved += np.linalg.norm(gradient) > 0.1
        a = a + adam.step(gradient)
        w = w - RATE * softmax(a) @ train
        np.testing.assert_allclose(lam, softmax(a), rtol=2e-5)
        np.testing.assert_allclose(at, w, rtol=1e-5, atol=1e-6)
    assert moved == STEPS
    assert state[0].fallbacks == 0


def test_moml_rests_where_the_validation_losses_disagree():
    tx, w = mtl.scale_by_moml(2), jnp.zeros(2)
    more = {"losses": jnp.ones(2), "validation_fn": lambda w: [w[0], w[1]]}
    _, state = jax.jit(lambda state: tx.update(jnp.eye(2), state, w, **more))(tx.init(w))
    assert state.weights.tolist() == [0.5, 0.5]
    assert state.fallbacks == 0


def test_forum_takes_the_steepest_descent_that_lowers_the_training_loss():
    """The primal problem by SLSQP: min_d max_k <u_k, d> + |d|^2 / 2 with <dq, d> <= -rho |dq|^2."""
    eta, inner, rho = 0.1, 5, 0.104
    got, weights, state = trained(mtl.forum(K, learning_rate=eta, inner_steps=inner, rho=rho))
    w, a, shares, adam, constrained = START, np.zeros(K), np.zeros(K), Adam(1e-3), 0
    for t, (at, lam) in enumerate(zip(got, weights, strict=True), start=1):
        sigma = softmax(a)
        settled = w
        for _ in range(inner):
            settled = settled - eta * sigma @ rows_at(settled)
        dq = np.concatenate(
            [softmax_slope(a) @ (losses_at(w) - losses_at(settled)), sigma @ rows_at(w)]
        )
        rows = rows_at(w, HELD_OUT)
        units = np.hstack([np.zeros((K, K)), rows / np.linalg.norm(rows, axis=1, keepdims=True)])
        square = dq @ dq
        found = minimize(
            lambda x: x[0] + x[1:] @ x[1:] / 2,
            np.concatenate([[0.0], -dq]),
            constraints=[
                {"type": "ineq", "fun": lambda x, u=units: x[0] - u @ x[1:]},
                {"type": "ineq", "fun": lambda x, q=dq, s=square: -rho * s - q @ x[1:]},
            ],
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        # d = -(Σ s_k u_k + nu dq): its multipliers, with Σ s = 1 weighted up.
        system = np.vstack([np.hstack([units.T, dq[:, None]]), 1e3 * np.array([[1.0] * K + [0.0]])])
        multipliers = np.linalg.lstsq(system, np.append(-found.x[1:], 1e3), rcond=None)[0]
        constrained += multipliers[-1] > 1e-3
        shares = shares + t**-0.75 * (multipliers[:K] - shares)
        nu = max(shares @ (rho - units @ dq / square), 0)
        d = shares @ units + nu * dq
        a, w = a + adam.step(d[:K]), w - RATE * d[K:]
        np.testing.assert_allclose(lam, sigma, rtol=1e-5)
        np.testing.assert_allclose(at, w, rtol=2e-4, atol=2e-4)
    assert state.fallbacks == 0
    assert 0 < constrained < STEPS


def test_forum_shares_out_one_whole_among_those_present():
    training, tx, w = losses_fn(MINIMA), mtl.forum(K), jnp.array(START, jnp.float32)
    given = {"losses_fn": training, "validation_fn": losses_fn(HELD_OUT)}
    _, jac = mtl.value_and_jac(training)(w)
    update = jax.jit(lambda state, present: tx.update(jac, state, w, present=present, **given)[1])
    state = tx.init(w)
    for present in ([True, True, True], [True, False, True], [False, True, True], [True] * 3):
        state = update(state, jnp.array(present))
        np.testing.assert_allclose(sum(np.where(present, state.shares, 0)), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("between", "mu", "bounds"), [("losses", 0.1, (0.2, 0.8)), ("weighted", 0.05, (0.0, 1.0))]
)
def test_ldc_mtl_descends_the_total_of_the_authors_scripts(between, mu, bounds):
    """That of Cityscapes, and that of NYU-v2; the router's gradient by central differences."""
    features, loss = RNG.normal(size=(4, 5, 2)), np.array([0.9, 2.5, 0.4])
    tx = mtl.scale_by_ldc_mtl(
        K, discrepancy=mu, between=between, num_features=2, bounds=bounds,
        optimizer=optax.sgd(0.5),
    )  # fmt: skip
    update = jax.jit(
        lambda state, h, loss: tx.update(jnp.eye(K), state, losses=loss, features=h)[1]
    )
    state, router = tx.init(None), np.zeros((K, 3))

    def total(router, loss, h):
        shares = np.clip(softmax(router @ np.append(h, 1)), *bounds)
        u = shares * loss if between == "weighted" else loss
        return shares @ loss + mu * np.sum(np.abs(u[:-1] - u[1:]))

    def slope(fn, x):
        out = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            e = np.zeros_like(x)
            e[i] = 1e-6
            out[i] = (fn(x + e) - fn(x - e)) / 2e-6
        return out

    for batch in features:
        state = update(state, jnp.float32(batch), jnp.float32(loss))
        h = np.mean(batch, axis=0)
        wanted = slope(lambda x, r=router, h=h: total(r, x, h), loss)
        np.testing.assert_allclose(state.weights, wanted, rtol=2e-5, atol=1e-6)
        router = router - 0.5 * slope(lambda r, h=h, x=loss: total(r, x, h), router)
        np.testing.assert_allclose(state.router, router, rtol=1e-4, atol=1e-6)
        loss = loss * [0.7, 0.9, 1.2]


def test_what_is_missing_is_named():
    w, rows, losses = jnp.zeros(2), jnp.eye(2), jnp.ones(2)
    for tx in (mtl.auto_lambda(2), mtl.moml(2), mtl.forum(2)):
        with pytest.raises(
            TypeError, match=r"got (validation|losses)_fn=None .* expected a function"
        ):
            tx.update(rows, tx.init(w), w, losses=losses)
    tx = mtl.auto_lambda(2)
    with pytest.raises(TypeError, match="params of type NoneType"):
        tx.update(rows, tx.init(w), losses=losses, validation_fn=lambda w: list(w))
    with pytest.raises(ValueError, match="expected those of the tasks"):
        tx.update(rows, tx.init(w), w, losses=losses, validation_fn=lambda w: [w[0]])
    _, jac = mtl.value_and_jac(lambda w: {"buy": w[0], "click": w[1]})(w)
    with pytest.raises(ValueError, match=r"\('a_click', 'buy'\), expected those of .*'click'\)"):
        tx.update(jac, tx.init(w), w, validation_fn=lambda w: {"a_click": w[1], "buy": w[0]})
    _, by_place = tx.update(jac, tx.init(w), w, validation_fn=lambda w: [w[0], w[1]])
    assert np.all(np.isfinite(by_place[0].weights))
    tx = mtl.ldc_mtl(2, num_features=3)
    with pytest.raises(TypeError, match="got no features="):
        tx.update(rows, tx.init(w), w, losses=losses)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 3\)"):
        tx.update(rows, tx.init(w), w, losses=losses, features=jnp.ones((5, 2)))
    with pytest.raises(
        ValueError, match=r"bounds=\[0\.8 0\.2\], expected two numbers in ascending"
    ):
        mtl.ldc_mtl(2, bounds=(0.8, 0.2))


def test_a_module_and_its_optimizer_rest_between_refreshes():
    """The function gets the state that the optimizer has; held weights keep its structure."""

    def task_losses(model, x):
        return {"a": jnp.mean(model(x) ** 2), "b": jnp.mean((model(x) - 1) ** 2)}

    @nnx.jit
    def step(model, optimizer, x):
        _, jac = mtl.value_and_jac(task_losses)(model, x)
        graph, _ = nnx.split(model)
        validation = lambda params: task_losses(nnx.merge(graph, params), x)  # noqa: E731
        optimizer.update(model, jac, validation_fn=validation)

    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    before = task_losses(model, jnp.ones((1, 3)))
    tx = optax.chain(mtl.every(2, mtl.auto_lambda(2, primary=[1.0, 0.0])), optax.sgd(0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        step(model, optimizer, jnp.ones((1, 3)))
    after = task_losses(model, jnp.ones((1, 3)))
    assert after["a"] + after["b"] < before["a"] + before["b"]


def test_the_trial_step_reaches_heads_and_frozen_parameters_stay():
    """An auxiliary task gains weight by what its gradient does through the trunk."""
    params = {"trunk": jnp.array([1.0, -2.0]), "a": jnp.array(0.5), "b": jnp.array(2.0)}

    def task_losses(p, y):
        h = jnp.sum(jnp.tanh(p["trunk"]))
        return {"a": (p["a"] * h - y) ** 2, "b": (p["b"] * h + 1.0) ** 2}

    tx = mtl.scale_by_auto_lambda(2, primary=[1.0, 0.0], optimizer=optax.sgd(1.0))
    wrt = {"trunk": True, "a": True, "b": False}
    validation = lambda p: task_losses(p, 1.3)  # noqa: E731

    @jax.jit
    def update(params):
        _, jac = mtl.value_and_jac(task_losses, wrt=wrt)(params, 1.0)
        return tx.update(jac, tx.init(params), params, validation_fn=validation)[1]

    state = update(params)

    def after(weights):  # differentiated twice, as it is written in the paper
        def train(p):
            losses = task_losses(p, 1.0)
            return weights[0] * losses["a"] + weights[1] * losses["b"]

        slopes = jax.grad(train)(params) | {"b": jnp.array(0.0)}
        ahead = jax.tree.map(lambda p, g: p - 0.1 * g, params, slopes)
        return validation(ahead)["a"]

    expected = 0.1 - jax.grad(after)(jnp.full(2, 0.1))
    np.testing.assert_allclose(state.weights, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["auto_lambda", "forum", "moml"])
def test_what_is_frozen_stays_and_has_no_say_whatever_its_type(name):
    params = {"w": jnp.array([0.5, 1.0]), "target": jnp.array(2.0), "step": jnp.array(3)}
    wrt = {"w": True, "target": False, "step": False}

    def task_losses(p):
        return {"a": jnp.sum((p["w"] - p["target"]) ** 2), "b": jnp.sum((p["w"] - 3) ** 2)}

    def of_the_rest(w):
        return task_losses(params | {"w": w})

    def updated(losses_fn, params, **options):
        tx = mtl.make(name, 2)
        _, jac = mtl.value_and_jac(losses_fn, **options)(params)
        more = {"losses_fn": losses_fn, "validation_fn": losses_fn}
        return tx.update(jac, tx.init(params), params, **more)[0]

    got, expected = jax.jit(
        lambda: (updated(task_losses, params, wrt=wrt), updated(of_the_rest, params["w"]))
    )()
    np.testing.assert_allclose(got["w"], expected, rtol=1e-6)
    assert got["target"] == got["step"] == 0
    assert got["step"].dtype == jnp.int32


def test_an_auxiliary_task_that_is_nan_on_the_other_batch_has_no_say():
    w = jnp.zeros(2)

    def task_losses(w, factor=1.0):
        return {"main": jnp.sum((w - 1) ** 2), "other": factor * jnp.sum((w - 3) ** 2)}

    tx = mtl.scale_by_auto_lambda(2, primary={"main": 1.0, "other": 0.0})
    _, jac = mtl.value_and_jac(task_losses)(w)
    good, bad = (
        tx.update(jac, tx.init(w), w, validation_fn=lambda w, f=f: task_losses(w, f))[1].weights
        for f in (1.0, jnp.nan)
    )
    assert np.all(good > 0.1)
    np.testing.assert_allclose(bad, good, rtol=1e-6)
