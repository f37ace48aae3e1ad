"""What a link of a chain is: it receives a Jacobian and hands on a Jacobian or an update."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax import states
from mtl_optax._numerics import divide, wide
from mtl_optax._options import per_task_leaves
from mtl_optax.jacobian import Jacobian, as_jacobian, task_names


def link(
    init_fn: Any,
    update_fn: Callable[..., tuple[Any, Any]],
    num_tasks: int | None = None,
    *,
    several: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A link of an `optax.chain` from what it does to a Jacobian.

    All strategies of this library are made by it, and so is one of your own. A *balancer* returns
    `jacobian.scale(weights)`, an *aggregator* `jacobian.combine(weights)`, or any gradient shaped
    as the parameters. It never sees how the Jacobian is computed, and is given what a
    `flax.nnx.Optimizer`, a `jax.jacrev` tree with `losses=` or a chain hands on.

    Args:
      init_fn: `init_fn(params)` returns the state: a NamedTuple of arrays of fixed shapes, of which
        `summarize` reads the scalars and those of shape `(K,)` and `(K, K)`; or
        `optax.init_empty_state`. Annotate as `mtl.PerTask` what has the tasks as its first axis in
        any other shape, and then all that has.
      update_fn: `update_fn(jacobian, state, **extra_args)` returns a Jacobian or one gradient, and
        the new state. Take `**extra_args` even if unused: other links of a chain get the same.
        Where tasks are absent (`jacobian.present`) their rows and losses are 0, the weights that
        they are given count as 0, and what the state holds of them stays as it was, whatever is
        returned: a mean over tasks is all that an update has to see to (`jacobian.num_present`).
      num_tasks: the K that the Jacobian must have; None takes any.
      several: whether `update_fn` takes a tuple of Jacobians, one a batch.

    Returns:
      An Optax transformation. Its `update` takes `present=`, a bool a task in a tree like the
      losses or in their order, False where the batch has nothing of that task; `losses=` and
      `shared=` (a mask over the parameters) for a `jax.jacrev` tree; all other extra arguments
      reach `update_fn`, and the parameters as `params=`.

    Raises:
      TypeError: by its `update`, if it gets a plain gradient, or `present=` is not of bools.
      ValueError: by its `update`, if the losses are not `num_tasks`, or the state is that of
        another strategy or of other tasks.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> def scale_by_inverse_loss():
      ...     def update_fn(jacobian, state, **extra_args):
      ...         return jacobian.scale(1 / jacobian.loss_vector()), state
      ...     return mtl.link(optax.init_empty_state, update_fn)
      >>> tx = optax.chain(scale_by_inverse_loss(), mtl.sum_tasks())
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": 9 * w @ w})(jnp.ones(2))
      >>> tx.update(jac, tx.init(jnp.ones(2)))[0].tolist()
      [2.0, 2.0]
    """
    get = receive_all if several else receive
    made: set[type] = set()  # the types of states that `init` makes, as far as is known

    def update(
        updates, state, params=None, *, losses=None, shared=None, present=None, **extra_args
    ) -> Any:
        states.check_state(state, made, lambda: init_fn(params), num_tasks)
        given = get(updates, losses, num_tasks, shared, present)
        result, new_state = update_fn(given, state, params=params, **extra_args)
        everyone, here = presence(given)
        if not everyone:
            new_state = states.hold(here, new_state, state)
        if isinstance(result, Jacobian):
            return result, new_state
        if not everyone and not (isinstance(given, Jacobian) and given.is_combined(result)):
            # What a strategy remembers of earlier gradients makes no update of nothing.
            anyone = jnp.any(here)
            result = jax.tree.map(
                lambda leaf: jnp.where(anyone, leaf, jnp.zeros_like(leaf)), result
            )
        return conform(result, params), new_state

    def init(params) -> Any:
        state = init_fn(params)
        states.TYPES.add(type(state))
        made.add(type(state))
        # A state is donated: it must not hold the caller's key or weights, nor one array twice.
        return jax.tree.map(jnp.copy, state)

    return optax.GradientTransformationExtraArgs(init, update)


