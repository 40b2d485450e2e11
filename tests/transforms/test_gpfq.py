from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from nasgraph.errors import ConfigError
from nasgraph.transforms.base import transformed
from nasgraph.transforms.gpfq import columns, executed, gpfq, nearest_step, output_errors, paper_step, quantize_model
from nasgraph.transforms.quantize import Quantize
from nasgraph.transforms.quantizers import code_range

EDGES = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_gpfq(w: Tensor, x: Tensor, y: Tensor, step: float, low: int, high: int) -> list[int]:
    """One neuron, as the equation is written."""
    levels = [step * code for code in range(low, high + 1)]
    u, codes = torch.zeros(len(x), dtype=x.dtype), []
    for t in range(len(w)):
        u = u + w[t] * x[:, t]
        square = float(y[:, t] @ y[:, t])
        target = float(u @ y[:, t]) / square if square else float(w[t])
        best = min(range(len(levels)), key=lambda i: abs(levels[i] - target))
        u = u - levels[best] * y[:, t]
        codes.append(best + low)
    return codes


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000), st.booleans())
def test_gpfq_is_the_papers_equation(bits: int, neurons: int, inputs: int, seed: int, dead: bool) -> None:
    w, x = normal(neurons, inputs, seed=seed).double(), normal(20, inputs, seed=seed + 1).double()
    y = x + 0.1 * normal(20, inputs, seed=seed + 2).double()
    if dead:
        y[:, inputs // 2] = 0
    low, high = code_range(bits)
    step = paper_step(w, bits, "channel")
    found = gpfq(w, x.T @ y, y.T @ y, step, low, high)
    expected = [slow_gpfq(row, x, y, float(its), low, high) for row, its in zip(w, step, strict=True)]
    assert found.tolist() == expected


def test_error_on_random_relu_inputs_is_lower_than_that_of_the_nearest_levels() -> None:
    w, x = normal(32, 128).double(), normal(256, 128, seed=1).relu().double()
    for bits in (2, 3, 4):
        model = nn.Linear(128, 32, bias=False).double()
        model.weight.data.copy_(w)
        errors = {}
        for method in ("gpfq", "rtn"):
            rounded = quantize_model(nn.Sequential(model), [(x,)], bits, method=method)
            (errors[method],) = output_errors(nn.Sequential(model), rounded, [(x,)], ["0"])
        assert errors["gpfq"] < 0.85 * errors["rtn"]


def test_steps() -> None:
    rows = normal(5, 40).double()
    assert float(paper_step(rows, 3)) == pytest.approx(1.16 * float(rows.abs().amax(1).mean()) / 4)
    low, high = code_range(3)
    for per in ("tensor", "channel"):
        best = nearest_step(rows, 3, per)
        assert best.shape == ((1, 1) if per == "tensor" else (5, 1))

        def error(step: Tensor) -> float:
            return float((((rows / step).round().clamp(low, high) * step) - rows).square().sum())

        assert all(error(best) <= error(best * factor) * 1.01 for factor in (0.5, 0.8, 0.9, 1.1, 1.3, 2.0))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), groups=2),
        nn.Conv2d(4, 4, 3, padding="same", groups=4, padding_mode="reflect"),
    ],
)
def test_columns_times_weights_are_the_layer(conv: nn.Conv2d) -> None:
    x = normal(2, 4, 8, 9)
    parts = zip(columns(conv, x), conv.weight.flatten(1).chunk(conv.groups), conv.bias.chunk(conv.groups), strict=True)
    rows = torch.cat([part @ weight.T + bias for part, weight, bias in parts], 1)
    out = conv(x)
    torch.testing.assert_close(rows.reshape(2, *out.shape[2:], -1).permute(0, 3, 1, 2), out)


