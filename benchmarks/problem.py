"""What is to be learnt: tasks, their losses and metrics, the model and the order of the data."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mtl_optax as mtl
from benchmarks.data import TASK_KINDS, Dataset, Split, Task
from mtl_optax import models


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all strategies of a comparison share."""

    seeds: int
    steps: int
    checkpoints: int
    batch_size: int
    learning_rates: tuple[float, ...]  # the grid from which each strategy gets its own
    hidden: tuple[int, ...]
    candidates: int  # random static weights, of which the best are the tuned baseline

    def __post_init__(self):
        for field in ("seeds", "steps", "checkpoints", "batch_size", "candidates"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected at least 1")
        for field, what in (("hidden", "width"), ("learning_rates", "learning rate")):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty, expected at least one {what}")
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


class Problem:
    """Tasks that one model learns together: hard sharing with a linear head for each.

    Attributes:
      names: the task names in the order of their losses.
      kinds: the kind of each task, a name in `TASK_KINDS`.
      measured: the tasks that have a metric.
      pairs: names of all pairs of tasks.
      params: the initial parameters, with a leading seed axis. The trunk of a seed starts the same
        whatever the tasks are.
    """

    def __init__(self, dataset: Dataset, tasks: Sequence[Task], settings: Settings):
        self.names = tuple(sorted(task.name for task in tasks))
        self.kinds = {task.name: task.kind for task in tasks}
        self.measured = dataset.judged or tuple(tasks)
        self.pairs = tuple(f"{a}-{b}" for a, b in itertools.combinations(self.names, 2))
        self._predict = dataset.predict
        heads = dataset.heads or {task.name: task.num_outputs for task in tasks}

        def create(seed: jax.Array | int) -> models.HardSharing:
            rngs = nnx.Rngs(jax.random.key(seed))
            encoder = dataset.encoder(dataset.train, settings.hidden, rngs)
            return models.HardSharing(encoder, heads, rngs=rngs)

        self._graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(0)))
        # Not under jit: random draws compile slowly, and problems share them shape by shape.
        self.params = jax.vmap(lambda seed: nnx.state(create(seed)))(jnp.arange(settings.seeds))
        # Both take parameters with an axis of seeds and one of configurations.
        self.evaluate = _over_models(self._evaluate)
        self.cosines = _over_models(self._cosines)

    def losses(
        self, params: Any, batch: Split
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The task losses of a batch and, not differentiated, how well each task does in [0, 1]."""
        outputs = self._outputs(params, batch)

        def each(measure: str) -> dict[str, jax.Array]:
            kinds = {t: getattr(TASK_KINDS[self.kinds[t]], measure) for t in self.names}
            return {t: kinds[t](outputs[t], batch.labels[t]) for t in self.names}

        return each("loss"), jax.lax.stop_gradient(each("kpi"))

    def _outputs(self, params: Any, batch: Split) -> dict[str, jax.Array]:
        return self._predict(nnx.merge(self._graphdef, params), batch.inputs)

    def select(self, split: Split) -> Split:
        """The split with no other labels than this problem's."""
        mine = {*self.names, *(task.name for task in self.measured)}
        return split._replace(labels={t: y for t, y in split.labels.items() if t in mine})

    def _evaluate(self, params: Any, split: Split) -> jax.Array:
        """The metrics of `measured`, in its order."""
        outputs = self._outputs(params, split)
        return jnp.stack(
            [
                TASK_KINDS[t.kind].metric(outputs[t.name], split.labels[t.name])
                for t in self.measured
            ]
        )

    def _cosines(self, params: Any, batch: Split) -> jax.Array:
        """The cosines of the gradients of `pairs`, in its order."""
        _, jac = mtl.value_and_jac(self.losses, has_aux=True)(params, batch)
        monitor = mtl.monitor_tasks(len(self.names))
        _, state = monitor.update(jac, monitor.init(params))  # pyright: ignore[reportArgumentType]
        summary = mtl.summarize(state, self.names)
        return jnp.array([summary[f"cosine/{pair}"] for pair in self.pairs])


def _over_models(function: Any) -> Any:
    return jax.jit(jax.vmap(jax.vmap(function, in_axes=(0, None)), in_axes=(0, None)))


def last_shared_layer(params: nnx.State) -> nnx.State:
    """A mask of the trunk's last layer, for `mtl_optax.value_and_jac(gramian_at=...)`."""
    trunk = jax.tree_util.DictKey("encoder")
    last = jax.tree_util.DictKey(max(params["encoder"]["layers"]))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0] == trunk and last in path, params
    )


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
