"""Where the trials of a search are kept: a journal that several processes append to, or an SQL database."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from luthier.engine.samplers import optuna_
from luthier.engine.spec import must_be_storage
from luthier.errors import LuthierError

BLOCK = 1 << 16
RECORD = b'{"op_code"'
"""how every line of a journal begins"""
SQL: dict[str, Any] = {"pool_pre_ping": True}
"""How databases are opened: a connection that was closed while a model was looked at is opened again."""
PATIENT = {**SQL, "connect_args": {"timeout": 60}}
"""The same for SQLite, whose writers wait for each other."""
AT_ONCE = ("already exists", "UNIQUE", "uplicate")
"""What databases say where two processes make the same tables at once; the next look finds them made."""
Call = TypeVar("Call", bound=Callable[..., Any])


def kept(call: Call) -> Call:
    """The same call, with what a storage raises as one line."""

    @wraps(call)
    def checked(*args: Any, **named: Any) -> Any:
        try:
            return call(*args, **named)
        except _faults() as fault:
            raise _fault(fault) from None

    return checked  # type: ignore[return-value]


def begun(storage: Path | str, name: str, sampler: Any) -> Any:
    """The study of this name, made anew if there is none.

    Raises LuthierError where the storage cannot be had.
    """
    optuna, tries = optuna_(), 5
    while True:
        tries -= 1
        try:
            return optuna.create_study(storage=opened(storage), study_name=name, load_if_exists=True, sampler=sampler)
        except LuthierError:
            raise
        except Exception as fault:  # SQLAlchemy's, a driver's, the journal's
            if not tries or not any(word in str(fault) for word in AT_ONCE):
                raise _fault(fault) from None
            time.sleep(0.2)


def _fault(fault: Exception) -> LuthierError:
    why = " ".join(str(fault).split())[:160] or type(fault).__name__
    return LuthierError(f"cannot keep trials there ({why})", where="search.storage")


def _faults() -> tuple[type[Exception], ...]:
    sql = sys.modules.get("sqlalchemy.exc")
    return (OSError, optuna_().exceptions.OptunaError, *([sql.SQLAlchemyError] if sql else ()))


def opened(storage: Path | str) -> Any:
    """Optuna's storage for a journal (a Path, or "journal:PATH") or an SQL address.

    Raises LuthierError for other words, and whatever a driver raises.
    """
    optuna = optuna_()
    if isinstance(storage, str) and "://" in storage:
        return optuna.storages.RDBStorage(storage, PATIENT if storage.startswith("sqlite") else SQL)
    if isinstance(storage, str):
        must_be_storage(storage)
    path = Path(str(storage).removeprefix("journal:"))
    _must_be_journal(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=Lock(path))
    return optuna.storages.JournalStorage(backend)


def _must_be_journal(path: Path) -> None:
    """LuthierError for a file that holds something else, which a `Lock` would cut."""
    if path.is_file():
        with path.open("rb") as file:
            begins = file.read(len(RECORD))
        if not RECORD.startswith(begins):  # the first record may be half written
            what = f"{path} holds something else than trials"
            raise LuthierError(what, where="search.storage", do="name a file that is not there yet")


class Lock:
    """Exclusive, and gone with the process that holds it. Whoever takes it cuts off a line that a dead process has
    left half written, on which the journal could never be read again."""

    def __init__(self, path: Path):
        self._path = path
        self._held = -1

    def acquire(self) -> bool:
        self._held = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(self._held, fcntl.LOCK_EX)
        size = os.fstat(self._held).st_size
        if size and os.pread(self._held, 1, size - 1) != b"\n":
            os.ftruncate(self._held, self._whole(size))
        return True

    def release(self) -> None:
        os.close(self._held)

    def _whole(self, size: int) -> int:
        """Bytes up to the end of the last whole line."""
        while size:
            start = max(0, size - BLOCK)
            found = os.pread(self._held, size - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            size = start
        return 0
