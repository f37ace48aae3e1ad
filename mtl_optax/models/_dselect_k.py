"""DSelect-k: a mixture of experts whose gates learn to use at most k experts."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtl_optax._numerics import wide
from mtl_optax._options import check_option
from mtl_optax.models._base import Layer, Sizes, positive_integer
from mtl_optax.models._experts import softmax
from mtl_optax.models._mmoe import MMoE


class DSelectK(MMoE):
    r"""`MMoE` with gates that are smooth, and yet can be exactly zero for all but k experts.

    A gate holds k selectors. Selector i spells the number of an expert in :math:`m = \lceil\log_2
    E\rceil` bits, each a smooth step of a logit, so that it weights the code c by

    .. math:: s_{ic}(h) = \prod_{b=1}^{m} \begin{cases} S(z_{ib}) & \text{bit b of c is 1} \\
        1 - S(z_{ib}) & \text{otherwise} \end{cases}, \quad
        S(z) = \begin{cases} 0 & z \le -\gamma/2 \\
        \frac12 + \frac{3z}{2\gamma} - \frac{2z^3}{\gamma^3} & |z| < \gamma/2 \\
        1 & z \ge \gamma/2 \end{cases}

    with :math:`z = Z_k h`, and the gate weights the selectors by :math:`\mathrm{softmax}(A_k h)`.
    Once all bits have saturated, at most k experts are used. `selector_entropy` as a penalty drives
    them there.

    **Shared by all tasks** and **of one task**: as in `MMoE`.

    Args:
      encoder: as in `MMoE`.
      heads: as in `MMoE`.
      num_selected: selectors k, the largest number of experts a task ends up with; at least 1.
      gamma: width of the smooth step, in units of the logits, > 0; smaller saturates sooner.
      dtype: as in `MMoE`.
      param_dtype: as in `MMoE`.
      **options: the options of `MMoE` other than ``gate``.

    Raises:
      ValueError: as in `MMoE`, and if ``num_selected`` is not an integer of at least 1 or
        ``gamma`` is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax import models
      >>> model = models.DSelectK(
      ...     4, {"click": 1, "buy": 1}, experts=8, num_experts=6, num_selected=2, rngs=nnx.Rngs(0)
      ... )
      >>> x = jnp.ones((10, 4))
      >>> model.utilization(x)["buy"].shape
      (1, 6)
      >>> penalty = model.selector_entropy(x)["buy"]  # add a small multiple to the loss of "buy"

    Differs from:
      The paper, in codes beyond the number of experts. There they stand for no expert and a second
      penalty keeps selectors away from them; here code c is expert c mod E, so that the weights
      always sum to one. The gates read the example, which the paper's static gates do not. The
      entropy is a mean over the batch where the authors' program sums.

    References:
      Hazimeh et al., `DSelect-k: Differentiable Selection in the Mixture of Experts with
      Applications to Multi-Task Learning <https://arxiv.org/abs/2106.03760>`_, 2021, section 3.
    """

    def __init__(
        self,
        encoder: Layer | Sizes,
        heads: Mapping[str, Layer | Sizes],
        *,
        num_selected: int = 2,
        gamma: float = 1.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        **options: Any,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        gate = partial(SmoothStepGate, num_selected=num_selected, gamma=gamma, **dtypes)
        super().__init__(encoder, heads, gate=gate, **dtypes, **options)

    def selector_entropy(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Entropy of a task's selectors, summed over them, a mean over the batch; 0 if settled."""
        hidden = self.encoder(x, *args, **kwargs)
        gates: Any = self.gates
        return {task: gates[task].entropy(hidden) for task in self.tasks}


class SmoothStepGate(nnx.Module):
    """The gate of `DSelectK`: features to weights ``(..., num_experts)`` that sum to one."""

    def __init__(
        self,
        features: int,
        num_experts: int,
        rngs: nnx.Rngs,
        *,
        num_selected: int,
        gamma: float,
        **options: Any,
    ):
        self.num_experts = num_experts
        self.num_selected = positive_integer(num_selected, "num_selected")
        check_option("gamma", gamma, lambda g: g > 0, "more than 0, the width of the smooth step")
        self.gamma = gamma
        self.num_bits = (num_experts - 1).bit_length()

        def linear(width: int, scale: float) -> nnx.Linear:
            # Small, as the authors' are: a bit that starts saturated has no gradient.
            init = _symmetric_uniform(scale)
            return nnx.Linear(
                features, width, kernel_init=init, bias_init=init, rngs=rngs, **options
            )

        # A single expert is chosen by no bit.
        width = self.num_selected * self.num_bits
        self.bits = linear(width, gamma / 100) if width else None
        self.scores = linear(self.num_selected, 0.05)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Weights of the experts, in at least float32."""
        codes = jnp.einsum("...k,...kc->...c", softmax(self.scores(x)), self._selectors(x))
        expert_of_code = jnp.arange(codes.shape[-1]) % self.num_experts
        return codes @ jax.nn.one_hot(expert_of_code, self.num_experts, dtype=codes.dtype)

    def entropy(self, x: jax.Array) -> jax.Array:
        """Entropy of the selectors, summed over them and averaged over the batch."""
        p = self._selectors(x)
        # Nested, since the gradient of log at zero would reach the branch that is not taken.
        entropy = jnp.where(p > 0, -p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0)
        return entropy.sum((-2, -1)).mean()

    def _selectors(self, x: jax.Array) -> jax.Array:
        """Weights of the codes for each selector, shape ``(..., num_selected, 2**num_bits)``."""
        if self.bits is None:
            return jnp.ones((*x.shape[:-1], self.num_selected, 1), wide(x.dtype))
        logits = self.bits(x)
        logits = logits.astype(wide(logits.dtype)) / self.gamma
        t = jnp.clip(logits.reshape(*x.shape[:-1], self.num_selected, 1, self.num_bits), -0.5, 0.5)
        one = 0.5 + 1.5 * t - 2 * t**3
        is_one = jnp.arange(2**self.num_bits)[:, None] >> jnp.arange(self.num_bits)[None] & 1
        shape = (*one.shape[:-2], *is_one.shape)
        bits = jnp.where(jnp.broadcast_to(is_one == 1, shape), one, 1 - one)
        return bits.prod(-1)


def _symmetric_uniform(scale: float) -> Any:
    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, *_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -scale, scale)

    return init
