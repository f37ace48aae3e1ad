"""`make demo`: two problems side by side, by the command that compares strategies on yours too."""

import sys

from mtl_optax.compare import _command as command

FIRST_LINE = (
    "Two problems: on MultiMNIST, two alike tasks, hardly anything beats equal weights; on the "
    "Helmholtz equation, losses of unlike scales, the weights decide."
)
PROBLEMS = ("benchmarks.data:multimnist", "benchmarks.data:helmholtz")
# Small enough for four minutes on two cores; a GPU or patience affords "all".
SIZE = (
    *("--seeds", "5", "--steps", "300", "--checkpoints", "5", "--candidates", "4"),
    *("--learning-rates", "3e-3", "1e-2", "--strategies", "uncertainty", "dwa", "famo", "pcgrad"),
)


def main(argv: list[str] | None = None) -> None:
    """Runs the command with these problems; further arguments change the size."""
    print(FIRST_LINE, flush=True)
    command.main([*PROBLEMS, *SIZE, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
