"""The table of every strategy, over which tests, benchmarks and docs iterate."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import optax

from mtl_optax import aggregators, balancers
from mtl_optax._options import check_num_tasks


class Strategy(NamedTuple):
    """One row of the catalog: a whole strategy, Jacobian in, gradient out.

    Attributes:
      name: the name `make` builds it by.
      kind: `"balancer"` (here with `sum_tasks()` behind it) or `"aggregator"`.
      needs: `"losses"` (one backward pass), `"gramian"` (K), `"rows"` (K, and the K gradients are
        held), `"batches"` (a tuple of Jacobians of several batches, K each), or `"validation"` (the
        losses of another batch as a function of the parameters, and their gradients).
      scale: what its update's norm is like: `"sum"`, `"mean"`, `"unit"` (it does not follow the
        norm of the rows) or `"free"`.
      summary: what it does, in a few words.
      paper: the address of its paper; empty for the plain baselines.
      factory: `factory(num_tasks, **options)`; its defaults are in `options`.
      stateful: whether, by default, an update depends on earlier ones.
      stochastic: whether it takes a `key=`.
      ordered: whether the order of the tasks has a say, as where weights are drawn or tasks chosen
        by their position.
      extra_args: the further arguments that its `update` needs, such as `kpis`.
      grid: numbers to try for some options, which `mtl.compare` does when it is told to tune.
    """

    name: str
    kind: Literal["balancer", "aggregator"]
    needs: Literal["losses", "gramian", "rows", "batches", "validation"]
    scale: Literal["sum", "mean", "unit", "free"]
    summary: str
    paper: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    stateful: bool = False
    stochastic: bool = False
    ordered: bool = False
    extra_args: tuple[str, ...] = ()
    grid: Mapping[str, tuple[float, ...]] = {}

    @property
    def options(self) -> dict[str, Any]:
        """The factory's keyword options with their defaults; a `key` has none."""
        parameters = list(inspect.signature(self.factory).parameters.values())[1:]
        return {p.name: p.default for p in parameters if p.default is not p.empty}


def _fixed(num_tasks: int, *, weights: Any = None) -> optax.GradientTransformationExtraArgs:
    check_num_tasks(num_tasks)
    return balancers.weights([1.0] * num_tasks if weights is None else weights)


_ARXIV = "https://arxiv.org/abs/"

