"""Tasks along an axis: one element's loss, every element a task."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_optax as mtl
from benchmarks.flops import flops
from tests.problems import a_fifth

N = 5
KEY = jax.random.key(0)
PARAMS = {
    "w": jax.random.normal(KEY, (6, 4)),
    "b": jnp.linspace(-1, 1, 4),
    "table": jax.random.normal(jax.random.key(1), (3, 6)),
    "kernel": jax.random.normal(jax.random.key(2), (3, 6, 6)) / 4,
    "heads": jax.random.normal(jax.random.key(3), (N, 4)),
}
X = jax.random.normal(jax.random.key(4), (N, 3, 6))
IDS = jnp.array([[0, 1, 2], [2, 2, 1], [0, 0, 7], [1, 1, 1], [2, 0, -1]])  # some out of bounds
AXES = ({"w": None, "b": None, "table": None, "kernel": None, "heads": 0}, 0, 0)


def dense(p, x, ids):
    return jnp.sum(jnp.tanh(x[0] @ p["w"] + p["b"]) * p["heads"])


def several_rows(p, x, ids):
    h = jnp.tanh((x + p["table"][ids]) @ p["w"] + p["b"][None])
    return jnp.mean((h @ p["heads"] - 1) ** 2)


def embedding(p, x, ids):
    return jnp.sum(jnp.sin(p["table"][ids]) * x)


def scanned(p, x, ids):
    step = jax.checkpoint(lambda h, _: (jnp.tanh(h @ p["w"] @ p["w"].T), None))
    return jnp.sum(jax.lax.scan(step, x, length=3)[0] ** 2)


def convolved(p, x, ids):
    h = jax.lax.conv_general_dilated(
        x[None], p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.sum(jnp.tanh(h[0] @ p["w"]) ** 2)


def reused(p, x, ids):
    return jnp.sum((x[0] @ p["w"]) ** 2) + jnp.sum(jnp.sin(x[1] @ p["w"])) + jnp.sum(p["w"])


def branched(p, x, ids):
    return jax.lax.cond(ids[0] > 0, lambda: jnp.sum(x @ p["w"]), lambda: jnp.sum((x @ p["w"]) ** 2))


def two_losses(p, x, ids):
    h = jnp.tanh(x[0] @ p["w"] + p["b"])
    return {"fit": jnp.sum(h * p["heads"]) ** 2, "size": jnp.mean(h**2)}


LOSSES = [
    dense, several_rows, embedding, scanned, convolved, reused, branched, two_losses,
]  # fmt: skip


def reference(fn, params, x):
    """The rows in float64 by `jax.jacrev` of the mapped function, leaves `(K, *shape)`."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, x))
        rows = jax.jacrev(lambda p: jax.vmap(fn, AXES)(p, wide[1], IDS))(wide[0])
        rows = list(rows.values()) if fn is two_losses else [rows]
        return {name: np.concatenate([np.asarray(r[name]) for r in rows]) for name in params}


@pytest.mark.parametrize("gramian", ["rows", "ghost"])
@pytest.mark.parametrize("fn", a_fifth(LOSSES), ids=lambda fn: fn.__name__)
def test_rows_gramian_and_combinations_are_those_of_the_mapped_function(fn, gramian):
    expected = reference(fn, PARAMS, X)
    K = len(expected["w"])
    weights = np.linspace(-1, 2, K).astype(np.float32)

    @jax.jit
    def everything(params, x):
        losses, jac = mtl.value_and_jac(fn, in_axes=AXES, gramian=gramian)(params, x, IDS)
        update = jac.combine(weights)
        return losses, jac.rows(), jac.gramian(), jac.pullback(weights), update

    losses, rows, gramian_matrix, pulled, update = everything(PARAMS, X)
    shared = mtl.value_and_jac(fn, in_axes=AXES)(PARAMS, X, IDS)[1].shared
    assert not shared["heads"] or fn is two_losses
    chosen = [n for n in expected if shared[n]]
    flat = np.concatenate([expected[n].reshape(K, -1) for n in chosen], axis=1)
    close = lambda got, want: np.testing.assert_allclose(  # noqa: E731
        got, want, rtol=0, atol=2e-5 * max(np.max(np.abs(want)), 1e-6)
    )
    close(gramian_matrix, flat @ flat.T)
    for name, want in expected.items():
        close(rows[name], want)
        close(pulled[name], np.tensordot(weights, want, 1))
        own = weights if shared[name] else np.ones(K)
        close(update[name], np.tensordot(own, want, 1))
    mapped = jax.vmap(fn, AXES)(PARAMS, X, IDS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), losses, mapped)


