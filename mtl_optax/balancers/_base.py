"""What turns a balancer into a whole strategy."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import ParamSpec

import optax

from mtl_optax.aggregators._sum import sum_tasks

P = ParamSpec("P")


def summed(
    factory: Callable[P, optax.GradientTransformationExtraArgs],
) -> Callable[P, optax.GradientTransformationExtraArgs]:
    """The strategy that scales by a balancer and sums, as `optax.adam` is to `scale_by_adam`."""

    @functools.wraps(factory)
    def strategy(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        return optax.chain(factory(*args, **kwargs), sum_tasks())

    name = factory.__name__
    strategy.__name__ = strategy.__qualname__ = name.removeprefix("scale_by_")
    doc = (inspect.getdoc(factory) or "").replace(
        "A balancer: Jacobian in, Jacobian out.", "A whole strategy: Jacobian in, gradient out."
    )
    # The sections start at the margin. The examples are those of the balancer.
    summary, *sections = re.split(r"\n\n(?=\S)", doc)
    summary = f"{summary.removesuffix('.')}: `{name}` followed by `sum_tasks()`."
    sections = [section for section in sections if not section.startswith("Examples:")]
    strategy.__doc__ = "\n\n".join([summary, *sections])
    return strategy
