"""The wheel holds what the package reads: recipes, the shipped network and its card, pages of the report."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    source = ROOT / "src"
    files = {p.relative_to(source).as_posix(): p for p in (source / "luthier").rglob("*") if p.is_file()}
    files = {name: path for name, path in files.items() if "__pycache__" not in path.parts}
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
        assert held == set(files)
        assert all(opened.getinfo(name).file_size == path.stat().st_size for name, path in files.items())
    assert {
        "luthier/sos/neural_sos.safetensors",
        "luthier/sos/neural_sos.md",
        "luthier/recipes/quickstart.yaml",
    } <= held
