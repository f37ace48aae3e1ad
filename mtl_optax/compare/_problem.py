"""What is to be compared: a user's own model, losses, data and metrics, as one object."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from mtl_optax._numerics import is_integer, is_real

MAX_NAME = 100  # characters


def adam(rate: jax.Array, steps: int) -> optax.GradientTransformation:
    """Adam whose rate falls to 0 along a cosine, the default `Problem.optimizer`.

    Strategies whose weights grow or shrink in training change the length of Adam's steps for as
    long as its second moment remembers: 100 steps here, where Adam's own default would be 1,000.
    """
    schedule = optax.cosine_decay_schedule(1.0, steps)
    return optax.adam(lambda count: rate * schedule(count), b2=0.99)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Batches that are drawn anew at each step, such as the points of a PINN.

    Attributes:
      batch: a traced function from a typed random key to a batch.
    """

    batch: Callable[[jax.Array], Any]

    def __post_init__(self):
        _check(self, "batch")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with several losses, its data and its metrics: what strategies are compared on.

    Attributes:
      init: makes the parameters from a typed random key: any pytree of arrays, or an nnx module,
        whose `nnx.Param` are trained and whose other variables are carried through.
      loss_fn: `loss_fn(params, batch)`, the losses as for `mtl.value_and_jac`.
      train: where batches come from. A pytree of arrays with the examples on their first axis:
        every seed walks through permutations of its own. Or a function from an integer to an
        iterable of batches (NumPy, Grain, tf.data): it is called with a seed, and with another each
        time the batches run out, must give the same ones for the same integer, and batches of
        another shape than the first one of seed 0 are passed over. Or a `Draw`.
      validation: what `metrics` takes to choose learning rates, weights and checkpoints.
      test: what `metrics` takes for the numbers that are reported.
      metrics: `metrics(params, split)`, a dict of numbers. It is compiled if it can be traced, and
        may else be any Python. If every metric has the name of a task, models trained on one task
        alone are a baseline; metrics of other names are held against equal weights.
      higher_is_better: one bool for all metrics, or one for each by its name.
      unit: what a metric is, such as "AUC", for all or by name. Where it ends in "%", the
        metric is a share, and shown in percent.
      steps: training steps.
      batch_size: examples in a batch, where `train` is arrays.
      learning_rates: the grid from which every strategy gets its own; or one rate for all.
      optimizer: from a learning rate, which is traced, and the number of steps to an Optax
        transformation.
      present: `present(batch)`, which tasks have labels in a batch, bools in a tree like the
        losses, under the same names, or in their order; None if all always have. Where a missing
        label is NaN, `labelled` says it. A loss without labels may be anything, NaN too.
      kpis: `kpis(params, batch)`, how well each task does, in [0, 1], like the losses; only `dtp`
        needs it.
      stateful: whether there is state beside the parameters, such as batch statistics or a random
        key outside of nnx: `init` then returns `(params, state)`, `loss_fn(params, state, batch)`
        returns `(losses, state)`, and `metrics` and `kpis` take both as well.
      options: options of strategies, by name: `{"uncertainty": {"kind": ...}}`.
      jac: options of `mtl.value_and_jac`, such as `in_axes=` for tasks along an axis.
      last_shared: where `gradnorm` measures gradients, as `gramian_at=` of `mtl.value_and_jac`.
      title: what the report is headed by.
      source: where the data come from, for the report.
    """

    init: Callable[[jax.Array], Any]
    loss_fn: Callable[..., Any]
    train: Any
    validation: Any
    test: Any
    metrics: Callable[..., Mapping[str, Any]]
    _: dataclasses.KW_ONLY
    higher_is_better: bool | Mapping[str, bool] = True
    unit: str | Mapping[str, str] = ""
    steps: int = 1000
    batch_size: int = 128
    learning_rates: Any = (1e-3, 3e-3, 1e-2)  # floats, or one
    optimizer: Callable[[jax.Array, int], optax.GradientTransformation] = adam
    present: Callable[[Any], Any] | None = None
    kpis: Callable[..., Any] | None = None
    stateful: bool = False
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    jac: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    last_shared: Any = None
    title: str = "a problem"
    source: str = ""

    def __post_init__(self):
        _check(self, "init", "loss_fn", "metrics")
        _check(self, *(name for name in ("present", "kpis") if getattr(self, name) is not None))
        _check(self, "options", "jac", kind=Mapping, expected="a dict")
        for option in {"has_aux", "argnums"} & self.jac.keys():
            raise ValueError(
                f"jac has {option!r} in it, which a comparison sets itself: leave it out"
            )


def _check(of: Any, *names: str, kind: Any = Callable, expected: str = "a function") -> None:
    for name in names:
        if not isinstance(getattr(of, name), kind):
            raise ValueError(f"{name}={shortened(getattr(of, name))}, expected {expected}")


def labelled(labels: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Which tasks have a label in a batch, where a missing one is NaN: what `present` returns.

    Args:
      labels: an array a task; integers are never missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> batch = {"click": jnp.array([0.0, 1.0]), "buy": jnp.array([jnp.nan, jnp.nan])}
      >>> {task: bool(seen) for task, seen in mtl.compare.labelled(batch).items()}
      {'click': True, 'buy': False}
    """
    return {task: jnp.any(~jnp.isnan(label)) for task, label in labels.items()}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all strategies of a comparison share."""

    seeds: int
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    checkpoints: int = 10  # looks at the validation and test metrics
    candidates: int = 8  # random static weights
    tune: bool = False  # whether strategies get the grids of their rows in the catalog
    models: int = 128  # trained side by side, at most

    def __post_init__(self):
        for field in ("seeds", "steps", "checkpoints", "batch_size", "candidates", "models"):
            object.__setattr__(self, field, whole(field, getattr(self, field)))
        object.__setattr__(self, "learning_rates", rates_of(self.learning_rates))
        if not isinstance(self.tune, bool):
            raise ValueError(f"tune is {self.tune!r}, expected True or False")
        if not self.learning_rates:
            raise ValueError("learning_rates is empty, expected at least one learning rate")
        least, most = float(np.finfo("f4").tiny), float(np.finfo("f4").max)
        if not all(least <= rate <= most for rate in self.learning_rates):
            raise ValueError(
                f"learning_rates are {self.learning_rates}, expected positive numbers in the range "
                "of float32"
            )
        if self.steps % self.checkpoints:
            raise ValueError(
                f"steps is {self.steps}, expected a multiple of checkpoints ({self.checkpoints}): "
                "change one of the two"
            )

    @property
    def steps_per_checkpoint(self) -> int:
        """Training steps between two looks at the validation and test sets."""
        return self.steps // self.checkpoints


def check_names(what: str, names: Sequence[Any]) -> None:
    """Refuses names that no table could show, before anything is trained."""
    for name in names:
        if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()):
            raise ValueError(
                f"a {what} is called {shortened(name)}, expected a text of 1 to {MAX_NAME} "
                "printable characters: rename it"
            )
    twice = {name for name in names if list(names).count(name) > 1}
    if twice:
        raise ValueError(f"two {what}s are called {min(twice)!r}: rename one")


def check_numbers(metrics: Mapping[str, Any]) -> None:
    """Refuses metrics that are no numbers, before anything is trained."""
    if not metrics:
        raise ValueError("metrics returns an empty dict, expected at least one metric")
    for name, value in metrics.items():
        if np.shape(value) != ():
            raise ValueError(f"metric {name!r} has shape {np.shape(value)}, expected one number")
        if not _is_number(value):
            raise ValueError(f"metric {name!r} is {_described(value)}, expected one real number")


def check_arrays(what: str, tree: Any) -> None:
    """Refuses leaves that JAX has no arrays for."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        try:
            jnp.result_type(leaf)
            fits = not isinstance(leaf, str)  # which may be the name of a type
        except (TypeError, ValueError):
            fits = False
        if not fits:
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"{what} has {shortened(leaf)}{' at ' * bool(where)}{where}, expected arrays of "
                "numbers alone"
            )


