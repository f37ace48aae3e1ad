"""What the aggregators that solve for K weights share."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from mtl_optax._numerics import bounded, divide, dot
from mtl_optax._options import check_choice, check_num_tasks, per_task
from mtl_optax._typing import TaskOption
from mtl_optax.jacobian import Jacobian
from mtl_optax.links import dealt, link
from mtl_optax.states import PerTask


class SolvedState(NamedTuple):
    """State of the aggregators that solve for the weights of the rows."""

    weights: PerTask  # (K,) float32, of the rows in the last update
    fallbacks: jax.Array  # () int32, updates that could not be solved: uniform weights


Heads = Literal["own", "weighted"]
HEADS = ("own", "weighted")


class Solved(NamedTuple):
    """What an aggregator solves for."""

    weights: jax.Array  # (K,), of the rows
    solved: jax.Array  # () bool, whether they are the answer
    shortened: ArrayLike = 1.0  # (), what multiplies the sum on the shared parameters alone


def solved_aggregator(
    num_tasks: int,
    solve: Callable[[Jacobian], tuple[jax.Array, jax.Array] | Solved],
    uniform: float | None = None,
    heads: Heads = "own",
) -> optax.GradientTransformationExtraArgs:
    """The aggregator d = Jᵀw of a function from the Jacobian to `(w, solved)`.

    Args:
      num_tasks: number of tasks K.
      solve: returns `Solved`: `(K,)` weights, whatever for absent tasks, and whether they are the
        answer.
      uniform: the weight of every task where they are not, or are not finite in float32; None is
        one over those present.
      heads: see `mtl_optax.aggregators`.
    """
    check_num_tasks(num_tasks)
    check_choice("heads", heads, HEADS)

    def init_fn(params):
        del params
        start = 1 / num_tasks if uniform is None else uniform
        return SolvedState(jnp.full(num_tasks, start, jnp.float32), jnp.zeros([], jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        weights, solved, *more = solve(jacobian)
        shortened = more[0] if more else 1.0
        weights = jnp.where(jacobian.present, weights, 0)
        solved &= jnp.all(jnp.isfinite(weights.astype(jnp.float32)))
        even = 1 / jacobian.num_present if uniform is None else uniform
        weights = jnp.where(solved, weights, jnp.asarray(even, weights.dtype))
        shortened = jnp.where(solved, shortened, 1).astype(weights.dtype)
        update = combined(jacobian, weights, heads, shortened)
        fallbacks = state.fallbacks + ~solved
        return update, SolvedState((weights * shortened).astype(jnp.float32), fallbacks)

    return link(init_fn, update_fn, num_tasks)


def combined(
    jacobian: Jacobian, weights: jax.Array, heads: Heads, shortened: ArrayLike = 1.0
) -> Any:
    """The weighted sum of the rows on the shared parameters, and what `heads` says on the heads."""
    if heads == "own":
        return jacobian.combine(weights * shortened)
    even = jnp.full(jacobian.num_tasks, shortened, weights.dtype)
    return jacobian.scale(weights).combine(even)


def shares(preference: TaskOption | None, jacobian: Jacobian) -> jax.Array:
    """The part of each row in a mean: the preference, by default one over the tasks present."""
    return per_task("preference", preference, jacobian, 1 / jacobian.num_present)


def random_orders(key: jax.Array, present: jax.Array) -> jax.Array:
    """An order of the tasks for each task, `(K, K)`; those present stand as if drawn alone."""
    num_tasks = len(present)
    keys = jax.random.split(key, num_tasks)
    orders = jax.vmap(lambda k: jax.random.permutation(k, num_tasks))(keys)
    present_first = jnp.argsort(~present)
    return dealt(present_first[orders], present)


def finite_correlation(jacobian: Jacobian) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cosines, norms and which rows are finite: one that is not conflicts with nothing."""
    cosines, norms = jacobian.correlation()
    good = jnp.isfinite(norms)
    return jnp.where(good[:, None] & good[None, :], cosines, 0), jnp.where(good, norms, 0), good


