"""Branches that stay branches under `vmap`."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp

Result = TypeVar("Result")

_without_fallbacks = False


def where_needed(
    needed: jax.Array, dear: Callable[[], Result], cheap: Callable[[], Result]
) -> Result:
    """`jax.lax.cond(needed, dear, cheap)`, whose dear branch costs nothing where none needs it.

    Under `vmap`, as over seeds, `lax.cond` computes both branches for all elements. Here the dear
    one is computed where any element needs it, and those alone take its result.
    """

    def taken() -> Result:
        return jax.tree.map(functools.partial(jnp.where, needed), dear(), cheap())

    return jax.lax.cond(_anywhere(needed), taken, cheap)


def fallback(needed: jax.Array, dear: Callable[[], Result], cheap: Callable[[], Result]) -> Result:
    """`where_needed`, for what ordinary numbers never need."""
    return cheap() if _without_fallbacks else where_needed(needed, dear, cheap)


@contextlib.contextmanager
def without_fallbacks() -> Iterator[None]:
    """For counting: what is traced within does what a step does whose numbers are ordinary."""
    global _without_fallbacks
    before, _without_fallbacks = _without_fallbacks, True
    try:
        yield
    finally:
        _without_fallbacks = before


@jax.custom_batching.custom_vmap
def _anywhere(flag: jax.Array) -> jax.Array:
    return flag


@_anywhere.def_vmap
def _anywhere_along(size: int, mapped: list[bool], flags: jax.Array) -> tuple[jax.Array, bool]:
    del size, mapped  # a flag that is not mapped does not come here
    return _anywhere(jnp.any(flags, axis=0)), False
