"""DB-PINN: balance equation against conditions, and the conditions among themselves."""

from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide, power_of_two, safe_sqrt
from mtl_optax._options import check_choice, check_num_tasks, task_position
from mtl_optax.balancers._base import summed
from mtl_optax.jacobian import Jacobian
from mtl_optax.jacobian._rows import magnitudes, per_row, row_size, scale_rows, sum_over_shards
from mtl_optax.links import link
from mtl_optax.states import PerTask

STATISTICS = ("mean", "std", "kurtosis")


class DbPinnState(NamedTuple):
    """State of `scale_by_db_pinn`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update: running means
    mean_losses: PerTask  # (K,) float32, means of all losses so far
    count: PerTask  # (K,) int32, updates that they are means over


def scale_by_db_pinn(
    num_tasks: int,
    *,
    reference: int | str = 0,
    statistic: Literal["mean", "std", "kurtosis"] = "mean",
) -> optax.GradientTransformationExtraArgs:
    r"""Weights the conditions by how far their gradients lag, shared out by how hard they are.

    .. math:: \hat\lambda_k = \Big(\sum_{j \ne r} \frac{\max_i |g_{r,i}|}
              {\mathrm{mean}_i |\lambda_j g_{j,i}|}\Big) \frac{l_k}{\sum_{j \ne r} l_j}, \quad
              l_k = \frac{L_k}{\mathrm{mean}_{s \le t} L_k(s)}, \quad
              \lambda_k = \mathrm{mean}_{s \le t}\, \hat\lambda_k(s), \quad \lambda_r = 1

    over the entries i of the shared parameters. The reference r is the PDE residual, the others are
    boundary, initial and data terms: the sum says what they need together, and each gets of it by
    how slowly its loss falls. Means run over all updates so far. A term whose gradient is 0 or not
    finite stays out of the sums and keeps its weight; so do all while the reference is absent or
    has no gradient. A negative loss counts as 0.

    The authors refresh the weights every 10 to 100 steps: `mtl.every(10, mtl.db_pinn(K))`.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      reference: the task r, by its name or its position in the order of the losses.
      statistic: what is compared: `"mean"`, as above, `"std"`, :math:`\sigma_r / \sigma_j` of the
        entries, or `"kurtosis"`, :math:`(\sigma_r / \kappa_r) / (\sigma_j / \kappa_j)`.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (weights are often 10 and more).

    Raises:
      ValueError: if `num_tasks` < 1, an option is none of its choices, no task is the reference, or
        the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[8.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
      >>> task_losses = lambda w: dict(zip(("pde", "x_bc", "y_bc"), J @ w))
      >>> losses, jac = mtl.value_and_jac(task_losses)(jnp.ones(2))
      >>> tx = mtl.scale_by_db_pinn(num_tasks=3, reference="pde")
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> dict(zip(jac.names, state.weights.tolist()))
      {'pde': 1.0, 'x_bc': 6.0, 'y_bc': 6.0}

    References:
      Zhou et al., `Dual-Balancing for Physics-Informed Neural Networks
      <https://arxiv.org/abs/2505.11117>`_, IJCAI 2025, and the authors' code, which has the weight
      in the mean of the entries.
    """
    check_num_tasks(num_tasks)
    check_choice("statistic", statistic, STATISTICS)

    def init_fn(params):
        del params
        ones = jnp.ones(num_tasks, jnp.float32)
        return DbPinnState(ones, jnp.zeros_like(ones), jnp.zeros(num_tasks, jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        position = task_position("reference", reference, jacobian.names)
        loss = jnp.maximum(jacobian.loss_vector().astype(jnp.float32), 0)
        upper, lower = _sizes(jacobian, statistic)
        if statistic == "mean":
            lower = state.weights * lower
        ratio = divide(upper[position], lower, jnp.nan)
        others = jacobian.present & (jnp.arange(num_tasks) != position)
        usable = others & (ratio > 0) & jnp.isfinite(ratio) & jnp.isfinite(loss)

        count = state.count + usable
        newest = 1 / jnp.maximum(count, 1).astype(jnp.float32)
        past = 1 - newest
        mean_losses = jnp.where(usable, past * state.mean_losses + newest * loss, state.mean_losses)
        hardness = jnp.where(usable, divide(loss, mean_losses), 0)
        even = 1 / jnp.maximum(jnp.sum(usable), 1).astype(jnp.float32)
        share = divide(hardness, jnp.sum(hardness), even)
        mixed = past * state.weights + newest * jnp.sum(jnp.where(usable, ratio, 0)) * share
        weights = jnp.where(usable & jnp.isfinite(mixed), mixed, state.weights)
        return jacobian.scale(weights), DbPinnState(weights, mean_losses, count)

    return link(init_fn, update_fn, num_tasks)


def _sizes(jacobian: Jacobian, statistic: str) -> tuple[jax.Array, jax.Array]:
    """What stands above and below the line of the ratio, `(K,)` float32 both."""
    rows = jacobian.measured_rows()
    largest, mean_size = magnitudes(rows, jacobian.num_tasks)
    if statistic == "mean":
        return largest, mean_size
    size = max(sum(map(row_size, rows)), 1)

    def mean(fn):
        parts = [jnp.sum(fn(row), axis=tuple(range(1, row.ndim))) for row in rows]
        parts = [sum_over_shards(part) for part in parts]
        return sum(parts, jnp.zeros_like(largest)) / size

    # Powers of entries may overflow.
    unit = power_of_two(largest)
    rows = [scale_rows(row.astype(jnp.float32), 1 / unit) for row in rows]
    middle = mean(lambda row: row)
    rows = [row - per_row(middle, row) for row in rows]
    variance = mean(lambda row: row**2) * (size / max(size - 1, 1))
    spread = unit * safe_sqrt(variance)
    if statistic == "kurtosis":
        # 1 / kurtosis = variance² / mean of the fourth powers.
        spread = spread * divide(variance**2, mean(lambda row: row**4))
    return spread, spread


db_pinn = summed(scale_by_db_pinn)
