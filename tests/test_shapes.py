"""The shapes that public signatures name are those that go in and come out."""

import inspect

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import mtl_optax as mtl
from mtl_optax import solvers

J = jax.random.normal(jax.random.key(0), (3, 5))


def checked(fn):
    """`fn` with its annotations, which are words for a type checker, checked at each call."""
    names = {name: getattr(jaxtyping, name) for name in ("Array", "Bool", "Float", "Int", "Shaped")}
    hints = {
        name: eval(hint, {**fn.__globals__, **names}) if isinstance(hint, str) else hint
        for name, hint in fn.__annotations__.items()
    }

    def copy(*args, **kwargs):
        return fn(*args, **kwargs)

    copy.__signature__ = inspect.signature(fn).replace(
        parameters=[
            p.replace(annotation=hints.get(p.name, p.empty))
            for p in inspect.signature(fn).parameters.values()
        ],
        return_annotation=hints.get("return", inspect.Signature.empty),
    )
    copy.__annotations__ = hints
    return jaxtyping.jaxtyped(typechecker=beartype.beartype)(copy)


METHODS = (
    "loss_vector", "pullback", "gramian", "scaled_gramian", "correlation", "norms",
    "cross_gramian", "scale", "keep", "finite_tasks", "combine",
)  # fmt: skip


def jacobian():
    return mtl.as_jacobian(J, jnp.arange(3.0))


def test_every_array_in_the_signatures_of_the_jacobian_has_a_shape():
    public = [n for n, x in vars(mtl.Jacobian).items() if inspect.isfunction(x) and n[0] != "_"]
    named = [n for n in public if "Array" in str(vars(mtl.Jacobian)[n].__annotations__)]
    assert set(METHODS) <= set(named)
    for name in METHODS:
        assert "jax.Array" not in str(vars(mtl.Jacobian)[name].__annotations__), name


def test_what_comes_out_of_a_jacobian_has_the_shapes_of_its_signatures():
    jac, w, tasks = jacobian(), jnp.ones(3), jnp.array([True, False, True])
    calls = dict.fromkeys(METHODS, ()) | dict.fromkeys(("pullback", "scale", "combine"), (w,))
    calls |= {"keep": (tasks,), "cross_gramian": (jac,)}
    for name, args in calls.items():
        checked(vars(mtl.Jacobian)[name])(jac, *args)
    for name in ("present", "num_present"):
        checked(vars(mtl.Jacobian)[name].fget)(jac)
    for name in ("pullback", "scale", "combine"):
        with pytest.raises(jaxtyping.TypeCheckError):
            checked(vars(mtl.Jacobian)[name])(jac, jnp.ones((3, 1)))


@pytest.mark.parametrize("name", sorted(set(solvers.__all__) - {"SolverResult"}))
def test_solvers_take_and_return_the_shapes_of_their_signatures(name):
    Q, q = J @ J.T, -jnp.ones(3)
    good = {"nnls": (J, jnp.ones(3))}.get(name, (Q, q))
    bad = {"nnls": (J, jnp.ones((3, 1)))}.get(name, (Q, q[:, None]))
    solve = checked(getattr(solvers, name))
    assert solve(*good).x.ndim == 1
    with pytest.raises(jaxtyping.TypeCheckError):
        solve(*bad)


def test_losses_and_metrics_take_and_return_the_shapes_of_their_signatures():
    logits, labels = jnp.ones((2, 4, 3)), jnp.zeros((2, 4), jnp.int32)
    softmax = checked(mtl.losses.softmax_focal_loss)
    assert softmax(logits, labels).shape == (2, 4)
    assert checked(mtl.losses.regression_focal_loss)(jnp.full((2, 5), 0.5)).shape == (2, 5)
    assert checked(mtl.metrics.delta_m)(jnp.ones((4, 3)), jnp.ones(3)).shape == (4,)
    assert checked(mtl.metrics.mean_rank)(jnp.ones((4, 2, 3))).shape == (4, 2)
    hypervolume = checked(mtl.metrics.hypervolume)
    assert hypervolume(jnp.ones((4, 2)), jnp.zeros(2)).shape == ()
    affinity = checked(mtl.metrics.affinity)
    assert affinity(lambda w: [w[0] ** 2, w[1]], jnp.ones(2), learning_rate=0.1).shape == (2, 2)
    assert checked(mtl.metrics.non_dominated)(jnp.ones((4, 2))).shape == (4,)
    assert checked(mtl.metrics.igd)(jnp.ones((4, 2)), jnp.ones((5, 2))).shape == ()
    assert checked(mtl.metrics.spacing)(jnp.ones((4, 2))).shape == ()
    assert checked(mtl.losses.causal_weights)(jnp.ones((4, 2))).shape == (4, 2)
    assert checked(mtl.fronts.with_preference)(jnp.ones((4, 3)), jnp.ones(2)).shape == (4, 5)
    assert checked(mtl.fronts.ordering_penalty)(jnp.ones((4, 2)), jnp.ones((4, 2))).shape == (2,)
    with pytest.raises(jaxtyping.TypeCheckError):
        softmax(logits, labels[0])
    with pytest.raises(jaxtyping.TypeCheckError):
        hypervolume(jnp.ones((4, 2)), jnp.zeros(3))
