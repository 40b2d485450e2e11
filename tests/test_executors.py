"""A bad candidate is a recorded result and the next one runs; no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from nasgraph.errors import ConfigError, NasgraphError, NotFinite, SearchStopped
from nasgraph.executors import Executor, FailureWatch, InProcess, Processes, RayActors
from nasgraph.objectives.base import Failed, Result, Scored, failure

TESTS = Path(__file__).parent
sys.path.append(str(TESTS))  # child processes import the fakes by name

import fake_search as fakes  # noqa: E402


def collect(executor: Executor, payloads: list[Any]) -> list[Result]:
    for ticket, payload in enumerate(payloads):
        executor.submit(ticket, payload)
    found: dict[int, Result] = {}
    while len(found) < len(payloads):
        arrived = executor.wait()
        assert arrived
        assert not found.keys() & {ticket for ticket, _ in arrived}
        found.update(arrived)
    return [found[ticket] for ticket in range(len(payloads))]


def reasons(results: list[Result]) -> list[str | None]:
    return [result.reason if isinstance(result, Failed) else None for result in results]


CATCHABLE = {
    "raise": "error",
    "nan": "not_finite",
    "inf": "not_finite",
    "memory_error": "out_of_memory",
    "sys_exit": "exit",
    "failed": "error",
}
DEADLY = {"os_exit": "crashed", "os_exit_0": "crashed", "segfault": "crashed"}


def test_in_process_records_what_python_can_catch_and_goes_on() -> None:
    payloads = [step for kind in CATCHABLE for step in (kind, 1)]
    with InProcess(fakes.misbehave) as executor:
        found = collect(executor, payloads)
        assert executor.wait() == []
    assert reasons(found) == [step for reason in CATCHABLE.values() for step in (reason, None)]
    assert all(result == Scored({"good": 1.0}) for result in found[1::2])


def test_the_detail_says_what_and_where() -> None:
    with InProcess(fakes.misbehave) as executor:
        raised, left = collect(executor, ["raise", "sys_exit"])
    assert isinstance(raised, Failed) and raised.detail.startswith("ValueError: as asked (fake_search.py:")
    assert isinstance(left, Failed) and left.detail.startswith("SystemExit: 3 (fake_search.py:")


def test_ctrl_c_is_no_failure_of_a_candidate() -> None:
    def interrupted(payload: Any) -> Result:
        raise KeyboardInterrupt

    with InProcess(interrupted) as executor, pytest.raises(KeyboardInterrupt):
        collect(executor, [1])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (RuntimeError("shapes do not match"), "error"),
        (NotFinite("loss is nan"), "not_finite"),
    ],
)
def test_failure_names_the_reason(error: BaseException, reason: str) -> None:
    assert failure(error).reason == reason


def test_processes_survive_everything_and_the_next_candidate_runs() -> None:
    kinds = {**CATCHABLE, **DEADLY, "endless": "timeout", "unpicklable": "error"}
    payloads = [step for kind in kinds for step in (kind, 1)]
    with Processes(fakes.misbehave, workers=2, timeout_s=1.0) as executor:
        found = collect(executor, payloads)
    assert reasons(found) == [step for reason in kinds.values() for step in (reason, None)]
    details = dict(zip(payloads, found, strict=True))
    assert details["os_exit"] == Failed("crashed", "exit code 7")
    assert details["segfault"] == Failed("crashed", "killed by SIGSEGV")
    assert details["endless"] == Failed("timeout", "not finished after 1 s")


def test_instant_crashes_are_each_told_once_while_the_parent_is_busy() -> None:
    import threading

    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    busy = threading.Thread(target=spin)
    busy.start()
    try:
        with Processes(fakes.misbehave, workers=2) as executor:
            found = collect(executor, ["os_exit", 1] * 20)
    finally:
        stop.set()
        busy.join()
    assert reasons(found) == ["crashed", None] * 20


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is enforced on Linux")
def test_a_memory_limit_is_a_recorded_failure() -> None:
    with Processes(fakes.misbehave, workers=1, memory_gb=1.0) as executor:
        assert reasons(collect(executor, ["allocate", 1])) == ["out_of_memory", None]


def test_workers_stay_warm_know_their_number_and_use_one_thread() -> None:
    with Processes(fakes.misbehave, workers=2) as executor:
        found = collect(executor, ["environment"] * 20)
    values = [result.values for result in found if isinstance(result, Scored)]
    assert len(values) == 20
    assert {(value["slots"], value["threads"]) for value in values} == {(2.0, 1.0)}
    assert len({value["pid"] for value in values}) <= 2
    assert os.getpid() not in {value["pid"] for value in values}


def test_a_worker_that_dies_while_idle_is_replaced_and_no_candidate_blamed() -> None:
    with Processes(fakes.misbehave, workers=1) as executor:
        collect(executor, [1])
        executor._workers[0].process.kill()
        executor._workers[0].process.join()
        assert reasons(collect(executor, [1, 2])) == [None, None]


def test_wait_returns_after_its_timeout() -> None:
    with Processes(fakes.misbehave, workers=1) as executor:
        collect(executor, [1])
        executor.submit(0, "sleep")
        started = time.monotonic()
        assert executor.wait(timeout=0.2) == []
        assert time.monotonic() - started < 5
        assert executor.wait(timeout=0) == []


def test_what_cannot_be_sent_is_refused_in_words() -> None:
    with pytest.raises(NasgraphError, match="the evaluation cannot be sent to a worker process"):
        Processes(lambda payload: {"good": 1.0}, workers=1)
    with Processes(fakes.misbehave, workers=1) as executor, pytest.raises(NasgraphError, match="the architecture"):
        executor.submit(0, lambda: None)
    with (
        pytest.raises(NasgraphError, match="cannot be loaded in a worker process: RuntimeError: cannot be made here"),
        Processes(fakes.Unloadable(), workers=1) as executor,
    ):
        collect(executor, [1])
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        Processes(fakes.misbehave, workers=0)


def pids_running(pids: list[int]) -> list[int]:
    """Those of ``pids`` that still run (zombies do not)."""
    running = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            running.append(pid)
    return running


def gone(pids: list[int], within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while pids_running(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not pids_running(pids)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_closing_leaves_no_process() -> None:
    with Processes(fakes.misbehave, workers=2) as executor:
        executor.submit(0, "environment")
        executor.submit(1, "endless")
        ((_, found),) = executor.wait()
        pids = [worker.process.pid for worker in executor._workers]
        assert isinstance(found, Scored) and pids_running(pids) == pids
    assert gone(pids)


PARENT = """
import signal, sys, time
sys.path.insert(0, {tests!r})
import fake_search as fakes
from nasgraph.executors import Processes

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script ignores it
    with Processes(fakes.misbehave, workers=2) as executor:
        executor.submit(0, 1)
        executor.submit(1, 1)
        executor.wait(), executor.wait()
        executor.submit(2, {kind!r})  # one busy, one idle
        print(*[worker.process.pid for worker in executor._workers], flush=True)
        executor.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize(
    ("kind", "how"), [("endless", signal.SIGKILL), ("nap", signal.SIGKILL), ("sleep", signal.SIGINT)]
)
def test_workers_end_with_their_parent(kind: str, how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=str(TESTS), kind=kind))
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and pids_running(pids) == pids
        parent.send_signal(how)
        _, errors = parent.communicate(timeout=30)
    assert gone(pids)
    assert "nasgraph-worker" not in errors  # the workers end without a word
    if how == signal.SIGINT:
        assert errors.strip().endswith("KeyboardInterrupt")


