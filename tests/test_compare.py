"""`mtl.compare`: a comparison end to end at a tiny size, and each of its promises alone."""

import dataclasses
import html
import itertools
import json
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import mtl_optax as mtl
from benchmarks.data.toy import gradnorm_toy
from benchmarks.known_answers import cagrad_problem
from mtl_optax.compare import (
    Comparison,
    Draw,
    Problem,
    _command as command,
    _comparison as front,
    _diagnosis as diagnosis,
    _plots as plots,
    _run as run,
    _selection as selection,
    _setup as setups,
    _source as sources,
    _statistics as statistics,
    _store as store,
    _summary as summary,
    _train as train,
)
from mtl_optax.compare._problem import Settings, batch_order, check_names
from mtl_optax.metrics import delta_m, mean_rank

# What no file name, table, formula or page may trip over.
A, B = "$a_$ [/64]", "../<b>&"
SETTINGS = Settings(
    seeds=3, steps=12, batch_size=16, learning_rates=(1e-4, 3e-2), checkpoints=3, candidates=2
)
STRATEGY = "dwa"


def outputs(params, x):
    hidden = jnp.tanh(x @ params["trunk"])
    return {A: hidden @ params["a"], B: hidden @ params["b"]}


def init(key):
    keys = jax.random.split(key, 3)
    shapes = {"trunk": (4, 6), "a": (6,), "b": (6,)}
    return {
        name: jax.random.normal(k, shape) / 2
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def losses(params, batch):
    found = outputs(params, batch["x"])
    return {A: jnp.mean((found[A] - batch["a"]) ** 2), B: jnp.mean((found[B] - batch["b"]) ** 2)}


def scores(params, split):
    return {
        task: 1 - loss / jnp.var(split["a" if task == A else "b"])
        for task, loss in losses(params, split).items()
    }


def examples(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    return {"x": x, "a": x[:, 0], "b": 20 * x[:, 1]}


PROBLEM = Problem(
    init, losses, examples(100, 0), examples(50, 1), examples(50, 2), scores,
    unit={A: "R² %", B: "R²"}, title="[/64] $x_ <i>",
)  # fmt: skip


@pytest.fixture(scope="module")
def seen():
    return {"progress": [], "finished": [], "warnings": []}


@pytest.fixture(scope="module")
def folder(seen, tmp_path_factory):
    """What a run leaves behind."""
    out = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "STEADY", 1e9)  # so that times are there on a busy machine too
        results = run.compared(
            PROBLEM,
            [STRATEGY],
            SETTINGS,
            out,
            on_progress=lambda *report: seen["progress"].append(report),
            on_finished=lambda name, metrics: seen["finished"].append((name, metrics)),
            warn=seen["warnings"].append,
        )
    Comparison({"command": "mtl-compare <here>", **results}).save(out)
    return out


@pytest.fixture(scope="module")
def results(folder):
    return Comparison.load(folder / "results.json").results


@pytest.fixture(scope="module")
def setup():
    return setups.Setup(PROBLEM, SETTINGS)


# A comparison, from start to report


def test_comparisons_stand_side_by_side(results):
    widths = []
    for several in ([results], [results, results]):
        content = plots.draw_together(several)
        assert content.startswith(b"\x89PNG")
        widths.append(int.from_bytes(content[16:20], "big"))
    assert widths[1] > widths[0]


def test_results_hold_every_run(results, seen):
    baselines = ["sum", "1 / initial losses", "tuned weights"]
    assert list(results["strategies"]) == [*baselines, STRATEGY]
    assert list(results["single_task"]) == [A, B]
    assert results["checkpoint_steps"] == [4, 8, 12]
    for name in ("python", "jax", "jaxlib", "optax", "machine"):
        assert results["versions"][name]
    for entry in (*results["strategies"].values(), *results["single_task"].values()):
        for title in ("validation", "test", "norm"):
            for values in entry[title].values():
                assert np.array(values).shape == (3, 3)  # seeds, checkpoints
        assert np.all(np.abs(entry["cosine"][f"{A}-{B}"]) <= 1 + 1e-6)
        for curve in entry["train_loss"].values():
            assert np.array(curve).shape == (3, 12)
            assert np.all(np.isfinite(curve))
        assert entry["rate"] == 3e-2  # 12 steps of 1e-4 change next to nothing
        assert entry["wall_ratio"] > 0
    done = [count for _, count, _ in seen["progress"]]
    assert done == sorted(done)
    assert seen["progress"][-1] == ("done", 12, 12)
    assert [name for name, _ in seen["finished"]] == ["sum", train.STATIC, STRATEGY]
    assert seen["warnings"] == []


def test_tuned_weights_are_never_worse_than_equal_ones_where_they_are_chosen(results):
    def score(name):
        entry = results["strategies"][name]
        values = [selection.at_best(entry, "validation", metric) for metric in (A, B)]
        singles = [results["single_task"][m] for m in (A, B)]
        reference = [
            selection.at_best(single, "validation", m).mean()
            for single, m in zip(singles, (A, B), strict=True)
        ]
        return float(np.mean(delta_m(np.stack(values, axis=1), reference)))

    assert score("tuned weights") >= score("sum")
    assert score("tuned weights") >= score("1 / initial losses")


def test_static_weights_are_one_over_the_losses_before_training(setup):
    params = [init(jax.random.key(seed)) for seed in range(3)]
    order = batch_order(SETTINGS, 100)
    first = np.array([
        list(losses(p, jax.tree.map(lambda x, s=s: x[order[s, 0]], PROBLEM.train)).values())
        for s, p in enumerate(params)
    ])  # fmt: skip
    (kind, inverse), *others = train.static_weights(setup, 4)
    assert kind == train.INVERSE
    np.testing.assert_allclose(inverse[:, 0] / inverse[:, 1], first[:, 1] / first[:, 0], rtol=1e-4)
    np.testing.assert_allclose(inverse.sum(axis=1), 2, rtol=1e-5)
    assert [kind for kind, _ in others] == [train.ALONE] * 2 + [train.RANDOM] * 4
    np.testing.assert_array_equal(others[0][1], [[2, 0]] * 3)
    # Half of the random ones are around the inverse losses, of each seed its own.
    assert [len(np.unique(w[:, 0])) for _, w in others[2:]] == [1, 3, 1, 3]


def test_equal_weights_are_the_plain_step(setup, results):
    configs = next(train.blocks(setup, [{}]))
    plain = train.build(setup, train.PLAIN, configs)
    items = next(setup.source.items())
    _, record = plain.advance(plain.state, configs, setup.source.data, items)
    equal = results["strategies"]["sum"]
    for i, task in enumerate(setup.names):
        np.testing.assert_allclose(
            np.array(equal["train_loss"][task])[:, :4], record.losses[:, 1, :, i], rtol=1e-4
        )
    assert equal["flops_ratio"] == pytest.approx(1, abs=0.01)


def test_numbers_of_the_table_follow_from_the_results(results, folder):
    def values(entry):
        return np.stack([selection.at_best(entry, "test", m) for m in (A, B)], axis=1)

    rows = {row.name: row for row in summary.rows(results)}
    entry, equal = results["strategies"][STRATEGY], results["strategies"]["sum"]
    one = values(entry)[:, 0]
    half = stats.t.ppf(0.975, 2) * one.std(ddof=1) / np.sqrt(3)
    assert rows[STRATEGY].metrics[A].mean == pytest.approx(one.mean())
    assert rows[STRATEGY].metrics[A].half == pytest.approx(half)
    single = np.stack(
        [selection.at_best(results["single_task"][m], "test", m) for m in (A, B)], axis=1
    )

    def gains(entry):
        return 100 * np.mean((values(entry) - single) / np.abs(single), axis=1)

    np.testing.assert_allclose(rows[STRATEGY].delta_m.mean, gains(entry).mean(), rtol=1e-4)
    np.testing.assert_allclose(rows[STRATEGY].gain.mean, (gains(entry) - gains(equal)).mean())
    assert rows["single task"].delta_m.mean == 0
    every = np.stack([values(run) for run in results["strategies"].values()])
    place = list(results["strategies"]).index(STRATEGY)
    np.testing.assert_allclose(rows[STRATEGY].rank.mean, mean_rank(every)[place].mean())
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert html.escape(rows[STRATEGY].metrics[A].text(scale=100)) in page
    assert html.escape(summary.answer(results)) in page
    assert "mtl-compare &lt;here&gt;" in page


def test_report_loads_and_runs_nothing(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = re.findall(r"""(?:src|href)\s*=\s*["'](.{0,20})""", page)
    assert len(found) == 7
    assert all(source.startswith("data:image/png") for source in found)
    assert not re.search(r"<script|<link|@import|url\(|https?:|<i>|<b>&", page)
    assert html.escape(f"{A}") in page
    assert html.escape(f"{B}") in page


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tables_fit_and_no_arrow_stands_alone(results, width):
    lines = summary.text(results, width).split("\n")
    assert max(map(len, lines)) <= width
    assert len({line.rstrip() for line in lines}) == 2 + len(summary.rows(results))
    assert not any(line.strip() in ("↑", "↓") for line in lines)
    if width == 140:
        assert "at end" in lines[1]
    header, rule, *body = summary.markdown(results).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in (header, rule, *body)}) == 1


