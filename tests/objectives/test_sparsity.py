from __future__ import annotations

import pytest
import torch
from torch import nn

from nasgraph.objectives.sparsity import count_kept_flops, count_kept_parameters
from nasgraph.transforms.base import transformed
from nasgraph.transforms.prune import Prune


@pytest.mark.parametrize("scores", ["magnitude", "random", "learned", "signed"])
def test_what_masks_leave(scores: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 4, 8))
    model = transformed(model, [Prune(keep=0.25, scores=scores)])
    assert count_kept_parameters(model) == (6 * 2 * 9 + 24 * 8) // 4 + 6 + 8
    assert count_kept_flops(model, (torch.zeros(3, 4, 4, 4),)) == 3 * 2 * (27 * 4 + 48)
    bare = nn.Linear(4, 2)
    assert count_kept_parameters(bare) == 10 and count_kept_flops(bare, (torch.zeros(3, 4),)) == 48


def test_zeros_that_no_mask_made_count_as_kept() -> None:
    layer = nn.Linear(8, 4, bias=False)
    nn.init.zeros_(layer.weight)
    assert count_kept_parameters(transformed(layer, [Prune(keep=0.5)])) == 16
