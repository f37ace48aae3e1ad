"""Cross-stitch networks: one network a task, with learned mixtures of their features."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtl_optax._options import check_option
from mtl_optax.models._base import Activation, Builder, Layer, Sizes, names_of_heads
from mtl_optax.models._columns import Block, Columns


class CrossStitch(Columns):
    r"""A column of blocks for each task; after every block the columns read each other.

    .. math:: h_k \leftarrow \sum_{j=1}^{K} \alpha^{(l)}_{kj}\, f^{(l)}_j(h_j), \quad
        h_k = \mathrm{encoder}(x) \text{ at first}, \quad y_k = \mathrm{head}_k(h_k)

    for the blocks l = 1 … L. All :math:`\alpha` are free weights, neither positive nor of sum one.

    **Shared by all tasks**: ``encoder``, ``blocks`` and ``mixtures`` (the :math:`\alpha` between
    blocks). **Of one task**: ``reads[task]`` (its :math:`\alpha` after the last block) and
    ``heads[task]``. (A single task shares nothing.)

    Args:
      encoder: as in `HardSharing`; ``8`` stands for inputs of width 8 that the blocks read
        directly, as in the paper.
      heads: as in `HardSharing`; they read the mixture after the last block.
      blocks: one for each level: the size of a layer or the sizes of several, each followed by the
        activation, as in ``(32, (32, 16))``; or a function ``(in_features, rngs) -> module``.
        Every task gets its own.
      same: first weight of a task's own column, unitless; the others share ``1 - same`` evenly.
      features: width of what the encoder returns, if it is a module without ``out_features``.
      block_features: width of what a block returns, if it is a module without ``out_features``.
      activation: as in `HardSharing`.
      dtype: as in `HardSharing`.
      param_dtype: as in `HardSharing`; also of the weights of the mixtures.
      rngs: source of the initial parameters.

    Raises:
      ValueError: as in `HardSharing`, and if ``blocks`` is empty or not made of sizes or functions.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax import models
      >>> model = models.CrossStitch(4, {"click": 1, "buy": 1}, blocks=(16, 8), rngs=nnx.Rngs(0))
      >>> x = jnp.ones((10, 4))
      >>> {task: y.shape for task, y in model(x).items()}
      {'buy': (10, 1), 'click': (10, 1)}
      >>> model.utilization(x)["click"].tolist()  # of "buy" and "click", block by block
      [[0.10..., 0.89...], [0.10..., 0.89...]]

    Differs from:
      The paper, in one weight for each pair of columns and block rather than one for each channel.

    References:
      Misra et al., `Cross-stitch Networks for Multi-task Learning
      <https://arxiv.org/abs/1604.03539>`_, 2016, section 3.
    """

    def __init__(
        self,
        encoder: Layer | Sizes,
        heads: Mapping[str, Layer | Sizes],
        *,
        blocks: Block | Sequence[Block],
        same: float = 0.9,
        features: int | None = None,
        block_features: int | None = None,
        activation: Activation = nnx.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_option("same", same, np.isfinite, "a number, such as 0.9")
        num_tasks = len(names_of_heads(heads))
        other = (1 - same) / max(num_tasks - 1, 1)
        alpha = jnp.where(jnp.eye(num_tasks, dtype=bool), same if num_tasks > 1 else 1.0, other)
        build = Builder(activation, dtype, param_dtype, rngs)
        super().__init__(encoder, heads, blocks, alpha, alpha, features, block_features, build)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Outputs of all tasks; what follows ``x`` goes to the encoder."""
        mixtures = [mixture[...] for mixture in self.mixtures]
        reads = {task: self.reads[task][...] for task in self.tasks}
        return self.run(self.encoder(x, *args, **kwargs), mixtures, reads)

    def utilization(self, *_: Any, **__: Any) -> dict[str, jax.Array]:
        """What a task's column reads of each column after each block: ``(blocks, tasks)``."""
        return {
            task: jnp.stack([*(m[index] for m in self.mixtures), self.reads[task][...]])
            for index, task in enumerate(self.tasks)
        }
