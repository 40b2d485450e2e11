"""Where candidates are evaluated: in this process, in child processes, or on Ray. One interface for all three.

A bad candidate (it raises, returns NaN, exhausts memory, calls ``sys.exit``, segfaults, never ends) comes back as a
:class:`Failed` with its reason, and the next one runs. :class:`InProcess` can only promise this for what Python can
catch; :class:`Processes` and :class:`RayActors` also survive the death and the endless loop of a candidate.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from nasgraph.errors import ConfigError, NasgraphError, SearchStopped
from nasgraph.objectives.base import Failed, Result, Scored, failure

Evaluate = Callable[[Any], "Result | Mapping[str, float]"]

SLOTS = "NASGRAPH_SLOTS"  # how many candidates share the machine: a latency is refused when it is not 1


class Executor(Protocol):
    """Takes candidates by ticket and hands results back in any order. Use it as a context manager."""

    slots: int
    timeout_s: float | None
    """Longest time for a candidate; may be changed between candidates. None: no limit."""

    def submit(self, ticket: int, payload: Any) -> None:
        """Queue ``evaluate(payload)``; its result comes back under ``ticket``."""

    def wait(self, timeout: float | None = None) -> list[tuple[int, Result]]:
        """Results not handed out yet. Blocks until there is one, nothing is running, or ``timeout`` seconds passed."""

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def guarded(evaluate: Evaluate, payload: Any) -> Result:
    """``evaluate(payload)`` with every exception but KeyboardInterrupt turned into a :class:`Failed`."""
    try:
        found = evaluate(payload)
        return found if isinstance(found, Scored | Failed) else Scored(dict(found))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return failure(error)


class FailureWatch:
    """Stops a search whose candidates fail: more than half of at least ``patience`` evaluated ones."""

    def __init__(self, patience: int = 5) -> None:
        self.patience, self.evaluated, self.failed = patience, 0, 0
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, result: Result) -> None:
        """Count one evaluated candidate. Raises: SearchStopped: too many failed; names the commonest reason."""
        self.evaluated += 1
        if isinstance(result, Failed):
            self.failed += 1
            self._reasons[result.reason] += 1
            self._examples[result.reason] = " ".join(result.detail.split())
        if self.evaluated >= self.patience and 2 * self.failed > self.evaluated:
            reason, count = self._reasons.most_common(1)[0]
            raise SearchStopped(
                f"{self.failed} of {self.evaluated} evaluated architectures failed, {count} with '{reason}': "
                f"{self._examples[reason][:300]}. What was computed is kept; mend the cause and resume."
            )


class InProcess:
    """One candidate at a time in this process: the simplest to debug. A segfault or endless loop is not survived."""

    slots = 1
    timeout_s: float | None = None

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._queue: deque[tuple[int, Any]] = deque()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.clear()

    def submit(self, ticket: int, payload: Any) -> None:
        self._queue.append((ticket, payload))

    def wait(self, timeout: float | None = None) -> list[tuple[int, Result]]:
        if not self._queue or (timeout is not None and timeout <= 0):
            return []
        ticket, payload = self._queue.popleft()
        return [(ticket, guarded(self._evaluate, payload))]


class Processes:
    """Child processes that stay warm between candidates, one thread each; a dead one is replaced.

    Each worker has a pipe of its own, so no lock is shared that a dying candidate could take with it, and the end of a
    worker is seen as the end of its pipe. Workers ignore Ctrl-C (the parent stops them) and end with their parent,
    however it ends.

    Args:
        evaluate: importable by name in a child process (no lambda, no inner function); pickled once per worker.
        workers: number of processes.
        timeout_s: seconds of wall clock after which a candidate is killed; None: never.
        memory_gb: GiB of private memory a candidate may take beyond what its worker holds when idle. Linux only.
        preload: modules imported once, in the server that workers are forked from (Linux).

    Raises: NasgraphError: ``evaluate`` cannot be pickled, or a worker does not start.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        workers: int,
        timeout_s: float | None = None,
        memory_gb: float | None = None,
        preload: Sequence[str] = ("torch",),
    ) -> None:
        if workers < 1:
            raise ConfigError(f"workers must be at least 1, not {workers}")
        if memory_gb is not None and sys.platform != "linux":
            raise ConfigError("memory_gb needs Linux (RLIMIT_DATA): leave it out on this machine")
        self.slots, self.timeout_s = workers, timeout_s
        self._memory = None if memory_gb is None else int(memory_gb * 2**30)
        self._pickled = _pickled(evaluate, "the evaluation")
        self._context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            self._context.set_forkserver_preload([__name__, *preload])
        self._workers: list[_Worker] = []
        self._queue: deque[tuple[int, bytes]] = deque()
        self._done: list[tuple[int, Result]] = []

    def __enter__(self) -> Processes:
        self._workers = [self._start() for _ in range(self.slots)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.clear()
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def submit(self, ticket: int, payload: Any) -> None:
        self._queue.append((ticket, _pickled((ticket, payload), "the architecture")))
        self._dispatch()

    def wait(self, timeout: float | None = None) -> list[tuple[int, Result]]:
        until = None if timeout is None else time.monotonic() + timeout
        while not self._done and (self._queue or any(worker.ticket is not None for worker in self._workers)):
            limits = [worker.deadline for worker in self._workers if worker.deadline is not None]
            limits += [] if until is None else [until]
            patience = max(0.0, min(limits) - time.monotonic()) if limits else None
            for pipe in connection.wait([worker.pipe for worker in self._workers], patience):
                self._receive(next(worker for worker in self._workers if worker.pipe is pipe))
            self._expire()
            self._dispatch()
            if until is not None and time.monotonic() >= until:
                break
        done, self._done = self._done, []
        return done

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._pickled, self.slots, self._memory)
        process = self._context.Process(target=_serve, args=arguments, name="nasgraph-worker")
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _replace(self, worker: _Worker) -> None:
        worker.stop()
        self._workers[self._workers.index(worker)] = self._start()

    def _dispatch(self) -> None:
        for worker in self._workers:
            if self._queue and worker.ready and worker.ticket is None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died while idle: no one's fault
                    worker.pipe.send_bytes(self._queue[0][1])
                    worker.ticket, _ = self._queue.popleft()
                    worker.deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s

    def _receive(self, worker: _Worker) -> None:
        try:
            message: Any = pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            worker.process.join()
            ended = _exit_text(worker.process.exitcode)
            if not worker.ready:
                raise NasgraphError(
                    f"a worker process ended while starting ({ended}). A script that starts a search must do so under "
                    "`if __name__ == '__main__':`"
                ) from None
            if worker.ticket is not None:
                self._done.append((worker.ticket, Failed("crashed", ended)))
            self._replace(worker)
            return
        if isinstance(message, str):
            if message != "ready":
                raise NasgraphError(f"the evaluation cannot be loaded in a worker process: {message}")
            worker.ready = True
            return
        worker.ticket = worker.deadline = None
        self._done.append(message)
        if isinstance(message[1], Failed) and message[1].reason == "out_of_memory":
            self._replace(worker)  # what is left of its memory is not a fair start for the next candidate

    def _expire(self) -> None:
        for worker in list(self._workers):
            if worker.deadline is None or time.monotonic() < worker.deadline or worker.pipe.poll():
                continue
            assert worker.ticket is not None
            self._done.append((worker.ticket, Failed("timeout", f"not finished after {self.timeout_s:g} s")))
            self._replace(worker)


