"""A linear program traced anew with taps in place of its measured parameters.

What calls a body, as `lax.scan` and `jax.checkpoint` do, is called anew around the body's own walk,
so that a tap stands where the parameter is used, and JAX itself transposes the whole.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax._compat import SCANS_FLAG_LINEAR_INPUTS, body_of, scan_counts
from mtl_optax.jacobian._program import (
    ISOMETRIES,
    Equations,
    evaluate,
    is_var,
    row_multiplications,
    through,
    variables,
)
from mtl_optax.jacobian.ways._base import Cost
from mtl_optax.jacobian.ways._tap import Layer, layer_of, tap, zeros


class View(NamedTuple):
    """A value of the linear program: a part of a measured parameter, each entry once."""

    leaf: int


class Live(NamedTuple):
    """A value that depends on the hole; what is neither this nor a `View` or `ZERO` is constant."""

    array: jax.Array


ZERO = None  # a value that depends on parameters that are not measured alone

# Those values as bits, for `through`.
_LIVE, _ZERO = 1, 2

_CHECKPOINTS = ("remat2", "checkpoint")
OPENED = ("scan", "cond", "jit", *_CHECKPOINTS)  # the calls of which it looks into the body

# What was tapped, and how often in one pass, by leaf and variable.
Found = dict[tuple[int, Any], tuple[Layer, int]]


@dataclasses.dataclass
class Walk:
    """Evaluates linear programs, with a tap for each use of a measured parameter.

    Attributes:
      num_tasks: the number of tasks K.
      dtype: of the Gramian.
      task: an index that is mapped over the tasks.
      found: what was tapped.
    """

    num_tasks: int
    dtype: Any
    task: jax.Array
    found: Found = dataclasses.field(default_factory=dict)
    _turns: int = 1  # of the loops around what is walked
    _in_checkpoint: bool = False

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], hole: jax.Array
    ) -> list[Any]:
        """The values of the outputs, from those of the inputs."""
        uses, env = _uses(jaxpr), dict(zip(jaxpr.constvars, consts, strict=True))

        def settle(v: Any, value: Any) -> None:
            """Taps a parameter itself where its uses are not of separate parts of it."""
            env[v] = value
            if isinstance(value, View):
                if not uses[v]:
                    env[v] = ZERO
                elif len(uses[v]) > 1 and not _are_apart(uses[v]):
                    env[v] = self._tap_rows(v, value, hole)

        for v, value in zip(jaxpr.invars, args, strict=True):
            settle(v, value)
        for eqn in jaxpr.eqns:
            layer = None
            for i, v in enumerate(eqn.invars):
                if is_var(v) and isinstance(env[v], View):
                    name = eqn.primitive.name
                    layer = layer_of(eqn, v, self.num_tasks, self.dtype)
                    if layer or _is_view(eqn) or (name in OPENED and self._opens(eqn, i, env)):
                        continue
                    env[v] = self._tap_rows(v, env[v], hole, row_multiplications(eqn, v))
            values = [env[v] if is_var(v) else v.val for v in eqn.invars]
            views = [value for value in values if isinstance(value, View)]
            if views and layer:
                outs = [self._tap(layer[0], [env[layer[1]]], views[0], eqn.outvars[0], hole)]
            elif views and _is_view(eqn):
                outs = views
            else:
                outs = self._evaluate(eqn, values, hole)
            for v, value in zip(eqn.outvars, outs, strict=True):
                settle(v, value)
        return [env[v] if is_var(v) else v.val for v in jaxpr.outvars]

    def arrays(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], hole: jax.Array
    ) -> list[jax.Array]:
        """The same, as arrays."""
        outs = self.run(jaxpr, consts, args, hole)
        return [_array(out, v.aval) for out, v in zip(outs, jaxpr.outvars, strict=True)]

    def tap_rows(self, leaf: int, aval: Any, own: Any, hole: jax.Array) -> Live:
        """A parameter as its rows see it, which heads read too and left their rows `own` at."""
        layer = Layer(self.num_tasks, self.dtype, aval)
        return self._tap(layer, [own], View(leaf), None, hole)

    def _tap_rows(self, v: Any, view: View, hole: jax.Array, forming: int = 0) -> Live:
        layer = Layer(self.num_tasks, self.dtype, v.aval, forming=forming)
        return self._tap(layer, [], view, v, hole)

    def _tap(self, layer: Layer, residuals: list[Any], view: View, at: Any, hole: Any) -> Live:
        self.found[view.leaf, at] = layer, self._turns
        return Live(tap(layer, residuals, self.task, hole))

    def _evaluate(self, eqn: Any, values: list[Any], hole: jax.Array) -> list[Any]:
        masks = through(eqn, [*map(_mask, values)])
        if all(mask == _ZERO for mask in masks):
            return [ZERO] * len(masks)
        if any(map(_mask, values)) and eqn.primitive.name in OPENED:
            if eqn.primitive.name == "jit":
                closed = eqn.params["jaxpr"]
                return self.run(body_of(closed), getattr(closed, "consts", ()), values, hole)
            if eqn.primitive.name in _CHECKPOINTS:
                arrays = self._checkpoint(eqn, values, hole)
                return _typed(arrays, masks)
            if eqn.primitive.name == "cond":
                return _typed(self._cond(eqn, values, hole), masks)
            if not self._is_kept(eqn, values):
                return _typed(self._scan(eqn, values, hole), masks)
        arrays = {
            v: _array(x, v.aval) for v, x in zip(eqn.invars, values, strict=True) if is_var(v)
        }
        one = Equations([], [*arrays], eqn.outvars, [eqn])
        return _typed(evaluate(one, [], *arrays.values()), masks)

    def _body(
        self, closed: Any, values: Sequence[Any], turns: int = 1
    ) -> Callable[[jax.Array, Sequence[Any]], list[jax.Array]]:
        """A body as a function of the hole and those of its inputs that are arrays."""
        jaxpr, consts = body_of(closed), getattr(closed, "consts", ())

        def run(hole: jax.Array, arrays: Sequence[Any]) -> list[jax.Array]:
            left = iter(arrays)
            args = [_like(value, left) for value in values]
            outer, self._turns = self._turns, self._turns * turns
            outs = self.arrays(jaxpr, consts, args, hole)
            self._turns = outer
            return outs

        return run

    def _checkpoint(self, eqn: Any, values: Any, hole: jax.Array) -> list[jax.Array]:
        prevent_cse = eqn.params["prevent_cse"]
        checkpointed = jax.checkpoint(
            self._body(eqn.params["jaxpr"], values),
            prevent_cse=any(prevent_cse) if isinstance(prevent_cse, tuple) else prevent_cse,
            policy=eqn.params["policy"],
        )
        outer, self._in_checkpoint = self._in_checkpoint, True
        closed = jax.make_jaxpr(checkpointed)(hole, _arrays(values))
        self._in_checkpoint = outer
        # Not marked so, it would be computed ahead of the cotangents, and be held until they come.
        eqns = [
            eqn.replace(params=eqn.params | {"differentiated": True})
            if eqn.primitive.name in _CHECKPOINTS
            else eqn
            for eqn in closed.jaxpr.eqns
        ]
        jaxpr = Equations(closed.jaxpr.constvars, closed.jaxpr.invars, closed.jaxpr.outvars, eqns)
        return evaluate(jaxpr, closed.consts, hole, *_arrays(values))

    def _cond(self, eqn: Any, values: Any, hole: jax.Array) -> list[jax.Array]:
        index, *values = values
        # JAX transposes a `cond` whose linear operands come last.
        constant = [x for x in values if not _mask(x)]
        live = [x.array for x in values if isinstance(x, Live)]

        def branch(closed: Any) -> Callable:
            body = self._body(closed, values)
            return lambda constant, live, hole: body(hole, _merge(values, constant, live))

        branches = [branch(closed) for closed in eqn.params["branches"]]
        return jax.lax.switch(index, branches, constant, live, hole)

    def _scan(self, eqn: Any, values: Any, hole: jax.Array) -> list[jax.Array]:
        params, body_avals = eqn.params, [v.aval for v in body_of(eqn.params["jaxpr"]).invars]
        consts_end, carry_end = itertools.accumulate(scan_counts(params))
        # A carry that starts as a constant may depend on the hole a turn later.
        carry_masks = through(eqn, [*map(_mask, values)])[: carry_end - consts_end]
        inits = [
            Live(_array(x, aval)) if mask or _mask(x) else x
            for x, aval, mask in zip(
                values[consts_end:carry_end],
                body_avals[consts_end:carry_end],
                carry_masks,
                strict=True,
            )
        ]
        consts, xs = values[:consts_end], values[carry_end:]
        body = self._body(params["jaxpr"], [*consts, *inits, *xs], params["length"])
        # JAX transposes a `scan` whose linear inputs come first, and whose constants are not
        # linear. So a linear constant is carried, times 1: what is carried unchanged is constant.
        constant = [x for x in consts if not _mask(x)]
        carried = [x.array for x in consts if isinstance(x, Live)]
        scanned = [x.array for x in xs if isinstance(x, Live)]
        rest = [x for x in xs if not _mask(x)]

        def step(carry, slices):
            hole, carried, state = carry
            args = [*_merge(consts, constant, carried), *state, *_merge(xs, slices[1], slices[0])]
            outs = body(hole, args)
            state, ys = outs[: len(inits)], outs[len(inits) :]
            return (hole * 1, [x * 1 for x in carried], state), ys

        init = hole, carried, _arrays(inits)
        (_, _, state), ys = jax.lax.scan(
            step,
            init,
            (scanned, rest),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*state, *ys]

    def _opens(self, eqn: Any, place: int, env: dict[Any, Any]) -> bool:
        """Whether a parameter that is an input of a call can be tapped inside of it."""
        if eqn.primitive.name == "cond":
            return place > 0
        if eqn.primitive.name != "scan":
            return True
        values = [env[v] if is_var(v) else v.val for v in eqn.invars]
        is_scanned = place >= sum(scan_counts(eqn.params))
        return is_scanned and not self._is_kept(eqn, values)

    def _is_kept(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Whether a scan has to stay the equation that it is, for JAX to know what is linear."""
        xs = values[sum(scan_counts(eqn.params)) :]
        flagged = SCANS_FLAG_LINEAR_INPUTS and not self._in_checkpoint
        return flagged and any(isinstance(x, Live) for x in xs)


