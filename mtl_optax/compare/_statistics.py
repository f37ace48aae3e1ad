"""How sure a mean over a few seeds is: Student's t in float64, and Holm's correction."""

import math
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.05
ROUNDING = 1e-9  # of what is the same number, computed twice
NO_NUMBER = "–"


class Estimate(NamedTuple):
    """A mean over seeds and half its 95 % interval by Student's t (NaN with one seed)."""

    mean: float
    half: float

    @classmethod
    def of(cls, samples: object) -> "Estimate":
        """The estimate from one number a seed."""
        values = np.asarray(samples, np.float64)
        if len(values) < 2:
            return cls(float(values.mean()), float("nan"))
        error = float(values.std(ddof=1) / np.sqrt(len(values)))
        return cls(float(values.mean()), quantile(len(values) - 1) * error)

    def text(
        self, decimals: int = 2, *, signed: bool = False, scale: float = 1.0, small: bool = False
    ) -> str:
        """``mean ± half``, or the mean alone where there is no interval.

        `small` numbers of which the decimals show next to nothing are shown by powers of ten.
        """
        if not np.isfinite(self.mean):
            return NO_NUMBER
        largest = max(abs(scale * self.mean), abs(np.nan_to_num(scale * self.half)))
        style = f".{decimals}f"
        if small and 0 < abs(scale * self.mean) < 10.0 ** (1 - decimals):
            style = ".1e"
        elif largest >= 1e4:
            style = ".0f" if largest < 1e7 else ".3e"
        mean = f"{scale * self.mean:{'+' if signed else ''}{style}}"
        return mean if np.isnan(self.half) else f"{mean} ± {scale * self.half:{style}}"


def of_finite(statistic: Any, values: np.ndarray) -> np.ndarray:
    """A statistic over the first axis, NaN where nothing is finite."""
    finite = np.isfinite(values)
    some = finite.any(axis=0)
    known = np.where(finite | ~some, np.where(finite, values, 0.0), np.nan)
    return np.where(some, statistic(known, axis=0), np.nan) if len(values) else values


def p_value(differences: object, resolution: float = 0.0) -> float:
    """The two-sided p of Student's t that differences, one a seed, have the mean 0.

    1 with fewer than three seeds, and where one is not finite.

    Args:
      differences: one a seed.
      resolution: the step of what was measured, such as one example of an accuracy. Few seeds often
        differ by the same number of steps, by chance: each is taken to be uncertain by one more.
    """
    values = np.asarray(differences, np.float64)
    if len(values) < 3 or not np.all(np.isfinite(values)) or not np.any(values):
        return 1.0
    error = np.sqrt((values.var(ddof=1) + resolution**2) / len(values))
    if error == 0:
        return 0.0
    return 1 - between(abs(values.mean()) / error, len(values) - 1)


def resolution_of(values: np.ndarray) -> float:
    """The smallest step between finite measurements ``(N, S)`` of one seed; 0 if all are equal."""
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=0)  # NaN come last
    size = np.maximum(np.abs(ordered[1:]), np.abs(ordered[:-1]))
    steps = np.diff(ordered, axis=0)
    steps = steps[steps > ROUNDING * size]
    return float(steps.min()) if steps.size else 0.0


def between(t: float, degrees: int) -> float:
    """How often Student's t is within ±t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for i in range(degrees // 2):
        total += term
        term *= cosine**2 * ((2 * i + 2) / (2 * i + 3) if odd else (2 * i + 1) / (2 * i + 2))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def quantile(degrees: int) -> float:
    """The t within whose ± lie 95 % of Student's distribution."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if between(middle, degrees) < 1 - LEVEL else (low, middle)
    return high


def holm(p_values: list[float]) -> list[float]:
    """Holm's corrected p values: the chance of one false claim among all is at most its level.

    References:
      Holm, `A simple sequentially rejective multiple test procedure
      <https://www.jstor.org/stable/4615733>`_, 1979.
    """
    corrected, largest = [1.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected
