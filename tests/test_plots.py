"""What the pictures show is what was recorded."""

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
    with pytest.raises(ValueError, match=r"expected \(N, K\) with K >= 2"):
        plots.front({"a": [1.0, 2.0]})


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
    with pytest.raises(ValueError, match="no runs"):
        plots.pareto_plane({}, ("a", "b"))


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'mtl-optax\[plots\]'"):
        plots.weights({"weights/a": [1.0]})
