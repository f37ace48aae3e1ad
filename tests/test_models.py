"""Multi-task architectures: forward passes by hand, who owns which parameter, transformations."""

import os
import subprocess
import sys
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mtl_optax as mtl
from mtl_optax import models
from tests.problems import a_fifth

# Few distinct widths, since making an initialiser compile is most of the time here.
WIDTH, EXPERTS, TASKS = 4, (4, 4), ("a", "b", "c")
GAMMA = 30.0  # a smooth step so wide that no bit of a selector saturates
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
    "dselect_k": lambda heads=HEADS, **kw: models.DSelectK(
        (4, 4), heads, experts=EXPERTS, num_experts=3, num_selected=2, gamma=GAMMA, **kw
    ),
    "cross_stitch": lambda heads=HEADS, **kw: models.CrossStitch(
        (4, 4), heads, blocks=(4, EXPERTS), **kw
    ),
    "ltb": lambda heads=HEADS, **kw: models.LTB(
        (4, 4), heads, blocks=(4, EXPERTS, 4), num_branches=2, **kw
    ),
    "mtan": lambda heads=HEADS, **kw: models.MTAN((4, 4), heads, blocks=(4, EXPERTS), **kw),
    "cgc": lambda heads=HEADS, **kw: models.CGC(4, heads, experts=4, num_shared_experts=2, **kw),
    "ple": lambda heads=HEADS, **kw: models.PLE(
        (4, 4), heads, experts=4, num_task_experts={"a": 1, "b": 2, "c": 1}, num_levels=3, **kw
    ),
}


def make(name, seed=0, **kwargs):
    """A smooth model with generic parameters: no dead units and no zero biases."""
    return fill(lambda: FACTORIES[name](activation=jnp.tanh, rngs=nnx.Rngs(0), **kwargs), seed)


def fill(create, seed=0):
    """A model with random parameters; abstract until then, so that no initialiser compiles."""
    graphdef, shapes = nnx.split(nnx.eval_shape(create))
    rng = np.random.default_rng(seed)
    return nnx.merge(
        graphdef,
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.7, p.dtype), shapes),
    )


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)


def by_path(tree):
    """Leaves of a tree of parameters by path."""
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(tree))[0]
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def flat(model):
    """Parameters by path, as NumPy arrays."""
    return {path: np.asarray(leaf) for path, leaf in by_path(nnx.state(model)).items()}


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


def selected(p, prefix, x):
    """Weights of three experts, whose numbers two selectors spell in two bits each."""
    t = dense(p, f"{prefix}/bits", x).reshape(len(x), 2, 2) / GAMMA
    one = 0.5 + 1.5 * t - 2 * t**3
    low, high = one[..., 0], one[..., 1]
    codes = [(1 - high) * (1 - low), (1 - high) * low, high * (1 - low), high * low]
    each = np.stack([codes[0] + codes[3], codes[1], codes[2]], -1)
    return (softmax(dense(p, f"{prefix}/scores", x))[..., None] * each).sum(1)


def dselect_k_by_hand(p, x):
    h = stack(p, "encoder", x, final=True)
    outputs = np.stack(experts(p, "experts", h), 1)
    weights = {task: selected(p, f"gates/{task}", h) for task in TASKS}
    return {task: head(p, task, (weights[task][..., None] * outputs).sum(1)) for task in TASKS}


def columns_by_hand(weights):
    """Columns of blocks that read mixtures of each other, with `weights` of the parameters."""

    def by_hand(p, x):
        outputs = experts(p, "blocks/0", stack(p, "encoder", x, final=True))
        level = 1
        while f"mixtures/{level - 1}" in p:
            inputs = weights(p[f"mixtures/{level - 1}"]) @ np.stack(outputs, 1)
            prefix = f"blocks/{level}/stack"
            outputs = [
                stack(p, prefix, inputs[:, i], final=True, expert=i) for i in range(len(outputs))
            ]
            level += 1
        return {
            task: head(p, task, weights(p[f"reads/{task}"]) @ np.stack(outputs, 1))
            for task in TASKS
        }

    return by_hand


