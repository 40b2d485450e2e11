from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.search_spaces.transformer import SelfAttention
from nasgraph.space import Architecture, Choice, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.transforms.lora import Lora
from nasgraph.transforms.low_rank import LowRank
from nasgraph.transforms.prune import Prune
from nasgraph.transforms.quantize import Quantize
from nasgraph.transforms.shrink import Group
from nasgraph.transforms.structured import group_of, groups, heads_of


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """Two blocks with BatchNorm, a sum, a depthwise convolution and a gate; a linear head on flattened pixels."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.one = nn.Conv2d(8, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 if pooled else 8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.two(F.relu(self.norm(self.one(h))))
        h = self.depthwise(h)
        h = h * torch.sigmoid(self.gate(h))
        if self.pooled:
            out: Tensor = self.head(h.mean(dim=(2, 3)))
        else:
            out = self.head(F.max_pool2d(h, 2).flatten(1))
        return out


class FeedForward(nn.Module):
    """As in BERT: the names, a residual and a norm after it."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__()
        self.refuses = refuses
        self.attention = nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(6, 6)})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(6, 10)})
        self.output = nn.ModuleDict({"dense": nn.Linear(10, 6), "norm": nn.LayerNorm(6)})

    def forward(self, x: Tensor) -> Tensor:
        if self.refuses and x.sum() > 1e9:  # what torch.fx cannot trace
            return x
        h = F.gelu(self.intermediate["dense"](x))
        out: Tensor = self.output["norm"](x + self.output["dense"](h))
        return out


def trained(model: nn.Module) -> nn.Module:
    """BatchNorm with statistics and factors of its own, all of it in evaluation mode."""
    rng = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data = torch.rand(tensor.shape, generator=rng) + 0.5
    return model.eval()


def masked(model: nn.Module, group: Group, channels: Sequence[int], x: Tensor) -> Tensor:
    """What the full model gives if its readers see zeros for what is not in ``channels``."""
    model = copy.deepcopy(model)
    for cut in group.cuts:
        if cut.end == "in":
            layer = model.get_submodule(cut.module)
            weight: Tensor = layer.weight  # type: ignore[assignment]
            keep = torch.zeros(weight.shape[1])
            keep[cut.entries(torch.tensor(channels), group.size)] = 1
            weight.data *= keep.view(1, -1, *[1] * (weight.dim() - 2))
    out: Tensor = model(x)
    return out


MODELS: dict[str, tuple[nn.Module, Tensor, dict[str, set[str]]]] = {
    "mlp": (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)),
        numbers(7, 4),
        {"0": {"0", "1", "3"}, "3": {"3", "5"}},
    ),
    "flattened": (
        Residual(),
        numbers(2, 3, 8, 8),
        {"one": {"one", "norm", "two"}, "stem.0": {"stem.0", "stem.1", "one", "two", "depthwise", "gate", "head"}},
    ),
    "pooled": (Residual(True), numbers(2, 3, 8, 8), {"one": {"one", "norm", "two"}}),
    "feed forward": (FeedForward(), numbers(2, 3, 6), {"intermediate.dense": {"intermediate.dense", "output.dense"}}),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("given", [False, True])
