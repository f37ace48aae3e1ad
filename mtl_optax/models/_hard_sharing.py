"""Hard parameter sharing: one encoder for all tasks, one head for each."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtl_optax.models._base import Activation, Builder, Layer, Sizes, names_of_heads, read


class HardSharing(nnx.Module):
    r"""A shared encoder and a head for each task.

    .. math:: y_k = \mathrm{head}_k(\mathrm{encoder}(x))

    **Shared by all tasks**: ``encoder``. **Of one task**: ``heads[task]``.

    Args:
      encoder: a module or function of any kind, or layer sizes from the input to the features,
        each layer followed by the activation; ``8`` or ``(8,)`` is no encoder for inputs of width
        8.
      heads: a head for each task: the output size of a Dense layer, the sizes of several layers
        after the features, such as ``(16, 1)``, or a module that reads what the encoder returns.
      features: width of what the encoder returns, if it is a module without ``out_features`` and
        a head is given by sizes.
      activation: activation of the layers given by sizes.
      dtype: dtype of the computation in layers given by sizes; None infers it.
      param_dtype: dtype of the parameters of layers given by sizes.
      rngs: source of the initial parameters.

    Raises:
      ValueError: if there is no head, a task name is not a non-empty string, a size is not a
        positive integer, or ``features`` is needed and missing; and when called, if a head reads
        features of another width than it is given.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax import models
      >>> model = models.HardSharing((4, 32, 16), {"click": 1, "age": (8, 5)}, rngs=nnx.Rngs(0))
      >>> {task: y.shape for task, y in model(jnp.ones((10, 4))).items()}
      {'age': (10, 5), 'click': (10, 1)}

    References:
      Caruana, `Multitask Learning <https://doi.org/10.1023/A:1007379606734>`_, 1997.
    """

    def __init__(
        self,
        encoder: Layer | Sizes,
        heads: Mapping[str, Layer | Sizes],
        *,
        features: int | None = None,
        activation: Activation = nnx.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Builder(activation, dtype, param_dtype, rngs)
        self.tasks = names_of_heads(heads)
        self.encoder, width = build.encoder(encoder, features)
        self.heads = nnx.data({k: build.head(k, heads[k], width) for k in self.tasks})

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Outputs of all tasks; what follows ``x`` goes to the encoder."""
        hidden = self.encoder(x, *args, **kwargs)
        return {task: read(self.heads, task, hidden) for task in self.tasks}
