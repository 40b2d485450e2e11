"""Costs that need no training: parameters, arithmetic, memory traffic and sizes.

All are exact counts on the untrained model and the task's inputs (one forward pass at most), so they do not
depend on a machine's speed or load. None changes the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nasgraph.objectives.base import Candidate, Objective

aten = torch.ops.aten

# Positions of the tensor that an operation scatters.
SCATTERS = {
    aten.scatter_add: 3,
    aten.scatter_add_: 3,
    aten.scatter_reduce: 3,
    aten.scatter_reduce_: 3,
    aten.scatter: 3,
    aten.scatter_: 3,
    aten.index_add: 3,
    aten.index_add_: 3,
    aten.index_reduce: 3,
    aten.index_reduce_: 3,
    aten.index_copy: 3,
    aten.index_copy_: 3,
    aten.index_put: 2,
    aten.index_put_: 2,
    aten.segment_reduce: 0,
}
GATHERS = {aten.index_select, aten.gather, aten.index, aten.embedding}
SPARSE_PRODUCTS = {aten.mm, aten.addmm, aten._sparse_addmm, aten._sparse_mm_reduce_impl}


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or not, each tensor once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Floating-point operations of one forward pass in evaluation mode, a multiply-add counted as 2.

    Counted by PyTorch's ``FlopCounterMode``: matrix products, convolutions and attention. Element-wise operations and
    message passing count as 0; :func:`count_traffic` is their measure. A linear layer on N rows: 2 N F O. Attention of
    H heads of width D over length L: 4 H L L D, with or without a causal mask.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # As matrix products: the counter does not know the fused kernel of CPUs, which would count as 0.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops())


def count_traffic(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that message passing moves in one forward pass in evaluation mode.

    The sum, over all operations that read or write rows by integer index, of

        bytes of a gather's result + bytes of a scatter's source,

    floating-point tensors only. So an aggregation of messages of width O over E edges in 4-byte numbers moves
    4 E O (gathered) + 4 E O (scattered) bytes, however it is written: a product of a sparse matrix of E entries with a
    dense one of O columns counts as the same. Reading the indices, and what a cache saves, is not counted.
    """
    counter = _Traffic()
    with evaluating(model), counter:
        model(*inputs)
    return counter.bytes


def count_weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each tensor once: what a file of the weights holds."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    total: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def count_activation_bytes(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps for the backward pass in one forward pass in training mode.

    Every storage once, without parameters, buffers and the inputs themselves. This is what grows with the graph and
    decides whether a candidate can be trained on it. Runs a copy of the model, with a seed of its own for dropout.
    What is kept may depend on the kind of device: dropout's mask takes 4 bytes per number on a CPU, 1 on a GPU.
    """
    model = copy.deepcopy(model).train()
    known = {_storage(tensor).data_ptr() for tensor in [*model.parameters(), *model.buffers(), *inputs]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        kept[storage.data_ptr()] = storage  # held, so that no later tensor gets the same address
        return tensor

    cuda = sorted({tensor.device.index for tensor in inputs if tensor.is_cuda})
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.random.fork_rng(devices=cuda), torch.enable_grad(), hooks:
        torch.manual_seed(0)
        model(*inputs)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in GATHERS and not (packet is aten.index and _is_mask(args[1])):
            self.bytes += _float_bytes(out)
        elif packet in SCATTERS and not (packet in (aten.index_put, aten.index_put_) and _is_mask(args[1])):
            at = SCATTERS[packet]
            self.bytes += _float_bytes(args[at] if len(args) > at else (kwargs or {}).get("src"))
        elif packet in SPARSE_PRODUCTS:
            result = out[0] if isinstance(out, tuple) else out
            for tensor in args:
                if isinstance(tensor, Tensor) and tensor.layout != torch.strided and result.layout == torch.strided:
                    self.bytes += 2 * tensor._nnz() * result.shape[-1] * result.element_size()
        return out


def _float_bytes(tensor: Any) -> int:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return 0
    return tensor.numel() * tensor.element_size()


def _is_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    if tensor.layout != torch.strided:
        tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
    return tensor.untyped_storage()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training, fused = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel for a whole layer, in which nothing can be counted
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        torch.backends.mha.set_fastpath_enabled(fused)


def _params(candidate: Candidate) -> float:
    return float(candidate.params)


def _flops(candidate: Candidate) -> float:
    return float(count_flops(candidate.model, candidate.task.inputs))


def _traffic(candidate: Candidate) -> float:
    return float(count_traffic(candidate.model, candidate.task.inputs))


def _weight_bytes(candidate: Candidate) -> float:
    return float(count_weight_bytes(candidate.model))


def _activation_bytes(candidate: Candidate) -> float:
    return float(count_activation_bytes(candidate.model, candidate.task.inputs))


params = Objective("params", "minimize", _params)
flops = Objective("flops", "minimize", _flops, "FLOP")
traffic = Objective("traffic", "minimize", _traffic, "B")
weight_bytes = Objective("weight_bytes", "minimize", _weight_bytes, "B")
activation_bytes = Objective("activation_bytes", "minimize", _activation_bytes, "B")
