"""Small convex programs, jitted, on the device."""

from mtl_optax.solvers._base import SolverResult
from mtl_optax.solvers._nnls import nnls
from mtl_optax.solvers._nonnegative_qp import nonnegative_qp
from mtl_optax.solvers._simplex_qp import simplex_qp

__all__ = ["SolverResult", "nnls", "nonnegative_qp", "simplex_qp"]
