"""An evaluation is a value, whatever the candidate does."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasgraph.errors import ConfigError, NotFinite
from nasgraph.objectives import Candidate, Evaluator, Failed, Objective, Scored, check_alone, failure
from nasgraph.objectives.accuracy import val_accuracy
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.tasks import digits_knn
from nasgraph.training import TrainSettings

SHORT = TrainSettings(epochs=4)


class Linear(nn.Module):
    """Reads the features only."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.linear(x)


def make_space() -> SearchSpace:
    from torch_geometric.nn import SAGEConv

    task = digits_knn()
    space = SearchSpace("two_layers")
    x = space.input("x", task.inputs[0], dynamic={0: "nodes"})
    edge_index = space.input("edge_index", task.inputs[1], dynamic={1: "edges"})
    width = Choice("width", [4, 8], ordered=True)
    kind = Choice("kind", {"sage": Op(SAGEConv, out_channels=width), "linear": Op(Linear, out_channels=width)})
    hidden = space.add("relu", Op(nn.ReLU), space.add("first", kind, x, edge_index))
    space.output(space.add("second", Op(SAGEConv, out_channels=10), hidden, edge_index))
    return space


ARCH = {"kind": "sage", "width": 4}


def evaluator(*objectives: Objective | str, **changes: Any) -> Evaluator:
    arguments = {"settings": SHORT, **changes}
    return Evaluator(make_space, digits_knn(), objectives, **arguments)


def measuring(function: Callable[[Candidate], float]) -> Failed | Scored:
    return evaluator(Objective("mine", "minimize", function))(ARCH)


def raising(error: BaseException) -> Callable[[Candidate], float]:
    def measure(candidate: Candidate) -> float:
        raise error

    return measure


def test_a_candidate_is_measured_on_all_objectives():
    result = evaluator("val_accuracy", "params", "flops", "traffic", "weight_bytes", "activation_bytes", seeds=(0, 3))(
        ARCH
    )
    assert isinstance(result, Scored)
    edges = digits_knn().inputs[1].shape[1]
    params = 2 * 64 * 4 + 4 + 2 * 4 * 10 + 10
    assert result.values["params"] == params
    assert result.values["weight_bytes"] == 4 * params
    assert result.values["flops"] == 2 * 1797 * 2 * (64 * 4 + 4 * 10)
    assert result.values["traffic"] == 4 * edges * (2 * 64 + 1 + 2 * 4 + 1)
    # kept: the two neighbourhood means, that of width 4 and ReLU's result; the graph's counts per node, twice
    assert result.values["activation_bytes"] >= 4 * 1797 * (64 + 4 + 4)
    accuracies = result.info["val_accuracies"]
    assert result.values["val_accuracy"] == sum(accuracies) / 2
    assert result.info["seeds"] == [0, 3]
    assert len(result.info["best_epochs"]) == 2
    assert result.info["seconds"] > 0
    assert json.loads(json.dumps(result.info)) == result.info


def test_an_evaluation_is_repeatable_and_survives_pickling():
    first = evaluator("val_accuracy", "params")
    again = pickle.loads(pickle.dumps(first))
    assert len(pickle.dumps(first)) < 2000
    assert first(ARCH).values == again(ARCH).values
    assert len(pickle.dumps(first)) < 2000  # nor do data or models travel after use


def test_the_seeds_of_an_evaluation_are_single_evaluations():
    both = evaluator("val_accuracy", seeds=(1, 2))(ARCH)
    alone = [evaluator("val_accuracy", seeds=(seed,))(ARCH).values["val_accuracy"] for seed in (1, 2)]
    assert both.info["val_accuracies"] == alone


def test_costs_train_nothing():
    result = evaluator("params", settings=TrainSettings(epochs=10_000))(ARCH)
    assert "epochs" not in result.info
    assert result.info["seconds"] < 30


