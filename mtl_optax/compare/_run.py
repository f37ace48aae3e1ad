"""A comparison from start to results: train every strategy, take notes, choose what was tuned.

Each finished strategy is saved, so an interrupted comparison goes on where it stopped.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mtl_optax as mtl
from mtl_optax.compare import _selection as selection, _store as store, _train as train
from mtl_optax.compare._problem import Problem, Settings, shortened
from mtl_optax.compare._selection import EQUAL_WEIGHTS, INVERSE_LOSSES, TUNED, Notes
from mtl_optax.compare._setup import Setup
from mtl_optax.compare._source import why_not_halved
from mtl_optax.compare._summary import SINGLE_TASK

NUM_WINDOWS = 60  # losses and weights are kept as means over this many windows of steps
RESERVED = (INVERSE_LOSSES, TUNED, SINGLE_TASK, train.STATIC, train.PLAIN)
STEADY = 1.05  # two runs of the plain step that differ by more say nothing about time

Progress = Callable[[str, int, int], None]
Finished = Callable[[str, dict[str, float]], None]


def compared(
    problem: Problem,
    strategies: Sequence[str],
    settings: Settings,
    folder: Path | None = None,
    *,
    on_progress: Progress = lambda what, done, total: None,
    on_finished: Finished = lambda name, metrics: None,
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, Any]:
    """Trains equal weights, static weights of other kinds, single-task models and the strategies.

    Args:
      problem: what to train on.
      strategies: names in the catalog, or "all"; the baselines are always added.
      settings: what all strategies share.
      folder: where each finished strategy is saved, and found again if everything that its result
        depends on is the same. None keeps nothing.
      on_progress: called with the name of what comes next, the work done and the work to do.
      on_finished: called with each strategy that is done, and its validation metrics.
      warn: called with a line about files that could not be used.

    Returns:
      A dict of numbers, strings, lists and dicts, ready for JSON.
    """
    strategies = _known(strategies)
    with store.locked(folder) if folder else contextlib.nullcontext():
        setup = Setup(problem, settings)
        names, skipped = _chosen(setup, strategies)
        jobs = [EQUAL_WEIGHTS, train.STATIC, *names]
        common = {} if folder is None else {**setup.facts(), "versions": _packages()}
        trainer = _Trainer(setup, on_progress, jobs)
        # Whatever is wrong with one of them is said before any is trained.
        of_each = {name: trainer.facts(name) for name in jobs}
        notes: dict[str, Notes] = {}
        for name in jobs:
            path, facts, known = None, {}, None
            if folder is not None:
                path = folder / f"{_file_name(name)}.run"
                facts = {**common, "settings": _asked(settings), **of_each[name]}
                known = store.load(path, facts, warn)
            if known:
                trainer.skip(name)
            else:
                known = trainer.notes(name)
                if path:
                    store.save(path, known, facts)
            notes[name] = known
            on_finished(name, selection.glance(setup, known))
        on_progress("done", trainer.total, trainer.total)
    return {
        **selection.choose(setup, names, notes, trainer.variants),
        "skipped": skipped,
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
        "checkpoint_steps": [
            settings.steps_per_checkpoint * (i + 1) for i in range(settings.checkpoints)
        ],
        "window_steps": [float(window.mean()) + 1 for window in _windows(settings)],
    }


def _known(strategies: Sequence[str]) -> list[str]:
    """The names that are given, each of the catalog or "all"."""
    strategies = [strategies] if isinstance(strategies, str) else [*strategies]
    for name in strategies:
        if not isinstance(name, str):
            raise ValueError(
                f"strategies has {shortened(name)} in it, expected names of the catalog, such as "
                "'upgrad'; mtl.register gives one of yours a name"
            )
        if name not in ("all", *mtl.STRATEGIES):
            mtl.make(name, 1)  # raises, and says which names are near
        if name in RESERVED:
            raise ValueError(
                f"a strategy is called {name!r}, as what a comparison always has: register it by "
                "another name"
            )
    return strategies


def _chosen(setup: Setup, strategies: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The names without equal weights, and of "all" those that can't be run, with the reason."""
    problem, skipped = setup.problem, {}
    given = {"validation_fn", "losses_fn"} | ({"kpis"} if problem.kpis is not None else set())
    for name in mtl.STRATEGIES:
        for argument in sorted({*mtl.STRATEGIES[name].extra_args} - given):
            skipped[name] = f"needs {argument}"
    if why := why_not_halved(problem, setup.source):
        for name, row in mtl.STRATEGIES.items():
            if row.needs in ("batches", "validation"):
                skipped[name] = f"halves a batch, and {why}"
    if "weights" not in problem.options:
        skipped["weights"] = "needs weights of yours, in options"
    everything = [name for name in mtl.STRATEGIES if name not in skipped]
    if "all" in strategies:
        return [name for name in everything if name != EQUAL_WEIGHTS], skipped
    for name in strategies:
        if name in skipped:
            raise ValueError(f"{name} {skipped[name]}: leave it out, or change the Problem")
    return [name for name in dict.fromkeys(strategies) if name != EQUAL_WEIGHTS], {}


