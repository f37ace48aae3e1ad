"""The models that the cost benchmarks train, on made-up batches.

A trunk is a tuple of layers such as `("dense", 512, 1024)`. Here it becomes pure functions and
pytrees of JAX; `benchmarks.peers` reads the same tuples into PyTorch.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

Layer = tuple[Any, ...]


class Workload(NamedTuple):
    """A trunk, K one-layer heads on its features, and one batch.

    Attributes:
      trunk: the layers, each a name and its sizes.
      heads: inputs and outputs of each head.
      num_tasks: K.
      params: `{"trunk": [one dict a layer], "heads": {task: dense}}`, all NumPy; heads that are
        stacked are one dense with a leading axis K.
      batch: inputs `(n, ...)` and class labels `(K, n)`, both NumPy.
      stacked: whether the heads are one vmapped layer, and the losses one `(K,)` array.
    """

    trunk: tuple[Layer, ...]
    heads: tuple[int, int]
    num_tasks: int
    params: Any
    batch: tuple[np.ndarray, np.ndarray]
    stacked: bool = False

    @property
    def num_params(self) -> int:
        """How many numbers the parameters are."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def encode(self, params: Any, batch: Any) -> jax.Array:
        """The trunk's features."""
        features, _ = batch
        for layer, weights in zip(self.trunk, params["trunk"], strict=True):
            features = _apply(layer, weights, features)
        return features

    def decode(self, params: Any, features: jax.Array, batch: Any) -> Any:
        """The losses of the heads: cross-entropies."""
        _, labels = batch

        def loss(head, label):
            logits = _dense(head, features)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label))

        heads = params["heads"]
        if self.stacked:
            return jax.vmap(loss)(heads, labels)
        return {task: loss(heads[task], labels[i]) for i, task in enumerate(heads)}

    def losses(self, params: Any, batch: Any) -> Any:
        """The K losses."""
        return self.decode(params, self.encode(params, batch), batch)

    def last_shared(self, params: Any) -> Any:
        """A mask of the trunk's last layer, for `gramian_at`."""
        last = max(i for i, weights in enumerate(params["trunk"]) if weights)
        return {"trunk": [i == last for i in range(len(params["trunk"]))], "heads": False}


def mlp(
    num_tasks: int,
    *,
    widths: tuple[int, ...] = (512, 1024, 1024, 512),
    batch: int = 256,
    classes: int = 100,
    stacked: bool = False,
) -> Workload:
    """Dense layers with ReLU."""
    pairs = itertools.pairwise(widths)
    trunk = tuple(layer for sizes in pairs for layer in (("dense", *sizes), ("relu",)))
    inputs = np.random.default_rng(0).standard_normal((batch, widths[0]), np.float32)
    return _workload(trunk, (widths[-1], classes), num_tasks, inputs, stacked)


def cnn(*, batch: int = 256) -> Workload:
    """A LeNet on 36 x 36 pixels, with two tasks: the usual model for two overlaid digits."""
    trunk = (
        ("conv", 1, 10, 5), ("relu",), ("pool",), ("conv", 10, 20, 5), ("relu",), ("pool",),
        ("flatten",), ("dense", 720, 50), ("relu",),
    )  # fmt: skip
    inputs = np.random.default_rng(0).standard_normal((batch, 36, 36, 1), np.float32)
    return _workload(trunk, (50, 10), 2, inputs)


def transformer(*, batch: int = 32, length: int = 32, width: int = 128) -> Workload:
    """Two encoder blocks over tokens, averaged, and one dense layer; three tasks."""
    trunk = (
        ("embed", 1000, length, width), ("block", width, 4), ("block", width, 4), ("average",),
        ("dense", width, width), ("relu",),
    )  # fmt: skip
    inputs = np.random.default_rng(0).integers(0, 1000, (batch, length), np.int32)
    return _workload(trunk, (width, 10), 3, inputs)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp-2": lambda: mlp(2),
    "mlp-8": lambda: mlp(8),
    "mlp-40": lambda: mlp(40),
    "cnn-2": cnn,
    "transformer-3": transformer,
    "tiny-mlp-3": lambda: mlp(3, widths=(16, 32, 16), batch=8, classes=4),
    "tiny-stacked-mlp-3": lambda: mlp(3, widths=(16, 32, 16), batch=8, classes=4, stacked=True),
    "stacked-mlp-40": lambda: mlp(40, stacked=True),
    "large-mlp-8": lambda: mlp(8, widths=(2048, 4096, 4096, 2048), batch=4096),
    "large-transformer-3": lambda: transformer(batch=64, length=256, width=1024),
}


