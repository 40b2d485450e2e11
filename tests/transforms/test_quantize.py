from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, SAGEConv, TAGConv

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.transforms import Prune, Quantize
from nasgraph.transforms.base import transformed
from nasgraph.transforms.quantizers import ActivationQuantizer, LearnedStep, MinMax, NestedBits, WeightQuantizer
from nasgraph.transforms.ranges import freeze_ranges, start_steps

EDGES = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])
BITS = [1, 2, 3, 4, 5, 6, 7, 8, 16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(method: str, weight: Tensor, bits: int, per: str = "tensor", group_size: int = 3) -> WeightQuantizer:
    return Quantize(weight_bits=bits, method=method, per=per, group_size=group_size).weight_quantizer(weight)


weights = st.tuples(
    st.integers(1, 5), st.integers(1, 8), st.integers(0, 10_000), st.sampled_from([0.0, 1e-3, 1.0, 50.0])
)
settled = st.sampled_from(
    [(m, b) for m in ("lsq", "minmax", "nested") for b in BITS if m != "nested" or b in range(2, 9)]
)


# ---- weights --------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(weights, settled, st.sampled_from(["tensor", "channel", "group"]))
def test_codes_times_scale_are_the_weight_and_quantising_it_again_changes_no_code(
    weight: tuple[int, int, int, float], method: tuple[str, int], per: str
) -> None:
    rows, columns, seed, size = weight
    w = normal(rows, columns, seed=seed) * size
    part = quantizer(*(method[0], w, method[1], per))
    codes, scale = part.codes(w)
    quantised = part(w)
    assert torch.equal((codes + part.offset) * part.spread(scale, w), quantised)
    assert torch.equal(part.codes(quantised)[0], codes)
    assert codes.dtype is torch.int32 and codes.shape == w.shape
    assert scale.shape == {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, -(-columns // 3))}[per]
    low, high = (
        (-1, 1) if method[1] <= 2 and method[0] != "nested" else (-(2 ** (method[1] - 1)), 2 ** (method[1] - 1) - 1)
    )
    assert low <= int(codes.min()) and int(codes.max()) <= high
    assert len(codes.unique()) <= (3 if (low, method[1]) == (-1, 2) else 2 ** method[1])


@pytest.mark.parametrize("method", ["lsq", "minmax", "nested"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_all_levels_are_used_and_none_beside_them(method: str, bits: int) -> None:
    w = torch.linspace(-1, 1 - 1 / 2 ** (bits - 1), 5001).reshape(1, -1)
    part = quantizer(method, w, bits)
    for name in dict(part.named_parameters()):
        nn.init.constant_(part.get_parameter(name), 1 / 2 ** (bits - 1))
    assert part.codes(w)[0].unique().tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def test_min_max_takes_the_nearest_level_and_the_smallest_step_that_clips_nothing() -> None:
    w = normal(3, 7)
    part = MinMax(3, "channel")
    codes, scale = part.codes(w)
    for row, code, step in zip(w, codes, scale, strict=True):
        levels = torch.arange(-4, 4) * step
        assert torch.equal(part.codes(w)[0], codes)
        assert code.tolist() == [int((levels - x).abs().argmin()) - 4 for x in row]
        assert float(step) == pytest.approx(max(float(row.max()) / 3, float(row.min()) / -4))


def test_binary_and_ternary_are_the_published_formulas() -> None:
    w = normal(4, 6)
    assert torch.equal(MinMax(1)(w), w.sign() * w.abs().mean())  # Rastegari et al. 2016, eq. 6
    large = w.abs() > 0.7 * w.abs().mean()  # Li et al. 2016, eq. 6
    torch.testing.assert_close(MinMax(2)(w), w.sign() * large * w[large].abs().mean())


def test_learned_step_gradients_are_the_papers_equations() -> None:
    for bits, per in [(2, "tensor"), (3, "tensor"), (4, "channel"), (8, "channel"), (4, "group")]:
        w = normal(5, 6).requires_grad_()
        part = LearnedStep(w, bits, per, 4)
        step = part.get_parameter(part.name)
        with torch.no_grad():
            step.mul_(0.5)  # so that some weights are clipped
        upstream = normal(5, 6, seed=1)
        part(w).backward(upstream)
        low, high = (-1, 1) if bits == 2 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        for_w, for_step = torch.zeros(5, 6), torch.zeros_like(step)
        for i in range(5):
            for j in range(6):
                at = {"tensor": (0, 0), "channel": (i, 0), "group": (i, j // 4)}[per]
                ratio = w[i, j].item() / step[at].item()
                inside = low < ratio < high
                for_w[i, j] = upstream[i, j] if inside else 0  # eq. 5
                slope = round(ratio) - ratio if inside else (low if ratio <= low else high)  # eq. 3
                for_step[at] += upstream[i, j] * slope
        sharing = 30 / step.numel()
        torch.testing.assert_close(w.grad, for_w)
        torch.testing.assert_close(step.grad, for_step / math.sqrt(sharing * high))  # section 2.2


def test_a_learned_step_starts_as_in_the_paper_and_is_called_by_its_width() -> None:
    layer = transformed(nn.Linear(6, 5), [Quantize(weight_bits=4)])
    step = layer.get_parameter("on_weight.quantize.step_4")
    assert step.item() == pytest.approx(2 * layer.weight.abs().mean().item() / math.sqrt(7))
    assert set(layer.state_dict()) == {"weight", "bias", "on_weight.quantize.step_4"}
    by_row = transformed(nn.Linear(6, 5), [Quantize(weight_bits=8, per="channel")])
    assert tuple(by_row.get_parameter("on_weight.quantize.step_8_channel").shape) == (5, 1)


@pytest.mark.parametrize(
    ("method", "bits"), [("minmax", 1), ("minmax", 2), ("minmax", 4), ("nested", 2), ("nested", 4)]
)
def test_computed_scales_pass_the_gradient_straight_through(method: str, bits: int) -> None:
    w = normal(4, 5).requires_grad_()
    part, x = quantizer(method, w, bits), normal(3, 5, seed=1)
    (x @ part(w).T).square().sum().backward()
    by_hand = w.detach().clone().requires_grad_()
    quantised = by_hand + (part(w) - w).detach()
    (x @ quantised.T).square().sum().backward()
    torch.testing.assert_close(w.grad, by_hand.grad)


def test_nested_codes_are_the_leading_bits_and_stand_for_the_middle_of_their_cell() -> None:
    w = normal(4, 9)
    for per in ("tensor", "channel", "group"):
        full, _ = NestedBits(8, 8, per, 4).codes(w)
        for bits in range(2, 9):
            part = NestedBits(bits, 8, per, 4)
            codes, scale = part.codes(w)
            assert torch.equal(codes, full >> (8 - bits))
            assert bool(((part(w) - w).abs() <= part.spread(scale, w) / 2 * 1.0001).all())


def test_more_bits_are_nearer() -> None:
    w = normal(20, 30)
    for method in ("minmax", "nested"):
        errors = [float((quantizer(method, w, bits)(w) - w).square().sum()) for bits in (2, 3, 4, 5, 6, 7, 8)]
        assert errors == sorted(errors, reverse=True)


# ---- activations ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 16), st.booleans(), st.integers(0, 1000))
def test_activations_use_the_range_of_the_present_tensor(bits: int, positive: bool, seed: int) -> None:
    x = normal(7, 5, seed=seed)
    x = x.abs() if positive else x
    part = ActivationQuantizer(bits)
    codes, scale = part.codes(x)
    low, high = (0, 2**bits - 1) if positive else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(codes * scale, part(x))
    assert low <= int(codes.min()) and int(codes.max()) <= high
    assert float((part(x) - x).abs().max()) <= float(scale) * 0.5001 + 1e-6
    assert int(codes.max()) == high or int(codes.min()) == low


def test_activations_pass_gradients_and_learned_steps_get_theirs() -> None:
    x = normal(4, 6).requires_grad_()
    ActivationQuantizer(4)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 6))
    part = ActivationQuantizer(4, learned=True)
    step = part.get_parameter("step_4")
    x = normal(4, 6) * 3
    part(x).sum().backward()
    ratio = x / step.detach()
    slopes = torch.where(ratio <= -8, -8.0, torch.where(ratio >= 7, 7.0, ratio.round() - ratio))
    assert bool((ratio > 7).any())
    torch.testing.assert_close(step.grad, slopes.sum().reshape(1) / math.sqrt(6 * 7))


def test_frozen_ranges_are_those_met_and_travel_in_the_state() -> None:
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

    def make() -> nn.Module:
        return transformed(copy.deepcopy(plain), [Quantize(activation_bits=4)])

    nn.init.constant_(plain[0].bias, 2.0)  # else ReLU may leave nothing that a range could change
    model, batches = make(), [(normal(5, 4, seed=i),) for i in range(3)]
    freeze_ranges(model, batches)
    first: ActivationQuantizer = model.get_submodule("0.on_input.quantize")
    assert float(first.lowest) == min(float(x.min()) for (x,) in batches)
    assert float(first.highest) == max(float(x.max()) for (x,) in batches)
    assert float(first(torch.tensor([[1e6]]))) == pytest.approx(float(first.codes(torch.tensor([1e6]))[1]) * 7)
    other = make()
    other.load_state_dict(model.state_dict())
    x = normal(1, 4, seed=9)
    assert torch.equal(other(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    assert not torch.equal(make()(x), model(x))


def test_learned_steps_of_activations_start_from_inputs() -> None:
    model = transformed(
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), [Quantize(activation_bits=4, activations="lsq")]
    )
    x = normal(5, 4)
    start_steps(model, [(x,)])
    assert model[0].on_input["quantize"].step_4.item() == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(7))
    assert set(model.state_dict()) == {
        f"{i}.{n}" for i in (0, 2) for n in ("weight", "bias", "on_input.quantize.step_4")
    }


# ---- aggregation ----------------------------------------------------------------------------------------------------


def test_aggregation_is_quantised_after_it() -> None:
    conv, x = SAGEConv(6, 4), normal(4, 6)
    weights = copy.deepcopy(conv.state_dict())
    rewritten = transformed(conv, [Quantize(aggregation_bits=4)])
    mean = torch.stack([x[EDGES[0][EDGES[1] == node]].mean(0) for node in range(4)])
    mean = ActivationQuantizer(4)(mean)
    expected = mean @ weights["lin_l.weight"].T + weights["lin_l.bias"] + x @ weights["lin_r.weight"].T
    torch.testing.assert_close(rewritten(x, EDGES), expected)
    assert list(rewritten.state_dict()) == list(weights)
    with torch.sparse.check_sparse_tensor_invariants():
        adjacency = torch.sparse_coo_tensor(EDGES.flip(0), torch.ones(5), (4, 4)).coalesce()
    torch.testing.assert_close(rewritten(x, adjacency), expected)  # PyG would fuse the product with a sparse matrix


@pytest.mark.parametrize("conv", [GATConv, TAGConv])
def test_a_quantised_convolution_can_be_copied_stored_and_exported(conv: Any) -> None:
    settings = Quantize(weight_bits=4, activation_bits=8, aggregation_bits=6, activations="lsq")
    model, x = transformed(conv(6, 4), [settings]).eval(), normal(4, 6)
    assert isinstance(model, conv) and "on_aggregate.step_6" in model.state_dict()
    out = model(x, EDGES)
    other = transformed(conv(6, 4), [settings]).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(copy.deepcopy(model)(x, EDGES), out) and torch.equal(other(x, EDGES), out)
    torch.testing.assert_close(torch.export.export(model, (x, EDGES)).module()(x, EDGES), out)


def test_aggregation_bits_need_a_convolution() -> None:
    with pytest.raises(
        SpaceError, match="aggregation_bits needs a PyG convolution .* of TransformedLinear; there is: none"
    ):
        transformed(nn.Linear(3, 2), [Quantize(weight_bits=4, aggregation_bits=8)])
    with pytest.raises(SpaceError, match="at 'lin' of GCNConv; there is: the operation itself"):
        transformed(GCNConv(3, 2), [Quantize("lin", aggregation_bits=8)])
    with pytest.raises(SpaceError, match="quantised twice"):
        transformed(GCNConv(3, 2), [Quantize(aggregation_bits=8), Quantize(aggregation_bits=4)])


# ---- declaration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("weight_bits", 0, "give 1"),
        ("weight_bits", 9, "give 1"),
        ("weight_bits", 4.0, "give 1"),
        ("weight_bits", True, "give 1"),
        ("activation_bits", 3, "give 4 to 16"),
        ("aggregation_bits", 17, "give 4 to 16"),
        ("method", "lqs", "give 'lsq', 'minmax' or 'nested'"),
        ("per", "row", "give 'tensor', 'channel' or 'group'"),
        ("group_size", 1, "2 or more"),
        ("activations", "static", "give 'dynamic' or 'lsq'"),
        ("nested_bits", 1, "give 2 to 16"),
    ],
)
def test_settings_out_of_range_are_refused_at_declaration(setting: str, value: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=f"Quantize: {setting} is {value!r}: .*{message}"):
        Quantize(**{setting: value})
    with pytest.raises(SpaceError, match=message):
        Quantize(**{setting: Choice("c", {"a": getattr(Quantize, setting), "b": value})})


def test_nested_bits_are_two_or_more_and_at_most_the_largest() -> None:
    for bits in (1, 16, Choice("bits", [2, 16])):
        with pytest.raises(SpaceError, match="nested bits are 2 to 8"):
            Quantize(weight_bits=bits, method="nested")
    assert not Quantize(weight_bits=16, method="nested", nested_bits=16).neutral()


def test_a_layer_is_quantised_once_and_an_embedding_has_no_input_to_quantise() -> None:
    with pytest.raises(SpaceError, match="quantised twice"):
        transformed(nn.Linear(3, 2), [Quantize(weight_bits=4), Quantize(weight_bits=8)])
    both = transformed(nn.Linear(3, 2), [Quantize(weight_bits=4), Quantize(activation_bits=8)])
    assert len(both.on_weight) == len(both.on_input) == 1
    with pytest.raises(SpaceError, match="Quantize"):
        transformed(nn.Embedding(3, 2), [Quantize(activation_bits=8)])
    words = transformed(nn.Embedding(3, 2), [Quantize(weight_bits=4, activation_bits=8, per="channel")])
    assert torch.equal(words(torch.tensor([1])), words.effective_weight()[1:2])


def test_in_a_space_over_a_model_an_embedding_of_floats_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    words = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    x = torch.arange(5).view(1, 5)
    weights, activations = Choice("w", [4, 32]), Choice("a", [8, 32])
    for inner, model in (("0", words), ("0.0", nn.Sequential(nn.Sequential(words[0]), words[1]))):
        for rules in (
            [Quantize("*", weight_bits=weights, activation_bits=activations)],
            [Quantize("(0|1)", weight_bits=weights, activation_bits=activations)],
        ):
            space = SearchSpace.from_module(model, rules, inputs=x)
            supernet = Supernet(space)
            for architecture in space.enumerate():
                made, alone = space.model(architecture), supernet.extract(architecture).eval()
                assert torch.equal(alone(x), supernet.subnet(architecture).eval()(x))
                table = made.get_submodule(inner)
                assert (type(table) is nn.Embedding) == (architecture["w"] == 32)
                linear: Any = made.get_submodule("1")
                assert ("quantize" in getattr(linear, "on_input", {})) == (architecture["a"] == 8)
    with pytest.raises(SpaceError, match="cannot rewrite Embedding|no layer that it can rewrite"):
        SearchSpace.from_module(words, [Quantize("0", activation_bits=activations)])


def test_what_a_mask_took_out_stays_out() -> None:
    for bits in BITS:
        layer = transformed(nn.Linear(8, 6), [Quantize(weight_bits=bits), Prune(keep=0.5)])
        weight, left = layer.effective_weight().detach(), layer.on_weight["prune"](layer.weight) != 0
        assert list(layer.on_weight) == ["prune", "quantize"]
        assert not bool(weight[~left].any())
        if bits == 1:
            torch.testing.assert_close(weight[left], layer.weight[left].sign() * layer.weight[left].abs().mean())
    with pytest.raises(SpaceError, match="nested codes have none for 0"):
        transformed(nn.Linear(8, 6), [Quantize(weight_bits=4, method="nested"), Prune(keep=0.5)])


# ---- in a space -----------------------------------------------------------------------------------------------------


def graph_space(transforms: bool = True) -> SearchSpace:
    space = SearchSpace("graphs")
    x = space.input("x", normal(4, 6), {0: "nodes"})
    edges = space.input("edge_index", EDGES, {1: "edges"})
    width = Choice("width", [3, 8], ordered=True)
    convs = {"gcn": Op(GCNConv, out_channels=width), "gat": Op(GATConv, out_channels=width, heads=2)}
    conv = Choice("conv", convs | {"sage": Op(SAGEConv, out_channels=width)})
    quantize = Quantize(
        weight_bits=Choice("w", [1, 2, 4, 8, 32]),
        activation_bits=Choice("a", [4, 8, None]),
        aggregation_bits=Choice("g", [4, None]),
        per=Choice("per", ["tensor", "channel", "group"]),
        method=Choice("method", ["lsq", "minmax"]),
        activations=Choice("activations", ["dynamic", "lsq"]),
        group_size=4,
    )
    h = space.add("conv1", conv, x, edges, transforms=[quantize] if transforms else [])
    more = [Quantize(weight_bits=Choice("head", [2, 5, 8, None]), method="nested", per="channel")] if transforms else []
    space.output(space.add("head", Op(nn.Linear, out_features=3), h, transforms=more))
    return space


def image_space() -> SearchSpace:
    space = SearchSpace("images")
    x = space.input("x", normal(2, 4, 6, 6), {0: "images"})
    width, kernel = Choice("width", [4, 8], ordered=True), Choice("kernel", [1, 3], ordered=True)
    quantize = Quantize(
        weight_bits=Choice("w", [1, 2, 3, 16, 32]), per=Choice("per", ["tensor", "channel", "group"]), group_size=4
    )
    op = Op(nn.Conv2d, out_channels=width, kernel_size=kernel, groups=Choice("groups", [1, 2]), padding=1)
    conv = space.add("conv1", op, x, transforms=[quantize])
    flat = space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=1), conv)
    space.output(space.add("conv2", Op(nn.Conv2d, out_channels=3, kernel_size=1), flat, transforms=[quantize]))
    return space


@pytest.mark.parametrize("make", [graph_space, image_space])
def test_a_subnet_equals_its_extraction_bit_for_bit(make: Any) -> None:
    space, rng = make(), random.Random(0)
    supernet = Supernet(space)
    assert any("step_2" in name for _, _, name in supernet.store)
    with torch.no_grad():
        for key, parameter in supernet.store.items():  # as if every step and weight had been trained
            parameter.add_(0.1 * normal(*parameter.shape, seed=sum(map(ord, "".join(key)))))
    inputs = tuple(each.example for each in space.inputs.values())
    for _ in range(30):
        architecture = space.sample(rng)
        subnet, alone = supernet.subnet(architecture), supernet.extract(architecture)
        assert torch.equal(subnet(*inputs), alone(*inputs)), architecture


def test_a_step_for_each_channel_stays_with_its_channel_in_smaller_networks() -> None:
    supernet = Supernet(graph_space())
    fixed = {
        "conv": "gat",
        "w": 4,
        "per": "channel",
        "method": "lsq",
        "a": None,
        "g": None,
        "activations": "dynamic",
        "head": None,
    }
    step = supernet.store["conv1", "gat", "lin.on_weight.quantize.step_4_channel"]
    weight = supernet.store["conv1", "gat", "lin.weight"]
    with torch.no_grad():
        step.copy_(weight[..., :1])  # each step is a number that its row has
    layer = supernet.extract({**fixed, "width": 3}).conv1.lin
    assert torch.equal(layer.on_weight["quantize"].step_4_channel, layer.weight[:, :1])


def test_neutral_bits_are_the_plain_network_bit_for_bit() -> None:
    space, bare = graph_space(), graph_space(transforms=False)
    inputs = (normal(4, 6), EDGES)
    for none in (None, 32):
        settings = {"w": 32, "a": None, "g": None, "per": "tensor", "method": "lsq", "activations": "lsq", "head": None}
        chosen = Architecture({"width": 8, "conv": "gat", **settings})
        without = Architecture({"width": 8, "conv": "gat"})
        assert space.key(chosen) == bare.key(without)
        assert torch.equal(build(space, chosen)(*inputs), build(bare, without)(*inputs))
        assert Quantize(weight_bits=none, activation_bits=none, aggregation_bits=none).neutral()


def test_training_lowers_the_loss_at_two_bits() -> None:
    x, y = normal(64, 8), normal(64, 8).sum(1, keepdim=True)
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    for index, layer in enumerate(p for p in layers.modules() if isinstance(p, nn.Linear)):
        nn.init.normal_(layer.weight, std=0.5, generator=torch.Generator().manual_seed(index))
        nn.init.zeros_(layer.bias)
    model = transformed(layers, [Quantize(weight_bits=2, activation_bits=4)])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(100):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
