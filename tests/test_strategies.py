"""What every strategy of the catalog must do."""

import functools
import inspect
import itertools
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import mtl_optax as mtl
from tests.problems import a_fifth, mlp_batch, mlp_losses, mlp_params, relative_error, told

TASKS = ("a", "b", "c")
NAMES = sorted(mtl.STRATEGIES)
# A strategy is one compiled program here and in the next run: shapes are shared over the file.
KPIS = {"a": 0.3, "b": 0.9, "c": 0.6}


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def make(name, num_tasks=3):
    return mtl.make(name, num_tasks, key=jax.random.key(0))


def step_fn(name, optimizer=None, **jac_options):
    tx = optax.chain(make(name), optimizer or optax.adam(1e-2))

    def step(params, opt_state, x, y):
        losses, jac = mtl.value_and_jac(mlp_losses, **jac_options)(params, x, y)
        losses_fn = lambda p: mlp_losses(p, x, y)  # noqa: E731
        more = {"kpis": KPIS, "validation_fn": losses_fn, "losses_fn": losses_fn}
        updates, opt_state = tx.update(jac, opt_state, params, **more, unexpected=1.0)
        return optax.apply_updates(params, updates), opt_state, losses

    return tx, step


@functools.cache
def compiled_step(name):
    """The step, jitted with donated state, and how often it was traced: shared by two tests."""
    tx, step = step_fn(name)
    traces = []

    def counted(*args):
        traces.append(name)
        return step(*args)

    return tx, jax.jit(counted, donate_argnums=(0, 1)), traces


@pytest.mark.parametrize("name", a_fifth(NAMES, 3))
def test_trains_jitted_with_donated_state_and_one_trace(name):
    tx, step, traces = compiled_step(name)
    params, (x, y) = mlp_params(jax.random.key(0)), mlp_batch(jax.random.key(1))
    opt_state = tx.init(params)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), opt_state)
    first = mlp_losses(params, x, y)
    for _ in range(10):
        params, opt_state, losses = step(params, opt_state, x, y)
    assert len(traces) == 1
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), opt_state) == shapes
    chex.assert_tree_all_finite((params, losses))
    # What was donated is the state's own: a key or weights given as options outlive it.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(tx.init(params)))
    assert sum(losses.values()) < sum(first.values())


@pytest.mark.parametrize("name", a_fifth(NAMES, 1))
def test_runs_in_scan_under_vmap_over_seeds(name):
    _, step = step_fn(name)
    x, y = mlp_batch(jax.random.key(1))

    def start(seed):
        params = mlp_params(jax.random.key(seed))
        tx = optax.chain(mtl.make(name, 3, key=jax.random.key(seed)), optax.adam(1e-2))
        return params, tx.init(params)

    def train(seed):
        body = lambda carry, _: (step(*carry, x, y)[:2], None)  # noqa: E731
        return jax.lax.scan(body, start(seed), None, length=3)[0]

    together = jax.jit(jax.vmap(train))(jnp.arange(2))
    alone = start(1)
    for _ in range(3):
        alone = compiled_step(name)[1](*alone, x, y)[:2]
    for stacked, single in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        if not is_key(single):
            np.testing.assert_allclose(stacked[1], single, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", a_fifth(NAMES, 2))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_keeps_the_dtype_of_parameters_and_state(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        tx, step = step_fn(name, optax.sgd(0.1))
        params = mlp_params(jax.random.key(0), dtype=dtype)
        batch = mlp_batch(jax.random.key(1), dtype=dtype)
        opt_state = tx.init(params)
        new_params, new_state, _ = jax.jit(step)(params, opt_state, *batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_params, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, opt_state)
        chex.assert_tree_all_finite(new_params)
        for weights in optax.tree.get_all_with_path(opt_state, "weights"):
            assert weights[1].dtype == jnp.float32


@pytest.mark.parametrize("name", a_fifth(NAMES))
def test_exports_for_cpu_cuda_and_tpu(name):
    tx, step = step_fn(name)
    params, batch = mlp_params(jax.random.key(0)), mlp_batch(jax.random.key(1))
    opt_state = tx.init(params)
    # Typed keys are not a type of the exchange format: they cross it as their raw data.
    raw = lambda tree: jax.tree.map(lambda k: jax.random.key_data(k) if is_key(k) else k, tree)  # noqa: E731

    def raw_step(params, raw_state, x, y):
        restore = lambda like, k: jax.random.wrap_key_data(k) if is_key(like) else k  # noqa: E731
        params, state, losses = step(params, jax.tree.map(restore, opt_state, raw_state), x, y)
        return params, raw(state), losses

    exported = jax.export.export(jax.jit(raw_step), platforms=("cpu", "cuda", "tpu"))(
        params, raw(opt_state), *batch
    )
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}


