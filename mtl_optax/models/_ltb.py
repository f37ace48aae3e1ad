"""Learning to branch: a tree of blocks, sampled while it is learned."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtl_optax._numerics import wide
from mtl_optax._options import check_option
from mtl_optax.models._base import (
    Activation,
    Builder,
    Layer,
    Sizes,
    names_of_heads,
    positive_integer,
)
from mtl_optax.models._columns import Block, Columns
from mtl_optax.models._experts import softmax


class LTB(Columns):
    r"""Blocks in levels, each of which chooses one block of the level below to read.

    Node i of level l reads node j of the level below with a probability that is learned, and the
    choice is a relaxed sample (Gumbel-softmax),

    .. math:: h^{(l)}_i = f^{(l)}_i\Big(\sum_j d^{(l)}_{ij} h^{(l-1)}_j\Big), \quad
        d^{(l)}_i = \mathrm{softmax}\big((\theta^{(l)}_i + g) / \tau\big), \;
        g_j \sim \mathrm{Gumbel}(0, 1)

    The first level reads :math:`\mathrm{encoder}(x)`, and head k chooses a node of the last level
    in the same way. Lowering the temperature :math:`\tau` during training turns mixtures into
    choices.

    **Shared by all tasks**: ``encoder``, ``blocks`` and ``mixtures`` (the :math:`\theta` between
    levels). **Of one task**: ``reads[task]`` (the :math:`\theta` of its head) and ``heads[task]``.
    A hard choice gives the blocks that a task does not read a zero gradient; they stay shared.

    Args:
      encoder: as in `HardSharing`; ``8`` stands for inputs of width 8 that the blocks read
        directly.
      heads: as in `HardSharing`; they read the last level.
      blocks: as in `CrossStitch`, one for each level; every node of it gets its own.
      num_branches: nodes in a level; static, at least 1. None takes one for each task.
      features: as in `CrossStitch`.
      block_features: as in `CrossStitch`.
      activation: as in `HardSharing`.
      dtype: as in `HardSharing`; the softmax of the choices is at least float32.
      param_dtype: as in `HardSharing`; also of the logits :math:`\theta`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: as in `CrossStitch`, and if ``num_branches`` is not a positive integer.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax import models
      >>> model = models.LTB(4, {"click": 1, "buy": 1}, blocks=(16, 8), rngs=nnx.Rngs(0))
      >>> x = jnp.ones((10, 4))
      >>> outputs = model(x, key=jax.random.key(0), temperature=0.5)  # a step of training
      >>> {task: y.shape for task, y in model(x, hard=True).items()}  # the likeliest tree
      {'buy': (10, 1), 'click': (10, 1)}
      >>> model.utilization(x)["buy"].tolist()  # probability of each node, level by level
      [[0.5, 0.5], [0.5, 0.5]]

    References:
      Guo et al., `Learning to Branch for Multi-Task Learning <https://arxiv.org/abs/2006.01895>`_,
      2020, section 3.
    """

    def __init__(
        self,
        encoder: Layer | Sizes,
        heads: Mapping[str, Layer | Sizes],
        *,
        blocks: Block | Sequence[Block],
        num_branches: int | None = None,
        features: int | None = None,
        block_features: int | None = None,
        activation: Activation = nnx.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        num_tasks = len(names_of_heads(heads))
        nodes = positive_integer(
            num_tasks if num_branches is None else num_branches, "num_branches"
        )
        between, reads = jnp.zeros((nodes, nodes)), jnp.zeros((num_tasks, nodes))
        build = Builder(activation, dtype, param_dtype, rngs)
        super().__init__(encoder, heads, blocks, between, reads, features, block_features, build)

    def __call__(
        self,
        x: Any,
        *args: Any,
        key: jax.Array | None = None,
        temperature: jax.typing.ArrayLike = 1.0,
        hard: bool = False,
        **kwargs: Any,
    ) -> dict[str, jax.Array]:
        """Outputs of all tasks; other arguments than these go to the encoder.

        Args:
          x: the input.
          *args: for the encoder.
          key: a typed key to sample the choices with, one sample for the whole batch; None leaves
            the noise out, and the choices are the probabilities themselves.
          temperature: of the softmax, > 0; may be traced, as a schedule's is.
          hard: whether to read exactly one node, with the gradient of the soft choice (a
            straight-through estimate).
          **kwargs: for the encoder.
        """
        check_option("temperature", temperature, lambda t: t > 0, "more than 0")
        logits = [m[...] for m in self.mixtures] + [self.reads[task][...] for task in self.tasks]
        keys = [None] * len(logits) if key is None else jax.random.split(key, len(logits))
        choices = [_choose(t, k, temperature, hard) for t, k in zip(logits, keys, strict=True)]
        levels = len(self.mixtures)
        reads = dict(zip(self.tasks, choices[levels:], strict=True))
        return self.run(self.encoder(x, *args, **kwargs), choices[:levels], reads)

    def utilization(self, *_: Any, **__: Any) -> dict[str, jax.Array]:
        """Probability that the path of a task goes through a node: ``(blocks, num_branches)``."""
        probabilities = {}
        for task in self.tasks:
            path = [softmax(self.reads[task][...])]
            for mixture in reversed(self.mixtures):
                path.insert(0, path[0] @ softmax(mixture[...]))
            probabilities[task] = jnp.stack(path)
        return probabilities


def _choose(logits: jax.Array, key: Any, temperature: Any, hard: bool) -> jax.Array:
    """Weights along the last axis: a relaxed sample, or one-hot with the gradient of it."""
    logits = logits.astype(wide(logits.dtype))
    if key is not None:
        logits = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = softmax(logits / temperature)
    if not hard:
        return soft
    chosen = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=soft.dtype)
    return chosen + (soft - jax.lax.stop_gradient(soft))
