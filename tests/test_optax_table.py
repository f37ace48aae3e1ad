"""All of Optax before, after and around a strategy, and on a Jacobian: the verdicts, in tables."""

import functools
import inspect

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import optax.transforms
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from optax import contrib

import mtl_optax as mtl
from tests.problems import a_fifth

# Some of Optax is deprecated, or warns of its own use of JAX.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _optax_may_promote_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


MODULES = {"optax": optax, "contrib": contrib, "transforms": optax.transforms}
PARAMS = {
    "trunk": jnp.array([[0.5, -1.0], [1.5, 0.3], [-0.2, 0.8]]),
    "a": jnp.array([1.0, -0.5]),
    "b": jnp.array([0.4, 0.9]),
}
X = jnp.array([[1.0, 0.5, -1.0], [0.3, -2.0, 0.7], [0.9, 0.1, 0.4], [-1.2, 0.6, 1.1]])
REMEDY = ("mtl_optax.Jacobian", "aggregator")


def task_losses(params):
    h = jnp.tanh(X @ params["trunk"])
    return {"a": jnp.mean((h @ params["a"] - 1) ** 2), "b": jnp.mean((h @ params["b"] + 2) ** 4)}


def total(params):
    return sum(task_losses(params).values())


@functools.cache
def jacobian():
    return mtl.value_and_jac(task_losses)(PARAMS)[1]


def aggregated(jac):
    tx = mtl.mgda(2)
    return tx.update(jac, tx.init(PARAMS), PARAMS)[0]


@functools.cache
def gradient():
    """What MGDA alone makes of the Jacobian."""
    return aggregated(jacobian())


def update(tx, updates, params=PARAMS, **extra_args):
    tx = tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx
    tx = optax.with_extra_args_support(tx)
    return tx.update(updates, tx.init(params), params, **extra_args)[0]


def assert_same(got, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, expected)


def refused(call, *args, parts=REMEDY, error=(TypeError, ValueError)):
    with pytest.raises(error) as caught:
        call(*args)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


def verdict(call, parts, expected):
    """Checks what `call(jacobian)` gives, outside and inside `jit`: an error, or an update."""
    for fn in (call, jax.jit(call)):
        if parts is not None:
            refused(fn, jacobian(), parts=parts)
        else:
            assert_same(fn(jacobian()), expected())


def zeros():
    return jax.tree.map(jnp.zeros_like, PARAMS)


def installed(name):
    module, attribute = name.split(".")
    return hasattr(MODULES[module], attribute)


def skip_unless_installed(name):
    if not installed(name):
        pytest.skip(f"{name} is not in Optax {optax.__version__}")


def halve():
    return optax.scale(0.5)


def labels(tree):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "rest", tree)


def matrices(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def dimensions(tree):
    return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(), tree)


