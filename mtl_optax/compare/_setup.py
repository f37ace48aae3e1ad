"""A problem made ready: its parameters for every seed, its names, what a model is measured by."""

import hashlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mtl_optax as mtl
from mtl_optax.compare import _hashes as hashes
from mtl_optax.compare._problem import (
    Problem,
    Settings,
    by_name,
    check_arrays,
    check_names,
    check_numbers,
    check_optimizer,
    check_options,
    check_texts,
)
from mtl_optax.compare._source import num_examples, source_of
from mtl_optax.jacobian import task_names
from mtl_optax.links import present_tasks

AT_ONCE = 8  # models that are measured side by side, at most,
EXAMPLES = 1 << 17  # on no more examples in all: what a model makes of them is held
# What these do is seen in a report, not in what was trained.
NOT_TRAINED = ("_command.py", "_report.py", "_plots.py", "_curves.py", "_style.py", "_summary.py")


class Setup:
    """A problem under its settings.

    Attributes:
      params: the initial parameters, with a leading axis of seeds.
      rest: the state beside them, of a module or a `stateful` problem, likewise.
      names: the tasks, in the order of their losses.
      pairs: all pairs of their positions.
      metric_names: the metrics.
      singles: whether every metric is that of a task.
      initial_losses: ``(S, K)``, for the baseline of inverse initial losses.
    """

    def __init__(self, problem: Problem, settings: Settings):
        self.problem, self.settings = problem, settings
        check_options(problem.options)
        check_optimizer(problem.optimizer, settings.steps)
        check_texts(title=problem.title, source=problem.source)
        self.source = source_of(problem, settings)
        models = [problem.init(jax.random.key(seed)) for seed in range(settings.seeds)]
        self._graphdef = None
        if isinstance(models[0], nnx.Module):
            self._graphdef = nnx.graphdef(models[0])
            models = [nnx.state(m, nnx.Param, ...) for m in models]
        elif problem.stateful and not (isinstance(models[0], tuple) and len(models[0]) == 2):
            raise ValueError(
                f"stateful is True, but init returns a {type(models[0]).__name__}, expected the "
                "pair (params, state)"
            )
        elif not problem.stateful:
            models = [(model, ()) for model in models]
        if "in_axes" in problem.jac and jax.tree.leaves(models[0][1]):
            raise ValueError(
                "in_axes of Problem.jac maps a loss function of parameters alone, but there is "
                "state beside them: leave out what updates it, such as batch statistics"
            )
        self.params, self.rest = _of_seeds(models)
        one = self.one_seed(0)
        try:
            self._check_rest(*one)
            shapes = jax.eval_shape(lambda: self.linearize(*one, self.source.probe)[2])
        except Exception as error:
            arrays = jax.tree.map(jnp.shape, self.source.probe)
            error.add_note(f"loss_fn was called with a batch of Problem.train: {arrays}")
            raise
        self._jacobian, self.names = shapes, shapes.names
        self.pairs = list(itertools.combinations(range(len(self.names)), 2))
        check_names("task", self.names)
        self._validation, self._test = problem.validation, problem.test
        self._traced = self._can_be_traced(*one)
        if self._traced:
            self._validation, self._test = jax.device_put((problem.validation, problem.test))
        self.metric_names: list[str] = []

        def measure() -> dict[str, Any]:
            found = problem.metrics(*self.given(*one), self._validation)
            if not isinstance(found, Mapping):
                raise ValueError(
                    f"metrics returns a {type(found).__name__}, expected a dict of numbers by name"
                )
            # Here, since what comes out of a trace is sorted by name.
            self.metric_names = list(found)
            return dict(found)

        found = jax.eval_shape(measure) if self._traced else measure()
        check_names("metric", self.metric_names)
        check_numbers(found)
        if self._traced:
            jax.eval_shape(self._metrics, *one, self._test)  # of the same names
        self.higher = by_name(
            problem.higher_is_better, self.metric_names, "higher_is_better", bool, "True or False"
        )
        self.unit = by_name(problem.unit, self.metric_names, "unit", str, "a text")
        self.singles = set(self.metric_names) <= set(self.names)
        self.initial_losses = np.asarray(jax.jit(jax.vmap(self._first_losses))(
            self.params, self.rest, jax.tree.map(lambda x: x[:, 0], self.source.first)
        ))  # fmt: skip
        models = settings.seeds * len(settings.learning_rates)  # at least; or a multiple of it
        held = sum(num_examples(split) or 1 for split in (self._validation, self._test))
        self.geometry = _mapped(self._geometry, _side_by_side(models, AT_ONCE))
        self._measure = _mapped(self._both, _side_by_side(models, EXAMPLES // held))

    def one_seed(self, seed: int) -> tuple[Any, Any]:
        """The initial parameters of a seed, and the state beside them."""
        return jax.tree.map(lambda leaf: leaf[seed], (self.params, self.rest))

    def given(self, params: Any, rest: Any) -> tuple[Any, ...]:
        """What the user's functions take before the batch or split."""
        if self._graphdef is not None:
            return (nnx.merge(self._graphdef, params, rest, copy=True),)
        return (params, rest) if self.problem.stateful else (params,)

    def losses(self, params: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
        """The losses and the new rest."""
        given = self.given(params, rest)
        loss_fn, in_axes = self.problem.loss_fn, self.problem.jac.get("in_axes")
        if in_axes is not None:
            loss_fn = jax.vmap(loss_fn, in_axes=in_axes)
        losses = loss_fn(*given, batch)
        if self.problem.stateful:
            if not (isinstance(losses, tuple) and len(losses) == 2):
                raise ValueError(
                    f"stateful is True, but loss_fn returns a {type(losses).__name__}, expected "
                    "the pair (losses, state)"
                )
            losses, rest = losses
        elif self._graphdef is not None:
            rest = nnx.state(given[0], nnx.Not(nnx.Param))
        return losses, rest

    def linearize(self, params: Any, rest: Any, batch: Any, **options: Any) -> tuple[Any, ...]:
        """The losses ``(K,)``, the new rest and the Jacobian."""
        options = {**self.problem.jac, **options}
        if options.get("in_axes") is not None:
            losses, jac = mtl.value_and_jac(self.problem.loss_fn, **options)(
                *self.given(params, rest), batch
            )
        else:
            (losses, rest), jac = mtl.value_and_jac(
                lambda params: self.losses(params, rest, batch), has_aux=True, **options
            )(params)
        del losses
        return jac.loss_vector(), rest, jac

    def present(self, batch: Any) -> jax.Array:
        """Which tasks a batch has labels of, ``(K,)``."""
        if self.problem.present is None:
            return jnp.ones(len(self.names), bool)
        given = self.problem.present(batch)
        size, ours = sum(map(jnp.size, jax.tree.leaves(given))), ", ".join(self.names)
        if size != len(self.names):
            raise ValueError(
                f"present(batch) says something of {size} tasks, expected the "
                f"{len(self.names)} of the losses: {ours}"
            )
        theirs = task_names(given)
        if isinstance(given, Mapping) and theirs != self.names:
            raise ValueError(
                f"present(batch) names the tasks {', '.join(theirs)}, expected those of the "
                f"losses: {ours}"
            )
        for leaf in jax.tree.leaves(given):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.bool_):
                raise ValueError(
                    f"present(batch) has values of type {jnp.result_type(leaf)}, expected a bool "
                    "a task: compare them with 0"
                )
        return present_tasks(given, self._jacobian.losses)

    def evaluate(self, params: Any, rest: Any) -> tuple[np.ndarray, np.ndarray]:
        """Validation and test metrics ``(S, C, M)`` of models with the axes ``(S, C)``."""
        shape = jax.tree.leaves(params)[0].shape[:2]
        if self._traced:
            return self._measure(params, rest, self._validation, self._test)
        values = np.empty((2, *shape, len(self.metric_names)))
        for s, c in np.ndindex(*shape):
            model = jax.tree.map(lambda x, s=s, c=c: x[s, c], (params, rest))
            given = self.given(*model)
            for i, split in enumerate((self._validation, self._test)):
                try:
                    found = self._named(self.problem.metrics(*given, split))
                    values[i, s, c] = [float(value) for value in found]
                except Exception as error:
                    # A model that diverged is not what metrics were written for.
                    if _all_finite(model):
                        error.add_note(f"metrics was called with a model of seed {s}")
                        raise
                    values[i, s, c] = np.nan
        return values[0], values[1]

    def _named(self, found: Mapping[str, Any]) -> list[Any]:
        """The metrics in their order."""
        if {*found} != {*self.metric_names}:
            raise ValueError(
                f"metrics returns {', '.join(map(repr, found))} of one split, expected "
                f"{', '.join(map(repr, self.metric_names))} as of validation"
            )
        return [found[name] for name in self.metric_names]

    def facts(self) -> dict[str, Any]:
        """Hashes of what all numbers depend on: the data, the problem's program, this library."""
        one, source = self.one_seed(0), self.source
        item = jax.tree.map(lambda x: x[0, 0], source.first)

        def program(params: Any, rest: Any, data: Any, item: Any) -> Any:
            batch = source.batch(data, item)
            losses, _, jac = self.linearize(params, rest, batch)
            grads = jac.pullback(jnp.ones(len(self.names)))
            tx = self.problem.optimizer(jnp.float32(1.0), self.settings.steps)
            kpis = self.problem.kpis and self.problem.kpis(*self.given(params, rest), batch)
            updates = tx.update(grads, tx.init(params), params)[0]
            looked_at = self._geometry(params, rest, source.probe)
            return losses, updates, self.present(batch), kpis, looked_at

        data = (source.data, source.first, self.params, self.rest, self._validation, self._test)
        if self._traced:
            measured = hashes.of_program(self._both, *one, self._validation, self._test)
        else:
            measured = hashes.of_function(self.problem.metrics)
        return {
            "data": hashes.of_values(data),
            "program": hashes.of_program(program, *one, source.data, item),
            "metrics": measured,
            "code": code_hash(),
        }

    def _check_rest(self, params: Any, rest: Any) -> None:
        """Refuses a loss function that returns another state than it was given."""
        _, new = jax.eval_shape(self.losses, params, rest, self.source.probe)
        _check_alike("loss_fn returns a state", new, rest, "as it was given")

    def _can_be_traced(self, params: Any, rest: Any) -> bool:
        def measure(params: Any, rest: Any, split: Any) -> list[jax.Array]:
            found = self.problem.metrics(*self.given(params, rest), split)
            return [jnp.asarray(value, jnp.float32) for value in found.values()]

        try:
            jax.eval_shape(measure, params, rest, self._validation)
        except Exception:  # whatever NumPy, scikit-learn or the user's code says to a tracer
            return False
        return True

    def _metrics(self, params: Any, rest: Any, split: Any) -> jax.Array:
        found = self._named(self.problem.metrics(*self.given(params, rest), split))
        return jnp.stack([jnp.asarray(value, jnp.float32) for value in found])

    def _both(self, params: Any, rest: Any, validation: Any, test: Any) -> Any:
        return self._metrics(params, rest, validation), self._metrics(params, rest, test)

    def _geometry(self, params: Any, rest: Any, batch: Any) -> Any:
        """The cosines ``(K, K)`` of the gradients and their norms ``(K,)``."""
        _, _, jac = self.linearize(params, rest, batch)
        return jac.keep(self.present(batch)).correlation()

    def _first_losses(self, params: Any, rest: Any, item: Any) -> jax.Array:
        batch = self.source.batch(self.source.data, item)
        losses, _ = self.losses(params, rest, batch)
        vector = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(losses)])
        return jnp.where(self.present(batch), vector, jnp.nan)


