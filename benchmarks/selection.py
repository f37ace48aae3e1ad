"""Choosing on the validation set what was tuned, and keeping what the choice led to."""

from typing import Any

import jax
import numpy as np

from benchmarks.data import TASK_KINDS, Dataset
from benchmarks.train import TUNED
from mtl_optax import catalog
from mtl_optax.metrics import delta_m

EQUAL_WEIGHTS = "sum"  # the strategy that all others are held against

# "validation/click" and the like; arrays have leading axes (S, C) of seeds and configurations.
Notes = dict[str, np.ndarray]


def single(task: str) -> str:
    """The name of the job that trains one task alone."""
    return f"single task: {task}"


def choose(dataset: Dataset, strategies: list[str], notes: dict[str, Notes]) -> dict[str, Any]:
    """The results of every job under its best configuration, ready for JSON.

    The best is the one with the largest mean relative gain (Δm) of the validation metrics after the
    last step, over single-task models, or over equal weights where there are none.

    Args:
      dataset: what was trained on.
      strategies: names in the catalog.
      notes: what was noted of each job under every configuration.
    """
    measured = [task.name for task in dataset.measured]
    kinds = {task.name: TASK_KINDS[task.kind] for task in dataset.measured}

    def best(job: str, names: list[str], reference: np.ndarray) -> dict[str, Any]:
        final = [notes[job][f"validation/{name}"][..., -1] for name in names]
        higher = [kinds[name].higher_is_better for name in names]
        gains = delta_m(np.stack(final, axis=-1), reference, higher_is_better=higher)
        scores = np.nan_to_num(np.asarray(gains).mean(axis=0), nan=-np.inf)
        return _chosen(notes[job], int(np.argmax(scores)))

    # One metric alone is best where it is best against any number, such as 1.
    ones = np.ones(len(measured))
    singles = {} if dataset.judged else {t: best(single(t), [t], ones[:1]) for t in measured}
    runs = singles or dict.fromkeys(measured, best(EQUAL_WEIGHTS, measured, ones))
    reference = np.array([np.mean(np.array(runs[t]["validation"][t])[:, -1]) for t in measured])
    candidates = {t: notes[TUNED][f"test/{t}"][..., -1].mean(axis=0) for t in measured}
    return {
        "dataset": {
            "name": dataset.name,
            "title": dataset.title,
            "source": dataset.source,
            "num_train": len(jax.tree.leaves(dataset.train)[0]),
            "num_validation": len(jax.tree.leaves(dataset.validation)[0]),
            "num_test": len(jax.tree.leaves(dataset.test)[0]),
            "tasks": sorted(task.name for task in dataset.tasks),
            "measured": measured,
            "metric": {t: kind.metric_name for t, kind in kinds.items()},
            "higher_is_better": {t: kind.higher_is_better for t, kind in kinds.items()},
            "percent": {t: kind.percent for t, kind in kinds.items()},
        },
        "equal_weights": EQUAL_WEIGHTS,
        "tuned_weights": TUNED,
        "single_task": singles,
        "strategies": {
            name: _about(name) | best(name, measured, reference) for name in (*strategies, TUNED)
        },
        "candidates": {t: _rounded(values) for t, values in candidates.items()},
    }


def _about(name: str) -> dict[str, str]:
    if name == TUNED:
        return {
            "kind": "baseline",
            "needs": "losses",
            "summary": "static weights, the best of random ones on the validation set",
            "paper": "https://arxiv.org/abs/2209.11379",
        }
    row = catalog.STRATEGIES[name]
    return {"kind": row.kind, "needs": row.needs, "summary": row.summary, "paper": row.paper}


def _chosen(notes: Notes, config: int) -> dict[str, Any]:
    """The notes of one configuration, nested by their titles: every array as one list a seed."""
    chosen: dict[str, Any] = {"weights": {}, "cosine": {}}
    for title, array in notes.items():
        group, _, name = title.partition("/")
        value = _rounded(array[:, config] if array.ndim > 1 else array)
        if name:
            chosen.setdefault(group, {})[name] = value
        else:
            chosen[group] = value
    return chosen | {"rate": chosen["rate"][0]}


def _rounded(array: np.ndarray) -> Any:
    """Nested lists with six digits, the precision of float32, which keeps the file small."""
    return [_rounded(row) for row in array] if array.ndim else float(f"{array:.6g}")
