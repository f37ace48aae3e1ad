"""`make demo`: two problems side by side, by the command that compares strategies on yours too."""

import dataclasses
import sys

from benchmarks import data
from mtl_optax.compare import Problem, _command as command

FIRST_LINE = (
    "Two problems: on MultiMNIST, two alike tasks, hardly anything beats equal weights; on the "
    "Helmholtz equation, losses of unlike scales, the strategy decides."
)
# Small enough for four minutes on two cores.
SIZE = ("--seeds", "5", "--checkpoints", "5", "--candidates", "4")
STRATEGIES = ("--strategies", "uncertainty", "dwa", "famo", "pcgrad")


def multimnist() -> Problem:
    """MultiMNIST at half its size."""
    problem = data.multimnist(sizes=(10_000, 2_000, 2_000))
    return dataclasses.replace(problem, steps=200, learning_rates=(3e-3, 1e-2))


def helmholtz() -> Problem:
    """The Helmholtz equation for as long as it takes to tell strategies apart."""
    return dataclasses.replace(data.helmholtz(), steps=1000, learning_rates=(3e-3, 1e-2))


def main(argv: list[str] | None = None) -> None:
    """Runs the command with these problems; further arguments change the size."""
    print(FIRST_LINE, flush=True)
    problems = [f"benchmarks.demo:{problem.__name__}" for problem in (multimnist, helmholtz)]
    command.main([*problems, *SIZE, *STRATEGIES, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
