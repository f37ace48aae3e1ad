"""What the architectures share: layer sizes or modules in, checked `flax.nnx` modules out."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtl_optax._numerics import is_integer

Layer: TypeAlias = Callable[..., Any]  # an nnx.Module or any function
Sizes: TypeAlias = int | Sequence[int]
Activation: TypeAlias = Callable[[jax.Array], jax.Array]


class MLP(nnx.Module):
    """Dense layers with an activation between them.

    Args:
      sizes: widths from the input to the output, at least one; one alone is the identity.
      activation: applied between the layers, and after the last one if ``activate_final``.
      activate_final: whether the output is activated, as features are and predictions are not.
      dtype: dtype of the computation; None infers it from inputs and parameters.
      param_dtype: dtype of the parameters.
      rngs: source of the initial parameters.

    Raises:
      ValueError: if a size is not a positive integer, or there is none; and when called, if the
        last axis of the input is not the first size.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax import models
      >>> mlp = models.MLP((3, 16, 2), rngs=nnx.Rngs(0))
      >>> mlp(jnp.ones((5, 3))).shape
      (5, 2)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Activation = nnx.relu,
        activate_final: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = check_sizes(sizes, "sizes")
        self.in_features, self.out_features = sizes[0], sizes[-1]
        self.hidden_features = sizes[max(len(sizes) - 2, 0)]
        self.activation = activation
        self.activate_final = activate_final
        self.layers = nnx.data(
            [
                nnx.Linear(i, o, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                for i, o in pairwise(sizes)
            ]
        )

    def hidden(self, x: jax.Array) -> jax.Array:
        """Features before the last layer, shape ``(..., hidden_features)``."""
        if self.layers:
            check_width("an MLP", self.in_features, x)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return x

    def readout(self, hidden: jax.Array) -> jax.Array:
        """Output from the features before the last layer."""
        if not self.layers:
            return hidden
        y = self.layers[-1](hidden)
        return self.activation(y) if self.activate_final else y

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies all layers along the last axis."""
        return self.readout(self.hidden(x))


class Builder:
    """Makes the layers of one model from what the user gave, all with the same options."""

    def __init__(self, activation: Activation, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        if not callable(activation):
            raise TypeError(f"activation={activation!r}, expected a function, such as nnx.relu")
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs is a {type(rngs).__name__}, expected nnx.Rngs(0)")
        self.activation = activation
        self.options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.rngs = rngs

    def encoder(self, encoder: Layer | Sizes, features: int | None) -> tuple[Layer, int | None]:
        """The encoder, and the width of what it returns if that is known."""
        if not is_layer(encoder):
            sizes = check_sizes(encoder, "encoder")
            if features not in (None, sizes[-1]):
                raise ValueError(
                    f"features is {features} but the encoder sizes {sizes} end in {sizes[-1]}: "
                    "leave features out, it is for encoders given as a module"
                )
            encoder = self.mlp(sizes, activate_final=True)
        return encoder, self.width(encoder, features)

    def mlp(
        self, sizes: Sequence[int], *, activate_final: bool, rngs: nnx.Rngs | None = None
    ) -> MLP:
        """Dense layers from the first size to the last."""
        return MLP(
            sizes,
            activation=self.activation,
            activate_final=activate_final,
            **self.options,
            rngs=rngs or self.rngs,
        )

    def head(
        self, task: str, head: Layer | Sizes, features: int | None, option: str = "features"
    ) -> Layer:
        """The head of a task, reading ``features`` inputs if it is given by sizes."""
        if is_layer(head):
            return head
        sizes = check_sizes(head, f"head of task {task!r}")
        features = require_width(features, f"the head of task {task!r} is given by sizes", option)
        if isinstance(head, Sequence):
            return self.mlp((features, *sizes), activate_final=False)
        return nnx.Linear(features, sizes[0], **self.options, rngs=self.rngs)

    @staticmethod
    def width(module: Any, given: int | None = None) -> int | None:
        """Output width of a module: as given, or read off the module."""
        if given is not None:
            return positive_integer(given, "features")
        width = getattr(module, "out_features", None)
        return width if isinstance(width, int) else None


def names_of_heads(heads: Mapping[str, Any]) -> tuple[str, ...]:
    """The task names of ``heads``, sorted, as JAX sorts the keys of a dictionary."""
    if not isinstance(heads, Mapping) or not heads:
        raise ValueError(
            f"heads is {heads!r}, expected a dictionary with at least one task: "
            "for example {'click': 1, 'buy': 1}"
        )
    for name in heads:
        if not isinstance(name, str) or not name:
            raise ValueError(f"task name {name!r} is not a non-empty string: name it, as 'click'")
    return tuple(sorted(heads))


def is_layer(value: Any) -> TypeGuard[Layer]:
    """Whether this is a module or a function, rather than sizes to make one from."""
    # A module need not be callable: a head of `Hierarchical` may have hidden and readout instead.
    return callable(value) or isinstance(value, nnx.Module)


def positive_integer(value: Any, what: str) -> int:
    """A size or a number of parts."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{what} is {value!r}, expected an integer >= 1")
    return int(value)


def check_sizes(sizes: Any, what: str) -> tuple[int, ...]:
    """One or more positive layer sizes."""
    if isinstance(sizes, int | np.integer):
        sizes = (sizes,)
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
        raise ValueError(
            f"{what} is {sizes!r}, expected layer sizes, such as (16, 1), or a module that can be "
            "called"
        )
    return tuple(positive_integer(size, f"a layer size of {what}") for size in sizes)


def require_width(features: int | None, why: str, option: str = "features") -> int:
    """The width of the features, which modules without ``out_features`` do not tell."""
    if features is None:
        raise ValueError(
            f"{why}, but the width of what it reads is unknown: pass it as `{option}=`, or give "
            "the module before it an `out_features` attribute"
        )
    return features


def check_width(what: str, width: int, x: Any) -> None:
    """Raises where Dense layers of one width are given another, which JAX says namelessly."""
    if jnp.shape(x)[-1:] != (width,):
        raise ValueError(
            f"{what} reads width {width}, and is given shape {jnp.shape(x)}: build it for that "
            "last axis, or, where it is made from sizes, correct what is passed as `features`, "
            "`expert_features` or `block_features`"
        )


def read(heads: Mapping[str, Any], task: str, features: Any) -> Any:
    """What the head of a task makes of its features."""
    head = heads[task]
    # Of other modules it is unknown what axis an attribute `in_features` is about.
    if type(head) in (MLP, nnx.Linear):
        check_width(f"the head of task {task!r}", head.in_features, features)
    return head(features)
