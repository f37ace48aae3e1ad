"""A comparison from start to results: train every strategy, take notes, choose what was tuned.

Each finished strategy is saved, so an interrupted comparison goes on where it stopped.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import selection, train
from benchmarks.data import Dataset, Split, Task
from benchmarks.problem import Problem, Settings, batch_order
from benchmarks.selection import EQUAL_WEIGHTS, Notes, single

NUM_WINDOWS = 60  # losses and weights are kept as means over this many windows of steps
NUM_PROBED = 256  # training examples on which the cosines of the tasks' gradients are measured

Progress = Callable[[str, int, int], None]


def run(
    dataset: Dataset,
    strategies: Sequence[str],
    settings: Settings,
    folder: Path,
    *,
    on_progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Trains single-task models, equal and tuned static weights, and the strategies.

    Args:
      dataset: what to train on.
      strategies: names in the catalog; the baselines are always added.
      settings: what all strategies share.
      folder: where each finished strategy is saved, and found again if everything that its result
        depends on is the same.
      on_progress: called with the name of what comes next, the work done and the work to do, in
        chunks; compiling a strategy counts as one.

    Returns:
      A dict of numbers, strings, lists and dicts, ready for JSON.
    """
    strategies = list(dict.fromkeys((EQUAL_WEIGHTS, *strategies)))
    jobs = {name: (dataset.tasks, name) for name in (EQUAL_WEIGHTS, train.TUNED, *strategies)}
    if not dataset.judged:
        singles = {single(task.name): ((task,), EQUAL_WEIGHTS) for task in dataset.tasks}
        jobs = singles | jobs
    facts = _facts(dataset, settings)
    trainer = _Trainer(dataset, settings, on_progress, len(jobs))
    notes: dict[str, Notes] = {}
    for job, (tasks, name) in jobs.items():
        path = folder / f"{job.replace(' ', '_').replace(':', '')}.npz"
        known = _load(path, facts)
        if known is None:
            known = trainer.notes(job, tasks, name)
            _save(path, known, facts)
        else:
            trainer.skip(job)
        notes[job] = known
    on_progress("done", trainer.total, trainer.total)
    return {
        **selection.choose(dataset, strategies, notes),
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
        "checkpoint_steps": [
            settings.steps_per_checkpoint * (i + 1) for i in range(settings.checkpoints)
        ],
        "window_steps": [float(window.mean()) + 1 for window in _windows(settings)],
    }


