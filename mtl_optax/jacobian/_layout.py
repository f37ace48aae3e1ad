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

    def __repr__(self) -> str:
        # JAX prints it with a tree that another one does not match.
        return f"{self.num_tasks} losses: {REMEDY}"

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
        typed = [x.astype(aval.dtype) for x, aval in zip(leaves, self.leaf_avals, strict=True)]
        return self.merge(typed, lambda aval: jnp.zeros(aval.shape, aval.dtype))

    def unflatten_rows(self, rows: Sequence[jax.Array]) -> Any:
        """A tree like the parameters with a first axis of tasks."""
        return self.merge(rows, lambda aval: jnp.zeros((self.num_tasks, *aval.shape), aval.dtype))

    def merge(self, leaves: Sequence[Any], frozen: Callable[[Any], Any]) -> Any:
        """A tree like the parameters of what stands for the leaves, and for the frozen ones."""
        left = iter(leaves)
        pairs = zip(self.trained, self.avals, strict=True)
        return self.params_def.unflatten(
            [next(left) if is_trained else frozen(aval) for is_trained, aval in pairs]
        )

    def leaves_of(self, tree: Any) -> list[Any]:
        """The trained leaves of a tree with as many leaves as the parameters."""
        leaves = jax.tree.leaves(tree)
        if len(leaves) != len(self.trained):
            raise ValueError(
                f"got {len(leaves)} leaves of rows, expected one for each of the "
                f"{len(self.trained)} parameters: change the leaves of rows()"
            )
        return [leaf for leaf, is_trained in zip(leaves, self.trained, strict=True) if is_trained]

    @property
    def leaf_avals(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes and dtypes of the leaves."""
        return [
            aval for aval, is_trained in zip(self.avals, self.trained, strict=True) if is_trained
        ]


def resolve_mask(mask: Mask, params: Any, option: str) -> tuple[bool, ...]:
    """A mask over the parameters as one bool each."""
    mask = mask(params) if callable(mask) else mask
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
