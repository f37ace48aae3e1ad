"""Experts and gates of the mixture-of-experts architectures."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from mtl_optax.models._base import Builder, Sizes, check_count, check_sizes

ExpertFactory: TypeAlias = Callable[[int, nnx.Rngs], nnx.Module]


class Experts(nnx.Module):
    """A group of experts that read the same input.

    Experts made from sizes or by a function hold their parameters stacked on a leading axis and
    run as one batched computation. Experts given as modules may differ from each other and run one
    by one, as do experts with state beyond parameters (batch statistics, random streams), which
    stacking would have to update.

    Args:
      experts: layer sizes after the features, each layer followed by the activation; a function
        ``(in_features, rngs) -> module``; or a sequence of modules.
      num_experts: number of experts; None only for a sequence of modules.
      features: width of the input.
      build: makes the layers.
      what: names the group in error messages.
    """

    def __init__(
        self,
        experts: Sizes | ExpertFactory | Sequence[nnx.Module],
        num_experts: int | None,
        features: int,
        build: Builder,
        what: str = "experts",
    ):
        if isinstance(experts, Sequence) and experts and all(callable(e) for e in experts):
            if num_experts not in (None, len(experts)):
                raise ValueError(
                    f"num_experts is {num_experts} but {what} are {len(experts)} modules: leave "
                    "num_experts out"
                )
            modules: list[Any] = list(experts)
            stack = None
        else:
            count = check_count(num_experts, f"the number of {what}")
            make: Any = experts if callable(experts) else _mlp_factory(experts, build, what)
            modules = [make(features, build.rngs) for _ in range(count)]
            stack = _stack(modules)
        self.num_experts = len(modules)
        self.out_features = build.width(modules[0])
        self.modules = nnx.data(modules if stack is None else [])
        self.stack = stack

    def __call__(self, x: Any) -> jax.Array:
        """Outputs of all experts, shape ``(num_experts, ...)``."""
        if self.stack is None:
            return jnp.stack([module(x) for module in self.modules])
        # Not nnx.vmap, which writes parameters back and so fails on a model closed over by jit.
        graphdef, params = nnx.split(self.stack)
        return jax.vmap(lambda p: nnx.merge(graphdef, p)(x))(params)


def gate_weights(gate: nnx.Linear, x: jax.Array) -> jax.Array:
    """Softmax gate, shape ``(..., num_experts)``, in at least float32."""
    logits = gate(x)
    return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)


def mix(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """Weighted sum over experts: weights ``(..., E)``, outputs ``(E, ..., *rest)``."""
    weights = jnp.moveaxis(weights, -1, 0)
    if outputs.shape[: weights.ndim] != weights.shape:
        raise ValueError(
            f"experts return shape {outputs.shape[1:]} while the gates, which read the last axis "
            f"of the features, have batch shape {weights.shape[1:]}, expected the experts' shape "
            "to begin with it: pool in the encoder, so that experts and gates read vectors"
        )
    weights = weights.reshape(weights.shape + (1,) * (outputs.ndim - weights.ndim))
    return jnp.sum(weights.astype(outputs.dtype) * outputs, axis=0)


def _stack(modules: Sequence[nnx.Module]) -> nnx.Module | None:
    """One module with the parameters of all, or None if they hold anything else, or nothing."""
    # After the fact rather than with nnx.vmap around the factory: groups of every size then
    # compile the same initialisers, which is most of the time it takes to make a model.
    if any(jax.tree.leaves(nnx.state(module, nnx.Not(nnx.Param))) for module in modules):
        return None
    params = [nnx.state(module) for module in modules]
    if not jax.tree.leaves(params):
        return None
    return nnx.merge(nnx.graphdef(modules[0]), jax.tree.map(lambda *p: jnp.stack(p), *params))


def _mlp_factory(sizes: Any, build: Builder, what: str) -> ExpertFactory:
    layers = check_sizes(sizes, what)
    return lambda features, rngs: build.mlp((features, *layers), activate_final=True, rngs=rngs)
