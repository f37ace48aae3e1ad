"""The pages that the site makes from the catalog and the docstrings: a page a method, and the API.

A hook of MkDocs: nothing is written to disk. `pages()` alone is what the tests look at.
"""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

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
}
SCALES = {
    "sum": "like the sum of the gradients",
    "mean": "like their mean",
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
    ("Metrics", mtl.metrics, ("delta_m", "mean_rank", "hypervolume")),
    ("Plots", mtl.plots, mtl.plots.__all__),
    ("Solvers", mtl.solvers, mtl.solvers.__all__),
)  # fmt: skip
# Measured by the benchmarks, where they have been run.
MEASURED = {"Results": "results.md", "Cost": "performance.md", "Scaling": "scaling.md"}


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Adds the generated pages, and their places in the navigation."""
    from mkdocs.structure.files import File  # the tests do without

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    measured = {title: path for title, path in MEASURED.items() if (DOCS / path).exists()}
    methods = [{name: f"methods/{name}.md"} for name in mtl.STRATEGIES]
    config.nav += [
        {"Methods": ["methods/index.md", *methods]},
        {"API": [{title: _api_path(title)} for title, *_ in API]},
        {"Measured": [{title: path} for title, path in measured.items()]},
    ]
    return files


def pages() -> dict[str, str]:
    """Path to Markdown."""
    made = {"methods/index.md": _index()}
    made |= {f"methods/{row.name}.md": _method(row) for row in mtl.STRATEGIES.values()}
    return made | {_api_path(title): _api(title, module, names) for title, module, names in API}


def documented() -> set[str]:
    """The public names that have a place: on a page of their own, or on a method's."""
    names = {name for _, _, group in API for name in group}
    for row in mtl.STRATEGIES.values():
        names |= {row.name, _public_name(row)}
    return names


def _index() -> str:
    table = catalog.markdown()
    for row in mtl.STRATEGIES.values():
        linked = f"[`{row.name}`]({row.paper})" if row.paper else f"`{row.name}`"
        table = table.replace(f"| {linked} |", f"| [`{row.name}`]({row.name}.md) |")
    return (
        "# All methods\n\n"
        "A page a method, with its maths, its options and its source. "
        "[Which one?](../guide.md) says where to begin.\n\n" + table + "\n"
    )


def _method(row: catalog.Strategy) -> str:
    name = _public_name(row)
    arguments = ", key=jax.random.key(0)" if row.stochastic else ""
    whole = f"mtl.{row.name}(num_tasks=2{arguments})"
    if row.name == "weights":
        whole = f'mtl.make("{row.name}", num_tasks=2)'
    lines = [
        f"# {row.name}",
        f"**{row.summary[0].upper()}{row.summary[1:]}.**"
        + (f" [Paper]({row.paper})" if row.paper else ""),
        "| | |\n|---|---|\n"
        + f"| kind | {row.kind} |\n"
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
    lines.append(f"::: {_home(mtl, name)}")
    return "\n\n".join(lines) + "\n"


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