def test_from_draws_the_same_report_again(folder, tmp_path, capsys):
    command.main(["--from", str(folder / "results.json"), "--out", str(tmp_path)])
    assert STRATEGY in capsys.readouterr().out
    for name in ("results.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_done_is_found_again_and_what_is_broken_is_made_again(folder, results, seen):
    runs = sorted(path.name for path in folder.glob("*.run"))
    assert runs == ["dwa.run", f"{run._file_name(train.STATIC)}.run", "sum.run"]
    whole = (folder / "dwa.run").read_bytes()
    (folder / "dwa.run").write_bytes(whole[:-20])
    (folder / ".dwa.run.1.part").write_bytes(b"left by a killed process")
    texts, warnings = [], []
    again = run.compared(
        PROBLEM, [STRATEGY], SETTINGS, folder,
        on_progress=lambda what, *_: texts.append(what), warn=warnings.append,
    )  # fmt: skip
    assert texts[:2] == ["found sum", f"found {train.STATIC}"]
    assert "training dwa" in texts
    assert len(warnings) == 1
    assert "dwa.run is not a whole file" in warnings[0]
    assert (folder / "dwa.run.broken").read_bytes() == whole[:-20]
    assert not list(folder.glob(".*.part"))

    def timeless(node):
        if isinstance(node, dict):
            return {k: timeless(v) for k, v in node.items() if k not in ("wall_ratio", "command")}
        return node

    assert timeless(json.loads(json.dumps(again))) == timeless(results)


def test_facts_follow_data_losses_options_and_code(setup, tmp_path):
    facts = setup.facts()
    assert facts == setups.Setup(PROBLEM, SETTINGS).facts()

    def changed(**changes):
        other = setups.Setup(dataclasses.replace(PROBLEM, **changes), SETTINGS).facts()
        return {name for name in facts if facts[name] != other[name]}

    assert changed(test=examples(50, 3)) == {"data"}
    assert "program" in changed(loss_fn=lambda p, b: {k: 2 * v for k, v in losses(p, b).items()})
    assert changed(options={"dwa": {"temperature": 1.0}}) == {"options"}
    (tmp_path / "compare").mkdir()
    for name in ("link.py", "compare/_train.py", "compare/_report.py"):
        (tmp_path / name).write_text("one")
    before = setups.code_hash(tmp_path)
    (tmp_path / "compare/_report.py").write_text("two")
    assert setups.code_hash(tmp_path) == before  # what draws changes no number
    (tmp_path / "link.py").write_text("two")
    assert setups.code_hash(tmp_path) != before


# Where batches come from


def test_an_iterable_and_arrays_train_alike(setup):
    order = batch_order(SETTINGS, 100)

    def factory(seed):
        # Half the batches at a time, then another epoch; and one of another shape.
        epoch, seed = divmod(seed, 1_000_003)
        yield jax.tree.map(lambda x: x[order[seed, 6 * epoch]], PROBLEM.train)
        yield jax.tree.map(lambda x: x[:5], PROBLEM.train)
        for index in order[seed, 6 * epoch + 1 : 6 * epoch + 6]:
            yield jax.tree.map(lambda x, i=index: x[i], PROBLEM.train)

    given = setups.Setup(dataclasses.replace(PROBLEM, train=factory), SETTINGS)
    assert given.source.num_examples is None
    chunks = list(given.source.items())
    assert len(chunks) == 3
    for chunk, indices in zip(chunks, setup.source.items(), strict=True):
        expected = jax.tree.map(lambda x, i=indices: x[i], PROBLEM.train)
        jax.tree.map(np.testing.assert_array_equal, chunk, expected)
    np.testing.assert_allclose(given.initial_losses, setup.initial_losses, rtol=1e-6)
    with pytest.raises(ValueError, match=r"train\(0\) yields no batch"):
        sources.source_of(dataclasses.replace(PROBLEM, train=lambda seed: []), SETTINGS)


def test_absent_tasks_and_a_metric_of_plain_python():
    train_split = PROBLEM.train | {"b": np.where(np.arange(100) < 80, np.nan, 1.0)}

    def loss_fn(params, batch):  # a mean over labels that are there; NaN if none is
        found = losses(params, batch | {"b": jnp.nan_to_num(batch["b"])})
        return {**found, B: jnp.where(jnp.all(jnp.isnan(batch["b"])), jnp.nan, found[B])}

    problem = dataclasses.replace(
        PROBLEM,
        train=train_split,
        loss_fn=loss_fn,
        present=lambda batch: mtl.compare.labelled({A: batch["a"], B: batch["b"]}),
        metrics=lambda params, split: {"worst": max(map(float, scores(params, split).values()))},
        unit="", batch_size=2,
    )  # fmt: skip
    settings = dataclasses.replace(SETTINGS, batch_size=2, learning_rates=(1e-2,))
    setup = setups.Setup(problem, settings)
    assert not setup.singles
    configs = next(train.blocks(setup, [{}]))
    program = train.build(setup, "uncertainty", configs)
    state, record = program.advance(
        program.state, configs, setup.source.data, next(setup.source.items())
    )
    absent = np.isnan(record.losses[..., setup.names.index(B)])
    assert absent.any()
    assert not absent.all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    validation, test = setup.evaluate(state.params, state.rest)
    assert validation.shape == test.shape == (3, 1, 1)
    model = jax.tree.map(lambda x: x[1, 0], state.params)
    assert test[1, 0, 0] == pytest.approx(max(map(float, scores(model, PROBLEM.test).values())))


def test_state_beside_the_parameters_is_carried_and_measured():
    def loss_fn(params, state, batch):
        return losses(params, batch), {"steps": state["steps"] + 1}

    def metrics(params, state, split):
        return {"steps": 1.0 * state["steps"], "error": scores(params, split)[A]}

    counted = dataclasses.replace(
        PROBLEM,
        init=lambda key: (init(key), {"steps": jnp.zeros((), int)}),
        loss_fn=loss_fn, metrics=metrics, unit="", stateful=True,
    )  # fmt: skip
    settings = dataclasses.replace(SETTINGS, learning_rates=(1e-2,))
    states = []
    for problem in (counted, PROBLEM):
        setup = setups.Setup(problem, settings)
        configs = next(train.blocks(setup, [{}]))
        program = train.build(setup, "sum", configs)
        items = next(setup.source.items())
        states.append(program.advance(program.state, configs, setup.source.data, items)[0])
        if problem is counted:
            validation, _ = setup.evaluate(states[0].params, states[0].rest)
            np.testing.assert_array_equal(validation[..., setup.metric_names.index("steps")], 4)
    jax.tree.map(np.testing.assert_array_equal, *(state.params for state in states))


def test_a_metric_keeps_its_name_whatever_their_order():
    in_another = lambda params, split: dict(reversed(scores(params, split).items()))  # noqa: E731
    setup = setups.Setup(dataclasses.replace(PROBLEM, metrics=in_another), SETTINGS)
    state = jax.tree.map(lambda x: x[:, None], setup.params)
    _, test = setup.evaluate(state, setup.rest)
    found = scores(jax.tree.map(lambda x: x[1], setup.params), PROBLEM.test)
    for i, name in enumerate(setup.metric_names):
        assert test[1, 0, i] == pytest.approx(float(found[name]), rel=1e-4)


@pytest.mark.parametrize(
    ("models", "fitting", "at_once"), [(5, 8, 5), (15, 8, 5), (11, 8, 1), (24, 8, 8), (24, 0, 1)]
)
def test_no_model_is_measured_twice_and_few_on_many_examples(models, fitting, at_once):
    assert setups._side_by_side(models, fitting) == at_once


def test_halves_are_every_other_example():
    one, other = sources.halves({"x": np.arange(6), "scalar": np.float32(3)})
    assert one["x"].tolist() == [0, 2, 4]
    assert other["x"].tolist() == [1, 3, 5]
    assert one["scalar"] == other["scalar"] == 3


def test_batches_are_epochs_of_permutations():
    order = batch_order(dataclasses.replace(SETTINGS, steps=24, batch_size=32), 400)
    assert order.shape == (3, 24, 32)
    epoch = order[0, :12].ravel()
    assert len(set(epoch)) == epoch.size
    assert not np.array_equal(order[0], order[1])
    with pytest.raises(ValueError, match="at most the 10"):
        batch_order(SETTINGS, 10)


# Statistics


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 19, 200])
def test_students_t(degrees):
    assert statistics.quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)
    for t in (0.1, 1.0, 5.0):
        expected = 1 - 2 * stats.t.sf(t, degrees)
        assert statistics.between(t, degrees) == pytest.approx(expected, abs=1e-12)


