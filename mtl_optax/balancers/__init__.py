"""Balancers: links from a Jacobian to a Jacobian, and the whole strategies they make."""

from mtl_optax._calls import explain_calls
from mtl_optax.balancers._auto_lambda import auto_lambda, scale_by_auto_lambda
from mtl_optax.balancers._cosmos import cosmos, scale_by_cosmos
from mtl_optax.balancers._cov import cov, scale_by_cov
from mtl_optax.balancers._db_pinn import db_pinn, scale_by_db_pinn
from mtl_optax.balancers._dtp import dtp, scale_by_dtp
from mtl_optax.balancers._dwa import dwa, scale_by_dwa
from mtl_optax.balancers._encodec import encodec, scale_by_encodec
from mtl_optax.balancers._famo import famo, scale_by_famo
from mtl_optax.balancers._gls import gls, scale_by_gls
from mtl_optax.balancers._go4align import go4align, scale_by_go4align
from mtl_optax.balancers._grad_norm_weights import (
    grad_norm_weights,
    scale_by_grad_norm_weights,
)
from mtl_optax.balancers._gradnorm import gradnorm, scale_by_gradnorm
from mtl_optax.balancers._imtl_l import imtl_l, scale_by_imtl_l
from mtl_optax.balancers._ldc_mtl import ldc_mtl, scale_by_ldc_mtl
from mtl_optax.balancers._lr_annealing import lr_annealing, scale_by_lr_annealing
from mtl_optax.balancers._moml import moml, scale_by_moml
from mtl_optax.balancers._ntk import ntk, ntk_traces, scale_by_ntk
from mtl_optax.balancers._pareto import pareto, scale_by_pareto
from mtl_optax.balancers._pbi import pbi, scale_by_pbi
from mtl_optax.balancers._relobralo import relobralo, scale_by_relobralo
from mtl_optax.balancers._rlw import rlw, scale_by_rlw
from mtl_optax.balancers._scale_invariant import scale_invariant
from mtl_optax.balancers._softadapt import scale_by_softadapt, softadapt
from mtl_optax.balancers._stch import scale_by_stch, stch
from mtl_optax.balancers._uncertainty import scale_by_uncertainty, uncertainty
from mtl_optax.balancers._uwso import scale_by_uwso, uwso
from mtl_optax.balancers._weights import scale_by_weights, weights

__all__ = [
    "auto_lambda",
    "cosmos",
    "cov",
    "db_pinn",
    "dtp",
    "dwa",
    "encodec",
    "famo",
    "gls",
    "go4align",
    "grad_norm_weights",
    "gradnorm",
    "imtl_l",
    "ldc_mtl",
    "lr_annealing",
    "moml",
    "ntk",
    "ntk_traces",
    "pareto",
    "pbi",
    "relobralo",
    "rlw",
    "scale_by_auto_lambda",
    "scale_by_cosmos",
    "scale_by_cov",
    "scale_by_db_pinn",
    "scale_by_dtp",
    "scale_by_dwa",
    "scale_by_encodec",
    "scale_by_famo",
    "scale_by_gls",
    "scale_by_go4align",
    "scale_by_grad_norm_weights",
    "scale_by_gradnorm",
    "scale_by_imtl_l",
    "scale_by_ldc_mtl",
    "scale_by_lr_annealing",
    "scale_by_moml",
    "scale_by_ntk",
    "scale_by_pareto",
    "scale_by_pbi",
    "scale_by_relobralo",
    "scale_by_rlw",
    "scale_by_softadapt",
    "scale_by_stch",
    "scale_by_uncertainty",
    "scale_by_uwso",
    "scale_by_weights",
    "scale_invariant",
    "softadapt",
    "stch",
    "uncertainty",
    "uwso",
    "weights",
]

explain_calls(globals(), __all__)
