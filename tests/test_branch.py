"""Branches under `vmap`: right for each element, and skipped where none needs them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from benchmarks.flops import parts
from mtl_optax._branch import fallback, where_needed, without_fallbacks

FLAGS = jnp.array([[True, False, False], [False, False, False]])
XS = jnp.arange(6.0).reshape(2, 3)


def choose(flag, x):
    key = jax.random.key(0)
    return where_needed(flag, lambda: (x**2, jax.random.split(key)[0]), lambda: (3 * x, key))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint])
def test_each_element_takes_its_own_branch(transform):
    values, keys = transform(jax.vmap(jax.vmap(choose)))(FLAGS, XS)
    np.testing.assert_array_equal(values, jnp.where(FLAGS, XS**2, 3 * XS))
    first = np.asarray(jax.random.key_data(jax.random.key(0)))
    moved = np.any(np.asarray(jax.random.key_data(keys)) != first, axis=-1)
    np.testing.assert_array_equal(moved, FLAGS)
    assert choose(FLAGS[0, 0], XS[1, 2])[0] == 25
    slopes = jax.vmap(jax.grad(lambda x, flag: choose(flag, x)[0]))(XS[1], FLAGS[0])
    np.testing.assert_array_equal(slopes, [6, 3, 3])
    _, scanned = jax.lax.scan(lambda _, at: (None, choose(*at)[0]), None, (FLAGS[0], XS[1]))
    np.testing.assert_array_equal(scanned, [9, 12, 15])


def test_a_count_may_leave_fallbacks_out():
    def conds(x):
        step = lambda x: fallback(x > 0, lambda: x**2, lambda: x)  # noqa: E731
        return str(jax.make_jaxpr(step)(x)).count("cond")

    x = jnp.ones(())
    with without_fallbacks():
        assert not conds(x)
    assert conds(x)


def mlp(params, x):
    h = jnp.tanh(x @ params["trunk"])
    return {t: jnp.mean((h @ params[t]) ** 2) for t in "abc"}


def start(num_models):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"trunk": (128, 32), "a": (32,), "b": (32,), "c": (32,)}
    return {
        name: jax.random.normal(key, (num_models, *shape))
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


X = jax.random.normal(jax.random.key(1), (64, 128))


@pytest.mark.parametrize("of", ["present", "every"])
def test_models_under_vmap_cost_what_one_does(of):
    tx = mtl.every(10, mtl.upgrad(3)) if of == "every" else mtl.uncertainty(3)

    def step(params, state, present):
        _, jac = mtl.value_and_jac(mlp)(params, X)
        told = {"present": {"a": present, "b": True, "c": True}} if of == "present" else {}
        return tx.update(jac, state, params, **told)[0]

    def plain(params):
        return jax.grad(lambda p: sum(mlp(p, X).values()))(params)

    params = start(4)
    args = params, jax.vmap(tx.init)(params), jnp.ones(4, bool)
    cost, _ = parts(jax.vmap(step), *args)
    assert cost <= 1.02 * parts(jax.vmap(plain), params)[0]


def test_models_that_refresh_at_different_times_do_as_each_alone():
    tx = optax.chain(mtl.every(2, mtl.pcgrad(3, key=jax.random.key(0))), optax.sgd(0.1))

    def step(carry):
        params, state = carry
        _, jac = mtl.value_and_jac(mlp)(params, X)
        updates, state = tx.update(jac, state, params)
        return optax.apply_updates(params, updates), state

    params = start(2)
    carry = params, jax.vmap(tx.init)(params)
    late = carry[1][0]._replace(wait=jnp.array([0, 1]), weighed=jnp.ones((2, 3), bool))
    carry = params, (late, carry[1][1])
    alone = [jax.tree.map(lambda leaf, i=i: leaf[i], carry) for i in range(2)]
    together, single = jax.jit(jax.vmap(step)), jax.jit(step)
    for _ in range(3):
        carry, alone = together(carry), [single(each) for each in alone]
    for i in range(2):
        for a, b in zip(jax.tree.leaves(carry[0]), jax.tree.leaves(alone[i][0]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


def test_a_trunk_that_is_not_finite_in_one_model_leaves_the_others_as_they_were():
    def losses(params, x):
        h = x @ params["trunk"]
        return {"a": jnp.mean(h**2), "b": jnp.mean(jnp.sqrt(x[0, 0] * h))}

    def update(params, x):
        _, jac = mtl.value_and_jac(losses)(params, x)
        tx = mtl.sum_tasks()
        return tx.update(jac, tx.init(params), params, present={"a": True, "b": x[0, 0] > 0})[0]

    params = {"trunk": jnp.ones((2, 3, 2))}
    x = jnp.ones((2, 4, 3)).at[1, 0, 0].set(0.0)
    x = x.at[1].multiply(-1.0)
    found = jax.vmap(update)(params, x)["trunk"]
    for i in range(2):
        alone = update({"trunk": params["trunk"][i]}, x[i])["trunk"]
        assert np.isfinite(alone).all()
        np.testing.assert_allclose(found[i], alone, rtol=1e-6)