def test_p_values_are_those_of_scipy_and_two_seeds_say_nothing():
    differences = [0.3, 0.1, 0.4, 0.2]
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert statistics.p_value(differences) == pytest.approx(expected)
    assert statistics.p_value([0.2, 0.2]) == statistics.p_value([0.0, 0.0, 0.0]) == 1
    assert statistics.p_value([0.2, np.inf, 0.2]) == 1


def test_holm_by_hand():
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("decimals", [12, 1])  # numbers that are rounded, as accuracies are
def test_one_strategy_under_many_names_is_hardly_ever_told_apart(decimals):
    rng, names = np.random.default_rng(0), ("sum", "1 / initial losses", "tuned weights")
    claims = 0
    for _ in range(200):
        values = rng.normal(size=(11, 5)).round(decimals)
        verdicts = summary.judged(dict(zip((*names, *"abcdefgh"), values, strict=True)))
        claims += any(verdicts.values())
    assert claims <= 10
    clear = dict(zip((*names, "a"), rng.normal(size=(4, 5)) / 100, strict=True))
    clear["a"] += 1
    assert summary.judged(clear)["a"] == {"gain": "↑", "over_tuned": "↑"}


def test_answer_says_who_to_prefer(results):
    rng = np.random.default_rng(0)

    def answered(noise=1e-3, **shifts):
        strategies = {}
        for name, entry in results["strategies"].items():
            shift = shifts.get(name.split()[0], 0.0)
            test = {m: (0.5 + shift + noise * rng.normal(size=(3, 3))).tolist() for m in (A, B)}
            strategies[name] = {**entry, "test": test}
        half = {m: [[0.5] * 3] * 3 for m in (A, B)}
        singles = {m: {**entry, "test": half} for m, entry in results["single_task"].items()}
        return summary.answer({**results, "strategies": strategies, "single_task": singles})

    assert answered(noise=0).startswith("Nothing is shown to beat equal weights here")
    assert answered(dwa=0.2).startswith("Prefer dwa: dwa is ")
    assert "than tuned static weights, at 1.0" in answered(dwa=0.2)
    everywhere = answered(dwa=0.2, tuned=0.2)
    assert everywhere.startswith("Prefer static weights (tuned weights): they are ")
    assert "what else helps (dwa) is not shown to be better" in everywhere
    strategies = {**results["strategies"]}
    strategies[STRATEGY] = {**strategies[STRATEGY], "options": {"temperature": 0.5}}
    assert "dwa (temperature 0.5)" in summary.text({**results, "strategies": strategies})
    few = {**results, "settings": {**results["settings"], "seeds": 2}}
    assert "say nothing about chance" in summary.answer(few)


