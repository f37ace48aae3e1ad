"""Experts and gates of the mixture-of-experts architectures."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from mtl_optax._numerics import wide
from mtl_optax.models._base import Builder, Sizes, check_sizes, check_width, positive_integer

ExpertFactory: TypeAlias = Callable[[int, nnx.Rngs], nnx.Module]


class Experts(nnx.Module):
    """A group of experts that read the same input.

    Experts made from sizes or by a function hold their parameters stacked on a leading axis and
    run as one batched computation. Experts given as modules run one by one, as do those of a
    function that share parameters, have state beyond them (batch statistics, random streams), which
    stacking would have to update, or differ in anything but the values of their parameters; a
    function made anew for each, such as a `lambda` as an activation, is a difference.

    Args:
      experts: layer sizes after the features, each layer followed by the activation; a function
        ``(in_features, rngs) -> module``; or a sequence of modules.
      num_experts: number of experts; None only for a sequence of modules.
      features: width of the input.
      build: makes the layers.
      what: names the group in error messages.

    Raises:
      ValueError: if there is no positive number of experts or they differ in what they return.
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
            count = positive_integer(num_experts, f"the number of {what}")
            make: Any = experts if callable(experts) else _mlp_factory(experts, build, what)
            modules = [make(features, build.rngs) for _ in range(count)]
            stack = _stack(modules)
        self.num_experts = len(modules)
        self.out_features = build.width(modules[0])
        self.what = what
        self.modules = nnx.data(modules if stack is None else [])
        self.stack = stack

    def __call__(self, x: Any) -> jax.Array:
        """Outputs of all experts, shape ``(num_experts, ...)``."""
        if self.stack is None:
            return self._stacked([module(x) for module in self.modules])
        return _vmapped(self.stack, None)(x)

    def each(self, inputs: jax.Array) -> jax.Array:
        """Output of expert e for ``inputs[e]``, shape ``(num_experts, ...)``."""
        if self.stack is None:
            pairs = zip(self.modules, inputs, strict=True)
            return self._stacked([module(x) for module, x in pairs])
        return _vmapped(self.stack, 0)(inputs)

    def _stacked(self, outputs: Sequence[Any]) -> jax.Array:
        for index, output in enumerate(outputs):
            if output.shape != outputs[0].shape:
                raise ValueError(
                    f"number {index} of the {self.what} returns shape {output.shape} and number 0 "
                    f"{outputs[0].shape}, expected the same of all: they are mixed"
                )
        return jnp.stack(outputs)


class SoftmaxGate(nnx.Linear):
    """Softmax of a linear layer without a bias, as in the MMoE and PLE papers."""

    def __init__(self, features: int, num_experts: int, rngs: nnx.Rngs, **options: Any):
        super().__init__(features, num_experts, use_bias=False, rngs=rngs, **options)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Weights of the experts, shape ``(..., num_experts)``, in at least float32."""
        check_width("a gate", self.in_features, inputs)
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
    # Gates choose between experts by small differences, which half precision would round off.
    return jax.nn.softmax(logits.astype(wide(logits.dtype)), axis=-1)


def blend(weights: jax.Array, outputs: jax.Array) -> jax.Array:
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


def together(outputs: Mapping[str, jax.Array], shared: jax.Array) -> jax.Array:
    """The outputs of the tasks' experts and of the shared ones, along the axis of the experts."""
    for task, output in outputs.items():
        if output.shape[1:] != shared.shape[1:]:
            raise ValueError(
                f"experts of task {task!r} return shape {output.shape[1:]} and shared ones "
                f"{shared.shape[1:]}, expected the same of all: they are mixed"
            )
    return jnp.concatenate([*outputs.values(), shared])


def _vmapped(stack: nnx.Module, axis: int | None) -> Callable[[Any], jax.Array]:
    """All stacked modules, with the inputs along ``axis`` or, if that is None, one for all."""
    # Not nnx.vmap, which writes parameters back and so fails on a model closed over by jit.
    graphdef, params = nnx.split(stack)

    def run(params: Any, x: Any) -> jax.Array:
        module: Any = nnx.merge(graphdef, params)
        return module(x)

    return partial(jax.vmap(run, in_axes=(0, axis)), params)


def _stack(modules: Sequence[nnx.Module]) -> nnx.Module | None:
    """One module with the parameters of all, or None if they hold anything else, or nothing.

    None as well if they are not alike: those of the first would stand for what the others are.
    """
    # After the fact rather than with nnx.vmap around the factory: groups of every size then
    # compile the same initialisers, which is most of the time it takes to make a model.
    if any(jax.tree.leaves(nnx.state(module, nnx.Not(nnx.Param))) for module in modules):
        return None
    params = [nnx.state(module) for module in modules]
    if not jax.tree.leaves(params) or not _alike(modules) or _tied(modules):
        return None
    return nnx.merge(nnx.graphdef(modules[0]), jax.tree.map(lambda *p: jnp.stack(p), *params))


def _alike(modules: Sequence[nnx.Module]) -> bool:
    """Whether only the values of their parameters tell the modules apart."""

    def kind(module: nnx.Module) -> tuple[Any, Any]:
        graphdef, params = nnx.split(module)
        return graphdef, [(p.shape, p.dtype) for p in jax.tree.leaves(params)]

    return all(kind(module) == kind(modules[0]) for module in modules[1:])


def _tied(modules: Sequence[nnx.Module]) -> bool:
    """Whether two modules hold one parameter, which stacking would make several."""
    held = [
        {id(node) for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)}
        for module in modules
    ]
    return len(set().union(*held)) < sum(map(len, held))


def _mlp_factory(sizes: Any, build: Builder, what: str) -> ExpertFactory:
    layers = check_sizes(sizes, what)
    return lambda features, rngs: build.mlp((features, *layers), activate_final=True, rngs=rngs)
