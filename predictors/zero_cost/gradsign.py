"""GradSign: do the samples agree on the direction in which each parameter should move?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nasgraph.predictors.zero_cost.per_sample import losses, per_sample_gradients
from nasgraph.predictors.zero_cost.proxy import cast_to, positive, proxy, trainable
from nasgraph.tasks.batch import Batch


@proxy(needs_labels=True, source="Zhang & Jia, ICLR 2022")
def gradsign(model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float64) -> float:
    """Sign agreement of per-sample gradients at initialisation (Zhang & Jia, ICLR 2022, Algorithm 1).

    ``tau = sum_k | sum_i sign(dl_i / dtheta_k) |`` over samples i and all trainable parameters k.

    A gradient that is zero up to rounding has sign 0 here: ``|g_ik| <= 4 eps max_k |g_ik|``. Without this, attention
    scores noise: where softmax cancels a gradient exactly (all neighbours on one side of a LeakyReLU), rounding
    leaves +-1e-16, on a tenth of all gradients of a GATv2. In float64 no true gradient is that small; in float32
    (faster) some in deep networks are.

    Memory: one int32 for each parameter beside the gradients of a few samples.
    Returns: an integer in 1 .. n * m for n samples and m parameters; it grows with both. Higher is better.
    Raises: NotFinite: a gradient is NaN or infinite, or all are zero.
    """
    model, batch = cast_to(dtype, model, batch)
    size = sum(p.numel() for p in trainable(model))
    signs = torch.zeros(size, dtype=torch.int32, device=batch.target.device)
    for rows in per_sample_gradients(model, batch, losses):
        signs += signs_of(rows).sum(0)
    return positive("gradsign", float(signs.abs().sum()))


def signs_of(gradients: Tensor) -> Tensor:
    """-1, 0 or 1 (int32) for each entry of ``gradients`` ``(samples, m)``; 0 for what is rounding error of its row."""
    floor = 4 * torch.finfo(gradients.dtype).eps * gradients.abs().amax(1, keepdim=True)
    return (gradients > floor).to(torch.int32) - (gradients < -floor).to(torch.int32)
