"""TorchJD's own tests of its aggregators, run on ours: `python -m benchmarks.peer_suite PATH`.

PATH is a checkout of TorchJD. Its classes keep their constructors, checks and texts, and answer
with our updates. Needs PyTorch, and what TorchJD's tests need. The classes named after none of
`BUILD` answer for themselves, and are not counted.
"""

import dataclasses
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import mtl_optax as mtl
from benchmarks import tables
from benchmarks.tables import Cells

_OUTCOMES, _WIDTH = "MTL_OPTAX_PEER_OUTCOMES", 64

# Of each of its classes: from K, a key and the arguments of its constructor to our strategy.
BUILD: dict[str, Callable[[int, Any, dict[str, Any]], Any]] = {
    "AlignedMTL": lambda k, _, a: mtl.aligned_mtl(k, scale=a["scale_mode"], **_preference(a)),
    "CAGrad": lambda k, _, a: mtl.cagrad(k, c=a["c"]),
    "ConFIG": lambda k, _, a: mtl.conflict_free(k, **_preference(a)),
    "DualProj": lambda k, _, a: mtl.dualproj(k, **_preference(a)),
    "FairGrad": lambda k, _, a: mtl.fairgrad(k, alpha=a["alpha"]),
    "GradDrop": lambda k, key, a: mtl.graddrop(k, key=key),
    "IMTLG": lambda k, _, a: mtl.imtl_g(k),
    "Krum": lambda k, _, a: mtl.krum(
        k, num_byzantine=a["n_byzantine"], num_selected=a["n_selected"]
    ),
    "MGDA": lambda k, _, a: mtl.mgda(k),
    "Mean": lambda k, _, a: mtl.mean(k),
    "NashMTL": lambda k, _, a: mtl.nash_mtl(k, max_norm=a["max_norm"]),
    "PCGrad": lambda k, key, a: mtl.pcgrad(k, key=key),
    "Sum": lambda k, _, a: mtl.sum(k),
    "TrimmedMean": lambda k, _, a: mtl.trimmed_mean(k, trim=a["trim_number"]),
    "UPGrad": lambda k, _, a: mtl.upgrad(k, **_preference(a)),
}


def _preference(arguments: dict[str, Any]) -> dict[str, Any]:
    given = arguments.get("pref_vector")
    return {} if given is None else {"preference": given}


def ours(name: str, matrix: np.ndarray, seed: int = 0, **arguments: Any) -> np.ndarray:
    """Our update of a Jacobian, for what a class of TorchJD's is constructed with.

    Columns of zeros, which change nothing, leave few shapes to compile.
    """
    rows, columns = matrix.shape
    padded = np.pad(matrix, [(0, 0), (0, -columns % _WIDTH)])
    vectors = {k: tuple(np.ravel(v).tolist()) for k, v in arguments.items() if np.ndim(v) == 1}
    with jax.enable_x64(matrix.dtype == np.float64):
        update = _compiled(name, rows, tuple(sorted((arguments | vectors).items())))
        return np.asarray(update(padded, jax.random.key(seed)))[:columns]


@functools.cache
def _compiled(name: str, num_tasks: int, arguments: tuple[tuple[str, Any], ...]) -> Any:
    @jax.jit
    def update(matrix: jax.Array, key: jax.Array) -> jax.Array:
        tx = BUILD[name](num_tasks, key, dict(arguments))
        losses = jnp.ones(num_tasks, matrix.dtype)
        return tx.update(matrix, tx.init(matrix[0]), losses=losses)[0]

    return update


