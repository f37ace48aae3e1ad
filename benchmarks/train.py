"""Training under one strategy: a compiled scan over steps, vmapped over seeds and configurations.

A configuration is a learning rate and, for the baseline of tuned static weights, the weights. Every
strategy sees the same initial weights and the same batches for a given seed. Training is cut into
chunks, so that the caller can look at the models, time the steps and show progress.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from benchmarks.data import Split
from benchmarks.problem import Problem, Settings, last_shared_layer

PLAIN = "plain"  # not a strategy: jax.grad of the summed losses, the reference of every overhead
TUNED = "tuned weights"  # static weights, the best of random ones on the validation set


class Config(NamedTuple):
    """What is tuned; arrays have a leading axis of configurations."""

    rate: Any  # (C,), Adam's first learning rate
    weights: Any  # (C, K), of `TUNED` alone


class TrainState(NamedTuple):
    """What one training step carries to the next; every leaf has leading axes ``(S, C)``."""

    params: Any
    opt_state: optax.OptState


class Record(NamedTuple):
    """What a chunk of T steps reports, tasks in the order of their losses.

    Arrays rather than dictionaries: single-task programs that differ in a name alone compile once.
    """

    losses: jax.Array  # (S, C, T, K)
    weights: jax.Array  # likewise, or (S, C, T, 0) for strategies that keep no weights


@dataclasses.dataclass(frozen=True)
class Program:
    """One strategy, compiled."""

    state: TrainState
    advance: jax.stages.Compiled  # (state, train split, indices (S, T, batch)) -> state, Record
    flops_per_step: float  # of one model


class Method(NamedTuple):
    """How a method differentiates the losses, and what it makes of the result."""

    differentiate: Callable[..., Any]  # (params, batch) -> ((losses, kpis), gradient or Jacobian)
    combine: Callable[[jax.Array, Config], optax.GradientTransformationExtraArgs]


def configurations(name: str, settings: Settings, num_tasks: int) -> Config:
    """Every learning rate of the grid; for `TUNED` with each of the random weights.

    Those are uniform on the simplex, times K so that a mean task counts as under equal weights.
    """
    count = settings.candidates if name == TUNED else 1
    draws = np.random.default_rng(0).dirichlet(np.ones(num_tasks), count)
    weights = np.repeat(num_tasks * draws, len(settings.learning_rates), axis=0)
    return Config(
        np.tile(np.array(settings.learning_rates, np.float32), count), weights.astype(np.float32)
    )


def method(problem: Problem, name: str, settings: Settings, num_examples: int) -> Method:
    """The strategy `name` of the catalog, `PLAIN` or `TUNED`."""
    num_tasks = len(problem.names)
    if name == PLAIN:

        def total(params: Any, batch: Split) -> tuple[jax.Array, Any]:
            losses, kpis = problem.losses(params, batch)
            return sum(losses.values(), jnp.zeros(())), (losses, kpis)

        def plain(params: Any, batch: Split) -> tuple[Any, Any]:
            (_, losses_and_kpis), grads = jax.value_and_grad(total, has_aux=True)(params, batch)
            return losses_and_kpis, grads

        return Method(plain, lambda key, config: optax.with_extra_args_support(optax.identity()))

    value_and_jac = mtl.value_and_jac(
        problem.losses,
        has_aux=True,
        gramian_at=last_shared_layer if name == "gradnorm" else None,
    )
    if name == TUNED:
        return Method(value_and_jac, lambda key, config: mtl.weights(config.weights))

    # What a strategy must be told about the problem; everything else stays at its default.
    first = problem.names[0]
    told: dict[str, dict[str, Any]] = {
        "dwa": {"window": max(1, num_examples // settings.batch_size)},  # an epoch, as its paper
        "uncertainty": {"kind": {t: _noise(kind) for t, kind in problem.kinds.items()}},
        "weights": {"weights": {task: 3.0 if task == first else 1.0 for task in problem.names}},
    }

    def on_halves(params: Any, batch: Split) -> tuple[Any, Any]:
        halves = [jax.tree.map(lambda array, i=i: array[i::2], batch) for i in range(2)]
        reports, jacs = zip(*(value_and_jac(params, half) for half in halves), strict=True)
        return jax.tree.map(lambda a, b: (a + b) / 2, *reports), jacs

    return Method(
        on_halves if mtl.STRATEGIES[name].needs == "batches" else value_and_jac,
        lambda key, config: mtl.make(name, num_tasks, key=key, **told.get(name, {})),
    )


def _noise(kind: str) -> str:
    return "classification" if kind in ("classification", "binary") else "regression"


def build(problem: Problem, name: str, settings: Settings, train: Split) -> Program:
    """Compiles the training of a problem under the strategy `name`, `PLAIN` or `TUNED`."""
    num_examples = len(jax.tree.leaves(train)[0])
    differentiate, combine = method(problem, name, settings, num_examples)
    configs = configurations(name, settings, len(problem.names))

    def transformation(key: jax.Array, config: Config) -> optax.GradientTransformationExtraArgs:
        # Strategies whose weights grow or shrink in training change the length of Adam's steps for
        # as long as its second moment remembers: 100 steps here, where the default would be 1000.
        schedule = optax.cosine_decay_schedule(1.0, settings.steps)
        adam = optax.adam(lambda count: config.rate * schedule(count), b2=0.99)
        return optax.chain(combine(key, config), adam)

    def init(params: Any, seed: jax.Array, config: Config) -> TrainState:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return TrainState(params, transformation(key, config).init(params))

    def step(state: TrainState, config: Config, batch: Split) -> tuple[TrainState, Record]:
        (losses, kpis), updates = differentiate(state.params, batch)
        tx = transformation(jax.random.key(0), config)  # each seed's own key is in its state
        losses_fn = lambda params: problem.losses(params, batch)[0]  # noqa: E731
        more = {"kpis": kpis, "validation_fn": losses_fn, "losses_fn": losses_fn}
        updates, opt_state = tx.update(updates, state.opt_state, state.params, **more)
        summary = mtl.summarize(opt_state, problem.names)
        weights = [summary[f"weights/{t}"] for t in problem.names if f"weights/{t}" in summary]
        params = optax.apply_updates(state.params, updates)
        record = Record(jnp.stack([losses[t] for t in problem.names]), jnp.array(weights))
        return TrainState(params, opt_state), record

    def advance(state: TrainState, train: Split, indices: jax.Array) -> tuple[TrainState, Record]:
        def one_seed(state: TrainState, indices: jax.Array) -> tuple[TrainState, Record]:
            def body(state: TrainState, index: jax.Array) -> tuple[TrainState, Record]:
                batch = jax.tree.map(lambda array: array[index], train)
                return jax.vmap(step, in_axes=(0, 0, None))(state, configs, batch)

            state, record = jax.lax.scan(body, state, indices)
            return state, jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), record)

        return jax.vmap(one_seed)(state, indices)

    state = jax.vmap(jax.vmap(init, in_axes=(None, None, 0)), in_axes=(0, 0, None))(
        problem.params, jnp.arange(settings.seeds), configs
    )
    indices = jax.ShapeDtypeStruct(
        (settings.seeds, settings.steps_per_checkpoint, settings.batch_size), jnp.int32
    )
    compiled = jax.jit(advance).lower(state, train, indices).compile()
    # XLA counts the body of the scan once, so this is one step of all models.
    flops = (compiled.cost_analysis() or {}).get("flops", float("nan"))
    return Program(state, compiled, flops / (settings.seeds * len(configs.rate)))
