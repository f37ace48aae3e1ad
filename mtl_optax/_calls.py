"""Calls of factories that do not fit: Python's words, and what to pass instead."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def explain_calls(namespace: dict[str, Any], names: Iterable[str]) -> None:
    """Puts in the place of each factory itself with a `TypeError` that names the remedy."""
    for name in names:
        namespace[name] = _explained(name, namespace[name])


def _explained(name: str, factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return factory(*args, **kwargs)
        except TypeError:
            signature = inspect.signature(factory)
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{name}: {error}. {_usage(name, signature)}") from None
            raise  # of the factory itself, which was called as it should be

    explained.__module__ = "mtl_optax"  # where it is public, and where pickle finds it
    return explained


def _usage(name: str, signature: inspect.Signature) -> str:
    required = [p for p in signature.parameters.values() if p.default is p.empty]
    options = [p.name for p in signature.parameters.values() if p.default is not p.empty]
    shown = {"num_tasks": "num_tasks=2", "key": "key=jax.random.key(0)"}
    call = ", ".join(shown.get(p.name, f"{p.name}=...") for p in required)
    usage = f"Call mtl.{name}({call})"
    if "num_tasks=2" in call:
        usage += ", where num_tasks is the number of losses"
    return usage + (f"; its options, by name: {', '.join(options)}" if options else "")
