"""The laws of the Jacobian as a type: a value, at home in every transformation of JAX."""

import copy
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from tests.problems import mlp_batch, mlp_losses, mlp_params

K = 8
TASKS = tuple(f"t{i}" for i in range(K))
PARAMS = mlp_params(jax.random.key(0), (6, 8, 8), TASKS)
BATCH = mlp_batch(jax.random.key(1), TASKS, size=4)
WAYS = ({}, {"gramian": "ghost"}, {"gramian": "columns"}, {"rows": "batched"})
OTHER = jax.tree.map(lambda leaf: 0.7 * leaf, PARAMS)
MIXED = jnp.linspace(0.1, 1.0, K)


def jacobian(params=PARAMS, **options):
    return mtl.value_and_jac(mlp_losses, **options)(params, *BATCH)[1]


def read(jac):
    return jac.gramian(), jac.combine(MIXED)


@functools.cache
def expected(*, other=False):
    return jax.jit(lambda params: read(jacobian(params)))(OTHER if other else PARAMS)


def assert_close(got, wanted):
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)


# One program, one structure.


@pytest.mark.parametrize("way", WAYS)
def test_two_points_of_one_program_have_one_structure_whether_traced_or_not(way):
    structures = {
        jax.tree.structure(make(params))
        for make in (lambda p: jacobian(p, **way), jax.jit(lambda p: jacobian(p, **way)))
        for params in (PARAMS, OTHER)
    }
    assert len(structures) == 1


PROGRAMS = {
    "one": lambda w: {"a": 2.0 * jnp.sum(w), "b": jnp.sum(w**2)},
    "another literal": lambda w: {"a": 3.0 * jnp.sum(w), "b": jnp.sum(w**2)},
    "zero": lambda w: {"a": 0.0 * jnp.sum(w), "b": jnp.sum(w**2)},
    "negative zero": lambda w: {"a": -0.0 * jnp.sum(w), "b": jnp.sum(w**2)},
    "another name": lambda w: {"a": 2.0 * jnp.sum(w), "c": jnp.sum(w**2)},
    "another operation": lambda w: {"a": 2.0 * jnp.sum(w), "b": jnp.sum(jnp.flip(w) ** 3)},
    "another part": lambda w: {"a": 2.0 * jnp.sum(w[:2]), "b": jnp.sum(w**2)},
    "other losses": lambda w: (2.0 * jnp.sum(w), jnp.sum(w**2)),
}


@pytest.mark.parametrize("trace", [lambda fn: fn, jax.jit])
def test_one_program_is_never_taken_for_another(trace):
    w, use = jnp.array([1.0, -2.0, 3.0]), jax.jit(lambda jac: (jac.names, jac.rows())[1])
    structures = {}
    for name, losses in PROGRAMS.items():
        jac = trace(lambda w, fn=losses: mtl.value_and_jac(fn)(w)[1])(w)
        wanted = jnp.stack(jax.tree.leaves(jax.jacrev(losses)(w)))
        np.testing.assert_array_equal(use(jac), wanted)  # one cache for all of them
        structures[name] = jax.tree.structure(jac)
    assert structures["one"] != structures["another name"] != structures["other losses"]
    assert structures["one"] not in (structures["another operation"], structures["another part"])


def test_a_constant_is_no_part_of_the_structure_but_of_the_value():
    def at(constant):
        return mtl.value_and_jac(lambda w: {"a": jnp.sum(constant * w), "b": w[0]})(jnp.ones(3))[1]

    one, two = at(jnp.arange(3.0)), at(jnp.arange(3.0) + 1)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    use = jax.jit(lambda jac: jac.rows()[0])
    np.testing.assert_array_equal(use(one), [0, 1, 2])
    np.testing.assert_array_equal(use(two), [1, 2, 3])


