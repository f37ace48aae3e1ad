"""MOML: weights under which a step helps every task on other data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._lookahead import jacobian_of, trial_step
from mtl_optax._min_norm import min_norm_weights
from mtl_optax._numerics import dot
from mtl_optax._options import check_num_tasks, check_option
from mtl_optax._usable import softmax_over, step_each, unit_vector
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class MomlState(NamedTuple):
    """State of `scale_by_moml`."""

    weights: PerTask  # (K,) float32, of the last update
    logits: PerTask  # (K,) float32, that the last update used
    opt_state: PerTask  # of the optimizer of each logit
    fallbacks: jax.Array  # () int32, updates whose solver did not converge


def scale_by_moml(
    num_tasks: int,
    *,
    learning_rate: float | jax.Array = 0.1,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns weights under which a step lowers every loss of another batch.

    .. math:: \lambda = \mathrm{softmax}(a), \quad
              h_k = \frac{\partial}{\partial a} L_k^{val}\Big(\theta - \alpha \sum_i \lambda_i
              \nabla L_i(\theta)\Big), \quad
              a \leftarrow a - \mathrm{opt}\Big(\sum_k s_k \frac{h_k}{\|h_k\|}\Big)

    with s the min-norm weights of MGDA: Auto-Lambda with as many goals as tasks, none of which may
    be traded for another. Where no change of the weights helps all of them, they rest. The losses
    of the other batch come as `validation_fn=`, as in `scale_by_auto_lambda`; this costs K
    gradients of them.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      learning_rate: alpha > 0 of the trial step.
      optimizer: updates each logit; `optax.adam(1e-3)` by default.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: mean-like (weights sum to 1).

    Raises:
      TypeError: if `validation_fn=` or the parameters are missing.
      ValueError: if `num_tasks` < 1, `learning_rate` <= 0, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> losses_fn = lambda w: {"a": jnp.sum((w - 1) ** 2), "b": jnp.sum((w - 3) ** 2)}
      >>> w = jnp.zeros(2)
      >>> losses, jac = mtl.value_and_jac(losses_fn)(w)
      >>> tx = mtl.scale_by_moml(2, optimizer=optax.sgd(0.1))
      >>> _, state = tx.update(jac, tx.init(w), w, validation_fn=losses_fn)
      >>> [round(x, 3) for x in state.weights.tolist()]  # the longer step is better for both
      [0.465, 0.535]

    Differs from:
      The paper unrolls any number of inner steps; this is the one step of the authors' later code
      and of LibMTL, which clips the min-norm weights of two tasks to 0.001 and 0.999.

    References:
      Ye et al., `Multi-Objective Meta Learning <https://arxiv.org/abs/2102.07121>`_, 2021,
      algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_option("learning_rate", learning_rate, lambda rate: rate > 0, "more than 0")
    optimizer = optimizer or optax.adam(1e-3)

    def init_fn(params):
        del params
        logits = jnp.zeros(num_tasks, jnp.float32)
        return MomlState(
            weights=jnp.full(num_tasks, 1 / num_tasks, jnp.float32),
            logits=logits,
            opt_state=jax.vmap(optimizer.init)(logits),
            fallbacks=jnp.zeros([], jnp.int32),
        )

    def update_fn(jacobian, state, *, params=None, validation_fn=None, **extra_args):
        del extra_args
        validation = jacobian_of("validation_fn", validation_fn, jacobian, params)
        present = jacobian.present

        def weights_of(logits):
            return softmax_over(present, logits, present)

        weights, by_logits = jax.vjp(weights_of, state.logits)
        stepped, slope = trial_step(jacobian, params, weights, learning_rate)
        rows = jax.vmap(lambda gradient: by_logits(slope(gradient))[0])(validation(stepped).rows())
        units, lengths = jax.vmap(unit_vector)(rows)
        usable = (lengths > 0) & jnp.isfinite(lengths)  # a loss that no weight changes has no say
        units = jnp.where(usable[:, None], units, 0)
        products = dot(units, units.T)
        shares, solved = min_norm_weights(products, usable.astype(products.dtype), usable)
        gradient = dot(shares, units)
        # Nearer to 0 than the rounding of the products can tell, an optimizer would follow noise.
        eps = jnp.finfo(gradient.dtype).eps
        moves = jnp.any(usable) & (dot(gradient, gradient) > 10 * eps)
        logits, opt_state = step_each(
            optimizer,
            state.opt_state,
            state.logits,
            gradient,
            jnp.broadcast_to(moves, (num_tasks,)),
        )
        weights = weights_of(logits)
        failed = jnp.any(usable) & ~solved
        return jacobian.scale(weights), MomlState(
            weights, logits, opt_state, state.fallbacks + failed
        )

    return link(init_fn, update_fn, num_tasks)


moml = summed(scale_by_moml)
