"""Experts and gates of the mixture-of-experts architectures."""

from collections.abc import Callable, Sequence
from functools import partial
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
        return _vmapped(self.stack, None)(x)

    def each(self, inputs: jax.Array) -> jax.Array:
        """Output of expert e for ``inputs[e]``, shape ``(num_experts, ...)``."""
        if self.stack is None:
            return jnp.stack([module(x) for module, x in zip(self.modules, inputs, strict=True)])
        return _vmapped(self.stack, 0)(inputs)


class SoftmaxGate(nnx.Linear):
    """Softmax of a linear layer without a bias, as in the MMoE and PLE papers."""

    def __init__(self, features: int, num_experts: int, rngs: nnx.Rngs, **options: Any):
        super().__init__(features, num_experts, use_bias=False, rngs=rngs, **options)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Weights of the experts, shape ``(..., num_experts)``, in at least float32."""
        return softmax(super().__call__(inputs))


class Gated(nnx.Module):
    """A model whose tasks weight experts, to be read out by ``gate_weights``."""

    def gate_weights(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """For each task one array ``(..., num_experts)``, or a tuple of them, one a level."""
        raise NotImplementedError

    def utilization(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """How much of each expert a task uses, a mean over the batch: ``(levels, experts)``."""
        weights = self.gate_weights(x, *args, **kwargs)
        return {
            task: jnp.stack([w.reshape(-1, w.shape[-1]).mean(0) for w in jax.tree.leaves(levels)])
            for task, levels in weights.items()
        }


def softmax(logits: jax.Array) -> jax.Array:
    """Softmax along the last axis, in at least float32."""
    return jax.nn.softmax(at_least_float32(logits), axis=-1)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Gates choose between experts by small differences, which half precision would round off."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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


def _vmapped(stack: nnx.Module, axis: int | None) -> Callable[[Any], jax.Array]:
    """All stacked modules, with the inputs along ``axis`` or, if that is None, one for all."""
    # Not nnx.vmap, which writes parameters back and so fails on a model closed over by jit.
    graphdef, params = nnx.split(stack)

    def run(params: Any, x: Any) -> jax.Array:
        module: Any = nnx.merge(graphdef, params)
        return module(x)

    return partial(jax.vmap(run, in_axes=(0, axis)), params)


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
