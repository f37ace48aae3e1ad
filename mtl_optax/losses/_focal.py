"""Focal losses: spend the gradient of a task on the examples it still gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from mtl_optax._numerics import wide
from mtl_optax._options import check_option

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# Where the logarithmic base loss becomes its tangent: -log(1 - e) has an unbounded slope at e = 1.
_LINEAR_FROM = 1.0 - 1e-3


def softmax_focal_loss(
    logits: Float[ArrayLike, "*batch C"],
    labels: Int[ArrayLike, "*batch"],
    *,
    gamma: ArrayLike = 2.0,
    alpha: ArrayLike = 1.0,
) -> Float[Array, "*batch"]:
    r"""Softmax cross-entropy that fades out on examples already classified well.

    .. math:: \ell = -\alpha_y (1 - p_y)^\gamma \log p_y, \quad p = \mathrm{softmax}(\text{logits})

    With ``gamma=0`` and ``alpha=1`` this is exactly
    `optax.losses.softmax_cross_entropy_with_integer_labels` in at least float32. For independent
    binary labels use `optax.losses.sigmoid_focal_loss`. Values and gradients are finite for every
    finite logit, with ``gamma`` and ``alpha`` up to 1000: the weight is computed from log(1 - p),
    and where a loss is beyond the dtype of the logits, or a logit beyond 1e19 (the root of the
    range of float32), its value stays at that bound while its gradient goes on.

    Args:
      logits: unnormalised log-probabilities, floating, shape ``(..., C)``.
      labels: the right class of each example, integers from 0 to C - 1, shape ``(...)``.
      gamma: focusing parameter, a scalar >= 0; larger ignores easy examples more.
      alpha: weight of an example, a scalar or one weight a class, shape ``(C,)``.

    Returns:
      The loss of each example, shape ``(...)``, in the dtype of ``logits``.

    Raises:
      ValueError: if ``logits`` are not floating, ``labels`` are not integers of shape
        ``logits.shape[:-1]``, ``gamma`` is negative or not a scalar, or ``alpha`` is neither a
        scalar nor of shape ``(C,)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtl_optax import losses
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # an easy one and a hard one
      >>> loss = losses.softmax_focal_loss(logits, jnp.array([0, 2]), gamma=2.0)
      >>> print([f"{x:.4f}" for x in loss])
      ['0.0109', '0.9635']

    References:
      Lin et al., `Focal Loss for Dense Object Detection <https://arxiv.org/abs/1708.02002>`_, 2017,
      eq. 5; Guo et al., `Dynamic Task Prioritization for Multitask Learning
      <https://doi.org/10.1007/978-3-030-01270-0_17>`_, 2018 (example-level priority).
    """
    logits, labels, alpha = jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(alpha)
    _check_classification(logits, labels, alpha)
    gamma = _check_gamma(gamma)

    # As a binary problem, label against the rest: p = sigmoid(-margin), so log(1 - p) is a
    # log-sigmoid, which neither cancels at p -> 0 nor overflows at p -> 1. The label's own logit
    # is masked by a number below all others, since with -inf a single class has NaN gradients.
    # Of logits up to the root of the range, differences times gamma are within it.
    scores = logits.astype(wide(logits.dtype))
    lowest, largest = jnp.finfo(scores.dtype).min, jnp.finfo(scores.dtype).max
    scores = _bounded(scores, jnp.sqrt(largest))
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(scores, labels)
    index = jnp.expand_dims(labels, -1)
    classes = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    rest = jnp.where(classes == index.astype(jnp.int32), lowest, scores)
    label_logit = jnp.take_along_axis(scores, index, axis=-1).squeeze(-1)
    margin = jax.nn.logsumexp(rest, axis=-1) - label_logit
    weight = jnp.exp(gamma.astype(scores.dtype) * jax.nn.log_sigmoid(margin))

    alpha = alpha.astype(scores.dtype)
    alpha = alpha if alpha.ndim == 0 else jnp.take(alpha, labels)
    return _narrowed(alpha * weight * cross_entropy, logits.dtype)


def regression_focal_loss(
    errors: Float[ArrayLike, "*batch"],
    *,
    gamma: ArrayLike = 2.0,
    base: Literal["log"] | Callable[[jax.Array], jax.Array] = "log",
) -> Float[Array, "*batch"]:
    r"""Regression loss that fades out on examples already predicted well.

    The focal loss with p = 1 - e, for an error e that is normalised to [0, 1]:

    .. math:: \ell = \min(|e|, 1)^\gamma \, b(|e|), \quad b(e) = -\log(1 - e) \text{ by default}

    A usual e is ``(prediction - target) / tolerance``, where an error of one tolerance is as bad as
    it gets. The logarithm has an unbounded slope at e = 1; from e = 0.999 on its tangent takes
    over, so that values and gradients are finite for every finite error and even the worst examples
    keep a gradient. Where a loss is beyond the dtype of the errors, its value stays at the largest
    number of that while its gradient goes on. Another base has to be finite by itself.

    Args:
      errors: normalised errors, floating, any shape. The sign is ignored.
      gamma: focusing parameter, a scalar >= 0; larger ignores small errors more. 0 gives b itself.
      base: the loss that is weighted: ``"log"``, or an elementwise function of the errors such as
        ``optax.losses.l2_loss``, ``optax.losses.huber_loss`` or ``jnp.abs``.

    Returns:
      The loss of each example, with the shape and the dtype of ``errors``.

    Raises:
      ValueError: if ``errors`` are not floating, ``gamma`` is negative or not a scalar, ``base`` is
        neither ``"log"`` nor callable, or it does not keep the shape.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from mtl_optax import losses
      >>> errors = jnp.array([0.1, 0.5, 0.9])
      >>> print([f"{x:.4f}" for x in losses.regression_focal_loss(errors, gamma=1.0)])
      ['0.0105', '0.3466', '2.0723']
      >>> focal_l2 = losses.regression_focal_loss(errors, gamma=1.0, base=optax.losses.l2_loss)
      >>> print([f"{x:.4f}" for x in focal_l2])
      ['0.0005', '0.0625', '0.3645']

    Differs from:
      The plain formula on e > 0.999, as above: clipping p there, as is common, would leave the
      hardest examples without a gradient.

    References:
      Guo et al., `Dynamic Task Prioritization for Multitask Learning
      <https://doi.org/10.1007/978-3-030-01270-0_17>`_, 2018 (example-level priority).
    """
    errors = jnp.asarray(errors)
    if not jnp.issubdtype(errors.dtype, jnp.floating):
        raise ValueError(
            f"errors have dtype {errors.dtype}, expected floating: normalise them to [0, 1]"
        )
    gamma = _check_gamma(gamma)
    if base != "log" and not callable(base):
        raise ValueError(
            f"base is {base!r}, expected 'log' or an elementwise function of the errors: "
            "pass for example optax.losses.l2_loss"
        )

    sizes = jnp.abs(errors.astype(wide(errors.dtype)))
    values = base(sizes) if callable(base) else _negative_log_complement(sizes)
    if values.shape != sizes.shape:
        raise ValueError(
            f"base returned shape {values.shape} for errors of shape {sizes.shape}, expected the "
            "same shape: it must not reduce"
        )
    # The slope of e**gamma at 0 is infinite for gamma < 1, but the product with b is flat there:
    # the inner `where` keeps 0 * inf out of the gradient, there and where b is large.
    gamma = gamma.astype(sizes.dtype)
    positive = sizes > 0
    weight = jnp.where(positive & (sizes < 1), sizes, 1.0) ** gamma
    weight = jnp.where(positive, weight, jnp.where(gamma == 0, 1.0, 0.0))
    return _narrowed(weight * values, errors.dtype)


def _negative_log_complement(errors: jax.Array) -> jax.Array:
    """-log(1 - e), continued by its tangent near e = 1."""
    slope = 1.0 / (1.0 - _LINEAR_FROM)
    inside = -jnp.log1p(-jnp.minimum(errors, _LINEAR_FROM))
    errors = _bounded(errors, jnp.asarray(jnp.finfo(errors.dtype).max / (2 * slope)))
    return inside + slope * jnp.maximum(errors - _LINEAR_FROM, 0.0)


def _bounded(x: jax.Array, largest: jax.Array) -> jax.Array:
    """Finite numbers kept within ± `largest`, with the slope 1 also beyond; others as they are."""
    finite = jnp.isfinite(x)
    value = jnp.where(finite, jnp.clip(x, -largest, largest), x)
    # Nothing but a slope, of a number that is not infinite.
    slope = jnp.where(finite, x - jax.lax.stop_gradient(x), 0)
    return jax.lax.stop_gradient(value) + slope


def _narrowed(losses: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Losses in the dtype of the input, of which the largest number stands for what is beyond."""
    return _bounded(losses, jnp.asarray(jnp.finfo(dtype).max, losses.dtype)).astype(dtype)


def _check_gamma(gamma: ArrayLike) -> jax.Array:
    if jnp.ndim(gamma) != 0:
        raise ValueError(f"gamma has shape {jnp.shape(gamma)}, expected a scalar")
    check_option("gamma", gamma, lambda g: g >= 0, "at least 0, where 0 turns the focus off")
    return jnp.asarray(gamma)


def _check_classification(logits: jax.Array, labels: jax.Array, alpha: jax.Array) -> None:
    if not jnp.issubdtype(logits.dtype, jnp.floating) or logits.ndim == 0:
        raise ValueError(
            f"logits have shape {logits.shape} and dtype {logits.dtype}, expected floating numbers "
            "of shape (..., num_classes)"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels have dtype {labels.dtype}, expected integers: for one-hot labels pass "
            "jnp.argmax(labels, axis=-1), for binary ones use optax.losses.sigmoid_focal_loss"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {labels.shape}, expected {logits.shape[:-1]} for logits of shape "
            f"{logits.shape}: one integer an example, without a class axis"
        )
    if alpha.shape not in ((), logits.shape[-1:]):
        raise ValueError(
            f"alpha has shape {alpha.shape}, expected a scalar or one weight a class, "
            f"{logits.shape[-1:]}"
        )
