"""Dynamic task priority inside a loss, and the performance indicators that it looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mtl_optax._numerics import focal, wide
from mtl_optax._options import check_option, is_traced

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def task_priority(kpi: ArrayLike, gamma: ArrayLike = 1.0) -> Float[Array, "*shape"]:
    r"""The weight of a task by its performance, differentiable in that.

    .. math:: \mathrm{FL}(\kappa; \gamma) = -(1 - \kappa)^\gamma \log\kappa

    What `dtp` weighs by, for use *inside* a loss: `task_priority(kpi) * loss` has the gradient
    :math:`\mathrm{FL}\,\nabla L + L\,\mathrm{FL}'(\kappa)\,\nabla\kappa`, of which a balancer gives
    the first part alone. The KPI has to be a smooth function of the parameters for that, as
    `accuracy(..., soft=True)` and `share_within(..., softness=...)` are. Of a constant KPI, or one
    behind `jax.lax.stop_gradient`, both are the same.

    Args:
      kpi: key performance indicators in [0, 1], any shape; kept within 1e-6 of the ends, beyond
        which they have no gradient.
      gamma: focusing exponent, >= 0; larger turns away faster from tasks that do well.

    Returns:
      The priority, of the shape of `kpi`: from 0 for a solved task to about 14 for a hopeless one.

    Raises:
      ValueError: if `gamma` is not at least 0.

    Examples:
      A task's loss L = -log p and its KPI p, the probability of the right answer:

      >>> import jax, jax.numpy as jnp
      >>> from mtl_optax import losses
      >>> loss = lambda p: losses.task_priority(p, gamma=1.0) * -jnp.log(p)
      >>> round(loss(0.5).item(), 4), round(jax.grad(loss)(0.5).item(), 4)
      (0.2402, -1.8667)

    References:
      Guo et al., `Dynamic Task Prioritization for Multitask Learning
      <https://doi.org/10.1007/978-3-030-01270-0_17>`_, 2018, eqs. 4-6.
    """
    check_option("gamma", gamma, lambda g: g >= 0, "at least 0", each=True)
    kpi, gamma = jnp.asarray(kpi, jnp.result_type(float, kpi)), jnp.asarray(gamma)
    # A narrower type has no number so near to 1.
    exact = kpi.astype(wide(kpi.dtype))
    return focal(exact, gamma.astype(exact.dtype)).astype(kpi.dtype)


def accuracy(
    logits: Float[ArrayLike, "*batch C"], labels: Int[ArrayLike, "*batch"], *, soft: bool = False
) -> Float[Array, ""]:
    """The share of examples whose label has the largest logit: a KPI for `dtp`.

    Args:
      logits: `(..., C)`.
      labels: the right class of each example, integers from 0 to C - 1, `(...)`.
      soft: whether to average the probability of the label instead, which has a gradient; static.

    Returns:
      A number in [0, 1], at least float32.

    Raises:
      TypeError: if `soft` is traced.
      ValueError: if `labels` are not integers of shape `logits.shape[:-1]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtl_optax import losses
      >>> logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
      >>> kpi = losses.accuracy(logits, jnp.array([0, 1, 1]))
      >>> soft = losses.accuracy(logits, jnp.array([0, 1, 1]), soft=True)
      >>> round(kpi.item(), 4), round(soft.item(), 4)
      (0.6667, 0.5531)
    """
    _check_static("soft", soft)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}, expected integers of "
            f"shape {logits.shape[:-1]} for logits of shape {logits.shape}"
        )
    dtype = wide(jnp.result_type(float, logits))
    if not soft:
        right = jnp.argmax(logits, axis=-1) == labels  # of NaN the first is the largest
        return jnp.mean(right & ~jnp.any(jnp.isnan(logits), axis=-1), dtype=dtype)
    probabilities = jax.nn.softmax(logits.astype(dtype))
    return jnp.mean(jnp.take_along_axis(probabilities, labels[..., None], axis=-1))


def share_within(
    errors: Float[ArrayLike, "*batch"], tolerance: ArrayLike, *, softness: float = 0.0
) -> Float[Array, ""]:
    """The share of errors within a tolerance: a KPI of regressions for `dtp`.

    Args:
      errors: predictions less targets, any shape and sign.
      tolerance: the largest error that counts as right, > 0, in the same unit.
      softness: the width in that unit over which an error stops counting, >= 0; 0 counts, more has
        a gradient: the mean of a sigmoid; static.

    Returns:
      A number in [0, 1], at least float32.

    Raises:
      TypeError: if `softness` is traced.
      ValueError: if `tolerance` is not above 0 or `softness` not at least 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtl_optax import losses
      >>> errors = jnp.array([0.1, -0.3, 2.0])
      >>> kpi = losses.share_within(errors, 0.5)
      >>> soft = losses.share_within(errors, 0.5, softness=0.1)
      >>> round(kpi.item(), 4), round(soft.item(), 4)
      (0.6667, 0.6209)
    """
    _check_static("softness", softness)
    unit = "in the unit of the errors"
    check_option("tolerance", tolerance, lambda t: t > 0, f"more than 0, {unit}", each=True)
    check_option("softness", softness, lambda s: s >= 0, f"at least 0, {unit}")
    errors, tolerance = jnp.asarray(errors), jnp.asarray(tolerance)
    room = tolerance - jnp.abs(errors.astype(wide(jnp.result_type(float, errors))))
    return jnp.mean(jax.nn.sigmoid(room / softness) if softness else (room >= 0).astype(room.dtype))


def _check_static(name: str, value: float) -> None:
    if is_traced(value):
        raise TypeError(
            f"{name} is traced, expected a Python number: whether it is 0 shapes the program, so "
            "close over it, or name it in static_argnames of jax.jit"
        )
