"""The pages that the site makes: the methods from the catalog, the API, the notebooks.

A hook of MkDocs: nothing is written to disk. `pages()` alone is what the tests look at.
"""

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import _methods
import _notebooks
import _pictures

import mtl_optax as mtl
from mtl_optax import catalog, jacobian, links, states, summary

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

DOCS = Path(__file__).parent

NEEDS = {
    "losses": "only the losses: one backward pass",
    "gramian": "the Gramian: K backward passes, or fewer",
    "rows": "the rows: K backward passes, and the K gradients are held",
    "batches": "the Jacobians of two or three batches: K backward passes each",
    "validation": "the losses of another batch as a function, and their gradients",
}
GROUPS = {
    "losses": "Losses only",
    "gramian": "The Gramian",
    "rows": "The rows",
    "batches": "Several batches",
    "validation": "Another batch's losses",
}
SCALES = {
    "sum": "about as long as the sum of the gradients",
    "mean": "about as long as the mean of the gradients",
    "unit": "of its own, whatever the gradients' norms",
    "free": "free: see below, or put `mtl.match_norm` around it",
}
# Title, module, names. What stands on a method's page is left out.
API = (
    ("Jacobian", jacobian, ("Jacobian", "value_and_jac", "value_and_feature_jac", "as_jacobian",
                            "Sketch", "Plan", "LeafPlan", "task_names")),
    ("Around the strategies", mtl.conditioning, mtl.conditioning.__all__),
    ("Wrappers and helpers", mtl, ("match_norm", "ntk_traces", "observe_losses", "sum_tasks",
                                   "mean_tasks")),
    ("Reading the state", summary, ("summarize",)),
    ("Resizing the state", states, ("resize_state",)),
    ("Catalog", catalog, ("make", "register", "Strategy", "STRATEGIES")),
    ("Links of your own", links, ("link",)),
    ("Losses", mtl.losses, mtl.losses.__all__),
    ("Models", mtl.models, mtl.models.__all__),
    ("Compare", mtl.compare, mtl.compare.__all__),
    ("Fronts", mtl.fronts, mtl.fronts.__all__),
    ("Metrics", mtl.metrics, mtl.metrics.__all__),
    ("Plots", mtl.plots, mtl.plots.__all__),
    ("Solvers", mtl.solvers, mtl.solvers.__all__),
)  # fmt: skip
# Measured by the benchmarks, where they have been run.
MEASURED = {
    "Results": "results.md",
    "Cost": "performance.md",
    "On a GPU": "gpu.md",
    "Scaling": "scaling.md",
}


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Adds the generated pages, and their places in the navigation."""
    from mkdocs.structure.files import File  # the tests do without

    pictures = _method_pictures() if config.extra["pictures"] else {}
    notebooks = _notebooks.notebooks(config.repo_url or "")
    for path, content in (pages(pictures) | pictures | notebooks).items():
        files.append(File.generated(config, path, content=content))
    measured = {title: path for title, path in MEASURED.items() if (DOCS / path).exists()}
    methods = [{GROUPS[needs]: [_entry(row) for row in _rows(needs)]} for needs in NEEDS]
    config.nav += [
        {"Methods": ["methods/index.md", *methods]},
        {"Notebooks": [path for path in notebooks if path.endswith(".md")]},
        {"API": ["stability.md", *({title: _api_path(title)} for title, *_ in API)]},
        {"Measured": [{title: path} for title, path in measured.items()]},
    ]
    return files


def pages(pictures: Iterable[str] = ()) -> dict[str, str]:
    """Path to Markdown; `pictures` are the paths of those that there are."""
    made = {"methods/index.md": _index()}
    made |= {f"methods/{name}.md": _method(row, pictures) for name, row in mtl.STRATEGIES.items()}
    return made | {_api_path(title): _api(title, module, names) for title, module, names in API}


def documented() -> set[str]:
    """The public names that have a place: on a page of their own, or on a method's."""
    names = {name for _, _, group in API for name in group}
    for row in mtl.STRATEGIES.values():
        names |= {row.name, _public_name(row)}
    return names


