"""Yeast: 14 functional classes of a gene, each of which may hold."""

import gzip

import numpy as np

from benchmarks.data.base import (
    Recipe,
    Split,
    Task,
    columns,
    hard_sharing,
    packaged_file,
    shuffled,
    standardized,
)
from mtl_optax.compare import Problem

NUM_FEATURES = 103


def yeast(*, sizes: tuple[int, int, int] = (1_417, 400, 600)) -> Problem:
    """Yeast: 14 binary labels of 2,417 genes, from their expression and phylogeny.

    Args:
      sizes: number of genes for training, validation and test.
    """
    path = packaged_file(
        "river",
        "datasets/yeast.csv.gz",
        sha256="2969cb4bab877a27adcbe17871fa0b378a1e54b98816cd6106b542ee450a1c09",
        install="pip install 'mtl-optax[bench]'",
    )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", skiprows=1)
    names = [f"class{i:02d}" for i in range(1, table.shape[1] - NUM_FEATURES + 1)]
    train, validation, test = shuffled(len(table), *sizes)
    inputs = standardized(table[:, :NUM_FEATURES], train)

    def split(rows: np.ndarray) -> Split:
        return Split(inputs[rows], columns(table[rows, NUM_FEATURES:], names))

    return hard_sharing(
        title="Yeast: 14 classes of genes",
        source="the 2,417 genes of the yeast data set as shipped with river",
        tasks=tuple(Task(name, 1, "binary") for name in names),
        train=split(train),
        validation=split(validation),
        test=split(test),
        recipe=Recipe(steps=300, batch_size=64, hidden=(64, 64), learning_rates=(3e-4, 1e-3, 3e-3)),
    )
