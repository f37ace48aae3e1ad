"""What a training under equal weights shows about a problem, and what to try."""

import dataclasses
import math
from typing import Any

import numpy as np

from mtl_optax.compare import _store as store
from mtl_optax.compare._statistics import of_finite
from mtl_optax.summary import pair_names

# A gradient norm this many times another one's drowns it under equal weights.
SCALES_APART = 5.0
# Cosines: noise of a batch is beyond 0 half of the time, a conflict is well below it.
CONFLICT, OFTEN = -0.2, 0.25
# Relative losses (of the start) of the slowest and the fastest task.
PACES_APART = 10.0
# A training whose summed losses end at more times their start went nowhere.
GROWN = 10.0

# The guide's table: what is seen, what it means, what to try, cheapest first.
ADVICE = {
    "scale": ("scale_invariant", "uncertainty", "gradnorm"),
    "conflict": ("pcgrad", "upgrad", "cagrad"),
    "scale and conflict": ("imtl_g", "aligned_mtl", "nash_mtl"),
    "pace": ("dwa", "famo"),
    "diverged": ("sum",),
    "nothing": ("sum",),
}
VERDICTS = {
    "scale": "The scales differ: the task with the largest gradient drowns the others.",
    "conflict": "The tasks conflict: their gradients often point against each other.",
    "scale and conflict": "The scales differ, and the tasks conflict.",
    "pace": "The tasks learn at different paces.",
    "diverged": "The training under equal weights diverged, so that little can be said of it.",
    "nothing": "There is nothing to treat: keep equal weights, and look for what is missing in the "
    "data or the model.",
}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was seen of a problem in a training under equal weights.

    Attributes:
      verdict: "scale", "conflict", "scale and conflict", "pace", "diverged" or "nothing".
      recommended: names in the catalog to try, the cheapest first; `("sum",)` for nothing.
      reasons: a sentence for each thing that was looked at.
      norms: the typical norm of each task's gradient on the shared parameters.
      cosines: the typical cosine of each pair of gradients.
      conflict_rate: how often a cosine was below -0.2, over the pairs and the looks.
      losses: the loss of each task at the start.
      left: what is left of each loss at the end, as a share of the start.

    A number that can't be told is NaN.
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
        if self.verdict == "diverged":
            return "Try: a smaller learning rate or clipped gradients, before any strategy."
        return f"Try: {', '.join(self.recommended)}."

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, with None for NaN."""
        said = {"says": VERDICTS[self.verdict], "advice": self.advice}
        return store.without_nan(dataclasses.asdict(self) | said)


def of(
    names: tuple[str, ...],
    losses: np.ndarray,
    norms: np.ndarray,
    cosines: np.ndarray,
    *,
    labels_missing: bool = True,
) -> Diagnosis:
    """The diagnosis from notes of a training.

    Args:
      names: the tasks.
      losses: ``(S, W, K)``, over the training.
      norms: ``(S, T, K)``, of the gradients at each look.
      cosines: ``(S, T, K, K)``, likewise.
      labels_missing: whether a loss that is no number may be that of a task without labels.
    """
    rows, columns = np.triu_indices(len(names), 1)
    pairs = cosines[..., rows, columns].reshape(math.prod(cosines.shape[:-2]), len(rows))
    diverged = _diverged(losses, norms[:, -1], np.any if labels_missing else np.all)
    grown = _grown(losses) & ~diverged
    typical = _typical(norms.reshape(-1, len(names)))
    known = pairs[np.isfinite(pairs)]
    nothing = math.nan if pairs.size else 0.0
    rate = float(np.mean(known < CONFLICT)) if known.size else nothing
    start = _mean(_first_finite(losses))
    end = _mean(np.where(diverged[:, np.newaxis], np.nan, _first_finite(losses[:, ::-1])))
    left = np.where(start > 0, end / np.where(start > 0, start, 1), np.nan)

    scale, norm_reasons = _scales(names, typical)
    conflict = rate >= OFTEN
    pace, pace_reasons = _paces(names, start, left)
    verdict = "nothing"
    if diverged.any() or grown.any():
        verdict = "diverged"
    elif scale or conflict:
        verdict = " and ".join(["scale"] * scale + ["conflict"] * conflict)
    elif pace:
        verdict = "pace"
    middle = _median(pairs)
    reasons = [
        *([] if labels_missing else _from_the_first(names, losses)),
        *_divergence(diverged, "were no finite numbers"),
        *_divergence(grown, f"were together over {GROWN:g} times their start"),
        *norm_reasons,
        *_conflicts(middle, rate, conflict),
        *_loss_scales(start),
        *pace_reasons,
    ]
    return Diagnosis(
        verdict,
        ADVICE[verdict],
        tuple(reasons),
        _named(names, typical),
        _named(pair_names(names), middle),
        rate,
        _named(names, start),
        _named(names, left),
    )


def _late(losses: np.ndarray) -> np.ndarray:
    return losses[:, -max(1, losses.shape[1] // 10) :]


def _diverged(losses: np.ndarray, norms: np.ndarray, enough: Any) -> np.ndarray:
    """In which seeds a training ended without numbers ``(S,)``, of all or of any task."""
    known = enough(np.isfinite(_late(losses)).any(axis=1), axis=1)
    return (~known & np.any(norms != 0, axis=1)) | ~np.isfinite(norms).all(axis=1)


def _grown(losses: np.ndarray) -> np.ndarray:
    """In which seeds the losses that were numbers at the start are far above it ``(S,)``."""
    first, last = _first_finite(losses), of_finite(np.nanmean, np.moveaxis(_late(losses), 1, 0))
    known = np.isfinite(first) & np.isfinite(last)
    before, after = (np.sum(np.where(known, x, 0), axis=1) for x in (first, last))
    return (before > 0) & (after > GROWN * before)


def _from_the_first(names: tuple[str, ...], losses: np.ndarray) -> list[str]:
    known = np.isfinite(losses[:, 0])
    broken = [name for k, name in enumerate(names) if not known[:, k].any()]
    if not broken:
        return []
    return [
        f"No number: the loss of {', '.join(broken)} was none in the first step already, which no "
        "learning rate can change: look at that loss."
    ]


def _divergence(diverged: np.ndarray, what: str) -> list[str]:
    if not diverged.any():
        return []
    return [
        f"Divergence: the losses or their gradients {what} at the end in {diverged.sum()} of "
        f"{len(diverged)} trainings; what follows is of the numbers that were."
    ]


def _scales(names: tuple[str, ...], typical: np.ndarray) -> tuple[bool, list[str]]:
    """Whether the norms of the gradients are far apart, and what is said of them."""
    reasons = []
    nothing = [name for name, norm in zip(names, typical, strict=True) if norm == 0]
    if nothing and len(nothing) == len(names) > 1:
        reasons.append(
            "No gradient: that of no task on the shared parameters was above zero at any look: "
            "the losses share no parameters, or have no labels there."
        )
    elif nothing:
        reasons.append(
            f"No gradient: on the shared parameters, that of {', '.join(nothing)} was zero at "
            "every look: the loss does not depend on them, or has no labels there."
        )
    some = {name: norm for name, norm in zip(names, typical, strict=True) if norm > 0}
    if len(some) < 2:
        return False, reasons
    large, small = max(some, key=some.__getitem__), min(some, key=some.__getitem__)
    apart = float(some[large] / some[small])
    reasons.append(
        f"Gradient norms: that of {large} is {apart:.3g} times that of {small}"
        + (
            ": a balancer brings them to one scale."
            if apart >= SCALES_APART
            else ", which is near enough."
        )
    )
    return apart >= SCALES_APART, reasons


def _conflicts(middle: np.ndarray, rate: float, conflict: bool) -> list[str]:
    known = middle[np.isfinite(middle)]
    if not known.size:
        return []
    low, high = f"{known.min():+.2f}", f"{known.max():+.2f}"
    span = low if low == high else f"from {low} to {high}"
    return [
        f"Cosines of the tasks' gradients: typically {span}.",
        f"Conflict: {100 * rate:.0f} % of the cosines were below {CONFLICT}"
        + (": an aggregator that heeds them can help." if conflict else "; that is rare."),
    ]


def _loss_scales(start: np.ndarray) -> list[str]:
    if len(start) < 2 or not np.all(start > 0):
        return []
    return [
        f"Loss scales: the largest was {start.max() / start.min():.3g} times the smallest at "
        "the start; weights of 1 / initial loss are the simplest remedy for that."
    ]


def _paces(names: tuple[str, ...], start: np.ndarray, left: np.ndarray) -> tuple[bool, list[str]]:
    """Whether one task is far behind another, and what is said of it."""
    reasons = []
    known = {name: share for name, share in zip(names, left, strict=True) if share >= 0}
    below = [
        name
        for name, first, share in zip(names, start, left, strict=True)
        if first <= 0 or share < 0
    ]
    apart = False
    if known:
        slow, fast = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
        # A loss that reached 0 is ahead of any that did not.
        apart = bool(known[slow] > 0 and known[slow] >= PACES_APART * known[fast])
        said = f"Pace: {_share(known[slow])} of the loss of {slow} is left at the end"
        if slow != fast:
            said += f", and {_share(known[fast])} of that of {fast}"
            if apart:
                said += ": the paces differ"
            elif known[slow] <= 1:
                said += ": neither is left far behind"
        reasons.append(f"{said}.")
    if below:
        reasons.append(
            f"Pace is not told of {', '.join(below)}: the loss begins at or below zero or ends "
            "below it, so that no share of it is left."
        )
    return apart, reasons


def _first_finite(values: np.ndarray) -> np.ndarray:
    """The first finite values along the axis of time, ``(S, K)``: a task may be absent at first."""
    places = np.isfinite(values).argmax(axis=1)
    found = np.take_along_axis(values, places[:, None], axis=1)[:, 0]
    return np.where(np.isfinite(found), found, np.nan)


def _typical(norms: np.ndarray) -> np.ndarray:
    """The geometric median of what is above 0; 0 where all are, NaN where none is a number."""
    finite = np.where(np.isfinite(norms), norms, np.nan)
    positive = np.where(finite > 0, finite, np.nan)
    zero = np.any(finite == 0, axis=0) & ~np.any(finite > 0, axis=0)
    return np.where(zero, 0.0, np.exp(_median(np.log(positive))))


def _mean(values: np.ndarray) -> np.ndarray:
    return of_finite(np.nanmean, values)


def _median(values: np.ndarray) -> np.ndarray:
    return of_finite(np.nanmedian, values)


def _share(left: float) -> str:
    return f"{100 * left:.3g} %"


def _named(names: Any, values: np.ndarray) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in zip(names, values, strict=True)}