def receive(
    updates: Any,
    losses: Any = None,
    num_tasks: int | None = None,
    shared: Any = None,
    present: Any = None,
) -> Jacobian:
    """What a link makes of the `updates` and extra arguments that it is given, checked.

    A `Jacobian` may come alone or as the one entry of a container, as `flax.nnx.Optimizer` hands
    it on; or as the tree that `jax.jacrev` returns, together with the losses.
    """
    is_jacobian = lambda x: isinstance(x, Jacobian)  # noqa: E731
    leaves = jax.tree.leaves(updates, is_leaf=is_jacobian)
    if len(leaves) == 1 and is_jacobian(leaves[0]):
        jacobian = leaves[0]
    elif len(leaves) > 1 and all(map(is_jacobian, leaves)):
        raise TypeError(
            f"a multi-task strategy got the Jacobians of {len(leaves)} batches, expected one: pass "
            "one of them (only strategies of several batches, such as mtl.modo, take a tuple, and "
            "no link or wrapper around them does)"
        )
    elif losses is None:
        raise TypeError(
            f"a multi-task strategy got {_describe(updates)}, expected the Jacobian of K losses: "
            "pass the one from mtl.value_and_jac(loss_fn)(params, ...), or what "
            "jax.jacrev(loss_fn) returns together with losses=. If this strategy stands in a "
            "chain, an aggregator before it has already combined the rows: keep exactly one "
            "aggregator, with every balancer before it and the optimizer after it"
        )
    else:
        jacobian = as_jacobian(updates, losses, shared=shared)
    if (size := sum(map(jnp.size, jax.tree.leaves(jacobian.losses)))) != jacobian.num_tasks:
        raise ValueError(
            f"a link got the Jacobians of {size // jacobian.num_tasks} models, stacked, expected "
            "that of one: put its update inside the jax.vmap that makes them; only strategies of "
            "mtl.fronts take a set, with nothing but optax behind them"
        )
    if num_tasks is not None and jacobian.num_tasks != num_tasks:
        raise ValueError(_wrong_number(jacobian, num_tasks))
    return jacobian.here().restrict(present, lambda: present_tasks(present, jacobian.losses))


def receive_all(
    updates: Any,
    losses: Any = None,
    num_tasks: int | None = None,
    shared: Any = None,
    present: Any = None,
) -> tuple[Jacobian, ...]:
    """What a link for several batches makes of its `updates`: one Jacobian a batch."""
    leaves = jax.tree.leaves(updates, is_leaf=lambda x: isinstance(x, Jacobian))
    if leaves and all(isinstance(leaf, Jacobian) for leaf in leaves):
        jacobians = [receive(jacobian, None, num_tasks, None, present) for jacobian in leaves]
        for other in jacobians[1:]:
            if other.names != jacobians[0].names:
                raise ValueError(
                    f"got the Jacobians of several batches with tasks {jacobians[0].names} and "
                    f"{other.names}, expected the same tasks of each"
                )
        return tuple(jacobians)
    return (receive(updates, losses, num_tasks, shared, present),)


def presence(given: Jacobian | tuple[Jacobian, ...]) -> tuple[bool, jax.Array]:
    """Whether no task can be absent, known while tracing, and which tasks take part."""
    jacobians = (given,) if isinstance(given, Jacobian) else given
    here = functools.reduce(jnp.logical_and, [jacobian.present for jacobian in jacobians])
    return all(jacobian.everyone for jacobian in jacobians), here


def present_tasks(present: Any, losses: Any) -> jax.Array:
    """The extra argument `present=` as `(K,)` bool, where the tasks have these losses."""
    for leaf in jax.tree.leaves(present):
        if isinstance(leaf, str) or not jnp.issubdtype(jnp.result_type(leaf), jnp.bool_):
            raise TypeError(
                f"present={present!r}, expected a bool for each of the tasks {task_names(losses)}: "
                "False where the batch has nothing of that task"
            )
    leaves = per_task_leaves("present", present, losses)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


