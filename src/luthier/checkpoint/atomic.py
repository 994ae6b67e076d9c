"""Writing that is all or nothing: a folder appears whole, or the old one stays.

`write_folder` gives a temporary sibling; when its block ends well everything is synced to disk and the
two folders are exchanged in one step of the file system. A process killed at any moment leaves the
old folder whole; what it left behind is removed by the next write to the same place.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import LuthierError

MARK = ".luthier"


def disk_fault(error: OSError, where: Path) -> LuthierError:
    """An operating system error as one line."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else f"cannot be written ({error.strerror})"
    return LuthierError(what, where=str(where), do="nothing was changed" + "; free some space" * full)


@contextmanager
def write_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary sibling of `out` to fill; it becomes `out` when the block ends without an error.

    A folder that Luthier did not write is never replaced. Raises LuthierError for that and for what
    the disk refuses.
    """
    out = Path(os.path.abspath(out))
    out = out.resolve() if out.is_symlink() else out
    if out.exists() and not _ours(out):
        raise LuthierError("exists and was not written by Luthier", where=str(out), do="choose another folder")
    temp = out.parent / f".{out.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        temp.mkdir()
    except OSError as error:
        raise disk_fault(error, out) from None
    held = os.open(temp, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield temp
        (temp / MARK).write_text("This folder was written by Luthier, which may replace it.\n")
        _sync(temp)
        _put(temp, out)
    except OSError as error:
        raise disk_fault(error, out) from None
    finally:
        os.close(held)
        shutil.rmtree(temp, ignore_errors=True)


def _ours(out: Path) -> bool:
    return out.is_dir() and ((out / MARK).exists() or next(out.iterdir(), None) is None)


def _sweep(out: Path) -> None:
    """Remove what killed processes left beside `out`."""
    pattern = re.compile(re.escape(f".{out.name}.tmp-") + r"(\d+)-[0-9a-f]{8}")
    for left in out.parent.iterdir():
        found = pattern.fullmatch(left.name)
        if found and not _alive(int(found[1])) and _free(left):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _free(folder: Path) -> bool:
    """Whether nobody, on this machine or another, holds the folder's lock."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _sync(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in [*files, "."]:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _put(temp: Path, out: Path) -> None:
    """Make `temp` be `out`; what was `out` is then in `temp`, for the caller to remove."""
    if not out.exists():
        os.rename(temp, out)
    elif not _exchange(temp, out):
        old = temp.with_name(temp.name[:-8] + secrets.token_hex(4))
        os.rename(out, old)
        os.rename(temp, out)
        shutil.rmtree(old, ignore_errors=True)
    fd = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system has no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        return libc.renameat2(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return libc.renamex_np(names[0], names[1], 2) == 0  # RENAME_SWAP
    return False