# Every name that returns a GradientTransformation: how to build one.
TRANSFORMS = {
    # optax, optimizers
    "optax.adabelief": lambda: optax.adabelief(0.1),
    "optax.adadelta": lambda: optax.adadelta(0.1),
    "optax.adafactor": lambda: optax.adafactor(0.1),
    "optax.adagrad": lambda: optax.adagrad(0.1),
    "optax.adam": lambda: optax.adam(0.1),
    "optax.adamax": lambda: optax.adamax(0.1),
    "optax.adamaxw": lambda: optax.adamaxw(0.1),
    "optax.adamw": lambda: optax.adamw(0.1),
    "optax.adan": lambda: optax.adan(0.1),
    "optax.amsgrad": lambda: optax.amsgrad(0.1),
    "optax.fromage": lambda: optax.fromage(0.1),
    "optax.lamb": lambda: optax.lamb(0.1),
    "optax.lars": lambda: optax.lars(0.1),
    "optax.lbfgs": lambda: optax.lbfgs(),
    "optax.lion": lambda: optax.lion(0.1),
    "optax.noisy_sgd": lambda: optax.noisy_sgd(0.1),
    "optax.novograd": lambda: optax.novograd(0.1),
    "optax.optimistic_adam": lambda: optax.optimistic_adam(0.1),
    "optax.optimistic_adam_v2": lambda: optax.optimistic_adam_v2(0.1),
    "optax.optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.1),
    "optax.polyak_sgd": lambda: optax.polyak_sgd(),
    "optax.radam": lambda: optax.radam(0.1),
    "optax.rmsprop": lambda: optax.rmsprop(0.1),
    "optax.rprop": lambda: optax.rprop(0.1),
    "optax.sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "optax.sign_sgd": lambda: optax.sign_sgd(0.1),
    "optax.signum": lambda: optax.signum(0.1),
    "optax.sm3": lambda: optax.sm3(0.1),
    "optax.yogi": lambda: optax.yogi(0.1),
    # optax, links
    "optax.adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
    "optax.add_decayed_weights": lambda: optax.add_decayed_weights(0.1),
    "optax.add_noise": lambda: optax.add_noise(0.1, 0.5, key=0),
    "optax.apply_every": lambda: optax.apply_every(2),
    "optax.centralize": lambda: optax.centralize(),
    "optax.clip": lambda: optax.clip(0.5),
    "optax.clip_by_block_rms": lambda: optax.clip_by_block_rms(0.1),
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(0.1),
    "optax.ema": lambda: optax.ema(0.9),
    "optax.freeze": lambda: optax.freeze(True),
    "optax.identity": lambda: optax.identity(),
    "optax.keep_params_nonnegative": lambda: optax.keep_params_nonnegative(),
    "optax.measure_with_ema": lambda: optax.measure_with_ema(optax.global_norm, 0.9),
    "optax.monitor": lambda: optax.monitor({"norm": optax.global_norm}),
    "optax.normalize_by_update_norm": lambda: optax.normalize_by_update_norm(),
    "optax.scale": lambda: optax.scale(0.5),
    "optax.scale_by_adadelta": lambda: optax.scale_by_adadelta(),
    "optax.scale_by_adam": lambda: optax.scale_by_adam(),
    "optax.scale_by_adamax": lambda: optax.scale_by_adamax(),
    "optax.scale_by_adan": lambda: optax.scale_by_adan(),
    "optax.scale_by_amsgrad": lambda: optax.scale_by_amsgrad(),
    "optax.scale_by_backtracking_linesearch": lambda: optax.scale_by_backtracking_linesearch(4),
    "optax.scale_by_belief": lambda: optax.scale_by_belief(),
    "optax.scale_by_distance_over_gradients": lambda: optax.scale_by_distance_over_gradients(),
    "optax.scale_by_factored_rms": lambda: optax.scale_by_factored_rms(),
    "optax.scale_by_lbfgs": lambda: optax.scale_by_lbfgs(),
    "optax.scale_by_learning_rate": lambda: optax.scale_by_learning_rate(0.1),
    "optax.scale_by_lion": lambda: optax.scale_by_lion(),
    "optax.scale_by_novograd": lambda: optax.scale_by_novograd(),
    "optax.scale_by_optimistic_gradient": lambda: optax.scale_by_optimistic_gradient(),
    "optax.scale_by_param_block_norm": lambda: optax.scale_by_param_block_norm(),
    "optax.scale_by_param_block_rms": lambda: optax.scale_by_param_block_rms(),
    "optax.scale_by_polyak": lambda: optax.scale_by_polyak(),
    "optax.scale_by_radam": lambda: optax.scale_by_radam(),
    "optax.scale_by_rms": lambda: optax.scale_by_rms(),
    "optax.scale_by_rprop": lambda: optax.scale_by_rprop(0.1),
    "optax.scale_by_rss": lambda: optax.scale_by_rss(),
    "optax.scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: 0.5),
    "optax.scale_by_sign": lambda: optax.scale_by_sign(),
    "optax.scale_by_sm3": lambda: optax.scale_by_sm3(),
    "optax.scale_by_stddev": lambda: optax.scale_by_stddev(),
    "optax.scale_by_trust_ratio": lambda: optax.scale_by_trust_ratio(),
    "optax.scale_by_yogi": lambda: optax.scale_by_yogi(),
    "optax.scale_by_zoom_linesearch": lambda: optax.scale_by_zoom_linesearch(4),
    "optax.set_to_zero": lambda: optax.set_to_zero(),
    "optax.snapshot": lambda: optax.snapshot("norm", optax.global_norm),
    "optax.stateless": lambda: optax.stateless(lambda g, p: jax.tree.map(lambda x: x / 2, g)),
    "optax.stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda g, p: g + p),
    "optax.trace": lambda: optax.trace(0.9),
    "optax.zero_nans": lambda: optax.zero_nans(),
    # optax, around other transformations
    "optax.MultiSteps": lambda: optax.MultiSteps(halve(), 2),
    "optax.apply_if_finite": lambda: optax.apply_if_finite(halve(), 2),
    "optax.chain": lambda: optax.chain(halve(), optax.clip(0.5)),
    "optax.conditionally_mask": lambda: optax.conditionally_mask(halve(), lambda step: True),
    "optax.conditionally_transform": lambda: optax.conditionally_transform(
        halve(), lambda step: True
    ),
    "optax.flatten": lambda: optax.flatten(halve()),
    "optax.inject_hyperparams": lambda: optax.inject_hyperparams(optax.scale)(step_size=0.5),
    "optax.inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.scale)(
        step_size=0.5
    ),
    "optax.lookahead": lambda: optax.lookahead(halve(), 2, 0.5),
    "optax.masked": lambda: optax.masked(halve(), matrices),
    "optax.multi_transform": lambda: optax.multi_transform(
        {"matrix": halve(), "rest": optax.identity()}, labels
    ),
    "optax.named_chain": lambda: optax.named_chain(("half", halve())),
    "optax.partition": lambda: optax.partition(
        {"matrix": halve(), "rest": optax.identity()}, labels
    ),
    "optax.selective_transform": lambda: optax.selective_transform(halve(), freeze_mask=True),
    "optax.with_extra_args_support": lambda: optax.with_extra_args_support(halve()),
    # contrib
    "contrib.acprop": lambda: contrib.acprop(0.1),
    "contrib.ademamix": lambda: contrib.ademamix(0.1),
    "contrib.adopt": lambda: contrib.adopt(0.1),
    "contrib.cocob": lambda: contrib.cocob(),
    "contrib.dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "contrib.differentially_private_aggregate": lambda: contrib.differentially_private_aggregate(
        1.0, 0.1, 0
    ),
    "contrib.dog": lambda: contrib.dog(),
    "contrib.dowg": lambda: contrib.dowg(),
    "contrib.dpsgd": lambda: contrib.dpsgd(0.1, 1.0, 0.1, 0),
    "contrib.galore": lambda: contrib.galore(0.1, rank=1),
    "contrib.hutchinson_estimator_diag_hessian": lambda: contrib.hutchinson_estimator_diag_hessian(
        jax.random.key(0)
    ),
    "contrib.madgrad": lambda: contrib.madgrad(0.1),
    "contrib.mechanize": lambda: contrib.mechanize(halve()),
    "contrib.momo": lambda: contrib.momo(),
    "contrib.momo_adam": lambda: contrib.momo_adam(),
    "contrib.muon": lambda: contrib.muon(0.1),
    "contrib.normalize": lambda: contrib.normalize(),
    "contrib.prodigy": lambda: contrib.prodigy(),
    "contrib.reduce_on_plateau": lambda: contrib.reduce_on_plateau(),
    "contrib.sam": lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
    "contrib.scale_by_acprop": lambda: contrib.scale_by_acprop(),
    "contrib.scale_by_ademamix": lambda: contrib.scale_by_ademamix(),
    "contrib.scale_by_adopt": lambda: contrib.scale_by_adopt(),
    "contrib.scale_by_cocob": lambda: contrib.scale_by_cocob(),
    "contrib.scale_by_galore": lambda: contrib.scale_by_galore(rank=1),
    "contrib.scale_by_madgrad": lambda: contrib.scale_by_madgrad(0.1),
    "contrib.scale_by_muon": lambda: contrib.scale_by_muon(weight_dimension_numbers=dimensions),
    "contrib.scale_by_simplified_ademamix": lambda: contrib.scale_by_simplified_ademamix(),
    "contrib.schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
    "contrib.schedule_free_adamw": lambda: contrib.schedule_free_adamw(),
    "contrib.schedule_free_sgd": lambda: contrib.schedule_free_sgd(),
    "contrib.simplified_ademamix": lambda: contrib.simplified_ademamix(0.1),
    "contrib.sophia": lambda: contrib.sophia(0.1),
    "contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(halve()),
}
# What they need beside the update.
EXTRA_ARGS = {
    "optax.lbfgs": ("value", "grad", "value_fn"),
    "optax.scale_by_backtracking_linesearch": ("value", "grad", "value_fn"),
    "optax.scale_by_zoom_linesearch": ("value", "grad", "value_fn"),
    "optax.polyak_sgd": ("value",),
    "optax.scale_by_polyak": ("value",),
    "contrib.hutchinson_estimator_diag_hessian": ("obj_fn",),
    "contrib.momo": ("value",),
    "contrib.momo_adam": ("value",),
    "contrib.reduce_on_plateau": ("value",),
    "contrib.sophia": ("obj_fn",),
}
# Before the aggregator all are refused with the remedy, but for these.
HANDED_ON = ["optax.identity"]
ZERO = ["optax.set_to_zero", "optax.freeze", "optax.selective_transform"]
OTHER_WORDS = {
    "contrib.differentially_private_aggregate": ("`grads` to have a batch dimension",),
    "contrib.dpsgd": ("`grads` to have a batch dimension",),
    # It does not read its updates, so what meets the aggregator is a plain tree.
    "contrib.hutchinson_estimator_diag_hessian": ("expected the Jacobian", "aggregator"),
}
# After the aggregator all work, but for these.
NOT_AFTER = {
    "contrib.differentially_private_aggregate": ("`grads` to have a batch dimension",),
    "contrib.dpsgd": ("`grads` to have a batch dimension",),
    "contrib.scale_by_muon": ("rank >= 2",),
    # Its parameters are pairs, which only what it is around can do without.
    "optax.lookahead": ("expected that of the parameters", "LookaheadParams"),
}
# What looks like one, as it says not what it returns or has an `update`, and is no transformation.
NOT_TRANSFORMATIONS = {
    "optax.WrappedSchedule",
    "optax.matrix_inverse_pth_root",
    "optax.sigmoid_binary_cross_entropy",
    "optax.update_infinity_moment",
    "optax.update_moment",
    "optax.update_moment_per_elem_norm",
    "contrib.schedule_free_eval_params",
}
# The arguments by which a transformation takes another one.
INNER = {"inner", "inner_factory", "tx", "opt", "optimizer", "base_optimizer", "fast_optimizer"}
INNER |= {"transforms", "args"}


