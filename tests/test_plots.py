"""What the pictures show is what was recorded."""

import collections
import io
import sys

import matplotlib as mpl

mpl.use("Agg")
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import pyplot
from numpy.testing import assert_allclose

import mtl_optax as mtl
from mtl_optax import plots


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def history():
    """A training of five steps, recorded by a scan."""
    target = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([-1.0, 0.5]), "c": jnp.array([0.0, 9.0])}

    def task_losses(w):
        return {task: jnp.sum((w - t) ** 2) for task, t in target.items()}

    tx = optax.chain(mtl.monitor_tasks(3), mtl.uwso(3), optax.sgd(0.05))

    def step(carry, _):
        w, state = carry
        losses, jac = mtl.value_and_jac(task_losses)(w)
        updates, state = tx.update(jac, state, w)
        return (w + updates, state), losses | mtl.summarize(state, jac.names)

    start = jnp.zeros(2)
    return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=5)[1])()


@pytest.mark.parametrize(
    ("plot", "field", "label"),
    [(plots.weights, "weights", "weight"), (plots.gradient_norms, "norm", "gradient norm")],
)
def test_lines_hold_each_task(history, plot, field, label):
    _, given = pyplot.subplots()
    ax = plot(history, ax=given)
    assert ax is given
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", label)
    assert [line.get_label() for line in ax.lines] == ["a", "b", "c"]
    for line in ax.lines:
        assert_allclose(line.get_ydata(), history[f"{field}/{line.get_label()}"])
    # Told apart without colour.
    assert len({line.get_linestyle() for line in ax.lines}) == 3


def test_norms_are_logarithmic(history):
    assert plots.gradient_norms(history).get_yscale() == "log"


def test_cosines_are_a_map_of_pairs_by_steps(history):
    ax = plots.cosines(history)
    (image,) = ax.images
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a-b", "a-c", "b-c"]
    assert_allclose(image.get_array()[1], history["cosine/a-c"])
    assert image.get_clim() == (-1, 1)
    # Dark to light, so that grey keeps the order.
    lightness = image.get_cmap()(np.linspace(0, 1, 9))[:, :3] @ [0.299, 0.587, 0.114]
    assert np.all(np.diff(lightness) > 0)


def test_plane_fills_the_front():
    runs = {
        "left": {"a": np.array([3.0, 1.0]), "b": np.array([3.0, 2.0])},
        "right": {"a": 2.0, "b": 1.0},
        "beaten": {"a": 2.0, "b": 2.0},
    }
    ax = plots.pareto_plane(runs, ("a", "b"))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")
    assert_allclose(ax.lines[0].get_xydata(), [[3, 3], [1, 2]])
    assert [line.get_markerfacecolor() == "white" for line in ax.lines] == [False, False, True]
    upside_down = plots.pareto_plane(runs, ("a", "b"), higher_is_better=True)
    assert [line.get_markerfacecolor() == "white" for line in upside_down.lines] == [
        True,
        True,
        False,
    ]


def test_affinity_shows_its_numbers_and_who_is_who():
    matrix = np.array([[0.2, -0.1, 0.0], [0.05, 0.3, 0.01], [-0.2, 0.1, 0.4]])
    ax = plots.affinity(matrix, ("a", "b", "c"))
    (image,) = ax.images
    assert_allclose(image.get_array(), matrix)
    assert image.get_clim() == (-0.4, 0.4)
    assert [text.get_text() for text in ax.texts][:3] == ["0.200", "-0.100", "0.000"]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("step for", "loss of")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"shape \(3, 3\), expected \(2, 2\)"):
        plots.affinity(matrix, ("a", "b"))


def test_front_tells_the_dominated_apart_and_says_its_measures():
    losses = {"a": np.array([0.0, 1.0, 1.0]), "b": np.array([1.0, 0.0, 1.0])}
    ax = plots.front(losses, true_front=[[0.0, 1.0], [1.0, 0.0]], reference=[2.0, 2.0])
    filled, hollow = ax.collections
    assert_allclose(filled.get_offsets(), [[0, 1], [1, 0]])
    assert_allclose(hollow.get_offsets(), [[1, 1]])
    assert ax.get_title() == "2 of 3 on the front, hypervolume 3, IGD+ 0, spacing 0"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")
    # Three tasks are parallel axes.
    ax = plots.front(losses | {"c": np.array([0.0, 0.0, 5.0])})
    assert [line.get_linestyle() for line in ax.lines] == ["-", "-", ":"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b", "c"]


def test_front_takes_its_tasks_in_the_order_of_the_losses():
    losses = {"z": jnp.array([1.0, 3.0]), "a": jnp.array([20.0, 10.0])}
    # (30 - 20) × (4 - 1) + (20 - 10) × (4 - 3), the tasks in the order of JAX.
    for reference in ([30.0, 4.0], {"z": 4.0, "a": 30.0}):
        ax = plots.front(losses, reference=reference)
        assert ax.get_title().startswith("2 of 2 on the front, hypervolume 40,")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "z")
    assert_allclose(ax.collections[0].get_offsets(), [[20, 1], [10, 3]])
    for true_front in ([[20.0, 1.0]], {"z": [1.0], "a": [20.0]}):
        ax = plots.front(losses, true_front=true_front)
        assert "IGD+ 0," in ax.get_title()
        assert_allclose(ax.lines[0].get_xydata(), [[20, 1]])
    kept = collections.OrderedDict(losses)
    assert plots.front(kept, reference=[4.0, 30.0]).get_title().count("hypervolume 40")


