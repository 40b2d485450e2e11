"""Which entries of a stored parameter a smaller form of its operation uses.

By default the leading entries of each axis. A module that needs others says so by a method::

    class Attention(nn.Module):
        def slice_rule(self, name: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
            "The entries of ``stored`` that are this module's parameter ``name``, in that ``shape``."

``self`` is the module in its smaller form. A rule selects (it indexes, reshapes, permutes) and never computes; it
speaks for all parameters below its module, under the names that they have there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Shape = tuple[int, ...]
Rule = Callable[[nn.Module, str, Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True, eq=False)
class Cut:
    """A rule with all but the stored tensor given."""

    func: Rule
    module: nn.Module
    name: str
    shape: Shape

    def __call__(self, stored: Tensor) -> Tensor:
        return self.func(self.module, self.name, stored, self.shape)


def leading(module: nn.Module, name: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
    """The first entries of each axis."""
    return stored[tuple(slice(0, size) for size in shape)]


def centred(module: nn.Module, name: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
    """A convolution: the first channels, and the middle of the kernel (Cai et al., Once-for-All, ICLR 2020)."""
    starts = [
        (full - size) // 2 if axis >= 2 else 0
        for axis, (full, size) in enumerate(zip(stored.shape, shape, strict=True))
    ]
    return stored[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]


OWN_RULES = (leading, centred)

RULES: dict[type[nn.Module], Rule] = {
    kind: centred
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}
"""Rules for classes that are not ours to give a method; they hold for subclasses too."""


def cut_for(module: nn.Module, name: str, stored: Shape, shape: Shape) -> Cut | None:
    """The function that cuts ``module``'s parameter ``name`` out of the stored tensor; None: all of it is used.

    The outermost module on the way to the parameter that has a rule decides.
    """
    parts = name.split(".")
    for depth in range(len(parts)):
        owner = module.get_submodule(".".join(parts[:depth]))
        rule = _rule(owner)
        if rule is not None:
            return None if rule is centred and stored == shape else Cut(rule, owner, ".".join(parts[depth:]), shape)
    return None if stored == shape else Cut(leading, module, name, shape)


def _rule(module: nn.Module) -> Rule | None:
    own = getattr(type(module), "slice_rule", None)
    if own is not None:
        return own  # type: ignore[no-any-return]
    return next((RULES[kind] for kind in type(module).__mro__ if kind in RULES), None)


def taken(cut: Cut | None, stored: Tensor) -> Tensor:
    """What ``cut`` selects from ``stored``."""
    return stored if cut is None else cut(stored)
