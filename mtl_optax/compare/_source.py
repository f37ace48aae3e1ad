"""Where batches come from: arrays, any Python iterable, or a draw at each step.

Each becomes items with the axes of seeds and steps, and a traced function from an item to a batch,
so that one compiled scan serves all of them.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_optax.compare._problem import (
    Draw,
    Problem,
    Settings,
    batch_order,
    check_arrays,
    check_takes_integer,
)

NUM_PROBED = 256  # training examples on which gradients are looked at
MAX_SHAPES = 3  # in a message
MAX_BYTES = 1 << 26  # of the batches of an iterable that are handed over at once


class Source(NamedTuple):
    """The batches of a problem."""

    data: Any  # on the device
    batch: Callable[[Any, Any], Any]  # (data, item) -> batch
    items: Callable[[], Iterator[Any]]  # chunks of items (S, steps of a chunk, ...)
    first: Any  # the first chunk
    steps: int  # of a chunk; divides those between two checkpoints
    probe: Any  # a batch on which gradients are looked at
    num_examples: int | None = None


def source_of(problem: Problem, settings: Settings) -> Source:
    """The batches of a problem for all seeds.

    Raises:
      ValueError: if there are too few examples, or an iterable yields nothing.
    """
    train = problem.train
    if isinstance(train, Draw):
        return _drawn(train, settings)
    if isinstance(train, Iterator):
        raise ValueError(
            f"train is a {type(train).__name__}, which yields its batches once: expected a "
            "function from an integer to one"
        )
    if callable(train):
        check_takes_integer(train)
        return _iterated(train, settings)
    check_arrays("train", train)
    sizes = {len(leaf) if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(train)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"the arrays of train have first axes of {sorted(sizes)}, expected the same number of "
            "examples in all; batches of another kind come from a function or a Draw"
        )
    (count,) = sizes
    chunks = np.split(batch_order(settings, count), settings.checkpoints, axis=1)
    probe = count if count < NUM_PROBED else NUM_PROBED
    if problem.jac.get("in_axes") is not None:
        probe = settings.batch_size  # the tasks may be the examples
    # Whatever the order in which they are stored.
    looked_at = np.random.default_rng(0).permutation(count)[:probe]
    return Source(
        data=jax.device_put(train),
        batch=lambda data, index: jax.tree.map(lambda array: array[index], data),
        items=lambda: map(jnp.asarray, chunks),
        first=jnp.asarray(chunks[0]),
        steps=settings.steps_per_checkpoint,
        probe=jax.tree.map(lambda array: jnp.asarray(np.asarray(array)[looked_at]), train),
        num_examples=count,
    )


def _drawn(draw: Draw, settings: Settings) -> Source:
    numbers = np.stack(np.meshgrid(range(settings.seeds), range(settings.steps), indexing="ij"), -1)
    chunks = np.split(numbers.astype(np.int32), settings.checkpoints, axis=1)

    def batch(data: Any, item: Any) -> Any:
        return draw.batch(jax.random.fold_in(jax.random.fold_in(data, item[0]), item[1]))

    key = jax.random.key(0)
    return Source(
        data=key,
        batch=batch,
        items=lambda: map(jnp.asarray, chunks),
        first=jnp.asarray(chunks[0]),
        steps=settings.steps_per_checkpoint,
        probe=batch(key, jnp.array([settings.seeds, 0])),  # points that no seed is trained on
    )


def _iterated(factory: Callable[[int], Any], settings: Settings) -> Source:
    def forever(seed: int, expected: _Kind | None = None) -> Iterator[Any]:
        epoch = 0
        while True:
            some, others = False, []
            # Numbers that no other seed and epoch shares, as long as there are under a million.
            number = seed + 1_000_003 * epoch
            for batch in factory(number):
                check_arrays(f"a batch of train({number})", batch)
                kind = _Kind.of(batch)
                expected = expected or kind
                if kind == expected:
                    some = True
                    yield batch
                elif kind.rest != expected.rest:
                    raise ValueError(_other_kind(number, expected, kind))
                elif kind.shapes not in others:
                    others.append(kind.shapes)
            if not some:
                raise ValueError(_no_batch(number, expected and expected.shapes, others))
            epoch += 1

    first, again = _copied(next(forever(0))), next(forever(0))
    kind = _Kind.of(first)  # of all seeds
    same = functools.partial(np.array_equal, equal_nan=True)
    if _Kind.of(again) != kind or not jax.tree.all(jax.tree.map(same, first, again)):
        raise ValueError(
            "train(0) yields another first batch when it is called again, expected the same ones "
            "for the same integer: draw from a generator that is made of it"
        )
    size = settings.seeds * sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(first))
    between = settings.steps_per_checkpoint
    at_once = max(1, min(between, MAX_BYTES // max(size, 1)))
    steps = max(n for n in range(1, at_once + 1) if between % n == 0)

    def items() -> Iterator[Any]:
        streams = [forever(seed, kind) for seed in range(settings.seeds)]
        for _ in range(settings.steps // steps):
            rows = [_stacked([_copied(next(s)) for _ in range(steps)]) for s in streams]
            yield jax.device_put(_stacked(rows))

    return Source(
        data=(),
        batch=lambda data, item: item,
        items=items,
        first=next(items()),
        steps=steps,
        probe=jax.tree.map(jnp.asarray, first),
    )


def _no_batch(number: int, expected: Any, others: list[Any]) -> str:
    if not others:
        return (
            f"train({number}) yields no batch: it must return the batches of an epoch anew each "
            "time it is called"
        )
    came = " or ".join(map(str, others[:MAX_SHAPES])) + ", ..." * (len(others) > MAX_SHAPES)
    return (
        f"train({number}) yields batches with arrays of the shapes {came}, but none of {expected}, "
        "those of the first batch of train(0), to which all must conform: yield batches of one "
        "size, or at least one of it in an epoch"
    )


class _Kind(NamedTuple):
    """What batches that are stacked have in common."""

    shapes: list[tuple[int, ...]]
    rest: tuple[Any, list[str]]  # the structure and the types

    @classmethod
    def of(cls, batch: Any) -> "_Kind":
        leaves, treedef = jax.tree.flatten(batch)
        types = [str(jnp.result_type(leaf)) for leaf in leaves]
        return cls([np.shape(leaf) for leaf in leaves], (treedef, types))


def _other_kind(number: int, expected: _Kind, kind: _Kind) -> str:
    (tree, types), (other_tree, other_types) = expected.rest, kind.rest
    what = "structure" if tree != other_tree else "types"
    said = (tree, other_tree) if tree != other_tree else (types, other_types)
    old, new = (str(part).replace("PyTreeDef", "") for part in said)
    return (
        f"train({number}) yields a batch of the {what} {new}, expected {old}, of the first batch "
        "of train(0): yield batches of one kind"
    )


def _copied(batch: Any) -> Any:
    """A batch of its own: a data loader may fill the same arrays anew."""
    return jax.tree.map(np.array, batch)


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def halves(batch: Any) -> list[Any]:
    """A batch as two, for strategies that need several: of each array every other example."""

    def half(array: Any, i: int) -> Any:
        return array[i::2] if jnp.ndim(array) else array

    return [jax.tree.map(lambda array, i=i: half(array, i), batch) for i in range(2)]


def why_not_halved(problem: Problem, source: Source) -> str:
    """Why the halves of a batch are no batches, "" if they are."""
    if problem.jac.get("in_axes") is not None:
        return "its examples are the tasks of in_axes"
    item = jax.tree.map(lambda array: array[0, 0], source.first)
    arrays = jax.tree.leaves(jax.eval_shape(source.batch, source.data, item))
    sizes = {array.shape[0] for array in arrays if array.ndim}
    if min(sizes, default=1) < 2:
        return "it has an array of one example, or none"
    # A draw may have points of several kinds, and each kind is halved.
    if len(sizes) > 1 and not isinstance(problem.train, Draw):
        return f"its arrays have first axes of {sorted(sizes)}, so that not all are examples"
    return ""


def num_examples(split: Any) -> int | None:
    """How many examples a split has, where it is arrays of one length."""
    leaves = jax.tree.leaves(split)
    sizes = {math.prod(np.shape(leaf)[:1]) for leaf in leaves if hasattr(leaf, "shape")}
    return sizes.pop() if len(sizes) == 1 and all(map(np.ndim, leaves)) else None
