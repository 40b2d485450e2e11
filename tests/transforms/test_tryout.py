"""What a layer refuses is said when a space is declared, or when a search begins: never in the middle of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.nn import GCNConv

from nasgraph.cli import main
from nasgraph.errors import SpaceError
from nasgraph.ops import add
from nasgraph.space import Call, Choice, Op, SearchSpace, Switch
from nasgraph.supernet import Supernet
from nasgraph.transforms import Lora, LowRank, Prune, Quantize, Transform
from nasgraph.transforms import low_rank as factors
from nasgraph.tryout import check_space
from tests.transforms.toys import Scale


@dataclass(frozen=True)
class MyQuantize(Quantize):
    """Of another type, so only the layer sees that it is the second."""


def model() -> nn.Module:
    net = nn.Module()
    net.conv, net.grouped = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
    net.first, net.second = nn.Linear(12, 10), nn.Linear(10, 9)
    net.table, net.bounded = nn.Embedding(10, 8), nn.Embedding(10, 8, max_norm=1.0)
    net.graph = GCNConv(4, 4)
    return net


def either(name: str, *options: Any) -> Choice:
    return Choice(f"{name}.{{name}}", list(options))


BAD = {
    "LoRA on a convolution in groups": (
        [Lora("(conv|grouped)", rank=either("rank", 0, 4))],
        r"Lora: 'grouped' names a convolution with groups=2.*so let the pattern not fit it.*\(with rank.grouped = 4\)",
    ),
    "a rank that no matrix of this size has": (
        [Lora("(first|second)", rank=either("rank", 0, 9, 10))],
        "Lora: rank 10 beside 'second', whose matrix is 9 x 10: give at most 9, or leave the layer out",
    ),
    "a rank above a convolution's and an embedding's": (
        [Lora("(conv|table)", rank=9)],
        "Lora: rank 9 beside 'conv', whose matrix is 8 x 36: give at most 8",
    ),
    "blocks that do not divide": (
        [Lora("first", rank=2, kind=either("kind", "plain", "melora"), blocks=either("blocks", 2, 4))],
        r"'first' names a layer that cannot have a melora adapter: 4 blocks do not divide its 12 inputs and 10 outputs "
        r"\(with kind.first = melora, blocks.first = 4\)",
    ),
    "n:m on an odd input": (
        [Prune("*", structure="2:4", keep=either("keep", None, 1.0))],
        r"'second': Prune: 2:4 needs inputs in groups of 4, and a weight of \(9, 10\) has 10; leave the layer out",
    ),
    "a bounded embedding": (
        [Quantize("*", weight_bits=either("bits", 4, 32))],
        r"'bounded': an embedding with max_norm writes into its weight.*\(with bits.bounded = 4\)",
    ),
    "nested bits of a pruned weight": (
        [
            Quantize("first", weight_bits=4, method=either("method", "lsq", "nested")),
            Prune("*", keep=either("keep", 0.5, 1.0)),
        ],
        r"nested codes have none for 0.*\(with method.first = nested, keep.first = 0.5\)",
    ),
    "two quantisers": (
        [Quantize("(first|second)", weight_bits=either("bits", 4, 8)), MyQuantize("second", weight_bits=4)],
        r"'second': Quantize: .*is quantised twice",
    ),
    "a rank that 2:4 does not divide": (
        [LowRank("first", rank=either("rank", 8, 6)), Prune("first", structure="2:4")],
        r"'first': Prune: 2:4 needs inputs in groups of 4, and a weight of \(10, 6\).*\(with rank.first = 6\)",
    ),
    "activation-aware factors without statistics": (
        [LowRank("first", rank=4, method=either("method", "svd", "activation"))],
        "weighs the inputs of 'first', and nobody has seen them",
    ),
    "options that contradict each other": (
        [Prune("first", keep=either("keep", 0.5, 0.25), structure=either("structure", "rows", "2:4"))],
        r"2:4 keeps 0.5.*\(with keep.*= 0.25, structure.* = 2:4\); offer only options that go together",
    ),
    "a container and a layer in it": (
        [Scale("graph", power=2), Quantize("graph.lin", weight_bits=4), MyQuantize("graph", weight_bits=4)],
        "is quantised twice",
    ),
    "aggregation without a convolution": (
        [Quantize("first", aggregation_bits=either("bits", 4, 32))],
        r"aggregation_bits needs a PyG convolution.* at 'first'.*there is: graph \(with bits.first = 4\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_layer_refuses_from_module_refuses(case: str) -> None:
    rules, says = BAD[case]
    with pytest.raises(SpaceError, match=says) as caught:
        SearchSpace.from_module(model(), rules)
    assert "\n" not in str(caught.value)


def test_ranks_up_to_the_smaller_side_and_of_other_kinds_above_it() -> None:
    for rule in (Lora("(first|second)", rank=9), Lora("(conv|table)", rank=8), Lora("second", rank=10, kind="mora")):
        SearchSpace.from_module(model(), [rule])


def test_the_models_numbers_stay_and_none_are_drawn() -> None:
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    SearchSpace.from_module(net, [Lora("first", rank=4), Prune("second", keep=0.5, scores="learned")])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_smaller_layers_meet_the_others_before_a_search() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    rules = [
        Prune("0", structure="channels", keep=either("keep", 0.5, 0.3, 1.0)),
        Prune("2", structure="2:4"),
    ]
    with pytest.raises(SpaceError, match=r"'2': Prune: 2:4 needs inputs in groups of 4, and a weight of \(4, 5\)"):
        SearchSpace.from_module(net, rules)
    fine = [Prune("0", structure="channels", keep=either("keep", 0.5, 0.25, 1.0)), rules[1]]
    assert SearchSpace.from_module(net, fine).size() == 3


def test_adapters_that_do_not_nest_are_refused_on_layers_that_become_smaller() -> None:
    net, x = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8), nn.Linear(8, 8)), torch.randn(4, 16)
    keep, rank = Choice("k", [0.5, 1.0]), Choice("r", [0, 2])
    prune = Prune("0", structure="channels", keep=keep)
    for factors_ in ([], [LowRank("2", rank=Choice("f", [None, 4]))]):
        for where in ("0", "2", "*"):
            with pytest.raises(SpaceError, match=r"Lora: another rule makes '[02](.second|.first)?' smaller.*mora"):
                SearchSpace.from_module(net, [prune, Lora(where, rank=rank, kind="mora"), *factors_], inputs=x)
    for lora in (Lora("3", rank=rank, kind="mora"), *(Lora("*", rank=rank, kind=k) for k in ("plain", "vera"))):
        space = SearchSpace.from_module(net, [prune, lora], inputs=x)
        supernet = Supernet(space)
        for architecture in space.enumerate():
            alone = supernet.extract(architecture).eval()
            assert torch.equal(alone(x), supernet.subnet(architecture).eval()(x))


def test_layers_of_one_form_are_tried_once_and_no_singular_value_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(Scale, "rewrite", lambda self, layer: calls.append(layer) or layer)
    monkeypatch.setattr(factors, "decomposed", lambda *_: pytest.fail("a decomposition"))
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)), nn.Linear(6, 3))
    rules: list[Transform] = [Scale("*", power=either("power", 0, 1, 2)), LowRank("*", rank=either("rank", 2, 3))]
    SearchSpace.from_module(net, rules)
    # each form of the two, its two powers: alone, and on both factors of its two ranks
    assert len(calls) == 2 * (2 + 2 * 2 * 2)


def test_more_settings_than_can_be_tried_still_have_each_option_tried() -> None:
    many = {name: Choice(name, [1, 2, 4, 8, 16]) for name in ("rank", "alpha", "r_max", "blocks")}
    kind, scale = Choice("kind", ["plain", "melora"]), Choice("scale", ["alpha/r", "alpha/sqrt(r)"])
    with pytest.raises(SpaceError, match="16 blocks do not divide"):
        SearchSpace.from_module(nn.Sequential(nn.Linear(24, 24)), [Lora("0", kind=kind, scale=scale, **many)])


def test_a_model_of_many_layers_is_tried_in_a_moment() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(40)))
    rules = [
        Lora("*", rank=either("rank", 0, 2, 4, 8)),
        Quantize("*", weight_bits=either("bits", 2, 4, 8, 32), activation_bits=either("a", 4, 8, 32)),
        Prune("*", keep=either("keep", 0.25, 0.5, 1.0)),
    ]
    start = time.perf_counter()
    SearchSpace.from_module(net, rules)
    assert time.perf_counter() - start < 5  # 0.3 s; without forms it is 20


# ---- declared spaces ----------------------------------------------------------------------------------------------


def declared(op: Any, *transforms: Transform, features: int = 8) -> SearchSpace:
    space = SearchSpace("one")
    x = space.input("x", torch.randn(4, features), {0: "nodes"})
    edges = space.input("edges", torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), {1: "edges"})
    h = space.add("layer", op, x, edges, transforms=list(transforms))
    space.output(space.add("head", Op(nn.Linear, out_features=2), h))
    return space


@pytest.mark.parametrize(
    ("op", "transform", "says"),
    [
        (Op(nn.ReLU), Quantize(weight_bits=4), "'layer': Quantize cannot rewrite ReLU.*Conv1d, Conv2d.*Linear"),
        (Op(nn.MaxPool2d, kernel_size=2), Lora(rank=Choice("r", [0, 4])), "Lora cannot rewrite MaxPool2d.*Linear"),
        (
            Choice("op", {"conv": Op(GCNConv, out_channels=8), "skip": Op(nn.Identity)}),
            Quantize(weight_bits=Choice("bits", [4, 32])),
            "Quantize cannot rewrite Identity",
        ),
        (Op(nn.Linear, out_features=4), Quantize(aggregation_bits=8), "aggregation_bits needs a PyG convolution"),
        (Op(GCNConv, out_channels=4), Lora("lim", rank=2), "no layer that it can rewrite is called 'lim'.*are: lin"),
        (Op(nn.Conv2d, out_channels=4, kernel_size=3), Lora(rank=2, kind="vera"), "cannot rewrite Conv2d.*: Linear"),
    ],
)
def test_an_operation_without_such_layers_is_refused_when_it_is_added(op: Any, transform: Transform, says: str) -> None:
    with pytest.raises(SpaceError, match=says):
        declared(op, transform)


@pytest.mark.parametrize(
    ("op", "transform"),
    [
        (Op(GCNConv, out_channels=4), Quantize(weight_bits=4, aggregation_bits=8)),
        (Op(nn.ReLU), Quantize(weight_bits=32)),  # changes nothing
        (Op(nn.ReLU), Lora(rank=Choice("rank", [0]))),
        (Op(nn.Linear, out_features=Choice("width", [8, 12])), Prune(structure="2:4")),
    ],
)
def test_what_goes_is_declared_and_checked(op: Any, transform: Transform) -> None:
    check_space(declared(op, transform))


def test_sizes_that_a_transform_refuses_are_found_before_a_search() -> None:
    width = Choice("width", [8, 6])
    space = declared(Op(nn.Linear, out_features=width), Quantize(weight_bits=4))
    h = space.add("next", Op(nn.Linear, out_features=2), space._nodes[2], transforms=[Prune(structure="2:4")])
    space.output(h)
    with pytest.raises(SpaceError, match=r"node 'next'.*2:4 needs inputs in groups of 4, and a weight of \(2, 6\)"):
        check_space(space)
    space.constrain("whole groups", lambda architecture: architecture["width"] == 8)
    check_space(space)


def test_options_that_contradict_each_other_are_found_before_a_search() -> None:
    keep, structure = Choice("keep", [0.5, 0.25]), Choice("structure", ["rows", "2:4"])
    with pytest.raises(SpaceError, match="2:4 keeps 0.5"):
        check_space(declared(Op(nn.Linear, out_features=8), Prune(keep=keep, structure=structure)))
    together = Switch(structure, {"rows": keep, "2:4": None})
    check_space(declared(Op(nn.Linear, out_features=8), Prune(keep=together, structure=structure)))


def test_networks_that_fail_for_other_reasons_are_left_to_the_search() -> None:
    space = SearchSpace("sums")
    x = space.input("x", torch.randn(2, 8))
    first = space.add("first", Op(nn.Linear, out_features=Choice("a", [4, 8])), x, transforms=[Quantize(weight_bits=4)])
    second = space.add("second", Op(nn.Linear, out_features=Choice("b", [4, 8])), x)
    space.output(space.add("sum", Call(add), first, second))
    check_space(space)


def test_a_search_of_such_a_space_ends_before_any_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "grey.yaml"
    config.write_text("space: {name: prune_cnn, structure: '2:4', keeps: [0.5, 1.0]}\ntask: digits_images\n")
    assert main(["search", str(config), "--out", str(tmp_path / "run")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "node 'conv1': Prune: 2:4 needs inputs in groups of 4, and a weight of" in told
    assert not (tmp_path / "run").exists()
