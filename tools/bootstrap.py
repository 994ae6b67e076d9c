"""Make .venv from constraints.txt. Standard library only; run by the Makefile.

usage: python3 tools/bootstrap.py run|test

Installing again is skipped while the pins and pyproject.toml are unchanged. On Linux x86_64 the default torch
wheel brings gigabytes of CUDA: before anything is installed the wheel on offer is asked for, and a CUDA build is
refused unless LUTHIER_CUDA=1.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / "python"


def fail(what: str) -> None:
    sys.exit(f"setup: {what}")


def check_prerequisites() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  whoever runs this may have an older one
        fail(f"Python {platform.python_version()} is too old; 3.11 or newer is needed (make setup PYTHON=python3.11)")
    if not shutil.which("git"):
        fail("git is missing; install it with your system's package manager")
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        fail("Python's venv module is incomplete; install it (Debian and Ubuntu: apt-get install python3-venv)")
    free = shutil.disk_usage(ROOT).free
    if free < 4 << 30 and not PYTHON.exists():
        fail(f"{free / 2**30:.1f} GiB of disk are free here; the environment and the quick start need 4")


def section(name: str) -> list[str]:
    """The pins between `# [name]` and the next section."""
    pins, inside = [], False
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("# ["):
            inside = line == f"# [{name}]"
        elif inside and line and not line.startswith("#"):
            pins.append(line)
    return pins


def stamp(name: str) -> tuple[Path, str]:
    text = "\n".join(section(name)) + (ROOT / "pyproject.toml").read_text() + sys.version
    return VENV / f".installed-{name}", hashlib.sha256(text.encode()).hexdigest()


def pip(*args: str, quiet: bool = True) -> subprocess.CompletedProcess:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *(["-q"] if quiet else []), *args]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if "ERROR" in line] or [done.stderr[-500:]]
        fail(f"pip {args[0]} failed: {lines[-1].strip()}")
    return done


def refuse_cuda(pin: str) -> None:
    """Look at the metadata of the torch wheel pip would take; nothing is installed by the look."""
    if os.environ.get("LUTHIER_CUDA") == "1" or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return
    report = pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", pin).stdout
    wheel = json.loads(report)["install"][0]["metadata"]
    needs = [r for r in wheel.get("requires_dist", []) if r.lower().startswith(("nvidia", "cuda"))]
    if needs:
        fail(
            f"the {wheel['name']} {wheel['version']} wheel on offer is a CUDA build ({len(needs)} CUDA packages); "
            "point pip at PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL, as its install page says) or set LUTHIER_CUDA=1"
        )


def install(name: str) -> None:
    path, digest = stamp(name)
    if path.exists() and path.read_text() == digest:
        return
    pins = section(name)
    print(f"setup: installing {len(pins)} pinned packages [{name}] into .venv", flush=True)
    if name == "run":
        refuse_cuda(next(p for p in pins if p.startswith("torch==")))
    pip("install", "--no-deps", *pins)
    if name == "run":
        pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    path.write_text(digest)


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "run"
    check_prerequisites()
    if not PYTHON.exists():
        print("setup: making .venv", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    install("run")
    if wanted == "test":
        install("test")


if __name__ == "__main__":
    main()
