"""Multi-task architectures: forward passes by hand, who owns which parameter, transformations."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_optax import models

# Few distinct widths, since making an initialiser compile is most of the time here.
WIDTH, EXPERTS, TASKS = 4, (4, 4), ("a", "b", "c")
HEADS = {"c": 2, "a": 2, "b": (4, 2)}
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, WIDTH)), jnp.float32)
FACTORIES = {
    "hard_sharing": lambda heads=HEADS, **kw: models.HardSharing((4, 4, 4), heads, **kw),
    "hierarchical": lambda heads=HEADS, **kw: models.Hierarchical(
        (4, 4), heads, parents={"a": ("b",), "c": ("a", "b")}, **kw
    ),
    "hierarchical_hidden": lambda heads=HEADS, **kw: models.Hierarchical(
        (4, 4),
        dict.fromkeys(heads, (4, 2)),
        parents={"a": "b", "c": ("a", "b")},
        feed="hidden",
        **kw,
    ),
    "mmoe": lambda heads=HEADS, **kw: models.MMoE(
        (4, 4), heads, experts=EXPERTS, num_experts=3, **kw
    ),
    "cgc": lambda heads=HEADS, **kw: models.PLE(4, heads, experts=4, num_shared_experts=2, **kw),
    "ple": lambda heads=HEADS, **kw: models.PLE(
        (4, 4), heads, experts=4, num_task_experts={"a": 1, "b": 2, "c": 1}, num_levels=3, **kw
    ),
}


def make(name, seed=0, **kwargs):
    """A smooth model with generic parameters: no dead units and no zero biases."""
    model = FACTORIES[name](activation=jnp.tanh, rngs=nnx.Rngs(seed), **kwargs)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.7, p.dtype), nnx.state(model)
    )
    nnx.update(model, params)
    return model


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)


def flat(model):
    """Parameters by path, as NumPy arrays."""
    state = nnx.to_pure_dict(nnx.state(model))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {"/".join(str(k.key) for k in path): np.asarray(leaf) for path, leaf in leaves}


# ---- the forward passes, by hand ------------------------------------------------------------


def dense(p, prefix, x, expert=...):
    y = x @ p[f"{prefix}/kernel"][expert]
    return y + p[f"{prefix}/bias"][expert] if f"{prefix}/bias" in p else y


def stack(p, prefix, x, *, final, expert=...):
    """Layers with tanh between them, and after the last one if `final`."""
    depth = sum(key.startswith(f"{prefix}/layers/") and key.endswith("kernel") for key in p)
    for i in range(depth):
        x = dense(p, f"{prefix}/layers/{i}", x, expert)
        x = np.tanh(x) if final or i < depth - 1 else x
    return x


def head(p, task, x):
    if f"heads/{task}/kernel" in p:
        return dense(p, f"heads/{task}", x)
    return stack(p, f"heads/{task}", x, final=False)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def experts(p, prefix, x):
    """Expert outputs, one after the other: a list of (batch, width)."""
    num = p[f"{prefix}/stack/layers/0/kernel"].shape[0]
    return [stack(p, f"{prefix}/stack", x, final=True, expert=e) for e in range(num)]


def gated(p, prefix, x, outputs):
    weights = softmax(dense(p, prefix, x))
    return sum(weights[:, [e]] * output for e, output in enumerate(outputs))


def hard_sharing_by_hand(p, x):
    h = stack(p, "encoder", x, final=True)
    return {task: head(p, task, h) for task in TASKS}


def hierarchical_by_hand(p, x):
    h = stack(p, "encoder", x, final=True)
    b = head(p, "b", h)
    a = head(p, "a", np.concatenate([h, b], 1))
    return {"a": a, "b": b, "c": head(p, "c", np.concatenate([h, a, b], 1))}


def hierarchical_hidden_by_hand(p, x):
    h = stack(p, "encoder", x, final=True)

    def hidden(task, inputs):
        return np.tanh(dense(p, f"heads/{task}/layers/0", inputs))

    z = {"b": hidden("b", h)}
    z["a"] = hidden("a", np.concatenate([h, z["b"]], 1))
    z["c"] = hidden("c", np.concatenate([h, z["a"], z["b"]], 1))
    return {task: dense(p, f"heads/{task}/layers/1", z[task]) for task in TASKS}


def mmoe_by_hand(p, x):
    h = stack(p, "encoder", x, final=True)
    outputs = experts(p, "experts", h)
    return {task: head(p, task, gated(p, f"gates/{task}", h, outputs)) for task in TASKS}


def cgc_by_hand(p, x):
    shared = experts(p, "levels/0/shared_experts", x)
    return {
        task: head(
            p,
            task,
            gated(
                p,
                f"levels/0/gates/{task}",
                x,
                experts(p, f"levels/0/task_experts/{task}", x) + shared,
            ),
        )
        for task in TASKS
    }


def ple_by_hand(p, x):
    s = stack(p, "encoder", x, final=True)
    h = dict.fromkeys(TASKS, s)
    for level in ("levels/0", "levels/1", "levels/2"):
        own = {task: experts(p, f"{level}/task_experts/{task}", h[task]) for task in TASKS}
        shared = experts(p, f"{level}/shared_experts", s)
        if level != "levels/2":
            s = gated(p, f"{level}/shared_gate", s, own["a"] + own["b"] + own["c"] + shared)
        h = {t: gated(p, f"{level}/gates/{t}", h[t], own[t] + shared) for t in TASKS}
    return {task: head(p, task, h[task]) for task in TASKS}


BY_HAND = {
    "hard_sharing": hard_sharing_by_hand,
    "hierarchical": hierarchical_by_hand,
    "hierarchical_hidden": hierarchical_hidden_by_hand,
    "mmoe": mmoe_by_hand,
    "cgc": cgc_by_hand,
    "ple": ple_by_hand,
}

# ---- the tasks whose losses reach a parameter, as the docstrings say ------------------------


def own_task(path):
    return {next(part for part in path.split("/") if part in TASKS)}


def hierarchical_tasks(path):
    downstream = {"b": {"a", "b", "c"}, "a": {"a", "c"}, "c": {"c"}}
    return set(TASKS) if path.startswith("encoder") else downstream[own_task(path).pop()]


def ple_tasks(path):
    level = int(path.split("/")[1]) if path.startswith("levels") else None
    own = (
        path.startswith("heads")
        or ("/task_experts/" in path and level == 2)
        or ("/gates/" in path and level >= 1)
    )
    return own_task(path) if own else set(TASKS)


TASKS_OF = {
    "hard_sharing": lambda p: own_task(p) if p.startswith("heads") else set(TASKS),
    "hierarchical": hierarchical_tasks,
    "hierarchical_hidden": lambda p: own_task(p) if "layers/1" in p else hierarchical_tasks(p),
    "mmoe": lambda p: own_task(p) if p.startswith(("heads", "gates")) else set(TASKS),
    "cgc": lambda p: set(TASKS) if "shared_experts" in p else own_task(p),
    "ple": ple_tasks,
}


def tasks_by_gradient(model):
    """For each parameter, the tasks whose loss has a gradient for every entry of it."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def rows(params):
        def losses(params):
            outputs = nnx.merge(graphdef, params)(X)
            return {task: jnp.sum(jnp.sin(y)) for task, y in outputs.items()}

        return jax.jacrev(losses)(params)

    reached = {}
    for task, row in rows(params).items():
        leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(row))[0]
        for path, leaf in leaves:
            name = "/".join(str(k.key) for k in path)
            assert (leaf != 0).all() or (leaf == 0).all(), name
            reached.setdefault(name, set()).update({task} if (leaf != 0).all() else ())
    return reached