@pytest.mark.parametrize("name", a_fifth(NAMES))
def test_resumes_from_a_checkpoint_bit_for_bit(name, tmp_path):
    tx, step, _ = compiled_step(name)
    params, batch = mlp_params(jax.random.key(0)), mlp_batch(jax.random.key(1))
    params, opt_state, _ = step(params, tx.init(params), *batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", opt_state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", opt_state)
    on = jax.tree.map(jnp.copy, params)
    for got, expected in zip(
        jax.tree.leaves(step(on, restored, *batch)),
        jax.tree.leaves(step(params, opt_state, *batch)),
        strict=True,
    ):
        assert jnp.array_equal(got, expected)


def numeric_option(name):
    """One option with a float default, and the options that are static."""
    options = mtl.STRATEGIES[name].options
    floats = [k for k, default in options.items() if isinstance(default, float)][:1]
    return floats, ("num_tasks", *(k for k in options if k not in floats))


@pytest.mark.parametrize("name", a_fifth([name for name in NAMES if numeric_option(name)[0]]))
def test_a_numeric_option_follows_a_schedule(name):
    row, ((option,), static) = mtl.STRATEGIES[name], numeric_option(name)
    default = row.options[option]
    factory = optax.inject_hyperparams(row.factory, static_args=static)
    key = {"key": jax.random.key(0)} if row.stochastic else {}
    tx = factory(num_tasks=3, **{option: optax.constant_schedule(default)}, **key)
    step = jax.jit(lambda m, s: tx.update(m, s, m[0], losses=LOSSES, **told(m, LOSSES)))
    update, state = step(MATRIX, tx.init(MATRIX[0]))
    np.testing.assert_allclose(state.hyperparams[option], default, rtol=1e-6)
    assert relative_error(update, aggregate(name, MATRIX, LOSSES)[0]) < 1e-5


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, row in mtl.STRATEGIES.items()
        for option, default in row.options.items()
        if isinstance(default, int | float)  # True and False too
        and option not in ("primary", "reference")  # a task by its place, or by its name
    ],
)
def test_an_option_of_another_type_is_named(name, option):
    row = mtl.STRATEGIES[name]
    key = {"key": jax.random.key(0)} if row.stochastic else {}
    others = ["no"]
    if "Mapping" not in str(inspect.signature(row.factory).parameters[option].annotation):
        others += [None, jnp.full(3, 0.5), [0.5, 0.5, 0.5], np.full((1, 1), 0.5)]
    for other in others:
        with pytest.raises((TypeError, ValueError), match=f"{option}="):
            row.factory(num_tasks=3, **{option: other}, **key)


OF_EACH_TASK = [
    (name, option)
    for name, row in mtl.STRATEGIES.items()
    for option, default in row.options.items()
    if isinstance(default, float)
    and "Mapping" in str(inspect.signature(row.factory).parameters[option].annotation)
]


@pytest.mark.parametrize(("name", "option"), OF_EACH_TASK)
def test_an_option_of_each_task_is_one_number_or_k_or_a_tree(name, option):
    row = mtl.STRATEGIES[name]
    key = {"key": jax.random.key(0)} if row.stochastic else {}
    one = row.options[option]
    for value in (one, [one] * 3, jnp.full(3, one), dict.fromkeys("abc", one)):
        row.factory(num_tasks=3, **{option: value}, **key)
    for wrong in ("no", jnp.nan, 2j):
        with pytest.raises((TypeError, ValueError), match=f"{option}="):
            row.factory(num_tasks=3, **{option: wrong}, **key)


@pytest.mark.parametrize(("name", "option"), OF_EACH_TASK)
def test_none_is_the_default_of_a_task(name, option):
    row = mtl.STRATEGIES[name]
    key = {"key": jax.random.key(0)} if row.stochastic else {}
    one, losses = row.options[option], dict(zip("abc", LOSSES, strict=True))
    rows = dict(zip("abc", MATRIX, strict=True))

    def update(value):
        tx = row.factory(num_tasks=3, **{option: value}, **key)
        given = told(MATRIX, LOSSES) if row.extra_args else {}
        return tx.update(rows, tx.init(MATRIX[0]), MATRIX[0], losses=losses, **given)[0]

    other = 0.1 if one == 0 else one / 2
    expected = update({"a": other, "b": one, "c": one})
    np.testing.assert_array_equal(update({"a": other, "b": None, "c": None}), expected)
    np.testing.assert_array_equal(update([other, None, one]), expected)


@pytest.mark.parametrize("name", sorted(mtl.STRATEGIES))
def test_a_first_state_has_no_nan(name):
    """Or `jax_debug_nans` stops at it."""
    with jax.debug_nans(True):
        make(name, 3).init(jnp.ones(2))


# Laws of the map from a Jacobian to an update, on given Jacobians.


