"""The ways to the Gramian: each is held against the rows of jax.jacrev, whatever the layer."""

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from mtl_optax.jacobian.ways import ghost
from tests.problems import a_fifth, mlp_batch, mlp_losses, mlp_params, relative_error

K = 3
WEIGHTS = jnp.array([0.3, -1.0, 2.0])


@pytest.fixture(name="tap_all")
def _tap_all(monkeypatch):
    """Taps every layer that has the form, also those that are too small to be worth it."""
    monkeypatch.setattr(ghost, "rows_cost", lambda uses, num_tasks: float("inf"))


# Losses of one trunk layer W each: (parameters, features (4, 5, 6) of it, the shape of W).

IDS = jnp.array([[0, 3, 3], [1, 3, 7]])
X = jax.random.normal(jax.random.key(1), (4, 5, 6))
LAYERS = {
    "dense": ((6, 7), lambda w: X @ w),
    "dense of transposed": ((7, 6), lambda w: X @ w.T),
    "weights first": ((7, 6), lambda w: jnp.einsum("of,btf->obt", w, X)),
    "attention projection": ((6, 2, 3), lambda w: jnp.einsum("btd,dhk->bhtk", X, w)),
    "attention output": (
        (2, 3, 7),
        lambda w: jnp.einsum("bthk,hkd->btd", X.reshape(4, 5, 2, 3), w),
    ),
    "a layer of experts": ((3, 6, 2), lambda w: jnp.einsum("btd,edf->ebtf", X, w)),
    "stacked experts": (
        (5, 6, 2),
        lambda w: jnp.einsum("etd,edf->etf", X.transpose(1, 0, 2), w),
    ),
    "reshaped": ((42,), lambda w: X @ w.reshape(6, 7)),
    "used twice": ((6, 6), lambda w: jnp.tanh(X @ w) @ w),
    "inside jit": ((6, 7), jax.jit(lambda w: jnp.tanh(X @ w))),
    "look-up": ((8, 3), lambda w: w[IDS]),
    "look-up, filled out of bounds": ((6, 3), lambda w: w.at[IDS].get(mode="fill", fill_value=0)),
    "look-up, clipped": ((6, 3), lambda w: w.at[IDS].get(mode="clip")),
    "two look-ups": ((8, 3), lambda w: jnp.concatenate([w[IDS], w[IDS + 1]])),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_ghost_of_every_layer_is_exact(name, tap_all):
    shape, layer = LAYERS[name]
    params = {"w": jax.random.normal(jax.random.key(2), shape), "b": jnp.ones(())}

    def losses(params):
        y = jnp.tanh(layer(params["w"]) + params["b"])
        return {"a": jnp.mean(y**2), "b": jnp.mean(jnp.cos(y)) * 3, "c": jnp.sum(y[0])}

    tapped = []

    def read(params):
        _, jac = mtl.value_and_jac(losses, gramian="ghost", rows="batched")(params)
        gramian = jac.gramian()
        tapped.append(set(jac._way.taps(jac._source, jac._layout.measured)))
        return gramian, jac.combine(WEIGHTS), jax.jacrev(losses)(params)

    gramian, combined, rows = jax.jit(read)(params)
    matrix = np.stack([np.r_[rows[t]["b"], np.ravel(rows[t]["w"])] for t in "abc"]).astype(float)
    assert tapped == [{1}]  # w, not b
    assert relative_error(gramian, matrix @ matrix.T) < 1e-5
    got = np.r_[combined["b"], np.ravel(combined["w"])]
    assert relative_error(got, np.asarray(WEIGHTS) @ matrix) < 1e-5


def test_what_has_not_the_form_falls_back_to_rows(tap_all):
    def losses(params):
        x = X @ jnp.tanh(params["bent"])  # not linear in the parameter
        x = x @ params["mixed"] + jnp.sum(params["mixed"])  # also used otherwise
        _, x = jax.lax.scan(lambda c, _: (c, jnp.tanh(x @ params["looped"])), 0, None, length=2)
        return {"a": jnp.mean(x**2), "b": jnp.mean(jnp.sin(x)), "c": jnp.max(x)}

    key, tapped = jax.random.key(0), []
    params = {name: jax.random.normal(key, (6, 6)) for name in ("bent", "mixed", "looped")}

    def read(params):
        _, jac = mtl.value_and_jac(losses, gramian="ghost")(params)
        gramian = jac.gramian()
        tapped.append(set(jac._way.taps(jac._source, jac._layout.measured)))
        return gramian, mtl.value_and_jac(losses)(params)[1].gramian()

    gramian, expected = jax.jit(read)(params)
    assert tapped == [set()]
    assert relative_error(gramian, expected) < 1e-5


def test_a_layer_is_tapped_where_that_is_cheaper():
    def leaves(num_examples, width):
        params = {"w": jnp.ones((width, width))}

        def losses(params, x):
            y = jnp.tanh(x @ params["w"])
            return [jnp.mean(y), jnp.mean(y**2)]

        spec = jax.ShapeDtypeStruct((num_examples, width), jnp.float32)
        taps = []

        def read(x):
            _, jac = mtl.value_and_jac(losses, gramian="ghost")(params, x)
            taps.append(set(jac._way.taps(jac._source, jac._layout.measured)))

        jax.eval_shape(read, spec)
        return taps[0]

    assert leaves(num_examples=8, width=64) == {0}
    assert leaves(num_examples=256, width=16) == set()


PROBLEM = (mlp_params(jax.random.key(0)), *mlp_batch(jax.random.key(1)))


@functools.cache
def reference():
    def read():
        _, jac = mtl.value_and_jac(mlp_losses)(*PROBLEM)
        return jac.gramian(), jac.combine(WEIGHTS)

    return jax.jit(read)()


MODES = [
    ("isolated", "ghost"),
    ("batched", "ghost"),
    ("sequential", "ghost"),
    ("isolated", "columns"),
    ("sequential", "rows"),
    ("batched", "rows"),
]


@pytest.mark.parametrize(("rows", "gramian"), MODES)
def test_modes_agree_jitted_vmapped_scaled_and_guarded(rows, gramian, tap_all):
    def read(w):
        _, jac = mtl.value_and_jac(mlp_losses, rows=rows, gramian=gramian)(*PROBLEM)
        jac = jac.scale(w)
        kept = jac.keep(jnp.array([True, True, False]))
        return jac.gramian(), jac.combine(WEIGHTS), kept.gramian()

    w = jnp.array([[1.0, 1.0, 1.0], [2.0, -0.5, 3.0]])
    gramian, combined, kept = jax.jit(jax.vmap(read))(w)
    expected, combination = reference()
    assert relative_error(gramian, expected[None] * w[:, :, None] * w[:, None, :]) < 1e-5
    assert relative_error(kept[0, :2, :2], expected[:2, :2]) < 1e-5
    assert not np.any(kept[:, 2])
    for got, leaf in zip(jax.tree.leaves(combined), jax.tree.leaves(combination), strict=True):
        assert relative_error(got[0], leaf) < 1e-5


@pytest.mark.parametrize(("rows", "gramian"), MODES)
def test_tasks_that_meet_nowhere_but_in_the_parameters(rows, gramian, tap_all):
    def losses(params):
        at = lambda points: jnp.tanh(points @ params["w"]) @ params["v"]  # noqa: E731
        return {
            "pde": jnp.mean(at(X[0]) ** 2),
            "edge": jnp.mean(at(X[1]) - 1),
            "none": jnp.ones(()),
        }

    params = {"w": jnp.ones((6, 4)) / 3, "v": jnp.arange(4.0)}

    def read(params):
        _, jac = mtl.value_and_jac(losses, rows=rows, gramian=gramian)(params)
        return jac.gramian(), jac.combine(WEIGHTS), jax.jacrev(losses)(params)

    measured, combined, rows_of = jax.jit(read)(params)
    tasks = ("edge", "none", "pde")
    matrix = np.stack([np.r_[rows_of[t]["v"], np.ravel(rows_of[t]["w"])] for t in tasks])
    assert relative_error(measured, matrix @ matrix.T) < 1e-5
    got = np.r_[combined["v"], np.ravel(combined["w"])]
    assert relative_error(got, np.asarray(WEIGHTS) @ matrix) < 1e-5


@pytest.mark.parametrize(("rows", "gramian"), MODES)
def test_a_nan_label_stays_with_its_task(rows, gramian, tap_all):
    params, x, y = PROBLEM
    y = y | {"b": y["b"].at[0].set(jnp.nan)}
    read = lambda *args: mtl.value_and_jac(mlp_losses, rows=rows, gramian=gramian)(*args)[1]  # noqa: E731
    measured = jax.jit(lambda *args: read(*args).gramian())(params, x, y)
    expected, _ = reference()
    others = np.ix_([0, 2], [0, 2])
    np.testing.assert_allclose(measured[others], expected[others], rtol=1e-5)
    assert np.isnan(measured[1, 1])


@pytest.mark.parametrize("gramian", ["ghost", "columns"])
@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_modes_are_safe_where_squares_overflow(gramian, scale, tap_all):
    losses = lambda *args: jax.tree.map(lambda x: scale * x, mlp_losses(*args))  # noqa: E731
    read = lambda *args: mtl.value_and_jac(losses, gramian=gramian)(*args)[1].correlation()  # noqa: E731
    cosines, norms = jax.jit(read)(*PROBLEM)
    expected, _ = reference()
    lengths = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(norms / scale, lengths, rtol=1e-5)
    np.testing.assert_allclose(cosines, expected / np.outer(lengths, lengths), atol=1e-5)


@pytest.mark.parametrize("gramian", ["ghost", "columns"])
def test_a_zero_row_has_no_scale(gramian, tap_all):
    def losses(params, x, y):
        every = mlp_losses(params, x, y)
        return every | {"b": 0 * every["b"]}

    read = lambda *args: mtl.value_and_jac(losses, gramian=gramian)(*args)[1].scaled_gramian()  # noqa: E731
    products, scales = jax.jit(read)(*PROBLEM)
    assert scales[1] == 0
    assert np.all(scales[np.array([0, 2])] > 0)
    assert not np.any(products[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("gramian", ["ghost", "columns"])
def test_modes_keep_dtypes(gramian, dtype, tap_all):
    with jax.enable_x64(dtype == jnp.float64):
        params = mlp_params(jax.random.key(0), dtype=dtype)
        batch = mlp_batch(jax.random.key(1), dtype=dtype)

        @jax.jit
        def read(*args):
            _, jac = mtl.value_and_jac(mlp_losses, gramian=gramian)(*args)
            _, expected = mtl.value_and_jac(mlp_losses)(*args)
            return jac.gramian(), expected.gramian(), jac.combine(WEIGHTS)

        measured, expected, combined = read(params, *batch)
        assert measured.dtype == jnp.promote_types(jnp.float32, dtype)
        assert all(g.dtype == dtype for g in jax.tree.leaves(combined))
        assert relative_error(measured, expected) < (0.05 if dtype == jnp.bfloat16 else 1e-12)


def many_tasks(num_tasks):
    tasks = tuple(f"t{i:02d}" for i in range(num_tasks))
    params = mlp_params(jax.random.key(0), (6, 32, 32), tasks)
    return params, *mlp_batch(jax.random.key(1), tasks, size=8)


def test_many_tasks_leave_the_update_to_a_pullback():
    weights = jnp.linspace(-1, 1, 10)

    @jax.jit
    def read(*args):
        _, jac = mtl.value_and_jac(mlp_losses, gramian="ghost")(*args)
        _, expected = mtl.value_and_jac(mlp_losses, gramian="rows")(*args)
        gramians = jac.gramian(), expected.gramian()
        return gramians, jac.combine(weights), expected.combine(weights)

    (gramian, expected), mixed, exact = read(*many_tasks(10))
    assert relative_error(gramian, expected) < 1e-5
    for got, leaf in zip(jax.tree.leaves(mixed), jax.tree.leaves(exact), strict=True):
        assert relative_error(got, leaf) < 1e-5


def test_memory_of_the_ways_to_the_gramian():
    def temp_bytes(**modes):
        def step(*args):
            _, jac = mtl.value_and_jac(mlp_losses, **modes)(*args)
            return jac.combine(jnp.sum(jac.gramian(), axis=1))

        tasks = tuple(f"t{i:02d}" for i in range(16))
        params = mlp_params(jax.random.key(0), (64, 256, 256), tasks)
        args = params, *mlp_batch(jax.random.key(1), tasks, size=8, width=64)
        return jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes

    rows = temp_bytes(gramian="rows")
    assert temp_bytes(gramian="columns") < 0.25 * rows
    assert temp_bytes(gramian="ghost", rows="batched") < 0.25 * rows


def test_a_sketch_is_unbiased_with_the_stated_error(tap_all):
    columns, draws = 4, 2000

    def read(key):
        sketch = mtl.Sketch(key, columns)
        return mtl.value_and_jac(mlp_losses, gramian=sketch, rows="batched")(*PROBLEM)[1].gramian()

    gramians = np.asarray(
        jax.jit(jax.vmap(read))(jax.random.split(jax.random.key(0), draws)), float
    )
    expected = np.asarray(reference()[0], float)
    lengths = np.sqrt(np.diag(expected))
    deviation = gramians.std(0) / np.outer(lengths, lengths)
    assert np.all(deviation > 0)
    assert np.all(deviation < np.sqrt(2 / columns))
    standard_errors = np.abs(gramians.mean(0) - expected) / (gramians.std(0) / np.sqrt(draws))
    assert np.all(standard_errors < 4)


def test_a_sketched_step_trains_with_a_key_a_step():
    params, x, y = many_tasks(4)
    tx = optax.chain(mtl.upgrad(4), optax.adam(1e-2))

    @jax.jit
    def step(params, opt_state, key):
        sketch = mtl.Sketch(key, columns=8)
        losses, jac = mtl.value_and_jac(mlp_losses, gramian=sketch)(params, x, y)
        updates, opt_state = tx.update(jac, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, sum(losses.values())

    opt_state, totals = tx.init(params), []
    for key in jax.random.split(jax.random.key(0), 20):
        params, opt_state, total = step(params, opt_state, key)
        totals.append(total)
    assert totals[-1] < 0.8 * totals[0]


def test_unknown_ways_are_told():
    with pytest.raises(ValueError, match=r"expected one of .*'ghost', .*'columns'.*Sketch"):
        mtl.value_and_jac(mlp_losses, gramian="gost")
    with pytest.raises(ValueError, match="rows='parallel' is not a row mode"):
        mtl.value_and_jac(mlp_losses, rows="parallel")


# What the ways were once wrong about.

ALL = ["rows", "ghost", "columns"]


def gramian_of(losses, params, *args, **options):
    return jax.jit(lambda *a: mtl.value_and_jac(losses, **options)(*a)[1].gramian())(params, *args)


@pytest.mark.parametrize("gramian", ALL)
def test_complex_features_of_a_real_weight(gramian, tap_all):
    def losses(w):
        y = jnp.fft.fft(X[0], axis=1) @ w
        return {"a": jnp.mean(jnp.abs(y) ** 2), "b": jnp.mean(jnp.sin(y.real)), "c": y.imag[0, 1]}

    w = jax.random.normal(jax.random.key(3), (6, 6))
    rows = jax.jacrev(losses)(w)
    matrix = np.stack([np.ravel(rows[task]) for task in "abc"]).astype(float)
    got = gramian_of(losses, w, gramian=gramian)
    assert got.dtype == jnp.float32
    assert relative_error(got, matrix @ matrix.T) < 1e-5


def test_complex_features_at_the_feature_level():
    encode = lambda w: jnp.fft.fft(w)  # noqa: E731
    decode = lambda w, z: {"a": jnp.sum(jnp.abs(z) ** 2), "b": jnp.sum(z.real * z.imag)}  # noqa: E731
    w = jnp.arange(4.0)
    _, jac = mtl.value_and_feature_jac(encode, decode)(w)
    z = encode(w)
    a, b = (np.r_[2 * z.real, 2 * z.imag], np.r_[z.imag, z.real])
    np.testing.assert_allclose(jac.gramian(), [[a @ a, a @ b], [a @ b, b @ b]], rtol=1e-6)


@pytest.mark.parametrize("gramian", ALL)
@pytest.mark.parametrize("as_argument", [False, True])
def test_indices_out_of_bounds_count_as_their_gradient_does(gramian, as_argument, tap_all):
    def losses(table, indices):
        e = table[indices]
        return {"a": jnp.sum(e**2), "b": jnp.sum(jnp.sin(e))}

    table, indices = jnp.arange(1.0, 7.0).reshape(3, 2), jnp.array([0, 2, 3])
    if as_argument:
        got = gramian_of(losses, table, indices, gramian=gramian)
    else:
        got = gramian_of(lambda table: losses(table, indices), table, gramian=gramian)
    assert relative_error(got, np.array([[264, 13.774683], [13.774683, 1.4674959]])) < 1e-6


@jax.custom_vjp
def _sine(x):
    return jnp.sin(x)


_sine.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, g: (g * cos,))


@jax.custom_vjp
def _clipped_backwards(x):
    return jnp.sin(x)


_clipped_backwards.defvjp(
    lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, g: (jnp.clip(g * cos, -0.1, 0.1),)
)


def _through(fn):
    def losses(w):
        y = fn(w)
        return {"a": jnp.sum(y**2), "b": jnp.sum(jnp.cos(y))}

    return losses


def test_columns_go_forth_through_a_custom_backward_rule():
    w = jnp.arange(4.0)
    got, expected = (gramian_of(_through(f), w, gramian="columns") for f in (_sine, jnp.sin))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_columns_name_a_backward_rule_that_has_no_transpose():
    with pytest.raises(TypeError, match=r'gramian="columns" goes forth.*use gramian="auto"'):
        gramian_of(_through(_clipped_backwards), jnp.arange(4.0), gramian="columns")


def _with_rule(rule):
    """The identity, whose cotangents a rule changes."""

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, x), lambda x, g: (rule(x, g),))
    return same


LINEAR_RULES = {
    "reversed": lambda x, g: -0.5 * g,
    "by the residual": lambda x, g: g * jnp.tanh(x) + jnp.where(x > 0, g, 0),
    "guarded": lambda x, g: jnp.where(jnp.isfinite(g), g, 0),
    "added to zeros": lambda x, g: jnp.zeros_like(g).at[:2].add(g[:2]) + jnp.zeros_like(g),
    "mixed": lambda x, g: g @ jax.nn.softmax(x.T @ x) - jnp.cumsum(g, axis=0),
    "in a loop": lambda x, g: jax.lax.fori_loop(0, 3, lambda i, g: 0.5 * g + i * g, g),
    "in a branch": lambda x, g: jax.lax.cond(x[0, 0] > 0, lambda g: 2 * g, lambda g: g, g),
}
BENT_RULES = {
    "clipped": lambda x, g: jnp.clip(g, -0.01, 0.01),
    "normalized": lambda x, g: g / jnp.linalg.norm(g),
    "signs": lambda x, g: jnp.sign(g),
    "squared": lambda x, g: g * jnp.abs(g),
    "quantised": lambda x, g: jnp.round(100 * g) / 100,
    "in integers": lambda x, g: (100 * g).astype(jnp.int32).astype(g.dtype) / 100,
    "noisy": lambda x, g: g + 0.01 * jax.random.normal(jax.random.key(0), g.shape),
    "chosen": lambda x, g: jnp.where(g > 0, g, 0.5 * g),
    "clipped in a loop": lambda x, g: jax.lax.fori_loop(
        0, 2, lambda i, g: jnp.clip(1.1 * g, -0.01, 0.01), g
    ),
    "clipped in a branch": lambda x, g: jax.lax.cond(
        x[0, 0] > 0, lambda g: jnp.minimum(g, 0.01), lambda g: jnp.maximum(g, -0.01), g
    ),
}


RULES = LINEAR_RULES | BENT_RULES


@pytest.mark.parametrize(
    ("name", "around"),
    [*zip(RULES, itertools.cycle([lambda f: f, jax.jit, jax.checkpoint]))],
)
def test_backward_rules_that_are_not_linear_take_whole_rows(name, around, monkeypatch):
    """A row is what the rule makes of a cotangent of 1 at one loss."""
    monkeypatch.setattr("mtl_optax.jacobian.ways.auto.SMALL", 0)
    ruled = around(_with_rule(RULES[name]))
    w = jax.random.normal(jax.random.key(0), (6, 4))

    def losses(w):
        h = ruled(X[:, 0] @ w)
        return {"a": jnp.mean(h**2), "b": 40 * jnp.sum(jnp.sin(h))}

    rows = np.stack([np.ravel(row) for row in jax.jacrev(losses)(w).values()])
    got = gramian_of(losses, w, gramian="auto")
    assert relative_error(got, rows @ rows.T) < 1e-5
    for gramian in ("ghost", "streamed"):
        if name in LINEAR_RULES:
            assert relative_error(gramian_of(losses, w, gramian=gramian), rows @ rows.T) < 1e-5
        else:
            with pytest.raises(TypeError, match=r'not linear in the cotangent.*gramian="rows"'):
                gramian_of(losses, w, gramian=gramian)


STRATEGIES = {
    "mgda": lambda: mtl.mgda(2),
    "moco": lambda: mtl.moco(2),
    "db_mtl": lambda: mtl.db_mtl(2),
    "graddrop": lambda: mtl.graddrop(2, key=jax.random.key(0)),
}


@pytest.mark.parametrize("gramian", ALL)
@pytest.mark.parametrize("name", STRATEGIES)
def test_heads_alone_and_empty_leaves_are_ordinary(gramian, name, tap_all):
    def losses(params):
        nothing = jnp.sum(X[0] @ params["empty"]) + jnp.sum(params["none"])
        return {task: jnp.sum(params[task] ** 2) + nothing for task in ("a", "b")}

    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    params |= {"empty": jnp.zeros((6, 0)), "none": jnp.zeros((0, 3))}
    tx = STRATEGIES[name]()

    @jax.jit
    def update(params):
        _, jac = mtl.value_and_jac(losses, gramian=gramian)(params)
        return tx.update(jac, tx.init(params), params)[0]

    got = update(params)
    scale = 1 / 2 if name == "db_mtl" else 1  # its rows are those of the logarithms, of losses 2, 3
    np.testing.assert_allclose(got["a"], 2 * scale * np.ones(2), rtol=1e-6)
    assert got["empty"].shape == (6, 0)
    assert got["none"].shape == (0, 3)


def test_rows_that_are_given_may_be_empty_or_none_shared():
    grads = {
        task: {"w": jnp.full(2, g), "e": jnp.zeros((0, 3))} for task, g in (("a", 1.0), ("b", 3.0))
    }
    losses = {"a": 1.0, "b": 2.0}
    tx = mtl.mgda(2)
    update, _ = tx.update(grads, tx.init(None), losses=losses)
    np.testing.assert_allclose(update["w"], [1, 1])
    apart = mtl.as_jacobian(grads, losses, shared={"w": False, "e": True})
    np.testing.assert_array_equal(apart.gramian(), np.zeros((2, 2)))
    np.testing.assert_allclose(tx.update(apart, tx.init(None))[0]["w"], [4, 4])


GUARDED = {
    "multi_steps": lambda: mtl.multi_steps(
        optax.chain(mtl.drop_nonfinite_tasks(3), mtl.mgda(3)), every_k=1, num_tasks=3
    ),
    "ema_tasks": lambda: optax.chain(
        mtl.ema_tasks(3, decay=0.0), mtl.drop_nonfinite_tasks(3), mtl.mgda(3)
    ),
    "drop": lambda: optax.chain(mtl.drop_nonfinite_tasks(3), mtl.mgda(3)),
}


@pytest.mark.parametrize("name", a_fifth(GUARDED))
@pytest.mark.parametrize("given", [False, True])
def test_guarded_rows_at_hand_with_heads(name, given):
    params, *batch = PROBLEM
    tx, plain = GUARDED[name](), mtl.mgda(3)

    @jax.jit
    def updates(params):
        losses, jac = mtl.value_and_jac(mlp_losses)(params, *batch)
        wanted, _ = plain.update(jac, plain.init(params), params)
        if given:
            jac = mtl.as_jacobian(jax.jacrev(mlp_losses)(params, *batch), losses, shared=jac.shared)
        return tx.update(jac, tx.init(params), params)[0], wanted

    got, wanted = updates(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("gramian", ["ghost", "streamed"])
def test_a_gradient_that_cancels_to_rounding_has_no_negative_square(gramian):
    """x is of rank 2, and the cotangent of one task lies where xᵀ is 0."""
    smallest = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x = (rng.normal(size=(8, 2)) @ rng.normal(size=(2, 64))).astype(np.float32)
        null = np.linalg.svd(x.T.astype(np.float64))[2][-1]
        cotangent = np.outer(null, rng.normal(size=64)).astype(np.float32)

        def losses(w, x=x, cotangent=cotangent):
            y = x @ w
            return {"a": jnp.sum(y * cotangent), "b": jnp.mean(y**2)}

        w = jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)
        _, jac = mtl.value_and_jac(losses, gramian=gramian)(w)
        smallest.append(jac.scaled_gramian()[0].diagonal().min())
        assert np.isfinite(jac.norms()).all()
    assert min(smallest) >= 0


WAYS = ("auto", "rows", "ghost", "streamed", "columns")


@pytest.mark.parametrize("gramian", WAYS)
def test_a_step_is_exported_for_any_batch_size(gramian):
    """Where the sizes are symbols there is nothing to compare, and the numbers are the same."""
    width = 70_000 if gramian == "auto" else 8  # past what is held as rows in any case
    params = {"trunk": jnp.ones((3, width)) / width, "a": jnp.ones(width), "b": jnp.ones(width)}

    def losses(p, x):
        h = jnp.tanh(x @ p["trunk"])
        return {k: jnp.mean((h @ p[k] - 1) ** 2) for k in ("a", "b")}

    def gramian_of(p, x):
        return mtl.value_and_jac(losses, gramian=gramian)(p, x)[1].gramian()

    (size,) = jax.export.symbolic_shape("b")
    shaped = jax.ShapeDtypeStruct((size, 3), jnp.float32)
    exported = jax.export.export(jax.jit(gramian_of))(params, shaped)
    x = jax.random.normal(jax.random.key(0), (5, 3))
    np.testing.assert_allclose(exported.call(params, x), jax.jit(gramian_of)(params, x), rtol=1e-5)


@pytest.mark.parametrize("gramian", ["auto", "ghost"])
def test_tasks_along_an_axis_are_exported_for_any_batch_size(gramian):
    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    def gramian_of(w, x):
        return mtl.value_and_jac(loss, in_axes=(None, 0), gramian=gramian)(w, x)[1].gramian()

    (size,) = jax.export.symbolic_shape("b")
    shaped = jax.ShapeDtypeStruct((4, size, 3), jnp.float32)
    w, x = jnp.ones((3, 5)), jax.random.normal(jax.random.key(0), (4, 6, 3))
    got = jax.export.export(jax.jit(gramian_of))(w, shaped).call(w, x)
    np.testing.assert_allclose(got, jax.jit(gramian_of)(w, x), rtol=1e-5)


def test_features_are_exported_for_any_batch_size():
    def step(w, x):
        encode, heads = lambda w: x @ w, lambda w, h: {"a": jnp.mean(h**2), "b": jnp.mean(h)}
        return mtl.value_and_feature_jac(encode, heads)(w)[1].gramian()

    (size,) = jax.export.symbolic_shape("b")
    w, x = jnp.ones((3, 5)), jax.random.normal(jax.random.key(0), (6, 3))
    exported = jax.export.export(jax.jit(step))(w, jax.ShapeDtypeStruct((size, 3), jnp.float32))
    np.testing.assert_allclose(exported.call(w, x), jax.jit(step)(w, x), rtol=1e-5)