@pytest.mark.parametrize("name", FACTORIES)
def test_model(name):
    """One model of each kind through everything that all of them must do."""
    model = make(name)
    graphdef, params = nnx.split(model)

    @jax.jit
    def apply(params, x):
        return nnx.merge(graphdef, params)(x)

    outputs = apply(params, X)
    assert tuple(outputs) == model.tasks == TASKS
    expected = BY_HAND[name](flat(model), np.asarray(X))
    for task in TASKS:
        assert outputs[task].shape == (5, 2)
        assert_close(outputs[task], expected[task])

    # The order in which the user wrote the heads changes nothing, initial parameters included.
    other = FACTORIES[name](heads=dict(sorted(HEADS.items())), rngs=nnx.Rngs(0))
    jax.tree.map(
        np.testing.assert_array_equal, flat(FACTORIES[name](rngs=nnx.Rngs(0))), flat(other)
    )

    # Traced as a constant, where a model that writes to itself would fail.
    assert jax.eval_shape(lambda x: model(x), X) == jax.eval_shape(apply, params, X)

    # Several seeds in one program.
    others = nnx.state(make(name, seed=1))
    both = jax.tree.map(lambda *p: jnp.stack(p), params, others)
    by_seed = jax.jit(jax.vmap(apply, (0, None)))(both, X)
    for task in TASKS:
        assert_close(by_seed[task][0], outputs[task])
        assert (by_seed[task][1] != outputs[task]).all()


