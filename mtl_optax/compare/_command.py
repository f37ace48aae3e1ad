"""The command `mtl-compare`: which strategy helps on a problem of yours?

Trains strategies on a Problem beside single-task models, equal weights and tuned static weights,
and writes a table to the terminal, and results.json, pictures and a self-contained report.html to a
folder. Each finished strategy is saved: start the same command again after an interruption, and it
goes on.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

try:
    import matplotlib  # noqa: F401
    import tyro
    from rich.console import Console
    from rich.text import Text
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: mtl-compare needs {error.name}: pip install 'mtl-optax[compare]'"
    ) from None

from mtl_optax.compare import _plots as plots
from mtl_optax.compare._comparison import SEEDS, SHORTLIST, Comparison, settings_of
from mtl_optax.compare._diagnosis import Diagnosis
from mtl_optax.compare._live import shown
from mtl_optax.compare._problem import Problem
from mtl_optax.compare._run import compared

DEFAULT_OUT = Path("results/compare")
TOGETHER = "side_by_side.png"
WIDTH = 140  # of the table in a log file
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Options:
    """What `mtl-compare` takes."""

    problems: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Where to find them: my_module:problem or path/to/file.py:problem, a Problem or a function
    without arguments that returns one. Several are compared one after the other."""
    out: Path | None = None
    """Folder to write to: results/compare/PROBLEM, or the folder of --from; of several problems
    each gets a folder of its name in it (with the module, where names are alike), beside a picture
    of all."""
    strategies: tuple[str, ...] = SHORTLIST
    """Strategies of the catalog, or all of them; by default a shortlist of every kind."""
    seeds: int | None = None
    """Seeds, trained side by side; each sets the initial parameters and the order of the data. 5,
    or 2 for --diagnose."""
    steps: int | None = None
    """Training steps; by default the problem's, as for the following two."""
    batch_size: int | None = None
    """Examples in a step."""
    learning_rates: tuple[float, ...] = ()
    """Grid of learning rates, from which every strategy gets its own."""
    checkpoints: int | None = None
    """Looks at the validation and test sets, or at gradients for --diagnose; must divide the steps.
    10 by default."""
    candidates: int = 8
    """Random static weights of which the best are the tuned baseline."""
    tune: bool = False
    """Also try options of the strategies, from the small grids of the catalog."""
    models: int = 128
    """Models trained side by side, at most."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Train nothing: draw the table, pictures and report again from this results.json."""
    diagnose: bool = False
    """Compare nothing: say what a short training under equal weights shows."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, prog="mtl-compare", description=__doc__)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    try:
        with _stoppable():
            _run(options, argv, console)
    except KeyboardInterrupt:
        console.print("stopped: start the same command again, and it goes on from here")
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, ModuleNotFoundError, BlockingIOError) as error:
        if isinstance(error, ValueError) and not _is_ours(error):
            raise  # of the user's code: where it is, is what matters
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        kept = "" if options.from_ else ". What is finished is kept: start the same command again"
        raise SystemExit(f"error: {error}{kept}") from error


def _is_ours(error: Exception) -> bool:
    """Whether it was raised by this library, with words that are enough."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").split(".")[0] == "mtl_optax"


def _run(options: Options, argv: list[str], console: Console) -> None:
    if options.from_ is not None:
        if not options.from_.is_file():
            raise ValueError(
                f"there is no file {options.from_}: --from takes the results.json of a comparison"
            )
        comparison = Comparison.load(options.from_)
        _show(comparison, options.out or options.from_.parent, console)
        return
    if not options.problems:
        raise ValueError("no problem is given, expected my_module:problem")
    folders = _folders(options.problems)
    problems = {target: load(target) for target in options.problems}
    if len(problems) > 1:
        titles = "; ".join(problem.title for problem in problems.values())
        console.print(Text(f"{len(problems)} problems: {titles}"))
    names = ("steps", "batch_size", "learning_rates", "checkpoints", "candidates", "tune", "models")
    given = {name: getattr(options, name) for name in names}
    found = {}
    for target, problem in problems.items():
        if options.diagnose:
            console.print(Text(f"{problem.title}\n{_diagnosed(problem, options)}"))
            continue
        out = options.out or DEFAULT_OUT / folders[target]
        if options.out and len(problems) > 1:
            out = options.out / folders[target]
        with shown(problem, console) as (on_progress, on_finished, warn):
            results = compared(
                problem,
                options.strategies,
                settings_of(problem, SEEDS if options.seeds is None else options.seeds, **given),
                out,
                on_progress=on_progress,
                on_finished=on_finished,
                warn=warn,
            )
        command = shlex.join(["mtl-compare", *argv])
        found[target] = Comparison({"command": command, **results})
        _show(found[target], out, console)
    if len(found) > 1:
        _show_together(found, options.out or DEFAULT_OUT, console)