def test_names_aux_and_keywords_are_those_of_the_mapped_function():
    def fn(w, x, *, y):
        return {"a": jnp.sum(w * x) * y, "b": jnp.sum((w - x) ** 2)}, {"seen": x[0]}

    w, x, y = jnp.ones(2), jnp.arange(6.0).reshape(3, 2), jnp.arange(3.0)
    (losses, aux), jac = mtl.value_and_jac(fn, has_aux=True, in_axes=(None, 0))(w, x, y=y)
    assert jac.names == ("a/0", "a/1", "a/2", "b/0", "b/1", "b/2")
    assert losses["a"].tolist() == [0.0, 5.0, 18.0]
    assert aux["seen"].tolist() == [0.0, 2.0, 4.0]
    update, _ = mtl.mean(6).update(jac, mtl.mean(6).init(w), w)
    expected = jax.grad(
        lambda w: jnp.sum(jax.vmap(lambda x, y: jnp.add(*fn(w, x, y=y)[0].values()))(x, y))
    )
    np.testing.assert_allclose(update, expected(w) / 6, rtol=1e-6)


def test_modules_and_strategies_work_unchanged():
    model = nnx.Linear(6, 1, rngs=nnx.Rngs(0))

    def loss(model, x, y):
        return (model(x)[0] - y) ** 2

    optimizer = nnx.Optimizer(model, optax.chain(mtl.mgda(N), optax.sgd(0.1)), wrt=nnx.Param)
    before = max(jax.vmap(lambda x: loss(model, x, 1.0))(X[:, 0]))
    for _ in range(20):
        losses, jac = mtl.value_and_jac(loss, in_axes=(None, 0, None), gramian="ghost")(
            model, X[:, 0], 1.0
        )
        optimizer.update(model, jac)
    assert max(losses) < before
    norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="changes an nnx module"):
        mtl.value_and_jac(lambda m, x: jnp.sum(m(x)), in_axes=(None, 0))(norm, X)


@pytest.mark.parametrize("gramian", ["rows", "ghost"])
def test_absent_tasks_and_links_behave_as_everywhere(gramian):
    bad = X.at[1].set(jnp.nan)
    value_and_jac = mtl.value_and_jac(several_rows, in_axes=AXES, gramian=gramian)
    here = np.arange(N) != 1
    tx = optax.chain(mtl.drop_nonfinite_tasks(N), mtl.monitor_tasks(N), mtl.upgrad(N))
    _, jac = jax.jit(value_and_jac)(PARAMS, bad, IDS)
    dropped, _ = jax.jit(tx.update)(jac, tx.init(PARAMS), PARAMS)
    told, _ = mtl.upgrad(N).update(jac, mtl.upgrad(N).init(PARAMS), PARAMS, present=here)
    rows = reference(several_rows, PARAMS, X)
    alone = mtl.upgrad(N - 1)
    shared = {n: r[here].astype(np.float32) for n, r in rows.items() if n != "heads"}
    expected, _ = alone.update(shared, alone.init(None), losses=jnp.ones(N - 1))
    for update in (dropped, told):
        assert not np.any(update["heads"][1])
        for name, want in expected.items():
            np.testing.assert_allclose(update[name], want, atol=3e-6 * np.max(np.abs(want)))


def test_a_jacobian_of_elements_is_a_value_that_cond_and_scan_carry():
    value_and_jac = mtl.value_and_jac(dense, in_axes=AXES, gramian="ghost")

    @jax.jit
    def run(params):
        def step(jac, scale):
            _, new = value_and_jac(params, scale * X, IDS)
            return jax.lax.cond(scale > 1, lambda: new, lambda: jac), jac.gramian()[0, 0]

        return jax.lax.scan(step, value_and_jac(params, X, IDS)[1], jnp.array([1.0, 2.0, 1.0]))[1]

    first, same, other = run(PARAMS)
    assert first == same != other


@pytest.mark.parametrize(("batch", "most"), [(32, 0.8), (128, 1.3), (256, 2.0)])
def test_a_gramian_of_examples_costs_about_one_backward_pass(batch, most):
    sizes = (784, 128, 64, 10)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in itertools.pairwise(sizes)]
    x = jax.ShapeDtypeStruct((batch, 784), jnp.float32)

    def loss(weights, x):
        for w in weights[:-1]:
            x = jnp.tanh(x @ w)
        return jax.nn.logsumexp(x @ weights[-1])

    def gramian(weights, x):
        return mtl.value_and_jac(loss, in_axes=(None, 0), gramian="ghost")(weights, x)[1].gramian()

    plain = jax.grad(lambda w, x: jnp.mean(jax.vmap(loss, (None, 0))(w, x)))
    assert flops(gramian, shapes, x) <= most * flops(plain, shapes, x)


