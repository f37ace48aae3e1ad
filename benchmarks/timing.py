"""Calls timed side by side, the peer they are timed against, and how the numbers are kept."""

import importlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from mtl_optax.compare import _run as experiment

OURS, PEER = "mtl_optax", "TorchJD"
RESULTS = Path(__file__).parent / "results"
# What glibc's allocator must be told to keep the memory that a step frees for the next one.
KEEPING = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": f"{2**35}",
    "MALLOC_TOP_PAD_": f"{2**28}",
}
_LEAST_SECONDS = 0.01  # a sample repeats a shorter call until it takes this long


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    max_seconds: float = 60.0,
    rest: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times calls in turns, so that a slow moment of the machine hits all alike.

    The first call of each, which compiles, is not timed. The order is drawn anew each round, and
    the machine rests before each turn: what follows a framework whose threads still spin is slowed
    down. Nothing counts before a call's arrays are ready. A short call is repeated within its turn,
    after one that only brings its data back to the caches; on a GPU the repeats are queued.

    Args:
      calls: what to time, by name; each returns what it computes.
      rounds: the most turns each call gets.
      max_seconds: no round begins later than this; the first always runs.
      rest: seconds of it before each turn.
      clock: what tells the seconds. `time.process_time`, in a process that is held to one core,
        leaves out what other processes take.

    Returns:
      For each name the seconds of a call, one number a round.
    """
    repeats = {}
    for name, call in calls.items():
        _wait(call())
        repeats[name] = max(1, round(_LEAST_SECONDS / _seconds(call, 1, clock)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, draw, begin = list(calls), random.Random(0), time.perf_counter()
    for turn in range(rounds):
        if turn and time.perf_counter() - begin > max_seconds:
            break
        draw.shuffle(order)
        for name in order:
            time.sleep(rest)
            if repeats[name] > 1:
                _wait(calls[name]())
            times[name].append(_seconds(calls[name], repeats[name], clock))
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median seconds of each call."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over the rounds of one call's time over another's of the same round."""
    pairs = zip(times[name], times[base], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def keep_memory() -> None:
    """Starts this program anew where its allocator would give memory back after each step.

    glibc does so with buffers of more than 32 MB. To clear their pages again takes a step whose
    buffers are just above that a fifth longer, in either framework, whatever it computes.
    """
    if not KEEPING.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | KEEPING)


def load_peer() -> tuple[Any, Any] | None:
    """The modules `(torch, torchjd)`, or None, after a line that says how to get them.

    Torch gets as many threads as XLA takes: one a core. They sleep when they have nothing to do,
    in place of spinning, which would slow down what runs next.
    """
    os.environ.update(KMP_BLOCKTIME="0", OMP_WAIT_POLICY="PASSIVE")
    try:
        torch, torchjd = importlib.import_module("torch"), importlib.import_module("torchjd")
    except ImportError as error:
        print(f"{error}: only our side runs; for the peer's, pip install 'mtl-optax[bench]'")
        return None
    torch.set_num_threads(experiment.num_cpus())
    return torch, torchjd


def save(name: str, payload: Mapping[str, Any]) -> Path:
    """Writes `results/<name>.json`: the payload after the machine and the versions."""
    versions = experiment.versions()
    for package in ("torch", "torchjd"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"versions": versions, **payload}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _seconds(call: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    # A GPU works its calls off one after the other, while the next are being launched.
    queued = jax.default_backend() != "cpu"
    begin = clock()
    for _ in range(repeats):
        result = call()
        if not queued:
            _wait(result)
    _wait(result)
    return (clock() - begin) / repeats


def _wait(result: Any) -> None:
    jax.block_until_ready(result)
    if jax.default_backend() == "gpu" and "torch" in sys.modules:
        sys.modules["torch"].cuda.synchronize()
