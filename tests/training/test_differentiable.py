"""Relaxed networks against plain sums, gradients against autograd, and methods on problems with one right answer."""

from __future__ import annotations

import copy
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasgraph import registry
from nasgraph.errors import ConfigError, NotFinite, SpaceError
from nasgraph.ops import Zero, concat
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.search_spaces.mobilenet import mobilenet
from nasgraph.search_spaces.nasbench201 import cell_space
from nasgraph.search_spaces.transformer import transformer_encoder
from nasgraph.space import Architecture, Call, Choice, Label, Op, SearchSpace, Switch
from nasgraph.supernet import Supernet
from nasgraph.tasks.batch import Batch
from nasgraph.training.differentiable import Relaxed, coded, distributions, tangle, two_path
from nasgraph.training.differentiable.coded import _last, coded_weights
from nasgraph.training.differentiable.distributions import band_loss, two_sizes
from nasgraph.training.differentiable.mixture import Mixture, interpolated
from nasgraph.training.differentiable.relaxed import (
    Batches,
    Parameters,
    most_probable,
    one_hot,
    pair,
    preferences,
    ranked,
    surrogate_cost,
    temperature,
)
from nasgraph.training.differentiable.tangle import concentration, hard
from nasgraph.training.differentiable.two_path import combined, gate_gradient, keep_others


def small_cnn() -> SearchSpace:
    """Elastic kernel and width, two norms, depth. Shapes: ``(B, 3, 8, 8)`` -> ``(B, 3)``."""
    space = SearchSpace("small_cnn")
    h: Any = space.input("image", torch.zeros(2, 3, 8, 8), dynamic={0: "batch"})
    ends = {}
    for i in (1, 2):
        kernel, width = Choice(f"kernel{i}", [1, 3], ordered=True), Choice(f"width{i}", [4, 8], ordered=True)
        h = space.add(f"conv{i}", Op(nn.Conv2d, out_channels=width, kernel_size=kernel, padding=kernel // 2), h)
        norms = {"batch": Op(nn.BatchNorm2d), "group": Op(nn.GroupNorm, num_groups=2)}
        h = ends[str(i)] = space.add(f"norm{i}", Choice(f"norm{i}", norms), h)
    h = space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=1), Choice("depth", ends))
    space.output(space.add("head", Op(nn.Linear, out_features=3), space.add("flat", Op(nn.Flatten), h)))
    return space


def awkward() -> SearchSpace:
    """What cannot be superposed: sigmoid (0 becomes 0.5), concatenation, LayerNorm; a switch; a choice as output."""
    space = SearchSpace("awkward")
    x = space.input("x", torch.zeros(4, 6), dynamic={0: "rows"})
    width = Choice("width", [3, 5, 8], ordered=True)
    a = space.add("a", Op(nn.Linear, out_features=width), x)
    b = space.add("b", Choice("squash", {"sigmoid": Op(nn.Sigmoid), "norm": Op(nn.LayerNorm), "none": Op(Zero)}), a)
    c = space.add("c", Call(concat), a, Switch(Choice("wiring", ["chain", "star"]), {"chain": b, "star": x}))
    d = space.add("d", Op(nn.Linear, out_features=2), c)
    e = space.add("e", Op(nn.Linear, out_features=2), b)
    space.output(Choice("end", {"d": d, "e": e}))
    return space


def joint(norm: bool = False) -> SearchSpace:
    """Two linear layers whose sizes are chosen apart: the second has 2 x 3 forms."""
    space = SearchSpace("joint")
    h = space.input("x", torch.zeros(4, 5), dynamic={0: "rows"})
    h = space.add("first", Op(nn.Linear, out_features=Choice("inner", [2, 4], ordered=True)), h)
    if norm:
        h = space.add("norm", Op(nn.LayerNorm), h)
    h = space.add("second", Op(nn.Linear, out_features=Choice("outer", [1, 3, 6], ordered=True)), h)
    space.output(h)
    return space


def gnn() -> SearchSpace:
    return gnn_node(7, 4, layers=2, widths=(8, 16))


def attention() -> SearchSpace:
    return transformer_encoder(layers=1, widths=(8, 16), head_width=8)


def transformed() -> SearchSpace:
    """Kernels that are computed from larger ones, with BatchNorm, width, expansion, depth and resolution."""
    stages = ((8, 2, 1, 2),)
    return mobilenet(4, 3, 12, (8, 12), kernels=(3, 5), expands=(2, 3), stages=stages, last=8, kernel_transform=True)


def example(space: SearchSpace) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    if "edge_index" in space.inputs:
        return torch.randn(12, 7, generator=generator), torch.randint(0, 12, (2, 40), generator=generator)
    (x,) = (given.example for given in space.inputs.values())
    return (torch.randn(3, *x.shape[1:], generator=generator),)


def randomised(space: SearchSpace, dtype: torch.dtype = torch.float32) -> Supernet:
    """A store without zeros and ones, so that a wrong entry shows."""
    supernet, generator = Supernet(space), torch.Generator().manual_seed(1)
    for parameter in supernet.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return supernet


