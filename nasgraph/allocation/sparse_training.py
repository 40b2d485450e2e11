"""Training that ends with a given sparsity, around any training loop: annealed masks, channels that go one by one.

Both are contexts: what trains within them, ``task.fit`` or a loop of your own, need not know of them. Annealing is also
a setting of this package's loop, ``TrainSettings(anneal=0.5)``, so of every search.

    with annealed_masks(model, steps=10 * len(task.epochs(0))):
        task.fit(model, TrainSettings(epochs=10), seed=0)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nasgraph.allocation.pruning import annealed_mask, group_step
from nasgraph.allocation.ranks import cubic
from nasgraph.errors import ConfigError
from nasgraph.transforms.layers import rewritten_layers
from nasgraph.transforms.prune import LearnedMask, SignedMask


@contextmanager
def annealed_masks(model: nn.Module, steps: int, seed: int = 0, start: float = 1.0) -> Iterator[None]:
    """Within, training of ``model`` sees :func:`~nasgraph.allocation.pruning.annealed_mask` instead of its masks.

    Each forward pass in training mode is a step: what a mask leaves out is there with a probability that falls from
    ``start`` to 0 over ``steps``, drawn anew each step, and learns while it is there. In evaluation mode, and after
    ``steps``, the masks are what they always are (Whitaker & Whitley, stochastic subnetwork annealing, 2024).

    Args:
        steps: at least 1; those of the whole fine-tuning, or fewer, so that the rest is with the final masks.
        seed: of the draws.

    Raises: ConfigError: no layer is masked, or a mask has learned scores, which would learn nothing from the draws.
    """
    masks = masks_of(model)
    if not masks:
        raise ConfigError("annealed_masks: no layer of the model has a mask: rewrite some with Prune first")
    if any(isinstance(mask, LearnedMask | SignedMask) for mask in masks):
        raise ConfigError("annealed_masks: masks of learned scores are not annealed: use magnitude or random")
    if steps < 1:
        raise ConfigError(f"annealed_masks: steps is {steps}: give at least 1")
    generator, done = torch.Generator().manual_seed(seed), -1

    def count(module: nn.Module, _: Any) -> None:
        nonlocal done
        done += module.training

    def anneal(mask: nn.Module, given: tuple[Tensor], masked: Tensor) -> Tensor:
        if not mask.training:
            return masked
        return given[0] * annealed_mask(masked.detach() != 0, min(1.0, max(0, done) / steps), generator, start)

    hooks = [model.register_forward_pre_hook(count), *(mask.register_forward_hook(anneal) for mask in masks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def masks_of(model: nn.Module) -> list[nn.Module]:
    """The masks of the layers that ``Prune`` has rewritten; a ratio of 1.0 has none."""
    return [layer.on_weight["prune"] for layer in rewritten_layers(model).values() if "prune" in layer.on_weight]


@contextmanager
def fewer_groups(
    layers: Mapping[str, nn.Module], budgets: Mapping[str, int], steps: int, strength: float = 0.01, axis: int = 0
) -> Iterator[None]:
    """Within, each optimizer step is followed by :func:`~nasgraph.allocation.pruning.group_step` on the weights.

    The number of slices along ``axis`` (0: output channels) that are not zero falls from all to ``budgets`` over
    ``steps``, fast first (:func:`~nasgraph.allocation.ranks.cubic`), and is exact after every step. A slice that is
    zero may come back while others shrink. The proximal step of the group sparse envelope decides which: Refael, Arbel
    & Huleihel 2022. Behind a BatchNorm a channel of zeros still gives a constant: cut the zeros out then
    (``nasgraph.transforms.structured.groups`` and ``Group.keep``) and fine-tune.

    Args:
        layers: by name, with a ``weight``; budgets: slices left in the end, for each of these names.
        strength: of each step: learning rate times regularisation.

    Raises: ConfigError: a layer without a budget, or a budget that is not between 1 and the layer's number of slices.
    """
    weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
    for name, weight in weights.items():
        if not 1 <= budgets.get(name, 0) <= weight.shape[axis]:
            raise ConfigError(f"fewer_groups: '{name}' has {weight.shape[axis]} slices and budget {budgets.get(name)}")
    done = 0

    @torch.no_grad()
    def shrink(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal done
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(weight) in own for weight in weights.values()):
            return  # of another model
        done += 1
        for name, weight in weights.items():
            left = cubic(done, 0, steps, weight.shape[axis], budgets[name])
            weight.copy_(group_step(weight, axis, strength, left))

    hook = register_optimizer_step_post_hook(shrink)
    try:
        yield
    finally:
        hook.remove()