def mtan_by_hand(p, x):
    shared, kept = stack(p, "encoder", x, final=True), {}
    for level in (0, 1):
        shared = stack(p, f"blocks/{level}", shared, final=True)
        for task in TASKS:
            seen = [shared]
            if level:
                seen.append(stack(p, "transfers/0", kept[task], final=True))
            logits = stack(p, f"attention/{task}/{level}", np.concatenate(seen, 1), final=False)
            kept[task] = shared / (1 + np.exp(-logits))
    return {task: head(p, task, kept[task]) for task in TASKS}


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
    "dselect_k": dselect_k_by_hand,
    "cross_stitch": columns_by_hand(lambda alpha: alpha),
    "ltb": columns_by_hand(softmax),
    "mtan": mtan_by_hand,
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


def own(*parts):
    """Every parameter is shared by all tasks, but those in these parts of the model."""
    return lambda path: own_task(path) if path.startswith(parts) else set(TASKS)


TASKS_OF = {
    "hard_sharing": own("heads"),
    "hierarchical": hierarchical_tasks,
    "hierarchical_hidden": lambda p: own_task(p) if "layers/1" in p else hierarchical_tasks(p),
    "mmoe": own("heads", "gates"),
    "dselect_k": own("heads", "gates"),
    "cross_stitch": own("heads", "reads"),
    "ltb": own("heads", "reads"),
    "mtan": own("heads", "attention"),
    "cgc": lambda p: set(TASKS) if "shared_experts" in p else own_task(p),
    "ple": ple_tasks,
}


def losses_of(model):
    """A smooth loss of every task, and the parameters."""
    graphdef, params = nnx.split(model)

    def losses(params):
        outputs = nnx.merge(graphdef, params)(X)
        return {task: jnp.sum(jnp.sin(y)) for task, y in outputs.items()}

    return losses, params


def tasks_by_gradient(model):
    """For each parameter, the tasks whose loss has a gradient for every entry of it."""
    losses, params = losses_of(model)
    reached = {}
    for task, row in jax.jit(jax.jacrev(losses))(params).items():
        for name, leaf in by_path(row).items():
            assert (leaf != 0).all() or (leaf == 0).all(), name
            reached.setdefault(name, set()).update({task} if (leaf != 0).all() else ())
    return reached


def shared_by_program(model):
    """For each parameter, whether `shared="auto"` takes it for shared."""
    losses, params = losses_of(model)
    found = {}

    def trace(params):
        _, jac = mtl.value_and_jac(losses, shared="auto")(params)
        found.update(by_path(jac.shared))
        return jac.losses

    jax.eval_shape(trace, params)
    return found


@pytest.mark.parametrize("name", a_fifth(FACTORIES))
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


@pytest.mark.parametrize("name", a_fifth(FACTORIES, 1))
def test_parameters_belong_to_the_documented_tasks(name):
    model = make(name)
    documented = {path: TASKS_OF[name](path) for path in flat(model)}
    assert tasks_by_gradient(model) == documented
    assert shared_by_program(model) == {path: len(tasks) > 1 for path, tasks in documented.items()}


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


@pytest.mark.parametrize("kind", ["sizes", "sequential"])
def test_a_task_at_a_lower_layer_leaves_the_layers_above_alone(kind):
    """Figure b of the paper: the easiest task at the first layer, the next at the second."""
    rngs = nnx.Rngs(0)
    encoder, depths = (WIDTH, 5, 4, 3), {"a": 1, "b": 2}
    if kind == "sequential":
        layers = [nnx.Linear(i, o, rngs=rngs) for i, o in pairwise(encoder)]
        encoder, depths = nnx.Sequential(layers[0], jnp.tanh, *layers[1:]), {"a": 1, "b": 3}
    model = models.Hierarchical(
        encoder,
        dict.fromkeys(TASKS, 2),
        parents={"c": "a"},
        depths=depths,
        features=3 if kind == "sequential" else None,
        activation=jnp.tanh,
        rngs=rngs,
    )
    assert [model.heads[task].in_features for task in TASKS] == [5, 4, 3 + 2]
    numbers = {"0": 0, "1": 1, "2": 2} if kind == "sizes" else {"0": 0, "2": 1, "3": 2}

    def tasks_of(path):
        if path.startswith("heads"):
            return {"a": {"a", "c"}, "b": {"b"}, "c": {"c"}}[path.split("/")[1]]
        return [set("abc"), set("bc"), {"c"}][numbers[path.split("/")[2]]]

    expected = {path: tasks_of(path) for path in flat(model)}
    assert tasks_by_gradient(model) == expected
    assert shared_by_program(model) == {path: len(t) > 1 for path, t in expected.items()}
    # The deepest task reads what the encoder returns.
    h = model.encoder(X)
    by_hand = model.heads["c"](jnp.concatenate([h, model(X)["a"]], -1))
    np.testing.assert_allclose(model(X)["c"], by_hand, rtol=1e-6)


