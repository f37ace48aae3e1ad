"""The EnCodec balancer: shares of the gradient at the model's output that you choose."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide, power_of_two
from mtl_optax._options import BELOW_ONE, check_flag, check_num_tasks, check_option, per_task
from mtl_optax._typing import TaskOption
from mtl_optax.balancers._base import summed
from mtl_optax.jacobian import Jacobian
from mtl_optax.jacobian._rows import sum_over_shards
from mtl_optax.links import link, running_mean
from mtl_optax.states import PerTask


class EncodecState(NamedTuple):
    """State of `scale_by_encodec`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    norms: PerTask  # (K,) float32, running means of the norms, not debiased
    masses: PerTask  # (K,) float32, what they are divided by for that


def scale_by_encodec(
    num_tasks: int,
    *,
    shares: TaskOption = 1.0,
    total_norm: float | jax.Array | None = None,
    decay: float | jax.Array = 0.999,
    per_example: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each task its share of the total gradient norm, whatever the scale of its loss.

    .. math:: \lambda_k = R\, \frac{s_k}{\sum_j s_j}\, \frac{1}{\langle\|g_k\|\rangle_\beta}

    where :math:`\langle\cdot\rangle_\beta` is a moving average, and the sums are over the tasks
    present. The paper measures the norms at the model's output: pass the Jacobian of
    `value_and_feature_jac(encode_fn, decode_fn)` with the output as the features; one backward pass
    then goes through the model. There :math:`\|g_k\|` is the mean over the batch of the norms of
    the examples' gradients, as in the authors' code.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      shares: s >= 0, one for all tasks or a tree like the losses.
      total_norm: R > 0; the sum of the average norms by default, which keeps the step size. The
        paper has 1.
      decay: beta in [0, 1), weight of the past.
      per_example: whether a norm at features, whose first axis is the batch, is the mean of those
        of its examples; False takes that of the whole array, as at parameters.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like, or at most `total_norm` on
      average where it is given (and the norms are measured on the parameters).

    Raises:
      TypeError: if `per_example` is no bool.
      ValueError: if `num_tasks` < 1, an option is out of range, the losses are not K, or
        `per_example` finds features of several batch sizes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[4.0, 0.0], [0.0, 0.5]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.ones(2))
      >>> tx = mtl.scale_by_encodec(num_tasks=2, shares=[3.0, 1.0], total_norm=1.0)
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> jac.rows().tolist()
      [[0.75, 0.0], [0.0, 0.25]]

    References:
      Défossez et al., `High Fidelity Neural Audio Compression <https://arxiv.org/abs/2210.13438>`_,
      2022, section 3.4.
    """
    check_num_tasks(num_tasks)
    check_flag("per_example", per_example)
    check_option("shares", shares, lambda s: s >= 0, "at least 0", each=True)
    check_option("decay", decay, *BELOW_ONE)
    if total_norm is not None:
        check_option("total_norm", total_norm, lambda r: r > 0, "more than 0")

    def init_fn(params):
        del params
        zeros = jnp.zeros(num_tasks, jnp.float32)
        return EncodecState(zeros + 1, zeros, zeros)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        by_example = per_example and not jacobian.at_parameters
        new = _mean_norm(jacobian) if by_example else jacobian.norms().astype(jnp.float32)
        present = jacobian.present
        average, norms, masses = running_mean(new, state.norms, state.masses, decay, present)
        average = jnp.where(present, average, 0)

        share = per_task("shares", shares, jacobian, 1.0).astype(jnp.float32)
        share = jnp.where(present, share, 0)
        share = divide(share, jnp.sum(share), share)
        total = jnp.sum(average) if total_norm is None else total_norm
        weights = jnp.where(average > 0, share * divide(total, average), 1)
        weights = bounded(weights, jnp.float32)
        return jacobian.scale(weights), EncodecState(weights, norms, masses)

    return link(init_fn, update_fn, num_tasks)


def _mean_norm(jacobian: Jacobian) -> jax.Array:
    """The mean over the examples of the norms of their rows, `(K,)`, safe at any scale."""
    rows = [row.astype(jnp.float32) for row in jacobian.measured_rows()]
    rows = [row.reshape(*row.shape[:2], -1) if row.ndim > 1 else row[:, None, None] for row in rows]
    sizes = {row.shape[1] for row in rows}
    if len(sizes) != 1:
        raise ValueError(
            f"encodec got features with first axes {sorted(sizes)}, expected one axis of examples: "
            "pass per_example=False for the norm of the whole"
        )
    entries = jnp.concatenate(rows, axis=2)
    unit = power_of_two(jnp.max(jnp.abs(entries), axis=(1, 2), initial=0))
    norms = jnp.linalg.norm(entries / unit[:, None, None], axis=2)
    # Inside `shard_map` each device has examples of its own. The 1s vary over them as the norms do.
    ones = jnp.where(norms > 0, 1.0, 1.0)
    total, count = unit * jnp.sum(norms, axis=1), jnp.sum(ones, axis=1)
    return sum_over_shards(total) / sum_over_shards(count)


encodec = summed(scale_by_encodec)
