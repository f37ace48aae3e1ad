"""Progressive layered extraction: shared experts next to experts of each task."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtl_optax.models._base import (
    Activation,
    Builder,
    Layer,
    Sizes,
    names_of_heads,
    positive_integer,
    read,
    require_width,
)
from mtl_optax.models._experts import ExpertFactory, Experts, Gated, SoftmaxGate, blend, together


class PLE(Gated):
    r"""Levels of shared and task-specific experts, mixed by gates; one level is `CGC`.

    Level j of L maps one vector for each task and one shared vector, all equal to ``encoder(x)``
    at first, to new ones. With :math:`F_k` the experts of task k and :math:`F_s` the shared ones,

    .. math:: h_k \leftarrow \mathrm{softmax}(W_k h_k) \cdot [F_k(h_k), F_s(h_s)], \quad
        h_s \leftarrow \mathrm{softmax}(W_s h_s) \cdot [F_1(h_1), \dots, F_K(h_K), F_s(h_s)]

    and :math:`y_k = \mathrm{head}_k(h_k)` after the last level, which has no shared gate.

    **Shared by all tasks**: ``encoder``; ``shared_experts`` of every level; ``shared_gate`` and,
    since the shared gate mixes them, also ``task_experts`` of every level but the last; ``gates``
    of every level but the last two. **Of one task**: ``task_experts[task]`` of the last level,
    ``gates[task]`` of the last two levels, and ``heads[task]``. (A single task shares nothing.)

    Args:
      encoder: as in `HardSharing`; ``8`` stands for inputs of width 8 that the experts read
        directly, as in the paper. The gates read the last axis of what it returns.
      heads: as in `HardSharing`; they read what the experts of the last level return.
      experts: layer sizes after the features that a level reads, each layer followed by the
        activation; or a function ``(in_features, rngs) -> module``. Every level has its own.
      num_task_experts: experts of each task in a level, one number or one a task, at least 1.
      num_shared_experts: shared experts in a level, at least 1.
      num_levels: extraction levels L, at least 1; 1 gives customised gate control, `CGC`.
      features: width of what the encoder returns, if it is a module without ``out_features``.
      expert_features: width of what an expert returns, if it is a module without ``out_features``,
        and there are several levels or a head is given by sizes.
      activation: as in `HardSharing`.
      dtype: as in `HardSharing`; the softmax of the gates is at least float32.
      param_dtype: as in `HardSharing`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: as in `HardSharing`, and if a number of experts or levels is not a positive
        integer, ``num_task_experts`` does not name exactly the tasks, or experts differ in what
        they return.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax import models
      >>> model = models.PLE(
      ...     8, {"click": 1, "buy": 1}, experts=8, num_task_experts=2, num_shared_experts=3,
      ...     num_levels=2, rngs=nnx.Rngs(0),
      ... )
      >>> x = jnp.ones((10, 8))
      >>> {task: y.shape for task, y in model(x).items()}
      {'buy': (10, 1), 'click': (10, 1)}
      >>> [w.shape for w in model.gate_weights(x)["buy"]]  # 2 own experts, then 3 shared, by level
      [(10, 5), (10, 5)]

    References:
      Tang et al., `Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for
      Personalized Recommendations <https://doi.org/10.1145/3383313.3412236>`_, 2020, section 4.
    """

    def __init__(
        self,
        encoder: Layer | Sizes,
        heads: Mapping[str, Layer | Sizes],
        *,
        experts: Sizes | ExpertFactory,
        num_task_experts: int | Mapping[str, int] = 1,
        num_shared_experts: int = 1,
        num_levels: int = 1,
        features: int | None = None,
        expert_features: int | None = None,
        activation: Activation = nnx.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Builder(activation, dtype, param_dtype, rngs)
        self.tasks = names_of_heads(heads)
        counts = _check_num_task_experts(num_task_experts, self.tasks)
        positive_integer(num_levels, "num_levels")
        self.encoder, width = build.encoder(encoder, features)
        levels = []
        for index in range(num_levels):
            option = "expert_features" if index else "features"
            width = require_width(width, f"the gates of level {index} are Dense layers", option)
            last = index == num_levels - 1
            level = _Extraction(experts, counts, num_shared_experts, width, build, last=last)
            levels.append(level)
            width = build.width(level.shared_experts, expert_features)
        self.levels = nnx.data(levels)
        self.heads = nnx.data(
            {k: build.head(k, heads[k], width, "expert_features") for k in self.tasks}
        )

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Outputs of all tasks; what follows ``x`` goes to the encoder."""
        hidden, _, _ = self._extract(self.encoder(x, *args, **kwargs))
        return {task: read(self.heads, task, hidden[task]) for task in self.tasks}

    def gate_weights(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, tuple[jax.Array, ...]]:
        """How much of each expert a task uses, for each level.

        Each is ``(..., own + shared)``, own experts first, summing to one.
        """
        _, weights, _ = self._extract(self.encoder(x, *args, **kwargs))
        return {task: tuple(level[task] for level in weights) for task in self.tasks}

    def shared_gate_weights(self, x: Any, *args: Any, **kwargs: Any) -> tuple[jax.Array, ...]:
        """How much of each expert the shared gate uses, for each level but the last.

        Each is ``(..., all experts)``, the tasks' experts in sorted order first, summing to one.
        """
        _, _, weights = self._extract(self.encoder(x, *args, **kwargs))
        return tuple(weights)

    def _extract(self, features: jax.Array) -> tuple[dict[str, jax.Array], list, list]:
        hidden, shared = dict.fromkeys(self.tasks, features), features
        task_weights, shared_weights = [], []
        for level in self.levels:
            weights, shared_weight, hidden, shared = level(hidden, shared)
            task_weights.append(weights)
            if shared_weight is not None:
                shared_weights.append(shared_weight)
        return hidden, task_weights, shared_weights


