"""The benchmarks of accuracy at a tiny size, and the adapter to the peer's own tests."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accuracy, helmholtz, peer_suite, tables, timing


@pytest.mark.parametrize("condition", [1, 30, 1e4])
def test_jacobians_have_their_condition(condition):
    rows = accuracy.jacobian(condition, num_tasks=4, columns=9, seed=0)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.cond(rows / norms), condition, rtol=1e-6)
    assert norms.max() > 2 * norms.min()


def test_accuracy_tells_the_rows_from_their_gramian(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    names = ["conflict_free", "conflict_free, by the Gramian"]
    options = ["--draws", "2", "--columns", "6", "--tasks", "3", "--no-peers"]
    accuracy.main(["--aggregators", *names, "--conditions", "1", "300", *options])
    results = json.loads((tmp_path / "accuracy.json").read_text())
    at = {(r["aggregator"], r["dtype"]): r["errors"] for r in results["rows"]}
    assert at[names[0], "float32"][1] < 1e-4 < at[names[1], "float32"][1]
    for errors in at.values():
        assert errors[0] < 1e-5
    text = "\n".join(map(tables.markdown, accuracy.tables_of(results)))
    assert "| conflict_free, by the Gramian |" in text
    assert "TorchJD" not in text


def test_helmholtz_draws_its_points_inside_and_on_the_sides():
    points = helmholtz.draw(jax.random.key(0))
    assert points["pde"].shape == (128, 2)
    sides = np.asarray(points["bc"]).reshape(4, 128, 2)
    for side, axis, value in zip(sides, (1, 0, 1, 0), (-1, 1, 1, -1), strict=True):
        np.testing.assert_array_equal(side[:, axis], value)
    assert np.abs(points["pde"]).max() < 1
    params = jax.tree.map(jnp.zeros_like, helmholtz.start(jax.random.key(1)))
    np.testing.assert_allclose(helmholtz.relative_error(params), 1.0)  # of u = 0
    losses = jax.jit(helmholtz.task_losses)(params, points)
    np.testing.assert_allclose(losses["bc"], 0, atol=1e-9)
    source = (1 - 17 * np.pi**2) * helmholtz.solution(points["pde"])
    np.testing.assert_allclose(losses["pde"], np.mean(source**2), rtol=1e-5)


def test_the_adapter_answers_for_the_peer():
    """Its constructor's arguments reach ours; columns of zeros change nothing."""
    matrix = np.random.default_rng(0).standard_normal((3, 5))
    preference = np.array([1.0, 2.0, 3.0])
    got = peer_suite.ours("ConFIG", matrix, pref_vector=preference)
    v = np.linalg.pinv(matrix / np.linalg.norm(matrix, axis=1, keepdims=True)) @ preference
    np.testing.assert_allclose(got, (matrix @ v).sum() / (v @ v) * v, rtol=1e-9)


def test_the_adapter_keeps_the_peers_constructor():
    class Tensor(np.ndarray):
        detach = cpu = lambda self: self
        numpy = lambda self: np.asarray(self)  # noqa: E731
        device = None

    class CAGrad:  # as TorchJD's
        def __init__(self, c: float, norm_eps: float = 1e-4):
            if c < 0:
                raise ValueError("c")

    torch = types.SimpleNamespace(
        is_tensor=lambda x: isinstance(x, Tensor),
        randint=lambda high, shape: 5,
        tensor=lambda x, dtype, device: np.asarray(x, dtype),
    )
    peer_suite.adapt(CAGrad, torch)
    with pytest.raises(ValueError, match="c"):
        CAGrad(-1.0)
    matrix = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], np.float32).view(Tensor)
    update = CAGrad(c=0.5).forward(matrix)
    np.testing.assert_allclose(update, [0.1835, 1.2041, 1.2041], rtol=1e-3)


def test_the_peers_tests_are_looked_for(tmp_path):
    with pytest.raises(SystemExit, match="has no tests of an aggregator"):
        peer_suite.main([str(tmp_path)])
