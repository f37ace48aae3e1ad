"""Pictures of a training: weights, gradient norms, cosines, affinity, trade-offs, whole fronts.

They draw what `mtl.summarize` returned at each step, stacked: a dict of ``(T,)`` arrays, as
`jax.lax.scan` gives it back, or `jax.tree.map(lambda *x: jnp.stack(x), *log)` makes of a list.
They read in grey as in colour. Matplotlib, the extra "plots", is imported when a picture is drawn.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from mtl_optax import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Mapping[str, ArrayLike]

__all__ = ["affinity", "cosines", "front", "gradient_norms", "pareto_plane", "weights"]


def __dir__() -> list[str]:
    return __all__


# Okabe and Ito's colours are told apart by all; in grey the line styles and markers do it.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vP<X>"


def weights(history: History, *, field: str = "weights", ax: "Axes | None" = None) -> "Axes":
    """Draws the weight of each task over the steps.

    Args:
      history: `"weights/<task>"` to a `(T,)` array, among whatever else was recorded.
      field: which numbers; `"weights.2"` are those of a second link that keeps weights.
      ax: the Matplotlib axes to draw on; new ones by default.

    Returns:
      The axes.

    Raises:
      ImportError: if Matplotlib is not installed.
      ValueError: if `history` holds nothing of that field, or not one number a step.

    Examples:
      >>> import mtl_optax as mtl
      >>> history = {"weights/buy": [1.0, 1.2, 1.4], "weights/click": [1.0, 0.8, 0.6]}
      >>> ax = mtl.plots.weights(history)
      >>> ax.get_ylabel()
      'weight'
    """
    return _lines(_series(history, field), "weight", ax)


def gradient_norms(history: History, *, ax: "Axes | None" = None) -> "Axes":
    """Draws the norm of each task's gradient over the steps, on a logarithmic axis.

    Args:
      history: `"norm/<task>"` to a `(T,)` array, as `mtl.monitor_tasks` records it.
      ax: as in `weights`.

    Returns:
      The axes.

    Raises:
      ImportError: as in `weights`.
      ValueError: as in `weights`.
    """
    ax = _lines(_series(history, "norm"), "gradient norm", ax)
    ax.set_yscale("log")
    return ax


def cosines(history: History, *, ax: "Axes | None" = None) -> "Axes":
    """Draws the cosine of each pair of gradients as a heat map: a row a pair, a column a step.

    The lightness rises from -1 to 1, so that dark is conflict in grey too.

    Args:
      history: `"cosine/<task>-<task>"` to a `(T,)` array, as `mtl.monitor_tasks` records it.
      ax: as in `weights`.

    Returns:
      The axes.

    Raises:
      ImportError: as in `weights`.
      ValueError: as in `weights`.
    """
    series = _series(history, "cosine")
    ax = _axes(ax)
    image = ax.imshow(
        np.stack(list(series.values())),
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        vmin=-1,
        vmax=1,
    )
    ax.set_xlabel("step")
    ax.set_yticks(range(len(series)), [plain(pair) for pair in series])
    ax.figure.colorbar(image, ax=ax, label="cosine (dark: conflict)")
    return ax


def affinity(matrix: ArrayLike, tasks: Sequence[str], *, ax: "Axes | None" = None) -> "Axes":
    """Draws what a step for each task does to the others, as a heat map with its numbers.

    Args:
      matrix: `(K, K)` as `mtl.metrics.affinity` returns it, or an average of several.
      tasks: the K names in their order, such as `jac.names`.
      ax: as in `weights`.

    Returns:
      The axes: a row for each task that steps, a column for each that is affected.

    Raises:
      ImportError: as in `weights`.
      ValueError: if the matrix is not `(K, K)`.

    Examples:
      >>> import mtl_optax as mtl
      >>> ax = mtl.plots.affinity([[0.1, -0.02], [0.03, 0.2]], ("buy", "click"))
      >>> [text.get_text() for text in ax.texts]
      ['0.100', '-0.020', '0.030', '0.200']
    """
    matrix, size = np.asarray(matrix), len(tasks)
    if matrix.shape != (size, size):
        raise ValueError(
            f"the matrix has shape {matrix.shape}, expected {(size, size)}: a row and a column for "
            f"each of the tasks {tuple(tasks)}"
        )
    ax = _axes(ax)
    largest = np.nanmax(np.abs(matrix), initial=1e-12)
    image = ax.imshow(matrix, cmap="cividis", vmin=-largest, vmax=largest)
    for (i, j), value in np.ndenumerate(matrix):
        colour = "black" if value > 0 else "white"
        ax.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour)
    names = [plain(task) for task in tasks]
    ax.set_xticks(range(size), names)
    ax.set_yticks(range(size), names)
    ax.set_xlabel("loss of")
    ax.set_ylabel("step for")
    ax.figure.colorbar(image, ax=ax, label="affinity (dark: harms)")
    return ax


def pareto_plane(
    runs: Mapping[str, History],
    tasks: tuple[str, str],
    *,
    higher_is_better: bool | Sequence[bool] = False,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws where each run ends in the plane of two tasks, and the path that led there.

    The ends that no other run beats in both tasks are filled, the others hollow; a run that ends in
    NaN is beaten.

    Args:
      runs: the label of a run to its losses or metrics, each a `(T,)` array or a number.
      tasks: the tasks on the two axes, by their names in every run.
      higher_is_better: whether these are metrics, of which more is better: one bool, or one for
        each axis; losses by default.
      ax: as in `weights`.

    Returns:
      The axes.

    Raises:
      ImportError: as in `weights`.
      ValueError: if there is no run, or one lacks a task or has not as many steps in both.

    Examples:
      >>> import mtl_optax as mtl
      >>> runs = {"sum": {"click": [0.9, 0.3], "buy": [0.9, 0.7]},
      ...         "mgda": {"click": [0.9, 0.4], "buy": [0.9, 0.5]}}
      >>> ax = mtl.plots.pareto_plane(runs, ("click", "buy"))
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['sum', 'mgda']
    """
    if not (isinstance(runs, Mapping) and runs):
        raise ValueError(
            f"the runs are {runs!r}, expected one or more, {{label: {{task: losses}}}}"
        )
    if len(tasks) != 2:
        raise ValueError(f"got the tasks {tuple(tasks)}, expected the two of the axes")
    better = np.asarray(higher_is_better)
    if better.dtype != bool or better.shape not in ((), (2,)):
        raise ValueError(f"higher_is_better={higher_is_better!r}, expected a bool, or one a task")
    paths = {}
    for label, run in runs.items():
        missing = [task for task in tasks if task not in run]
        if missing:
            raise ValueError(f"run {label!r} has {list(run)}, expected the tasks {missing} too")
        steps = [np.atleast_1d(np.asarray(run[task])) for task in tasks]
        shapes = {task: step.shape for task, step in zip(tasks, steps, strict=True)}
        if len(set(shapes.values())) > 1 or steps[0].ndim != 1 or not steps[0].size:
            raise ValueError(
                f"run {label!r} has the shapes {shapes}, expected (T,) for each, as many steps in "
                "both: record both at each step, and choose one seed"
            )
        paths[label] = np.stack(steps)
    ends = np.stack([path[:, -1] for path in paths.values()]) * np.where(better, -1, 1)
    ax = _axes(ax)
    for i, (label, path) in enumerate(paths.items()):
        by = np.all(ends <= ends[i], axis=1) & np.any(ends < ends[i], axis=1)
        beaten = np.any(by) or np.any(np.isnan(ends[i]))
        ax.plot(
            path[0],
            path[1],
            **_look(i),
            marker=_MARKERS[i % len(_MARKERS)],
            markevery=[-1],
            markersize=9,
            markeredgewidth=1.5,
            markerfacecolor="white" if beaten else _look(i)["color"],
            label=plain(label),
        )
    ax.set_xlabel(plain(tasks[0]))
    ax.set_ylabel(plain(tasks[1]))
    ax.grid(alpha=0.3)
    ax.legend(title="filled: on the front")
    return ax


