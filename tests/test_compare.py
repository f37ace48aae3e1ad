"""`mtl.compare`: a comparison end to end at a tiny size, and each of its promises alone."""

import collections
import dataclasses
import fractions
import functools
import hashlib
import html
import importlib
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    _hashes as hashes,
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
from mtl_optax.compare._problem import Settings, batch_order, check_names, check_optimizer
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
        least = np.abs(single.mean(axis=0)) / 10
        return 100 * np.mean((values(entry) - single) / np.maximum(np.abs(single), least), axis=1)

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
    assert texts[:5] == [
        "checking sum", f"checking {train.STATIC}", "checking dwa", "found sum",
        f"found {train.STATIC}",
    ]  # fmt: skip
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
    assert changed(options={"dwa": {"temperature": 1.0}}) == set()
    (tmp_path / "compare").mkdir()
    for name in ("link.py", "compare/_train.py", "compare/_report.py"):
        (tmp_path / name).write_text("one")
    before = setups.code_hash(tmp_path)
    (tmp_path / "compare/_report.py").write_text("two")
    assert setups.code_hash(tmp_path) == before  # what draws changes no number
    (tmp_path / "link.py").write_text("two")
    assert setups.code_hash(tmp_path) != before


def test_facts_of_a_strategy_follow_its_program_and_its_grid(setup, monkeypatch):
    def factory(num_tasks, *, power=0.0, schedule=None):
        def update_fn(jacobian, state, **extra_args):
            weights = power * jacobian.loss_vector() + (schedule(2.0) if schedule else 1.0)
            return jacobian.scale(jax.jit(lambda: weights * jnp.array(table))()), state

        balancer = mtl.link(optax.init_empty_state, update_fn, num_tasks)
        return optax.chain(balancer, mtl.sum_tasks())

    def facts(name="mine", grid=({},), **changes):
        other = setups.Setup.__new__(setups.Setup)
        other.__dict__ |= vars(setup) | {"problem": dataclasses.replace(PROBLEM, **changes)}
        return json.dumps(train.facts(other, name, list(grid)))

    table = [1.0, 2.0]
    mine = mtl.Strategy("mine", "balancer", "losses", "free", "", "", factory)
    monkeypatch.setitem(mtl.STRATEGIES, "mine", mine)
    told = lambda **options: {"options": {"mine": options}}  # noqa: E731
    assert facts() == facts() == facts(**told(power=0.0))
    several = [
        facts(),
        facts(**told(power=1.0)),
        facts(**told(schedule=lambda n: n)),
        facts(**told(schedule=lambda n: n + 1)),
        facts(grid=[{"power": 1.0}, {"power": 2.0}]),
        facts(grid=[{"power": 1.0}, {"power": 3.0}]),
        facts("gradnorm"),
        facts("gradnorm", last_shared={"trunk": False, "a": True, "b": True}),
    ]
    table = [1.0, 3.0]
    several.append(facts())  # its code was edited
    assert len(set(several)) == len(several)


def with_jvp(f):
    ruled = jax.custom_jvp(f)
    ruled.defjvp(lambda x, tangents: (ruled(*x), *tangents))
    return ruled


def with_vjp(f):
    ruled = jax.custom_vjp(f)
    ruled.defvjp(lambda x: (f(x), None), lambda _, g: (g,))
    return ruled