def _workload(
    trunk: tuple[Layer, ...],
    heads: tuple[int, int],
    num_tasks: int,
    inputs: np.ndarray,
    stacked: bool = False,
) -> Workload:
    rng = np.random.default_rng(1)
    tasks = [f"task{k}" for k in range(num_tasks)]
    params = {
        "trunk": [_init(layer, rng) for layer in trunk],
        "heads": {task: _init(("dense", *heads), rng) for task in tasks},
    }
    if stacked:
        params["heads"] = jax.tree.map(lambda *h: np.stack(h), *params["heads"].values())
    labels = rng.integers(0, heads[1], (num_tasks, len(inputs)), np.int32)
    return Workload(trunk, heads, num_tasks, params, (inputs, labels), stacked)


def _init(layer: Layer, rng: np.random.Generator) -> dict[str, Any]:
    def normal(*shape: int) -> np.ndarray:
        scale = math.prod(shape[:-1]) ** -0.5
        return scale * rng.standard_normal(shape, np.float32)

    match layer:
        case ("dense", c, f):
            return {"w": normal(c, f), "b": np.zeros(f, np.float32)}
        case ("conv", c, f, size):
            return {"w": normal(size, size, c, f), "b": np.zeros(f, np.float32)}
        case ("embed", vocabulary, length, width):
            return {"tokens": normal(vocabulary, width), "positions": normal(length, width)}
        case ("block", width, _):
            dense = {"qkv": 3 * width, "out": width, "up": 4 * width}
            return {
                **{name: _init(("dense", width, f), rng) for name, f in dense.items()},
                "down": _init(("dense", 4 * width, width), rng),
                "norm1": {"scale": np.ones(width, np.float32), "b": np.zeros(width, np.float32)},
                "norm2": {"scale": np.ones(width, np.float32), "b": np.zeros(width, np.float32)},
            }
    return {}


def _apply(layer: Layer, p: Any, x: jax.Array) -> jax.Array:
    match layer:
        case ("dense", *_):
            return _dense(p, x)
        case ("relu",):
            return jax.nn.relu(x)
        case ("conv", *_):
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=numbers)
            return y + _like(p["b"], y)
        case ("pool",):
            return linen.max_pool(x, (2, 2), (2, 2))
        case ("flatten",):
            return x.reshape(len(x), -1)
        case ("average",):
            return jnp.mean(x, axis=1)
        case ("embed", *_):
            y = p["tokens"][x]
            return y + _like(p["positions"], y)
        case ("block", _, num_heads):
            x = x + _attention(p, _norm(p["norm1"], x), num_heads)
            return x + _dense(p["down"], jax.nn.relu(_dense(p["up"], _norm(p["norm2"], x))))
    raise ValueError(f"no layer is called {layer[0]!r}")


def _dense(p: Any, x: jax.Array) -> jax.Array:
    y = x @ p["w"]
    return y + _like(p["b"], y)


def _norm(p: Any, x: jax.Array) -> jax.Array:
    y = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
    return y * _like(p["scale"], y) + _like(p["b"], y)


def _attention(p: Any, x: jax.Array, num_heads: int) -> jax.Array:
    *_, width = x.shape
    split = _dense(p["qkv"], x).reshape(*x.shape[:-1], 3, num_heads, width // num_heads)
    query, key, value = (split[..., i, :, :] for i in range(3))
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) * (width // num_heads) ** -0.5
    mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), value)
    return _dense(p["out"], mixed.reshape(x.shape))


def _like(p: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.broadcast_to(p, y.shape)
