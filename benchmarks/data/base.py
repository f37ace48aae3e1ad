"""What a data set is, and how its files are found, checked and cached."""

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from mtl_optax import models

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


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A multi-task data set, split into train, validation and test."""

    name: str
    title: str
    source: str
    tasks: tuple[Task, ...]
    train: Split
    validation: Split
    test: Split
    recipe: Recipe
    encoder: Callable[[Split, tuple[int, ...], nnx.Rngs], nnx.Module] = dense_encoder
    predict: Callable[[Callable[[Any], dict[str, Any]], Any], dict[str, Any]] = outputs_of_heads
    """From a model and inputs to what the losses and metrics compare with the labels."""
    heads: Mapping[str, int] | None = None
    """Outputs of the network, if they are not one head a task."""
    judged: tuple[Task, ...] = ()
    """What is measured, if it is not the tasks; there is no single-task baseline then."""

    @property
    def measured(self) -> tuple[Task, ...]:
        """The tasks that have a metric."""
        return self.judged or self.tasks


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
    checked when the file is made; the file itself carries checksums that reading it checks.
    """
    folder = Path(os.environ.get(CACHE_VARIABLE, Path.home() / ".cache" / "mtl_optax"))
    path = folder / f"{name}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{name}.{os.getpid()}.part.npz"
        np.savez(part, allow_pickle=False, **build())
        part.replace(path)  # so that an interruption leaves no half file
    with np.load(path) as arrays:
        return dict(arrays)


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