def test_the_trained_model_of_a_candidate_is_its_best_fit():
    task = digits_knn()
    candidate = Candidate(make_space(), ARCH, task, SHORT, seeds=(0, 1, 2))
    best = max(candidate.fits, key=lambda fit: (fit.val, -fit.val_loss))
    assert task.score(candidate.trained, "val") == {"accuracy": best.val, "loss": best.val_loss}
    untrained = Candidate(make_space(), ARCH, task, SHORT, seeds=(0,)).model
    same = zip(candidate.model.state_dict().values(), untrained.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize(
    ("error", "reason", "says"),
    [
        (RuntimeError("shapes\ndo not fit"), "error", "RuntimeError: shapes do not fit (test_evaluator.py:"),
        (NotFinite("training loss is nan in epoch 3"), "not_finite", "training loss is nan in epoch 3"),
        (MemoryError(), "out_of_memory", "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory", "CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory", "can't allocate"),
        (SystemExit(3), "exit", "SystemExit: 3"),
        (GeneratorExit(), "error", "GeneratorExit"),
    ],
)
def test_whatever_is_raised_is_a_failure_with_its_reason(error, reason, says):
    result = measuring(raising(error))
    assert isinstance(result, Failed)
    assert result.reason == reason
    assert says in result.detail
    assert "\n" not in result.detail
    assert result.detail.endswith("in measure)")


def test_a_real_allocation_that_fails_is_out_of_memory():
    result = measuring(lambda candidate: float(torch.empty(2**55).sum()))
    assert result.reason == "out_of_memory"


def test_the_next_candidate_is_measured_after_a_failure():
    broken = {"yes": True}

    def sometimes(candidate: Candidate) -> float:
        if broken.pop("yes", False):
            raise SystemExit(1)
        return 1.0

    evaluate = evaluator(Objective("mine", "minimize", sometimes))
    assert [type(evaluate(ARCH)) for _ in range(2)] == [Failed, Scored]


def test_an_interrupt_gets_through():
    with pytest.raises(KeyboardInterrupt):
        measuring(raising(KeyboardInterrupt()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_failure_that_names_the_objective(value):
    result = measuring(lambda candidate: value)
    assert result.reason == "not_finite"
    assert "'mine'" in result.detail
    with pytest.raises(NotFinite, match="mine"):
        Scored({"mine": value, "other": 1.0})


def test_training_that_diverges_is_a_failure():
    result = evaluator("val_accuracy", settings=TrainSettings(epochs=50, lr=1e30, optimizer="sgd"))(ARCH)
    assert result.reason == "not_finite"
    assert "epoch" in result.detail


def test_an_architecture_that_the_space_does_not_have_is_a_failure():
    result = evaluator("params")({"kind": "sage", "width": 5})
    assert result.reason == "error"
    assert "width" in result.detail


def test_bad_objectives_are_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="Did you mean 'params'"):
        evaluator("parms")
    with pytest.raises(ConfigError, match="given twice"):
        evaluator("params", "params")
    with pytest.raises(ConfigError, match="at least one objective"):
        evaluator()
    with pytest.raises(ConfigError, match="is a function"):
        evaluator("nasgraph.objectives.cost:count_flops")
    with pytest.raises(ConfigError, match="'maximize' or 'minimize'"):
        Objective("mine", "max", lambda candidate: 0.0)


def test_a_users_objective_is_three_lines():
    def half(candidate: Candidate) -> float:
        candidate.info["note"] = "seen"
        return sum(p.numel() for p in candidate.model.parameters()) / 2

    result = evaluator(Objective("half", "minimize", half), "params")(ARCH)
    assert result.values["half"] * 2 == result.values["params"]
    assert result.info["note"] == "seen"


# ---- alone on the device ---------------------------------------------------------------------------------------------


def never(candidate: Candidate) -> float:
    raise AssertionError("measured beside other trials")


def test_an_exclusive_objective_is_not_measured_beside_other_trials(monkeypatch):
    exclusive = Objective("speed", "minimize", never, exclusive=True)
    monkeypatch.setenv("NASGRAPH_SLOTS", "2")
    result = evaluator("params", exclusive)(ARCH)
    assert result.reason == "error"
    assert "'speed' must be measured alone" in result.detail
    assert evaluator("latency_ms")(ARCH).reason == "error"
    assert isinstance(evaluator("params")(ARCH), Scored)
    with pytest.raises(ConfigError, match="use 1 worker"):
        check_alone([val_accuracy, exclusive], 2)
    check_alone([val_accuracy], 2)
    check_alone([exclusive], 1)
    assert evaluator("latency_ms").exclusive
    assert not evaluator("params").exclusive


def test_latency_comes_with_its_spread_and_threads(monkeypatch):
    monkeypatch.setenv("NASGRAPH_SLOTS", "1")
    result = evaluator("latency_ms")(ARCH)
    assert isinstance(result, Scored)
    assert result.values["latency_ms"] == result.info["latency_median_ms"] > 0
    assert result.info["latency_iqr_ms"] >= 0
    assert result.info["latency_threads"] == torch.get_num_threads()
    assert "epochs" not in result.info


def test_failure_without_a_traceback():
    assert failure(ValueError("plain")) == Failed("error", "ValueError: plain")