def test_what_makes_no_sense_is_left_out_by_name(results):
    assert selection._near_zero(np.array([0.05, 0.05, 0.051]), True)  # R² of .05
    assert selection._near_zero(np.array([0.9, -0.5, 0.4]), True)
    assert not selection._near_zero(np.array([0.5, 0.52, 0.49]), True)
    assert not selection._near_zero(np.array([0.01, 0.0101, 0.0099]), False)  # an error
    without = {**results, "left_out": [A]}
    assert any(f"Δm leaves out {A}" in note for note in summary.notes(without))
    row = {row.name: row for row in summary.rows(without)}[STRATEGY]
    entry, single = results["strategies"][STRATEGY], results["single_task"][B]
    mine, base = (selection.at_best(x, "test", B) for x in (entry, single))
    expected = np.mean(100 * (mine - base) / np.abs(base))
    assert row.delta_m.mean == pytest.approx(expected)


def test_times_are_left_out_where_the_plain_step_disagrees(results):
    busy = {name: {**entry, "wall_ratio": None} for name, entry in results["strategies"].items()}
    busy = {**results, "strategies": busy}
    assert "time" in summary.text(results, 200)
    assert "time" not in summary.text(busy, 200)
    assert any("differed by more than" in note for note in summary.notes(busy))