# fmt: off
_ROWS = (
    Strategy("sum", "aggregator", "losses", "sum", "equal weights, the plain summed loss", "",
             aggregators.sum),
    Strategy("mean", "aggregator", "losses", "mean", "equal weights, averaged on the trunk", "",
             aggregators.mean),
    Strategy("weights", "balancer", "losses", "sum", "weights you choose, or their schedule", "",
             _fixed),
    Strategy("uncertainty", "balancer", "losses", "free", "learned noise of each task",
             _ARXIV + "1705.07115", balancers.uncertainty, stateful=True),
    Strategy("uwso", "balancer", "losses", "sum", "softmax of the inverse losses",
             _ARXIV + "2408.07985", balancers.uwso),
    Strategy("gradnorm", "balancer", "gramian", "sum", "equal gradient norms and training rates",
             _ARXIV + "1711.02257", balancers.gradnorm, stateful=True),
    Strategy("dwa", "balancer", "losses", "sum", "more weight where the loss falls slowly",
             _ARXIV + "1803.10704", balancers.dwa, stateful=True),
    Strategy("dtp", "balancer", "losses", "free", "more weight where performance is poor",
             "https://openaccess.thecvf.com/content_ECCV_2018/html/"
             "Michelle_Guo_Focus_on_the_ECCV_2018_paper.html",
             balancers.dtp, stateful=True, extra_args=("kpis",)),
    Strategy("auto_lambda", "balancer", "validation", "free", "weights that help on another batch",
             _ARXIV + "2202.03091", balancers.auto_lambda, stateful=True,
             extra_args=("validation_fn",)),
    Strategy("moml", "balancer", "validation", "mean", "weights that help all on another batch",
             _ARXIV + "2102.07121", balancers.moml, stateful=True, extra_args=("validation_fn",)),
    Strategy("forum", "aggregator", "validation", "free", "down on another batch and in training",
             _ARXIV + "2401.09257", aggregators.forum, stateful=True,
             extra_args=("losses_fn", "validation_fn")),
    Strategy("ldc_mtl", "balancer", "losses", "mean", "a learned router, and losses kept together",
             _ARXIV + "2502.08585", balancers.ldc_mtl, stateful=True, ordered=True),
    Strategy("rlw", "balancer", "losses", "sum", "random weights, drawn anew at each update",
             _ARXIV + "2111.10603", balancers.rlw, stochastic=True, ordered=True),
    Strategy("rgw", "aggregator", "losses", "sum", "random weights, the heads left alone",
             _ARXIV + "2111.10603", aggregators.rgw, stochastic=True, ordered=True),
    Strategy("gls", "balancer", "losses", "free", "the geometric mean of the losses",
             _ARXIV + "1904.08492", balancers.gls),
    Strategy("imtl_l", "balancer", "losses", "free", "learned scales that make the losses equal",
             "https://openreview.net/forum?id=IMPnRXEWpvr", balancers.imtl_l, stateful=True),
    Strategy("imtl", "aggregator", "gramian", "mean", "learned loss scales, equal projections",
             "https://openreview.net/forum?id=IMPnRXEWpvr", aggregators.imtl, stateful=True),
    Strategy("scale_invariant", "balancer", "losses", "free", "the sum of the log losses", "",
             balancers.scale_invariant),
    Strategy("famo", "balancer", "losses", "mean", "log losses that fall equally fast",
             _ARXIV + "2306.03792", balancers.famo, stateful=True),
    Strategy("stch", "balancer", "losses", "sum", "a smooth maximum of the losses",
             _ARXIV + "2402.19078", balancers.stch),
    Strategy("softadapt", "balancer", "losses", "sum", "more weight where the loss rises",
             _ARXIV + "1912.12355", balancers.softadapt, stateful=True),
    Strategy("relobralo", "balancer", "losses", "sum", "relative losses, with random look back",
             _ARXIV + "2110.09813", balancers.relobralo, stateful=True, stochastic=True),
    Strategy("cov", "balancer", "losses", "sum", "more weight where the loss ratio varies",
             _ARXIV + "2009.01717", balancers.cov, stateful=True),
    Strategy("go4align", "balancer", "losses", "free", "equal losses, one weight a group of tasks",
             _ARXIV + "2404.06486", balancers.go4align, stateful=True),
    Strategy("cosmos", "balancer", "losses", "free", "a weighted sum turned towards a preference",
             _ARXIV + "2103.13392", balancers.cosmos),
    Strategy("pbi", "balancer", "losses", "free", "down a preference ray, penalised off it",
             "https://doi.org/10.1109/TEVC.2007.892759", balancers.pbi),
    Strategy("pareto", "balancer", "gramian", "mean", "Pareto-efficient weights above floors",
             "https://doi.org/10.1145/3298689.3346998", balancers.pareto),
    Strategy("mgda", "aggregator", "gramian", "mean", "the shortest convex combination",
             _ARXIV + "1810.04650", aggregators.mgda),
    Strategy("pcgrad", "aggregator", "gramian", "sum", "conflicting gradients projected off",
             _ARXIV + "2001.06782", aggregators.pcgrad, stochastic=True, ordered=True),
    Strategy("gradvac", "aggregator", "gramian", "sum", "rows turned to their usual cosines",
             _ARXIV + "2010.05874", aggregators.gradvac, stateful=True, stochastic=True,
             ordered=True),
    Strategy("gradcraft", "aggregator", "gramian", "mean", "rows of like size, freed of conflict",
             _ARXIV + "2407.19682", aggregators.gradcraft),
    Strategy("cagrad", "aggregator", "gramian", "free", "best worst task near the mean",
             _ARXIV + "2110.14048", aggregators.cagrad),
    Strategy("conicgrad", "aggregator", "gramian", "mean", "best worst task in a cone at the mean",
             _ARXIV + "2502.00217", aggregators.conicgrad),
    Strategy("imtl_g", "aggregator", "gramian", "mean", "equal projections on every task",
             "https://openreview.net/forum?id=IMPnRXEWpvr", aggregators.imtl_g),
    Strategy("nash_mtl", "aggregator", "gramian", "unit", "the Nash bargaining solution",
             _ARXIV + "2202.01017", aggregators.nash_mtl),
    Strategy("fairgrad", "aggregator", "gramian", "unit", "α-fair improvements",
             _ARXIV + "2402.15638", aggregators.fairgrad),
    Strategy("aligned_mtl", "aggregator", "gramian", "mean", "singular values made equal",
             _ARXIV + "2305.19000", aggregators.aligned_mtl),
    Strategy("upgrad", "aggregator", "gramian", "mean", "each row freed of conflict, averaged",
             _ARXIV + "2406.16232", aggregators.upgrad),
    Strategy("dualproj", "aggregator", "gramian", "mean", "the mean freed of conflict",
             _ARXIV + "1706.08840", aggregators.dualproj),
    Strategy("conflict_free", "aggregator", "gramian", "sum", "equal cosines with all (ConFIG)",
             _ARXIV + "2408.11104", aggregators.conflict_free),
    Strategy("epo", "aggregator", "gramian", "mean", "to a chosen ratio of the losses",
             "https://proceedings.mlr.press/v119/mahapatra20a.html", aggregators.epo),
    Strategy("ntk", "balancer", "gramian", "free", "equal convergence rates by kernel traces",
             _ARXIV + "2007.14527", balancers.ntk),
    Strategy("lr_annealing", "balancer", "rows", "free", "terms at the size of the residual's",
             _ARXIV + "2001.04536", balancers.lr_annealing, stateful=True, ordered=True),
    Strategy("grad_norm_weights", "balancer", "gramian", "sum", "equal gradient norms, averaged",
             _ARXIV + "2308.08468", balancers.grad_norm_weights, stateful=True),
    Strategy("db_pinn", "balancer", "rows", "free", "conditions at the residual's size, by need",
             _ARXIV + "2505.11117", balancers.db_pinn, stateful=True, ordered=True),
    Strategy("encodec", "balancer", "gramian", "sum", "chosen shares of the gradient norm",
             _ARXIV + "2210.13438", balancers.encodec, stateful=True),
    Strategy("graddrop", "aggregator", "rows", "sum", "one random sign an entry",
             _ARXIV + "2010.06808", aggregators.graddrop, stochastic=True),
    Strategy("krum", "aggregator", "gramian", "mean", "the rows nearest to their neighbours",
             _ARXIV + "1703.02757", aggregators.krum),
    Strategy("trimmed_mean", "aggregator", "rows", "mean", "entries averaged without extremes",
             _ARXIV + "1803.01498", aggregators.trimmed_mean),
    Strategy("db_mtl", "aggregator", "rows", "free", "log losses, rows at the largest norm",
             _ARXIV + "2308.12029", aggregators.db_mtl, stateful=True),
    Strategy("moco", "aggregator", "rows", "mean", "min-norm weights on tracked rows",
             "https://openreview.net/forum?id=dLAYGdKTi2", aggregators.moco, stateful=True),
    Strategy("cr_mogm", "aggregator", "gramian", "mean", "smoothed weights of another aggregator",
             "https://openreview.net/forum?id=ScwfQ7hdwyP", aggregators.cr_mogm, stateful=True),
    Strategy("excess_mtl", "aggregator", "rows", "mean", "more weight to a high excess risk",
             _ARXIV + "2402.02009", aggregators.excess_mtl, stateful=True),
    Strategy("pcd", "aggregator", "gramian", "free", "a primary task, progress for the others",
             _ARXIV + "2606.29521", aggregators.pcd, stateful=True, ordered=True),
    Strategy("metabalance", "aggregator", "rows", "sum", "auxiliary tasks at the primary's size",
             _ARXIV + "2203.06801", aggregators.metabalance, stateful=True, ordered=True),
    Strategy("adatask", "aggregator", "rows", "unit", "Adam with moments of each task's own",
             _ARXIV + "2211.15055", aggregators.adatask, stateful=True),
    Strategy("modo", "aggregator", "batches", "mean", "min-norm weights by double sampling",
             _ARXIV + "2305.20057", aggregators.modo, stateful=True),
    Strategy("sdmgrad", "aggregator", "batches", "mean", "a direction near a preferred one",
             _ARXIV + "2305.18409", aggregators.sdmgrad, stateful=True),
    Strategy("m_config", "aggregator", "rows", "unit", "ConFIG on momenta, one task a step",
             _ARXIV + "2408.11104", aggregators.m_config, stateful=True, ordered=True),
)
# fmt: on