class _Worker:
    """The parent's side of one child process."""

    def __init__(self, process: Any, pipe: Any) -> None:
        self.process, self.pipe = process, pipe
        self.ready = False
        self.ticket: int | None = None
        self.deadline: float | None = None

    def stop(self) -> None:
        self.pipe.close()
        if self.ready and self.ticket is None:
            self.process.join(1.0)  # idle: it leaves at the end of its pipe
        self.process.kill()
        self.process.join()
        self.process.close()


def _serve(pipe: Any, pickled: bytes, slots: int, memory: int | None) -> None:
    """The child's side: evaluate what comes through the pipe until it ends, or nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    os.environ[SLOTS] = str(slots)
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            import torch

            torch.set_num_threads(1)
            evaluate: Evaluate = pickle.loads(pickled)
        except BaseException as error:
            pipe.send_bytes(pickle.dumps(failure(error).detail))
            return
        if memory is not None:
            _limit_memory(memory)
        pipe.send_bytes(pickle.dumps("ready"))
        while True:
            ticket, payload = pickle.loads(pipe.recv_bytes())
            result = guarded(evaluate, payload)
            try:
                answer = pickle.dumps((ticket, result))
            except Exception as error:
                answer = pickle.dumps((ticket, Failed("error", f"the result cannot be pickled: {error}")))
            pipe.send_bytes(answer)


def _end_with_parent() -> None:
    """End this process when the one that asked for it ends, also by kill -9, also amid a call that holds the GIL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; the parent is the fork server
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limit_memory(extra: int) -> None:
    """Let this process take ``extra`` bytes more. Counts private writable memory: mapped files and the address space
    that CUDA reserves do not count, as they would under RLIMIT_AS."""
    import resource

    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (int(held.split()[1]) * 1024 + extra, hard))


def _pickled(thing: Any, what: str) -> bytes:
    try:
        return pickle.dumps(thing)
    except Exception as error:
        raise NasgraphError(
            f"{what} cannot be sent to a worker process: {error}. Use functions and classes defined at the top of a "
            "module (no lambda), or evaluate in this process."
        ) from error


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


