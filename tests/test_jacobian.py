"""The lazy Jacobian: its law, its laziness, and which parameters it finds shared."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec as P

import mtl_optax as mtl
from tests.problems import mlp_batch, mlp_losses, mlp_params

TASKS = ("a", "b", "c")
ROW_MODES = ("isolated", "batched", "sequential")


@pytest.fixture(name="problem")
def _problem():
    return mlp_params(jax.random.key(0)), *mlp_batch(jax.random.key(1))


def reference_rows(params, *batch):
    """Leaves (K, *shape), by jax.jacrev, tasks in sorted order."""
    grads = jax.jacrev(mlp_losses)(params, *batch)
    return jax.tree.map(lambda *rows: jnp.stack(rows), *[grads[task] for task in TASKS])


def reference_gramian(rows, leaves=lambda rows: rows["trunk"]):
    flat = jnp.concatenate([leaf.reshape(3, -1) for leaf in jax.tree.leaves(leaves(rows))], axis=1)
    return np.asarray(flat, np.float64) @ np.asarray(flat, np.float64).T


def test_adding_it_to_parameters_says_that_an_aggregator_is_missing():
    params = jnp.ones(3)
    _, jac = mtl.value_and_jac(lambda w: {"a": jnp.sum(w), "b": jnp.sum(w**2)})(params)
    with pytest.raises(TypeError, match="put an aggregator"):
        optax.apply_updates(params, jac)


@pytest.mark.parametrize("mode", ROW_MODES)
@pytest.mark.parametrize("jit", [False, True])
def test_rows_pullback_and_gramian_match_jacrev(problem, mode, jit):
    def read(*args):
        losses, jac = mtl.value_and_jac(mlp_losses, rows=mode)(*args)
        return losses, jac.rows(), jac.pullback(jnp.array([1.0, -2.0, 0.5])), jac.gramian()

    losses, rows, pulled, gramian = (jax.jit(read) if jit else read)(*problem)
    expected = reference_rows(*problem)
    chex.assert_trees_all_close(losses, mlp_losses(*problem), rtol=1e-6)
    chex.assert_trees_all_close(rows, expected, atol=1e-6)
    weighted = jax.tree.map(lambda r: jnp.tensordot(jnp.array([1.0, -2.0, 0.5]), r, 1), expected)
    chex.assert_trees_all_close(pulled, weighted, atol=1e-6)
    np.testing.assert_allclose(gramian, reference_gramian(expected), rtol=1e-5, atol=1e-7)
    assert gramian.dtype == jnp.float32


def test_law_rows_are_the_gradients_of_losses_after_scaling(problem):
    _, jac = mtl.value_and_jac(mlp_losses)(*problem)
    w = jnp.array([2.0, -0.5, 0.0])
    scaled = jac.scale(w).scale(jnp.array([1.0, 3.0, 1.0]))
    total = jnp.array([2.0, -1.5, 0.0])

    def scaled_losses(*args):
        losses = mlp_losses(*args)
        return {task: losses[task] * total[i] for i, task in enumerate(TASKS)}

    chex.assert_trees_all_close(scaled.losses, scaled_losses(*problem), rtol=1e-6)
    grads = jax.jacrev(scaled_losses)(*problem)
    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *[grads[task] for task in TASKS])
    chex.assert_trees_all_close(scaled.rows(), expected, atol=1e-6)
    np.testing.assert_allclose(scaled.gramian(), reference_gramian(expected), rtol=1e-5, atol=1e-7)
    summed = jax.tree.map(lambda r: jnp.sum(r, axis=0), expected)
    chex.assert_trees_all_close(scaled.combine(1.0), summed, atol=1e-6)


@pytest.mark.parametrize("after_gramian", [False, True])
def test_combine_mixes_shared_leaves_and_gives_each_head_its_own_row(problem, after_gramian):
    _, jac = mtl.value_and_jac(mlp_losses)(*problem)
    if after_gramian:
        jac.gramian()  # combine then uses the rows that are at hand
    w = jnp.array([0.0, 0.25, 3.0])
    combined = jac.combine(w)
    rows = reference_rows(*problem)
    expected = jax.tree.map(lambda r: jnp.tensordot(w, r, 1), rows["trunk"])
    chex.assert_trees_all_close(combined["trunk"], expected, atol=1e-6)
    for i, task in enumerate(TASKS):
        np.testing.assert_allclose(combined["heads"][task], rows["heads"][task][i], atol=1e-6)


def test_combine_with_everything_shared_is_the_pullback(problem):
    _, jac = mtl.value_and_jac(mlp_losses, shared=None)(*problem)
    w = jnp.array([0.0, 0.25, 3.0])
    chex.assert_trees_all_close(jac.combine(w), jac.pullback(w), rtol=1e-5, atol=1e-6)


def test_gramian_at_restricts_only_the_measurement(problem):
    last = lambda params: {"trunk": [False, {"w": True, "b": False}], "heads": False}  # noqa: E731
    _, jac = mtl.value_and_jac(mlp_losses, gramian_at=last)(*problem)
    rows = reference_rows(*problem)
    expected = reference_gramian(rows, lambda rows: rows["trunk"][1]["w"])
    np.testing.assert_allclose(jac.gramian(), expected, rtol=1e-5, atol=1e-7)
    _, plain = mtl.value_and_jac(mlp_losses)(*problem)
    w = jnp.array([0.3, 0.2, 3.0])
    chex.assert_trees_all_close(jac.combine(w), plain.combine(w), atol=1e-6)


def test_correlation_is_safe_where_squares_overflow():
    matrix = jnp.array([[3e25, 4e25], [4e-30, -3e-30], [0.0, 0.0]])
    _, jac = mtl.value_and_jac(lambda w: matrix @ w)(jnp.zeros(2))
    cosines, norms = jac.correlation()
    np.testing.assert_allclose(norms, [5e25, 5e-30, 0], rtol=1e-6)
    np.testing.assert_allclose(cosines, np.diag([1, 1, 0]), atol=1e-6)


# What may be a loss, and what it is called.


def test_names_follow_the_structure_of_the_losses():
    scalar = jnp.float32(1.0)
    assert mtl.task_names({"b": scalar, "a": scalar}) == ("a", "b")
    assert mtl.task_names({"x": {"b": scalar}, "y": [scalar, scalar]}) == ("x/b", "y/0", "y/1")
    assert mtl.task_names(jnp.ones(3)) == ("0", "1", "2")
    assert mtl.task_names((scalar, jnp.ones(2))) == ("0", "1/0", "1/1")
    assert mtl.task_names(scalar) == ("0",)


def test_jacobian_answers_by_task_name(problem):
    _, jac = mtl.value_and_jac(mlp_losses)(*problem)
    assert "a" in jac
    assert "trunk" not in jac
    assert (jac.num_tasks, jac.names) == (3, TASKS)


@pytest.mark.parametrize(
    "join", [jnp.stack, jnp.array, lambda xs: jnp.concatenate([xs[0][None], jnp.stack(xs[1:])])]
)
def test_stacked_losses_are_told_apart(problem, join):
    def stacked(*args):
        return join([loss for _, loss in sorted(mlp_losses(*args).items())])

    losses, jac = mtl.value_and_jac(stacked)(*problem)
    assert losses.shape == (3,)
    _, by_name = mtl.value_and_jac(mlp_losses)(*problem)
    w = jnp.array([0.0, 0.25, 3.0])
    chex.assert_trees_all_close(jac.combine(w), by_name.combine(w), atol=1e-6)
    chex.assert_trees_all_close(jac.rows(), by_name.rows(), atol=1e-6)


def test_losses_computed_as_one_array_share_everything():
    def losses(params, x):
        return jnp.mean((x @ params["trunk"] @ params["heads"]) ** 2, axis=0)

    params = {"trunk": jnp.eye(3), "heads": jnp.arange(6.0).reshape(3, 2)}
    value, jac = mtl.value_and_jac(losses)(params, jnp.ones((4, 3)))
    assert value.shape == (2,)
    expected = jax.jacrev(losses)(params, jnp.ones((4, 3)))
    chex.assert_trees_all_close(jac.rows(), expected, rtol=1e-6)
    flat = np.concatenate([np.reshape(leaf, (2, -1)) for leaf in jax.tree.leaves(expected)], axis=1)
    np.testing.assert_allclose(jac.gramian(), flat @ flat.T, rtol=1e-6)


def test_constant_loss_has_a_zero_row():
    _, jac = mtl.value_and_jac(lambda w: {"a": jnp.sum(w), "b": jnp.float32(2.0)})(jnp.ones(3))
    np.testing.assert_array_equal(jac.rows(), [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(jac.combine(jnp.array([2.0, 5.0])), [1, 1, 1])


def test_one_task_is_all_shared():
    _, jac = mtl.value_and_jac(lambda w: {"only": jnp.sum(w**2)})(jnp.ones(3))
    np.testing.assert_allclose(jac.gramian(), [[12.0]])
    np.testing.assert_allclose(jac.combine(jnp.array([0.5])), [1, 1, 1])


def test_aux_comes_back(problem):
    def with_aux(*args):
        losses = mlp_losses(*args)
        return losses, {"total": sum(losses.values())}

    (losses, aux), jac = mtl.value_and_jac(with_aux, has_aux=True)(*problem)
    np.testing.assert_allclose(aux["total"], sum(losses.values()))
    assert jac.names == TASKS


# A pytree among pytrees.


def test_crosses_jit_without_a_second_trace(problem):
    traces = 0

    @jax.jit
    def make(*args):
        return mtl.value_and_jac(mlp_losses)(*args)[1]

    @jax.jit
    def use(jac):
        nonlocal traces
        traces += 1
        return jac.combine(jnp.diagonal(jac.gramian()))

    expected = use(mtl.value_and_jac(mlp_losses)(*problem)[1])
    for _ in range(3):
        chex.assert_trees_all_close(use(make(*problem)), expected, rtol=1e-4, atol=1e-5)
    assert traces == 1


def test_crosses_vmap_and_scan(problem):
    params, x, y = problem
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params)
    make = lambda p: mtl.value_and_jac(mlp_losses)(p, x, y)[1]  # noqa: E731
    use = lambda jac: jac.combine(jnp.diagonal(jac.gramian()))  # noqa: E731
    halved = jax.tree.map(lambda p: 0.5 * p, params)
    expected = jax.tree.map(
        lambda *s: jnp.stack(s),
        use(make(params)),
        use(make(halved)),
    )
    chex.assert_trees_all_close(
        jax.vmap(use)(jax.vmap(make)(stacked)), expected, rtol=1e-4, atol=1e-5
    )
    jacs = jax.lax.scan(lambda _, p: (None, make(p)), None, stacked)[1]
    updates = jax.lax.scan(lambda _, jac: (None, use(jac)), None, jacs)[1]
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)


def test_values_of_an_inner_trace_do_not_leak_out(problem):
    _, jac = mtl.value_and_jac(mlp_losses)(*problem)

    @jax.jit
    def inner_first(jac, flag):
        inside = jax.lax.cond(flag, lambda: jac.gramian(), lambda: jnp.zeros((3, 3)))
        return inside, jac.gramian(), jac.combine(jnp.ones(3))

    inside, outside, combined = inner_first(jac, True)
    np.testing.assert_allclose(inside, outside, rtol=1e-6)
    chex.assert_trees_all_close(combined, jac.combine(1.0), atol=1e-6)


def test_stock_linen_train_state_takes_it(problem):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(4)(x))
            return {"a": nn.Dense(1, name="a")(h), "b": nn.Dense(1, name="b")(h)}

    model, x = Model(), problem[1]
    tx = optax.chain(mtl.mgda(num_tasks=2), optax.sgd(0.1))
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=tx)

    def task_losses(params):
        return {task: jnp.mean((out - 1) ** 2) for task, out in model.apply(params, x).items()}

    @jax.jit
    def step(state):
        losses, jac = mtl.value_and_jac(task_losses)(state.params)
        return state.apply_gradients(grads=jac), losses

    state, first = step(state)
    for _ in range(20):
        state, losses = step(state)
    assert all(losses[task] < first[task] for task in losses)


@pytest.mark.parametrize("split", [False, True])
def test_stock_nnx_optimizer_takes_it(problem, split):
    model = mtl.models.HardSharing([6, 5], {"a": 1, "b": 1}, rngs=nnx.Rngs(0))
    tx = optax.chain(mtl.gradnorm(num_tasks=2), optax.adam(0.02))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = problem[1]

    def losses_of(model):
        return {task: jnp.mean((out - 1) ** 2) for task, out in model(x).items()}

    @nnx.jit
    def step(model, optimizer):
        if split:
            graphdef, params = nnx.split(model, nnx.Param)
            loss_fn = lambda params: losses_of(nnx.merge(graphdef, params))  # noqa: E731
            losses, jac = mtl.value_and_jac(loss_fn)(params)
        else:
            losses, jac = mtl.value_and_jac(losses_of)(model)
        optimizer.update(model, jac)
        return losses

    first = step(model, optimizer)
    for _ in range(20):
        losses = step(model, optimizer)
    assert all(losses[task] < first[task] for task in losses)
    as_pure = getattr(nnx, "as_pure", None) or nnx.pure  # the name since flax 0.12.3
    assert "weights/a" in mtl.summarize(as_pure(optimizer.opt_state), ("a", "b"))


# Isolation.


@pytest.mark.parametrize(
    "join", [lambda losses: losses, lambda losses: jnp.stack([losses[t] for t in TASKS])]
)
def test_isolated_rows_keep_a_nan_to_itself(problem, join):
    params, x, y = problem
    poisoned = {**y, "b": y["b"].at[3].set(jnp.nan)}
    rows_of = jax.jit(
        lambda y: mtl.value_and_jac(lambda p: join(mlp_losses(p, x, y)), rows="isolated")(params)[
            1
        ].rows()
    )
    clean, dirty = rows_of(y), rows_of(poisoned)
    for good, bad in zip(
        jax.tree.leaves(clean["trunk"]), jax.tree.leaves(dirty["trunk"]), strict=True
    ):
        np.testing.assert_array_equal(good[0], bad[0])
        np.testing.assert_array_equal(good[2], bad[2])
        assert np.isnan(bad[1]).any()
    # jax.jacrev, the reference of what must not happen, does let it through.
    grads = jax.jacrev(lambda p: mlp_losses(p, x, poisoned))(params)
    assert np.isnan(grads["a"]["trunk"][0]["w"]).any()


# Which parameters are shared.


def shared_leaves(losses_fn, params, **options):
    _, jac = mtl.value_and_jac(losses_fn, **options)(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, flag in jax.tree_util.tree_leaves_with_path(jac.shared)
        if flag
    }


@jax.custom_vjp
def doubled(x):
    return 2.0 * x


doubled.defvjp(lambda x: (2.0 * x, None), lambda _, g: (2.0 * g,))


@jax.custom_jvp
def tripled(x):
    return 3.0 * x


tripled.defjvp(lambda primals, tangents: (3.0 * primals[0], 3.0 * tangents[0]))


def scanned(x):
    return jax.lax.scan(lambda carry, _: (jnp.sin(carry), carry), x, None, length=3)[0]


def branched(x):
    return jax.lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x)


WRAPPERS = {
    "plain": jnp.sin,
    "jit": jax.jit(jnp.sin),
    "scan": scanned,
    "cond": branched,
    "remat": jax.checkpoint(lambda x: jnp.sin(jnp.cos(x))),
    "custom_vjp": doubled,
    "custom_jvp": tripled,
    "while": lambda x: jax.lax.fori_loop(0, 2, lambda _, y: jnp.sin(y), x),
    "vmap": jax.vmap(jnp.sin),
    "nested": jax.jit(jax.checkpoint(lambda x: scanned(branched(doubled(x))))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_shared_auto_looks_through(name):
    wrap = WRAPPERS[name]

    def losses(params):
        h = wrap(params["trunk"])
        return {task: jnp.sum(wrap(h * params[task])) for task in ("a", "b")}

    params = {"trunk": jnp.ones(3), "a": jnp.ones(3), "b": jnp.ones(3), "unused": jnp.ones(2)}
    assert shared_leaves(losses, params) == {"trunk"}


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_shared_auto_keeps_tasks_apart_inside_one_call(transform):
    @transform
    def heads(h, a, b):
        return jnp.sum(h * a), jnp.sum(h * b)

    def losses(params):
        a, b = heads(jnp.sin(params["trunk"]), params["a"], params["b"])
        return {"a": a, "b": b}

    assert shared_leaves(losses, {k: jnp.ones(3) for k in ("trunk", "a", "b")}) == {"trunk"}


def test_shared_auto_follows_a_scan_carry_to_its_fixed_point():
    # b reaches the first carry only by way of the second, one step later.
    def losses(params):
        def body(carry, _):
            first, second = carry
            return (first + second, second * params["b"]), None

        init = (params["a"], jnp.float32(1.0))
        (first, second), _ = jax.lax.scan(body, init, None, length=3)
        return {"first": first, "second": second}

    assert shared_leaves(losses, {"a": jnp.float32(2.0), "b": jnp.float32(3.0)}) == {"b"}


def test_shared_auto_in_a_hierarchy_counts_a_leaf_of_two_tasks_in_three():
    def losses(params):
        h = jnp.sin(params["trunk"])
        easy = h * params["easy"]
        hard = (h + easy) * params["hard"]
        return {"easy": jnp.sum(easy), "hard": jnp.sum(hard), "other": jnp.sum(h * params["other"])}

    params = {k: jnp.ones(3) for k in ("trunk", "easy", "hard", "other")}
    assert shared_leaves(losses, params) == {"trunk", "easy"}


def test_shared_auto_respects_stop_gradient():
    def losses(params):
        h = jnp.sin(params["trunk"])
        return {"a": jnp.sum(h), "b": jnp.sum(jax.lax.stop_gradient(h) * params["b"])}

    assert shared_leaves(losses, {"trunk": jnp.ones(3), "b": jnp.ones(3)}) == set()


def test_shared_auto_on_nnx_models():
    model = mtl.models.Hierarchical(
        [3, 4], {"a": 2, "b": 2, "c": 2}, parents={"b": ("a",)}, rngs=nnx.Rngs(0)
    )
    graphdef, params = nnx.split(model, nnx.Param)

    def losses(params):
        return {k: jnp.mean(v**2) for k, v in nnx.merge(graphdef, params)(jnp.ones((2, 3))).items()}

    # What really happens, by autodiff: which leaves have a nonzero gradient for two or more tasks.
    grads = jax.jacrev(losses)(params)
    used = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, count in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda *g: sum(bool(jnp.any(x != 0)) for x in g), *grads.values())
        )
        if count > 1
    }
    assert shared_leaves(losses, params) == used
    assert any("a" in path for path in used)


def test_shared_takes_a_mask_a_prefix_a_function_and_none():
    def losses(params):
        return {"a": jnp.sum(params["t"]["w"] * params["a"]), "b": jnp.sum(params["t"]["w"])}

    params = {"t": {"w": jnp.ones(2), "v": jnp.ones(2)}, "a": jnp.ones(2)}
    check = functools.partial(shared_leaves, losses, params)
    assert check(shared={"t": {"w": True, "v": False}, "a": False}) == {"t/w"}
    assert check(shared={"t": True, "a": False}) == {"t/w", "t/v"}
    assert check(shared=lambda p: {"t": False, "a": True}) == {"a"}
    assert check(shared=None) == {"t/w", "t/v", "a"}


# Feature level.


def encode(params, x, y):
    del y
    h = x
    for layer in params["trunk"]:
        h = jnp.tanh(h @ layer["w"] + layer["b"][None, :])
    return h


def decode(params, features, x, y):
    del x
    return {task: jnp.mean((features @ w - y[task]) ** 2) for task, w in params["heads"].items()}


def test_feature_jacobian_measures_at_the_features_and_pulls_back_exactly(problem):
    losses, jac = mtl.value_and_feature_jac(encode, decode)(*problem)
    _, exact = mtl.value_and_jac(mlp_losses)(*problem)
    chex.assert_trees_all_close(losses, mlp_losses(*problem), rtol=1e-6)
    rows = jax.jacrev(decode, argnums=1)(problem[0], encode(*problem), *problem[1:])
    flat = np.stack([np.ravel(rows[task]) for task in TASKS]).astype(np.float64)
    np.testing.assert_allclose(jac.gramian(), flat @ flat.T, rtol=1e-5, atol=1e-9)
    w = jnp.array([0.3, 0.0, 2.0])
    chex.assert_trees_all_close(jac.combine(w), exact.combine(w), atol=1e-6)
    chex.assert_trees_all_close(jac.rows(), exact.rows(), atol=1e-6)
    scaled = jac.scale(w)
    np.testing.assert_allclose(scaled.gramian(), jac.gramian() * w[:, None] * w[None, :], rtol=1e-5)


def test_feature_jacobian_is_exact_when_the_features_are_the_parameters():
    targets = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([-1.0, 0.5])}
    identity = lambda z: z  # noqa: E731
    distances = lambda params, z: {k: jnp.sum((z - t) ** 2) for k, t in targets.items()}  # noqa: E731
    z = jnp.array([0.3, 0.1])
    _, jac = mtl.value_and_feature_jac(identity, distances)(z)
    _, exact = mtl.value_and_jac(lambda z: distances(None, z))(z)
    np.testing.assert_allclose(jac.gramian(), exact.gramian(), rtol=1e-6)


# jax.jacrev trees.


def test_as_jacobian_takes_jacrev_of_a_dict_and_of_an_array(problem):
    params, *batch = problem
    grads = jax.jacrev(mlp_losses)(params, *batch)
    losses = mlp_losses(params, *batch)
    by_name = mtl.as_jacobian(grads, losses)
    stacked = lambda *args: jnp.stack([mlp_losses(*args)[t] for t in TASKS])  # noqa: E731
    by_index = mtl.as_jacobian(jax.jacrev(stacked)(params, *batch), stacked(params, *batch))
    expected = reference_rows(params, *batch)
    w = jnp.array([0.3, 0.0, 2.0])
    _, lazy = mtl.value_and_jac(mlp_losses, shared=None)(params, *batch)
    for jac in (by_name, by_index):
        chex.assert_trees_all_close(jac.rows(), expected, atol=1e-7)
        chex.assert_trees_all_close(jac.combine(w), lazy.combine(w), atol=1e-6)
        np.testing.assert_allclose(jac.gramian(), lazy.gramian(), rtol=1e-5)
    assert by_name.names == TASKS
    assert mtl.as_jacobian(by_name, losses) is by_name
    heads_apart = mtl.as_jacobian(grads, losses, shared=lambda p: {"trunk": True, "heads": False})
    _, auto = mtl.value_and_jac(mlp_losses)(params, *batch)
    chex.assert_trees_all_close(heads_apart.combine(w), auto.combine(w), atol=1e-6)


# Bad input.


@pytest.mark.parametrize(
    ("losses", "error", "parts"),
    [
        (
            lambda w: {"click": jnp.sum(w), "buy": w},
            ValueError,
            ["'buy'", "(3,)", "scalar", "jnp.mean"],
        ),
        (lambda w: {"click": jnp.argmax(w)}, TypeError, ["'click'", "int32", "floating"]),
        (lambda w: {}, ValueError, ["no losses"]),
    ],
)
def test_losses_that_are_none(losses, error, parts):
    with pytest.raises(error) as caught:
        mtl.value_and_jac(losses)(jnp.ones(3))
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: mtl.value_and_jac(jnp.sum, rows="fast"), ValueError, ["'fast'", "batched"]),
        (
            lambda: mtl.value_and_jac(jnp.sum)(jnp.arange(3)),
            TypeError,
            ["int32", "further argument"],
        ),
        (
            lambda: mtl.value_and_jac(jnp.sum, shared="all")(jnp.ones(3)),
            ValueError,
            ["'all'", "auto"],
        ),
        (
            lambda: mtl.value_and_jac(jnp.sum, shared=[True, False])(jnp.ones(3)),
            ValueError,
            ["shared=", "structure"],
        ),
        (
            lambda: mtl.value_and_jac(jnp.sum, gramian_at=lambda p: False)(jnp.ones(3)),
            ValueError,
            ["gramian_at", "no parameter"],
        ),
        (
            lambda: mtl.as_jacobian(jnp.ones(3), {"a": 1.0, "b": 2.0}),
            ValueError,
            ["('a', 'b')", "jax.jacrev"],
        ),
        (
            lambda: mtl.as_jacobian(jnp.ones((3, 2)), jnp.ones(2)),
            ValueError,
            ["(3, 2)", "jax.jacrev"],
        ),
        (
            lambda: mtl.as_jacobian(jnp.ones((2, 2)), jnp.ones(2)).combine(jnp.ones(3)),
            ValueError,
            ["(3,)", "(2,)"],
        ),
    ],
)
def test_mistakes_say_what_to_do(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_loss_that_was_not_averaged_over_devices_is_named():
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Auto,))

    def direction(w, x, reduce):
        loss_fn = lambda w: {"a": reduce(jnp.mean(w * x)), "b": jnp.sum(w**2)}  # noqa: E731
        _, jac = mtl.value_and_jac(loss_fn)(w)
        return jac.combine(1.0)

    def run(reduce):
        each = functools.partial(direction, reduce=reduce)
        mapped = jax.shard_map(each, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P())
        return mapped(jnp.ones(2), jnp.ones(2))

    with pytest.raises(ValueError, match=r"task 'a'.*\['devices'\].*jax.lax.pmean"):
        run(lambda loss: loss)
    np.testing.assert_allclose(run(lambda loss: jax.lax.pmean(loss, "devices")), 2.5)
