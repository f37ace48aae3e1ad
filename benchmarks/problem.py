"""What is to be learnt: tasks, their losses and metrics, the model and the order of the data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.data import TASK_KINDS, Dataset, Split, Task
from mtl_optax import models


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all strategies of a comparison share."""

    seeds: int
    steps: int
    checkpoints: int
    batch_size: int
    learning_rate: float
    hidden: tuple[int, ...]

    def __post_init__(self):
        for field in ("seeds", "steps", "checkpoints", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected at least 1")
        if not self.hidden:
            raise ValueError("hidden is empty, expected the width of at least one shared layer")
        if self.steps % self.checkpoints:
            raise ValueError(
                f"steps is {self.steps}, expected a multiple of checkpoints ({self.checkpoints}): "
                "change one of the two"
            )

    @property
    def steps_per_checkpoint(self) -> int:
        """Training steps between two looks at the test set."""
        return self.steps // self.checkpoints


class Problem:
    """Tasks that one model learns together: hard sharing with a linear head for each.

    Attributes:
      names: the task names in the order of their losses.
      kinds: the kind of each task, a name in `TASK_KINDS`.
      params: the initial parameters, with a leading seed axis. The trunk of a seed starts the same
        whatever the tasks are.
    """

    def __init__(self, dataset: Dataset, tasks: Sequence[Task], settings: Settings):
        self.names = tuple(sorted(task.name for task in tasks))
        self.kinds = {task.name: task.kind for task in tasks}
        sizes = (dataset.train.inputs.shape[-1], *settings.hidden)
        heads = {task.name: task.num_outputs for task in tasks}

        def create(seed: jax.Array | int) -> models.HardSharing:
            return models.HardSharing(sizes, heads, rngs=nnx.Rngs(jax.random.key(seed)))

        self._graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(0)))
        # Not under jit: random draws compile slowly, and problems share them shape by shape.
        self.params = jax.vmap(lambda seed: nnx.state(create(seed)))(jnp.arange(settings.seeds))
        self.evaluate = jax.jit(jax.vmap(self._evaluate, in_axes=(0, None)))

    def losses(
        self, params: Any, batch: Split
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The task losses of a batch and, not differentiated, the metrics as KPIs."""
        outputs = self._outputs(params, batch)
        losses = {
            t: TASK_KINDS[self.kinds[t]].loss(outputs[t], batch.labels[t]) for t in self.names
        }
        return losses, jax.lax.stop_gradient(self._metrics(outputs, batch))

    def _outputs(self, params: Any, batch: Split) -> dict[str, jax.Array]:
        return nnx.merge(self._graphdef, params)(batch.inputs)

    def _metrics(self, outputs: dict[str, jax.Array], batch: Split) -> dict[str, jax.Array]:
        return {
            t: TASK_KINDS[self.kinds[t]].metric(outputs[t], batch.labels[t]) for t in self.names
        }

    def _evaluate(self, params: Any, split: Split) -> dict[str, jax.Array]:
        return self._metrics(self._outputs(params, split), split)


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