def _wrong_number(jacobian: Jacobian, num_tasks: int) -> str:
    names, got = jacobian.names, jacobian.num_tasks
    few = str(names) if got <= 8 else f"({', '.join(map(repr, names[:3]))}, ...)"
    if got == 1:
        first = "got one loss, as of a sum: return the losses apart, as a dict or a list"
    elif len(jax.tree.leaves(jacobian.losses)) == 1:
        first = (
            f"got one array of {got} losses, as of a loss an example that was not reduced: take "
            "its mean for each task"
        )
    else:
        first = f"got {got} losses {few}"
    return (
        f"{first}. The strategy has num_tasks={num_tasks}: it expects {num_tasks} losses; if "
        f"{got} is meant, build it with num_tasks={got}"
    )


def _describe(tree: Any) -> str:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    more = ", ..." if len(shapes) > 3 else ""
    leaves = ", ".join(str(shape) for shape in shapes[:3])
    return f"a plain {type(tree).__name__} with {len(shapes)} leaves of shapes {leaves}{more}"


def conform(update: Any, params: Any) -> Any:
    """An update in the structure of the parameters that the optimizer sees.

    They differ under `flax.nnx.Optimizer`, which strips its variables down to arrays.
    """
    if params is None or jax.tree.structure(update) == jax.tree.structure(params):
        return update
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if shapes != [jnp.shape(leaf) for leaf in jax.tree.leaves(update)]:
        raise ValueError(
            f"the gradient has the structure {jax.tree.structure(update)}, expected that of the "
            f"parameters, {treedef}: pass to update() the params that were differentiated"
        )
    return treedef.unflatten(jax.tree.leaves(update))


def dealt(values: jax.Array, present: jax.Array) -> jax.Array:
    """What was drawn for K tasks, handed to those present in their order, first come first served.

    A strategy that draws at random so draws for them what it would draw if they were all.

    Args:
      values: `(K, ...)`; what absent tasks get means nothing.
      present: `(K,)` bool.
    """
    return values[jnp.maximum(jnp.cumsum(present) - 1, 0)]


def keep_finite(new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` where it is finite, else `old`: a NaN task must not poison a strategy's state."""
    return jnp.where(jnp.isfinite(new), new, old)


def running_mean(
    new: jax.Array,
    sums: jax.Array,
    masses: jax.Array,
    decay: float | jax.Array,
    present: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A moving average whose zeros of the start have no weight; what is not finite leaves it.

    Args:
      new: `(K,)`, one number a task.
      sums: `(K,)` float32, the average before its debiasing, 0 at first.
      masses: `(K,)` float32, the weights of all numbers in it, 0 at first.
      decay: weight of the past.
      present: `(K,)` bool, the tasks whose average moves.

    Returns:
      The average, 0 where there is none yet, and the new sums and masses.
    """
    seen, new = present & jnp.isfinite(new), new.astype(sums.dtype)
    sums = jnp.where(seen, decay * sums + (1 - decay) * new, sums)
    masses = jnp.where(seen, decay * masses + (1 - decay), masses)
    return divide(sums, masses), sums, masses


def check_params(params: Any) -> None:
    """Raises unless `init` got what a state has the structure of."""
    if not jax.tree.leaves(params):
        raise ValueError(
            "init got no parameters, expected those that are trained: this link keeps a row a "
            "task, shaped as they are, so call tx.init(params)"
        )


def task_zeros(num_tasks: int, params: Any) -> Any:
    """State that holds a row a task: zeros `(K, *param.shape)`, at least float32."""
    check_params(params)

    def zeros(leaf):
        dtype = jnp.result_type(leaf)
        dtype = wide(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
        # Split over devices as the parameter is.
        zero = jnp.zeros_like(leaf, dtype)
        return jnp.broadcast_to(zero, (num_tasks, *zero.shape))

    return jax.tree.map(zeros, params)