@functools.cache
def link_step(name, num_tasks=3):
    """The jitted update of given Jacobians and its first state: one program for all laws."""
    tx = make(name, num_tasks)
    step = jax.jit(lambda m, s, losses: tx.update(m, s, m[0], losses=losses, **told(m, losses)))
    return step, tx.init(MATRIX[0])


def aggregate(name, matrix, losses):
    step, first = link_step(name, len(matrix))
    updates, state = step(matrix, first, losses)
    found = optax.tree.get_all_with_path(state, "weights")  # a chain of links has several
    return updates, found[-1][1] if found else jnp.ones(len(matrix))


MATRIX = jax.random.normal(jax.random.key(7), (3, 10)) - 0.3
LOSSES = jnp.array([0.7, 1.1, 2.0])


@pytest.mark.parametrize("name", NAMES)
def test_products_of_small_matrices_are_in_full_precision(name):
    """By default a TPU multiplies in bfloat16, a GPU in TensorFloat-32."""
    step, state = link_step(name)
    program = str(jax.make_jaxpr(step)(MATRIX, state, LOSSES))
    products = re.findall(r"dot_general\[(.*?)\n *\]", program, re.DOTALL)
    assert all("(Precision.HIGHEST, Precision.HIGHEST)" in product for product in products)


# Two divide by the root of a second moment plus an epsilon, like Adam; FORUM adds unit gradients of
# a validation batch and a multiple of the training batch's.
@pytest.mark.parametrize("name", a_fifth(sorted(set(NAMES) - {"m_config", "adatask", "forum"}), 4))
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_scaling_the_jacobian_scales_the_update(name, scale):
    update, _ = aggregate(name, MATRIX, LOSSES)
    scaled, _ = aggregate(name, scale * MATRIX, LOSSES)
    factor = 1 if mtl.STRATEGIES[name].scale == "unit" else scale
    assert relative_error(scaled / factor, update) < 1e-4


@pytest.mark.parametrize("name", [name for name in NAMES if not mtl.STRATEGIES[name].ordered])
def test_permuting_the_tasks_permutes_the_weights_and_keeps_the_update(name):
    order = jnp.array([2, 0, 1])
    update, weights = aggregate(name, MATRIX, LOSSES)
    permuted, permuted_weights = aggregate(name, MATRIX[order], LOSSES[order])
    assert relative_error(permuted, update) < 1e-5
    np.testing.assert_allclose(permuted_weights, weights[order], rtol=1e-4)


# They keep no weights, or mix more than the rows: moments, other batches, earlier gradients.
KEEP_NONE = {"adatask", "graddrop", "mean", "metabalance", "scale_invariant", "sum", "trimmed_mean"}
MIX_MORE = {"db_mtl", "forum", "m_config", "moco"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - KEEP_NONE - MIX_MORE))
def test_the_weights_of_a_state_are_those_of_its_last_update(name):
    step, state = link_step(name)
    _, state = step(MATRIX, state, LOSSES)
    matrix = 0.7 * MATRIX[::-1]
    update, state = step(matrix, state, LOSSES * jnp.array([0.9, 0.5, 0.8]))
    links = state if type(state) is tuple else (state,)
    weights = [link.weights for link in links if hasattr(link, "weights")]
    assert relative_error(update, functools.reduce(jnp.multiply, weights) @ matrix) < 1e-5


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("pcgrad", [[2.7e-38, 0], [-500, 20]]),
        ("gradvac", [[2.7e-38, 0], [-500, 20]]),
        ("pcd", [[500, 20], [-2.7e-38, 0]]),
        ("db_mtl", [[3e-37, 0], [200, 200]]),
        ("encodec", [[1e-34, 0], [2e5, 2e5]]),
    ],
)
def test_norms_further_apart_than_the_range_of_float32_leave_the_update_finite(name, rows):
    tx, matrix = make(name, 2), jnp.array(rows, jnp.float32)
    update, state = tx.update(matrix, tx.init(jnp.zeros(2)), jnp.zeros(2), losses=jnp.ones(2))
    chex.assert_tree_all_finite((update, [x for x in jax.tree.leaves(state) if not is_key(x)]))


def test_weights_beyond_float32_do_not_spoil_a_state_in_double_precision():
    with jax.enable_x64(True):
        rows = [jnp.array([[tiny, 0.0], [-1.0, -1.0]]) for tiny in (0.2, 4e-44, 4e-44, 0.2, 0.2)]
        pcgrad = mtl.pcgrad(2, key=jax.random.key(0))
        for tx in (mtl.grad_norm_weights(2), mtl.every(2, pcgrad), mtl.skip_nonfinite(pcgrad)):
            state = tx.init(jnp.zeros(2))
            for matrix in rows:
                update, state = tx.update(matrix, state, jnp.zeros(2), losses=jnp.ones(2))
                chex.assert_tree_all_finite(update)
                assert np.any(update)