def test_a_script_without_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(TESTS)!r})
            import fake_search as fakes
            from nasgraph.executors import Processes
            with Processes(fakes.misbehave, workers=1) as executor:
                executor.submit(0, 1)
                executor.wait()
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "if __name__ == '__main__':" in done.stderr.strip().splitlines()[-1]


def test_failures_stop_a_search_when_most_of_five_fail() -> None:
    good, bad = Scored({"a": 1.0}), Failed("error", "ImportError: no module x")
    watch = FailureWatch()
    for result in (bad, bad, good, good):
        watch.add(result)
    with pytest.raises(SearchStopped, match="3 of 5 .* 2 with 'error': ImportError: no module x") as stopped:
        watch.add(Failed("timeout", "slow"))
    assert "\n" not in str(stopped.value)
    watch = FailureWatch()
    for result in (bad, good, bad, good, good, bad):  # half of six is not more than half
        watch.add(result)


def test_ray_actors_survive_too() -> None:
    kinds = {"raise": "error", "sys_exit": "exit", "nan": "not_finite", "os_exit": "crashed", "sleep": "timeout"}
    with RayActors(fakes.misbehave, workers=1, timeout_s=2.0) as executor:
        found = collect(executor, [*kinds, 1, "environment"])
    assert reasons(found) == [*kinds.values(), None, None]
    assert isinstance(found[-1], Scored)
    assert (found[-1].values["slots"], found[-1].values["threads"]) == (1.0, 1.0)


@pytest.mark.slow
def test_ray_says_what_it_cannot_load_or_place() -> None:
    with (
        pytest.raises(NasgraphError, match="cannot be loaded in a Ray worker: RuntimeError: cannot be made here"),
        RayActors(fakes.Unloadable(), workers=1),
    ):
        pass
    with (
        pytest.raises(NasgraphError, match="needs 1 CPU and 1000 GPU"),
        RayActors(fakes.misbehave, workers=1, num_gpus=1000, start_s=2.0),
    ):
        pass