@functools.cache
def transformations():
    """The public names of Optax that return a GradientTransformation: their signatures."""
    found, seen = {}, set()
    for module, namespace in MODULES.items():
        for name in filter(lambda name: not name.startswith("_"), dir(namespace)):
            value = getattr(namespace, name)
            is_class = inspect.isclass(value) and not issubclass(value, tuple)
            if id(value) in seen or not (
                inspect.isfunction(value) or (is_class and hasattr(value, "update"))
            ):
                continue
            seen.add(id(value))
            signature = inspect.signature(value)
            returned = signature.return_annotation
            if returned is inspect.Signature.empty or "GradientTransformation" in str(returned):
                found[f"{module}.{name}"] = signature
    return {name: s for name, s in found.items() if name not in NOT_TRANSFORMATIONS}


def extra_args(name):
    every = {"value": total(PARAMS), "value_fn": total, "obj_fn": total}
    every["grad"] = jacobian().pullback(jnp.ones(2))
    return {key: every[key] for key in EXTRA_ARGS.get(name, ())}


def params_for(name):
    is_pair = name == "optax.lookahead"
    return optax.LookaheadParams.init_synced(PARAMS) if is_pair else PARAMS


def chain(*links):
    alone = (x.gradient_transformation() if isinstance(x, optax.MultiSteps) else x for x in links)
    return optax.chain(*alone)


