"""How much of each layer stays, by a knapsack; and which weights and groups go.

First the allocator: a table of what each keep ratio spoils in each layer, a table of what it costs, and the exact
knapsack over both. Then functions of tensors: a proximal step with an exact budget, annealed masks, mask repair. None
of them trains: see ``sparse_training.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nasgraph.allocation.bits import layers_of
from nasgraph.allocation.knapsack import knapsack
from nasgraph.tasks.batch import Batch
from nasgraph.transforms.damage import lost_signal
from nasgraph.transforms.layers import plain_linears
from nasgraph.transforms.prune import kept, largest

Table = Mapping[str, Mapping[float, float]]  # layer -> keep ratio -> number


@torch.no_grad()
def keep_sensitivity(
    model: nn.Module, batch: Batch, ratios: Sequence[float], structure: str = "unstructured", where: str = "*"
) -> dict[str, dict[float, float]]:
    """:func:`~nasgraph.transforms.damage.lost_signal` when one layer alone is masked by magnitude.

    Of each layer of ``model`` at ``where`` at each of ``ratios``, with a mask as ``Prune(keep=ratio)`` has it. The
    model is one without masks, trained; it runs in evaluation mode, in a copy.
    Raises: ConfigError: no layer at ``where``.
    """
    model = plain_linears(copy.deepcopy(model)).eval()
    damage = lost_signal(model, batch)
    table: dict[str, dict[float, float]] = {}
    for name, layer in layers_of(model, where).items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        whole = weight.clone()
        table[name] = {}
        for ratio in ratios:
            weight.copy_(whole * kept(whole.abs(), ratio, structure))
            table[name][ratio] = damage(model)
        weight.copy_(whole)
    return table


@torch.no_grad()
def keep_costs(
    model: nn.Module, inputs: Sequence[Tensor], ratios: Sequence[float], what: str = "flops", where: str = "*"
) -> dict[str, dict[float, float]]:
    """What each layer of ``model`` at ``where`` costs at each of ``ratios``: kept ``"flops"`` or ``"weights"``.

    FLOPs are 2 for each kept weight and output position, as ``kept_flops`` counts them on ``inputs``; an embedding has
    none. Raises: ValueError: another ``what``. ConfigError: no layer at ``where``.
    """
    if what not in ("flops", "weights"):
        raise ValueError(f"costs in {what!r}: give flops or weights")
    model = plain_linears(copy.deepcopy(model)).eval()
    layers = layers_of(model, where)
    positions = dict.fromkeys(layers, 0)

    def count(name: str, out: Tensor) -> None:
        layer = layers[name]
        if not isinstance(layer, nn.Embedding):
            positions[name] += out.numel() // len(layer.weight)  # type: ignore[arg-type]

    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: count(name, out)) for name, layer in layers.items()
    ]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}  # type: ignore[operator]
    each = {name: 2 * positions[name] if what == "flops" else 1 for name in layers}
    return {name: {r: float(each[name] * max(1, round(r * sizes[name]))) for r in ratios} for name in layers}


def keep_ratios(sensitivity: Table, costs: Table, budget: float) -> dict[str, float]:
    """The keep ratio of each layer that together spoil least within the budget: :func:`.knapsack.knapsack`, exact.

    Raises: ValueError: even the smallest ratios cost more than ``budget``, or a layer or ratio without a cost.
    """
    for name, ratio in ((name, ratio) for name, row in sensitivity.items() for ratio in row):
        if ratio not in costs.get(name, {}):
            raise ValueError(f"layer '{name}' at keep ratio {ratio} has no cost")
    options = {name: list(row) for name, row in sensitivity.items()}
    values = [[-sensitivity[name][ratio] for ratio in row] for name, row in options.items()]
    prices = [[costs[name][ratio] for ratio in row] for name, row in options.items()]
    picked = knapsack(values, prices, budget)
    return {name: row[i] for (name, row), i in zip(options.items(), picked.options, strict=True)}


def envelope_prox(norms: Tensor, weights: Tensor, strength: float, budget: float) -> Tensor:
    """Factors by which the proximal step of the group sparse envelope shrinks each group; their support is the budget.

    The envelope ``R(w) = min over u in [0, 1], sum u <= k, of sum_j d_j |w_j|^2 / (2 u_j)`` is a convex stand-in for
    "at most k groups are not zero". ``prox(z)_j = z_j u_j / (u_j + s d_j)`` with strength ``s`` and
    ``u_j = clip(|z_j| sqrt(s d_j / (2 mu)) - s d_j, 0, 1)``, ``mu`` such that ``sum u = k`` (WGSEF: Refael, Arbel &
    Huleihel, "Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization", 2022).
    All ``u`` are 1 if no more than k groups are not zero.

    Args:
        norms: L2 norms of the groups ``(groups,)``.
        weights: ``d``, positive, ``(groups,)``: 1, or the sizes of the groups.
        strength: of the step (learning rate times regularisation), above 0.
        budget: k, in groups; may be a fraction.

    Returns: factors in [0, 1), float64 ``(groups,)``.
    Raises: ValueError: a strength or budget of 0 or less, or weights that are not positive.
    """
    if strength <= 0 or budget <= 0 or bool((weights <= 0).any()):
        raise ValueError("envelope_prox: strength, budget and weights must be above 0")
    z, d = norms.double(), strength * weights.double()
    live = z > 0
    if budget >= int(live.sum()):
        return live / (1 + d)

    def shares(root: float) -> Tensor:  # root = 1 / sqrt(2 mu)
        return (d.sqrt() * z * root - d).clamp(0, 1)

    low, high = 0.0, float(((1 + d) / (d.sqrt() * z))[live].max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shares(middle).sum()) < budget else (low, middle)
    u = shares(high)
    return u / (u + d)


def group_step(weight: Tensor, axis: int, strength: float, budget: int) -> Tensor:
    """:func:`envelope_prox` of the slices of ``weight`` along ``axis``, then exactly ``budget`` of them kept.

    Those with the largest factors stay, of equals the first: the envelope alone may leave a fraction of a group.
    Returns: a tensor like ``weight``. Raises: ValueError: ``budget`` is not between 1 and the number of slices.
    """
    rows = weight.detach().movedim(axis, 0).flatten(1)
    if not 1 <= budget <= len(rows):
        raise ValueError(f"budget is {budget} of {len(rows)} groups")
    norms = rows.double().norm(dim=1)
    factors = envelope_prox(norms, torch.ones_like(norms), strength, budget)
    factors = torch.where(largest(factors, budget), factors, 0.0).to(weight.dtype)
    return weight * factors.view(-1, *[1] * (weight.dim() - 1)).movedim(0, axis)


def annealed_mask(mask: Tensor, progress: float, generator: torch.Generator, start: float = 1.0) -> Tensor:
    """Stochastic subnetwork annealing: what ``mask`` keeps stays, the rest is there with a probability that falls to 0.

    The probability is ``start * (1 + cos(pi progress)) / 2`` (Whitaker & Whitley 2024). For fine-tuning: drawn anew at
    each step, and ``mask`` itself from ``progress`` 1 on.

    Args:
        mask: bool, any shape.
        progress: share of the fine-tuning that is done, in [0, 1].

    Raises: ValueError: a progress or start outside [0, 1].
    """
    if not (0 <= progress <= 1 and 0 <= start <= 1):
        raise ValueError(f"progress {progress} and start {start} must be in [0, 1]")
    chance = start * (1 + math.cos(math.pi * progress)) / 2
    drawn = torch.rand(mask.shape, generator=generator, device=generator.device).to(mask.device) < chance
    return mask | drawn


def repaired_mask(
    weight: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, norm: Tensor, cycles: int = 50, close: float = 0.1
) -> Tensor:
    """Dynamic sparsity without training (DSnoT): entries change places so that each output's mean error shrinks.

    Of a row, ``e = sum over pruned of w E[x]``. A cycle revives the pruned entry that reduces ``|e|`` most per
    variance, ``w E[x] sign(e) / Var[x]``, and prunes the kept one of least ``|w| |x|_2`` whose ``w E[x]`` has the
    opposite sign, so that ``|e|`` shrinks too; as many stay as before. A row stops when ``|e| < close``, when ``e``
    changes its sign, or when nothing is left to change (Zhang et al., ICLR 2024).

    Args:
        weight, mask: of a linear layer, ``(out, in)``; mask bool.
        mean, variance, norm: of the layer's inputs over the data, ``(in,)``; norm is the L2 norm.

    Returns: bool ``(out, in)``. Rows keep their numbers of entries.
    """
    found = mask.clone()
    moves = weight.detach() * mean
    error = (moves * ~found).sum(dim=1)
    sign = error.sign()
    cost = weight.detach().abs() * norm
    active = torch.ones_like(sign, dtype=torch.bool)
    rows = torch.arange(len(weight), device=weight.device)
    for _ in range(cycles):
        active &= (error.abs() >= close) & (error.sign() == sign)
        gain = torch.where(found, -math.inf, moves * sign[:, None] / variance.clamp(min=1e-12))
        loss = torch.where(found & (moves * sign[:, None] < 0), cost, math.inf)
        revived, pruned = gain.argmax(dim=1), loss.argmin(dim=1)
        active &= (gain[rows, revived] > 0) & loss[rows, pruned].isfinite()
        if not bool(active.any()):
            break
        which = rows[active]
        found[which, revived[which]] = True
        found[which, pruned[which]] = False
        error[which] += moves[which, pruned[which]] - moves[which, revived[which]]
    return found
