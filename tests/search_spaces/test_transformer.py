"""Transformers: sizes by equation, attention against the equation, masks, slices of a supernet."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.objectives.cost import count_flops
from nasgraph.predictors.zero_cost import gradsign, live_params, naswot, ntk_cond, params, zico
from nasgraph.predictors.zero_cost.per_sample import logit_sums, losses, per_sample_gradients
from nasgraph.search_spaces.transformer import Positions, SelfAttention, transformer_decoder, transformer_encoder
from nasgraph.space import Architecture, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks.batch import Batch
from nasgraph.testing import SpaceExam

HEAD = 4  # channels of a head in these tests
SIZES: dict[str, Any] = {"layers": 2, "widths": (8, 12), "heads": (1, 2, 3), "ratios": (1, 2), "head_width": HEAD}


def encoder(**arguments: Any) -> SearchSpace:
    return transformer_encoder(features=5, classes=3, length=6, **{**SIZES, **arguments})


def decoder(**arguments: Any) -> SearchSpace:
    return transformer_decoder(vocabulary=11, length=7, **{**SIZES, **arguments})


def inputs(space: SearchSpace, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    if "tokens" in space.inputs:
        return torch.randint(11, (n, 7), generator=generator)
    return torch.randn(n, 6, 5, generator=generator)


def samples(space: SearchSpace, n: int) -> list[Architecture]:
    rng = random.Random(0)
    return [space.sample(rng) for _ in range(n)]


class TestEncoder(SpaceExam):
    space = staticmethod(encoder)
    classes = 3
    samples = 10
    exported = 1


class TestDecoder(SpaceExam):
    space = staticmethod(decoder)
    classes = 11
    samples = 10
    exported = 1


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [encoder, decoder])
def test_size_by_equation(make: Callable[..., SearchSpace]) -> None:
    """Widths times the sum over depths d of (heads * ratios) ** d."""
    assert make().size() == 2 * ((3 * 2) + (3 * 2) ** 2)
    assert sum(1 for _ in make().enumerate()) == make().size()
    assert transformer_encoder().size() == transformer_decoder().size() == 3 * (9 + 9**2 + 9**3 + 9**4) == 22_140


def expected_params(arch: Mapping[str, Any], enter: int, length: int, leave: int) -> int:
    """Embedding without its bias ``enter`` x d, positions, blocks, norm, head."""
    d = arch["width"]
    total = enter * d + length * d + 2 * d + d * leave + leave
    for i in range(1, int(arch["depth"]) + 1):
        inner, hidden = arch[f"heads{i}"] * HEAD, d * arch[f"ratio{i}"]
        total += 2 * d + (d * 3 * inner + 3 * inner) + (inner * d + d)
        total += 2 * d + (d * hidden + hidden) + (hidden * d + d)
    return total


def test_parameters_by_equation() -> None:
    for arch in samples(encoder(), 20):
        bias = arch["width"]
        assert params(build(encoder(), arch), Batch((), torch.zeros(1))) == expected_params(arch, 5, 6, 3) + bias
    for arch in samples(decoder(), 20):
        assert params(build(decoder(), arch), Batch((), torch.zeros(1))) == expected_params(arch, 11, 7, 11)


def test_flops_by_equation() -> None:
    """A multiply-add counts as 2; attention as 2 * 2 * heads * length^2 * head width, causal or not."""
    for arch in samples(decoder(), 10):
        n, length, d = 3, 7, arch["width"]
        expected = d * 11
        for i in range(1, int(arch["depth"]) + 1):
            inner, hidden = arch[f"heads{i}"] * HEAD, d * arch[f"ratio{i}"]
            expected += 3 * d * inner + inner * d + 2 * d * hidden + 2 * length * inner
        assert count_flops(build(decoder(), arch), (inputs(decoder(), n),)) == 2 * n * length * expected


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"length": 0}, {"head_width": 0}, {"layers": True}])
def test_wrong_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SpaceError, match=f"{next(iter(wrong))} is .* at least 1"):
        transformer_decoder(**wrong)


# ---- what it computes -----------------------------------------------------------------------------------------------


def plain_attention(module: SelfAttention, x: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, a head and a position at a time (Vaswani et al. 2017, eq. 1)."""
    heads, width = module.heads, module.head_width
    projected = x @ module.enter.weight.T + module.enter.bias
    query, key, value = (part.split(width, dim=-1) for part in projected.split(heads * width, dim=-1))
    mixed = torch.zeros(*x.shape[:2], heads * width, dtype=x.dtype)
    for n, i, h in itertools.product(range(x.shape[0]), range(x.shape[1]), range(heads)):
        seen = i + 1 if module.causal else x.shape[1]
        scores = torch.stack([query[h][n, i] @ key[h][n, j] for j in range(seen)]) / math.sqrt(width)
        mixed[n, i, h * width : (h + 1) * width] = torch.softmax(scores, dim=0) @ value[h][n, :seen]
    return mixed @ module.leave.weight.T + module.leave.bias


@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_equation(causal: bool) -> None:
    torch.manual_seed(0)
    module = SelfAttention(embed_dim=6, heads=3, head_width=4, causal=causal).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain_attention(module, x))


def test_a_later_token_changes_no_output_before_it() -> None:
    space = decoder()
    for arch in samples(space, 10):
        model, tokens = build(space, arch).eval(), inputs(space, 2)
        before = model(tokens)
        for place in range(7):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 1) % 11
            after = model(changed)
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.allclose(after[:, place:], before[:, place:])


