"""Trains strategies on a data set and shows which one helps.

Writes a table to the terminal, and results.json, pictures and a self-contained report.html to a
folder. All strategies share the model, the seeds and the order of the data; each gets the learning
rate that is best for it on a validation set. Single-task models, equal weights and tuned static
weights always run beside them. Each finished strategy is saved: start the same command again after
an interruption, and it goes on.
"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from benchmarks import experiment, plots, report, summary
from benchmarks.data import DATASETS
from benchmarks.problem import Settings
from mtl_optax import catalog

DEFAULT_OUT = Path("results/compare")
WIDTH = 140  # of the table in a log file
# What make demo trains in a few minutes: the methods most used, of every kind.
SHORTLIST = (
    "mean", "weights", "uncertainty", "uwso", "gradnorm", "dwa", "dtp", "famo",
    "pareto", "mgda", "pcgrad",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.compare` takes."""

    out: Path | None = None
    """Folder to write to: results/compare/DATA, or the folder of --from."""
    data: Literal[tuple(DATASETS)] = "multimnist"  # pyright: ignore[reportInvalidTypeForm]
    """Data set."""
    strategies: tuple[Literal[("all", *catalog.STRATEGIES)], ...] = SHORTLIST  # pyright: ignore[reportInvalidTypeForm]
    """Strategies of the catalog, or all of them; by default a shortlist of every kind."""
    seeds: int = 3
    """Seeds, trained side by side; each sets the initial weights and the order of the data."""
    candidates: int = 8
    """Random static weights of which the best are the tuned baseline."""
    checkpoints: int = 10
    """Looks at the validation and test sets; must divide the steps."""
    steps: int | None = None
    """Training steps; by default what suits the data set, as for the following ones."""
    batch_size: int | None = None
    """Examples in a step."""
    learning_rates: tuple[float, ...] = ()
    """Grid of Adam's first learning rates, from which every strategy gets its own."""
    hidden: tuple[int, ...] = ()
    """Widths of the trunk's layers; the last one is where GradNorm measures gradients."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Train nothing: draw the table, pictures and report again from this results.json."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.compare", description=__doc__)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    try:
        if options.from_ is not None:
            results = json.loads(options.from_.read_text(encoding="utf-8"))
            out = options.out or options.from_.parent
        else:
            out = options.out or DEFAULT_OUT / options.data
            results = {
                "command": shlex.join(["python", "-m", "benchmarks.compare", *argv]),
                **_train(options, out, console),
            }
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    save(results, out)
    console.print(table(results))
    console.print(summary.conclusion(results))
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)


def save(results: dict[str, Any], out: Path) -> None:
    """Writes results.json, the pictures and report.html into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    report.write(results, plots.draw(results, out), out / "report.html")


def table(results: dict[str, Any]) -> Table:
    """The comparison as a table for the terminal."""
    header, *body = summary.cells(results)
    title = f"{results['dataset']['title']}: test set, mean ± s.e. over seeds"
    view = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(header):
        view.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for line in body:
        view.add_row(*line)
    return view


def _train(options: Options, out: Path, console: Console) -> dict[str, Any]:
    names = tuple(catalog.STRATEGIES) if "all" in options.strategies else options.strategies
    console.print(f"loading {options.data}")
    dataset = DATASETS[options.data]()
    recipe = dataset.recipe
    settings = Settings(
        seeds=options.seeds,
        steps=options.steps or recipe.steps,
        checkpoints=options.checkpoints,
        batch_size=options.batch_size or recipe.batch_size,
        learning_rates=options.learning_rates or recipe.learning_rates,
        hidden=options.hidden or recipe.hidden,
        candidates=options.candidates,
    )
    columns = (
        TextColumn("{task.description:<30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        return experiment.run(dataset, names, settings, out / "runs", on_progress=show)


if __name__ == "__main__":
    main()
