"""Aggregators: links from a Jacobian to one gradient.

An aggregator weighs the gradients of the shared parameters. What only one task reads, its head, has
nothing to be weighed against and follows its own loss: `heads="own"`. The authors of some methods
descend the weighted sum of the losses instead, so that their heads are weighed too, and with them
the learning rate of each head: `heads="weighted"`, of `mgda`, `nash_mtl`, `fairgrad`, `epo` and
`excess_mtl`. Under an optimizer such as Adam, which divides by the size of a gradient, the two
differ little. Balancers always scale whole rows, heads too.
"""

from mtl_optax._calls import explain_calls
from mtl_optax.aggregators._adatask import adatask
from mtl_optax.aggregators._aligned_mtl import aligned_mtl
from mtl_optax.aggregators._cagrad import cagrad
from mtl_optax.aggregators._conflict_free import conflict_free
from mtl_optax.aggregators._conicgrad import conicgrad
from mtl_optax.aggregators._cr_mogm import cr_mogm
from mtl_optax.aggregators._db_mtl import db_mtl
from mtl_optax.aggregators._dualproj import dualproj
from mtl_optax.aggregators._epo import epo
from mtl_optax.aggregators._excess_mtl import excess_mtl
from mtl_optax.aggregators._fairgrad import fairgrad
from mtl_optax.aggregators._forum import forum
from mtl_optax.aggregators._gradcraft import gradcraft
from mtl_optax.aggregators._graddrop import graddrop
from mtl_optax.aggregators._gradvac import gradvac
from mtl_optax.aggregators._imtl import imtl
from mtl_optax.aggregators._imtl_g import imtl_g
from mtl_optax.aggregators._krum import krum
from mtl_optax.aggregators._m_config import m_config
from mtl_optax.aggregators._metabalance import metabalance
from mtl_optax.aggregators._mgda import mgda
from mtl_optax.aggregators._moco import moco
from mtl_optax.aggregators._modo import modo
from mtl_optax.aggregators._nash_mtl import nash_mtl
from mtl_optax.aggregators._pcd import pcd
from mtl_optax.aggregators._pcgrad import pcgrad
from mtl_optax.aggregators._rgw import rgw
from mtl_optax.aggregators._sdmgrad import sdmgrad
from mtl_optax.aggregators._sum import mean, mean_tasks, sum, sum_tasks
from mtl_optax.aggregators._trimmed_mean import trimmed_mean
from mtl_optax.aggregators._upgrad import upgrad

__all__ = [
    "adatask",
    "aligned_mtl",
    "cagrad",
    "conflict_free",
    "conicgrad",
    "cr_mogm",
    "db_mtl",
    "dualproj",
    "epo",
    "excess_mtl",
    "fairgrad",
    "forum",
    "gradcraft",
    "graddrop",
    "gradvac",
    "imtl",
    "imtl_g",
    "krum",
    "m_config",
    "mean",
    "mean_tasks",
    "metabalance",
    "mgda",
    "moco",
    "modo",
    "nash_mtl",
    "pcd",
    "pcgrad",
    "rgw",
    "sdmgrad",
    "sum",
    "sum_tasks",
    "trimmed_mean",
    "upgrad",
]

explain_calls(globals(), __all__)
