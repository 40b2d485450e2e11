"""Tiny spaces and evaluations that misbehave, importable by name in child processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nasgraph.objectives.base import Failed, Result, Scored
from nasgraph.space import Choice, Op, SearchSpace


def chain(depth: int = 4) -> SearchSpace:
    """A conditional space: depth is a choice of nodes; deeper nodes ask their own activation and width."""
    space = SearchSpace("chain")
    node = space.input("x", torch.randn(2, 4), dynamic={0: "batch"})
    ends: dict[str, Any] = {}
    for i in range(depth):
        width = Choice(f"width{i}", [4, 8, 16, 32], ordered=True)
        act = Choice(f"act{i}", {"relu": Op(nn.ReLU), "elu": Op(nn.ELU), "tanh": Op(nn.Tanh)})
        node = space.add(f"linear{i}", Op(nn.Linear, out_features=width), node)
        node = space.add(f"act{i}", act, node)
        ends[str(i + 1)] = node
    space.output(Choice("depth", ends))
    return space


ACTS = {"relu": 0.3, "elu": 0.5, "tanh": 0.1}


def toy(arch: Mapping[str, Any]) -> Result:
    """A smooth, deterministic trade-off: accuracy-like value against a size."""
    depth = int(arch["depth"])
    good = sum(ACTS[arch[f"act{i}"]] + 0.01 * arch[f"width{i}"] for i in range(depth)) / (1 + 0.3 * depth)
    size = float(sum(arch[f"width{i}"] for i in range(depth)))
    return Scored({"good": good, "size": size}, {"depth": depth})


def slow_toy(arch: Mapping[str, Any]) -> Result:
    time.sleep(0.02)
    return toy(arch)


def failing(arch: Mapping[str, Any]) -> Result:
    if arch["act0"] == "elu":
        raise ValueError("elu is out")
    return toy(arch)


def always_failing(arch: Mapping[str, Any]) -> Result:
    raise ValueError("no such luck")


def misbehave(kind: Any) -> Any:
    """One evaluation of every kind that a search meets."""
    match kind:
        case "raise":
            raise ValueError("as asked")
        case "nan":
            return {"good": float("nan")}
        case "inf":
            return {"good": float("inf")}
        case "memory_error":
            raise MemoryError("no room")
        case "allocate":
            return {"good": float(torch.ones(3 * 2**28).sum())}  # 3 GiB
        case "os_exit":
            os._exit(7)
        case "os_exit_0":
            os._exit(0)
        case "segfault":
            ctypes.string_at(0)
        case "sys_exit":
            sys.exit(3)
        case "endless":
            while True:
                pass
        case "sleep":
            time.sleep(60)
        case "nap":
            time.sleep(0.3)
        case "unpicklable":
            return Scored({"good": 1.0}, {"what": lambda: None})
        case "failed":
            return Failed("error", "own words")
        case "environment":
            threads = float(torch.get_num_threads())
            return {"slots": float(os.environ["NASGRAPH_SLOTS"]), "threads": threads, "pid": float(os.getpid())}
    return {"good": 1.0 if kind == "nap" else float(kind)}


class Unloadable:
    """Pickles, but cannot be loaded."""

    def __call__(self, payload: Any) -> Any:
        return {"good": 0.0}

    def __reduce__(self) -> Any:
        return (_refuse, ())


def _refuse() -> None:
    raise RuntimeError("cannot be made here")


# ---- a search in a child process, to be killed ------------------------------------------------------------------

OBJECTIVES: list[tuple[str, Any]] = [("good", "maximize"), ("size", "minimize")]


def search(path: str, sampler: str, trials: int, log: str, moment: tuple[str, int] | None = None) -> None:
    """Run or resume a search; what is evaluated and what is recorded goes to ``log``. Dies at ``moment``."""
    import sqlalchemy

    from nasgraph.executors import InProcess
    from nasgraph.study import Study

    torch.set_num_threads(1)
    where, when = moment or ("never", 0)
    seen = 0

    def here(name: str) -> None:
        nonlocal seen
        if name == where:
            seen += 1
            if seen > when:
                os.kill(os.getpid(), signal.SIGKILL)

    def write(*words: Any) -> None:
        with open(log, "a") as file:
            file.write(" ".join(map(str, words)) + "\n")

    def evaluate(arch: Mapping[str, Any]) -> Result:
        here("evaluating")
        write("evaluated", space.key(arch))
        here("evaluated")
        return failing_seldom(arch)

    space = chain()
    study = Study(path, "search", space, OBJECTIVES, sampler, seed=3, limits={"size": 90.0})
    engine = study._engine
    sqlalchemy.event.listen(engine, "before_cursor_execute", lambda *arguments: here("statement"))
    sqlalchemy.event.listen(engine, "commit", lambda *arguments: here("commit"))

    def recorded(record: Any) -> None:
        write("recorded", record.number, record.key)
        here("recorded")

    with InProcess(evaluate) as executor:
        study.run(trials, executor, recorded)


def failing_seldom(arch: Mapping[str, Any]) -> Result:
    if arch["act0"] == "tanh" and arch["width0"] < 16:
        return Failed("error", "too narrow for tanh")
    return toy(arch)


def hold(path: str, ready: Any) -> None:
    """Run a search that never ends."""
    from nasgraph.executors import InProcess
    from nasgraph.study import Study

    def evaluate(arch: Mapping[str, Any]) -> Result:
        ready.send("running")
        time.sleep(600)
        return toy(arch)

    with InProcess(evaluate) as executor:
        Study(path, "search", chain(), OBJECTIVES, "random", seed=3).run(3, executor)


def screen_and_die(folder: str, count: int) -> None:
    """Screen 100 candidates, and die by kill -9 while the network number ``count`` is scored."""
    from nasgraph.executors import InProcess
    from nasgraph.screen import ScreenTable, screen

    left = count

    def score(arch: Mapping[str, Any]) -> Result:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return failing_seldom(arch)

    with ScreenTable(f"{folder}/screen.db") as table:
        screen(chain(), table, 100, 1, InProcess(score))