def test_the_encoder_sees_everything() -> None:
    space = encoder()
    model, x = build(space, samples(space, 1)[0]).double().eval(), inputs(space, 1).double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, 0], x)
    assert (gradient.abs().sum(dim=-1) > 0).all()


def test_positions_matter_and_are_learned() -> None:
    module = Positions(embed_dim=3, length=4)
    x = torch.zeros(2, 4, 3)
    assert torch.equal(module(x)[0], module.weight) and torch.equal(module(x)[1], module.weight)
    assert module.weight.requires_grad and module.weight.std() > 0


def test_depth_is_the_block_that_the_norm_reads() -> None:
    """So the blocks behind it are not there, and those before it are the same."""
    space = encoder()
    deep = {"depth": "2", "width": 8, "heads1": 1, "ratio1": 1, "heads2": 2, "ratio2": 1}
    one, two = build(space, {**deep, "depth": "1"}), build(space, deep)
    assert {name for name, _ in two.named_children()} - {name for name, _ in one.named_children()} == {
        *("attend2", "attend2_norm", "feed2_norm", "feed2_up", "feed2_act", "feed2_down")
    }
    assert torch.equal(one.get_submodule("attend1.enter").weight, two.get_submodule("attend1.enter").weight)


def test_dropout_is_in_the_network_only_if_asked() -> None:
    arch = samples(encoder(), 1)[0]
    assert not any(isinstance(module, nn.Dropout) for module in build(encoder(), arch).modules())
    rates = [module.p for module in build(encoder(dropout=0.1), arch).modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.1] * 2 * int(arch["depth"])


# ---- in a supernet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("make", [encoder, decoder])
def test_a_subnet_is_its_slice(make: Callable[[], SearchSpace], n: int) -> None:
    supernet = Supernet(make())
    x = inputs(supernet.space, n)
    for arch in samples(supernet.space, 40):
        alone, shared = supernet.extract(arch), supernet.subnet(arch)
        for training in (False, True):
            assert torch.equal(alone.train(training)(x), shared.train(training)(x)), arch


def test_fewer_heads_are_the_first_whole_heads() -> None:
    """The store's largest form has 3 heads; one of 2 attends as those heads do, by an equation over the store."""
    supernet = Supernet(decoder())
    enter = supernet.store["attend1", "SelfAttention", "enter.weight"].detach()
    leave = supernet.store["attend1", "SelfAttention", "leave.weight"].detach()
    arch = {"depth": "1", "width": 8, "heads1": 2, "ratio1": 1}
    module = supernet.extract(arch).get_submodule("attend1")
    for part, head in itertools.product(range(3), range(2)):
        mine = module.enter.weight[(part * 2 + head) * HEAD : (part * 2 + head + 1) * HEAD]
        stored = enter[(part * 3 + head) * HEAD : (part * 3 + head + 1) * HEAD]
        assert torch.equal(mine, stored[:, :8])
        assert torch.equal(module.leave.weight[:, head * HEAD : (head + 1) * HEAD], leave[:8, head * HEAD :][:, :HEAD])


def test_gradients_of_a_slice_are_those_of_the_network_alone() -> None:
    supernet = Supernet(decoder())
    x = inputs(supernet.space, 3)
    for arch in samples(supernet.space, 10):
        alone, shared = supernet.extract(arch), supernet.subnet(arch)
        for parameter in supernet.parameters():
            parameter.grad = None
        alone(x).square().sum().backward()
        shared(x).square().sum().backward()
        own = dict(alone.named_parameters())
        for piece in supernet._structure(arch).pieces:
            stored, expected = supernet.store[piece.key].grad, own[piece.name].grad
            assert stored is not None and expected is not None
            assert torch.equal(stored if piece.cut is None else piece.cut(stored), expected)
            assert stored.count_nonzero() == expected.count_nonzero()


# ---- proxies see sequences ------------------------------------------------------------------------------------------


def sequences(space: SearchSpace) -> Batch:
    x = inputs(space, 5)
    labels = torch.arange(35).view(5, 7) % 11 if "tokens" in space.inputs else torch.arange(5) % 3
    return Batch((x,), labels)


@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize("value", [losses, logit_sums])
def test_per_sample_gradients_take_the_quick_route(make: Callable[[], SearchSpace], value: Any) -> None:
    """Under vmap, they are those of the plain loop over samples; a sample is a sequence."""
    space = make()
    model, batch = build(space, samples(space, 3)[2]).double().eval(), sequences(space)
    batch = Batch(tuple(x.double() if x.is_floating_point() else x for x in batch.inputs), batch.target)
    quick = list(per_sample_gradients(model, batch, value))
    assert [len(rows) for rows in quick] == [5]
    slow = torch.cat(list(per_sample_gradients(model, batch, value, fast=False)))
    torch.testing.assert_close(torch.cat(quick), slow)


@pytest.mark.parametrize("make", [encoder, decoder])
def test_proxies_score_transformers(make: Callable[[], SearchSpace]) -> None:
    space = make()
    for arch in samples(space, 3):
        model, batch = build(space, arch), sequences(space)
        for proxy in (gradsign, naswot, ntk_cond, zico, live_params):
            assert math.isfinite(proxy(model, batch))
        assert live_params(model, batch) == sum(p.numel() for p in model.parameters())
