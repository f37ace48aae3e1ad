"""The hypervolume gradient: a set of models that spreads over the front by itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import check_flag, per_task
from mtl_optax._typing import TaskOption
from mtl_optax.fronts._set import set_link
from mtl_optax.metrics import beats, hypervolume


class HypervolumeGradientState(NamedTuple):
    """State of `hypervolume_gradient`."""

    weights: jax.Array  # (n, K) float32, of the last update


def hypervolume_gradient(
    num_tasks: int, *, reference: TaskOption, normalize: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Weights the losses of n models so that they ascend the volume that they dominate together.

    .. math:: w_i = -\frac{\partial H(F_i)}{\partial L_i} \Big/
              \Big\| \frac{\partial H(F_i)}{\partial L_i} \Big\|, \quad d_i = J_i^\top w_i

    with H the hypervolume down to the reference point and :math:`F_i` the models among which i is
    not dominated: the set is sorted into a first front, a second one of those that only the first
    dominates, and so on, so that every model moves. A model is pushed from its neighbours and drawn
    into gaps; no preferences are needed.

    Each update takes the volumes of up to n fronts, whose cost grows as :math:`n^K`: for some ten
    models of two or three tasks. A model whose losses are not finite gets weights of 0.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      reference: a point that the losses should beat, a tree like the losses or K numbers. Where 1.1
        times the worst loss is beyond it, that takes its place. The further it is from the front,
        the more its ends count.
      normalize: whether each model's weights have the norm 1; False follows the gradient of the
        volume, which vanishes where neighbours are near; static.

    Returns:
      A link from the stacked Jacobians of n models,
      ``jax.vmap(mtl.value_and_jac(loss_fn))(params)``, to n gradients. An optimizer that looks at
      single entries follows as it is, as Adam; one that takes norms needs a `jax.vmap` of its own.
      Update scale: mean-like; heads are weighted too.

    Raises:
      TypeError: if `num_tasks` is no Python int or `normalize` no bool; by `update`, if it got no
        Jacobian, or `present` is not of bools.
      ValueError: if `num_tasks` < 1; by `init` and `update`, if the models are not stacked; by
        `update`, if the losses are not K or `reference` does not fit them.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> def task_losses(x):
      ...     return {"near": x**2, "far": (x - 1) ** 2}
      >>> x = jnp.array([0.0, 0.4, 0.5, 1.0])
      >>> tx = mtl.fronts.hypervolume_gradient(2, reference={"near": 1.1, "far": 1.1})
      >>> @jax.jit
      ... def step(x, state):
      ...     losses, jac = jax.vmap(mtl.value_and_jac(task_losses))(x)
      ...     return tx.update(jac, state, x)
      >>> update, state = step(x, tx.init(x))
      >>> [round(w, 2) for w in state.weights[1].tolist()]
      [0.14, 0.99]

    Differs from:
      Deist et al. take 1.1 times the worst loss whatever its sign. Of a negative one that is a
      better point: here a tenth of its size is added.

    References:
      Wang et al., `Hypervolume Indicator Gradient Ascent Multi-objective Optimization
      <https://doi.org/10.1007/978-3-319-54157-0_44>`_, 2017. Deist et al., `Multi-Objective
      Learning to Predict Pareto Fronts Using Hypervolume Maximization
      <https://arxiv.org/abs/2102.04523>`_, 2021.
    """
    check_flag("normalize", normalize)

    def init_fn(num_models):
        return HypervolumeGradientState(jnp.zeros((num_models, num_tasks), jnp.float32))

    def update_fn(jacobians, state):
        del state

        def read(jac):
            return jac.loss_vector(), per_task("reference", reference, jac), jac.present

        losses, references, present = jax.vmap(read)(jacobians)
        weights = _weights(losses, references[0], present[0], normalize)
        gradients = jax.vmap(lambda jac, w: jac.pullback(w))(jacobians, weights)
        return gradients, HypervolumeGradientState(weights.astype(jnp.float32))

    return set_link(num_tasks, init_fn, update_fn)


def _weights(
    losses: jax.Array, reference: jax.Array, present: jax.Array, normalize: bool
) -> jax.Array:
    finite = jnp.all(jnp.isfinite(losses), axis=1, keepdims=True)
    worst = jnp.max(jnp.where(finite, losses, -jnp.inf), axis=0)
    corner = jnp.maximum(reference, worst + 0.1 * jnp.abs(worst))
    corner = jnp.where(present, corner, 1)  # the volume over the others: a loss of 0 gains 1
    losses = jnp.where(finite, losses, corner[None])
    ranks = _front_ranks(losses)

    def slopes(rank):
        # At the corner a model adds nothing.
        front = jnp.where((ranks == rank)[:, None], losses, corner[None])
        return jax.grad(hypervolume)(front, corner, higher_is_better=False)

    weights = -jnp.sum(jax.lax.map(slopes, jnp.arange(len(losses))), axis=0)
    weights = jnp.where(present[None] & finite, weights, 0)
    if not normalize:
        return weights
    weights = divide(weights, jnp.max(weights, axis=1, keepdims=True))
    return divide(weights, jnp.linalg.norm(weights, axis=1, keepdims=True))


def _front_ranks(losses: jax.Array) -> jax.Array:
    """How long the chain of models is that dominates each: (n,) int32, 0 on the first front."""
    is_beaten = beats(-losses)

    def longer(_, ranks):
        return jnp.max(jnp.where(is_beaten, ranks[:, None] + 1, 0), axis=0)

    return jax.lax.fori_loop(0, len(losses), longer, jnp.zeros(len(losses), jnp.int32))