@pytest.mark.parametrize("name", FACTORIES)
def test_parameters_belong_to_the_documented_tasks(name):
    model = make(name)
    reached = tasks_by_gradient(model)
    assert reached == {path: TASKS_OF[name](path) for path in flat(model)}


def test_stop_gradient_makes_every_head_its_own():
    model = models.Hierarchical(
        (4, 4),
        dict.fromkeys(TASKS, 2),
        parents={"a": "b", "c": ("a", "b")},
        stop_gradient=True,
        activation=jnp.tanh,
        rngs=nnx.Rngs(0),
    )
    expected = {p: TASKS_OF["hard_sharing"](p) for p in flat(model)}
    assert tasks_by_gradient(model) == expected


@pytest.mark.parametrize(("name", "levels"), [("mmoe", 1), ("cgc", 1), ("ple", 3)])
def test_gate_weights_sum_to_one(name, levels):
    model = make(name)
    weights = model.gate_weights(X)
    assert tuple(weights) == TASKS
    assert all(len(w) == levels for w in weights.values()) or name == "mmoe"
    gates = jax.tree.leaves(weights)
    if name == "ple":
        shared = model.shared_gate_weights(X)
        assert [w.shape for w in shared] == [(5, 5), (5, 5)]  # 1 + 2 + 1 of the tasks, 1 shared
        assert [w.shape for w in weights["b"]] == [(5, 3)] * 3
        gates += shared
    for gate in gates:
        assert (np.asarray(gate) > 0).all()
        np.testing.assert_allclose(gate.sum(-1), np.ones(5), rtol=1e-6)


def test_mmoe_with_one_expert_is_hard_sharing():
    mmoe = models.MMoE(4, HEADS, experts=(4, 4), num_experts=1, rngs=nnx.Rngs(0))
    graphdef, stacked = nnx.split(mmoe.experts.stack)
    expert = nnx.merge(graphdef, jax.tree.map(lambda p: p[0], stacked))
    shared = models.HardSharing(expert, mmoe.heads, rngs=nnx.Rngs(1))
    jax.tree.map(assert_close, mmoe(X), shared(X))


def count(model):
    return sum(p.size for p in jax.tree.leaves(nnx.state(model)))


