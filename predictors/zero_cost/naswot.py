"""NASWOT: can the untrained network tell the samples apart by which units fire?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nasgraph.errors import NotFinite
from nasgraph.predictors.zero_cost.proxy import proxy
from nasgraph.tasks.batch import Batch

JITTER = 1e-6

_NAMES = (
    "relu relu_ relu6 leaky_relu leaky_relu_ prelu rrelu elu elu_ selu selu_ celu celu_ gelu silu mish hardswish "
    "hardtanh softplus softsign tanh tanh_ sigmoid sigmoid_ hardsigmoid logsigmoid tanhshrink"
)
ACTIVATIONS = frozenset(
    getattr(place, name) for place in (F, torch, Tensor) for name in _NAMES.split() if hasattr(place, name)
)


@proxy(needs_labels=False, source="Mellor et al., ICML 2021")
def naswot(model: nn.Module, batch: Batch) -> float:
    """Log-determinant of the agreement of activation codes (Mellor et al., ICML 2021).

    ``log det(K + jitter * U * I)``, ``K = C C^T + (1 - C)(1 - C)^T``: row i of C ``(n, U)`` holds, for each of the U
    units, whether its pre-activation is positive for sample i, so ``K_ij`` counts the units on which i and j agree.
    All activations of torch count, as modules or as functions, if they have one row for each output row of the model
    (so attention scores of edges do not). ``jitter = 1e-6`` bounds what two samples of equal code cost.

    Returns: a real number. Higher is better.
    Raises: NotFinite: NaN in an activation, or there is no activation to read.
    """
    with torch.no_grad(), _Record() as record:
        outputs = model(*batch.inputs)
    rows = len(outputs)
    index = torch.arange(rows, device=outputs.device) if batch.index is None else batch.index
    layers = [x[index].flatten(1) for x in record.seen if x.dim() >= 2 and len(x) == rows]
    if not layers:
        raise NotFinite("naswot: the model has no activation with a row for each sample, so there is no code to read")
    values = torch.cat(layers, 1)
    if not values.isfinite().all() or not outputs.isfinite().all():
        raise NotFinite("naswot: an activation or output is NaN or infinite")
    codes = (values > 0).double()
    kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T
    units = codes.shape[1]
    return float(torch.linalg.slogdet(kernel + JITTER * units * torch.eye(len(kernel)).to(kernel)).logabsdet)


class _Record(TorchFunctionMode):
    """Keeps what goes into every activation function; ``nn.ReLU`` and its like call these functions too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in ACTIVATIONS and args:
            self.seen.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))
