"""Preferences spread evenly over the simplex."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from mtl_optax._options import check_count, check_num_tasks

if TYPE_CHECKING:
    from jaxtyping import Float


def simplex_grid(num_tasks: int, divisions: int) -> Float[np.ndarray, "N K"]:
    r"""All preferences whose shares are multiples of one over the divisions, and sum to 1.

    .. math:: N = \binom{H + K - 1}{K - 1}

    of them for H divisions: H + 1 for two tasks. The corners, where all but one task have the share
    0, are among them: ``(1 - K * low) * grid + low`` keeps every share above `low`.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      divisions: H, static, at least 1.

    Returns:
      ``(N, K)``, float32, in ascending order.

    Raises:
      TypeError: if `num_tasks` or `divisions` is no Python int.
      ValueError: if either < 1.

    Examples:
      >>> import mtl_optax as mtl
      >>> mtl.fronts.simplex_grid(2, divisions=2).tolist()
      [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]

    References:
      Das and Dennis, `Normal-Boundary Intersection
      <https://doi.org/10.1137/S1052623496307510>`_, 1998.
    """
    check_num_tasks(num_tasks)
    check_count("divisions", divisions)
    # Where K - 1 bars stand among the divisions.
    places = divisions + num_tasks - 1
    bars = list(itertools.combinations(range(places), num_tasks - 1))
    bars = np.array(bars, int).reshape(len(bars), num_tasks - 1)
    shares = np.diff(bars, axis=1, prepend=-1, append=places) - 1
    return (shares / divisions).astype(np.float32)