def _uses(jaxpr: Any) -> dict[Any, list[Any]]:
    """The equations that read each variable, as often as they do; None for an output."""
    uses = defaultdict(list)
    for eqn in jaxpr.eqns:
        for v in variables(eqn):
            uses[v].append(eqn)
    for v in filter(is_var, jaxpr.outvars):
        # No view leaves a body: what is outside may use it otherwise.
        uses[v] += [None, None]
    return uses


def _is_view(eqn: Any) -> bool:
    """Whether it moves entries of a parameter, or leaves some out."""
    if eqn.primitive.name == "slice":
        return eqn.params["strides"] is None
    out = eqn.outvars[0].aval
    return eqn.primitive.name in ISOMETRIES and jnp.issubdtype(out.dtype, jnp.floating)


def _are_apart(uses: Sequence[Any]) -> bool:
    """Whether all uses are slices of which no two share an entry, as the layers of a stack."""
    if not all(eqn is not None and eqn.primitive.name == "slice" for eqn in uses):
        return False
    boxes = [
        [*zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True)]
        for eqn in uses
    ]
    return all(map(_is_view, uses)) and all(
        any(p[1] <= q[0] or q[1] <= p[0] for p, q in zip(a, b, strict=True))
        for a, b in itertools.combinations(boxes, 2)
    )