# Tuning


@pytest.mark.parametrize("name", [row.name for row in mtl.STRATEGIES.values() if row.grid])
def test_options_of_a_grid_can_be_traced(name):
    row, params = mtl.STRATEGIES[name], jnp.ones(3)

    def update(values):
        key = jax.random.key(0) if row.stochastic else None
        tx = mtl.make(name, 2, key=key, **dict(zip(row.grid, values, strict=True)))
        _, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(params)
        return tx.update(jac, tx.init(params), params)[0]

    assert row.grid.keys() <= row.options.keys()
    assert jax.eval_shape(update, [jnp.float32(1)] * len(row.grid)).shape == (3,)


def test_tuning_tries_each_option_with_each_rate_and_blocks_share_a_program(setup):
    tuned = setups.Setup(PROBLEM, dataclasses.replace(SETTINGS, tune=True, models=18))
    assert train.grid("dwa", setup) == [{}]
    grid = train.grid("dwa", tuned)
    assert grid == [{"temperature": value} for value in mtl.STRATEGIES["dwa"].grid["temperature"]]
    (config,) = train.blocks(tuned, grid)
    assert config.rate[0].tolist() == pytest.approx([1e-4, 3e-2] * 3)
    np.testing.assert_allclose(
        config.options["temperature"][0], np.repeat([v["temperature"] for v in grid], 2)
    )
    small = dataclasses.replace(SETTINGS, models=12)
    weights = [w for _, w in train.static_weights(setups.Setup(PROBLEM, small), 3)]
    blocks = list(train.blocks(setups.Setup(PROBLEM, small), weights))
    assert [b.rate.shape for b in blocks] == [(3, 4)] * 3
    np.testing.assert_array_equal(blocks[1].weights[:, 2], weights[3])