def check_takes_integer(train: Callable[..., Any]) -> None:
    """Refuses a function of batches that can't be called with a seed."""
    try:
        inspect.signature(train).bind(0)
    except TypeError as error:
        raise ValueError(
            f"train can't be called as train(0): {error}, expected a function from an integer, "
            "such as a seed, to batches"
        ) from None
    except ValueError:
        pass  # has no signature


def check_optimizer(optimizer: Any, steps: int) -> None:
    """Refuses what is no function of a rate and a number of steps, as `optax.adam` itself."""
    fits = callable(optimizer)
    if fits:
        parameters = inspect.signature(optimizer).parameters.values()
        # A second one with a default, as that of b1, means something else.
        asked = [p for p in parameters if p.default is p.empty and p.kind != p.KEYWORD_ONLY]
        fits = len(asked) > 1 or any(p.kind == p.VAR_POSITIONAL for p in asked)
    if not fits:
        raise ValueError(
            f"optimizer={shortened(optimizer)}, expected a function of a learning rate and the "
            "number of steps: lambda rate, steps: optax.adam(rate)"
        )
    made = optimizer(jnp.float32(1.0), steps)
    if not (callable(getattr(made, "init", None)) and callable(getattr(made, "update", None))):
        raise ValueError(
            f"optimizer returns {shortened(made)}, expected an Optax transformation: lambda rate, "
            "steps: optax.adam(rate)"
        )


