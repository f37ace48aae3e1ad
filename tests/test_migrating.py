"""Each row of LibMTL's table in docs/migrating.md by number: five steps of its default beside ours.

The peer's rules are written anew in NumPy, float64, from its formulas and defaults; what a row's
note says is different is what `TURNED` does to the update that LibMTL would give.
"""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import mtl_optax as mtl

K, WIDTH, STEPS, RATE = 3, 5, 5, 0.05
_rng = np.random.default_rng(2)
CURVATURE = _rng.uniform(0.5, 3.0, size=(K, WIDTH)) * np.array([[1.0], [4.0], [0.5]])
CENTRE = _rng.normal(size=(K, WIDTH))
START = _rng.normal(size=WIDTH)

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "migrating.md").read_text("utf-8")
_TABLE = PAGE.split("## LibMTL's weightings")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\| `(\w+)` \| `(mtl\.[^`]*)` \|", _TABLE, re.MULTILINE))


def quadratics(w, xp, num_tasks):
    """Losses above 1/2, and their rows."""
    apart = w[None, :] - CENTRE[:num_tasks]
    curvature = xp.asarray(CURVATURE[:num_tasks])
    return 0.5 * (curvature * apart**2).sum(1) + 0.5, curvature * apart


def lines(w, xp, num_tasks):
    """The same losses with rows that stay, for steps in the units of the rows."""
    losses, _ = quadratics(w, xp, num_tasks)
    rows = CURVATURE[:num_tasks] * (START[None, :] - CENTRE[:num_tasks])
    # One row much shorter than the others, and longer along them: a vertex is the least.
    return losses, xp.asarray(rows * np.array([[1.0], [1.0], [0.05]])[:num_tasks])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def project(y):
    """Onto the simplex."""
    u = np.sort(y)[::-1]
    theta = (np.cumsum(u) - 1) / np.arange(1, len(u) + 1)
    return np.maximum(y - theta[np.nonzero(u > theta)[0][-1]], 0)


# Rules: from the rows, the losses, what is remembered and t = 1, 2, ... to the update.


def sum_rule(J, L, memory, t):
    return J.sum(0)


def uw(J, L, memory, t):
    s = memory.setdefault("s", np.full(K, -0.5))
    memory["s"] = s - RATE * (0.5 - 0.5 * np.exp(-s) * L)
    return 0.5 * np.exp(-s) @ J


def gradnorm(J, L, memory, t):
    """On logits, as LibMTL has it: to first order in their rate the paper's weights."""
    logits, first = memory.setdefault("logits", np.ones(K)), memory.setdefault("first", L)
    w = K * softmax(logits)
    norms = np.linalg.norm(J, axis=1)
    rate = (L / first) / np.mean(L / first)
    slope = np.sign(w * norms - np.mean(w * norms) * rate**1.5) * norms
    memory["logits"] = logits - 1e-3 * w * (slope - w @ slope / K)
    return w @ J


def dwa(J, L, memory, t):
    seen = memory.setdefault("seen", [])
    w = K * softmax(seen[-1] / seen[-2] / 2.0) if t > 2 else np.ones(K)
    seen.append(L)
    return w @ J


def gls(J, L, memory, t):
    return L.prod() ** (1 / K) / (K * L) @ J


def mgda(J, L, memory, t):
    best = None
    for size in range(1, K + 1):
        for face in map(list, itertools.combinations(range(K), size)):
            G = J[face] @ J[face].T
            w = np.linalg.solve(G, np.ones(size))
            w /= w.sum()
            d = w @ J[face]
            if (w >= 0).all() and (best is None or d @ d < best @ best):
                best = d
    return best


def imtl(J, L, memory, t):
    s = memory.setdefault("s", np.zeros(K))
    memory["s"] = s - RATE * (np.exp(s) * L - 1)
    J = np.exp(s)[:, None] * J
    U = J / np.linalg.norm(J, axis=1, keepdims=True)
    D, V = J[:1] - J[1:], U[:1] - U[1:]
    alpha = J[0] @ V.T @ np.linalg.inv(D @ V.T)
    return np.append(1 - alpha.sum(), alpha) @ J


def pcgrad(J, L, memory, t):
    d = J.copy()
    for i, j in ((0, 1), (1, 0)):
        d[i] -= min(J[i] @ J[j], 0) * J[j] / (J[j] @ J[j])
    return d.sum(0)


def gradvac(J, L, memory, t):
    rho, d = memory.setdefault("rho", np.zeros((2, 2))), J.copy()
    n = np.linalg.norm(J, axis=1)
    for i, j in ((0, 1), (1, 0)):
        c, r = J[i] @ J[j] / (n[i] * n[j]), rho[i, j]
        if c < r:
            d[i] += (
                J[j]
                * n[i]
                * (r * (1 - c**2) ** 0.5 - c * (1 - r**2) ** 0.5)
                / (n[j] * (1 - r**2) ** 0.5)
            )
        rho[i, j] = 0.5 * r + 0.5 * c
    return d.sum(0)


def cagrad(J, L, memory, t):
    G = J @ J.T
    even, c = np.full(K, 1 / K), 0.5 * np.sqrt(np.mean(G))
    solution = scipy.optimize.minimize(
        lambda w: w @ G @ even + c * np.sqrt(w @ G @ w),
        even,
        jac=lambda w: G @ even + c * G @ w / np.sqrt(w @ G @ w),
        bounds=[(0, 1)] * K,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    d = solution.x @ J
    return (J.mean(0) + c * d / np.linalg.norm(d)) / (1 + 0.5**2)


def bargain(J):
    """α > 0 with Gα = 1/α."""
    G = J @ J.T
    log_alpha = scipy.optimize.root(
        lambda x: G @ np.exp(x) - np.exp(-x), -0.5 * np.log(np.diag(G)), tol=1e-13
    )
    assert log_alpha.success
    return np.exp(log_alpha.x)


def nash(J, L, memory, t):
    norm = np.linalg.norm(J @ J.T)
    d = bargain(J / norm**0.5) @ J
    return d / max(np.linalg.norm(d), 1)


def fairgrad(J, L, memory, t):
    return bargain(J) @ J


def famo(J, L, memory, t):
    xi = memory.setdefault("xi", np.zeros(K))
    if "L" in memory:  # after the second forward pass, at the new parameters: those of now
        z = softmax(xi)
        drop = np.log(memory["L"] / L)
        g = z * (drop - z @ drop) + 1e-3 * xi
        m = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
        v = memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
        step = m / (1 - 0.9 ** (t - 1)) / (np.sqrt(v / (1 - 0.999 ** (t - 1))) + 1e-8)
        xi = memory["xi"] = xi - 0.025 * step
    memory["L"] = L
    z = softmax(xi) / L
    return z / z.sum() @ J


def aligned(J, L, memory, t):
    values, V = np.linalg.eigh(J @ J.T)
    return ((V / np.sqrt(values)) @ V.T * np.sqrt(values[0])).sum(0) @ J


def moco(J, L, memory, t):
    """With a projection, debiased and by relative steps, as the note says."""
    J = J / np.linalg.norm(J, axis=1, keepdims=True) * L[:, None]
    beta = 0.5 / t**0.5
    y = memory["y"] = memory.get("y", 0) * (1 - beta) + beta * J
    left = memory["left"] = memory.get("left", 1) * (1 - beta)
    y = y / (1 - left)
    w, G = memory.get("w", np.full(K, 1 / K)), y @ y.T
    w = memory["w"] = project(w - 0.1 / t**0.5 * G @ w / np.mean(np.diag(G)))
    return w @ y


def modo(J, L, memory, t):
    w = memory.get("w", np.full(K, 1 / K))
    w = memory["w"] = project(w - 1e-3 * (J @ J.T @ w + 0.1 * w))
    return w @ J


def sdmgrad(J, L, memory, t):
    w, velocity = memory.get("w", np.full(K, 1 / K)), 0
    G = J @ J.T
    G = G / np.mean(np.sqrt(np.diag(G))) ** 2
    for _ in range(20):
        velocity = 0.5 * velocity + G @ w + 0.3 * G.mean(1)
        w = project(w - 5 * velocity)
    memory["w"] = w
    return (w @ J + 0.3 * J.mean(0)) / 1.3


def db_mtl(J, L, memory, t):
    m = memory["m"] = J / L[:, None] + 0.9 * (memory.get("m", 0) - J / L[:, None])
    norms = np.linalg.norm(m, axis=1)
    return norms.max() / norms @ m


def excess_mtl(J, L, memory, t):
    squares = memory["squares"] = memory.get("squares", 0) + J**2
    risk = (J**2 / np.sqrt(squares + 1e-7)).sum(1)
    w = memory.get("w", np.ones(K))
    if t > 1:
        w = w * np.exp(0.01 * risk / memory["first"])
        w = w / w.sum() * K
    else:
        memory["first"] = risk
    memory["w"] = w
    return w @ J


def stch(J, L, memory, t):
    """Epochs of one step, a warm-up of one epoch and that of the nadir."""
    if t <= 2:
        memory["nadir"] = L
        return 1 / L @ J
    return K * softmax(np.log(L / memory["nadir"])) / L @ J


def upgrad(J, L, memory, t):
    G = J @ J.T
    G = G / np.trace(G) + 1e-4 * np.eye(K)
    total = np.zeros(K)
    for u in np.eye(K) / K:
        # min vᵀGv, v >= u: by the set of the coordinates that are above.
        best = None
        for free in itertools.product([False, True], repeat=K):
            free, v = np.array(free), u.copy()
            v[free] = -np.linalg.solve(G[free][:, free], G[free][:, ~free] @ u[~free])
            if (v >= u - 1e-12).all() and (best is None or v @ G @ v < best @ G @ best):
                best = v
        total += best
    return total @ J


SGD = "optimizer=optax.sgd(RATE)"
# The rule, options that the test adds to the row's, and the tolerance of the path.
RULES = {
    "EW": (sum_rule, "", 1e-5),
    "UW": (uw, SGD, 1e-5),
    "GradNorm": (gradnorm, "optimizer=optax.sgd(1e-3)", 1e-4),
    "DWA": (dwa, "", 1e-5),
    "GLS": (gls, "", 1e-5),
    "MGDA": (mgda, "", 1e-4),
    "IMTL": (imtl, SGD, 1e-4),
    "PCGrad": (pcgrad, "", 1e-5),
    "GradVac": (gradvac, "", 1e-4),
    "CAGrad": (cagrad, "", 1e-4),
    "Nash_MTL": (nash, "", 1e-4),
    "FairGrad": (fairgrad, "", 1e-4),
    "FAMO": (famo, "", 1e-4),
    "Aligned_MTL": (aligned, "", 1e-4),
    "MoCo": (moco, "", 1e-4),
    "MoDo": (modo, "", 1e-4),
    "SDMGrad": (sdmgrad, "", 1e-4),
    "DB_MTL": (db_mtl, "", 1e-4),
    "ExcessMTL": (excess_mtl, "", 1e-4),
    "STCH": (stch, "", 1e-4),
    "UPGrad": (upgrad, "", 2e-3),
}
IN_UNITS_OF_ROWS = {"MoDo", "SDMGrad"}
TWO_TASKS = {"PCGrad", "GradVac"}  # of more the order is random
# LibMTL's update is this times ours.
TURNED = {"DB_MTL": lambda t: 1 - 0.9**t, "ExcessMTL": lambda t: K}
DRAWN = {"RLW", "RGW", "GradDrop"}


def code_of(name):
    """The row's code, for steps of this test and with what it adds."""
    code, (_, more, _) = ROWS[name], RULES.get(name, (None, "", None))
    code = code.replace("warmup=500, window=100", "warmup=2, window=1")
    if name == "MoDo":  # the step and the pull are relative to the mean squared norm
        code = code.replace("gamma=0.001, rho=0.1", "gamma=0.001 * SIZE, rho=0.1 / SIZE")
    return f"{code[:-1]}, {more})" if more else code


def path_of_ours(name, problem, num_tasks):
    size = np.mean(np.sum(problem(START, np, num_tasks)[1] ** 2, axis=1))
    names = {"mtl": mtl, "optax": optax, "RATE": RATE, "SIZE": size, "K": num_tasks}
    tx = eval(code_of(name), names | {"key": jax.random.key(1)})
    if name == "MoCo":
        tx = optax.chain(mtl.link(optax.init_empty_state, _rows_of_the_losses), tx)

    def step(carry, t):
        w, state = carry
        losses, rows = problem(w, jnp, num_tasks)
        jac = mtl.as_jacobian(rows, losses)
        update, state = tx.update((jac,) * 3 if name in IN_UNITS_OF_ROWS else jac, state, w)
        if name in TURNED:
            update = update * TURNED[name](t)
        w = w - RATE * update
        return (w, state), (w, update, state)

    start = jnp.asarray(START, jnp.float32)
    times = jnp.arange(1.0, STEPS + 1)
    return jax.jit(lambda c: jax.lax.scan(step, c, times)[1])((start, tx.init(start)))


def _rows_of_the_losses(jacobian, state, **extra_args):
    return jacobian.scale(jacobian.loss_vector() / jacobian.norms(), losses=jacobian.losses), state


# They learn from a second batch: test_bilevel.py has their rules.
BILEVEL = {"AutoLambda", "FORUM", "MOML"}


def test_every_row_has_a_rule():
    assert set(ROWS) == set(RULES) | DRAWN | BILEVEL
    assert len(ROWS) == 27


@pytest.mark.parametrize("name", RULES)
def test_five_steps_are_those_of_libmtl(name):
    rule, _, tolerance = RULES[name]
    problem = lines if name in IN_UNITS_OF_ROWS else quadratics
    num_tasks = 2 if name in TWO_TASKS else K
    got, updates, _ = path_of_ours(name, problem, num_tasks)
    w, memory = START.copy(), {}
    for t in range(1, STEPS + 1):
        losses, rows = problem(w, np, num_tasks)
        update = rule(rows, losses, memory, t)
        w = w - RATE * update
        np.testing.assert_allclose(
            updates[t - 1], update, atol=tolerance * np.abs(update).max(), err_msg=f"step {t}"
        )
    np.testing.assert_allclose(got[-1], w, atol=tolerance * np.abs(w - START).max())


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_draws_weigh_as_libmtl_does(name):
    """Its weights times K of a softmax; or, of GradDrop's entries, those of one sign."""
    path, updates, state = path_of_ours(name, quadratics, K)
    state = state[0] if name == "RLW" else state  # a balancer and a sum
    w = START
    for t in range(STEPS):
        _, rows = quadratics(np.asarray(w, float), np, K)
        if name == "GradDrop":
            either = np.maximum(rows, 0).sum(0), np.minimum(rows, 0).sum(0)
            gaps = np.minimum(*(np.abs(updates[t] - x) for x in either))
            np.testing.assert_allclose(gaps, 0, atol=1e-4)
        else:
            weights = np.asarray(state.weights[t], float)
            np.testing.assert_allclose(weights.sum(), K, rtol=1e-5)
            np.testing.assert_allclose(updates[t], weights @ rows, rtol=1e-4, atol=1e-5)
        w = path[t]
