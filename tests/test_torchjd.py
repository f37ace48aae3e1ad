"""Training by our links and by TorchJD's aggregators is the same training.

Needs the extra "bench". The network, its start, the order of the data and the optimizer are the
same in both, in float64, so that what differs is the strategy alone.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl

torch = pytest.importorskip("torch", reason="TorchJD comes with the extra bench")
aggregation = pytest.importorskip("torchjd.aggregation", reason="comes with the extra bench")
autojac = importlib.import_module("torchjd.autojac")
linalg = importlib.import_module("torchjd.linalg")

TASKS = ("a", "b", "c")
STEPS, BATCH, RATE = 60, 16, 0.05
# TorchJD rounds small norms up and adds a ridge, both 1e-4 of a Gramian of trace 1: turned down, or
# what is projected is another cone.
PROJECTOR = {"norm_eps": 1e-12, "reg_eps": 1e-12}

# Ours, theirs, and how far the losses may be apart, relative.
PAIRS = {
    "mean": (mtl.mean_tasks, aggregation.Mean, 1e-6),
    "sum": (mtl.sum_tasks, aggregation.Sum, 1e-6),
    "upgrad": (
        lambda: mtl.upgrad(3),
        lambda: aggregation.UPGrad(projector=linalg.QuadprogProjector(**PROJECTOR)),
        1e-6,
    ),
    "dualproj": (
        lambda: mtl.dualproj(3),
        lambda: aggregation.DualProj(projector=linalg.QuadprogProjector(**PROJECTOR)),
        1e-6,
    ),
    "imtl_g": (lambda: mtl.imtl_g(3), aggregation.IMTLG, 1e-6),
    "aligned_mtl": (lambda: mtl.aligned_mtl(3), aggregation.AlignedMTL, 1e-6),
    "conflict_free": (lambda: mtl.conflict_free(3), aggregation.ConFIG, 1e-6),
    # Frank-Wolfe and a conic solver stop early. By default the former does so after 100 iterations,
    # which lets losses drift apart by 2 %.
    "mgda": (
        lambda: mtl.mgda(3),
        lambda: aggregation.MGDA(epsilon=1e-6, max_iters=10_000),
        1e-3,
    ),
    "cagrad": (lambda: mtl.cagrad(3, c=0.5), lambda: aggregation.CAGrad(c=0.5), 1e-3),
}


@pytest.fixture(scope="module")
def problem():
    """Start and data: three regressions on one trunk, the second against the first."""
    rng = np.random.default_rng(0)
    widths = {"in": (6, 12), "hidden": (12, 8), **dict.fromkeys(TASKS, (8, 2))}
    params = {
        layer: {"w": rng.standard_normal(shape) / shape[0] ** 0.5, "b": np.zeros(shape[1])}
        for layer, shape in widths.items()
    }
    x = rng.standard_normal((STEPS, BATCH, 6))
    target = np.tanh(x[..., :2])
    noise = 0.3 * rng.standard_normal((len(TASKS), STEPS, BATCH, 2))
    y = {"a": target, "b": -3 * target, "c": np.sin(x[..., 2:4])}
    return params, x, {task: y[task] + noise[i] for i, task in enumerate(TASKS)}


def ours(problem, strategy):
    """The losses of each step, and the lowest cosine between two tasks."""
    tx = optax.chain(strategy, optax.sgd(RATE))

    def dense(layer, x):
        y = x @ layer["w"]
        return y + jnp.broadcast_to(layer["b"], y.shape)

    def task_losses(params, x, y):
        h = jnp.tanh(dense(params["hidden"], jnp.tanh(dense(params["in"], x))))
        return {task: jnp.mean((dense(params[task], h) - y[task]) ** 2) for task in TASKS}

    def step(carry, batch):
        params, opt_state = carry
        _, jac = mtl.value_and_jac(task_losses)(params, *batch)
        updates, opt_state = tx.update(jac, opt_state, params)
        cosines, _ = jac.correlation()
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (jac.loss_vector(), jnp.min(cosines))

    @jax.jit
    def train(params, x, y):
        return jax.lax.scan(step, (params, tx.init(params)), (x, y))[1]

    with jax.enable_x64(True):
        losses, cosines = train(*jax.tree.map(jnp.asarray, problem))
    return np.asarray(losses), float(cosines.min())


def theirs(problem, aggregator):
    """The losses of each step."""
    params, xs, ys = problem

    def linear(layer):
        module = torch.nn.Linear(*layer["w"].shape, dtype=torch.float64)
        with torch.no_grad():
            module.weight.copy_(torch.tensor(layer["w"].T))
            module.bias.copy_(torch.tensor(layer["b"]))
        return module

    tanh = torch.nn.Tanh
    trunk = torch.nn.Sequential(linear(params["in"]), tanh(), linear(params["hidden"]), tanh())
    heads = torch.nn.ModuleDict({task: linear(params[task]) for task in TASKS})
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=RATE)
    history = []
    for i, x in enumerate(xs):
        features = trunk(torch.tensor(x))
        losses = [torch.mean((heads[t](features) - torch.tensor(ys[t][i])) ** 2) for t in TASKS]
        history.append([float(loss) for loss in losses])
        optimizer.zero_grad()
        autojac.mtl_backward(losses, features=features)
        autojac.jac_to_grad(trunk.parameters(), aggregator)
        optimizer.step()
    return np.asarray(history)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings("ignore")  # of PyTorch and its solvers
def test_same_trajectory(problem, name):
    strategy, aggregator, tolerance = PAIRS[name]
    losses, lowest_cosine = ours(problem, strategy())
    assert lowest_cosine < -0.1  # there is something to disagree about
    assert np.all(losses[-10:].mean(axis=0) < losses[:5].mean(axis=0))
    np.testing.assert_allclose(losses, theirs(problem, aggregator()), rtol=tolerance)
