"""The benchmark of aggregators: what it measures, and that its gaps tell right from wrong."""

import numpy as np
from rich.console import Console

from benchmarks import aggregate_time, cost_report
from benchmarks.gaps import GAPS


def test_our_gaps_are_small_and_those_of_wrong_weights_are_not():
    options = aggregate_time.Options(
        tasks=(), gramian_tasks=(4,), many_tasks=(), peers=False, rounds=1
    )
    results = aggregate_time.run(options, Console(quiet=True))
    gaps = {row["strategy"]: row["gaps"] for row in results["rows"]}
    assert set(gaps) == set(aggregate_time.STRATEGIES) == {*GAPS, "pcgrad"}
    assert all(gap < 1e-5 for ours in gaps.values() for gap in ours), gaps

    rows = np.random.default_rng(0).standard_normal((4, 5))
    wrong = {name: gap(rows @ rows.T, np.array([0.1, 0.2, 0.3, 0.4])) for name, gap in GAPS.items()}
    assert all(gap > 1e-3 for gap in wrong.values()), wrong

    (table,) = aggregate_time.tables_of(results)
    assert [row[-1] for row in table.rows] == ["yes"] * len(aggregate_time.STRATEGIES)


def test_calls_in_which_torchjd_took_no_turn_fill_the_table_and_the_picture():
    both = {"strategy": "mgda", "num_tasks": 4, "columns": 8, "kind": "mixed", "gaps": [1e-7, 1e-6]}
    alone = {
        "strategy": "mgda",
        "num_tasks": 64,
        "columns": 128,
        "kind": "gaussian",
        "gaps": [1e-7],
    }
    rows = [{**both, "seconds": [0.1, 0.2], "ratio": 0.5}]
    rows += [{**alone, "seconds": [0.1], "ratio": None}]
    results = {"settings": {"columns": 1000}, "rows": rows}
    (table,) = aggregate_time.tables_of(results)
    assert [len(row) for row in table.rows] == [len(table.header)] * 2
    bars = cost_report.draw_aggregate_time(results).axes[0].patches
    assert [round(bar.get_width(), 3) for bar in bars] == [100, 100, 200]
