"""How a data set becomes a `Problem`, and how its files are found, checked and cached."""

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from benchmarks.data.kinds import TASK_KINDS
from mtl_optax import models
from mtl_optax.compare import Problem, _store as store, labelled

CACHE_VARIABLE = "MTL_OPTAX_CACHE"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a data set."""

    name: str
    num_outputs: int = 1
    kind: str = "classification"  # a name in TASK_KINDS


class Split(NamedTuple):
    """Examples, or a batch of them; NumPy or JAX arrays with the examples on the first axis."""

    inputs: Any  # (N, D) float32, or a tree that the encoder understands
    labels: dict[str, Any]  # (N,) integers, or (N, num_outputs) floats where NaN is missing


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how large to train unless the user says otherwise."""

    steps: int
    batch_size: int
    hidden: tuple[int, ...]
    learning_rates: tuple[float, ...]  # the grid from which every strategy gets its own


def dense_encoder(example: Split, hidden: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
    """Dense layers with ReLU on ``(N, D)`` inputs."""
    return models.MLP((example.inputs.shape[-1], *hidden), activate_final=True, rngs=rngs)


def outputs_of_heads(model: Callable[[Any], dict[str, Any]], inputs: Any) -> dict[str, Any]:
    """What most tasks are judged by: the outputs of their heads."""
    return model(inputs)


def hard_sharing(
    *,
    title: str,
    source: str,
    tasks: tuple[Task, ...],
    train: Split,
    validation: Split,
    test: Split,
    recipe: Recipe,
    encoder: Callable[[Split, tuple[int, ...], nnx.Rngs], nnx.Module] = dense_encoder,
    predict: Callable[[Callable[[Any], dict[str, Any]], Any], dict[str, Any]] = outputs_of_heads,
    heads: Mapping[str, int] | None = None,
    judged: tuple[Task, ...] = (),
) -> Problem:
    """One trunk for all tasks with a linear head for each, trained and judged by their kinds.

    Args:
      title: what it is called.
      source: where the data come from.
      tasks: what is learnt.
      train: examples to learn from.
      validation: examples that choose.
      test: examples that judge.
      recipe: how long and how large to train.
      encoder: makes the trunk from examples, widths and random streams.
      predict: from a model and inputs to what the losses and metrics compare with the labels.
      heads: outputs of the network, if they are not one head a task.
      judged: what is measured, if it is not the tasks.
    """
    heads = heads or {task.name: task.num_outputs for task in tasks}
    measured = judged or tasks
    kinds = {task.name: TASK_KINDS[task.kind] for task in (*tasks, *measured)}

    def create(key: jax.Array) -> models.HardSharing:
        rngs = nnx.Rngs(key)
        return models.HardSharing(encoder(train, recipe.hidden, rngs), heads, rngs=rngs)

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(jax.random.key(0))))

    def outputs(params: Any, split: Split) -> dict[str, Any]:
        return predict(nnx.merge(graphdef, params), split.inputs)

    def measure(what: str, names: Iterable[str]) -> Callable[[Any, Split], dict[str, jax.Array]]:
        def of(params: Any, split: Split) -> dict[str, jax.Array]:
            found = outputs(params, split)
            return {t: getattr(kinds[t], what)(found[t], split.labels[t]) for t in names}

        return of

    def present(batch: Split) -> dict[str, jax.Array]:
        return labelled({name: batch.labels[name] for name in learnt})

    learnt, seen = [task.name for task in tasks], [task.name for task in measured]
    return Problem(
        init=lambda key: nnx.state(create(key)),
        loss_fn=measure("loss", learnt),
        train=train,
        validation=validation,
        test=test,
        metrics=measure("metric", seen),
        higher_is_better={name: kinds[name].higher_is_better for name in seen},
        unit={name: kinds[name].unit for name in seen},
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rates=recipe.learning_rates,
        present=present if any(map(has_missing, train.labels.values())) else None,
        kpis=measure("kpi", learnt),
        options={"uncertainty": {"kind": {t: kinds[t].noise for t in learnt}}},
        last_shared=last_shared_layer,
        title=title,
        source=source,
    )


def has_missing(label: np.ndarray) -> bool:
    """Whether a label of an example is missing, NaN."""
    return label.dtype.kind == "f" and bool(np.isnan(label).any())


def last_shared_layer(params: nnx.State) -> nnx.State:
    """A mask of the trunk's last layer, for `mtl_optax.value_and_jac(gramian_at=...)`."""
    trunk = jax.tree_util.DictKey("encoder")
    last = jax.tree_util.DictKey(max(params["encoder"]["layers"]))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0] == trunk and last in path, params
    )


def packaged_file(package: str, relative: str, *, sha256: str, install: str) -> Path:
    """The path of a data file inside an installed package, found without importing the package.

    Args:
      package: name of the top-level module.
      relative: path inside it.
      sha256: checksum of the file.
      install: the command that installs it, for the message.

    Returns:
      The path.

    Raises:
      ModuleNotFoundError: if the package is not installed.
      ValueError: if the file is not the one that the benchmarks were written for.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"this data set is read from the package {package!r}, which is not installed: {install}"
        )
    return checked(Path(spec.submodule_search_locations[0]) / relative, sha256, install)


def checked(path: Path, sha256: str, install: str) -> Path:
    """The path, if the file has the checksum."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {install}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}: {install}")
    return path


def cached(name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `build` makes, kept in a file from the first time on.

    The folder is ``~/.cache/mtl_optax``, or what the variable MTL_OPTAX_CACHE says. The sources are
    checked when the file is made; a file that is not whole is set aside and made again.
    """
    folder = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/mtl_optax").expanduser()
    path = folder / f"{name}.arrays"
    known = store.load(path, name, print)
    if known is None:
        folder.mkdir(parents=True, exist_ok=True)
        known = build()
        store.save(path, known, name)
    return known


def shuffled(count: int, *sizes: int, seed: int = 0) -> list[np.ndarray]:
    """Disjoint random indices, one array for each of `sizes`."""
    if sum(sizes) > count:
        raise ValueError(f"sizes {sizes} are more than the {count} examples there are")
    order = np.random.default_rng(seed).permutation(count)
    return np.split(order, np.cumsum(sizes))[:-1]


def standardized(inputs: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and variance 1 over the rows `train`; a constant column becomes 0."""
    mean, std = inputs[train].mean(axis=0), inputs[train].std(axis=0)
    return ((inputs - mean) / np.where(std > 1e-12, std, 1.0)).astype(np.float32)


def columns(labels: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """Labels ``(N, K)`` as a dictionary of ``(N, 1)`` float32."""
    return {name: labels[:, [i]].astype(np.float32) for i, name in enumerate(names)}
