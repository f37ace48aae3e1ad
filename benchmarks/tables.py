"""The tables of the cost benchmarks: for the terminal, and as Markdown for the docs."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import timing


class Cells(NamedTuple):
    """A table of strings; the first column names its rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def show(console: Console, cells: Cells) -> None:
    """Prints a table."""
    view = Table(title=cells.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(cells.header):
        view.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in cells.rows:
        view.add_row(*row)
    console.print(view)


def command(
    options: type,
    run: Callable[[Any, Console], dict[str, Any]],
    tables_of: Callable[[dict[str, Any]], list[Cells]],
    argv: list[str] | None,
) -> None:
    """The command line of the benchmark that `run` belongs to; its options have a `name`."""
    module = sys.modules[run.__module__]
    prog = f"python -m {module.__spec__.name}" if module.__spec__ else None
    chosen = tyro.cli(options, args=argv, prog=prog, description=module.__doc__)
    report(chosen.name, run, tables_of, chosen)


def report(
    name: str,
    run: Callable[[Any, Console], dict[str, Any]],
    tables_of: Callable[[dict[str, Any]], list[Cells]],
    options: Any,
) -> None:
    """Runs a benchmark, keeps its results under `name` and shows its tables."""
    console = Console()
    path = timing.save(name, run(options, console))
    results = json.loads(path.read_text(encoding="utf-8"))
    for cells in tables_of(results):
        show(console, cells)
    console.print(f"results: {path}", soft_wrap=True)


def markdown(cells: Cells) -> str:
    """A table with its title as a line above it."""
    rule = ["---", *["---:"] * (len(cells.header) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in (cells.header, rule, *cells.rows)]
    return "\n".join([f"{cells.title}:", "", *lines])


def fill(document: str, name: str, text: str) -> str:
    """The document with `text` between its lines `<!-- name -->` and `<!-- /name -->`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"no lines <!-- {name} --> and <!-- /{name} --> to write between")
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", document)
