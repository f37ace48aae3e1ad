"""Trains every strategy on real data and shows which one helps.

Writes a table to the terminal, and results.json, pictures and a self-contained report.html to a
folder. All strategies share the model, the seeds, the order of the data and the learning rate,
which was chosen for equal weights; no strategy's options are tuned.
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
WIDTH = 100  # of the table in a log file
# What make demo trains in a few minutes: the methods most used, of every kind.
SHORTLIST = (
    "mean", "weights", "uncertainty", "uwso", "gradnorm", "dwa", "dtp", "famo",
    "pareto", "mgda", "pcgrad",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.compare` takes."""

    out: Path | None = None
    """Folder to write to: results/compare, or the folder of --from."""
    data: Literal[tuple(DATASETS)] = "multimnist"  # pyright: ignore[reportInvalidTypeForm]
    """Data set."""
    strategies: tuple[Literal[("all", *catalog.STRATEGIES)], ...] = SHORTLIST  # pyright: ignore[reportInvalidTypeForm]
    """Strategies of the catalog, or all of them; by default a shortlist of every kind. Equal
    weights (sum) and single-task models always run."""
    seeds: int = 5
    """Seeds, trained side by side; each sets the initial weights and the order of the data."""
    steps: int = 1200
    """Training steps."""
    batch_size: int = 128
    """Examples in a step."""
    learning_rate: float = 3e-3
    """Adam's first learning rate, for all strategies, since Adam divides out the scale of their
    updates; it falls to 0 along a cosine. The default was chosen for equal weights."""
    hidden: tuple[int, ...] = (128, 128)
    """Widths of the trunk's layers; the last one is where GradNorm measures gradients."""
    checkpoints: int = 10
    """Times the test set is looked at; must divide the steps. Nothing is chosen by it."""
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
            out = options.out or DEFAULT_OUT
            results = {
                "command": shlex.join(["python", "-m", "benchmarks.compare", *argv]),
                **_train(options, console),
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


def _train(options: Options, console: Console) -> dict[str, Any]:
    names = tuple(catalog.STRATEGIES) if "all" in options.strategies else options.strategies
    settings = Settings(
        seeds=options.seeds,
        steps=options.steps,
        checkpoints=options.checkpoints,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        hidden=options.hidden,
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
        bar = progress.add_task("loading data", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        return experiment.run(DATASETS[options.data](), names, settings, on_progress=show)


if __name__ == "__main__":
    main()