def test_the_smaller_model_is_the_masked_one(name: str, given: bool) -> None:
    torch.manual_seed(0)
    model, x, expected = MODELS[name]
    model = trained(copy.deepcopy(model))
    found = groups(model, (x,) if given else None)
    for layer, members in expected.items():
        assert {cut.module for cut in found[layer].cuts} == members
    for layer, group in found.items():
        assert group.exact
        channels = group.best(group.importance(model), group.size // 2).tolist()
        small = copy.deepcopy(model)
        group.keep(small, channels)
        torch.testing.assert_close(small(x), masked(model, group, channels, x), rtol=0, atol=1e-6)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        assert all(p.requires_grad for p in small.parameters()), layer
        same = copy.deepcopy(model)
        group.keep(same, range(group.size))
        assert torch.equal(same(x), model(x))


def test_two_groups_that_share_a_layer_and_what_it_has_kept() -> None:
    model = trained(Residual())
    full = copy.deepcopy(model)
    for name, count in (("one", 3), ("stem.0", 5), ("one", 2)):  # the first again, of what was left
        group = groups(model)[name]
        group.keep(model, group.best(group.importance(model), count))
    assert model.two.weight.shape == (5, 2, 1, 1) and model.depthwise.groups == 5 and model.head.in_features == 5 * 16
    assert model.norm.num_features == 2 and model.norm.running_var.shape == (2,)
    assert model(numbers(2, 3, 8, 8)).shape == (2, 5)
    for name, parameter in model.named_parameters():
        layer, _, own = name.rpartition(".")
        kept = getattr(model.get_submodule(layer), "kept_entries", {}).get(own, ())
        stored = full.get_parameter(name)
        for axis, entries in enumerate(kept):
            stored = stored if entries is None else stored.index_select(axis, entries)
        assert torch.equal(stored, parameter), name
    copied = copy.deepcopy(model)
    assert set(copied.two.kept_entries) == {"weight", "bias"}


def test_importance_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    model[0].weight.data = torch.tensor([[3.0, 0], [1, 1], [0, 0]])
    model[2].weight.data = torch.tensor([[4.0, 1, 2]])
    group = groups(model)["0"]
    assert group.importance(model).tolist() == [5.0, 3**0.5, 2.0]
    assert group.best(group.importance(model), 2).tolist() == [0, 2]
    assert group.importance(model, "first").tolist() == [3, 2, 1]
    assert torch.equal(group.importance(model, "random", 3), group.importance(model, "random", 3))
    with pytest.raises(ValueError, match="no gradient"):
        group.importance(model, "taylor")
    x = numbers(4, 2)
    model(x).sum().backward()
    scores = group.importance(model, "taylor")
    for i in range(3):
        first = (model[0].weight * model[0].weight.grad)[i].sum() + (model[2].weight * model[2].weight.grad)[:, i].sum()
        assert scores[i].item() == pytest.approx(abs(first.item()), rel=1e-5)


@pytest.mark.parametrize("refuses", [False, True])
def test_following_by_name_where_nothing_can_be_traced(refuses: bool) -> None:
    model = trained(FeedForward(refuses))
    if refuses:
        with pytest.raises(
            SpaceError,
            match=r"what reads 'intermediate.dense' is not known, as torch.fx cannot trace .*name that layer",
        ):
            group_of(model, "intermediate.dense")
    group = group_of(model, "intermediate.dense", follow="output.dense")
    assert [cut.module for cut in group.cuts] == ["intermediate.dense", "output.dense"]
    x = numbers(2, 3, 6)
    small = copy.deepcopy(model)
    group.keep(small, [1, 4, 9])
    torch.testing.assert_close(small(x), masked(model, group, [1, 4, 9], x), rtol=0, atol=1e-6)
    with pytest.raises(SpaceError, match="'output.dense' does not read the channels of 'attention.output.dense'"):
        group_of(model, "attention.output.dense", follow="output.dense")
    with pytest.raises(SpaceError, match="no linear layer called 'out'"):
        group_of(model, "intermediate.dense", follow="out")


class Gated(nn.Module):
    """The feed-forward part of Llama, in a model that cannot be traced."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        self.refuses = refuses
        self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.refuses and x.sum() > 1e9:
            return x
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Around(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x if x.sum() > 1e9 else self.mlp(x)
        return out


@pytest.mark.parametrize("refuses", [False, True])
def test_a_wrong_follow_is_noticed(refuses: bool) -> None:
    torch.manual_seed(0)
    mlp = Gated(refuses)
    outer, x = Around(mlp), numbers(2, 4)
    if refuses:
        with pytest.raises(SpaceError, match="more than 'mlp.down' depends on the channels of 'mlp.up'"):
            group_of(outer, "mlp.up", "down", (x,))
        assert mlp.up.out_features == 6
    else:  # what can be traced is, and the gate is found
        group = group_of(outer, "mlp.up", "down", (x,))
        assert {cut.module for cut in group.cuts} == {"mlp.up", "mlp.gate", "mlp.down"}
        small = copy.deepcopy(mlp)
        group_of(small, "up", "down").keep(small, [0, 2, 5])
        assert small(x).shape == (2, 4)


class Centred(nn.Module):
    """Subtracts the mean over axis 1: of channels for 2-D inputs, of positions for 3-D ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out: Tensor = self.b(h - h.mean(1, keepdim=True))
        return out


def test_a_mean_over_axis_1_is_followed_if_inputs_show_that_it_is_of_positions() -> None:
    torch.manual_seed(0)
    model = Centred()
    assert "a" not in groups(model)
    with pytest.raises(SpaceError, match="channels of 'a' are fixed: .*of positions or of channels: give inputs"):
        group_of(model, "a")
    for x in (numbers(3, 4), numbers(8, 4)):  # as many rows as channels
        assert "a" not in groups(model, (x,))
    x = numbers(3, 5, 4)
    group, small = groups(model, (x,))["a"], copy.deepcopy(model)
    group.keep(small, [0, 3])
    torch.testing.assert_close(small(x), masked(model, group, [0, 3], x), rtol=0, atol=1e-6)


class Loop(nn.Module):
    """A model that cannot be traced around blocks that can."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
            if x.sum() > 1e9:
                break
        return x


def test_blocks_of_a_model_that_cannot_be_traced_as_a_whole() -> None:
    model = Loop()
    group = group_of(model, "blocks.2.0")
    assert [cut.module for cut in group.cuts] == ["blocks.2.0", "blocks.2.2"]
    with pytest.raises(SpaceError, match="what reads 'blocks.2.2' is not known"):
        group_of(model, "blocks.2.2")


def test_layers_are_left_out_under_their_names() -> None:
    model = Loop()
    model.blocks[1][0].weight.data *= 0.01
    model.blocks[1][2].weight.data *= 0.01
    small = Prune("blocks", keep=0.75, structure="layers").apply_to_model(copy.deepcopy(model), "blocks")
    assert [name for name, _ in small.get_submodule("blocks").named_children()] == ["0", "2", "3"]
    x = numbers(3, 4)
    h = x
    for i in (0, 2, 3):
        h = h + model.blocks[i](h)
    assert torch.equal(small(x), h)
    first = Prune("blocks", keep=0.5, structure="layers", scores="first").apply_to_model(copy.deepcopy(model), "blocks")
    assert [name for name, _ in first.get_submodule("blocks").named_children()] == ["0", "1"]


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        vocab_size=30,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.BertForSequenceClassification(config).eval()
    return model


@pytest.mark.parametrize("where", ["bert.encoder.layer.1.attention", "bert.encoder.layer.1.attention.self"])
def test_heads_and_feed_forward_units_of_bert(where: str) -> None:
    model, tokens = bert(), torch.arange(12).view(2, 6)
    heads = heads_of(model, where)
    units = group_of(model, "bert.encoder.layer.0.intermediate.dense", follow="output.dense")
    assert (heads.size, units.size) == (4, 24)
    full, small = copy.deepcopy(model), copy.deepcopy(model)
    for group, channels in ((heads, [1, 3]), (units, [0, 5, 6, 23])):
        group.keep(small, channels)
        for cut in group.cuts:
            if cut.end == "in":
                zero = torch.ones(full.get_submodule(cut.module).weight.shape[1])  # type: ignore[union-attr, arg-type]
                zero[cut.entries(torch.tensor(channels), group.size)] = 0
                full.get_submodule(cut.module).weight.data[:, zero.bool()] = 0  # type: ignore[union-attr, index]
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, full(tokens).logits, rtol=0, atol=1e-6)
    attention: Any = small.get_submodule("bert.encoder.layer.1.attention.self")
    assert attention.num_attention_heads == 2 and attention.query.weight.shape == (8, 16)
    with pytest.raises(
        SpaceError, match="trace the forward of BertFor.*: name that layer, such as follow='output.dense'"
    ):
        group_of(model, "bert.encoder.layer.0.intermediate.dense")
    pruned = Prune("x", keep=0.5, structure="heads").apply_to_model(copy.deepcopy(model), where)
    assert pruned(tokens).logits.shape == (2, 2)


def test_heads_of_the_transformers_here() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SelfAttention(8, 4, 3, causal=True))
    x = numbers(2, 5, 8)
    full = copy.deepcopy(model)
    heads_of(model, "0").keep(model, [0, 3])
    keep = torch.zeros(4, 3)
    keep[[0, 3]] = 1
    full[0].leave.weight.data *= keep.view(1, -1)
    torch.testing.assert_close(model(x), full(x), rtol=0, atol=1e-6)
    with pytest.raises(SpaceError, match="no heads that can be removed"):
        heads_of(nn.Sequential(nn.MultiheadAttention(8, 2)), "0")


class Odd(nn.Module):
    """One reason each for channels that cannot be removed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.next = how, nn.Conv2d(3, 4, 1), nn.Conv2d(8 if how == "cat" else 4, 2, 1)
        self.extra = nn.Parameter(torch.ones(4, 1, 1))
        self.groups = nn.Conv2d(4, 4, 1, groups=2)
        self.group_norm, self.linear = nn.GroupNorm(2, 4), nn.Linear(8, 8)
        self.other = nn.Conv2d(3, 4, 1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if self.how == "cat":
            h = torch.cat([h, h], 1)
        elif self.how == "parameter":
            h = h + self.extra
        elif self.how == "groups":
            h = self.groups(h)
        elif self.how == "softmax":
            h = h.softmax(1)
        elif self.how == "norm":
            h = self.group_norm(h)
        elif self.how == "axis":
            h = self.linear(h)
        elif self.how == "transposed":
            h = h.mT
        elif self.how == "input":
            h = h + x[:, :1]
        elif self.how == "shared":
            h = h + self.other(x)
        out: Tensor = self.next(h)
        return out


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cat", "cat reads it"),
        ("parameter", "joins it with what cannot be cut"),
        ("groups", "'groups' is a convolution in groups"),
        ("softmax", "softmax reads it"),
        ("norm", r"'group_norm' \(GroupNorm\) reads it"),
        ("axis", "'linear' reads along another axis"),
        ("transposed", "getattr reads it"),
        ("input", "joins it with what cannot be cut"),
        ("shared", "shares the weight of"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(how: str, reason: str) -> None:
    model = Odd(how)
    with pytest.raises(SpaceError, match=f"channels of 'conv' are fixed: .*{reason}"):
        group_of(model, "conv")
    assert "conv" not in groups(model, (numbers(1, 3, 8, 8),))


def test_other_refusals() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert not groups(model)["0"].exact
    with pytest.raises(SpaceError, match="channels of '2' are fixed: the model returns it"):
        group_of(model, "2")
    with pytest.raises(SpaceError, match="'1' is a LayerNorm; channels are removed from Linear"):
        group_of(model, "1")
    with pytest.raises(ValueError, match="channels must ascend"):
        groups(model)["0"].keep(model, [2, 1])
    with pytest.raises(SpaceError, match="layers are removed from a ModuleList"):
        Prune(keep=0.5, structure="layers").apply_to_model(model, "0")


def test_a_ratio_is_of_the_group_before_anything_was_removed() -> None:
    model = trained(Residual())
    prune = Prune(keep=0.5, structure="channels")
    for name in ("stem.0", "two", "gate"):  # one group: the second and third find it done
        prune.apply_to_model(model, name)
    assert model.two.out_channels == 4
    with pytest.raises(SpaceError, match="'two' is tied to layers that keep 4 of 8 channels, and should keep 2"):
        Prune(keep=0.25, structure="channels").apply_to_model(model, "two")
    magnitude, random = Residual(), None
    random = copy.deepcopy(magnitude)
    prune.apply_to_model(magnitude, "one")
    Prune(keep=0.5, structure="channels", scores="random").apply_to_model(random, "one")
    assert magnitude.one.weight.shape == random.one.weight.shape
    assert not torch.equal(magnitude.one.weight, random.one.weight)


def test_a_space_over_a_model_and_its_supernet() -> None:
    torch.manual_seed(0)
    model, x = trained(Residual()), numbers(2, 3, 8, 8)
    keeps, mask = [0.25, 0.5, 1.0], Choice("mask", [0.5, 1.0])
    rules = [
        Prune("gate", keep=mask, scores="learned"),  # listed first, applied last
        Prune("two", keep=mask, scores="random"),
        Prune("one", structure="channels", keep=Choice("keep.{name}", keeps)),
        Prune("stem.0", structure="channels", keep=Choice("keep.{name}", keeps), scores="random"),
    ]
    space = SearchSpace.from_module(model, rules, inputs=x)
    assert torch.equal(space.model(space.baseline()).eval()(x), model(x))
    supernet = Supernet(space)
    sizes = set()
    for architecture in space.enumerate():
        alone, subnet = supernet.extract(architecture).eval(), supernet.subnet(architecture).eval()
        assert torch.equal(alone(x), subnet(x))
        made = build(space, architecture).eval()
        if architecture["mask"] == 1.0:  # scores start anew in what is built alone
            assert torch.equal(alone(x), made(x))
        sizes.add(sum(p.numel() for p in made.parameters()))
    assert len(sizes) == 18
    chosen = {"keep.one": 0.25, "keep.stem.0": 0.5, "mask": 0.5}
    subnet, own = supernet.subnet(chosen).eval(), supernet.extract(chosen).eval()
    subnet(x).square().sum().backward()
    own(x).square().sum().backward()
    for piece in supernet._structure(Architecture(chosen)).pieces:
        grad, alone_grad = supernet.store[piece.key].grad, own.get_parameter(piece.name).grad
        assert grad is not None and alone_grad is not None
        torch.testing.assert_close(grad.abs().sum(), alone_grad.abs().sum(), rtol=1e-4, atol=1e-5)


def test_a_space_over_bert_whose_heads_units_and_layers_go() -> None:
    model, tokens = bert(), torch.arange(12).view(2, 6)
    rules = [
        Prune("bert.encoder.layer.*.attention", structure="heads", keep=Choice("heads.{name}", [0.5, 1.0])),
        Prune(
            "bert.encoder.layer.*.intermediate.dense",
            structure="channels",
            keep=Choice("units", [0.25, 1.0]),
            follow="output.dense",
        ),
    ]
    space = SearchSpace.from_module(model, rules, inputs={"input_ids": tokens}, output="logits")
    assert len(space.choices) == 3 and space.size() == 8
    supernet = Supernet(space)
    for architecture in list(space.enumerate())[:3]:
        assert torch.equal(supernet.extract(architecture).eval()(tokens), supernet.subnet(architecture).eval()(tokens))
    steps = [Quantize("*.(query|output.dense)", weight_bits=4, per=Choice("per", ["channel", "group"]), group_size=4)]
    supernet = Supernet(SearchSpace.from_module(model, [*rules, *steps], inputs={"input_ids": tokens}, output="logits"))
    for architecture in supernet.space.enumerate():
        assert torch.equal(supernet.extract(architecture).eval()(tokens), supernet.subnet(architecture).eval()(tokens))
    layers = Prune("bert.encoder.layer", structure="layers", keep=Choice("depth", [0.5, 1.0]))
    shallow = SearchSpace.from_module(model, [layers]).model({"depth": 0.5}).eval()
    assert shallow(tokens).logits.shape == (2, 2) and len(shallow.get_submodule("bert.encoder.layer")) == 1


class Read(nn.Module):
    """Channels that go and what reads them, one of each kind of layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body: nn.Module
        if kind == "convolution":
            self.body = nn.Conv2d(3, 8, 3, padding=1)
        else:
            self.body = nn.Embedding(12, 8) if kind == "embedding" else nn.Linear(5, 8)
        self.reader = nn.Conv2d(8, 6, 3) if kind == "convolution" else nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.reader(torch.relu(self.body(x)))
        return out

    def inputs(self) -> Tensor:
        if self.kind == "embedding":
            return torch.arange(12).view(3, 4)
        return numbers(2, 3, 6, 6) if self.kind == "convolution" else numbers(3, 4, 5)


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
@pytest.mark.parametrize("rank", [None, 3])
def test_learned_steps_of_smaller_layers_are_those_of_what_stays(kind: str, per: str, rank: int | None) -> None:
    torch.manual_seed(0)
    model = Read(kind).eval()
    x = model.inputs()
    bits = Choice("bits", [3, 32])
    rules: list[Any] = [
        Prune("body", structure="channels", keep=Choice("keep", [0.125, 0.5, 1.0])),
        Quantize("(body|reader)", weight_bits=bits, per=per, group_size=2),
    ]
    if rank is not None:
        rules.append(LowRank("reader", rank=Choice("rank", [None, rank])))
    space = SearchSpace.from_module(model, rules, inputs=x)
    supernet = Supernet(space)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for (_, _, name), stored in supernet.store.items():
            if "step" in name:
                stored.copy_(0.1 + torch.rand(stored.shape, generator=generator))  # each its own
    for architecture in space.enumerate():
        alone = supernet.extract(architecture).eval()
        assert torch.equal(alone(x), supernet.subnet(architecture).eval()(x))
        for name, parameter in alone.named_parameters():
            before, _, step = name.rpartition(".on_weight.quantize.")
            if before and per != "tensor":
                stored = next(p for (_, _, key), p in supernet.store.items() if name.endswith(key)).detach()
                entries = alone.get_submodule(before).__dict__.get("kept_entries", {"weight": (None, None)})["weight"]
                weight: Tensor = alone.get_submodule(before).weight  # type: ignore[assignment]
                area = weight[0, 0].numel()
                for row in range(weight.shape[0]):
                    old_row = row if entries[0] is None else int(entries[0][row])
                    if per == "channel":
                        assert torch.equal(parameter[row].flatten(), stored[old_row].flatten())
                        continue
                    for group in range(parameter.shape[1]):
                        column, rest = divmod(2 * group, area)
                        old = column if entries[1] is None else int(entries[1][column])
                        assert parameter[row, group] == stored[old_row, (old * area + rest) // 2]


def test_a_mean_over_positions_in_a_space_needs_its_inputs() -> None:
    rules = [Prune("a", structure="channels", keep=Choice("k", [0.5, 1.0]))]
    with pytest.raises(SpaceError, match="of positions or of channels: give inputs"):
        SearchSpace.from_module(Centred(), rules)
    with pytest.raises(SpaceError, match="takes the mean over channels"):
        SearchSpace.from_module(Centred(), rules, inputs=numbers(3, 4))
    x = numbers(3, 5, 4)
    assert SearchSpace.from_module(Centred(), rules, inputs=x).model({"k": 0.5})(x).shape == (3, 5, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out: Tensor = self.o(h + torch.relu(self.b(h)))
        return out


def test_tied_layers_have_one_ratio() -> None:
    keeps = [0.25, 0.5, 1.0]
    with pytest.raises(SpaceError, match=r"'a' and 'b' are tied: give both the same keep, .*without \{name\}"):
        SearchSpace.from_module(Tied(), [Prune("(a|b)", structure="channels", keep=Choice("k.{name}", keeps))])
    with pytest.raises(SpaceError, match="'a' and 'b' are tied: give both the same scores"):
        SearchSpace.from_module(
            Tied(),
            [Prune("a", structure="channels", keep=0.5), Prune("b", structure="channels", keep=0.5, scores="first")],
        )
    space = SearchSpace.from_module(Tied(), [Prune("(a|b)", structure="channels", keep=Choice("k", keeps))])
    assert [space.model({"k": keep}).get_submodule("b").out_features for keep in keeps] == [2, 4, 8]
    masks = [Prune("a", structure="channels", keep=Choice("k", keeps)), Prune("b", keep=Choice("m", keeps))]
    assert SearchSpace.from_module(Tied(), masks).size() == 9  # a mask of b is another matter


def test_rules_within_layers_that_are_removed() -> None:
    torch.manual_seed(0)
    model, x = Loop(), numbers(3, 4)
    model.blocks[1][0].weight.data *= 0.01
    model.blocks[1][2].weight.data *= 0.01
    rules = [
        LowRank("blocks.*.2", rank=Choice("rank.{name}", [None, 2])),
        Quantize("blocks.*.2", weight_bits=Choice("bits.{name}", [4, 32])),
        Prune("blocks.*.0", structure="channels", keep=Choice("keep.{name}", [0.5, 1.0])),
        Prune("blocks", structure="layers", keep=Choice("depth", [0.75, 1.0])),
    ]
    space = SearchSpace.from_module(model, rules, inputs=x)
    supernet = Supernet(space)
    most = {name: choice.labels[0] for name, choice in space.choices.items()}
    for depth in (0.75, 1.0):
        picked = most | {"depth": depth}
        small: Any = build(space, picked).eval().get_submodule("model")
        assert torch.equal(supernet.extract(picked).eval()(x), supernet.subnet(picked).eval()(x))
        names = ["0", "1", "2", "3"] if depth == 1.0 else ["0", "2", "3"]  # by the norms of the model as it was
        assert [name for name, _ in small.blocks.named_children()] == names
        h = x
        for name in names:
            assert small.blocks.get_submodule(name)[0].out_features == 4
            h = h + small.blocks.get_submodule(name)(h)
        assert torch.equal(small(x), h)

    def key(**changed: Any) -> str:
        return space.key(most | changed)

    for name, other in {"bits.blocks.1.2": 32, "keep.blocks.1.0": 1.0, "rank.blocks.1.2": 2}.items():
        assert key(**{name: other}) == key()  # nothing is left to be quantised
        assert key(**{name: other, "depth": 1.0}) != key(depth=1.0)
        assert key(**{name.replace("blocks.1", "blocks.2"): other}) != key()


def test_lists_of_layers_in_a_list_of_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)))
    model[0][1].weight.data *= 100  # counts for stage 0, though this layer goes
    rules = [
        Prune("stages.(0|1|2)", structure="layers", keep=Choice("depth", [0.5, 1.0]), scores="first"),
        Prune("stages", structure="layers", keep=Choice("stages", [0.7, 1.0])),
    ]
    space = SearchSpace.from_module(nn.ModuleDict({"stages": model}), rules)
    stages = space.model({"depth": 0.5, "stages": 0.7}).get_submodule("stages")
    names = [name for name, _ in stages.named_children()]
    assert len(names) == 2 and names[0] == "0" and all(len(stages.get_submodule(name)) == 1 for name in names)


def test_bert_with_fewer_layers_and_rules_in_them() -> None:
    model, tokens = bert(), torch.arange(12).view(2, 6)
    rules = [
        Prune("bert.encoder.layer", structure="layers", keep=Choice("depth", [0.5, 1.0])),
        Prune("*.attention.self", structure="heads", keep=Choice("heads.{name}", [0.5, 1.0])),
        Quantize("*.intermediate.dense", weight_bits=Choice("bits.{name}", [4, 32])),
    ]
    space = SearchSpace.from_module(model, rules, inputs={"input_ids": tokens}, output="logits")
    supernet = Supernet(space)
    most = {name: choice.labels[0] for name, choice in space.choices.items()}
    assert torch.equal(supernet.extract(most).eval()(tokens), supernet.subnet(most).eval()(tokens))
    (layer,) = space.model(most).get_submodule("bert.encoder.layer").children()
    assert layer.attention.self.num_attention_heads == 2
    assert list(layer.intermediate.dense.on_weight) == ["quantize"]


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_adapters_of_smaller_layers_stay_with_the_channels(kind: str) -> None:
    torch.manual_seed(0)
    model = Read(kind).eval()
    x = model.inputs()
    rules: list[Any] = [
        Prune("body", structure="channels", keep=Choice("keep", [0.25, 0.5, 1.0])),
        Lora("(body|reader)", rank=Choice("rank", [1, 2])),
    ]
    space = SearchSpace.from_module(model, rules, inputs=x)
    supernet = Supernet(space)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for stored in supernet.store.values():
            stored.copy_(torch.randn(stored.shape, generator=generator))
    stores = {name: stored.detach() for (_, _, name), stored in supernet.store.items()}
    moved = 0
    for architecture in space.enumerate():
        alone = supernet.extract(architecture).eval()
        assert torch.equal(alone(x), supernet.subnet(architecture).eval()(x))
        found = dict(alone.named_parameters())
        rows, columns = ((1, None) if kind == "embedding" else (0, None)), (None, 1)
        for layer, (out, read) in {"body": rows, "reader": columns}.items():
            name = next(n for n in found if n.endswith(f"{layer}.beside.lora.A")).removesuffix(".beside.lora.A")
            entries = alone.get_submodule(name).__dict__.get("kept_entries", {}).get("weight", (None, None))
            for end, axis, position in (("A", 1, read), ("B", 0, out)):
                mine = found[f"{name}.beside.lora.{end}"]
                [whole] = [t for key, t in stores.items() if key.endswith(f"{layer}.beside.lora.{end}")]
                index = None if position is None else entries[position]
                if index is not None:
                    whole = whole.index_select(axis, index)
                    moved += not torch.equal(index, torch.arange(len(index)))
                assert torch.equal(mine, whole[tuple(slice(size) for size in mine.shape)]), (architecture, layer, end)
    assert moved > 0
