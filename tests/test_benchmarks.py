"""The comparison end to end, on a small subset and few steps."""

import dataclasses
import html
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compare, experiment, summary, train
from benchmarks.data.digits import multimnist
from benchmarks.problem import Problem, Settings, batch_order
from mtl_optax.metrics import delta_m

SETTINGS = Settings(
    seeds=2, steps=12, checkpoints=3, batch_size=32, learning_rate=3e-3, hidden=(24, 16)
)
STRATEGIES = ("dwa", "pcgrad")


@pytest.fixture(scope="module")
def dataset():
    return multimnist(sizes=(400, 100, 200))


@pytest.fixture(scope="module")
def progress():
    return []


@pytest.fixture(scope="module")
def folder(dataset, progress, tmp_path_factory):
    """What a run leaves behind."""
    out = tmp_path_factory.mktemp("demo")
    results = experiment.run(
        dataset, STRATEGIES, SETTINGS, on_progress=lambda *report: progress.append(report)
    )
    compare.save({"command": "python -m benchmarks.compare --out <here>", **results}, out)
    return out


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_results_hold_every_run(results):
    assert list(results["strategies"]) == ["sum", *STRATEGIES]
    assert list(results["single_task"]) == ["left", "right"]
    assert results["checkpoint_steps"] == [4, 8, 12]
    assert results["settings"]["hidden"] == [24, 16]
    for name in ("python", "jax", "jaxlib", "optax", "machine"):
        assert results["versions"][name]
    for run in (results["plain"], *results["strategies"].values()):
        for task in ("left", "right"):
            accuracies = np.asarray(run["test"][task])
            assert accuracies.shape == (2, 3)  # seeds, checkpoints
            assert np.all((accuracies >= 0) & (accuracies <= 1))
            losses = np.asarray(run["train_loss"][task])
            assert losses.shape == (2, len(results["window_steps"]))
            assert np.all(np.isfinite(losses))
        assert len(run["seconds"]) == 3
        assert run["wall_ratio"] > 0
    assert set(results["strategies"]["dwa"]["weights"]) == {"left", "right"}
    assert set(results["single_task"]["left"]["test"]) == {"left"}


def test_training_learns(results):
    for run in results["strategies"].values():
        for losses in run["train_loss"].values():
            assert np.mean(losses, axis=0)[-1] < np.mean(losses, axis=0)[0]


def test_numbers_of_the_table_follow_from_the_results(results, folder):
    def accuracies(run, task):
        return np.asarray(run["test"][task])[:, -1]

    rows = {row.name: row for row in summary.rows(results)}
    pcgrad, equal = results["strategies"]["pcgrad"], results["strategies"]["sum"]
    left = accuracies(pcgrad, "left")
    assert rows["pcgrad"].metrics["left"].mean == pytest.approx(left.mean())
    assert rows["pcgrad"].metrics["left"].error == pytest.approx(abs(left[0] - left[1]) / 2)

    def gains(run):
        pairs = [
            (accuracies(run, t), accuracies(results["single_task"][t], t))
            for t in ("left", "right")
        ]
        return 100 * np.mean([(m - b) / b for m, b in pairs], axis=0)

    np.testing.assert_allclose(rows["pcgrad"].delta_m.mean, gains(pcgrad).mean(), rtol=1e-4)
    np.testing.assert_allclose(
        rows["pcgrad"].gain.mean, (gains(pcgrad) - gains(equal)).mean(), atol=1e-3
    )
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert rows["pcgrad"].metrics["left"].text(scale=100) in page
    assert html.escape(summary.conclusion(results)) in page
    assert html.escape(results["command"]) in page


def test_equal_weights_is_the_plain_step(results):
    plain, equal = results["plain"], results["strategies"]["sum"]
    for task in ("left", "right"):
        np.testing.assert_allclose(equal["train_loss"][task], plain["train_loss"][task], rtol=1e-4)
    assert equal["flops_ratio"] == pytest.approx(1, abs=0.005)
    assert results["strategies"]["pcgrad"]["flops_ratio"] > 1.1