def _index() -> str:
    """The methods, by what they cost and then by what they are for."""
    parts = [
        "# All methods",
        "By what a step costs, and then by what it is for. A page each has the maths, the options, "
        "a picture, the source, and where we differ from it. [Which one?](../guide.md) says where "
        "to begin, [the scale of updates](../concepts.md#the-scale-of-updates) what the last "
        "column is.",
    ]
    for needs, cost in NEEDS.items():
        rows = _rows(needs)
        parts.append(f"## {GROUPS[needs]}\n\nNeeds {cost}.")
        for purpose in _methods.PURPOSES:
            lines = [_line(row) for row in rows if _methods.ADVICE[row.name].purpose == purpose]
            if lines:
                titles = "| method | what it does | use it when | scale |\n|---|---|---|---|"
                parts.append("\n".join([f"### {purpose}\n", titles, *lines]))
    return "\n\n".join(parts) + "\n"


def _rows(needs: str) -> list[catalog.Strategy]:
    return [row for row in mtl.STRATEGIES.values() if row.needs == needs]


def _entry(row: catalog.Strategy) -> dict[str, str]:
    return {row.name: f"methods/{row.name}.md"}


def _line(row: catalog.Strategy) -> str:
    use = _methods.ADVICE[row.name].use
    return f"| [`{row.name}`]({row.name}.md) | {row.summary} | {use} | {row.scale} |"


def _method(row: catalog.Strategy, pictures: Iterable[str]) -> str:
    name, advice = _public_name(row), _methods.ADVICE[row.name]
    arguments = ", key=jax.random.key(0)" if row.stochastic else ""
    whole = f"mtl.{row.name}(num_tasks=2{arguments})"
    if row.name == "weights":
        whole = f'mtl.make("{row.name}", num_tasks=2)'
    lines = [
        f"# {row.name}",
        f"**{row.summary[0].upper()}{row.summary[1:]}.**"
        + (f" [Paper]({row.paper})" if row.paper else ""),
        f"Use it when {advice.use}.\n\nRather not when {advice.avoid}.",
        "| | |\n|---|---|\n"
        + f"| kind | {row.kind} |\n"
        + f"| for | {advice.purpose[0].lower()}{advice.purpose[1:]} |\n"
        + f"| needs | {NEEDS[row.needs]} |\n"
        + f"| its update is | {SCALES[row.scale]} |\n"
        + f"| remembers earlier updates | {'yes' if row.stateful else 'no'} |\n"
        + f"| draws at random | {'yes, from `key=`' if row.stochastic else 'no'} |\n"
        + f"| heeds the order of the tasks | {'yes' if row.ordered else 'no'} |",
        "```python\nimport jax, optax\nimport mtl_optax as mtl\n\n"
        f"tx = optax.chain({whole}, optax.adamw(1e-3))\n```",
    ]
    if row.extra_args:
        extra = ", ".join(f"{arg}=..." for arg in row.extra_args)
        lines.append(f"Each update needs `tx.update(jac, opt_state, params, {extra})`.")
    if name.startswith("scale_by_"):
        lines.append(
            f"`mtl.{row.name}` is `chain(mtl.{name}, mtl.sum_tasks())`, with the same options."
        )
    if _picture_path(row.name, "conflict") in pictures:
        lines.append(
            f"![Two gradients in conflict](images/{row.name}-conflict.svg)\n"
            f"![Two gradients of unequal size](images/{row.name}-scale.svg)\n{{ .halves }}\n\n"
            "The tenth update, while the loss of a falls by 10 % an update and that of b by 1 %."
        )
    lines.append(f"::: {_home(mtl, name)}")
    return "\n\n".join(lines) + "\n"


def _method_pictures() -> dict[str, str]:
    """Path to SVG; none of the methods that ask for more than a picture has."""
    made = {}
    for name in mtl.STRATEGIES:
        if seen := _pictures.see(name):
            halves = _pictures.draw(name, seen)
            made |= {_picture_path(name, half): picture for half, picture in halves.items()}
    return made


def _picture_path(name: str, half: str) -> str:
    return f"methods/images/{name}-{half}.svg"


def _public_name(row: catalog.Strategy) -> str:
    balancer = f"scale_by_{row.name}"
    return balancer if hasattr(mtl, balancer) else row.name


def _api(title: str, module: ModuleType, names: tuple[str, ...] | list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {_home(module, name)}" for name in names)]) + "\n"


def _api_path(title: str) -> str:
    return f"api/{title.lower().replace(' ', '-')}.md"


def _home(module: ModuleType, name: str) -> str:
    """Where a name is public: `mtl_optax.balancers.ntk_traces` for `mtl.ntk_traces`."""
    for folder in (mtl.aggregators, mtl.balancers):
        if module is mtl and hasattr(folder, name):
            return f"{folder.__name__}.{name}"
    return f"{module.__name__}.{name}"
