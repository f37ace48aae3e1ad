"""What an aggregator does with the parameters of one task: `heads=`, documented in the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl

PARAMS = {"trunk": jnp.array([1.0, -0.5, 2.0]), "a": jnp.array([3.0, 1.0]), "b": jnp.array(0.5)}
FACTORIES = {
    "mgda": mtl.mgda,
    "nash_mtl": mtl.nash_mtl,
    "nash_mtl, shortened": lambda k, **options: mtl.nash_mtl(k, max_norm=0.5, **options),
    "fairgrad": lambda k, **options: mtl.fairgrad(k, alpha=2.0, **options),
    "epo": mtl.epo,
    "excess_mtl": mtl.excess_mtl,
}


def task_losses(params):
    x = params["trunk"]
    return {
        "a": jnp.sum((params["a"] * x[:2] - 1) ** 2),
        "b": jnp.sum((params["b"] * x + 1) ** 2),
    }


# All solvers hand their weights on in one place.
@pytest.mark.parametrize("name", ["mgda", "nash_mtl, shortened", "fairgrad", "excess_mtl"])
def test_weighted_heads_follow_the_weighted_sum_of_the_losses(name):
    own = jax.jacrev(task_losses)(PARAMS)
    jac = mtl.as_jacobian(own, task_losses(PARAMS), shared={"trunk": True, "a": False, "b": False})
    held = name == "mgda"  # where the weights rest, the heads are weighed too
    updates = {}
    for heads in ("own", "weighted"):
        tx = FACTORIES[name](2, heads=heads)
        tx = mtl.every(2, tx) if held else tx
        step = jax.jit(tx.update)
        updates[heads], state = step(jac, tx.init(PARAMS))
        if held:
            updates[heads], state = step(jac, state)
    weights = dict(zip("ab", (state.inner_state if held else state).weights, strict=True))
    trunk = sum(np.asarray(weights[k] * own[k]["trunk"], float) for k in "ab")
    for update in updates.values():
        np.testing.assert_allclose(update["trunk"], trunk, rtol=1e-4, atol=1e-5)
    # The length that nash_mtl is shortened to is that of the trunk, as in its authors' code.
    factor = np.linalg.norm(trunk) / 2**0.5 if "shortened" in name else 1.0
    for task in "ab":
        np.testing.assert_allclose(updates["own"][task], own[task][task], rtol=1e-5)
        expected = weights[task] / factor * own[task][task]
        np.testing.assert_allclose(updates["weighted"][task], expected, rtol=1e-4)


@pytest.mark.parametrize("name", FACTORIES)
def test_another_choice_is_named(name):
    with pytest.raises(ValueError, match="heads='both', expected one of"):
        FACTORIES[name](2, heads="both")
