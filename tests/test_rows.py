"""Inner products of rows: large leaves, several leaves, and rows at the limits of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_optax.jacobian._rows import _BLOCK, scaled_products


@jax.jit
def products(leaves):
    return scaled_products(leaves, leaves, len(leaves[0]), jnp.float32)


def expected(leaves):
    rows = np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in leaves], axis=1)
    rows = rows.astype(np.float64)
    return rows @ rows.T, np.linalg.norm(rows, axis=1)


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 33])  # pairs, blocks, halves of blocks
@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-30])
def test_large_leaves(num_tasks, scale):
    rng = np.random.default_rng(num_tasks)
    shapes = [(2 * _BLOCK + 5,), (3, _BLOCK), (7,)]
    leaves = [rng.standard_normal((num_tasks, *s)).astype(np.float32) for s in shapes]
    leaves = [np.float32(scale) * leaf for leaf in leaves]
    M, s, t = (np.asarray(x, np.float64) for x in products(leaves))
    gramian, norms = expected(leaves)
    np.testing.assert_allclose(
        s[:, None] * M * t / np.outer(norms, norms), gramian / np.outer(norms, norms), atol=5e-6
    )
    np.testing.assert_array_equal(np.frexp(s)[0], 0.5)  # powers of two


def test_unequal_zero_and_nan_rows():
    rng = np.random.default_rng(0)
    leaf = rng.standard_normal((4, 2 * _BLOCK)).astype(np.float32)
    leaf *= np.array([1e20, 1e-25, 0, 1], np.float32)[:, None]
    M, s, _ = (np.asarray(x, np.float64) for x in products([leaf]))
    gramian, norms = expected([leaf])
    lengths = np.outer(norms, norms)
    lengths[lengths == 0] = 1
    np.testing.assert_allclose(s[:, None] * M * s / lengths, gramian / lengths, atol=5e-6)
    assert s[2] == 0

    leaf[1, 3] = np.nan
    nan = np.isnan(np.asarray(products([leaf])[0]))
    others = [0, 2, 3]
    assert nan[1].all()
    assert not nan[np.ix_(others, others)].any()
