"""NTK weights: let all the terms of a physics-informed loss converge at one rate."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._branch import where_needed
from mtl_optax._numerics import bounded, divide, wide
from mtl_optax._options import check_count, check_key, check_num_tasks, per_task
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class NtkState(NamedTuple):
    """State of `scale_by_ntk`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    traced: jax.Array  # () int32, 1 once traces were given


def scale_by_ntk(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by the inverse trace of its neural tangent kernel.

    .. math:: \lambda_k = \frac{\sum_j \mathrm{tr}\, K_j}{\mathrm{tr}\, K_k}, \quad
              K_k = \frac{\partial r_k}{\partial\theta} \frac{\partial r_k}{\partial\theta}^\top

    The trace is the mean convergence rate of the residuals :math:`r_k` times their number. It comes
    with each update as the extra argument `ntk_traces=`, a tree like the losses, from `ntk_traces`
    below. Every hundred steps is often enough: in between the weights are held, at the cost of a
    plain step. Until the first traces come the kernel is that of the losses themselves,
    :math:`\mathrm{tr}\, K_k = \|g_k\|^2`, the diagonal of the Gramian. A task of trace 0 keeps
    weight 1; a trace that is not finite leaves a weight as it was.

    Args:
      num_tasks: number of tasks K; static, at least 1.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (each weight is at least 1).

    Raises:
      ValueError: if `num_tasks` < 1, or the losses or traces are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> residuals = lambda w, x: {"pde": 3 * w * x, "boundary": w - jnp.ones(1)}
      >>> w, x = jnp.float32(2.0), jnp.array([1.0, -1.0])
      >>> traces = mtl.ntk_traces(residuals)(w, x)
      >>> task_losses = lambda w, x: {k: jnp.mean(r**2) for k, r in residuals(w, x).items()}
      >>> losses, jac = mtl.value_and_jac(task_losses)(w, x)
      >>> tx = mtl.scale_by_ntk(num_tasks=2)
      >>> jac, state = tx.update(jac, tx.init(w), ntk_traces=traces)
      >>> {name: round(float(w), 4) for name, w in zip(jac.names, state.weights)}
      {'boundary': 19.0, 'pde': 1.0556}

    References:
      Wang et al., `When and Why PINNs Fail to Train <https://arxiv.org/abs/2007.14527>`_, 2020,
      eqs. 6.5-6.6 and algorithm 1.
    """
    check_num_tasks(num_tasks)

    def init_fn(params):
        del params
        return NtkState(jnp.ones(num_tasks, jnp.float32), jnp.zeros([], jnp.int32))

    def update_fn(jacobian, state, *, ntk_traces=None, **extra_args):
        del extra_args

        def balanced(traces):
            usable = jnp.isfinite(traces)
            total = jnp.sum(jnp.where(usable & jacobian.present, traces, 0))
            weights = jnp.where(usable, divide(total, traces, 1), state.weights)
            return bounded(weights, jnp.float32)

        def of_the_losses():
            norms = jacobian.norms()
            largest = jnp.max(jnp.where(jnp.isfinite(norms), norms, 0))
            # Ratios before squares, which may leave the range.
            return balanced(divide(norms, largest, norms) ** 2)

        if ntk_traces is None:
            weights = where_needed(state.traced == 0, of_the_losses, lambda: state.weights)
            return jacobian.scale(weights), NtkState(weights, state.traced)
        traces = per_task("ntk_traces", jax.lax.stop_gradient(ntk_traces), jacobian)
        weights = balanced(traces)
        return jacobian.scale(weights), NtkState(weights, jnp.ones_like(state.traced))

    return link(init_fn, update_fn, num_tasks)


def ntk_traces(
    residual_fn: Callable[..., Any], *, num_probes: int | None = None
) -> Callable[..., Any]:
    r"""The trace of each task's neural tangent kernel, for `scale_by_ntk`.

    .. math:: \mathrm{tr}\, K_k = \|\partial r_k / \partial\theta\|_F^2
              = \mathbb E_v \|v^\top \partial r_k / \partial\theta\|^2

    Args:
      residual_fn: `residual_fn(params, *args)` returns a tree with an array of residuals for each
        task, in the structure of the losses.
      num_probes: None for the exact trace, one backward pass a residual (vmapped); a number for
        Hutchinson's estimate from as many random signs v, unbiased, of relative deviation about
        :math:`\sqrt{2 / \text{num\_probes}}` at most.

    Returns:
      A function of the arguments of `residual_fn` to the traces, a tree like the losses; with
      probes it takes a typed random key as `key=` too.

    Raises:
      TypeError: if `num_probes` is not a Python int; by the function, if `key` is not a typed one.
      ValueError: if `num_probes` < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> traces = mtl.ntk_traces(lambda w, x: {"a": w * x, "b": 2 * w * x})
      >>> {k: float(t) for k, t in traces(jnp.float32(1.0), jnp.array([1.0, 2.0])).items()}
      {'a': 5.0, 'b': 20.0}
    """
    if num_probes is not None:
        check_count("num_probes", num_probes)

    def traces_fn(params, *args, key: jax.Array | None = None, **kwargs):
        residuals, pull = jax.vjp(lambda p: residual_fn(p, *args, **kwargs), params)
        leaves, treedef = jax.tree.flatten(residuals)
        if num_probes is not None:
            check_key(key)
        # Without probes nothing is drawn.
        keys = jax.random.split(jax.random.key(0) if key is None else key, len(leaves))
        traces = []
        for i, (leaf, leaf_key) in enumerate(zip(leaves, keys, strict=True)):

            def square(v, i=i):
                cotangents = [jnp.zeros_like(x) for x in leaves]
                cotangents[i] = v
                # Squares of a narrow type would leave its range.
                row = jax.tree.leaves(pull(treedef.unflatten(cotangents)))
                return optax.tree.norm([g.astype(wide(g.dtype)) for g in row], squared=True)

            if num_probes is None:
                vectors = jnp.eye(leaf.size, dtype=leaf.dtype).reshape(-1, *leaf.shape)
                traces.append(jnp.sum(jax.vmap(square)(vectors)))
            else:
                signs = jax.random.rademacher(leaf_key, (num_probes, *leaf.shape), leaf.dtype)
                traces.append(jnp.mean(jax.vmap(square)(signs)))
        return treedef.unflatten(traces)

    return traces_fn


ntk = summed(scale_by_ntk)
