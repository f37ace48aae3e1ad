"""Weights of points: the papers' rules over several steps, by hand in float64."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import mtl_optax as mtl
from mtl_optax import losses

rng = np.random.default_rng(0)
# Five steps of two terms: 4 points of an equation, 2 × 3 residuals at a boundary.
STEPS = [{"edge": rng.normal(size=(2, 3)), "pde": 9 * rng.normal(size=4)} for _ in range(5)]


def rba_by_hand(steps, gamma=0.9, eta=0.05):
    weights, lam = [], {k: np.zeros_like(r) for k, r in steps[0].items()}
    for r in steps:
        for k in lam:
            lam[k] = gamma * lam[k] + eta * np.abs(r[k]) / np.abs(r[k]).max()
        weights.append({k: v**2 for k, v in lam.items()})
    return weights


def self_adaptive_by_hand(steps, lr=5e-3, b1=0.9, b2=0.999, eps=1e-8):
    """Ascent on mean (λ r)², by Adam written out."""
    weights = []
    lam = {k: np.ones_like(r) for k, r in steps[0].items()}
    m, v = ({k: np.zeros_like(r) for k, r in lam.items()} for _ in range(2))
    for t, r in enumerate(steps, 1):
        weights.append({k: x**2 for k, x in lam.items()})
        for k in lam:
            up = 2 * lam[k] * r[k] ** 2 / r[k].size
            m[k] = b1 * m[k] + (1 - b1) * up
            v[k] = b2 * v[k] + (1 - b2) * up**2
            lam[k] = lam[k] + lr * (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
    return weights


def brdr_by_hand(steps, beta_c=0.9, beta_w=0.8):
    weights, w = [], {k: np.ones_like(r) for k, r in steps[0].items()}
    fourth = {k: np.zeros_like(r) for k, r in w.items()}
    for t, r in enumerate(steps, 1):
        fourth = {k: beta_c * f + (1 - beta_c) * r[k] ** 4 for k, f in fourth.items()}
        rate = {k: r[k] ** 2 / np.sqrt(f / (1 - beta_c**t)) for k, f in fourth.items()}
        mean = np.mean(np.concatenate([x.ravel() for x in rate.values()]))
        w = {k: beta_w * w[k] + (1 - beta_w) * rate[k] / mean for k in w}
        weights.append(w)
    return weights


RULES = {
    "rba": (losses.rba(decay=0.9, learning_rate=0.05), rba_by_hand),
    "self_adaptive": (losses.self_adaptive(), self_adaptive_by_hand),
    "brdr": (losses.brdr(decay=0.8, residual_decay=0.9), brdr_by_hand),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_follows_the_paper_step_by_step(name):
    rule, by_hand = RULES[name]
    steps = jax.tree.map(lambda *r: jnp.asarray(np.stack(r), jnp.float32), *STEPS)
    state = rule.init(jax.eval_shape(lambda: jax.tree.map(lambda r: r[0], steps)))

    def scan(steps):
        return jax.lax.scan(lambda state, r: rule.update(r, state)[::-1], state, steps)[1]

    # Two runs at once; the second sees the residuals a million times smaller.
    runs = jax.jit(jax.vmap(scan))(jax.tree.map(lambda r: jnp.stack([r, 1e-6 * r]), steps))
    expected = jax.tree.map(lambda *w: np.stack(w), *by_hand(STEPS))
    for term, weights in runs.items():
        assert_allclose(weights[0], expected[term], rtol=2e-5)
        if name != "self_adaptive":  # Adam's epsilon has a unit
            assert_allclose(weights[1], expected[term], rtol=2e-5)


@pytest.mark.parametrize("name", RULES)
def test_weights_are_constants_and_the_state_goes_through_aux(name):
    rule, by_hand = RULES[name]
    x = jnp.linspace(0.5, 2.0, 4)
    tx = optax.chain(mtl.sum_tasks(), optax.sgd(0.1))

    @jax.checkpoint
    def task_losses(w, state):
        residuals = w * x - x**2
        weights, state = rule.update(residuals, state)
        return {"pde": jnp.mean(weights * residuals**2), "edge": (w - 1) ** 2}, state

    def step(carry, _):
        w, state = carry
        (_, state), jac = mtl.value_and_jac(task_losses, has_aux=True)(w, state)
        update, _ = tx.update(jac, tx.init(w), w)
        return (w + update, state), w

    state = pickle.loads(pickle.dumps(rule.init(x)))
    w = np.asarray(jax.jit(lambda s: jax.lax.scan(step, (0.0, s), length=4)[1])(state), float)
    X = np.asarray(x, float)
    weights = [p["pde"] for p in by_hand([{"pde": v * X - X**2} for v in w])]
    for v, weight, after in zip(w, weights, w[1:], strict=False):
        slope = np.mean(2 * weight * (v * X - X**2) * X) + 2 * (v - 1)
        assert_allclose(after, v - 0.1 * slope, rtol=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_broken_and_vanishing_residuals_leave_the_others_alone(name):
    rule, _ = RULES[name]
    state = rule.init(jnp.zeros(3, jnp.bfloat16))
    for residuals in (
        [jnp.nan, 1.0, 0.0],
        [0.0, 0.0, 0.0],
        [jnp.inf, 2.0, 1e8],
        [3e38, 1.0, 1e20],  # whose squares are infinite
        [1.0, 1.0, 1.0],
    ):
        weights, state = rule.update(jnp.asarray(residuals, jnp.bfloat16), state)
        assert weights.dtype == jnp.bfloat16
        assert jnp.all(jnp.isfinite(weights)), residuals
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    with pytest.raises(ValueError, match=r"shapes \(1,\), expected \(3,\), of those that init saw"):
        rule.update(jnp.ones(1), state)


def test_self_adaptive_takes_any_mask_and_start():
    rule = losses.self_adaptive(
        optimizer=optax.sgd(0.5), mask=jax.nn.sigmoid, initial=jnp.array([0.0, 1.0])
    )
    residuals = jnp.array([1.0, 2.0])
    weights, state = rule.update(residuals, rule.init(residuals))
    s = 1 / (1 + np.exp(-np.array([0.0, 1.0])))
    assert_allclose(weights, s, rtol=1e-6)
    up = s * (1 - s) * np.array([1.0, 4.0]) / 2
    assert_allclose(state.multipliers, np.array([0.0, 1.0]) + 0.5 * up, rtol=1e-6)


def test_causal_weights_wait_for_what_comes_before():
    chunks = jnp.array([[0.5, 1.0, 0.25], [2.0, jnp.inf, 1.0]])
    got = losses.causal_weights(chunks, tolerance=2.0)
    assert_allclose(got, [[1, np.exp(-1), np.exp(-3)], [1, np.exp(-4), 0]], rtol=1e-6)
    # Of integers, and where the steps of a narrow type are wider than a loss.
    assert_allclose(losses.causal_weights([1, 2, 3]), np.exp([0.0, -1.0, -3.0]), rtol=1e-6)
    narrow = jnp.full(400, 2.0**-7, jnp.bfloat16)
    assert_allclose(losses.causal_weights(narrow)[-1], np.exp(-399 * 2.0**-7), rtol=2.0**-8)
    assert losses.causal_weights(chunks[1], tolerance=0.0).tolist() == [1, 1, 1]
    # Constants under differentiation.
    slope = jax.grad(lambda c: jnp.sum(losses.causal_weights(c, tolerance=2.0) * c))(chunks[0])
    assert_allclose(slope, got[0], rtol=1e-6)


def test_mistakes_say_what_is_wrong():
    with pytest.raises(TypeError, match="residuals have dtype int32, expected floating"):
        losses.rba().update(jnp.ones(2, int), losses.rba().init(jnp.ones(2)))
    for make in (losses.rba, losses.brdr, losses.self_adaptive):
        with pytest.raises(TypeError, match="residuals have dtype int32, expected floating"):
            make().init({"pde": jnp.ones(2, int)})
    with pytest.raises(ValueError, match=r"decay=1\.5, expected in \[0, 1\]"):
        losses.rba(decay=1.5)
    with pytest.raises(ValueError, match="residual_decay=1, expected in \\[0, 1\\)"):
        losses.brdr(residual_decay=1)
    residuals = {"bc": jnp.ones(2), "pde": jnp.ones(3)}
    for make in (losses.rba, losses.self_adaptive):
        for initial in ({"pde": 1.0}, jnp.ones(3), {"bc": jnp.ones(3), "pde": 1.0}, [1.0, 1.0]):
            expected = r"expected \{'bc': \(2,\), 'pde': \(3,\)\}, those of the residuals"
            with pytest.raises(ValueError, match=expected):
                make(initial=initial).init(residuals)
    start = losses.rba(initial={"bc": 2.0, "pde": jnp.arange(3.0)}).init(residuals).multipliers
    assert jax.tree.map(lambda m: m.tolist(), start) == {"bc": [2.0, 2.0], "pde": [0.0, 1.0, 2.0]}
    with pytest.raises(ValueError, match=r"tolerance=-1\.0, expected at least 0"):
        losses.causal_weights(jnp.ones(2), tolerance=-1.0)
    with pytest.raises(ValueError, match=r"losses is a scalar, expected \(\.\.\., C\)"):
        losses.causal_weights(0.3)
