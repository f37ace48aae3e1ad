"""A comparison from start to results: compile every strategy, train them in turns, take notes."""

import collections
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from benchmarks import train
from benchmarks.data import TASK_KINDS, Dataset
from benchmarks.problem import Problem, Settings, batch_order
from mtl_optax import catalog

EQUAL_WEIGHTS = "sum"  # the strategy that all others are held against
NUM_WINDOWS = 60  # losses and weights are kept as means over this many windows of steps


@dataclasses.dataclass
class _Run:
    problem: Problem
    program: train.Program
    state: train.TrainState
    seconds: list[float] = dataclasses.field(default_factory=list)
    records: list[train.Record] = dataclasses.field(default_factory=list)
    metrics: list[dict[str, jax.Array]] = dataclasses.field(default_factory=list)


def run(
    dataset: Dataset,
    strategies: Sequence[str],
    settings: Settings,
    *,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Trains single-task baselines, the plain step and the strategies; returns plain data.

    All of them advance by one chunk in turn, so a slow moment of the machine hits all alike, and a
    strategy's time is divided by the plain step's time of the same round.

    Args:
      dataset: what to train on.
      strategies: names in the catalog; equal weights are always added.
      settings: what all strategies share.
      on_progress: called with the name of what comes next, the work done and the work to do, in
        chunks; compiling a strategy counts as one.

    Returns:
      A dict of numbers, strings, lists and dicts, ready for JSON.
    """
    strategies = list(dict.fromkeys((EQUAL_WEIGHTS, *strategies)))
    order = batch_order(settings, len(dataset.train.inputs))
    chunks = np.split(order, settings.checkpoints, axis=1)
    train_split, test_split = jax.device_put((dataset.train, dataset.test))

    started = time.perf_counter()
    together = Problem(dataset, dataset.tasks, settings)
    jobs = {name: (together, name) for name in (train.PLAIN, *strategies)}
    for task in dataset.tasks:
        jobs[_single(task.name)] = (Problem(dataset, (task,), settings), EQUAL_WEIGHTS)
    total, done = len(jobs) * (1 + len(chunks)), 0
    runs: dict[str, _Run] = {}
    for job, (problem, name) in jobs.items():
        on_progress(f"compiling {job}", done, total)
        program = train.build(problem, name, settings, train_split)
        runs[job] = _Run(problem, program, program.state)
        done += 1
    compiled = time.perf_counter()
    turns = collections.deque(runs)
    for indices in map(jax.numpy.asarray, chunks):
        for job in turns:
            on_progress(f"training {job}", done, total)
            _advance(runs[job], train_split, test_split, indices)
            done += 1
        turns.rotate(1)  # so that nobody always has the same place in a round
    on_progress("done", done, total)
    trained = time.perf_counter()

    per_chunk = settings.steps_per_checkpoint
    windows = np.array_split(np.arange(settings.steps), min(NUM_WINDOWS, settings.steps))
    notes = {job: _notes(one, runs[train.PLAIN], windows) for job, one in runs.items()}
    return {
        "dataset": _describe(dataset),
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
        "seconds": {"compile": compiled - started, "train": trained - compiled},
        "checkpoint_steps": [per_chunk * (i + 1) for i in range(len(chunks))],
        "window_steps": [float(window.mean()) + 1 for window in windows],
        "equal_weights": EQUAL_WEIGHTS,
        "plain": notes[train.PLAIN],
        "single_task": {task.name: notes[_single(task.name)] for task in dataset.tasks},
        "strategies": {
            name: {
                "kind": catalog.STRATEGIES[name].kind,
                "needs": catalog.STRATEGIES[name].needs,
                "summary": catalog.STRATEGIES[name].summary,
                "paper": catalog.STRATEGIES[name].paper,
                **notes[name],
            }
            for name in strategies
        },
    }


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
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _single(task: str) -> str:
    return f"single task: {task}"


def _advance(one: _Run, train_split: Any, test_split: Any, indices: jax.Array) -> None:
    start = time.perf_counter()
    one.state, record = jax.block_until_ready(one.program.advance(one.state, train_split, indices))
    one.seconds.append(time.perf_counter() - start)
    one.records.append(record)
    one.metrics.append(one.problem.evaluate(one.state.params, test_split))


def _notes(one: _Run, plain: _Run, windows: list[np.ndarray]) -> dict[str, Any]:
    """What is kept of a run: every ``(S, ...)`` array as one list a seed."""

    def window_means(curves: list[dict[str, jax.Array]]) -> dict[str, Any]:
        whole = {task: np.concatenate([c[task] for c in curves], axis=1) for task in curves[0]}
        return {
            task: _rounded(np.stack([curve[:, w].mean(axis=1) for w in windows], axis=1))
            for task, curve in whole.items()
        }

    ratios = np.divide(one.seconds, plain.seconds)
    return {
        "test": {
            task: _rounded(np.stack([m[task] for m in one.metrics], axis=1))
            for task in one.metrics[0]
        },
        "train_loss": window_means([record.losses for record in one.records]),
        "weights": window_means([record.weights for record in one.records]),
        "seconds": _rounded(np.asarray(one.seconds)),
        "wall_ratio": float(np.median(ratios)),
        "flops_ratio": one.program.flops_per_step / plain.program.flops_per_step,
    }


def _rounded(array: np.ndarray) -> Any:
    """Nested lists with six digits, the precision of float32, which keeps the file small."""
    return [_rounded(row) for row in array] if array.ndim else float(f"{array:.6g}")


def _describe(dataset: Dataset) -> dict[str, Any]:
    kinds = {task.name: TASK_KINDS[task.kind] for task in dataset.tasks}
    return {
        "name": dataset.name,
        "title": dataset.title,
        "source": dataset.source,
        "num_train": len(dataset.train.inputs),
        "num_test": len(dataset.test.inputs),
        "tasks": [task.name for task in dataset.tasks],
        "metric": {task: kind.metric_name for task, kind in kinds.items()},
        "higher_is_better": {task: kind.higher_is_better for task, kind in kinds.items()},
    }
