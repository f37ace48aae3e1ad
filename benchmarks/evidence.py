"""The comparisons of docs/results.md: runs them, and writes their tables into the page.

`python -m benchmarks.evidence qm9 yeast` runs two of them, each by the command that stands beside
its table, and keeps the numbers in benchmarks/results/compare. Without names, and after each run,
the page is filled from what is there.
"""

import dataclasses
import json
import shlex
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from benchmarks import tables, timing
from benchmarks.tables import Cells
from mtl_optax.compare import _command as command, _plots as plots, _summary as summary
from mtl_optax.compare._comparison import RESULTS, Comparison
from mtl_optax.compare._selection import EQUAL_WEIGHTS

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURES = DOCS / "results.md", DOCS / "images" / "compare"
OUT = Path("results/compare")
KEPT = timing.RESULTS / "compare"
WIDTH = 150  # characters of a table
# Of every kind, and cheap enough for all problems: what the closing table compares.
CORE = ("uncertainty", "scale_invariant", "famo", "dwa", "imtl", "upgrad", "pcgrad")
LAST = 0.2  # the share of a training in which its metric should hardly move


class Run(NamedTuple):
    """One comparison: where its problem is, and what the command takes beside it."""

    target: str
    strategies: tuple[str, ...] = CORE
    settings: str = "--candidates 8"
    picture: tuple[str, str] | None = None  # one of the report's, and what it shows


