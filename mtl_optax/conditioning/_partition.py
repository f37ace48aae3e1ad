"""Groups of parameters, each aggregated by a strategy of its own."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.conditioning._base import run
from mtl_optax.links import conform, receive
from mtl_optax.states import check_state

OF_PARAMETERS = ("losses_fn", "validation_fn")  # extra arguments


class PartitionState(NamedTuple):
    """State of `partition`."""

    inner_states: dict[str, Any]  # of the strategies, by label


def partition(
    strategies: Mapping[str, optax.GradientTransformation],
    labels: Any | Callable[[Any], Any],
) -> optax.GradientTransformationExtraArgs:
    r"""Aggregates each group of parameters by its own strategy, over its own Gramian.

    .. math:: d_{(g)} = A_g(J_{(g)}), \quad J_{(g)} = \text{the columns of } J
              \text{ of the parameters in group } g

    As `optax.partition` gives each group an optimizer of its own:

        labels = {"encoder": "conflicts", "decoder": "plain"}  # a prefix of the parameters
        tx = optax.chain(
            mtl.partition({"conflicts": mtl.upgrad(2), "plain": mtl.sum_tasks()}, labels),
            optax.adam(1e-3),
        )

    All groups share the K backward passes. To a strategy the parameters of the other groups are
    empty arrays: in no row, no Gramian and no state. What weighs the tasks for all parameters alike
    stands before it in the chain. `losses_fn=` and `validation_fn=`, which `mtl.forum` and
    `mtl.auto_lambda` take, are functions of all parameters: each strategy moves those of its group.

    Args:
      strategies: by label, each a strategy (Jacobian in, gradient out), with or without an
        optimizer behind it.
      labels: a tree of labels with the structure of the parameters or a prefix of it, or a function
        from the parameters to one.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: that of each group's strategy.

    Raises:
      TypeError: if a strategy returns a Jacobian.
      ValueError: if the labels do not fit the parameters, a label has no strategy, or `gramian_at`
        measures none of the shared parameters of a group.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.partition({"a": mtl.mgda(2), "b": mtl.sum_tasks()}, {"u": "a", "v": "b"})
      >>> task_losses = lambda p: [p["u"] @ p["v"], jnp.sum(p["u"] ** 2 + p["v"] ** 2)]
      >>> params = {"u": jnp.array([1.0, 0.0]), "v": jnp.array([0.0, 1.0])}
      >>> losses, jac = mtl.value_and_jac(task_losses)(params)
      >>> update, state = tx.update(jac, tx.init(params), params)
      >>> [round(x, 4) for x in update["u"].tolist()], update["v"].tolist()
      ([0.4, 0.8], [1.0, 2.0])
    """
    if not strategies:
        raise ValueError("partition got no strategy, expected one for each label")
    inner = {label: optax.with_extra_args_support(tx) for label, tx in strategies.items()}

    def groups(params: Any) -> dict[str, list[bool]]:
        flat = _flat_labels(labels, params)
        if missing := sorted({repr(label) for label in flat if label not in inner}):
            raise ValueError(
                f"no strategy for the labels {', '.join(missing)}: partition got strategies for "
                f"{sorted(inner)}"
            )
        return {label: [each == label for each in flat] for label in inner}

    def init_fn(params):
        return PartitionState(
            {
                label: inner[label].init(_only(chosen, params))
                for label, chosen in groups(params).items()
            }
        )

    def update_fn(
        updates, state, params=None, *, losses=None, shared=None, present=None, **extra_args
    ):
        check_state(state, set(), PartitionState, None)
        jacobian = receive(updates, losses, None, shared, present)
        by_label = groups(jacobian.shared if params is None else params)
        treedef = jax.tree.structure(jacobian.shared)
        update, states = [None] * treedef.num_leaves, {}
        of_all = {name: extra_args[name] for name in OF_PARAMETERS if name in extra_args}
        for label, chosen in by_label.items():
            own = None if params is None else _only(chosen, params)
            part, old = jacobian.part(chosen), state.inner_states[label]
            of_own = {name: _within(chosen, params, fn) for name, fn in of_all.items()}
            result, states[label] = run(inner[label], part, old, own, extra_args | of_own)
            for i, leaf in enumerate(jax.tree.leaves(result)):
                update[i] = leaf if chosen[i] else update[i]
        return conform(treedef.unflatten(update), params), PartitionState(states)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _flat_labels(labels: Any, params: Any) -> list[Any]:
    tree = labels(params) if callable(labels) else labels
    try:
        full = jax.tree.map(lambda label, sub: jax.tree.map(lambda _: label, sub), tree, params)
    except ValueError as error:
        raise ValueError(
            "the labels of partition do not fit the parameters: expected a tree of labels of "
            f"their structure or a prefix of it. {error}"
        ) from None
    return jax.tree.leaves(full)


def _within(chosen: list[bool], params: Any, fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of the parameters as one of those of a group, the others as they are."""
    leaves, treedef = jax.tree.flatten(params)

    def of_own(own: Any) -> Any:
        pairs = zip(chosen, jax.tree.leaves(own), leaves, strict=True)
        return fn(treedef.unflatten([new if c else old for c, new, old in pairs]))

    return of_own


def _only(chosen: list[bool], params: Any) -> Any:
    """The parameters with those of the other groups empty."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        [
            leaf if is_chosen else jnp.zeros((0,), jnp.result_type(leaf))
            for leaf, is_chosen in zip(leaves, chosen, strict=True)
        ]
    )
