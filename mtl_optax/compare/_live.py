"""Progress with the time left, and a table of what is done, in a terminal or a notebook."""

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mtl_optax.compare._problem import Problem

LINES = 8  # of what is done last


@contextlib.contextmanager
def shown(problem: Problem, console: Console | None = None) -> Iterator[tuple[Any, ...]]:
    """Shows a comparison while it runs: what to call on progress, on a result, with a warning."""
    console = console or Console()

    def line(name: str, metrics: dict[str, float]) -> Text:
        numbers = "  ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
        return Text(f"{name:<20} {numbers}", no_wrap=True, overflow="ellipsis")

    def warn(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    title = Text(f"{problem.title}: best validation metrics so far")
    if not (console.is_terminal or console.is_jupyter):  # a log: a line for each that is done
        console.print(title)
        yield lambda *_: None, lambda *done: console.print(line(*done)), warn
        return
    bar = Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
    )
    task, lines = bar.add_task("starting", total=None), []
    with Live(bar, console=console, refresh_per_second=4) as live:

        def on_progress(what: str, count: int, total: int) -> None:
            bar.update(task, description=escape(what), completed=count, total=total)

        def on_finished(name: str, metrics: dict[str, float]) -> None:
            lines.append(line(name, metrics))
            live.update(Group(title, *lines[-LINES:], bar))

        yield on_progress, on_finished, warn
        live.update(bar)  # the table of all is printed by who asked
