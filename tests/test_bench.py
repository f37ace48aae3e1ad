"""The cost benchmarks end to end at a tiny size."""

import importlib
import json
import math

import jax
import numpy as np
import pytest
import tyro

from benchmarks import (
    compile_time,
    cost_report,
    evidence,
    kernels,
    memory,
    scaling,
    step_time,
    tables,
    timing,
)
from benchmarks.steps import EXACT, PLAIN, WAYS
from benchmarks.workloads import WORKLOADS
from mtl_optax import STRATEGIES
from mtl_optax.compare import _command as command

TINY = "tiny-mlp-3"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the three command lines write."""
    folder = tmp_path_factory.mktemp("results")
    cached = jax.config.jax_enable_compilation_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "RESULTS", folder)
        rows = ["--rows", "uncertainty"]
        step_time.main(
            ["--workloads", TINY, *rows, "upgrad, ghost", "--rounds", "2", "--no-peers", "--busy"]
        )
        memory.main(["--workload", TINY, "--rows", PLAIN])
        compile_time.main(["--workloads", TINY, *rows])
    jax.config.update("jax_enable_compilation_cache", cached)
    return {file.stem: json.loads(file.read_text()) for file in folder.iterdir()}


def test_results_say_where_they_were_measured(results):
    assert set(results) == {"step_time", "memory", "compile_time"}
    for result in results.values():
        assert result["versions"]["jax"] == jax.__version__
        assert "CPU cores" in result["versions"]["machine"]


def test_step_time_counts_in_plain_steps(results):
    workload = results["step_time"]["workloads"][TINY]
    assert (workload["num_tasks"], workload["rounds"]) == (3, 2)
    assert workload["parameters"] == (16 * 32 + 32) + (32 * 16 + 16) + 3 * (16 * 4 + 4)
    plain, control, uncertainty, ghost = workload["rows"].values()
    assert plain["ratio"] == plain["flops_ratio"] == control["flops_ratio"] == 1
    assert 1 <= uncertainty["flops_ratio"] < 1.005 < ghost["flops_ratio"]
    for row in (uncertainty, ghost):
        low, high = row["quartiles"]
        assert 0 < low <= row["ratio"] <= high
        assert row["seconds"] > 0


def test_memory_is_that_of_a_fresh_process(results):
    row = results["memory"]["rows"][PLAIN]
    assert row["temp_bytes"] > 0
    assert row["growth_bytes"] is None or 0 <= row["growth_bytes"] < 1e9


def test_compile_time_adds_its_stages(results):
    for row in results["compile_time"]["workloads"][TINY].values():
        assert row["total"] >= max(row["trace"], row["lower"], row["compile"]) > 0
        assert row["processor"] > 0


def test_report_draws_and_fills_the_page(results):
    calls = {"strategy": "mgda", "num_tasks": 2, "columns": 4, "kind": "mixed"}
    calls |= {"seconds": [1e-3], "ratio": None}
    aggregate_time = {"settings": {"columns": 4}, "rows": [{**calls, "gaps": [0.0]}]}
    committed = json.loads((timing.RESULTS / "scaling.json").read_text(encoding="utf-8"))
    results = {**results, "aggregate_time": aggregate_time, "scaling": committed}
    page = "\n".join(f"<!-- {name} -->\nold\n<!-- /{name} -->" for name in results)
    for name, (benchmark, draw, _) in cost_report.PARTS.items():
        if name not in results:
            continue
        (axis, *_) = draw(results[name]).axes
        assert axis.lines if name == "scaling" else axis.patches
        text = "\n".join(tables.markdown(cells) for cells in benchmark.tables_of(results[name]))
        page = tables.fill(page, name, text)
    assert "old" not in page
    assert "| mtl_optax: upgrad, ghost | " in page
    with pytest.raises(ValueError, match="<!-- other -->"):
        tables.fill(page, "other", "")


def test_kernels_are_counted_through_calls_and_the_dearest_branch():
    hlo = """
%few (x: f32[4]) -> f32[4] {
  ROOT %a = f32[4] add(%x, %x)
}

%many (x: f32[4]) -> f32[4] {
  %a = f32[4] fusion(%x), calls=%other
  ROOT %b = f32[4] custom-call(%a), custom_call_target="cholesky"
}

%turn (t: (f32[4])) -> (f32[4]) {
  %x = f32[4] get-tuple-element(%t), index=0
  %y = f32[4] call(%x), to_apply=%many
  ROOT %z = (f32[4]) tuple(%y)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %c = f32[4] conditional(%p, %x, %x), branch_computations={%few, %many}
  %d = f32[4] dot(%c, %c)
  ROOT %w = (f32[4]) while(%d), condition=%few, body=%turn
}
"""
    assert kernels.count(hlo) == (2 + 1, 2)


def test_growth_is_the_slope_of_logarithms():
    xs = [2, 8, 32, 128]
    assert scaling.slope(xs, [5 * x**1.5 for x in xs]) == pytest.approx(1.5)


def test_targets_name_what_is_measured():
    assert {way.group for way in WAYS.values()} - {"sketch"} == set(step_time.TARGETS)
    assert set(EXACT) == {n.split(", ")[1] for n, way in WAYS.items() if way.group == "exact"}
    assert {name for limits in step_time.TARGETS.values() for name in limits} <= set(WORKLOADS)
    assert memory.HELD in WAYS


@pytest.mark.parametrize("name", ["cnn-2", "transformer-3", "stacked-mlp-40"])
def test_workloads_start_near_chance(name):
    workload = WORKLOADS[name]()
    inputs, labels = workload.batch
    batch = inputs[:4], labels[:, :4]
    losses = jax.jit(workload.losses)(workload.params, batch)
    losses = np.stack(jax.tree.leaves(losses)).ravel()
    assert losses.shape == (workload.num_tasks,)
    np.testing.assert_allclose(losses, math.log(workload.heads[1]), rtol=0.5)
    mask = workload.last_shared(workload.params)["trunk"]
    assert mask.index(True) == len(mask) - 2  # before a ReLU


@pytest.mark.parametrize("name", evidence.RUNS)
def test_evidence_is_asked_for_by_commands_that_the_tool_understands(name):
    options = tyro.cli(command.Options, args=evidence.arguments(name))
    # Those that rest between refreshes are rows that their problem adds.
    assert {name.removesuffix("_every_10") for name in options.strategies} <= set(STRATEGIES)
    kept = json.loads((evidence.KEPT / name / "results.json").read_text())
    assert kept["command"] == evidence.told(name)
    module, function = options.problems[0].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_page_holds_what_was_found():
    page = evidence.PAGE.read_text(encoding="utf-8")
    for path in evidence.KEPT.glob("*/results.json"):
        comparison = evidence.Comparison.load(path)
        assert evidence.section(path.parent.name, comparison) in page
