"""Each proxy against its equation, worked by hand or by plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nasgraph import registry
from nasgraph.errors import NotFinite
from nasgraph.predictors.zero_cost import (
    flops,
    grad_norm,
    gradsign,
    jacov,
    live_params,
    naswot,
    ntk_cond,
    params,
    snip,
    synflow,
    zico,
)
from nasgraph.predictors.zero_cost.gradsign import signs_of
from nasgraph.predictors.zero_cost.per_sample import losses, per_sample_gradients
from nasgraph.predictors.zero_cost.proxy import prepared
from nasgraph.tasks.batch import Batch
from nasgraph.testing import node_batch, node_model, plain_batch, plain_model


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


def loss_gradients(model: nn.Module, batch: Batch, rows: slice) -> list[torch.Tensor]:
    loss = batch.losses(batch.outputs(model))[rows].mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_gradsign_of_two_samples_worked_by_hand() -> None:
    # With equal logits softmax gives 1/2 to each of the two classes, so dl/dz = (-1/2, 1/2) for class 0, and
    # dl/dW = dl/dz x^T. Sample (1, 2) of class 0: signs ((-, -), (+, +)). Sample (3, -1) of class 1: ((+, -), (-, +)).
    # Sum of signs: ((0, -2), (0, 2)); of absolute values: 4. Bias: (-, +) and (+, -) cancel.
    batch = Batch((torch.tensor([[1.0, 2.0], [3.0, -1.0]]),), torch.tensor([0, 1]))
    assert gradsign(linear([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]), batch) == 4.0
    # Of the same class, they agree where their features do: column 0 of both rows, and on both biases: 2 * (2 + 2).
    same = Batch(batch.inputs, torch.tensor([0, 0]))
    assert gradsign(linear([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]), same) == 8.0


def test_gradsign_bounds() -> None:
    x = torch.ones(5, 3)
    score = gradsign(linear([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]), Batch((x,), torch.zeros(5, dtype=torch.long)))
    assert score == 5 * 6  # identical samples agree on all of m = 6 parameters


def test_gradsign_does_not_see_the_scale_of_the_loss() -> None:
    class Scaled(Batch):
        def losses(self, outputs: torch.Tensor) -> torch.Tensor:
            return 1000 * super().losses(outputs)

    model = node_model("gcn", "layer").eval().double()
    batch = node_batch(torch.float64)
    plain = torch.cat(list(per_sample_gradients(model, batch, losses)))
    scaled = torch.cat(
        list(per_sample_gradients(model, Scaled(batch.inputs, batch.target, batch.index), losses, fast=False))
    )
    assert torch.equal(signs_of(plain), signs_of(scaled))
    assert not torch.allclose(plain, scaled)


def test_rounding_noise_has_no_sign() -> None:
    gradients = torch.tensor([[1.0, -1e-16, 1e-12, 0.0], [1e-16, -1e-20, 3e-33, -1e-40]], dtype=torch.float64)
    assert signs_of(gradients).tolist() == [[1, 0, 1, 0], [1, -1, 0, 0]]


def test_gradsign_of_a_gatv2_whose_softmax_cancels_counts_nothing_for_it() -> None:
    # Positive weights and features: every LeakyReLU is on its linear side, so the target's own term leaves the softmax.
    from torch_geometric.nn import GATv2Conv

    batch = node_batch()
    batch = Batch((batch.inputs[0].abs() + 0.1, batch.inputs[1]), batch.target, batch.index)
    model = GATv2Conv(5, 3, bias=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.abs_()
    whole = gradsign(model, batch)
    model.lin_r.requires_grad_(False)
    assert gradsign(model, batch) == whole


def test_snip_is_weight_times_gradient() -> None:
    model, batch = plain_model(), plain_batch()
    grads = loss_gradients(model, batch, slice(None))
    expected = sum(float((p.detach() * g).abs().sum()) for p, g in zip(model.parameters(), grads, strict=True))
    assert snip(model, batch) == pytest.approx(expected, rel=1e-6)


def test_grad_norm_is_the_sum_over_weights() -> None:
    model, batch = plain_model(), plain_batch()
    expected = sum(float(g.norm()) for g in loss_gradients(model, batch, slice(None)) if g.dim() >= 2)
    assert grad_norm(model, batch) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("parts", [2, 5])
def test_zico_is_the_log_of_mean_over_std(parts: int) -> None:
    model, batch = plain_model(), plain_batch()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    by_part = [loss_gradients(model, batch, order[b::parts]) for b in range(parts)]
    expected = 0.0
    for layer in (0, 2):  # weights; 1 and 3 are biases
        g = torch.stack([part[layer] for part in by_part]).double().numpy()
        mean, std = abs(g).mean(0), g.std(0)
        expected += math.log((mean[std > 0] / std[std > 0]).sum())
    assert zico(model, batch, parts) == pytest.approx(expected, rel=1e-4)


def test_synflow_of_a_linear_chain_in_closed_form() -> None:
    # R = 1^T |W2| |W1| 1 for each row; theta dR/dtheta summed over one layer's weights is R again, so the score is 2 R.
    w1, w2 = [[1.0, -2.0], [3.0, 4.0]], [[-1.0, 5.0]]
    r = 1 * (1 + 2) + 5 * (3 + 4)
    batch = Batch((torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),), torch.zeros(3, dtype=torch.long))
    assert synflow(nn.Sequential(linear(w1), linear(w2)), batch) == pytest.approx(math.log(3 * 2 * r), rel=1e-12)
    # Norms are passed by, and their own weights count nothing.
    with_norms = nn.Sequential(linear(w1), nn.BatchNorm1d(2), nn.LayerNorm(2), nn.ReLU(), linear(w2))
    assert synflow(with_norms, batch) == pytest.approx(math.log(3 * 2 * r), rel=1e-12)


def test_synflow_passes_by_the_norms_of_pyg() -> None:
    from torch_geometric.nn import BatchNorm, GraphNorm

    batch = node_batch()
    model = node_model("gcn", "layer")
    scores = []
    for norm in (BatchNorm(8), GraphNorm(8), nn.Identity()):
        model.norm = norm
        scores.append(synflow(model, batch))
    assert scores[0] == scores[1] == scores[2]


def test_synflow_that_leaves_float64_is_not_finite() -> None:
    wide = [nn.Linear(4, 4) for _ in range(60)]
    with torch.no_grad():
        for layer in wide:
            layer.weight.fill_(1e10)
    with pytest.raises(NotFinite):
        synflow(nn.Sequential(*wide), Batch((torch.ones(2, 4),), torch.tensor([0, 1])))
    with pytest.raises(NotFinite, match="nothing flows"):
        synflow(linear([[0.0, 0.0]]), Batch((torch.ones(2, 2),), torch.tensor([0, 0])))


def test_naswot_by_counting_agreements() -> None:
    model, batch = plain_model(), plain_batch()
    fires = (model[0](batch.inputs[0]) > 0).tolist()
    agree = torch.tensor([[sum(a == b for a, b in zip(p, q, strict=True)) for q in fires] for p in fires]).double()
    expected = torch.logdet(agree + 1e-6 * 12 * torch.eye(10, dtype=torch.float64))
    assert naswot(model, batch) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.LeakyReLU(), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.PReLU()])
def test_naswot_reads_any_activation_as_module_or_function(module: nn.Module) -> None:
    class Functional(nn.Module):
        def __init__(self, layers: nn.Sequential) -> None:
            super().__init__()
            self.a, self.b = layers[0], layers[2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.a(x)))

    model, batch = plain_model(), plain_batch()
    expected = naswot(model, batch)
    assert naswot(Functional(model), batch) == expected
    assert naswot(nn.Sequential(model[0], module, model[2]), batch) == expected  # the code is taken before it


def test_naswot_without_an_activation_has_no_score() -> None:
    with pytest.raises(NotFinite, match="no activation"):
        naswot(linear([[1.0, 2.0]]), Batch((torch.ones(2, 2),), torch.tensor([0, 0])))


def test_jacov_of_uncorrelated_and_of_equal_samples() -> None:
    # y = sum(s_i * x_i) with s_i orthogonal and of mean 0: corr(J) = I, so every v is 1.
    class Rows(nn.Module):
        def __init__(self, signs: list[list[float]]) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(signs))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight * x).sum(1, keepdim=True)

    batch = Batch((torch.ones(2, 4),), torch.tensor([0, 0]))
    v = 1 + 1e-5
    score = jacov(Rows([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]]), batch)
    assert score == pytest.approx(-2 * (math.log(v) + 1 / v), rel=1e-9)
    equal = jacov(Rows([[1.0, -1.0, 1.0, -1.0]] * 2), batch)  # v = 0 and 2
    assert equal == pytest.approx(-(math.log(1e-5) + 1e5 + math.log(2 + 1e-5) + 1 / (2 + 1e-5)), rel=1e-9)
    dead = jacov(Rows([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]), batch)  # v = 0 and 1
    assert dead == pytest.approx(-(math.log(1e-5) + 1e5 + math.log(v) + 1 / v), rel=1e-9)
    with pytest.raises(NotFinite):
        jacov(Rows([[0.0] * 4] * 2), batch)


@pytest.mark.parametrize("conv", ["gat", "gcn", "gen", "fc"])
def test_ntk_against_an_explicit_jacobian(conv: str) -> None:
    batch = node_batch(torch.float64)
    model = prepared(node_model(conv, "layer").double(), batch)  # GENConv holds a BatchNorm
    weights = dict(model.named_parameters())

    def summed(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, batch.inputs)[batch.index].sum(1)

    explicit = torch.autograd.functional.jacobian
    blocks = [explicit(lambda w, name=name: summed({**weights, name: w}), p) for name, p in weights.items()]
    jacobian = torch.cat([block.flatten(1) for block in blocks], 1)
    # Singular values of J itself, not eigenvalues of J J^T: accurate where the condition number is large.
    values = torch.linalg.svdvals(jacobian)
    assert ntk_cond(node_model(conv, "layer"), node_batch()) == pytest.approx(
        2 * math.log(float(values[-1] / values[0])), rel=1e-5
    )


def test_ntk_by_hand_and_of_equal_samples() -> None:
    # One output w . x: K = X X^T = diag(9, 4), condition number 9/4. Two equal samples: singular, the stated floor.
    model = linear([[1.0, 1.0]])
    target = torch.tensor([0, 0])
    assert ntk_cond(model, Batch((torch.tensor([[3.0, 0.0], [0.0, 2.0]]),), target)) == pytest.approx(math.log(4 / 9))
    floor = math.log(2 * torch.finfo(torch.float64).eps)
    assert ntk_cond(model, Batch((torch.ones(2, 2),), target)) == pytest.approx(floor)


def test_counts() -> None:
    model, batch = plain_model(), plain_batch()
    size = 6 * 12 + 12 + 12 * 3 + 3
    assert params(model, batch) == live_params(model, batch) == size
    assert flops(model, batch) == 2 * 10 * (6 * 12 + 12 * 3)


def test_live_params_counts_what_the_output_depends_on() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.computed, self.never = nn.Linear(6, 3), nn.Linear(6, 4), nn.Linear(9, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.computed(x)
            return self.used(x) * 0.0  # reached, though its gradient is zero

    model = Partly()
    assert live_params(model, plain_batch()) == 6 * 3 + 3
    model.used.requires_grad_(False)
    assert live_params(model, plain_batch()) == 6 * 3 + 3
    assert params(model, plain_batch()) == 6 * 3 + 3 + 6 * 4 + 4 + 90


def test_a_model_without_parameters() -> None:
    batch = plain_batch()
    model = nn.Sequential(nn.ReLU())
    assert params(model, batch) == live_params(model, batch) == flops(model, batch) == 0.0
    for proxy in (gradsign, snip, grad_norm, zico, synflow, ntk_cond):
        with pytest.raises(NotFinite, match="no trainable parameter"):
            proxy(model, batch)


def test_lora_adapters_at_zero_have_no_saliency() -> None:
    class LoRA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(6, 3).requires_grad_(False)
            self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.b(self.a(x))

    for proxy in (snip, synflow):
        with pytest.raises(NotFinite):
            proxy(LoRA(), plain_batch())
    assert gradsign(LoRA(), plain_batch()) > 0


def test_batch_norm_holds_the_statistics_of_the_batch() -> None:
    # A BatchNorm over features of mean 100 and variance 0 or 1 in its buffers: the buffers of the caller do not matter.
    def model(mean: float) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
        layers[1].running_mean.fill_(mean)
        return layers

    with torch.random.fork_rng(devices=[]):
        fresh, trained = model(0.0), model(100.0)
    batch = plain_batch()
    assert snip(fresh, batch) == snip(trained, batch)
    by_hand = plain_batch()
    pre = fresh[0](batch.inputs[0])
    scaled = (pre - pre.mean(0)) / (pre.var(0) + 1e-5).sqrt()
    assert naswot(fresh, batch) == naswot(nn.Sequential(nn.ReLU(), fresh[3]), Batch((scaled,), by_hand.target))


def test_too_few_samples_and_lazy_parameters_are_refused() -> None:
    one = Batch((torch.ones(1, 6),), torch.tensor([0]))
    for proxy in (zico, jacov, ntk_cond):
        with pytest.raises(ValueError, match="at least"):
            proxy(plain_model(), one)
    lazy = nn.Sequential(nn.LazyLinear(3))
    for name in registry.names("proxies"):
        with pytest.raises(ValueError, match="run the model once"):
            registry.resolve("proxies", name)(lazy, plain_batch())


def test_graph_level_tasks() -> None:
    from torch_geometric.nn import GCNConv, global_mean_pool

    class OfGraphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.a, self.b, self.c = GCNConv(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, edge_index: torch.Tensor, graph: torch.Tensor) -> torch.Tensor:
            pooled = global_mean_pool(self.a(x, edge_index).relu(), graph)
            return self.c(self.b(pooled).relu())

    x, edges = node_batch().inputs
    four = torch.arange(24) // 6
    batch = Batch((x, edges[:, four[edges[0]] == four[edges[1]]], four), torch.tensor([0, 1, 2, 0]))
    for proxy in (gradsign, snip, grad_norm, zico, synflow, naswot, ntk_cond, params, live_params, flops):
        assert proxy(OfGraphs(), batch) != 0.0
    with pytest.raises(ValueError, match="a row for each row"):
        jacov(OfGraphs(), batch)
