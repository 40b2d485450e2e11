"""A subnet is its slice: the same bits, the same gradients. The oracle is the plain network of the architecture."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.export import export_model
from nasgraph.ops import add
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.search_spaces.nas_bench_graph import nas_bench_graph
from nasgraph.search_spaces.nasbench201 import nasbench201
from nasgraph.space import Architecture, Call, Choice, Node, Op, SearchSpace
from nasgraph.supernet import Supernet, recalibrate
from nasgraph.supernet.variants import variants
from nasgraph.tasks.batch import Batch

_spec = importlib.util.spec_from_file_location("supernet_spaces", Path(__file__).with_name("supernet_spaces.py"))
assert _spec is not None and _spec.loader is not None
_spaces = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_spaces)
small_cnn = _spaces.small_cnn


@pytest.fixture(scope="module")
def gnn() -> Supernet:
    return Supernet(gnn_node(9, 3, widths=(8, 16, 32)))


@pytest.fixture(scope="module")
def cnn() -> Supernet:
    return Supernet(small_cnn())


def samples(space: SearchSpace, n: int, seed: int = 0) -> list[Architecture]:
    rng = random.Random(seed)
    return [space.sample(rng) for _ in range(n)]


def graph(nodes: int, features: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(nodes)
    edges = torch.randint(nodes, (2, 3 * nodes), generator=generator)
    return torch.randn(nodes, features, generator=generator), edges


def images(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)),)


def run(model: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
    torch.manual_seed(7)  # dropout
    out: Tensor = model.train(training)(*inputs)
    return out


@pytest.mark.parametrize("nodes", [1, 2, 17])
def test_a_subnet_of_a_gnn_is_its_slice(gnn: Supernet, nodes: int) -> None:
    for arch in samples(gnn.space, 40, seed=nodes):
        batch_norm_needs_two = nodes == 1 and gnn.has_batch_norm(arch)
        for training in (False,) if batch_norm_needs_two else (False, True):
            alone, shared = gnn.extract(arch), gnn.subnet(arch)
            assert torch.equal(run(alone, graph(nodes), training), run(shared, graph(nodes), training)), arch


@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_subnet_of_a_cnn_is_its_slice(cnn: Supernet, n: int) -> None:
    for arch in samples(cnn.space, 40, seed=n):
        for training in (False, True):
            alone, shared = cnn.extract(arch), cnn.subnet(arch)
            assert torch.equal(run(alone, images(n), training), run(shared, images(n), training)), arch


@pytest.mark.parametrize("kind", ["gnn", "cnn"])
def test_gradients_arrive_in_the_store_as_they_are_alone(kind: str, request: pytest.FixtureRequest) -> None:
    supernet: Supernet = request.getfixturevalue(kind)
    inputs = graph(17) if kind == "gnn" else images(5)
    for arch in samples(supernet.space, 20, seed=3):
        alone, shared = supernet.extract(arch), supernet.subnet(arch)
        for parameter in supernet.parameters():
            parameter.grad = None
        run(alone, inputs, True).square().sum().backward()
        run(shared, inputs, True).square().sum().backward()
        own = dict(alone.named_parameters())
        pieces = supernet._structure(arch).pieces
        for piece in pieces:
            stored = supernet.store[piece.key].grad
            expected = own[piece.name].grad
            if expected is None:
                assert stored is None or not stored.any()
                continue
            assert stored is not None
            assert torch.equal(stored if piece.cut is None else piece.cut(stored), expected)
            assert stored.count_nonzero() == expected.count_nonzero()  # nothing beside the slice
        touched = {key for key, parameter in supernet.store.items() if parameter.grad is not None}
        assert touched <= {piece.key for piece in pieces}


def test_training_changes_what_every_view_sees(cnn: Supernet) -> None:
    supernet = Supernet(small_cnn())
    arch = samples(supernet.space, 1)[0]
    view = supernet.subnet(arch)
    before = run(view, images(2), False)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.mul_(0.5)
    after = run(view, images(2), False)
    assert not torch.equal(before, after)
    assert torch.equal(after, run(supernet.extract(arch), images(2), False))


def test_what_is_extracted_is_its_own() -> None:
    supernet = Supernet(small_cnn())
    model = supernet.extract(samples(supernet.space, 1)[0])
    kept = {key: parameter.detach().clone() for key, parameter in supernet.store.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(parameter, kept[key]) for key, parameter in supernet.store.items())


def test_forward_writes_no_buffer(cnn: Supernet) -> None:
    arch = next(arch for arch in samples(cnn.space, 50) if cnn.has_batch_norm(arch))
    forms = [form for form in cnn._structure(arch).forms if form is not None]
    buffers = [buffer for form in forms for buffer in form.module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    for training in (False, True):
        run(cnn.subnet(arch), images(4), training)
        after = [buffer for form in forms for buffer in form.module.buffers()]
        assert all(one is other for one, other in zip(after, buffers, strict=True))
        assert before and all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


def test_what_is_extracted_can_be_exported(gnn: Supernet, tmp_path: Path) -> None:
    arch = gnn.space.architecture(
        {"depth": "1", "conv1": "gat", "width": 16, "heads": 2, "attention_dropout": 0.0, "norm": "batch"}
        | {"activation": "relu", "input_dropout": 0.0, "dropout": 0.0, "head": "gcn", "propagate": "none"}
    )
    model = gnn.extract(arch)
    assert set(model.meta["calls"]) == set(build(gnn.space, arch).meta["calls"])
    written = export_model(model, tmp_path, space=gnn.space, architecture=arch, formats=["safetensors"])
    assert [(item.format, item.status) for item in written] == [("safetensors", "ok")]


# ---- the store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_cnn, lambda: nasbench201(4, cells=1), lambda: gnn_node(9, 3, 2, (8, 16))])
def test_the_store_is_as_large_as_the_largest_architecture_needs(make: Any) -> None:
    """The oracle: what random architectures have. Sampling meets all sizes of the first two spaces."""
    space = make()
    supernet = Supernet(space)
    largest: dict[Any, tuple[int, ...]] = {}
    for arch in samples(space, 250):
        parameters = dict(build(space, arch).named_parameters())
        for piece in supernet._structure(arch).pieces:
            shape = tuple(parameters[piece.name].shape) if piece.cut is None else piece.cut.axes
            largest[piece.key] = tuple(map(max, largest.get(piece.key, shape), shape))
    stored = {key: tuple(parameter.shape) for key, parameter in supernet.store.items()}
    assert all(a >= b for key, shape in largest.items() for a, b in zip(stored[key], shape, strict=True))
    assert stored == largest or space.name == "gnn_node"


def test_forms_know_the_decisions_that_sizes_share() -> None:
    """Both layers share a width, so no form reads 8 channels and gives 16."""
    space = SearchSpace("shared")
    x = space.input("x", torch.zeros(4, 5), {0: "nodes"})
    width = Choice("width", [8, 16], ordered=True)
    first = space.add("first", Op(nn.Linear, out_features=width), x)
    second = space.add("second", Op(nn.Linear, out_features=width), first)
    space.output(space.add("sum", Call(add), first, second))
    shapes = [form.shapes["weight"] for form in variants(space)["second", "Linear"]]
    assert shapes == [(8, 8), (16, 16)]


def test_forms_of_switches() -> None:
    """The head reads 1 to 4 leaves, or the input where all operations skip (a constraint excludes that)."""
    found = variants(nas_bench_graph("cora"))
    assert {key: len(forms) for key, forms in found.items() if len(forms) > 2} == {("post", "Linear"): 5}


@pytest.mark.parametrize("make", [lambda: gnn_node(9, 3, widths=(8, 16)), small_cnn])
def test_the_start_depends_on_seed_node_and_option_only(make: Any) -> None:
    one, other, different = Supernet(make(), seed=3), Supernet(make(), seed=3), Supernet(make(), seed=4)
    for arch in samples(other.space, 5):
        other.subnet(arch)
    torch.manual_seed(0)
    assert list(one.store) == list(other.store)
    assert all(torch.equal(one.store[key], other.store[key]) for key in one.store)
    assert any(not torch.equal(one.store[key], different.store[key]) for key in one.store)


def test_the_start_is_the_same_in_every_process() -> None:
    """Which hash texts differently."""
    code = """