class _Trainer:
    """Trains one job after the other, and times each against the plain step beside it."""

    def __init__(self, setup: Setup, on_progress: Progress, jobs: list[str]):
        self._setup, self._on_progress = setup, on_progress
        grids = {name: train.grid(name, setup) for name in jobs if name != train.STATIC}
        # Static weights get at least as many trials as any strategy.
        count = max(setup.settings.candidates, *map(len, grids.values()))
        self.variants: dict[str, list[Any]] = {
            **grids,
            train.STATIC: train.static_weights(setup, count),
        }
        self._done = 0
        self.total = sum(map(self._work, jobs))

    def skip(self, name: str) -> None:
        """Counts a job that needs no training."""
        self._report(f"found {name}", self._work(name))

    def facts(self, name: str) -> dict[str, Any]:
        """What the notes of a job depend on, beside what all depend on."""
        self._report(f"checking {name}")
        return train.facts(self._setup, name, self._variants(name))

    def notes(self, name: str) -> Notes:
        """The notes of a whole training under every configuration."""
        self._report(f"compiling {name}")
        variants = self._variants(name)
        program, parts = None, []
        for configs in train.blocks(self._setup, variants):
            if program is None:
                program = train.build(self._setup, name, configs)
                self._report(f"training {name}", 1)
            parts.append(self._notes(name, program, configs))
        ratios = {"wall_ratio", "flops_ratio"}
        joined = {
            title: np.concatenate([part[title] for part in parts], axis=1)
            for title in parts[0]
            if title not in ratios
        }
        return joined | {
            title: np.array(np.mean([part[title] for part in parts])) for title in ratios
        }

    def _notes(self, name: str, program: train.Program, configs: train.Config) -> Notes:
        setup, settings = self._setup, self._setup.settings
        data, plain = setup.source.data, self._plain
        state, seconds, over_time, looks = program.state, [], [], []
        per_look = settings.steps_per_checkpoint // setup.source.steps
        plain_seconds = [self._plain_turn()]
        for i, items in enumerate(setup.source.items()):
            spent, state, record = _turn(program, state, configs, data, items)
            seconds.append(spent)
            over_time.append(record)
            if (i + 1) % per_look == 0:
                looks.append(
                    (
                        *setup.evaluate(state.params, state.rest),
                        *setup.geometry(state.params, state.rest, setup.source.probe),
                    )
                )
                self._report(f"training {name}", 1)
        plain_seconds.append(self._plain_turn())
        steady = max(plain_seconds) <= STEADY * min(plain_seconds)
        models = configs.rate.shape[1] / self._plain_configs.rate.shape[1]
        ratio = np.median(seconds) / np.median(plain_seconds) / models
        losses, weights = (
            np.concatenate(curves, axis=2) for curves in zip(*over_time, strict=True)
        )
        validation, test, cosines, norms = (
            np.stack([np.asarray(value) for value in values], axis=2)
            for values in zip(*looks, strict=True)
        )
        return {
            "wall_ratio": np.array(ratio if steady else np.nan),
            "flops_ratio": np.array(program.flops_per_step / plain.flops_per_step),
            "train_loss": _window_means(losses, settings),
            "weights": _window_means(weights, settings),
            "validation": validation,
            "test": test,
            "cosine": cosines,
            "norm": norms,
        }

    def _plain_turn(self) -> float:
        """The seconds of the plain step's first chunk, always from its start."""
        source = self._setup.source
        first = self._plain.state, self._plain_configs, source.data, source.first
        return _turn(self._plain, *first)[0]

    @functools.cached_property
    def _plain_configs(self) -> train.Config:
        return next(train.blocks(self._setup, [{}]))

    @functools.cached_property
    def _plain(self) -> train.Program:
        return train.build(self._setup, train.PLAIN, self._plain_configs)

    def _work(self, name: str) -> int:
        """Compiling, and a look at each checkpoint of each block."""
        looks = self._setup.settings.checkpoints
        return 1 + looks * sum(1 for _ in train.blocks(self._setup, self._variants(name)))

    def _variants(self, name: str) -> list[Any]:
        """Options, or of `STATIC` the weights without their kind."""
        variants = self.variants[name]
        return [weights for _, weights in variants] if name == train.STATIC else variants

    def _report(self, what: str, done: int = 0) -> None:
        self._done += done
        self._on_progress(what, self._done, self.total)


def _turn(
    program: train.Program, state: train.TrainState, configs: train.Config, data: Any, items: Any
) -> tuple[float, train.TrainState, train.Record]:
    """Trains for one chunk; the seconds it took, and what came of it."""
    start = time.perf_counter()
    state, record = jax.block_until_ready(program.advance(state, configs, data, items))
    return time.perf_counter() - start, state, record


def _window_means(curves: np.ndarray, settings: Settings) -> np.ndarray:
    """Means over windows of the axis of steps, of the steps in which a task was present."""
    seen = np.isfinite(curves)
    filled = np.where(seen, curves, 0.0)
    return np.stack(
        [
            np.where((n := seen[:, :, w].sum(axis=2)) > 0, filled[:, :, w].sum(axis=2), np.nan)
            / np.maximum(n, 1)
            for w in _windows(settings)
        ],
        axis=2,
    )


def _windows(settings: Settings) -> list[np.ndarray]:
    return np.array_split(np.arange(settings.steps), min(NUM_WINDOWS, settings.steps))


def _file_name(name: str) -> str:
    """A name that every system takes, of its own for every job."""
    if re.fullmatch(r"[a-z][a-z0-9_]{0,60}", name):
        return name
    digest = hashlib.sha256(name.encode(), usedforsecurity=False).hexdigest()[:8]
    return f"{re.sub(r'[^a-z0-9_]', '_', name.lower())[:40]}-{digest}"


def _asked(settings: Settings) -> dict[str, Any]:
    """The settings without those that only say how many other models are trained."""
    given = dataclasses.asdict(settings)
    return {name: value for name, value in given.items() if name not in ("candidates", "models")}


def _packages() -> dict[str, str]:
    found = versions()
    return {name: found[name] for name in ("mtl-optax", "jax", "optax")}


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