DEGENERATE = {
    "one task": MATRIX[:1],
    "duplicate rows": MATRIX[jnp.array([0, 0, 1])],
    "a zero row": MATRIX.at[1].set(0),
    "all zero": jnp.zeros((3, 10)),
    "antiparallel rows": jnp.stack([MATRIX[0], -MATRIX[0], MATRIX[1]]),
    "rank one": jnp.array([[1.0], [-2.0], [0.5]]) * MATRIX[:1],
    "badly scaled": MATRIX * jnp.array([[1e-4], [1.0], [1e4]]),
    "norms of 1e15": MATRIX * 1e15,
    "more tasks than parameters": MATRIX.at[:, 2:].set(0),
}


@pytest.mark.parametrize(("name", "case"), a_fifth(itertools.product(NAMES, DEGENERATE)))
def test_degenerate_jacobians_are_normal_input(name, case):
    matrix = DEGENERATE[case]
    update, weights = aggregate(name, matrix, LOSSES[: len(matrix)])
    chex.assert_tree_all_finite((update, weights))
    if case == "one task" and mtl.STRATEGIES[name].scale in ("sum", "mean"):
        np.testing.assert_allclose(update, matrix[0], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_task_does_not_poison_the_state(name):
    step, state = link_step(name)
    for bad in (jnp.nan, jnp.inf):
        _, spoiled = step(MATRIX.at[1].set(bad), state, LOSSES.at[1].set(bad))
        update, state = step(MATRIX, spoiled, LOSSES)
        # What is not known yet is inf there.
        assert not any(jnp.any(jnp.isnan(x)) for x in jax.tree.leaves(spoiled) if not is_key(x))
    numbers = [leaf for leaf in jax.tree.leaves(state) if not is_key(leaf)]
    chex.assert_tree_all_finite((update, numbers))


@pytest.mark.parametrize("name", NAMES)
def test_remembers_earlier_updates_if_the_catalog_says_so(name):
    step, first = link_step(name)
    conflicting, state = MATRIX.at[1].add(-2 * MATRIX[0]), first
    for power in (1, -1, 2):
        _, state = step(MATRIX * 10.0 ** jnp.array([[-1], [0], [1]]), state, LOSSES**power)
    state = jax.tree.map(lambda new, old: old if is_key(new) else new, state, first)
    got, expected = (step(conflicting, s, LOSSES)[0] for s in (state, first))
    assert (relative_error(got, expected) > 1e-4) == mtl.STRATEGIES[name].stateful


# Cost.


def compiled_flops(step, *args):
    return jax.jit(step).lower(*args).compile().cost_analysis()["flops"]


@pytest.fixture(scope="module", name="plain_step")
def _plain_step():
    tasks, sizes = ("a", "b", "c", "d"), (256, 256, 256, 256, 256)
    params = mlp_params(jax.random.key(0), sizes, tasks)
    batch = mlp_batch(jax.random.key(1), tasks, 128, 256)
    optimizer = optax.adam(1e-3)

    def plain(params, opt_state, x, y):
        grads = jax.grad(lambda p: sum(mlp_losses(p, x, y).values()))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return params, batch, compiled_flops(plain, params, optimizer.init(params), *batch)


@pytest.mark.parametrize(
    ("name", "ratio", "options"),
    [(row.name, 1.005, {}) for row in mtl.STRATEGIES.values() if row.needs == "losses"]
    + [
        (
            "gradnorm",
            1.35,
            {"gramian_at": lambda p: {"trunk": [False, False, False, True], "heads": False}},
        )
    ],
)
def test_costs_no_more_flops_than(plain_step, name, ratio, options):
    params, batch, plain = plain_step
    tx = optax.chain(make(name, num_tasks=4), optax.adam(1e-3))
    kpis = {"a": 0.3, "b": 0.9, "c": 0.6, "d": 0.5}

    def step(params, opt_state, *batch):
        _, jac = mtl.value_and_jac(mlp_losses, **options)(params, *batch)
        updates, opt_state = tx.update(jac, opt_state, params, kpis=kpis)
        return optax.apply_updates(params, updates), opt_state

    assert compiled_flops(step, params, tx.init(params), *batch) <= ratio * plain


def test_the_catalog_lists_every_strategy_and_names_the_near_ones():
    assert {"uncertainty", "uwso", "gradnorm", "dwa", "dtp", "pareto", "mgda", "pcgrad"} <= set(
        NAMES
    )
    with pytest.raises(ValueError, match="near it: gradnorm"):
        mtl.make("grad_norm", 2)
    with pytest.raises(ValueError, match="pass key="):
        mtl.make("pcgrad", 2)
