"""Which arguments of a loss function are its parameters, and which of those are trained."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtl_optax.jacobian._layout import Mask, resolve_mask


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of a call, read as parameters and the rest.

    nnx modules are split and merged as Flax's own transformations do it: their trained variables
    are parameters, and what the call changes in any of them is written back.
    """

    params: Any  # the argument at `argnums`, or the tuple of them; a module as its trained State
    trained: tuple[bool, ...]  # which leaves of `params` are
    call: Callable[[Callable[..., Any], Any], tuple[Any, Any]]  # (fn, params) to (result, changes)
    write_back: Callable[[Any], None]

    @classmethod
    def of(
        cls, args: Sequence[Any], kwargs: dict[str, Any], argnums: int | Sequence[int], wrt: Any
    ) -> "Arguments":
        """Reads the arguments of a call."""
        positions = _positions(len(args), argnums)
        chosen, chosen_def = _flatten([args[i] for i in positions])
        others, others_def = _flatten(
            ([None if i in positions else arg for i, arg in enumerate(args)], kwargs)
        )
        modules = [*filter(_is_module, chosen), *filter(_is_module, others)]
        num_chosen = sum(map(_is_module, chosen))
        if num_chosen == 0 and isinstance(wrt, type):
            raise TypeError(
                f"wrt={wrt.__name__} is a filter of the variables of an nnx module, but the "
                "parameters hold no module: pass the module itself, or a mask over the parameters"
            )

        def is_trained(path, variable):
            wanted = nnx.filterlib.to_predicate(nnx.Param if wrt is None else wrt)
            return path[0] < num_chosen and wanted(path[1:], variable)

        graphdef, trained, rest = nnx.split(modules, is_trained, ...)
        states = iter(nnx.State(trained.get(k, {})) for k in range(num_chosen))
        trees = chosen_def.unflatten([next(states) if _is_module(x) else x for x in chosen])
        params = trees[0] if isinstance(argnums, int) else tuple(trees)

        def call(fn, params):
            parts = chosen_def.flatten_up_to([params] if isinstance(argnums, int) else [*params])
            new = [part for part, old in zip(parts, chosen, strict=True) if _is_module(old)]
            copies = nnx.merge(graphdef, nnx.State(dict(enumerate(new))), rest, copy=True)
            left = iter(copies)
            parts = [
                next(left) if _is_module(old) else x for x, old in zip(parts, chosen, strict=True)
            ]
            values, keywords = others_def.unflatten(
                [next(left) if _is_module(x) else x for x in others]
            )
            for i, value in zip(positions, chosen_def.unflatten(parts), strict=True):
                values[i] = value
            result = fn(*values, **keywords)
            return result, nnx.split(copies)[1]

        leaves = jax.tree.leaves(params)
        mask = (True,) * len(leaves)
        if num_chosen == 0 and wrt is not None:
            mask = resolve_mask(wrt, params, "wrt")
        _check(params, mask)
        return cls(params, mask, call, lambda changes: nnx.update(modules, changes))

    @property
    def leaves(self) -> list[Any]:
        """The trained leaves of the parameters."""
        pairs = zip(jax.tree.leaves(self.params), self.trained, strict=True)
        return [leaf for leaf, is_trained in pairs if is_trained]

    def with_leaves(self, leaves: Sequence[Any]) -> Any:
        """The parameters with other trained leaves."""
        old, treedef = jax.tree.flatten(self.params)
        new = iter(leaves)
        return treedef.unflatten(
            [next(new) if t else leaf for leaf, t in zip(old, self.trained, strict=True)]
        )

    def resolve(self, mask: Mask, option: str) -> tuple[bool, ...]:
        """A mask over the parameters as one bool for each trained leaf."""
        full = resolve_mask(mask, self.params, option)
        return tuple(m for m, is_trained in zip(full, self.trained, strict=True) if is_trained)


def _positions(num_args: int, argnums: int | Sequence[int]) -> list[int]:
    positions = [argnums] if isinstance(argnums, int) else list(argnums)
    if not positions or not all(-num_args <= i < num_args for i in positions):
        raise ValueError(
            f"argnums={argnums} does not fit a call with {num_args} positional arguments: expected "
            "the positions of the parameters among them"
        )
    return [i % num_args for i in positions]


def _is_module(x: Any) -> bool:
    return isinstance(x, nnx.Module | nnx.Rngs)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=_is_module)


def _check(params: Any, trained: Sequence[bool]) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not any(trained):
        raise ValueError("no parameter is trained: expected at least one, selected by wrt=")
    for (path, leaf), is_trained in zip(leaves, trained, strict=True):
        try:
            what = f"dtype {jnp.result_type(leaf)}"
            is_real = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        except (TypeError, ValueError):
            what, is_real = f"the type {type(leaf).__name__}", False
        if is_trained and not is_real:
            raise TypeError(
                f"parameter {jax.tree_util.keystr(path)} has {what}, "
                "expected a real floating-point array: pass everything that is not trained as a "
                "further argument of the loss function, or name what is by "
                "value_and_jac(wrt=mask)"
            )