def test_every_transformation_of_optax_has_a_row():
    missing = sorted(set(transformations()) - set(TRANSFORMS))
    assert not missing, (
        f"{missing} of Optax {optax.__version__} have no row: add to TRANSFORMS in "
        f"{__file__} how to build them (or to NOT_TRANSFORMATIONS)"
    )


def test_every_wrapper_of_optax_has_a_row():
    wrappers = {name for name, s in transformations().items() if INNER & set(s.parameters)}
    missing = sorted(wrappers - {name.split(" ")[0] for name in AROUND})
    assert not missing, (
        f"{missing} of Optax {optax.__version__} take another transformation and have no row: "
        f"add to AROUND in {__file__} what they do around a strategy"
    )


@pytest.mark.parametrize("name", a_fifth(TRANSFORMS, 1))
def test_before_the_aggregator_nothing_computes_on_a_jacobian(name):
    skip_unless_installed(name)
    params, extra = params_for(name), extra_args(name)

    def before(jac):
        return update(chain(TRANSFORMS[name](), mtl.mgda(2)), jac, params, **extra)

    if name in ZERO:
        verdict(before, None, zeros)
    else:
        parts = None if name in HANDED_ON else OTHER_WORDS.get(name, REMEDY)
        verdict(before, parts, gradient)


