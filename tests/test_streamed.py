"""The streamed Gramian: exact wherever the layers are, one layer held, and what a step then costs.

python -m tests.test_streamed    what steps of UPGrad take, in plain steps
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl
from benchmarks.flops import flops
from mtl_optax._compat import body_of, is_jaxpr
from mtl_optax.jacobian.ways import auto
from tests.problems import a_fifth, relative_error


def block(h, layer):
    return h + jnp.tanh(h @ layer["up"] + layer["bias"][None]) @ layer["down"]


def in_turn(h, layers, block=block):
    for layer in layers:
        h = block(h, layer)
    return h


def unstacked(stack):
    one = lambda i: jax.tree.map(lambda w: w[i], stack)  # noqa: E731
    return [one(i) for i in range(len(stack["up"]))]


def scanned(h, stack, block=block, **options):
    return jax.lax.scan(lambda h, layer: (block(h, layer), None), h, stack, **options)[0]


def either(h, layer):
    others = [block, lambda h, layer: h @ layer["up"] @ layer["down"]]
    return jax.lax.switch(jnp.argmax(h[0, :2]), others, h, layer)


# A trunk as it may be written; those of a list take the layers, the others their stack.
TRUNKS = {
    "list": in_turn,
    "list, remat": lambda h, layers: in_turn(h, layers, jax.checkpoint(block)),
    "w[i]": lambda h, stack: in_turn(h, unstacked(stack)),
    "w[i], remat": lambda h, stack: in_turn(h, unstacked(stack), jax.checkpoint(block)),
    "scan": scanned,
    "scan, remat": lambda h, stack: scanned(h, stack, jax.checkpoint(block)),
    "scan of jit": lambda h, stack: scanned(h, stack, jax.jit(block)),
    "scan of switch": lambda h, stack: scanned(h, stack, either),
    "scan, reversed": lambda h, stack: scanned(h, stack, reverse=True, unroll=2),
    "remat of scan": lambda h, stack: jax.checkpoint(scanned)(h, stack),
    "cond": lambda h, stack: jax.lax.cond(
        jnp.sum(h) > 0, scanned, lambda h, stack: in_turn(h, unstacked(stack)), h, stack
    ),
}
SHARED = {"trunk": True, "heads": False}


def network(trunk, num_tasks=4, width=8, hidden=12, batch=4, depth=2, dtype=jnp.float32):
    """Losses, parameters and a batch of a residual network."""
    rng = np.random.default_rng(0)

    def draw(*shape, scale):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    stack = {
        "up": draw(depth, width, hidden, scale=width**-0.5),
        "bias": draw(depth, hidden, scale=0.1),
        "down": draw(depth, hidden, width, scale=hidden**-0.5),
    }
    params = {
        "trunk": unstacked(stack) if trunk.startswith("list") else stack,
        "heads": draw(num_tasks, width, scale=0.5),
    }

    def losses(params, x):
        h = TRUNKS[trunk](x, params["trunk"])
        return [jnp.mean(jnp.sin(h @ params["heads"][k] + k) ** 2) for k in range(num_tasks)]

    return losses, params, draw(batch, width, scale=1)


def matrix(losses, params, *args, only=None):
    """The Jacobian (K, P) of some losses by some parameters, by `jax.jacrev` in float64."""
    with jax.enable_x64(True):
        wide = lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        params, args = jax.tree.map(wide, (params, args))
        part = {name: params[name] for name in only or params}
        every = lambda part: jnp.stack([*losses(params | part, *args)])  # noqa: E731
        rows = jax.tree.leaves(jax.jit(jax.jacrev(every))(part))
        return np.concatenate([np.reshape(r, (len(r), math.prod(r.shape[1:]))) for r in rows], 1)


def streamed(losses, *args, **options):
    """The Gramian, and the plan of it."""
    plans = []

    def read(*args):
        _, jac = mtl.value_and_jac(losses, gramian="streamed", **options)(*args)
        plans.append(jac.plan())
        return jac.gramian()

    return np.asarray(jax.jit(read)(*args)), plans[0]


@pytest.mark.parametrize("trunk", a_fifth(TRUNKS))
def test_it_is_exact_wherever_the_layers_are(trunk):
    with jax.enable_x64(True):
        losses, params, x = network(trunk, dtype=jnp.float64)
        gramian, plan = streamed(losses, params, x, shared=SHARED)
        rows = matrix(losses, params, x, only=["trunk"])
    assert relative_error(gramian, rows @ rows.T) < 1e-13
    ways = {leaf.name.split("/")[-1]: leaf.way for leaf in plan.leaves}
    assert ways["up"] == ways["down"] == "streamed ghost"
    assert ways["bias"] == "streamed rows"


def test_the_plan_counts_all_layers_and_holds_one():
    losses, params, x = network("scan, remat")
    leaf = {leaf.name: leaf for leaf in streamed(losses, params, x, shared=SHARED)[1].leaves}
    depth, n, c, f, k = 2, 4, 8, 12, 4
    assert leaf["trunk/up"].multiplications == depth * (n * n * c + k * n * f * (n + k))
    assert leaf["trunk/up"].bytes_held == 4 * k * n * f
    assert leaf["trunk/bias"].multiplications == depth * k * k * f
    assert leaf["trunk/bias"].bytes_held == 4 * k * f


def transformer(params, tokens, width=16):
    """Four losses of a language model whose blocks are scanned and computed again."""
    dtype = params["embedding"].dtype

    def norm(h, gain):
        unit = h * jax.lax.rsqrt(jnp.mean(h.astype(jnp.float32) ** 2, -1, keepdims=True) + 1e-3)
        return unit.astype(dtype) * gain[None, None]

    def block(h, layer):
        q, k, v = jnp.einsum("btd,dshe->sbhte", norm(h, layer["gain"][0]), layer["qkv"])
        scores = jnp.einsum("bhqe,bhke->bhqk", q, k) / 2
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        attention = jax.nn.softmax(jnp.where(causal, scores, -1e9).astype(jnp.float32))
        mixed = jnp.einsum("bhqk,bhke->bqhe", attention.astype(dtype), v)
        h = h + jnp.einsum("bqhe,hed->bqd", mixed, layer["out"])
        return h + jax.nn.gelu(norm(h, layer["gain"][1]) @ layer["up"]) @ layer["down"], None

    h = params["embedding"][tokens]
    h, _ = jax.lax.scan(jax.checkpoint(block), h, params["blocks"])
    logits = jnp.einsum("btd,vd->btv", h, params["embedding"]).astype(jnp.float32)
    chance = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    return [-jnp.mean(chance[:, i::4]) * 3**i for i in range(4)]


@pytest.mark.long
def test_a_scanned_transformer_in_bfloat16():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    draw = lambda *shape: jax.random.normal(next(keys), shape, jnp.bfloat16) / 4  # noqa: E731
    blocks = {
        "gain": 1 + draw(3, 2, 16),
        "qkv": draw(3, 16, 3, 2, 8),
        "out": draw(3, 2, 8, 16),
        "up": draw(3, 16, 32),
        "down": draw(3, 32, 16),
    }
    params = {"embedding": draw(40, 16), "blocks": blocks}
    tokens = jax.random.randint(next(keys), (2, 8), 0, 40)
    gramian, plan = streamed(transformer, params, tokens)
    rows = matrix(transformer, params, tokens)
    by_rows = jax.jit(lambda p: mtl.value_and_jac(transformer)(p, tokens)[1].gramian())(params)
    assert all(leaf.way.startswith("streamed") for leaf in plan.leaves)
    error = relative_error(by_rows, rows @ rows.T)
    assert relative_error(gramian, rows @ rows.T) < max(2 * error, 0.01)


def test_absent_tasks_have_no_part_even_where_the_trunk_is_not_finite():
    def losses(params, x):
        h = jnp.tanh(x @ params["w"])
        broken = jnp.log(h @ params["v"] - 1e3)  # NaN, in two of the tasks
        a, b = jnp.mean(h**2), jnp.mean(jnp.sin(h))
        return [a, jnp.mean(broken), b, jnp.sum(broken), b * jnp.nan]

    x = jax.random.normal(jax.random.key(0), (5, 6))
    params = {name: jnp.eye(6) + 0.1 for name in "wv"}
    present = np.array([True, False, True, False, False])

    def read(params):
        _, jac = mtl.value_and_jac(losses, gramian="streamed")(params, x)
        kept = jac.keep(jnp.asarray(present))
        return jac.keep(jac.finite_tasks()).gramian(), kept.gramian(), kept.combine(jnp.ones(5))

    found, kept, update = jax.jit(read)(params)
    rows = np.zeros((5, 72))
    rows[present] = matrix(lambda *args: losses(*args)[:3:2], params, x)
    for gramian in (found, kept):
        assert relative_error(gramian, rows @ rows.T) < 1e-5
        assert not np.any(gramian[~present])
        assert not np.any(gramian[:, ~present])
    assert relative_error(np.concatenate([np.ravel(update[n]) for n in "vw"]), rows.sum(0)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(jnp.float16, 1), (jnp.bfloat16, 1e-12), (jnp.float32, 1e-15), (jnp.float32, 1e15)],
)
def test_any_scale_of_the_losses_in_any_precision(dtype, scale):
    losses, params, x = network("scan", dtype=dtype)
    scaled = lambda params, x: [scale * loss.astype(jnp.float32) for loss in losses(params, x)]  # noqa: E731

    @jax.jit
    def read(params):
        _, jac = mtl.value_and_jac(scaled, gramian="streamed", shared=SHARED)(params, x)
        return jac.correlation()

    cosines, norms = read(params)
    rows = matrix(scaled, params, x, only=["trunk"])
    expected = np.linalg.norm(rows, axis=1)
    tolerance = 0.05 if dtype != jnp.float32 else 1e-5
    assert relative_error(norms, expected) < tolerance
    assert np.max(np.abs(cosines - rows @ rows.T / np.outer(expected, expected))) < tolerance


def complex_features(params, x):
    spectrum = jnp.fft.fft(x @ params["w"]) * jax.lax.complex(params["b"], params["b"] ** 2)[None]
    return [jnp.mean(jnp.abs(spectrum)), jnp.mean(jnp.imag(spectrum)), jnp.sum(jnp.real(spectrum))]


def read_by_heads_too(params, x):
    h = jnp.tanh(x @ params["w"])
    return [
        jnp.mean((h @ params["w"]) ** 2),
        jnp.mean(jnp.sin(h)) + jnp.sum(params["b"] ** 2),
        jnp.mean(h * params["b"][None]),
    ]


def empty_and_unread(params, x):
    h = x @ params["w"] + jnp.sum(params["empty"])
    return [jnp.mean(h), jnp.mean(h**2), jnp.max(h)]


def recurrent(params, x):
    """Live inputs that are scanned over, beside layers that are."""
    xs = jnp.tanh(x @ params["w"]).reshape(5, 1, 6)
    stack = jnp.broadcast_to(params["b"][None, :, None], (5, 6, 6)) * 0.3

    def step(state, slices):
        w, x, layer = slices
        state = jnp.tanh(state @ params["w"] + x + state @ w) @ layer
        return state, jnp.sum(state)

    state, sums = jax.lax.scan(step, jnp.ones((1, 6)), (params["stack"], xs, stack))
    return [jnp.mean(state), jnp.mean(sums**2), jnp.sum(jnp.sin(sums))]


def alone(params, x):
    return [jnp.mean(jnp.tanh(x @ params["w"]) @ params["b"])]


@pytest.mark.parametrize(
    ("losses", "measured"),
    [
        (complex_features, None),
        (read_by_heads_too, None),
        (empty_and_unread, None),
        (recurrent, None),
        (recurrent, "w"),
        (recurrent, "stack"),
        (alone, None),
    ],
)
def test_what_is_not_a_plain_layer(losses, measured):
    with jax.enable_x64(True):
        params = {
            "b": jnp.linspace(-1, 1, 6),
            "empty": jnp.zeros((0, 3)),
            "stack": jax.random.normal(jax.random.key(1), (5, 6, 6)),
            "w": jax.random.normal(jax.random.key(2), (6, 6)),
        }
        x = jax.random.normal(jax.random.key(0), (5, 6))
        here = {name: measured in (name, None) for name in params}
        gramian, _ = streamed(losses, params, x, shared=None, gramian_at=here)
        rows = matrix(losses, params, x, only=[name for name in params if here[name]])
    expected = rows @ rows.T
    assert np.max(np.abs(gramian - expected)) <= 1e-12 * max(np.max(np.abs(expected)), 1e-3)


def test_it_can_be_vmapped_scanned_and_put_under_cond():
    losses, params, x = network("scan, remat")
    seeds = jnp.stack([x, x[::-1] + 1, 2 * x])

    def read(params, x):
        return mtl.value_and_jac(losses, gramian="streamed", shared=SHARED)(params, x)[1].gramian()

    def under_cond(carry, x):
        return carry, jax.lax.cond(x[0, 0] > -9, read, lambda *_: jnp.zeros((4, 4)), params, x)

    expected = np.stack([jax.jit(read)(params, x) for x in seeds])
    for one_by_one in (
        jax.jit(jax.vmap(read, (None, 0))),
        jax.vmap(jax.jit(read), (None, 0)),
        jax.jit(lambda params, seeds: jax.lax.scan(under_cond, 0, seeds)[1]),
    ):
        assert relative_error(one_by_one(params, seeds), expected) < 1e-6


# What a step takes.


def bodies(eqn):
    """The jaxprs that an equation calls."""
    for value in eqn.params.values():
        yield from filter(is_jaxpr, value if type(value) is tuple else (value,))


def shapes(jaxpr):
    """The shapes of all that it computes."""
    for eqn in body_of(jaxpr).eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for body in bodies(eqn):
            yield from shapes(body)


def steps(trunk, num_tasks):
    """A plain step and one of UPGrad, and their arguments."""
    losses, params, x = network(trunk, num_tasks, width=256, hidden=512, batch=32, depth=6)
    upgrad = mtl.upgrad(num_tasks)

    def plain(params, x):
        return jax.grad(lambda params: sum(losses(params, x)))(params)

    def step(params, x):
        read = mtl.value_and_jac(losses, gramian="streamed", shared=SHARED)
        return upgrad.update(read(params, x)[1], upgrad.init(params), params)[0]

    return plain, step, (params, x)


def temporary(fn, *args):
    analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


@pytest.mark.parametrize(
    ("trunk", "num_tasks", "batch", "way"),
    a_fifth(
        [
            ("list", 4, 4, "ghost"),
            ("list, remat", 4, 4, "streamed ghost"),
            ("w[i]", 4, 4, "streamed ghost"),
            ("scan, remat", 4, 4, "streamed ghost"),
            ("scan", 2, 64, "rows"),  # more examples than inputs: a pass more saves nothing
            ("scan", 12, 64, "streamed rows"),
        ]
    ),
)
def test_auto_streams_where_that_saves_what_it_takes(trunk, num_tasks, batch, way, monkeypatch):
    losses, params, x = network(trunk, num_tasks, batch=batch)
    _, small = mtl.value_and_jac(losses, shared=SHARED)(params, x)
    assert all(leaf.way == "rows" for leaf in small.plan().leaves if leaf.shared)
    monkeypatch.setattr(auto, "SMALL", 0)
    _, jac = mtl.value_and_jac(losses, shared=SHARED)(params, x)
    leaf = {leaf.name.split("/")[-1]: leaf for leaf in jac.plan().leaves}
    assert leaf["up"].way == way
    chosen = "streamed" if way.startswith("streamed") else "ghost"
    _, alike = mtl.value_and_jac(losses, shared=SHARED, gramian=chosen)(params, x)
    np.testing.assert_array_equal(jac.gramian(), alike.gramian())


@pytest.mark.parametrize("trunk", ["list, remat", "w[i]", "scan", "scan, remat"])
def test_a_step_of_upgrad_takes_two_and_a_half_plain_steps(trunk):
    plain, step, args = steps(trunk, 4)
    traced = jax.make_jaxpr(step)(*args)
    assert flops(step, *args) < 2.51 * flops(plain, *args)
    # Four gradients of a layer, or of all layers, are never formed.
    assert not [s for s in shapes(traced) if math.prod(s) >= 4 * 256 * 512 and s[0] == 4]


def test_a_step_of_upgrad_holds_one_layer():
    plain, step, args = steps("scan, remat", 4)
    layer = 2 * 256 * 512 * 4
    assert temporary(step, *args) < temporary(plain, *args) + 1.1 * layer


def test_auto_leaves_what_cannot_be_mapped_to_ghost():
    sizes, x = jnp.array([6, 10]), jax.random.normal(jax.random.key(0), (16, 128))
    params = jax.random.normal(jax.random.key(1), (3, 2, 128, 128)) / 20

    def losses(p, x):
        layer = lambda h, w: (jnp.tanh(jax.lax.ragged_dot(h, w, sizes)), None)  # noqa: E731
        h, _ = jax.lax.scan(jax.checkpoint(layer), x, p)
        return [jnp.mean(h**2), jnp.sum(h), jnp.mean(jnp.sin(h))]

    gramians = [
        mtl.value_and_jac(losses, gramian=way)(params, x)[1].gramian() for way in ("auto", "rows")
    ]
    np.testing.assert_allclose(*gramians, rtol=1e-4, atol=1e-6)
    with pytest.raises(NotImplementedError, match='use gramian="ghost"'):
        mtl.value_and_jac(losses, gramian="streamed")(params, x)[1].gramian()


def main():
    for num_tasks in (4, 10):
        for trunk in ("list", "list, remat", "w[i]", "w[i], remat", "scan", "scan, remat"):
            plain, step, args = steps(trunk, num_tasks)
            times = flops(step, *args) / flops(plain, *args)
            held, before = temporary(step, *args), temporary(plain, *args)
            print(
                f"K = {num_tasks:2}  {trunk:12} {times:.3f} plain steps, "
                f"{held / 1e6:5.2f} MB held, plain {before / 1e6:5.2f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
