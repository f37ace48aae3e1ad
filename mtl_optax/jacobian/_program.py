"""A linear program, from parameters to losses: read, cut, transposed and compared.

`jax.linearize` gives the tangent program of a loss function at a point, a jaxpr. Its data flow says
which parameter feeds which task. What feeds one task alone is that task's *head*, what feeds more
is the *trunk*.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from mtl_optax._compat import body_of, is_jaxpr, new_jaxpr
from mtl_optax._numerics import underflows
from mtl_optax.jacobian._rows import gathered

# What moves or widens the entries of a parameter and leaves all inner products as they are.
ISOMETRIES = ("transpose", "reshape", "convert_element_type", "squeeze", "copy", "copy_p")


@dataclasses.dataclass(frozen=True)
class Equations:
    """What a jaxpr holds, in every version of JAX; the values of its constants are kept apart."""

    constvars: Sequence[Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]
    eqns: Sequence[Any]

    def replace(self, **changes: Any) -> "Equations":
        """The same with other variables or equations."""
        return dataclasses.replace(self, **changes)


class Parts(NamedTuple):
    """A program cut where its tasks part."""

    heads: list[list[Any]]  # for each group, the equations that feed it and no other task
    trunk: Equations  # what feeds several tasks
    meets: list[Any]  # the variables of the trunk that heads read, or that are losses themselves


class Program:
    """Equations that are linear in their inputs, the leaves of the parameters.

    Its outputs are *groups* of tasks: a scalar for a loss that was computed alone, an array for
    losses that were computed together. Its constants, the residuals of the forward pass, are kept
    apart. Two programs are equal if they do the same, whatever their variables are called.
    """

    def __init__(self, jaxpr: Equations):
        self.jaxpr = jaxpr

    @classmethod
    def of(cls, linear_fn: Callable, *primals: Any) -> tuple["Program", list[Any]]:
        """Stages out `linear_fn`, which is linear in the trees `primals`, and its residuals."""
        whole = lambda *primals: jax.tree.map(gathered, linear_fn(*primals))  # noqa: E731
        jaxpr, residuals = _sort_out(*_inline(jax.make_jaxpr(whole)(*primals)))
        return cls(_unstack_outputs(jaxpr)), residuals

    def __repr__(self) -> str:
        return f"a program of {self.num_tasks} losses"

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Program)
            and hash(self) == hash(other)
            and self._canonical == other._canonical
        )

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _canonical(self) -> Any:
        return _canonical(self.jaxpr)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._canonical)

    @property
    def leaves(self) -> Sequence[Any]:
        """The variables of the parameters."""
        return self.jaxpr.invars

    @property
    def groups(self) -> Sequence[Any]:
        """The variables, or literals, of the losses."""
        return self.jaxpr.outvars

    @functools.cached_property
    def num_tasks(self) -> int:
        """The number of tasks K."""
        return sum(group.aval.size for group in self.groups)

    @functools.cached_property
    def tasks(self) -> list[range]:
        """The tasks of each group."""
        ends = itertools.accumulate((g.aval.size for g in self.groups), initial=0)
        return [range(i, j) for i, j in itertools.pairwise(ends)]

    @functools.cached_property
    def feeds(self) -> dict[Any, int]:
        """For each variable, the set of tasks that depend on it, as a bit mask."""
        masks = {}
        for group, tasks in zip(self.groups, self.tasks, strict=True):
            if is_var(group):
                masks[group] = masks.get(group, 0) | ((1 << len(tasks)) - 1) << tasks.start
        for eqn in reversed(self.jaxpr.eqns):
            for v in variables(eqn):
                masks[v] = masks.get(v, 0) | fed(eqn, masks)
        return masks

    @functools.cached_property
    def touches(self) -> list[int]:
        """How many tasks each leaf touches, seen through calls and loops."""
        leaves = range(len(self.leaves))
        reached = reachable(self.jaxpr, [1 << i for i in leaves])
        sizes = [group.aval.size for group in self.groups]
        return [
            sum(size for size, mask in zip(sizes, reached, strict=True) if mask >> i & 1)
            for i in leaves
        ]

    @functools.cached_property
    def forming(self) -> list[int]:
        """The multiplications that a row of each leaf takes, as far as they are matrix products."""
        views, costs = {v: i for i, v in enumerate(self.leaves)}, [0] * len(self.leaves)
        for eqn in self.jaxpr.eqns:
            for v in variables(eqn):
                if v in views and eqn.primitive.name in ISOMETRIES:
                    views[eqn.outvars[0]] = views[v]
                elif v in views:
                    costs[views[v]] += row_multiplications(eqn, v)
        return costs

    @functools.cached_property
    def underflows(self) -> bool:
        """Whether a leaf or a loss is of a type that has no small numbers, as float16."""
        return any(underflows(v.aval.dtype) for v in (*self.leaves, *self.groups))

    @functools.cached_property
    def parts(self) -> Parts:
        """The heads and the trunk."""
        owners = {tasks.start: i for i, tasks in enumerate(self.tasks)}
        heads, trunk = [[] for _ in self.groups], []
        for eqn in self.jaxpr.eqns:
            mask = fed(eqn, self.feeds)
            if mask.bit_count() > 1:
                trunk.append(eqn)
            elif mask:
                heads[owners[mask.bit_length() - 1]].append(eqn)
        read = {v for eqn in itertools.chain(*heads) for v in variables(eqn)}
        read.update(filter(is_var, self.groups))
        meets = [v for eqn in trunk for v in eqn.outvars if v in read]
        return Parts(heads, self.jaxpr.replace(eqns=trunk, outvars=meets), meets)


def is_var(atom: Any) -> bool:
    """Whether an atom of a jaxpr is a variable, not a literal."""
    return not isinstance(atom, jex.Literal)


def variables(eqn: Any) -> list[Any]:
    """The variables that an equation reads."""
    return [atom for atom in eqn.invars if is_var(atom)]


def row_multiplications(eqn: Any, w: Any) -> int:
    """The multiplications that a row of W takes where an equation is a matrix product with it."""
    if eqn.primitive.name != "dot_general":
        return 0
    contracted = eqn.params["dimension_numbers"][0][eqn.invars.index(w)]
    return eqn.outvars[0].aval.size * math.prod(w.aval.shape[d] for d in contracted)


def all_read(jaxpr: Equations) -> set[Any]:
    """The variables that any of its equations reads."""
    return {v for eqn in jaxpr.eqns for v in variables(eqn)}


def fed(eqn: Any, masks: dict[Any, int]) -> int:
    """The tasks that depend on an equation."""
    return functools.reduce(operator.or_, (masks.get(v, 0) for v in eqn.outvars), 0)


def transpose(
    jaxpr: Equations, consts: Sequence[Any]
) -> Callable[[Sequence[jax.Array]], list[Any]]:
    """The transpose of a linear jaxpr: cotangents of its outputs to those of its inputs."""
    # The avals themselves: inside `shard_map` they say which mesh axes an input varies over.
    primals = [v.aval for v in jaxpr.invars]
    linear = jax.linear_transpose(lambda *args: evaluate(jaxpr, consts, *args), *primals)
    return lambda cotangents: list(linear(list(cotangents)))


def cut(jaxpr: Equations, outvars: Sequence[Any]) -> Equations:
    """The part of a jaxpr that `outvars` depend on."""
    needed, eqns = set(filter(is_var, outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            needed.update(variables(eqn))
    return jaxpr.replace(eqns=eqns[::-1], outvars=list(outvars))


def forward_as_backward(jaxpr: Any) -> Any:
    """The program whose look-ups give 0 out of bounds, where their transposes drop.

    A look-up that promises to stay in bounds clamps what does not, but only on its way forth.
    """

    def rewrite(value: Any) -> Any:
        if is_jaxpr(value):
            body = forward_as_backward(body_of(value))
            return body if body_of(value) is value else value.replace(jaxpr=body)
        return tuple(map(rewrite, value)) if type(value) is tuple else value

    def strict(eqn: Any) -> Any:
        params = {name: rewrite(value) for name, value in eqn.params.items()}
        if params.get("mode") == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS:
            params |= {"mode": jax.lax.GatherScatterMode.FILL_OR_DROP}
            params |= {"fill_value": 0} if "fill_value" in params else {}
        return eqn.replace(params=params)

    return jaxpr.replace(eqns=[strict(eqn) for eqn in jaxpr.eqns])


def evaluate(equations: Equations, consts: Sequence[Any], *args: Any) -> list[Any]:
    """What a jaxpr gives for the values of its constants and inputs."""
    inputs = [*equations.constvars, *equations.invars]
    jaxpr = new_jaxpr(inputs, equations.outvars, equations.eqns)
    return jex.jaxpr_as_fun(jaxpr)(*consts, *args)


def _inline(closed: Any) -> tuple[Equations, list[Any]]:
    """The program without calls of jitted functions, and with its arrays as constants.

    Outside of `jit` a residual of one number may stand in the program as a literal. There it would
    make another program of each step.
    """
    eqns, constvars, consts = [], list(closed.jaxpr.constvars), list(closed.consts)

    def constant(value, aval):
        constvars.append(jex.Var(aval))
        consts.append(value)
        return constvars[-1]

    def walk(jaxpr, env):
        def read(atom):
            if is_var(atom):
                return env.get(atom, atom)
            is_array = isinstance(atom.val, jax.Array) or np.ndim(atom.val)
            return constant(jnp.asarray(atom.val), atom.aval) if is_array else atom

        for eqn in jaxpr.eqns:
            invars = [read(atom) for atom in eqn.invars]
            body = eqn.params.get("jaxpr") if eqn.primitive.name == "jit" else None
            if body is not None:
                inner = dict(zip(body.jaxpr.invars, invars, strict=True))
                for v, value in zip(body.jaxpr.constvars, body.consts, strict=True):
                    inner[v] = constant(value, v.aval)
                outvars = walk(body.jaxpr, inner)
                env.update(zip(eqn.outvars, outvars, strict=True))
                continue
            # A body that is called twice has its variables once.
            outvars = [jex.Var(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outvars, strict=True))
            eqns.append(eqn.replace(invars=invars, outvars=outvars))
        return [read(atom) for atom in jaxpr.outvars]

    outvars = walk(closed.jaxpr, {})
    return Equations(constvars, closed.jaxpr.invars, outvars, eqns), consts


def _sort_out(jaxpr: Equations, consts: list[Any]) -> tuple[Equations, list[Any]]:
    """The equations that are linear in the inputs, and their constants, computed where needed."""
    linear = set(jaxpr.invars)
    constant, rest = [], []
    for eqn in jaxpr.eqns:
        if linear.isdisjoint(variables(eqn)):
            constant.append(eqn)
        else:
            rest.append(eqn)
            linear.update(eqn.outvars)
    needed = {v for eqn in rest for v in variables(eqn)} | set(filter(is_var, jaxpr.outvars))
    known = [v for eqn in constant for v in eqn.outvars if v in needed]
    values = []
    if known:
        values = evaluate(jaxpr.replace(eqns=constant, invars=[], outvars=known), consts)
    kept = [(v, c) for v, c in zip(jaxpr.constvars, consts, strict=True) if v in needed]
    constvars = [*(v for v, _ in kept), *known]
    return jaxpr.replace(eqns=rest, constvars=constvars), [*(c for _, c in kept), *values]


def _unstack_outputs(jaxpr: Equations) -> Equations:
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
        env.update(zip(eqn.outvars, through(eqn, inputs), strict=True))
    return [read(v) for v in jaxpr.outvars]


def through(eqn: Any, inputs: list[int]) -> list[int]:
    """Masks of an equation's outputs; what can't be looked into mixes all its inputs."""
    name, params = eqn.primitive.name, eqn.params
    union = functools.reduce(operator.or_, inputs, 0)
    mixed = [union] * len(eqn.outvars)
    if not union:
        return mixed
    if name == "scan":
        body = body_of(params["jaxpr"])
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
        branches = [reachable(body_of(branch), inputs[1:]) for branch in params["branches"]]
        # Which branch it is decides on all that comes out.
        return [functools.reduce(operator.or_, m, inputs[0]) for m in zip(*branches, strict=True)]
    # jit, remat, custom_jvp_call and their like carry one body with the equation's own signature.
    body = body_of(params.get("jaxpr") or params.get("call_jaxpr"))
    if body is not None and (len(body.invars), len(body.outvars)) == (
        len(eqn.invars),
        len(eqn.outvars),
    ):
        return reachable(body, inputs)
    return mixed


# Equality: a jaxpr as a hashable value, its variables numbered as they come.


def _canonical(jaxpr: Any) -> Any:
    numbers: dict[Any, int] = {}

    def name(atom: Any) -> Any:
        if is_var(atom):
            return numbers.setdefault(atom, len(numbers))
        return _canonical_param(atom.val), atom.aval

    inputs = tuple((name(v), v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
    eqns = tuple(
        (
            eqn.primitive,
            tuple(map(name, eqn.invars)),
            tuple((name(v), v.aval) for v in eqn.outvars),
            _canonical_param(eqn.params),
        )
        for eqn in jaxpr.eqns
    )
    return inputs, len(jaxpr.constvars), eqns, tuple(map(name, jaxpr.outvars))


def _canonical_param(value: Any) -> Any:
    if is_jaxpr(value):
        return _canonical(body_of(value)), tuple(
            map(_canonical_param, getattr(value, "consts", ()))
        )
    if isinstance(value, dict):
        return tuple((k, _canonical_param(v)) for k, v in sorted(value.items(), key=str))
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_canonical_param, value))
    if isinstance(value, np.ndarray | np.generic | bool | int | float | complex):
        # Their bytes: 1 equals 1.0 and True, -0. equals 0., and NaN not itself.
        return type(value), np.asarray(value).dtype, np.shape(value), np.asarray(value).tobytes()
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value


class _Same:
    """Equal to what holds the same object."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