import hashlib
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.supernet import Supernet
digest = hashlib.sha256()
for key, parameter in Supernet(gnn_node(9, 3, widths=(8, 16, 32))).store.items():
    digest.update(repr(key).encode() + parameter.detach().numpy().tobytes())
print(digest.hexdigest())
"""
    found = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", code]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1


def test_making_a_supernet_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    supernet = Supernet(small_cnn())
    supernet.extract(samples(supernet.space, 1)[0])
    assert torch.equal(torch.rand(3), expected)


def test_a_kernel_is_the_middle_of_the_larger_one(cnn: Supernet) -> None:
    choices = {"depth": "1", "norm1": "group", "width1": 4, "kernel1": 3}
    piece = cnn.extract(cnn.space.architecture(choices)).get_submodule("conv1").weight
    stored = cnn.store["conv1", "Conv2d", "weight"]
    assert tuple(stored.shape) == (8, 3, 5, 5)
    assert torch.equal(piece, stored[:4, :, 1:4, 1:4])


class Heads(nn.Module):
    """A projection to query and key: ``2 * heads * 3`` rows, so the halves of a smaller one are not adjacent."""

    def __init__(self, in_features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(in_features, 2 * heads * 3)

    def slice_rule(self, name: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
        halves = stored.unflatten(0, (2, -1))[:, : self.heads * 3].flatten(0, 1)
        return halves[:, : shape[1]] if len(shape) == 2 else halves

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.project(x).chunk(2, dim=-1)
        return query * key  # type: ignore[no-any-return]


class Wrong(Heads):
    def slice_rule(self, name: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
        return stored


def with_heads(kind: type[Heads]) -> SearchSpace:
    space = SearchSpace("heads")
    x = space.input("x", torch.zeros(4, 5), {0: "nodes"})
    h = space.add("attend", Op(kind, heads=Choice("heads", [1, 2, 4], ordered=True)), x)
    space.output(space.add("head", Op(nn.Linear, out_features=2), h))
    return space


def test_a_module_declares_its_rule() -> None:
    supernet = Supernet(with_heads(Heads))
    stored = supernet.store["attend", "Heads", "project.weight"]
    assert tuple(stored.shape) == (24, 5)
    weight = supernet.extract({"heads": 1}).get_submodule("attend.project").weight
    assert torch.equal(weight, torch.cat([stored[:3], stored[12:15]]))
    for heads in (1, 2, 4):
        x = torch.randn(3, 5)
        assert torch.equal(supernet.subnet({"heads": heads})(x), supernet.extract({"heads": heads})(x))


def test_a_rule_that_selects_something_else_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"node 'attend', option 'Wrong', parameter 'project\.\w+'.*select"):
        Supernet(with_heads(Wrong))


class Tables(nn.Module):
    def __init__(self, in_features: int, axes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((in_features,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if self.scale.dim() == 1 else x @ self.scale


def test_parameters_that_do_not_nest_are_refused_when_declared() -> None:
    space = SearchSpace("tables")
    x: Node = space.input("x", torch.zeros(4, 5), {0: "nodes"})
    space.output(space.add("table", Choice("kind", {"wild": Op(Tables, axes=Choice("axes", [1, 2]))}), x))
    with pytest.raises(SpaceError, match="node 'table', option 'wild', parameter 'scale' is .* do not nest"):
        Supernet(space)


def test_options_of_one_class_have_stores_of_their_own() -> None:
    supernet = Supernet(nasbench201(4, cells=1))
    found = {(node, option) for node, option, _ in supernet.store if "nor_conv" in option}
    assert {option for _, option in found} == {"nor_conv_1x1", "nor_conv_3x3"}
    assert len(found) == 2 * 3 * 6  # stages, edges


def test_structures_are_built_once(cnn: Supernet) -> None:
    arch = samples(cnn.space, 1)[0]
    assert cnn._structure(arch) is cnn._structure(Architecture(dict(arch)))
    assert all(p.is_meta for form in cnn._structure(arch).forms if form for p in form.module.parameters())


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self, in_features: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Linear(in_features, hidden, bias=False)
        self.leave = nn.Linear(hidden, hidden, bias=False)
        self.again = self.leave

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.leave(self.enter(x)))  # type: ignore[no-any-return]


def test_tied_weights_stay_tied() -> None:
    space = SearchSpace("tied")
    x = space.input("x", torch.zeros(4, 5), {0: "nodes"})
    space.output(space.add("tied", Op(Tied, hidden=Choice("hidden", [3, 6], ordered=True)), x))
    supernet = Supernet(space)
    assert len(supernet.store) == 2
    for hidden in (3, 6):
        x = torch.randn(7, 5)
        assert torch.equal(supernet.subnet({"hidden": hidden})(x), supernet.extract({"hidden": hidden})(x))
        alone, view = supernet.extract({"hidden": hidden}), supernet.subnet({"hidden": hidden})
        for parameter in supernet.parameters():
            parameter.grad = None
        alone(x).sum().backward()
        view(x).sum().backward()
        gradient = supernet.store["tied", "Tied", "leave.weight"].grad
        assert gradient is not None
        torch.testing.assert_close(gradient[:hidden, :hidden], alone.get_submodule("tied.leave").weight.grad)


# ---- BatchNorm ------------------------------------------------------------------------------------------------------


def test_recalibration_gives_pooled_statistics() -> None:
    supernet = Supernet(small_cnn())
    arch = supernet.space.architecture({"depth": "1", "norm1": "batch", "width1": 8, "kernel1": 3})
    data = torch.randn(64 * 32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1
    batches = [Batch((part,), torch.zeros(32, dtype=torch.long)) for part in data.split(32)]
    model = supernet.extract(arch)
    momentum = model.get_submodule("norm1").momentum
    assert recalibrate(model, batches) is model
    norm = model.get_submodule("norm1")
    with torch.no_grad():
        pooled = model.get_submodule("conv1")(data)
    torch.testing.assert_close(norm.running_mean, pooled.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, pooled.var(dim=(0, 2, 3)), rtol=5e-3, atol=0)
    assert int(norm.num_batches_tracked) == 64 and norm.momentum == momentum and not model.training


def test_recalibration_of_no_batch_is_refused(cnn: Supernet) -> None:
    with pytest.raises(ValueError, match="no batch"):
        recalibrate(cnn.extract(samples(cnn.space, 1)[0]), [])
