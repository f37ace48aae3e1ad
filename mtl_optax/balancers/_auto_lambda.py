"""Auto-Lambda: learn the weights under which a step helps on other data."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax._lookahead import jacobian_of, trial_step
from mtl_optax._options import check_flag, check_num_tasks, check_option, is_traced, per_task
from mtl_optax._typing import TaskOption
from mtl_optax._usable import softmax_over, step_each
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask

_START = 0.1


class AutoLambdaState(NamedTuple):
    """State of `scale_by_auto_lambda`."""

    weights: Annotated[PerTask, _START]  # (K,) float32, of the last update
    values: Annotated[PerTask, _START]  # (K,) float32, what is learned: weights or their logits
    opt_state: PerTask  # of the optimizer of each value


def scale_by_auto_lambda(
    num_tasks: int,
    *,
    learning_rate: float | jax.Array = 0.1,
    primary: TaskOption = 1.0,
    softmax: bool = False,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns the weights under which a step lowers the losses of another batch.

    .. math:: \min_\lambda \sum_k p_k L_k^{val}(\theta'), \quad
              \theta' = \theta - \alpha \sum_i \lambda_i \nabla L_i(\theta), \quad
              \frac{\partial}{\partial\lambda_i} = -\alpha\,\Big\langle \nabla L_i(\theta),
              \sum_k p_k \nabla L_k^{val}(\theta') \Big\rangle

    A task whose gradient on this batch points where the primary tasks improve on the other gains
    weight. The weights take a step of their own optimizer first, and then weigh the update. The
    losses of the other batch, held out or only another one of the training data, come with each
    update as the extra argument `validation_fn=`, a function from parameters to losses like those
    that were differentiated::

        tx.update(jac, opt_state, params, validation_fn=lambda p: task_losses(p, other_batch))

    A `flax.nnx.Optimizer` has them as a state: `lambda p: losses_fn(nnx.merge(graph, p), batch)`.
    It takes all parameters, so this link can't stand inside `mtl.partition`. An update costs about
    three plain steps. Weights start at 0.1 and are free: they may become negative, and then a task
    is unlearned.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      learning_rate: alpha > 0 of the trial step; that of the model's optimizer.
      primary: p, how much each validation loss counts, one for all tasks or a tree like the losses;
        0 for an auxiliary task.
      softmax: whether the weights are the softmax of what is learned, and sum to 1.
      optimizer: updates each weight; `optax.adam(1e-4)` with a tiny `eps` by default.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (K / 10 of the mean at first;
      mean-like with `softmax`).

    Raises:
      TypeError: if `validation_fn=` or the parameters are missing, or `softmax` is no bool.
      ValueError: if `num_tasks` < 1, `learning_rate` <= 0, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> losses_fn = lambda w, x: {"a": jnp.sum((w - x) ** 2), "b": jnp.sum((w + 1) ** 2)}
      >>> w = jnp.zeros(2)
      >>> losses, jac = mtl.value_and_jac(losses_fn)(w, 1.0)
      >>> tx = mtl.scale_by_auto_lambda(2, primary={"a": 1.0, "b": 0.0}, optimizer=optax.sgd(0.1))
      >>> validation_fn = lambda w: losses_fn(w, 1.2)
      >>> _, state = tx.update(jac, tx.init(w), w, validation_fn=validation_fn)
      >>> [round(x, 3) for x in state.weights.tolist()]
      [0.196, 0.004]

    Differs from:
      The authors' code takes the inner product by a finite difference of the losses, and adds the
      momentum and weight decay of the model's optimizer to the trial step; here it is exact, and
      the step plain.

    References:
      Liu et al., `Auto-Lambda: Disentangling Dynamic Task Relationships
      <https://arxiv.org/abs/2202.03091>`_, 2022, eqs. 4-6.
    """
    check_num_tasks(num_tasks)
    check_flag("softmax", softmax)
    check_option("learning_rate", learning_rate, lambda rate: rate > 0, "more than 0")
    check_option("primary", primary, lambda p: p >= 0, "at least 0", each=True)
    # Adam's own eps of 1e-8 would slow the weights down where gradients are small.
    optimizer = optimizer or optax.adam(1e-4, eps=1e-15)

    def init_fn(params):
        del params
        values = jnp.full(num_tasks, _START, jnp.float32)
        weights = jax.nn.softmax(values) if softmax else values
        return AutoLambdaState(weights, values, jax.vmap(optimizer.init)(values))

    def update_fn(jacobian, state, *, params=None, validation_fn=None, **extra_args):
        del extra_args
        validation = jacobian_of("validation_fn", validation_fn, jacobian, params)
        importance, present = per_task("primary", primary, jacobian, 1.0), jacobian.present

        def weights_of(values):
            return softmax_over(present, values, present) if softmax else values

        weights, by_values = jax.vjp(weights_of, state.values)
        stepped, slope = trial_step(jacobian, params, weights, learning_rate)
        other = validation(stepped)
        if _has_zeros(primary):  # 0 times the NaN of an auxiliary task is NaN
            other = other.keep(importance != 0)
        (gradient,) = by_values(slope(other.pullback(importance)))
        values, opt_state = step_each(
            optimizer, state.opt_state, state.values, gradient, jnp.isfinite(gradient)
        )
        weights = weights_of(values)
        return jacobian.scale(weights), AutoLambdaState(weights, values, opt_state)

    return link(init_fn, update_fn, num_tasks)


def _has_zeros(primary: TaskOption) -> bool:
    return is_traced(primary) or any(np.any(np.equal(p, 0)) for p in jax.tree.leaves(primary))


auto_lambda = summed(scale_by_auto_lambda)
