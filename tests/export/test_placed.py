"""Code of rewritten operations: short where the modules say all, whole transforms elsewhere, the same bits always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from nasgraph.build import build
from nasgraph.export import Exported, Request, export_many, placed
from nasgraph.space import Op, SearchSpace
from nasgraph.transforms import Lora, LowRank, Prune, Quantize, Transform, freeze_ranges
from tests.transforms.toys import Adapt, Scale

LOW = Quantize(weight_bits=4, activation_bits=8, activations="lsq")
CASES: dict[str, list[Transform]] = {
    "lora": [Lora(rank=2)],
    "quantised": [Quantize(weight_bits=4, activation_bits=8)],
    "both": [Lora(rank=2), LOW],
    "masked": [Prune(keep=0.5, scores="random"), LOW],
    "factors": [LowRank(rank=2), LOW],
    "own": [Scale(power=2), Adapt(rank=2)],
    "vera": [Lora(rank=2, kind="vera")],
}


class Net(nn.Module):
    """Blocks that can be left out, channels that can be removed, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.norm(self.first(x))))
        for block in self.blocks:
            x = x + block(x)
        return x


def layers(name: str) -> SearchSpace:
    space = SearchSpace(name)
    x = space.input("x", torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    h = space.add("first", Op(nn.Linear, out_features=16), x, transforms=CASES[name])
    space.output(space.add("second", Op(nn.Linear, out_features=3), space.add("act", Op(nn.ReLU), h)))
    return space


def graph() -> SearchSpace:
    space = SearchSpace("graph")
    x = space.input("x", torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), {0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2], [1, 2, 3]]), {1: "edges"})
    low = [Quantize(weight_bits=4, activation_bits=8, aggregation_bits=8), Lora(rank=2)]
    space.output(space.add("conv", Op(GCNConv, out_channels=5), x, edges, transforms=low))
    return space


def existing() -> SearchSpace:
    rules = [
        LowRank("second", rank=2),
        Prune("first", structure="channels", keep=0.5),
        Prune("blocks", structure="layers", keep=0.67),
        Quantize("(first|second)", weight_bits=8, activation_bits=8),
    ]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    return SearchSpace.from_module(model, rules, inputs=x, dynamic={"x": {0: "batch"}}, make=Op(Net))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Request, list[Exported]]]:
    folder, requests = tmp_path_factory.mktemp("placed"), {}
    for name, space in {**{name: layers(name) for name in CASES}, "graph": graph(), "existing": existing()}.items():
        model = build(space, {})
        with torch.no_grad():
            for parameter in model.parameters():  # adapters start at 0, which would hide them
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        freeze_ranges(model, [tuple(given.example for given in space.inputs.values())])
        requests[name] = Request(model, folder / name, space, {}, ["code", "packed"])
    return dict(zip(requests, zip(requests.values(), export_many(list(requests.values())), strict=True), strict=True))


@pytest.mark.parametrize("name", [*CASES, "graph", "existing"])
def test_the_code_gives_the_same_bits_without_the_transforms(name: str, exported: Any) -> None:
    request, results = exported[name]
    assert [(item.status, item.max_abs_diff) for item in results] == [("ok", 0.0)] * 2, results
    texts = [Path(request.folder / file).read_text(encoding="utf-8") for file in ("model.py", "packed_model.py")]
    for text in texts:
        assert ("class Transform:" in text) == (name == "vera")  # its frozen matrices are in no file
        assert max(map(len, text.splitlines())) <= 120
        assert name == "vera" or len(text.splitlines()) < 500
    if name == "lora":
        assert "class VeraLinear" not in texts[0] and len(texts[0].splitlines()) < 300
    if name == "existing":
        assert (
            "'blocks.1': (None, {}, {})" in texts[0] or "'blocks.0': (None, {}, {})" in texts[0] or "None" in texts[0]
        )


def test_what_cannot_be_placed_is_made_by_its_transforms() -> None:
    model = build(layers("vera"), {})
    made = model.meta["calls"]["first"]
    assert placed.without_transforms(made, model.first) is made
    plain = build(layers("lora"), {})
    assert placed.without_transforms(plain.meta["calls"]["act"], plain.act) is plain.meta["calls"]["act"]
    found = placed.without_transforms(plain.meta["calls"]["first"], plain.first)
    assert found.make is placed.placed
    assert set(found().state_dict()) == set(plain.first.state_dict())
    plain.first.beside["lora"].act = torch.relu  # type: ignore[assignment]
    assert placed.without_transforms(plain.meta["calls"]["first"], plain.first)().beside["lora"].act is torch.relu
    plain.first.beside["lora"].strange = object()  # type: ignore[assignment]  # an attribute that no code gives back
    assert placed.without_transforms(plain.meta["calls"]["first"], plain.first).make is not placed.placed