@pytest.mark.parametrize("name", a_fifth(TRANSFORMS))
def test_after_the_aggregator_it_gets_the_gradient(name):
    skip_unless_installed(name)
    params, extra = params_for(name), extra_args(name)
    after = chain(mtl.mgda(2), TRANSFORMS[name]())
    if name in NOT_AFTER:
        refused(lambda: update(after, jacobian(), params, **extra), parts=NOT_AFTER[name])
        return
    expected = update(TRANSFORMS[name](), gradient(), params, **extra)
    assert_same(update(after, jacobian(), params, **extra), expected)


WORKS = None
OUTSIDE = ("mtl_optax.Jacobian", "outside", "after the aggregator")
# Around a strategy: how to build it around any transformation, and the parts of the error's text.
AROUND = {
    "optax.MultiSteps": (lambda tx: optax.MultiSteps(tx, 2), ("mtl.multi_steps",)),
    "optax.MultiSteps of one": (lambda tx: optax.MultiSteps(tx, 1), ("mtl.multi_steps",)),
    "optax.MultiSteps of sums": (
        lambda tx: optax.MultiSteps(tx, 2, use_grad_mean=False),
        ("mtl.multi_steps",),
    ),
    "optax.MultiSteps that skips": (
        lambda tx: optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite),
        ("mtl.multi_steps", "mtl.skip_nonfinite"),
    ),
    "optax.MultiSteps that skips large": (
        lambda tx: optax.MultiSteps(
            tx,
            2,
            should_skip_update_fn=functools.partial(optax.skip_large_updates, max_squared_norm=1.0),
        ),
        ("mtl.multi_steps", "mtl.skip_nonfinite"),
    ),
    "optax.apply_if_finite": (lambda tx: optax.apply_if_finite(tx, 2), ("mtl.skip_nonfinite",)),
    "optax.chain": (lambda tx: optax.chain(tx, halve()), WORKS),
    "optax.conditionally_mask": (
        lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
        REMEDY,
    ),
    "optax.conditionally_transform": (
        lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
        REMEDY,
    ),
    "optax.flatten": (optax.flatten, REMEDY),
    "optax.inject_hyperparams": (
        lambda tx: optax.inject_hyperparams(lambda s: optax.chain(tx, optax.scale(s)))(s=0.5),
        WORKS,
    ),
    "optax.inject_stateful_hyperparams": (
        lambda tx: optax.inject_stateful_hyperparams(lambda s: optax.chain(tx, optax.scale(s)))(
            s=0.5
        ),
        WORKS,
    ),
    "optax.lookahead": (lambda tx: optax.lookahead(tx, 2, 0.5), WORKS),
    "optax.masked": (lambda tx: optax.masked(tx, matrices(PARAMS)), OUTSIDE),
    "optax.masked by a function": (lambda tx: optax.masked(tx, matrices), OUTSIDE),
    "optax.masked nothing": (lambda tx: optax.masked(tx, True), WORKS),
    "optax.masked all": (lambda tx: optax.masked(tx, False), ("MaskedNode", "aggregator")),
    "optax.multi_transform": (
        lambda tx: optax.multi_transform({"matrix": tx, "rest": halve()}, labels(PARAMS)),
        OUTSIDE,
    ),
    "optax.named_chain": (lambda tx: optax.named_chain(("a", tx), ("b", halve())), WORKS),
    "optax.partition": (
        lambda tx: optax.partition({"matrix": tx, "rest": halve()}, labels(PARAMS)),
        OUTSIDE,
    ),
    "optax.partition by a function": (
        lambda tx: optax.partition({"matrix": tx, "rest": halve()}, labels),
        OUTSIDE,
    ),
    "optax.partition of one": (
        lambda tx: optax.partition({"matrix": tx}, lambda tree: "matrix"),
        WORKS,
    ),
    "optax.selective_transform": (
        lambda tx: optax.selective_transform(tx, freeze_mask=matrices(PARAMS)),
        OUTSIDE,
    ),
    "optax.with_extra_args_support": (optax.with_extra_args_support, WORKS),
    "contrib.galore": (lambda tx: contrib.galore(0.1, rank=1, base_optimizer=tx), REMEDY),
    "contrib.mechanize": (contrib.mechanize, REMEDY),
    "contrib.sam": (lambda tx: contrib.sam(tx, tx), WORKS),
    "contrib.sam as its papers have it": (
        lambda tx: contrib.sam(tx, optax.chain(contrib.normalize(), optax.sgd(0.1))),
        ("mtl_optax.Jacobian", "SAM move outside"),
    ),
    "contrib.scale_by_galore": (
        lambda tx: contrib.scale_by_galore(rank=1, base_optimizer=tx),
        REMEDY,
    ),
    "contrib.schedule_free": (lambda tx: contrib.schedule_free(tx, 0.1), WORKS),
    "contrib.split_real_and_imaginary": (contrib.split_real_and_imaginary, WORKS),
}


