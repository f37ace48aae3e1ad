"""What a state belongs to: under whose names it is read, and how it outlives its tasks."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl

TWO, THREE = ("buy", "click"), ("buy", "click", "like")
PARAMS = jnp.ones(4)


def losses_of(names):
    return lambda w: {name: jnp.sum((w - k) ** 2) for k, name in enumerate(names)}


def trained(name, names, steps=3, **extra_args):
    tx = optax.chain(mtl.make(name, len(names), key=jax.random.key(0)), optax.adam(0.1))
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(steps):
        _, jac = mtl.value_and_jac(losses_of(names))(params)
        kpis = jnp.linspace(0.2, 0.8, len(names))
        jac = (jac, jac) if mtl.STRATEGIES[name].needs == "batches" else jac
        losses_fn = losses_of(names)
        more = {"kpis": kpis, "validation_fn": losses_fn, "losses_fn": losses_fn} | extra_args
        updates, state = tx.update(jac, state, params, **more)
        params = optax.apply_updates(params, updates)
    return tx, state, params


# Names.


def test_numbers_stand_under_their_own_names():
    tx = mtl.weights({"click": 1.0, "buy": 5.0})
    losses, jac = mtl.value_and_jac(losses_of(("click", "buy")))(PARAMS)
    _, state = tx.update(jac, tx.init(None))
    for given in (losses, jac, jac.names):
        assert mtl.summarize(state, given)["weights/click"] == 1.0
    with pytest.raises(ValueError, match="which number is whose"):
        mtl.summarize(state, ["click", "buy"])
    for wrong in (("buy",), THREE, {"buy": 1.0}):
        with pytest.raises(ValueError, match="is of 2"):
            mtl.summarize(state, wrong)


def test_names_may_follow_the_places_of_a_list_or_of_nested_losses():
    for losses in ([1.0] * 12, {"a": {"z": 1.0}, "a-b": 2.0}, {"b": [1.0, 2.0], "a": (3.0,)}):
        names = mtl.task_names(losses)
        state = mtl.make("dwa", len(names)).init(None)
        assert f"weights/{names[-1]}" in mtl.summarize(state, names)


def test_a_history_is_no_table_of_pairs():
    _, state, _ = trained("dwa", TWO)
    assert not [name for name in mtl.summarize(state, TWO) if "-" in name]


def test_names_are_told_apart():
    losses = dict.fromkeys(("a", "a-b", "b-c", "c"), 1.0)
    summary = mtl.summarize(mtl.monitor_tasks(4).init(None), losses)
    assert len([name for name in summary if name.startswith("cosine/")]) == 6
    assert "cosine/'a'-'b-c'" in summary
    one = jnp.float32(1)
    assert mtl.task_names({"a": [one], "a/0": one}) == ("['a'][0]", "['a/0']")


def test_one_link_of_several_is_read_by_the_name_of_its_state():
    tx = optax.chain(mtl.scale_by_dwa(2), mtl.scale_by_uncertainty(2), mtl.sum_tasks())
    state = tx.init(PARAMS)
    with pytest.raises(KeyError):
        optax.tree.get(state, "weights")
    assert optax.tree.get(state, "UncertaintyState").weights.shape == (2,)
    assert "weights.2/buy" in mtl.summarize(state, TWO)


class CountsState(NamedTuple):
    seen: jax.Array  # (K,), by its shape
    table: jax.Array  # (K, K), by its shape
    count: jax.Array


class RowsState(NamedTuple):
    rows: mtl.PerTask
    start: Annotated[mtl.PerTask, 7.0]
    of_the_step: jax.Array  # (2,) by chance


def test_states_of_a_user_are_held_by_shape_or_as_they_are_annotated():
    def counts(num_tasks):
        def init(params):
            seen = jnp.zeros(num_tasks)
            return CountsState(seen, jnp.zeros((num_tasks, num_tasks)), jnp.zeros([]))

        def update(jacobian, state, **extra_args):
            return jacobian, jax.tree.map(lambda x: x + 1, state)

        return mtl.link(init, update, num_tasks)

    def rows(num_tasks):
        def init(params):
            return RowsState(jnp.zeros((num_tasks, 5)), jnp.zeros(num_tasks), jnp.zeros(2))

        def update(jacobian, state, **extra_args):
            return jacobian, jax.tree.map(lambda x: x + 1, state)

        return mtl.link(init, update, num_tasks)

    tx = optax.chain(counts(2), rows(2), mtl.sum_tasks())
    _, state = tx.update(jnp.eye(2), tx.init(PARAMS), losses=jnp.ones(2), present=[True, False])
    assert state[0].seen.tolist() == [1, 0]
    assert state[0].table.tolist() == [[1, 0], [0, 0]]
    assert state[0].count == 1
    assert state[1].rows[:, 0].tolist() == [1, 0]
    assert state[1].of_the_step.tolist() == [1, 1]
    resized = mtl.resize_state(state, TWO, ("click", "new", "buy"))
    assert resized[0].seen.tolist() == [0, 0, 1]
    assert resized[0].table[2].tolist() == [0, 0, 1]
    assert resized[1].start.tolist() == [0, 7, 1]
    assert resized[1].of_the_step.tolist() == [1, 1]


# Tasks that come and go.


@pytest.mark.parametrize("name", sorted(mtl.STRATEGIES))
def test_a_state_outlives_a_task_that_is_added_and_removed_again(name):
    """In some state of training: every number is another one."""
    _, start, _ = trained(name, TWO, steps=0)
    leaves, treedef = jax.tree.flatten(start)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    state = treedef.unflatten(
        [
            x if is_key(x) else (np.arange(x.size).reshape(x.shape) + i).astype(x.dtype)
            for i, x in enumerate(leaves)
        ]
    )
    _, fresh, _ = trained(name, THREE, steps=0)
    grown = mtl.resize_state(state, TWO, THREE)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    assert shapes(grown) == shapes(fresh)
    assert jax.tree.map(lambda x: x.dtype, grown) == jax.tree.map(lambda x: x.dtype, fresh)
    for before, now in zip(jax.tree.leaves(state[1]), jax.tree.leaves(grown[1]), strict=True):
        np.testing.assert_array_equal(now, before)  # Adam's
    back = mtl.resize_state(grown, THREE, TWO)
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        if not is_key(before):
            np.testing.assert_array_equal(now, before)
    # With a fresh state new tasks take theirs from it.
    again = mtl.resize_state(state, TWO, ("like", "buy", "click"), fresh)
    assert shapes(again) == shapes(fresh)


def test_a_state_moves_to_a_model_with_a_new_head():
    params = {"trunk": jnp.ones(3), "heads": {"buy": jnp.ones(3), "click": 2 * jnp.ones(3)}}

    def losses(p):
        return {k: jnp.sum((p["trunk"] * head - 1) ** 2) for k, head in p["heads"].items()}

    def chain(k):
        return optax.chain(mtl.ema_tasks(k), mtl.uncertainty(k), optax.adam(0.1))

    tx = chain(2)
    _, jac = mtl.value_and_jac(losses)(params)
    _, state = tx.update(jac, tx.init(params), params)
    more = params | {"heads": {"add": jnp.zeros(3)} | params["heads"]}
    new = chain(3)
    moved = mtl.resize_state(state, TWO, ("add", *TWO), new.init(more))
    rows = moved[0].rows
    np.testing.assert_array_equal(rows["trunk"][1:], state[0].rows["trunk"])
    np.testing.assert_array_equal(rows["heads"]["buy"][1:], state[0].rows["heads"]["buy"])
    assert not np.any(rows["trunk"][0])
    assert not np.any(rows["heads"]["add"])
    mu, old = moved[2][0].mu, state[2][0].mu
    np.testing.assert_array_equal(mu["heads"]["click"], old["heads"]["click"])
    np.testing.assert_array_equal(mu["trunk"], old["trunk"])
    assert int(moved[2][0].count) == 1
    _, jac = mtl.value_and_jac(losses)(more)
    new.update(jac, moved, more)


def test_resizing_names_what_does_not_fit():
    _, state, _ = trained("dwa", TWO)
    with pytest.raises(ValueError, match="the state is of 2 tasks and from_names has 3"):
        mtl.resize_state(state, THREE, TWO)
    with pytest.raises(ValueError, match="each once"):
        mtl.resize_state(state, ("buy", "buy"), TWO)
    with pytest.raises(ValueError, match="from_names='buy'"):
        mtl.resize_state(state, "buy", TWO)
    with pytest.raises(ValueError, match="3 names, and the"):
        mtl.resize_state(state, TWO, THREE, state)


# The state of something else.


def test_a_state_of_other_tasks_or_of_another_strategy_is_named():
    tx, state, params = trained("mgda", THREE)
    _, jac = mtl.value_and_jac(losses_of(THREE))(params)
    _, two, _ = trained("mgda", TWO)
    with pytest.raises(ValueError, match=r"of 2 tasks.*num_tasks=3.*resize_state"):
        tx.update(jac, two, params)
    _, other, _ = trained("dwa", THREE)
    with pytest.raises(ValueError, match="expected the SolvedState"):
        tx.update(jac, other, params)
    assert state


def test_a_sum_and_a_loss_an_example_are_called_by_their_names():
    tx = mtl.mgda(2)
    _, jac = mtl.value_and_jac(lambda w: jnp.sum(w**2))(PARAMS)
    with pytest.raises(ValueError, match="got one loss, as of a sum"):
        tx.update(jac, tx.init(PARAMS))
    _, jac = mtl.value_and_jac(lambda w: jnp.outer(jnp.ones(16), w).ravel() ** 2)(PARAMS)
    with pytest.raises(ValueError, match="a loss an example that was not reduced") as error:
        tx.update(jac, tx.init(PARAMS))
    assert len(str(error.value)) < 300


class RowsAndMore(NamedTuple):
    rows: mtl.PerTask
    inner: optax.OptState  # whose own annotation only a type checker can resolve


def test_what_a_field_says_holds_whatever_its_neighbours_say():
    def update_fn(jacobian, state, **extra_args):
        return jacobian, state._replace(rows=jacobian.rows() + state.rows + 1)

    tx = mtl.link(lambda params: RowsAndMore(jnp.zeros((2, 2)), ()), update_fn, 2)
    jac = mtl.as_jacobian(jnp.diag(jnp.array([1.0, 10.0])), jnp.ones(2))
    _, state = tx.update(jac, tx.init(jnp.ones(2)), present=[True, False])
    assert state.rows.tolist() == [[2.0, 1.0], [0.0, 0.0]]


def test_gathered_micro_batches_move_with_their_tasks():
    tx = mtl.multi_steps(mtl.weights([1.0, 1.0]), 2, 2)
    rows, w = jnp.diag(jnp.array([1.0, 10.0])), jnp.ones(2)
    state = tx.init(w)
    _, state = tx.update(rows, state, w, losses=jnp.ones(2), present=jnp.array([True, False]))
    moved = mtl.resize_state(state, ("a", "b"), ("b", "a"))
    assert moved.counts.tolist() == [0, 1]
    assert moved.rows.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_names_may_be_numbers_as_text():
    losses = lambda w: {str(k): jnp.sum((w - k) ** 2) for k in (9, 10)}  # noqa: E731
    _, jac = mtl.value_and_jac(losses)(jnp.ones(2))
    found = mtl.summarize(mtl.dwa(2).init(jnp.ones(2)), jac.names)
    assert {"weights/10", "weights/9"} <= set(found)
