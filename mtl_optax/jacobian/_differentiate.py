"""How to get a Jacobian: in place of `jax.value_and_grad`, at the features, or from rows."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax.jacobian._arguments import Arguments, split_aux
from mtl_optax.jacobian._given import GivenRows
from mtl_optax.jacobian._jacobian import Jacobian
from mtl_optax.jacobian._layout import Layout, Mask, resolve_mask
from mtl_optax.jacobian._linear_map import ROW_MODES, LinearMap, RowMode
from mtl_optax.jacobian._losses import check_losses, check_reduced, flatten_losses, task_names
from mtl_optax.jacobian._mapped import MappedMap, linearize_mapped
from mtl_optax.jacobian.ways import Gramian, Rows, Way, named
from mtl_optax.jacobian.ways.axis import Axis
from mtl_optax.jacobian.ways.features import Features


def value_and_jac(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: Any = None,
    wrt: Any = None,
    shared: Mask | None = "auto",
    gramian_at: Mask | None = None,
    rows: RowMode = "isolated",
    gramian: Gramian = "auto",
) -> Callable[..., tuple[Any, Jacobian]]:
    r"""Like `jax.value_and_grad`, for a function that returns several losses.

    The losses are evaluated and linearised once. What is computed beyond depends on what the
    strategy asks of the `Jacobian`: a loss-only strategy runs one backward pass, so its step costs
    what the plain summed-loss step costs; a strategy that needs the Gramian runs K, or the halves
    of them that `gramian` needs.

    An nnx module may stand among the arguments, as for `nnx.value_and_grad`: its variables of type
    `wrt` are differentiated, and what the call changes in it, batch statistics and random streams,
    is changed.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` returns the K losses: a dict of scalars, any
        other pytree of scalars, or an array of which each element is a task.
      argnums: which positional argument holds the parameters, or which several do; then the
        Jacobian is over their tuple. Static.
      has_aux: whether `loss_fn` returns `(losses, aux)`.
      in_axes: as of `jax.vmap`, for tasks along an axis: `loss_fn` is written for one element, and
        every element of the mapped axis is a task (times the losses that it returns). The risks of
        single examples, `in_axes=(None, 0, 0)`; tasks, environments or domains with batches of
        their own; heads stacked in one leaf, by 0 on that leaf of the parameters, which is then no
        shared one. Since a task depends on its own slice alone, the K rows take about one plain
        step, and so does their Gramian, which forms none of them for dense layers. An array of
        losses that you map yourself can't be told apart and takes K passes. Keyword arguments are
        mapped over their first axis.
      wrt: which parameters are trained. Of nnx modules a filter, `nnx.Param` by default; else a
        tree of bools like the parameters (a prefix will do), or a function from the parameters to
        one, or None for all. The others are in no row and no Gramian, and their update is zero.
      shared: which parameters the tasks share: aggregators combine the rows there, elsewhere each
        head follows its own loss. `"auto"` reads it off the program: a leaf is shared when two or
        more losses depend on it. Or a tree of bools like the parameters (a prefix will do), a
        function from the parameters to one, a filter of the variables of an nnx module, such as
        `nnx.PathContains("trunk")` or a function of path and variable, or None for all.
      gramian_at: where the Gramian is measured, in the same forms, such as the last shared layer
        for GradNorm. None measures it over all shared parameters.
      rows: how the K rows are computed. Every head is differentiated alone, whatever the mode.
        `"isolated"`: the trunk once a task, so that a NaN in one task can't reach another's row
        (losses returned as one array computed together are told apart where they were stacked from
        scalars, else vmapped). `"batched"`: the trunk's K passes vmapped into one, for accelerators
        and convolutions. `"sequential"`: one pass after another by `jax.lax.map`, the smallest
        program and the least memory; on CPU as fast as `"isolated"` for dense layers, several times
        slower for convolutions.
      gramian: how the Gramian is computed; `jac.plan()` prints it leaf by leaf. `"auto"`: `"rows"`
        where they take no more than a megabyte; else `"ghost"`, or `"streamed"` where layers stand
        in a loop, a checkpoint or a stack, and the step then takes at most a tenth more
        multiplications than with their rows.
        `"rows"`: from the rows, K × P numbers. `"ghost"`: dense layers and embeddings by the
        identity :math:`\langle x^\top\delta_i, x^\top\delta_j\rangle = \langle\delta_i, (x
        x^\top)\,\delta_j\rangle`, without their weight gradients, the rest from its rows; chosen
        layer by layer, by counted cost. Exact, but its rounding error is that of the sum over pairs
        of examples, eps :math:`(\sum_b \|x_b\| \|\delta_b\| / \|x^\top\delta\|)^2`: prefer
        `"rows"` where a large batch's gradient nearly cancels.
        `"streamed"`: each layer's share is added as the K cotangents pass it, by ghost or by that
        layer's rows, inside `lax.scan`, `jax.checkpoint`, `jit`, `cond` and views of stacked
        parameters too: one layer is held at a time, for deep models as they are written.
        `"columns"`: :math:`G e_j = J (J^\top e_j)`, one pass back and one forth a task, for models
        of which two rows do not fit. Or a `Sketch`, an approximate ghost.

    Returns:
      A function of the arguments of `loss_fn` that returns `(losses, jacobian)`, or
      `((losses, aux), jacobian)`.

    Raises:
      TypeError: if `loss_fn` is no function, a parameter or a loss is not of a real floating-point
        type, or with `has_aux` it returns no pair.
      ValueError: if `rows`, `gramian`, `argnums` or `in_axes` is none that the call can have, a
        named loss is not a scalar, a mask does not fit the parameters, or a loss inside
        `jax.shard_map` was not reduced over the devices.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> def task_losses(params, x):
      ...     h = jnp.tanh(x @ params["trunk"])
      ...     return {"click": jnp.mean((h @ params["click"]) ** 2),
      ...             "buy": jnp.mean((h @ params["buy"] - 1) ** 2)}
      >>> params = {"trunk": jnp.ones((3, 2)), "click": jnp.ones(2), "buy": jnp.ones(2)}
      >>> losses, jac = mtl.value_and_jac(task_losses)(params, jnp.ones((4, 3)))
      >>> jac.names
      ('buy', 'click')
      >>> jac.gramian().shape
      (2, 2)
    """
    _check_functions(loss_fn)
    _check_row_mode(rows)
    way = named(gramian) if in_axes is None else _along_an_axis(gramian)

    @functools.wraps(loss_fn)
    def value_and_jac_fn(*args, **kwargs):
        arguments = Arguments.of(args, kwargs, argnums, wrt)
        if in_axes is not None:
            losses, aux, linear_map = linearize_mapped(
                loss_fn, args, kwargs, in_axes, argnums, wrt, has_aux
            )
            layout = _layout(arguments, losses, linear_map, shared, gramian_at, rows)
            return (losses, *aux) if has_aux else losses, Jacobian(losses, linear_map, way, layout)

        losses, linear_fn, aux, changes = arguments.linearize(loss_fn, has_aux)
        check_losses(losses)
        check_reduced(losses, arguments.params)
        arguments.write_back(changes)
        linear_map = LinearMap.of(linear_fn, arguments.leaves)
        layout = _layout(arguments, losses, linear_map, shared, gramian_at, rows)
        return (losses, *aux) if has_aux else losses, Jacobian(losses, linear_map, way, layout)

    return value_and_jac_fn


def value_and_feature_jac(
    encode_fn: Callable[..., Any],
    decode_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    wrt: Any = None,
    shared: Mask | None = "auto",
    rows: RowMode = "isolated",
) -> Callable[..., tuple[Any, Jacobian]]:
    r"""`value_and_jac` with the Gramian measured on the features, at the cost of a plain step.

    .. math:: G = F F^\top, \quad F_k = \partial L_k / \partial Z, \quad Z = \mathrm{encode}(params)

    The K backward passes stop at the features; one backward pass then goes through the trunk.
    Pullback and rows are exact. Only the Gramian is an approximation of :math:`J J^\top`: it is
    exact, up to a common factor, when the encoder's Jacobian :math:`\partial Z / \partial\theta`
    maps feature gradients to parameter gradients isometrically up to scale (as when Z is itself the
    parameters). The solution MGDA finds with it bounds that of the true Gramian from above.

    Args:
      encode_fn: `encode_fn(params, *args, **kwargs)` returns the features, any pytree of arrays;
        masks and indices among them are handed on.
      decode_fn: `decode_fn(params, features, *args, **kwargs)` returns the K losses.
      has_aux: whether `decode_fn` returns `(losses, aux)`.
      wrt: as in `value_and_jac`.
      shared: as in `value_and_jac`.
      rows: as in `value_and_jac`.

    Returns:
      A function of the arguments of `decode_fn` less the features that returns
      `(losses, jacobian)`, or `((losses, aux), jacobian)`.

    Raises:
      TypeError: if a parameter or a loss is not of a real floating-point type.
      ValueError: if a named loss is not a scalar, a mask does not fit the parameters, or a loss
        inside `jax.shard_map` was not reduced over the devices.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> encode = lambda params, x: jnp.tanh(x @ params["trunk"])
      >>> decode = lambda params, z, x: {"a": jnp.mean(z @ params["a"]), "b": jnp.mean(z**2)}
      >>> params = {"trunk": jnp.ones((3, 2)), "a": jnp.ones(2)}
      >>> losses, jac = mtl.value_and_feature_jac(encode, decode)(params, jnp.ones((4, 3)))
      >>> jac.gramian().shape
      (2, 2)

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, 2018, section 3.3 (MGDA-UB).
    """
    _check_functions(encode_fn, decode_fn)
    _check_row_mode(rows)

    @functools.wraps(decode_fn)
    def value_and_feature_jac_fn(params, *args, **kwargs):
        encoding = Arguments.of((params, *args), kwargs, 0, wrt)

        def features_of(leaves):
            features, changes = encoding.call(encode_fn, encoding.with_leaves(leaves))
            smooth, others = _smooth_and_others(features)
            return smooth, (others, changes)

        features, encode_linear, (others, changes) = jax.linearize(
            features_of, encoding.leaves, has_aux=True
        )
        encoding.write_back(changes)
        decoding = Arguments.of((params, features, *args), kwargs, 0, wrt)

        def losses_of(leaves, smooth):
            features = jax.tree.map(
                lambda leaf, other: other if leaf is None else leaf,
                smooth, others, is_leaf=lambda leaf: leaf is None,
            )  # fmt: skip
            fn = lambda params, _, *args, **kwargs: decode_fn(params, features, *args, **kwargs)  # noqa: E731
            result, changes = decoding.call(fn, decoding.with_leaves(leaves))
            losses, aux = split_aux(result, has_aux)
            return losses, (aux, changes)

        losses, decode_linear, (aux, changes) = jax.linearize(
            losses_of, decoding.leaves, features, has_aux=True
        )
        check_losses(losses)
        check_reduced(losses, decoding.params)
        decoding.write_back(changes)
        linear_map = LinearMap.of(lambda t: decode_linear(t, encode_linear(t)), decoding.leaves)
        probe = LinearMap.of(decode_linear, decoding.leaves, features)
        layout = _layout(decoding, losses, linear_map, shared, None, rows)
        jacobian = Jacobian(losses, linear_map, Features(probe), layout)
        return (losses, *aux) if has_aux else losses, jacobian

    return value_and_feature_jac_fn


def _smooth_and_others(features: Any) -> tuple[Any, Any]:
    """Those that have gradients, and masks, indices and random keys; None where it is the other."""
    is_smooth = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)  # noqa: E731
    return (
        jax.tree.map(lambda leaf: leaf if is_smooth(leaf) else None, features),
        jax.tree.map(lambda leaf: None if is_smooth(leaf) else leaf, features),
    )


def as_jacobian(grads: Any, losses: Any, *, shared: Mask | None = None) -> Jacobian:
    """Wraps what `jax.jacrev(loss_fn)` returns.

    Every strategy's `update` does this to a `jax.jacrev` tree that comes with `losses=`.

    Args:
      grads: a tree of losses over a tree of parameters, leaves `loss.shape + param.shape`. A
        `Jacobian` is returned as it is.
      losses: the losses, a pytree as in `value_and_jac`.
      shared: as in `value_and_jac`, less `"auto"`; None takes all parameters as shared, heads too.
        `tx.update(grads, state, params, losses=losses, shared=mask)` passes it on.

    Returns:
      A `Jacobian` that holds the K rows.

    Raises:
      TypeError: if a loss or a gradient is not of a real floating-point type.
      ValueError: if a named loss is not a scalar, or `grads` does not fit the losses.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> task_losses = lambda w: {"a": jnp.sum(w**2), "b": jnp.sum((w - 1) ** 2)}
      >>> w = jnp.array([1.0, 2.0])
      >>> jac = mtl.as_jacobian(jax.jacrev(task_losses)(w), task_losses(w))
      >>> jac.gramian().tolist()
      [[20.0, 8.0], [8.0, 4.0]]
    """
    if isinstance(grads, Jacobian):
        return grads
    check_losses(losses)
    loss_leaves, losses_def = jax.tree.flatten(losses)
    try:
        per_loss = losses_def.flatten_up_to(grads)
    except ValueError as error:
        raise ValueError(
            f"the gradients do not have the structure of the losses {task_names(losses)}: pass "
            "exactly what jax.jacrev(loss_fn) returns, a tree of losses over a tree of parameters "
            "(a single gradient, as jax.grad returns it, has no rows to combine; neither has the "
            "update of an aggregator that stands earlier in the chain)"
        ) from error
    params_def = jax.tree.structure(per_loss[0])
    blocks = []
    for loss, tree in zip(loss_leaves, per_loss, strict=True):
        shape = jnp.shape(loss)
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != params_def or any(leaf.shape[: len(shape)] != shape for leaf in leaves):
            raise ValueError(
                f"the gradients of the losses {task_names(losses)} are not trees of the same "
                f"parameters with leaves of shape {shape} + param.shape (got "
                f"{[leaf.shape for leaf in leaves]}): pass exactly what jax.jacrev(loss_fn) "
                "returns; a chain has one aggregator, and nothing after it takes rows"
            )
        for leaf in leaves:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"the gradients have a leaf of dtype {jnp.result_type(leaf)}, expected real "
                    "floating-point ones: cast integers, and make the real and the imaginary part "
                    "of a complex parameter two parameters"
                )
        size = math.prod(shape)
        blocks.append([leaf.reshape(size, *leaf.shape[len(shape) :]) for leaf in leaves])
    rows = [
        leaf[0] if len(leaf) == 1 else jnp.concatenate(leaf) for leaf in zip(*blocks, strict=True)
    ]
    avals = [jax.ShapeDtypeStruct(r.shape[1:], r.dtype) for r in rows]
    params = params_def.unflatten(avals)
    if isinstance(shared, str):
        raise ValueError(
            f"shared={shared!r} is not known here: expected a mask over the parameters, a function "
            'from the parameters to one, or None; only value_and_jac can find them by "auto"'
        )
    everywhere = (True,) * len(rows)
    is_shared = everywhere if shared is None else resolve_mask(shared, params, "shared")
    layout = Layout(
        params_def=params_def,
        avals=tuple(avals),
        trained=everywhere,
        num_tasks=len(task_names(losses)),
        dtype=flatten_losses(losses).dtype,
        shared=is_shared,
        measured=is_shared,
        row_mode="batched",
        shown=(True,) * len(is_shared),
    )
    return Jacobian(losses, GivenRows(rows), Rows(), layout)


def _layout(
    arguments: Arguments,
    losses: Any,
    linear_map: LinearMap | MappedMap,
    shared: Mask | None,
    gramian_at: Mask | None,
    row_mode: RowMode,
) -> Layout:
    everywhere = (True,) * len(arguments.leaves)
    measured = None if gramian_at is None else arguments.resolve(gramian_at, "gramian_at")
    if measured is not None and not any(measured):
        raise ValueError(
            "gramian_at= selects none of the parameters that are trained: expected one that wrt= "
            "does not freeze"
        )
    if isinstance(shared, str):
        if shared != "auto":
            raise ValueError(
                f'shared={shared!r} is not known here: expected "auto", a mask over the '
                "parameters, a function from the parameters to one, or None"
            )
        # With one task nothing is shared, and its gradient is the whole update.
        alone = linear_map.num_tasks == 1
        is_shared = everywhere if alone else tuple(n > 1 for n in linear_map.touches)
    else:
        is_shared = everywhere if shared is None else arguments.resolve(shared, "shared")
    return Layout(
        params_def=jax.tree.structure(arguments.params),
        avals=tuple(
            jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
            for leaf in jax.tree.leaves(arguments.params)
        ),
        trained=arguments.trained,
        num_tasks=linear_map.num_tasks,
        dtype=flatten_losses(losses).dtype,
        shared=is_shared,
        measured=is_shared if measured is None else measured,
        row_mode=row_mode,
        shown=(True,) * len(is_shared),
    )


def _check_functions(*functions: Any) -> None:
    for fn in functions:
        if not callable(fn):
            raise TypeError(
                f"got a {type(fn).__name__} in place of a function: pass the loss function itself, "
                "as in mtl.value_and_jac(loss_fn)(params, batch), not the losses it returned"
            )


def _along_an_axis(gramian: Gramian) -> Way:
    ways = {"auto": Axis, "rows": Rows, "ghost": Axis}
    if isinstance(gramian, Way) or gramian not in ways:
        raise ValueError(
            f"gramian={gramian!r} is not a way to the Gramian of tasks along an axis: expected one "
            f"of {tuple(ways)}; all rows take one backward pass there"
        )
    return ways[gramian]()


def _check_row_mode(mode: str) -> None:
    if mode not in ROW_MODES:
        raise ValueError(f"rows={mode!r} is not a row mode: expected one of {ROW_MODES}")
