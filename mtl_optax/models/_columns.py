"""Networks side by side that read mixtures of each other, as in CrossStitch and LTB."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from mtl_optax.models._base import Builder, Layer, Sizes, names_of_heads, read, require_width
from mtl_optax.models._experts import ExpertFactory, Experts

Block: TypeAlias = Sizes | ExpertFactory | Sequence[nnx.Module]


class Columns(nnx.Module):
    """Columns of blocks; before every block but the first, and before the heads, they are mixed.

    Args:
      encoder: reads the input; all columns read what it returns.
      heads: one for each task.
      blocks: for each level, what `Experts` makes its blocks from, one a column.
      between: first weights of a mixture, ``(columns, columns)``: row i is what column i reads.
      reads: first weights of the last mixture, ``(tasks, columns)``.
      features: width of what the encoder returns, if it does not tell.
      block_features: width of what a block returns, if it does not tell.
      build: makes the layers.
    """

    def __init__(
        self,
        encoder: Layer | Sizes,
        heads: Mapping[str, Layer | Sizes],
        blocks: Block | Sequence[Block],
        between: jax.Array,
        reads: jax.Array,
        features: int | None,
        block_features: int | None,
        build: Builder,
    ):
        self.tasks = names_of_heads(heads)
        self.encoder, width = build.encoder(encoder, features)
        levels = []
        for index, block in enumerate(split_blocks(blocks)):
            option = "block_features" if index else "features"
            width = require_width(width, f"the blocks of level {index} read it", option)
            levels.append(Experts(block, len(between), width, build, f"blocks of level {index}"))
            width = build.width(levels[-1], block_features)
        self.blocks = nnx.data(levels)
        dtype = build.options["param_dtype"]
        self.mixtures = nnx.data([nnx.Param(between.astype(dtype)) for _ in levels[1:]])
        # Apart for each task, since no other task reads them.
        rows = zip(self.tasks, reads.astype(dtype), strict=True)
        self.reads = nnx.data({task: nnx.Param(row) for task, row in rows})
        self.heads = nnx.data(
            {k: build.head(k, heads[k], width, "block_features") for k in self.tasks}
        )

    def run(
        self, features: Any, mixtures: Sequence[jax.Array], reads: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Outputs of all tasks, from the encoder's features and the weights of the mixtures."""
        outputs = self.blocks[0](features)
        for blocks, weights in zip(self.blocks[1:], mixtures, strict=True):
            outputs = blocks.each(_mixed(weights, outputs))
        return {task: read(self.heads, task, _mixed(reads[task], outputs)) for task in self.tasks}


def split_blocks(blocks: Any) -> tuple[Any, ...]:
    """The blocks level by level; a number or a function alone is one level."""
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        return (blocks,)
    if not blocks:
        raise ValueError("blocks is empty, expected at least one: for example (16, 16)")
    return tuple(blocks)


def _mixed(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """Weighted sums over columns: weights ``(*rows, columns)``, outputs ``(columns, ...)``."""
    return jnp.tensordot(weights.astype(outputs.dtype), outputs, axes=1)
