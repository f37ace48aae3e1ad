"""Whether backward rules of one's own are linear: clipping a gradient on its way back is not.

What is not linear gives each task its row from a cotangent of 1 at its loss, and from nothing else:
not from one that was scaled, and not from one of several tasks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mtl_optax._compat import body_of, scan_counts
from mtl_optax.jacobian._program import is_var, through

RULE = "custom_lin"  # what a custom_vjp leaves in a linearised program
# No function of a cotangent that is one of these is linear, and none that compares it.
BENT = frozenset((
    "abs", "acos", "acosh", "and", "argmax", "argmin", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "cos", "cosh", "cummax", "cummin", "cumprod", "digamma", "eq", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "le", "lgamma",
    "log", "log1p", "logistic", "lt", "max", "min", "ne", "nextafter", "not", "or", "pow",
    "reduce_max", "reduce_min", "reduce_prod", "rem", "round", "rsqrt", "sign", "sin", "sinh",
    "sort", "sqrt", "square", "tan", "tanh", "top_k", "xor",
))  # fmt: skip
PRODUCTS = frozenset(("mul", "dot_general", "conv_general_dilated"))
SUMS = frozenset(("add", "sub", "add_any"))


def has_bent_rule(jaxpr: Any) -> bool:
    """Whether a backward rule somewhere in a linear program is known not to be linear."""
    return any(
        _is_bent(eqn) if eqn.primitive.name == RULE else any(map(has_bent_rule, _bodies(eqn)))
        for eqn in jaxpr.eqns
    )


def _is_bent(eqn: Any) -> bool:
    count, rule = eqn.params["num_res"], eqn.params["bwd"]
    avals = [v.aval for v in (*eqn.invars[:count], *eqn.outvars)]
    try:
        rule = jax.make_jaxpr(getattr(rule, "call_wrapped", rule))(*avals)
    except Exception:  # a rule that can't be read alone is taken at its word
        return False
    return _bends(body_of(rule), [0] * count + [1] * len(eqn.outvars))


def _bends(jaxpr: Any, masks: Sequence[int]) -> bool:
    """Whether what depends on the inputs that are marked is not linear in them."""
    env, zeros = dict(zip(jaxpr.invars, masks, strict=True)), set()

    def is_zero(atom: Any) -> bool:
        return atom in zeros if is_var(atom) else not np.any(atom.val)

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = [env.get(v, 0) if is_var(v) else 0 for v in eqn.invars]
        outputs = [0] * len(eqn.outvars) if name == "is_finite" else through(eqn, inputs)
        if any(inputs):
            constants = [v for v, mask in zip(eqn.invars, inputs, strict=True) if not mask]
            if _bends_at(eqn, inputs, outputs) or (
                name in SUMS and not all(map(is_zero, constants))
            ):
                return True
        elif name in ("broadcast_in_dim", "convert_element_type") and is_zero(eqn.invars[0]):
            zeros.update(eqn.outvars)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return False


def _bends_at(eqn: Any, inputs: list[int], outputs: list[int]) -> bool:
    name, params = eqn.primitive.name, eqn.params
    if name in PRODUCTS:
        return all(inputs)
    if name == "div":
        return bool(inputs[1])
    if name == "select_n":
        return bool(inputs[0])
    if name == "convert_element_type":  # to integers, or to a few levels
        dtype = np.dtype(params["new_dtype"])
        return not jax.numpy.issubdtype(dtype, jax.numpy.inexact) or dtype.itemsize == 1
    if name == "cond":
        return bool(inputs[0]) or any(_bends(b, inputs[1:]) for b in _bodies(eqn))
    if name == "scan":
        start, count = scan_counts(params)
        carried = [a | b for a, b in zip(inputs[start:][:count], outputs[:count], strict=True)]
        inputs = [*inputs[:start], *carried, *inputs[start + count :]]
    if name in BENT:
        return True
    bodies = [b for b in _bodies(eqn) if len(b.invars) == len(inputs)]
    return any(_bends(body, inputs) for body in bodies)


def _bodies(eqn: Any) -> list[Any]:
    params = eqn.params
    found = [params.get(name) for name in ("jaxpr", "call_jaxpr")]
    return [body_of(b) for b in (*found, *params.get("branches", ())) if b is not None]