class _Extraction(nnx.Module):
    """One level: experts of each task, shared experts, and the gates over them."""

    def __init__(
        self,
        experts: Sizes | ExpertFactory,
        num_task_experts: Mapping[str, int],
        num_shared_experts: int,
        features: int,
        build: Builder,
        *,
        last: bool,
    ):
        self.tasks = tuple(num_task_experts)
        self.shared_experts = Experts(
            experts, num_shared_experts, features, build, "shared experts"
        )
        num_shared = self.shared_experts.num_experts
        self.task_experts = nnx.data(
            {k: Experts(experts, n, features, build) for k, n in num_task_experts.items()}
        )
        gate = partial(SoftmaxGate, **build.options)
        self.gates = nnx.data(
            {k: gate(features, n + num_shared, build.rngs) for k, n in num_task_experts.items()}
        )
        total = sum(num_task_experts.values()) + num_shared
        # Nothing would read it in the last level, and an unread parameter belongs to no task.
        self.shared_gate = None if last else gate(features, total, build.rngs)

    def __call__(
        self, hidden: dict[str, jax.Array], shared: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array | None, dict[str, jax.Array], jax.Array]:
        shared_outputs = self.shared_experts(shared)
        outputs = {task: self.task_experts[task](hidden[task]) for task in self.tasks}
        weights = {task: self.gates[task](hidden[task]) for task in self.tasks}
        mixed = {
            task: blend(weights[task], together({task: outputs[task]}, shared_outputs))
            for task in self.tasks
        }
        if self.shared_gate is None:
            return weights, None, mixed, shared
        shared_weights = self.shared_gate(shared)
        pool = together(outputs, shared_outputs)
        return weights, shared_weights, mixed, blend(shared_weights, pool)


def _check_num_task_experts(given: int | Mapping[str, int], tasks: tuple[str, ...]) -> dict:
    """The number of own experts of each task, in sorted order."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(tasks, positive_integer(given, "num_task_experts"))
    if set(given) != set(tasks):
        raise ValueError(
            f"num_task_experts names the tasks {sorted(map(str, given))}, expected {list(tasks)}: "
            "give one number for all of them, or one for each task that has a head"
        )
    return {task: positive_integer(given[task], f"num_task_experts of {task!r}") for task in tasks}