def relative_norms(norms: jax.Array) -> jax.Array:
    """The norms over their largest, at most 1."""
    return divide(norms, jnp.max(norms), norms)


def towards(target: jax.Array, norms: jax.Array, relax_factor: float | jax.Array) -> jax.Array:
    """The weights that bring norms the part r of the way to the target; finite for a norm of 0."""
    ratio = bounded(divide(target, norms, 1))
    return relax_factor * ratio + (1 - relax_factor)


# Singular values of unit rows below so many times K eps are those of rounding.
_ROUNDING = 16


class SymmetricFactors(NamedTuple):
    """Eigenvalues and vectors of a correlation matrix, those of rounding marked."""

    values: jax.Array  # (K,) ascending
    vectors: jax.Array  # (K, K), in columns
    kept: jax.Array  # (K,) bool, the eigenvalues above rounding


def factors(cosines: jax.Array) -> SymmetricFactors:
    """The eigendecomposition that decides the rank relative to the largest eigenvalue.

    On unit rows: a task is not taken for dependent because its gradient is small.
    """
    # LAPACK may hang or trap on NaN.
    values, vectors = jnp.linalg.eigh(jnp.where(jnp.isfinite(cosines), cosines, 0))
    tolerance = values.size * jnp.finfo(values.dtype).eps * values[-1]
    return SymmetricFactors(values, vectors, values > tolerance)


def row_factors(jacobian: Jacobian, cosines: jax.Array) -> SymmetricFactors:
    """The same of the cosines of a Jacobian, at the conditioning of its rows where it can be.

    The eigenvectors of the computed cosines mix the unit rows U to nearly orthogonal ones A = T U;
    from the Gramian of those, found anew, U = V B W with an orthonormal W and a small B, whose
    singular values are those of U. An error of eps in U so stays one of eps. That holds for any
    T, which therefore has no part in a derivative.
    """
    eps = jnp.finfo(cosines.dtype).eps
    # Largest first: of a matrix graded so an SVD finds the small singular values.
    values, vectors, _ = (x[..., ::-1] for x in jax.lax.stop_gradient(factors(cosines)))
    root = jnp.sqrt(jnp.maximum(values, values.size * eps * values[0]))
    mixing = divide(1, root)[:, None] * vectors.T
    products = jacobian.mixed_products(mixing)
    if products is None:
        return factors(cosines)
    # Near the identity, but where rows are dependent: an eps keeps its root real.
    products = jnp.where(jnp.isfinite(products), products, 0) + eps * jnp.eye(values.size)
    small = root[:, None] * jnp.linalg.cholesky(products)
    left, singular, _ = jnp.linalg.svd(jnp.where(jnp.isfinite(small), small, 0))
    # Two tasks that are one differ by the rounding of their entries, which is no direction.
    kept = singular > _ROUNDING * values.size * eps * singular[0]
    return SymmetricFactors(singular**2, dot(vectors, left), kept)


def pseudo_solve(cosines: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """C⁺b, by the eigendecomposition; b is 0 where a row and its cosines are.

    Returns:
      The solution, and its `(K,)` uncertainty from the rounding of C.
    """
    # A row of 0 is one of its own, or it would mix with what has small eigenvalues.
    cosines = cosines + jnp.diag(jnp.diagonal(cosines) == 0)
    # The derivative is that of the last line: of equal eigenvalues, vectors have none.
    values, vectors, kept = jax.lax.stop_gradient(factors(cosines))
    inverse = divide(1, jnp.where(kept, values, 0))
    components = dot(rhs, vectors)
    eps = jnp.finfo(values.dtype).eps
    noise = eps * rhs.size * jnp.linalg.norm(rhs) * dot(jnp.abs(vectors), inverse)
    solution = dot(vectors, inverse * components)
    # What is left is solved for once more: the rounding of C stays, that of its vectors goes.
    left = dot(rhs - dot(cosines, solution), vectors)
    return solution + dot(vectors, inverse * left), noise
