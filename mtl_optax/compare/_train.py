"""Training under one strategy: a compiled scan over steps, vmapped over seeds and configurations.

A configuration is a learning rate, and static weights or options of the strategy. Every strategy
sees the same initial parameters and the same batches for a given seed. Training is cut into chunks,
so that the caller can look at the models, time the steps and show progress.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from mtl_optax._branch import without_fallbacks
from mtl_optax.compare import _hashes as hashes
from mtl_optax.compare._setup import Setup
from mtl_optax.compare._source import halves

PLAIN = "plain"  # not a strategy: jax.grad of the summed losses, the reference of every overhead
OPTIMIZERS = ("adatask", "m_config")  # hold Adam's moments: followed by SGD, rates along a cosine
STATIC = "static weights"  # what every weighting has to be better than
INVERSE, ALONE, RANDOM = "inverse", "alone", "random"  # where static weights come from


class Config(NamedTuple):
    """What is tuned; arrays have leading axes ``(S, C)`` of seeds and configurations."""

    rate: Any
    weights: Any  # (S, C, K), of `STATIC` alone
    options: dict[str, Any]


class TrainState(NamedTuple):
    """What one training step carries to the next; every leaf has leading axes ``(S, C)``."""

    params: Any
    rest: Any
    opt_state: optax.OptState


class Record(NamedTuple):
    """What a chunk of T steps reports, tasks in the order of their losses."""

    losses: jax.Array  # (S, C, T, K), NaN where a task was absent
    weights: jax.Array  # likewise, or (S, C, T, 0) for strategies that keep no weights


@dataclasses.dataclass(frozen=True)
class Program:
    """One strategy, compiled for a number of configurations."""

    state: TrainState
    advance: jax.stages.Compiled  # (state, configs, data, items (S, T, ...)) -> state, Record
    flops_per_step: float  # of one model


def grid(name: str, setup: Setup) -> list[dict[str, Any]]:
    """The options that a strategy is tried with: those of its row in the catalog, or no choice."""
    choices = mtl.STRATEGIES[name].grid if setup.settings.tune and name in mtl.STRATEGIES else {}
    told = setup.problem.options.get(name, {})
    lists: list[dict[str, Any]] = [{}]
    for option, values in choices.items():
        if option not in told:
            lists = [{**chosen, option: value} for chosen in lists for value in values]
    return lists


def static_weights(setup: Setup, count: int) -> list[tuple[str, np.ndarray]]:
    """The static weights of the baselines ``(S, K)``, each with where it comes from.

    One over the initial losses; each task alone, if it is measured alone; and `count` random ones,
    half of them uniform on the simplex, half those times the inverse initial losses. A mean task
    counts as under equal weights.
    """
    first, num_tasks = np.abs(setup.initial_losses), len(setup.names)
    usable = np.isfinite(first) & (first > 0)
    inverse = 1 / np.where(usable, first, 1.0)
    some = usable.sum(axis=1, keepdims=True)
    typical = np.where(usable, inverse, 0.0).sum(axis=1, keepdims=True) / np.maximum(some, 1)
    inverse = np.where(usable, inverse, np.where(some, typical, 1.0))
    draws = np.random.default_rng(0).dirichlet(np.ones(num_tasks), count)
    rows = [(INVERSE, inverse)]
    if setup.singles:
        rows += [(ALONE, np.tile(one, (len(first), 1))) for one in np.eye(num_tasks)]
    rows += [(RANDOM, draw * (inverse if i % 2 else 1)) for i, draw in enumerate(draws)]
    scaled = [(kind, num_tasks * w / w.sum(axis=-1, keepdims=True)) for kind, w in rows]
    return [(kind, np.broadcast_to(w, first.shape).astype(np.float32)) for kind, w in scaled]


def blocks(setup: Setup, variants: list[Any]) -> Iterator[Config]:
    """Every variant, weights or options, with every learning rate, as many at a time as allowed.

    All blocks are of one size, so that they share a program. A configuration's place is that of its
    variant times the number of rates, and that of its rate.
    """
    rates = np.array(setup.settings.learning_rates, np.float32)
    seeds, count = setup.settings.seeds, len(variants)
    fitting = max(1, setup.settings.models // (seeds * len(rates)))
    size = max(n for n in range(1, count + 1) if count % n == 0 and n <= fitting)
    for start in range(0, count, size):
        some = variants[start : start + size]
        weights, options = np.zeros((seeds, size * len(rates), 0), np.float32), {}
        if isinstance(some[0], dict):
            options = {
                name: _of_seeds([variant[name] for variant in some], seeds, len(rates))
                for name in some[0]
            }
        else:
            weights = np.repeat(np.stack(some, axis=1), len(rates), axis=1)
        yield Config(np.tile(rates, (seeds, size)), weights, options)


def _of_seeds(values: list[float], seeds: int, num_rates: int) -> np.ndarray:
    return np.tile(np.repeat(np.array(values, np.float32), num_rates), (seeds, 1))


def facts(setup: Setup, name: str, variants: list[Any]) -> dict[str, Any]:
    """What the numbers of a strategy depend on beside the problem: its own program, its grid.

    The program is that of one model, which is the same however many are trained side by side.
    """
    init, step = _program(setup, name)
    config = jax.tree.map(lambda x: x[0, 0], next(blocks(setup, variants[:1])))
    item = jax.tree.map(lambda x: x[0, 0], setup.source.first)

    def once(params: Any, rest: Any, seed: Any, config: Config, data: Any, item: Any) -> Any:
        state = init(params, rest, seed, config)
        return state, step(state, config, setup.source.batch(data, item))

    arguments = *setup.one_seed(0), jnp.int32(0), config, setup.source.data, item
    options = [variant for variant in variants if isinstance(variant, dict)]
    weights = [variant for variant in variants if not isinstance(variant, dict)]
    return {
        "training": hashes.of_program(once, *arguments),
        "variants": [{o: float(value) for o, value in chosen.items()} for chosen in options],
        "weights": hashes.of_values(weights),
    }


def _program(setup: Setup, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The first state of one model under a strategy, and a step of its training."""
    problem, settings, source = setup.problem, setup.settings, setup.source
    needs = mtl.STRATEGIES[name].needs if name in mtl.STRATEGIES else ""
    several, validates = needs == "batches", needs == "validation"
    measured = {} if name != "gradnorm" else {"gramian_at": problem.last_shared}
    told: dict[str, Any] = dict(problem.options.get(name, {}))
    if name == "dwa" and source.num_examples:  # an epoch, as its paper
        told = {"window": max(1, source.num_examples // settings.batch_size), **told}

    def transformation(key: jax.Array, config: Config) -> optax.GradientTransformationExtraArgs:
        optimizer = problem.optimizer(config.rate, settings.steps)
        if name in OPTIMIZERS:
            schedule = optax.cosine_decay_schedule(1.0, settings.steps)
            optimizer = optax.sgd(lambda count: config.rate * schedule(count))
        if name == PLAIN:
            return optax.with_extra_args_support(optimizer)
        if name == STATIC:
            return optax.chain(mtl.weights(config.weights), optimizer)
        strategy = mtl.make(name, len(setup.names), key=key, **{**told, **config.options})
        return optax.chain(strategy, optimizer)

    def differentiate(state: TrainState, batch: Any) -> tuple[Any, ...]:
        """The losses, the rest, what `update` takes, and further arguments of it."""
        present = setup.present(batch)
        if name == PLAIN:

            def total(params: Any) -> tuple[jax.Array, Any]:
                losses, rest = setup.losses(params, state.rest, batch)
                leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(losses)]
                seen = jnp.where(present, jnp.concatenate(leaves), 0.0)
                return jnp.sum(seen), (seen, rest)

            (_, report), grads = jax.value_and_grad(total, has_aux=True)(state.params)
            return *report, grads, {}
        parts, extra, rest = [batch], {}, state.rest
        if several or validates:
            parts = halves(batch)
        if validates:  # on the half that is not trained on
            *parts, other = parts
            for argument, half in (("losses_fn", parts[0]), ("validation_fn", other)):
                extra[argument] = lambda p, half=half: setup.losses(p, state.rest, half)[0]
        losses, jacs = [], []
        for part in parts:
            vector, rest, jac = setup.linearize(state.params, rest, part, **measured)
            present &= setup.present(part)
            losses.append(vector)
            jacs.append(jac)
        if problem.present is not None:
            extra["present"] = present
        if problem.kpis is not None and name == "dtp":
            extra["kpis"] = problem.kpis(*setup.given(state.params, state.rest), batch)
        seen = jnp.where(present, sum(losses) / len(losses), jnp.nan)
        return seen, rest, tuple(jacs) if several else jacs[0], extra

    def init(params: Any, rest: Any, seed: jax.Array, config: Config) -> TrainState:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return TrainState(params, rest, transformation(key, config).init(params))

    def step(state: TrainState, config: Config, batch: Any) -> tuple[TrainState, Record]:
        losses, rest, updates, extra = differentiate(state, batch)
        tx = transformation(jax.random.key(0), config)  # each seed's own key is in its state
        updates, opt_state = tx.update(updates, state.opt_state, state.params, **extra)
        summary = mtl.summarize(opt_state, setup.names)
        weights = [summary[f"weights/{t}"] for t in setup.names if f"weights/{t}" in summary]
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, rest, opt_state), Record(losses, jnp.array(weights))

    return init, step


