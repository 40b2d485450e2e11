from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.model_space import ModelSpace
from nasgraph.space import Choice, SearchSpace
from nasgraph.supernet import Supernet
from tests.transforms.toys import Adapt, Scale


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.sigmoid(self.query(x)) * self.value(x))


class Net(nn.Module):
    """Two blocks and a classifier.

    ``full``: returns an object with two tensors. ``branch``: on ``"shape"``, which torch.fx cannot follow, or on
    ``"data"``, which torch.export cannot either.
    """

    def __init__(self, full: bool = False, branch: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.classifier = nn.Linear(8, 3)
        self.full, self.branch = full, branch

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        for block in self.blocks:
            if (self.branch == "data" and x.sum() > 1e9) or (self.branch == "shape" and x.shape[-1] > 8):
                x = x * 0
            x = block(x)
        logits = self.classifier(x)
        return SimpleNamespace(logits=logits, hidden=x) if self.full else logits


def a_model(**arguments: Any) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(**arguments).eval()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
RULES = [
    Adapt("*.(query|value)", rank=Choice("rank.{name}", [0, 1, 3])),
    Scale("*.query", power=Choice("power", [0, 2])),
]


def test_every_module_gets_its_choices_and_the_template_names_them() -> None:
    space = SearchSpace.from_module(a_model(), RULES)
    ranks = {f"rank.blocks.{i}.{name}" for i in (0, 1) for name in ("query", "value")}
    assert isinstance(space, ModelSpace)
    assert set(space.choices) == ranks | {"power"}
    assert space.size() == 3**4 * 2
    assert space.names == ("blocks.0.query", "blocks.0.value", "blocks.1.query", "blocks.1.value")


def test_the_neutral_architecture_is_the_model_bit_for_bit_and_the_model_is_never_changed() -> None:
    model = a_model()
    before = copy.deepcopy(model.state_dict())
    space = SearchSpace.from_module(model, RULES, inputs=X)
    baseline = space.baseline()
    assert set(baseline.values()) == {0}
    assert torch.equal(space.model(baseline)(X), model(X)) and torch.equal(build(space, baseline)(X), model(X))
    rng = random.Random(0)
    for _ in range(5):
        made = space.model(space.sample(rng))
        assert type(made) is Net
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
    assert list(model.state_dict()) == list(before) and type(model.blocks[0].query) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_rewritten_model_is_the_formula() -> None:
    model = a_model()
    space = SearchSpace.from_module(model, RULES, inputs=X)
    chosen = {**space.baseline(), "rank.blocks.1.query": 3, "power": 2}
    made = space.model(chosen)
    assert isinstance(made, Net)
    layer: Any = made.blocks[1].query
    expected = X @ (2 * layer.weight).T + layer.bias + X @ layer.beside["adapt"].a.T @ layer.beside["adapt"].b.T
    torch.testing.assert_close(layer(X), expected)
    assert type(made.blocks[1].value) is nn.Linear  # rank 0
    assert torch.equal(build(space, chosen)(X), made(X))


def test_frozen_numbers_are_shared_with_the_model_and_only_what_is_added_trains() -> None:
    model = a_model()
    space = SearchSpace.from_module(model, RULES, inputs=X, train=["classifier"])
    made = space.model({**space.baseline(), "rank.blocks.0.value": 1})
    of = dict(model.named_parameters())
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    adapter = {f"blocks.0.value.beside.adapt.{x}" for x in "ab"}
    assert trained == {"classifier.weight", "classifier.bias"} | adapter
    for name, parameter in made.named_parameters():
        if name in of:
            assert (parameter.data_ptr() == of[name].data_ptr()) == (name not in trained)
    assert SearchSpace.from_module(model, [RULES[1]]).model({"power": 2}).get_parameter("classifier.bias").requires_grad


def test_a_supernet_shares_the_frozen_base_and_its_subnets_equal_their_extraction() -> None:
    model = a_model()
    space = SearchSpace.from_module(model, RULES, inputs=X)
    supernet = Supernet(space)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    added = [parameter for parameter in supernet.parameters() if parameter.data_ptr() not in own]
    assert sum(p.numel() for p in added) == 4 * (3 * 8 + 8 * 3) + 2 * 1  # adapters at rank 3, one gain for each query
    assert all(parameter.requires_grad == (parameter.data_ptr() not in own) for parameter in supernet.parameters())
    rng = random.Random(0)
    for n in (1, 2, 5):
        for _ in range(4):
            chosen = space.sample(rng)
            subnet, alone = supernet.subnet(chosen), supernet.extract(chosen)
            assert torch.equal(subnet(X[:n]), alone(X[:n]))
    assert torch.equal(supernet.extract(space.baseline())(X), model(X))


def test_a_supernet_of_a_model_that_trains_has_numbers_of_its_own() -> None:
    model = a_model()
    supernet = Supernet(SearchSpace.from_module(model, [RULES[1]], inputs=X))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(p.requires_grad and p.data_ptr() not in own for p in supernet.parameters())
    assert torch.equal(supernet.extract({"power": 0})(X), model(X))


def test_an_output_among_several_is_named() -> None:
    model = a_model(full=True)
    with pytest.raises(SpaceError, match=r"returns a SimpleNamespace.*output='logits'"):
        SearchSpace.from_module(model, RULES, inputs=X)
    space = SearchSpace.from_module(model, RULES, inputs={"x": X}, output="logits")
    assert torch.equal(build(space, space.baseline())(X), model(X).logits)
    assert torch.equal(space.model(space.baseline())(X).hidden, model(X).hidden)  # with its own forward
    chosen = space.sample(random.Random(0))
    supernet = Supernet(space)
    assert torch.equal(supernet.subnet(chosen)(X), supernet.extract(chosen)(X))


@pytest.mark.parametrize(("branch", "how"), [("", "fx"), ("shape", "export"), ("data", "order")])
def test_edges_are_data_flow_where_the_model_can_be_traced(branch: str, how: str) -> None:
    space = SearchSpace.from_module(a_model(branch=branch), RULES, inputs=X)
    graph = space.graph()
    assert graph.graph["edges"] == how
    if how == "order":
        assert set(graph.edges()) == set(zip(space.names, space.names[1:], strict=False))
    else:
        first, second = (("blocks.0.query", "blocks.0.value"), ("blocks.1.query", "blocks.1.value"))
        assert set(graph.edges()) == {(a, b) for a in first for b in second}
    assert graph.nodes["blocks.0.query"]["choices"] == ["power", "rank.blocks.0.query"]


@pytest.mark.parametrize(
    ("rules", "options", "says"),
    [
        ([], {}, "list of at least one transform"),
        (RULES[0], {}, "list of at least one transform"),
        ([Scale], {}, "a rule is a transform"),
        ([Scale(Choice("power", [0, 1]))], {}, "what comes first is a pattern"),
        ([Adapt("*.qery", rank=1)], {}, r"fits no module of Net. Did you mean"),
        ([Adapt("*.norm", rank=1)], {}, r"fits 'blocks.0.norm', and Adapt cannot rewrite LayerNorm.*blocks.0.query"),
        ([Adapt("blocks.0.(query|norm)", rank=1)], {}, r"fits 'blocks.0.norm'"),
        ([Adapt("*.query", rank=1), Adapt("blocks", rank=1)], {}, "two rules of Adapt fit"),
        ([RULES[1]], {"train": ["classifier"]}, "no rule freezes"),
        ([RULES[0]], {"train": "head"}, "train is 'head': give a list"),
        ([RULES[0]], {"train": [1]}, r"train is \[1\]: give a list"),
        ([RULES[0]], {"inputs": torch.randn(2, 7)}, "cannot read the inputs"),
        ([RULES[0]], {"inputs": {"mask": X}}, "not the first arguments of Net.forward"),
        ([RULES[0]], {"inputs": X, "dynamic": {"xs": {0: "batch"}}}, r"names 'xs', which is no input.* mean 'x'\?"),
        ([RULES[0]], {"inputs": X, "dynamic": {"inputs": {0: "batch"}}}, r"no input of the model. There are: x"),
        ([RULES[0]], {"dynamic": {"xs": {0: "batch"}}}, "which is no input of the model"),
        ([RULES[0]], {"inputs": X, "dynamic": {"x": {5: "batch"}}}, f"axis 5 of 'x': there are 0 to {X.dim() - 1}"),
        ([RULES[0]], {"inputs": X, "dynamic": {"x": {-1: "batch"}}}, "axis -1 of 'x'"),
        ([RULES[0]], {"dynamic": {"x": {-1: "batch"}}}, "axis -1 of 'x': count from 0"),
        ([RULES[0]], {"inputs": X, "dynamic": {0: "batch"}}, r"such as {'x': {0: 'batch'}}"),
        ([RULES[0]], {"inputs": X, "dynamic": {"x": {0: 1}}}, r"such as {'x': {0: 'batch'}}"),
        ([RULES[0]], {"inputs": X, "dynamic": ["x"]}, r"such as {'x': {0: 'batch'}}"),
    ],
)
def test_bad_declarations_name_what_is_wrong(rules: list[Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpaceError, match=says):
        SearchSpace.from_module(a_model(), rules, **options)


def test_a_transform_without_a_neutral_option_has_no_baseline() -> None:
    space = SearchSpace.from_module(a_model(), [Scale("*.query", power=Choice("power", [1, 2]))])
    with pytest.raises(SpaceError, match="no neutral option"):
        space.baseline()


def test_any_name_means_each_layer_that_can_be_rewritten() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU())
    )
    assert SearchSpace.from_module(model, [Scale(power=Choice("{name}", [0, 1]))]).names == ("0", "3.0")
    blocks = SearchSpace.from_module(a_model(), [Scale("blocks.*", power=Choice("{name}", [0, 1]))])
    assert blocks.names == ("blocks.0.query", "blocks.0.value", "blocks.1.query", "blocks.1.value")
    assert SearchSpace.from_module(a_model(), [Scale("blocks", power=Choice("{name}", [0, 1]))]).names == ("blocks",)


