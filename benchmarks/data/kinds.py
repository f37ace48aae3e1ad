"""Kinds of tasks: how each is trained and judged. A NaN label is a missing one."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Measure = Callable[[jax.Array, jax.Array], jax.Array]  # (outputs, labels) -> scalar


@dataclasses.dataclass(frozen=True)
class TaskKind:
    """How a kind of task is trained and judged."""

    loss: Measure
    metric: Measure
    unit: str  # of the metric; "%" shows it in percent
    kpi: Measure  # of a training batch, in [0, 1], 1 is perfect
    higher_is_better: bool = True
    noise: str = "regression"  # for `uncertainty`


def observed_mean(values: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of the values whose label is not missing, 0 if all are; NaN never gets through."""
    seen = ~jnp.isnan(labels)
    return jnp.sum(jnp.where(seen, values, 0.0)) / jnp.maximum(jnp.sum(seen), 1)


def _filled(labels: jax.Array) -> jax.Array:
    # Missing labels must be gone before the loss is computed: 0 · NaN = NaN in the backward pass.
    return jnp.nan_to_num(labels)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of ``(N, C)`` logits and ``(N,)`` integer labels."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of ``(N,)`` integer labels with the largest of their ``(N, C)`` logits."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of one logit and one label in {0, 1, NaN} an example."""
    return observed_mean(optax.losses.sigmoid_binary_cross_entropy(logits, _filled(labels)), labels)


def binary_accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the labels in {0, 1} that the sign of the logit tells."""
    return observed_mean(((logits > 0) == (labels > 0.5)).astype(jnp.float32), labels)


def auc(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Area under the ROC curve: how often a positive is above a negative, ties count half."""
    scores, labels = logits.ravel(), labels.ravel()
    positive, negative = labels == 1, labels == 0
    below = jnp.sort(jnp.where(negative, scores, jnp.inf))
    wins = jnp.searchsorted(below, scores, side="left").astype(jnp.float32)
    ties = jnp.searchsorted(below, scores, side="right").astype(jnp.float32) - wins
    total = jnp.sum(jnp.where(positive, wins + 0.5 * ties, 0.0))
    return total / jnp.sum(positive) / jnp.sum(negative)


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean squared error over the labels that are not missing."""
    return observed_mean((outputs - _filled(labels)) ** 2, labels)


def root_mean_squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Root of the mean squared error, in units of the labels."""
    return jnp.sqrt(squared_error(outputs, labels))


def r2(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the labels' variance that is explained; below 0 is worse than their mean."""
    centred = _filled(labels) - observed_mean(_filled(labels), labels)
    return 1 - squared_error(outputs, labels) / observed_mean(centred**2, labels)


def relative_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    r"""The relative error :math:`\|u - u^*\|_2 / \|u^*\|_2` of a field."""
    return jnp.linalg.norm(outputs - labels) / jnp.linalg.norm(labels)


def _share_explained(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.clip(jnp.nan_to_num(r2(outputs, labels), nan=0.0), 0, 1)


def _closeness(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.exp(-squared_error(outputs, labels))


TASK_KINDS = {
    "classification": TaskKind(
        cross_entropy, accuracy, "accuracy %", accuracy, noise="classification"
    ),
    "binary": TaskKind(binary_cross_entropy, auc, "AUC %", binary_accuracy, noise="classification"),
    "regression": TaskKind(squared_error, r2, "R² %", _share_explained),
    "rating": TaskKind(squared_error, root_mean_squared_error, "RMSE", _share_explained, False),
    "field": TaskKind(squared_error, relative_error, "relative error %", _closeness, False),
}
