"""Every built-in proxy sits the exam that we ship to others."""

from __future__ import annotations

import pytest
from torch import nn

from nasgraph import registry
from nasgraph.build import build
from nasgraph.predictors import zero_cost
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.tasks.batch import Batch
from nasgraph.testing import ProxyExam, node_batch


@zero_cost.proxy(needs_labels=False, source="the example of docs/proxies.md")
def logit_spread(model: nn.Module, batch: Batch) -> float:
    return float(batch.outputs(model).detach().std(0).mean())


class TestLogitSpread(ProxyExam):
    proxy = staticmethod(logit_spread)
    needs_labels = False


class TestGradSign(ProxyExam):
    proxy = staticmethod(zero_cost.gradsign)


class TestSnip(ProxyExam):
    proxy = staticmethod(zero_cost.snip)


class TestGradNorm(ProxyExam):
    proxy = staticmethod(zero_cost.grad_norm)


class TestZico(ProxyExam):
    proxy = staticmethod(zero_cost.zico)


class TestSynflow(ProxyExam):
    proxy = staticmethod(zero_cost.synflow)
    needs_labels = False


class TestNaswot(ProxyExam):
    proxy = staticmethod(zero_cost.naswot)
    needs_labels = False


class TestJacov(ProxyExam):
    proxy = staticmethod(zero_cost.jacov)
    needs_labels = False


class TestNtkCond(ProxyExam):
    proxy = staticmethod(zero_cost.ntk_cond)
    needs_labels = False


class Count(ProxyExam):
    needs_labels = False
    reads_weights = False


class TestParams(Count):
    proxy = staticmethod(zero_cost.params)


class TestLiveParams(Count):
    proxy = staticmethod(zero_cost.live_params)


class TestFlops(Count):
    proxy = staticmethod(zero_cost.flops)


class TestSqnr(ProxyExam):
    proxy = staticmethod(zero_cost.sqnr)
    needs_labels = False


class TestOutputSqnr(ProxyExam):
    proxy = staticmethod(zero_cost.output_sqnr)
    needs_labels = False


EXAMS = [TestGradSign, TestSnip, TestGradNorm, TestZico, TestSynflow, TestNaswot, TestJacov, TestNtkCond]
EXAMS += [TestParams, TestLiveParams, TestFlops, TestSqnr, TestOutputSqnr]


def test_every_installed_proxy_is_examined_and_described() -> None:
    proxies = {exam.proxy.__name__: exam for exam in EXAMS}
    assert {*proxies, "logit_spread"} == set(zero_cost.PROXIES)
    assert set(registry.names("proxies")) >= set(proxies)
    for name, exam in proxies.items():
        assert registry.resolve("proxies", name) is exam.proxy
        assert zero_cost.PROXIES[name].needs_labels == exam.needs_labels


def test_every_proxy_scores_what_the_engine_builds() -> None:
    from torch_geometric.nn import GATConv, GCNConv

    batch = node_batch()
    space = SearchSpace("two_layers")
    x = space.input("x", example=batch.inputs[0], dynamic={0: "nodes"})
    edges = space.input("edge_index", example=batch.inputs[1], dynamic={1: "edges"})
    kind = Choice("kind", {"gcn": Op(GCNConv, out_channels=8), "gat": Op(GATConv, out_channels=8)})
    h = space.add("first", kind, x, edges)
    h = space.add("act", Op(nn.ReLU), h)
    space.output(space.add("last", Op(GCNConv, out_channels=3), h, edges))
    models = [build(space, space.architecture({"kind": label})) for label in ("gcn", "gat")]
    for exam in EXAMS:
        first, second = (exam.proxy(model, batch) for model in models)
        assert first == exam.proxy(build(space, space.architecture({"kind": "gcn"})), batch)
        # attention's products are not matrix products; the last two look at what transforms did, here nothing
        assert first != second or exam in (TestFlops, TestSqnr, TestOutputSqnr)


@pytest.mark.parametrize("flaw", ["mutates", "labels", "blind"])
def test_the_exam_fails_a_bad_proxy(flaw: str) -> None:
    def bad(model, batch):
        if flaw == "mutates":
            model.eval()
        if flaw == "labels":
            return float(batch.target.sum()) + 1.0
        return 0.0

    class Exam(ProxyExam):
        proxy = staticmethod(bad)
        needs_labels = False

    ask = {
        "mutates": lambda: Exam().test_leaves_the_model_as_it_was("gcn"),
        "labels": Exam().test_labels_are_read_only_by_a_proxy_that_says_so,
        "blind": lambda: Exam().test_finite_and_not_zero_on_every_convolution("gcn", "batch"),
    }[flaw]
    with pytest.raises(AssertionError):
        ask()
