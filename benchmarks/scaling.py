"""How the cost of a step grows with tasks, parameters and devices.

Tasks: wall time, and the operations of matrix products, loops counted. Parameters and devices: what
the compiler says a step allocates and moves, without running it; the devices are simulated. Then
the same for one billion parameters, as models of that size are written: layers that are scanned and
checkpointed, computing in bfloat16. `python -m benchmarks.cost_report` draws the results.
"""

import collections
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rich.console import Console
from rich.progress import track

import mtl_optax as mtl
from benchmarks import tables, timing
from benchmarks.flops import flops
from benchmarks.tables import Cells

# IMTL-G asks for no more than the Gramian, and its own K x K program is among the smallest.
WAYS: dict[str, tuple[str, Callable[[Any], Callable[..., Any]]]] = {
    "plain": ("sum", lambda w: mtl.value_and_jac(w.losses)),
    "loss-only": ("uncertainty", lambda w: mtl.value_and_jac(w.losses)),
    "features": ("imtl_g", lambda w: mtl.value_and_feature_jac(w.encode, w.decode)),
    "ghost": ("imtl_g", lambda w: mtl.value_and_jac(w.losses, gramian="ghost")),
    "streamed": ("imtl_g", lambda w: mtl.value_and_jac(w.losses, gramian="streamed")),
    "columns": ("imtl_g", lambda w: mtl.value_and_jac(w.losses, gramian="columns")),
    "rows": ("imtl_g", lambda w: mtl.value_and_jac(w.losses, gramian="rows", rows="batched")),
}
# What is fitted: which cost against what.
SLOPES = (
    ("tasks", "flops"),
    ("tasks", "seconds"),
    ("params", "temp_bytes"),
    ("devices", "state_bytes"),
    ("devices", "temp_bytes"),
)
X_LABELS = {"tasks": "tasks K", "params": "trunk parameters P", "devices": "devices"}
QUANTITIES = {
    "flops": "operations of matrix products",
    "seconds": "seconds",
    "temp_bytes": "bytes beside the state, a device",
    "state_bytes": "bytes of state, a device",
}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.scaling` takes."""

    tasks: tuple[int, ...] = (2, 8, 32, 128)
    """Numbers of tasks K, at `width` 256."""
    params: tuple[float, ...] = (1e4, 1e6, 1e8)
    """Numbers of trunk parameters, at K = 8 on one device."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices, at K = 8 and 1e7 parameters, split with the batch over all of them."""
    plan: float = 1e9
    """Parameters of the plan, at K = 10 on the most devices; 0 leaves it out."""
    seconds: float = 4.0
    """When the last round of a number of tasks begins, at the latest."""
    compiled_only: bool = False
    """Measure what is compiled alone, and print JSON: what a process with more devices does."""


@dataclasses.dataclass(frozen=True)
class Mlp:
    """`depth` square layers and K stacked heads of one output: shapes, no numbers yet.

    Scanned, its layers are one stack, checkpointed, and compute in bfloat16.
    """

    num_tasks: int
    size: float  # numbers of the trunk, about
    depth: int = 3
    batch: int = 256
    scanned: bool = False
    keep: Callable[[jax.Array], jax.Array] = lambda h: h  # where activations lie

    @property
    def width(self) -> int:
        """Inputs and outputs of a layer."""
        return 8 * max(1, round((self.size / self.depth) ** 0.5 / 8))

    def params(self) -> dict[str, Any]:
        """The parameters' shapes."""
        trunk: Any = [_shape(self.width, self.width)] * self.depth
        if self.scanned:
            trunk = _shape(self.depth, self.width, self.width)
        return {"trunk": trunk, "heads": _shape(self.num_tasks, self.width)}

    def examples(self) -> tuple[Any, Any]:
        """The batch's shapes: inputs, and a target of each head."""
        return _shape(self.batch, self.width), _shape(self.batch, self.num_tasks)

    def encode(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """The trunk's features."""
        del y

        def layer(h: jax.Array, w: jax.Array) -> jax.Array:
            return self.keep(jnp.tanh(h @ w.astype(h.dtype)))

        if self.scanned:
            turn = lambda h, w: (jax.checkpoint(layer)(h, w), None)  # noqa: E731
            return jax.lax.scan(turn, x.astype(jnp.bfloat16), params["trunk"])[0]
        for w in params["trunk"]:
            x = layer(x, w)
        return x

    def decode(self, params: Any, features: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        """The K losses."""
        del x
        return jnp.mean((features @ params["heads"].T - y) ** 2, axis=0)

    def losses(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """The K losses, from the inputs."""
        return self.decode(params, self.encode(params, x, y), x, y)


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class Step:
    """One way to train a model, compiled for parameters and examples split over devices."""

    def __init__(self, model: Mlp, way: str, num_devices: int = 1):
        mesh = jax.make_mesh((num_devices,), ("fsdp",), axis_types=(AxisType.Auto,))
        by_rows, whole = (NamedSharding(mesh, P(*spec)) for spec in (("fsdp",), ()))
        by_columns = lambda leaf: NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "fsdp"))  # noqa: E731
        keep = lambda h: jax.lax.with_sharding_constraint(h, by_rows)  # noqa: E731
        model = dataclasses.replace(model, keep=keep)
        strategy, value_and_jac = WAYS[way]
        tx = optax.chain(mtl.make(strategy, model.num_tasks), optax.adam(1e-3))

        def step(state, batch):
            params, opt_state = state
            losses, jac = value_and_jac(model)(params, *batch)
            updates, opt_state = tx.update(jac, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), losses

        state = jax.eval_shape(lambda p: (p, tx.init(p)), model.params())
        shardings = jax.tree.map(lambda leaf: by_columns(leaf) if leaf.ndim > 1 else whole, state)
        place = lambda leaf, sharding: leaf.update(sharding=sharding)  # noqa: E731
        self._state = jax.tree.map(place, state, shardings)
        self._batch = tuple(place(leaf, by_rows) for leaf in model.examples())
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        self._compiled = jitted.lower(self._state, self._batch).compile()
        self._flops = flops(step, self._state, self._batch)

    def measures(self) -> dict[str, float]:
        """Operations in all; bytes held, beside them, moved, and moved at once, a device."""
        memory: Any = self._compiled.memory_analysis()
        moved, largest = moved_bytes(self._compiled.as_text() or "")
        return {
            "state_bytes": int(memory.argument_size_in_bytes),
            "temp_bytes": int(memory.temp_size_in_bytes),
            "moved_bytes": moved,
            "largest_bytes": largest,
            "flops": self._flops,
        }

    def call(self) -> Callable[[], Any]:
        """A call that trains one step on, from made-up numbers."""
        rng = np.random.default_rng(0)

        def draw(leaf):
            return np.abs(0.1 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

        state, batch = jax.device_put(
            jax.tree.map(draw, (self._state, self._batch)),
            jax.tree.map(lambda leaf: leaf.sharding, (self._state, self._batch)),
        )

        def train():
            nonlocal state
            state, losses = self._compiled(state, batch)
            return losses

        return train


def moved_bytes(hlo: str) -> tuple[int, int]:
    """What the collectives of a program yield on one device: all bytes, loops counted; the most."""
    bodies, name = collections.defaultdict(list), ""
    for line in hlo.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        name = ("ENTRY" if opened[1] else opened[2]) if opened else name
        bodies[name].append(line)

    def count(name: str) -> tuple[int, int]:
        total = most = 0
        for line in bodies[name]:
            yields = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
            loop = re.search(r" while\(.*body=%?([\w.-]+)", line)
            # The branch for True, which is taken as a rule, is the last.
            branch = re.search(r" conditional\(.*branch_computations=\{.*, %?([\w.-]+)\}", line)
            if yields:
                shapes = re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", yields[1])
                sizes = [
                    int(bits) // 8 * math.prod(map(int, filter(None, dims.split(","))))
                    for bits, dims in shapes
                ]
                total, most = total + sum(sizes), max(most, *sizes)
            elif called := loop or branch:
                inside, largest = count(called[1])
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                total += inside * (int(trips[1]) if loop and trips else 1)
                most = max(most, largest)
        return total, most

    return count("ENTRY")


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent b of y ~ x^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def run(options: Options, console: Console) -> dict[str, Any]:
    """All results, ready for JSON: a list of numbers a way, and their slopes."""
    tasks: dict[str, Any] = {"x": options.tasks, "flops": {}, "seconds": {}}
    columns = [
        _measure_tasks(num_tasks, options.seconds)
        for num_tasks in track(options.tasks, "tasks", console=console)
    ]
    for key in ("flops", "seconds"):
        ways = columns[0][key]
        tasks[key] = {way: [column[key][way] for column in columns] for way in ways}
    # A process has as many simulated devices as it began with.
    command = [sys.executable, "-m", "benchmarks.scaling", "--compiled-only"]
    for field in ("params", "devices", "plan"):
        value = getattr(options, field)
        command += [f"--{field}", *map(str, value if isinstance(value, tuple) else (value,))]
    # Nor does it run: its machine code need not be fast.
    flags = (
        f"--xla_force_host_platform_device_count={max(options.devices)} "
        "--xla_backend_optimization_level=0"
    )
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    with console.status("parameters and devices, compiled"):
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    results = {"tasks": tasks, **json.loads(output.stdout.splitlines()[-1])}
    results["slopes"] = {
        f"{key} against {part}": {
            way: round(slope(results[part]["x"], ys), 2)
            for way, ys in results[part][key].items()
            if min(ys) > 0
        }
        for part, key in SLOPES
    }
    return {"settings": dataclasses.asdict(options), **results}


def _measure_tasks(num_tasks: int, seconds: float) -> dict[str, dict[str, float]]:
    steps = {way: Step(Mlp(num_tasks, 3 * 256**2), way) for way in WAYS}
    calls = {way: step.call() for way, step in steps.items()}
    times = timing.interleave(calls, rounds=20, max_seconds=seconds)
    operations = {way: step.measures()["flops"] for way, step in steps.items()}
    return {"flops": operations, "seconds": timing.medians(times)}


def compiled(options: Options) -> dict[str, Any]:
    """What is known without running: a list of numbers for each measure and way."""

    def over(xs: Sequence[float], measure: Callable[[str, Any], dict[str, float]]) -> Any:
        found = {way: [measure(way, x) for x in xs] for way in WAYS}
        return {"x": xs} | {
            key: {way: [measures[key] for measures in each] for way, each in found.items()}
            for key in found["plain"][0]
        }

    most = max(options.devices)
    parts: dict[str, Any] = {
        "params": over(options.params, lambda way, x: Step(Mlp(8, x), way).measures()),
        "devices": over(options.devices, lambda way, x: Step(Mlp(8, 1e7), way, x).measures()),
    }
    if options.plan:
        model = Mlp(10, options.plan, depth=16, batch=1024, scanned=True)
        parts["plan"] = {way: Step(model, way, most).measures() for way in WAYS}
    return parts


def tables_of(results: dict[str, Any]) -> list[Cells]:
    """The exponents, and what a step of the plan takes."""
    slopes = [
        [
            f"{QUANTITIES[key]}, against {X_LABELS[part]}",
            *(f"{found[way]:.2f}" if way in found else "" for way in WAYS),
        ]
        for (part, key), found in zip(SLOPES, results["slopes"].values(), strict=True)
    ]
    cells = [Cells("The power of x that a cost grows with", ["cost, against x", *WAYS], slopes)]
    if plan := results.get("plan"):
        sizes = ("state_bytes", "temp_bytes", "moved_bytes", "largest_bytes")
        rows = [
            [way, f"{plan[way]['flops'] / plan['plain']['flops']:.2f}"]
            + [f"{plan[way][key] / 1e9:.2f} GB" for key in sizes]
            for way in WAYS
        ]
        header = ["way", "operations", "state", "beside it", "moved", "moved at once"]
        cells.append(Cells("A step of the plan, on each device", header, rows))
    return cells


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.scaling", description=__doc__)
    if options.compiled_only:
        print(json.dumps(compiled(options)))
        return
    tables.report("scaling", run, tables_of, options)


if __name__ == "__main__":
    main()
