"""Sets of models and models of all trade-offs: by hand in float64, and on known fronts."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import mtl_optax as mtl
from benchmarks import fronts
from mtl_optax.fronts import hypervolume_gradient, moo_svgd

rng = np.random.default_rng(0)


def identity(x):
    """Losses that are the parameters: an update is what the losses are weighted by."""
    return [x[k] for k in range(x.size)]


def updated(tx, loss_fn, x, **extra):
    @jax.jit
    def update(x):
        _, jac = jax.vmap(mtl.value_and_jac(loss_fn, shared=None))(x)
        return tx.update(jac, tx.init(x), x, **extra)

    return update(x)


def volume_by_hand(points, corner):
    """Inclusion and exclusion over all subsets."""
    signed = 0.0
    for size in range(1, len(points) + 1):
        for some in itertools.combinations(points, size):
            signed -= (-1) ** size * np.prod(np.maximum(corner - np.max(some, axis=0), 0))
    return signed


def sorted_fronts(points):
    """The members of the first front, of the next one, and so on."""
    left = list(range(len(points)))
    while left:
        front = [
            i
            for i in left
            if not any(
                all(points[j] <= points[i]) and any(points[j] < points[i]) for j in left if j != i
            )
        ]
        yield front
        left = [i for i in left if i not in front]


def weights_by_hand(points, reference):
    worst = points.max(axis=0)
    corner = np.maximum(reference, worst + 0.1 * np.abs(worst))
    weights = np.zeros_like(points)
    for front in sorted_fronts(points):
        for n, k in itertools.product(range(len(front)), range(points.shape[1])):
            shift = np.zeros((len(front), points.shape[1]))
            shift[n, k] = 1e-6
            up, down = (volume_by_hand(points[front] + s * shift, corner) for s in (1, -1))
            weights[front[n], k] = (down - up) / 2e-6
    return weights / np.linalg.norm(weights, axis=1, keepdims=True)


@pytest.mark.parametrize(("num_tasks", "divisions"), [(1, 3), (2, 10), (3, 4), (4, 2)])
def test_grid_holds_every_share_once(num_tasks, divisions):
    grid = mtl.fronts.simplex_grid(num_tasks, divisions)
    every = itertools.product(range(divisions + 1), repeat=num_tasks)
    expected = [p for p in every if sum(p) == divisions]
    assert len(grid) == math.comb(divisions + num_tasks - 1, num_tasks - 1)
    assert_allclose(grid * divisions, expected, atol=1e-6)


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_hypervolume_gradient_is_that_of_each_front(num_tasks):
    points = rng.uniform(-1, 1, size=(7, num_tasks))
    reference = np.linspace(0.5, 2.0, num_tasks)  # one is beyond all points, one is not
    assert len(list(sorted_fronts(points))) > 1
    tx = hypervolume_gradient(num_tasks, reference=reference)
    update, state = updated(tx, identity, jnp.asarray(points, jnp.float32))
    assert_allclose(update, weights_by_hand(points, reference), atol=2e-4)
    assert_allclose(state.weights, update)


def test_hypervolume_gradient_passes_over_broken_models_and_absent_tasks():
    tx = hypervolume_gradient(3, reference=[2.0, 2.0, 2.0])
    points = rng.uniform(size=(4, 3))
    broken = np.concatenate([points, [[0.1, np.nan, 0.1]]])
    run = jax.jit(lambda x, here: updated(tx, identity, x, present=here)[0])
    whole = run(jnp.asarray(broken, jnp.float32), jnp.ones(3, bool))
    assert_allclose(whole[:4], weights_by_hand(points, np.full(3, 2.0)), atol=2e-4)
    # Without the second task it is the volume over the others.
    others = run(jnp.asarray(broken, jnp.float32), jnp.array([True, False, True]))
    two = weights_by_hand(np.delete(broken, 1, axis=1), np.full(2, 2.0))
    assert_allclose(others[:, [0, 2]], two, atol=2e-4)
    assert np.all(np.asarray(others[:4, 1]) == 0)


def curved(x):
    return {"a": jnp.sum((x - 1) ** 2), "b": 3 * jnp.sum(jnp.array([1.0, 2.0, 0.5]) * x**2)}


def moo_svgd_by_hand(x, h, c):
    """Two tasks, whose shortest combination of unit rows has a closed form."""
    a = np.array([1.0, 2.0, 0.5])
    losses = np.stack([((x - 1) ** 2).sum(1), 3 * (a * x**2).sum(1)], axis=1)
    rows = np.stack([2 * (x - 1), 6 * a * x], axis=1)
    n, descents = len(x), []
    for first, second in rows:
        u, v = first / np.linalg.norm(first), second / np.linalg.norm(second)
        share = np.clip((v @ v - u @ v) / ((u - v) @ (u - v)), 0, 1)
        descents.append(share * first + (1 - share) * second)
    out = np.zeros_like(x)
    for i in range(n):
        for j in range(n):
            gap = losses[i] - losses[j]
            k = np.exp(-gap @ gap / h)
            out[i] += k * descents[j] + c * np.sqrt(h) * rows[i].T @ (-2 * gap / h * k)
    return out / n


def test_moo_svgd_draws_and_pushes_past_a_broken_model():
    x = rng.normal(size=(4, 3))
    losses = np.stack([((x - 1) ** 2).sum(1), 3 * (np.array([1.0, 2.0, 0.5]) * x**2).sum(1)], 1)
    h = np.median(np.square(losses[:, None] - losses[None]).sum(2)) / 4
    five = jnp.asarray(np.concatenate([x, [[np.nan] * 3]]), jnp.float32)
    update, state = updated(moo_svgd(2, repulsion=0.7), curved, five)
    assert_allclose(update[:4], moo_svgd_by_hand(x, h, 0.7), rtol=1e-4, atol=1e-4)
    assert_allclose(state.bandwidth, h, rtol=1e-5)

    def steep(x):  # at 0 the losses are finite and a gradient is not
        return curved(x) | {"a": curved(x)["a"] + 0 * jnp.sqrt(jnp.sum(x**2))}

    five = five.at[4].set(0)
    update, _ = updated(moo_svgd(2, repulsion=0.7), steep, five)
    assert_allclose(update[:4], moo_svgd_by_hand(x, h, 0.7), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bandwidth", [None, 1.0])
def test_moo_svgd_keeps_models_whose_squared_distance_is_out_of_range(bandwidth):
    far = 1e10 * rng.normal(size=(3, 3))  # losses of 1e20, the square of their gaps beyond float32
    x = np.concatenate([far, [[0.1, 0.2, 0.3]]])
    losses = np.stack([((x - 1) ** 2).sum(1), 3 * (np.array([1.0, 2.0, 0.5]) * x**2).sum(1)], 1)
    h = bandwidth or np.median(np.square(losses[:, None] - losses[None]).sum(2)) / 4
    update, _ = updated(moo_svgd(2, bandwidth=bandwidth), curved, jnp.asarray(x, jnp.float32))
    assert_allclose(update, moo_svgd_by_hand(x, h, 1.0), rtol=1e-3, atol=1e-4)


def test_sets_follow_the_unit_of_the_losses():
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)

    @jax.jit
    def updates(s):
        scaled = lambda x: jax.tree.map(lambda loss: s * loss, curved(x))  # noqa: E731
        _, jac = jax.vmap(mtl.value_and_jac(scaled, shared=None))(x)
        sets = (moo_svgd(2), hypervolume_gradient(2, reference=[40 * s, 40 * s]))
        return [tx.update(jac, tx.init(x), x)[0] for tx in sets]

    for one, many in zip(updates(1.0), updates(1e6), strict=True):
        assert_allclose(many, 1e6 * one, rtol=1e-3, atol=10)


def test_a_jacrev_tree_is_a_set_too():
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    tx = hypervolume_gradient(2, reference={"a": 9.0, "b": 9.0})
    expected, _ = updated(tx, curved, x)
    got, _ = jax.jit(
        lambda x: tx.update(
            jax.vmap(jax.jacrev(curved))(x), tx.init(x), x, losses=jax.vmap(curved)(x)
        )
    )(x)
    assert_allclose(got, expected, rtol=1e-5)


def test_interpolated_members_learn_every_trade_off():
    target = jnp.array([[0.0, 1.0, 4.0], [2.0, -1.0, 0.0]])

    def task_losses(theta):
        return {"a": jnp.sum((theta - target[0]) ** 2), "b": jnp.sum((theta - target[1]) ** 2)}

    def step(members, key):
        p = jax.random.dirichlet(key, jnp.ones(2))
        _, jac = mtl.value_and_jac(lambda m: task_losses(mtl.fronts.interpolate(m, p)))(members)
        return members - 0.1 * jac.pullback(p), None

    keys = jax.random.split(jax.random.key(0), 500)
    members, _ = jax.jit(lambda m: jax.lax.scan(step, m, keys))(jnp.ones((2, 3)))
    # The Pareto set is the segment between the two targets: θ(p) is best where the members are.
    assert_allclose(members, target, atol=1e-3)
    waves = mtl.fronts.interpolate(jnp.array([[1 + 1j], [3 - 1j]]), jnp.array([0.5, 0.5]))
    assert_allclose(waves, [2.0 + 0j])


def test_ordering_penalty_by_hand():
    p = np.array([[0.5, 0.5], [0.1, 0.9], [0.8, 0.2]])
    losses = np.array([[0.7, 0.2], [0.4, 0.1], [0.9, 0.3]])
    # In the order of their preference of the first task its losses are .4, .7, .9.
    expected = [np.log((np.exp(2 * 0.3) + np.exp(2 * 0.2)) / 2), 0.0]
    penalty = jax.jit(lambda p, x: mtl.fronts.ordering_penalty(p, x, temperature=2.0))
    assert_allclose(penalty(p, losses), expected, atol=1e-6)
    named = [{"b": x[:, 1], "a": x[:, 0]} for x in (p, losses)]
    assert_allclose(penalty(*named), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"preferences of \['a', 'c'\] and losses of \['a', 'b'\]"):
        penalty({"a": p[:, 0], "c": p[:, 1]}, named[1])


def test_ordering_penalty_holds_no_equals_against_each_other():
    penalty = jax.jit(jax.value_and_grad(lambda x, p: mtl.fronts.ordering_penalty(p, x).sum()))
    # Nobody prefers a task more.
    value, slope = penalty(np.array([[0.1, 0.1], [0.9, 0.9]]), np.full((2, 2), 0.5))
    assert value == 0
    assert np.all(np.asarray(slope) == 0)
    # Each of two equals is held against the one below and the one above, in whatever order.
    p, x = np.array([[0.5], [0.2], [0.8], [0.5]]), np.array([[0.9], [0.4], [0.7], [0.1]])
    expected = np.log(np.mean(np.exp([0.5, 0.0, 0.0, 0.6])))  # from 0.4 twice, to 0.7 twice
    for order in ([0, 1, 2, 3], [3, 1, 2, 0]):
        assert_allclose(penalty(x[order], p[order])[0], expected, rtol=1e-5)


def test_the_preference_stands_behind_each_input():
    x = jnp.zeros((2, 3, 4), jnp.bfloat16)
    each = jnp.asarray(rng.uniform(size=(2, 3, 2)), jnp.float32)
    joined = mtl.fronts.with_preference(x, each)
    assert (joined.shape, joined.dtype) == ((2, 3, 6), jnp.bfloat16)
    assert_allclose(joined[..., 4:], each, rtol=1e-2)
    for shares in (jnp.array([0.25, 0.75]), {"b": 0.75, "a": jnp.array(0.25)}):
        counts = mtl.fronts.with_preference(jnp.array([3, 1]), shares)
        assert counts.tolist() == [3.0, 1.0, 0.25, 0.75]
    # One for each of two examples, not for each of their two tokens.
    with pytest.raises(ValueError, match=r"shape \(2, 2, 1\) and the preference \(2, 3\)"):
        mtl.fronts.with_preference(jnp.ones((2, 2, 1)), jnp.ones((2, 3)))


def test_mistakes_say_what_to_do():
    tx = hypervolume_gradient(2, reference=1.1)
    _, jac = mtl.value_and_jac(identity)(jnp.ones(2))
    with pytest.raises(ValueError, match=r"Jacobian of one model, expected those of n: jax\.vmap"):
        tx.update(jac, tx.init(jnp.ones((3, 2))))
    models = jnp.ones((3, 2))
    _, jacs = jax.vmap(mtl.value_and_jac(identity))(models)
    beside = [
        mtl.skip_nonfinite(tx),
        mtl.multi_steps(tx, 2, 3),
        optax.chain(mtl.drop_nonfinite_tasks(3), tx),
        optax.chain(mtl.scale_by_uncertainty(3), tx),
        optax.chain(mtl.normalize_tasks(), tx),
        mtl.upgrad(3),
    ]
    for of_one in beside:
        with pytest.raises(
            ValueError, match="Jacobians of 3 models, stacked, expected that of one"
        ):
            of_one.update(jacs, of_one.init(models))
    with pytest.raises(ValueError, match="parameters of one model, expected those of n"):
        tx.init({"w": jnp.ones(2), "b": jnp.zeros([])})
    with pytest.raises(ValueError, match="num_tasks=2"):
        updated(tx, identity, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="expected the K members stacked"):
        mtl.fronts.interpolate(jnp.ones((2, 3)), jnp.ones(3) / 3)
    with pytest.raises(ValueError, match=r"preference has shape \(\), expected \(K,\)"):
        mtl.fronts.interpolate(jnp.ones((2, 3)), 0.5)
    for preference in (jnp.ones((3, 2)), 0.5):
        with pytest.raises(ValueError, match=r"inputs have shape \(2, 3\) and the preference"):
            mtl.fronts.with_preference(jnp.ones((2, 3)), preference)
    with pytest.raises(ValueError, match=r"temperature=-1\.0, expected at least 0"):
        mtl.fronts.ordering_penalty(jnp.ones((2, 2)), jnp.ones((2, 2)), temperature=-1.0)
    with pytest.raises(ValueError, match=r"expected \(M, K\) for both"):
        mtl.fronts.ordering_penalty(jnp.ones((1, 2)), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="divisions=0, expected at least 1"):
        mtl.fronts.simplex_grid(2, divisions=0)


# The largest volumes of eleven points, by `python -m benchmarks.fronts`.
BEST = {"ZDT1": 0.832051, "DTLZ2": 0.629888}


@pytest.mark.parametrize("name", BEST)
def test_hypervolume_gradient_spreads_over_known_fronts(name):
    problem = fronts.PROBLEMS[name]
    tx = hypervolume_gradient(problem.num_tasks, reference=problem.reference)
    (ends,) = fronts.losses_of(problem, fronts.train_set(problem, tx, seeds=1, steps=1500))
    assert fronts.volume(ends, np.array(problem.reference)) >= 0.99 * BEST[name]
    assert fronts.distance(name, ends).max() < 1e-3


def test_eleven_preferences_in_one_program_reach_the_front_of_vlmop2_at_their_own_cost():
    ends = fronts.train_preferences(fronts.PROBLEMS["VLMOP2"], steps=1500)
    assert fronts.distance("VLMOP2", ends).max() < 1e-3
    assert np.all(np.diff(ends[:, 0]) < -0.01)  # a preference a trade-off
    assert fronts.cost_of_preferences() < 1.3


def test_a_broken_model_does_not_shorten_the_steps_of_others():
    tx = mtl.fronts.moo_svgd(2)
    jac_of = jax.vmap(mtl.value_and_jac(lambda x: {"a": (x - 1) ** 2, "b": (x + 1) ** 2}))
    models = jnp.array([-0.5, 0.1, 0.6])
    alone, beside = (
        tx.update(jac_of(xs)[1], tx.init(xs), xs)[0] for xs in (models, jnp.append(models, jnp.nan))
    )
    np.testing.assert_allclose(beside[:3], alone, rtol=1e-6)
