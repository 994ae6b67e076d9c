"""Writing that is all or nothing: a folder or file appears whole, or the old one stays.

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from luthier.errors import LuthierError

MARK, SAID = ".luthier", "This folder was written by Luthier, which may replace what it put there:"
BEFORE = "This folder was written by Luthier, which may replace it."
"""What the mark said when it listed nothing; models hold files then, and a tuned one its change in `delta`."""


def is_full(error: Exception) -> bool:
    """Whether an error says that the disk is full: one of the system, or of a library that passes on its words."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or any(words in str(error) for words in ("No space left on device", "Disk quota exceeded"))


def disk_fault(error: Exception, where: Path) -> LuthierError:
    """An error of writing as one line."""
    if is_full(error):
        return LuthierError("the disk is full", where=str(where), do="nothing was changed; free some space, try again")
    why = getattr(error, "strerror", None) or error
    return LuthierError(f"cannot be written ({why})", where=str(where), do="nothing was changed")


@contextmanager
def write_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary sibling of `out` to fill; it becomes `out` when the block ends without an error.

    A folder that Luthier did not write is never replaced, nor one that holds what it did not put there. Raises
    LuthierError for these, for a mount point, and for what the disk refuses.
    """
    out = Path(os.path.abspath(out))
    out = out.resolve() if out.is_symlink() else out
    temp = _beside(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out.parent, out.name)
        check_replaceable(out)
        temp.mkdir()
    except OSError as error:
        raise disk_fault(error, out) from None
    held = os.open(temp, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield temp
        (temp / MARK).write_text("\n".join([SAID, *_entries(temp)]) + "\n", encoding="utf-8")
        _sync(temp)
        check_replaceable(out)  # hours may have passed
        _put(temp, out)
    except LuthierError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or is_full(error):
            raise disk_fault(error, out) from None
        raise
    finally:
        os.close(held)
        shutil.rmtree(temp, ignore_errors=True)


def write_file(path: Path, text: str) -> Path:
    """Put a text in a file's place in one step; LuthierError, and the old file, where the disk refuses."""
    with _replacing(path) as temp:
        temp.write_text(text, encoding="utf-8")
    return path


@contextmanager
def write_binary(path: Path) -> Iterator[Path]:
    """A temporary sibling of the file `path` to write; synced, it becomes `path` when the block ends without error."""
    with _replacing(path) as temp:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        with temp.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` when the block ends without an error."""
    temp = _beside(path)
    try:
        sweep(path.parent, path.name)
        yield temp
        os.replace(temp, path)
    except OSError as error:
        raise disk_fault(error, path) from None
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder; killed on the way, it is gone from its place whole."""
    if folder.is_dir():
        temp = _beside(folder)
        os.rename(folder, temp)
        shutil.rmtree(temp, ignore_errors=True)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in `folder` of what they were writing, or of `name` alone."""
    pattern = re.compile(r"\.(.+)\.(tmp|old)-(\d+)-[0-9a-f]{8}")
    for left in folder.iterdir() if folder.is_dir() else ():
        found = pattern.fullmatch(left.name)
        if not found or name not in (None, found[1]) or _alive(int(found[3])) or not _free(left):
            continue
        if found[2] == "old" and not (folder / found[1]).exists():
            os.rename(left, folder / found[1])  # killed between two renames: this is the result that stood
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _beside(out: Path, kind: str = "tmp") -> Path:
    return out.parent / f".{out.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def check_apart(out: str | os.PathLike[str], inputs: Iterable[Path]) -> None:
    """LuthierError if an input is the folder `out` or lies in it: it would be gone with what was there."""
    home = Path(out).resolve()
    for path in inputs:
        if home in (path.resolve(), *path.resolve().parents):
            raise LuthierError(f"holds an input, {path}", where=str(out), do="choose another folder for the output")


def check_replaceable(out: Path) -> None:
    """LuthierError for what stands there and must stay."""
    if not os.path.lexists(out):
        return
    if _mounted(out):
        raise LuthierError("is a mount point, which cannot be replaced", where=str(out), do="name a folder inside it")
    if out.is_dir() and next(out.iterdir(), None) is None:
        return
    said, *listed = _mark(out).split("\n")
    if said not in (SAID, BEFORE):
        raise LuthierError("exists and was not written by Luthier", where=str(out), do="choose another folder")
    if said == BEFORE:
        listed = [entry.name for entry in out.iterdir() if entry.name == "delta" or not entry.is_dir()]
        listed += [entry for entry in _entries(out) if re.fullmatch(r"delta/[^/]*", entry)]
    other = min(set(_entries(out)) - {MARK, *listed}, default=None)
    if other is not None:
        what = f"holds {other}, which Luthier did not put there"
        raise LuthierError(what, where=str(out), do="move it away, or choose another folder")


def _mark(out: Path) -> str:
    try:
        return (out / MARK).read_text(encoding="utf-8") if (out / MARK).is_file() else ""
    except ValueError:
        return ""


def _entries(folder: Path) -> list[str]:
    """What a folder holds, and the folders in it."""
    found = (os.path.join(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files))
    return sorted(Path(path).relative_to(folder).as_posix() for path in found)


def _mounted(out: Path) -> bool:
    """Whether something is mounted there; only Linux's own table knows of a folder of the same disk."""
    try:
        table = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        table = []
    place = re.sub(rb"[ \t\n\\\\]", lambda found: b"\\%03o" % found[0][0], os.fsencode(os.path.realpath(out)))
    return os.path.ismount(out) or any(line.split(b" ")[4] == place for line in table)


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
        try:
            os.rename(temp, out)
        except OSError:
            if not out.exists():
                raise
            _swap(temp, out)  # another process was first
    else:
        _swap(temp, out)
    fd = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _swap(temp: Path, out: Path) -> None:
    """Exchange the two, in one step where the system can."""
    if not _exchange(temp, out):
        old = _beside(out, "old")
        os.rename(out, old)
        os.rename(temp, out)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system has no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        return libc.renameat2(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return libc.renamex_np(names[0], names[1], 2) == 0  # RENAME_SWAP
    return False
