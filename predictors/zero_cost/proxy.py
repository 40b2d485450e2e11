"""What all training-free proxies share: the caller's model is not touched, and a score is finite or an error.

:func:`proxy` turns a function with an equation in it into a proxy. The function receives a private copy of the model:

- in evaluation mode, so that dropout is off;
- with every BatchNorm that keeps running statistics set to the statistics of the batch's inputs, held constant.
  So signals are scaled as in training, while one sample's gradient does not flow through another's;
- with the random number generators forked and seeded, so that the caller's stay where they are.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from nasgraph.errors import NotFinite
from nasgraph.tasks.batch import Batch

Score = TypeVar("Score", bound=Callable[..., float])


@dataclass(frozen=True)
class ProxyInfo:
    """What a proxy needs and where it comes from. Of every proxy, higher is meant to be better."""

    name: str
    needs_labels: bool
    source: str


PROXIES: dict[str, ProxyInfo] = {}
"""The proxies defined so far, by name."""


def proxy(*, needs_labels: bool, source: str) -> Callable[[Score], Score]:
    """Make ``score(model, batch) -> float`` a proxy: run it on a prepared copy, refuse what is not finite."""

    def decorate(score: Score) -> Score:
        name = score.__name__
        PROXIES[name] = ProxyInfo(name, needs_labels, source)

        @functools.wraps(score)
        def checked(model: nn.Module, batch: Batch, *args: Any, **kwargs: Any) -> float:
            with torch.random.fork_rng(devices=_devices(model)), torch.enable_grad():
                torch.manual_seed(0)
                value = float(score(prepared(model, batch), batch, *args, **kwargs))
            if not math.isfinite(value):
                raise NotFinite(f"{name} is {value}: the model's weights, outputs or gradients left the number range")
            return value

        return cast(Score, checked)

    return decorate


def prepared(model: nn.Module, batch: Batch) -> nn.Module:
    """A copy of ``model`` in evaluation mode, each BatchNorm holding the statistics of ``batch.inputs``.

    Raises: ValueError: a parameter is still uninitialised (run the model once before scoring it).
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"parameter {name} has no shape yet: run the model once before scoring it")
    model = copy.deepcopy(model).eval()
    model.zero_grad()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if norms:
        for norm in norms:
            norm.momentum = 1.0  # running statistics := those of the next forward
            norm.train()
        with torch.no_grad():
            model(*batch.inputs)
        model.eval()
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that require gradients, of whatever layer: PyG's layers hold no ``nn.Linear`` that one could look for.

    Raises: NotFinite: there is none.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise NotFinite("the model has no trainable parameter, so there is nothing to score")
    return parameters


def gradients(value: Tensor, model: nn.Module, *, retain_graph: bool = False) -> list[Tensor]:
    """Gradient of a scalar with respect to each trainable parameter, zeros where it is not reached.

    Raises: NotFinite: no trainable parameter is reached.
    """
    parameters = trainable(model)
    if not value.requires_grad:
        raise NotFinite("no trainable parameter reaches the output, so there is nothing to score")
    return list(torch.autograd.grad(value, parameters, retain_graph=retain_graph, materialize_grads=True))


def positive(name: str, value: float) -> float:
    """``value``, refused where it is zero: a magnitude that vanishes says nothing about the model.

    Raises: NotFinite: ``value`` is 0 (every gradient vanishes, or as in LoRA's adapters B = 0).
    """
    if value == 0.0:
        raise NotFinite(f"{name} is 0 for every parameter: gradients vanish, or each meets a weight of 0 (LoRA's B)")
    return value


def without_new_adapters(name: str, model: nn.Module) -> None:
    """For proxies that multiply weights by gradients: refuse adapters that are as they start.

    With B = 0 the gradient of A is 0, and that of B is multiplied by 0, so no adapter of whatever rank would count.
    An adapter is a module that has a method ``adds_nothing``.

    Raises: ValueError: names the first.
    """
    for where, module in model.named_modules():
        if hasattr(module, "adds_nothing") and module.adds_nothing():
            raise ValueError(
                f"{name} cannot judge the adapter '{where}': what it ends with (LoRA's B) is 0, so each of its weights "
                "times its gradient is 0 at any rank. Take grad_norm or gradsign, or train it first"
            )


def cast_to(dtype: torch.dtype, model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """The model (changed in place: pass a copy) and the batch with every float as ``dtype``."""
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in batch.inputs)
    return model.to(dtype), Batch(inputs, batch.target, batch.index)


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
