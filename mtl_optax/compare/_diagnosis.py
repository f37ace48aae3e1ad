"""What a training under equal weights shows about a problem, and what to try."""

import dataclasses
import math
from typing import Any

import numpy as np

# A gradient norm this many times another one's drowns it under equal weights.
SCALES_APART = 5.0
# Cosines: noise of a batch is beyond 0 half of the time, a conflict is well below it.
CONFLICT, OFTEN = -0.2, 0.25
# Relative losses (of the start) of the slowest and the fastest task.
PACES_APART = 10.0

# The guide's table: what is seen, what it means, what to try, cheapest first.
ADVICE = {
    "scale": ("scale_invariant", "uncertainty", "gradnorm"),
    "conflict": ("pcgrad", "upgrad", "cagrad"),
    "scale and conflict": ("imtl_g", "aligned_mtl", "nash_mtl"),
    "pace": ("dwa", "famo"),
    "nothing": ("sum",),
}
VERDICTS = {
    "scale": "The scales differ: the task with the largest gradient drowns the others.",
    "conflict": "The tasks conflict: their gradients often point against each other.",
    "scale and conflict": "The scales differ, and the tasks conflict.",
    "pace": "The tasks learn at different paces.",
    "nothing": "There is nothing to treat: keep equal weights, and look for what is missing in the "
    "data or the model.",
}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was seen of a problem in a training under equal weights.

    Attributes:
      verdict: "scale", "conflict", "scale and conflict", "pace" or "nothing".
      recommended: names in the catalog to try, the cheapest first; `("sum",)` for nothing.
      reasons: a sentence for each thing that was looked at.
      norms: the typical norm of each task's gradient on the shared parameters.
      cosines: the typical cosine of each pair of gradients.
      conflict_rate: how often a cosine was below -0.2, over the pairs and the looks.
      losses: the loss of each task at the start.
      left: what is left of each loss at the end, as a share of the start.
    """

    verdict: str
    recommended: tuple[str, ...]
    reasons: tuple[str, ...]
    norms: dict[str, float]
    cosines: dict[str, float]
    conflict_rate: float
    losses: dict[str, float]
    left: dict[str, float]

    def __str__(self) -> str:
        return "\n".join([VERDICTS[self.verdict], *(f"- {r}" for r in self.reasons), self.advice])

    @property
    def advice(self) -> str:
        """What to try."""
        if self.verdict == "nothing":
            return "Try: nothing; a comparison will tell if a strategy helps all the same."
        return f"Try: {', '.join(self.recommended)}."

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self) | {"says": VERDICTS[self.verdict], "advice": self.advice}


def of(
    names: tuple[str, ...], losses: np.ndarray, norms: np.ndarray, cosines: np.ndarray
) -> Diagnosis:
    """The diagnosis from notes of a training.

    Args:
      names: the tasks.
      losses: ``(S, W, K)``, over the training.
      norms: ``(S, T, K)``, of the gradients at each look.
      cosines: ``(S, T, K, K)``, likewise.
    """
    rows, columns = np.triu_indices(len(names), 1)
    pairs = cosines[..., rows, columns].reshape(math.prod(cosines.shape[:-2]), len(rows))
    typical = _typical(norms.reshape(-1, len(names)))
    rate = float(np.nanmean(pairs < CONFLICT)) if pairs.size else 0.0
    start, end = np.nanmean(losses[:, 0], axis=0), np.nanmean(losses[:, -1], axis=0)
    left = np.where(start > 0, end / np.where(start > 0, start, 1), np.nan)

    usable = typical[typical > 0]
    apart = float(usable.max() / usable.min()) if usable.size else 1.0
    scale, conflict = apart >= SCALES_APART, rate >= OFTEN
    known = left[np.isfinite(left) & (left > 0)]
    paces = float(known.max() / known.min()) if known.size else 1.0
    pace = paces >= PACES_APART
    verdict = "nothing"
    if scale or conflict:
        verdict = " and ".join(["scale"] * scale + ["conflict"] * conflict)
    elif pace:
        verdict = "pace"
    large, small = names[int(np.nanargmax(typical))], names[int(np.nanargmin(typical))]
    reasons = [
        f"Gradient norms: that of {large} is {apart:.3g} times that of {small}"
        + (": a balancer brings them to one scale." if scale else ", which is near enough."),
        f"Conflict: {100 * rate:.0f} % of the cosines were below {CONFLICT}"
        + (": an aggregator that heeds them can help." if conflict else "; that is rare."),
    ]
    middle = np.nanmedian(pairs, axis=0) if pairs.size else np.zeros(0)
    if len(middle):
        low, high = f"{np.nanmin(middle):+.2f}", f"{np.nanmax(middle):+.2f}"
        span = low if low == high else f"from {low} to {high}"
        reasons.insert(1, f"Cosines of the tasks' gradients: typically {span}.")
    if np.all(start > 0):
        reasons.append(
            f"Loss scales: the largest was {start.max() / start.min():.3g} times the smallest at "
            "the start; weights of 1 / initial loss are the simplest remedy for that."
        )
    if known.size:
        slow, fast = names[int(np.nanargmax(left))], names[int(np.nanargmin(left))]
        reasons.append(
            f"Pace: {_share(left, names, slow)} of the loss of {slow} is left at the end"
            + (f", and {_share(left, names, fast)} of that of {fast}" if slow != fast else "")
            + (": the paces differ." if pace else ": no task is left far behind.")
        )
    between = [f"{names[i]}-{names[j]}" for i, j in zip(rows, columns, strict=True)]
    return Diagnosis(
        verdict,
        ADVICE[verdict],
        tuple(reasons),
        _named(names, typical),
        _named(between, middle),
        rate,
        _named(names, start),
        _named(names, left),
    )


def _typical(values: np.ndarray) -> np.ndarray:
    positive = np.where(values > 0, values, np.nan)
    with np.errstate(all="ignore"):
        return np.nan_to_num(np.exp(np.nanmedian(np.log(positive), axis=0)))


def _share(left: np.ndarray, names: tuple[str, ...], name: str) -> str:
    return f"{100 * left[names.index(name)]:.3g} %"


def _named(names: Any, values: np.ndarray) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in zip(names, values, strict=True)}
