"""What options may be."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.typing import ArrayLike

# One value for all tasks, K in their order, or a tree like the losses; None in it is the default.
TaskOption = ArrayLike | Sequence[Any] | Mapping[str, Any]
# From the number of updates so far to a value.
Schedule = Callable[[Any], ArrayLike]