def test_report_loads_nothing_from_elsewhere(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["'](.{0,20})""", page)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(|https?:", page)


def test_from_draws_the_same_report_again(folder, tmp_path, capsys):
    compare.main(["--from", str(folder / "results.json"), "--out", str(tmp_path)])
    assert "pcgrad" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    for name in ("results.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_progress_moves_to_the_end(folder, progress):
    done = [step for _, step, _ in progress]
    assert done == sorted(done)
    assert progress[-1] == ("done", 6 * (1 + 3), 6 * (1 + 3))


def test_a_seed_trains_alike_alone_and_among_others(dataset):
    def losses(settings):
        problem = Problem(dataset, dataset.tasks, settings)
        program = train.build(problem, "pcgrad", settings, dataset.train)
        indices = jnp.asarray(batch_order(settings, len(dataset.train.inputs)))
        _, record = program.advance(program.state, dataset.train, indices)
        return np.stack([record.losses[task][0] for task in problem.names])

    settings = dataclasses.replace(SETTINGS, steps=6, checkpoints=1)
    np.testing.assert_allclose(
        losses(settings), losses(dataclasses.replace(settings, seeds=1)), rtol=1e-4
    )


def test_single_task_models_start_from_the_same_trunk(dataset):
    together = Problem(dataset, dataset.tasks, SETTINGS)
    alone = Problem(dataset, dataset.tasks[:1], SETTINGS)
    kernels = [p.params["encoder"]["layers"][0]["kernel"][...] for p in (together, alone)]
    np.testing.assert_array_equal(*kernels)
    assert not np.array_equal(kernels[0][0], kernels[0][1])  # seeds differ


def test_batches_are_epochs_of_permutations():
    settings = dataclasses.replace(SETTINGS, steps=24)
    order = batch_order(settings, 400)
    assert order.shape == (2, 24, 32)
    epoch = order[0, :12].ravel()
    assert len(set(epoch)) == epoch.size
    assert not np.array_equal(order[0], order[1])
    with pytest.raises(ValueError, match="at most the 20"):
        batch_order(settings, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 10}, "multiple of checkpoints"),
        ({"seeds": 0}, "seeds is 0"),
        ({"hidden": ()}, "hidden is empty"),
    ],
)
def test_bad_settings_say_what_to_change(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_command_line_reports_bad_settings():
    with pytest.raises(SystemExit, match="error: steps is 7"):
        compare.main(["--steps", "7"])


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "data",
        "strategies",
        "seeds",
        "steps",
        "out",
        "batch-size",
        "learning-rate",
        "from",
    ):
        assert f"--{option}" in text


def test_conclusion_says_who_beats_equal_weights(results):
    equal = results["strategies"]["sum"]

    def with_accuracies(left, right):
        test = {"left": [[v] for v in left], "right": [[v] for v in right]}
        strategies = {"sum": equal, "pcgrad": {**results["strategies"]["pcgrad"], "test": test}}
        return summary.conclusion({**results, "strategies": strategies})

    assert "Better than equal weights by more than two standard errors: pcgrad." in (
        with_accuracies([0.99, 0.99], [0.99, 0.99])
    )
    assert "Worse by more than two: pcgrad" in with_accuracies([1e-3, 1e-3], [1e-3, 1e-3])
    same = [np.asarray(equal["test"][task])[:, -1] for task in ("left", "right")]
    assert "No strategy is better" in with_accuracies(*same)


@pytest.mark.parametrize(("seeds", "share"), [(2, 0.2952), (5, 0.1161), (1000, 0.0458)])
def test_two_errors_mean_what_student_says(seeds, share):
    assert summary.beyond_two_errors(seeds) == pytest.approx(share, abs=2e-4)


def test_delta_m_of_the_single_task_models_is_zero(results):
    assert summary.rows(results)[0].delta_m.mean == 0
    assert float(delta_m([0.5, 0.5], [0.5, 0.5])) == 0
