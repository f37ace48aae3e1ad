"""What a user calls: `run`, `diagnose`, and the comparison that comes out."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mtl_optax.compare import (
    _diagnosis as diagnosis,
    _store as store,
    _summary as summary,
    _train as train,
)
from mtl_optax.compare._diagnosis import Diagnosis
from mtl_optax.compare._problem import Problem, Settings, whole
from mtl_optax.compare._run import compared
from mtl_optax.compare._selection import EQUAL_WEIGHTS, FORMAT
from mtl_optax.compare._setup import Setup

INSTALL = "pip install 'mtl-optax[compare]'"
# The methods most used, of every kind.
SHORTLIST = (
    "uncertainty",
    "gradnorm",
    "dwa",
    "famo",
    "scale_invariant",
    "mgda",
    "pcgrad",
    "upgrad",
)
SEEDS = 5
SHORT = 500  # steps of a diagnosis
RESULTS, REPORT = "results.json", "report.html"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
      results: all numbers, as they are written to results.json.
    """

    results: dict[str, Any]

    @property
    def answer(self) -> str:
        """One sentence: what to prefer, by how much and at what cost, or that nothing helps."""
        return summary.answer(self.results)

    @property
    def notes(self) -> list[str]:
        """What must be said beside the numbers."""
        return summary.notes(self.results)

    def table(self, width: int = 80) -> str:
        """The table as text, as many columns as fit."""
        return summary.text(self.results, width)

    def markdown(self, width: float = math.inf) -> str:
        """The answer and the table for a page, as many columns as fit."""
        return f"{self.answer}\n\n{summary.markdown(self.results, width)}"

    def save(self, folder: str | Path) -> Path:
        """Writes results.json, the pictures and a report that loads nothing from elsewhere.

        Args:
          folder: where to; it is made if it is not there.

        Returns:
          The path of the report.

        Raises:
          ModuleNotFoundError: if Matplotlib is not installed.
          OSError: if the folder can't be written to.
        """
        need("matplotlib")
        from mtl_optax.compare import _plots as plots, _report as report

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(store.without_nan(self.results), allow_nan=False)
        store.write(folder / RESULTS, content.encode())
        pictures = plots.draw(self.results)
        for name, picture in pictures.items():
            store.write(folder / f"{name}.png", picture)
        report.write(self.results, pictures, folder / REPORT)
        return folder / REPORT

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """Reads a results.json.

        Raises:
          ValueError: if it is not one, or was written by another version.
        """
        wrong = f"{path} is not a results.json of this version: run the comparison again"
        try:
            results = json.loads(Path(path).read_text(encoding="utf-8"))
            if results["format"] != FORMAT:
                raise ValueError(wrong)
            from mtl_optax.compare import _report as report

            report.page(results, {})  # whole, with numbers where numbers should be
            if not (results["window_steps"] and results["checkpoint_steps"]):  # of the pictures
                raise ValueError(wrong)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(wrong) from error
        return cls(results)

    def __str__(self) -> str:
        return "\n".join([self.answer, *self.notes, "", self.table()])

    def _repr_html_(self) -> str:
        from mtl_optax.compare import _report as report

        return f"<p>{report.html.escape(self.answer)}</p>{report.table(self.results)}"


def run(
    problem: Problem,
    strategies: str | Sequence[str] = SHORTLIST,
    *,
    seeds: int = SEEDS,
    out: str | Path | None = None,
    live: bool | None = None,
    **settings: Any,
) -> Comparison:
    """Compares strategies on a problem with single-task models, equal and static weights.

    All share the initial parameters and the batches of a seed; each gets its own learning rate by
    the validation set. With arrays or a `Draw`, all seeds, rates and weights train side by side.

    Args:
      problem: what to train on.
      strategies: names in the catalog, or `"all"`.
      seeds: how many times each is trained; 3 at least for anything to be told from chance.
      out: a folder where each finished strategy is saved, found again by the next run, and where
        the report is written. None keeps nothing.
      live: whether to show progress and a table of what is done; by default if rich is installed.
      **settings: `steps`, `batch_size` and `learning_rates` instead of the problem's;
        `checkpoints`, the looks at validation and test (10, must divide the steps); `candidates`,
        the random static weights (8); `tune`, whether options are tried from the small grids of
        `mtl.STRATEGIES[name].grid`; `models`, how many are trained side by side at most (128).

    Returns:
      The comparison: `print` it, or read its `answer`, `table()` and `results`.

    Raises:
      ValueError: if the problem or a setting can't be used; the text says what to change.
      ModuleNotFoundError: if something of the extra "compare" is needed and missing.
      OSError: if `out` is in use or can't be written to.
    """
    if out == "":
        raise ValueError("out is empty, expected a folder, or None to keep nothing")
    if out is not None:
        need("matplotlib")  # not only after all training
    if live or (live is None and find_spec("rich")):
        need("rich")
        from mtl_optax.compare._live import shown

        view = shown(problem)
    else:
        view = contextlib.nullcontext((lambda *_: None, lambda *_: None, _say))
    names = (strategies,) if isinstance(strategies, str) else tuple(strategies)
    with view as (on_progress, on_finished, warn):
        results = compared(
            problem,
            names,
            settings_of(problem, seeds, **settings),
            None if out is None else Path(out),
            on_progress=on_progress,
            on_finished=on_finished,
            warn=warn,
        )
    comparison = Comparison(results)
    if out is not None:
        comparison.save(out)
    return comparison


