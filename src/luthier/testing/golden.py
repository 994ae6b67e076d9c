"""A method's golden vectors: the test file that belongs to it in a source checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from luthier.testing import Outcome

ROOT = Path(__file__).parents[3]
"""The checkout this package is imported from; without one, a folder that has no tests."""


def file_of(id_: str) -> Path:
    """`merge.ties` -> tests/golden/test_merge_ties.py"""
    return ROOT / "tests" / "golden" / f"test_{id_.replace('.', '_')}.py"


def run(id_: str) -> Outcome | None:
    """Run the golden vectors in a pytest of their own; None where there is no such file."""
    if not file_of(id_).exists():
        return None
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file_of(id_))],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines() or [f"pytest ended with {done.returncode}"]
    last = next((line[1:] for line in lines if line.startswith("E  ")), lines[-1])
    passed = done.returncode == 0
    return Outcome("golden", passed, time.perf_counter() - began, "" if passed else " ".join(last.split()))
