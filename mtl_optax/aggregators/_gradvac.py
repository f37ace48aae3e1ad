"""GradVac: PCGrad with a target cosine learned for each pair of tasks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide, dot, safe_sqrt
from mtl_optax._options import UP_TO_ONE, check_key, check_num_tasks, check_option
from mtl_optax.aggregators._base import finite_correlation, random_orders
from mtl_optax.links import keep_finite, link
from mtl_optax.states import PerPair, PerTask


class GradvacState(NamedTuple):
    """State of `gradvac`."""

    weights: PerTask  # (K,) float32, of the rows in the last update
    targets: PerPair  # (K, K) float32, running cosine of row i (as altered) with row j
    key: jax.Array  # typed random key


def gradvac(
    num_tasks: int, *, key: jax.Array, decay: float | jax.Array = 0.99
) -> optax.GradientTransformationExtraArgs:
    r"""Turns each row towards every row that it agrees with less than usual, then sums.

    .. math:: v_i \leftarrow v_i + \frac{\|v_i\| (\varphi_{ij} \sqrt{1 - c^2} - c
              \sqrt{1 - \varphi_{ij}^2})}{\|g_j\| \sqrt{1 - \varphi_{ij}^2}} g_j
              \quad \text{where } c = \cos(v_i, g_j) < \varphi_{ij}, \qquad d = \sum_i v_i

    for j ≠ i in random order, from :math:`v_i = g_i`, after which the cosine of the pair is its
    target; then :math:`\varphi_{ij} \leftarrow (1-\beta) \varphi_{ij} + \beta c`. Targets start
    at 0, so the first update is that of `pcgrad`. It runs on the K coefficients of each
    :math:`v_i`, so it costs the Gramian and no more. Rows of zero length change nothing. A target
    near 1 turns a row that departs from it almost into the other: the update can then be far longer
    than the sum.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      key: a typed random key, split in state: the order is drawn anew for each task and update.
      decay: 1 - beta in [0, 1], weight of the past in the running mean; 1 is PCGrad.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: sum-like.

    Raises:
      TypeError: if `key` is not a typed random key.
      ValueError: if `num_tasks` < 1, `decay` is not in [0, 1], or the losses are not K.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.gradvac(num_tasks=2, key=jax.random.key(0))
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()]
      [0.5848, 3.8012, 3.8012]

    Differs from:
      The paper's targets are kept for each layer or module; here for the whole of the shared
      parameters. The roots are kept from 0 by the rounding of a cosine, so that rows which agree to
      rounding stay as they are.

    References:
      Wang et al., `Gradient Vaccine <https://arxiv.org/abs/2010.05874>`_, 2020, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_key(key)
    check_option("decay", decay, *UP_TO_ONE)

    def init_fn(params):
        del params
        targets = jnp.zeros((num_tasks, num_tasks), jnp.float32)
        return GradvacState(jnp.ones(num_tasks, jnp.float32), targets, key)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        next_key, order_key = jax.random.split(state.key)
        cosines, norms, good = finite_correlation(jacobian)
        targets = state.targets.astype(norms.dtype)
        orders = random_orders(order_key, jacobian.present)
        coefficients, seen = _vaccinate(cosines, targets, orders)
        weights = jnp.where(good, bounded(divide(dot(norms, coefficients), norms)), 1)
        update = jacobian.combine(weights)
        mixed = targets + jnp.asarray(1 - decay, norms.dtype) * (seen - targets)
        targets = keep_finite(mixed, targets).astype(jnp.float32)
        return update, GradvacState(bounded(weights, jnp.float32), targets, next_key)

    return link(init_fn, update_fn, num_tasks)


def _vaccinate(cosines, targets, orders):
    """Row i's coefficients of the unit rows, and the cosines that it met with each other row."""
    num_tasks = cosines.shape[0]
    tasks = jnp.arange(num_tasks)
    smallest = 16 * jnp.finfo(cosines.dtype).eps

    def sine(cosine):
        return jnp.sqrt(jnp.maximum(1 - cosine**2, smallest))

    def turn(task, target, order):
        def towards(position, carry):
            coefficients, seen = carry
            other = order[position]
            products = dot(cosines, coefficients)
            length = safe_sqrt(dot(coefficients, products))
            regular = (length > 0) & (other != task) & (cosines[other, other] > 0)
            cosine = jnp.clip(divide(products[other], length), -1, 1)
            aim = target[other]
            step = length * (aim * sine(cosine) / sine(aim) - cosine)
            coefficients = coefficients.at[other].add(jnp.where(regular & (cosine < aim), step, 0))
            return coefficients, seen.at[other].set(jnp.where(regular, cosine, aim))

        unit = (tasks == task).astype(cosines.dtype)
        return jax.lax.fori_loop(0, num_tasks, towards, (unit, target))

    return jax.vmap(turn)(tasks, targets, orders)
