"""What of a state belongs to a task: held while it is absent, kept when others come and go."""

import contextlib
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["task", "pair", "step"]

# A field of a state whose leaves have the tasks as their first axis, as `(K,)` weights, K rows or
# the state of an optimizer that is mapped over the tasks; and one whose first two axes are tasks.
# All others belong to the step. A new task starts from 0, or from x in `Annotated[PerTask, x]`.
PerTask = Annotated[Any, "task"]
PerPair = Annotated[Any, "pair"]

# The types of the states that links have made.
TYPES: set[type] = set()


def is_link_state(node: Any) -> bool:
    """Whether a node of an optimizer's state is that of a link."""
    return hasattr(node, "_asdict") and (_is_ours(type(node)) or type(node) in TYPES)


def _is_ours(state_type: type) -> bool:
    return state_type.__module__.startswith(f"{__package__}.")


def link_states(opt_state: Any) -> Iterator[Any]:
    """The states of all links in an optimizer's state, outer ones first."""
    for node in jax.tree.leaves(opt_state, is_leaf=is_link_state):
        if is_link_state(node):
            yield node
            for field, value in node._asdict().items():
                if field not in _declared(type(node)):
                    yield from link_states(value)


@functools.cache
def _declared(state_type: type) -> dict[str, tuple[Kind, Any]]:
    """The fields that belong to tasks, with what a new one starts from."""
    hints: dict[str, Any] = {}
    for base in reversed(state_type.__mro__):
        for field, hint in inspect.get_annotations(base).items():
            # One at a time: a name that only a type checker knows, as in `optax.OptState`, is a
            # matter of its own field.
            alone = type("", (), {"__annotations__": {field: hint}, "__module__": base.__module__})
            with contextlib.suppress(NameError):
                hints |= typing.get_type_hints(alone, include_extras=True)
    marks = {field: (*getattr(hint, "__metadata__", ()), 0) for field, hint in hints.items()}
    return {field: (kind, x[0]) for field, (kind, *x) in marks.items() if kind in ("task", "pair")}


def kind_of_leaf(state: Any, field: str, num_tasks: int) -> Kind:
    """What a field that holds one array belongs to: as declared, else by its shape."""
    declared = _declared(type(state))
    if declared or _is_ours(type(state)):
        return declared.get(field, ("step",))[0]
    by_shape: dict[Any, Kind] = {(num_tasks,): "task", (num_tasks, num_tasks): "pair"}
    return by_shape.get(getattr(getattr(state, field), "shape", None), "step")


def num_tasks_of(state: Any) -> int | None:
    """The K that a state was made for, as far as its declared fields tell."""
    for field in _declared(type(state)):
        for leaf in jax.tree.leaves(getattr(state, field)):
            return len(leaf)
    return None


def hold(present: jax.Array, new: Any, old: Any) -> Any:
    """The new state of a link, as it was where it belongs to absent tasks.

    Args:
      present: `(K,)` bool. Without any task nothing moves.
      new: what the link returned.
      old: what it was given, of the same structure.
    """
    anyone, both = jnp.any(present), present[:, None] & present[None, :]
    masks = {"task": present, "pair": both, "step": anyone}

    def held(mask: jax.Array, new: Any, old: Any) -> Any:
        def leaf(new: jax.Array, old: jax.Array) -> jax.Array:
            rest = [1] * (jnp.ndim(new) - mask.ndim) if mask.ndim else []
            return jnp.where(mask.reshape(*mask.shape, *rest), new, old)

        return jax.tree.map(leaf, new, old)

    if not hasattr(new, "_fields"):
        return held(anyone, new, old)
    return type(new)(
        *(
            held(masks[kind_of_leaf(new, field, len(present))], value, getattr(old, field))
            for field, value in new._asdict().items()
        )
    )


def check_state(
    state: Any, made: set[type], expected: type | Callable[[], Any], num_tasks: int | None
) -> None:
    """Raises where a state is not one that the link made.

    Args:
      state: what `update` got.
      made: the types that are known to be right, to which this one is added.
      expected: the type that `init` makes, or a function that returns such a state.
      num_tasks: the K of the link, None for any.
    """
    made_for = num_tasks_of(state) if is_link_state(state) else None
    if num_tasks is not None and made_for is not None and made_for != num_tasks:
        raise ValueError(
            f"the state, a {type(state).__name__}, is of {made_for} tasks, and the strategy has "
            f"num_tasks={num_tasks}: mtl.resize_state(opt_state, names_before, names_now) keeps "
            "what the tasks that stay have learned, and the optimizer's moments"
        )
    if type(state) in made:
        return
    try:
        wanted = expected if isinstance(expected, type) else type(jax.eval_shape(expected))
    except (AttributeError, TypeError, ValueError):  # without the parameters that it needs
        return
    if type(state) is not wanted:
        raise ValueError(
            f"the state is a {type(state).__name__}, expected the {wanted.__name__} that "
            "this link's init makes: it is that of another strategy. Start the strategy anew and "
            "keep the optimizer: in a chain, (tx.init(params)[0], *opt_state[1:])"
        )
    made.add(type(state))