class RayActors:
    """One Ray actor per worker, on this machine or on the cluster that ``RAY_ADDRESS`` names.

    Ray only places work: nothing that a search knows is stored in it.

    Args:
        evaluate: pickled once and held by each actor.
        workers: number of actors; each takes one CPU.
        num_gpus: GPUs per actor, may be a fraction (0.25: four actors share one).
        timeout_s: seconds of wall clock after which a candidate's actor is killed and replaced; None: never.
        start_s: seconds to wait for an actor to be placed and to start.

    Raises: NasgraphError: ``evaluate`` cannot be pickled, or the cluster has no room for an actor.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        workers: int,
        num_gpus: float = 0.0,
        timeout_s: float | None = None,
        start_s: float = 120.0,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"workers must be at least 1, not {workers}")
        self.slots, self.num_gpus, self.timeout_s, self.start_s = workers, num_gpus, timeout_s, start_s
        self._evaluate = evaluate
        self._free: list[Any] = []
        self._running: dict[Any, tuple[int, Any, float | None]] = {}  # object reference -> ticket, actor, deadline
        self._queue: deque[tuple[int, Any]] = deque()
        self._started_ray = False

    def __enter__(self) -> RayActors:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's new default; silences its notice
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if not ray.is_initialized():
            here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(self.slots, os.cpu_count() or 1)}
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **here)
            self._started_ray = True
        try:
            try:
                self._pickled = ray.put(ray.cloudpickle.dumps(self._evaluate))
            except Exception as error:
                raise NasgraphError(f"the evaluation cannot be sent to Ray: {error}") from error
            self._make = ray.remote(num_cpus=1, num_gpus=self.num_gpus, max_restarts=0)(_Actor)
            self._free = [self._make.remote() for _ in range(self.slots)]
            for actor in self._free:
                self._greet(actor)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        for actor in [*self._free, *(actor for _, actor, _ in self._running.values())]:
            ray.kill(actor)
        self._free, self._running = [], {}
        self._queue.clear()
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False

    def submit(self, ticket: int, payload: Any) -> None:
        self._queue.append((ticket, payload))
        self._dispatch()

    def wait(self, timeout: float | None = None) -> list[tuple[int, Result]]:
        import ray

        until = None if timeout is None else time.monotonic() + timeout
        done: list[tuple[int, Result]] = []
        while not done and self._running:
            limits = [deadline for _, _, deadline in self._running.values() if deadline is not None]
            limits += [] if until is None else [until]
            patience = max(0.0, min(limits) - time.monotonic()) if limits else None
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=patience)
            for reference in ready:
                ticket, actor, _ = self._running.pop(reference)
                result, alive = self._result(reference)
                self._free.append(actor if alive else self._start())
                done.append((ticket, result))
            now = time.monotonic()
            for reference, (ticket, actor, deadline) in list(self._running.items()):
                if deadline is not None and now >= deadline:
                    del self._running[reference]
                    ray.kill(actor)
                    self._free.append(self._start())
                    done.append((ticket, Failed("timeout", f"not finished after {self.timeout_s:g} s")))
            self._dispatch()
            if until is not None and now >= until:
                break
        return done

    def _dispatch(self) -> None:
        while self._queue and self._free:
            ticket, payload = self._queue.popleft()
            actor = self._free.pop(0)
            deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s
            self._running[actor.run.remote(payload)] = (ticket, actor, deadline)

    def _start(self) -> Any:
        actor = self._make.remote()
        self._greet(actor)
        return actor

    def _greet(self, actor: Any) -> None:
        """Wait until the actor runs: its start is not part of a candidate's time."""
        import ray

        try:
            problem = ray.get(actor.load.remote(self._pickled, sys.path, self.slots), timeout=self.start_s)
        except ray.exceptions.GetTimeoutError:
            raise NasgraphError(
                f"Ray started no worker within {self.start_s:g} s: each of the {self.slots} needs 1 CPU and "
                f"{self.num_gpus:g} GPU; ask for fewer workers or a smaller num_gpus"
            ) from None
        except ray.exceptions.RayError as error:
            problem = _first_line(error)
        if problem is not None:
            raise NasgraphError(f"the evaluation cannot be loaded in a Ray worker: {problem}")

    @staticmethod
    def _result(reference: Any) -> tuple[Result, bool]:
        """What the actor returned, and whether it still lives."""
        import ray

        try:
            found: Result = ray.get(reference)
            return found, True
        except ray.exceptions.OutOfMemoryError as error:
            return Failed("out_of_memory", _first_line(error)), False
        except ray.exceptions.RayActorError as error:
            return Failed("crashed", _first_line(error)), False
        except ray.exceptions.RayError as error:
            return Failed("error", _first_line(error)), True


class _Actor:
    """What runs inside Ray: holds the evaluation, evaluates what it is sent."""

    def load(self, pickled: bytes, path: list[str], slots: int) -> str | None:
        """Unpickle the evaluation, modules looked for where the parent finds them. Returns: what went wrong."""
        os.environ[SLOTS] = str(slots)
        sys.path += [folder for folder in path if folder not in sys.path]
        try:
            import torch

            torch.set_num_threads(1)
            self._evaluate: Evaluate = pickle.loads(pickled)
        except BaseException as error:
            return failure(error).detail
        return None

    def run(self, payload: Any) -> Result:
        return guarded(self._evaluate, payload)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