WRAPPED = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "jit in jit": lambda f: jax.jit(lambda x: jax.jit(f)(x) + 1),
    "checkpoint": jax.checkpoint,
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=2)[0],
    "cond": lambda f: lambda x: jax.lax.cond(x[0] > 0, f, jnp.sin, x),
    "while": lambda f: lambda x: jax.lax.while_loop(lambda c: jnp.all(c < 9), f, x),
    "vmap": jax.vmap,
    "callback": lambda f: (
        lambda x: jax.pure_callback(lambda x: f(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    ),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("array", [jnp.array, np.array], ids=["jax", "numpy"])
def test_arrays_that_a_program_closes_over_are_facts_wherever_they_stand(wrap, array):
    def hashed(number):
        held = array([0.0] * 3000 + [number], np.float32)  # too long to be printed
        return hashes.of_program(wrap(lambda x: x + held[-2:].sum()), jnp.ones(2))

    assert hashed(1.0) == hashed(1.0) != hashed(2.0)


LIMIT = [1.0]


def helper(value):
    return value * LIMIT[0]


class Scorer:
    def __init__(self, share):
        self.share = {"of": np.array([share])}

    def __call__(self, params, split):
        return {"x": helper(float(self.share["of"][0]))}


def test_facts_of_a_metric_in_python_are_what_its_code_reaches(monkeypatch):
    def made(closed=1.0, default=1.0, keyword=1.0):
        def metric(params, split, shift=default, *, power=keyword):
            return {"x": helper(closed) + shift**power}

        return metric

    def partial(metric, value):
        return functools.partial(metric, shift=value)

    known = hashes.of_function(made())
    assert known == hashes.of_function(made())
    one, other = lambda p, s: {"x": 1.0}, lambda p, s: {"x": 2.0}  # of one line
    several = [
        made(), made(closed=2.0), made(default=2.0), made(keyword=2.0), made(closed=made()),
        made(closed=np.arange(2000)), made(closed=np.arange(2000) // 1999),
        partial(made(), 1.0), partial(made(), 2.0), partial(one, 1.0), one, other, jax.jit(one),
        Scorer(1.0), Scorer(2.0), Scorer(1.0).__call__,
    ]  # fmt: skip
    found = [hashes.of_function(metric) for metric in several]
    assert len(set(found)) == len(several)
    monkeypatch.setitem(globals(), "LIMIT", [2.0])
    assert hashes.of_function(made()) != known
    assert hashes.of_function(one) == found[10]  # which does not name it


def other_helper(value):
    return value + 1


class Cached:
    score = functools.cached_property(lambda self: 1.0)


class CachedOther:
    score = functools.cached_property(lambda self: 2.0)


def test_facts_are_found_in_what_the_standard_library_holds():
    pairs = [
        (range(3), range(4)),
        (slice(3), slice(4)),
        (fractions.Fraction(1, 3), fractions.Fraction(2, 3)),
        (re.compile("a"), re.compile("b")),
        ({helper}, {other_helper}),
        (collections.deque([helper]), collections.deque([other_helper])),
        (types.SimpleNamespace(f=helper), types.SimpleNamespace(f=other_helper)),
        (np.vectorize(helper), np.vectorize(other_helper)),
        (vars(Cached)["score"], vars(CachedOther)["score"]),
    ]
    for one, other in pairs:
        assert hashes.of_values([one]) == hashes.of_values([one]) != hashes.of_values([other])
    itself = set()
    itself.add(lambda: itself)
    assert hashes.of_values([itself])


def test_facts_are_the_same_in_every_process():
    program = (
        "import jax, jax.numpy as jnp, numpy as np\n"
        "from mtl_optax.compare import _hashes as hashes\n"
        "names = {'click', 'buy', 'view', 'like'}\n"
        "def metric(params, split):\n"
        "    return {n: np.mean(split) for n in names if n in {'click', 'buy', 'view'}}\n"
        "f = jax.custom_jvp(lambda x: jax.pure_callback(np.sin, x, x))\n"
        "f.defjvp(lambda x, t: (f(*x), f(*t)))\n"
        "print(hashes.of_function(metric), hashes.of_program(f, jnp.ones(2)),\n"
        "      hashes.of_values({'a': object(), 'b': [1.0, 'x', names]}))\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in "12"
    ]  # fmt: skip
    one, other = (process.communicate()[0] for process in started)
    assert len(one.split()) == 3
    assert one == other


def test_a_set_in_a_program_has_no_order_and_no_address():
    text = "f[axes=frozenset({'b', 'a'}) call=<function f at 0x7f00>] y"
    assert hashes._lasting(text) == hashes._lasting(
        "f[axes=frozenset({'a', 'b'}) call=<function f at 0x7abc>] y"
    )
    assert hashes.of_values({"x": ["a"]}) != hashes.of_values({"y": ["a"]})
    words = [np.array([word], object) for word in ("a", "a", "b")]
    one, same, other = map(hashes.of_values, words)
    assert one == same != other


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


def test_batches_have_the_shape_of_the_first_of_all_seeds():
    def sized(sizes):
        return dataclasses.replace(
            PROBLEM, train=lambda seed: [np.zeros(size) for size in sizes(seed)]
        )

    own_first = sized(lambda seed: [4, 5] if seed % 2 == 0 else [5, 4])
    chunk = next(sources.source_of(own_first, SETTINGS).items())
    assert chunk.shape == (3, 4, 4)  # seed 1 begins with another one
    with pytest.raises(ValueError, match=r"train\(1\) yields .* \[\(5,\)\] or \[\(6,\)\], but none "
                       r"of \[\(4,\)\], those of the first batch"):  # fmt: skip
        sources.source_of(sized(lambda seed: [5, 6, 5] if seed == 1 else [4]), SETTINGS)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (np.zeros(4, int), r"train\(0\) yields a batch of the types \['int32'\], expected"),
        (
            {"x": np.zeros(4)},
            r"of the structure \({'x': \*}\), expected \(\*\), of the first batch",
        ),
        (np.array(["a"] * 4), r"a batch of train\(0\) has array.* expected arrays of numbers"),
    ],
)
def test_batches_are_of_the_kind_of_the_first(other, message):
    problem = dataclasses.replace(PROBLEM, train=lambda seed: [np.zeros(4), other])
    with pytest.raises(ValueError, match=message):
        next(sources.source_of(problem, SETTINGS).items())
    as_wide = dataclasses.replace(PROBLEM, train=lambda seed: [np.zeros(4, "f4"), np.zeros(4)])
    assert next(sources.source_of(as_wide, SETTINGS).items()).dtype == np.float32


def test_a_loader_may_fill_one_buffer_anew_and_must_heed_its_integer():
    def filled(seed):
        buffer = np.empty(4, np.float32)
        for i in np.random.default_rng(seed).permutation(8):
            buffer[:] = i
            yield buffer

    chunk = next(sources.source_of(dataclasses.replace(PROBLEM, train=filled), SETTINGS).items())
    expected = [np.random.default_rng(seed).permutation(8)[:4] for seed in range(3)]
    assert chunk[..., 0].tolist() == [order.tolist() for order in expected]
    rng = np.random.default_rng(0)
    unseeded = dataclasses.replace(PROBLEM, train=lambda seed: [rng.normal(size=4)])
    with pytest.raises(
        ValueError, match=r"train\(0\) yields another first batch when it is called"
    ):
        sources.source_of(unseeded, SETTINGS)
    missing = dataclasses.replace(PROBLEM, train=lambda seed: [np.array([1.0, np.nan])])
    assert next(sources.source_of(missing, SETTINGS).items()).shape == (3, 4, 2)


def test_gradients_are_looked_at_whatever_the_order_of_the_examples():
    train = {"x": np.arange(1000.0), "a": np.arange(1000) % 2}
    probe = sources.source_of(dataclasses.replace(PROBLEM, train=train), SETTINGS).probe
    assert len(probe["x"]) == 256
    assert 300 < np.mean(probe["x"]) < 700
    np.testing.assert_array_equal(probe["x"] % 2, probe["a"])


def test_present_is_like_the_losses_or_in_their_order(setup):
    def seen(present):
        problem = dataclasses.replace(PROBLEM, present=lambda batch: present)
        return np.isnan(setups.Setup(problem, SETTINGS).initial_losses[0]).tolist()

    assert setup.names == (A, B)
    assert seen({B: True, A: False}) == seen([False, True]) == [True, False]
    assert seen(np.array([True, False])) == [False, True]
    with pytest.raises(ValueError, match=r"names the tasks click, view, .* \$a_\$ \[/64\], \.\./"):
        seen({"click": True, "view": False})
    with pytest.raises(ValueError, match="values of type float32, expected a bool a task"):
        seen({A: 1.0, B: 0.0})


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


def test_equal_steps_of_few_examples_are_no_evidence():
    rng, names = np.random.default_rng(0), ("sum", "1 / initial losses", "tuned weights")
    names, claims = (*names, *map(str, range(20))), 0
    for _ in range(100):
        right = rng.binomial(100, 0.98, size=(len(names), 3)) / 100
        claims += any(summary.judged(dict(zip(names, 100 * right, strict=True))).values())
    assert claims <= 5


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


def test_a_divergence_is_said_with_who_finished(results):
    def ended(strategies, seeds=(0, 1, 2), first=0):
        changed = {**results["strategies"]}
        for name in strategies:
            test = {m: [list(row) for row in rows] for m, rows in changed[name]["test"].items()}
            for seed in seeds:
                test[A][seed][first:] = [None] * (3 - first)
            changed[name] = {**changed[name], "test": test}
        return {**results, "strategies": changed}

    alone = ended(["sum"])
    said = summary.answer(alone)
    assert said.startswith("Equal weights diverged in 3 of 3 seeds, so that nothing can be held")
    for name in ("dwa", "tuned weights", "1 / initial losses"):
        assert name in said.partition("finished")[2]
    assert any("not finite: sum (equal) (all seeds)." in note for note in summary.notes(alone))
    without_losses = {
        name: {**entry, "train_loss": {m: [[None] * 12] * 3 for m in (A, B)}}
        for name, entry in ended(results["strategies"])["strategies"].items()
    }
    everyone = summary.answer({**results, "strategies": without_losses})
    assert "nothing else finished in all seeds" in everyone
    nowhere = {m: [[None] * 3] * 3 for m in (A, B)}
    nothing = {name: {**e, "test": nowhere} for name, e in results["strategies"].items()}
    said = summary.answer({**results, "strategies": nothing})
    assert said.startswith("No metric is a finite number under any strategy")
    some = ended(["dwa"], seeds=(1,), first=2)
    assert any("not finite: dwa (seed 1)." in note for note in summary.notes(some))
    at_end = ended(["sum"], seeds=(0, 2), first=2)
    for run_ in at_end["strategies"].values():
        run_["best"] = [0, 0, 0]
    assert summary.answer(at_end).startswith("Equal weights diverged in 2 of 3 seeds. ")
    dwa = {**results["strategies"]["dwa"], "train_loss": without_losses["dwa"]["train_loss"]}
    without = {**results, "strategies": {**results["strategies"], "dwa": dwa}}
    assert summary.diverged(without) == {"dwa": [0, 1, 2]}  # whatever its metrics are
    assert summary.diverged(results) == {}


def test_a_model_of_one_task_that_diverged_is_named(results):
    single = results["single_task"][B]
    test = [list(row) for row in single["test"][B]]
    test[1] = [None] * len(test[1])
    lost = {**single, "test": {**single["test"], B: test}}
    without = {**results, "single_task": {**results["single_task"], B: lost}}
    said = f"Models of one task alone ended with no number: {B} (seed 1). There is no Δm"
    assert any(note.startswith(said) for note in summary.notes(without))
    assert "nan" not in summary.text(without, 200)
    assert not any("one task alone ended" in note for note in summary.notes(results))


def test_it_is_said_where_all_metrics_are_near_zero(results):
    def said(value):
        def near(run):
            near_it = lambda x: np.full(np.shape(x), value).tolist()  # noqa: E731
            return {**run, "validation": {m: near_it(v) for m, v in run["validation"].items()}}

        singles = {m: near(run) for m, run in results["single_task"].items()}
        notes = summary.notes({**results, "single_task": singles})
        return any(
            note.startswith("None of the baseline's metrics is clearly above") for note in notes
        )

    assert said(0.05)
    assert not said(0.5)


def test_small_numbers_are_shown():
    assert statistics.Estimate(3e-6, 1e-7).text(4, small=True) == "3.0e-06 ± 1.0e-07"
    assert statistics.Estimate(3e-6, 1e-7).text(2, signed=True) == "+0.00 ± 0.00"
    assert statistics.Estimate(0.0, 0.0).text(4, small=True) == "0.0000 ± 0.0000"
    assert statistics.Estimate(np.nan, np.nan).text() == "–"


def test_metrics_of_other_names_are_said_to_leave_out_a_baseline(results):
    said = "Metrics have other names than the tasks"
    assert not any(note.startswith(said) for note in summary.notes(results))
    without = {**results, "single_task": {}}
    assert any(note.startswith(said) for note in summary.notes(without))


def test_what_is_finite_is_chosen_before_what_is_not():
    low = -np.inf
    assert selection._best_config(np.array([[low, 1.0, 5.0], [low, 1.0, low]])) == 1
    assert selection._best_config(np.array([[low, 5.0, 1.0], [9.0, low, low]])) == 0
    assert selection._best_config(np.full((2, 3), low)) == 0
    assert selection._reference(np.array([np.nan, 2.0])) == 2
    assert selection._reference(np.array([np.nan])) == selection._reference(np.zeros(2)) == 1


def test_equal_weights_that_diverge_leave_a_comparison_of_the_others(tmp_path):
    large = lambda w, x: {"a": 1e5 * fits(w, x)["a"], "b": fits(w, x)["b"]}  # noqa: E731
    problem = dataclasses.replace(
        least_squares(fits, higher_is_better=False, learning_rates=0.1),
        loss_fn=large, optimizer=lambda rate, steps: optax.sgd(rate),
    )  # fmt: skip
    found = mtl.compare.run(problem, [], seeds=3, live=False, checkpoints=2, candidates=1)
    assert found.answer.startswith("Equal weights diverged in 3 of 3 seeds")
    assert "tuned weights" in found.answer
    tuned = found.results["strategies"]["tuned weights"]["test"]
    assert all(np.isfinite(np.array(tuned[task], float)).all() for task in "ab")
    assert found.results["diagnosis"]["verdict"] == "diverged"
    json.dumps(found.results, allow_nan=False)
    assert found.save(tmp_path).exists()  # its pictures too


def test_results_are_valid_json(results, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda results: {})
    old = {**results, "diagnosis": {**results["diagnosis"], "left": {A: float("nan"), B: 0.5}}}
    Comparison(old).save(tmp_path)
    content = (tmp_path / "results.json").read_text()
    assert json.loads(content, parse_constant=pytest.fail)["diagnosis"]["left"] == {A: None, B: 0.5}


def test_what_makes_no_sense_is_left_out_by_name(results):
    assert selection.is_near_zero(np.array([0.05, 0.05, 0.051]), True)  # R² of .05
    assert selection.is_near_zero(np.array([0.9, -0.5, 0.4]), True)
    assert not selection.is_near_zero(np.array([0.5, 0.52, 0.49]), True)
    assert not selection.is_near_zero(np.array([0.01, 0.0101, 0.0099]), False)  # an error
    without = {**results, "left_out": [A]}
    assert any(f"Δm leaves out {A}" in note for note in summary.notes(without))
    row = {row.name: row for row in summary.rows(without)}[STRATEGY]
    entry, single = results["strategies"][STRATEGY], results["single_task"][B]
    mine, base = (selection.at_best(x, "test", B) for x in (entry, single))
    expected = np.mean(100 * (mine - base) / np.maximum(np.abs(base), np.abs(base.mean()) / 10))
    assert row.delta_m.mean == pytest.approx(expected)


def test_times_are_left_out_where_the_plain_step_disagrees(results):
    busy = {name: {**entry, "wall_ratio": None} for name, entry in results["strategies"].items()}
    busy = {**results, "strategies": busy}
    assert "time" in summary.text(results, 200)
    assert "time" not in summary.text(busy, 200)
    assert any("differed by more than" in note for note in summary.notes(busy))
    # Many static weights are trained side by side, each in less time than alone.
    timed = {row.name for row in summary.rows(results) if row.wall_ratio is not None}
    assert timed == {*results["strategies"]} - {"1 / initial losses", "tuned weights"}


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


def test_a_whole_file_of_something_else_is_made_again(tmp_path):
    for content in (b"", b"no arrays", pickle.dumps(1)):
        digest = hashlib.sha256(content).hexdigest().encode()
        (tmp_path / "x.run").write_bytes(digest + b"\n" + content)
        assert store.load(tmp_path / "x.run", 1, pytest.fail) is None
    np.savez(tmp_path / "other", a=np.ones(3))
    content = (tmp_path / "other.npz").read_bytes()
    digest = hashlib.sha256(content).hexdigest().encode()
    (tmp_path / "x.run").write_bytes(digest + b"\n" + content)
    assert store.load(tmp_path / "x.run", 1, pytest.fail) is None


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
        lambda r: r.pop("window_steps"),
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
        ("..x:problem", r"'\.\.x:problem' is no place of a problem"),
    ],
)
def test_what_is_no_problem_is_named(target, message):
    with pytest.raises(SystemExit, match=rf"error: .*{message}"):
        command.main([target])


