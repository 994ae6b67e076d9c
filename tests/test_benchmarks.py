"""The scripts behind the published numbers can be started, without the peers that they measure against."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
PROBE = """
import importlib, sys, traceback
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception:
        print(f"{name}: {traceback.format_exc()}")
"""


@pytest.mark.slow
def test_every_benchmark_imports():
    """As when it is started: from its own folder, which holds what some share."""
    assert len(SCRIPTS) > 10
    command = [sys.executable, "-c", PROBE, *(script.stem for script in SCRIPTS)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_benchmark_takes_from_another_is_there(script):
    """Names that it imports from its neighbours, wherever in the file it does."""
    beside = {path.stem: path for path in SCRIPTS}
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in beside:
            tree = ast.parse(beside[node.module].read_text(encoding="utf-8"))
            made = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            made |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
            made |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            assert {alias.name for alias in node.names} <= made, f"from {node.module}"
