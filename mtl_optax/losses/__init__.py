"""What `optax.losses` lacks for several tasks: focal losses, task priority and its indicators.

The binary focal loss is `optax.losses.sigmoid_focal_loss`.
"""

from mtl_optax.losses._focal import regression_focal_loss, softmax_focal_loss
from mtl_optax.losses._priority import accuracy, share_within, task_priority

__all__ = [
    "accuracy",
    "regression_focal_loss",
    "share_within",
    "softmax_focal_loss",
    "task_priority",
]
