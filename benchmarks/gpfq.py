"""GPFQ against round-to-nearest on the same levels: output error of each layer of three trained models.

    OMP_NUM_THREADS=1 NASGRAPH_DATA=... python benchmarks/gpfq.py > results/benchmarks/gpfq.md

Without NASGRAPH_DATA the digits that scikit-learn holds stand in for MNIST, and the graph model is left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from nasgraph.tasks import digits_images, mnist, planetoid
from nasgraph.training import TrainSettings
from nasgraph.transforms.gpfq import executed, output_errors, quantize_model
from nasgraph.transforms.layers import plain_linears

CALIBRATION = 512
ABOUT = f"""torch {torch.__version__}, one thread, seed 0. Relative Frobenius error of the outputs of each layer.

- *Alone*: only this layer is quantised, on the inputs that it was fitted to ({CALIBRATION} training images; the graph).
- *In the quantised model*: all layers are, on test images (of Cora: the whole graph again).
- RTN and GPFQ round to the same levels: 3 (ternary) for 2 bits, 2^b for more.
- Step `paper`: 1.16 times the greatest weight of a neuron by 2^(b-1). Step `nearest`: that with the least squared error
  of the rounded weights, so the best for RTN.
"""
Inputs = list[tuple[Any, ...]]


class GCN(nn.Module):
    """Two graph convolutions (Kipf & Welling, ICLR 2017)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(features, 16), GCNConv(16, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Shapes: x ``(nodes, features)`` -> logits ``(nodes, classes)``."""
        out: Tensor = self.conv2(
            nn.functional.dropout(self.conv1(x, edge_index).relu(), 0.5, self.training), edge_index
        )
        return out


def cnn(channels: int, size: int, classes: int) -> nn.Module:
    """Three convolutions, one of them grouped, and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * (size // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, classes)),
    )


def mlp(channels: int, size: int, classes: int) -> nn.Module:
    """Three linear layers."""
    inputs = channels * size * size
    layers = (nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, classes))
    return nn.Sequential(nn.Flatten(), *layers)


def compare(
    name: str, model: nn.Module, calibration: Inputs, fresh: Inputs, score: Callable[[nn.Module], float]
) -> list[bool]:
    """Print the errors of each layer. Returns: whether GPFQ's is lower, for each layer, width and kind of levels."""
    exact = plain_linears(model).eval()
    layers = executed(exact, calibration)
    print(f"\n## {name}\n\nTest accuracy in float: {score(exact):.3f}.")
    lower: list[bool] = []
    for step in ("paper", "nearest"):
        for per in ("tensor", "channel"):
            for bits in (2, 3, 4):
                results = {}
                for method in ("rtn", "gpfq"):
                    alone = [errors_alone(exact, layer, calibration, bits, method, per, step) for layer in layers]
                    rounded = quantize_model(exact, calibration, bits, method=method, per=per, step=step)
                    chain = output_errors(exact, rounded, fresh, layers)
                    results[method] = (alone, chain, score(rounded))
                (alone, chain, accuracy), (alone_gpfq, chain_gpfq, accuracy_gpfq) = results["rtn"], results["gpfq"]
                print(f"\n{bits} bits, one step per {per}, step `{step}`. ", end="")
                print(f"Test accuracy: RTN {accuracy:.3f}, GPFQ {accuracy_gpfq:.3f}.\n")
                print("| layer | alone: RTN | GPFQ | in the quantised model: RTN | GPFQ |\n|---|---|---|---|---|")
                rows = zip(layers, alone, alone_gpfq, chain, chain_gpfq, strict=True)
                for layer, one, other, after, other_after in rows:
                    print(f"| {layer} | {one:.3f} | {other:.3f} | {after:.3f} | {other_after:.3f} |", flush=True)
                    lower += [other < one, other_after < after]
    return lower


def errors_alone(
    exact: nn.Module, layer: str, calibration: Inputs, bits: int, method: str, per: str, step: str
) -> float:
    """The output error of one layer when it alone is quantised, on the inputs that it was fitted to."""
    rounded = quantize_model(exact, calibration, bits, method=method, per=per, step=step, where=layer)
    return output_errors(exact, rounded, calibration, [layer])[0]


def images(
    task: Any, make: Callable[..., nn.Module], epochs: int
) -> tuple[nn.Module, Inputs, Inputs, Callable[[nn.Module], float]]:
    """A model trained on ``task``, training images to fit to, and test images."""
    (example,) = task.inputs
    torch.manual_seed(0)
    model = make(example.shape[1], example.shape[-1], task.sizes["classes"])
    task.fit(model, TrainSettings(epochs=epochs, lr=1e-3, weight_decay=0.0, patience=epochs), seed=0)
    fresh: Inputs = [tuple(batch.inputs) for batch in task.batches("test")][:2]
    return (
        model,
        [tuple(task.batch(CALIBRATION, 0).inputs)],
        fresh,
        lambda net: task.score(net.eval(), "test")["accuracy"],
    )


def main(models: Sequence[str] = ("cnn", "mlp", "gcn")) -> None:
    """Train, quantise, print."""
    torch.set_num_threads(1)
    start, data = time.time(), os.environ.get("NASGRAPH_DATA")
    print("# GPFQ against round-to-nearest\n\n    OMP_NUM_THREADS=1 NASGRAPH_DATA=... python benchmarks/gpfq.py\n")
    print(ABOUT)
    lower: list[bool] = []
    task = mnist(train_samples=4000) if data else digits_images()
    for name, make in (("cnn", cnn), ("mlp", mlp)):
        if name in models:
            lower += compare(f"{name.upper()} on {task.name}", *images(task, make, 6 if data else 40))
    if data and "gcn" in models:
        graph = planetoid("Cora")
        torch.manual_seed(0)
        model = GCN(graph.sizes["features"], graph.sizes["classes"])
        graph.fit(model, TrainSettings(), seed=0)
        inputs: Inputs = [tuple(graph.inputs)]
        lower += compare("GCN on Cora", model, inputs, inputs, lambda net: graph.score(net.eval(), "test")["accuracy"])
    share = f"{sum(lower)} of {len(lower)}"
    print(f"\n## Sum\n\nGPFQ has the lower error in {share} comparisons. {time.time() - start:.0f} s.")


if __name__ == "__main__":
    main()
