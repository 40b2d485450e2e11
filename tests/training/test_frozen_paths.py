"""A supernet over a frozen model: an architecture without adapters has nothing to train, and stops nothing."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
from torch import nn

from nasgraph.space import Architecture, Choice, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks.batch import Batch
from nasgraph.training.policies import Policy
from nasgraph.transforms import Lora


class Given(Policy):
    """Rank 0, then rank 2."""

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        return [Architecture({"rank": 0 if step == 0 else 2})]


def test_a_path_without_adapters_moves_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    space = SearchSpace.from_module(model, [Lora("0", rank=Choice("rank", [0, 2]))], inputs=x)
    batch = Batch((x,), torch.arange(10) % 3)
    supernet = Supernet(space, SimpleNamespace(batch=lambda n, seed: batch))  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in supernet.parameters()]
    first = supernet.train(Given(), steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, supernet.parameters(), strict=True))
    supernet.train(Given(), steps=30)
    changed = [not torch.equal(a, b) for a, b in zip(before, supernet.parameters(), strict=True)]
    assert changed == [parameter.requires_grad for parameter in supernet.parameters()]
    assert float(batch.loss(supernet.subnet({"rank": 2})).detach()) < first[0]
