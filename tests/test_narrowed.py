"""A narrowed space is the original with fewer options: the oracle is a filter over the original's architectures."""

from __future__ import annotations

import importlib.util
import pickle
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.search_spaces.nas_bench_graph import nas_bench_graph
from nasgraph.space import Choice, Op, SearchSpace, Switch
from nasgraph.supernet import Supernet
from nasgraph.supernet.variants import variants

_spec = importlib.util.spec_from_file_location("random_spaces", Path(__file__).with_name("test_space.py"))
assert _spec is not None and _spec.loader is not None
_random = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_random)
spaces, everything, some = _random.spaces, _random.everything, _random.some


@st.composite
def narrowings(draw):
    """A random space and labels to keep of some of its choices."""
    space = draw(spaces())
    names = draw(st.sets(st.sampled_from([*space.choices]))) if space.choices else set()
    keep = {name: draw(st.sets(st.sampled_from(space.choices[name].labels), min_size=1)) for name in sorted(names)}
    return space, {name: sorted(labels, key=str) for name, labels in keep.items()}


def inside(architecture, keep) -> bool:
    return all(label in keep.get(name, (label,)) for name, label in architecture.items())


@some(150)
@given(narrowings())
def test_it_has_the_architectures_of_the_original_that_keep_to_the_labels(case):
    space, keep = case
    known = everything(space)
    before = space.fingerprint()
    narrow = space.narrowed(keep)
    left = [architecture for architecture in space.enumerate() if inside(architecture, keep)]
    assert list(narrow.enumerate()) == left  # in the same order
    assert narrow.size() == len(left)
    assert set(narrow.choices) >= {name for architecture in left for name in architecture}
    assert space.fingerprint() == before and set(space.enumerate()) == set(known)


@some(100)
@given(narrowings(), st.integers(0, 99))
def test_a_sample_is_the_same_network_in_the_original(case, seed):
    space, keep = case
    narrow = space.narrowed(keep)
    found = narrow.sample(random.Random(seed))
    assert found in everything(space) and inside(found, keep)
    assert narrow.resolve(found) == space.resolve(found)
    assert narrow.key(found) == space.key(found)
    assert space.architecture(found) == found == narrow.architecture(found)


@some(60)
@given(narrowings(), st.data())
def test_narrowing_twice_is_narrowing_once(case, data):
    space, keep = case
    narrow = space.narrowed(keep)
    further = {
        name: [data.draw(st.sampled_from(choice.labels))] for name, choice in narrow.choices.items() if name in keep
    }
    assert narrow.narrowed(further).fingerprint() == space.narrowed({**keep, **further}).fingerprint()


@some(40)
@given(spaces())
def test_naming_every_label_changes_nothing(space):
    same = space.narrowed({name: choice.labels for name, choice in space.choices.items()})
    assert same.fingerprint() == space.fingerprint()


def test_a_supernet_calls_the_options_as_before():
    wide = gnn_node(9, 3, layers=2, widths=(8, 16))
    narrow = wide.narrowed({"conv2": ["skip", "gat", "sage_max"], "width": [8], "norm": ["batch"]})
    assert narrow.choices["conv2"].labels == ("gat", "sage_max", "skip")  # in the order of the original
    all_of_it, part = Supernet(wide), Supernet(narrow)
    assert set(part.store) < set(all_of_it.store)
    assert {option for node, option, _ in part.store if node == "conv2"} == {"gat", "sage_max"}
    assert max(p.shape[0] for (node, *_), p in part.store.items() if node == "conv1") < 17


def test_options_keep_their_names_where_labels_alone_would_not_tell():
    """The same operation under two labels, and two labels of one text: an option is named by what is left out, too."""
    space = SearchSpace("names")
    x = space.input("x", torch.zeros(2, 3))
    one, other = Op(nn.Linear, out_features=4), Op(nn.Linear, out_features=4, bias=False)
    shared = Choice("shared", {"a": one, "b": one, "c": other})
    h = space.add("first", shared, x)
    h = space.add("second", Choice("texts", {1: Op(nn.Linear, out_features=4), "1": Op(nn.LayerNorm)}), h)
    h = space.add("third", Switch(shared, {"a": Op(nn.ReLU), "b": one}, default=other), h)
    space.output(h)
    everywhere, names = set(variants(space)), {("first", "a"), ("second", "1'"), ("third", "b")}
    assert names <= everywhere
    assert set(variants(space.narrowed({"shared": ["b"], "texts": ["1"]}))) == names


def test_its_networks_start_the_same():
    wide = gnn_node(9, 3, layers=2, widths=(8, 16))
    narrow = wide.narrowed({"conv1": ["gcn", "gin"], "depth": ["2"]})
    for seed in range(5):
        found = narrow.sample(random.Random(seed))
        one, other = build(wide, found).state_dict(), build(narrow, found).state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_constraints_are_kept_and_examples_shared():
    wide = nas_bench_graph("cora", features=9, classes=3, width=8)
    narrow = wide.narrowed({f"op{i}": ["skip", "gcn"] for i in range(1, 5)})
    assert sum(1 for _ in narrow.enumerate()) == 9 * 2**4 - 9  # not skips only
    assert all(narrow.inputs[name].example is wide.inputs[name].example for name in wide.inputs)
    narrow.constrain("chain", lambda arch: arch["link"] == "0123")
    assert len(narrow.constraints) == 2 and len(wide.constraints) == 1


def test_choices_that_nothing_asks_any_more_are_left_out():
    wide = gnn_node(9, 3, layers=1)
    narrow = wide.narrowed({"conv1": ["gcn"], "head": ["linear"], "propagate": ["none"]})
    assert {"heads", "attention_dropout", "steps", "teleport"} == set(wide.choices) - set(narrow.choices)
    assert narrow.choices["conv1"].labels == ("gcn",)
    assert pickle.loads(pickle.dumps(narrow)).fingerprint() == narrow.fingerprint()
    ordered = wide.narrowed({"width": [128, 16]}).choices["width"]
    assert ordered.labels == ordered.options == (16, 128) and ordered.ordered


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"conv9": ["gcn"]}, "has no choice 'conv9'"),
        ({"conv1": ["gcm"]}, "choice 'conv1' has no option 'gcm'. Did you mean 'gcn'"),
        ({"conv1": []}, "'conv1' would have no options: keep at least one"),
    ],
)
def test_what_cannot_be_kept_is_named(keep, message):
    space = gnn_node(9, 3, layers=1)
    with pytest.raises(SpaceError, match=message):
        space.narrowed(keep)
