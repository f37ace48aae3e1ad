"""Task priority inside a loss, and the indicators of performance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl
from mtl_optax.losses import accuracy, share_within, task_priority


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_gradient_has_the_part_of_the_kpi(gamma):
    """L = w² with κ = 1 - w / 4 at w = 1: the derivative by hand, and what a balancer leaves."""
    w, kappa = 1.0, 0.75
    value, slope = jax.value_and_grad(lambda w: task_priority(1 - w / 4, gamma) * w**2)(w)
    priority = -((1 - kappa) ** gamma) * np.log(kappa)
    of_kpi = gamma * (1 - kappa) ** (gamma - 1) * np.log(kappa) - (1 - kappa) ** gamma / kappa
    np.testing.assert_allclose(value, priority, rtol=1e-5)
    np.testing.assert_allclose(slope, priority * 2 * w + w**2 * of_kpi * -1 / 4, rtol=1e-5)

    _, jac = mtl.value_and_jac(lambda w: [w**2])(w)
    tx = mtl.dtp(1, gamma=gamma)
    update, _ = tx.update(jac, tx.init(w), kpis=[jnp.float32(kappa)])
    np.testing.assert_allclose(update, priority * 2 * w, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
def test_finite_at_the_ends(gamma):
    ends = jnp.array([0.0, 1.0, -1.0, 2.0])
    values, slopes = jax.vmap(jax.value_and_grad(lambda k: task_priority(k, gamma)))(ends)
    assert np.isfinite(values).all()
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(values[1], 0, atol=1e-5)
    # The largest number below 1 of a narrow type is further from it than the ends are.
    narrow = ends[1].astype(jnp.bfloat16)
    assert np.isfinite(jax.grad(lambda k: task_priority(k, gamma))(narrow))
    for wrong in (-1.0, np.nan):
        with pytest.raises(ValueError, match=f"gamma={wrong}, expected at least 0"):
            task_priority(0.5, wrong)


def test_indicators_count():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5, 3)), rng.integers(0, 3, size=(4, 5))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = np.take_along_axis(p, labels[..., None], -1)
    np.testing.assert_allclose(accuracy(logits, labels), (logits.argmax(-1) == labels).mean())
    np.testing.assert_allclose(accuracy(logits, labels, soft=True), right.mean(), rtol=1e-6)
    errors = rng.normal(size=20)
    np.testing.assert_allclose(share_within(errors, 0.7), (abs(errors) <= 0.7).mean(), rtol=1e-6)
    sigmoids = 1 / (1 + np.exp((abs(errors) - 0.7) / 0.2))
    np.testing.assert_allclose(share_within(errors, 0.7, softness=0.2), sigmoids.mean(), rtol=1e-6)
    assert accuracy(jnp.ones((2, 3), jnp.bfloat16), jnp.zeros(2, int)).dtype == jnp.float32
    # Votes and differences of counts are integers.
    assert accuracy(jnp.array([[2, 0], [3, 1]]), jnp.array([0, 1])) == 0.5
    assert accuracy(jnp.array([[jnp.nan] * 2, [3, 1]]), jnp.array([0, 0])) == 0.5
    assert share_within(jnp.array([1, -5]), 2) == 0.5


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"labels have shape \(2, 3\)"):
        accuracy(jnp.ones((2, 3)), jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match="tolerance=0"):
        share_within(jnp.ones(2), 0.0)
    with pytest.raises(ValueError, match="softness=-1"):
        share_within(jnp.ones(2), 1.0, softness=-1.0)
    with pytest.raises(TypeError, match="softness is traced, expected a Python number"):
        jax.jit(lambda s: share_within(jnp.ones(2), 1.0, softness=s))(0.1)
    with pytest.raises(TypeError, match="soft is traced"):
        jax.jit(lambda s: accuracy(jnp.ones((2, 3)), jnp.zeros(2, int), soft=s))(True)
