"""The comparison end to end, on a small subset and few steps."""

import dataclasses
import html
import json
import multiprocessing
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compare, experiment, selection, summary, train
from benchmarks.data import Task
from benchmarks.data.digits import multimnist
from benchmarks.data.pinn import helmholtz
from benchmarks.plots import critical_difference
from benchmarks.problem import Problem, Settings, batch_order
from mtl_optax.metrics import delta_m, mean_rank

SETTINGS = Settings(
    seeds=2,
    steps=12,
    checkpoints=3,
    batch_size=32,
    learning_rates=(1e-4, 3e-3),
    hidden=(24, 16),
    candidates=3,
)
STRATEGIES = ("dwa", "pcgrad")
SIZES = (400, 100, 200)


@pytest.fixture(scope="module")
def dataset():
    return multimnist(sizes=SIZES)


@pytest.fixture(scope="module")
def progress():
    return []


@pytest.fixture(scope="module")
def folder(dataset, progress, tmp_path_factory):
    """What a run leaves behind."""
    out = tmp_path_factory.mktemp("demo")
    results = experiment.run(
        dataset,
        STRATEGIES,
        SETTINGS,
        out / "runs",
        on_progress=lambda *report: progress.append(report),
    )
    compare.save({"command": "python -m benchmarks.compare --out <here>", **results}, out)
    return out


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_results_hold_every_run(results):
    assert list(results["strategies"]) == ["sum", *STRATEGIES, "tuned weights"]
    assert list(results["single_task"]) == ["left", "right"]
    assert results["checkpoint_steps"] == [4, 8, 12]
    assert results["settings"]["hidden"] == [24, 16]
    for name in ("python", "jax", "jaxlib", "optax", "machine"):
        assert results["versions"][name]
    for run in results["strategies"].values():
        for task in ("left", "right"):
            for split in ("validation", "test"):
                accuracies = np.asarray(run[split][task])
                assert accuracies.shape == (2, 3)  # seeds, checkpoints
                assert np.all((accuracies >= 0) & (accuracies <= 1))
            losses = np.asarray(run["train_loss"][task])
            assert losses.shape == (2, len(results["window_steps"]))
            assert np.all(np.isfinite(losses))
        cosines = np.asarray(run["cosine"]["left-right"])
        assert cosines.shape == (2, 3)
        assert np.all(np.abs(cosines) <= 1)
        assert run["rate"] in SETTINGS.learning_rates
        assert run["wall_ratio"] > 0
    assert set(results["strategies"]["dwa"]["weights"]) == {"left", "right"}
    assert set(results["single_task"]["left"]["test"]) == {"left"}


def test_training_learns_and_prefers_the_larger_rate(results):
    # 12 steps of 1e-4 change next to nothing.
    for run in results["strategies"].values():
        assert run["rate"] == 3e-3
        for losses in run["train_loss"].values():
            assert np.mean(losses, axis=0)[-1] < np.mean(losses, axis=0)[0]


def test_tuned_weights_stay_on_one_point_of_the_simplex(results):
    weights = np.stack(list(results["strategies"]["tuned weights"]["weights"].values()))
    np.testing.assert_allclose(weights.sum(axis=0), 2, rtol=1e-5)
    np.testing.assert_allclose(weights, weights[:, :1, :1] * np.ones(weights.shape), rtol=1e-5)
    grid = train.configurations(train.TUNED, SETTINGS, 2)
    assert grid.weights.shape == (6, 2)
    assert len(set(grid.weights[:, 0].tolist())) == 3
    assert np.abs(grid.weights - weights[:, 0, 0]).sum(axis=1).min() < 1e-4
    assert len(results["candidates"]["left"]) == 6


def test_the_validation_set_chooses(dataset):
    """A configuration that shines on the test set alone is not taken."""
    validation, test = np.array([0.5, 0.9, np.nan]), np.array([0.99, 0.6, 0.999])

    def notes(tasks):
        by_split = {"validation": validation, "test": test}
        shape = (2, 3, 1)  # seeds, configurations, checkpoints
        values = {
            f"{split}/{task}": np.broadcast_to(value[None, :, None], shape)
            for split, value in by_split.items()
            for task in tasks
        }
        return {**values, "rate": np.tile([0.1, 0.2, 0.3], (2, 1)), "wall_ratio": np.array(1.0)}

    jobs = {name: notes(["left", "right"]) for name in ("sum", train.TUNED)}
    jobs |= {selection.single(task): notes([task]) for task in ("left", "right")}
    chosen = selection.choose(dataset, ["sum"], jobs)
    for run in (*chosen["strategies"].values(), *chosen["single_task"].values()):
        assert run["rate"] == 0.2
    assert chosen["strategies"]["sum"]["test"]["left"] == [[0.6], [0.6]]
    lower = dataclasses.replace(dataset, judged=(Task("left", 1, "field"),))
    assert selection.choose(lower, ["sum"], jobs)["strategies"]["sum"]["rate"] == 0.1


