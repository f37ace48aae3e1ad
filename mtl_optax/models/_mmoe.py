"""Multi-gate mixture of experts: each task mixes one pool of experts with its own gate."""

from collections.abc import Callable, Mapping, Sequence
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
    read,
    require_width,
)
from mtl_optax.models._experts import ExpertFactory, Experts, Gated, SoftmaxGate, blend


class MMoE(Gated):
    r"""Experts shared by all tasks, mixed by one softmax gate for each task.

    .. math:: y_k = \mathrm{head}_k\Big(\sum_{e=1}^{E} w_{ke}(h)\, f_e(h)\Big), \quad
        w_k(h) = \mathrm{softmax}(W_k h), \; h = \mathrm{encoder}(x)

    **Shared by all tasks**: ``encoder`` and ``experts``. **Of one task**: ``gates[task]`` and
    ``heads[task]`` (the paper's towers). With one expert the gates are constant and this is
    `HardSharing`.

    Args:
      encoder: as in `HardSharing`; ``8`` stands for inputs of width 8 that the experts read
        directly, as in the paper. The gates read the last axis of what it returns.
      heads: as in `HardSharing`; they read what the experts return.
      experts: layer sizes after the encoder's features, each layer followed by the activation; or
        a function ``(in_features, rngs) -> module``; or a sequence of modules, which may differ but
        must return the same shape.
      num_experts: number of experts E; static, at least 1; left out for a sequence of modules.
      gate: a function ``(features, num_experts, rngs) -> module`` for gates other than the softmax
        gate; a module maps features to weights ``(..., num_experts)``.
      features: width of what the encoder returns, if it is a module without ``out_features``.
      expert_features: width of what an expert returns, if it is a module without ``out_features``
        and a head is given by sizes.
      activation: as in `HardSharing`.
      dtype: as in `HardSharing`; the softmax of the gates is at least float32.
      param_dtype: as in `HardSharing`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: as in `HardSharing`, and if ``num_experts`` is not a positive integer, the experts
        differ in what they return, or a gate does not return one weight an expert.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax import models
      >>> model = models.MMoE(
      ...     4, {"click": 1, "buy": 1}, experts=(16, 8), num_experts=3, rngs=nnx.Rngs(0)
      ... )
      >>> x = jnp.ones((10, 4))
      >>> {task: y.shape for task, y in model(x).items()}
      {'buy': (10, 1), 'click': (10, 1)}
      >>> model.gate_weights(x)["buy"].shape  # how much of each expert
      (10, 3)
      >>> model.utilization(x)["buy"].shape  # the same as a mean over the batch
      (1, 3)

    References:
      Ma et al., `Modeling Task Relationships in Multi-task Learning with Multi-gate
      Mixture-of-Experts <https://doi.org/10.1145/3219819.3220007>`_, 2018, section 4.
    """

    def __init__(
        self,
        encoder: Layer | Sizes,
        heads: Mapping[str, Layer | Sizes],
        *,
        experts: Sizes | ExpertFactory | Sequence[nnx.Module],
        num_experts: int | None = None,
        gate: Callable[[int, int, nnx.Rngs], Callable[[jax.Array], jax.Array]] | None = None,
        features: int | None = None,
        expert_features: int | None = None,
        activation: Activation = nnx.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Builder(activation, dtype, param_dtype, rngs)
        self.tasks = names_of_heads(heads)
        self.encoder, width = build.encoder(encoder, features)
        width = require_width(width, "the gates are Dense layers")
        self.experts = Experts(experts, num_experts, width, build)
        mixed = build.width(self.experts, expert_features)
        num_experts = self.experts.num_experts
        gate = gate or partial(SoftmaxGate, **build.options)
        self.gates = nnx.data({k: gate(width, num_experts, rngs) for k in self.tasks})
        self.heads = nnx.data(
            {k: build.head(k, heads[k], mixed, "expert_features") for k in self.tasks}
        )

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Outputs of all tasks; what follows ``x`` goes to the encoder."""
        hidden = self.encoder(x, *args, **kwargs)
        outputs = self.experts(hidden)
        return {
            task: read(self.heads, task, blend(self._weights(task, hidden), outputs))
            for task in self.tasks
        }

    def gate_weights(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """How much of each expert a task uses, ``(..., num_experts)``, summing to one."""
        hidden = self.encoder(x, *args, **kwargs)
        return {task: self._weights(task, hidden) for task in self.tasks}

    def _weights(self, task: str, hidden: Any) -> jax.Array:
        weights, experts = self.gates[task](hidden), self.experts.num_experts
        if weights.shape[-1:] != (experts,):
            raise ValueError(
                f"the gate of task {task!r} returns shape {weights.shape}, expected (..., "
                f"{experts}): one weight for each expert, of which `gate` is told the number"
            )
        return weights