def test_an_eager_jacobian_and_a_jitted_update_compile_once():
    tx, traces = optax.chain(mtl.upgrad(K), optax.sgd(0.01)), []

    @jax.jit
    def update(jac, opt_state, params):
        traces.append(1)
        updates, opt_state = tx.update(jac, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(10):
        params, opt_state = update(jacobian(params), opt_state, params)
    assert len(traces) == 1


# A value in control flow.


def test_cond_and_switch_return_one_from_each_branch():
    branches = [
        jacobian,
        lambda: jacobian(OTHER),
        lambda: jacobian(OTHER).scale(jnp.ones(K)),  # a balancer in one of them
    ]
    switched = jax.jit(lambda i: read(jax.lax.switch(i, branches)))
    chosen = jax.jit(lambda flag: read(jax.lax.cond(flag, *branches[:2])))
    assert_close(switched(0), expected())
    assert_close(switched(1), expected(other=True))
    assert_close(switched(2), expected(other=True))
    assert_close(chosen(False), expected(other=True))


def test_a_scan_carries_one_that_changes_at_each_step():
    def step(carry, _):
        params, jac = carry
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, jac.combine(1.0))
        return (params, jacobian(params)), jac.loss_vector()

    def delayed(first):
        return jax.lax.scan(step, (PARAMS, first), length=4)[1]

    losses = jax.jit(lambda: delayed(jacobian()))()
    assert np.all(np.sum(losses[1:], axis=1) < np.sum(losses[:-1], axis=1))
    # Its zeros are the Jacobian of losses 0 and rows 0: a first step that does not move.
    late = jax.jit(lambda: delayed(jax.tree.map(jnp.zeros_like, jacobian())))()
    np.testing.assert_array_equal(late[0], np.zeros(K))
    np.testing.assert_allclose(late[1:], losses[:-1], rtol=1e-5)


def test_a_stack_of_them_is_sliced_and_joined_again():
    make = lambda params: jacobian(params)  # noqa: E731
    stacked = jax.vmap(make)(jax.tree.map(lambda *leaves: jnp.stack(leaves), PARAMS, OTHER))
    second = jax.tree.map(lambda leaf: leaf[1], stacked)
    assert_close(jax.jit(read)(second), expected(other=True))
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), jacobian(), jacobian(OTHER))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), expected(), expected(other=True))
    assert_close(jax.jit(jax.vmap(read))(joined), both)


def test_it_crosses_checkpoint_and_waits_and_moves_as_arrays_do():
    assert_close(jax.jit(jax.checkpoint(read))(jacobian()), expected())
    moved = jax.device_put(jax.block_until_ready(jacobian()), jax.devices()[0])
    assert_close(jax.jit(read)(moved), expected())
    shapes = jax.eval_shape(read, jax.eval_shape(jacobian))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, expected())


# What is computed once, and where it is known.


