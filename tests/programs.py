"""Random small multi-task programs, each held against `jax.jacrev` in every way of the library.

A program is drawn from an integer seed: parameters in some pytree, a trunk of building blocks, and
K losses that read it here or there. `BLOCKS`, `TASKS` and `FORMS` are what it is drawn from.

    python -m tests.programs 2000
    python -m tests.programs 1 --seed 17 --verbose
    python -m tests.programs 3000 --cover
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import mtl_optax as mtl
from mtl_optax.jacobian.ways import ghost
from tests import xla_flags

TOLERANCE = 1e-9
# Entries of rows below this are taken for zero: what is left of a sum that cancels.
FLOOR = 1e-4
BATCH = 3
MOST_LEAVES = 8

Env = Mapping[int, jax.Array]  # what a handle stands for: a parameter or an argument
Layer = Callable[[Env, jax.Array], jax.Array]  # (BATCH, n) to (BATCH, m), both even
Task = Callable[[Env], Any]
# The handle of the input's features; those after d blocks have FEATURES - d.
FEATURES = -1


class Maker:
    """Draws what a program is made of, and counts what was drawn."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.params: dict[int, np.ndarray] = {}
        self.args: dict[int, np.ndarray] = {}
        self.consts: dict[int, np.ndarray] = {}
        self.used: list[str] = []
        self.width = 4  # of the features so far
        self.widths = [4]  # of the features after each block of the trunk
        self._read: set[int] = set()

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def choice(self, options: Any) -> Any:
        options = list(options)
        return options[self.rng.integers(len(options))]

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return np.asarray(scale * self.rng.normal(size=shape))

    def param(self, *shape: int, scale: float = 0.6, reuse: float = 0.15) -> int:
        """The handle of a parameter: a new one, or now and then an old one of that shape."""
        same = [i for i, p in self.params.items() if p.shape == shape and p.size]
        full = len(self.params) >= MOST_LEAVES
        if same and self.chance(1.0 if full else reuse):
            self.used.append("reuse")
            return self._note(self.choice(same))
        return self._note(self.add(self.params, self.normal(*shape, scale=scale)))

    def any_param(self) -> int:
        """The handle of some parameter that there is, a new one if there is none."""
        return self._note(self.choice(self.params)) if self.params else self.param(3)

    def const(self, value: Any) -> int:
        """The handle of an array that is not trained: an argument, or closed over."""
        where = self.args if self.chance(0.5) else self.consts
        return self._note(self.add(where, np.asarray(value)))

    def features(self) -> int:
        """The handle of what the trunk gives, now and then of what it gives halfway."""
        depth = self.choice(range(len(self.widths))) if self.chance(0.2) else len(self.widths) - 1
        self.width = self.widths[depth]
        return FEATURES - depth

    @contextlib.contextmanager
    def noted(self) -> Iterator[set[int]]:
        """Yields the handles that are drawn inside."""
        outer, self._read = self._read, set()
        yield self._read
        self._read |= outer

    def block(self, names: Any) -> Layer:
        name = self.choice(names)
        self.used.append(name)
        return BLOCKS[name](self)

    def add(self, where: dict[int, np.ndarray], value: np.ndarray) -> int:
        handle = len(self.params) + len(self.args) + len(self.consts)
        where[handle] = value
        return handle

    def _note(self, handle: int) -> int:
        self._read.add(handle)
        return handle


# Building blocks: from a `Maker` to a layer.


def dense(make: Maker) -> Layer:
    width = make.choice([4, 6])
    w = make.param(make.width, width)
    make.width = width
    return lambda env, h: jnp.tanh(h @ env[w])


def dense_transposed(make: Maker) -> Layer:
    width = make.choice([4, 6])
    w = make.param(width, make.width)
    make.width = width
    return lambda env, h: jnp.sin(h @ env[w].T)


def dense_of_experts(make: Maker) -> Layer:
    half = make.width // 2
    w = make.param(2, half, half)

    def layer(env, h):
        y = jnp.einsum("bei,eio->ebo", h.reshape(BATCH, 2, half), env[w])
        return jnp.tanh(y.transpose(1, 0, 2).reshape(BATCH, -1)) + h

    return layer


def dense_reshaped(make: Maker) -> Layer:
    n = make.width
    w = make.param(n * n)
    return lambda env, h: jnp.tanh(h @ env[w].reshape(n, n)) + h