def complete(space: SearchSpace, architecture: Architecture, rng: random.Random) -> dict[str, Label]:
    return {name: architecture.get(name, rng.choice(choice.labels)) for name, choice in space.choices.items()}


def as_weights(space: SearchSpace, labels: dict[str, Label]) -> dict[str, Tensor]:
    return {name: one_hot(c.labels.index(labels[name]), len(c.labels)) for name, c in space.choices.items()}


def alone(supernet: Supernet, architecture: Architecture, inputs: tuple[Tensor, ...]) -> Tensor:
    """The extracted network with dropout off and batch statistics on."""
    model = supernet.extract(architecture).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    with torch.no_grad():
        result: Tensor = model(*inputs)
    return result


# ---- the relaxed network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"superpose": False}, {"align": "interpolate"}], ids=str)
@pytest.mark.parametrize("make", [small_cnn, awkward, gnn, cell_space, attention, transformed])
def test_one_hot_weights_are_the_subnet(make: Callable[[], SearchSpace], options: dict[str, Any]) -> None:
    space = make()
    supernet, rng = randomised(space), random.Random(0)
    mixture, inputs = Mixture(supernet, **options), example(space)
    for _ in range(6):
        found = space.sample(rng)
        labels = complete(space, found, rng)
        expected, weights = alone(supernet, found, inputs), as_weights(space, labels)
        opened = {name: frozenset([label]) for name, label in labels.items()}
        with torch.no_grad():
            everything = mixture(weights, inputs, training=False)
            only = mixture(weights, inputs, training=False, labels=opened)
        if mixture.align == "pad":  # a detour over another size is not undone by averaging
            assert torch.allclose(everything, expected, rtol=1e-5, atol=1e-5), found
        assert torch.allclose(only, expected, rtol=1e-5, atol=1e-5), found