def test_number_of_parameters():
    def mlp(*sizes):
        return sum((i + 1) * o for i, o in pairwise(sizes))

    heads, head = {"a": 2, "b": 2}, mlp(4, 2)
    rngs = nnx.Rngs(0)
    assert count(models.HardSharing((4, 4, 4), heads, rngs=rngs)) == mlp(4, 4, 4) + 2 * head
    fed = models.Hierarchical((4, 4), heads, parents={"b": "a"}, rngs=rngs)
    assert count(fed) == mlp(4, 4) + head + mlp(4 + 2, 2)
    mmoe = models.MMoE((4, 4), heads, experts=(4, 4), num_experts=3, rngs=rngs)
    assert count(mmoe) == mlp(4, 4) + 3 * mlp(4, 4, 4) + 2 * (4 * 3) + 2 * head
    ple = models.PLE(
        4, heads, experts=4, num_task_experts=2, num_shared_experts=3, num_levels=2, rngs=rngs
    )
    level = (2 * 2 + 3) * mlp(4, 4) + 2 * (4 * (2 + 3))
    assert count(ple) == 2 * level + 4 * (2 * 2 + 3) + 2 * head


@pytest.mark.parametrize("name", FACTORIES)
def test_dtypes_are_kept(name):
    def run(x):
        model = FACTORIES[name](rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        return nnx.state(model), model(x)

    leaves = jax.tree.leaves(jax.eval_shape(run, X.astype(jnp.bfloat16)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_models_are_made_and_run_under_vmap():
    def init(key):
        return nnx.state(models.MMoE(4, {"a": 4}, experts=4, num_experts=2, rngs=nnx.Rngs(key)))

    keys = jax.random.split(jax.random.key(0), 3)
    one = models.MMoE(4, {"a": 4}, experts=4, num_experts=2, rngs=nnx.Rngs(keys[1]))
    params = jax.vmap(init)(keys)
    outputs = jax.vmap(lambda p: nnx.merge(nnx.graphdef(one), p)(X)["a"])(params)
    assert outputs.shape == (3, 5, 4)
    assert_close(outputs[1], one(X)["a"])
    assert (outputs[0] != outputs[1]).any()


class Pool(nnx.Module):
    """An encoder without `out_features`, of two inputs, for images."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (2, 2), rngs=rngs)

    def __call__(self, image, *, scale):
        return scale * self.conv(image).mean((-3, -2))


def test_modules_of_any_kind_may_be_encoder_experts_and_heads():
    class Normalized(nnx.Module):
        """An expert with state beyond parameters."""

        def __init__(self, features, rngs):
            self.linear = nnx.Linear(features, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.out_features = 4

        def __call__(self, x):
            return self.norm(self.linear(x))

    rngs = nnx.Rngs(0)
    heads = {"a": lambda h: h.sum(-1), "b": 2}
    images = jnp.ones((5, 6, 6, 1))
    different = [nnx.Linear(4, 4, rngs=rngs), models.MLP((4, 4, 4), rngs=rngs)]
    for model in (
        models.HardSharing(Pool(rngs), heads, features=4, rngs=rngs),
        models.MMoE(Pool(rngs), heads, experts=different, features=4, rngs=rngs),
        models.MMoE(Pool(rngs), heads, experts=Normalized, num_experts=2, features=4, rngs=rngs),
    ):
        outputs = model(images, scale=2.0)
        assert {task: y.shape for task, y in outputs.items()} == {"a": (5,), "b": (5, 2)}
    # The batch statistics of the last model's experts have moved: they are not stacked.
    means = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    assert len(means) == 4
    assert any((m != 0).any() and (m != 1).any() for m in means)


def test_a_hidden_feed_takes_any_module_with_hidden_and_readout():
    class Head(nnx.Module):
        hidden_features = 4

        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def hidden(self, x):
            return self.linear(x)

        def readout(self, hidden):
            return hidden.sum(-1, keepdims=True)

    rngs = nnx.Rngs(0)
    model = models.Hierarchical(
        4, {"hard": 2, "easy": Head(rngs)}, parents={"hard": "easy"}, feed="hidden", rngs=rngs
    )
    outputs = model(X)
    z = X @ model.heads["easy"].linear.kernel[...]
    assert_close(outputs["easy"][:, 0], z.sum(-1))
    assert_close(outputs["hard"], jnp.concatenate([X, z], 1) @ model.heads["hard"].kernel[...])


def test_experts_may_return_sequences():
    model = models.MMoE(4, {"a": 2}, experts=4, num_experts=2, rngs=nnx.Rngs(0))
    sequences = jnp.stack([X, 2 * X])
    assert model(sequences)["a"].shape == (2, 5, 2)
    assert_close(model(sequences)["a"][0], model(X)["a"])
    assert model(X[0])["a"].shape == (2,)


def test_task_names_may_be_names_of_module_attributes():
    names = ("eval", "items", "a/b", "shared", "train")
    model = models.HardSharing(4, dict.fromkeys(names, 2), rngs=nnx.Rngs(0))
    assert tuple(nnx.jit(lambda m, x: m(x))(model, X)) == tuple(sorted(names))


def small(cls, heads=None, **kwargs):
    return cls(
        kwargs.pop("encoder", 4),
        {"a": 2, "b": 2} if heads is None else heads,
        rngs=nnx.Rngs(0),
        **kwargs,
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: small(models.HardSharing, {}), "at least one task"),
        (lambda: small(models.HardSharing, {0: 2}), "task name 0 is not a non-empty string"),
        (lambda: small(models.HardSharing, {"a": 0}), "head of task 'a' is 0, expected an integer"),
        (lambda: small(models.HardSharing, {"a": ()}), r"head of task 'a' is \(\), expected layer"),
        (lambda: small(models.HardSharing, encoder=Pool(nnx.Rngs(0))), "pass it as `features=`"),
        (lambda: small(models.HardSharing, features=3), "features is 3 but the encoder sizes"),
        (lambda: models.MLP((), rngs=nnx.Rngs(0)), r"sizes is \(\), expected layer sizes"),
        (
            lambda: small(models.Hierarchical, parents={"a": ("z",)}),
            r"parents of task 'a' name the unknown task 'z', expected one of \('a', 'b'\)",
        ),
        (
            lambda: small(models.Hierarchical, parents={"a": "b", "b": "a"}),
            "circle .*'a' -> 'b'|circle .*'b' -> 'a'",
        ),
        (lambda: small(models.Hierarchical, parents={"a": "a"}), "circle 'a' -> 'a'"),
        (lambda: small(models.Hierarchical, parents=["a"]), "parents is .* expected a dictionary"),
        (lambda: small(models.Hierarchical, parents={}, feed="logits"), "feed is 'logits'"),
        (
            lambda: small(models.Hierarchical, parents={"a": "b"}, feed="hidden"),
            r"task 'b' feeds others .* sizes such as \(16, 1\)",
        ),
        (
            lambda: small(models.Hierarchical, {"a": 1, "b": lambda h: h}, parents={"a": "b"}),
            "what task 'b' feeds it is unknown: give .* `out_features`",
        ),
        (lambda: small(models.MMoE, experts=4), "number of experts is None, expected an integer"),
        (lambda: small(models.MMoE, experts=4, num_experts=0), "number of experts is 0"),
        (lambda: small(models.MMoE, experts="4", num_experts=1), "experts is '4', expected layer"),
        (
            lambda: small(models.MMoE, experts=[lambda x: x], num_experts=2),
            "num_experts is 2 but experts are 1 modules",
        ),
        (
            lambda: small(models.MMoE, experts=[lambda x: x.sum(0)], expert_features=4)(X),
            r"experts return shape \(4,\) .* batch shape \(5,\)",
        ),
        (lambda: small(models.MMoE, experts=[lambda x: x]), "pass it as `expert_features=`"),
        (lambda: small(models.PLE, experts=4, num_shared_experts=0), "shared experts is 0"),
        (lambda: small(models.PLE, experts=4, num_task_experts=0), "num_task_experts is 0"),
        (lambda: small(models.PLE, experts=4, num_levels=0), "num_levels is 0"),
        (
            lambda: small(models.PLE, experts=4, num_task_experts={"a": 1}),
            r"num_task_experts names the tasks \['a'\], expected \['a', 'b'\]",
        ),
    ],
)
def test_static_mistakes_say_what_to_do(make, match):
    with pytest.raises(ValueError, match=match):
        make()