def test_every_problem_has_a_folder_of_its_own(results, monkeypatch, tmp_path, capsys):
    targets = ["a:problem", "b.c:problem", "x/a.py:problem", "y/a.py:problem", "a:other", "d:Other"]
    folders = command._folders(targets)
    assert list(folders) == targets
    assert len({folder.lower() for folder in folders.values()}) == len(targets)
    assert command._folders(["a:one", "b:two"]) == {"a:one": "one", "b:two": "two"}
    assert folders["b.c:problem"] == "b.c.problem"
    assert not any(re.search(r"[/\\:]", folder) for folder in folders.values())
    with pytest.raises(SystemExit, match="error: a:problem is given twice: leave one out"):
        command.main(["a:problem", "a:problem"])
    shown = []
    monkeypatch.setattr(command, "load", lambda target: PROBLEM)
    monkeypatch.setattr(command, "compared", lambda *_, **__: results)
    monkeypatch.setattr(command, "_show", lambda found, out, console: shown.append(out))
    command.main(["a:problem", "b:problem", "--out", str(tmp_path)])
    assert shown == [tmp_path / "a.problem", tmp_path / "b.problem"]
    assert (tmp_path / command.TOGETHER).exists()
    assert f"{PROBLEM.title} (b:problem): " in capsys.readouterr().out  # of one title


