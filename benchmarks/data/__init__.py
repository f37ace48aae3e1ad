"""Data sets of the comparisons: one function each, returning a `Problem`.

To add one, write a function that returns a `Problem` and put it into `DATASETS`. Nothing is
downloaded: files come with packages, which the message of a missing one names.
"""

from collections.abc import Callable

from benchmarks.data.base import Recipe, Split, Task
from benchmarks.data.census import census
from benchmarks.data.digits import mnist_fashion, multifashion, multimnist
from benchmarks.data.kinds import TASK_KINDS, TaskKind
from benchmarks.data.movielens import movielens
from benchmarks.data.pinn import burgers, helmholtz
from benchmarks.data.qm9 import qm9
from benchmarks.data.toy import gradnorm_toy
from benchmarks.data.yeast import yeast
from mtl_optax.compare import Problem

__all__ = ["DATASETS", "TASK_KINDS", "Recipe", "Split", "Task", "TaskKind"]

DATASETS: dict[str, Callable[[], Problem]] = {
    loader.__name__: loader
    for loader in (
        multimnist,
        multifashion,
        mnist_fashion,
        movielens,
        census,
        qm9,
        yeast,
        gradnorm_toy,
        burgers,
        helmholtz,
    )
}
