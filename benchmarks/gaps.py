"""How far weights are from the optimum that their strategy defines, in float64 by SciPy.

Each takes the Gramian and the weights of the rows, of any scale where the strategy leaves it open,
and returns a number that is 0 at the optimum and does not depend on the scale of the Gramian.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import nnls

RADIUS, FAIRNESS = 0.5, 2.0  # of CAGrad and of FairGrad


def mgda(gramian: np.ndarray, weights: np.ndarray) -> float:
    """The duality gap of the shortest convex combination, relative to its square."""
    weights = _on_simplex(weights)
    slopes = gramian @ weights
    return float((weights @ slopes - slopes.min()) / (weights @ slopes))


def upgrad(gramian: np.ndarray, weights: np.ndarray) -> float:
    """The relative error of the direction."""
    projected = [_projected(gramian, one) for one in np.eye(len(gramian))]
    return _error(gramian, weights, np.mean(projected, axis=0))


def dualproj(gramian: np.ndarray, weights: np.ndarray) -> float:
    """The relative error of the direction."""
    return _error(gramian, weights, _projected(gramian, np.full(len(gramian), 1 / len(gramian))))


def cagrad(gramian: np.ndarray, weights: np.ndarray) -> float:
    """The duality gap of the least improvement, relative to the most the mean could improve."""
    mean = np.full(len(gramian), 1 / len(gramian))
    square = mean @ gramian @ mean
    radius = RADIUS * np.sqrt(square)
    lift = weights - mean
    lift *= min(1, radius / np.sqrt(lift @ gramian @ lift))  # not beyond the ball
    least = (gramian @ (mean + lift)).min()
    dual = _on_simplex(lift)
    bound = dual @ gramian @ mean + radius * np.sqrt(dual @ gramian @ dual)
    return float((bound - least) / ((1 + RADIUS) * square))


def nash_mtl(gramian: np.ndarray, weights: np.ndarray) -> float:
    """The largest relative deviation from the equilibrium G w ∝ 1 / w."""
    return _imbalance(weights * (gramian @ weights))


def fairgrad(gramian: np.ndarray, weights: np.ndarray) -> float:
    """The largest relative deviation from the equilibrium G w ∝ w^(-1/α)."""
    return _imbalance(np.maximum(weights, 0) ** (1 / FAIRNESS) * (gramian @ weights))


def aligned_mtl(gramian: np.ndarray, weights: np.ndarray) -> float:
    """The relative error of the direction."""
    values, vectors = np.linalg.eigh(gramian)
    shares = np.full(len(gramian), 1 / len(gramian))
    return _error(gramian, weights, vectors @ (np.sqrt(values[0] / values) * (shares @ vectors)))


GAPS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    gap.__name__: gap for gap in (upgrad, dualproj, mgda, cagrad, nash_mtl, fairgrad, aligned_mtl)
}


def _projected(gramian: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Weights of Jᵀs projected onto the dual cone, of independent rows."""
    root = np.linalg.cholesky(gramian).T
    return shares + nnls(root, -root @ shares)[0]


def _on_simplex(weights: np.ndarray) -> np.ndarray:
    weights = np.maximum(weights, 0)
    return weights / weights.sum()


def _error(gramian: np.ndarray, weights: np.ndarray, exact: np.ndarray) -> float:
    difference = weights - exact
    return float(np.sqrt(difference @ gramian @ difference / (exact @ gramian @ exact)))


def _imbalance(shares: np.ndarray) -> float:
    return float(np.abs(shares / shares.mean() - 1).max())