def diagnose(problem: Problem, *, seeds: int = 2, **settings: Any) -> Diagnosis:
    """What is wrong with equal weights here, from one short training under them.

    Args:
      problem: what to look at.
      seeds: trainings, side by side.
      **settings: `steps`, by default 500 or those of the problem if they are fewer;
        `learning_rates`, of which the middle one is taken; `batch_size`; `checkpoints`, the looks
        at the gradients.

    Returns:
      The diagnosis; `print` it. `mtl.compare.run(problem, diagnosis.recommended)` checks it.

    Raises:
      ValueError: if the problem or a setting can't be used.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> def losses(w, x):
      ...     error = jnp.mean((x @ w - x[:, 0]) ** 2)
      ...     return {"small": error, "large": 1e3 * error}
      >>> problem = mtl.compare.Problem(
      ...     init=lambda key: jnp.zeros(3), loss_fn=losses, train=x, validation=x, test=x,
      ...     metrics=losses, higher_is_better=False, batch_size=16)
      >>> diagnosis = mtl.compare.diagnose(problem, seeds=1, steps=8)
      >>> diagnosis.verdict
      'scale'
    """
    # The middle of the grid is what one would have begun with.
    settings = {"steps": min(SHORT, whole("steps", problem.steps))} | _given(settings)
    steps = whole("steps", settings["steps"])
    looks = max(n for n in range(1, 11) if steps % n == 0)
    chosen = settings_of(problem, seeds, **{"checkpoints": looks} | settings)
    rates = sorted(chosen.learning_rates)
    chosen = dataclasses.replace(chosen, learning_rates=(rates[len(rates) // 2],))
    setup = Setup(problem, chosen)
    configs = next(train.blocks(setup, [{}]))
    program = train.build(setup, EQUAL_WEIGHTS, configs)
    state, losses, looks = program.state, [], [setup.geometry(
        program.state.params, program.state.rest, setup.source.probe
    )]  # fmt: skip
    per_look = chosen.steps_per_checkpoint // setup.source.steps
    for i, items in enumerate(setup.source.items()):
        state, record = program.advance(state, configs, setup.source.data, items)
        losses.append(np.asarray(record.losses[:, 0]))
        if (i + 1) % per_look == 0:
            looks.append(setup.geometry(state.params, state.rest, setup.source.probe))
    cosines, norms = (
        np.stack([np.asarray(look[i])[:, 0] for look in looks], axis=1) for i in range(2)
    )
    seen = np.concatenate(losses, axis=1), norms, cosines
    return diagnosis.of(setup.names, *seen, labels_missing=problem.present is not None)


def settings_of(problem: Problem, seeds: int, **given: Any) -> Settings:
    """The problem's own settings, but for those given."""
    known = {field.name for field in dataclasses.fields(Settings)}
    for name in given:
        if name not in known:
            raise ValueError(f"no setting is called {name!r}; there are {', '.join(sorted(known))}")
    own = {name: getattr(problem, name) for name in ("steps", "batch_size", "learning_rates")}
    return Settings(seeds=seeds, **own | _given(given))


def need(package: str) -> None:
    """Refuses to begin without a package of the extra."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"this needs {package}: {INSTALL}")


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """What was really given: None and nothing at all are the default."""
    empty = lambda value: value is None or (isinstance(value, tuple | list) and not value)  # noqa: E731
    return {name: value for name, value in settings.items() if not empty(value)}


def _say(line: str) -> None:
    print(line)
