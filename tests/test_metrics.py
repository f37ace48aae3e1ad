import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_optax.metrics import (
    affinity,
    delta_m,
    hypervolume,
    igd,
    mean_rank,
    non_dominated,
    spacing,
)


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


@pytest.mark.parametrize(
    ("metrics", "higher_is_better", "expected"),
    [
        ([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], True, [2, 2, 2]),
        ([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], (True, False), [1, 2, 3]),
        ([[0.5], [0.5], [0.4], [0.5]], True, [2, 2, 4, 2]),  # three share 1, 2 and 3
        ([[0.5], [np.nan], [0.4]], False, [2, 3, 1]),
        ([[-np.inf], [np.nan], [0.4], [np.nan]], True, [2, 3.5, 1, 3.5]),
        ([[[1.0], [5.0]], [[2.0], [4.0]]], True, [[2, 1], [1, 2]]),  # two seeds
        ([[0.3, 0.4]], True, [1]),
    ],
)
def test_mean_rank_by_hand(metrics, higher_is_better, expected):
    np.testing.assert_allclose(mean_rank(metrics, higher_is_better=higher_is_better), expected)


@pytest.mark.parametrize(
    ("points", "reference", "higher_is_better", "expected"),
    [
        ([[2.0, 3.0]], [0.0, 1.0], True, 4),
        ([[3, 1], [1, 2], [1, 1]], [0.0, 0.0], True, 4),  # the third is dominated
        ([[3, 1], [3, 1]], [0.0, 0.0], True, 3),
        ([[5, -1], [1, 2], [np.nan, 9]], [0.0, 0.0], True, 2),  # outside, and no number
        ([[0.2, 0.9]], [0.5, 0.5], (False, True), 0.12),
        ([[1.0], [4.0]], [1.0], True, 3),
        # Infinitely better than the reference in one task, and in another at least better.
        ([[-np.inf, 1], [0, 0]], [2.0, 2.0], False, np.inf),
        ([[1, np.inf], [2, np.inf]], [0.0, 0.0], True, np.inf),
        ([[1, 1, 1], [np.inf, 1, 1], [np.inf, 1, 1]], [0.0, 0.0, 0.0], True, np.inf),
        ([[-np.inf, 2], [0, 0]], [2.0, 2.0], False, 4),  # no better in the other
        ([[np.inf, 0], [-np.inf, np.inf], [0, 0]], [2.0, 2.0], False, 4),
        ([[1e30, 1e30, 1], [1e30, 1e30, 1]], [0.0, 0.0, 0.0], True, np.inf),  # beyond float32
        # Boxes 2x2x1, 1x2x2 and 2x1x2 share 1x1x1 in threes: 12 - (2 + 2 + 2) + 1.
        ([[2, 2, 1], [1, 2, 2], [2, 1, 2]], [0.0, 0.0, 0.0], True, 7),
    ],
)
def test_hypervolume_by_hand(points, reference, higher_is_better, expected):
    actual = hypervolume(points, reference, higher_is_better=higher_is_better)
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_hypervolume_is_the_share_of_random_points_below_the_front():
    rng = np.random.default_rng(0)
    points, draws = rng.random((6, 4)), rng.random((200_000, 4))
    share = np.mean(np.any(np.all(draws[:, None] < points, axis=2), axis=1))
    assert float(hypervolume(points, np.zeros(4))) == pytest.approx(share, abs=0.004)


@pytest.mark.parametrize(
    ("points", "higher_is_better", "expected"),
    [
        ([[3, 1], [1, 2], [1, 1]], True, [1, 1, 0]),
        ([[3, 1], [1, 2], [1, 1]], False, [0, 0, 1]),
        ([[1, 1], [1, 1], [np.nan, 9]], True, [1, 1, 0]),  # equals do not beat each other
        ([[0.9, 0.1], [0.8, 0.2], [0.9, 0.2]], (True, False), [1, 0, 0]),
    ],
)
def test_non_dominated_by_hand(points, higher_is_better, expected):
    got = non_dominated(np.array(points, float), higher_is_better=higher_is_better)
    assert got.tolist() == [bool(e) for e in expected]


@pytest.mark.parametrize(
    ("points", "front", "options", "expected"),
    [
        # From (0, 1) and (1, 0) to the nearest of two points, for losses.
        ([[1, 1], [0, 3]], [[0, 1], [1, 0]], {"higher_is_better": False}, 1.0),
        ([[1, 1], [0, 3]], [[0, 1], [1, 0]], {"higher_is_better": False, "plus": False}, 1.0),
        # A point that is better than the front lacks nothing.
        ([[-3, -4]], [[0, 0]], {"higher_is_better": False}, 0.0),
        ([[-3, -4]], [[0, 0]], {"plus": False}, 5.0),
        ([[-3, -4], [np.nan, 0]], [[0, 0]], {}, 5.0),
        ([[-3, 4]], [[0, 0]], {"higher_is_better": (True, False)}, 5.0),
        (np.zeros((0, 2)), [[0, 0]], {}, np.inf),
    ],
)
def test_igd_by_hand(points, front, options, expected):
    assert float(igd(np.array(points, float), front, **options)) == pytest.approx(expected)


