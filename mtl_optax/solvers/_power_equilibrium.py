"""The equilibrium G x = x^-p: the fixed point of Nash-MTL and FairGrad."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mtl_optax._numerics import bounded, divide, dot, power_of_two, safe_sqrt
from mtl_optax.solvers import _base


def power_equilibrium(
    Q: ArrayLike,
    scales: ArrayLike | None = None,
    *,
    power: ArrayLike = 1.0,
    max_steps: int | None = None,
) -> _base.SolverResult:
    r"""Solves for the positive vector whose image is its own inverse power.

    .. math:: \mathrm{diag}(s) Q \,\mathrm{diag}(s)\, x = x^{-p}, \quad x > 0

    It is the minimiser of the convex :math:`\tfrac12 x^T G x - \sum_i \varphi(x_i)` with
    :math:`\varphi' = x^{-p}`, found by Newton's method in variables that make both sides about 1
    whatever the scale of Q and s. The Hessian changes by at most :math:`(1 - t\rho)^{-p-1}` along a
    step t, where ρ is the largest relative decrease of a variable; the t that minimises the bound
    that follows,

    .. math:: t = \frac{1 - (1 + p\rho)^{-1/p}}{\rho},

    lowers the objective always and tends to 1, so convergence is global and quadratic.

    G with a positive null vector (Pareto-stationary rows) has no equilibrium. There x grows until
    it solves the problem of a matrix that differs from G by rounding; it stays finite.

    Args:
      Q: matrix (K, K), symmetric positive semi-definite; only its symmetric part matters.
      scales: vector s (K,), non-negative; None for ones.
      power: scalar p > 0.
      max_steps: the most Newton steps, static; None is 100 (4 to 10 are the rule).

    Returns:
      A `SolverResult`, x of shape (K,) in the wider of the types of Q and s, at least float32; x_i
      = 0 where the diagonal of G is 0. Its residual is the largest over the other i of

      .. math:: |(Gx)_i - x_i^{-p}| \,/\, ((|G|x)_i + x_i^{-p}).

    Raises:
      ValueError: if the shapes are not (K, K) and (K,) with K at least 1, or `max_steps` < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers._power_equilibrium import power_equilibrium
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> print(power_equilibrium(J @ J.T).x.round(4))
      [0.5915 0.4071]

    References:
      Boyd and Vandenberghe, `Convex Optimization <https://web.stanford.edu/~boyd/cvxbook/>`_, 2004,
      sec. 9.6 (the damping, there for p = 1).
    """
    Q = jnp.asarray(Q)
    K = Q.shape[0] if Q.ndim else 0
    scales = jnp.ones(K, Q.dtype) if scales is None else jnp.asarray(scales)
    if Q.shape != (K, K) or scales.shape != (K,) or K == 0:
        raise ValueError(
            f"Q has shape {Q.shape} and scales {scales.shape}, expected (K, K) and (K,) with "
            "K >= 1: use jax.vmap for a batch of problems."
        )
    max_steps = 100 if max_steps is None else _base.step_limit(max_steps, K)
    return _solve(Q, scales, jnp.asarray(power), max_steps=max_steps)


@functools.partial(jax.jit, static_argnames="max_steps")
def _solve(Q, scales, power, *, max_steps):
    dtype = _base.solver_dtype(Q, scales)
    Q, scales, p = Q.astype(dtype), scales.astype(dtype), power.astype(dtype)
    K = scales.size
    eps = jnp.finfo(dtype).eps

    unit = power_of_two(jnp.max(jnp.abs(Q)))
    lengths = safe_sqrt(jnp.diagonal(Q) / unit)
    present = (lengths != 0) & (scales != 0)  # NaN stays, and the residual says so
    divisor = jnp.where(present, lengths, 1)
    C = Q / unit / divisor[:, None] / divisor[None, :]
    C = jnp.where(present[:, None] & present[None, :], jnp.clip((C + C.T) / 2, -1, 1), 0)
    C = C + jnp.diag(jnp.where(present, 0, 1).astype(dtype))
    log_norms = jnp.where(present, jnp.log(divisor) + jnp.log(jnp.where(present, scales, 1)), 0)
    # With z = Nx = c y and c = n^((p-1)/(p+1)) the equation reads C (c y) = c y^-p: the exponent is
    # between -1 and 1, and y = 1 for orthogonal rows. A common factor of n is taken off first.
    middle = jnp.max(jnp.where(present, log_norms, -jnp.inf))
    middle = jnp.where(jnp.any(present), middle, 0)
    log_norms = jnp.where(present, log_norms - middle, 0)
    c = jnp.exp((p - 1) / (p + 1) * log_norms)
    c = jnp.maximum(c / jnp.max(c), jnp.finfo(dtype).tiny ** 0.25)

    def imbalance(y):
        pull, push = dot(C, c * y), c * y**-p
        return pull - push, dot(jnp.abs(C), c * y) + push

    def residual(y):
        difference, magnitude = imbalance(y)
        return jnp.max(jnp.abs(difference) / magnitude)

    def unsolved(carry):
        y, change, steps = carry
        return (change > eps**0.5) & (residual(y) > 2 * eps) & (steps < max_steps)

    def body(carry):
        y, _, steps = carry
        # Divided by c on both sides; the ridge acts on the step only, so it leaves no bias.
        hessian = C + jnp.diag(p * y ** (-p - 1) + 4 * K * eps)
        step = -_base.solve(hessian, imbalance(y)[0][:, None])[:, 0] / c
        relative = step / y
        rho = jnp.maximum(jnp.max(-relative), 0)
        # t ρ, what the variable that falls fastest loses; never so much as to round to all of it.
        drop = jnp.minimum(-jnp.expm1(-jnp.log1p(p * rho) / p), 1 - 1e-3)
        length = divide(drop, rho, 1)
        y = y * jnp.maximum(1 + length * relative, 1 - drop)
        return y, jnp.max(jnp.abs(relative)), steps + 1

    # The minimiser along the ray of c, no further than rounding can tell.
    bend = jnp.maximum(dot(c, dot(C, c)) / dot(c, c), K * eps)
    y = jnp.full(K, bend ** (-1 / (p + 1)), dtype)
    start = (y, jnp.ones((), dtype), jnp.zeros((), jnp.int32))
    y, _, steps = jax.lax.while_loop(unsolved, body, start)
    # x = n^(-2 / (p + 1)) y for the norms with their common factors.
    log_factor = -2 / (p + 1) * (log_norms + middle + jnp.log(unit) / 2)
    x = jnp.where(present, jnp.exp(log_factor) * y, 0)
    return _base.result(bounded(x), residual(y), steps)
