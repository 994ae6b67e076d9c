"""Work for the processes of a pool: what is slow, dies or counts where it runs."""

import os
import signal
import time

from luthier.errors import LuthierError


def work(task):
    what, value = task
    if what == "sleep":
        time.sleep(value)
    if what == "signal":
        os.kill(os.getpid(), getattr(signal, value))
        time.sleep(60)
    if what == "exit":
        os._exit(value)
    if what == "pid":
        time.sleep(0.05)
        return os.getpid()
    return value


def warm():
    pass


def lacking():
    raise LuthierError("certificates need a solver")


def broken():
    os._exit(3)
