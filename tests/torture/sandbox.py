"""Runs hostile cases, each in a child with bounded memory, time and file size, and looks at what it left behind.

    python tests/torture/sandbox.py FOLDER NAME...      one JSON object a case on standard output

The parent imports everything once and forks for each case. A case's folder is its working directory and home;
what the child may write is `out`, `runs/`, `home/` (with the cache) and nothing else. FSIZE bounds what it can
put on the disk, DATA what it can take, CPU how long it can think.
"""

import contextlib
import gc
import hashlib
import importlib
import io
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

MIB, FILE = 1 << 20, 256 << 20
PATIENCE = 20
"""seconds that a child may wait for something, beside five times what it may work: machines are shared"""
ALLOWED = ("out", "runs", "home", "stdout", "stderr")
"""What a command may make or change in the folder it works in."""


class Left(NamedTuple):
    """What a child left. code: exit code, or minus the signal.  changed: paths it should not have touched.
    output: every path that is new or other than before.  memory: peak over the parent's, in MiB.  cpu: seconds."""

    name: str
    code: int
    out: str
    err: str
    changed: list[str]
    output: list[str]
    memory: float
    cpu: float


def snapshot(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Every path under the folder with its kind and content."""
    found = {}
    for root, folders, files in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [f for f in folders if f not in skip]
            files = [f for f in files if f not in skip]
        for name in [*folders, *files]:
            path = Path(root, name)
            if path.is_symlink():
                kind = os.readlink(path)
            elif path.is_file():
                size = path.stat().st_size
                kind = str(size) if size > 4 * MIB else hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                kind = "other"
            found[str(path.relative_to(folder))] = kind
    return found


def child(make, here: Path, limit: int, cpu: int) -> None:
    """Never returns. The case is prepared before the bounds hold, so that only the product pays for it."""
    from luthier.cli import main
    from luthier.errors import LuthierError

    os.chdir(here)
    code = 70
    try:
        work = make
        for name, number in (("stdout", 1), ("stderr", 2)):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, number)
        signal.alarm(PATIENCE + 5 * cpu)
        used = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + cpu, int(used) + cpu + 1))
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + limit, data + limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if callable(work):
            try:
                work()
                code = 0
            except LuthierError as fault:
                print(f"luthier: {fault}", file=sys.stderr)
                code = 2
        else:
            code = main(work)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(case, folder: Path, base: float = 0.0) -> Left:
    """One case in a folder of its own. base: the peak of a child that does nothing."""
    around = folder / f"{case.place}"
    here = around / "here"
    here.mkdir(parents=True)
    (around / "secret").write_text("key")
    (here / "home" / "tmp").mkdir(parents=True)
    os.environ.update(
        HOME=str(here / "home"), LUTHIER_CACHE=str(here / "home" / "cache"), TMPDIR=str(here / "home/tmp")
    )
    words = case.make(here)
    before = snapshot(around), snapshot(here, ALLOWED)
    pid = os.fork()
    if pid == 0:
        child(words, here, case.memory * MIB, case.cpu)
    _, status, usage = os.wait4(pid, 0)
    after = snapshot(around), snapshot(here, ALLOWED)
    inside = tuple(f"here/{name}" for name in ALLOWED)
    changed = [p for b, a in zip(before, after, strict=True) for p in b.keys() | a.keys() if b.get(p) != a.get(p)]
    output = [p for p in after[0] if before[0].get(p) != after[0][p] and p not in ("here/stdout", "here/stderr")]
    return Left(
        case.name, os.waitstatus_to_exitcode(status), _text(here / "stdout"), _text(here / "stderr"),
        sorted(p for p in changed if not p.startswith(inside)), sorted(output),
        usage.ru_maxrss / 1024 - base, usage.ru_utime + usage.ru_stime,
    )  # fmt: skip


def _text(path: Path) -> str:
    return path.read_bytes()[:20_000].decode("utf-8", "replace")


GOOD = ("run: whole and good", "recipe: whole and good", "mergekit: whole and good", "adapter: whole and good",
        "data: whole and good", "model: whole and good", "index: whole and good")  # fmt: skip


def warm(folder: Path) -> None:
    """A model that the cases share; and everything they will import, imported by carrying out the good ones."""
    import hostile
    import torch

    from luthier.cli import main
    from luthier.testing import tiny

    torch.set_num_threads(1)
    tiny.checkpoint(folder / "model")
    os.environ["HOSTILE_MODEL"] = str(folder / "model")
    for name in GOOD:
        here = folder / hostile.CASES[name].place
        here.mkdir(parents=True)
        words = hostile.CASES[name].make(here)
        os.chdir(here)
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(words) == 0, name  # type: ignore[arg-type]
    for name in ("engine.trainer", "sos.certify", "tune.full", "model.build"):
        importlib.import_module(f"luthier.{name}")
    for name in ("clarabel", "scipy.sparse", "gguf"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the collector of every child copies the whole heap


def main() -> None:
    import shutil

    import hostile

    folder = Path(sys.argv[1]).resolve()
    warm(folder / "warm")
    idle = hostile.Case("idle", lambda here: print, ())
    base = run(idle, folder).memory
    for name in sys.argv[2:] or hostile.CASES:
        left = run(hostile.CASES[name], folder, base)
        print(json.dumps(left._asdict()), flush=True)
        shutil.rmtree(folder / hostile.CASES[name].place, ignore_errors=True)


if __name__ == "__main__":
    main()
