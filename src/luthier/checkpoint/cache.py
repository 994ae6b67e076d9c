"""The cache folder, and a lock that keeps two processes from making the same thing twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import LuthierError


def cache_folder(*parts: str) -> Path:
    """A folder in the cache, made if need be: LUTHIER_CACHE, else luthier in XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("LUTHIER_CACHE")
    root = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LuthierError(
            f"the cache cannot be made ({error.strerror})", where=str(folder), do="set LUTHIER_CACHE to a folder"
        ) from None
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever holds it; freed by the system when a process dies."""
    import fcntl

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
