"""Task hierarchy: an easier task feeds the layers of a harder one, or sits at a lower layer."""

from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtl_optax.models._base import (
    MLP,
    Activation,
    Builder,
    Layer,
    Sizes,
    check_width,
    is_layer,
    names_of_heads,
    positive_integer,
    read,
    require_width,
)


class Hierarchical(nnx.Module):
    r"""A shared encoder, and heads that read the heads of easier tasks, or a layer of their own.

    .. math:: y_k = \mathrm{head}_k([h_{d_k}, z_{p_1}, z_{p_2}, \dots]), \quad
        h_d = \mathrm{layer}_d(h_{d-1}), \; h_0 = x, \quad p_i \in \mathrm{parents}(k)

    where :math:`z_p` is the output of the easier task p, or the features before its last layer.
    Parts are concatenated along the last axis, the parents in sorted order. A task whose
    :math:`d_k` is not the last layer is supervised there: the layers above are none of its own.

    **Shared by all tasks**: ``encoder``, up to the least depth; a layer above it by the tasks whose
    depth reaches it. **Shared by an easier task and all tasks downstream of
    it**: ``heads[easier]``, since the loss of a harder task reaches them through what is fed; with
    ``feed="hidden"`` all but its last layer. **Of one task**: the heads that feed no other task,
    with ``feed="hidden"`` also the last layer of each head, and with ``stop_gradient=True`` every
    head.

    Args:
      encoder: as in `HardSharing`; its features need a last axis to concatenate along.
      heads: as in `HardSharing`; a module reads the features and what is fed, concatenated.
      parents: for each harder task, the easier task or tasks that feed it. Tasks left out read the
        features alone; the tasks must not feed each other in a circle.
      depths: for an easier task, after how many layers of the encoder its head sits, at least 1;
        tasks left out read what the encoder returns. Takes an encoder given by sizes, an `MLP` or
        an ``nnx.Sequential``, of which every entry counts.
      feed: ``"outputs"`` feeds what an easier task predicts (variables such as logits), and
        ``"hidden"`` the features before its last layer. The latter needs a head with several
        layers, such as ``(16, 1)``, or a module with methods ``hidden(x)`` and ``readout(hidden)``,
        as `MLP` has, and, if a fed head is given by sizes, an attribute ``hidden_features``.
      stop_gradient: whether a harder task only reads what it is fed and does not train it.
      features: as in `HardSharing`.
      activation: as in `HardSharing`.
      dtype: as in `HardSharing`.
      param_dtype: as in `HardSharing`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: as in `HardSharing`, and if ``parents`` or ``depths`` name an unknown task, there
        is a circle, the encoder has no such layer, or a task that feeds others has no such features
        as ``feed`` asks for.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax import models
      >>> model = models.Hierarchical(
      ...     (4, 16), {"buy": 1, "click": 2}, parents={"buy": "click"}, rngs=nnx.Rngs(0)
      ... )
      >>> model.order  # the easier task goes first
      ('click', 'buy')
      >>> model.heads["buy"].in_features  # 16 features and the 2 outputs of "click"
      18

      The easier task at the first of three layers:

      >>> model = models.Hierarchical(
      ...     (4, 32, 16, 8), {"buy": 1, "click": 2}, depths={"click": 1}, rngs=nnx.Rngs(0)
      ... )
      >>> {task: head.in_features for task, head in model.heads.items()}
      {'buy': 8, 'click': 32}

    References:
      Guo et al., `Dynamic Task Prioritization for Multitask Learning
      <https://doi.org/10.1007/978-3-030-01270-0_17>`_, 2018, section 4.
    """

    def __init__(
        self,
        encoder: Layer | Sizes,
        heads: Mapping[str, Layer | Sizes],
        *,
        parents: Mapping[str, str | Sequence[str]] | None = None,
        depths: Mapping[str, int] | None = None,
        feed: str = "outputs",
        stop_gradient: bool = False,
        features: int | None = None,
        activation: Activation = nnx.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if feed not in ("outputs", "hidden"):
            raise ValueError(f"feed is {feed!r}, expected 'outputs' or 'hidden'")
        build = Builder(activation, dtype, param_dtype, rngs)
        self.tasks = names_of_heads(heads)
        self.feed = feed
        self.stop_gradient = stop_gradient
        edges = _check_parents({} if parents is None else parents, self.tasks)
        self.order = _topological_order(edges)
        # In a tuple, since nnx would take a dictionary for part of the parameters.
        self.parents = tuple(edges[task] for task in self.order)
        self.encoder, width = build.encoder(encoder, features)
        depths = {} if depths is None else _check_depths(depths, self.tasks, self.encoder)
        self.depths = tuple(depths.get(task) for task in self.order)

        self.easier = tuple(sorted({parent for task in self.tasks for parent in edges[task]}))
        built: dict[str, Any] = {}
        for task, depth in zip(self.order, self.depths, strict=True):
            head = heads[task]
            inputs = width if depth is None else build.width(self.encoder.layers[depth - 1])
            if not is_layer(head):
                why = f"the head of task {task!r} is given by sizes"
                inputs = require_width(inputs, why) + sum(
                    self._fed_width(p, built[p], why) for p in edges[task]
                )
            built[task] = build.head(task, head, inputs)
            if task in self.easier and feed == "hidden":
                _check_hidden(task, built[task])
        self.heads = nnx.data(built)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Outputs of all tasks; what follows ``x`` goes to the encoder."""
        levels = self._levels(x, *args, **kwargs)
        outputs, fed = {}, {}
        for task, parents, depth in zip(self.order, self.parents, self.depths, strict=True):
            inputs = levels[depth]
            if parents:
                inputs = jnp.concatenate([inputs, *(fed[p] for p in parents)], -1)
            if self.feed == "hidden" and task in self.easier:
                head = self.heads[task]
                if type(head) is MLP:
                    check_width(f"the head of task {task!r}", head.in_features, inputs)
                fed[task] = head.hidden(inputs)
                outputs[task] = head.readout(fed[task])
            else:
                outputs[task] = fed[task] = read(self.heads, task, inputs)
            if self.stop_gradient:
                fed[task] = jax.lax.stop_gradient(fed[task])
        return {task: outputs[task] for task in self.tasks}

    def _levels(self, x: Any, *args: Any, **kwargs: Any) -> dict[int | None, Any]:
        """What the encoder's layers return that heads read, by depth; None is the last one."""
        if not any(self.depths):
            return {None: self.encoder(x, *args, **kwargs)}
        levels: dict[int | None, Any] = {}
        final = getattr(self.encoder, "activate_final", None)  # None but for an MLP
        for depth, layer in enumerate(self.encoder.layers, start=1):
            x = layer(x, *args, **kwargs)
            args, kwargs = (), {}
            if final or (final is False and depth < len(self.encoder.layers)):
                x = self.encoder.activation(x)
            levels[depth] = levels[None] = x
        return levels

    def _fed_width(self, parent: str, head: Any, why: str) -> int:
        name = "out_features" if self.feed == "outputs" else "hidden_features"
        width = getattr(head, name, None)
        if not isinstance(width, int):
            raise ValueError(
                f"{why}, but the width of what task {parent!r} feeds it is unknown: give the "
                f"module of {parent!r} an attribute `{name}`"
            )
        return width


def _check_parents(
    parents: Mapping[str, str | Sequence[str]], tasks: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """The parents of every task, sorted."""
    if not isinstance(parents, Mapping):
        raise ValueError(
            f"parents is {parents!r}, expected a dictionary from a harder task to the easier ones "
            "that feed it, such as {'buy': ('click',)}"
        )
    edges = dict.fromkeys(tasks, ())
    for task, easier in parents.items():
        if not isinstance(easier, Iterable):
            raise ValueError(
                f"parents of task {task!r} is {easier!r}, expected the name of an easier task or "
                "several, such as ('click',): leave out a task that none feeds"
            )
        easier = (easier,) if isinstance(easier, str) else tuple(easier)
        for name in (task, *easier):
            if name not in tasks:
                raise ValueError(
                    f"parents of task {task!r} name the unknown task {name!r}, expected one of "
                    f"{tasks}: give it a head or leave it out"
                )
        edges[task] = tuple(sorted(set(easier)))
    return edges


def _check_depths(depths: Any, tasks: tuple[str, ...], encoder: Any) -> dict[str, int]:
    """The depths of the tasks that have one."""
    if not isinstance(depths, Mapping) or set(depths) - set(tasks):
        raise ValueError(
            f"depths is {depths!r}, expected a dictionary from some of the tasks {tasks} to a "
            "number of layers, such as {'click': 1}"
        )
    if not isinstance(encoder, MLP | nnx.Sequential):
        raise ValueError(
            f"depths is given, and the encoder is a {type(encoder).__name__}, whose layers are "
            "unknown: give it by sizes, such as (8, 32, 16), or as an nnx.Sequential of its layers"
        )
    for task, depth in depths.items():
        if positive_integer(depth, f"the depth of task {task!r}") > len(encoder.layers):
            raise ValueError(
                f"the depth of task {task!r} is {depth}, expected at most {len(encoder.layers)}, "
                "the number of layers of the encoder"
            )
    return dict(depths)


def _topological_order(edges: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    try:
        return tuple(TopologicalSorter(edges).static_order())
    except CycleError as error:
        circle = " -> ".join(repr(task) for task in error.args[1])
        raise ValueError(
            f"parents has the circle {circle}, expected an order from easier to harder tasks: "
            "remove one of these"
        ) from None


def _check_hidden(task: str, head: Any) -> None:
    deep = len(head.layers) > 1 if isinstance(head, MLP) else True
    if not (deep and hasattr(head, "hidden") and hasattr(head, "readout")):
        raise ValueError(
            f"task {task!r} feeds others and feed='hidden', but its head has no hidden layer: give "
            "it sizes such as (16, 1), or a module with methods hidden(x) and readout(hidden)"
        )
