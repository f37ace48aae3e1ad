"""What `optax.losses` lacks for several tasks: priority of tasks, of examples and of points.

Focal losses for classes and regression (the binary one is `optax.losses.sigmoid_focal_loss`), task
priority with its indicators, and the weights of points and stretches of time that physics-informed
networks use.
"""

from mtl_optax.losses._brdr import brdr
from mtl_optax.losses._causal import causal_weights
from mtl_optax.losses._focal import regression_focal_loss, softmax_focal_loss
from mtl_optax.losses._points import PointWeights
from mtl_optax.losses._priority import accuracy, share_within, task_priority
from mtl_optax.losses._rba import rba
from mtl_optax.losses._self_adaptive import self_adaptive

__all__ = [
    "PointWeights",
    "accuracy",
    "brdr",
    "causal_weights",
    "rba",
    "regression_focal_loss",
    "self_adaptive",
    "share_within",
    "softmax_focal_loss",
    "task_priority",
]