def dense_twice(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: jnp.tanh(h @ env[w]) @ env[w]


def dense_mixed(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: jnp.tanh(h @ env[w] + 0.1 * jnp.sum(env[w] ** 2))


def low_rank(make: Maker) -> Layer:
    a, b = make.param(make.width, 2), make.param(2, make.width)
    return lambda env, h: h + jnp.tanh(h @ (env[a] @ env[b]))


def weight_normalised(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: h @ (env[w] / jnp.sqrt(1 + jnp.sum(env[w] ** 2, 0, keepdims=True)))


def bias(make: Maker) -> Layer:
    b = make.param(make.width)
    return lambda env, h: jnp.tanh(h + env[b][None])


def gain(make: Maker) -> Layer:
    g = make.param()
    return lambda env, h: h * (1 + env[g])


def elementwise(make: Maker) -> Layer:
    fn = make.choice([jnp.tanh, jnp.sin, jax.nn.softplus, jax.nn.swish, jax.nn.gelu, jnp.arctan])
    return lambda env, h: fn(h)


def normalisation(make: Maker) -> Layer:
    g, b = make.param(make.width), make.param(make.width)
    axis = make.choice([0, 1])

    def layer(env, h):
        centred = h - jnp.mean(h, axis, keepdims=True)
        unit = centred / jnp.sqrt(jnp.mean(centred**2, axis, keepdims=True) + 0.1)
        return unit * (1 + env[g])[None] + env[b][None]

    return layer


def conv_1d(make: Maker) -> Layer:
    w = make.param(3, 2, 2)
    dilation = make.choice([1, 2])

    def layer(env, h):
        x = h.reshape(BATCH, -1, 2)
        numbers = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(
            x, env[w], (1,), "SAME", rhs_dilation=(dilation,), dimension_numbers=numbers
        )
        return jnp.tanh(y).reshape(BATCH, -1)

    return layer


def conv_2d(make: Maker) -> Layer:
    w = make.param(3, 3, 2, 2)

    def layer(env, h):
        x = jnp.stack([h, jnp.sin(h)], axis=-1).reshape(BATCH, 2, -1, 2)
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, env[w], (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.tanh(y[..., 0] + y[..., 1] ** 2).reshape(BATCH, -1)

    return layer


def conv_depthwise(make: Maker) -> Layer:
    w = make.param(3, 1, 2)

    def layer(env, h):
        x = h.reshape(BATCH, -1, 2)
        numbers = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(
            x, env[w], (1,), "SAME", dimension_numbers=numbers, feature_group_count=2
        )
        return jnp.tanh(y).reshape(BATCH, -1)

    return layer


def scan_layers(make: Maker) -> Layer:
    n, reverse = make.width, make.chance(0.3)
    w, b = make.param(2, n, n), make.param(2, n)

    def layer(env, h):
        step = lambda z, layer: (jnp.tanh(z @ layer[0] + layer[1][None]), jnp.sum(z, 0))  # noqa: E731
        h, sums = jax.lax.scan(step, h, (env[w], env[b]), reverse=reverse)
        return h + 0.1 * jnp.sum(sums, 0)[None]

    return layer


def scan_recurrent(make: Maker) -> Layer:
    w, v, start = make.param(2, 2), make.param(2, 2), make.param(2)

    def layer(env, h):
        def step(state, x):
            state = jnp.tanh(state @ env[w] + x @ env[v])
            return state, state

        state = jnp.broadcast_to(env[start][None], (BATCH, 2))
        _, states = jax.lax.scan(step, state, h.reshape(BATCH, -1, 2).transpose(1, 0, 2))
        return states.transpose(1, 0, 2).reshape(BATCH, -1)

    return layer


def loop(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: jax.lax.fori_loop(0, 3, lambda i, z: jnp.tanh(z @ env[w]) + 0.1 * i, h)


def loop_over_stack(make: Maker) -> Layer:
    w = make.param(2, make.width, make.width)
    return lambda env, h: jax.lax.fori_loop(0, 2, lambda i, z: z + jnp.tanh(z @ env[w][i]), h)


def cond(make: Maker) -> Layer:
    w, v = make.param(make.width, make.width), make.param(make.width)
    return lambda env, h: jax.lax.cond(
        jnp.sum(h) > 0, lambda z: jnp.tanh(z @ env[w]), lambda z: jnp.sin(z * env[v][None]), h
    )


def switch(make: Maker) -> Layer:
    w, v = make.param(make.width, make.width), make.param()
    branches = lambda env: [  # noqa: E731
        lambda z: jnp.tanh(z @ env[w]),
        lambda z: z * env[v],
        lambda z: jnp.cos(z) @ env[w] + env[v],
    ]

    def layer(env, h):
        index = (jnp.sum(h) > 0).astype(int) + (jnp.sum(h) > 1).astype(int)
        return jax.lax.switch(index, branches(env), h)

    return layer


def inside_checkpoint(make: Maker) -> Layer:
    inner, handles = _inner(make)
    return lambda env, h: jax.checkpoint(inner)({i: env[i] for i in handles}, h)


def inside_jit(make: Maker) -> Layer:
    inner, handles = _inner(make)
    return lambda env, h: jax.jit(inner)({i: env[i] for i in handles}, h)


def inside_vmap(make: Maker) -> Layer:
    inner, _ = _inner(make)

    def layer(env, h):
        several = jax.vmap(lambda z: inner(env, z))(jnp.stack([h, jnp.cos(h)]))
        return several[0] + 0.5 * several[1]

    return layer


def inside_scan(make: Maker) -> Layer:
    width = make.width
    inner, _ = _inner(make)
    back = make.param(make.width, width)
    make.width = width

    def layer(env, h):
        step = lambda z, _: (jnp.tanh(inner(env, z) @ env[back]), None)  # noqa: E731
        return jax.lax.scan(step, h, None, length=2)[0]

    return layer


def vmap_over_layers(make: Maker) -> Layer:
    w = make.param(2, make.width, make.width)

    def layer(env, h):
        return jnp.prod(jax.vmap(lambda one: jnp.tanh(h @ one) + 1)(env[w]), axis=0)

    return layer


def view(make: Maker) -> Layer:
    w = make.param(2, make.width, make.width)
    return lambda env, h: jnp.tanh(h @ env[w][0]) @ env[w][1]


def sliced(make: Maker) -> Layer:
    n = make.width
    w = make.param(n + 1, n + 2)
    return lambda env, h: jnp.tanh(h @ env[w][1:, 1:-1]) + h @ env[w][:n, ::-1][:, :n]


def sliced_by_argument(make: Maker) -> Layer:
    w, start = make.param(4, make.width), make.const(make.choice([0, 2, 5, -1]))
    return lambda env, h: h + jax.lax.dynamic_slice_in_dim(env[w], env[start], BATCH, 0)


def stopped_weight(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: jnp.tanh(h @ jax.lax.stop_gradient(env[w]))


def stopped_part(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: h + jax.lax.stop_gradient(jnp.tanh(h @ env[w])) * jnp.sin(h)


@jax.custom_jvp
def _rounded(x):
    return jnp.round(2 * x) / 2


_rounded.defjvp(lambda primals, tangents: (_rounded(*primals), tangents[0] * 0.7))


def custom_jvp(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: _rounded(h @ env[w]) + h


@jax.custom_vjp
def _reversed(x):
    return jnp.tanh(x)


# The gradient is not that of the function, as a reversal layer's is not.
_reversed.defvjp(lambda x: (jnp.tanh(x), jnp.cos(x)), lambda cos, g: (-0.5 * g * cos,))


def custom_vjp(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: _reversed(h @ env[w]) + h


@jax.custom_vjp
def _fused_dense(x, w):
    return jnp.tanh(x @ w)


def _fused_forward(x, w):
    y = jnp.tanh(x @ w)
    return y, (x, w, y)


def _fused_backward(residuals, g):
    x, w, y = residuals
    g = g * (1 - y**2)
    return g @ w.T, x.T @ g


_fused_dense.defvjp(_fused_forward, _fused_backward)


def custom_vjp_dense(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: _fused_dense(h, env[w])


def fourier(make: Maker) -> Layer:
    width = make.choice([4, 6])
    w = make.param(make.width, width)
    make.width = width
    read = make.choice([jnp.abs, lambda y: jnp.tanh(y.real) + y.imag**2])
    return lambda env, h: read(jnp.fft.fft(h, axis=1) @ env[w] + (3 + 1j))


def fourier_layer(make: Maker) -> Layer:
    modes = make.width // 2 + 1
    re, im = make.param(modes), make.param(modes)

    def layer(env, h):
        y = jnp.fft.rfft(h, axis=1) * jax.lax.complex(env[re], env[im])[None]
        return h + jnp.fft.irfft(y, h.shape[1], axis=1)

    return layer


def complex_weight(make: Maker) -> Layer:
    re, im = make.param(make.width, make.width), make.param(make.width, make.width)

    def layer(env, h):
        y = (h * (1 + 0.5j)) @ (env[re] + 1j * env[im])
        return jnp.tanh(y.real) + y.imag * jnp.cos(y.real)

    return layer


def _indices(make: Maker, size: int, *shape: int) -> int:
    """Indices into an axis, some of them negative and, half the time, out of range."""
    low, high = make.choice([(0, size), (-size, size), (0, size + 4), (-size - 3, size + 3)])
    return make.const(make.rng.integers(low, high, size=shape).astype(np.int32))


def look_up(make: Maker) -> Layer:
    table, ids = make.param(7, make.width), _indices(make, 7, BATCH)
    return lambda env, h: jnp.tanh(h + env[table][env[ids]])


def look_up_clipped(make: Maker) -> Layer:
    table, ids = make.param(7, make.width), _indices(make, 7, BATCH)
    return lambda env, h: jnp.tanh(h + env[table].at[env[ids]].get(mode="clip"))


def look_up_filled(make: Maker) -> Layer:
    table, ids = make.param(7, make.width), _indices(make, 7, BATCH)
    return lambda env, h: h + jnp.sin(env[table].at[env[ids]].get(mode="fill", fill_value=0.5))


def look_up_wrapped(make: Maker) -> Layer:
    table, ids = make.param(7, make.width), _indices(make, 7, BATCH)
    return lambda env, h: h + jnp.sin(jnp.take(env[table], env[ids], axis=0, mode="wrap"))


def look_up_twice(make: Maker) -> Layer:
    table = make.param(7, make.width)
    ids, others = _indices(make, 7, BATCH, 2), _indices(make, 7, BATCH)
    return lambda env, h: jnp.tanh(
        h + jnp.sum(env[table][env[ids]], axis=1) * env[table][env[others]]
    )


def look_up_columns(make: Maker) -> Layer:
    table, ids = make.param(BATCH, 5), _indices(make, 5, make.width)
    return lambda env, h: h * jnp.cos(env[table][:, env[ids]])


def look_up_entries(make: Maker) -> Layer:
    table = make.param(5, 4)
    ids, others = _indices(make, 5, BATCH), _indices(make, 4, BATCH)
    return lambda env, h: jnp.tanh(h + env[table][env[ids], env[others]][:, None])


def scattered(make: Maker) -> Layer:
    v, ids = make.param(2, make.width), _indices(make, BATCH, 2)
    return lambda env, h: h.at[env[ids]].add(jnp.tanh(env[v]))


def overwritten(make: Maker) -> Layer:
    v, ids = make.param(make.width), make.const(make.rng.integers(0, BATCH + 1))
    return lambda env, h: jnp.sin(h.at[env[ids]].set(env[v]))


def segment_sum(make: Maker) -> Layer:
    w, ids = make.param(make.width, make.width), _indices(make, 2, BATCH)

    def layer(env, h):
        sums = jax.ops.segment_sum(h @ env[w], env[ids], num_segments=2)
        return h + jnp.tanh(sums)[jnp.array([0, 1, 0])]

    return layer


def cumulative(make: Maker) -> Layer:
    fn = make.choice([jnp.cumsum, jnp.cumprod, jax.lax.cumlogsumexp])
    axis, b = make.choice([0, 1]), make.param(make.width)
    return lambda env, h: jnp.tanh(0.3 * fn(h + env[b][None], axis=axis))


def sort(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: jnp.tanh(jnp.sort(h @ env[w], axis=1))


def max_of_pairs(make: Maker) -> Layer:
    w = make.param(make.width, make.width)

    def layer(env, h):
        pooled = jnp.max((h @ env[w]).reshape(BATCH, -1, 2), axis=2)
        return jnp.concatenate([pooled, jnp.cos(pooled)], axis=1)

    return layer


def max_pooling(make: Maker) -> Layer:
    b = make.param(make.width)

    def layer(env, h):
        z = h * (1 + env[b])[None]
        pooled = jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "SAME")
        return h + jnp.sin(pooled)

    return layer


def attention(make: Maker) -> Layer:
    n = make.width
    w, out = make.param(n, 3, n), make.param(n, n)

    def layer(env, h):
        q, k, v = jnp.einsum("bf,fcd->cbd", h, env[w])
        return h + jax.nn.softmax(q @ k.T / 2, axis=-1) @ v @ env[out]

    return layer


def solve(make: Maker) -> Layer:
    w = make.param(make.width, make.width, scale=0.2)

    def layer(env, h):
        return jnp.tanh(jnp.linalg.solve(2 * jnp.eye(h.shape[1]) + env[w], h.T).T)

    return layer


def concatenated_leaves(make: Maker) -> Layer:
    n = make.width
    a, b, c = make.param(2, n), make.param(n - 2, n), make.param(n)

    def layer(env, h):
        w = jnp.concatenate([env[a], env[b]])
        v = jnp.concatenate([env[c], jnp.ravel(env[a])])
        return jnp.tanh(h @ w) * jnp.cos(v[1 : n + 1])[None]

    return layer


def concatenated_features(make: Maker) -> Layer:
    w = make.param(make.width, 2)
    make.width += 2
    return lambda env, h: jnp.concatenate([h, jnp.tanh(h @ env[w])], axis=1)


def masked(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    mask = make.const(make.rng.random((BATCH, make.width)) < 0.6)
    return lambda env, h: jnp.where(env[mask], h @ env[w], 0.3)


def masked_by_sign(make: Maker) -> Layer:
    w = make.param(make.width, make.width)
    return lambda env, h: jnp.where(h > 0, h @ env[w], 0.1 * h)


def masked_weight(make: Maker) -> Layer:
    w, mask = make.param(make.width, make.width), make.const(make.normal(1, make.width) > 0)
    return lambda env, h: h + jnp.tanh(h @ jnp.where(env[mask], env[w], 0))


def empty_leaf(make: Maker) -> Layer:
    if make.chance(0.5):
        empty = make.param(make.width, 0)
        return lambda env, h: h + jnp.sum(h @ env[empty], axis=1, keepdims=True)
    empty = make.param(0, make.width)
    return lambda env, h: h + h[:, :0] @ env[empty]


def _inner(make: Maker) -> tuple[Layer, list[int]]:
    """A block for inside another one, and the handles that it reads."""
    with make.noted() as handles:
        inner = make.block(name for name in BLOCKS if not name.startswith("inside"))
    return inner, sorted(handles)


BLOCKS: dict[str, Callable[[Maker], Layer]] = {
    "dense": dense,
    "dense of transposed": dense_transposed,
    "dense of experts": dense_of_experts,
    "dense of reshaped": dense_reshaped,
    "dense twice": dense_twice,
    "dense, also used otherwise": dense_mixed,
    "low rank": low_rank,
    "normalised weight": weight_normalised,
    "bias": bias,
    "gain": gain,
    "elementwise": elementwise,
    "normalisation": normalisation,
    "1-d convolution": conv_1d,
    "2-d convolution": conv_2d,
    "depthwise convolution": conv_depthwise,
    "scan over layers": scan_layers,
    "scan with a shared weight": scan_recurrent,
    "fori_loop": loop,
    "fori_loop over a stack": loop_over_stack,
    "cond": cond,
    "switch": switch,
    "inside checkpoint": inside_checkpoint,
    "inside jit": inside_jit,
    "inside vmap": inside_vmap,
    "inside scan": inside_scan,
    "vmap over layers": vmap_over_layers,
    "view": view,
    "slices": sliced,
    "slice at an argument": sliced_by_argument,
    "stop_gradient of a weight": stopped_weight,
    "stop_gradient of a part": stopped_part,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "custom_vjp, dense": custom_vjp_dense,
    "Fourier features": fourier,
    "Fourier layer": fourier_layer,
    "complex weight": complex_weight,
    "look-up": look_up,
    "look-up, clipped": look_up_clipped,
    "look-up, filled": look_up_filled,
    "look-up, wrapped": look_up_wrapped,
    "two look-ups": look_up_twice,
    "look-up of columns": look_up_columns,
    "look-up of entries": look_up_entries,
    "scatter-add": scattered,
    "scatter": overwritten,
    "segment sum": segment_sum,
    "cumulative": cumulative,
    "sort": sort,
    "maximum of pairs": max_of_pairs,
    "max pooling": max_pooling,
    "attention": attention,
    "linear solve": solve,
    "concatenated leaves": concatenated_leaves,
    "concatenated features": concatenated_features,
    "mask": masked,
    "mask by sign": masked_by_sign,
    "masked weight": masked_weight,
    "empty leaf": empty_leaf,
}


# Tasks: from a `Maker` to a scalar loss. They read the features by `env`, so that it is known.


def own_head(make: Maker) -> Task:
    h = make.features()
    w, y = make.param(make.width, reuse=0), make.const(make.normal(BATCH))
    return lambda env: jnp.mean((jnp.tanh(env[h]) @ env[w] - env[y]) ** 2)


def deep_head(make: Maker) -> Task:
    h, layer = make.features(), make.block(BLOCKS)
    w = make.param(make.width)
    return lambda env: jnp.mean(jnp.sin(layer(env, env[h]) @ env[w]))


def no_head(make: Maker) -> Task:
    h = make.features()
    shift = make.const(make.normal(1, make.width))
    return lambda env: jnp.mean(jnp.cos(env[h] + env[shift]))


def of_parameters(make: Maker) -> Task:
    leaf = make.any_param()
    return lambda env: jnp.sum(jnp.sin(env[leaf]))


def of_trunk_and_parameters(make: Maker) -> Task:
    h, leaf = make.features(), make.any_param()
    return lambda env: jnp.mean(env[h] ** 2) + 0.1 * jnp.sum(env[leaf] ** 2)


def a_parameter(make: Maker) -> Task:
    leaf = make.param()
    return lambda env: env[leaf]


def constant(make: Maker) -> Task:
    del make
    return lambda env: jnp.ones(())


TASKS: dict[str, Callable[[Maker], Task]] = {
    "own head": own_head,
    "deep head": deep_head,
    "no head": no_head,
    "of parameters": of_parameters,
    "of the trunk and parameters": of_trunk_and_parameters,
    "a parameter": a_parameter,
    "constant": constant,
}

# How K scalars are returned.
FORMS: dict[str, Callable[[list[jax.Array]], Any]] = {
    "dict": lambda losses: {f"t{i}": loss for i, loss in enumerate(losses)},
    "list": lambda losses: losses,
    "tuple": tuple,
    "nested": lambda losses: {"first": losses[0], "rest": tuple(losses[1:])},
    "stack": jnp.stack,
    "array": jnp.array,
    "concatenate": lambda losses: jnp.concatenate([jnp.reshape(loss, (1,)) for loss in losses]),
    "stack and list": lambda losses: [jnp.stack(losses[:2]), *losses[2:]],
}


def together(make: Maker, num_tasks: int) -> Task:
    """K losses that are computed as one array."""
    h = make.features()
    w = make.param(make.width, num_tasks, reuse=0)
    if make.chance(0.5):
        return lambda env: jnp.mean(jnp.tanh(env[h] @ env[w]) ** 2, axis=0)
    return lambda env: jax.vmap(lambda v: jnp.mean(jnp.sin(env[h] @ v)), 1)(env[w])


@dataclasses.dataclass(frozen=True)
class Program:
    """A multi-task program at a point."""

    losses: Callable[[Any, list[Any]], Any]  # of the parameters and the arguments
    params: Any
    args: list[np.ndarray]
    num_tasks: int
    reads: list[int]  # how many tasks read each leaf, at most
    used: set[str]  # the names of the blocks, tasks and the form


class _Noting(dict):
    """Notes which of its keys are read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.noted: set[int] = set()

    def __getitem__(self, key):
        self.noted.add(key)
        return super().__getitem__(key)


def draw(seed: int) -> Program:
    """The program of a seed."""
    make = Maker(seed)
    x = make.const(make.normal(BATCH, make.width))
    layers: list[Layer] = []
    for _ in range(make.choice([0, 1, 1, 2, 2, 2, 3, 3, 3, 4])):
        if len(make.params) < MOST_LEAVES - 3:
            layers.append(make.block(BLOCKS))
            make.widths.append(make.width)
    if not layers:
        make.used.append("no trunk")
    num_tasks = int(make.choice([1, 2, 2, 3, 3, 4]))
    as_one = make.chance(0.15)
    if as_one:
        make.used.append("together")
        tasks, form = [together(make, num_tasks)], lambda losses: losses[0]
    else:
        names = [make.choice(["own head", *TASKS]) for _ in range(num_tasks)]
        tasks = [TASKS[name](make) for name in names]
        make.used += [*names, make.choice(FORMS)]
        form = FORMS[make.used[-1]]
    if make.chance(0.3) or not make.params:
        make.used.append("unread leaf")
        make.add(make.params, make.choice([np.zeros((3, 0)), make.normal(3), make.normal()]))

    handles = _nest(make, [int(i) for i in make.rng.permutation(list(make.params))])
    order = jax.tree.leaves(handles)

    def evaluate(params: Any, args: list[Any]) -> tuple[list[Any], list[set[int]]]:
        """What the tasks give, and what each of them reads."""
        env = _Noting(zip(order, jax.tree.leaves(params), strict=True))
        env.update(zip(make.args, map(jnp.asarray, args), strict=True))
        env.update((i, jnp.asarray(value)) for i, value in make.consts.items())
        env[FEATURES] = env[x]
        below = {FEATURES: frozenset()}
        for depth, layer in enumerate(layers):
            env[FEATURES - depth - 1] = layer(env, env[FEATURES - depth])
            below[FEATURES - depth - 1] = frozenset(env.noted)
        losses, reads = [], []
        for task in tasks:
            env.noted = set()
            losses.append(task(env))
            reads.append(env.noted.union(*(below.get(i, ()) for i in env.noted)))
        return losses, reads

    params, args = jax.tree.map(make.params.__getitem__, handles), list(make.args.values())
    reads: list[set[int]] = []
    jax.eval_shape(lambda params: reads.extend(evaluate(params, args)[1]), params)
    return Program(
        losses=lambda params, args: form(evaluate(params, args)[0]),
        params=params,
        args=args,
        num_tasks=num_tasks,
        reads=[sum(i in read for read in reads) * (num_tasks if as_one else 1) for i in order],
        used=set(make.used),
    )


def _nest(make: Maker, items: list[int]) -> Any:
    """The items in some nesting of dicts, lists and tuples."""
    if len(items) == 1 and make.chance(0.7):
        return items[0]
    cuts = sorted(make.rng.integers(1, len(items) + 1, size=make.choice([1, 2])))
    parts = [items[i:j] for i, j in zip([0, *cuts], [*cuts, len(items)], strict=True)]
    children = [_nest(make, part) for part in parts if part]
    kind = make.choice([dict, list, tuple])
    if kind is dict:
        names = make.rng.permutation(list("abcdef"))
        return {str(name): child for name, child in zip(names, children, strict=False)}
    return kind(children)


# All that a program is drawn from.
NAMES = frozenset([*BLOCKS, *TASKS, *FORMS, "no trunk", "together", "reuse", "unread leaf"])


# The ways of the library, and their comparison.

UPDATES = ("pullback", "combine")
ROW_MODES = ("isolated", "batched", "sequential")
# The name of a way to the Gramian, its option, and whether every layer is tapped whatever it costs.
WAYS = {
    "rows": ("rows", False),
    "ghost": ("ghost", False),
    "ghost, all tapped": ("ghost", True),
    "columns": ("columns", False),
    "streamed": ("streamed", False),
    "streamed, all tapped": ("streamed", True),
}


@contextlib.contextmanager
def tapping(tap_all: bool) -> Iterator[None]:
    """Makes a way by ghosts tap every layer that has the form, also where that costs more.

    The one place that knows how the library chooses.
    """
    if not tap_all:
        yield
        return
    with mock.patch.object(ghost, "rows_cost", lambda *_: float("inf")):  # noqa: PT008
        yield


@dataclasses.dataclass(frozen=True)
class Options:
    """How a program is measured. Compiling takes all the time, so not all is asked of each way."""

    modes: dict[str, str]  # the row mode of each way
    updates: dict[str, tuple[str, bool]]  # pullback or combine after the Gramian; whether scaled
    rows: str  # the way whose Jacobian is also asked for scaled rows,
    fresh: str  # that is asked before its Gramian,
    kept: str  # and that is guarded
    shared: Any  # options of value_and_jac
    gramian_at: Any
    vectors: dict[str, np.ndarray]  # weights w, scales s and a mask, (K,)

    @classmethod
    def of(cls, program: Program, seed: int) -> "Options":
        make = Maker(seed + 10**6)
        k, leaves = program.num_tasks, jax.tree.leaves(program.params)

        def mask() -> Any:
            chosen = make.rng.random(len(leaves)) < 0.5
            chosen[make.rng.integers(len(leaves))] = True
            return jax.tree.unflatten(jax.tree.structure(program.params), list(map(bool, chosen)))

        others = len(WAYS) - len(ROW_MODES)
        modes = [*make.rng.permutation(ROW_MODES), *(make.choice(ROW_MODES) for _ in range(others))]
        vectors = {"w": make.normal(k), "s": make.normal(k), "mask": make.rng.random(k) < 0.6}
        return cls(
            modes=dict(zip(WAYS, map(str, modes), strict=True)),
            updates={way: (make.choice(UPDATES), make.chance(0.5)) for way in WAYS},
            rows=make.choice(WAYS),
            fresh=make.choice(WAYS),
            kept=make.choice(WAYS),
            shared=mask() if make.chance(0.15) else make.choice(["auto"] * 9 + [None]),
            gramian_at=mask() if make.chance(0.2) else None,
            vectors=vectors,
        )


def _attempt(fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except Exception as error:  # any is a finding
        return f"{type(error).__name__}: {error}".split("\n")[0]


def _measure(program: Program, options: Options, way: str, params: Any, args: Any, vectors: Any):
    """What a way answers, by what was asked; an exception's text in place of an answer."""
    w, s, mask = vectors["w"], vectors["s"], vectors["mask"]
    answers: dict[str, Any] = {}

    def ask(jac: mtl.Jacobian, what: str, name: str) -> None:
        needs_weights = what in UPDATES
        question = getattr(jac, what)
        answers[name] = _attempt(lambda: question(w) if needs_weights else question())

    gramian, tap_all = WAYS[way]
    mode, (update, is_scaled) = options.modes[way], options.updates[way]
    read = mtl.value_and_jac(
        program.losses,
        rows=mode,
        gramian=gramian,
        shared=options.shared,
        gramian_at=options.gramian_at,
    )
    with tapping(tap_all):
        _, jac = read(params, args)
        if way == options.fresh:
            ask(jac, "pullback", "pullback")
            ask(jac, "combine", "combine")
        if way == options.kept:
            kept = jac.keep(mask)
            ask(kept, "gramian", "keep, gramian")
            ask(kept, "rows", "keep, rows")
            ask(kept, update, f"keep, {update}")
        scaled = jac.scale(s)
        if list(WAYS).index(way) < len(ROW_MODES):  # each mode once
            ask(jac, "rows", f"rows {mode}")
        if way == options.rows:
            ask(scaled, "rows", "scale, rows")
            if not isinstance(rows := answers["scale, rows"], str):
                replaced = scaled.replace_rows(rows)
                ask(replaced, "gramian", "scale, gramian of rows replaced")
        ask(jac, "gramian", "gramian")
        ask(scaled, "gramian", "scale, gramian")
        if is_scaled:
            ask(scaled, update, f"scale, {update} after gramian")
        else:
            ask(jac, update, f"{update} after gramian")
    return answers, jac.shared


def _answers(program: Program, options: Options, ways: Any) -> tuple[dict, dict, Any, Any]:
    """The answers of some ways, the texts of exceptions, what is shared, and `jax.jacrev`."""
    known: dict[str, Any] = {"texts": {}, "shared": None}

    def traced(params, args, vectors):
        found = {}
        for way in ways:
            one = _attempt(lambda way=way: _measure(program, options, way, params, args, vectors))
            if isinstance(one, str):
                known["texts"][way, "value_and_jac"] = one
                continue
            answers, known["shared"] = one
            for what, answer in answers.items():
                where = known["texts"] if isinstance(answer, str) else found
                where[way, what] = answer
        return found, jax.jacrev(program.losses)(params, args)

    arrays = jax.tree.map(jnp.asarray, (program.params, program.args, options.vectors))
    found, jacobian = jax.device_get(jax.jit(traced)(*arrays))
    return found, known["texts"], known["shared"], jacobian


def check(seed: int, ways: Sequence[str] = tuple(WAYS)) -> dict[tuple[str, str], str]:
    """What disagrees, by way and by what was asked; an empty text is agreement."""
    program = draw(seed)
    options = Options.of(program, seed)
    try:
        answers, errors, shared, jacobian = _answers(program, options, ways)
    except Exception:  # some answer could be traced and not compiled
        answers, errors, shared, jacobian = {}, {}, None, None
        for way in ways:
            one = _attempt(lambda way=way: _answers(program, options, [way]))
            if isinstance(one, str):
                errors[way, "compiled"] = one
            else:
                answers, errors = answers | one[0], errors | one[1]
                _, _, shared, jacobian = one
        if jacobian is None:
            return errors
    rows, shared = _rows(jacobian, program), jax.tree.leaves(shared)
    measured = shared if options.gramian_at is None else jax.tree.leaves(options.gramian_at)
    found = dict(errors)
    if options.shared == "auto" and shared:
        found["auto", "shared"] = _compare_shared(shared, rows, program)
    for (way, what), answer in answers.items():
        found[way, what] = _compare(what, answer, rows, shared, measured, options.vectors)
    return found


def _rows(jacobian: Any, program: Program) -> list[np.ndarray]:
    """The rows (K, *shape) of each leaf from the tree that `jax.jacrev` returns."""
    params = jax.tree.leaves(program.params)
    blocks = jax.tree.leaves(jacobian)
    columns = [blocks[i :: len(params)] for i in range(len(params))]
    return [
        np.concatenate([np.reshape(b, (-1, *np.shape(p))) for b in column])
        if np.size(p)
        else np.zeros((program.num_tasks, *np.shape(p)))
        for p, column in zip(params, columns, strict=True)
    ]


def _compare_shared(shared: list[bool], rows: list[np.ndarray], program: Program) -> str:
    """A leaf with two rows that are not zero is shared; one that one loss reads is not."""
    if program.num_tasks == 1:
        return "" if all(shared) else "with one task, not all is shared"
    for i, (here, row) in enumerate(zip(shared, rows, strict=True)):
        used = sum(np.any(each != 0) for each in row)
        if used > 1 and not here:
            return f"leaf {i} has {used} rows and is not shared"
        if program.reads[i] < 2 and here:
            return f"leaf {i} is read by {program.reads[i]} tasks and is shared"
    return ""


def _compare(what, answer, rows, shared, measured, vectors) -> str:
    """Holds an answer against what the rows of `jax.jacrev` make it."""
    w, s, mask = vectors["w"], vectors["s"], vectors["mask"]
    mix = lambda w, row: np.tensordot(w, row, 1)  # noqa: E731
    way, _, asked = what.partition(", ")
    if way == "scale":
        rows = [mix(np.diag(s), row) for row in rows]
    elif way == "keep":
        rows = [mix(np.diag(mask.astype(float)), row) for row in rows]
    else:
        asked = what
    if asked.startswith("rows"):
        expected = rows
    elif asked.startswith("gramian"):
        flat = [r.reshape(len(r), -1) for r, here in zip(rows, measured, strict=True) if here]
        expected = [sum((f @ f.T for f in flat), np.zeros((len(w), len(w))))]
    elif asked.startswith("pullback"):
        expected = [mix(w, row) for row in rows]
    else:
        ones = np.ones_like(w)
        pairs = zip(rows, shared, strict=True)
        expected = [mix(w if here else ones, row) for row, here in pairs]
    got = jax.tree.leaves(answer)
    shapes = [np.shape(g) for g in got]
    if shapes != [e.shape for e in expected]:
        return f"shapes {shapes}"
    if wrong := {str(g.dtype) for g in got} - {"float64"}:
        return f"dtypes {wrong}"
    if way == "keep" and asked in ("rows", "gramian") and any(np.any(g[~mask]) for g in got):
        return "a row that was dropped is not zero"
    got, expected = (np.concatenate([np.ravel(x) for x in xs]) for xs in (got, expected))
    largest = max(np.max(np.abs(expected), initial=0), FLOOR)
    error = np.max(np.abs(got - expected), initial=0) / largest
    return "" if error <= TOLERANCE else f"relative error {error:.1e}"


@contextlib.contextmanager
def precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield


@dataclasses.dataclass
class Tally:
    """How many programs agree, for each way and what was asked of it."""

    asked: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    wrong: dict[Any, list[int]] = dataclasses.field(default_factory=dict)  # the seeds

    def add(self, seed: int, found: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
        """Counts what a program gave; returns what of it is wrong."""
        self.asked.update(found.keys())
        wrong = {at: error for at, error in found.items() if error}
        for at in wrong:
            self.wrong.setdefault(at, []).append(seed)
        return wrong

    @property
    def failing(self) -> list[int]:
        return sorted(set().union(*self.wrong.values()))

    def __str__(self) -> str:
        lines = []
        for at, asked in sorted(self.asked.items()):
            seeds = self.wrong.get(at, [])
            some = f"; not seeds {', '.join(map(str, seeds[:12]))}" if seeds else ""
            lines.append(f"{': '.join(at):45} {asked - len(seeds):5} of {asked:5}{some}")
        return "\n".join([*lines, f"failing seeds: {self.failing}"])


def cover(seeds: Iterator[int]) -> list[int]:
    """Few seeds in whose programs all of `NAMES` occur, the best one first."""
    used = {seed: draw(seed).used & NAMES for seed in seeds}
    chosen, left = [], set(NAMES)
    while left:
        best = max(used, key=lambda seed: len(used[seed] & left))
        if not used[best] & left:
            raise ValueError(f"{sorted(left)} do not occur: try more programs")
        chosen.append(best)
        left -= used[best]
    return chosen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("programs", type=int, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    parser.add_argument("--verbose", action="store_true", help="say what each failing program is")
    parser.add_argument(
        "--cover", action="store_true", help="only choose seeds in which all that there is occurs"
    )
    options = parser.parse_args(argv)
    flags = filter(xla_flags.known, xla_flags.WISHES)
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    seeds = range(options.seed, options.seed + options.programs)
    with precision():
        if options.cover:
            print(cover(iter(seeds)))
            return 0
        tally, start = Tally(), time.perf_counter()
        for done, seed in enumerate(seeds, 1):
            found = _attempt(lambda seed=seed: check(seed))
            if isinstance(found, str):
                found = {("program", "as a whole"): found}
            wrong = tally.add(seed, found)
            if wrong and options.verbose:
                print(f"seed {seed}: {'; '.join(sorted(draw(seed).used))}")
                for at, error in wrong.items():
                    print(f"  {': '.join(at)}: {error}")
            if done % 20 == 0:
                jax.clear_caches()  # one program's functions are of no use to the next
                seconds = (time.perf_counter() - start) / done
                count = len(tally.failing)
                print(f"{done} programs, {count} failing, {seconds:.2f} s each", flush=True)
    print(tally)
    return 1 if tally.failing else 0


if __name__ == "__main__":
    sys.exit(main())
