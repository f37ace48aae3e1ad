"""Every place where the versions of JAX that are supported differ."""

import functools
from typing import Any

import jax
from jax.extend import core as jex
from jax.sharding import AxisType

# In jax.core up to JAX 0.9, in jax.extend.core since.
_trace_state = getattr(jex, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state  # pyright: ignore


def current_trace() -> Any:
    """What equals itself as long as the same trace, or none, is under way."""
    return _trace_state(convention="nnx")


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes that x varies over inside `shard_map`."""
    aval: Any = jax.typeof(x)
    # `vma` up to JAX 0.9
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma


def explicit_mesh(x: Any) -> Any:
    """The mesh of x where its axes are Explicit, else None."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def new_jaxpr(invars: Any, outvars: Any, eqns: Any) -> Any:
    """A jaxpr without constants, of variables and equations of another one."""
    names = {"arg_names": ("",) * len(invars), "result_paths": ("",) * len(outvars)}
    debug_info = _nothing().debug_info._replace(**names)
    return jex.ClosedJaxpr(jex.Jaxpr([], invars, outvars, eqns, debug_info=debug_info), [])


@functools.cache
def _nothing() -> Any:
    return body_of(jax.make_jaxpr(lambda: ())())


def is_jaxpr(value: Any) -> bool:
    """Whether it is a jaxpr, open or closed; since JAX 0.12 there is one class for both."""
    return isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)


def body_of(jaxpr: Any) -> Any:
    """The jaxpr of a closed one; which of the two an equation holds depends on the version."""
    return getattr(jaxpr, "jaxpr", jaxpr)


# Up to JAX 0.9 a scan says itself which of its inputs are linear, and only JAX can say so.
SCANS_FLAG_LINEAR_INPUTS = jax.__version_info__ < (0, 10)


def scan_counts(params: Any) -> tuple[int, int]:
    """How many inputs of a `scan` equation are its constants, and how many are carried."""
    if "ft_in" not in params:  # up to JAX 0.11
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len([*consts]), len([*carry])
