"""Which arguments are parameters, which of them are trained, and nnx modules among them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_optax as mtl
from tests.problems import a_fifth

ONES = jnp.ones(2)
X = jax.random.normal(jax.random.key(0), (5, 3))


def plain(tree):
    """The same with the numbers of its random keys."""
    is_key = lambda x: jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def assert_same(got, expected):
    # Counts and keys to the last bit; numbers but for what a version of XLA may round otherwise.
    got, expected = plain(got), plain(expected)
    chex.assert_trees_all_close(got, expected, rtol=2e-6, atol=1e-7)
    bits = lambda x: 0 if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x  # noqa: E731
    chex.assert_trees_all_equal(jax.tree.map(bits, got), jax.tree.map(bits, expected))


def summed(fn):
    return lambda *args, **kwargs: sum(fn(*args, **kwargs).values())


# argnums


def bilinear(left, right, *, factor=1.0):
    products = factor * left * right["w"]
    return {"a": jnp.sum(products), "b": jnp.sum(products**2)}


SIDES = (jnp.arange(3.0), {"w": jnp.array([1.0, -2.0, 0.5])})


@pytest.mark.parametrize("argnums", [0, 1, -1, -2, (0,), (1, 0), (0, -1), [0, 1]])
def test_argnums_are_those_of_value_and_grad(argnums):
    losses, jac = mtl.value_and_jac(bilinear, argnums=argnums)(*SIDES, factor=2.0)
    theirs = tuple(argnums) if isinstance(argnums, list) else argnums
    value, grads = jax.value_and_grad(summed(bilinear), argnums=theirs)(*SIDES, factor=2.0)
    assert sum(losses.values()) == value
    assert_same(jac.pullback(ONES), grads)


def test_argnums_go_with_aux():
    fn = lambda *args: (bilinear(*args), args[0])  # noqa: E731
    (losses, aux), jac = mtl.value_and_jac(fn, argnums=1, has_aux=True)(*SIDES)
    assert_same((losses, aux), fn(*SIDES))
    assert_same(jac.pullback(ONES), jax.grad(summed(bilinear), argnums=1)(*SIDES))


# wrt, of trees

PARAMS = {
    "trunk": jnp.full((3, 2), 0.3),
    "frozen": {"w": jnp.array([[0.5, -1.0], [1.0, 2.0]]), "b": jnp.array([0.1, -0.2])},
    "heads": {"a": jnp.array([1.0, 0.5]), "b": jnp.array([-1.0, 0.6])},
}
MASK = {"trunk": True, "frozen": False, "heads": True}  # a prefix of the parameters
FULL = {"trunk": True, "frozen": {"w": False, "b": False}, "heads": {"a": True, "b": True}}
OTHERS = {name: PARAMS[name] for name in ("trunk", "heads")}


def encode(params, x):
    h = jnp.tanh(x @ params["trunk"])
    return jnp.tanh(h @ params["frozen"]["w"] + params["frozen"]["b"][None])


def decode(params, features, x):
    targets = {"a": x[:, 0], "b": 3 * x[:, 1]}
    return {k: jnp.mean((features @ w - targets[k]) ** 2) for k, w in params["heads"].items()}


def task_losses(params, x):
    return decode(params, encode(params, x), x)


def constant(fn):
    """The function of the other parameters, in which the frozen ones are constants."""
    return lambda params, *args: fn(params | {"frozen": PARAMS["frozen"]}, *args)


def mgda_step(jac, params):
    tx = mtl.mgda(num_tasks=2)
    update, state = tx.update(jac, tx.init(params), params)
    return update, state.weights


def check_frozen(jac, expected):
    """That it is the Jacobian in which the frozen parameters are constants."""
    np.testing.assert_allclose(jac.gramian(), expected.gramian(), rtol=1e-6)
    update, weights = mgda_step(jac, PARAMS)
    other_update, other_weights = mgda_step(expected, OTHERS)
    np.testing.assert_allclose(weights, other_weights, rtol=1e-6)
    for got, of_others in [
        (jac.rows(), expected.rows()),
        (update, other_update),
        (jac.pullback(ONES), expected.pullback(ONES)),
    ]:
        assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(got["frozen"]))
        chex.assert_trees_all_close({k: got[k] for k in OTHERS}, of_others, rtol=1e-6)
    chex.assert_trees_all_equal_structs(update, PARAMS)


@pytest.mark.parametrize("wrt", [MASK, FULL, lambda params: {k: k != "frozen" for k in params}])
def test_a_frozen_leaf_is_in_no_row_no_gramian_and_no_update(wrt):
    _, jac = mtl.value_and_jac(task_losses, wrt=wrt)(PARAMS, X)
    check_frozen(jac, mtl.value_and_jac(constant(task_losses))(OTHERS, X)[1])
    # It was in the Gramian, or this says nothing.
    everywhere = mgda_step(mtl.value_and_jac(task_losses)(PARAMS, X)[1], PARAMS)[1]
    assert np.abs(everywhere - mgda_step(jac, PARAMS)[1]).max() > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"rows": "batched"},
        {"rows": "sequential"},
        {"gramian": "ghost"},
        {"gramian": "columns"},
        {"gramian": mtl.Sketch(jax.random.key(1))},
        {"shared": {"trunk": True, "frozen": True, "heads": False}},
        {"shared": None},
        {"gramian_at": {"trunk": True, "frozen": True, "heads": False}},
    ],
    ids=str,
)
def test_a_frozen_leaf_stays_out_whatever_the_options(options):
    _, jac = mtl.value_and_jac(task_losses, wrt=MASK, **options)(PARAMS, X)
    for option in {"shared", "gramian_at"} & options.keys():
        mask = options[option]
        options |= {option: mask and {k: mask[k] for k in OTHERS}}
    check_frozen(jac, mtl.value_and_jac(constant(task_losses), **options)(OTHERS, X)[1])


def test_a_frozen_leaf_stays_out_at_the_feature_level():
    _, jac = mtl.value_and_feature_jac(encode, decode, wrt=MASK)(PARAMS, X)
    expected = mtl.value_and_feature_jac(constant(encode), constant(decode))(OTHERS, X)[1]
    check_frozen(jac, expected)


def test_what_is_frozen_may_be_of_any_dtype():
    extra = {"count": jnp.int32(3), "flag": True, "key": jax.random.key(0), "z": jnp.ones(2) * 1j}

    def losses(params, x):
        noise = jax.random.normal(params["key"], x.shape) * params["count"]
        return task_losses(params, jnp.where(params["flag"], x + noise, x))

    params = PARAMS | extra
    _, jac = mtl.value_and_jac(losses, wrt=MASK | dict.fromkeys(extra, False))(params, X)
    _, expected = mtl.value_and_jac(lambda p, x: losses(p | extra, x))(PARAMS, X)
    pulled = jac.pullback(ONES)
    chex.assert_trees_all_close(pulled["heads"], expected.pullback(ONES)["heads"], rtol=1e-6)
    for name, value in extra.items():
        assert pulled[name].dtype == jnp.result_type(value)
        assert jac.rows()[name].shape == (2, *jnp.shape(value))


def train(tx, params=PARAMS, steps=3):
    opt_state = tx.init(params)
    for _ in range(steps):
        _, jac = mtl.value_and_jac(task_losses, wrt=MASK)(params, X)
        updates, opt_state = tx.update(jac, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(mtl.mgda(2), optax.adam(0.1)),
        optax.chain(mtl.ema_tasks(2), mtl.upgrad(2), optax.sgd(0.1)),
        optax.chain(mtl.graddrop(2, key=jax.random.key(0)), optax.adam(0.1)),
        mtl.multi_steps(optax.chain(mtl.mgda(2), optax.adam(0.1)), every_k=2, num_tasks=2),
        optax.chain(mtl.uwso(2), optax.adamw(0.1, mask=FULL)),
    ],
    ids=["adam", "ema_tasks", "entries", "multi_steps", "masked_decay"],
)
def test_a_frozen_leaf_does_not_move(tx):
    trained = train(tx)
    assert_same(trained["frozen"], PARAMS["frozen"])
    assert all(jnp.any(new != old) for new, old in leaves_beside(trained["heads"], PARAMS["heads"]))


def leaves_beside(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def test_weight_decay_moves_a_frozen_leaf_that_it_is_not_masked_from():
    trained = train(optax.chain(mtl.mgda(2), optax.adamw(0.1, weight_decay=0.1)))
    pairs = leaves_beside(trained["frozen"], PARAMS["frozen"])
    assert all(jnp.any(new != old) for new, old in pairs)


# What a call with nnx modules does, and does to them.


class Net(nnx.Module):
    """Features, and a head for each of two tasks."""

    def __init__(self, *features, width=4, rngs):
        self.features = nnx.Sequential(*features)
        self.a = nnx.Linear(width, 1, rngs=rngs)
        self.b = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.features(x))
        return {"a": jnp.mean((self.a(h) - 1) ** 2), "b": jnp.mean((self.b(h) + 2) ** 2)}


class Sowing(Net):
    """Keeps its features as an intermediate."""

    def __call__(self, x):
        self.sow(nnx.Intermediate, "features_seen", self.features(x))
        return super().__call__(x)


@dataclasses.dataclass
class Case:
    """Objects, and the losses of a call with them."""

    make: Callable[[nnx.Rngs], Any]  # one object, or the tuple of them
    losses: Callable[..., Any] = lambda model, x: model(x)
    argnums: int | tuple[int, ...] = 0
    wrt: Any = None

    @property
    def filter(self):
        return nnx.Param if self.wrt is None else self.wrt

    def objects(self):
        made = self.make(nnx.Rngs(0))
        return made if isinstance(made, tuple) else (made,)

    def is_trained(self, path, variable):
        here = (0,) if self.argnums == 0 else self.argnums
        return path[0] in here and nnx.filterlib.to_predicate(self.filter)(path[1:], variable)

    def trained(self, objects):
        return objects[0] if self.argnums == 0 else tuple(objects[i] for i in self.argnums)


def linear(rngs, *more):
    return [nnx.Linear(3, 4, rngs=rngs), *more]


def batch_norm(rngs):
    return Net(*linear(rngs, nnx.BatchNorm(4, rngs=rngs)), rngs=rngs)


def tied(rngs):
    layer = nnx.Linear(3, 3, rngs=rngs)
    return Net(layer, jnp.tanh, layer, width=3, rngs=rngs)


def recurrent(rngs):
    lstm = nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs), rngs=rngs)
    return Net(lambda x: x[:, None], lstm, lambda h: h[:, -1], rngs=rngs)


def attention(rngs):
    layer = nnx.MultiHeadAttention(
        2,
        3,
        qkv_features=4,
        out_features=4,
        dropout_rate=0.3,
        deterministic=False,
        decode=False,
        rngs=rngs,
    )
    return Net(lambda x: x[None], layer, lambda h: h[0], rngs=rngs)


def lora(rngs):
    layer = nnx.LoRA(3, 2, 4, base_module=nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
    layer.lora_b[...] = jnp.full(
        (2, 4), 0.1, jnp.float32
    )  # it begins at 0, where lora_a has no gradient
    return Net(layer, rngs=rngs)


def two_outputs(encoder, head, x):
    out = head(encoder(x))
    return {"a": jnp.mean((out[:, 0] - 1) ** 2), "b": jnp.mean((out[:, 1] + 2) ** 2)}


def encoder_and_head(rngs):
    encoder = nnx.Sequential(
        *linear(rngs, nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    )
    return encoder, nnx.Linear(4, 2, rngs=rngs)


def counted(model, metric, count, x):
    losses = model(x)
    metric.update(values=losses["a"])
    count[...] += 1
    return losses


NOT_THE_FEATURES = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("features")))
CASES = {
    "batch_norm": Case(batch_norm),
    "dropout": Case(lambda r: Net(*linear(r, nnx.Dropout(0.5, rngs=r)), rngs=r)),
    "recurrent": Case(recurrent),
    "attention": Case(attention),
    "lora": Case(lora, wrt=nnx.LoRAParam),
    "tied": Case(tied),
    "sown": Case(lambda r: Sowing(*linear(r), rngs=r)),
    "frozen": Case(batch_norm, wrt=NOT_THE_FEATURES),
    "two_modules": Case(encoder_and_head, two_outputs, argnums=(0, 1)),
    "kernels_of_two_modules": Case(
        encoder_and_head, two_outputs, argnums=(0, 1), wrt=nnx.PathContains("kernel")
    ),
    "one_of_two_modules": Case(encoder_and_head, two_outputs),
    "in_a_dict": Case(
        lambda r: dict(zip(("encoder", "head"), encoder_and_head(r), strict=True)),
        lambda parts, x: two_outputs(parts["encoder"], parts["head"], x),
    ),
    "rngs": Case(
        lambda r: (Net(*linear(r), rngs=r), nnx.Rngs(7)),
        lambda model, rngs, x: model(x + jax.random.normal(rngs(), x.shape)),
    ),
    "metric_and_variable": Case(
        lambda r: (Net(*linear(r), rngs=r), nnx.metrics.Average(), nnx.Variable(jnp.int32(0))),
        counted,
    ),
}  # fmt: skip
sowing = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")


@sowing
@pytest.mark.parametrize("name", a_fifth(CASES, 1))
def test_a_module_is_taken_as_nnx_value_and_grad_takes_it(name):
    case = CASES[name]
    ours, theirs = case.objects(), case.objects()
    losses, jac = mtl.value_and_jac(case.losses, argnums=case.argnums, wrt=case.wrt)(*ours, X)
    of = lambda i: nnx.DiffState(i, case.filter)  # noqa: E731
    argnums = of(0) if case.argnums == 0 else tuple(map(of, case.argnums))
    value, grads = nnx.value_and_grad(summed(case.losses), argnums=argnums)(*theirs, X)
    assert sum(losses.values()) == value
    assert_same(jac.pullback(ONES), grads)
    assert_same(nnx.state(ours), nnx.state(theirs))


@sowing
@pytest.mark.parametrize("name", a_fifth(CASES))
def test_an_nnx_optimizer_trains_it_as_a_loop_over_its_arrays_does(name):
    case = CASES[name]
    strategy = lambda: optax.chain(mtl.mgda(2), optax.sgd(0.1, momentum=0.9))  # noqa: E731
    objects, traces = case.objects(), 0
    optimizer = nnx.Optimizer(case.trained(objects), strategy(), wrt=case.filter)
    fn = mtl.value_and_jac(case.losses, argnums=case.argnums, wrt=case.wrt)

    @nnx.jit
    def step(objects, optimizer, x):
        nonlocal traces
        traces += 1
        losses, jac = fn(*objects, x)
        optimizer.update(case.trained(objects), jac)
        nnx.pop(objects, nnx.Intermediate)  # or nnx traces anew as they add up
        return losses

    history = [step(objects, optimizer, X) for _ in range(10)]
    # flax 0.12.2 traces once more for what the first call sows.
    assert traces == 1 + (case is CASES["sown"] and flax.__version__ == "0.12.2")
    assert sum(history[-1].values()) < sum(history[0].values())
    final = nnx.state(objects)

    graphdef, params, rest = nnx.split(case.objects(), case.is_trained, ...)
    tx = strategy()

    @jax.jit
    def plain_step(params, rest, opt_state, x):
        def losses_of(params):
            objects = nnx.merge(graphdef, params, rest, copy=True)
            losses = case.losses(*objects, x)
            nnx.pop(objects, nnx.Intermediate)
            return losses, nnx.split(objects, case.is_trained, ...)[2]

        (losses, rest), jac = mtl.value_and_jac(losses_of, has_aux=True)(params)
        updates, opt_state = tx.update(jac, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, losses

    opt_state = tx.init(params)
    for losses in history:
        params, rest, opt_state, expected = plain_step(params, rest, opt_state, X)
        chex.assert_trees_all_close(losses, expected, rtol=1e-4)
    merged = nnx.state(nnx.merge(graphdef, params, rest))
    chex.assert_trees_all_close(plain(final), plain(merged), rtol=1e-4, atol=1e-5)


def test_a_module_goes_through_the_feature_level():
    ours, theirs = encoder_and_head(nnx.Rngs(0)), encoder_and_head(nnx.Rngs(0))
    model, expected = (nnx.Dict(encoder=e, head=h) for e, h in (ours, theirs))
    fn = mtl.value_and_feature_jac(
        lambda model, x: model.encoder(x),
        lambda model, z, x: two_outputs(lambda _: z, model.head, x),
    )
    losses, jac = fn(model, X)
    value, grads = nnx.value_and_grad(lambda m, x: sum(two_outputs(m.encoder, m.head, x).values()))(
        expected, X
    )
    np.testing.assert_allclose(sum(losses.values()), value, rtol=1e-6)
    chex.assert_trees_all_close(jac.pullback(ONES), grads, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(
        *(plain(nnx.state(m, nnx.Not(nnx.Param))) for m in (model, expected))
    )


@pytest.mark.parametrize(
    "closed_over", [lambda teacher: teacher, nnx.state], ids=["module", "state"]
)
def test_a_module_of_an_outer_trace_may_be_read(closed_over):
    student, teacher = (nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    graphdef, outer = nnx.graphdef(teacher), closed_over(teacher)

    def distances(student, outer, x):
        teacher = nnx.merge(graphdef, outer) if isinstance(outer, nnx.State) else outer
        a, b = jnp.mean((student(x) - teacher(x)) ** 2, axis=0)
        return {"a": a, "b": b}

    step = lambda student, x: mtl.value_and_jac(distances)(student, outer, x)[0]  # noqa: E731
    expected = distances(student, outer, X)
    chex.assert_trees_all_close(nnx.jit(step)(student, X), expected, rtol=1e-6)
    scanned = jax.lax.scan(lambda _, x: (None, step(student, x)), None, X[None])[1]
    chex.assert_trees_all_close(scanned, jax.tree.map(lambda v: v[None], expected), rtol=1e-6)


def test_a_module_may_come_by_keyword():
    model, rngs = Net(*linear(nnx.Rngs(0)), rngs=nnx.Rngs(0)), nnx.Rngs(7)
    fn = lambda model, x, *, rngs: model(x + jax.random.normal(rngs(), x.shape))  # noqa: E731
    losses, _ = mtl.value_and_jac(fn)(model, x=X, rngs=rngs)
    assert_same(losses, fn(model, X, rngs=nnx.Rngs(7)))
    assert rngs.default.count[...] == 1


def test_masks_over_a_module_are_states_or_functions_of_its_state():
    model = Net(*linear(nnx.Rngs(0)), rngs=nnx.Rngs(0))
    first = lambda path, _: path[0] == "features"  # noqa: E731
    by_state = nnx.State({"features": True, "a": False, "b": False})
    for mask in (by_state, lambda params: nnx.map_state(first, params)):
        _, jac = mtl.value_and_jac(lambda model: model(X), shared=mask, gramian_at=mask)(model)
        expected = nnx.map_state(first, nnx.state(model, nnx.Param))
        assert jax.tree.leaves(jac.shared) == jax.tree.leaves(expected)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "there", [nnx.PathContains("lora_b"), lambda path, variable: "lora_b" in path]
)
def test_masks_of_a_module_may_be_filters(split, there):
    model = lora(nnx.Rngs(0))
    at = {"gramian_at": there, "shared": nnx.Not(nnx.PathContains("b"))}
    if split:  # a State of parameters by the user's own hand
        graphdef, params = nnx.split(model)
        losses = lambda params: nnx.merge(graphdef, params)(X)  # noqa: E731
        _, jac = mtl.value_and_jac(losses, wrt=nnx.LoRAParam, **at)(params)
    else:
        params = nnx.state(model, nnx.LoRAParam)
        _, jac = mtl.value_and_jac(lambda model: model(X), wrt=nnx.LoRAParam, **at)(model)
    rows = jac.rows()["features"]["layers"][0]
    seen = np.asarray(rows["lora_b"][...]).reshape(2, -1)
    np.testing.assert_allclose(jac.gramian(), seen @ seen.T, rtol=1e-5)
    assert np.any(rows["lora_a"][...])
    is_moved = [bool(np.any(leaf)) for leaf in jax.tree.leaves(jac.rows())]
    assert sum(is_moved) == 2


# Messages


class Mislabelled(Net):
    """Calls its step count a parameter."""

    def __init__(self, rngs):
        super().__init__(*linear(rngs), rngs=rngs)
        self.step = nnx.Param(jnp.int32(0))


FORGOTTEN = "further argument of the loss function"


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (
            lambda: mtl.value_and_jac(bilinear, argnums=2)(*SIDES),
            ValueError,
            ["argnums=2", "2 pos"],
        ),
        (lambda: mtl.value_and_jac(bilinear, argnums=-3)(*SIDES), ValueError, ["argnums=-3"]),
        (
            lambda: of_module(argnums=nnx.DiffState(0, nnx.LoRAParam)),
            TypeError,
            ["argnums=DiffState", "is said by wrt="],
        ),
        (
            lambda: mtl.value_and_jac(task_losses, shared=lambda path, v: True)(PARAMS, X),
            TypeError,
            ["shared=<lambda>", "no module"],
        ),
        (lambda: mtl.value_and_jac(bilinear, argnums=())(*SIDES), ValueError, ["argnums=()"]),
        (lambda: mtl.value_and_jac(bilinear, argnums=(1, -1))(*SIDES), ValueError, ["each once"]),
        (lambda: mtl.value_and_jac(bilinear)(left=1.0, right=1.0), ValueError, ["0 positional"]),
        (lambda: frozen_by(nnx.Param), TypeError, ["wrt=Param", "no module", "mask"]),
        (lambda: frozen_by(nnx.PathContains("trunk")), TypeError, ["no module", "mask"]),
        (lambda: frozen_by("trunk"), TypeError, ["wrt='trunk' holds no bool"]),
        (
            lambda: mtl.value_and_jac(task_losses, gramian_at=nnx.Param)(PARAMS, X),
            TypeError,
            ["gramian_at=Param", "no module"],
        ),
        (
            lambda: mtl.value_and_jac(
                task_losses,
                wrt={"trunk": True, "frozen": False, "heads": True},
                gramian_at={"trunk": False, "frozen": True, "heads": False},
            )(PARAMS, X),
            ValueError,
            ["gramian_at= selects none", "trained", "wrt="],
        ),
        (lambda: of_module(shared="features"), ValueError, ["shared='features' is not known"]),
        (lambda: of_module(gramian_at="b"), TypeError, ["gramian_at='b' holds no bool"]),
        (lambda: frozen_by(False), ValueError, ["wrt= selects no parameter"]),
        (lambda: frozen_by({"trunk": True}), ValueError, ["wrt= does not fit", "heads"]),
        (lambda: with_leaf(jnp.arange(3)), TypeError, ["['new']", "int32", FORGOTTEN, "wrt=mask"]),
        (lambda: with_leaf("trunk"), TypeError, ["['new']", "type str", FORGOTTEN]),
        (lambda: with_leaf("float32"), TypeError, ["['new']", "type str", FORGOTTEN]),
        (lambda: with_leaf("trunk", wrt=False), TypeError, ["['new']", "type str", FORGOTTEN]),
        (lambda: of_module(wrt={"a": True}), TypeError, ["wrt is a dict", "nnx.LoRAParam"]),
        (lambda: of_module(wrt=nnx.BatchStat), ValueError, ["no parameter is trained", "wrt="]),
        (lambda: of_module(shared={"a": True}), ValueError, ["shared= does not fit", "State"]),
        (lambda: of_module(Mislabelled), TypeError, ["['step']", "int32", FORGOTTEN]),
    ],
)
def test_mistakes_say_what_to_do(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "PyTreeDef" not in message
    assert len(message) < 600


def frozen_by(wrt):
    return mtl.value_and_jac(task_losses, wrt=wrt)(PARAMS, X)


def with_leaf(leaf, wrt=True):
    mask = dict.fromkeys(PARAMS, True) | {"new": wrt}
    return mtl.value_and_jac(task_losses, wrt=mask)(PARAMS | {"new": leaf}, X)


def of_module(make=lambda rngs: Net(*linear(rngs), rngs=rngs), **options):
    return mtl.value_and_jac(lambda model: model(X), **options)(make(nnx.Rngs(0)))


# What is shared, where it can't be read off the program


def test_a_jacrev_tree_with_a_mask_gives_each_head_its_own_row():
    grads, losses = jax.jacrev(task_losses)(PARAMS, X), task_losses(PARAMS, X)
    tx = mtl.mgda(num_tasks=2)
    mask = {"trunk": True, "frozen": True, "heads": False}
    got, state = tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses, shared=mask)
    expected, weights = mgda_step(mtl.value_and_jac(task_losses)(PARAMS, X)[1], PARAMS)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
    np.testing.assert_allclose(state.weights, weights, rtol=1e-5)
    own = {task: grads[task]["heads"][task] for task in ("a", "b")}
    chex.assert_trees_all_close(got["heads"], own, rtol=1e-6)
    everywhere, _ = tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses)
    assert jnp.abs(everywhere["heads"]["b"] - own["b"]).max() > 0.1


def stacked_losses(params):
    h = jnp.array([1.0, 2.0, -1.0]) * params["trunk"]
    return {task: (h @ head - 1) ** 2 for task, head in zip("ab", params["heads"], strict=True)}


def test_heads_stacked_in_one_leaf_are_heads_if_a_mask_says_so():
    trunk, heads = jnp.ones(3), jnp.array([[0.1, 0.2, 0.5], [-0.3, 0.1, 0.0]])
    params, apart = {"trunk": trunk, "heads": heads}, {"trunk": trunk, "heads": tuple(heads)}
    _, auto = mtl.value_and_jac(stacked_losses)(params)
    mask = {"trunk": True, "heads": False}
    _, told = mtl.value_and_jac(stacked_losses, shared=mask)(params)
    _, expected = mtl.value_and_jac(stacked_losses)(apart)
    update, weights = mgda_step(told, params)
    expected_update, expected_weights = mgda_step(expected, apart)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6)
    np.testing.assert_allclose(update["heads"], expected_update["heads"], rtol=1e-6)
    assert np.abs(mgda_step(auto, params)[1] - weights).max() > 0.01
    notes = [{leaf.name: leaf.note for leaf in jac.plan().leaves} for jac in (auto, told)]
    assert "taken as shared" in notes[0]["heads"]
    assert "shared=" in notes[0]["heads"]
    assert notes[1]["heads"] == notes[0]["trunk"] == ""


# plan()


def test_the_plan_has_a_row_for_every_parameter():
    def losses(params, x):
        h = jnp.tanh(x @ params["trunk"]) * params["frozen"]["b"][None]
        h = h * params["gains"].sum()
        return {task: jnp.mean((h @ w) ** 2) for task, w in params["heads"].items()}

    params = PARAMS | {"gains": jnp.ones(2), "unread": jnp.ones(4)}
    _, jac = mtl.value_and_jac(losses, wrt=MASK | {"gains": True, "unread": True})(params, X)
    table = jac.plan()
    kinds = {leaf.name: (leaf.trained, leaf.shared, leaf.way) for leaf in table.leaves}
    assert kinds == {
        "frozen/b": (False, False, ""),
        "frozen/w": (False, False, ""),
        "gains": (True, True, "rows"),
        "heads/a": (True, False, ""),
        "heads/b": (True, False, ""),
        "trunk": (True, True, "rows"),
        "unread": (True, False, ""),
    }
    lines = {line.split()[0]: line for line in str(table).splitlines()}
    assert [*lines] == ["parameter", *kinds, "total"]
    for name, words in {
        "frozen/w": ["(2, 2)", "frozen", "-"],
        "heads/a": ["(2,)", "head", "-"],
        "trunk": ["(3, 2)", "shared", "rows"],
        "gains": ["as many slices as tasks, taken as shared"],
        "unread": ["no loss depends on it"],
    }.items():
        assert all(word in lines[name] for word in words), lines[name]


def test_the_plan_names_variables_by_their_paths():
    model = nnx.Dict(net=Net(*linear(nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    model.pair = nnx.Param({"left": jnp.ones(3), "right": jnp.ones(3)})
    fn = lambda model: model.net(X * model.pair["left"][None])  # noqa: E731
    names = [leaf.name for leaf in mtl.value_and_jac(fn)(model)[1].plan().leaves]
    assert names[:2] == ["net/a/bias", "net/a/kernel"]
    assert names[-3:] == ["net/features/layers/0/kernel", "pair/left", "pair/right"]


def test_features_without_gradients_are_handed_on():
    def encode(w, x):
        return {"z": jnp.tanh(x @ w), "mask": x[:, 0] > 0, "key": jax.random.key(0), "none": None}

    def decode(w, features, x):
        z = features["z"] * features["mask"]
        return {"a": jnp.sum(z**2), "b": jnp.sum(z) + jax.random.normal(features["key"])}

    w, x = jnp.array([0.5, -1.0]), jnp.array([[1.0, 2.0], [-3.0, 1.0], [0.2, 0.4]])
    losses, jac = jax.jit(mtl.value_and_feature_jac(encode, decode))(w, x)
    z, mask = np.tanh(np.array(x @ w)), np.array(x[:, 0] > 0)
    features = np.stack([2 * z * mask, mask])
    np.testing.assert_allclose(jac.gramian(), features @ features.T, rtol=1e-6)
    wanted = jax.jacrev(lambda w: decode(w, encode(w, x), x))(w)
    np.testing.assert_allclose(jac.rows(), jnp.stack([wanted["a"], wanted["b"]]), rtol=1e-5)
    assert losses.keys() == {"a", "b"}


@pytest.mark.parametrize("mask", ["trunk", 3, {"w": "yes", "a": False, "b": False}])
def test_a_mask_holds_bools(mask):
    params = {name: jnp.ones(3) for name in ("w", "a", "b")}
    losses = lambda p: {n: jnp.sum((p["w"] * p[n] - 2) ** 2) for n in ("a", "b")}  # noqa: E731
    with pytest.raises(TypeError, match="holds no bool, expected True or False"):
        mtl.value_and_jac(losses, gramian_at=mask)(params)
