"""Counts what matrix products and convolutions of a function take, loops as often as they turn.

The compiler's own figure counts the body of a loop once. Nothing is computed: shapes will do.
What no result depends on is left out, as the compiler leaves it out.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.interpreters import partial_eval

from mtl_optax._compat import body_of, is_jaxpr


def flops(fn: Callable[..., Any], *args: Any) -> int:
    """Operations of `fn(*args)`, of each `cond` the dearest branch."""
    outside, branches = parts(fn, *args)
    return outside + sum(map(max, branches))


def parts(fn: Callable[..., Any], *args: Any) -> tuple[int, list[tuple[int, ...]]]:
    """Operations of `fn(*args)` outside of all `cond`s, and of each one's branches.

    A `while`, as of a solver, whose turns are not known, counts nothing.
    """
    jaxpr = body_of(jax.make_jaxpr(fn)(*args))
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: Any) -> tuple[int, list[tuple[int, ...]]]:
    outside, branches = 0, []
    for eqn in body_of(jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            summed = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            outside += 2 * eqn.outvars[0].aval.size * summed
            continue
        if eqn.primitive.name == "conv_general_dilated":
            kernel, layout = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            outside += 2 * eqn.outvars[0].aval.size * math.prod(kernel) // kernel[layout[0]]
            continue
        inside = [_count(body) for body in _bodies(eqn)]
        if eqn.primitive.name == "cond":
            branches.append(tuple(out + sum(map(max, more)) for out, more in inside))
        elif eqn.primitive.name != "while":
            turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            outside += turns * sum(out for out, _ in inside)
            branches += [tuple(turns * b for b in each) for _, more in inside for each in more]
    return outside, branches


def _bodies(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        yield from filter(is_jaxpr, value if isinstance(value, list | tuple) else (value,))
