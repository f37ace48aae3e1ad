import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_optax.metrics import delta_m


@pytest.mark.parametrize(
    ("metrics", "baseline", "higher_is_better", "expected"),
    [
        ([0.9, 0.8], [0.9, 0.8], True, 0.0),
        ([0.99, 0.72], [0.9, 0.8], True, 0.0),  # +10 % and -10 %
        ([0.99, 0.88], [0.9, 0.8], True, 10.0),
        ([0.18], [0.2], False, 10.0),  # an error that falls by a tenth
        ([0.99, 0.22], [0.9, 0.2], (True, False), 0.0),
        ([-0.5], [-1.0], True, 50.0),  # a negative R² that rises is a gain
        ([[0.99, 0.8], [0.9, 0.4]], [0.9, 0.8], True, [5.0, -25.0]),
        ([[0.99, 0.8], [0.5, 0.5]], [[0.9, 0.8], [0.4, 0.5]], True, [5.0, 12.5]),
    ],
)
def test_delta_m_by_hand(metrics, baseline, higher_is_better, expected):
    actual = jax.jit(lambda m, b: delta_m(m, b, higher_is_better=higher_is_better))(
        jnp.asarray(metrics), jnp.asarray(baseline)
    )
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_delta_m_keeps_leading_axes_and_vmaps():
    metrics = jnp.linspace(0.5, 0.9, 24).reshape(2, 3, 4)
    baseline = jnp.array([0.6, 0.7, 0.8, 0.9])
    whole = delta_m(metrics, baseline)
    assert whole.shape == (2, 3)
    mapped = jax.vmap(jax.vmap(lambda m: delta_m(m, baseline)))(metrics)
    np.testing.assert_allclose(whole, mapped, rtol=1e-5)


@pytest.mark.parametrize(
    ("metrics", "baseline", "higher_is_better", "message"),
    [
        (0.9, 0.8, True, "last axis"),
        ([], [], True, "last axis"),
        ([0.9, 0.8], [0.9], True, r"expected \(2,\)"),
        ([[0.9, 0.8]] * 3, [[0.9], [0.8], [0.7]], True, r"expected \(2,\)"),
        ([0.9, 0.8], [0.9, 0.8], [True], "2 of them"),
        ([0.9, 0.8], [0.9, 0.8], [1, -1], "2 of them"),
    ],
)
def test_delta_m_says_what_does_not_fit(metrics, baseline, higher_is_better, message):
    with pytest.raises(ValueError, match=message):
        delta_m(metrics, baseline, higher_is_better=higher_is_better)