def paths_by_hand(p, task):
    """Probability of every node of `ltb` on the way to a task, from the first level on."""
    path = [softmax(p[f"reads/{task}"])]
    for level in (1, 0):
        path.insert(0, path[0] @ softmax(p[f"mixtures/{level}"]))
    return path


UTILIZATION = {
    "mmoe": lambda p, h, task: [softmax(dense(p, f"gates/{task}", h)).mean(0)],
    "dselect_k": lambda p, h, task: [selected(p, f"gates/{task}", h).mean(0)],
    "cross_stitch": lambda p, h, task: [p["mixtures/0"]["abc".index(task)], p[f"reads/{task}"]],
    "ltb": lambda p, h, task: paths_by_hand(p, task),
}


@pytest.mark.parametrize("name", [*UTILIZATION, "cgc", "ple"])
def test_utilization(name):
    model = make(name)
    use = nnx.jit(lambda model, x: model.utilization(x))(model, X)
    assert tuple(use) == TASKS
    p = flat(model)
    for task, levels in use.items():
        if name != "cross_stitch":
            assert (np.asarray(levels) > 0).all()
            np.testing.assert_allclose(levels.sum(-1), np.ones(len(levels)), rtol=1e-5)
        if name in UTILIZATION:
            h = stack(p, "encoder", np.asarray(X), final=True)
            assert_close(levels, np.stack(UTILIZATION[name](p, h, task)))
        else:
            own = {"cgc": (1, 3), "ple": (3, 3 if task == "b" else 2)}[name]
            assert levels.shape == own
    if name == "ple":
        read = nnx.jit(lambda model, x: (model.gate_weights(x), model.shared_gate_weights(x)))
        gates, shared = read(model, X)
        assert [w.shape for w in gates["b"]] == [(5, 3)] * 3
        assert_close(use["b"], np.mean(gates["b"], 1))
        assert [w.shape for w in shared] == [(5, 5), (5, 5)]  # 1 + 2 + 1 of the tasks, 1 shared
        assert_close(np.sum(shared, -1), np.ones((2, 5)))