@pytest.mark.parametrize("gramian", ["rows", "ghost"])
def test_tasks_with_data_of_their_own_cost_one_plain_step(gramian):
    shapes = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 3
    x = jax.ShapeDtypeStruct((10, 32, 64), jnp.float32)

    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def step(weights, x):
        _, jac = mtl.value_and_jac(loss, in_axes=(None, 0), gramian=gramian)(weights, x)
        return mtl.mgda(10).update(jac, mtl.mgda(10).init(None))[0]

    plain = jax.grad(lambda w, x: jnp.mean(jax.vmap(loss, (None, 0))(w, x)))
    most = 1.6 if gramian == "rows" else 2.5  # of matrix products: the pairs of tasks of the ghost
    assert flops(step, shapes, x) <= most * flops(plain, shapes, x)


@pytest.mark.parametrize(
    ("in_axes", "match"),
    [
        ((None, 0), "2 entries for 3 positional"),
        ((None, None, None), "at least one array"),
        (({"w": 1, "b": None, "table": None, "kernel": None, "heads": 0}, 0, 0), "one common size"),
        ((None, 0, 1), "one common size"),
    ],
)
def test_axes_that_do_not_fit_are_named(in_axes, match):
    with pytest.raises(ValueError, match=match):
        mtl.value_and_jac(dense, in_axes=in_axes)(PARAMS, X, IDS)


def test_losses_of_an_element_are_scalars_and_ways_are_named():
    with pytest.raises(ValueError, match="written for one element"):
        mtl.value_and_jac(lambda p, x, ids: x @ p["w"], in_axes=AXES)(PARAMS, X[:, 0], IDS)
    with pytest.raises(ValueError, match="tasks along an axis"):
        mtl.value_and_jac(dense, in_axes=AXES, gramian="columns")


def test_the_plan_says_which_leaves_are_heads():
    plan = str(mtl.value_and_jac(dense, in_axes=AXES, gramian="ghost")(PARAMS, X, IDS)[1].plan())
    assert "pairs of tasks" in plan
    assert "taken as shared" not in plan


@jax.custom_vjp
def layer(x, w):
    return jnp.sin(x @ w)


def layer_backward(residuals, g):
    x, w = residuals
    slope = g * jnp.cos(x @ w)
    return slope @ w.T, x.T @ slope


layer.defvjp(lambda x, w: (layer(x, w), (x, w)), layer_backward)


@pytest.mark.parametrize("gramian", ["rows", "ghost"])
def test_a_backward_rule_of_ones_own_is_followed(gramian):
    def loss(p, x):
        return jnp.sum(layer(x, p["w"]) * jnp.array([[1.0, 2.0, 3.0, 4.0]]))

    weights, params = jnp.arange(1.0, N + 1), {"w": PARAMS["w"]}
    _, jac = mtl.value_and_jac(loss, in_axes=(None, 0), gramian=gramian)(params, X)
    each = jax.vmap(loss, (None, 0))
    expected = jax.grad(lambda p: weights @ each(p, X))(params)
    np.testing.assert_allclose(jac.pullback(weights)["w"], expected["w"], rtol=1e-5, atol=1e-5)
    tx = mtl.upgrad(N)
    update, _ = tx.update(jac, tx.init(params), params)
    _, by_rows = mtl.value_and_jac(each, gramian="rows")(params, X)
    expected, _ = tx.update(by_rows, tx.init(params), params)
    np.testing.assert_allclose(update["w"], expected["w"], rtol=1e-4, atol=1e-5)


def test_frozen_leaves_and_variables_are_no_columns():
    params = {"heads": PARAMS["heads"], "w": PARAMS["w"], "b": PARAMS["b"]}
    loss = lambda p, x: dense(p, x, None)  # noqa: E731
    axes = ({"heads": 0, "w": None, "b": None}, 0)
    for frozen in params:
        wrt = {name: name != frozen for name in params}
        _, jac = mtl.value_and_jac(loss, in_axes=axes, wrt=wrt)(params, X)
        expected = jax.grad(lambda p: jnp.sum(jax.vmap(loss, axes)(p, X)))(params)
        update = jac.pullback(jnp.ones(N))
        for name in params:
            wanted = 0 * expected[name] if name == frozen else expected[name]
            np.testing.assert_allclose(update[name], wanted, rtol=1e-5, atol=1e-6)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(6, 4, rngs=rngs)
            self.norm, self.drop = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return jnp.sum(self.drop(self.norm(self.body(x))) ** 2)

    model = Model(nnx.Rngs(0))
    model.eval()
    for wrt, shapes in ((None, 4), (nnx.PathContains("body"), 2)):
        run = mtl.value_and_jac(lambda m, x: m(x[0]), in_axes=(None, 0), wrt=wrt)
        rows = run(model, X)[1].rows()
        assert [len(leaf) for leaf in jax.tree.leaves(rows)] == [N] * shapes


@pytest.mark.parametrize("in_axes", [(None, 3), (None, -4), (7, 0)])
def test_an_axis_that_an_array_has_not_is_named(in_axes):
    with pytest.raises(ValueError, match="axes that they have"):
        mtl.value_and_jac(lambda p, x: jnp.sum(x @ p), in_axes=in_axes)(PARAMS["w"], X)