def test_spacing_by_hand():
    # Nearest at 1, 1 and 4: their mean is 2, the squares of the deviations sum to 6.
    assert float(spacing([[0, 0], [1, 0], [2, 3]])) == pytest.approx(np.sqrt(3))
    with_nan = [[0, 0], [np.nan, 0], [1, 0], [2, 3], [1, np.inf]]
    assert float(spacing(with_nan)) == pytest.approx(np.sqrt(3))
    assert np.isnan(spacing([[0, 0], [np.nan, 0]]))


def test_ranks_and_volumes_say_what_does_not_fit():
    with pytest.raises(ValueError, match="methods on the first axis"):
        mean_rank([0.1, 0.2])
    with pytest.raises(ValueError, match=r"\(3,\).*expected \(N, K\) and \(K,\)"):
        hypervolume([[1.0, 2.0]], [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="2 of them"):
        hypervolume([[1.0, 2.0]], [0.0, 0.0], higher_is_better=[True])


def test_a_task_of_nan_leaves_the_affinities_of_the_others():
    def losses(w, y):
        return {"a": jnp.sum((jnp.tanh(w) - 1) ** 2), "b": jnp.sum((jnp.tanh(w) - y) ** 2)}

    whole, spoiled = (affinity(losses, jnp.zeros(2), y, learning_rate=0.1) for y in (1.0, np.nan))
    assert np.isnan(spoiled).tolist() == [[False, True], [True, True]]
    np.testing.assert_allclose(spoiled[0, 0], whole[0, 0], rtol=1e-6)


def test_derivatives_of_measures_of_a_front_are_numbers_on_it():
    front = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    assert np.all(np.isfinite(jax.grad(lambda p: igd(p, front))(front.at[1].set(0.4))))
    even = jnp.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])
    assert np.all(np.isfinite(jax.grad(spacing)(even)))
    np.testing.assert_allclose(igd([[0.0, 0.0]], [[3e20, 4e20]]), 5e20, rtol=1e-6)


def test_affinity_of_quadratics_is_a_closed_form():
    """L_j = a_j |w - t_j|^2 / 2 + h_j^2: a step of eta on task i leaves w - eta a_i (w - t_i)."""
    rng, eta = np.random.default_rng(0), 0.2
    a, t, h = rng.uniform(0.5, 2, 3), rng.normal(size=(3, 4)), rng.normal(size=3)
    w = np.mean(t, axis=0)

    def losses_fn(params, scale):
        distance = lambda j: jnp.sum((params["w"] - jnp.float32(t[j])) ** 2)  # noqa: E731
        return {k: scale * a[j] * distance(j) + params[k] ** 2 for j, k in enumerate("xyz")}

    params = {"w": jnp.float32(w), **dict(zip("xyz", map(jnp.float32, h), strict=True))}
    got = jax.jit(lambda p: affinity(losses_fn, p, 0.5, learning_rate=eta))(params)
    loss = lambda w: a * np.sum((w - t) ** 2, axis=1) / 2 + h**2  # noqa: E731
    after = np.stack([loss(w - eta * a[i] * (w - t[i])) for i in range(3)])
    np.testing.assert_allclose(got, 1 - after / loss(w), rtol=1e-5, atol=1e-6)
    assert np.min(got) < 0 < np.max(got)
    zero = affinity(lambda w: [w**2, 0 * w], jnp.float32(1.0), learning_rate=0.1)
    np.testing.assert_allclose(zero, [[1 - 0.8**2, 0], [0, 0]], rtol=1e-5)

    with pytest.raises(ValueError, match=r"expected \(N, K\): solutions by their metrics"):
        non_dominated([1.0, 2.0])
    # Of a negative loss, as of a log-likelihood: a step for a task lowers its own.
    shifted = affinity(lambda w: [w**2 - 10, w**2], jnp.float32(1.0), learning_rate=0.1)
    np.testing.assert_allclose(shifted, [[0.36 / 9, 0.36]] * 2, rtol=1e-5)

    with pytest.raises(ValueError, match="the front has no points"):
        igd([[1.0, 2.0]], np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"expected \(N, K\) and \(M, K\)"):
        igd([[1.0, 2.0]], [[0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="got 1 points, expected at least 2"):
        spacing([[1.0, 2.0]])