@pytest.mark.parametrize("name", a_fifth(AROUND))
def test_around_a_strategy_a_wrapper_works_or_names_our_way(name):
    first = name.split(" ")[0]
    skip_unless_installed(first)
    (make, parts), params = AROUND[name], params_for(first)
    verdict(
        lambda jac: update(make(mtl.mgda(2)), jac, params),
        parts,
        lambda: update(make(optax.identity()), gradient(), params),
    )


def test_sam_that_asks_for_gradients_takes_jacobians():
    jac_fn = mtl.value_and_jac(task_losses)

    def opaque(tx, grad_fn, updates):
        return update(contrib.sam(tx, tx, opaque_mode=True), updates, grad_fn=grad_fn)

    got = opaque(mtl.mgda(2), lambda params, _: jac_fn(params)[1], jacobian())
    expected = opaque(optax.identity(), lambda params, _: aggregated(jac_fn(params)[1]), gradient())
    assert_same(got, expected)


def test_a_line_search_along_a_jacobian_names_the_pullback():
    def step(jac):
        update_, value = jac.pullback(jnp.ones(2)), total(PARAMS)
        return update(optax.lbfgs(), update_, value=value, grad=jac, value_fn=total)

    verdict(step, ("mtl_optax.Jacobian", "grad=jac.pullback"), None)


def mapped(fn):
    return lambda jac: jax.tree.map(fn, jac)


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def over_vmap(fn):
    def both(jac):
        two = jax.tree.map(lambda x: jnp.stack([x, x]), jac)
        return jax.vmap(lambda jac: aggregated(fn(jac)), axis_name="i")(two)

    return both


def over_shards(fn):
    mesh = jax.make_mesh((1,), ("i",))
    return lambda jac: jax.shard_map(
        lambda jac: aggregated(fn(jac)), mesh=mesh, in_specs=P(), out_specs=P()
    )(jac)


