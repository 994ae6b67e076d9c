"""Processes that each do one job at a time: one that is late is ended, one that dies is replaced, the rest go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from luthier.errors import LuthierError


class Lost(str):
    """Why a job has no answer: a reason in one clause."""


class _Worker:
    """A process, the job it has, and when that is late. `job` is None while it starts or waits."""

    def __init__(self, work: Callable[[Any], Any], warm: Callable[[], None]):
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, work, warm), daemon=True)
        self.process.start()
        there.close()
        self.ready, self.job, self.late = False, None, float("inf")

    def give(self, job: Any, seconds: float | None) -> None:
        self.job = (job,)
        self.late = time.monotonic() + seconds if seconds else float("inf")
        self.pipe.send(job)

    def end(self) -> int | None:
        """Kill it, if it still runs; its exit code."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def answers(
    tasks: Iterable[Any], work: Callable[[Any], Any], warm: Callable[[], None], jobs: int, seconds: float | None
) -> Iterator[tuple[Any, Any]]:
    """(task, work(task)) as they come, not in order; a Lost instead of the answer where there is none.

    work, warm: functions of a module. Each process calls `warm` before its first task; a task's time does not
    hold that.  seconds: what a task may take.
    """
    left, workers = iter(tasks), []
    waiting = list(_first(left, jobs))
    try:
        workers = [_Worker(work, warm) for _ in waiting]
        while waiting or any(w.job for w in workers):
            for worker in workers:
                if worker.ready and not worker.job and waiting:
                    worker.give(waiting.pop(0), seconds)
                    waiting += _first(left, 1)
            soonest = min(w.late for w in workers) - time.monotonic()
            wait([w.pipe for w in workers], None if soonest == float("inf") else max(0.0, soonest))
            for worker in list(workers):
                yield from _heard(worker, seconds)
                if worker.pipe.closed:
                    workers.remove(worker)
                    workers += [_Worker(work, warm)] if waiting else []
    finally:
        for worker in workers:
            if not worker.pipe.closed:
                worker.end()


def _first(left: Iterator[Any], count: int) -> Iterator[Any]:
    for _, task in zip(range(count), left, strict=False):
        yield task


def _heard(worker: _Worker, seconds: float | None) -> Iterator[tuple[Any, Any]]:
    """What the worker has answered, if anything; its pipe is closed where it has ended."""
    job = worker.job
    try:
        if worker.pipe.poll():
            answer = worker.pipe.recv()
            worker.ready, worker.job, worker.late = True, None, float("inf")
            if job:
                yield job[0], answer
            elif answer is not None:
                raise answer  # what `warm` lacks
            return
    except (EOFError, OSError):
        why = _death(worker.end())
        if not job:
            raise LuthierError(f"a process for certificates cannot start: {why}") from None
        yield job[0], Lost(why)
        return
    if job and time.monotonic() >= worker.late:
        worker.end()
        yield job[0], Lost(f"stopped after {seconds:g} s")


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"its process was ended by {name}" + ("; memory may have run out" if -code in (6, 9) else "")
    return f"its process ended with code {code}"


def _serve(pipe: Connection, work: Callable[[Any], Any], warm: Callable[[], None]) -> None:
    """The life of a worker: it ends when its pipe does, or its parent."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer = None
    try:
        warm()
    except LuthierError as fault:
        answer = fault
    while True:
        try:
            pipe.send(answer)
            task = pipe.recv()
        except (EOFError, OSError):
            return
        answer = work(task)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)