# Around the defaults, for the options that papers tune.
_GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "gradnorm": {"alpha": (0.5, 1.5, 3.0)},
    "dwa": {"temperature": (0.5, 2.0, 5.0)},
    "uwso": {"temperature": (0.5, 1.0, 5.0)},
    "stch": {"mu": (0.03, 0.1, 0.3)},
    "softadapt": {"beta": (0.1, 1.0, 10.0)},
    "relobralo": {"temperature": (0.1, 1.0, 10.0)},
    "cagrad": {"c": (0.2, 0.5, 0.8)},
    "fairgrad": {"alpha": (0.5, 1.0, 2.0)},
}

STRATEGIES: dict[str, Strategy] = {
    row.name: row._replace(grid=_GRIDS.get(row.name, {})) for row in _ROWS
}


def register(strategy: Strategy) -> None:
    """Adds a strategy of your own to the catalog, so that `make` and all that iterates knows it.

    Args:
      strategy: its row. The factory takes `num_tasks` first and options by keyword, and builds a
        whole strategy: a balancer with `sum_tasks()` behind it, or an aggregator.

    Raises:
      ValueError: if the name is taken, or the factory does not take `num_tasks` first.

    Examples:
      >>> import optax
      >>> import mtl_optax as mtl
      >>> def inverse_loss(num_tasks):
      ...     def update_fn(jacobian, state, **extra_args):
      ...         return jacobian.scale(1 / jacobian.loss_vector()), state
      ...     balancer = mtl.link(optax.init_empty_state, update_fn, num_tasks)
      ...     return optax.chain(balancer, mtl.sum_tasks())
      >>> mtl.register(mtl.Strategy(
      ...     "inverse_loss", "balancer", needs="losses", scale="free",
      ...     summary="each loss over itself", paper="", factory=inverse_loss))
      >>> tx = mtl.make("inverse_loss", num_tasks=2)
      >>> del mtl.STRATEGIES["inverse_loss"]
    """
    if strategy.name in STRATEGIES:
        raise ValueError(
            f"a strategy is called {strategy.name!r} already: choose another name, or first "
            f"del mtl.STRATEGIES[{strategy.name!r}]"
        )
    if next(iter(inspect.signature(strategy.factory).parameters), None) != "num_tasks":
        raise ValueError(
            f"the factory of {strategy.name!r} does not take num_tasks first: define it as "
            f"{strategy.name}(num_tasks, *, ...)"
        )
    STRATEGIES[strategy.name] = strategy


