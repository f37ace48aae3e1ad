"""Trains on several devices and prints, as JSON, how far the result is from one device's.

python -m tests.sharding_worker                  8 simulated devices
python -m tests.sharding_worker HOST:PORT RANK   4 devices, 2 in each of two processes
"""

import collections
import contextlib
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import mtl_optax as mtl

K, STEPS = 3, 4
LAYOUTS = {"data": (8, 1), "fsdp": (1, 8), "both": (4, 2)}
STRATEGIES = {
    "plain": mtl.sum_tasks,
    "uncertainty": lambda: mtl.uncertainty(K),
    "upgrad": lambda: mtl.upgrad(K),
    "graddrop": lambda: mtl.graddrop(K, key=jax.random.key(0)),
    "trimmed_mean": lambda: mtl.trimmed_mean(K),
    "groups": lambda: mtl.partition(
        {"upgrad": mtl.upgrad(K), "mgda": mtl.every(2, mtl.mgda(K))},
        {"first": "upgrad", "second": "mgda"} | dict.fromkeys("abc", "mgda"),
    ),
    # What looks at entries, or at whether all are finite, on every device at its own.
    "entries": lambda: optax.chain(
        mtl.drop_nonfinite_tasks(K),
        mtl.scale_by_lr_annealing(K, layerwise=True),
        mtl.scale_by_db_pinn(K, statistic="std"),
        mtl.match_norm(mtl.excess_mtl(K, step_size=1.0)),
    ),
    "guarded": lambda: mtl.skip_nonfinite(mtl.multi_steps(mtl.mgda(K), 1, K)),
}
MODES = [
    {"rows": "batched"},
    {"rows": "sequential"},
    {"gramian": "columns"},
    {"gramian": "ghost"},
    {"gramian": "streamed"},
]
AXIS_KINDS = ("tensor parallel", "data parallel", "explicit")
OPTIMIZER = optax.sgd(0.5, momentum=0.9)
EXAMPLES = P(("data", "fsdp"))  # each device has its own, wherever the parameters are


