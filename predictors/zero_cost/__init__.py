"""Training-free proxies: ``name(model, batch) -> float``, higher is better. One idea, one file.

A model is scored as it is initialised. It is never changed, and a score that would be NaN or infinite is
:class:`nasgraph.errors.NotFinite`. ``PROXIES`` tells of each what it needs and where it comes from.
"""

from nasgraph.predictors.zero_cost.flops import flops
from nasgraph.predictors.zero_cost.grad_norm import grad_norm
from nasgraph.predictors.zero_cost.gradsign import gradsign
from nasgraph.predictors.zero_cost.jacov import jacov
from nasgraph.predictors.zero_cost.live_params import live_params
from nasgraph.predictors.zero_cost.naswot import naswot
from nasgraph.predictors.zero_cost.ntk_cond import ntk_cond
from nasgraph.predictors.zero_cost.output_sqnr import output_sqnr
from nasgraph.predictors.zero_cost.params import params
from nasgraph.predictors.zero_cost.proxy import PROXIES, ProxyInfo, proxy
from nasgraph.predictors.zero_cost.snip import snip
from nasgraph.predictors.zero_cost.sqnr import sqnr
from nasgraph.predictors.zero_cost.synflow import synflow
from nasgraph.predictors.zero_cost.zico import zico

__all__ = [
    "PROXIES",
    "ProxyInfo",
    "flops",
    "grad_norm",
    "gradsign",
    "jacov",
    "live_params",
    "naswot",
    "ntk_cond",
    "output_sqnr",
    "params",
    "proxy",
    "snip",
    "sqnr",
    "synflow",
    "zico",
]
