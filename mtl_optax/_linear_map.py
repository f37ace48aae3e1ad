"""The differential of K losses as data: linearised once, transposed as a strategy asks.

`jax.linearize` gives the tangent program of a loss function at a point. Kept as a jaxpr, that one
program answers everything: its transpose is the pullback, the transposes of its slices are the
rows, and its data flow says which parameter feeds which task.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.extend import core as jex

RowMode = Literal["batched", "isolated"]
ROW_MODES = get_args(RowMode)


class LinearMap:
    """A linear map from the flat leaves of a pytree to K loss tangents.

    Its outputs are *groups*: a scalar for a loss that was computed alone, an array for losses that
    were computed together. The residuals of the forward pass are its pytree children, so it crosses
    `jit`, `vmap` and `scan`.
    """

    def __init__(self, jaxpr: Any, residuals: Sequence[Any]):
        self._jaxpr = jaxpr
        self._residuals = residuals

    @classmethod
    def of(cls, linear_fn: Callable, primals: Any) -> "LinearMap":
        """Stages out `linear_fn`, which is linear in the tree `primals`."""
        closed = jax.make_jaxpr(linear_fn)(primals)
        return cls(_unstack_outputs(closed.jaxpr), closed.consts)

    def pullback(self, weights: jax.Array) -> list[jax.Array]:
        """Jᵀw, one array a leaf: one backward pass."""
        groups = self._jaxpr.outvars
        ends = itertools.accumulate((math.prod(g.aval.shape) for g in groups), initial=0)
        cotangents = [
            weights[i:j].reshape(group.aval.shape).astype(group.aval.dtype)
            for group, (i, j) in zip(groups, itertools.pairwise(ends), strict=True)
        ]
        return self._transpose(groups)(cotangents)

    def rows(self, mode: RowMode) -> list[jax.Array]:
        """The K rows, leaves `(K, *shape)`: K backward passes."""
        groups = self._jaxpr.outvars
        if mode == "batched":
            num_tasks = sum(math.prod(group.aval.shape) for group in groups)
            dtype = jnp.result_type(*(group.aval.dtype for group in groups))
            return jax.vmap(self.pullback)(jnp.eye(num_tasks, dtype=dtype))
        blocks = []
        for group in groups:
            # A slice holds no operation of another task, so 0 * NaN can't reach these rows.
            transpose, shape = self._transpose([group]), group.aval.shape
            basis = jnp.eye(math.prod(shape), dtype=group.aval.dtype).reshape(-1, *shape)
            if len(basis) == 1:
                blocks.append([row[None] for row in transpose([basis[0]])])
            else:
                blocks.append(jax.vmap(lambda e, transpose=transpose: transpose([e]))(basis))
        return [jnp.concatenate(leaf) for leaf in zip(*blocks, strict=True)]

    def touches(self) -> list[int]:
        """How many tasks each leaf touches, by the data flow of the tangent program."""
        num_leaves = len(self._jaxpr.invars)
        reached = _reachable(self._jaxpr, [1 << i for i in range(num_leaves)])
        return [
            sum(
                math.prod(group.aval.shape)
                for group, mask in zip(self._jaxpr.outvars, reached, strict=True)
                if mask >> i & 1
            )
            for i in range(num_leaves)
        ]

    def _transpose(self, groups: Sequence[Any]) -> Callable[[list[jax.Array]], list[jax.Array]]:
        jaxpr = _slice(self._jaxpr, groups)
        closed = jex.ClosedJaxpr(jaxpr, self._residuals)
        primals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]
        transpose = jax.linear_transpose(lambda *t: jex.jaxpr_as_fun(closed)(*t), *primals)
        return lambda cotangents: list(transpose(cotangents))


jax.tree_util.register_pytree_node(
    LinearMap,
    lambda linear: ((linear._residuals,), linear._jaxpr),
    lambda jaxpr, children: LinearMap(jaxpr, *children),
)


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


def _slice(jaxpr: Any, outvars: Sequence[Any]) -> Any:
    """The part of a jaxpr that `outvars` depend on."""
    needed, eqns = {v for v in outvars if _is_var(v)}, []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            needed.update(v for v in eqn.invars if _is_var(v))
    return jaxpr.replace(eqns=eqns[::-1], outvars=list(outvars))


def _unstack_outputs(jaxpr: Any) -> Any:
    """Undoes a final `jnp.stack`, `jnp.array` or `jnp.concatenate` of losses.

    The stacked tasks become outputs of their own again, so that they can be told apart.
    """
    producer = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

    def pieces(atom: Any) -> list[Any]:
        eqn = producer.get(atom) if _is_var(atom) else None
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


def _reachable(jaxpr: Any, masks: Sequence[int]) -> list[int]:
    """For each output, the union of the bit masks of the inputs it depends on."""
    env = dict(zip(jaxpr.invars, masks, strict=True))

    def read(atom: Any) -> int:
        return env.get(atom, 0) if _is_var(atom) else 0

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
        body = _open(params["jaxpr"])
        # Consts and carry enter the body as they are; what is scanned over loses its first axis.
        same = [v.aval.shape == u.aval.shape for v, u in zip(eqn.invars, body.invars, strict=True)]
        num_carry = sum(
            v.aval.shape == u.aval.shape for v, u in zip(eqn.outvars, body.outvars, strict=True)
        )
        carry = slice(sum(same) - num_carry, sum(same))
        while True:  # a carry feeds the next step's carry: the least fixed point
            outputs = _reachable(body, inputs)
            merged = [a | b for a, b in zip(inputs[carry], outputs[:num_carry], strict=True)]
            if merged == inputs[carry]:
                return outputs
            inputs = [*inputs[: carry.start], *merged, *inputs[carry.stop :]]
    if name == "cond":
        branches = [_reachable(_open(branch), inputs[1:]) for branch in params["branches"]]
        return [functools.reduce(operator.or_, masks) for masks in zip(*branches, strict=True)]
    # jit, remat, custom_jvp_call and their like carry one body with the equation's own signature.
    body = _open(params.get("jaxpr") or params.get("call_jaxpr"))
    if body is not None and (len(body.invars), len(body.outvars)) == (
        len(eqn.invars),
        len(eqn.outvars),
    ):
        return _reachable(body, inputs)
    return mixed


def _open(jaxpr: Any) -> Any:
    """The jaxpr of a closed one; which of the two an equation holds depends on the JAX version."""
    return getattr(jaxpr, "jaxpr", jaxpr)