def test_a_file_is_run_as_python_would_run_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    for folder, size in (("one", 3), ("two", 4)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"beside_{folder}.py").write_text(f"SIZE = {size}\n")
        (tmp_path / folder / "mine.py").write_text(
            "from __future__ import annotations\nimport dataclasses\n"
            f"from beside_{folder} import SIZE\nfrom {__name__} import PROBLEM\n"
            "@dataclasses.dataclass\nclass Options:\n    size: int = SIZE\n"
            "problem = dataclasses.replace(PROBLEM, title=str(Options().size))\n"
        )
    titles = [command.load(f"{tmp_path / f}/mine.py:problem").title for f in ("one", "two")]
    assert titles == ["3", "4"]
    (tmp_path / "json.py").write_text("raise ValueError('of mine')\n")
    with pytest.raises(ValueError, match="of mine"):  # where it is raised is seen
        command.main([f"{tmp_path}/json.py:problem"])
    assert sys.modules["json"] is json


def test_results_that_are_not_there_are_no_interruption(tmp_path):
    with pytest.raises(SystemExit) as ended:
        command.main(["--from", str(tmp_path / "nothing.json")])
    text = str(ended.value)
    assert "there is no file" in text
    assert "nothing.json" in text
    assert "start the same command" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 10}, "multiple of checkpoints"),
        ({"seeds": 0}, "seeds is 0"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"learning_rates": (0.1, -1.0)}, "expected positive numbers"),
        ({"learning_rates": (1e-60,)}, "in the range of float32"),
        ({"learning_rates": (1e60,)}, "in the range of float32"),
        ({"learning_rates": "0.1"}, "learning_rates has '0.1' in it, expected numbers"),
        ({"steps": 12.0}, r"steps is 12\.0, expected a whole number"),
        ({"seeds": True}, "seeds is True, expected a whole number"),
        ({"seeds": "3"}, "seeds is '3', expected a whole number"),
        ({"tune": "no"}, "tune is 'no', expected True or False"),
    ],
)
def test_bad_settings_say_what_to_change(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


@pytest.mark.parametrize("rates", [1e-2, np.float64(1e-2), (1e-2,), [1e-2], jnp.array(1e-2)])
def test_one_learning_rate_is_a_grid_of_one(rates):
    assert dataclasses.replace(SETTINGS, learning_rates=rates).learning_rates == (
        pytest.approx(1e-2),
    )
    problem = dataclasses.replace(PROBLEM, learning_rates=rates)
    assert front.settings_of(problem, 3).learning_rates == (pytest.approx(1e-2),)


@pytest.mark.parametrize("begin", [front.run, front.diagnose])
def test_no_learning_rates_are_those_of_the_problem(begin, monkeypatch):
    class StoppedError(Exception):
        pass

    def stopped(problem, settings):
        raise StoppedError(settings)

    monkeypatch.setattr(front, "Setup", stopped)
    monkeypatch.setattr(run, "Setup", stopped)
    problem = dataclasses.replace(PROBLEM, learning_rates=3e-3, steps=20)
    live = {"live": False} if begin is front.run else {}
    for given in (None, (), [], {}):
        settings = {} if given == {} else {"learning_rates": given, "steps": given}
        with pytest.raises(StoppedError) as ended:
            begin(problem, seeds=2, **live, **settings)
        assert ended.value.args[0].learning_rates == (3e-3,)
        assert ended.value.args[0].steps == 20
    with pytest.raises(ValueError, match=r"steps is 20\.0, expected a whole number"):
        begin(problem, **live, steps=20.0)
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        begin(problem, **live, steps=0)


def test_bad_problems_say_what_to_change():
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            setups.Setup(dataclasses.replace(PROBLEM, **changes), SETTINGS)

    refused("init=3, expected a function", init=3)
    refused("metrics=None, expected a function", metrics=None)
    refused("present='always', expected a function", present="always")
    refused("options=None, expected a dict", options=None)
    refused("jac=None, expected a dict", jac=None)
    refused("mgda has no option 'num_tasks'", options={"mgda": {"num_tasks": 3}})
    refused("mgda has 3, expected a dict of options", options={"mgda": 3})
    refused("jac has 'has_aux' in it, which a comparison sets", jac={"has_aux": True})
    refused("optimizer returns None, expected an Optax", optimizer=lambda rate, steps: None)
    refused("pcgrad has no option 'key'; there are: none", options={"pcgrad": {"key": 3}})
    named = lambda key: {**init(key), "name": "mine"}  # noqa: E731
    refused(r"init makes for seed 0 has 'mine' at \['name'\], expected arrays", init=named)
    by_seed = lambda key: {**init(key), "w": jnp.ones(jax.random.key_data(key)[1] + 1)}  # noqa: E731
    refused(r"init for seed 1 makes parameters with float32\[2\] at \['w'\]", init=by_seed)
    with_state = {
        "stateful": True, "init": lambda key: (init(key), {"n": jnp.int32(0)}),
        "metrics": lambda params, state, split: scores(params, split),
    }  # fmt: skip
    refused(
        r"loss_fn returns a state with float32\[\] at \['n'\], expected int32\[\]",
        loss_fn=lambda params, state, batch: (losses(params, batch), {"n": state["n"] + 0.5}),
        **with_state,
    )
    refused(
        "stateful is True, but loss_fn returns a dict",
        loss_fn=lambda params, state, batch: losses(params, batch), **with_state,
    )  # fmt: skip
    refused(r"first axes of \[3, 4\]", train={"x": np.zeros((3, 1)), "y": np.zeros(4)})
    refused("metrics returns an empty dict", metrics=lambda params, split: {})
    refused(
        r"metric 'x' has shape \(2,\)", metrics=lambda params, split: {"x": jnp.zeros(2)}, unit=""
    )
    refused("higher_is_better says nothing of the metric", higher_is_better={A: True})
    refused("says something of 1 tasks", present=lambda batch: True)
    for value in (None, "a", 1j):
        refused(
            "metric 'x' is .*, expected one real number", metrics=lambda p, s, v=value: {"x": v}
        )
    refused("metrics returns a float, expected a dict", metrics=lambda params, split: 0.5)
    refused("unit is None for the metric .*, expected a text", unit=None)
    refused("unit is 3 for the metric '../<b>&', expected", unit={A: "", B: 3})
    refused("is 'lower' for the metric .*, expected True or False", higher_is_better="lower")
    refused("expected True or False, or a dict of them", higher_is_better={A: True, B: 1})
    refused("Problem.options: no strategy is called 'dwe'; near it: dwa", options={"dwe": {}})
    refused("dwa has no option 'heat'; there are: temperature", options={"dwa": {"heat": 1.0}})
    refused("title is None, expected a text", title=None)
    refused("init returns a dict, expected the pair", stateful=True)
    refused(
        "there is state beside them", stateful=True, init=lambda key: (init(key), jnp.zeros(2)),
        jac={"in_axes": (None, 0)},
    )  # fmt: skip
    with pytest.raises(ValueError, match="batch=3, expected a function"):
        Draw(3)
    for wrong in ([mtl.upgrad], [mtl.upgrad(2)]):
        with pytest.raises(ValueError, match=r"strategies has .* in it, expected names of the"):
            mtl.compare.run(PROBLEM, wrong, live=False)
    with pytest.raises(ValueError, match="out is empty, expected a folder"):
        mtl.compare.run(PROBLEM, [], out="")
    with pytest.raises(ValueError, match="no setting is called 'step'"):
        front.settings_of(PROBLEM, 3, step=4)
    with pytest.raises(ValueError, match="no strategy is called 'dwe'; near it: dwa"):
        run.compared(PROBLEM, ["dwe"], SETTINGS)
    with pytest.raises(ValueError, match="dtp needs kpis"):
        run.compared(PROBLEM, ["dtp"], SETTINGS)
    chosen, skipped = run._chosen(setups.Setup(PROBLEM, SETTINGS), ["all"])
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


def seen_training(left=(0.4, 0.4), norms=(1.0, 1.0), cosine=0.1, start=(1.0, 1.3)):
    """What a diagnosis is made from: two seeds, ten steps and looks, two tasks."""
    shares = np.linspace(1, left, 10)
    cosines = np.where(np.eye(2), 1.0, cosine)
    return (
        np.tile(shares * np.array(start), (2, 1, 1)),
        np.tile(np.array(norms), (2, 10, 1)),
        np.tile(cosines, (2, 10, 1, 1)),
    )


def test_a_training_that_diverged_is_no_training_with_nothing_to_treat():
    losses, norms, cosines = seen_training()
    nothing = diagnosis.of(("a", "b"), losses * np.nan, norms * np.nan, cosines * np.nan)
    assert (nothing.verdict, nothing.recommended) == ("diverged", ("sum",))
    assert str(nothing).startswith("The training under equal weights diverged")
    assert "in 2 of 2 trainings" in nothing.reasons[0]
    assert "smaller learning rate" in nothing.advice
    assert nothing.as_dict()["losses"] == {"a": None, "b": None}
    json.dumps(nothing.as_dict(), allow_nan=False)
    losses[1, 5:], norms[1, 5:], cosines[1, 5:] = np.nan, np.inf, np.nan
    once = diagnosis.of(("a", "b"), losses, norms, cosines)
    assert once.verdict == "diverged"
    assert "in 1 of 2 trainings" in once.reasons[0]
    assert once.left == pytest.approx({"a": 0.4, "b": 0.4})  # of the one that ended
    absent = seen_training()
    absent[0][:, [0, -1], 1] = np.nan
    assert diagnosis.of(("a", "b"), *absent).verdict == "nothing"


def test_a_task_without_a_gradient_is_named():
    found = diagnosis.of(("const", "b"), *seen_training(norms=(0.0, 2.0)))
    assert "that of const was zero at every look" in found.reasons[0]
    assert not any("times that of" in reason for reason in found.reasons[:3])
    three = [np.concatenate([x, x[..., :1]], axis=-1) for x in seen_training(norms=(3.0, 0.0))[:2]]
    three[1][..., 2] = 1.5
    cosines = np.broadcast_to(np.eye(3), (2, 10, 3, 3))
    found = diagnosis.of(("a", "const", "c"), *three, cosines)
    assert any("that of a is 2 times that of c" in reason for reason in found.reasons)


def test_paces_are_true_of_losses_that_reach_zero():
    solved = diagnosis.of(("slow", "fast"), *seen_training(left=(0.5, 0.0)))
    assert solved.verdict == "pace"
    assert "and 0 % of that of fast: the paces differ." in solved.reasons[-1]
    below = diagnosis.of(("slow", "nll"), *seen_training(left=(0.5, -1.0)))
    assert below.reasons[-2] == "Pace: 50 % of the loss of slow is left at the end."
    assert "Pace is not told of nll" in below.reasons[-1]
    assert not any("left far behind" in reason for reason in (*solved.reasons, *below.reasons))


def test_conflicts_are_counted_among_the_cosines_that_are_known():
    losses, norms, cosines = seen_training(cosine=-0.9)
    cosines[:, 3:, 0, 1] = np.nan  # 14 of 20
    found = diagnosis.of(("a", "b"), losses, norms, cosines)
    assert found.conflict_rate == 1
    assert found.verdict == "conflict"


def test_no_two_pairs_share_a_name():
    names = ("a", "a-b", "b-c", "c")
    losses, norms = np.ones((1, 2, 4)), np.ones((1, 2, 4))
    cosines = np.arange(32.0).reshape(1, 2, 4, 4) / 32
    found = diagnosis.of(names, losses, norms, cosines)
    assert len(found.cosines) == 6
    assert "'a'-'b-c'" in found.cosines
    pairs = list(itertools.combinations(range(4), 2))
    setup = types.SimpleNamespace(names=names, pairs=pairs, metric_names=[])
    notes = dict.fromkeys(("validation", "test"), np.ones((1, 1, 2, 0)))
    notes |= dict.fromkeys(("train_loss", "weights", "norm"), losses[:, None])
    notes |= {"cosine": cosines[:, None], "wall_ratio": np.ones(()), "flops_ratio": np.ones(())}
    assert selection._kept(setup, notes, 0)["cosine"].keys() == found.cosines.keys()


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


def test_mistakes_of_one_strategy_are_said_before_any_is_trained(monkeypatch):
    monkeypatch.setattr(run._Trainer, "notes", pytest.fail)
    problem = least_squares(fits, higher_is_better=False, options={"gradnorm": {"alpha": "much"}})
    with pytest.raises(ValueError, match="alpha=much, expected"):
        mtl.compare.run(problem, ["uwso", "gradnorm"], seeds=2, live=False, checkpoints=2)


def test_other_static_weights_are_trained_anew():
    """As many as before, of which other ones are those of a single task."""
    setup = setups.Setup(PROBLEM, SETTINGS)
    some = [np.full((3, 2), i, np.float32) for i in range(4)]
    facts = [train.facts(setup, train.STATIC, order) for order in (some, some, some[::-1])]
    assert facts[0] == facts[1] != facts[2]


def test_optimizers_are_followed_by_sgd():
    """AdaTask's own moments, and not Adam's after them."""
    problem = least_squares(fits, higher_is_better=False, learning_rates=0.1, steps=2)
    found = mtl.compare.run(problem, ["adatask"], seeds=1, live=False, checkpoints=2, candidates=1)
    x, w = np.array(problem.train), jnp.zeros(3)
    tx = optax.chain(mtl.adatask(2), optax.sgd(optax.cosine_decay_schedule(0.1, 2)))
    state, order = tx.init(w), np.random.default_rng(0).permutation(32)
    for batch in (x[order[:8]], x[order[8:16]]):
        _, jac = mtl.value_and_jac(fits)(w, batch)
        updates, state = tx.update(jac, state, w)
        w = optax.apply_updates(w, updates)
    ours = found.results["strategies"]["adatask"]["test"]
    for task, value in fits(w, problem.test).items():
        np.testing.assert_allclose(ours[task][0][-1], value, rtol=1e-4)


def test_examples_that_are_tasks_are_not_halved():
    def loss(w, example):
        return jnp.sum((w - example) ** 2)

    problem = dataclasses.replace(
        least_squares(fits, higher_is_better=False), loss_fn=loss, batch_size=4,
        jac={"in_axes": (None, 0)},
    )  # fmt: skip
    with pytest.raises(ValueError, match="modo halves a batch, and its examples are the tasks"):
        mtl.compare.run(problem, ["modo"], live=False)


def test_batches_without_halves_are_not_halved():
    with pytest.raises(ValueError, match="modo halves a batch, and it has an array of one example"):
        mtl.compare.run(least_squares(fits, batch_size=1), ["modo"], live=False)
    x, class_weights = np.ones((8, 3), "f"), np.ones(3, "f")
    problem = dataclasses.replace(
        least_squares(fits, higher_is_better=False),
        train=lambda seed: [(x, class_weights)],
        loss_fn=lambda w, batch: fits(w, batch[0]),
    )
    with pytest.raises(ValueError, match=r"forum halves a batch, and .* first axes of \[3, 8\]"):
        mtl.compare.run(problem, ["forum"], live=False)
    points = dataclasses.replace(problem, train=Draw(lambda key: (x, class_weights)), steps=2)
    assert sources.why_not_halved(points, setups.Setup(points, SETTINGS).source) == ""


def test_batches_of_another_kind_are_said(monkeypatch):
    monkeypatch.setattr(run._Trainer, "notes", pytest.fail)

    def problem(train):
        return dataclasses.replace(least_squares(fits, higher_is_better=False), train=train)

    x = np.ones((8, 3), "f")
    with pytest.raises(ValueError, match="train is a generator, which yields its batches once"):
        mtl.compare.run(problem(x for _ in range(3)), ["uwso"], live=False)
    with pytest.raises(ValueError, match=r"train can't be called as train\(0\): too many"):
        mtl.compare.run(problem(lambda: [x]), ["uwso"], live=False)
    with pytest.raises(TypeError) as error:
        mtl.compare.run(problem([x, x]), ["uwso"], live=False)
    said = "loss_fn was called with a batch of Problem.train: [(8, 3), (8, 3)]"
    assert said in error.value.__notes__


def test_a_failed_strategy_changes_no_verdict():
    deltas = {name: np.array([-10.0, -12, -11]) for name in ("sum", "tuned weights")}
    deltas |= {"1 / initial losses": np.array([-9.0, -12, -11]), "dwa": np.array([-9.0, -11, -10])}
    verdicts = summary.judged(deltas)
    assert not any(verdicts.values())
    for bad in (np.full(3, np.nan), np.array([np.nan, 1e30, -1e30]), np.full(3, -1e20)):
        with_bad = summary.judged({**deltas, "bad": bad})
        assert {name: with_bad[name] for name in verdicts} == verdicts


def test_long_and_wide_names_fit_a_terminal(results):
    strategies = {**results["strategies"], "名前" * 30: results["strategies"]["sum"]}
    for width in (60, 80, 100, 140):
        table = summary.text({**results, "strategies": strategies}, width)
        assert max(map(summary._width, table.splitlines())) <= width
        assert "名前" in table
    assert ("名前" * 30) in summary.markdown({**results, "strategies": strategies})


def test_a_page_shows_a_name_as_it_is(results):
    strategies = {"a\\|b <i> *c*": results["strategies"][STRATEGY], **results["strategies"]}
    table = summary.markdown({**results, "strategies": strategies})
    line = next(line for line in table.splitlines() if line.startswith("| a"))
    assert line.startswith(r"| a\\\|b \<i> \*c\* |")
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == table.splitlines()[1].count("|")


def test_metrics_keep_their_digits():
    problem = least_squares(
        lambda w, x: {"a": -1234567 - 10 * float(np.sum(np.asarray(w)))}, higher_is_better=False
    )
    found = mtl.compare.run(problem, [], seeds=1, live=False, checkpoints=4, candidates=1)
    assert len(set(found.results["strategies"]["sum"]["test"]["a"][0])) == 4
    ranks = [row.rank.mean for row in summary.rows(found.results) if row.rank]
    assert len(ranks) > len(set(ranks)) > 1  # tuned weights may be one of the others
    traced = least_squares(lambda w, x: {"a": jnp.sum(w)})
    found = mtl.compare.run(traced, [], seeds=1, live=False, checkpoints=4, candidates=1)
    for value in found.results["strategies"]["sum"]["test"]["a"][0]:
        assert np.float32(value) == pytest.approx(value, rel=1e-8)


def test_an_optimizer_may_ask_for_more_than_one_step():
    problem = least_squares(
        fits,
        higher_is_better=False,
        optimizer=lambda rate, steps: optax.adam(optax.cosine_decay_schedule(rate, steps // 2)),
    )
    mtl.compare.run(problem, [], seeds=1, live=False, checkpoints=2, candidates=1)


def test_a_metric_in_python_is_asked_of_models_that_are_numbers():
    def metrics(w, split):
        values = np.asarray(w)
        if not np.isfinite(values).all():
            raise ValueError("Input contains NaN.")
        if np.abs(values).max() > 100:
            raise ValueError("too large")
        return {"a": float(fits(values, split)["a"])}

    options = {"higher_is_better": False, "optimizer": lambda rate, steps: optax.sgd(rate)}
    problem = least_squares(metrics, learning_rates=(1e-2, 1e30), **options)
    found = mtl.compare.run(problem, [], seeds=1, live=False, checkpoints=2, candidates=1)
    assert {run["rate"] for run in found.results["strategies"].values()} == {0.01}
    with pytest.raises(ValueError, match="too large") as error:
        mtl.compare.run(
            dataclasses.replace(problem, learning_rates=(3e2,)), [], seeds=1, live=False
        )
    assert "metrics was called with a model of seed 0" in error.value.__notes__


def test_metrics_may_come_in_another_order_on_another_split(tmp_path):
    def measured(factor):
        def metrics(w, split):
            found = {
                name: loss * factor ** (len(split) == 5) for name, loss in fits(w, split).items()
            }
            return dict(sorted(found.items(), reverse=len(split) == 5))

        problem = least_squares(metrics, higher_is_better=False)
        problem = dataclasses.replace(problem, test=problem.test[:5])
        options = {"seeds": 1, "live": False, "checkpoints": 2, "candidates": 1}
        return mtl.compare.run(problem, [], out=tmp_path, **options).results["strategies"]["sum"]

    once, twice = measured(1.0), measured(2.0)
    assert once["test"]["a"] != once["test"]["b"]
    # What is measured on the test split alone is measured anew, under its own name.
    for name in "ab":
        np.testing.assert_allclose(twice["test"][name], 2 * np.array(once["test"][name]), rtol=1e-6)
        assert twice["validation"][name] == once["validation"][name]
    other = least_squares(lambda w, x: {"a" if len(x) == 32 else "c": jnp.sum(w)})
    with pytest.raises(ValueError, match="metrics returns 'c' of one split"):
        mtl.compare.run(dataclasses.replace(other, test=other.test[:5]), [], live=False)


@pytest.mark.parametrize("name", run.RESERVED)
def test_no_strategy_takes_the_name_of_a_baseline(name, monkeypatch):
    monkeypatch.setitem(mtl.STRATEGIES, name, mtl.STRATEGIES["dwa"])
    with pytest.raises(ValueError, match="as what a comparison always has"):
        mtl.compare.run(least_squares(fits), [name], live=False)


def test_operations_do_not_depend_on_how_many_share_a_batch():
    def batch(key):
        return jax.random.normal(key, (64, 3))

    problem = dataclasses.replace(
        least_squares(fits, higher_is_better=False, steps=2), train=Draw(batch)
    )
    costs = [
        mtl.compare.run(problem, [], seeds=1, live=False, checkpoints=1, candidates=c)
        for c in (1, 16)
    ]
    few, many = (c.results["strategies"]["tuned weights"]["flops_ratio"] for c in costs)
    assert few == many == pytest.approx(1, rel=0.1)


def test_models_of_one_task_are_said_to_be_ahead_where_it_is_known(results):
    def far_ahead(seeds):
        def cut(run):
            fields = {k: {m: v[:seeds] for m, v in run[k].items()} for k in ("validation", "test")}
            return {**run, **fields, "best": run["best"][:seeds]}

        singles = {m: cut(run) for m, run in results["single_task"].items()}
        for single in singles.values():
            single["test"] = {m: (10 + np.array(v)).tolist() for m, v in single["test"].items()}
        strategies = {name: cut(run) for name, run in results["strategies"].items()}
        notes = summary.notes({**results, "single_task": singles, "strategies": strategies})
        return [note for note in notes if note.startswith("Models of one task alone are")]

    (said,) = far_ahead(3)
    assert said.endswith("with 2 times the parameters.")
    assert not far_ahead(1)


def test_a_training_whose_losses_grew_is_no_training_with_something_to_treat():
    found = mtl.compare.diagnose(
        least_squares(fits, learning_rates=3.0, optimizer=lambda rate, steps: optax.sgd(rate)),
        seeds=2, steps=10,
    )  # fmt: skip
    assert found.verdict == "diverged"
    assert "were together over 10 times their start" in str(found)
    assert "left far behind" not in str(found)


def test_a_loss_that_is_never_a_number_is_named():
    def losses(w, x):  # of parameters of its own
        return {"a": fits(w[:3], x)["a"], "b": jnp.nan * jnp.sum(w[3:])}

    problem = dataclasses.replace(
        least_squares(lambda w, x: {"a": fits(w[0], x)["a"]}, higher_is_better=False),
        init=lambda key: [jnp.zeros(3), jnp.zeros(2)],
        loss_fn=lambda w, x: losses(jnp.concatenate(w), x),
    )
    found = mtl.compare.diagnose(problem, seeds=1, steps=4)
    assert found.verdict == "diverged"
    assert "the loss of b was none in the first step already" in str(found)
    compared = mtl.compare.run(problem, [], seeds=1, live=False, checkpoints=2, candidates=1)
    assert any("The loss of b was no finite number" in note for note in compared.notes)


def test_tasks_that_share_nothing_are_told():
    problem = dataclasses.replace(
        least_squares(lambda w, x: fits(w["a"], x)),
        init=lambda key: {"a": jnp.zeros(3), "b": jnp.zeros(3)},
        loss_fn=lambda w, x: {name: fits(w[name], x)[name] for name in "ab"},
    )
    assert "the losses share no parameters" in str(mtl.compare.diagnose(problem, seeds=1, steps=4))


def test_metrics_in_python_have_the_same_names_on_every_split():
    def metrics(w, split):
        name = "a" if len(split) == 32 else "c"
        return {name: float(np.sum(np.asarray(w)))}

    problem = dataclasses.replace(least_squares(metrics), test=np.ones((5, 3), "f"))
    with pytest.raises(ValueError, match="metrics returns 'c' of one split, expected 'a' as of"):
        mtl.compare.run(problem, [], seeds=1, live=False, checkpoints=2, candidates=1)


def test_a_diagnosis_is_asked_for_by_the_command(capsys):
    target = [f"{__name__}:PROBLEM", "--diagnose", "--steps", "8", "--batch-size", "32"]
    command.main([*target, "--checkpoints", "2"])
    assert "Try: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected a multiple of checkpoints"):
        command.main([*target, "--checkpoints", "3"])


def test_one_loss_is_diagnosed():
    one = lambda w, x: {"a": fits(w, x)["a"]}  # noqa: E731
    problem = dataclasses.replace(least_squares(one, higher_is_better=False), loss_fn=one)
    assert mtl.compare.diagnose(problem, seeds=1, steps=4).verdict == "nothing"


@pytest.mark.parametrize(
    "optimizer", [optax.adam, optax.sgd(0.1), None, lambda rate: optax.sgd(rate)]
)
def test_an_optimizer_is_a_function_of_a_rate_and_the_steps(optimizer):
    """`optax.adam` itself would take the number of steps as its b1."""
    with pytest.raises(ValueError, match="a learning rate and the number of steps"):
        check_optimizer(optimizer, 20)
    check_optimizer(lambda rate, steps: optax.sgd(rate), 20)


def test_code_of_the_user_is_seen_through_modules_imports_and_slots(tmp_path, monkeypatch):
    (tmp_path / "ownlib").mkdir()
    (tmp_path / "ownlib" / "__init__.py").write_text("")
    (tmp_path / "ownlib" / "score.py").write_text("def of(w): return 1 + w\n")
    (tmp_path / "ownlib" / "user.py").write_text(
        "import ownlib.score\n"
        "def outside(w): return ownlib.score.of(w)\n"
        "def inside(w):\n    import ownlib.score as score\n    return score.of(w)\n"
        "class Held:\n    __slots__ = ('c',)\n    def __init__(self, c): self.c = c\n"
        "held = Held(1)\n"
        "def slotted(w): return held.c * w\n"
        "def named(w): return getattr(ownlib.score, 'of')(w)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    user = importlib.import_module("ownlib.user")
    functions = [user.outside, user.inside, user.slotted, user.named]
    before = [hashes.of_function(f) for f in functions]
    assert before == [hashes.of_function(f) for f in functions]
    monkeypatch.setattr(sys.modules["ownlib.score"], "of", lambda w: 100 + w)
    user.held.c = 2
    for function, old in zip(functions, before, strict=True):
        assert hashes.of_function(function) != old