def test_numbers_of_the_table_follow_from_the_results(results, folder):
    def accuracies(run):
        return np.stack([np.asarray(run["test"][t])[:, -1] for t in ("left", "right")], axis=1)

    rows = {row.name: row for row in summary.rows(results)}
    pcgrad, equal = results["strategies"]["pcgrad"], results["strategies"]["sum"]
    left = accuracies(pcgrad)[:, 0]
    assert rows["pcgrad"].metrics["left"].mean == pytest.approx(left.mean())
    assert rows["pcgrad"].metrics["left"].error == pytest.approx(abs(left[0] - left[1]) / 2)

    singles = [results["single_task"][t]["test"][t] for t in ("left", "right")]
    baseline = np.asarray(singles)[:, :, -1].T

    def gains(run):
        return 100 * np.mean((accuracies(run) - baseline) / baseline, axis=1)

    np.testing.assert_allclose(rows["pcgrad"].delta_m.mean, gains(pcgrad).mean(), rtol=1e-4)
    np.testing.assert_allclose(
        rows["pcgrad"].gain.mean, (gains(pcgrad) - gains(equal)).mean(), atol=1e-3
    )
    every = np.stack([accuracies(run) for run in results["strategies"].values()])
    place = list(results["strategies"]).index("pcgrad")
    np.testing.assert_allclose(rows["pcgrad"].rank.mean, mean_rank(every)[place].mean())
    areas = np.prod(100 * (accuracies(pcgrad) - every.min(axis=(0, 1))), axis=1)
    np.testing.assert_allclose(rows["pcgrad"].volume.mean, areas.mean(), rtol=1e-3)
    header, rule, *body = summary.markdown(results).splitlines()
    assert len(body) == len(rows)
    assert len({line.count("|") for line in (header, rule, *body)}) == 1
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert rows["pcgrad"].metrics["left"].text(scale=100) in page
    assert html.escape(summary.conclusion(results)) in page
    assert html.escape(results["command"]) in page


def test_equal_weights_is_the_plain_step(results, dataset):
    problem = Problem(dataset, dataset.tasks, SETTINGS)
    plain = train.build(problem, train.PLAIN, SETTINGS, dataset.train)
    order = jnp.asarray(batch_order(SETTINGS, len(dataset.train.inputs)))[:, :4]
    _, record = plain.advance(plain.state, dataset.train, order)
    equal = results["strategies"]["sum"]
    for i, task in enumerate(("left", "right")):
        np.testing.assert_allclose(
            np.asarray(equal["train_loss"][task])[:, :4], record.losses[:, 1, :, i], rtol=1e-4
        )
    assert equal["flops_ratio"] == pytest.approx(1, abs=0.005)
    assert results["strategies"]["pcgrad"]["flops_ratio"] > 1.1


def train_until_killed(folder):
    seen = []

    def kill(what, done, total):
        seen.append((what, done))
        if seen[-2:-1] == [("training pcgrad", done - 1)]:
            os.kill(os.getpid(), signal.SIGKILL)

    experiment.run(multimnist(sizes=SIZES), STRATEGIES, SETTINGS, folder, on_progress=kill)


