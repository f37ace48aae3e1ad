"""The benchmark of aggregators: what it measures, and that its gaps tell right from wrong."""

import numpy as np
from rich.console import Console

from benchmarks import aggregate_time
from benchmarks.gaps import GAPS


def test_our_gaps_are_small_and_those_of_wrong_weights_are_not():
    options = aggregate_time.Options(tasks=(), gramian_tasks=(4,), peers=False, rounds=1)
    results = aggregate_time.run(options, Console(quiet=True))
    gaps = {row["strategy"]: row["gaps"] for row in results["rows"]}
    assert set(gaps) == set(aggregate_time.STRATEGIES) == {*GAPS, "pcgrad"}
    assert all(gap < 1e-5 for ours in gaps.values() for gap in ours), gaps

    rows = np.random.default_rng(0).standard_normal((4, 5))
    wrong = {name: gap(rows @ rows.T, np.array([0.1, 0.2, 0.3, 0.4])) for name, gap in GAPS.items()}
    assert all(gap > 1e-3 for gap in wrong.values()), wrong

    (table,) = aggregate_time.tables_of(results)
    assert [row[-1] for row in table.rows] == ["yes"] * len(aggregate_time.STRATEGIES)
