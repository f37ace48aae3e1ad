"""Which arguments of a loss function are its parameters, and which of those are trained."""

import dataclasses
import inspect
import operator
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
        chosen, chosen_def = jax.tree.flatten([args[i] for i in positions], is_leaf=_is_module)
        others, others_def = jax.tree.flatten(
            ([None if i in positions else arg for i, arg in enumerate(args)], kwargs),
            is_leaf=is_object,
        )
        modules = [*filter(_is_module, chosen), *filter(is_object, others)]
        num_chosen = sum(map(_is_module, chosen))
        is_wanted = _variable_filter(wrt) if num_chosen else nnx.filterlib.Nothing()

        def is_trained(path, variable):
            return path[0] < num_chosen and is_wanted(path[1:], variable)

        graphdef, trained, rest = nnx.split(modules, is_trained, ...)
        states = iter(trained[k] if k in trained else nnx.State({}) for k in range(num_chosen))
        trees = chosen_def.unflatten([next(states) if _is_module(x) else x for x in chosen])
        params = trees[0] if isinstance(argnums, int) else tuple(trees)

        def call(fn, params):
            parts = chosen_def.flatten_up_to([params] if isinstance(argnums, int) else [*params])
            new = [part for part, old in zip(parts, chosen, strict=True) if _is_module(old)]
            copies = nnx.merge(graphdef, nnx.State(dict(enumerate(new))), rest, copy=True)
            before = {p: jax.tree.leaves(v) for p, v in nnx.to_flat_state(nnx.split(copies)[1])}
            left = iter(copies)
            parts = [
                next(left) if _is_module(old) else x for x, old in zip(parts, chosen, strict=True)
            ]
            values, keywords = others_def.unflatten(
                [next(left) if is_object(x) else x for x in others]
            )
            for i, value in zip(positions, chosen_def.unflatten(parts), strict=True):
                values[i] = value

            def is_changed(path, variable):
                old, now = before.get(path), jax.tree.leaves(variable)
                return old is None or [*map(id, old)] != [*map(id, now)]

            result = fn(*values, **keywords)
            # What is not changed is not written: it may belong to an outer trace.
            return result, nnx.filter_state(nnx.split(copies)[1], is_changed)

        leaves = jax.tree.leaves(params)
        mask = (True,) * len(leaves)
        if num_chosen == 0 and wrt is not None:
            mask = _resolved(wrt, params, "wrt")
        _check(params, mask)
        return cls(params, mask, call, lambda changes: nnx.update(modules, changes))

    @property
    def leaves(self) -> list[Any]:
        """The trained leaves of the parameters."""
        pairs = zip(jax.tree.leaves(self.params), self.trained, strict=True)
        return [leaf for leaf, is_trained in pairs if is_trained]

    def linearize(
        self, loss_fn: Callable[..., Any], has_aux: bool
    ) -> tuple[Any, Callable[..., Any], list[Any], Any]:
        """The losses, their differential, what else was returned, and what the call changed."""

        def losses_of(leaves: Sequence[Any]) -> Any:
            result, changes = self.call(loss_fn, self.with_leaves(leaves))
            losses, aux = split_aux(result, has_aux)
            return losses, (aux, changes)

        losses, linear_fn, (aux, changes) = jax.linearize(losses_of, self.leaves, has_aux=True)
        return losses, linear_fn, aux, changes

    def with_leaves(self, leaves: Sequence[Any]) -> Any:
        """The parameters with other trained leaves."""
        old, treedef = jax.tree.flatten(self.params)
        new = iter(leaves)
        return treedef.unflatten(
            [next(new) if t else leaf for leaf, t in zip(old, self.trained, strict=True)]
        )

    def resolve(self, mask: Mask, option: str) -> tuple[bool, ...]:
        """A mask over the parameters as one bool for each trained leaf."""
        full = _resolved(mask, self.params, option)
        return tuple(m for m, is_trained in zip(full, self.trained, strict=True) if is_trained)