RUNS = {
    "helmholtz_paper": Run(
        "benchmarks.published:helmholtz",
        ("lr_annealing", "grad_norm_weights", "uncertainty", "conflict_free", "relobralo"),
        "--steps 10000 --candidates 2",
        picture=("gains", "Gains over equal weights on the Helmholtz equation"),
    ),
    "helmholtz_fixed": Run(
        "benchmarks.published:helmholtz_fixed",
        (
            "lr_annealing", "lr_annealing_every_10", "conflict_free", "conflict_free_every_10",
            "grad_norm_weights", "uncertainty",
        ),
        "--candidates 1",
    ),
    "helmholtz_attention": Run(
        "benchmarks.published:helmholtz_attention",
        ("lr_annealing", "conflict_free", "grad_norm_weights", "uncertainty"),
        "--candidates 1",
    ),
    "helmholtz": Run(
        "benchmarks.data:helmholtz",
        (*CORE, "lr_annealing", "grad_norm_weights", "conflict_free", "relobralo"),
        "--candidates 4",
    ),
    "burgers": Run(
        "benchmarks.data:burgers",
        (*CORE, "lr_annealing", "grad_norm_weights", "conflict_free", "relobralo"),
        "--candidates 4",
    ),
    "census": Run(
        "benchmarks.published:census", ("uncertainty", "scale_invariant", "famo", "upgrad"),
        "--candidates 2",
    ),
    "census_mmoe": Run("benchmarks.published:census_mmoe", ("uncertainty",), "--candidates 1"),
    "census_ple": Run("benchmarks.published:census_ple", ("uncertainty",), "--candidates 1"),
    "iwrm_mnist": Run(
        "benchmarks.published:iwrm_mnist", ("upgrad", "mgda", "pcgrad"),
        "--candidates 1 --checkpoints 8",
    ),
    "iwrm_fashion": Run(
        "benchmarks.published:iwrm_fashion", ("upgrad", "mgda", "pcgrad"),
        "--candidates 1",
    ),
    "movielens": Run(
        "benchmarks.data:movielens", (*CORE, "db_mtl", "conflict_free"),
        picture=("plane", "AUC of click and like on MovieLens"),
    ),
    "environments": Run("benchmarks.published:environments"),
    "qm9_raw": Run("benchmarks.data:qm9", picture=("metrics", "R² of twelve targets of QM9")),
    "qm9": Run("benchmarks.published:qm9"),
    "yeast": Run("benchmarks.data:yeast", (*CORE, "uwso")),
    "multimnist": Run(
        "benchmarks.data:multimnist", (*CORE, "mgda", "gradnorm"),
        picture=("plane", "Accuracies of both digits on MultiMNIST"),
    ),
    "mnist_fashion": Run(
        "benchmarks.data:mnist_fashion", (*CORE, "mgda", "gradnorm"),
        picture=("plane", "Accuracies of digit and clothing on MNIST+Fashion"),
    ),
    "gradnorm_toy": Run(
        "benchmarks.data:gradnorm_toy", (*CORE, "gradnorm"),
        picture=("gains", "Gains over equal weights on the toy of GradNorm"),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.evidence` takes."""

    names: Annotated[tuple[Literal[tuple(RUNS)], ...], tyro.conf.Positional] = ()  # pyright: ignore[reportInvalidTypeForm]
    """What to run, before the page is filled."""
    out: Path = OUT
    """Where each run keeps what it needs to go on after an interruption."""


def arguments(name: str, out: Path = OUT) -> list[str]:
    """What `mtl-compare` is given."""
    run = RUNS[name]
    strategies = ["--strategies", *run.strategies]
    return [run.target, *strategies, *run.settings.split(), "--out", str(out / name)]


def told(name: str) -> str:
    """The command that repeats it, wherever it was run."""
    return shlex.join(["mtl-compare", *arguments(name)])


def keep(name: str, path: Path) -> None:
    """Keeps a results.json with the command that repeats it, in place of the one that was given."""
    results = json.loads(path.read_text(encoding="utf-8")) | {"command": told(name)}
    (KEPT / name).mkdir(parents=True, exist_ok=True)
    (KEPT / name / RESULTS).write_text(json.dumps(results), encoding="utf-8")


def section(name: str, comparison: Comparison) -> str:
    """What the page says of a run: its command, the answer, the table, and what stands beside."""
    results = comparison.results
    moved, parts = last_change(results), told(name).replace(" --", "\n  --").splitlines()
    wrapped = " \\\n".join(
        line for part in parts for line in textwrap.wrap(part, 88, subsequent_indent="    ")
    )
    lines = [
        f"```bash\n{wrapped}\n```",
        comparison.markdown(WIDTH),
        *comparison.notes,
        f"Under equal weights the validation metrics moved by {moved:+.1f} % in the last fifth of "
        f"the {results['settings']['steps']:,} steps. {results['problem']['num_parameters']:,} "
        f"parameters; {results['settings']['seeds']} seeds.",
    ]
    if (picture := RUNS[name].picture) is not None:
        lines.append(f"![{picture[1]}](images/compare/{name}.png)")
    return "\n\n".join(lines)


def last_change(results: dict[str, Any]) -> float:
    """By how many percent equal weights' validation metrics got better over the end of training."""
    equal, problem = results["strategies"][EQUAL_WEIGHTS]["validation"], results["problem"]
    changes = []
    for metric in problem["metrics"]:
        if metric in results["left_out"]:
            continue
        curve = np.array(equal[metric], float).mean(axis=0)
        before = curve[round((1 - LAST) * len(curve)) - 1]
        sign = 1 if problem["higher_is_better"][metric] else -1
        changes.append(sign * (curve[-1] - before) / abs(before))
    return 100 * float(np.mean(changes))


def closing(found: dict[str, Comparison]) -> Cells:
    """Against the best static weights: a row a problem, a column a strategy."""
    body = []
    for name, comparison in found.items():
        lines = {row.name: row for row in summary.rows(comparison.results)}
        cells = [
            f"{r.over_tuned.text(signed=True)} {r.verdicts.get(summary.OVER_TUNED, '')}".strip()
            if (r := lines.get(strategy))
            else ""
            for strategy in CORE
        ]
        if any(cells):
            body.append([f"[{name}](#{name.replace('_', '-')})", *cells])
    return Cells("Points of Δm against tuned static weights", ["problem", *CORE], body)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    options = tyro.cli(
        Options, args=argv, prog="python -m benchmarks.evidence", description=__doc__
    )
    for name in options.names:
        command.main(arguments(name, options.out))
        keep(name, options.out / name / RESULTS)
    page = PAGE.read_text(encoding="utf-8")
    there = [name for name in RUNS if (KEPT / name / RESULTS).is_file()]
    found = {name: Comparison.load(KEPT / name / RESULTS) for name in there}
    for name, comparison in found.items():
        page = tables.fill(page, name, section(name, comparison))
        if (picture := RUNS[name].picture) is not None:
            file = PICTURES / f"{name}.png"
            file.write_bytes(plots.draw(comparison.results, picture[0])[picture[0]])
    page = tables.fill(page, "closing", tables.markdown(closing(found)))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
