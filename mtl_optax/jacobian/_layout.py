"""What is static about a Jacobian: which parameters there are, and which of them are which."""

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax.jacobian._linear_map import RowMode
from mtl_optax.jacobian._opaque import REMEDY

# A mask over the parameters: a tree (or prefix) of bools, or a function of the parameters to one.
Mask = Any | Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, repr=False)
class Layout:
    """Which parameters there are; the *leaves* are the trained ones, in their order."""

    params_def: Any
    avals: tuple[jax.ShapeDtypeStruct, ...]  # of all parameters
    trained: tuple[bool, ...]
    num_tasks: int
    dtype: Any  # of everything K-sized: float32, or float64 for float64 losses
    shared: tuple[bool, ...]  # of the leaves
    measured: tuple[bool, ...]
    row_mode: RowMode
    shown: tuple[bool, ...]  # of the leaves: the others stand in trees as empty arrays

    def __repr__(self) -> str:
        # JAX prints it with a tree that another one does not match.
        return f"{self.num_tasks} losses: {REMEDY}"

    @functools.cached_property
    def places(self) -> tuple[int, ...]:
        """Where the leaves stand among the parameters."""
        return tuple(i for i, is_trained in enumerate(self.trained) if is_trained)

    @property
    def num_leaves(self) -> int:
        """How many parameters are trained."""
        return len(self.shared)

    @functools.cached_property
    def measured_leaves(self) -> tuple[int, ...]:
        """The positions of the leaves on which the Gramian is measured."""
        return tuple(i for i, here in enumerate(self.measured) if here)

    @functools.cached_property
    def shared_leaves(self) -> tuple[int, ...]:
        """The positions of the leaves that the tasks share."""
        return tuple(i for i, here in enumerate(self.shared) if here)

    def unflatten(self, leaves: Sequence[jax.Array]) -> Any:
        """A tree like the parameters, zero where they are frozen, each of its parameter's dtype."""
        typed = [
            x.astype(aval.dtype) if is_shown else None
            for x, aval, is_shown in zip(leaves, self.leaf_avals, self.shown, strict=True)
        ]
        return self.merge(typed, lambda aval: jnp.zeros(aval.shape, aval.dtype))

    def unflatten_rows(self, rows: Sequence[jax.Array]) -> Any:
        """A tree like the parameters with a first axis of tasks; frozen keys have float32 rows."""

        def frozen(aval: Any) -> jax.Array:
            is_key = jnp.issubdtype(aval.dtype, jax.dtypes.extended)
            shape = (self.num_tasks, *aval.shape)
            return jnp.zeros(shape, jnp.float32 if is_key else aval.dtype)

        return self.merge(rows, frozen)

    def merge(self, leaves: Sequence[Any], frozen: Callable[[Any], Any]) -> Any:
        """A tree like the parameters of what stands for the leaves, and for the frozen ones."""
        shown = {
            place: leaf
            for place, leaf, is_shown in zip(self.places, leaves, self.shown, strict=True)
            if is_shown
        }
        return self.params_def.unflatten(
            [shown[i] if i in shown else frozen(aval) for i, aval in enumerate(self.avals)]
        )

    def part(self, chosen: Sequence[bool]) -> "Layout":
        """With some of the parameters alone: the others are empty, and in no row and Gramian."""
        empty = [jax.ShapeDtypeStruct((0,), aval.dtype) for aval in self.avals]
        avals = zip(self.avals, empty, chosen, strict=True)
        here = [chosen[place] for place in self.places]

        def only(mask: tuple[bool, ...]) -> tuple[bool, ...]:
            return tuple(m and h for m, h in zip(mask, here, strict=True))

        return dataclasses.replace(
            self,
            avals=tuple(aval if is_chosen else nothing for aval, nothing, is_chosen in avals),
            shared=only(self.shared),
            measured=only(self.measured),
            shown=only(self.shown),
        )

    def leaves_of(self, tree: Any) -> list[Any]:
        """The trained leaves of a tree with as many leaves as the parameters."""
        leaves = jax.tree.leaves(tree)
        if len(leaves) != len(self.trained):
            raise ValueError(
                f"got {len(leaves)} leaves of rows, expected one for each of the "
                f"{len(self.trained)} parameters: change the leaves of rows()"
            )
        return [leaves[place] for place in self.places]

    @property
    def leaf_avals(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes and dtypes of the leaves."""
        return [self.avals[place] for place in self.places]


def resolve_mask(mask: Mask, params: Any, option: str) -> tuple[bool, ...]:
    """A mask over the parameters as one bool each."""
    mask = mask(params) if callable(mask) else mask
    for leaf in jax.tree.leaves(mask):
        if not (isinstance(leaf, bool) or jnp.issubdtype(getattr(leaf, "dtype", int), jnp.bool_)):
            raise TypeError(
                f"{option}={leaf!r} holds no bool, expected True or False for each parameter: a "
                "tree of their structure, a prefix of it, or a function from them to one"
            )
    try:
        full = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: bool(m), sub), mask, params)
    except ValueError as error:
        where = textwrap.shorten(str(error).replace("tree_map tree", option), 400)
        raise ValueError(
            f"{option}= does not fit the parameters: expected a tree of bools of their structure "
            f"or a prefix of it. {where}"
        ) from None
    resolved = tuple(jax.tree.leaves(full))
    if not any(resolved):
        raise ValueError(
            f"{option}= selects no parameter: expected at least one True in the mask; "
            f"leave {option} out for the default"
        )
    return resolved