def count_dots(fn, *args):
    """The matrix products of a program, those in branches of a cond left out."""

    def walk(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            total += eqn.primitive.name == "dot_general"
            if eqn.primitive.name != "cond":
                bodies = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
                total += sum(walk(body) for body in bodies if hasattr(body, "eqns"))
        return total

    return walk(jax.make_jaxpr(fn)(*args).jaxpr)


@pytest.mark.parametrize("way", WAYS)
def test_a_gramian_inside_a_cond_leaves_the_update_one_pass(way):
    def guarded(flag):
        jac = jacobian(**way)
        gramian = jax.lax.cond(flag, jac.gramian, lambda: jnp.zeros((K, K)))
        return gramian, jac.combine(MIXED)

    alone = count_dots(lambda flag: jacobian(**way).combine(MIXED), True)
    assert count_dots(guarded, True) == alone
    assert_close(jax.jit(guarded)(True), expected())


def test_a_strategy_inside_a_cond_measures_once():
    tx = mtl.mgda(K)

    def update(jac):
        return tx.update(jac, tx.init(PARAMS), PARAMS)

    def inside():
        jac = jacobian()  # of the outer trace, measured in the branch
        return jax.lax.cond(True, lambda: update(jac), lambda: update(jac))

    def dots_of_branch():
        (cond,) = [e for e in jax.make_jaxpr(inside)().jaxpr.eqns if e.primitive.name == "cond"]
        return count_dots(jax.extend.core.jaxpr_as_fun(cond.params["branches"][0]), *(
            jnp.zeros(v.aval.shape, v.aval.dtype) for v in cond.invars[1:]))  # fmt: skip

    outside = count_dots(lambda: update(jacobian())) - count_dots(lambda: jacobian().losses)
    assert 0 < dots_of_branch() <= outside


@pytest.mark.parametrize("way", WAYS)
def test_nothing_leaks_out_of_a_trace(way):
    jac, tx = jacobian(**way), mtl.mgda(K)
    with jax.check_tracer_leaks():
        jax.make_jaxpr(lambda: read(jac))()
        jax.make_jaxpr(lambda flag: jax.lax.cond(flag, jac.gramian, lambda: jnp.zeros((K, K))))(
            True
        )
        jax.make_jaxpr(lambda: tx.update(jac, tx.init(PARAMS), PARAMS))()
        jax.make_jaxpr(jax.vmap(lambda s: jac.scale(jnp.full(K, s)).combine(MIXED)))(jnp.ones(2))
    assert_close(jax.jit(read)(jac), expected())


def test_it_is_copied_as_a_value_and_says_what_can_be_pickled():
    jac = jacobian()
    assert copy.copy(jac) is jac
    assert_close(jax.jit(read)(copy.deepcopy({"jac": jac})["jac"]), expected())
    with pytest.raises(TypeError, match=r"pickle jac.losses and jac.rows\(\)"):
        pickle.dumps(jac)


# Narrow types.


def test_rows_leave_float16_before_a_loss_scale_is_taken_back():
    scale, small = 4096.0, 2e-8  # the gradient is below the smallest float16, 6e-8

    def losses(params):
        h = jnp.ones((4, 3), jnp.float16) @ params["w"]
        return {
            k: scale * small * jnp.mean(h.astype(jnp.float32) * s) for k, s in (("a", 1), ("b", 2))
        }

    params = {"w": jnp.ones((3, 2), jnp.float16)}
    _, jac = mtl.value_and_jac(losses)(params)
    jac = jac.scale(jnp.full(2, 1 / scale))
    rows = jac.rows()["w"]
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows[0], np.full((3, 2), small / 2), rtol=2e-3)
    np.testing.assert_allclose(jac.norms(), [small / 2 * 6**0.5, small * 6**0.5], rtol=2e-3)
    # 100 of them are a float16 again, and no pass through it saw the small numbers.
    summed = jac.combine(jnp.full(2, 100.0))["w"]
    assert summed.dtype == jnp.float16
    np.testing.assert_allclose(summed, np.full((3, 2), 150 * small), rtol=2e-2)


@pytest.mark.parametrize("gramian", ["rows", "ghost", "columns"])
def test_float8_parameters_are_ordinary(gramian):
    def losses(params):
        w = params["w"].astype(jnp.float32)
        return {"a": jnp.sum(w**2), "b": jnp.sum(w)}

    params = {"w": jnp.ones((3, 3), jnp.float8_e4m3fn)}
    _, jac = mtl.value_and_jac(losses, gramian=gramian)(params)
    np.testing.assert_allclose(jac.gramian(), [[36, 18], [18, 9]])
    update, _ = mtl.mgda(2).update(jac, mtl.mgda(2).init(params), params)
    assert update["w"].dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(jac.keep(jnp.array([True, False])).gramian(), [[36, 0], [0, 0]])


def test_products_of_many_weights_stay_finite():
    jac = mtl.as_jacobian(jnp.eye(2), jnp.ones(2))
    for _ in range(4):
        jac = jac.scale(jnp.array([1e20, 1.0]))
    assert np.all(np.isfinite(jac.norms()))
    assert np.all(np.isfinite(jac.combine(jnp.array([0.0, 1.0]))))
