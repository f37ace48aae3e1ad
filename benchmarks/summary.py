"""From results to the numbers that the table, the plots and the report all show."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jax.scipy.special import betainc

from mtl_optax.metrics import delta_m

SINGLE_TASK = "single task"


class Estimate(NamedTuple):
    """A mean over seeds and its standard error (NaN with one seed)."""

    mean: float
    error: float

    @classmethod
    def of(cls, samples: np.ndarray) -> "Estimate":
        """The estimate from one number a seed."""
        samples = np.asarray(samples, np.float64)
        if len(samples) < 2:
            return cls(float(samples.mean()), float("nan"))
        return cls(float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(len(samples))))

    def text(self, decimals: int = 2, *, signed: bool = False, scale: float = 1.0) -> str:
        """``mean ± error``, or the mean alone where there is no error."""
        mean = f"{scale * self.mean:{'+' if signed else ''}.{decimals}f}"
        return mean if np.isnan(self.error) else f"{mean} ± {scale * self.error:.{decimals}f}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    name: str
    kind: str  # "reference", "balancer" or "aggregator"
    metrics: dict[str, Estimate]  # on the test set, after the last step
    delta_m: Estimate  # percent, against single-task models of the same seed
    gain: Estimate  # delta_m minus that of equal weights, seed by seed
    flops_ratio: float  # of a training step, to the plain step
    wall_ratio: float

    @property
    def label(self) -> str:
        """The name that is shown."""
        return "sum (equal)" if self.name == "sum" else self.name

    @property
    def verdict(self) -> str:
        """Whether it differs from equal weights by more than two standard errors."""
        if self.gain.mean > 2 * self.gain.error:
            return "better"
        return "worse" if self.gain.mean < -2 * self.gain.error else ""


def rows(results: dict[str, Any]) -> list[Row]:
    """The single-task models, then every strategy, best first."""
    tasks = results["dataset"]["tasks"]
    higher = [results["dataset"]["higher_is_better"][task] for task in tasks]

    def final(run: dict[str, Any], task: str) -> np.ndarray:
        return np.asarray(run["test"][task])[:, -1]

    singles = results["single_task"]
    baseline = np.stack([final(singles[task], task) for task in tasks], axis=1)
    metrics = {SINGLE_TASK: baseline} | {
        name: np.stack([final(run, task) for task in tasks], axis=1)
        for name, run in results["strategies"].items()
    }
    gains = {
        name: np.asarray(delta_m(values, baseline, higher_is_better=higher))
        for name, values in metrics.items()
    }

    def row(name: str, kind: str, flops_ratio: float, wall_ratio: float) -> Row:
        return Row(
            name=name,
            kind=kind,
            metrics={t: Estimate.of(metrics[name][:, i]) for i, t in enumerate(tasks)},
            delta_m=Estimate.of(gains[name]),
            gain=Estimate.of(gains[name] - gains[results["equal_weights"]]),
            flops_ratio=flops_ratio,
            wall_ratio=wall_ratio,
        )

    reference = row(
        SINGLE_TASK,
        "reference",
        sum(singles[task]["flops_ratio"] for task in tasks),
        sum(singles[task]["wall_ratio"] for task in tasks),
    )
    strategies = [
        row(name, run["kind"], run["flops_ratio"], run["wall_ratio"])
        for name, run in results["strategies"].items()
    ]
    return [reference, *sorted(strategies, key=lambda r: -r.delta_m.mean)]


def conclusion(results: dict[str, Any]) -> str:
    """What the comparison shows against equal weights, and how far it reaches."""
    others = [r for r in rows(results)[1:] if r.name != results["equal_weights"]]
    seeds = results["settings"]["seeds"]
    if seeds < 2:
        return "One seed says nothing about chance: run with --seeds 3 or more to compare."
    better = [r.name for r in others if r.verdict == "better"]
    worse = [r.name for r in others if r.verdict == "worse"]
    first = (
        f"Better than equal weights by more than two standard errors: {', '.join(better)}."
        if better
        else "No strategy is better than equal weights by more than two standard errors."
    )
    second = f" Worse by more than two: {', '.join(worse)}." if worse else ""
    # Adam divides the mean's factor 1/K out again, which leaves its ε K times as large.
    placebo = next((r.gain.text(signed=True) for r in others if r.name == "mean"), None)
    third = (
        f" But for Adam's ε, mean takes the steps of equal weights: its {placebo} is chance."
        if placebo
        else ""
    )
    return (
        f"{first}{second}{third} With {seeds} seeds, chance alone puts about "
        f"{100 * beyond_two_errors(seeds):.0f} % of equally good strategies beyond two standard "
        f"errors, one way or the other, and {len(others)} were compared. This is one data set, one "
        "model and one learning rate, with no strategy's options tuned."
    )


def beyond_two_errors(seeds: int) -> float:
    """How often a mean of normal differences is over two standard errors from its true value 0.

    The two tails of Student's t with one degree of freedom less than seeds.
    """
    degrees = seeds - 1
    return float(betainc(degrees / 2, 0.5, degrees / (degrees + 4)))


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The table as text: a header, then a line for each of `rows`."""
    dataset = results["dataset"]
    header = [
        "strategy",
        *(f"{task}\n{dataset['metric'][task]} %" for task in dataset["tasks"]),
        "Δm %",
        "Δm % vs\nequal weights",
        "flops\n× plain",
        "time\n× plain",
    ]
    body = [
        [
            row.label,
            *(row.metrics[task].text(scale=100) for task in dataset["tasks"]),
            "0" if row.name == SINGLE_TASK else row.delta_m.text(signed=True),
            ""
            if row.name in (SINGLE_TASK, results["equal_weights"])
            else f"{row.gain.text(signed=True)} {row.verdict}".rstrip(),
            f"{row.flops_ratio:.2f}",
            f"{row.wall_ratio:.2f}",
        ]
        for row in rows(results)
    ]
    return [header, *body]