def adapt(kind: Any, torch: Any) -> None:
    """Makes a class of TorchJD's answer with our updates."""
    init, signature = kind.__init__, inspect.signature(kind.__init__)
    known = ("pref_vector", "scale_mode", "c", "alpha", "n_byzantine", "n_selected", "max_norm")

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        tensor = lambda v: v.detach().cpu().numpy() if torch.is_tensor(v) else v  # noqa: E731
        chosen = {k: tensor(v) for k, v in bound.arguments.items() if k in (*known, "trim_number")}
        object.__setattr__(self, "_given", chosen)

    def forward(self: Any, matrix: Any) -> Any:
        seed = int(torch.randint(2**31, ()))  # so that its seed decides ours
        update = ours(kind.__name__, matrix.detach().cpu().numpy(), seed, **self._given)
        return torch.tensor(update, dtype=matrix.dtype, device=matrix.device)

    kind.__init__, kind.forward = construct, forward


# What follows runs as a plugin of pytest, in the process of its tests.

_seen: dict[str, Counter[str]] = {}


def pytest_configure(config: Any) -> None:
    """Before its tests are imported."""
    del config
    torch = importlib.import_module("torch")
    aggregation = importlib.import_module("torchjd.aggregation")
    for name in BUILD:
        if hasattr(aggregation, name):
            adapt(getattr(aggregation, name), torch)


def pytest_runtest_logreport(report: Any) -> None:
    """Counts what a test came to."""
    if report.when == "call" or report.outcome != "passed":
        file = report.nodeid.split("::")[0].rsplit("/", 1)[-1]
        _seen.setdefault(file, Counter())[report.outcome] += report.when != "teardown"


def pytest_sessionfinish() -> None:
    """Hands the counts to the command."""
    Path(os.environ[_OUTCOMES]).write_text(json.dumps(_seen), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m benchmarks.peer_suite` takes."""

    checkout: Annotated[Path, tyro.conf.Positional]
    """The folder of a checkout of TorchJD."""
    dtype: Literal["float32", "float64"] = "float64"
    """Of its matrices."""
    show: bool = False
    """Whether to print what pytest prints."""


def run(options: Options) -> dict[str, dict[str, int]]:
    """What its tests came to, by file."""
    tests = options.checkout.resolve() / "tests" / "unit" / "aggregation"
    names = "|".join(f"test_{n}" for n in map(_snake, BUILD))
    files = [f for f in sorted(tests.glob("test_*.py")) if f.stem in names.split("|")]
    if not files:
        raise SystemExit(f"{tests} has no tests of an aggregator: give the path of a checkout")
    paths = [options.checkout.resolve() / "src", options.checkout.resolve() / "tests", *sys.path]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, [Path.cwd(), *paths]))),
            "PYTEST_TORCH_DTYPE": options.dtype,
            _OUTCOMES: f"{folder}/outcomes.json",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.peer_suite", "-W"]
        done = subprocess.run(
            [*command, "ignore", "-o", "addopts=", "--tb=line", *map(str, files)],
            cwd=options.checkout,
            env=environment,
            capture_output=not options.show,
            text=True,
            check=False,
        )
        outcomes = Path(folder) / "outcomes.json"
        if not outcomes.exists():
            raise SystemExit(f"its tests did not run\n{done.stdout or ''}\n{done.stderr or ''}")
        return json.loads(outcomes.read_text(encoding="utf-8"))


def _snake(name: str) -> str:
    names = {"AlignedMTL": "aligned_mtl", "IMTLG": "imtl_g", "NashMTL": "nash_mtl"}
    names |= {"TrimmedMean": "trimmed_mean"}
    return names.get(name, name.lower())


def tables_of(outcomes: dict[str, dict[str, int]]) -> list[Cells]:
    """A row a file, and the sum."""
    kinds = ("passed", "failed", "skipped")
    body = [[file, *(str(n.get(k, 0)) for k in kinds)] for file, n in sorted(outcomes.items())]
    total = [str(sum(n.get(k, 0) for n in outcomes.values())) for k in kinds]
    return [
        Cells("TorchJD's tests on our aggregators", ["tests", *kinds], [*body, ["all", *total]])
    ]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    options = tyro.cli(
        Options, args=argv, prog="python -m benchmarks.peer_suite", description=__doc__
    )
    for cells in tables_of(run(options)):
        tables.show(Console(), cells)


if __name__ == "__main__":
    main()