ONES = jnp.ones(2)
REFUSED = {
    "optax.global_norm": optax.global_norm,
    "optax.apply_updates": lambda jac: optax.apply_updates(PARAMS, jac),
    "optax.incremental_update": lambda jac: optax.incremental_update(jac, jac, 0.1),
    "optax.incremental_update of params": lambda jac: optax.incremental_update(jac, PARAMS, 0.1),
    "optax.tree.norm": optax.tree.norm,
    "optax.tree.norm, ord 1": lambda jac: optax.tree.norm(jac, ord=1),
    "optax.tree.sum": optax.tree.sum,
    "optax.tree.max": optax.tree.max,
    "optax.tree.min": optax.tree.min,
    "optax.tree.scale": lambda jac: optax.tree.scale(2.0, jac),
    "optax.tree.add": lambda jac: optax.tree.add(jac, jac),
    "optax.tree.sub": lambda jac: optax.tree.sub(jac, jac),
    "optax.tree.mul": lambda jac: optax.tree.mul(jac, jac),
    "optax.tree.div": lambda jac: optax.tree.div(jac, jac),
    "optax.tree.add_scale": lambda jac: optax.tree.add_scale(jac, 0.5, jac),
    "optax.tree.vdot": lambda jac: optax.tree.vdot(jac, jac),
    "optax.tree.cast": lambda jac: optax.tree.cast(jac, jnp.bfloat16),
    "optax.tree.clip": lambda jac: optax.tree.clip(jac, -1.0, 1.0),
    "optax.tree.where": lambda jac: optax.tree.where(jnp.bool_(True), jac, 0.0),
    "optax.tree.random_like": lambda jac: optax.tree.random_like(jax.random.key(0), jac),
    "optax.tree.update_moment": lambda jac: optax.tree.update_moment(jac, jac, 0.9, 1),
    "optax.tree.batch_shape": lambda jac: optax.tree.batch_shape(jac, (2,)),
    "optax.centralize": lambda jac: update(optax.centralize(), jac),
    "g / 2": mapped(lambda g: g / 2),
    "g * .5": mapped(lambda g: g * 0.5),
    "np.float32 * g": mapped(lambda g: np.float32(0.5) * g),
    "-g": mapped(lambda g: -g),
    "abs(g)": mapped(abs),
    "g ** 2": mapped(lambda g: g**2),
    "g @ g": mapped(lambda g: g @ g),
    "g < 0": mapped(lambda g: g < 0),
    "g.astype": mapped(lambda g: g.astype(jnp.bfloat16)),
    "g.sum()": mapped(lambda g: g.sum()),
    "g.mean()": mapped(lambda g: g.mean()),
    "g.round()": mapped(lambda g: g.round()),
    "g.argmax()": mapped(lambda g: g.argmax()),
    "g.clip()": mapped(lambda g: g.clip(-1, 1)),
    "g.at[...].set(0)": mapped(lambda g: g.at[...].set(0)),
    "g.reshape(-1)": mapped(lambda g: g.reshape(-1)),
    "g.T": mapped(lambda g: g.T),
    "jnp.isnan": mapped(jnp.isnan),
    "jnp.isfinite": mapped(jnp.isfinite),
    "jnp.where": mapped(lambda g: jnp.where(True, g, 0)),
    "jnp.round": mapped(jnp.round),
    "jnp.sign": mapped(jnp.sign),
    "jnp.square": mapped(jnp.square),
    "jnp.maximum": mapped(lambda g: jnp.maximum(g, 0)),
    "jnp.sum of leaves": mapped(jnp.sum),
    "jnp.stack of leaves": mapped(lambda g: jnp.stack([g, g])),
    "matrices": mapped(lambda x: x * 0.5 if x.ndim > 1 else x),
    "no matrices": mapped(lambda x: x * 0.5 if x.ndim < 2 else x),
    "vectors": mapped(lambda x: x * 0.5 if x.ndim == 1 else x),
    "convolutions": mapped(lambda x: x * 0.5 if x.ndim == 4 else x),
    "no scalars": mapped(lambda x: x * 0.5 if x.size > 1 else x),
    "floats, cast": mapped(lambda x: x.astype(jnp.bfloat16) if is_float(x) else x),
    "masked, matrices": lambda jac: update(optax.masked(optax.clip(0.5), matrices), jac),
    "masked, floats": lambda jac: update(
        optax.masked(halve(), lambda t: jax.tree.map(is_float, t)), jac
    ),
    "jax.tree.reduce": lambda jac: jax.tree.reduce(lambda a, b: a + jnp.sum(b**2), jac, 0.0),
    "ravel_pytree": lambda jac: jax.flatten_util.ravel_pytree(jac)[0],
    "psum in vmap": over_vmap(lambda jac: lax.psum(jac, "i")),
    "pmean in vmap": over_vmap(lambda jac: lax.pmean(jac, "i")),
    "pmax in vmap": over_vmap(lambda jac: lax.pmax(jac, "i")),
    "all_gather in vmap": over_vmap(lambda jac: lax.all_gather(jac, "i")),
    "psum over shards": over_shards(lambda jac: lax.psum(jac, "i")),
    "pmean over shards": over_shards(lambda jac: lax.pmean(jac, "i")),
    "pmax over shards": over_shards(lambda jac: lax.pmax(jac, "i")),
    "jnp.sum": jnp.sum,
    "jnp.asarray": jnp.asarray,
    "jnp.isnan of all": jnp.isnan,
    "lax.mul": lambda jac: lax.mul(jac, 2.0),
    "np.asarray": np.asarray,
    "np.array": np.array,
    "np.sum": np.sum,
    "jac + jac": lambda jac: jac + jac,
    "sum": lambda jac: sum([jac, jac]),
    "jac - jac": lambda jac: jac - jac,
    "jac * 2": lambda jac: jac * 2,
    "2 * jac": lambda jac: 2 * jac,
    "array * jac": lambda jac: ONES * jac,
    "numpy array * jac": lambda jac: np.ones(2) * jac,
    "-jac": lambda jac: -jac,
    "+jac": lambda jac: +jac,
    "jac / 2": lambda jac: jac / 2,
    "jac // 2": lambda jac: jac // 2,
    "jac % 2": lambda jac: jac % 2,
    "jac ** 2": lambda jac: jac**2,
    "2 ** jac": lambda jac: 2**jac,
    "jac @ w": lambda jac: jac @ ONES,
    "w @ jac": lambda jac: ONES @ jac,
    "jac < 1": lambda jac: jac < 1,
    "jac[0]": lambda jac: jac[0],
    "list(jac)": list,
    "abs(jac)": abs,
    "round(jac)": round,
    "float(jac)": float,
}  # fmt: skip
HARMLESS = {
    "jax.tree.map of the identity": mapped(lambda g: g),
    "jnp.asarray of leaves": mapped(jnp.asarray),
    "jnp.real": mapped(jnp.real),
    "optax.tree.real": optax.tree.real,
    "optax.scale_gradient": lambda jac: optax.scale_gradient(jac, 0.5),
    "optax.periodic_update": lambda jac: optax.periodic_update(jac, jac, jnp.int32(0), 2),
    "optax.tree.where of two": lambda jac: optax.tree.where(jnp.bool_(True), jac, jac),
    "optax.tree.cast to None": lambda jac: optax.tree.cast(jac, None),
    "lax.stop_gradient": lax.stop_gradient,
    "lax.optimization_barrier": lax.optimization_barrier,
    "jax.device_put": jax.device_put,
    "jax.block_until_ready": jax.block_until_ready,
}
# What raises nothing, since it keeps shapes and dtypes and passes over keys.
EVADING = {
    "floats, scaled": mapped(lambda x: x * 0.5 if is_float(x) else x),
    "floats, clipped": mapped(lambda x: jnp.clip(x, -0.1, 0.1) if is_float(x) else x),
    "full_like": lambda jac: optax.tree.full_like(jac, 2.0),
    "flip": mapped(jnp.flip),
}


@pytest.mark.parametrize("name", a_fifth(REFUSED))
def test_arithmetic_on_a_jacobian_says_what_to_do(name):
    def use(jac):
        result = REFUSED[name](jac)
        return aggregated(result) if isinstance(result, mtl.Jacobian) else result

    for fn in (use, jax.jit(use)):
        # JAX asserts that the operands of a product are numbers.
        refused(fn, jacobian(), error=(TypeError, ValueError, AssertionError))


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_keeps_a_jacobian(name):
    verdict(lambda jac: aggregated(HARMLESS[name](jac)), None, gradient)


def test_zeros_like_a_jacobian_are_the_jacobian_zero():
    verdict(lambda jac: aggregated(optax.tree.zeros_like(jac)), None, zeros)


@pytest.mark.parametrize("name", EVADING)
def test_what_keeps_shapes_and_dtypes_and_passes_over_keys_makes_every_number_nan(name):
    updates = jax.jit(lambda jac: aggregated(EVADING[name](jac)))(jacobian())
    assert all(jnp.all(jnp.isnan(leaf)) for leaf in jax.tree.leaves(updates))


def test_outside_of_jit_arithmetic_on_floats_alone_is_refused():
    refused(EVADING["floats, scaled"], jacobian())
