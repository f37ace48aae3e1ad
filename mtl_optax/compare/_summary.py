"""From results to the numbers that the table, the plots and the report all show."""

import dataclasses
import math
import re
import unicodedata
from typing import Any

import numpy as np

from mtl_optax.compare._selection import (
    EQUAL_WEIGHTS,
    INVERSE_LOSSES,
    TUNED,
    at_best,
    is_near_zero,
)
from mtl_optax.compare._statistics import (
    LEVEL,
    Estimate,
    holm,
    of_finite,
    p_value,
    resolution_of,
)
from mtl_optax.metrics import mean_rank

SINGLE_TASK = "single task"
NEAREST = 0.1  # to 0, of its mean over the seeds, that a baseline's metric is divided by
MAX_COLUMNS = 4  # more metrics than these are summed up
MAX_NAMED = 4  # in a sentence
EQUAL, OVER_TUNED = "gain", "over_tuned"  # what a row is held against
_REFERENCES = (EQUAL_WEIGHTS, INVERSE_LOSSES, TUNED)
SHORTEST = 12  # characters that are left of a long name
PADDING = 2  # between the columns of a terminal


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the comparison; all estimates are means over seeds with their 95 % intervals."""

    name: str
    kind: str  # "reference", "baseline", "balancer" or "aggregator"
    metrics: dict[str, Estimate]  # on the test set, at the best validation checkpoint
    worst: str  # the metric that is furthest behind the baseline's, of those in Δm
    delta_m: Estimate  # percent, against single-task models (or equal weights) of the same seed
    at_end: Estimate  # likewise, after the last step
    gain: Estimate  # delta_m minus that of equal weights, seed by seed
    over_tuned: Estimate  # delta_m minus that of tuned static weights
    verdicts: dict[str, str]  # "↑" or "↓" for `gain` and `over_tuned`, after Holm's correction
    rank: Estimate | None  # among the strategies, averaged over the metrics
    volume: Estimate | None  # of two metrics, in their units, above the worst of all
    rate: float | None  # the learning rate chosen
    options: dict[str, float]  # likewise, where they were tuned
    trials: int
    flops_ratio: float | None  # of a training step, to the plain step
    wall_ratio: float | None

    @property
    def label(self) -> str:
        """The name that is shown."""
        if self.name == EQUAL_WEIGHTS:
            return "sum (equal)"
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.options.items())
        return f"{self.name} ({chosen})" if chosen else self.name


def percent(results: dict[str, Any], metric: str) -> bool:
    """Whether a metric is a share that is shown in percent."""
    return results["problem"]["unit"][metric].endswith("%")


def rows(results: dict[str, Any]) -> list[Row]:
    """The single-task models, if there are any, then every strategy, best first."""
    problem, strategies, singles = (
        results[key] for key in ("problem", "strategies", "single_task")
    )
    metrics = problem["metrics"]
    higher = [problem["higher_is_better"][m] for m in metrics]
    counted = [i for i, m in enumerate(metrics) if m not in results["left_out"]]

    def of(runs: dict[str, Any], *, end: bool = False) -> np.ndarray:
        """The test metrics ``(S, M)``, from the run of each metric."""
        values = [
            np.array(runs[m]["test"][m], float)[:, -1] if end else at_best(runs[m], "test", m)
            for m in metrics
        ]
        return np.stack(values, axis=1)

    runs = {name: dict.fromkeys(metrics, run) for name, run in strategies.items()}
    values = {name: of(run) for name, run in runs.items()}
    every = np.stack(list(values.values()))
    # Over how many each is: in single precision numbers would be equal that are not.
    places = np.where(np.isnan(every), np.nan, (every[:, None] > every[None]).sum(axis=1))
    ranks = dict(zip(values, np.asarray(mean_rank(places, higher_is_better=higher)), strict=True))
    signs = np.where(higher, 1.0, -1.0)
    worst = signs * np.where(np.isfinite(every), signs * every, np.inf).min(axis=(0, 1))
    worst = np.where(np.isfinite(worst), worst, np.nan)
    if singles:
        runs[SINGLE_TASK] = singles
        values[SINGLE_TASK] = of(singles)
    baseline = values[SINGLE_TASK if singles else EQUAL_WEIGHTS][:, counted]
    # That of one seed may be near 0.
    least = NEAREST * np.abs(of_finite(np.nanmean, baseline))
    unit_of_change = np.maximum(np.abs(baseline), least)
    unit_of_change = np.where(unit_of_change == 0, 1.0, unit_of_change)

    def changes(values: np.ndarray) -> np.ndarray:
        return signs[counted] * (values[:, counted] - baseline) / unit_of_change

    def against_baseline(values: np.ndarray) -> np.ndarray:
        return 100 * np.mean(changes(values), axis=1)

    def furthest_behind(values: np.ndarray) -> str:
        of_each = np.mean(changes(values), axis=0)
        return metrics[counted[np.where(np.isnan(of_each), -np.inf, of_each).argmin()]]

    deltas = {name: against_baseline(value) for name, value in values.items()}
    verdicts = judged({name: deltas[name] for name in strategies})
    unit = np.where([percent(results, m) for m in metrics], 100.0, 1.0)

    def row(name: str) -> Row:
        alone = name == SINGLE_TASK
        about = (
            {"kind": "reference", "rate": None, "trials": 0, "options": {}}
            if alone
            else strategies[name]
        )
        costs = {"flops_ratio": None, "wall_ratio": None} if alone else strategies[name]
        # Of more models side by side than of the plain step each takes less time.
        as_many = about["trials"] == strategies[EQUAL_WEIGHTS]["trials"] and name != INVERSE_LOSSES
        return Row(
            name=name,
            kind=about["kind"],
            metrics={m: Estimate.of(values[name][:, i]) for i, m in enumerate(metrics)},
            worst=furthest_behind(values[name]),
            delta_m=Estimate.of(deltas[name]),
            at_end=Estimate.of(against_baseline(of(runs[name], end=True))),
            gain=Estimate.of(deltas[name] - deltas[EQUAL_WEIGHTS]),
            over_tuned=Estimate.of(deltas[name] - deltas[TUNED]),
            verdicts=verdicts.get(name, {}),
            rank=Estimate.of(ranks[name]) if name in ranks else None,
            volume=Estimate.of(np.prod(unit * signs * (values[name] - worst), axis=1))
            if len(metrics) == 2
            else None,
            rate=about["rate"],
            options=about["options"],
            trials=about["trials"],
            flops_ratio=costs["flops_ratio"],
            wall_ratio=costs["wall_ratio"] if as_many else None,
        )

    body = [row(name) for name in strategies]
    # Against a baseline that diverged there is no Δm, but there are ranks.
    place = {name: rank.mean() for name, rank in ranks.items()}
    body.sort(key=lambda r: (-np.nan_to_num(r.delta_m.mean, nan=-np.inf), place[r.name]))
    return [row(SINGLE_TASK), *body] if singles else body


def judged(deltas: dict[str, np.ndarray]) -> dict[str, dict[str, str]]:
    """Which differences from equal and tuned static weights are more than chance.

    Paired over seeds by Student's t, of which no difference is known to less than the smallest step
    in the table; Holm's correction is over all that are compared, so that one false arrow in a
    whole table is as rare as its level says.

    Args:
      deltas: Δm of each seed, by strategy, the baselines among them.

    Returns:
      For each name "↑" or "↓" for what it was held against, if it is told apart.
    """
    tests = [(name, EQUAL, EQUAL_WEIGHTS) for name in deltas if name != EQUAL_WEIGHTS]
    tests += [(name, OVER_TUNED, TUNED) for name in deltas if name not in _REFERENCES]
    differences = [deltas[name] - deltas[other] for name, _, other in tests]
    resolution = resolution_of(np.stack(list(deltas.values())))
    corrected = holm([p_value(d, resolution) for d in differences])
    verdicts: dict[str, dict[str, str]] = {name: {} for name in deltas}
    for (name, what, _), d, p in zip(tests, differences, corrected, strict=True):
        if p <= LEVEL:
            verdicts[name][what] = "↑" if d.mean() > 0 else "↓"
    return verdicts


def answer(results: dict[str, Any]) -> str:
    """One sentence: what to prefer here, by how much and at what cost, or that nothing helps."""
    lines = {row.name: row for row in rows(results)}
    seeds = results["settings"]["seeds"]
    failed = diverged(results)
    lost = failed.get(EQUAL_WEIGHTS, [])
    if not np.isfinite(lines[EQUAL_WEIGHTS].gain.mean) and lost:
        return _without_reference(lines, failed, seeds)
    if not _numbers(results):
        return (
            "No metric is a finite number under any strategy, so that nothing can be compared: "
            "look at what metrics returns."
        )
    said = _compared(lines, seeds)
    if lost:
        return f"Equal weights diverged in {len(lost)} of {seeds} seeds. {said}"
    return said


def diverged(results: dict[str, Any]) -> dict[str, list[int]]:
    """The seeds in which a strategy ended with what is no finite number, where there are any."""
    metrics, found = _numbers(results), {}
    for name, run in results["strategies"].items():
        measured = [np.isfinite(_array(run, "test", metric)[:, -1]) for metric in metrics]
        # A metric such as an accuracy is a number whatever the parameters are.
        losses = [np.isfinite(_array(run, "train_loss", task)[:, -1]) for task in run["train_loss"]]
        enough = np.any if results["problem"].get("labels_missing", True) else np.all
        fine = np.all(measured, axis=0) & enough(losses, axis=0)
        if not fine.all():
            found[name] = np.flatnonzero(~fine).tolist()
    return found


def _diverged_alone(results: dict[str, Any]) -> dict[str, list[int]]:
    """The seeds in which the model of one task has no metric, where other models have one."""
    numbers = _numbers(results)
    measured = {name: at_best(run, "test", name) for name, run in results["single_task"].items()}
    lost = {name: np.flatnonzero(~np.isfinite(v)).tolist() for name, v in measured.items()}
    return {name: seeds for name, seeds in lost.items() if seeds and name in numbers}


def _baseline(results: dict[str, Any]) -> list[tuple[np.ndarray, bool]]:
    """The validation metrics that Δm is relative to, each with whether higher is better."""
    problem = results["problem"]
    equal = results["strategies"][EQUAL_WEIGHTS]
    return [
        (
            at_best(results["single_task"].get(name, equal), "validation", name),
            problem["higher_is_better"][name],
        )
        for name in problem["metrics"]
    ]


def _numbers(results: dict[str, Any]) -> list[str]:
    """The metrics that are a finite number anywhere."""
    strategies = results["strategies"].values()
    return [
        metric
        for metric in results["problem"]["metrics"]
        if any(np.isfinite(_array(run, "test", metric)).any() for run in strategies)
    ]


def _array(run: dict[str, Any], what: str, name: str) -> np.ndarray:
    return np.array(run[what][name], float)


def _without_reference(lines: dict[str, Row], failed: dict[str, list[int]], seeds: int) -> str:
    """The answer where equal weights have no numbers that others could be held against."""
    said = (
        f"Equal weights diverged in {len(failed[EQUAL_WEIGHTS])} of {seeds} seeds, so that nothing "
        "can be held against them"
    )
    finished = [r for r in lines.values() if r.name != SINGLE_TASK and r.name not in failed]
    if not finished:
        return f"{said}; nothing else finished in all seeds: try smaller learning rates."
    return f"{said}; with finite numbers in all seeds finished {_listed(finished)}."


def _compared(lines: dict[str, Row], seeds: int) -> str:
    if seeds < 3:
        return f"{seeds} seed(s) say nothing about chance: run 3 or more to compare."
    better = [r for r in lines.values() if r.verdicts.get(EQUAL) == "↑"]
    best = [r for r in better if r.verdicts.get(OVER_TUNED) == "↑"]
    static = [r for r in better if r.name in _REFERENCES]
    others = [r for r in better if r.name not in _REFERENCES]
    if best:
        first = best[0]
        return (
            f"Prefer {_listed(best)}: {first.label} is {_points(first.gain)} better than equal "
            f"weights and {_points(first.over_tuned)} better than tuned static weights, "
            f"{_at_cost(first)}."
        )
    if static:
        first = static[0]
        also = f"; what else helps ({_listed(others)}) is not shown to be better" * bool(others)
        return (
            f"Prefer static weights ({first.label}): they are {_points(first.gain)} better than "
            f"equal weights at the cost of a plain step{also}."
        )
    if others:
        first = others[0]
        return (
            f"Prefer {_listed(others)}: {first.label} is {_points(first.gain)} better than equal "
            f"weights, {_at_cost(first)}, but not shown to be better than tuned static ones."
        )
    closest = max(
        (r for r in lines.values() if r.name not in (SINGLE_TASK, EQUAL_WEIGHTS)),
        key=lambda r: np.nan_to_num(r.gain.mean, nan=-np.inf),
    )
    count = sum(name not in (SINGLE_TASK, EQUAL_WEIGHTS) for name in lines)
    if not np.isfinite(closest.gain.mean):
        return (
            f"Nothing is shown to beat equal weights here: none of {count} others has a Δm in all "
            "seeds."
        )
    return (
        f"Nothing is shown to beat equal weights here: of {count} others the best, "
        f"{closest.label}, differs by {closest.gain.text(signed=True)} points of Δm, which is not "
        "told apart from chance among so many."
    )


def notes(results: dict[str, Any]) -> list[str]:
    """What must be said beside the numbers."""
    lines, problem = rows(results), results["problem"]
    said = []
    worse = [r for r in lines if r.verdicts.get(EQUAL) == "↓"]
    if worse:
        said.append(f"Worse than equal weights: {_listed(worse)}.")
    if results["left_out"]:
        said.append(
            f"Δm leaves out {', '.join(results['left_out'])}: the baseline's metric is negative, "
            "not clearly above zero, or no number, so that a relative change of it says little."
        )
    elif all(is_near_zero(*of) for of in _baseline(results)):
        said.append(
            "None of the baseline's metrics is clearly above zero, so that a relative change of "
            "them, and Δm, says little: look at the metrics themselves."
        )
    if not results["single_task"]:
        said.append(
            "Metrics have other names than the tasks "
            f"({_few(problem['tasks'])}), so that models of one task are no baseline."
        )
    equal = results["strategies"][EQUAL_WEIGHTS]
    never = [t for t in problem["tasks"] if not np.isfinite(_array(equal, "train_loss", t)).any()]
    if never:
        said.append(
            f"The loss of {_few(never)} was no finite number in any step under equal weights"
            + " or no batch had its labels" * problem.get("labels_missing", True)
            + ": look at it before anything else."
        )
    alone = _diverged_alone(results)
    if alone:
        seeds = results["settings"]["seeds"]
        each = [f"{name} ({_seeds(which, seeds)})" for name, which in alone.items()]
        said.append(
            f"Models of one task alone ended with no number: {', '.join(each)}. There is no Δm in "
            "these seeds: try smaller learning rates."
        )
    ended = diverged(results)
    if ended:
        seeds = results["settings"]["seeds"]
        each = [f"{r.label} ({_seeds(ended[r.name], seeds)})" for r in lines if r.name in ended]
        said.append(f"Ended with numbers that are not finite: {', '.join(each)}.")
    if lines[0].name == SINGLE_TASK and lines[1].delta_m.mean + lines[1].delta_m.half < 0:
        ahead = Estimate(-lines[1].delta_m.mean, lines[1].delta_m.half)
        said.append(
            f"Models of one task alone are {ahead.text()} points ahead of the best "
            f"({lines[1].label}), with {len(results['single_task'])} times the parameters."
        )
    if any(r.wall_ratio is None for r in lines if r.kind not in ("reference", "baseline")):
        said.append(
            "Where a strategy's time is missing, two runs of the plain step beside it differed by "
            "more than 5 % (the machine was busy), or its options were tuned side by side."
        )
    skipped = [f"{name} ({reason})" for name, reason in results["skipped"].items()]
    if skipped:
        said.append(f"Left out of all: {', '.join(skipped)}.")
    return said


def columns(results: dict[str, Any]) -> list[tuple[int, list[str]]]:
    """The table by columns, each with its importance: 0 is always shown. Cells are text."""
    problem, lines = results["problem"], rows(results)
    metrics = problem["metrics"]

    def metric(row: Row, m: str) -> str:
        scale = 100.0 if percent(results, m) else 1.0
        return row.metrics[m].text(2 if percent(results, m) else 4, scale=scale, small=True)

    def worst(row: Row) -> str:
        return "" if row.name == SINGLE_TASK else f"{metric(row, row.worst)} {row.worst}"

    def compared(row: Row, what: str, nothing: tuple[str, ...]) -> str:
        if row.name in nothing:
            return ""
        return f"{getattr(row, what).text(signed=True)} {row.verdicts.get(what, '')}".rstrip()

    def number(value: float | None, style: str) -> str:
        return "" if value is None else f"{value:{style}}"

    names = [f"{m}\n{problem['unit'][m]}" for m in metrics]
    made: list[tuple[int, str, Any]] = [(0, "strategy", lambda r: r.label)]
    if len(metrics) <= MAX_COLUMNS:
        made += [
            (2, name, lambda r, m=m: metric(r, m)) for name, m in zip(names, metrics, strict=True)
        ]
    else:
        made += [(4, "worst metric\nvs baseline", worst)]
    alone = (SINGLE_TASK,)
    made += [
        (1, "Δm %\nbest", lambda r: "0" if r.name in alone else r.delta_m.text(signed=True)),
        (5, "Δm %\nat end", lambda r: r.at_end.text(signed=True)),
        (0, "Δm % vs\nequal", lambda r: compared(r, EQUAL, (*alone, EQUAL_WEIGHTS))),
        (3, "Δm % vs\ntuned", lambda r: compared(r, OVER_TUNED, (*alone, *_REFERENCES))),
        (6, "mean\nrank", lambda r: r.rank.text(1) if r.rank else ""),
        (6, "learning\nrate", lambda r: number(r.rate, "g")),
        (7, "trials", lambda r: number(r.trials or None, "d")),
        (1, "flops\n× plain", lambda r: number(r.flops_ratio, ".2f")),
        (3, "time\n× plain", lambda r: number(r.wall_ratio, ".2f")),
    ]
    if len(metrics) == 2:
        made.append((8, "hyper-\nvolume", lambda r: r.volume.text(1, small=True)))
    table = [(place, [title, *map(cell, lines)]) for place, title, cell in made]
    return [(place, cells) for place, cells in table if any(cells[1:])]


def fitting(results: dict[str, Any], width: float) -> list[list[str]]:
    """The most important columns that fit side by side, with no cell broken into lines."""
    every = columns(results)

    def wide(cells: list[str]) -> int:
        return PADDING + max(_width(part) for cell in cells for part in cell.split("\n"))

    limit = max(place for place, _ in every)
    while limit and sum(wide(c) for place, c in every if place <= limit) > width:
        limit -= 1
    names, *others = (cells for place, cells in every if place <= limit)
    room = width - sum(map(wide, others)) - PADDING
    return [[_cut(name, max(room, SHORTEST)) for name in names], *others]


def text(results: dict[str, Any], width: int = 80) -> str:
    """The table as plain text."""
    header, *body = zip(*fitting(results, width), strict=True)
    tall = max(cell.count("\n") for cell in header)
    top = [(cell + "\n" * (tall - cell.count("\n"))).split("\n") for cell in header]
    lines = [*zip(*top, strict=True), *body]
    sizes = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    space = " " * PADDING

    def padded(i: int, cell: str) -> str:
        missing = " " * (sizes[i] - _width(cell))
        return missing + cell if i else cell + missing

    return "\n".join(
        space.join(padded(i, cell) for i, cell in enumerate(line)).rstrip() for line in lines
    )


def _cut(name: str, room: float) -> str:
    """A name that is too long for the columns of a terminal, as far as it fits."""
    if _width(name) <= room:
        return name
    while _width(name) >= room:
        name = name[:-1]
    return f"{name}…"


def _width(cell: str) -> int:
    """The columns of a terminal that a text takes: some letters take two, marks none."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in cell)
    return len(cell) + wide - sum(map(bool, map(unicodedata.combining, cell)))


def markdown(results: dict[str, Any], width: float = math.inf) -> str:
    """The table for a page."""
    header, *body = zip(*fitting(results, width), strict=True)
    header = [cell.replace("\n", " ") for cell in header]
    escaped = [[re.sub(r"([\\|<*`])", r"\\\1", cell) for cell in line] for line in (header, *body)]
    rule = [":--", *["--:"] * (len(header) - 1)]
    lines = (escaped[0], rule, *escaped[1:])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(lines: list[Row]) -> str:
    return _few([row.label for row in lines])


def _few(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _seeds(which: list[int], seeds: int) -> str:
    if len(which) == seeds:
        return "all seeds"
    return f"seed{'s' * (len(which) > 1)} {', '.join(map(str, which))}"


def _points(estimate: Estimate) -> str:
    return f"{estimate.text()} points of Δm"


def _at_cost(row: Row) -> str:
    plain = row.flops_ratio or float("nan")
    return f"at {plain:.2f} times the flops of a plain step"