def build(setup: Setup, name: str, configs: Config) -> Program:
    """Compiles the training under the strategy `name`, `PLAIN` or `STATIC`."""
    problem, settings, source = setup.problem, setup.settings, setup.source
    init, step = _program(setup, name)

    def advance(state: TrainState, configs: Config, data: Any, items: Any) -> Any:
        def one_seed(state: TrainState, configs: Config, items: Any) -> Any:
            def body(state: TrainState, item: Any) -> tuple[TrainState, Record]:
                batch = source.batch(data, item)
                return jax.vmap(step, in_axes=(0, 0, None))(state, configs, batch)

            state, record = jax.lax.scan(body, state, items)
            return state, jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), record)

        return jax.vmap(one_seed)(state, configs, items)

    state = jax.vmap(jax.vmap(init, in_axes=(None, None, None, 0)))(
        setup.params, setup.rest, jnp.arange(settings.seeds), configs
    )
    data = source.data, source.first
    compiled = counted = jax.jit(advance).lower(state, configs, *data).compile()
    # The models of a seed share a batch: what one costs is told by as many as of the plain step.
    count = len(settings.learning_rates)
    some = jax.tree.map(lambda x: x[:, :count], (state, configs))
    fallback = problem.present is not None and name != PLAIN
    if fallback or count < configs.rate.shape[1]:
        # XLA counts both branches, of which one is for gradients of absent tasks that are NaN. A
        # function of its own, or the trace of the one above would be found again.
        with without_fallbacks():
            counted = jax.jit(lambda *args: advance(*args)).lower(*some, *data).compile()
    # XLA counts the body of the scan once, so this is one step of all models.
    flops = (counted.cost_analysis() or {}).get("flops", float("nan"))
    return Program(state, compiled, flops / (settings.seeds * count))