class _Trainer:
    """Trains one job after the other, and times each against the plain step beside it."""

    def __init__(self, dataset: Dataset, settings: Settings, on_progress: Progress, num_jobs: int):
        self._dataset, self._settings, self._on_progress = dataset, settings, on_progress
        order = batch_order(settings, len(jax.tree.leaves(dataset.train)[0]))
        self._chunks = [jax.numpy.asarray(c) for c in np.split(order, settings.checkpoints, axis=1)]
        self._splits = jax.device_put((dataset.train, dataset.validation, dataset.test))
        self._problems: dict[tuple[Task, ...], Problem] = {}
        self._done, self.total = 0, num_jobs * (1 + settings.checkpoints)

    def skip(self, job: str) -> None:
        """Counts a job that needs no training."""
        self._report(f"found {job}", 1 + self._settings.checkpoints)

    def notes(self, job: str, tasks: tuple[Task, ...], name: str) -> Notes:
        """The notes of a whole training."""
        settings = self._settings
        self._report(f"compiling {job}")
        problem = self._problem(tasks)
        train_split, validation, test = map(problem.select, self._splits)
        probe = jax.tree.map(lambda array: array[:NUM_PROBED], train_split)
        program = train.build(problem, name, settings, train_split)
        plain, plain_seconds = self._plain, []  # always the same steps from its start
        self._report(f"training {job}", 1)
        state, seconds, over_time, looks = program.state, [], [], []
        for i, indices in enumerate(self._chunks):
            if i in (0, len(self._chunks) // 2):
                plain_seconds.append(_turn(plain, plain.state, self._splits[0], indices)[0])
            spent, state, record = _turn(program, state, train_split, indices)
            seconds.append(spent)
            over_time.append(record)
            looks.append(
                (
                    problem.evaluate(state.params, validation),
                    problem.evaluate(state.params, test),
                    problem.cosines(state.params, probe),
                )
            )
            self._report(f"training {job}", 1)
        rates = train.configurations(name, settings, len(problem.names)).rate
        models = len(rates) / len(settings.learning_rates)  # for each one of the plain step
        losses, weights = (
            np.concatenate(curves, axis=2) for curves in zip(*over_time, strict=True)
        )
        measured = [task.name for task in problem.measured]
        validations, tests, cosines = (
            np.stack(values, axis=2) for values in zip(*looks, strict=True)
        )
        return {
            "rate": np.tile(rates, (settings.seeds, 1)),
            "wall_ratio": np.array(np.median(seconds) / np.median(plain_seconds) / models),
            "flops_ratio": np.array(program.flops_per_step / plain.flops_per_step),
            **_by_name("train_loss", problem.names, _window_means(losses, settings)),
            **_by_name("weights", problem.names, _window_means(weights, settings)),
            **_by_name("validation", measured, validations),
            **_by_name("test", measured, tests),
            **_by_name("cosine", problem.pairs, cosines),
        }

    @functools.cached_property
    def _plain(self) -> train.Program:
        problem = self._problem(self._dataset.tasks)
        return train.build(problem, train.PLAIN, self._settings, self._splits[0])

    def _problem(self, tasks: tuple[Task, ...]) -> Problem:
        """One problem for all strategies: what it compiles to measure a model is theirs too."""
        if tasks not in self._problems:
            self._problems[tasks] = Problem(self._dataset, tasks, self._settings)
        return self._problems[tasks]

    def _report(self, what: str, done: int = 0) -> None:
        self._done += done
        self._on_progress(what, self._done, self.total)


def _turn(
    program: train.Program, state: train.TrainState, split: Split, indices: jax.Array
) -> tuple[float, train.TrainState, train.Record]:
    """Trains for one chunk; the seconds it took, and what came of it."""
    start = time.perf_counter()
    state, record = jax.block_until_ready(program.advance(state, split, indices))
    return time.perf_counter() - start, state, record


def _by_name(title: str, names: Sequence[str], values: np.ndarray) -> Notes:
    """Values ``(S, C, T, K)`` as one array a name; none where the last axis is empty."""
    return {f"{title}/{name}": values[..., i] for i, name in enumerate(names[: values.shape[-1]])}


def _window_means(curves: np.ndarray, settings: Settings) -> np.ndarray:
    return np.stack([curves[:, :, w].mean(axis=2) for w in _windows(settings)], axis=2)


def _windows(settings: Settings) -> list[np.ndarray]:
    return np.array_split(np.arange(settings.steps), min(NUM_WINDOWS, settings.steps))


def _facts(dataset: Dataset, settings: Settings) -> dict[str, Any]:
    """What the numbers depend on; the rest of `versions()` may differ."""
    data = hashlib.sha256(usedforsecurity=False)
    for array in jax.tree.leaves((dataset.train, dataset.validation, dataset.test)):
        data.update(np.ascontiguousarray(array).data)
    found = versions()
    return {
        "dataset": dataset.name,
        "sha256": data.hexdigest(),
        "settings": dataclasses.asdict(settings),
        "versions": {name: found[name] for name in ("mtl-optax", "jax", "optax")},
    }


def _save(path: Path, notes: Notes, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, allow_pickle=False, facts=np.array(json.dumps(facts)), **notes)
    part.replace(path)  # so that an interruption leaves no half file


def _load(path: Path, facts: dict[str, Any]) -> Notes | None:
    if not path.exists():
        return None
    with np.load(path) as file:
        notes = dict(file)
    return notes if notes.pop("facts").item() == json.dumps(facts) else None


def versions() -> dict[str, str]:
    """The versions that a result depends on, and the machine's kind."""
    packages = ("mtl-optax", "jax", "jaxlib", "optax", "flax", "numpy")
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": f"{platform.system()} {platform.machine()}, {num_cpus()} CPU cores",
    }


def num_cpus() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