class Late(nn.Module):
    """Its layers run in another order than that in which they are declared, one of them twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.never = nn.Linear(8, 3), nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(self.first(x).relu()).relu().flatten(1))
        return out


def test_a_model_is_quantised_in_order_of_execution_and_its_codes_can_be_stored() -> None:
    model, batches = Late(), [(normal(16, 2, 2, 2, seed=seed),) for seed in range(2)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert executed(model, batches) == ["first", "last"]
    for per in ("tensor", "channel"):
        rounded = quantize_model(model, batches, 3, per=per)
        for name in ("first", "last"):
            layer: Any = rounded.get_submodule(name)
            codes, scale = layer.on_weight["quantize"].codes(layer.weight)
            assert torch.equal(codes * scale, layer.weight) and torch.equal(layer.effective_weight(), layer.weight)
            assert int(codes.min()) >= -4 and int(codes.max()) <= 3
            assert scale.numel() == (1 if per == "tensor" else layer.weight.shape[0])
        assert torch.equal(rounded.get_submodule("never").weight, model.never.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model.first) is nn.Conv2d


def test_a_later_layer_makes_up_for_the_errors_of_the_first() -> None:
    layers = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    for seed, layer in enumerate((layers[0], layers[2])):
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    batches = [(normal(64, 24, seed=seed),) for seed in range(4)]
    errors = {}
    for method in ("gpfq", "rtn"):
        rounded = quantize_model(layers, batches, 3, method=method)
        errors[method] = output_errors(layers, rounded, batches, ["0", "2"])
    assert errors["gpfq"][0] < errors["rtn"][0] and errors["gpfq"][1] < errors["rtn"][1]


def test_graph_convolutions_are_quantised_too() -> None:
    conv, x = GCNConv(6, 4), normal(4, 6)
    rounded = quantize_model(conv, [(x, EDGES)], 4)
    assert type(rounded.lin).__name__ == "TransformedLinear" and type(conv.lin).__name__ == "Linear"
    with torch.no_grad():
        assert float((rounded(x, EDGES) - conv(x, EDGES)).norm() / conv(x, EDGES).norm()) < 0.5


def test_quantised_activations_are_what_a_layer_reads() -> None:
    model = transformed(nn.Sequential(nn.Linear(6, 4)), [Quantize(activation_bits=4)])
    x = normal(8, 6)
    (read,) = columns(model[0], x)
    assert torch.equal(read, model[0].on_input["quantize"](x))
    assert quantize_model(model, [(x,)], 4)(x).shape == (8, 4)


def test_wrong_settings() -> None:
    model, batches = nn.Sequential(nn.Linear(3, 2)), [(normal(2, 3),)]
    for settings_, message in [
        ({"method": "gptq"}, "method is 'gptq': give gpfq or rtn"),
        ({"step": "best"}, "step is 'best': give paper or nearest"),
        ({"per": "group"}, "per is 'group': give tensor or channel"),
        ({"bits": 1}, "bits is 1: give 2 to 8"),
        ({"where": "head"}, "no linear or 2d-convolution layer at 'head' runs"),
    ]:
        with pytest.raises(ConfigError, match=message):
            quantize_model(model, batches, **{"bits": 4, **settings_})  # type: ignore[arg-type]
    quantised = transformed(model, [Quantize(weight_bits=4)])
    with pytest.raises(ConfigError, match="weight of '0' is already rewritten"):
        quantize_model(quantised, batches, 4)


def test_bits_may_be_given_by_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [(normal(32, 6),)]
    mixed = quantize_model(model, batches, {"0": 4, "2": 32, "4": 2})
    uniform = quantize_model(model, batches, 4)
    assert torch.equal(mixed[0].weight, uniform[0].weight)  # the first layer sees the same inputs
    assert torch.equal(mixed[2].weight, model[2].weight)
    assert len(mixed[4].weight.unique()) <= 3
    for wrong, says in (({"1": 4}, "no layer that runs is called '1'"), ({"0": 9}, "bits is 9"), (1, "bits is 1")):
        with pytest.raises(ConfigError, match=says):
            quantize_model(model, batches, wrong)  # type: ignore[arg-type]
