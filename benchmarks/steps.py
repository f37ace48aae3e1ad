"""The train steps that the cost benchmarks compare: one compiled program for each row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import mtl_optax as mtl
from benchmarks import flops
from benchmarks.workloads import Workload

PLAIN = "plain"
CONTROL = "plain, once more"  # whose ratio tells how far the others' can be trusted
LEARNING_RATE = 1e-3
EVERY = 10


class Way(NamedTuple):
    """One row: a strategy, and how its Jacobian is made.

    Attributes:
      group: what it is compared with: `"losses"`, `"features"`, `"last layer"`, `"exact"` for a
        Gramian over the whole trunk, `"every 10"` for one at every tenth step, or `"sketch"`.
      strategy: its name in the catalog.
      value_and_jac: from a workload and a random key to the function of `(params, batch)`.
    """

    group: str
    strategy: str
    value_and_jac: Callable[[Workload, jax.Array], Callable[..., Any]]


def _by(**options: Any) -> Callable[[Workload, jax.Array], Callable[..., Any]]:
    return lambda workload, _: mtl.value_and_jac(workload.losses, **options)


def _features(workload: Workload, _: jax.Array) -> Callable[..., Any]:
    return mtl.value_and_feature_jac(workload.encode, workload.decode)


def _last_layer(**options: Any) -> Callable[[Workload, jax.Array], Callable[..., Any]]:
    return lambda workload, _: mtl.value_and_jac(
        workload.losses, gramian_at=workload.last_shared, **options
    )


def _sketched(workload: Workload, key: jax.Array) -> Callable[..., Any]:
    return mtl.value_and_jac(workload.losses, gramian=mtl.Sketch(key))


# Every exact way to the Gramian over the whole trunk: a new mode is one line here.
EXACT = {
    "isolated rows": _by(gramian="rows", rows="isolated"),
    "batched rows": _by(gramian="rows", rows="batched"),
    "sequential rows": _by(gramian="rows", rows="sequential"),
    "columns": _by(gramian="columns"),
    "ghost": _by(gramian="ghost"),
    "streamed": _by(gramian="streamed"),
}
WAYS: dict[str, Way] = {
    **{
        name: Way("losses", name, _by())
        for name in ("uncertainty", "dwa", "dtp", "famo", "gls", "rlw")
    },
    **{f"{name}, features": Way("features", name, _features) for name in ("mgda", "upgrad")},
    "upgrad, last layer": Way("last layer", "upgrad", _last_layer()),
    "upgrad, last layer by ghost": Way("last layer", "upgrad", _last_layer(gramian="ghost")),
    **{f"upgrad, {mode}": Way("exact", "upgrad", make) for mode, make in EXACT.items()},
    "upgrad, every 10": Way("every 10", "upgrad", _by()),
    "upgrad, sketch": Way("sketch", "upgrad", _sketched),
}


class Program:
    """A compiled train step of a workload; every call trains on from where the last one ended.

    Args:
      workload: what is trained.
      name: a row of `WAYS`, or `PLAIN`.
      make: makes the strategy, as `mtl.make` does.

    Attributes:
      flops: of the matrix products and convolutions of one step, what a loop does as often as it
        turns; of a link that rests, the mean step's.
      temp_bytes: what the step allocates beside parameters, state and batch, as compiled.
    """

    def __init__(self, workload: Workload, name: str, make: Callable[..., Any] = mtl.make):
        step, self._state = train_step(workload, name, make)
        self._arguments = jax.device_put((workload.batch, jax.random.key(0)))
        # The optimizer's state is updated in place, as it is in PyTorch.
        jitted = jax.jit(step, donate_argnums=0)
        self._compiled = jitted.lower(self._state, *self._arguments).compile()
        outside, branches = flops.parts(step, self._state, *self._arguments)
        turns = EVERY if WAYS.get(name) and WAYS[name].group == f"every {EVERY}" else 1
        dearer = sum(max(branch) - min(branch) for branch in branches)
        self.flops = outside + sum(map(min, branches)) + dearer / turns
        memory: Any = self._compiled.memory_analysis()
        self.temp_bytes = int(memory.temp_size_in_bytes)

    def __call__(self) -> Any:
        """Trains one step; returns the losses before it."""
        self._state, losses = self._compiled(self._state, *self._arguments)
        return losses


def train_step(
    workload: Workload, name: str, make: Callable[..., Any] = mtl.make
) -> tuple[Callable[..., Any], Any]:
    """The step `(state, batch, key) -> (state, losses)` of a row, or of `PLAIN`, and its state."""
    way = WAYS.get(name)
    adam = optax.adam(LEARNING_RATE)
    if way is None:
        tx: Any = adam
    else:
        strategy: Any = make(way.strategy, workload.num_tasks, key=jax.random.key(0))
        if way.group == f"every {EVERY}":
            strategy = mtl.every(EVERY, strategy)
        tx = optax.chain(strategy, adam)

    def step(state, batch, key):
        params, opt_state = state
        if way is None:
            (_, losses), updates = jax.value_and_grad(total, has_aux=True)(params, batch)
        else:
            losses, updates = way.value_and_jac(workload, key)(params, batch)
        # Performance indicators, which DTP asks for: anything between 0 and 1 costs the same.
        kpis = jax.tree.map(lambda loss: jnp.full_like(loss, 0.5), losses)
        updates, opt_state = tx.update(updates, opt_state, params, kpis=kpis)
        return (optax.apply_updates(params, updates), opt_state), losses

    def total(params, batch):
        losses = workload.losses(params, batch)
        return sum(jnp.sum(loss) for loss in jax.tree.leaves(losses)), losses

    params = jax.device_put(workload.params)
    return step, (params, tx.init(params))
