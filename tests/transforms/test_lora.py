from __future__ import annotations

import copy
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from nasgraph.build import build
from nasgraph.declare import as_op
from nasgraph.errors import SpaceError
from nasgraph.objectives.bits import count_adapter_parameters
from nasgraph.predictors.zero_cost import grad_norm, snip, synflow
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks.batch import Batch
from nasgraph.training.policies import Uniform
from nasgraph.transforms.adapters import Adapter, frozen
from nasgraph.transforms.base import transformed
from nasgraph.transforms.lora import Lora, adapters, merge


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` with every adapter parameter random."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(module).values():
        for parameter in adapter.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def rewritten(layer: nn.Module, **settings: object) -> nn.Module:
    return transformed(copy.deepcopy(layer), [Lora(**settings)])  # type: ignore[arg-type]


LAYERS = [
    (nn.Linear(12, 8), torch.randn(3, 5, 12)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), torch.randn(2, 4, 9, 9)),
    (nn.Conv2d(4, 6, (1, 3), padding="same"), torch.randn(2, 4, 5, 5)),
    (nn.Conv3d(2, 3, 2), torch.randn(1, 2, 4, 4, 4)),
    (nn.Embedding(7, 6, padding_idx=2), torch.tensor([[0, 2, 6, 2]])),
]
KINDS = [{}, {"kind": "vera"}, {"kind": "mora"}, {"kind": "melora", "blocks": 2}, {"kind": "melora", "blocks": 4}]
CASES = [(layer, x, {}) for layer, x in LAYERS] + [(*LAYERS[0], kind) for kind in KINDS[1:]]


@pytest.mark.parametrize(("layer", "x", "kind"), CASES)
def test_the_start_is_the_layer_itself_and_merging_is_the_same_function(
    layer: nn.Module, x: Tensor, kind: dict[str, object]
) -> None:
    changed = rewritten(layer, rank=3, **kind)
    assert torch.equal(changed(x), layer(x))
    (adapter,) = adapters(changed).values()
    assert adapter.adds_nothing()
    stirred(changed)
    assert not adapter.adds_nothing()
    before = changed(x)
    assert (before - layer(x)).abs().max() > 1e-3 or isinstance(layer, nn.Embedding)
    assert adapter.delta().shape == layer.weight.shape
    merged = merge(copy.deepcopy(changed))
    assert type(merged) is type(layer) and adapters(merged) == {}
    torch.testing.assert_close(merged(x), before, rtol=1e-5, atol=1e-5)


def test_plain_is_scale_b_a_x() -> None:
    layer, x = LAYERS[0]
    changed = stirred(rewritten(layer, rank=3, alpha=6.0, scale="alpha/r"))
    a, b = changed.beside["lora"].A, changed.beside["lora"].B
    added = torch.zeros(3, 5, 8)
    for r in range(3):
        for o in range(8):
            added[..., o] += 2.0 * b[o, r] * (x * a[r]).sum(-1)
    torch.testing.assert_close(changed(x), layer(x) + added)


def test_vera_is_two_diagonals_around_frozen_matrices() -> None:
    layer, x = LAYERS[0]
    changed = stirred(rewritten(layer, rank=5, kind="vera"))
    one = changed.beside["lora"]
    assert [name for name, _ in one.named_parameters()] == ["d", "b"]
    assert "A" not in one.state_dict() and float(one.scale) == 1.0
    dense = torch.diag(one.b) @ one.B @ torch.diag(one.d) @ one.A
    torch.testing.assert_close(changed(x), layer(x) + x @ dense.T)
    smaller = rewritten(layer, rank=2, kind="vera").beside["lora"]
    assert torch.equal(smaller.A, one.A[:2])
    torch.testing.assert_close(smaller.B * math.sqrt(2 / 5), one.B[:, :2])
    assert torch.allclose(smaller.d, torch.tensor(0.1)) and not smaller.b.any()


def test_frozen_matrices_are_the_same_in_every_process() -> None:
    torch.testing.assert_close(frozen(2, 3)[1], frozen(5, 3)[1], rtol=0, atol=0)
    torch.testing.assert_close(frozen(1, 4)[0], torch.tensor([-0.3339, 0.1385, 0.3632, -0.4346]), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("ins", "outs", "rank"), [(12, 8, 1), (12, 8, 3), (5, 17, 2), (17, 5, 1), (4, 4, 9)])
def test_mora_sums_groups_and_repeats(ins: int, outs: int, rank: int) -> None:
    layer, x = nn.Linear(ins, outs), torch.randn(3, ins)
    changed = stirred(rewritten(layer, rank=rank, kind="mora"))
    one = changed.beside["lora"]
    side = min(int(math.sqrt((ins + outs) * rank)), max(ins, outs))
    square = one.get_parameter(f"M_{side}")
    assert tuple(square.shape) == (side, side)
    added = torch.zeros(3, outs)
    for o in range(outs):
        for i in range(ins):
            added[:, o] += square[o % side, i % side] * x[:, i]
    torch.testing.assert_close(changed(x), layer(x) + added)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_melora_is_block_diagonal(blocks: int) -> None:
    layer, x = LAYERS[0]
    changed = stirred(rewritten(layer, rank=2, kind="melora", blocks=blocks, scale="alpha/r", alpha=4.0))
    one = changed.beside["lora"]
    a, b = one.get_parameter(f"A_{blocks}"), one.get_parameter(f"B_{blocks}")
    dense = torch.zeros(8, 12)
    for n in range(blocks):
        rows, columns = slice(n * 8 // blocks, (n + 1) * 8 // blocks), slice(n * 12 // blocks, (n + 1) * 12 // blocks)
        dense[rows, columns] = b[n] @ a[n]
    torch.testing.assert_close(changed(x), layer(x) + 2.0 * x @ dense.T)
    assert int(torch.linalg.matrix_rank(dense)) == min(8, 2 * blocks)
    assert count_adapter_parameters(changed) == 2 * (12 + 8)


def test_an_embedding_keeps_its_padding_row() -> None:
    layer, x = LAYERS[-1]
    changed = rewritten(layer, rank=2)
    changed.beside["lora"].B.data.normal_()
    assert not changed(x)[0, 1].any()
    changed(x).sum().backward()
    assert not changed.beside["lora"].A.grad[:, 2].any() and changed.beside["lora"].A.grad[:, 6].any()


@given(r=st.integers(1, 64), extra=st.integers(0, 64), alpha=st.floats(0.1, 100))
@settings(deadline=None)
def test_scales(r: int, extra: int, alpha: float) -> None:
    layer = nn.Linear(2, 2)
    found = {
        name: float(Lora(rank=r, alpha=alpha, scale=name, r_max=r + extra).adapter(layer).scale)
        for name in ("alpha/r_max", "alpha/r", "alpha/sqrt(r)")
    }
    expected = {"alpha/r_max": alpha / (r + extra), "alpha/r": alpha / r, "alpha/sqrt(r)": alpha * r**-0.5}
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_largest_rank_is_fixed_at_declaration_and_the_scale_lies_in_the_file() -> None:
    declared = Lora(rank=Choice("r", [0, 4, 32, 8]), scale="alpha/r_max", alpha=64)
    assert declared.r_max == 32
    changed = transformed(nn.Linear(4, 4), [Lora(**{**as_op(declared).kwargs, "rank": 8})])
    assert float(changed.state_dict()["beside.lora.scale"]) == 2.0
    assert Lora(rank=4).r_max is None  # no other rule asks for it


def test_dropout_is_of_the_input_and_only_in_training() -> None:
    layer = rewritten(nn.Linear(50, 4), rank=4, dropout=0.5)
    stirred(layer)
    x = torch.randn(2, 50)
    torch.testing.assert_close(layer.eval()(x), merge(copy.deepcopy(layer))(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": -1}, "rank is -1: give a whole number"),
        ({"rank": Choice("r", [0, 2.5])}, r"rank is 2\.5"),
        ({"rank": True}, "rank is True"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"scale": "alpha"}, "scale is 'alpha': give one of alpha/r_max"),
        ({"rank": 8, "scale": "alpha/r_max", "r_max": 4}, "r_max is 4: .*at least the largest rank"),
        ({"kind": "dora"}, "kind is 'dora': give one of plain, vera"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"blocks": 0}, "blocks is 0"),
    ],
)
def test_what_is_out_of_range_is_refused_at_declaration(given: dict[str, object], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Lora(**given)  # type: ignore[arg-type]


def test_layers_that_cannot_have_an_adapter() -> None:
    with pytest.raises(SpaceError, match="Lora cannot rewrite Conv2d, which has no layer of these kinds: Linear"):
        rewritten(nn.Conv2d(2, 2, 1), kind="vera")
    with pytest.raises(SpaceError, match="groups=2.*needs 1 group"):
        rewritten(nn.Conv2d(2, 2, 1, groups=2))
    with pytest.raises(SpaceError, match="5 blocks do not divide its 12 inputs and 8 outputs"):
        rewritten(LAYERS[0][0], kind="melora", blocks=5)
    with pytest.raises(SpaceError, match="has an adapter already"):
        transformed(nn.Linear(2, 2), [Lora(rank=1), Lora(rank=2)])
    layer = rewritten(nn.Linear(2, 2), rank=1)
    layer.on_input["bits"] = nn.Identity()
    with pytest.raises(ValueError, match="cannot be merged: the layer is masked or quantised"):
        merge(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_files_and_programs(kind: dict[str, object]) -> None:
    layer, x = LAYERS[0]
    changed = stirred(rewritten(layer, rank=3, dropout=0.1, **kind)).eval()
    again = rewritten(layer, rank=3, dropout=0.1, **kind).eval()
    again.load_state_dict(changed.state_dict())
    assert torch.equal(again(x), changed(x)) and torch.equal(copy.deepcopy(changed)(x), changed(x))
    program = torch.export.export(changed, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    longer = torch.cat([x, x])
    torch.testing.assert_close(program.module()(longer), changed(longer))


def test_a_float64_layer_has_a_float64_adapter() -> None:
    changed = stirred(rewritten(nn.Linear(4, 4).double(), rank=2, kind="vera"))
    changed.beside["lora"].double()
    assert changed(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_saliency_proxies_refuse_adapters_as_they_start(kind: dict[str, object]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    transformed(model, [Lora("0", rank=2, **kind)])  # type: ignore[arg-type]
    batch = Batch((torch.randn(6, 8),), torch.arange(6) % 3)
    for proxy in (snip, synflow):
        with pytest.raises(ValueError, match=r"cannot judge the adapter '0.beside.lora': .* is 0 at any rank"):
            proxy(model, batch)
    assert grad_norm(model, batch) > 0
    stirred(model)
    assert snip(model, batch) > 0 and math.isfinite(synflow(model, batch))


# ---- in a space and a supernet --------------------------------------------------------------------------------------


def space_of(kinds: bool = False) -> SearchSpace:
    space = SearchSpace("adapted")
    x = space.input("x", torch.randn(4, 6), {0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]]), {1: "edges"})
    width = Choice("width", [4, 8], ordered=True)
    rank = Choice("rank", [0, 1, 2, 4])
    kind = Choice("kind", ["plain", "vera", "mora", "melora"]) if kinds else "plain"
    lora = Lora(rank=rank, kind=kind, blocks=2, scale="alpha/r")
    h = space.add("conv", Op(GCNConv, out_channels=width), x, edges, transforms=[lora])
    space.output(space.add("head", Op(nn.Linear, out_features=3), h))
    return space


def test_a_declared_space_with_ranks_and_kinds() -> None:
    space = space_of(kinds=True)
    bare = build(space, {"width": 8, "rank": 0, "kind": "mora"})
    assert "lora" not in str(bare) and {space.key(a) for a in space.enumerate() if a["rank"] == 0} == {
        space.key({"width": width, "rank": 0, "kind": "plain"}) for width in (4, 8)
    }
    inputs = (torch.randn(4, 6), torch.tensor([[0, 1, 2], [1, 2, 3]]))
    for kind in ("plain", "vera", "mora", "melora"):
        model = build(space, {"width": 8, "rank": 2, "kind": kind})
        assert torch.equal(model(*inputs), bare(*inputs))
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_ranks_of_a_supernet_are_prefixes_and_extraction_is_bit_equal() -> None:
    space = space_of(kinds=True)
    supernet = Supernet(space)
    generator = torch.Generator().manual_seed(0)
    for (_, _, name), parameter in supernet.store.items():
        if ".beside." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    shapes = {name: tuple(p.shape) for (node, _, name), p in supernet.store.items() if node == "conv"}
    side = {math.isqrt((6 + width) * rank) for width in (4, 8) for rank in (1, 2, 4)}
    squares = {f"lin.beside.lora.M_{min(s, 8)}" for s in side if s <= 8}
    assert squares <= set(shapes)
    assert shapes["lin.beside.lora.A"] == (4, 6) and shapes["lin.beside.lora.B"] == (8, 4)
    assert shapes["lin.beside.lora.A_2"] == (2, 4, 3) and shapes["lin.beside.lora.B_2"] == (2, 4, 4)
    assert not any(name.endswith("scale") for name in shapes)
    inputs = (torch.randn(4, 6), torch.tensor([[0, 1, 2], [1, 2, 3]]))
    for architecture in random.Random(0).sample(list(space.enumerate()), 20):
        subnet, alone = supernet.subnet(architecture), supernet.extract(architecture)
        assert torch.equal(subnet(*inputs), alone(*inputs))
    low = supernet.extract({"width": 8, "rank": 2, "kind": "plain"}).conv.lin.beside["lora"]
    high = supernet.extract({"width": 8, "rank": 4, "kind": "plain"}).conv.lin.beside["lora"]
    assert isinstance(low, Adapter)
    assert torch.equal(low.A, high.A[:2]) and torch.equal(low.B, high.B[:, :2])
    assert (float(low.scale), float(high.scale)) == (8.0, 4.0)


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "lora.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace('formats=["peft"]', 'formats=["safetensors"]'), names)  # PEFT: in tests/export
    assert count_adapter_parameters(names["network"]) == 2 * (16 + 32) + 8 * (32 + 32)
    assert names["supernet"].numel == 8 * (16 + 32) + 8 * (32 + 32) + sum(
        p.numel() for p in names["model"].parameters()
    )


class Target(nn.Module):
    """What has to be learned: a frozen layer plus an update whose singular values are 4, 2, 1 and 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("scale", ["alpha/r", "alpha/r_max"])
def test_dylora_one_supernet_trains_every_rank(scale: str) -> None:
    """Valipour et al., EACL 2023: uniform paths over nested ranks.

    The mean squared error on white inputs is the squared norm of what is missing, over the number of outputs: the best
    rank b leaves the singular values behind the b-th. With a constant scale the best of all ranks are nested, and are
    found. With DyLoRA's alpha / b they are not: what rank 1 multiplies by alpha, rank 2 multiplies by alpha / 2.
    """
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    update = u[:, :4] @ torch.diag(values) @ v[:, :4].T
    model = Target()
    lora = Lora("layer", rank=Choice("rank", [0, 1, 2, 4], ordered=True), alpha=4.0, scale=scale)
    space = SearchSpace.from_module(model, [lora], inputs=torch.randn(2, 16, generator=generator))
    supernet = Supernet(space)
    policy = Uniform(space)
    optimizer = torch.optim.Adam([p for p in supernet.parameters() if p.requires_grad], lr=0.02)
    rng = random.Random(0)
    for step in range(800):
        x = torch.randn(64, 16, generator=generator)
        (chosen,) = policy.sample(step, rng)
        optimizer.zero_grad()
        error = supernet.subnet(chosen)(x) - model(x) - x @ update.T
        if chosen["rank"]:
            error.square().mean().backward()
            optimizer.step()
    found = {}
    for rank in (0, 1, 2, 4):
        layer = supernet.extract({"rank": rank}).model.layer
        delta = layer.beside["lora"].delta() if rank else torch.zeros(12, 16)
        found[rank] = float((delta - update).detach().square().sum())
    best = {rank: float(values[rank:].square().sum()) for rank in (0, 1, 2, 4)}
    assert found[0] == pytest.approx(best[0], rel=1e-4)
    assert found[0] > found[1] > found[2] > found[4]
    for rank in (1, 2, 4):
        assert found[rank] < best[rank] + (0.05 if scale == "alpha/r_max" else 0.5) * best[0]
    assert (found[4] < 0.05) == (scale == "alpha/r_max")
