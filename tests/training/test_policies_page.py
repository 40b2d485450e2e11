"""The code of docs/policies.md runs as it stands, its policy passes the exam, and its table is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nasgraph import registry
from nasgraph.testing import PolicyExam
from nasgraph.training import policies

PAGE = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
TRAINING, OWN, EXAM = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def run(*blocks: str) -> dict[str, Any]:
    names: dict[str, Any] = {"STEPS": 2, "__name__": "page"}
    for block in blocks:
        exec(block, names)
    return names


TestAgain: type[PolicyExam] = run(OWN, EXAM)["TestAgain"]


def test_the_example_trains() -> None:
    assert run(TRAINING)["supernet"].step == 2


def test_the_policy_of_the_page_repeats_the_worst() -> None:
    names = run(TRAINING, OWN)
    space, supernet = names["space"], names["supernet"]
    policy = names["Again"](space)
    seen: list[list[float]] = []
    supernet.train(policy, 5, on_step=lambda step, losses: seen.append(list(losses)))
    assert [len(losses) for losses in seen] == [1, 2, 2]
    assert len([line for line in OWN.splitlines() if line.strip()]) <= 15


def test_the_table_names_every_policy() -> None:
    listed = dict(re.findall(r"^\| `(\w+)`, `(\w+)` \|", PAGE, flags=re.MULTILINE))
    assert sorted(listed) == registry.names("policies")
    for name, class_ in listed.items():
        assert registry.resolve("policies", name) is getattr(policies, class_)
