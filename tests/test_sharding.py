"""A step on many devices: the same result as on one, and no more talk between them than it needs.

The devices live in processes of their own: 8 simulated ones, and 2 in each of two processes.
"""

import collections
import json
import math
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from benchmarks import scaling
from tests import sharding_worker as worker

ROOT = pathlib.Path(__file__).parent.parent
RUNS = [run[0] for two in (False, True) for run in worker.runs(two)]
PARAMS = {name: list(leaf.shape) for name, leaf in worker.problem()[0].items()}
SHARED, K = ("first", "second"), worker.K


@pytest.fixture(scope="module")
def results():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # What the machine code is optimised for does not matter here, what compiling it takes does.
    env = {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | os.environ
    env |= {"JAX_PLATFORMS": "cpu"}
    commands = [[], [address, "0"], [address, "1"]]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharding_worker", *arguments],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in commands
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    # The collectives of two processes greet each other on stdout first.
    return {k: v for out, _ in outputs[:2] for k, v in json.loads(out.splitlines()[-1]).items()}


@pytest.mark.parametrize("run", RUNS)
def test_same_parameters_as_on_one_device(results, run):
    assert "failure" not in results[run], results[run]["failure"]
    assert results[run]["error"] < 1e-5
    assert results[run]["moved"] > 1e-2


@pytest.mark.parametrize("gramian", ["rows", "ghost", "streamed", "columns"])
def test_devices_that_hold_parts_of_the_parameters_add_up(results, gramian):
    assert results[f"tensor parallel {gramian}"] < 2e-6


@pytest.mark.parametrize("kind", worker.AXIS_KINDS)
def test_tasks_along_an_axis_are_those_of_one_device(results, kind):
    assert results[f"axis {kind}"] < 5e-6


@pytest.mark.parametrize(
    "run", [run for run in RUNS if run.split()[0] not in ("processes", "explicit")]
)
def test_gathers_what_the_plain_step_gathers(results, run):
    gathered, plain = (
        collections.Counter(tuple(shape) for op in found.get("all-gather", []) for shape in op)
        for found in (_collectives(results, run), _collectives(results, _plain(run)))
    )
    # A task after the other, or J(Jᵀe), the trunk's weights are used once more.
    again = 2 if run.endswith(("sequential", "columns")) else 1
    assert gathered.keys() == plain.keys()
    assert all(gathered[shape] <= again * plain[shape] for shape in plain)
    assert gathered.keys() <= {tuple(shape) for shape in PARAMS.values()}


@pytest.mark.parametrize("layout", [*worker.LAYOUTS, "shard_map"])
def test_loss_only_adds_the_losses(results, layout):
    numbers = [_reduced(_collectives(results, f"{layout} {s}")) for s in ("uncertainty", "plain")]
    assert numbers[0] - numbers[1] <= K


@pytest.mark.parametrize("layout", ["fsdp", "both", "shard_map"])
def test_gramian_adds_one_small_sum_a_leaf(results, layout):
    found = _collectives(results, f"{layout} upgrad", "entry")
    sums = [shape for op in found["all-reduce"] for shape in op if shape == [K, K]]
    assert len(sums) == len(SHARED)
    assert sum([K, K] in op for op in found["all-reduce"]) <= (1 if layout == "shard_map" else 2)
    # Besides: rows are summed over the examples where the plain step sums one gradient.
    plain = _collectives(results, f"{layout} plain", "entry")
    assert _reduced(found) - len(sums) * K**2 <= K * _reduced(plain)


def test_columns_sum_one_row_at_a_time(results):
    found = _collectives(results, "both upgrad columns")
    numbers = max(math.prod(shape) for op in found["all-reduce"] for shape in op)
    assert numbers <= max(math.prod(shape) for shape in PARAMS.values())


def test_moved_bytes_count_every_turn_of_a_loop():
    hlo = """
%body (t: f32[4]) -> f32[4] {
  %sum = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %all = f32[8]{0} all-gather(%x), dimensions={0}
  %w = f32[4]{0} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert scaling.moved_bytes(hlo) == (8 * 4 + 5 * (4 * 4 + 6 * 2), 8 * 4)


def _plain(run):
    return f"{run.split()[0]} plain"


def _collectives(results, run, where="collectives"):
    assert "failure" not in results[run], results[run]["failure"]
    return results[run][where]


def _reduced(found):
    """How many numbers are summed over devices."""
    return sum(math.prod(shape) for op in found["all-reduce"] for shape in op)
