"""The training loop against its definition: best weights, ties, patience, bits, and losses that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nasgraph.errors import ConfigError, NotFinite
from nasgraph.tasks.batch import Batch
from nasgraph.training import TrainSettings, evaluate, train


def blobs(n: int = 60, seed: int = 0) -> Batch:
    """Three overlapping clouds in the plane."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(n) % 3
    centres = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    return Batch((centres[target] + 0.8 * torch.randn(n, 2, generator=generator),), target)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def bits(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


class Scripted(nn.Module):
    """Logits of a validation sample follow a script, one entry per call in evaluation mode."""

    def __init__(self, correct: list[float]) -> None:
        super().__init__()
        self.correct, self.epoch = correct, 0
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return torch.stack([self.weight.expand(len(x)), -self.weight.expand(len(x))], 1)
        logit = self.correct[self.epoch]
        self.epoch += 1
        return torch.tensor([[logit, 0.0]]).expand(len(x), 2)


SCRIPT_BATCH = Batch((torch.zeros(4, 1),), torch.zeros(4, dtype=torch.long))


def test_the_weights_left_in_the_model_are_those_that_the_fit_speaks_of():
    model, val = network(), [blobs(seed=1)]
    fit = train(model, [blobs()], val, TrainSettings(epochs=60, patience=60), seed=3)
    assert not model.training
    assert evaluate(model, val) == (fit.val, fit.val_loss)
    assert fit.history[fit.best_epoch - 1][1:] == (fit.val_loss, fit.val)
    assert (fit.val, -fit.val_loss) == max((accuracy, -loss) for _, loss, accuracy in fit.history)
    assert fit.best_epoch < fit.epochs == 60 == len(fit.history)  # so restoring did something
    assert fit.history[-1][1:] != (fit.val_loss, fit.val)


def test_accuracy_ties_go_to_the_lower_loss_and_patience_counts_from_the_best():
    # Logit of the right class: wrong, right, right and surer, right but less sure, ...
    model = Scripted([-1.0, 1.0, 2.0, 1.5, 1.5, 1.5, 9.0])
    fit = train(model, [SCRIPT_BATCH], [SCRIPT_BATCH], TrainSettings(epochs=7, patience=3), seed=0)
    assert (fit.best_epoch, fit.epochs, fit.val) == (3, 6, 1.0)
    assert fit.val_loss == pytest.approx(math.log1p(math.exp(-2.0)))


def test_equal_seeds_give_equal_bits_and_the_callers_generator_is_left_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    models = [network() for _ in range(3)]
    fits = [
        train(model, [blobs()], [blobs(seed=1)], TrainSettings(epochs=12), seed=seed)
        for model, seed in zip(models, (5, 5, 6), strict=True)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert fits[0].history == fits[1].history
    assert all(torch.equal(a, b) for a, b in zip(bits(models[0]), bits(models[1]), strict=True))
    assert fits[0].history != fits[2].history  # the seed reaches dropout


def test_mini_batches_are_averaged_by_their_samples():
    whole = blobs(50)
    parts = [Batch((whole.inputs[0][rows],), whole.target[rows]) for rows in (slice(0, 40), slice(40, 50))]
    model = network().eval()
    assert evaluate(model, parts) == pytest.approx(evaluate(model, [whole]))
    with torch.no_grad():
        outputs = model(whole.inputs[0])
    expected = (
        (outputs.argmax(1) == whole.target).float().mean().item(),
        nn.functional.cross_entropy(outputs, whole.target).item(),
    )
    assert evaluate(model, [whole]) == pytest.approx(expected)


def test_one_adam_epoch_is_the_equation():
    """First step of Adam with L2: theta - lr * g / (|g| + eps), g the gradient plus decay * theta."""
    model, batch = nn.Linear(2, 3), blobs()
    expected = []
    batch.loss(model).backward()
    for parameter in model.parameters():
        gradient = parameter.grad + 0.1 * parameter.detach()
        expected.append(parameter.detach() - 0.01 * gradient / (gradient.abs() + 1e-8))
    train(model, [batch], [batch], TrainSettings(epochs=1, weight_decay=0.1), seed=0)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_optimizer_learns(optimizer):
    fit = train(network(), [blobs()], [blobs(seed=1)], TrainSettings(epochs=80, optimizer=optimizer), seed=0)
    assert fit.val > 0.7  # chance is 1/3; the clouds overlap
    assert fit.history[-1][0] < fit.history[0][0]


def test_a_loss_that_is_not_finite_is_raised_with_its_epoch():
    class Overflow(Scripted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (math.nan if self.training and self.epoch == 2 else 1.0)

    with pytest.raises(NotFinite, match="training loss is nan in epoch 3"):
        train(Overflow([1.0] * 9), [SCRIPT_BATCH], [SCRIPT_BATCH], TrainSettings(epochs=9), seed=0)
    with pytest.raises(NotFinite, match="validation loss is nan in epoch 2"):
        train(Scripted([1.0, math.nan]), [SCRIPT_BATCH], [SCRIPT_BATCH], TrainSettings(epochs=9), seed=0)


def test_progress_is_told_and_time_is_bounded():
    seen: list[int] = []
    train(
        network(),
        [blobs()],
        [blobs()],
        TrainSettings(epochs=5),
        seed=0,
        on_epoch=lambda epoch, values: seen.append(epoch),
    )
    assert seen == [1, 2, 3, 4, 5]
    assert train(network(), [blobs()], [blobs()], TrainSettings(max_seconds=1e-9), seed=0).epochs == 1


def test_a_frozen_model_is_scored_as_it_is():
    model, val = network().requires_grad_(False), blobs(seed=1)
    before = bits(model)
    fit = train(model, [blobs()], [val], TrainSettings(epochs=3), seed=0)
    assert (fit.val, fit.val_loss) == evaluate(model, [val])
    assert (fit.epochs, fit.best_epoch, fit.history) == (0, 0, []) and not model.training
    assert all(torch.equal(a, b) for a, b in zip(before, bits(model), strict=True))


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter to train"):
        train(nn.Identity(), [blobs()], [blobs()], TrainSettings(epochs=1), seed=0)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 2.5}, "epochs is 2.5"),
        ({"patience": 0}, "patience is 0"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"max_seconds": 0}, "max_seconds is 0"),
        ({"optimizer": "adamm"}, "Did you mean 'adam'?"),
    ],
)
def test_a_bad_setting_is_named(setting, says):
    with pytest.raises(ConfigError) as error:
        TrainSettings(**setting)
    assert says in str(error.value)
