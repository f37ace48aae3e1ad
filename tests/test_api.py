"""What the package offers, by name, and what its factories answer to a wrong call."""

import inspect
import pathlib
import pickle
import tomllib

import jax
import pytest

import mtl_optax as mtl

# Beside the strategies and their `scale_by_`: a name that joins or leaves is a change of the API.
# fmt: off
NAMES = [
    "Jacobian", "Sketch", "as_jacobian", "task_names", "value_and_feature_jac", "value_and_jac",
    "PerPair", "PerTask", "STRATEGIES", "Strategy", "link", "make", "register", "mean_tasks",
    "sum_tasks", "match_norm", "ntk_traces", "clip_tasks", "drop_nonfinite_tasks", "ema_tasks",
    "every", "log_losses", "monitor_tasks", "multi_steps", "normalize_tasks", "partition",
    "skip_nonfinite", "observe_losses", "resize_state", "summarize", "fronts", "compare",
    "losses", "metrics", "models", "plots", "solvers", "__version__",
]
# fmt: on
OF_MODULES = {
    "compare": "Comparison Diagnosis Draw Problem adam diagnose labelled run",
    "losses": "PointWeights accuracy brdr causal_weights rba regression_focal_loss self_adaptive "
    "share_within softmax_focal_loss task_priority",
    "fronts": "hypervolume_gradient interpolate moo_svgd ordering_penalty simplex_grid "
    "with_preference",
    "metrics": "affinity delta_m hypervolume igd mean_rank non_dominated spacing",
    "models": "CGC CrossStitch DSelectK Experts HardSharing Hierarchical LTB MLP MMoE MTAN PLE",
    "plots": "affinity cosines front gradient_norms pareto_plane weights",
    "solvers": "SolverResult nnls nonnegative_qp simplex_qp",
}
FACTORIES = sorted(n for n in dir(mtl) if n in mtl.STRATEGIES or n.startswith("scale_by_"))


def test_the_package_shows_its_public_names_and_no_others():
    strategies = {*mtl.STRATEGIES, *(n for n in dir(mtl) if n.startswith("scale_by_"))}
    assert set(dir(mtl)) - strategies == set(NAMES)
    assert set(mtl.STRATEGIES) <= set(dir(mtl))
    assert len(dir(mtl)) == len(set(dir(mtl)))


@pytest.mark.parametrize("name", OF_MODULES)
def test_a_module_shows_its_public_names_and_no_others(name):
    shown = [n for n in dir(getattr(mtl, name)) if not n.startswith("_")]
    assert sorted(shown) == sorted(OF_MODULES[name].split())
    assert sorted(getattr(mtl, name).__all__) == sorted(shown)


def test_the_page_of_what_is_stable_names_the_modules():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "stability.md").read_text("utf-8")
    named = page.partition("what `dir` of its modules ")[2].partition(" lists")[0]
    assert named == ", ".join(f"`{name}`" for name in sorted(OF_MODULES))


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_says_what_to_pass(name):
    factory = getattr(mtl, name)
    first, *options = inspect.signature(factory).parameters
    call = rf"Call mtl\.{name}\({first}="
    with pytest.raises(TypeError, match=rf"^{name}: missing .*'{first}'.*{call}"):
        factory()
    if first == "num_tasks":
        with pytest.raises(TypeError, match="where num_tasks is the number of losses"):
            factory(2, 3)
    key = {"key": jax.random.key(0)} if "key" in options else {}
    listed = ", ".join(name for name in options if name != "key")
    with pytest.raises(TypeError, match=rf"'temprature'.*{listed}$"):
        factory(2, **key, temprature=2.0)


@pytest.mark.parametrize("name", ["sum_tasks", "mean_tasks", "sum", "mean"])
def test_every_aggregator_takes_the_number_of_tasks(name):
    tx = getattr(mtl, name)(2)
    _, jac = mtl.value_and_jac(lambda w: [w, 2 * w, 3 * w])(1.0)
    with pytest.raises(ValueError, match=r"got 3 losses .* num_tasks=2"):
        tx.update(jac, tx.init(1.0))
    with pytest.raises(ValueError, match="num_tasks=0"):
        getattr(mtl, name)(0)


def test_the_version_is_one():
    root = pathlib.Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert project["version"] == mtl.__version__
    assert f"\nversion: {mtl.__version__}\n" in citation


def test_factories_are_pickled_by_their_public_name():
    assert pickle.loads(pickle.dumps(mtl.upgrad)) is mtl.upgrad
    assert mtl.dwa.__module__ == "mtl_optax"