def test_front_says_what_does_not_fit():
    losses = {"a": [1.0, 2.0], "b": [2.0, 1.0]}
    for solutions in ({}, {"a": [1.0, 2.0]}):
        with pytest.raises(ValueError, match=r"have the tasks .* expected 2 or more"):
            plots.front(solutions)
    with pytest.raises(ValueError, match=r"expected \(N, K\): a dict of K tasks"):
        plots.front({"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match=r"shapes \{'a': \(2,\), 'b': \(1,\)\}, expected the same"):
        plots.front(losses | {"b": [1.0]})
    with pytest.raises(ValueError, match=r"reference has \['a', 'c'\], expected the tasks"):
        plots.front(losses, reference={"a": 1.0, "c": 1.0})


def test_a_run_that_diverged_is_not_on_the_front():
    runs = {
        "good": {"a": [2.0, 1.0], "b": [2.0, 2.0]},
        "diverged": {"a": [2.0, np.nan], "b": [2.0, np.nan]},
        "half": {"a": [2.0, 0.5], "b": [2.0, np.nan]},
    }
    ax = plots.pareto_plane(runs, ("a", "b"))
    assert [line.get_markerfacecolor() == "white" for line in ax.lines] == [False, True, True]


@pytest.mark.parametrize("name", ["_aux", "$x_$", "a\\$b$", ""])
def test_names_are_shown_as_they_are(name):
    def shown(ax):
        ax.figure.savefig(io.BytesIO())  # where Matplotlib would read a formula
        return [label.get_text() for label in ax.get_legend().get_texts()]

    runs = {name: {name: [1.0, 2.0], "b": [2.0, 1.0]}}
    for labels in (
        shown(plots.weights({f"weights/{name}": [1.0], "weights/b": [2.0]}))[:1],
        shown(plots.pareto_plane(runs, (name, "b"))),
    ):
        assert [label.strip().replace("\\$", "$") for label in labels] == [name]
    plain = plots.plain(name)
    plots.cosines({f"cosine/{name}": [0.1, 0.2]}).figure.savefig(io.BytesIO())
    plots.affinity([[1.0]], (name,)).figure.savefig(io.BytesIO())
    ax = plots.front({name: [1.0, 2.0], "b": [2.0, 1.0]})
    ax.figure.savefig(io.BytesIO())
    assert plain in (ax.get_xlabel(), ax.get_ylabel())


def test_second_link_is_drawn_by_its_field():
    ax = plots.weights({"weights/a": [1.0], "weights.2/a": [2.0]}, field="weights.2")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[2.0]]


def test_mistakes_say_what_to_do(history):
    with pytest.raises(ValueError, match=r"expected cosine/<task>: record what mtl.summarize"):
        plots.cosines({"weights/a": [1.0]})
    with pytest.raises(ValueError, match=r"expected \(T,\) for each"):
        plots.weights({"weights/a": 1.0})
    with pytest.raises(ValueError, match=r"expected the tasks \['d'\] too"):
        plots.pareto_plane({"run": history}, ("a", "d"))
    with pytest.raises(ValueError, match=r"run 'r' has the shapes \{'a': \(2,\), 'b': \(1,\)\}"):
        plots.pareto_plane({"r": {"a": [2.0, 1.0], "b": [2.0]}}, ("a", "b"))
    with pytest.raises(ValueError, match=r"expected \(T,\) for each, as many steps in both"):
        plots.pareto_plane({"r": {"a": [[2.0, 1.0]], "b": [[2.0, 1.0]]}}, ("a", "b"))
    for runs in ({}, [history]):
        with pytest.raises(ValueError, match=r"expected one or more, \{label: \{task: losses\}\}"):
            plots.pareto_plane(runs, ("a", "b"))
    for tasks in (("a",), ("a", "b", "c")):
        with pytest.raises(ValueError, match="expected the two of the axes"):
            plots.pareto_plane({"run": history}, tasks)
    for better in ([True], {"a": True, "b": False}, "yes", 1):
        with pytest.raises(ValueError, match="expected a bool, or one a task"):
            plots.pareto_plane({"run": history}, ("a", "b"), higher_is_better=better)
    with pytest.raises(ValueError, match="the history is a list, expected one dict of arrays"):
        plots.weights([{"weights/a": 1.0}])
    with pytest.raises(ValueError, match="solutions is a ndarray, expected"):
        plots.front(np.ones((3, 2)))


def test_each_axis_of_the_plane_has_its_own_direction():
    runs = {"high": {"x": [0.9], "y": [0.9]}, "low": {"x": [0.5], "y": [0.5]}}
    beaten = {False: [True, False], True: [False, True], (True, False): [False, False]}
    for better, expected in [*beaten.items(), ([False, False], beaten[False])]:
        ax = plots.pareto_plane(runs, ("x", "y"), higher_is_better=better)
        assert [line.get_markerfacecolor() == "white" for line in ax.lines] == expected


def test_one_nan_leaves_the_colours_of_the_others():
    ax = plots.affinity([[0.2, np.nan], [0.1, -0.3]], ("a", "b"))
    assert ax.images[0].get_clim() == (-0.3, 0.3)


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'mtl-optax\[plots\]'"):
        plots.weights({"weights/a": [1.0]})
