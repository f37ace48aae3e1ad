"""What is to be compared: a user's own model, losses, data and metrics, as one object."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
        another shape than the first one are passed over. Or a `Draw`.
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
      learning_rates: the grid from which every strategy gets its own.
      optimizer: from a learning rate, which is traced, and the number of steps to an Optax
        transformation.
      present: `present(batch)`, which tasks have labels in a batch, bools like the losses; None if
        all always have. Where a missing label is NaN, `labelled` says it. A loss without labels may
        be anything, NaN too.
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
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    optimizer: Callable[[jax.Array, int], optax.GradientTransformation] = adam
    present: Callable[[Any], Any] | None = None
    kpis: Callable[..., Any] | None = None
    stateful: bool = False
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    jac: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    last_shared: Any = None
    title: str = "a problem"
    source: str = ""


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
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected at least 1")
        if not self.learning_rates:
            raise ValueError("learning_rates is empty, expected at least one learning rate")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates are {self.learning_rates}, expected positive numbers")
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
                f"a {what} is called {_shortened(name)}, expected a text of 1 to {MAX_NAME} "
                "printable characters: rename it"
            )
    twice = {name for name in names if list(names).count(name) > 1}
    if twice:
        raise ValueError(f"two {what}s are called {min(twice)!r}: rename one")


def by_name(value: Any, names: Sequence[str], what: str) -> dict[str, Any]:
    """One value for all names, or a mapping that has each of them."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"{what} says nothing of the metric {missing[0]!r}: add it")
    return {name: value[name] for name in names}


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


def _shortened(name: Any) -> str:
    text = repr(name)
    return text if len(text) <= 40 else f"{text[:40]}..."
