"""Processes that die: start a child, kill it at a random moment, look at what it has left."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

HALF = re.compile(r"\..+\.(tmp-\d+-[0-9a-f]{8}|part)|.+\.part\d*|ledger\.sqlite-(wal|journal)")
"""Names of what is being written."""

Place = tuple[str, int]
"""file and line"""


def fork(body: Callable[[], object]) -> int:
    """The id of a child that runs `body` and ends. Nothing is imported anew."""
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def ended(pid: int) -> int:
    """The child's exit code; negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def script(name: str, *words: object) -> None:
    """Run a script of the tests in a process of its own, which must end well."""
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, Path(__file__).with_name(name), *map(str, words)]
    done = subprocess.run(command, env=alone | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def mute() -> None:
    """The child says nothing to the terminal of its parent."""
    sys.stdout = sys.stderr = io.StringIO()


def heard(body: Callable[[], int | None]) -> tuple[int, str, str]:
    """(what `body` gave, what it said, what it complained of), run in a child."""
    return begun(body)()


def begun(body: Callable[[], int | None]) -> Callable[[], tuple[int, str, str]]:
    """The same for a child that is at work: what is returned waits for its end."""
    folder = tempfile.TemporaryDirectory()
    said, complained = Path(folder.name, "out"), Path(folder.name, "err")

    def speak() -> None:
        with said.open("w") as sys.stdout, complained.open("w") as sys.stderr:
            code = body() or 0
        os._exit(code)

    pid = fork(speak)

    def end() -> tuple[int, str, str]:
        with folder:
            return ended(pid), said.read_text(), complained.read_text()

    return end


def at_lines(files: Collection[str], act: Callable[[Place], object], inside: CodeType | None = None) -> None:
    """From now on `act` is called before each line that the process runs of these files.

    inside: only for lines that run for this function.
    """
    lock = threading.Lock()

    def called(frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code is not inside:
            frame = frame.f_back
        return frame is not None

    def trace(frame: FrameType, event: str, arg: object):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and (inside is None or called(frame)):
            with lock:
                act((frame.f_code.co_filename, frame.f_lineno))
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


def half_written(folder: Path) -> list[Path]:
    """What a killed process was writing below the folder."""
    return [path for path in folder.rglob("*") if HALF.fullmatch(path.name)]


@dataclass
class Mortal:
    """A body that is started again and again, and killed.

    files: of the code that writes.  seconds: a life takes at most.  places: the lines of these files that it runs,
    and how often.
    """

    body: Callable[[], object]
    files: Collection[str]
    seconds: float = 0.0
    places: Counter[Place] = field(default_factory=Counter)

    def measure(self) -> None:
        """Take the measure of a life, calm and in this process, so that children need to import nothing."""
        began = time.monotonic()
        at_lines(self.files, lambda place: self.places.update([place]))
        try:
            self.body()
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
        self.seconds = time.monotonic() - began

    def at_a_line(self, dice: random.Random, act: Callable[[], object]) -> Callable[[], None]:
        """What to call in a child, so that it acts once, before a random line that writes."""
        place = dice.choice(list(self.places))
        left = dice.randrange(self.places[place])

        def here(now: Place) -> None:
            nonlocal left
            left -= now == place
            if left == -1 and now == place:
                act()

        return lambda: at_lines(self.files, here)

    def live(self, dice: random.Random, share: float = 1.0) -> tuple[int, str]:
        """(exit code, how) of a life that ends at a random moment, by the clock or at a line that writes; every such
        line is as likely as another, however often it runs.

        share: of a calm life's length at which the clock strikes at the latest.
        """
        how, strike = dice.choice(["clock", "line"]), self.at_a_line(dice, die)
        pause = dice.random() * share * self.seconds

        def body() -> None:
            mute()
            if how == "line":
                strike()
            self.body()

        began, pid = time.monotonic(), fork(body)
        if how == "clock":
            kill_after(pid, pause)
        code = ended(pid)
        if code == 0 and how == "clock":  # it was measured on a slower day
            self.seconds = min(self.seconds, time.monotonic() - began)
        return code, how


def kill_after(pid: int, seconds: float) -> None:
    """Kill a child of ours after so many seconds, unless it has ended."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(min(left, 0.005))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