def check_options(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses options that no strategy would get."""
    for name, told in options.items():
        if name not in mtl.STRATEGIES:
            try:
                mtl.make(name, 1)
            except ValueError as error:  # says which names are near
                raise ValueError(f"Problem.options: {error}") from None
        if not isinstance(told, Mapping):
            raise ValueError(
                f"Problem.options: {name} has {shortened(told)}, expected a dict of options"
            )
        takes = inspect.signature(mtl.STRATEGIES[name].factory).parameters
        if any(takes[option].kind is inspect.Parameter.VAR_KEYWORD for option in takes):
            continue
        for option in told:
            # The tasks and the key are what a comparison gives.
            known = [given for given in [*takes][1:] if given != "key"]
            if option not in known:
                raise ValueError(
                    f"Problem.options: {name} has no option {option!r}; there are: "
                    f"{', '.join(known) or 'none'}"
                )


def check_texts(**texts: Any) -> None:
    """Refuses what a report could not show."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is {shortened(text)}, expected a text")


def whole(name: str, value: Any) -> int:
    """A setting that counts something."""
    if not is_integer(value):
        raise ValueError(f"{name} is {value!r}, expected a whole number, such as 20")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
    return int(value)


def rates_of(given: Any) -> tuple[float, ...]:
    """Learning rates from several, or from one."""
    alone = isinstance(given, str | bytes) or not isinstance(given, Iterable)
    if alone or getattr(given, "ndim", 1) == 0:
        given = (given,)
    rates = tuple(given)
    for rate in rates:
        if isinstance(rate, str | bytes | bool | np.bool_) or not _is_number(rate):
            raise ValueError(
                f"learning_rates has {rate!r} in it, expected numbers, such as (1e-3, 1e-2)"
            )
    return tuple(float(rate) for rate in rates)


def by_name(value: Any, names: Sequence[str], what: str, kind: type, expected: str) -> dict:
    """One value for all names, or a mapping that has each of them."""
    if not isinstance(value, Mapping):
        value = dict.fromkeys(names, value)
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"{what} says nothing of the metric {missing[0]!r}: add it")
    for name in names:
        if not isinstance(value[name], (kind, np.bool_) if kind is bool else kind):
            raise ValueError(
                f"{what} is {value[name]!r} for the metric {name!r}, expected {expected}, or a "
                "dict of them by metric"
            )
    return {name: kind(value[name]) for name in names}


def batch_order(settings: Settings, num_examples: int) -> np.ndarray:
    """Indices ``(S, steps, batch)``: every seed walks through its own permutation in each epoch."""
    per_epoch = num_examples // settings.batch_size
    if not per_epoch:
        raise ValueError(
            f"batch_size is {settings.batch_size}, expected at most the {num_examples} training "
            "examples"
        )

    def one_seed(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        epochs = [
            rng.permutation(num_examples)[: per_epoch * settings.batch_size]
            for _ in range(-(-settings.steps // per_epoch))
        ]
        flat = np.concatenate(epochs).reshape(-1, settings.batch_size)
        return flat[: settings.steps].astype(np.int32)

    return np.stack([one_seed(seed) for seed in range(settings.seeds)])


def shortened(name: Any) -> str:
    """What a user gave, in a message."""
    text = repr(name)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is_number(value: Any) -> bool:
    if isinstance(value, jax.ShapeDtypeStruct | jax.Array):
        return is_real(value.dtype)
    if isinstance(value, str | bytes | complex | np.complexfloating):
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _described(value: Any) -> str:
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"of type {value.dtype}"
    return shortened(value)