def split_aux(result: Any, has_aux: bool) -> tuple[Any, list[Any]]:
    """The losses, and what else the function returned: nothing, or one value."""
    if not has_aux:
        return result, []
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"with has_aux=True the loss function returned {jax.tree.structure(result)}, expected "
            "a pair (losses, aux)"
        )
    return result[0], [result[1]]


def _positions(num_args: int, argnums: int | Sequence[int]) -> list[int]:
    try:
        positions = [argnums] if isinstance(argnums, int) else [*map(operator.index, argnums)]
    except TypeError:
        raise TypeError(
            f"argnums={argnums!r}, expected the position of the parameters among the arguments, "
            "or several; which variables of an nnx module are trained is said by wrt="
        ) from None
    fits = all(-num_args <= i < num_args for i in positions)
    if not fits or not 0 < len(positions) == len({i % num_args for i in positions}):
        raise ValueError(
            f"argnums={argnums} does not fit a call with {num_args} positional arguments: expected "
            "the positions of the parameters among them, each once"
        )
    return [i % num_args for i in positions]


def _variable_filter(wrt: Any) -> Callable[..., bool]:
    try:
        return nnx.filterlib.to_predicate(nnx.Param if wrt is None else wrt)
    except TypeError as error:
        raise TypeError(
            f"wrt is a {type(wrt).__name__}, expected a filter of the variables of an nnx module, "
            "such as nnx.LoRAParam, nnx.PathContains('head') or a function of path and variable"
        ) from error


def _is_filter(mask: Any) -> bool:
    """Whether it is a filter of variables: a function of one argument is one of the parameters."""
    if inspect.isfunction(mask):
        return len(inspect.signature(mask).parameters) == 2  # path and variable
    return any(
        isinstance(leaf, type) or type(leaf).__module__ == nnx.filterlib.__name__
        for leaf in jax.tree.leaves(mask)
    )


def _resolved(mask: Any, params: Any, option: str) -> tuple[bool, ...]:
    """A mask, or a filter of the variables of the modules among the parameters, as bools."""
    if not _is_filter(mask):
        return resolve_mask(mask, params, option)
    trees, treedef = jax.tree.flatten(params, is_leaf=_is_state)
    if not any(map(_is_state, trees)):
        raise TypeError(
            f"{option}={getattr(mask, '__name__', mask)} is a filter of the variables of an nnx "
            "module, but the parameters hold no module: pass the module itself, or a mask over "
            "the parameters"
        )
    is_wanted = nnx.filterlib.to_predicate(mask)
    masks = [nnx.map_state(is_wanted, tree) if _is_state(tree) else False for tree in trees]
    return resolve_mask(treedef.unflatten(masks), params, option)


def _is_module(x: Any) -> bool:
    return isinstance(x, nnx.Pytree)  # modules, Rngs, metrics


def _is_state(x: Any) -> bool:
    return isinstance(x, nnx.State)


def is_object(x: Any) -> bool:
    """Whether a call may change it; a variable among the parameters is an array like others."""
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _check(params: Any, trained: Sequence[bool]) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not any(trained):
        raise ValueError("no parameter is trained: expected at least one, selected by wrt=")
    for (path, leaf), is_trained in zip(leaves, trained, strict=True):
        try:
            # A string may be the name of a dtype.
            dtype = None if isinstance(leaf, str) else jnp.result_type(leaf)
        except (TypeError, ValueError):
            dtype = None
        if dtype is not None and (not is_trained or jnp.issubdtype(dtype, jnp.floating)):
            continue
        what = f"the type {type(leaf).__name__}" if dtype is None else f"dtype {dtype}"
        raise TypeError(
            f"parameter {jax.tree_util.keystr(path)} has {what}, expected "
            f"{'a real floating-point' if is_trained else 'an'} array: pass everything that is not "
            "trained as a further argument of the loss function, or name what is by "
            "value_and_jac(wrt=mask)"
        )