def test_keys_tell_networks_apart_and_neutral_settings_do_not_count() -> None:
    space = SearchSpace.from_module(a_model(), [*RULES, Scale("*.value", power=0)], inputs=X)
    without = SearchSpace.from_module(a_model(), RULES, inputs=X)
    rng = random.Random(0)
    some = {space.sample(rng) for _ in range(40)}
    assert len({space.key(architecture) for architecture in some}) == len(some)
    assert space.key(space.baseline()) == without.key(without.baseline())


def test_narrowing_keeps_the_model() -> None:
    space = SearchSpace.from_module(a_model(), RULES, inputs=X)
    narrow = space.narrowed({"power": [2]})
    assert narrow.size() == space.size() // 2
    assert torch.equal(
        build(narrow, narrow.sample(random.Random(0)))(X), build(space, narrow.sample(random.Random(0)))(X)
    )


def test_without_examples_a_network_reads_what_forward_needs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
            return (self.first(a) + self.second(b)) * scale

    space = SearchSpace.from_module(Two(), [Adapt("first", rank=Choice("rank", [0, 1]))])
    assert list(space.inputs) == ["a", "b"]
    assert build(space, {"rank": 1})(torch.randn(5, 3), torch.randn(5, 4)).shape == (5, 2)


class Returns(nn.Module):
    """What ``made`` makes of two tensors; ``b`` is another name of ``a``."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.a, self.made = nn.Linear(8, 3), made
        self.b = self.a

    def forward(self, x: Tensor) -> Any:
        return self.made(self.a(x), self.b(x))


def lists(first: Tensor, second: Tensor) -> list[Any]:
    return [first, second, None]


@pytest.mark.parametrize(
    ("made", "output", "says"),
    [
        (lists, "logits", "Returns returns a list, which has no output 'logits': say which with output=0 or output=1$"),
        (lists, 7, "a list, which has no output 7: say which with output=0 or output=1$"),
        (lists, 2, "a list, whose 2 is a NoneType, not one tensor: say which with output=0 or output=1$"),
        (lists, None, "a list, not one tensor: say which with output=0 or output=1$"),
        (lambda a, b: {"scores": a, "all": [b]}, "logits", "a dict, which has .* with output='scores'$"),
        (lambda a, b: SimpleNamespace(hidden=a), None, "not one tensor: say which with output='hidden'$"),
        (lambda a, b: "text", "logits", "a str, which has no output 'logits': wrap the model in one"),
        (lambda a, b: "text", None, "a str, not one tensor: wrap the model in one"),
    ],
)
def test_an_output_that_is_not_there_names_those_that_are(made: Any, output: str | int | None, says: str) -> None:
    with pytest.raises(SpaceError, match=says):
        SearchSpace.from_module(Returns(made), [Adapt("a", rank=1)], inputs=X, output=output)


def test_a_second_name_of_a_module_leads_to_the_first() -> None:
    with pytest.raises(SpaceError, match="'b' is one module with 'a': call it by that name"):
        SearchSpace.from_module(Returns(lists), [Adapt("b", rank=1)])


def test_layers_that_a_pattern_fits_and_nothing_can_rewrite_are_named() -> None:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D  # noqa: N806 - GPT-2's layers
    with pytest.warns(UserWarning, match=r"^Adapt\('\*'\) leaves 2 layers of class Conv1D as they are, such as '1'"):
        space = SearchSpace.from_module(
            nn.Sequential(nn.Linear(8, 8), Conv1D(8, 8), Conv1D(3, 8)), [Adapt("*", rank=1)]
        )
    assert space.names == ("0",)