def test_a_killed_run_goes_on_to_the_same_result(dataset, results, tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=train_until_killed, args=(tmp_path,)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    saved = {path.stem for path in tmp_path.iterdir()}
    assert saved == {"single_task_left", "single_task_right", "sum", "tuned_weights", "dwa"}

    seen = []
    again = experiment.run(
        dataset, STRATEGIES, SETTINGS, tmp_path, on_progress=lambda *report: seen.append(report)
    )
    texts = [what for what, _, _ in seen]
    assert [t for t in texts if t.startswith("found")] == [
        f"found {job}"
        for job in ("single task: left", "single task: right", "sum", "tuned weights", "dwa")
    ]
    assert "training dwa" not in texts

    def timeless(node):
        if isinstance(node, dict):
            return {k: timeless(v) for k, v in node.items() if k not in ("wall_ratio", "command")}
        return node

    assert timeless(json.loads(json.dumps(again))) == timeless(results)

    # What was trained under other settings or on other data is not taken for these.
    facts = experiment._facts(dataset, SETTINGS)
    path = tmp_path / "dwa.npz"
    assert experiment._load(path, facts) is not None
    longer = dataclasses.replace(SETTINGS, steps=24)
    assert experiment._load(path, experiment._facts(dataset, longer)) is None
    flipped = dataclasses.replace(dataset, test=jax.tree.map(np.flip, dataset.test))
    assert experiment._load(path, experiment._facts(flipped, SETTINGS)) is None


def test_a_problem_judged_by_something_else_than_its_losses(tmp_path):
    problem = helmholtz(num_points=64)
    settings = dataclasses.replace(SETTINGS, steps=2, checkpoints=1, candidates=2, hidden=(4,))
    results = json.loads(json.dumps(experiment.run(problem, (), settings, tmp_path / "runs")))
    assert results["single_task"] == {}
    assert results["dataset"]["tasks"] == ["boundary", "pde"]
    assert set(results["strategies"]["sum"]["test"]) == {"u"}
    rows = {row.name: row for row in summary.rows(results)}
    assert rows["sum"].delta_m.mean == 0  # equal weights are the baseline
    better = rows["tuned weights"].metrics["u"].mean < rows["sum"].metrics["u"].mean
    assert (rows["tuned weights"].delta_m.mean > 0) == better
    compare.save({"command": "", **results}, tmp_path)
    assert "against equal weights" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_loads_nothing_from_elsewhere(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["'](.{0,20})""", page)
    assert len(sources) == 6
    assert all(source.startswith("data:image/png") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(|https?:", page)


def test_from_draws_the_same_report_again(folder, tmp_path, capsys):
    compare.main(["--from", str(folder / "results.json"), "--out", str(tmp_path)])
    assert "pcgrad" in capsys.readouterr().out
    drawn = {path.name for path in folder.iterdir() if path.is_file()}
    assert {path.name for path in tmp_path.iterdir()} == drawn
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
        return record.losses[0, -1]

    settings = dataclasses.replace(SETTINGS, steps=6, checkpoints=1)
    alone = dataclasses.replace(settings, seeds=1, learning_rates=(3e-3,))
    np.testing.assert_allclose(losses(settings), losses(alone), rtol=1e-4)


def test_single_task_models_start_from_the_same_trunk(dataset):
    together = Problem(dataset, dataset.tasks, SETTINGS)
    alone = Problem(dataset, dataset.tasks[:1], SETTINGS)
    kernels = [p.params["encoder"]["layers"][0]["kernel"][...] for p in (together, alone)]
    np.testing.assert_array_equal(*kernels)
    assert not np.array_equal(kernels[0][0], kernels[0][1])  # seeds differ


def test_strategies_of_several_batches_get_halves(dataset):
    problem = Problem(dataset, dataset.tasks, SETTINGS)
    params = jax.tree.map(lambda leaf: leaf[0], problem.params)
    batch = jax.tree.map(lambda array: array[:32], dataset.train)
    whole = train.method(problem, "sum", SETTINGS, 400).differentiate(params, batch)
    halves = train.method(problem, "modo", SETTINGS, 400).differentiate(params, batch)
    assert len(halves[1]) == 2
    for task in problem.names:
        np.testing.assert_allclose(halves[0][0][task], whole[0][0][task], rtol=1e-5)


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
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"learning_rates": (0.1, -1.0)}, "expected positive numbers"),
    ],
)
def test_bad_settings_say_what_to_change(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_command_line_reports_bad_settings():
    with pytest.raises(SystemExit, match="error: steps is 7"):
        compare.main(["--data", "gradnorm_toy", "--steps", "7"])


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in dataclasses.fields(compare.Options):
        assert f"--{option.name.strip('_').replace('_', '-')}" in text


def test_conclusion_says_who_beats_equal_weights(results):
    equal = results["strategies"]["sum"]

    def with_accuracies(left, right):
        test = {"left": [[v] for v in left], "right": [[v] for v in right]}
        pcgrad = {**results["strategies"]["pcgrad"], "test": test}
        return summary.conclusion(
            {**results, "strategies": {**results["strategies"], "dwa": equal, "pcgrad": pcgrad}}
        )

    high = with_accuracies([0.99, 0.99], [0.99, 0.99])
    for baseline in ("equal weights", "tuned static weights"):
        assert f"Better than {baseline} by more than two standard errors: pcgrad." in high
    assert "Worse by more than two: pcgrad" in with_accuracies([1e-3, 1e-3], [1e-3, 1e-3])
    same = [np.asarray(equal["test"][task])[:, -1] for task in ("left", "right")]
    assert "No strategy is better than equal weights" in with_accuracies(*same)


@pytest.mark.parametrize(("seeds", "share"), [(2, 0.2952), (5, 0.1161), (1000, 0.0458)])
def test_two_errors_mean_what_student_says(seeds, share):
    assert summary.beyond_two_errors(seeds) == pytest.approx(share, abs=2e-4)


def test_critical_difference_is_that_of_nemenyi():
    # Demšar, JMLR 2006, table 5: q = 2.569 for 4 and 3.164 for 10 classifiers.
    assert critical_difference(4, 14) == pytest.approx(2.569 * (20 / 84) ** 0.5, rel=0.02)
    assert critical_difference(10, 30) == pytest.approx(3.164 * (110 / 180) ** 0.5, rel=0.02)


def test_delta_m_of_the_single_task_models_is_zero(results):
    assert summary.rows(results)[0].delta_m.mean == 0
    assert float(delta_m([0.5, 0.5], [0.5, 0.5])) == 0