def front(
    solutions: History,
    *,
    true_front: ArrayLike | History | None = None,
    reference: ArrayLike | History | None = None,
    higher_is_better: bool = False,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws a whole front, with its measures in the title.

    Two tasks span a plane; more of them are parallel axes, where a line is a solution. Solutions
    that no other one dominates are filled or solid, the others hollow or dashed. The tasks stand in
    the order in which JAX flattens the losses, sorted, and not in that of the dict.

    Args:
      solutions: each task to its losses or metrics, an `(N,)` array, N >= 2, as
        ``jax.vmap(loss_fn)(params)`` returns them.
      true_front: points of the true front, where it is known: drawn in the plane, and IGD+ is
        measured from it. `(M, K)` in the order of the tasks, or a dict of them to `(M,)` arrays.
      reference: a point down to which the hypervolume is measured, `(K,)` in the order of the
        tasks, or a dict of them to numbers.
      higher_is_better: whether these are metrics, of which more is better; losses by default.
      ax: as in `weights`.

    Returns:
      The axes.

    Raises:
      ImportError: as in `weights`.
      ValueError: if there are less than two tasks or solutions, or shapes or tasks don't fit.

    Examples:
      >>> import mtl_optax as mtl
      >>> losses = {"click": [0.1, 0.2, 0.6], "buy": [0.8, 0.3, 0.2]}
      >>> ax = mtl.plots.front(losses, reference={"click": 1.0, "buy": 2.0})
      >>> ax.get_title(), ax.get_xlabel()
      ('3 of 3 on the front, hypervolume 1.52, spacing 0.058', 'buy')
    """
    if not isinstance(solutions, Mapping):
        raise ValueError(f"solutions is a {type(solutions).__name__}, expected {{task: losses}}")
    # JAX keeps the order of this one dict alone.
    tasks = list(solutions) if isinstance(solutions, OrderedDict) else sorted(solutions)
    if len(tasks) < 2:
        raise ValueError(f"the solutions have the tasks {tasks}, expected 2 or more")
    points = _columns("the dict of solutions", solutions, tasks)
    if points.ndim != 2:
        raise ValueError(
            f"the solutions have shape {points.shape}, expected (N, K): a dict of K tasks to (N,) "
            "losses"
        )
    best = np.asarray(metrics.non_dominated(points, higher_is_better=higher_is_better))
    title = [f"{best.sum()} of {len(points)} on the front"]
    if reference is not None:
        reference = _columns("reference", reference, tasks)
        volume = metrics.hypervolume(points, reference, higher_is_better=higher_is_better)
        title.append(f"hypervolume {volume:.3g}")
    if true_front is not None:
        true_front = _columns("true_front", true_front, tasks)
        distance = metrics.igd(points, true_front, higher_is_better=higher_is_better)
        title.append(f"IGD+ {distance:.2g}")
    title.append(f"spacing {metrics.spacing(points):.2g}")
    ax, names = _axes(ax), [plain(task) for task in tasks]
    if len(names) == 2:
        if true_front is not None:
            ax.plot(*true_front.T, ".", color="0.6", markersize=3, label="true front")
            ax.legend()
        ax.scatter(*points[best].T, color=_COLOURS[0], zorder=2)
        ax.scatter(*points[~best].T, facecolors="none", edgecolors=_COLOURS[0], zorder=2)
        ax.set_xlabel(names[0])
        ax.set_ylabel(names[1])
    else:
        for point, is_best in zip(points, best, strict=True):
            ax.plot(point, "-" if is_best else ":", color=_COLOURS[0], alpha=0.7, marker="o")
        ax.set_xticks(range(len(names)), names)
    ax.set_title(", ".join(title), fontsize="medium")
    ax.grid(alpha=0.3)
    return ax


def plain(text: str) -> str:
    """A user's text, in which Matplotlib reads no formula and from which it hides no label."""
    escaped = str(text).replace("$", r"\$")
    return f" {escaped}" if escaped[:1] in ("", "_") else escaped


def _columns(name: str, values: Any, tasks: Sequence[str]) -> np.ndarray:
    """A dict of the tasks as an array with the tasks on the last axis; an array is one already."""
    if not isinstance(values, Mapping):
        return np.asarray(values, float)
    if set(values) != set(tasks):
        raise ValueError(f"{name} has {list(values)}, expected the tasks {list(tasks)}")
    columns = {task: np.asarray(values[task], float) for task in tasks}
    shapes = {task: column.shape for task, column in columns.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{name} has the shapes {shapes}, expected the same of each task")
    return np.stack(list(columns.values()), axis=-1)


def _lines(series: dict[str, np.ndarray], label: str, ax: "Axes | None") -> "Axes":
    ax = _axes(ax)
    for i, (task, values) in enumerate(series.items()):
        ax.plot(values, **_look(i), label=plain(task))
    ax.set_xlabel("step")
    ax.set_ylabel(label)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def _series(history: History, field: str) -> dict[str, np.ndarray]:
    if not isinstance(history, Mapping):
        raise ValueError(
            f"the history is a {type(history).__name__}, expected one dict of arrays: stack what "
            "was recorded at each step, as by jax.tree.map(lambda *x: jnp.stack(x), *steps)"
        )
    prefix = f"{field}/"
    found = {
        name.removeprefix(prefix): np.asarray(values)
        for name, values in history.items()
        if name.startswith(prefix)
    }
    if not found:
        raise ValueError(
            f"got {list(history)}, expected {prefix}<task>: record what mtl.summarize(opt_state, "
            "jac.names) returns at each step, with mtl.monitor_tasks(num_tasks) in the chain for "
            "cosines and norms"
        )
    shapes = {name: values.shape for name, values in found.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        raise ValueError(
            f"{field} has the shapes {shapes}, expected (T,) for each, one number a step: stack "
            "the records of a run along the steps, and choose one seed"
        )
    return found


def _look(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _LINES[i % len(_LINES)]}


def _axes(ax: "Axes | None") -> "Axes":
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "mtl_optax.plots draws with Matplotlib, which is not installed: "
            "pip install 'mtl-optax[plots]'"
        ) from error
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax
