"""Choosing on the validation set what was tuned, and keeping what the choice led to."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import mtl_optax as mtl
from mtl_optax.compare import _diagnosis as diagnosis
from mtl_optax.compare._setup import Setup
from mtl_optax.compare._source import num_examples
from mtl_optax.compare._statistics import Estimate, of_finite
from mtl_optax.compare._train import ALONE, INVERSE, RANDOM, STATIC
from mtl_optax.summary import pair_names

FORMAT = 2  # of results.json
EQUAL_WEIGHTS = "sum"  # the strategy that all others are held against
INVERSE_LOSSES = "1 / initial losses"
TUNED = "tuned weights"
# A relative change of a metric nearer to 0 says nothing: R² of .05 to .1 is not a gain of 100 %.
CLEARLY_ABOVE = 0.1
DIGITS = 6  # of what pictures show; metrics keep all of theirs
MAX_PAIRS = 6  # more cosines than these are kept as quantiles
PER_CONFIG = ("validation", "test", "train_loss", "weights", "cosine", "norm")

# Arrays with leading axes (S, C) of seeds and configurations; metrics are (S, C, T, M).
Notes = dict[str, np.ndarray]


def choose(
    setup: Setup, strategies: list[str], notes: dict[str, Notes], variants: dict[str, list[Any]]
) -> dict[str, Any]:
    """The results of every job under its best configuration, ready for JSON.

    The best configuration has the largest mean over seeds of what each seed reaches at its best
    checkpoint: the mean relative gain (Δm) of the validation metrics over single-task models, or
    over equal weights where there are none. Whatever is finite in more seeds comes first. Equal
    weights and the inverse initial losses are candidates of the tuned static weights, which
    therefore are never worse on the validation set.

    Args:
      setup: what was trained.
      strategies: names in the catalog, beside equal weights.
      notes: what was noted of each job under every configuration.
      variants: what each job was tried with: options, or of `STATIC` the kind and the weights.
    """
    metrics, rates = setup.metric_names, setup.settings.learning_rates

    def best(job: Notes, counted: list[int], reference: np.ndarray) -> tuple[int, dict[str, Any]]:
        higher = [setup.higher[metrics[i]] for i in counted]
        values = job["validation"][..., counted]
        gains = np.mean(np.where(higher, 1, -1) * (values - reference) / np.abs(reference), axis=-1)
        gains = np.where(np.isfinite(gains), gains, -np.inf)
        looks = gains.argmax(axis=2)  # (S, C)
        config = _best_config(gains.max(axis=2))
        kept = _kept(setup, job, config)
        return config, {
            "rate": rates[config % len(rates)],
            "best": looks[:, config].tolist(),
        } | kept

    kinds = np.repeat([kind for kind, _ in variants[STATIC]], len(rates))
    of_kind = {kind: _configs(notes[STATIC], kinds == kind) for kind in (INVERSE, ALONE, RANDOM)}
    equal = notes[EQUAL_WEIGHTS]
    equal |= {"weights": np.ones_like(equal["train_loss"])}
    pool = [equal, of_kind[INVERSE], of_kind[RANDOM]]
    tuned = {title: np.concatenate([job[title] for job in pool], axis=1) for title in PER_CONFIG}

    # One metric alone is best where it is best against any number, such as 1.
    everything = _with_numbers(equal) or _with_numbers(tuned, *(notes[name] for name in strategies))
    everything = everything or list(range(len(metrics)))
    ones = np.ones(len(everything))
    singles = {}
    for i, name in enumerate(metrics if setup.singles else []):
        start = len(rates) * setup.names.index(name)
        alone = _configs(of_kind[ALONE], slice(start, start + len(rates)))
        singles[name] = best(alone | _costs(notes[STATIC]), [i], ones[:1])[1]
    runs = singles or dict.fromkeys(metrics, best(equal, everything, ones)[1])
    samples = {name: at_best(runs[name], "validation", name) for name in metrics}
    left_out = _left_out(setup, samples, everything)
    counted = [i for i, name in enumerate(metrics) if name not in left_out]
    reference = np.array([_reference(samples[metrics[i]]) for i in counted])

    jobs = {
        EQUAL_WEIGHTS: equal,
        INVERSE_LOSSES: of_kind[INVERSE] | _costs(notes[STATIC]),
        TUNED: tuned | _costs(notes[STATIC]),
        **{name: notes[name] for name in strategies},
    }
    chosen = {name: best(job, counted, reference) for name, job in jobs.items()}
    config, _ = chosen[EQUAL_WEIGHTS]
    seen = [equal[title][:, config] for title in ("train_loss", "norm", "cosine")]
    return {
        "format": FORMAT,
        "problem": _about_problem(setup),
        "left_out": left_out,
        "single_task": singles,
        "strategies": {
            name: _about(name)
            | {"trials": jobs[name]["validation"].shape[1]}
            | {"options": variants[name][config // len(rates)] if name in strategies else {}}
            | run
            for name, (config, run) in chosen.items()
        },
        "candidates": _by_name(metrics, tuned["test"][:, :, -1].mean(axis=0)),
        "diagnosis": diagnosis.of(
            setup.names, *seen, labels_missing=setup.problem.present is not None
        ).as_dict(),
    }


def glance(setup: Setup, notes: Notes) -> dict[str, float]:
    """The best validation metrics of a job, each by itself, for the table of what is done."""
    best = {}
    for i, name in enumerate(setup.metric_names):
        values = notes["validation"][..., i].mean(axis=0)
        known = values[np.isfinite(values)]
        best[name] = float((max if setup.higher[name] else min)(known, default=np.nan))
    return best


def at_best(run: dict[str, Any], split: str, metric: str) -> np.ndarray:
    """A metric of each seed at its best checkpoint."""
    values = np.array(run[split][metric], float)
    return values[np.arange(len(values)), run["best"]]


def _best_config(reached: np.ndarray) -> int:
    """Of what each seed reached ``(S, C)``: finite in most seeds, then the largest mean of them."""
    finite = np.isfinite(reached)
    count = finite.sum(axis=0)
    mean = np.where(finite, reached, 0.0).sum(axis=0) / np.maximum(count, 1)
    return int(np.lexsort((-mean, -count))[0])


def _with_numbers(*jobs: Notes) -> list[int]:
    """The metrics that are a number anywhere."""
    known = [np.isfinite(job["validation"]).any(axis=(0, 1, 2)) for job in jobs]
    return np.flatnonzero(np.any(known, axis=0)).tolist()


def _reference(samples: np.ndarray) -> float:
    """What relative gains are of; 1 where it is 0, or no number as that of a diverged training."""
    known = samples[np.isfinite(samples)]
    return float(known.mean() if known.size else 1.0) or 1.0


def _left_out(setup: Setup, samples: dict[str, np.ndarray], everything: list[int]) -> list[str]:
    """The metrics that count in no mean: near zero, unless all of them are."""
    metrics = setup.metric_names
    near = [name for name in metrics if is_near_zero(samples[name], setup.higher[name])]
    if len(near) < len(metrics):
        return near
    known = [i for i, name in enumerate(metrics) if np.isfinite(samples[name]).any()]
    return [name for i, name in enumerate(metrics) if i not in (known or everything)]


def is_near_zero(samples: np.ndarray, higher_is_better: bool) -> bool:
    """Whether a metric of a baseline is so near to 0 that a relative change of it says nothing."""
    known = samples[np.isfinite(samples)]
    if not known.size:
        return True
    mean, half = Estimate.of(known)
    return bool(mean - np.nan_to_num(half) <= 0 or (higher_is_better and mean < CLEARLY_ABOVE))


def _configs(notes: Notes, chosen: Any) -> Notes:
    return {title: notes[title][:, chosen] for title in PER_CONFIG}


def _costs(notes: Notes) -> Notes:
    return {title: notes[title] for title in ("wall_ratio", "flops_ratio")}


def _about_problem(setup: Setup) -> dict[str, Any]:
    problem = setup.problem
    return {
        "title": problem.title,
        "source": problem.source,
        "tasks": list(setup.names),
        "metrics": setup.metric_names,
        "unit": setup.unit,
        "higher_is_better": setup.higher,
        "num_train": setup.source.num_examples,
        "num_validation": num_examples(problem.validation),
        "num_test": num_examples(problem.test),
        "labels_missing": problem.present is not None,
        "num_parameters": sum(x[0].size for x in jax.tree.leaves(setup.params)),
    }


def _about(name: str) -> dict[str, str]:
    if name in mtl.STRATEGIES:
        row = mtl.STRATEGIES[name]
        return {"kind": row.kind, "needs": row.needs, "summary": row.summary, "paper": row.paper}
    summary = "each loss divided by its initial value"
    if name == TUNED:
        summary = "the best static weights on the validation set"
    return {"kind": "baseline", "needs": "losses", "summary": summary, "paper": ""}


def _kept(setup: Setup, notes: Notes, config: int) -> dict[str, Any]:
    """The notes of one configuration by the names of tasks and metrics: one list a seed."""
    pairs = dict(zip(pair_names(setup.names), setup.pairs, strict=True))
    cosines = {pair: notes["cosine"][:, config, :, i, j] for pair, (i, j) in pairs.items()}
    if len(pairs) > MAX_PAIRS:
        every = np.stack(list(cosines.values()))
        cosines = {
            f"{share} % of the pairs are below": of_finite(
                functools.partial(np.nanpercentile, q=share), every
            )
            for share in (10, 50, 90)
        }
    return {
        **{
            t: _by_name(setup.metric_names, notes[t][:, config], exact=True)
            for t in ("validation", "test")
        },
        **{
            t: _by_name(setup.names, notes[t][:, config]) for t in ("train_loss", "weights", "norm")
        },
        "cosine": {name: rounded(values) for name, values in cosines.items()},
        **{title: rounded(value) for title, value in _costs(notes).items()},
    }


def _by_name(names: Sequence[str], values: np.ndarray, *, exact: bool = False) -> dict[str, Any]:
    """Values ``(..., K)`` as nested lists, one a name; none where the last axis is empty."""
    digits = np.finfo(values.dtype).precision + 3 if exact else DIGITS
    known = names[: values.shape[-1]]
    return {name: rounded(values[..., i], digits) for i, name in enumerate(known)}


def rounded(array: Any, digits: int = DIGITS) -> Any:
    """Nested lists of numbers with that many digits; None for what is not finite."""
    if np.ndim(array):
        return [rounded(row, digits) for row in array]
    return float(f"{array:.{digits}g}") if np.isfinite(array) else None
