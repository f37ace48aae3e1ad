"""What was computed once, kept for the trace in which it was."""

from collections.abc import Callable
from typing import Any

from mtl_optax._compat import current_trace


class Memo:
    """Values by name: known in the trace in which it was made, and in traces inside that one.

    What is computed in an inner trace is not kept: it must not be used, nor live on, outside.

    Attributes:
      updates: for one that is watched, `(made, update)` of all combined updates.
    """

    def __init__(self, outer: "Memo | None" = None, updates: list[Any] | None = None):
        self._trace = current_trace()
        self._outer = outer
        self._values: dict[Any, Any] = {}
        self.updates = updates

    def is_of_this_trace(self) -> bool:
        """Whether what is computed now may be kept here."""
        return self._trace == current_trace()

    def known(self, name: Any) -> Any:
        """What was computed, or None."""
        if name in self._values:
            return self._values[name]
        return self._outer.known(name) if self._outer else None

    def once(self, name: Any, compute: Callable[[], Any]) -> Any:
        """What was computed, now at the latest."""
        value = self.known(name)
        if value is None:
            value = compute()
            if self.is_of_this_trace():
                self._values[name] = value
        return value
