"""Balancers: links from a Jacobian to a Jacobian, and the whole strategies they make."""

from mtl_optax.balancers._cosmos import CosmosState, cosmos, scale_by_cosmos
from mtl_optax.balancers._cov import CovState, cov, scale_by_cov
from mtl_optax.balancers._dtp import DtpState, dtp, scale_by_dtp
from mtl_optax.balancers._dwa import DwaState, dwa, scale_by_dwa
from mtl_optax.balancers._encodec import EncodecState, encodec, scale_by_encodec
from mtl_optax.balancers._famo import FamoState, famo, scale_by_famo
from mtl_optax.balancers._gls import GlsState, gls, scale_by_gls
from mtl_optax.balancers._gradnorm import GradnormState, gradnorm, scale_by_gradnorm
from mtl_optax.balancers._imtl_l import ImtlLState, imtl, imtl_l, scale_by_imtl_l
from mtl_optax.balancers._lr_annealing import LrAnnealingState, lr_annealing, scale_by_lr_annealing
from mtl_optax.balancers._ntk import NtkState, ntk, ntk_traces, scale_by_ntk
from mtl_optax.balancers._pareto import ParetoState, pareto, scale_by_pareto
from mtl_optax.balancers._pbi import PbiState, pbi, scale_by_pbi
from mtl_optax.balancers._relobralo import RelobraloState, relobralo, scale_by_relobralo
from mtl_optax.balancers._rlw import RlwState, rlw, scale_by_rlw
from mtl_optax.balancers._softadapt import SoftadaptState, scale_by_softadapt, softadapt
from mtl_optax.balancers._stch import StchState, scale_by_stch, stch
from mtl_optax.balancers._uncertainty import UncertaintyState, scale_by_uncertainty, uncertainty
from mtl_optax.balancers._uwso import UwsoState, scale_by_uwso, uwso
from mtl_optax.balancers._weights import WeightsState, scale_by_weights, weights

__all__ = [
    "CosmosState",
    "CovState",
    "DtpState",
    "DwaState",
    "EncodecState",
    "FamoState",
    "GlsState",
    "GradnormState",
    "ImtlLState",
    "LrAnnealingState",
    "NtkState",
    "ParetoState",
    "PbiState",
    "RelobraloState",
    "RlwState",
    "SoftadaptState",
    "StchState",
    "UncertaintyState",
    "UwsoState",
    "WeightsState",
    "cosmos",
    "cov",
    "dtp",
    "dwa",
    "encodec",
    "famo",
    "gls",
    "gradnorm",
    "imtl",
    "imtl_l",
    "lr_annealing",
    "ntk",
    "ntk_traces",
    "pareto",
    "pbi",
    "relobralo",
    "rlw",
    "scale_by_cosmos",
    "scale_by_cov",
    "scale_by_dtp",
    "scale_by_dwa",
    "scale_by_encodec",
    "scale_by_famo",
    "scale_by_gls",
    "scale_by_gradnorm",
    "scale_by_imtl_l",
    "scale_by_lr_annealing",
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
    "softadapt",
    "stch",
    "uncertainty",
    "uwso",
    "weights",
]
