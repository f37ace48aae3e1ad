"""What turns a balancer into a whole strategy."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import optax

from mtl_optax.aggregators import sum_tasks

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
    strategy.__doc__ = (
        f"`{name}` followed by `sum_tasks()`: a whole strategy, Jacobian in, gradient out.\n\n"
        f"Arguments, errors and references are those of `{name}`."
    )
    return strategy
