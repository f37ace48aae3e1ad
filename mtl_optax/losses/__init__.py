"""What `optax.losses` lacks for several tasks: priority of single examples and points.

Focal losses for classes and regression (the binary one is `optax.losses.sigmoid_focal_loss`), and
the weights of points and stretches of time that physics-informed networks use.
"""

from mtl_optax.losses._brdr import brdr
from mtl_optax.losses._causal import causal_weights
from mtl_optax.losses._focal import regression_focal_loss, softmax_focal_loss
from mtl_optax.losses._points import PointWeights
from mtl_optax.losses._rba import rba
from mtl_optax.losses._self_adaptive import self_adaptive

__all__ = [
    "PointWeights",
    "brdr",
    "causal_weights",
    "rba",
    "regression_focal_loss",
    "self_adaptive",
    "softmax_focal_loss",
]
