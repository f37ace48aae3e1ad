"""The train steps of TorchJD on the workloads, in PyTorch's own idiom."""

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import jax

from benchmarks.steps import LEARNING_RATE, PLAIN
from benchmarks.workloads import Layer, Workload

Step = Callable[[], Any]
# Rows by their group, as `benchmarks.steps.WAYS` has them.
GROUPS = {
    PLAIN: PLAIN,
    "uncertainty": "losses",
    "dwa": "losses",
    "famo, second forward pass": "losses",
    "upgrad, autogram": "exact",
    "upgrad, Jacobian": "exact",
    "upgrad, Jacobian by rows": "exact",
    "mgda, Jacobian": "exact",
    "cagrad, Jacobian": "exact",
}


def steps(torch: Any, workload: Workload) -> dict[str, Step]:
    """A step for each row of `GROUPS`, every one with a model of its own."""
    aggregation, autogram, autojac, scalarization = (
        importlib.import_module(f"torchjd.{name}")
        for name in ("aggregation", "autogram", "autojac", "scalarization")
    )
    inputs, labels = workload.batch
    if workload.trunk[0][0] == "conv":
        inputs = inputs.transpose(0, 3, 1, 2)  # PyTorch has channels first
    torch.set_default_device("cuda" if jax.default_backend() == "gpu" else "cpu")
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 on a GPU, as XLA's default is
    inputs, labels = torch.tensor(inputs), torch.tensor(labels).long()
    num_tasks = workload.num_tasks

    class Setup:
        """A model, its optimizer, and one step around the way to its gradients."""

        def __init__(self, extra: Iterable[Any] = ()):
            self.trunk, self.heads = model(torch, workload)
            parameters = [*self.trunk.parameters(), *self.heads.parameters(), *extra]
            self.optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)

        def losses(self, features: Any) -> list[Any]:
            loss = torch.nn.functional.cross_entropy
            pairs = zip(self.heads, labels, strict=True)
            return [loss(head(features), label) for head, label in pairs]

        def step(self, backward: Callable[[Any, Any], Any]) -> Any:
            self.optimizer.zero_grad()
            features = self.trunk(inputs)
            losses = self.losses(features)
            backward(losses, features)
            self.optimizer.step()
            return torch.stack(losses).detach()

    def scalarized(scalarizer: Any) -> Step:
        setup = Setup(scalarizer.parameters())
        return lambda: setup.step(lambda losses, _: scalarizer(torch.stack(losses)).backward())

    def plain() -> Step:
        setup = Setup()
        return lambda: setup.step(lambda losses, _: torch.stack(losses).sum().backward())

    def famo() -> Step:
        # As its authors run it: a second forward pass after the update.
        setup, scalarizer = Setup(), scalarization.FAMO(num_tasks)

        def step():
            losses = setup.step(lambda losses, _: scalarizer(torch.stack(losses)).backward())
            with torch.no_grad():
                scalarizer.update(torch.stack(setup.losses(setup.trunk(inputs))))
            return losses

        return step

    def by_gramian(weighting: Any) -> Step:
        setup = Setup()
        engine = autogram.Engine(setup.trunk, batch_dim=None)

        def backward(losses, _):
            stacked = torch.stack(losses)
            stacked.backward(weighting(engine.compute_gramian(stacked)))

        return lambda: setup.step(backward)

    def by_jacobian(aggregator: Any, *, by_rows: bool = False) -> Step:
        setup = Setup()

        def backward(losses, features):
            autojac.mtl_backward(
                losses, features=features, parallel_chunk_size=1 if by_rows else None
            )
            options = {"optimize_gramian_computation": True} if by_rows else {}
            autojac.jac_to_grad(setup.trunk.parameters(), aggregator, **options)

        return lambda: setup.step(backward)

    return {
        PLAIN: plain(),
        "uncertainty": scalarized(scalarization.UW(num_tasks)),
        "dwa": scalarized(scalarization.DWA()),
        "famo, second forward pass": famo(),
        "upgrad, autogram": by_gramian(aggregation.UPGradWeighting()),
        "upgrad, Jacobian": by_jacobian(aggregation.UPGrad()),
        "upgrad, Jacobian by rows": by_jacobian(aggregation.UPGrad(), by_rows=True),
        "mgda, Jacobian": by_jacobian(aggregation.MGDA()),
        "cagrad, Jacobian": by_jacobian(aggregation.CAGrad(c=0.5)),
    }


def model(torch: Any, workload: Workload) -> tuple[Any, Any]:
    """The trunk and the heads of a workload as modules."""
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(*(_module(torch.nn, layer) for layer in workload.trunk))
    heads = [torch.nn.Linear(*workload.heads) for _ in range(workload.num_tasks)]
    return trunk, torch.nn.ModuleList(heads)


def _module(nn: Any, layer: Layer) -> Any:
    match layer:
        case ("dense", c, f):
            return nn.Linear(c, f)
        case ("relu",):
            return nn.ReLU()
        case ("conv", c, f, size):
            return nn.Conv2d(c, f, size)
        case ("pool",):
            return nn.MaxPool2d(2)
        case ("flatten",):
            return nn.Flatten()
        case ("average",):
            return _composite(nn, {}, lambda _, x: x.mean(dim=1))
        case ("embed", vocabulary, length, width):
            parts = {"tokens": nn.Embedding(vocabulary, width)}
            parts["positions"] = nn.Embedding(length, width)
            return _composite(nn, parts, _embed)
        case ("block", width, num_heads):
            parts = {
                "norm1": nn.LayerNorm(width),
                "qkv": nn.Linear(width, 3 * width),
                "out": nn.Linear(width, width),
                "norm2": nn.LayerNorm(width),
                "up": nn.Linear(width, 4 * width),
                "down": nn.Linear(4 * width, width),
            }
            return _composite(nn, parts, lambda block, x: _block(block, x, num_heads))
    raise ValueError(f"no layer is called {layer[0]!r}")


def _composite(nn: Any, parts: dict[str, Any], function: Callable[[Any, Any], Any]) -> Any:
    class Composite(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

        def forward(self, x):
            return function(self, x)

    return Composite()


def _embed(embed: Any, x: Any) -> Any:
    return embed.tokens(x) + embed.positions(x.new_tensor(range(x.shape[1])))


def _block(block: Any, x: Any, num_heads: int) -> Any:
    width = x.shape[-1]
    split = block.qkv(block.norm1(x)).unflatten(-1, (3, num_heads, width // num_heads))
    query, key, value = (part.transpose(1, 2) for part in split.unbind(2))
    scores = query @ key.transpose(-1, -2) * (width // num_heads) ** -0.5
    x = x + block.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    return x + block.down(block.up(block.norm2(x)).relu())