def resize_state(
    opt_state: Any, from_names: Sequence[str], to_names: Sequence[str], fresh: Any = None
) -> Any:
    """Keeps a training's state when tasks are added or removed.

    What the tasks that stay have learned goes with them, whatever their new places; a new task
    starts as one would at the first step; what belongs to no task, the moments of the optimizer
    above all, stays as it is.

    Args:
      opt_state: the state of any chain with links of this library in it, of the old tasks.
      from_names: the old tasks in their order, as `Jacobian.names` gives them.
      to_names: the new ones, in theirs.
      fresh: `tx.init(params)` of the new chain. Give it where the parameters change too, as with
        the head of a new task: what is kept a parameter stays where path and shape are the same,
        and is taken from here elsewhere. It also knows what the options say of a new task. Without
        it new tasks get each strategy's usual start, and weights of inner optimizers 0.

    Returns:
      The state for the new chain.

    Raises:
      ValueError: if names repeat, `from_names` are not as many as the tasks of the state, or
        `fresh` is not the state of `to_names`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> chain = lambda k: optax.chain(mtl.uncertainty(k), optax.adam(1e-3))
      >>> state = chain(2).init(jnp.ones(3))
      >>> state = mtl.resize_state(state, ("buy", "click"), ("buy", "click", "like"))
      >>> losses, jac = mtl.value_and_jac(
      ...     lambda w: {"buy": w @ w, "click": jnp.sum(w), "like": jnp.sum(w**4)})(jnp.ones(3))
      >>> updates, state = chain(3).update(jac, state, jnp.ones(3))
    """
    for option, names in (("from_names", from_names), ("to_names", to_names)):
        if isinstance(names, str) or len(set(names)) != len(names):
            raise ValueError(f"{option}={names!r}, expected the names of tasks, each once")
    sources = [from_names.index(n) if n in from_names else -1 for n in to_names]
    move = functools.partial(_move, np.array(sources), len(from_names))
    if fresh is None:
        return _resized(opt_state, len(from_names), move)
    check_num_tasks_of(fresh, len(to_names))
    known = dict(jax.tree_util.tree_leaves_with_path(opt_state))
    axes_of = _axes_of_leaves(fresh, len(to_names))

    def leaf(path: Any, new: Any) -> Any:
        old, axes = known.get(path), axes_of.get(path, 0)
        if old is None:
            return new
        if axes and jnp.shape(old)[axes:] == jnp.shape(new)[axes:]:
            return move(old, new, axes)
        return old if jnp.shape(old) == jnp.shape(new) else new

    return jax.tree_util.tree_map_with_path(leaf, fresh)


_AXES: dict[Kind, int] = {"step": 0, "task": 1, "pair": 2}


def _move(sources: np.ndarray, num_before: int, old: Any, new: Any, axes: int) -> jax.Array:
    """A leaf for the new tasks: the old rows of those that stay, the new ones of the others."""
    if len(old) != num_before:
        raise ValueError(
            f"the state is of {len(old)} tasks and from_names has {num_before}: give the names of "
            "the tasks that it was made for, in their order"
        )
    stays = sources >= 0
    moved = old
    for axis in range(axes):
        moved = jnp.take(moved, np.where(stays, sources, 0), axis=axis)
    mask = stays if axes == 1 else stays[:, None] & stays[None, :]
    mask = mask.reshape(*mask.shape, *[1] * (jnp.ndim(old) - axes))
    return jnp.where(mask, moved, new).astype(jnp.result_type(old))


def _resized(opt_state: Any, num_before: int, move: Callable[..., jax.Array]) -> Any:
    return _map_leaves(
        lambda leaf, axes, start: move(leaf, start, axes) if axes else leaf, opt_state, num_before
    )


def _axes_of_leaves(opt_state: Any, num_tasks: int) -> dict[Any, int]:
    """How many leading axes of each leaf are tasks, by path."""
    axes = _map_leaves(lambda leaf, axes, start: axes, opt_state, num_tasks)
    return dict(jax.tree_util.tree_leaves_with_path(axes))


def _map_leaves(fn: Callable[[Any, int, Any], Any], tree: Any, num_tasks: int) -> Any:
    """`fn(leaf, axes, start)` of each leaf, with how many leading axes of it are tasks."""

    def link_state(state: Any) -> Any:
        def field(name: str, value: Any) -> Any:
            kind = kind_of_leaf(state, name, num_tasks)
            if kind == "step":
                return _map_leaves(fn, value, num_tasks)
            start = _declared(type(state)).get(name, (kind, 0))[1]
            return jax.tree.map(lambda leaf: fn(leaf, _AXES[kind], start), value)

        return type(state)(*(field(name, value) for name, value in state._asdict().items()))

    return jax.tree.map(
        lambda node: link_state(node) if is_link_state(node) else fn(node, 0, None),
        tree,
        is_leaf=is_link_state,
    )


def check_num_tasks_of(opt_state: Any, num_tasks: int) -> None:
    """Raises unless the links' states are of that many tasks."""
    for state in link_states(opt_state):
        made_for = num_tasks_of(state)
        if made_for is not None and made_for != num_tasks:
            raise ValueError(
                f"{num_tasks} names, and the {type(state).__name__} is of {made_for} tasks"
            )
