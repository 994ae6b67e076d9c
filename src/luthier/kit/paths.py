"""Names that may be paths, looked at without a surprise."""

from __future__ import annotations

import os
from pathlib import Path


def there(name: str | os.PathLike[str]) -> Path | None:
    """The path, if something stands there; None also for what no path can be: a NUL, 5000 letters, no such home."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None
