"""BatchNorm of a frozen model: it normalises by the running statistics that it has, in training too."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Held(nn.Module):
    """Mixed into a layer's class: the layer stays in evaluation mode."""

    def train(self, mode: bool = True) -> Held:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (kind(self),), self.__dict__.copy()


def hold(layer: nn.Module) -> None:
    """Keep ``layer`` in evaluation mode from now on. It stays of its class, by a subclass of the same name."""
    if not isinstance(layer, Held):
        own: Any = type(layer)
        layer.__class__ = _held(own)
    layer.train(False)


def kind(layer: nn.Module) -> type[nn.Module]:
    """The class of ``layer``, held or not."""
    own = type(layer)
    return own.__bases__[1] if isinstance(layer, Held) else own


@cache
def _held(own: Any) -> Any:
    return type(own.__name__, (Held, own), {"__module__": own.__module__, "__doc__": own.__doc__})


def _blank(own: Any) -> nn.Module:
    made: nn.Module = _held(own).__new__(_held(own))
    return made
