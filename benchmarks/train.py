"""Training under one strategy: a compiled scan over steps, vmapped over seeds.

Every strategy sees the same initial weights and the same batches for a given seed. Training is cut
into chunks, so that the caller can interleave strategies, time them fairly and show progress.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import mtl_optax as mtl
from benchmarks.data import Split
from benchmarks.problem import Problem, Settings, last_shared_layer

PLAIN = "plain"  # not a strategy: jax.grad of the summed losses, the reference of every overhead


class TrainState(NamedTuple):
    """What one training step carries to the next; every leaf has a leading seed axis."""

    params: Any
    opt_state: optax.OptState


class Record(NamedTuple):
    """What a chunk of C steps reports, by task name, each ``(S, C)``."""

    losses: dict[str, jax.Array]
    weights: dict[str, jax.Array]  # empty for strategies that keep no weights


@dataclasses.dataclass(frozen=True)
class Program:
    """One strategy, compiled."""

    state: TrainState
    advance: jax.stages.Compiled  # (state, train split, indices (S, C, batch)) -> state, Record
    flops_per_step: float


class Method(NamedTuple):
    """How a method differentiates the losses, and what it makes of the result."""

    differentiate: Callable[..., Any]  # (params, batch) -> ((losses, kpis), gradient or Jacobian)
    transformation: Callable[[jax.Array], optax.GradientTransformationExtraArgs]  # from a key


def method(problem: Problem, name: str, settings: Settings, num_examples: int) -> Method:
    """The strategy `name` of the catalog followed by Adam, or `PLAIN`."""
    # Strategies whose weights grow or shrink in training change the length of Adam's steps for as
    # long as its second moment remembers: 100 steps here, where the default would be 1000.
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    adam = optax.adam(schedule, b2=0.99)
    if name == PLAIN:

        def total(params: Any, batch: Split) -> tuple[jax.Array, Any]:
            losses, kpis = problem.losses(params, batch)
            return sum(losses.values(), jnp.zeros(())), (losses, kpis)

        def differentiate(params: Any, batch: Split) -> tuple[Any, Any]:
            (_, losses_and_kpis), grads = jax.value_and_grad(total, has_aux=True)(params, batch)
            return losses_and_kpis, grads

        return Method(differentiate, lambda key: optax.chain(adam))

    # What a strategy must be told about the problem; everything else stays at its default.
    first = problem.names[0]
    told: dict[str, dict[str, Any]] = {
        "dwa": {"window": max(1, num_examples // settings.batch_size)},  # an epoch, as its paper
        "uncertainty": {"kind": problem.kinds},
        "weights": {"weights": {task: 3.0 if task == first else 1.0 for task in problem.names}},
    }
    gramian_at = last_shared_layer if name == "gradnorm" else None

    def transformation(key: jax.Array) -> optax.GradientTransformationExtraArgs:
        return optax.chain(mtl.make(name, len(problem.names), key=key, **told.get(name, {})), adam)

    return Method(
        mtl.value_and_jac(problem.losses, has_aux=True, gramian_at=gramian_at), transformation
    )


def build(problem: Problem, name: str, settings: Settings, train: Split) -> Program:
    """Compiles the training of a problem under the strategy `name` (or `PLAIN`)."""
    differentiate, transformation = method(problem, name, settings, len(train.inputs))
    tx = transformation(jax.random.key(0))  # to update with: each seed's own key is in its state

    def init(params: Any, seed: jax.Array) -> TrainState:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return TrainState(params, transformation(key).init(params))

    def step(state: TrainState, batch: Split) -> tuple[TrainState, Record]:
        (losses, kpis), updates = differentiate(state.params, batch)
        updates, opt_state = tx.update(updates, state.opt_state, state.params, kpis=kpis)
        summary = mtl.summarize(opt_state, problem.names)
        weights = {t: summary[f"weights/{t}"] for t in problem.names if f"weights/{t}" in summary}
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state), Record(losses, weights)

    def advance(state: TrainState, train: Split, indices: jax.Array) -> tuple[TrainState, Record]:
        def body(state: TrainState, index: jax.Array) -> tuple[TrainState, Record]:
            return step(state, jax.tree.map(lambda array: array[index], train))

        return jax.vmap(lambda state, indices: jax.lax.scan(body, state, indices))(state, indices)

    # A copy: the state is donated, and problem.params is the start of other strategies too.
    params = jax.tree.map(jnp.copy, problem.params)
    state = jax.vmap(init)(params, jnp.arange(settings.seeds))
    indices = jax.ShapeDtypeStruct(
        (settings.seeds, settings.steps_per_checkpoint, settings.batch_size), jnp.int32
    )
    compiled = jax.jit(advance, donate_argnums=0).lower(state, train, indices).compile()
    # XLA counts the body of the scan once, so this is one step of all seeds.
    flops = (compiled.cost_analysis() or {}).get("flops", float("nan"))
    return Program(state, compiled, flops)
