"""One model of all trade-offs: it reads a preference, or is interpolated by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mtl_optax._options import check_option
from mtl_optax.jacobian._rows import mix

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def with_preference(
    x: Float[ArrayLike, "*batch D"],
    preference: Float[ArrayLike, "*each K"] | Mapping[str, ArrayLike],
) -> Float[Array, "*batch D+K"]:
    """An input with the preference behind it: any model that reads it learns all trade-offs.

    Train it with a preference drawn anew at each step, the same for the input and for a strategy
    that takes one, such as `mtl.cosmos`, `mtl.stch` or `mtl.epo`. It is then asked for a trade-off
    when it is used.

    Args:
      x: inputs, ``(..., D)``.
      preference: one for all of them, ``(K,)``, or one each, ``(..., K)``; or a dict like the
        losses of their K columns.

    Returns:
      ``(..., D + K)``, in the type of the inputs, if that is floating.

    Raises:
      ValueError: if there is no axis of features or of tasks, or the inputs and the preferences are
        not as many.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> mtl.fronts.with_preference(jnp.ones((2, 1)), jnp.array([0.25, 0.75])).tolist()
      [[1.0, 0.25, 0.75], [1.0, 0.25, 0.75]]

    References:
      Ruchte and Grabocka, `Scalable Pareto Front Approximation for Deep Multi-Objective Learning
      <https://arxiv.org/abs/2103.13392>`_, 2021 (COSMOS).
    """
    x, preference = jnp.asarray(x), _columns(preference)
    x = x.astype(jnp.result_type(float, x))  # shares are no integers
    each = preference.shape[:-1]
    if min(x.ndim, preference.ndim) < 1 or (each and each != x.shape[:-1]):
        raise ValueError(
            f"the inputs have shape {x.shape} and the preference {preference.shape}, expected "
            "(..., D), and (K,) for all of them or (..., K), one each"
        )
    behind = jnp.broadcast_to(preference.astype(x.dtype), (*x.shape[:-1], preference.shape[-1]))
    return jnp.concatenate([x, behind], axis=-1)


def interpolate(members: Any, preference: Float[ArrayLike, " K"] | Mapping[str, ArrayLike]) -> Any:
    r"""The parameters of one model from those of K, as a preference mixes them (PaMaL).

    .. math:: \theta(p) = \sum_k p_k \theta_k

    Pareto manifold learning trains the K members together, through models that preferences drawn
    anew at each step mix, each on the losses weighted by that preference; then every preference has
    a model. `ordering_penalty` keeps its losses in order.

    Args:
      members: parameters, stacked: leaves ``(K, *param.shape)``, as ``jax.vmap(init_model)(keys)``
        makes them. Leaves of integers, bools or random keys are those of the first.
      preference: p, ``(K,)``, summing to 1, or a dict like the losses.

    Returns:
      Parameters of one model.

    Raises:
      ValueError: if the preference is not `(K,)`, or a leaf does not have K members.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> members = {"w": jnp.array([[0.0, 1.0], [4.0, 1.0]])}
      >>> mtl.fronts.interpolate(members, jnp.array([0.75, 0.25]))["w"].tolist()
      [1.0, 1.0]

    References:
      Dimitriadis, Frossard and Fleuret, `Pareto Manifold Learning: Tackling multiple tasks via
      ensembles of single-task models <https://arxiv.org/abs/2210.09759>`_, ICML 2023.
    """
    preference = _columns(preference)
    if preference.ndim != 1:
        raise ValueError(f"the preference has shape {preference.shape}, expected (K,)")

    def mixed(leaf):
        if jnp.shape(leaf)[:1] != preference.shape:
            raise ValueError(
                f"a parameter has shape {jnp.shape(leaf)} and the preference {preference.shape}, "
                "expected the K members stacked along its first axis"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf[0]
        return mix(preference, leaf)

    return jax.tree.map(mixed, members)


def ordering_penalty(
    preferences: Float[ArrayLike, "M K"] | Mapping[str, ArrayLike],
    losses: Float[ArrayLike, "M K"] | Mapping[str, ArrayLike],
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, " K"]:
    r"""What is paid where a model that prefers a task more has a larger loss in it (PaMaL).

    .. math:: R_k = \log \frac{1}{|E_k|} \sum_{(m, n) \in E_k}
              \exp\big(\tau \max(L_k^{(n)} - L_k^{(m)}, 0)\big)

    with :math:`E_k` the pairs of models of which n has the next larger preference of task k after
    m: M - 1 neighbours, if no two are equal. Models of equal preferences are not held against each
    other. It is 0 where no loss rises. Add it to the losses, each task's to its own, times a
    coefficient.

    Args:
      preferences: ``(M, K)``, M >= 2, or a dict of its columns.
      losses: of the M models, likewise, as ``jax.vmap(loss_fn)`` returns them.
      temperature: τ, in one over the unit of the losses, >= 0.

    Returns:
      ``(K,)``, at least 0, in the order in which JAX flattens the losses.

    Raises:
      ValueError: if the shapes or the names don't fit, M < 2, or `temperature` is not at least 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> p = jnp.array([[0.2, 0.8], [0.7, 0.3]])
      >>> penalty = mtl.fronts.ordering_penalty(p, jnp.array([[0.5, 0.3], [0.9, 0.6]]))
      >>> [round(r, 4) for r in penalty.tolist()]
      [0.4, 0.0]

    Differs from:
      The authors' code, which keeps the last one of models with equal preferences, and puts the
      models in the falling order of their preferences before it takes the rises.

    References:
      As of `interpolate`.
    """
    check_option("temperature", temperature, lambda t: t >= 0, "at least 0")
    if isinstance(preferences, Mapping) and isinstance(losses, Mapping):
        names = sorted(preferences), sorted(losses)
        if names[0] != names[1]:
            raise ValueError(
                f"preferences of {names[0]} and losses of {names[1]}, expected the same tasks"
            )
    preferences, losses = _columns(preferences), _columns(losses)
    if losses.ndim != 2 or preferences.shape != losses.shape or len(losses) < 2:
        raise ValueError(
            f"preferences have shape {preferences.shape} and losses {losses.shape}, expected "
            "(M, K) for both, with M >= 2"
        )
    order = jnp.argsort(preferences, axis=0)
    preferred, losses = (jnp.take_along_axis(x, order, axis=0) for x in (preferences, losses))
    steps = jnp.cumsum(jnp.diff(preferred, axis=0) > 0, axis=0)
    rank = jnp.concatenate([jnp.zeros_like(steps[:1]), steps])  # alike for equal preferences
    pairs = rank[None] == rank[:, None] + 1
    rises = jnp.where(pairs, jnp.maximum(losses[None] - losses[:, None], 0), 0)
    pairs |= ~jnp.any(pairs, axis=(0, 1), keepdims=True)  # none: the mean of zeros
    powers = jnp.where(pairs, temperature * rises, -jnp.inf)
    mean = jax.nn.logsumexp(powers, axis=(0, 1)) - jnp.log(jnp.sum(pairs, axis=(0, 1)))
    return jnp.maximum(mean, 0)


def _columns(value: Any) -> jax.Array:
    """What has the tasks along its last axis, given as it is or as a dict of its columns."""
    if isinstance(value, Mapping):
        return jnp.stack([jnp.asarray(leaf) for leaf in jax.tree.leaves(value)], axis=-1)
    return jnp.asarray(value)
