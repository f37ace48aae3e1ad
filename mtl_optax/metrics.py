"""Measures of a multi-task result: one number for K metrics."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def delta_m(
    metrics: ArrayLike,
    baseline: ArrayLike,
    *,
    higher_is_better: bool | Sequence[bool] = True,
) -> jax.Array:
    r"""Mean relative gain over a baseline, in percent; positive is better than the baseline.

    .. math:: \Delta_m = \frac{100}{K} \sum_{k=1}^K (-1)^{l_k} \frac{M_k - B_k}{B_k}

    with :math:`l_k = 1` where a lower metric is better. The baseline is usually K single-task
    models, one for each metric.

    Differs from:
      Maninis et al. write the ratio with :math:`B_k`; this divides by :math:`|B_k|`, so that a gain
      stays a gain for metrics that can be negative (R², log-likelihood).

    Args:
      metrics: the K metrics, ``(..., K)``; leading axes (seeds, methods) are kept.
      baseline: the baseline's K metrics, ``(K,)``, or the shape of `metrics` to pair every entry
        (such as a seed) with its own baseline; must not be 0.
      higher_is_better: one bool for all tasks, or K of them; static.

    Returns:
      An array shaped as `metrics` without its last axis, in percent.

    Raises:
      ValueError: if the shapes don't fit, there is no task, or `higher_is_better` is not K bools.

    Examples:
      >>> import mtl_optax as mtl
      >>> accuracy_and_error = [[0.90, 0.30], [0.99, 0.18]]
      >>> change = mtl.metrics.delta_m(
      ...     accuracy_and_error, [0.90, 0.20], higher_is_better=[True, False])
      >>> [round(float(percent), 3) for percent in change]
      [-25.0, 10.0]

    References:
      Maninis et al., `Attentive Single-Tasking of Multiple Tasks
      <https://arxiv.org/abs/1904.08918>`_, 2019, eq. 4.
    """
    metrics, baseline = jnp.asarray(metrics, float), jnp.asarray(baseline, float)
    if metrics.ndim == 0 or metrics.shape[-1] == 0:
        raise ValueError(
            f"metrics have shape {metrics.shape}, expected (..., K) with K >= 1: "
            "put the tasks on the last axis"
        )
    if baseline.shape not in (metrics.shape, metrics.shape[-1:]):
        raise ValueError(
            f"baseline has shape {baseline.shape}, expected {metrics.shape[-1:]} (one number a "
            f"task) or {metrics.shape} (the shape of the metrics)"
        )
    better = np.asarray(higher_is_better)
    if better.dtype != bool or better.shape not in ((), metrics.shape[-1:]):
        raise ValueError(
            f"higher_is_better is {higher_is_better!r}, expected one bool or "
            f"{metrics.shape[-1]} of them, one a task"
        )
    sign = jnp.broadcast_to(np.where(better, 1.0, -1.0), metrics.shape)
    baseline = jnp.broadcast_to(baseline, metrics.shape)
    return 100.0 * jnp.mean(sign * (metrics - baseline) / jnp.abs(baseline), axis=-1)