# Faults


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:200] + b"x" + path.read_bytes()[201:]),
        lambda path: path.write_bytes(b"\x80\x04 something else\n"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_file_that_is_not_whole_is_set_aside(damage, tmp_path):
    path, warnings = tmp_path / "x.run", []
    for i in ("", "1"):
        store.save(path, {"a": np.arange(1000)}, {"facts": 1})
        np.testing.assert_array_equal(store.load(path, {"facts": 1}, print)["a"], np.arange(1000))
        assert store.load(path, {"facts": 2}, print) is None
        damage(path)
        assert store.load(path, {"facts": 1}, warnings.append) is None
        assert not path.exists()
        assert (tmp_path / f"x.run.broken{i}").exists()
    assert len(warnings) == 2
    assert str(path) in warnings[0]


def test_kills_leave_whole_files(tmp_path):
    program = (
        "import importlib.util, pathlib, sys, numpy as np\n"
        f"spec = importlib.util.spec_from_file_location('store', {store.__file__!r})\n"
        "store = importlib.util.module_from_spec(spec); spec.loader.exec_module(store)\n"
        f"path = pathlib.Path({str(tmp_path)!r}) / 'x.run'\n"
        "print('ready', flush=True)\n"
        "while True: store.save(path, {'a': np.random.default_rng(0).normal(size=200_000)}, 1)\n"
    )
    for delay in (0.0, 0.03, 0.1):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        process.stdout.readline()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        found = store.load(tmp_path / "x.run", 1, pytest.fail)
        assert found is None or found["a"].shape == (200_000,)


def test_two_processes_do_not_share_a_folder(tmp_path):
    def enter():
        with store.locked(tmp_path):
            return True

    with store.locked(tmp_path), pytest.raises(OSError, match=r"is in use by process \d+: wait"):
        enter()
    assert enter()  # given back


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    arguments = [f"{__name__}:PROBLEM", "--seeds", "1", "--out"]
    monkeypatch.setattr(setups, "Setup", pytest.fail)
    with pytest.raises(SystemExit, match=r"error: .*file"):
        command.main([*arguments, str(tmp_path / "file" / "out")])

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(SystemExit, match=r"No space left on device: '.*space'\. What is finished"):
        command.main([*arguments, str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {store.LOCK}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_one_line(number, monkeypatch, capsys, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, "compared", lambda *_, **__: signal.raise_signal(number))
    with pytest.raises(SystemExit) as ended:
        command.main([f"{__name__}:PROBLEM", "--out", str(tmp_path)])
    assert ended.value.code == 130
    output = capsys.readouterr().out.strip().split("\n")
    assert output[-1] == "stopped: start the same command again, and it goes on from here"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", ""], "called '', expected a text of 1 to 100"),
        (["a\0"], r"called 'a\\x00'"),
        (["a" * 300], r"called 'a{39}\.\.\., expected"),
        ([3], "called 3, expected a text"),
        (["a", "b", "a"], "two tasks are called 'a'"),
    ],
)
def test_names_are_checked_before_training(names, message):
    with pytest.raises(ValueError, match=message):
        check_names("task", names)


def test_every_job_has_a_file_of_its_own():
    names = ["a b", "a_b", "../../../x", "A", "a", "..", "a" * 300, "con/", ""]
    files = [run._file_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_-]{1,70}", name) for name in files)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("settings"),
        lambda r: r.update(format=1),
        lambda r: r["problem"].pop("metrics"),
        lambda r: r["strategies"]["sum"].update(flops_ratio="<script>"),
        lambda r: r["strategies"]["sum"]["test"].update({A: "<script>"}),
        lambda r: r["settings"].update(steps="<script>"),
    ],
)
def test_a_foreign_results_file_is_named_and_draws_nothing(change, results, tmp_path):
    foreign = json.loads(json.dumps(results))
    change(foreign)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(foreign))
    with pytest.raises(SystemExit, match=r"error: .*results\.json is not a results\.json of this"):
        command.main(["--from", str(path)])
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