def plain_second(supernet: Supernet, h: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """The alpha-weighted sum of the padded outputs of every slice of the second layer, one after the other."""
    weight, bias = supernet.store["second", "Linear", "weight"], supernet.store["second", "Linear", "bias"]
    total = torch.zeros(len(h), 6, dtype=h.dtype)
    for (i, a), (o, b) in itertools.product(zip((2, 4), inner, strict=True), zip((1, 3, 6), outer, strict=True)):
        out = F.linear(h[:, :i], weight[:o, :i], bias[:o])
        total = total + a * b * F.pad(out, (0, 6 - o))
    return total


def test_a_superposed_run_is_the_sum_over_all_slices_and_so_are_its_gradients() -> None:
    space = joint()
    supernet = randomised(space, torch.float64)
    mixture = Mixture(supernet)
    assert [len(mixture.places[name].groups) for name in ("first", "second")] == [1, 1]
    assert [len(mixture.places[name].forms) for name in ("first", "second")] == [2, 6]
    (x,) = (t.double() for t in example(space))
    alphas = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in ([0.3, -0.7], [0.2, 0.5, -0.3])]
    inner, outer = (torch.softmax(a, dim=0) for a in alphas)
    found = mixture({"inner": inner, "outer": outer}, (x,), training=True)
    weight, bias = supernet.store["first", "Linear", "weight"], supernet.store["first", "Linear", "bias"]
    outs = [a * F.pad(F.linear(x, weight[:i], bias[:i]), (0, 4 - i)) for i, a in zip((2, 4), inner, strict=True)]
    expected = plain_second(supernet, outs[0] + outs[1], inner, outer)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    probe = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensors = [*alphas, *supernet.parameters()]
    one, other = (torch.autograd.grad(y, tensors, probe, retain_graph=True) for y in (found, expected))
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_convolution_superposes_kernels_and_widths() -> None:
    space = SearchSpace("kernels")
    x = space.input("x", torch.zeros(2, 3, 6, 6), dynamic={0: "batch"})
    kernel, width = Choice("kernel", [1, 3, 5], ordered=True), Choice("width", [2, 4], ordered=True)
    space.output(space.add("conv", Op(nn.Conv2d, out_channels=width, kernel_size=kernel, padding=kernel // 2), x))
    supernet = randomised(space, torch.float64)
    mixture = Mixture(supernet)
    assert [len(group.members) for group in mixture.places["conv"].groups] == [6]
    image = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    kernels, widths = (torch.tensor(p, dtype=torch.float64) for p in ([0.2, 0.5, 0.3], [0.6, 0.4]))
    weights = {"kernel": kernels, "width": widths}
    weight, bias = (supernet.store["conv", "Conv2d", name] for name in ("weight", "bias"))
    expected = torch.zeros(2, 4, 6, 6, dtype=torch.float64)
    for (k, a), (w, b) in itertools.product(enumerate(kernels), zip((2, 4), widths, strict=True)):
        out = F.conv2d(image, weight[:w, :, 2 - k : 3 + k, 2 - k : 3 + k], bias[:w], padding=k)
        expected = expected + a * b * F.pad(out, (0, 0, 0, 0, 0, 4 - w))
    assert torch.allclose(mixture(weights, (image,), training=True), expected, rtol=0, atol=1e-12)


def test_a_norm_over_channels_is_run_for_each_width_unless_asked_for_the_published_way() -> None:
    space = joint(norm=True)
    supernet, inputs = randomised(space), example(space)
    exact, full = Mixture(supernet), Mixture(supernet, norms="full")
    assert [len(mixture.places["norm"].groups) for mixture in (exact, full)] == [2, 1]
    small = Architecture({"inner": 2, "outer": 6})
    expected, weights = alone(supernet, small, inputs), as_weights(space, dict(small))
    assert torch.allclose(exact(weights, inputs, training=False), expected, atol=1e-6)
    assert (full(weights, inputs, training=False) - expected).abs().max() > 0.05  # the padding counts in its statistics


def test_operations_are_mixed_by_their_outputs_and_inner_choices_count_with_them() -> None:
    space = SearchSpace("ops")
    x = space.input("x", torch.zeros(4, 5), dynamic={0: "rows"})
    parts = {
        "linear": Op(nn.Linear, out_features=5),
        "leaky": Op(nn.LeakyReLU, negative_slope=Choice("slope", [0.1, 0.5])),
    }
    space.output(space.add("h", Choice("op", parts), x))
    supernet = randomised(space)
    (inputs,) = example(space)
    op, slope = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    linear = F.linear(inputs, *(supernet.store["h", "linear", name] for name in ("weight", "bias")))
    expected = 0.3 * linear + 0.7 * (0.6 * F.leaky_relu(inputs, 0.1) + 0.4 * F.leaky_relu(inputs, 0.5))
    found = Mixture(supernet)({"op": op, "slope": slope}, (inputs,), training=False)
    assert torch.allclose(found, expected, atol=1e-6)


def test_only_what_is_open_is_run() -> None:
    class Trap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 3:
                raise AssertionError("run")
            return x

    globals()["Trap"] = Trap
    space = SearchSpace("trap")
    x = space.input("x", torch.zeros(4, 5), dynamic={0: "rows"})
    behind = space.add("behind", Op(Trap), x)
    h = space.add("h", Op(nn.Linear, out_features=5), Choice("end", {"x": x, "behind": behind}))
    space.output(h)
    mixture = Mixture(Supernet(space))
    inputs = (torch.zeros(3, 5),)
    weights = as_weights(space, {"end": "x"})
    mixture(weights, inputs, training=True, labels={"end": frozenset(["x"])})
    with pytest.raises(AssertionError, match="run"):
        mixture(weights, inputs, training=True)


def test_options_of_different_rank_are_refused_by_the_name_of_their_node() -> None:
    space = SearchSpace("ranks")
    x = space.input("x", torch.zeros(2, 3, 4, 4), dynamic={0: "batch"})
    space.output(space.add("h", Choice("op", {"flat": Op(nn.Flatten), "same": Op(nn.Identity)}), x))
    with pytest.raises(SpaceError, match="node 'h' is a tensor of another rank"):
        Mixture(Supernet(space))


# ---- the decision -------------------------------------------------------------------------------------------------


def nested() -> SearchSpace:
    """A choice inside an option, and a constraint that the most probable architecture breaks."""
    space = SearchSpace("nested")
    x = space.input("x", torch.zeros(4, 3), dynamic={0: "rows"})
    parts = {"drop": Op(nn.Dropout, p=Choice("rate", [0.1, 0.2, 0.3])), "none": Op(nn.Identity)}
    h = space.add("h", Choice("part", parts), x)
    space.output(space.add("head", Op(nn.Linear, out_features=Choice("width", [2, 3])), h))
    return space


PROBABILITIES: dict[str, dict[Label, float]] = {
    "part": {"drop": 0.6, "none": 0.4},
    "rate": {0.1: 0.2, 0.2: 0.5, 0.3: 0.3},
    "width": {2: 0.1, 3: 0.9},
}


def test_architectures_come_in_the_order_of_their_probability() -> None:
    space = nested()

    def relative(found: Architecture) -> float:
        return math.prod(PROBABILITIES[c][label] / max(PROBABILITIES[c].values()) for c, label in found.items())

    found = list(ranked(space, PROBABILITIES))
    assert sorted(map(hash, found)) == sorted(map(hash, space.enumerate())) and len(found) == 8
    assert [relative(a) for a in found] == pytest.approx(sorted(map(relative, space.enumerate()), reverse=True))


def test_the_decision_meets_the_constraints_or_says_that_none_does() -> None:
    space = nested()
    assert most_probable(space, PROBABILITIES) == Architecture({"part": "drop", "rate": 0.2, "width": 3})
    space.constrain("no dropout of 0.2", lambda a: a.get("rate") != 0.2)
    assert most_probable(space, PROBABILITIES) == Architecture({"part": "none", "width": 3})
    space.constrain("nothing", lambda a: False)
    with pytest.raises(SpaceError, match="none of the 1,000 most probable"):
        most_probable(space, PROBABILITIES)


# ---- the formulas -------------------------------------------------------------------------------------------------


def test_gates_move_the_alphas_as_autograd_says() -> None:
    alphas = torch.tensor([0.4, -1.1], dtype=torch.float64, requires_grad=True)
    gates = torch.tensor([0.7, -0.2], dtype=torch.float64)
    (expected,) = torch.autograd.grad((gates * torch.softmax(alphas, dim=0)).sum(), alphas)
    assert torch.allclose(gate_gradient(gates, torch.softmax(alphas, dim=0).detach()), expected, atol=1e-15)
    assert not gate_gradient(torch.tensor([2.0, 2.0 + 1e-7]), torch.tensor([0.3, 0.7])).any()


def test_a_gates_gradient_is_that_of_its_output() -> None:
    """``dL/dg_k = sum(out_k * dL/dout)``, also of the path whose gate is closed."""
    space = SearchSpace("gates")
    x = space.input("x", torch.zeros(4, 5), dynamic={0: "rows"})
    parts = {"linear": Op(nn.Linear, out_features=5), "tanh": Op(nn.Tanh), "relu": Op(nn.ReLU)}
    space.output(space.add("h", Choice("op", parts), x))
    supernet = randomised(space)
    (inputs,) = example(space)
    gates = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    opened, path = {"op": frozenset(["linear", "tanh"])}, {"op": "linear"}
    out = Mixture(supernet, superpose=False)({"op": gates}, (inputs,), training=False, labels=opened, path=path)
    linear = F.linear(inputs, *(supernet.store["h", "linear", name] for name in ("weight", "bias"))).detach()
    assert torch.allclose(out, linear)
    (found,) = torch.autograd.grad(out.square().sum(), gates)
    slope = 2 * linear
    expected = [(slope * linear).sum().item(), (slope * inputs.tanh()).sum().item(), 0.0]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_moving_two_alphas_leaves_the_other_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    alphas = torch.randn(6, dtype=torch.float64, generator=generator)
    two = torch.tensor([4, 1])
    before, old = torch.logsumexp(alphas[two], dim=0), torch.softmax(alphas, dim=0)
    alphas[two] += torch.tensor([0.9, -2.0])
    keep_others(alphas, two, before)
    new = torch.softmax(alphas, dim=0)
    others = [0, 2, 3, 5]
    assert (new[others] - old[others]).abs().max() < 1e-12
    assert (new[two] - old[two]).abs().min() > 1e-3


def test_a_step_of_two_path_moves_two_probabilities_only() -> None:
    found = two_path(Supernet(planted_op(), Blobs()), 1, alpha_lr=0.5)
    changes = sorted(abs(p - 1 / 3) for p in found.probabilities["op"].values())
    assert changes[0] < 1e-12 < 1e-3 < changes[1] == pytest.approx(changes[2])


def test_decisions_that_make_no_architecture_are_refused() -> None:
    space = SearchSpace("groups")
    x = space.input("x", torch.zeros(4, 8), dynamic={0: "rows"})
    space.output(space.add("norm", Op(nn.GroupNorm, num_groups=Choice("groups", [3, 4])), x))
    with pytest.raises(SpaceError, match="the output has no form with the decisions that are open"):
        mixture = Mixture(Supernet(space))
        mixture(as_weights(space, {"groups": 3}), example(space), training=True, labels={"groups": frozenset([3])})


def test_pairs_are_drawn_without_replacement_by_the_softmax() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    n, counts = 20_000, dict.fromkeys(itertools.permutations(range(3), 2), 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(n):
            counts[tuple(pair(p.log()).tolist())] += 1  # type: ignore[index]
    chi = sum((count - n * (e := float(p[i] * p[j] / (1 - p[i])))) ** 2 / (n * e) for (i, j), count in counts.items())
    assert chi < 20.5  # 5 degrees of freedom, 0.1%


def test_the_losses_of_accuracy_and_cost() -> None:
    error, cost = torch.tensor(1.3), torch.tensor(900.0)
    product = combined(error, cost, 1000.0, "product", 0.2, 0.3, 0.1)
    assert float(product) == pytest.approx(1.3 * 0.2 * (math.log(900) / math.log(1000)) ** 0.3)
    assert float(combined(error, cost, 1000.0, "sum", 0.2, 0.3, 0.1)) == pytest.approx(1.3 + 0.1 * -100 / 1000)


def test_the_mean_gradient_of_the_surrogate_is_that_of_the_expected_cost() -> None:
    space = nested()
    alphas = {name: torch.randn(len(c.labels), dtype=torch.float64) for name, c in sorted(space.choices.items())}
    for values in alphas.values():
        values.requires_grad_(True)

    def cost(found: Architecture) -> float:
        return len(found) * 10 + float(found["width"]) ** 2 + 7 * float(found.get("rate", 0))  # type: ignore[arg-type]

    p = {name: torch.softmax(values, dim=0) for name, values in alphas.items()}
    shares = {name: dict(zip(space.choices[name].labels, values, strict=True)) for name, values in p.items()}
    expected, mean = torch.zeros(()).double(), torch.zeros(()).double()
    for labels in itertools.product(*(space.choices[name].labels for name in alphas)):
        path = dict(zip(alphas, labels, strict=True))
        chance = torch.stack([shares[name][label] for name, label in path.items()]).prod()
        expected = expected + chance * cost(space.architecture(path))
        mean = mean + chance.detach() * surrogate_cost(space, cost, path, shares)
    assert mean.item() == pytest.approx(expected.item())
    one, other = (torch.autograd.grad(v, list(alphas.values()), retain_graph=True) for v in (expected, mean))
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_hard_weights_are_one_hot_with_the_gradient_of_the_gumbel_softmax() -> None:
    alphas = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        weights, index = hard(alphas, 0.7)
        torch.manual_seed(5)
        noise = -torch.log(-torch.log(torch.rand(3, dtype=torch.float64)))
    soft = torch.softmax((torch.log_softmax(alphas, dim=0) + noise) / 0.7, dim=0)
    assert weights.tolist() == pytest.approx(one_hot(index, 3).tolist(), abs=1e-15) and index == int(soft.argmax())
    (found,) = torch.autograd.grad((weights * slope).sum(), alphas)
    (expected,) = torch.autograd.grad((soft * slope).sum(), alphas)
    assert torch.allclose(found, expected, atol=1e-12)
    assert [temperature((10.0, 0.1), step, 3) for step in range(3)] == pytest.approx([10.0, 5.05, 0.1])


def test_the_dirichlet_is_uniform_at_zero_and_never_without_mass() -> None:
    assert concentration(torch.tensor([0.0, 1.0, -50.0])).tolist() == pytest.approx([1.0, 2.0, 1e-4])


def test_coded_weights_have_length_one() -> None:
    weights = coded_weights({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([-2.0])})
    assert weights["a"].tolist() == pytest.approx([0.6, 0.8]) and weights["b"].tolist() == [-1.0]


def test_two_sizes_share_the_weight_as_their_probabilities() -> None:
    alphas = torch.tensor([0.2, 0.9, -0.4, 0.0], dtype=torch.float64, requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        weights, two = two_sizes(alphas, 1.5)
        torch.manual_seed(2)
        noise = -torch.log(-torch.log(torch.rand(4, dtype=torch.float64)))
    p = torch.softmax((torch.log_softmax(alphas, dim=0) + noise) / 1.5, dim=0)
    assert weights[two].tolist() == pytest.approx((p[two] / p[two].sum()).tolist())
    assert float(weights.detach().sum()) == pytest.approx(1) and int((weights == 0).sum()) == 2


def test_interpolation_averages_neighbours() -> None:
    x = torch.arange(12.0).reshape(2, 6)
    assert interpolated(x, 1, 3).tolist() == [[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]]
    assert interpolated(x, 1, 12).tolist() == x.repeat_interleave(2, dim=1).tolist()
    image = torch.randn(2, 5, 3, 4)
    start, end = [math.floor(i * 5 / 3) for i in range(3)], [math.ceil((i + 1) * 5 / 3) for i in range(3)]
    expected = torch.stack([image[:, a:b].mean(dim=1) for a, b in zip(start, end, strict=True)], dim=1)
    assert torch.allclose(interpolated(image, 1, 3), expected)


def test_widths_are_aligned_to_the_larger_of_the_two_that_are_open() -> None:
    space = joint()
    supernet = randomised(space)
    (x,) = example(space)
    weights = {"inner": one_hot(0, 2), "outer": torch.tensor([0.0, 0.25, 0.75]).double()}
    opened: dict[str, frozenset[Label]] = {"inner": frozenset([2]), "outer": frozenset([3, 6])}
    found = Mixture(supernet, align="interpolate")(weights, (x,), training=False, labels=opened)
    h = F.linear(x, *(supernet.store["first", "Linear", name][:2] for name in ("weight", "bias")))
    weight, bias = (supernet.store["second", "Linear", name] for name in ("weight", "bias"))
    small, large = (F.linear(h, weight[:o, :2], bias[:o]) for o in (3, 6))
    assert torch.allclose(found, 0.25 * small.repeat_interleave(2, dim=1) + 0.75 * large, atol=1e-6)


@pytest.mark.parametrize(("cost", "sign"), [(94.0, -1), (95.0, 0), (105.0, 0), (106.0, 1)])
def test_the_band_pushes_towards_the_target(cost: float, sign: int) -> None:
    assert float(band_loss(torch.tensor(cost), 100.0, 0.05)) == pytest.approx(sign * math.log(cost))


def test_equal_gradients_are_no_preference() -> None:
    grads = {"same": torch.tensor([0.3, 0.3 + 1e-8]), "other": torch.tensor([0.3, 0.31]), "none": torch.zeros(2)}
    assert list(preferences(grads)) == ["other"]


# ---- the methods --------------------------------------------------------------------------------------------------


class Shuffle(nn.Module):
    """Destroys what a sample says: gives it the mean of all."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=0, keepdim=True).expand_as(x)


class Blobs:
    """Four classes around four points."""

    name = "blobs"

    def __init__(self, poison: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(160) % 4
        self.x = 2 * torch.randn(4, 8, generator=generator)[self.y] + 0.7 * torch.randn(160, 8, generator=generator)
        self.poison, self.asked = poison, 0

    def split(self, name: str) -> Batch:
        rows = {"train": slice(0, 80), "val": slice(80, 160)}[name]
        return Batch((self.x[rows],), self.y[rows])

    def batch(self, n: int, seed: int) -> Batch:
        self.asked += 1
        batch = self.split("train")
        if self.poison and self.asked > 2:
            return Batch((batch.inputs[0] * math.nan,), batch.target)
        return batch


def planted_op() -> SearchSpace:
    """Only ``linear`` lets the classes through."""
    space = SearchSpace("planted_op")
    x = space.input("x", torch.zeros(4, 8), dynamic={0: "rows"})
    parts = {"zero": Op(Zero), "linear": Op(nn.Linear, out_features=8), "shuffle": Op(Shuffle)}
    h = space.add("act", Op(nn.ReLU), space.add("h", Choice("op", parts), x))
    space.output(space.add("head", Op(nn.Linear, out_features=4), h))
    return space


def planted_width() -> SearchSpace:
    """One unit cannot tell four classes apart."""
    space = SearchSpace("planted_width")
    x = space.input("x", torch.zeros(4, 8), dynamic={0: "rows"})
    h = space.add("h", Op(nn.Linear, out_features=Choice("width", [1, 16], ordered=True)), x)
    space.output(space.add("head", Op(nn.Linear, out_features=4), space.add("act", Op(nn.ReLU), h)))
    return space


def planted_depth() -> SearchSpace:
    """Behind ``shuffle`` there is nothing to learn: the head has to read the first layer."""
    space = SearchSpace("planted_depth")
    x = space.input("x", torch.zeros(4, 8), dynamic={0: "rows"})
    h = space.add("h", Op(nn.Linear, out_features=8), x)
    ends = {"1": h, "2": space.add("behind", Op(Shuffle), h)}
    space.output(space.add("head", Op(nn.Linear, out_features=4), Choice("depth", ends)))
    return space


FAST: dict[str, Any] = {"steps": 40, "alpha_lr": 0.05}
CODED: dict[str, Any] = {"steps": 80}
PLANTED = [
    (tangle, planted_op, "linear", FAST),
    (tangle, planted_op, "linear", {**FAST, "sampler": "drnas"}),
    (tangle, planted_op, "linear", {**FAST, "sampler": "gdas"}),
    (tangle, planted_op, "linear", {**FAST, "operations": "sample"}),
    (tangle, planted_width, 16, FAST),
    (tangle, planted_width, 16, {**FAST, "sampler": "drnas"}),
    (tangle, planted_width, 16, {**FAST, "sampler": "gdas"}),
    (tangle, planted_depth, "1", FAST),
    (two_path, planted_op, "linear", FAST),
    (two_path, planted_width, 16, FAST),
    (two_path, planted_depth, "1", FAST),
    (coded, planted_op, "linear", CODED),
    (coded, planted_depth, "1", CODED),
    (distributions, planted_width, 16, FAST),
    (distributions, planted_depth, "1", FAST),
]


@pytest.mark.parametrize(("method", "make", "right", "options"), PLANTED)
def test_the_planted_option_is_found(
    method: Callable[..., Relaxed], make: Callable[[], SearchSpace], right: Label, options: dict[str, Any]
) -> None:
    task, found = Blobs(), []
    for seed in range(5):
        result = method(Supernet(make(), task, seed=seed), seed=seed, **options)  # type: ignore[arg-type]
        ((name, label),) = result.architecture.items()
        assert label == max(result.probabilities[name], key=result.probabilities[name].__getitem__)
        assert sum(result.probabilities[name].values()) == pytest.approx(1)
        found.append(label)
    assert found.count(right) >= 4, found


METHODS = [tangle, two_path, coded, distributions]


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_everything_and_the_callers_generator_is_left_alone(method: Callable[..., Relaxed]) -> None:
    state = torch.random.get_rng_state()
    steps: list[tuple[int, Any]] = []
    one, other, third = (
        method(Supernet(small(), Blobs()), 8, seed=seed, on_step=lambda *told: steps.append(told)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.probabilities == other.probabilities != third.probabilities
    assert repr(one.history) == repr(other.history) and len(one.history) == 8
    assert [step for step, _ in steps] == [*range(8)] * 3
    assert [repr(losses) for _, losses in steps[:8]] == [repr(losses) for losses in one.history]
    assert all(math.isfinite(value) for _, value in one.history)


def small() -> SearchSpace:
    """Operations, a shared width, a depth and a dropout rate."""
    space = SearchSpace("small")
    h: Any = space.input("x", torch.zeros(4, 8), dynamic={0: "rows"})
    width, rate = Choice("width", [4, 8, 16], ordered=True), Choice("rate", [0.0, 0.5], ordered=True)
    act = Choice("act", {"relu": Op(nn.ReLU), "tanh": Op(nn.Tanh)})
    ends = {}
    for i in (1, 2):
        h = space.add(f"drop{i}", Op(nn.Dropout, p=rate), h)
        parts = {"linear": Op(nn.Linear, out_features=width), "plain": Op(nn.Linear, out_features=width, bias=False)}
        h = space.add(f"h{i}", Choice(f"op{i}", parts), h)
        h = ends[str(i)] = space.add(f"act{i}", act, h)
    space.output(space.add("head", Op(nn.Linear, out_features=4), Choice("depth", ends)))
    return space


@pytest.mark.parametrize("method", METHODS)
def test_fixed_choices_stay(method: Callable[..., Relaxed]) -> None:
    fixed = {"width": 8, "op1": "plain"}
    found = method(Supernet(small(), Blobs()), 8, fixed=fixed)
    assert {name: found.architecture[name] for name in fixed} == fixed
    assert found.probabilities["width"] == {4: 0, 8: 1, 16: 0}
    with pytest.raises(SpaceError, match="has no choice 'widht'. Did you mean 'width'"):
        method(Supernet(small(), Blobs()), 8, fixed={"widht": 8})


@pytest.mark.parametrize("method", [tangle, two_path])
def test_a_choice_that_no_gradient_reaches_stays_uniform(method: Callable[..., Relaxed]) -> None:
    found = method(Supernet(small(), Blobs()), 10, alpha_lr=0.1)
    rates = found.probabilities["rate"]
    assert rates == {0.0: 0.5, 0.5: 0.5} and found.architecture["rate"] == 0.0  # the first option
    assert max(abs(p - 0.5) for p in found.probabilities["act"].values()) > 0.02


@pytest.mark.parametrize("method", METHODS)
def test_nan_stops_with_the_step_and_is_not_taken(method: Callable[..., Relaxed]) -> None:
    supernet = Supernet(small(), Blobs(poison=True))
    taken: list[int] = []
    with pytest.raises(NotFinite, match=r"^step 2: the training loss is nan; the step was not taken$"):
        method(supernet, 8, samples=10, on_step=lambda step, _: taken.append(step))
    assert taken == [0, 1]
    assert all(bool(parameter.isfinite().all()) for parameter in supernet.parameters())


def test_coded_reads_and_changes_no_weight_of_the_store() -> None:
    supernet = Supernet(small(), Blobs(), seed=4)
    before = copy.deepcopy(dict(supernet.store))
    one = coded(supernet, 8)
    assert all(torch.equal(before[key], parameter) for key, parameter in supernet.store.items())
    for parameter in supernet.parameters():
        parameter.data.zero_()
    assert coded(supernet, 8).probabilities == one.probabilities
    assert one.architecture["width"] == 16 and one.probabilities["width"] == {4: 0, 8: 0, 16: 1}
    assert one.architecture["rate"] == 0.0  # a rate is no size


def test_the_read_out_is_what_nothing_with_parameters_follows() -> None:
    assert _last(Mixture(Supernet(small()))) == [("head", "Linear", "weight"), ("head", "Linear", "bias")]
    heads = {key[0] for key in _last(Mixture(Supernet(gnn())))}
    assert heads == {"head"}  # propagation follows it, without parameters


def test_without_a_read_out_what_destroys_the_features_wins() -> None:
    """An untrained head on features has a larger loss than on zeros: log 4."""
    found = [coded(Supernet(planted_op(), Blobs()), 80, seed=seed, readout=False) for seed in range(3)]
    assert [result.architecture["op"] for result in found].count("linear") == 0
    assert all(math.isnan(loss) for loss, _ in found[0].history)


@pytest.mark.parametrize("options", [{"sampler": "gdas"}, {"operations": "sample"}])
def test_what_a_constraint_excludes_is_not_drawn(options: dict[str, Any]) -> None:
    """Without ``h`` the head cannot be built on the rows' three numbers: the constraint says so."""
    space = SearchSpace("excluded")
    x = space.input("x", torch.zeros(4, 8), dynamic={0: "rows"})
    h = space.add("h", Choice("op", {"linear": Op(nn.Linear, out_features=6), "zero": Op(Zero)}), x)
    groups = Choice("groups", {"three": Op(nn.GroupNorm, num_groups=3), "two": Op(nn.GroupNorm, num_groups=2)})
    space.output(space.add("head", Op(nn.Linear, out_features=4), space.add("norm", groups, h)))
    space.constrain("three groups need six channels", lambda a: a.get("groups") != "three" or a["op"] == "linear")
    for seed in range(3):
        found = tangle(Supernet(space, Blobs()), 10, seed=seed, **options)  # type: ignore[arg-type]
        assert not space.violated(found.architecture)


def test_a_cost_is_not_asked_for_what_a_constraint_excludes() -> None:
    def space() -> SearchSpace:
        """Three groups do not fit into four channels."""
        found = SearchSpace("groups")
        x = found.input("x", torch.zeros(4, 8), dynamic={0: "rows"})
        h = found.add("h", Op(nn.Linear, out_features=Choice("width", [3, 4, 6], ordered=True)), x)
        groups = Choice("groups", [1, 3], ordered=True)
        found.output(
            found.add("head", Op(nn.Linear, out_features=4), found.add("n", Op(nn.GroupNorm, num_groups=groups), h))
        )
        found.constrain("whole groups", lambda a: int(a["width"]) % int(a["groups"]) == 0)  # type: ignore[call-overload]
        return found

    for method, target in ((two_path, {"reference": 20.0}), (distributions, {"target": 20.0})):
        found = method(Supernet(space(), Blobs()), 20, alpha_lr=0.1, **target)  # type: ignore[operator, arg-type]
        assert not space().violated(found.architecture)


@pytest.mark.parametrize("method", [tangle, two_path])
def test_alphas_wait_for_the_warmup(method: Callable[..., Relaxed]) -> None:
    found = method(Supernet(small(), Blobs()), 6, warmup=6)
    assert all(max(p.values()) - min(p.values()) < 0.01 for p in found.probabilities.values())
    assert all(math.isnan(val) and math.isfinite(train) for train, val in found.history)


def test_a_weight_step_of_two_path_trains_one_path() -> None:
    supernet = Supernet(planted_op(), Blobs())
    before = {key: parameter.detach().clone() for key, parameter in supernet.store.items()}
    two_path(supernet, 1, fixed={"op": "zero"})
    changed = {key[:2] for key, parameter in supernet.store.items() if not torch.equal(parameter, before[key])}
    assert changed == {("head", "Linear")}


@pytest.mark.parametrize("loss", ["product", "sum"])
def test_a_dear_option_loses_if_the_cost_says_so(loss: str) -> None:
    def params(found: Architecture) -> float:
        return 10.0 + 1000.0 * (found["op"] == "linear")

    options: dict[str, Any] = {"reference": 10.0, "cost": params, "loss": loss, "strength": 5.0, "power": 6.0}
    found = two_path(Supernet(planted_op(), Blobs()), 40, alpha_lr=0.05, scale=1.0, **options)
    assert found.architecture["op"] != "linear"


def test_a_target_decides_the_size() -> None:
    supernet = Supernet(planted_width(), Blobs())
    sizes = {width: supernet.params({"width": width}) for width in (1, 16)}
    found = {
        target: distributions(Supernet(planted_width(), Blobs()), 40, alpha_lr=0.05, target=target, weight=20.0)
        for target in sizes.values()
    }
    assert {target: supernet.params(result.architecture) for target, result in found.items()} == {
        target: target for target in sizes.values()
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: tangle(s, 1, sampler="dart"), "unknown sampler 'dart'. Did you mean 'darts'"),
        (lambda s: tangle(s, 1, operations="all"), "unknown operations 'all'"),
        (lambda s: tangle(s, 1, norms="half"), "unknown norms 'half'"),
        (lambda s: two_path(s, 1, loss="mean"), "unknown loss 'mean'"),
        (lambda s: two_path(s, 1, reference=1.0), "reference is 1.0: give a cost above 1"),
        (lambda s: two_path(s, 1, every=0), "every is 0"),
        (lambda s: coded(s, 3), "restarts is 4: give a whole number from 1 to the number of steps, 3"),
        (lambda s: coded(s, 3, start="kaiming"), "unknown start 'kaiming'"),
        (lambda s: distributions(s, 1, target=-1.0), "target is -1.0"),
        (lambda s: distributions(s, 1, tolerance=1.0), "tolerance is 1.0"),
        (lambda s: tangle(Supernet(s.space), 1), "this supernet has no task"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[Supernet], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(Supernet(planted_op(), Blobs()))


def test_they_are_plug_ins() -> None:
    names = {"tangle": tangle, "two_path": two_path, "coded": coded, "distributions": distributions}
    assert {name: registry.resolve("relaxations", name) for name in names} == names
    supernet = Supernet(planted_op(), Blobs())
    found = registry.make("relaxations", "tangle", {"sampler": "gdas"}, {"supernet": supernet, "steps": 2, "seed": 0})
    assert isinstance(found, Relaxed) and not supernet.space.violated(found.architecture)


# ---- the batches --------------------------------------------------------------------------------------------------


class OnlyTraining:
    """A task that gives no validation samples."""

    def batch(self, n: int, seed: int) -> Batch:
        return Batch((torch.tensor([float(seed)]),), torch.zeros(1, dtype=torch.long))


class InParts(OnlyTraining):
    def batches(self, split: str) -> Iterator[Batch]:
        assert split == "val"
        return iter([self.batch(1, 7), self.batch(1, 8)])


def test_alphas_learn_from_the_validation_split_where_there_is_one() -> None:
    task = Blobs()
    assert torch.equal(Batches(task, None, 0).val(3).inputs[0], task.split("val").inputs[0])  # type: ignore[arg-type]
    parts = Batches(InParts(), 4, 0)  # type: ignore[arg-type]
    assert [float(parts.val(step).inputs[0]) for step in range(4)] == [7, 8, 7, 8]
    drawn = Batches(OnlyTraining(), 4, 0)  # type: ignore[arg-type]
    seeds = [float(batch.inputs[0]) for step in range(20) for batch in (drawn.train(step), drawn.val(step))]
    assert len(set(seeds)) == 40


def test_architecture_parameters_are_those_of_real_choices() -> None:
    space = joint()
    Choice("single", [1])
    alphas = Parameters(Supernet(space), {"outer": 3}).scatter(1e-3, 0)
    assert list(alphas.of) == ["inner"]
    whole = alphas.complete({"inner": torch.tensor([0.1, 0.9])})
    assert whole["outer"].tolist() == [0, 1, 0]
    many = Parameters(Supernet(gnn()), {}).scatter(0.5, 0)
    numbers = [x for values in many.of.values() for x in values.tolist()]
    assert 0.3 < statistics.pstdev(numbers) < 0.7
