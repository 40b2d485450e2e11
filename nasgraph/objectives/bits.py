"""Costs of bits, masks and adapters, counted on the untrained model without what training alone needs.

All numbers at 32 bits are those of the plain network, so architectures with and without transforms can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nasgraph.export.packed import layout, stored_as, stored_bytes
from nasgraph.export.weights import shared_tensors
from nasgraph.objectives.base import Candidate, Objective
from nasgraph.objectives.cost import count_flops, evaluating
from nasgraph.transforms.deploy import deploy
from nasgraph.transforms.layers import CONVOLUTIONS, Transformed, is_pyg_linear, rewritten_layers
from nasgraph.transforms.prune import LearnedMask, SignedMask
from nasgraph.transforms.quantize import message_passing
from nasgraph.transforms.quantizers import ActivationQuantizer

FLOAT_BITS = 32
MULTIPLYING = (nn.Linear, *CONVOLUTIONS)


def count_model_bits(model: nn.Module) -> int:
    """Bits of the tensors in ``packed.safetensors`` (:mod:`nasgraph.export.packed`), exactly; not its header.

    Codes at their bits and scales at 32; of a pruned weight a bitmap and what it keeps, where that is smaller;
    everything else, buffers included, as it is. Each tensor is counted in whole bytes, as it is stored.
    """
    deployed = deploy(model)
    state = deployed.model.state_dict()
    shared = shared_tensors(state)
    total = 0
    for name, value in state.items():
        if name not in shared:
            weight = stored_as(deployed, name)
            total += value.nbytes if weight is None else stored_bytes(weight, *layout(weight))
    return 8 * total


def count_activation_bits(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """Bits of the buffers that layers read in one forward pass in evaluation mode: of all, and of the largest.

    Buffers are the inputs of linear and convolution layers and what PyG convolutions have aggregated, each of

        numbers in it * bits of the quantiser there (32 without).

    What two layers read counts for both.
    """
    sizes: list[int] = []

    def look(bits: int) -> Callable[..., None]:
        return lambda layer, args, *_: sizes.append(args[0].numel() * bits)

    def aggregated(bits: int) -> Callable[..., None]:
        return lambda layer, args, out: sizes.append(out.numel() * bits)

    hooks: list[Any] = [layer.register_forward_pre_hook(look(input_bits(layer))) for layer in layers(model).values()]
    for _, convolution in message_passing(model):
        quantizer = getattr(convolution, "on_aggregate", None)
        hook = aggregated(quantizer.bits if isinstance(quantizer, ActivationQuantizer) else FLOAT_BITS)
        for register in ("register_aggregate_forward_hook", "register_message_and_aggregate_forward_hook"):
            hooks.append(getattr(convolution, register)(hook))
    with removed(hooks), evaluating(model):
        model(*inputs)
    return sum(sizes), max(sizes, default=0)


def count_bit_operations(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bit operations of one forward pass in evaluation mode: the sum over layers of

        multiply-adds * bits of the weight * bits of the input

    (van Baalen et al., Bayesian Bits, NeurIPS 2020). Linear and convolution layers; all other products that
    ``FlopCounterMode`` sees (attention, adapters) count at 32 * 32 bits, so a network without quantisers has
    ``512 * flops``. A mask saves none: a product with 0 is still one.
    """
    deployed = deploy(model)
    found: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            found[name] = found.get(name, 0) + out.numel() * layer.weight[0].numel()

        return hook

    known = layers(deployed.model)
    with removed([layer.register_forward_hook(count(name)) for name, layer in known.items()]):
        others = count_flops(deployed.model, inputs) // 2
    total = 0
    for name, products in found.items():
        weight = deployed.weights.get(name)
        bits = FLOAT_BITS if weight is None else weight.bits
        total += products * bits * input_bits(known[name])
        others -= products
    return total + others * FLOAT_BITS**2


def count_adapter_parameters(model: nn.Module) -> int:
    """Parameters of the adapters: what a file of the adapters alone holds."""
    adapters = [adapter for layer in rewritten_layers(model).values() for adapter in layer.beside.values()]
    return sum(parameter.numel() for adapter in adapters for parameter in adapter.parameters())


def count_trainable_parameters(model: nn.Module) -> int:
    """Parameters that training changes, each tensor once. Weights below a mask that alone learns are not."""
    trained: dict[int, int] = {}
    for module in model.modules():
        masks = module.on_weight.values() if isinstance(module, Transformed) else ()
        fixed = any(isinstance(mask, LearnedMask | SignedMask) and mask.fixed for mask in masks)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and not (fixed and name == "weight"):
                trained[id(parameter)] = parameter.numel()
    return sum(trained.values())


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolution layers, rewritten or not, by their names."""
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, MULTIPLYING) or is_pyg_linear(layer)}


def input_bits(layer: nn.Module) -> int:
    """Bits of what a layer computes with as its input: the least ``bits`` of a module in ``on_input``."""
    steps = getattr(layer, "on_input", {}).values()
    return min([step.bits for step in steps if isinstance(getattr(step, "bits", None), int)], default=FLOAT_BITS)


@contextmanager
def removed(hooks: list[Any]) -> Iterator[None]:
    """The hooks are gone afterwards."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _model_bits(candidate: Candidate) -> float:
    return float(count_model_bits(candidate.model))


def _activation_bits(candidate: Candidate) -> float:
    total, candidate.info["largest_activation_bits"] = count_activation_bits(candidate.model, candidate.task.inputs)
    return float(total)


def _bit_operations(candidate: Candidate) -> float:
    return float(count_bit_operations(candidate.model, candidate.task.inputs))


def _adapter_params(candidate: Candidate) -> float:
    return float(count_adapter_parameters(candidate.model))


def _trainable_params(candidate: Candidate) -> float:
    return float(count_trainable_parameters(candidate.model))


model_bits = Objective("model_bits", "minimize", _model_bits, "bit")
activation_bits = Objective("activation_bits", "minimize", _activation_bits, "bit")
bit_operations = Objective("bit_operations", "minimize", _bit_operations)
adapter_params = Objective("adapter_params", "minimize", _adapter_params)
trainable_params = Objective("trainable_params", "minimize", _trainable_params)