def make(
    name: str, num_tasks: int, *, key: jax.Array | None = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Builds a whole strategy by its name in the catalog.

    Args:
      name: a name in `STRATEGIES`.
      num_tasks: number of tasks K; static, at least 1.
      key: a typed random key, for the stochastic strategies; the others ignore it.
      **options: keyword options of the strategy's factory.

    Returns:
      A transformation from the Jacobian to one gradient, to be chained with any optimizer.

    Raises:
      ValueError: if the name is unknown (the text lists the near ones), or a stochastic strategy
        gets no key.

    Examples:
      >>> import optax
      >>> import mtl_optax as mtl
      >>> tx = optax.chain(mtl.make("dwa", num_tasks=2, temperature=1.0), optax.adam(1e-3))
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=3, cutoff=0.4) or list(STRATEGIES)
        raise ValueError(f"no strategy is called {name!r}; near it: {', '.join(near)}")
    strategy = STRATEGIES[name]
    if strategy.stochastic:
        if key is None:
            raise ValueError(f"{name} draws at random: pass key=jax.random.key(0)")
        options["key"] = key
    return strategy.factory(num_tasks, **options)


def markdown() -> str:
    """The catalog as the Markdown table of docs/strategies.md."""
    titles = "strategy", "kind", "needs", "state", "update scale", "what it does"
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in STRATEGIES.values():
        name = f"[`{row.name}`]({row.paper})" if row.paper else f"`{row.name}`"
        state = " ".join(["memory"] * row.stateful + ["key"] * row.stochastic)
        lines.append(
            f"| {name} | {row.kind} | {row.needs} | {state} | {row.scale} | {row.summary} |"
        )
    return "\n".join(lines)