def _show_together(found: dict[str, Comparison], out: Path, console: Console) -> None:
    titles = [comparison.results["problem"]["title"] for comparison in found.values()]
    several = []
    for (target, comparison), title in zip(found.items(), titles, strict=True):
        name = title if titles.count(title) == 1 else f"{title} ({target})"
        console.print(Text(f"{name}: {comparison.answer}"))
        about = {**comparison.results["problem"], "title": name}
        several.append({**comparison.results, "problem": about})
    (out / TOGETHER).write_bytes(plots.draw_together(several))
    console.print(Text(f"side by side: {out / TOGETHER}"))


def _diagnosed(problem: Problem, options: Options) -> Diagnosis:
    from mtl_optax.compare import diagnose

    names = ("seeds", "steps", "batch_size", "learning_rates", "checkpoints")
    given = {name: getattr(options, name) for name in names}
    return diagnose(problem, **{name: value for name, value in given.items() if value is not None})


def _show(comparison: Comparison, out: Path, console: Console) -> None:
    path = comparison.save(out)
    title = comparison.results["problem"]["title"]
    lines = [comparison.answer, *comparison.notes]
    console.print(Text(f"\n{title}: test set, mean ± 95 % interval over seeds\n"))
    console.print(Text(comparison.table(console.width)), soft_wrap=True)
    console.print(Text("\n" + "\n".join(lines)))
    console.print(Text(f"report: {path}"), soft_wrap=True)


def load(target: str) -> Problem:
    """The problem at `module:name` or `file.py:name`.

    Raises:
      ValueError: if there is none, with what to write instead.
    """
    where, colon, name = target.rpartition(":")
    relative = where.startswith(".") and not where.endswith(".py")
    if not colon or not where or relative or not name.isidentifier():
        raise ValueError(f"{target!r} is no place of a problem: expected my_module:problem")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as for python -m
    module = _executed(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    found = getattr(module, name, None)
    if callable(found) and not isinstance(found, Problem):
        found = found()
    if not isinstance(found, Problem):
        raise ValueError(
            f"{target} is {'not there' if found is None else f'a {type(found).__name__}'}, "
            "expected a mtl.compare.Problem, or a function without arguments that returns one"
        )
    return found


def _executed(path: Path) -> Any:
    """The module in a file, as Python would run it: beside its neighbours, and found by name."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    path = path.resolve()
    name, taken = path.stem, sys.modules.get(path.stem)
    if taken is not None and getattr(taken, "__file__", None) != str(path):
        name = f"{name}_{hashlib.sha256(str(path).encode(), usedforsecurity=False).hexdigest()[:8]}"
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _folders(targets: Sequence[str]) -> dict[str, str]:
    """A folder of its own for each target: its name, with the module or the path where needed."""
    twice = {target for target in targets if targets.count(target) > 1}
    if twice:
        raise ValueError(f"{min(twice)} is given twice: leave one out")
    found = dict.fromkeys(targets, "")
    for kind in (_name, _name_and_module, _name_and_path):
        names = {target: kind(target) for target in targets}
        alike = [name.casefold() for name in names.values()]  # as some file systems see them
        for target, name in names.items():
            if not found[target] and alike.count(name.casefold()) == 1:
                found[target] = name
    return found


def _name(target: str) -> str:
    return target.rpartition(":")[2]


def _name_and_module(target: str) -> str:
    where = target.rpartition(":")[0]
    module = Path(where).stem if where.endswith(".py") else where
    return f"{module}.{_name(target)}"


def _name_and_path(target: str) -> str:
    return f"{quote(target.rpartition(':')[0], safe='')}.{_name(target)}"


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A request to end, of whatever kind, is one interruption."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    kinds = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        before = {kind: signal.signal(kind, stop) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
