"""The code blocks of README and docs run as they stand, in order, page by page; generated parts are fresh."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)```", re.S)
PAGES = ["README.md", "docs/guide.md", "docs/certify.md"]


def blocks(page: str) -> list[tuple[str, str, str]]:
    text = (ROOT / page).read_text()
    return [(m["mark"] or "", m["kind"], m["body"]) for m in BLOCK.finditer(text)]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    paths = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page: str, tmp_path: Path) -> None:
    ran = 0
    for mark, kind, body in blocks(page):
        if mark.startswith("not run:"):
            continue
        if mark.startswith("file: "):
            path = tmp_path / mark.removeprefix("file: ")
            if mark.startswith("file: luthier/") and not (tmp_path / "luthier").exists():
                shutil.copytree(ROOT / "src" / "luthier", tmp_path / "luthier")  # the page adds to the package
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body)
        if kind == "python" and (not mark.startswith("file: ") or "apply" in body):
            script = tmp_path / "block.py"
            script.write_text(body)
            run([sys.executable, str(script)], tmp_path)
            ran += 1
        if kind == "bash":
            for line in body.splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "luthier":
                    run([sys.executable, "-m", "luthier.cli", *words[1:]], tmp_path)
                    ran += 1
                elif words and words[0] == "make":
                    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
    assert ran, f"{page} has no block that runs"


def test_generated_parts_are_fresh() -> None:
    import docs

    page = (ROOT / "README.md").read_text()
    assert docs.readme(page) == page, "run: python tools/docs.py"
    assert (ROOT / "docs" / "errata.md").read_text() == docs.errata(), "run: python tools/docs.py"


def test_the_readme_shows_a_real_quick_start() -> None:
    page = (ROOT / "README.md").read_text()
    shown = page.split("<!-- quickstart:begin -->")[1].split("<!-- quickstart:end -->")[0]
    assert shown.count("| ") > 20, "the quick start's table is missing"


def test_the_python_example_is_short() -> None:
    body = next(body for mark, kind, body in blocks("README.md") if kind == "python")
    assert len(body.strip().splitlines()) <= 10


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, "docs/decisions.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            if "://" not in target:
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
