"""Conditioning: links that ready the rows, and wrappers that guard a whole strategy."""

from mtl_optax._calls import explain_calls
from mtl_optax.conditioning._clip import clip_tasks
from mtl_optax.conditioning._drop_nonfinite import drop_nonfinite_tasks
from mtl_optax.conditioning._ema import ema_tasks
from mtl_optax.conditioning._every import every
from mtl_optax.conditioning._log import log_losses
from mtl_optax.conditioning._match_norm import match_norm
from mtl_optax.conditioning._monitor import monitor_tasks
from mtl_optax.conditioning._multi_steps import multi_steps
from mtl_optax.conditioning._normalize import normalize_tasks
from mtl_optax.conditioning._partition import partition
from mtl_optax.conditioning._skip_nonfinite import skip_nonfinite

__all__ = [
    "clip_tasks",
    "drop_nonfinite_tasks",
    "ema_tasks",
    "every",
    "log_losses",
    "match_norm",
    "monitor_tasks",
    "multi_steps",
    "normalize_tasks",
    "partition",
    "skip_nonfinite",
]

explain_calls(globals(), __all__)
