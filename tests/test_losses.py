"""Focal losses: closed forms, limits, gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_optax import losses

# jax < 0.8 has it under another name.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(6, 4)) * 2
LABELS = rng.integers(0, 4, size=6)


def focal_by_hand(logits, labels, gamma, alpha=1.0):
    """The closed form in float64, term by term."""
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[np.arange(len(labels)), labels]
    return -np.broadcast_to(alpha, (z.shape[-1],))[labels] * (1 - p) ** gamma * np.log(p)


def regression_by_hand(errors, gamma):
    return errors**gamma * -np.log(1 - errors)


def central_difference(f, x, step=1e-6):
    """Gradient of a sum, entry by entry, in float64."""
    grad = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        grad[index] = (np.sum(f(up)) - np.sum(f(down))) / (2 * step)
    return grad


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [1.0, 0.25, np.array([0.1, 1.0, 2.0, 0.5])], ids=str)
def test_softmax_focal_loss_equals_the_closed_form(gamma, alpha):
    got = losses.softmax_focal_loss(jnp.asarray(LOGITS), LABELS, gamma=gamma, alpha=alpha)
    assert got.shape == (6,)
    np.testing.assert_allclose(got, focal_by_hand(LOGITS, LABELS, gamma, alpha), rtol=2e-5)


def test_softmax_focal_loss_golden_value():
    # p = 1/2 and gamma = 2: (1/2)^2 ln 2.
    got = losses.softmax_focal_loss(jnp.zeros((1, 2)), jnp.array([0]))
    np.testing.assert_allclose(got, [0.25 * np.log(2.0)], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gamma_zero_is_exactly_cross_entropy(dtype):
    logits = jnp.asarray(np.concatenate([LOGITS[:3], LOGITS[3:] * 1e4]), dtype)

    def reference(z, labels):
        wide = z.astype(jnp.float32)
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(wide, labels)
        return loss.astype(dtype)

    def value_and_grad(f):
        return jax.jit(jax.value_and_grad(lambda z: f(z).sum()))(logits)

    got = value_and_grad(lambda z: losses.softmax_focal_loss(z, LABELS, gamma=0.0))
    expected = value_and_grad(lambda z: reference(z, LABELS))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_two_classes_equal_the_sigmoid_focal_loss_of_optax(gamma, alpha):
    logits, labels = jnp.asarray(LOGITS[:, :2], jnp.float32), jnp.asarray(LABELS % 2)
    expected = optax.losses.sigmoid_focal_loss(
        logits[:, 1] - logits[:, 0], labels.astype(jnp.float32), alpha=alpha, gamma=gamma
    )
    per_class = 1.0 if alpha is None else jnp.array([1 - alpha, alpha])
    got = losses.softmax_focal_loss(logits, labels, gamma=gamma, alpha=per_class)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gradients_equal_finite_differences():
    errors = np.array([1e-3, 0.2, 0.5, 0.9, 0.99])

    @jax.jit
    def grads(logits, errors, gamma):
        return (
            jax.grad(lambda z: losses.softmax_focal_loss(z, LABELS, gamma=gamma).sum())(logits),
            jax.grad(lambda e: losses.regression_focal_loss(e, gamma=gamma).sum())(errors),
        )

    for gamma in GAMMAS:
        with enable_x64(True):
            classification, regression = grads(LOGITS, errors, gamma)
        assert classification.dtype == regression.dtype == jnp.float64
        expected = central_difference(lambda z, g=gamma: focal_by_hand(z, LABELS, g), LOGITS)
        np.testing.assert_allclose(classification, expected, rtol=1e-6, atol=1e-8)
        expected = central_difference(lambda e, g=gamma: regression_by_hand(e, g), errors)
        np.testing.assert_allclose(regression, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_softmax_focal_loss_is_finite_at_the_extremes(dtype):
    extremes = [
        [1e4, -1e4, 0],
        [-1e4, 1e4, 0],
        [1e4, 1e4, 1e4],
        [-1e4] * 3,
        [30, 0, 0],
        [-30, 0, 0],
    ]
    logits = jnp.asarray(extremes, dtype)
    labels = jnp.zeros(len(logits), jnp.int32)

    @jax.jit
    def value_and_grad(gamma):
        def total(z):
            values = losses.softmax_focal_loss(z, labels, gamma=gamma)
            return values.sum(), values

        return jax.value_and_grad(total, has_aux=True)(logits)

    for gamma in (0.0, 1e-3, 0.5, 1.0, 2.0, 5.0):
        (_, values), grads = value_and_grad(gamma)
        assert values.dtype == grads.dtype == dtype
        assert np.isfinite(np.asarray(values, np.float32)).all()
        assert np.isfinite(np.asarray(grads, np.float32)).all()
        # p = 1 costs nothing; p = 0 costs the whole margin and keeps its gradient.
        assert values[0] == 0
        np.testing.assert_allclose(float(values[1]), 2e4, rtol=1e-2)
        np.testing.assert_allclose(np.asarray(grads[1], np.float32), [-1, 1, 0], atol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 1000.0])
def test_losses_beyond_the_dtype_stay_at_its_bound_and_keep_their_gradient(dtype, gamma):
    largest = float(jnp.finfo(dtype).max)
    logits = jnp.asarray([[largest, -largest, 0], [-largest, largest, 0], [0, 1, 0]], dtype)
    errors = jnp.asarray([largest, 60000.0, 2.0], dtype)

    @jax.jit
    def value_and_grad(logits, errors):
        def total(logits, errors):
            right = losses.softmax_focal_loss(logits, jnp.zeros(3, int), gamma=gamma)
            near = losses.regression_focal_loss(errors, gamma=gamma)
            every = jnp.concatenate([right, near]).astype(jnp.float32)
            return jnp.sum(every), (right, near)

        return jax.grad(total, (0, 1), has_aux=True)(logits, errors)

    (slopes, of_errors), (right, near) = value_and_grad(logits, errors)
    for values in (slopes, of_errors, right, near):
        assert values.dtype == dtype
        assert np.isfinite(np.asarray(values, np.float32)).all()
    # A loss of 2 × largest is beyond float16; in the others the logits stay at the root.
    root = float(jnp.sqrt(jnp.finfo(jnp.float32).max))
    expected = largest if dtype == jnp.float16 else 2 * root
    np.testing.assert_allclose(np.asarray(right, np.float32)[:2], [0, expected], rtol=1e-2)
    np.testing.assert_allclose(np.asarray(slopes[1], np.float32), [-1, 1, 0], atol=1e-6)
    bound = largest if dtype == jnp.float16 else float(jnp.finfo(jnp.float32).max) / 2
    np.testing.assert_allclose(np.asarray(near[0], np.float32), bound, rtol=1e-2)
    np.testing.assert_allclose(np.asarray(of_errors, np.float32), np.full(3, 1000.0), rtol=1e-2)


@pytest.mark.parametrize("logits", [[3.0], [3.0, -np.inf]], ids=["one class", "masked class"])
def test_softmax_focal_loss_is_zero_when_only_one_class_is_possible(logits):
    @jax.jit
    def value_and_grad(gamma):
        f = lambda z: losses.softmax_focal_loss(z, jnp.array(0), gamma=gamma)  # noqa: E731
        return jax.value_and_grad(f)(jnp.array(logits))

    for gamma in (0.0, 0.5, 2.0):
        value, grad = value_and_grad(gamma)
        assert value == 0
        np.testing.assert_array_equal(grad, np.zeros(len(logits)))


def test_softmax_focal_loss_takes_any_batch_shape_and_transformations():
    logits, labels = LOGITS.reshape(2, 3, 4), LABELS.reshape(2, 3).astype(np.uint8)
    batched = jax.jit(losses.softmax_focal_loss)(logits, labels)
    np.testing.assert_allclose(batched.ravel(), focal_by_hand(LOGITS, LABELS, 2.0), rtol=2e-5)

    def one(logits, label, gamma):
        return losses.softmax_focal_loss(logits, label, gamma=gamma)

    over_gammas = jax.jit(jax.vmap(jax.vmap(one, (0, 0, None)), (None, None, 0)))
    for gamma, row in zip(GAMMAS, over_gammas(LOGITS, LABELS, jnp.array(GAMMAS)), strict=True):
        np.testing.assert_allclose(row, focal_by_hand(LOGITS, LABELS, gamma), rtol=2e-5)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_regression_focal_loss_equals_the_closed_form(gamma):
    errors = np.array([[0.0, 1e-6, 0.1], [0.5, 0.9, 0.998]])
    got = losses.regression_focal_loss(jnp.asarray(errors), gamma=gamma)
    np.testing.assert_allclose(got, regression_by_hand(errors, gamma), rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(got, losses.regression_focal_loss(-errors, gamma=gamma))


@pytest.mark.parametrize("base", [optax.losses.l2_loss, optax.losses.huber_loss, jnp.abs])
def test_regression_focal_loss_weights_any_base_loss(base):
    errors = jnp.array([0.0, 0.3, 1.0, 1.7])
    got = losses.regression_focal_loss(errors, gamma=2.0, base=base)
    np.testing.assert_allclose(got, np.minimum(errors, 1) ** 2 * base(errors), rtol=1e-6)
    unfocused = losses.regression_focal_loss(errors, gamma=0.0, base=base)
    np.testing.assert_array_equal(unfocused, base(errors))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_regression_focal_loss_is_finite_everywhere_and_increases(dtype):
    errors = jnp.asarray([0.0, 1e-30, 1e-6, 0.5, 0.99, 1.0, 1.5, 1e3], dtype)

    @jax.jit
    def value_and_grad(gamma):
        def total(errors):
            values = losses.regression_focal_loss(errors, gamma=gamma)
            return values.sum(), values

        return jax.value_and_grad(total, has_aux=True)(errors)

    for gamma in (0.0, 1e-2, 0.5, 1.0, 2.0):
        (_, values), grads = value_and_grad(gamma)
        assert values.dtype == grads.dtype == dtype
        values, grads = np.asarray(values, np.float32), np.asarray(grads, np.float32)
        assert np.isfinite(values).all()
        assert np.isfinite(grads).all()
        assert (np.diff(values) >= 0).all()
        assert (grads[3:] > 0).all()  # the worst examples keep their gradient


def test_regression_focal_loss_tangent_joins_smoothly():
    grad = jax.jit(jax.vmap(jax.grad(losses.regression_focal_loss)))
    below, above = grad(jnp.array([0.998999, 0.999001]))
    np.testing.assert_allclose(below, above, rtol=5e-3)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"labels": jnp.zeros(2)}, "labels have dtype float32.*argmax.*sigmoid_focal_loss"),
        ({"labels": jnp.zeros((2, 1), int)}, r"labels have shape \(2, 1\), expected \(2,\)"),
        ({"logits": jnp.zeros((2, 3), int)}, "logits have shape .* dtype int32, expected floating"),
        ({"logits": jnp.zeros(())}, r"logits have shape \(\)"),
        ({"gamma": -1.0}, "gamma=-1.0, expected at least 0"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"gamma": jnp.ones(3)}, r"gamma has shape \(3,\), expected a scalar"),
        ({"alpha": jnp.ones(2)}, r"alpha has shape \(2,\), expected a scalar or .* \(3,\)"),
    ],
)
def test_softmax_focal_loss_says_what_is_wrong(kwargs, match):
    good = {"logits": jnp.zeros((2, 3)), "labels": jnp.zeros(2, int)}
    with pytest.raises(ValueError, match=match):
        losses.softmax_focal_loss(**good | kwargs)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"errors": jnp.zeros(2, int)}, "errors have dtype int32, expected floating"),
        ({"gamma": -0.5}, "gamma=-0.5"),
        ({"base": "l3"}, "base is 'l3', expected 'log' or an elementwise function"),
        ({"base": jnp.mean}, r"base returned shape \(\) for errors of shape \(2,\)"),
    ],
)
def test_regression_focal_loss_says_what_is_wrong(kwargs, match):
    with pytest.raises(ValueError, match=match):
        losses.regression_focal_loss(**{"errors": jnp.zeros(2)} | kwargs)
