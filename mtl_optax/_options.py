"""What an option may be: checked when a link is built, laid out for its tasks at an update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mtl_optax._numerics import is_integer, is_real
from mtl_optax.jacobian import Jacobian, task_names


def check_num_tasks(num_tasks: int) -> None:
    """Raises unless `num_tasks` is a static, positive integer."""
    check_count("num_tasks", num_tasks)


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raises unless an option that shapes the program is an integer of at least `least`."""
    if not is_integer(value):
        raise TypeError(
            f"{name}={value!r}, expected a Python int: it shapes the program and is static "
            f'(with optax.inject_hyperparams, name it in static_args=("{name}",))'
        )
    if value < least:
        raise ValueError(f"{name}={value}, expected at least {least}")


def is_traced(value: Any) -> bool:
    """Whether an option is known only when the program runs, as under `inject_hyperparams`."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


# What a share or the weight of the past may be: `check_option("decay", decay, *BELOW_ONE)`.
BELOW_ONE = (lambda x: (x >= 0) & (x < 1), "in [0, 1)")
UP_TO_ONE = (lambda x: (x >= 0) & (x <= 1), "in [0, 1]")
FINITE = (np.isfinite, "a finite number")
# What counts steps may be.
COUNT = (lambda x: (x >= 1) & (x % 1 == 0), "a whole number of at least 1")


def check_option(
    name: str, value: Any, valid: Callable[[Any], Any], expected: str, *, each: bool = False
) -> None:
    """Raises unless an option is one number, or with `each` a tree of arrays, in its range.

    Traced values pass whatever they are.
    """
    leaves = jax.tree.leaves(value)
    if not each and not (len(leaves) == 1 and leaves[0] is value and np.ndim(value) == 0):
        raise ValueError(f"{name}={value!r}, expected one number, {expected}")
    if is_traced(value):
        return
    for leaf in map(np.asarray, leaves):
        if not (is_real(leaf.dtype) and np.all(valid(leaf))):
            raise ValueError(f"{name}={value}, expected {expected}")


def check_flag(name: str, value: Any) -> None:
    """Raises unless an option that is on or off is one of the two: "no" would count as on."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r}, expected True or False, known when the link is built")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless every leaf of an option is one of the choices."""
    for leaf in jax.tree.leaves(value):
        if leaf not in choices:
            raise ValueError(f"{name}={leaf!r}, expected one of {choices}")


def check_key(key: Any) -> None:
    """Raises unless `key` is a typed random key."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"key={key!r}, expected a typed random key: pass key=jax.random.key(0) "
            "(jax.random.wrap_key_data makes one of an old-style uint32 key)"
        )


def per_task(name: str, value: Any, jacobian: Jacobian, default: Any = None) -> jax.Array:
    """A per-task option as a `(K,)` array of the losses' precision; None in it is the default."""
    is_none = lambda x: x is None  # noqa: E731
    given, structure = jax.tree.flatten(value, is_leaf=is_none)
    if default is not None and any(map(is_none, given)):
        usual = per_task(name, default, jacobian)
        if value is None:
            return usual
        if len(given) == jacobian.num_tasks:
            pairs = zip(given, usual, strict=True)
            value = structure.unflatten([old if new is None else new for new, old in pairs])
    leaves = per_task_leaves(name, value, jacobian.losses)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]).astype(jacobian.dtype)


def check_preference(preference: Any) -> None:
    """Raises unless a preference is None, or non-negative and not 0 for all tasks."""
    check_option("preference", preference, lambda p: p >= 0, "non-negative weights", each=True)
    given = not is_traced(preference) and jax.tree.leaves(preference)
    if given and not any(np.any(np.asarray(leaf)) for leaf in given):
        raise ValueError(f"preference={preference}, expected at least one task above 0")


def per_task_leaves(name: str, value: Any, losses: Any) -> list[Any]:
    """An option's leaves: one value for all tasks, or K in their order, or a tree like them."""
    leaves, structure = jax.tree.flatten(value)
    names, size = task_names(losses), lambda leaf: getattr(leaf, "size", 1)
    if structure.num_leaves == structure.num_nodes == 1 and size(value) == 1:
        return [value] * len(names)
    in_order = isinstance(value, list | tuple) or hasattr(value, "shape")
    alike = in_order or structure == jax.tree.structure(losses)
    if not alike or sum(map(size, leaves)) != len(names):
        raise ValueError(
            f"{name}={value!r} does not fit the tasks {names}: expected one value for all, or "
            f"{len(names)} in that order, or a tree like the losses"
        )
    return leaves


def task_position(option: str, task: int | str, names: tuple[str, ...]) -> int:
    """The position of a task that an option names, or gives by its position."""
    if task in names:
        return names.index(task)
    if is_integer(task):
        place = int(task)
        if -len(names) <= place < len(names):
            return place % len(names)
    raise ValueError(
        f"{option}={task!r}, expected one of the tasks {names} or its position, a Python int "
        f'(with optax.inject_hyperparams, name it in static_args=("num_tasks", {option!r}))'
    )
