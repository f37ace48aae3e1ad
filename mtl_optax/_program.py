"""Reading and cutting the jaxpr of a linear program."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex


def is_var(atom: Any) -> bool:
    """Whether an atom of a jaxpr is a variable, not a literal."""
    return not isinstance(atom, jex.Literal)


def variables(eqn: Any) -> list[Any]:
    """The variables that an equation reads."""
    return [atom for atom in eqn.invars if is_var(atom)]


def sort_out(closed: Any) -> tuple[Any, list[Any]]:
    """A linear program as equations that are all linear in its inputs, and their constants.

    Calls of jitted functions give way to their bodies, and what no input reaches is computed.
    """
    jaxpr = _inline(closed.jaxpr)
    linear = set(jaxpr.invars)
    constant, rest = [], []
    for eqn in jaxpr.eqns:
        if linear.isdisjoint(variables(eqn)):
            constant.append(eqn)
        else:
            rest.append(eqn)
            linear.update(eqn.outvars)
    if not constant:
        return jaxpr, closed.consts
    needed = {v for eqn in rest for v in eqn.invars if is_var(v)} | set(
        filter(is_var, jaxpr.outvars)
    )
    known = [v for eqn in constant for v in eqn.outvars if v in needed]
    values = evaluate(jaxpr.replace(eqns=constant, invars=[], outvars=known), closed.consts)
    return jaxpr.replace(eqns=rest, constvars=[*jaxpr.constvars, *known]), [*closed.consts, *values]


def evaluate(jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
    """The outputs of a jaxpr."""
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts))(*args)


def transpose(jaxpr: Any, consts: Sequence[Any]) -> Callable[[Sequence[jax.Array]], list[Any]]:
    """The transpose of a linear jaxpr: cotangents of its outputs to those of its inputs."""
    # The avals themselves: inside `shard_map` they say which mesh axes an input varies over.
    primals = [v.aval for v in jaxpr.invars]
    linear = jax.linear_transpose(lambda *args: evaluate(jaxpr, consts, *args), *primals)
    return lambda cotangents: list(linear(list(cotangents)))


def cut(jaxpr: Any, outvars: Sequence[Any]) -> Any:
    """The part of a jaxpr that `outvars` depend on."""
    needed, eqns = set(filter(is_var, outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            needed.update(variables(eqn))
    return jaxpr.replace(eqns=eqns[::-1], outvars=list(outvars))


def feeds(jaxpr: Any) -> dict[Any, int]:
    """For each variable, the set of tasks that depend on it, as a bit mask."""
    masks, first = {}, 0
    for group in jaxpr.outvars:
        if is_var(group):
            masks[group] = masks.get(group, 0) | ((1 << group.aval.size) - 1) << first
        first += group.aval.size
    for eqn in reversed(jaxpr.eqns):
        for v in variables(eqn):
            masks[v] = masks.get(v, 0) | fed(eqn, masks)
    return masks


def fed(eqn: Any, masks: dict[Any, int]) -> int:
    """The tasks that depend on an equation."""
    return functools.reduce(operator.or_, (masks.get(v, 0) for v in eqn.outvars), 0)


def _inline(jaxpr: Any) -> Any:
    eqns = []

    def walk(jaxpr, env):
        def read(atom):
            return env.get(atom, atom) if is_var(atom) else atom

        for eqn in jaxpr.eqns:
            invars = [read(atom) for atom in eqn.invars]
            body = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
            if body is not None and not body.consts:
                outvars = walk(body.jaxpr, dict(zip(body.jaxpr.invars, invars, strict=True)))
                env.update(zip(eqn.outvars, outvars, strict=True))
                continue
            # A body that is called twice has its variables once.
            outvars = [jex.Var(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outvars, strict=True))
            eqns.append(eqn.replace(invars=invars, outvars=outvars))
        return [read(atom) for atom in jaxpr.outvars]

    outvars = walk(jaxpr, {})
    return jaxpr.replace(eqns=eqns, outvars=outvars)


def unstack_outputs(jaxpr: Any) -> Any:
    """Undoes a final `jnp.stack`, `jnp.array` or `jnp.concatenate` of losses.

    The stacked tasks become outputs of their own again, so that they can be told apart.
    """
    producer = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

    def pieces(atom: Any) -> list[Any]:
        eqn = producer.get(atom) if is_var(atom) else None
        if eqn is None:
            return [atom]
        params = eqn.params
        if (eqn.primitive.name == "stack" and params["axis"] == 0) or (
            eqn.primitive.name == "concatenate" and params["dimension"] == 0
        ):
            return [piece for operand in eqn.invars for piece in pieces(operand)]
        if eqn.primitive.name in ("broadcast_in_dim", "reshape") and atom.aval.size == 1:
            return pieces(eqn.invars[0])
        return [atom]

    return jaxpr.replace(outvars=[piece for v in jaxpr.outvars for piece in pieces(v)])


def reachable(jaxpr: Any, masks: Sequence[int]) -> list[int]:
    """For each output, the union of the bit masks of the inputs it depends on."""
    env = dict(zip(jaxpr.invars, masks, strict=True))

    def read(atom: Any) -> int:
        return env.get(atom, 0) if is_var(atom) else 0

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        env.update(zip(eqn.outvars, _through(eqn, inputs), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _through(eqn: Any, inputs: list[int]) -> list[int]:
    """Masks of an equation's outputs; what can't be looked into mixes all its inputs."""
    name, params = eqn.primitive.name, eqn.params
    union = functools.reduce(operator.or_, inputs, 0)
    mixed = [union] * len(eqn.outvars)
    if not union:
        return mixed
    if name == "scan":
        body = _body(params["jaxpr"])
        # Consts and carry enter the body as they are; what is scanned over loses its first axis.
        same = [v.aval.shape == u.aval.shape for v, u in zip(eqn.invars, body.invars, strict=True)]
        num_carry = sum(
            v.aval.shape == u.aval.shape for v, u in zip(eqn.outvars, body.outvars, strict=True)
        )
        carry = slice(sum(same) - num_carry, sum(same))
        while True:  # a carry feeds the next step's carry: the least fixed point
            outputs = reachable(body, inputs)
            merged = [a | b for a, b in zip(inputs[carry], outputs[:num_carry], strict=True)]
            if merged == inputs[carry]:
                return outputs
            inputs = [*inputs[: carry.start], *merged, *inputs[carry.stop :]]
    if name == "cond":
        branches = [reachable(_body(branch), inputs[1:]) for branch in params["branches"]]
        return [functools.reduce(operator.or_, masks) for masks in zip(*branches, strict=True)]
    # jit, remat, custom_jvp_call and their like carry one body with the equation's own signature.
    body = _body(params.get("jaxpr") or params.get("call_jaxpr"))
    if body is not None and (len(body.invars), len(body.outvars)) == (
        len(eqn.invars),
        len(eqn.outvars),
    ):
        return reachable(body, inputs)
    return mixed


def _body(jaxpr: Any) -> Any:
    """The jaxpr of a closed one; which of the two an equation holds depends on the JAX version."""
    return getattr(jaxpr, "jaxpr", jaxpr)