def problem():
    """Parameters and a batch: no other array has the shape of a parameter."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.normal(size=shape) / shape[0] ** 0.5).astype(np.float32)

    params = {"first": draw(24, 32), "second": draw(32, 64)} | {
        name: draw(64, 16) for name in "abc"
    }
    return params, (draw(48, 24) * 5, {name: draw(48, 16) * 5 for name in "abc"})


def task_losses(params, x, y, keep=lambda h: h):
    h = keep(jnp.tanh(x @ params["first"]))
    h = keep(jnp.tanh(h @ params["second"]))
    return {name: jnp.mean((h @ params[name] - y[name]) ** 2) for name in "abc"}


def manual_losses(params, x, y):
    """Inside `shard_map`: parameters are gathered where they are used, losses averaged."""
    gather = functools.partial(jax.lax.all_gather, axis_name="fsdp", axis=1, tiled=True)
    return jax.lax.pmean(task_losses(jax.tree.map(gather, params), x, y), ("data", "fsdp"))


def make_step(strategy, losses_fn, modes):
    tx = optax.chain(STRATEGIES[strategy](), OPTIMIZER)

    def step(params, opt_state, *batch):
        _, jac = mtl.value_and_jac(losses_fn, **modes)(params, *batch)
        updates, opt_state = tx.update(jac, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return tx.init, step


def train_on_one(strategy):
    params, batch = problem()
    init, step = make_step(strategy, task_losses, {})
    step, state = jax.jit(step), (params, init(params))
    for _ in range(STEPS):
        state = step(*state, *batch)
    return jax.device_get(state[0])


def explicit_losses(params, x, y):
    """Where sharding is part of the type, what meets must be split alike: whole weights."""
    weights = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P(None, None)), params)
    return task_losses(weights, x, y)


def train_on_many(strategy, mesh, modes, *, manual=False):
    """The parameters after some steps, and the compiled step."""
    params, batch = problem()
    placed = functools.partial(NamedSharding, mesh)
    keep = functools.partial(jax.lax.with_sharding_constraint, shardings=placed(EXAMPLES))
    losses_fn = manual_losses if manual else functools.partial(task_losses, keep=keep)
    if AxisType.Explicit in mesh.axis_types:
        losses_fn = explicit_losses
    init, step = make_step(strategy, losses_fn, modes)
    begin = lambda params: (params, init(params))  # noqa: E731
    # Matrices, and what the optimizer or a strategy keeps in their shape, are split by columns.
    specs = jax.tree.map(
        lambda leaf: P(*[None] * (leaf.ndim - 1), "fsdp") if leaf.ndim > 1 else P(),
        jax.eval_shape(begin, params),
    )
    if manual:
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(*specs, EXAMPLES, EXAMPLES), out_specs=specs
        )
    shardings = jax.tree.map(placed, specs)
    state = jax.jit(begin, out_shardings=shardings)(params)
    batch = jax.device_put(batch, placed(EXAMPLES))
    step = jax.jit(step, out_shardings=shardings).lower(*state, *batch).compile()
    for _ in range(STEPS):
        # Devices that share a core may meet in different steps if steps are sent ahead.
        state = jax.block_until_ready(step(*state, *batch))
    whole = jax.jit(lambda tree: tree, out_shardings=placed(P()))(state[0])
    return jax.tree.map(np.asarray, whole), step


def tensor_parallel(gramian):
    """The Gramian and the update where each device holds a part of the parameters, and on one."""
    rng = np.random.default_rng(0)
    shapes = {"tokens": (10, 16), "up": (16, 64), "down": (64, 16)}
    params = {name: rng.normal(size=s).astype(np.float32) / 3 for name, s in shapes.items()}
    ids = rng.integers(0, 10, size=8)

    def losses(params, join):
        h = params["tokens"][ids]
        h = h + join(jnp.tanh(h @ params["up"]) @ params["down"])
        return [jnp.mean(h**2), jnp.mean(jnp.sin(h)), jnp.mean((h - 1) ** 2)]

    def read(params, join=lambda h: h, *, gramian=gramian):
        _, jac = mtl.value_and_jac(losses, gramian=gramian)(params, join)
        return jac.gramian(), jac.pullback(jnp.ones(K))

    def manual(params):
        return read(params, functools.partial(jax.lax.psum, axis_name="model"))

    specs = {"tokens": P(), "up": P(None, "model"), "down": P("model", None)}
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(manual, mesh=mesh, in_specs=(specs,), out_specs=(P(), specs))
    got, wanted = jax.jit(split)(params), jax.jit(functools.partial(read, gramian="rows"))(params)
    relative = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), got, wanted)
    return max(map(float, jax.tree.leaves(relative)))


def along_an_axis(kind):
    """Of tasks along an axis, how far UPGrad's update and a pullback are from one device's."""
    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(4, 8)).astype(np.float32), "v": np.ones(8, np.float32)}
    x = rng.normal(size=(K, 8, 4)).astype(np.float32)
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))

    def loss(params, x, join=lambda out: out, average=lambda out: out):
        return average(jnp.mean(join(jnp.tanh(x @ params["w"]) @ params["v"]) ** 2))

    def read(loss, params, x):
        tx = mtl.upgrad(len(x))
        _, jac = mtl.value_and_jac(loss, in_axes=(None, 0))(params, x)
        return tx.update(jac, tx.init(params), params)[0], jac.pullback(jnp.arange(1.0, len(x) + 1))

    if kind == "explicit":
        x = np.concatenate([x, x, x])[:8]  # a task a device
        with jax.set_mesh(mesh):
            whole, split = (NamedSharding(mesh, spec) for spec in (P(), P("d")))
            placed = jax.device_put((params, x), (whole, split))
            got = jax.device_get(jax.jit(functools.partial(read, loss))(*placed))
    else:
        if kind == "tensor parallel":
            manual = functools.partial(loss, join=lambda out: jax.lax.psum(out, "d"))
            specs, examples = {"w": P(None, "d"), "v": P("d")}, P()
        else:
            manual = functools.partial(loss, average=lambda out: jax.lax.pmean(out, "d"))
            specs, examples = P(), P(None, "d")
        split = functools.partial(jax.shard_map, mesh=mesh, out_specs=(specs, specs))
        got = jax.jit(split(functools.partial(read, manual), in_specs=(specs, examples)))(params, x)
    wanted = jax.jit(functools.partial(read, loss))(params, x)
    relative = jax.tree.map(lambda a, b: np.max(np.abs(a - b)) / np.max(np.abs(b)), got, wanted)
    return max(map(float, jax.tree.leaves(relative)))


def distance(params, others):
    return max(float(np.max(np.abs(params[name] - others[name]))) for name in params)


def collectives(hlo):
    """What each collective of a compiled program yields: a list of shapes an operation."""
    found = collections.defaultdict(list)
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for yields, name in re.findall(rf"= (.*?) ({names})(?:-start)?\(", hlo):
        shapes = re.findall(r"\w+\[([\d,]*)\]", yields)
        found[name].append([[int(size) for size in shape.split(",") if size] for shape in shapes])
    return found


def runs(two_processes):
    """`(name, strategy, layout, modes, manual)` of everything that is trained."""
    if two_processes:
        for strategy in ("uncertainty", "upgrad", "graddrop"):
            yield f"processes {strategy}", strategy, (2, 2), {}, False
        yield "processes upgrad shard_map", "upgrad", (2, 2), {}, True
        return
    for layout, shape in LAYOUTS.items():
        for strategy in ("plain", "uncertainty", "upgrad"):
            yield f"{layout} {strategy}", strategy, shape, {}, False
    yield "both graddrop", "graddrop", LAYOUTS["both"], {}, False
    yield "both groups", "groups", LAYOUTS["both"], {}, False
    for modes in MODES:
        yield f"both upgrad {''.join(modes.values())}", "upgrad", LAYOUTS["both"], modes, False
    # What draws at random an entry draws other numbers for a shard than for the whole.
    for strategy in (
        "plain",
        "uncertainty",
        "upgrad",
        "trimmed_mean",
        "groups",
        "entries",
        "guarded",
    ):
        yield f"shard_map {strategy}", strategy, LAYOUTS["both"], {}, True
    for modes in ({}, *MODES):
        yield f"explicit upgrad {''.join(modes.values())}", "upgrad", LAYOUTS["both"], modes, False
    for modes in MODES[2:]:
        yield f"shard_map upgrad {''.join(modes.values())}", "upgrad", LAYOUTS["both"], modes, True


def main(address=None, rank="0"):
    jax.config.update("jax_num_cpu_devices", 2 if address else 8)
    if address:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, num_processes=2, process_id=int(rank))
    reference, results = functools.cache(train_on_one), {}
    for name, strategy, shape, modes, manual in runs(bool(address)):
        axis_type = AxisType.Explicit if name.startswith("explicit") else AxisType.Auto
        mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(axis_type,) * 2)
        try:
            with jax.set_mesh(mesh) if axis_type == AxisType.Explicit else contextlib.nullcontext():
                params, step = train_on_many(strategy, mesh, modes, manual=manual)
        except Exception as failure:
            results[name] = {"failure": f"{type(failure).__name__}: {failure}"}
            continue
        results[name] = {
            "error": distance(params, reference(strategy)),
            "moved": distance(params, problem()[0]),
            "collectives": collectives(step.as_text()),
            "entry": collectives(step.as_text().split("ENTRY")[-1]),  # no branch, no loop
        }
    if not address:
        for way in ("rows", "ghost", "streamed", "columns"):
            results[f"tensor parallel {way}"] = tensor_parallel(way)
        for kind in AXIS_KINDS:
            results[f"axis {kind}"] = along_an_axis(kind)
    if rank == "0":
        print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
