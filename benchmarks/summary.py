"""From results to the numbers that the table, the plots and the report all show."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.scipy.special import betainc

from mtl_optax.metrics import delta_m, hypervolume, mean_rank

SINGLE_TASK = "single task"
MAX_COLUMNS = 4  # more tasks than these are summed up


class Estimate(NamedTuple):
    """A mean over seeds and its standard error (NaN with one seed)."""

    mean: float
    error: float

    @classmethod
    def of(cls, samples: Any) -> "Estimate":
        """The estimate from one number a seed."""
        samples = np.asarray(samples, np.float64)
        if len(samples) < 2:
            return cls(float(samples.mean()), float("nan"))
        return cls(float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(len(samples))))

    def text(self, decimals: int = 2, *, signed: bool = False, scale: float = 1.0) -> str:
        """``mean ± error``, or the mean alone where there is no error."""
        large = abs(scale * self.mean) >= 1e4
        style = ".1e" if large else f".{decimals}f"
        mean = f"{scale * self.mean:{'+' if signed else ''}{style}}"
        return mean if np.isnan(self.error) else f"{mean} ± {scale * self.error:{style}}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    name: str
    kind: str  # "reference", "baseline", "balancer" or "aggregator"
    metrics: dict[str, Estimate]  # on the test set, after the last step
    delta_m: Estimate  # percent, against single-task models (or equal weights) of the same seed
    gain: Estimate  # delta_m minus that of equal weights, seed by seed
    over_tuned: Estimate  # delta_m minus that of tuned static weights
    rank: Estimate | None  # among the strategies, averaged over the tasks
    volume: Estimate | None  # of two tasks, in their units, above the worst of all
    rate: float  # the learning rate chosen
    flops_ratio: float  # of a training step, to the plain step
    wall_ratio: float

    @property
    def label(self) -> str:
        """The name that is shown."""
        return "sum (equal)" if self.name == "sum" else self.name


def verdict(difference: Estimate) -> str:
    """``"↑"`` or ``"↓"`` where a difference is more than two standard errors from 0."""
    if difference.mean > 2 * difference.error:
        return "↑"
    return "↓" if difference.mean < -2 * difference.error else ""


def rows(results: dict[str, Any]) -> list[Row]:
    """The single-task models, if there are any, then every strategy, best first."""
    dataset, strategies = results["dataset"], results["strategies"]
    measured, singles = dataset["measured"], results["single_task"]
    higher = [dataset["higher_is_better"][t] for t in measured]

    def final(runs: dict[str, Any]) -> np.ndarray:
        """The test metrics after the last step ``(S, K)``, from the run of each metric."""
        return np.stack([np.array(runs[t]["test"][t])[:, -1] for t in measured], axis=1)

    values = {name: final(dict.fromkeys(measured, run)) for name, run in strategies.items()}
    every = np.stack(list(values.values()))
    ranks = dict(zip(values, np.asarray(mean_rank(every, higher_is_better=higher)), strict=True))
    worst = np.where(higher, every.min(axis=(0, 1)), every.max(axis=(0, 1)))
    if singles:
        values[SINGLE_TASK] = final(singles)
    baseline = values[SINGLE_TASK if singles else results["equal_weights"]]
    gains = {
        name: np.asarray(delta_m(value, baseline, higher_is_better=higher))
        for name, value in values.items()
    }
    unit = np.where([dataset["percent"][t] for t in measured], 100.0, 1.0)
    area = jax.vmap(lambda p: hypervolume(p[None], unit * worst, higher_is_better=higher))

    def row(name: str, runs: list[dict[str, Any]], kind: str, rate: float) -> Row:
        return Row(
            name=name,
            kind=kind,
            metrics={t: Estimate.of(values[name][:, i]) for i, t in enumerate(measured)},
            delta_m=Estimate.of(gains[name]),
            gain=Estimate.of(gains[name] - gains[results["equal_weights"]]),
            over_tuned=Estimate.of(gains[name] - gains[results["tuned_weights"]]),
            rank=Estimate.of(ranks[name]) if name in ranks else None,
            volume=Estimate.of(area(unit * values[name])) if len(measured) == 2 else None,
            rate=rate,
            flops_ratio=sum(run["flops_ratio"] for run in runs),
            wall_ratio=sum(run["wall_ratio"] for run in runs),
        )

    body = [row(name, [run], run["kind"], run["rate"]) for name, run in strategies.items()]
    body.sort(key=lambda r: -np.nan_to_num(r.delta_m.mean, nan=-np.inf))
    if singles:
        body.insert(0, row(SINGLE_TASK, list(singles.values()), "reference", float("nan")))
    return body


def conclusion(results: dict[str, Any]) -> str:
    """What the comparison shows against equal and tuned static weights, and how far it reaches."""
    references = (SINGLE_TASK, results["equal_weights"], results["tuned_weights"])
    others = [r for r in rows(results) if r.name not in references]
    seeds = results["settings"]["seeds"]
    if seeds < 2:
        return "One seed says nothing about chance: run with --seeds 3 or more to compare."

    def those(comparison: str, word: str) -> list[str]:
        return [r.name for r in others if verdict(getattr(r, comparison)) == word]

    text = ""
    for comparison, name in (("gain", "equal weights"), ("over_tuned", "tuned static weights")):
        better, worse = those(comparison, "↑"), those(comparison, "↓")
        text += (
            f"Better than {name} by more than two standard errors: {', '.join(better)}. "
            if better
            else f"No strategy is better than {name} by more than two standard errors. "
        )
        text += f"Worse by more than two: {', '.join(worse)}. " if worse else ""
    # Adam divides the mean's factor 1/K out again, which leaves its ε K times as large.
    placebo = next((r.gain.text(signed=True) for r in others if r.name == "mean"), None)
    if placebo:
        text += (
            f"But for Adam's ε, mean takes the steps of equal weights: its {placebo} is chance. "
        )
    return (
        f"{text}With {seeds} seeds, chance alone puts about "
        f"{100 * beyond_two_errors(seeds):.0f} % of equally good strategies beyond two standard "
        f"errors, one way or the other, and {len(others)} were compared. This is one data set and "
        "one model; learning rates were tuned, the strategies' own options were not."
    )


def beyond_two_errors(seeds: int) -> float:
    """How often a mean of normal differences is over two standard errors from its true value 0.

    The two tails of Student's t with one degree of freedom less than seeds.
    """
    degrees = seeds - 1
    return float(betainc(degrees / 2, 0.5, degrees / (degrees + 4)))


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The table as text: a header, then a line for each of `rows`."""
    dataset, lines = results["dataset"], rows(results)
    measured, references = dataset["measured"], (SINGLE_TASK, results["equal_weights"])

    scale = {t: 100 if dataset["percent"][t] else 1 for t in measured}
    sign = {t: 1 if dataset["higher_is_better"][t] else -1 for t in measured}
    unit = {t: dataset["metric"][t] + " %" * dataset["percent"][t] for t in measured}

    def metric(row: Row, t: str) -> str:
        return row.metrics[t].text(2 if dataset["percent"][t] else 4, scale=scale[t])

    def worst(row: Row) -> str:
        t = min(measured, key=lambda t: sign[t] * row.metrics[t].mean)
        return f"{metric(row, t)} {t}"

    def average(row: Row) -> str:
        mean = float(np.mean([row.metrics[t].mean for t in measured]))
        return Estimate(mean, float("nan")).text(scale=scale[measured[0]])

    each = len(measured) <= MAX_COLUMNS
    titles = [f"{what}\n{unit[measured[0]]}" for what in ("mean", "worst task")]
    titles = [f"{t}\n{unit[t]}" for t in measured] if each else titles
    header = ["strategy", *titles, "Δm %", "Δm % vs\nequal", "Δm % vs\ntuned", "mean\nrank"]
    header += ["hyper-\nvolume"] * (lines[0].volume is not None)
    header += ["learning\nrate", "flops\n× plain", "time\n× plain"]

    def compared(row: Row, difference: Estimate, nothing: tuple[str, ...]) -> str:
        if row.name in nothing:
            return ""
        return f"{difference.text(signed=True)} {verdict(difference)}".rstrip()

    body = [
        [
            row.label,
            *([metric(row, t) for t in measured] if each else [average(row), worst(row)]),
            "0" if row.name == SINGLE_TASK else row.delta_m.text(signed=True),
            compared(row, row.gain, references),
            compared(row, row.over_tuned, (SINGLE_TASK, results["tuned_weights"])),
            row.rank.text(1) if row.rank else "",
            *([row.volume.text(1)] if row.volume else []),
            "" if row.name == SINGLE_TASK else f"{row.rate:g}",
            f"{row.flops_ratio:.2f}",
            f"{row.wall_ratio:.2f}",
        ]
        for row in lines
    ]
    return [header, *body]


def markdown(results: dict[str, Any]) -> str:
    """The table for a page: `python -m benchmarks.summary results.json` prints it."""
    header, *body = [[cell.replace("\n", " ") for cell in line] for line in cells(results)]
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