# The command


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "expected my_module:problem"),
        ("no_file.py:problem", r"there is no file no_file\.py"),
        ("math:pi", "math:pi is a float, expected a mtl.compare.Problem"),
        ("math:nothing", "math:nothing is not there"),
        ("no_such_module:x", "no_such_module"),
    ],
)
def test_what_is_no_problem_is_named(target, message):
    with pytest.raises(SystemExit, match=rf"error: .*{message}"):
        command.main([target])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 10}, "multiple of checkpoints"),
        ({"seeds": 0}, "seeds is 0"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"learning_rates": (0.1, -1.0)}, "expected positive numbers"),
    ],
)
def test_bad_settings_say_what_to_change(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_bad_problems_say_what_to_change():
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            setups.Setup(dataclasses.replace(PROBLEM, **changes), SETTINGS)

    refused(r"first axes of \[3, 4\]", train={"x": np.zeros((3, 1)), "y": np.zeros(4)})
    refused("metrics returns an empty dict", metrics=lambda params, split: {})
    refused(
        r"metric 'x' has shape \(2,\)", metrics=lambda params, split: {"x": jnp.zeros(2)}, unit=""
    )
    refused("higher_is_better says nothing of the metric", higher_is_better={A: True})
    refused("says something of 1 tasks", present=lambda batch: True)
    refused("init returns a dict, expected the pair", stateful=True)
    refused(
        "there is state beside them", stateful=True, init=lambda key: (init(key), jnp.zeros(2)),
        jac={"in_axes": (None, 0)},
    )  # fmt: skip
    with pytest.raises(ValueError, match="no setting is called 'step'"):
        front.settings_of(PROBLEM, 3, step=4)
    with pytest.raises(ValueError, match="no strategy is called 'dwe'; near it: dwa"):
        run.compared(PROBLEM, ["dwe"], SETTINGS)
    with pytest.raises(ValueError, match="dtp needs kpis"):
        run.compared(PROBLEM, ["dtp"], SETTINGS)
    chosen, skipped = run._chosen(PROBLEM, "all")
    assert set(chosen) | set(skipped) | {"sum"} == set(mtl.STRATEGIES)
    assert skipped == {"dtp": "needs kpis", "weights": "needs weights of yours, in options"}


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out.lower()
    for option in dataclasses.fields(command.Options):
        assert option.name.strip("_").replace("_", "-") in text


def test_the_package_does_without_the_extra():
    program = (
        "import sys; sys.modules['tyro'] = None; import mtl_optax as mtl\n"
        "assert 'mtl_optax.compare' not in sys.modules\n"
        "assert 'compare' in dir(mtl) and mtl.compare.Problem\n"
        "import mtl_optax.compare._command"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = ended.stderr.strip().split("\n")
    assert lines == ["error: mtl-compare needs tyro: pip install 'mtl-optax[compare]'"]


# Diagnosis


@pytest.mark.long
def test_the_gradnorm_toy_is_a_matter_of_scale():
    toy = dataclasses.replace(gradnorm_toy(sizes=(600, 64, 64)), jac={"rows": "batched"})
    found = mtl.compare.diagnose(toy, seeds=1, steps=40)
    assert found.verdict == "scale"
    assert "scale_invariant" in found.recommended
    assert found.norms["scale100"] > 20 * found.norms["scale001"]
    assert "scale100 is" in str(found)


def test_the_cagrad_toy_is_a_conflict():
    found = mtl.compare.diagnose(cagrad_problem(), learning_rates=(0.1,))
    assert found.verdict == "conflict"
    assert "cagrad" in found.recommended


def test_alike_tasks_have_nothing_to_treat():
    rng = np.random.default_rng(0)
    shape = (2, 10, 2)
    losses = np.linspace(1, 0.4, 10)[None, :, None] * np.array([1.0, 1.3])
    cosines = np.broadcast_to(np.eye(2), (2, 10, 2, 2)) + 0.05 * rng.normal(size=(2, 10, 2, 2))
    found = diagnosis.of(("a", "b"), np.broadcast_to(losses, shape), 1 + 0 * losses, cosines)
    assert (found.verdict, found.recommended) == ("nothing", ("sum",))
    assert found.left == pytest.approx({"a": 0.4, "b": 0.4})
    slow = losses * np.linspace(1, 0.01, 10)[None, :, None] ** np.array([1, 0])
    assert diagnosis.of(("a", "b"), slow, 1 + 0 * losses, cosines).verdict == "pace"


def test_every_verdict_has_advice_from_the_catalog():
    assert diagnosis.ADVICE.keys() == diagnosis.VERDICTS.keys()
    assert set(itertools.chain(*diagnosis.ADVICE.values())) <= set(mtl.STRATEGIES)


def test_points_that_are_drawn_differ_from_step_to_step():
    problem = dataclasses.replace(
        PROBLEM, train=Draw(lambda key: {"x": jax.random.normal(key, (3,))})
    )
    source = sources.source_of(problem, SETTINGS)
    points = jax.vmap(jax.vmap(lambda item: source.batch(source.data, item)))(source.first)["x"]
    assert len(np.unique(points.reshape(-1, 3), axis=0)) == 3 * 4


def least_squares(metrics, **options):
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("f")
    options = {"steps": 20, "batch_size": 8, "metrics": metrics} | options
    return Problem(lambda key: jnp.zeros(3), fits, x, x, x, **options)


def fits(w, x):
    return {"a": jnp.mean((x @ w - x[:, 0]) ** 2), "b": jnp.mean((x @ w + x[:, 1]) ** 2)}


def test_a_metric_that_is_nan_is_left_out_and_chooses_nothing():
    problem = least_squares(
        lambda w, x: fits(w, x) | {"auc": w[0] * jnp.nan},
        higher_is_better={"a": False, "b": False, "auc": True},
        learning_rates=(1e-5, 1e-1),
    )
    found = mtl.compare.run(problem, ["uwso"], seeds=2, live=False, checkpoints=2, candidates=1)
    assert found.results["left_out"] == ["auc"]
    assert {s["rate"] for s in found.results["strategies"].values()} == {0.1}


def test_one_loss_is_diagnosed():
    one = lambda w, x: {"a": fits(w, x)["a"]}  # noqa: E731
    problem = dataclasses.replace(least_squares(one, higher_is_better=False), loss_fn=one)
    assert mtl.compare.diagnose(problem, seeds=1, steps=4).verdict == "nothing"