def _of_seeds(models: list[Any]) -> Any:
    """The parameters of all seeds as one tree."""
    for seed, model in enumerate(models):
        for part, first in zip(model, models[0], strict=True):
            check_arrays(f"what init makes for seed {seed}", part)
            _check_alike(f"init for seed {seed} makes parameters", part, first, "as for seed 0")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


def _check_alike(what: str, tree: Any, expected: Any, why: str) -> None:
    """Refuses a tree with other leaves."""

    def kinds(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
            for path, leaf in leaves
        }

    found, known = kinds(tree), kinds(expected)
    for path in [*known, *found]:
        if found.get(path) != known.get(path):
            raise ValueError(
                f"{what} with {found.get(path, 'nothing')} at {path or 'its root'}, expected "
                f"{known.get(path, 'nothing')}, {why}"
            )


def _all_finite(tree: Any) -> bool:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return all(bool(jnp.all(jnp.isfinite(x))) for x in floats)


def _side_by_side(models: int, fitting: int) -> int:
    """How many of `models`, a divisor of them, are measured at a time."""
    return max(n for n in range(1, AT_ONCE + 1) if models % n == 0 and n <= max(fitting, 1))


def _mapped(function: Callable[..., Any], at_once: int) -> Callable[..., Any]:
    """`function` of a model and more, over models with the axes ``(S, C)``, `at_once` at a time."""
    some = jax.jit(lambda models, *more: jax.vmap(lambda m: function(*m, *more))(models))

    def all_of_them(params: Any, rest: Any, *more: Any) -> Any:
        shape = jax.tree.leaves(params)[0].shape[:2]
        places, values = list(np.ndindex(*shape)), []
        for start in range(0, len(places), at_once):
            s, c = np.array(places[start : start + at_once]).T
            models = jax.tree.map(lambda x, s=s, c=c: x[s, c], (params, rest))
            values.append(jax.device_get(some(models, *more)))
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *values)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), joined)

    return all_of_them


def code_hash(root: Path | None = None) -> str:
    """A hash of this library's files: a strategy that was edited is trained again."""
    root = root or Path(mtl.__file__).parent
    found = hashlib.sha256(usedforsecurity=False)
    for path in sorted(root.rglob("*.py")):
        if path.parent.name != "compare" or path.name not in NOT_TRAINED:
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
