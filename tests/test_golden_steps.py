"""Several steps of a strategy beside a float64 loop written from its authors' code."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import mtl_optax as mtl
from tests.problems import relative_error

RNG = np.random.default_rng(3)
# What conflicts and what differs in size, over four steps, and losses that change.
MATRICES = (RNG.normal(size=(4, 4, 10)) * np.array([3.0, 0.2, 1.0, 8.0])[:, None]).astype("f4")
LOSSES = RNG.uniform(0.2, 3.0, size=(4, 4)).astype("f4")
# A trunk of two arrays and a head for each of the first two tasks.
TREES = {
    "trunk": {"u": MATRICES[:, :, :4], "v": MATRICES[:, :, 4:].reshape(4, 4, 3, 2)},
    "heads": [np.eye(4, dtype="f4")[i][None, :, None] * MATRICES[:, :, :2] for i in (0, 1)],
}
SHARED = {"trunk": {"u": True, "v": True}, "heads": [False, False]}


def run(tx, rows=MATRICES, losses=LOSSES, shared=None):
    """The updates and states of all steps, by one program."""
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[2:]), rows)

    def step(state, at):
        jac = mtl.as_jacobian(at[0], at[1], shared=shared)
        update, state = tx.update(jac, state, params)
        return state, (update, state)

    scan = jax.jit(lambda state, given: jax.lax.scan(step, state, given)[1])
    return scan(tx.init(params), (rows, losses))


def weights_of(balancer):
    """The weights of all steps, after whatever follows the balancer."""
    return run(balancer)[1][0].weights


# Gradient-norm weights.


@pytest.mark.parametrize("to", ["mean", "sum"])
def test_grad_norm_weights_are_those_of_jaxpi_and_of_its_paper(to):
    weights = np.ones(4)
    for matrix, got in zip(
        MATRICES.astype(float), weights_of(mtl.grad_norm_weights(4, to=to)), strict=True
    ):
        norms = [np.sqrt(sum(entry**2 for entry in row)) for row in matrix]
        target = sum(norms) / (len(norms) if to == "mean" else 1)
        weights = [
            w * 0.9 + (1 - 0.9) * target / norm for w, norm in zip(weights, norms, strict=True)
        ]
        np.testing.assert_allclose(got, weights, rtol=1e-5)


# DB-PINN.


def compared(statistic, residual, term, weight):
    """The authors' `loss_grad_max_mean` and `loss_grad_stats`, of torch's unbiased deviation."""
    if statistic == "mean":
        return np.max(np.abs(residual)) / np.mean(np.abs(weight * term))
    sizes = []
    for entries in (residual, term):
        std = np.std(entries, ddof=1)
        kurtosis = np.mean(((entries - np.mean(entries)) / std) ** 4)
        sizes.append(std if statistic == "std" else std / kurtosis)
    return sizes[0] / sizes[1]


@pytest.mark.parametrize("statistic", ["mean", "std", "kurtosis"])
def test_db_pinn_follows_its_loop(statistic):
    """The residual stands second; the others are averaged from 0, as the authors' `lam_avg`."""
    terms, shown = [0, 2, 3], np.ones(4)
    averages, mean_losses = np.zeros(4), np.zeros(4)
    got = weights_of(mtl.db_pinn(4, reference=1, statistic=statistic))
    for t, (matrix, loss) in enumerate(zip(MATRICES, LOSSES.astype(float), strict=True)):
        n, matrix = t + 1, matrix.astype(float)
        total = sum(compared(statistic, matrix[1], matrix[i], shown[i]) for i in terms)
        mean_losses = (1 - 1 / n) * mean_losses + loss / n
        ratios = loss / mean_losses
        for i in terms:
            hat = total * ratios[i] / ratios[terms].sum()
            averages[i] = averages[i] + (hat - averages[i]) / n
            shown[i] = averages[i]
        np.testing.assert_allclose(got[t], shown, rtol=2e-5)


def test_db_pinn_holds_what_it_cannot_measure():
    tx = mtl.scale_by_db_pinn(3)
    step = jax.jit(
        lambda state, losses, here: tx.update(matrix, state, losses=losses, present=here)[1]
    )
    matrix = jnp.array([[8.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    losses = jnp.array([1.0, 2.0, 3.0])
    everyone = jnp.ones(3, bool)
    first = step(tx.init(None), losses, everyone)
    assert first.weights.tolist() == [1, 8, 1]  # a term without a gradient stays out
    second = step(first, losses, everyone.at[0].set(False))
    np.testing.assert_array_equal(second.weights, first.weights)
    odd = jnp.array([1.0, -2.0, jnp.nan])
    third = step(first, odd, everyone)
    np.testing.assert_array_equal(third.weights, [1, 4.5, 1])  # (8 + 8 / 8) / 2, alone as it is


# MetaBalance.


def test_metabalance_follows_its_optimizer_leaf_by_leaf():
    tx = mtl.metabalance(4, primary=2, relax_factor=0.7, decay=0.9)
    updates, _ = run(tx, TREES, shared=SHARED)
    for name, rows in TREES["trunk"].items():
        norms = np.zeros(4)
        for t, leaf in enumerate(rows.astype(float)):
            norms = norms * 0.9 + (1 - 0.9) * np.sqrt((leaf.reshape(4, -1) ** 2).sum(1))
            total = sum(norms[2] * g / norms[k] * 0.7 + g * 0.3 for k, g in enumerate(leaf))
            assert relative_error(updates["trunk"][name][t], total) < 1e-6
    for i, rows in enumerate(TREES["heads"]):
        np.testing.assert_array_equal(updates["heads"][i], rows[:, i])


def test_metabalance_waits_for_the_primary_task():
    tx, rows = mtl.metabalance(2), jnp.array([[3.0, 4.0], [1.0, 0.0]])
    step = jax.jit(lambda here, state: tx.update(rows, state, losses=jnp.ones(2), present=here))
    update, state = step(jnp.array([False, True]), tx.init(rows[0]))
    assert update.tolist() == [1.0, 0.0]
    _, state = step(jnp.array([True, True]), state)
    update, _ = step(jnp.array([False, True]), state)
    np.testing.assert_allclose(update, [0.7 * 5 + 0.3, 0.0], rtol=1e-6)


# GradCraft.


def crafted(grads, norms, r, e, b):
    """The authors' step, with the inverse that they take; the conflicts that it met too."""
    sizes = np.linalg.norm(grads, axis=1)
    norms = b * norms + (1 - b) * sizes
    grads = np.stack(
        [r * g * max(norms) / n + (1 - r) * g for g, n in zip(grads, norms, strict=True)]
    )
    freed, conflicts = [], 0
    for g in grads:
        against = grads[grads @ g < 0]
        conflicts = max(conflicts, len(against))
        right = e * np.linalg.norm(g) * np.linalg.norm(against, axis=1) - against @ g
        freed.append(g + against.T @ (np.linalg.inv(against @ against.T) @ right))
    return np.mean(freed, axis=0), norms, conflicts


@pytest.mark.parametrize("options", [(0.1, 1e-10, 0.0), (0.6, 0.2, 0.8)])
def test_gradcraft_follows_its_algorithm(options):
    r, e, b = options
    updates, states = run(mtl.gradcraft(4, relax_factor=r, margin=e, decay=b))
    norms, most = np.zeros(4), 0
    for matrix, got in zip(MATRICES.astype(float), updates, strict=True):
        expected, norms, conflicts = crafted(matrix, norms, r, e, b)
        most = max(most, conflicts)
        assert relative_error(got, expected) < 1e-5
    assert most >= 2
    assert states.fallbacks[-1] == 0


def test_gradcraft_lifts_a_row_by_its_conflicts_alone():
    """The conflicts of each row span all of space, so that nothing is left of it.

    Those of the third one nearly lie in a plane; small eigenvalues mix easily with zeros.
    """
    matrix = np.array([
        [-0.5804136, 0.80132073, 0.9642616], [-0.07994204, 1.9049201, -3.4472344],
        [-0.28132141, -0.50222725, -0.9863313], [-0.5636243, 0.3146948, 0.9727958],
        [0.7490641, -0.76693285, -0.14562976], [0.29117486, 1.4134427, -0.595317],
    ], np.float32)  # fmt: skip
    tx = mtl.gradcraft(6)
    update, _ = tx.update(matrix, tx.init(None), losses=np.ones(6, np.float32))
    np.testing.assert_allclose(update, 0, atol=0.05)


# AdaTask.


def test_adatask_is_adam_of_each_task_and_of_each_head():
    b1, b2, eps = 0.8, 0.95, 1e-3
    updates, _ = run(mtl.adatask(4, b1=b1, b2=b2, eps=eps), TREES, shared=SHARED)

    def adam(gradients):
        m = v = np.zeros_like(gradients[0])
        for t, g in enumerate(gradients, 1):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            yield m / (1 - b1**t) / (np.sqrt(v) / np.sqrt(1 - b2**t) + eps)

    for name, rows in TREES["trunk"].items():
        steps = [list(adam(rows[:, k].astype(float))) for k in range(4)]
        assert relative_error(updates["trunk"][name], np.sum(steps, axis=0)) < 1e-6
    for i, rows in enumerate(TREES["heads"]):
        steps = list(adam(rows[:, i].astype(float)))
        assert relative_error(updates["heads"][i], np.stack(steps)) < 1e-6


# GO4Align.


def best_groups(x, num_groups):
    """Of all ways to put numbers into groups the one with the least squares, by trying them."""
    best = np.inf, None
    for labels in itertools.product(range(num_groups), repeat=len(x)):
        means = np.array([np.mean(x[np.equal(labels, k)]) for k in labels])
        cost = np.sum((x - means) ** 2)
        best = min(best, (cost, tuple(means)))
    return np.array(best[1])


@pytest.mark.parametrize("num_groups", [2, 3])
def test_go4align_follows_its_code_with_the_best_groups(num_groups):
    got = weights_of(mtl.go4align(4, num_groups=num_groups, step_size=0.3))
    probabilities = np.ones(4) / 4
    for loss, weights in zip(LOSSES.astype(float), got, strict=True):
        probabilities = probabilities * np.exp(-0.3 * loss)
        probabilities = probabilities / probabilities.sum()
        found = loss.sum() / loss * probabilities
        np.testing.assert_allclose(weights, best_groups(found, num_groups), rtol=1e-5)


def test_go4align_groups_those_at_hand():
    tx = mtl.scale_by_go4align(5)
    state = tx.init(None)._replace(weights=jnp.arange(5.0))
    losses = jnp.array([1.0, -1.0, 10.0, jnp.nan, 1.1])
    _, state = jax.jit(lambda state: tx.update(jnp.eye(5), state, losses=losses))(state)
    np.testing.assert_array_equal(state.weights[jnp.array([1, 3])], [1, 3])
    q = np.exp(-1e-4 * losses[jnp.array([0, 2, 4])])
    alone = 12.1 / np.array([1.0, 10.0, 1.1]) * q / q.sum()
    pair = (alone[0] + alone[2]) / 2
    np.testing.assert_allclose(
        state.weights[jnp.array([0, 2, 4])], [pair, alone[1], pair], rtol=1e-5
    )
    assert state.unusable.tolist() == [0, 1, 0, 1, 0]


# ConicGrad.


def projected(v, axis, c):
    """The nearest point of the cone of cosine c around a unit vector."""
    along, across = v @ axis, v - (v @ axis) * axis
    if along >= c * np.linalg.norm(v):
        return v
    sine, width = np.sqrt(1 - c**2), np.linalg.norm(across)
    return max(along * c + width * sine, 0) * (c * axis + sine * across / width)


def least_bound(rows, c):
    """By duality the best least improvement of a unit vector in the cone."""
    count = len(rows)
    axis = rows.mean(0) / np.linalg.norm(rows.mean(0))
    bound = lambda w: np.linalg.norm(projected(w @ rows, axis, c))  # noqa: E731
    found = [
        scipy.optimize.minimize(
            bound, start, bounds=[(0, 1)] * count, options={"ftol": 1e-14},
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, method="SLSQP",
        ).fun
        for start in (np.ones(count) / count, *(0.9 * np.eye(count) + 0.1 / count))
    ]  # fmt: skip
    return min(found)


@pytest.mark.parametrize("c", [0.1, 0.5])
def test_conicgrad_is_the_best_direction_of_its_cone(c):
    rng = np.random.default_rng(0)
    sizes = np.exp(1.5 * rng.normal(size=(20, 3, 1)))
    matrices = (sizes * (rng.normal(size=(20, 3, 8)) + 0.2)).astype("f4")
    tx = mtl.conicgrad(3, c=c)
    step = jax.jit(jax.vmap(lambda m: tx.update(m, tx.init(None), losses=jnp.ones(3))))
    updates, states = step(matrices)
    assert not np.any(states.fallbacks)
    on_surface = []
    for rows, d in zip(matrices.astype(float), np.asarray(updates, float), strict=True):
        length, mean = np.linalg.norm(d), rows.mean(0)
        np.testing.assert_allclose(length, np.linalg.norm(mean), rtol=1e-5)
        cosine = d @ mean / length**2
        assert cosine > c - 1e-5
        on_surface.append(cosine < c + 1e-4)
        best, got = least_bound(rows, c), np.min(rows @ d) / length
        if best > 1e-3 * np.min(np.linalg.norm(rows, axis=1)):
            np.testing.assert_allclose(got, best, rtol=1e-4)
    assert 0 < np.sum(on_surface) < len(on_surface)


def test_conicgrad_is_the_mean_where_no_direction_improves_all():
    tx = mtl.conicgrad(2)
    rows = jnp.array([[3.0, 0.0], [-1.0, 0.0]])
    for matrix in (rows, rows.at[1].set(0)):
        update, state = jax.jit(tx.update)(matrix, tx.init(None), losses=jnp.ones(2))
        np.testing.assert_allclose(update, matrix.mean(0), rtol=1e-6)
        assert state.fallbacks == 0


@pytest.mark.parametrize("name", ["conicgrad", "cagrad"])
def test_no_direction_leaves_its_cone_or_ball_where_rows_hardly_improve_together(name):
    """Three rows in a plane: the lift to a bound out of reach is long, and cancels to rounding."""
    matrices = np.random.default_rng(3).normal(size=(1500, 3, 2)).astype("f4")
    tx = mtl.make(name, 3, c=0.5)
    step = jax.jit(jax.vmap(lambda m: tx.update(m, tx.init(None), losses=jnp.ones(3))))
    updates, states = step(matrices)
    assert not np.any(states.fallbacks)
    means = matrices.astype(float).mean(axis=1)
    length = np.linalg.norm(means, axis=1)
    if name == "cagrad":
        assert np.max(np.linalg.norm(updates - means, axis=1) / length) < 0.5 + 1e-3
    else:
        np.testing.assert_allclose(np.linalg.norm(updates, axis=1), length, rtol=1e-2)
        cosines = np.sum(updates * means, axis=1) / length / np.linalg.norm(updates, axis=1)
        assert np.min(cosines) > 0.5 - 1e-3


# Options.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mtl.grad_norm_weights(2, to="max"), "to='max'"),
        (lambda: mtl.grad_norm_weights(2, decay=1.0), "decay=1.0"),
        (lambda: mtl.db_pinn(2, statistic="max"), "statistic='max'"),
        (lambda: mtl.metabalance(2, relax_factor=1.5), "relax_factor=1.5"),
        (lambda: mtl.gradcraft(2, margin=-0.1), "margin=-0.1"),
        (lambda: mtl.adatask(2, b2=1.0), "b2=1.0"),
        (lambda: mtl.go4align(2, num_groups=0), "num_groups=0"),
        (lambda: mtl.conicgrad(2, c=0.0), "c=0.0"),
    ],
)
def test_options_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()
