"""What an engine asks of the operating system: Ctrl-C as a wish, threads, the memory held. POSIX."""

from __future__ import annotations

import math
import os
import platform
import resource
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """A list that the first Ctrl-C fills; the second one acts as it did before. Where Ctrl-C is ignored
    (a process in the background) it stays so."""
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    elsewhere = threading.current_thread() is not threading.main_thread()  # signals reach only that one
    if elsewhere or before == signal.SIG_IGN:
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def peak_rss() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def one_thread_each() -> Iterator[None]:
    """A pool has the cores: torch's own threads would wait for one another at every small kernel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(
    work: Callable[[Any], T], items: Iterable[Any], threads: int, weigh: Callable[[Any], int] = lambda item: 1,
    most: float = math.inf,
) -> Iterator[T]:  # fmt: skip
    """work(item) in order, by several threads which run only a little ahead.

    weigh, most: items are started as long as those that are under way, or not yet taken, weigh no more together; one
    that weighs more comes alone.
    """
    if threads == 1:
        yield from map(work, items)
        return
    weighed = ((item, weigh(item)) for item in items)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[Future[T], int]] = deque()
        held, waiting = 0, next(weighed, None)
        while waiting or ahead:
            while waiting and len(ahead) <= threads and (not ahead or held + waiting[1] <= most):
                ahead.append((pool.submit(work, waiting[0]), waiting[1]))
                held, waiting = held + waiting[1], next(weighed, None)
            future, weight = ahead.popleft()
            done = future.result()
            del future
            yield done
            held -= weight


def process() -> str:
    """This process, by its machine, start of it and space of numbers, and number."""
    return f"{_here()} {os.getpid()}"


def _here() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def dead(owner: str) -> bool:
    """Whether a process that wrote `process` is known to have ended: it was one of this machine, and is gone."""
    here, _, number = owner.rpartition(" ")
    if not here or here != _here() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
