"""Each loss-only balancer against its paper's formula."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from mtl_optax import (
    cosmos,
    famo,
    observe_losses,
    pbi,
    scale_by_cosmos,
    scale_by_cov,
    scale_by_famo,
    scale_by_gls,
    scale_by_imtl_l,
    scale_by_pbi,
    scale_by_relobralo,
    scale_by_rlw,
    scale_by_softadapt,
    scale_by_stch,
    stch,
)
from mtl_optax._usable import positive_log
from tests.problems import a_fifth

KEY = jax.random.key(0)


def states_of(tx, losses_seq, **extra_args):
    """The states after each of a sequence of losses, stacked, with the identity as Jacobian."""
    losses_seq = jnp.asarray(losses_seq, jnp.result_type(float))
    eye = jnp.eye(losses_seq.shape[1], dtype=losses_seq.dtype)

    def step(state, losses):
        _, state = tx.update(eye, state, losses=losses, **extra_args)
        return state, state

    return jax.jit(lambda s: jax.lax.scan(step, s, losses_seq)[1])(tx.init(None))


def weights_of(tx, losses, **extra_args):
    """The weights of the first update."""
    return np.asarray(states_of(tx, jnp.asarray(losses)[None], **extra_args).weights[0])


def softmax(x):
    e = np.exp(np.asarray(x) - np.max(x))
    return e / e.sum()


# What all must do.

FACTORIES = {
    "rlw": functools.partial(scale_by_rlw, key=KEY),
    "gls": scale_by_gls,
    "imtl_l": scale_by_imtl_l,
    "famo": scale_by_famo,
    "stch": scale_by_stch,
    "stch_log": functools.partial(scale_by_stch, kind="log", warmup=2),
    "softadapt": scale_by_softadapt,
    "softadapt_weighted": functools.partial(
        scale_by_softadapt, normalize=True, loss_weighted=True, window=2
    ),
    "relobralo": functools.partial(scale_by_relobralo, key=KEY, decay=0.9, rho=0.5),
    "cov": functools.partial(scale_by_cov, decay=0.9),
    "cosmos": scale_by_cosmos,
    "pbi": scale_by_pbi,
}
# At one task these have nothing to choose.
IDENTITY_AT_ONE = set(FACTORIES) - {"imtl_l", "stch_log"}
EXTREME = {
    "a task is NaN": [[1.0, 2.0, 3.0], [1.0, np.nan, 2.0], [1.0, 3.0, 2.0], [0.5, 2.0, 1.0]],
    "a task is inf": [[1.0, np.inf, 2.0], [1.0, 2.0, 3.0], [1.0, -np.inf, 2.0], [0.5, 2.0, 1.0]],
    "a task is NaN at first": [[1.0, np.nan, 2.0]] * 3 + [[1.0, 2.0, 3.0]],
    "all are NaN": [[np.nan] * 3, [1.0, 2.0, 3.0], [np.nan] * 3, [1.0, 2.0, 2.0]],
    "a task is 0": [[1.0, 0.0, 2.0], [1.0, 0.0, 2.0], [0.5, 1.0, 1.0], [0.5, 0.0, 1.0]],
    "all are 0": [[0.0] * 3] * 4,
    "a task is negative": [[1.0, -1.0, 2.0], [1.0, -2.0, 2.0], [1.0, 1.0, 2.0], [1.0, -1.0, 1.0]],
    "from 1e-38 to 1e38": [[1e-38, 1.0, 1e38], [1e38, 1e-38, 1.0], [1.0, 1e38, 1e-38]] * 2,
    "all are equal": [[1.0, 1.0, 1.0]] * 4,
}


def _is_number(leaf):
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("name", FACTORIES)
def test_weights_and_state_stay_finite_and_of_one_type(name):
    tx = FACTORIES[name](3)
    first = tx.init(None)
    # A buffer that stands twice in a state can't be donated.
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(first) if _is_number(leaf)]
    assert len(set(buffers)) == len(buffers)
    longest = max(map(len, EXTREME.values()))
    sequences = np.array([seq + seq[-1:] * (longest - len(seq)) for seq in EXTREME.values()])
    states = jax.vmap(functools.partial(states_of, tx))(sequences)
    chex.assert_tree_all_finite(states.weights)
    last = jax.tree.map(lambda leaf: leaf[:, -1], states)
    for old, new in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True):
        assert old.shape == new.shape[1:]
        assert old.dtype == new.dtype
        if _is_number(new):
            assert old.dtype in (jnp.float32, jnp.int32)
            chex.assert_tree_all_finite(new)


@pytest.mark.parametrize("name", sorted(IDENTITY_AT_ONE))
def test_one_task_keeps_its_weight(name):
    weights = states_of(FACTORIES[name](1), [[2.0], [1.0], [3.0]]).weights
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


@pytest.mark.parametrize("name", a_fifth(FACTORIES, 1))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_any_precision_gives_the_same_weights_from_the_same_state_types(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        tx = FACTORIES[name](2)
        state = tx.init(None)
        types = jax.tree.map(lambda leaf: leaf.dtype, state)
        step = jax.jit(tx.update)
        for losses in jnp.array([[1.0, 2.0], [0.5, 2.5], [0.25, 2.0]], dtype):
            jac, state = step(jnp.eye(2, dtype=dtype), state, losses=losses)
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == types
        assert jac.rows().dtype == jac.losses.dtype == dtype
    expected = states_of(FACTORIES[name](2), [[1.0, 2.0], [0.5, 2.5], [0.25, 2.0]]).weights[-1]
    np.testing.assert_allclose(state.weights, expected, rtol=1e-5)


@pytest.mark.parametrize("name", FACTORIES)
def test_no_row_is_ever_computed(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("a loss-only balancer must not compute rows")

    monkeypatch.setattr(mtl.Jacobian, "rows", refuse)
    monkeypatch.setattr(mtl.Jacobian, "_every_row", refuse)
    monkeypatch.setattr(mtl.Jacobian, "_pull", refuse)
    tx = FACTORIES[name](2)

    def scaled_losses(w):
        losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(w)
        scaled, _ = tx.update(jac, tx.init(None))
        return scaled.losses, losses

    scaled, losses = jax.eval_shape(scaled_losses, jnp.ones(2))
    assert scaled == losses


# Absent tasks: what the strategy gives for the others alone, whatever its options.

WITH_OPTIONS = {
    "famo": lambda k: scale_by_famo(k, min_losses=-1.0),
    "stch": lambda k: scale_by_stch(k, mu=1.0, reference=-1.0),
    "stch_log": lambda k: scale_by_stch(k, kind="log", warmup=3, window=2),
    "stch_nadir": lambda k: scale_by_stch(k, kind="log", nadir=2.0),
    "softadapt": lambda k: scale_by_softadapt(k, normalize=True, loss_weighted=True, window=2),
    "relobralo": lambda k: scale_by_relobralo(k, key=KEY, decay=0.5, rho=0.5, temperature=1.0),
    "cov": lambda k: scale_by_cov(k, decay=0.8),
    "cosmos": lambda k: scale_by_cosmos(k, preference=[3.0, 1.0, 2.0][:k], penalty=0.3),
    "pbi": lambda k: scale_by_pbi(k, preference=[3.0, 1.0, 2.0][:k], reference=-1.0),
    "dwa": lambda k: mtl.scale_by_dwa(k, window=2, temperature=0.5),
    "uwso": lambda k: mtl.scale_by_uwso(k, temperature=0.5),
    "encodec": lambda k: mtl.scale_by_encodec(k, shares=[3.0, 1.0, 2.0][:k], decay=0.5),
    "gradnorm": lambda k: mtl.scale_by_gradnorm(k, initial_losses=2.0, optimizer=optax.sgd(0.1)),
    "log_losses": mtl.log_losses,
    "normalize": lambda k: mtl.normalize_tasks("max"),
    "normalize_loss": lambda k: mtl.normalize_tasks("loss+"),
    "clip": lambda k: mtl.clip_tasks(0.5),
}


@pytest.mark.parametrize("name", a_fifth(WITH_OPTIONS))
@pytest.mark.parametrize("garbage", [np.nan, -7.0])
def test_an_absent_task_changes_nothing_for_the_others(name, garbage):
    rng = np.random.default_rng(0)
    losses = rng.uniform(0.5, 2.0, size=(7, 3))
    losses[3, 1] = np.nan  # present, but not to be used
    matrix = rng.normal(size=(3, 5))

    def rows_of(num_tasks, losses, **extra_args):
        tx = WITH_OPTIONS[name](num_tasks)

        def step(state, x):
            jac, state = tx.update(jnp.asarray(matrix[:num_tasks]), state, losses=x, **extra_args)
            return state, (jac.rows(), jac.losses)

        return jax.jit(lambda s: jax.lax.scan(step, s, jnp.asarray(losses))[1])(tx.init(None))

    expected_rows, expected_losses = rows_of(2, losses[:, :2])
    losses[:, 2] = garbage
    rows, scaled = rows_of(3, losses, present=[True, True, False])
    np.testing.assert_allclose(rows[:, :2], expected_rows, rtol=2e-5)
    np.testing.assert_allclose(scaled[:, :2], expected_losses, rtol=2e-5)
    np.testing.assert_array_equal(rows[:, 2], 0)
    np.testing.assert_array_equal(scaled[:, 2], 0)


@pytest.mark.parametrize("name", ["cov", "relobralo"])
@pytest.mark.parametrize("first", [0.0, np.nan])
def test_a_first_loss_that_could_not_be_used_counts_as_none(name, first):
    """The statistics of that task are those without that batch."""
    factory = {
        "cov": scale_by_cov,
        "relobralo": lambda k: scale_by_relobralo(k, key=KEY, rho=1.0, decay=0.5, temperature=1.0),
    }[name]
    losses = np.random.default_rng(6).uniform(0.5, 2.0, size=(10, 2))
    got = states_of(factory(2), np.concatenate([[[1.0, first]], losses]))
    expected = states_of(factory(2), losses)
    for field in set(got._fields) - {"weights", "key"}:
        np.testing.assert_allclose(
            getattr(got, field)[1:, 1], getattr(expected, field)[:, 1], rtol=1e-6
        )


def test_relobralo_and_an_absent_task_share_k():
    tx = scale_by_relobralo(3, key=KEY, decay=0.0, rho=1.0, temperature=0.3)
    state, step = tx.init(None), jax.jit(tx.update)
    rng = np.random.default_rng(7)
    for losses, present in zip(
        rng.uniform(0.5, 2.0, size=(40, 3)), rng.uniform(size=(40, 3)) < 0.6, strict=True
    ):
        before = state.weights
        _, state = step(jnp.eye(3), state, losses=losses, present=present)
        np.testing.assert_allclose(jnp.sum(state.weights), 3, rtol=1e-5)
        np.testing.assert_array_equal(state.weights[~present], before[~present])
        assert (state.weights >= 0).all()


def test_famo_compares_a_task_with_when_it_was_last_present():
    losses = FAMO_LOSSES[:3]
    tx = scale_by_famo(3, optimizer=optax.sgd(0.1))
    state = tx.init(None)
    for x, third in zip(losses, (True, False, True), strict=True):
        _, state = tx.update(jnp.eye(3), state, losses=x, present=[True, True, third])
    before, after = losses[1].copy(), losses[2]
    before[2] = losses[0, 2]
    pair = states_of(scale_by_famo(2, optimizer=optax.sgd(0.1)), losses[:2, :2])
    xi = np.append(pair.logits[-1], 0.0)
    z = softmax(xi)
    drop = np.log(before / after)
    np.testing.assert_allclose(state.logits, xi - 0.1 * z * (drop - z @ drop), rtol=1e-5, atol=1e-7)


INJECTED = {
    "famo": (scale_by_famo, {"min_losses": 0.1}),
    "stch": (scale_by_stch, {"mu": 0.5}),
    "softadapt": (scale_by_softadapt, {"beta": 2.0}),
    "relobralo": (functools.partial(scale_by_relobralo, key=KEY), {"decay": 0.5}),
    "cov": (scale_by_cov, {"decay": 0.9}),
    "cosmos": (scale_by_cosmos, {"penalty": 2.0}),
    "pbi": (scale_by_pbi, {"penalty": 2.0}),
}


@pytest.mark.parametrize("name", INJECTED)
def test_options_may_be_schedules(name):
    factory, options = INJECTED[name]
    ((option, value),) = options.items()

    static = ("num_tasks", "key") if name == "relobralo" else ("num_tasks",)
    schedule = {option: lambda count: jnp.asarray(value)}
    tx = optax.inject_hyperparams(factory, static_args=static)(2, **schedule)
    losses_seq = [[1.0, 2.0], [0.5, 2.5], [0.25, 2.0]]
    got = states_of(tx, losses_seq).inner_state.weights
    np.testing.assert_allclose(got, states_of(factory(2, **options), losses_seq).weights, rtol=1e-6)


BAD_OPTIONS = [
    (scale_by_rlw, {"key": 0}, TypeError, "typed random key"),
    (scale_by_relobralo, {"key": 0}, TypeError, "typed random key"),
    (scale_by_relobralo, {"key": KEY, "decay": 1.5}, ValueError, "decay=1.5, expected in"),
    (scale_by_relobralo, {"key": KEY, "temperature": 0.0}, ValueError, "temperature=0.0"),
    (scale_by_relobralo, {"key": KEY, "rho": -0.1}, ValueError, "rho=-0.1"),
    (scale_by_stch, {"mu": 0.0}, ValueError, "mu=0.0, expected more than 0"),
    (scale_by_stch, {"kind": "lin"}, ValueError, "kind='lin'"),
    (scale_by_stch, {"nadir": [1.0, 0.0]}, ValueError, "nadir="),
    (scale_by_stch, {"warmup": 2, "window": 3}, ValueError, "window=3 is longer than warmup=2"),
    (scale_by_stch, {"preference": {"a": 1.0, "b": -1.0}}, ValueError, "preference="),
    (scale_by_softadapt, {"beta": np.inf}, ValueError, "beta=inf"),
    (scale_by_softadapt, {"window": 0}, ValueError, "window=0"),
    (scale_by_cov, {"decay": 0.0}, ValueError, "decay=0.0"),
    (scale_by_cosmos, {"preference": 0.0}, ValueError, "at least one task above 0"),
    (scale_by_cosmos, {"penalty": -1.0}, ValueError, "penalty=-1.0"),
    (scale_by_pbi, {"penalty": -1.0}, ValueError, "penalty=-1.0"),
]


@pytest.mark.parametrize(("factory", "options", "error", "text"), BAD_OPTIONS)
def test_options_out_of_range_are_named(factory, options, error, text):
    with pytest.raises(error, match=text):
        factory(2, **options)


def test_positive_log_reaches_down_to_the_smallest_number():
    x = np.array([1.0, 1e-30, 1e-38, 1e-44, 0.0, -0.0, -1.0, np.nan, np.inf], np.float32)
    log, usable = jax.jit(positive_log)(x)
    np.testing.assert_array_equal(usable, [True] * 4 + [False] * 5)
    np.testing.assert_allclose(log[:4], np.log(x[:4].astype(np.float64)), rtol=1e-6)
    np.testing.assert_array_equal(log[4:], 0)


# RLW.


def test_rlw_draws_the_softmax_of_normal_noise_anew_at_each_update():
    weights = states_of(scale_by_rlw(3, key=KEY), np.ones((4000, 3))).weights
    np.testing.assert_allclose(jnp.sum(weights, axis=1), 3, rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(weights, axis=0), 1, atol=0.05)
    # The difference of two standard normal numbers.
    differences = jnp.log(weights[:, 0] / weights[:, 1])
    np.testing.assert_allclose(jnp.std(differences), 2**0.5, rtol=0.05)
    assert len(np.unique(weights[:, 0])) > 3900


# GLS: the geometric mean differentiated by JAX, and in closed form.


def test_gls_is_the_gradient_of_the_geometric_mean():
    losses = jnp.array([0.3, 2.0, 7.0])
    mean, expected = jax.jit(jax.value_and_grad(lambda x: jnp.prod(x) ** (1 / 3)))(losses)
    tx = scale_by_gls(3)
    jac, _ = jax.jit(tx.update)(jnp.eye(3), tx.init(None), losses=losses)
    np.testing.assert_allclose(jac.rows(), np.diag(expected), rtol=1e-6)
    # The scaled losses sum to the mean itself.
    np.testing.assert_allclose(np.sum(jac.losses), mean, rtol=1e-6)


@pytest.mark.parametrize(
    "losses", [[1e-30] * 4, [1e-38, 1e-38], [1e-30, 1.0, 1e30], [1e-38, 1.0], [1e38, 1e38, 1e38]]
)
def test_gls_does_not_underflow(losses):
    exact = np.array(losses, np.float32).astype(np.float64)
    expected = np.exp(np.mean(np.log(exact)) - np.log(exact)) / len(losses)
    np.testing.assert_allclose(weights_of(scale_by_gls(len(losses)), losses), expected, rtol=2e-5)


def test_gls_leaves_out_what_has_no_logarithm():
    weights = weights_of(scale_by_gls(5), [4.0, 0.0, 1.0, np.nan, -1.0])
    np.testing.assert_allclose(weights, [0.25, 0, 1, 0, 0], rtol=1e-6)


# IMTL-L.


def test_imtl_l_descends_its_objective():
    losses_seq = jnp.array([[1.0, 5.0], [0.2, 4.0], [0.1, 3.0]])
    states = states_of(scale_by_imtl_l(2, optimizer=optax.sgd(0.1)), losses_seq)
    s = jnp.zeros(2)
    for i, losses in enumerate(losses_seq):
        np.testing.assert_allclose(states.weights[i], jnp.exp(s), rtol=1e-6)
        s = s - 0.1 * jax.grad(lambda s, x: jnp.sum(jnp.exp(s) * x - s))(s, losses)
        np.testing.assert_allclose(states.log_scales[i], s, rtol=1e-5, atol=1e-6)


def test_imtl_l_settles_where_the_weighted_losses_are_one_and_holds_at_zero_loss():
    losses = np.array([0.01, 1.0, 200.0, 0.0])
    states = states_of(scale_by_imtl_l(4, optimizer=optax.adam(0.1)), np.tile(losses, (1500, 1)))
    np.testing.assert_allclose(states.weights[-1, :3] * losses[:3], 1, rtol=1e-2)
    assert states.weights[-1, 3] == 1


def test_imtl_has_equal_projections_on_the_rows_that_imtl_l_scaled():
    matrix = np.array([[3.0, 0.0, 1.0], [0.2, 0.4, -0.1]], np.float32)
    tx = mtl.imtl(2)
    step = jax.jit(lambda state: tx.update(matrix, state, losses=jnp.array([0.1, 5.0])))
    update, state = step(step(step(tx.init(None))[1])[1])
    scales = np.asarray(state[0].weights, np.float64)
    assert abs(scales[0] / scales[1] - 1) > 0.01
    # Equation 5 of the paper for two tasks, by hand.
    rows = scales[:, None] * matrix
    apart = np.subtract(*(rows / np.linalg.norm(rows, axis=1, keepdims=True)))
    share = rows[0] @ apart / ((rows[0] - rows[1]) @ apart)
    np.testing.assert_allclose(update, (1 - share) * rows[0] + share * rows[1], rtol=1e-5)


def test_scale_invariant_descends_the_sum_of_logarithms():
    matrix, losses = jnp.array([[3.0, 0.0], [0.2, 0.4]]), jnp.array([0.1, 5.0])
    tx = mtl.scale_invariant(2)
    update, _ = tx.update(matrix, tx.init(None), losses=losses)
    expected = jax.grad(lambda x: jnp.sum(jnp.log(losses + matrix @ x)))(jnp.zeros(2))
    np.testing.assert_allclose(update, expected, rtol=1e-6)


# FAMO: algorithm 1 in NumPy, with PyTorch's Adam and its coupled weight decay.


class FamoTwin:
    def __init__(self, num_tasks, min_losses=0.0):
        self.xi, self.m, self.v, self.t = np.zeros(num_tasks), 0.0, 0.0, 0
        self.min_losses = min_losses

    def weights(self, losses):
        shares = softmax(self.xi) / (losses - self.min_losses)
        return shares / shares.sum()

    def learn(self, before, after):
        drop = np.log(before - self.min_losses) - np.log(after - self.min_losses)
        z = softmax(self.xi)
        gradient = (np.diag(z) - np.outer(z, z)) @ drop + 1e-3 * self.xi
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        self.xi = self.xi - 0.025 * m / (np.sqrt(v) + 1e-8)


FAMO_LOSSES = np.abs(np.random.default_rng(0).normal(size=(12, 3))) + 0.2


@pytest.mark.parametrize("min_losses", [0.0, np.array([0.1, 0.0, 0.15])])
def test_famo_learns_from_the_next_losses(min_losses):
    states = states_of(scale_by_famo(3, min_losses=min_losses), FAMO_LOSSES)
    twin = FamoTwin(3, min_losses)
    for i, losses in enumerate(FAMO_LOSSES):
        if i:
            twin.learn(FAMO_LOSSES[i - 1], losses)
        np.testing.assert_allclose(states.logits[i], twin.xi, atol=2e-5)
        np.testing.assert_allclose(states.weights[i], twin.weights(losses), rtol=1e-4)


def test_famo_learns_from_observed_losses_inside_scan():
    tx = optax.chain(optax.chain(scale_by_famo(3), mtl.sum_tasks()), optax.scale(-1.0))
    after = 0.7 * FAMO_LOSSES[::-1]

    def step(state, losses):
        _, state = tx.update(jnp.eye(3), state, losses=losses[0])
        weights = state[0][0].weights
        state = observe_losses(state, [9.0, 9.0, 9.0])  # only the last one counts
        return observe_losses(state, {"a": losses[1][0], "b": losses[1][1:]}), weights

    pairs = jnp.stack([FAMO_LOSSES, after], axis=1)
    _, weights = jax.jit(lambda s: jax.lax.scan(step, s, pairs))(tx.init(None))
    twin = FamoTwin(3)
    for i, losses in enumerate(FAMO_LOSSES):
        np.testing.assert_allclose(weights[i], twin.weights(losses), rtol=1e-4)
        twin.learn(losses, after[i])


def test_famo_gives_weight_to_the_task_that_falls_slowly():
    losses = np.stack([0.5 ** np.arange(30), 0.9 ** np.arange(30)], axis=1)
    logits = states_of(scale_by_famo(2), losses).logits
    assert logits[0].tolist() == [0, 0]
    assert (jnp.diff(logits[:, 1] - logits[:, 0]) > 0).all()


def test_famo_goes_on_without_a_task_that_is_not_finite():
    losses = FAMO_LOSSES.copy()
    losses[3:6, 1] = np.nan, np.inf, 0.0
    states = states_of(scale_by_famo(3, optimizer=optax.sgd(0.1)), losses)
    np.testing.assert_array_equal(states.weights[3:6, 1], 0)
    np.testing.assert_allclose(jnp.sum(states.weights, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(states.logits[2:7, 1], states.logits[2, 1])
    # The others learn as the two of them would.
    z = softmax(states.logits[3])
    drop = np.log(losses[3] / losses[4])[[0, 2]]
    mean = z[[0, 2]] @ drop / z[[0, 2]].sum()
    step = states.logits[4] - states.logits[3]
    np.testing.assert_allclose(step[jnp.array([0, 2])], -0.1 * z[[0, 2]] * (drop - mean), rtol=1e-3)


def test_famo_does_not_depend_on_the_units_of_the_losses():
    units = np.array([1e-12, 1.0, 1e9])
    got = states_of(scale_by_famo(3), FAMO_LOSSES * units[None])
    expected = states_of(scale_by_famo(3), FAMO_LOSSES)
    np.testing.assert_allclose(got.logits, expected.logits, atol=1e-4)


def test_famo_learns_nothing_of_a_task_that_the_observed_batch_had_not():
    tx, losses = scale_by_famo(3), jnp.array(FAMO_LOSSES)
    _, state = tx.update(jnp.eye(3), tx.init(None), losses=losses[0])

    def after(garbage):
        seen = observe_losses(
            state,
            {"a": losses[1][0], "b": [garbage, losses[1][2]]},
            present={"a": True, "b": [False, True]},
        )
        assert seen.losses_after[1] == state.losses_after[1]
        return tx.update(jnp.eye(3), seen, losses=losses[2])[1]

    # The second task is compared with its loss of the next update, the others with the observed.
    mixed = observe_losses(state, jnp.array([losses[1][0], losses[2][1], losses[1][2]]))
    expected = tx.update(jnp.eye(3), mixed, losses=losses[2])[1]
    for garbage in (jnp.nan, 1e30, 0.0):
        chex.assert_trees_all_equal(after(garbage), expected)
    with pytest.raises(ValueError, match=r"does not fit the tasks .*, or 3 in that order"):
        observe_losses(state, losses[1], present=[True, False])
    with pytest.raises(TypeError, match="expected a bool for each of the tasks"):
        observe_losses(state, losses[1], present=[1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="or a tree like the losses"):
        observe_losses(
            state,
            dict(zip("abc", losses[1], strict=True)),
            present={"a": True, "b": True, "d": False},
        )


def test_observe_losses_says_what_is_wrong():
    with pytest.raises(TypeError, match=r"no link of this optimizer state, a tuple.*mtl\.famo"):
        observe_losses(optax.chain(mtl.dwa(2), optax.sgd(0.1)).init(jnp.ones(2)), [1.0, 2.0])
    with pytest.raises(ValueError, match="losses_after has 3 losses, expected 2"):
        observe_losses(famo(2).init(None), [1.0, 2.0, 3.0])


# STCH, COSMOS and PBI: their objectives differentiated by JAX.


def stch_objective(losses, mu, preference, reference):
    scaled = preference * (losses - reference) / mu
    return losses.size * mu * jax.scipy.special.logsumexp(scaled)


def cosmos_objective(losses, r, penalty):
    return r @ losses - penalty * r @ losses / jnp.linalg.norm(r) / jnp.linalg.norm(losses)


def pbi_objective(losses, r, penalty, reference):
    gap, ray = losses - reference, r / jnp.linalg.norm(r)
    return gap @ ray + penalty * jnp.linalg.norm(gap - (gap @ ray) * ray)


RAY, IDEAL = np.array([0.2, 0.5, 0.3]), np.array([0.1, 0.0, -1.0])
OBJECTIVES = {
    "stch": (
        scale_by_stch(3, mu=0.5, preference=RAY, reference=IDEAL),
        lambda losses: stch_objective(losses, 0.5, RAY, IDEAL),
    ),
    "cosmos": (
        scale_by_cosmos(3, preference=10 * RAY, penalty=2.0),  # scaled to sum to 1
        lambda losses: cosmos_objective(losses, RAY, 2.0),
    ),
    "pbi": (
        scale_by_pbi(3, preference=RAY, penalty=5.0, reference=IDEAL),
        lambda losses: pbi_objective(losses, RAY, 5.0, IDEAL),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_preference_methods_descend_their_objectives(name):
    tx, objective = OBJECTIVES[name]
    with jax.enable_x64(True):

        @jax.jit
        def both(losses):
            jac, _ = tx.update(jnp.eye(3), tx.init(None), losses=losses)
            return jac.rows(), jnp.diag(jax.grad(objective)(losses))

        for losses in jnp.array([[0.7, 1.1, 2.0], [3.0, 0.1, 0.2], [5.0, 4.0, 0.0]]):
            np.testing.assert_allclose(*both(losses), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("factory", [scale_by_stch, scale_by_cosmos, scale_by_pbi])
def test_a_preference_may_come_with_each_update(factory):
    losses = [0.7, 1.1, 2.0]
    expected = weights_of(factory(3, preference=RAY), losses)
    np.testing.assert_array_equal(weights_of(factory(3), losses, preference=RAY), expected)


@pytest.mark.parametrize("factory", [stch, cosmos, pbi])
def test_preferences_fit_names(factory):
    grads, losses = {"b": jnp.ones(2), "a": jnp.ones(2)}, {"b": jnp.ones([]), "a": jnp.ones([])}
    weights = []
    for preference in ({"b": 1.0, "a": 3.0}, [3.0, 1.0]):
        tx = factory(2, preference=preference)
        weights.append(tx.update(grads, tx.init(None), losses=losses)[1][0].weights)
    np.testing.assert_array_equal(*weights)
    assert weights[0][0] != weights[0][1]


def test_stch_is_the_maximum_for_small_mu_and_the_sum_for_large():
    losses = [1e6, 1e6 - 1e3, 5.0]
    np.testing.assert_allclose(weights_of(scale_by_stch(3, mu=1e-3), losses), [3, 0, 0])
    np.testing.assert_allclose(weights_of(scale_by_stch(3, mu=1e12), losses), 1, rtol=1e-5)
    np.testing.assert_allclose(
        weights_of(scale_by_stch(3, mu=1e-30), [-np.inf, 2.0, np.nan]), [0, 3, 0]
    )


def test_stch_log_warms_up_then_measures_from_the_nadir():
    losses = np.array([[9.0, 9.0], [2.0, 30.0], [4.0, np.nan], [1.0, 20.0], [3.0, 10.0]])
    mu, p = 0.5, np.array([1.0, 0.8])
    tx = scale_by_stch(2, kind="log", mu=mu, preference=p, warmup=3, window=2)
    states = states_of(tx, losses)
    np.testing.assert_allclose(states.weights[:3], np.nan_to_num(1 / losses[:3]), rtol=1e-6)
    nadir = np.array([3.0, 30.0])
    np.testing.assert_allclose(states.nadir[-1], nadir)
    with jax.enable_x64(True):
        objective = lambda x: stch_objective(jnp.log(x / nadir), mu, p, 0.0)  # noqa: E731
        for i in (3, 4):
            expected = jax.jit(jax.grad(objective))(jnp.array(losses[i]))
            np.testing.assert_allclose(states.weights[i], expected, rtol=1e-5)
    given = states_of(scale_by_stch(2, kind="log", mu=mu, preference=p, nadir=nadir), losses)
    np.testing.assert_allclose(given.weights[3:], states.weights[3:], rtol=1e-6)


def test_stch_log_does_not_depend_on_the_units_of_the_losses():
    tx = scale_by_stch(3, kind="log")
    units = np.array([1e-30, 1.0, 1e20])
    got = states_of(tx, FAMO_LOSSES * units[None]).weights * units[None]
    np.testing.assert_allclose(got, states_of(tx, FAMO_LOSSES).weights, rtol=1e-4)


def test_stch_holds_the_centre_of_a_concave_front_where_the_sum_does_not():
    """VLMOP2, n = 20: equal losses are 1 - 1/e; the ends are 0 and 1 - exp(-4)."""

    def task_losses(x):
        shift = 20**-0.5
        return [1 - jnp.exp(-jnp.sum((x - shift) ** 2)), 1 - jnp.exp(-jnp.sum((x + shift) ** 2))]

    def train(strategy):
        tx = optax.chain(strategy, optax.adam(1e-2))

        def step(carry, _):
            x, state = carry
            _, jac = mtl.value_and_jac(task_losses)(x)
            updates, state = tx.update(jac, state, x)
            return (optax.apply_updates(x, updates), state), None

        x = 0.2 * jax.random.normal(KEY, (20,)) + 0.02
        (x, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=1000))((x, tx.init(x)))
        return np.array(task_losses(x))

    np.testing.assert_allclose(train(stch(2, mu=0.01)), [0.63212, 0.63212], atol=1e-3)
    np.testing.assert_allclose(train(pbi(2)), [0.63212, 0.63212], atol=2e-2)
    assert train(mtl.sum_tasks()).min() < 0.01


def test_cosmos_and_pbi_on_their_ray():
    on_ray = 3e-20 * RAY
    np.testing.assert_allclose(weights_of(scale_by_cosmos(3, preference=RAY), 7 * RAY), RAY, 1e-5)
    np.testing.assert_allclose(
        weights_of(scale_by_pbi(3, preference=RAY), on_ray), RAY / np.linalg.norm(RAY), rtol=1e-6
    )
    np.testing.assert_allclose(weights_of(scale_by_cosmos(3, preference=RAY), [0.0] * 3), RAY, 1e-6)


def test_cosmos_and_pbi_leave_out_a_task_that_is_not_finite():
    for factory in (scale_by_cosmos, scale_by_pbi):
        weights = weights_of(factory(3), [1.0, np.nan, 2.0])
        assert weights[1] == 0
        assert np.isfinite(weights).all()
    expected = weights_of(scale_by_pbi(2), [1.0, 2.0])
    np.testing.assert_allclose(weights[[0, 2]], expected, rtol=1e-6)


def test_pbi_does_not_depend_on_the_unit_of_the_losses():
    losses = np.array([0.7, 1.1, 2.0])
    expected = weights_of(scale_by_pbi(3), losses)
    for unit in (1e-30, 1e30):
        np.testing.assert_allclose(weights_of(scale_by_pbi(3), unit * losses), expected, rtol=1e-5)


# SoftAdapt: sections 3.1.1 to 3.1.3 in NumPy.


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss_weighted", [False, True])
def test_softadapt_golden_values_with_windows(normalize, loss_weighted):
    beta, window = 1.5, 3
    losses = np.random.default_rng(1).uniform(0.5, 3.0, size=(12, 3))
    tx = scale_by_softadapt(
        3, beta=beta, window=window, normalize=normalize, loss_weighted=loss_weighted
    )
    weights = states_of(tx, losses).weights
    means = losses.reshape(4, window, 3).mean(axis=1)
    np.testing.assert_array_equal(weights[: 2 * window - 1], 1)
    for i in range(1, 4):
        rates = means[i] - means[i - 1]
        rates = rates / np.abs(rates).sum() if normalize else rates
        expected = np.exp(beta * rates) * (means[i] if loss_weighted else 1)
        expected = 3 * expected / expected.sum()
        for step in range((i + 1) * window - 1, min((i + 2) * window - 1, 12)):
            np.testing.assert_allclose(weights[step], expected, rtol=1e-5)


def test_softadapt_skips_what_is_not_finite():
    tx = scale_by_softadapt(2, beta=1.0)
    weights = states_of(tx, [[2.0, 2.0], [np.nan, 1.0], [1.0, 1.0]]).weights
    np.testing.assert_allclose(weights[1], 2 * softmax([0.0, -1.0]), rtol=1e-6)
    np.testing.assert_allclose(weights[2], 2 * softmax([-1.0, 0.0]), rtol=1e-6)


# ReLoBRaLo.


def relobralo_twin(losses, stays, decay, temperature):
    weights, seen = np.ones(losses.shape[1]), [np.ones(losses.shape[1])]
    balanced = lambda now, then: len(now) * softmax(now / (temperature * then))  # noqa: E731
    for t in range(1, len(losses)):
        past = weights if stays[t] else balanced(losses[t], losses[1])
        alpha = decay if t > 1 else 0
        weights = alpha * past + (1 - alpha) * balanced(losses[t], losses[t - 1])
        seen.append(weights)
    return np.stack(seen)


# The rule of the authors' code (rbischof/relative_balancing, src/update_rules.py and train.py) in
# float64, T = .1: alpha = 1, 0, .999, L(0) from the second step. With rho = 1, and rho = 0.
RELOBRALO_LOSSES = [[1.0, 2.0, 3.0], [0.8, 1.7, 3.9], [0.5, 1.6, 3.0], [0.4, 1.8, 2.0]]
RELOBRALO_STEPS = {
    1.0: (
        (1.0, 1.0, 1.0),
        (0.01985941, 0.03274263, 2.94739796),
        (0.01994356, 0.03516586, 2.94489058),
        (0.02003451, 0.03799057, 2.94197492),
    ),
    0.0: (
        (1.0, 1.0, 1.0),
        (0.01985941, 0.03274263, 2.94739796),
        (0.10401254, 2.45596789, 0.44001957),
        (0.0112356, 2.97608876, 0.01267564),
    ),
}


@pytest.mark.parametrize("rho", RELOBRALO_STEPS)
def test_relobralo_takes_the_steps_of_the_authors_code(rho):
    weights = states_of(scale_by_relobralo(3, key=KEY, rho=rho), RELOBRALO_LOSSES).weights
    np.testing.assert_allclose(weights, RELOBRALO_STEPS[rho], rtol=1e-5)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_relobralo_golden_values_with_and_without_look_back(rho):
    losses = np.random.default_rng(2).uniform(0.5, 2.0, size=(8, 3))
    tx = scale_by_relobralo(3, key=KEY, decay=0.8, temperature=0.5, rho=rho)
    expected = relobralo_twin(losses, [rho > 0] * 8, 0.8, 0.5)
    np.testing.assert_allclose(states_of(tx, losses).weights, expected, rtol=1e-5)


def test_relobralo_looks_back_as_often_as_it_should():
    # Since the second step the first task has fallen, since the last one neither has.
    losses = np.concatenate([[[2.0, 1.0]] * 2, np.ones((2000, 2))])
    tx = scale_by_relobralo(2, key=KEY, decay=1.0, temperature=0.5, rho=0.9)
    weights = states_of(tx, losses).weights
    looked = np.flatnonzero(np.diff(np.asarray(weights[:, 0])))
    assert len(looked) == 1  # with a decay of 1 a look back fixes the weights for good
    np.testing.assert_allclose(weights[-1], 2 * softmax([1.0, 2.0]), rtol=1e-6)
    keys = jax.random.split(KEY, 500)
    firsts = jax.vmap(
        lambda key: states_of(
            scale_by_relobralo(2, key=key, decay=1.0, temperature=0.5, rho=0.9), losses[:3]
        ).weights[2, 0]
    )(keys)
    np.testing.assert_allclose(jnp.mean(firsts == 1), 0.9, atol=0.05)


def test_relobralo_keeps_the_weight_of_a_task_that_is_not_finite():
    losses = [[1.0, 2.0, 3.0], [0.5, 2.0, 3.0], [0.4, np.nan, 3.0], [0.4, np.inf, 1.0]]
    tx = scale_by_relobralo(3, key=KEY, decay=0.5, temperature=0.5, rho=1.0)
    states = states_of(tx, losses)
    np.testing.assert_array_equal(states.weights[2:, 1], states.weights[1, 1])
    np.testing.assert_allclose(jnp.sum(states.weights, axis=1), 3, rtol=1e-6)
    np.testing.assert_allclose(states.last_losses[-1], [0.4, 2.0, 1.0])
    np.testing.assert_allclose(states.initial_losses[-1], [0.5, 2.0, 3.0])


# CoV.


def cov_twin(losses):
    means = np.cumsum(losses, axis=0) / np.arange(1, len(losses) + 1)[:, None]
    ratios = np.concatenate([np.ones((1, losses.shape[1])), losses[1:] / means[:-1]])
    for t in range(1, len(losses) + 1):
        c = np.sqrt(np.var(ratios[:t], axis=0) + 1e-8) / np.mean(ratios[:t], axis=0)
        yield losses.shape[1] * c / c.sum()


def test_cov_is_the_deviation_over_the_mean_of_the_ratios():
    losses = np.random.default_rng(3).uniform(0.5, 2.0, size=(20, 3)) * np.array([1.0, 1e-9, 1e6])
    weights = states_of(scale_by_cov(3), losses).weights
    np.testing.assert_array_equal(weights[0], 1)
    np.testing.assert_allclose(weights, np.stack(list(cov_twin(losses))), rtol=1e-4)


def test_cov_gives_constant_losses_equal_weights_and_skips_what_is_not_finite():
    np.testing.assert_allclose(
        states_of(scale_by_cov(2), np.tile([0.1, 7.0], (50, 1))).weights, 1, rtol=1e-4
    )
    losses = np.random.default_rng(4).uniform(0.5, 2.0, size=(6, 2))
    with_gap = np.insert(losses, 3, [np.nan, np.inf], axis=0)
    got, expected = (states_of(scale_by_cov(2), x).weights for x in (with_gap, losses))
    np.testing.assert_allclose(np.delete(got, 3, axis=0), expected, rtol=1e-5)


def test_cov_with_decay_forgets():
    noisy = np.random.default_rng(5).uniform(0.5, 2.0, size=(100, 1))
    calm = np.ones((400, 1))
    losses = np.concatenate([np.concatenate([noisy, calm]), np.tile([[1.0], [1.2]], (250, 1))], 1)
    full, decaying = (states_of(scale_by_cov(2, decay=d), losses).weights[-1] for d in (1.0, 0.9))
    assert decaying[0] < 0.1 < full[0]
