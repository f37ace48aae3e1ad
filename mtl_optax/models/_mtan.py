"""Multi-task attention network: each task masks the features of one shared network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtl_optax.models._base import (
    Activation,
    Builder,
    Layer,
    Sizes,
    check_sizes,
    is_layer,
    names_of_heads,
    read,
    require_width,
)
from mtl_optax.models._columns import split_blocks


class MTAN(nnx.Module):
    r"""Shared blocks, with an attention mask of each task on the output of every block.

    With :math:`p^{(l)} = f^{(l)}(p^{(l-1)})` the shared blocks and :math:`p^{(0)} =
    \mathrm{encoder}(x)`, task k keeps

    .. math:: a^{(l)}_k = \sigma\Big(g^{(l)}_k\big([p^{(l)}, t^{(l)}(a^{(l-1)}_k)]\big)\Big)
        \odot p^{(l)}, \quad y_k = \mathrm{head}_k(a^{(L)}_k)

    where the first mask reads :math:`p^{(1)}` alone. Masks act along the last axis, so blocks may
    return vectors, sequences or images.

    **Shared by all tasks**: ``encoder``, ``blocks`` and ``transfers`` (the :math:`t`). **Of one
    task**: ``attention[task]`` (the :math:`g_k`) and ``heads[task]``.

    Args:
      encoder: as in `HardSharing`; ``8`` stands for inputs of width 8 that the blocks read
        directly.
      heads: as in `HardSharing`; they read the masked output of the last block.
      blocks: one after the other: the size of a layer or the sizes of several, each followed by
        the activation, as in ``(32, (32, 16))``; or a module or function.
      transfer: a function ``(in_features, out_features, rngs) -> module`` for the :math:`t`, whose
        output must have the shape of the next block's; needed where blocks shrink images. None is
        a Dense layer and the activation.
      features: width of what the encoder returns, if it is a module without ``out_features``.
      block_features: width of what a block returns, if it is a module without ``out_features``.
      activation: as in `HardSharing`.
      dtype: as in `HardSharing`.
      param_dtype: as in `HardSharing`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: as in `HardSharing`, and if ``blocks`` is empty, the width of one is unknown, or
        a transfer does not return the shape of the next block.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax import models
      >>> model = models.MTAN(4, {"depth": 1, "class": 5}, blocks=(16, 8), rngs=nnx.Rngs(0))
      >>> {task: y.shape for task, y in model(jnp.ones((10, 4))).items()}
      {'class': (10, 5), 'depth': (10, 1)}

    Differs from:
      The paper, where a mask reads features from inside of the block, which blocks of any kind do
      not tell apart from their output, and the layers of a mask are normalised over the batch.

    References:
      Liu et al., `End-to-End Multi-Task Learning with Attention
      <https://arxiv.org/abs/1803.10704>`_, 2019, section 3.
    """

    def __init__(
        self,
        encoder: Layer | Sizes,
        heads: Mapping[str, Layer | Sizes],
        *,
        blocks: Layer | Sizes | Sequence[Layer | Sizes],
        transfer: Callable[[int, int, nnx.Rngs], Layer] | None = None,
        features: int | None = None,
        block_features: int | None = None,
        activation: Activation = nnx.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Builder(activation, dtype, param_dtype, rngs)
        self.tasks = names_of_heads(heads)
        self.encoder, width = build.encoder(encoder, features)

        def dense(inputs: int, outputs: int, rngs: nnx.Rngs) -> Layer:
            return build.mlp((inputs, outputs), activate_final=True, rngs=rngs)

        built, transfers, widths = [], [], []
        for index, block in enumerate(split_blocks(blocks)):
            if not is_layer(block):
                sizes = check_sizes(block, f"block {index}")
                option = "block_features" if index else "features"
                width = require_width(width, f"block {index} is given by sizes", option)
                block = build.mlp((width, *sizes), activate_final=True)
            built.append(block)
            why = f"the masks of block {index} are Dense layers"
            width = require_width(build.width(block, block_features), why, "block_features")
            if widths:
                transfers.append((transfer or dense)(widths[-1], width, rngs))
            widths.append(width)
        self.blocks = nnx.data(built)
        self.transfers = nnx.data(transfers)
        inputs = [widths[0], *(2 * w for w in widths[1:])]
        self.attention = nnx.data(
            {
                k: [
                    build.mlp((i, w, w), activate_final=False)
                    for i, w in zip(inputs, widths, strict=True)
                ]
                for k in self.tasks
            }
        )
        self.heads = nnx.data({k: build.head(k, heads[k], width) for k in self.tasks})

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Outputs of all tasks; what follows ``x`` goes to the encoder."""
        shared = self.encoder(x, *args, **kwargs)
        kept: dict[str, jax.Array] = {}
        for index, block in enumerate(self.blocks):
            shared = block(shared)
            for task in self.tasks:
                seen = shared
                if index:
                    carried = self.transfers[index - 1](kept[task])
                    _check_transfer(index, carried, shared)
                    seen = jnp.concatenate([shared, carried], -1)
                kept[task] = jax.nn.sigmoid(self.attention[task][index](seen)) * shared
        return {task: read(self.heads, task, kept[task]) for task in self.tasks}


def _check_transfer(index: int, carried: jax.Array, shared: jax.Array) -> None:
    if carried.shape != shared.shape:
        raise ValueError(
            f"the transfer to block {index} returns shape {carried.shape}, expected the block's "
            f"{shared.shape}: give `transfer` a function whose modules shrink as the blocks do"
        )
