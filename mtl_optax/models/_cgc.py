"""Customised gate control: progressive layered extraction with a single level."""

from collections.abc import Mapping
from typing import Any

from mtl_optax.models._base import Layer, Sizes
from mtl_optax.models._ple import PLE


class CGC(PLE):
    r"""Shared experts next to experts of each task, mixed by one gate a task: `PLE` of one level.

    .. math:: y_k = \mathrm{head}_k\big(\mathrm{softmax}(W_k h) \cdot [F_k(h), F_s(h)]\big), \quad
        h = \mathrm{encoder}(x)

    **Shared by all tasks**: ``encoder`` and the ``shared_experts``. **Of one task**:
    ``task_experts[task]``, ``gates[task]`` and ``heads[task]``.

    Args:
      encoder: as in `PLE`.
      heads: as in `PLE`.
      **options: the options of `PLE` other than ``num_levels``.

    Raises:
      ValueError: as in `PLE`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax import models
      >>> model = models.CGC(8, {"click": 1, "buy": 1}, experts=8, rngs=nnx.Rngs(0))
      >>> model.utilization(jnp.ones((10, 8)))["buy"].shape  # 1 own expert, then 1 shared
      (1, 2)

    References:
      Tang et al., `Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for
      Personalized Recommendations <https://doi.org/10.1145/3383313.3412236>`_, 2020, section 4.1.
    """

    def __init__(self, encoder: Layer | Sizes, heads: Mapping[str, Layer | Sizes], **options: Any):
        super().__init__(encoder, heads, num_levels=1, **options)
