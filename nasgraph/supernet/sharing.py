"""Which stored parameters are one: rules that let options or nodes of a supernet share storage.

A rule gives each parameter a key; parameters with equal keys are one, if their names and shapes are equal too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase

from nasgraph.declare import choices_in, make_name, plain, switches_in
from nasgraph.space import Node, SearchSpace
from nasgraph.supernet.structure import Key
from nasgraph.supernet.variants import Variant

Forms = Mapping[tuple[str, str], list[Variant]]

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def options(space: SearchSpace, forms: Forms) -> Callable[[Key], Any]:
    """The options of a node share what has one name and shape: the projections of two aggregators, say."""
    return lambda key: key[0]


def homogeneous(space: SearchSpace, forms: Forms) -> Callable[[Key], Any]:
    """Nodes share what is the same layer (Zhou et al., Auto-GNN, 2019: constrained parameter sharing).

    The same layer: the same operation with the same arguments but for sizes that are choices, so the same attention;
    all parameters of equal shape, so the same inputs and outputs; and what reads it is declared as the same operations
    up to the activation. Normalisation is not shared. Choices count by their name: two layers whose activations are
    decided apart are not the same.
    """

    def layer(key: Key) -> Any:
        node, option, _ = key
        mine = forms[node, option]
        if any(isinstance(part, NORMS) for form in mine for part in form.module.modules()):
            return key  # with itself only
        made = {(make_name(form.made.make), str(form.module)) for form in mine}
        shapes = {tuple(form.shapes.items()) for form in mine}
        return option, tuple(sorted(made)), tuple(sorted(shapes)), _followed(space, node)

    return layer


RULES: dict[str, Callable[[SearchSpace, Forms], Callable[[Key], Any]]] = {
    "options": options,
    "homogeneous": homogeneous,
}


def _followed(space: SearchSpace, node: str) -> tuple[str, ...]:
    """The operations behind ``node``, while one alone reads it: norm and activation."""
    found: list[str] = []
    while True:
        readers = [name for name, sources in space._sources.items() if any(_reads(source, node) for source in sources)]
        if len(readers) != 1 or len(found) == 2:
            return tuple(found)
        node = readers[0]
        found.append(str(plain(space._ops[node])))


def _reads(source: Any, node: str) -> bool:
    if isinstance(source, Node):
        return source.name == node
    things = [option for choice in choices_in(source) for option in choice.options]
    things += [case for switch in switches_in(source) for case in switch.cases.values()]
    return any(isinstance(thing, Node) and thing.name == node for thing in things)