def _mask(value: Any) -> int:
    return _ZERO if value is ZERO else _LIVE if isinstance(value, View | Live) else 0


def _arrays(values: Sequence[Any]) -> list[Any]:
    """The arrays among some values."""
    known = [x for x in values if x is not ZERO and not isinstance(x, View)]
    return [x.array if isinstance(x, Live) else x for x in known]


def _merge(values: Sequence[Any], constant: Sequence[Any], live: Sequence[Any]) -> list[Any]:
    """The arrays among some values, in their order, from those of either kind."""
    constants, lives = iter(constant), iter(live)
    known = [x for x in values if x is not ZERO and not isinstance(x, View)]
    return [next(lives if isinstance(x, Live) else constants) for x in known]


def _like(value: Any, arrays: Any) -> Any:
    """The same kind of value, of the next array where it is one."""
    if value is ZERO or isinstance(value, View):
        return value
    return Live(next(arrays)) if isinstance(value, Live) else next(arrays)


def _array(value: Any, aval: Any) -> Any:
    """The value as an array of that type."""
    return zeros(aval) if value is ZERO else value.array if isinstance(value, Live) else value


def _typed(arrays: Sequence[Any], masks: Sequence[int]) -> list[Any]:
    """What the outputs of an equation are, by the inputs that they depend on."""
    kinds = {_ZERO: lambda _: ZERO, 0: lambda array: array}
    return [kinds.get(mask, Live)(x) for x, mask in zip(arrays, masks, strict=True)]


def costs_by_leaf(found: Found) -> dict[int, Cost]:
    """What measuring each leaf takes: all that it is tapped at, and the largest that is held."""
    costs: dict[int, Cost] = {}
    for (leaf, _), (layer, turns) in found.items():
        here = layer.cost
        before = costs.get(leaf, here._replace(multiplications=0))
        costs[leaf] = Cost(
            here.way if here.way == before.way else "streamed ghost, rows",
            before.multiplications + turns * here.multiplications,
            max(before.bytes_held, here.bytes_held),
        )
    return costs