def shard_batch():
    """Every model on four devices: nothing moves between them, and the outputs are right."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    assert mesh.size == 4
    batch = jax.NamedSharding(mesh, jax.P("batch"))
    x = np.concatenate([X, X[:3] + 1])
    split = {name: nnx.split(make(name)) for name in FACTORIES}
    params = jax.device_put(
        {name: state for name, (_, state) in split.items()}, jax.NamedSharding(mesh, jax.P())
    )

    @jax.jit
    def apply(params, x):
        return {name: nnx.merge(split[name][0], p)(x) for name, p in params.items()}

    inputs = jax.device_put(x, batch)
    compiled = apply.lower(params, inputs).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
    for name, outputs in compiled(params, inputs).items():
        expected = BY_HAND[name](flat(make(name)), x)
        for task in TASKS:
            assert outputs[task].sharding.is_equivalent_to(batch, 2)
            assert_close(outputs[task], expected[task])


def test_a_sharded_batch_stays_where_it_is():
    # A process of its own, since the number of devices is fixed once JAX has started.
    done = subprocess.run(
        [sys.executable, "-c", "from tests import test_models; test_models.shard_batch()"],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_mmoe_with_one_expert_is_hard_sharing():
    mmoe = models.MMoE(4, HEADS, experts=(4, 4), num_experts=1, rngs=nnx.Rngs(0))
    graphdef, stacked = nnx.split(mmoe.experts.stack)
    expert = nnx.merge(graphdef, jax.tree.map(lambda p: p[0], stacked))
    shared = models.HardSharing(expert, mmoe.heads, rngs=nnx.Rngs(1))
    jax.tree.map(assert_close, mmoe(X), shared(X))


def test_a_smooth_step_gate_selects_at_most_k_experts():
    model = models.DSelectK(
        4, {"a": 2}, experts=4, num_experts=6, num_selected=2, gamma=1e-3, rngs=nnx.Rngs(0)
    )
    gate = model.gates["a"]
    undecided = 2 * 3 * np.log(2)  # two selectors of three bits, all of which are near a half
    np.testing.assert_allclose(gate.entropy(X), undecided, rtol=1e-2)
    gate.bits.kernel[...] = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)

    @nnx.jit
    def run(gate, x):
        return gate(x), *nnx.value_and_grad(lambda gate: gate.entropy(x) + gate(x)[0, 0])(gate)

    weights, value, grads = run(gate, X)
    used = np.asarray(weights) > 0
    assert (used.sum(-1) <= 2).all()
    assert used.any(0).sum() > 2  # though not the same ones for all examples
    np.testing.assert_allclose(weights.sum(-1), np.ones(5), rtol=1e-6)
    np.testing.assert_allclose(value, weights[0, 0], rtol=1e-6)  # nothing is left undecided
    assert model.selector_entropy(X)["a"] == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    # Saturated bits are settled, and what remains to learn is the weights of the selectors.
    assert not np.any(grads["bits"]["kernel"][...])


def test_a_single_expert_is_no_choice():
    model = models.DSelectK(4, {"a": 2}, experts=4, num_experts=1, rngs=nnx.Rngs(0))
    assert model.selector_entropy(X) == {"a": 0}
    np.testing.assert_allclose(model.gate_weights(X)["a"], np.ones((5, 1)), rtol=1e-6)


def test_branches_are_sampled_with_their_probabilities():
    model = fill(lambda: models.LTB(4, {"a": 2}, blocks=4, num_branches=2, rngs=nnx.Rngs(0)))
    model.reads["a"][...] = jnp.asarray([0.4, -0.4])
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, keys):
        def sample(key, **options):
            return nnx.merge(graphdef, params)(X, key=key, **options)["a"]

        cold = sample(keys[0], temperature=1e-4)
        return jax.vmap(lambda key: sample(key, hard=True))(keys), cold

    outputs, cold = run(params, jax.random.split(jax.random.key(0), 1000))
    nodes = [model.heads["a"](h) for h in model.blocks[0](X)]
    chosen = [np.isclose(outputs, node, atol=1e-5).all((1, 2)) for node in nodes]
    assert (chosen[0] ^ chosen[1]).all()
    probability = float(model.utilization(X)["a"][0, 0])
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-0.8)), rtol=1e-6)
    assert abs(chosen[0].mean() - probability) < 4 * np.sqrt(0.25 / 1000)
    assert_close(cold, outputs[0])
    # Without a key, the likeliest node, whose gradient reaches the logits all the same.
    value, grads = nnx.value_and_grad(lambda m: m(X, hard=True)["a"].sum())(model)
    np.testing.assert_allclose(value, nodes[0].sum(), rtol=1e-5)
    assert (grads["reads"]["a"][...] != 0).all()


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
    cross = models.CrossStitch((4, 4), heads, blocks=(4, 4), rngs=rngs)
    assert count(cross) == mlp(4, 4) + 2 * 2 * mlp(4, 4) + 2 * 2 * 2 + 2 * head


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


class Normalized(nnx.Module):
    """An expert with state beyond parameters."""

    def __init__(self, features, rngs):
        self.linear = nnx.Linear(features, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.out_features = 4

    def __call__(self, x):
        return self.norm(self.linear(x))


def test_modules_of_any_kind_may_be_encoder_experts_and_heads():
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


@pytest.mark.parametrize("difference", ["activation", "depth", "width", "constant"])
def test_modules_of_one_function_may_differ(difference):
    """What only their structure tells apart is not run as the first of them."""
    made = []

    def make(features, rngs):
        odd, index = len(made) % 2, len(made)
        sizes = (features, 5 if odd else 4, 4) if difference == "width" else (features, 4)
        mlp = models.MLP(
            (*sizes, 4) if odd and difference == "depth" else sizes,
            activation=jnp.tanh if odd and difference == "activation" else nnx.relu,
            activate_final=True,
            rngs=rngs,
        )
        if difference == "constant":
            mlp.activation = partial(jnp.add, float(index))
        made.append(mlp)
        return mlp

    options = {"encoder": 4, "heads": {"a": lambda h: h, "b": lambda h: h}, "rngs": nnx.Rngs(0)}
    mmoe = models.MMoE(experts=make, num_experts=3, **options)
    weights = mmoe.gate_weights(X)["a"]
    expected = sum(w[:, None] * np.asarray(m(X)) for w, m in zip(weights.T, made, strict=True))
    assert_close(mmoe(X)["a"], expected)
    made.clear()
    cross = models.CrossStitch(blocks=(make, make), same=1.0, **options)
    for task, first, second in zip("ab", made[:2], made[2:], strict=True):
        assert_close(cross(X)[task], second(first(X)))
    made.clear()
    ple = models.PLE(experts=make, num_shared_experts=2, **options)
    shared, own = made[:2], made[2]
    weights = ple.gate_weights(X)["a"][0]
    expected = sum(
        w[:, None] * np.asarray(m(X)) for w, m in zip(weights.T, (own, *shared), strict=True)
    )
    assert_close(ple(X)["a"], expected)


def test_modules_of_one_function_that_share_parameters_stay_tied():
    rngs = nnx.Rngs(0)
    tied = nnx.Linear(4, 4, rngs=rngs)

    def make(_, rngs):
        return nnx.Sequential(tied, nnx.Linear(4, 4, rngs=rngs))

    model = models.MMoE(4, {"a": lambda h: h}, experts=make, num_experts=3, rngs=rngs)
    assert count(model.experts) == 4 * 20
    alike = models.MMoE(
        4, {"a": lambda h: h}, experts=lambda f, r: nnx.Linear(f, 4, rngs=r), num_experts=3,
        expert_features=4, rngs=rngs,
    )  # fmt: skip
    assert alike.experts.stack is not None


def test_blocks_may_be_modules_of_any_kind():
    def outputs(cls, **options):
        rngs = nnx.Rngs(0)
        heads = dict.fromkeys("ab", lambda h: h.mean((-3, -2)))
        return cls(shrink(1, rngs), heads, rngs=rngs, **options)(jnp.ones((5, 16, 16, 1)))

    def shrink(features, *options):
        return nnx.Conv(features, 4, (2, 2), strides=2, rngs=options[-1])

    def halve(h):
        return h[:, ::2, ::2]

    for cls, options in (
        (models.MTAN, {"blocks": (4, halve), "block_features": 4, "transfer": shrink}),
        (models.LTB, {"blocks": (shrink, 4)}),
        (models.CrossStitch, {"blocks": (4, Normalized, shrink)}),
    ):
        shapes = jax.eval_shape(partial(outputs, cls, **options))
        assert {task: y.shape for task, y in shapes.items()} == {"a": (5, 4), "b": (5, 4)}


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


def wide_gate(features, num_experts, rngs):
    return nnx.Linear(features, num_experts + 1, rngs=rngs)


def alternating(*widths):
    """A factory of experts of one width after the other."""
    rest = iter(widths)
    return lambda features, rngs: nnx.Linear(features, next(rest), rngs=rngs)


def read_wrongly(name):
    """A model of which one head was built for features of another width."""
    heads = HEADS | {"b": models.MLP((7, 4, 2), rngs=nnx.Rngs(0))}
    if name == "hierarchical_hidden":  # whose factory above makes the heads itself
        options = {"parents": {"a": "b"}, "feed": "hidden"}
        return models.Hierarchical((4, 4), heads, rngs=nnx.Rngs(0), **options)(X)
    return FACTORIES[name](heads=heads, rngs=nnx.Rngs(0))(X)


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
        (
            lambda: small(models.Hierarchical, parents={"a": None}),
            "parents of task 'a' is None, expected the name of an easier task",
        ),
        (lambda: small(models.Hierarchical, parents={}, feed="logits"), "feed is 'logits'"),
        (lambda: small(models.Hierarchical, depths={"z": 1}), "from some of the tasks"),
        (lambda: small(models.Hierarchical, depths={"a": 9}), "depth of task 'a' is 9, .* at most"),
        (lambda: small(models.Hierarchical, depths={"a": 0}), "expected an integer >= 1"),
        (
            lambda: small(models.Hierarchical, encoder=Pool(nnx.Rngs(0)), depths={"a": 1}),
            "encoder is a Pool, whose layers are unknown",
        ),
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
        (
            lambda: small(
                models.MMoE, experts=[lambda x: x, lambda x: x[:, :3]], expert_features=4
            )(X),
            r"number 1 of the experts returns shape \(5, 3\) and number 0 \(5, 4\)",
        ),
        (
            lambda: small(models.MMoE, experts=4, num_experts=2, gate=wide_gate)(X),
            r"gate of task 'a' returns shape \(5, 3\), expected \(\.\.\., 2\): one weight",
        ),
        (
            lambda: models.PLE(
                4, {"a": 2}, experts=alternating(4, 3), num_shared_experts=1, rngs=nnx.Rngs(0)
            )(X),
            r"experts of task 'a' return shape \(5, 3\) and shared ones \(5, 4\)",
        ),
        *[
            (partial(read_wrongly, name), r"head of task 'b' reads width 7, and .* shape \(5, \d\)")
            for name in FACTORIES
        ],
        (lambda: small(models.HardSharing, encoder=(3, 4))(X), r"MLP reads width 3, .* \(5, 4\)"),
        (
            lambda: small(models.HardSharing, encoder=lambda x: x, features=6)(X),
            r"head of task 'a' reads width 6, and is given shape \(5, 4\)",
        ),
        (lambda: small(models.PLE, experts=4, num_shared_experts=0), "shared experts is 0"),
        (lambda: small(models.PLE, experts=4, num_task_experts=0), "num_task_experts is 0"),
        (lambda: small(models.PLE, experts=4, num_levels=0), "num_levels is 0"),
        (lambda: small(models.DSelectK, experts=4, num_experts=2, num_selected=0), "selected is 0"),
        (
            lambda: small(models.DSelectK, experts=4, num_experts=2, gamma=0.0),
            "gamma=0.0, expected",
        ),
        (lambda: small(models.DSelectK, experts=4, num_experts=2, gamma="1"), "gamma=1, expected"),
        (lambda: small(models.CrossStitch, blocks=4, same="0.9"), "same=0.9, expected a number"),
        (lambda: small(models.LTB, blocks=4)(X, temperature=0.0), "temperature=0.0, expected"),
        (lambda: small(models.LTB, blocks=4, num_branches=0), "num_branches is 0"),
        (lambda: small(models.CrossStitch, blocks=()), "blocks is empty"),
        (lambda: small(models.CrossStitch, blocks=(4, "4")), "blocks of level 1 is '4'"),
        (lambda: small(models.MTAN, blocks=lambda h: h), "pass it as `block_features=`"),
        (
            lambda: small(models.MTAN, blocks=(4, 4), transfer=lambda *_: lambda h: h[:1])(X),
            r"transfer to block 1 returns shape \(1, 4\), expected the block's \(5, 4\)",
        ),
        (
            lambda: small(models.PLE, experts=4, num_task_experts={"a": 1}),
            r"num_task_experts names the tasks \['a'\], expected \['a', 'b'\]",
        ),
    ],
)
def test_static_mistakes_say_what_to_do(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_what_is_of_another_kind_is_named():
    with pytest.raises(TypeError, match=r"rngs is a \w+, expected nnx.Rngs\(0\)"):
        models.HardSharing((4, 3), {"a": 1}, rngs=jax.random.key(0))
    with pytest.raises(TypeError, match="activation='relu', expected a function"):
        models.HardSharing((4, 3), {"a": 1}, activation="relu", rngs=nnx.Rngs(0))
