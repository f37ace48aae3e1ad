"""What `optax.losses` lacks for several tasks: the multi-class and the regression focal loss.

The binary focal loss is `optax.losses.sigmoid_focal_loss`.
"""

from mtl_optax.losses._focal import regression_focal_loss, softmax_focal_loss

__all__ = ["regression_focal_loss", "softmax_focal_loss"]
