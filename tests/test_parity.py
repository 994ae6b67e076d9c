"""What mergekit and fusion-bench give, kept in short by `benchmarks/parity.py`, and what Luthier gives."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from luthier.cli import main

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
KEPT = json.loads((HERE / "golden" / "peers.json").read_text())


def _script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fusion = _script("parity_fusion")
parity = _script("parity")
CASES = fusion.cases(1000)


@pytest.fixture(scope="module")
def yaml_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yaml")
    parity.models(folder)
    return folder


@pytest.fixture(scope="module")
def fusion_models(tmp_path_factory):
    return fusion.models(tmp_path_factory.mktemp("fusion"))


def test_all_cases_are_kept():
    assert set(KEPT) == {*parity.CASES, *(fusion.PREFIX + name for name in CASES)} - set(parity.APART)


@pytest.mark.parametrize("name", [name for name in parity.CASES if name not in parity.APART])
def test_mergekit(name, yaml_models, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(parity.located(parity.CASES[name], yaml_models))
    assert main(["merge", str(config), str(tmp_path / "out")]) == 0
    assert fusion.differs(fusion.read(tmp_path / "out"), KEPT[name]) is None


@pytest.mark.parametrize("name", CASES)
def test_fusion_bench(name, fusion_models, tmp_path):
    case = fusion.cases(fusion.entries(fusion_models[0]))[name]
    made = fusion.ours(case, fusion_models, fusion.sources(), tmp_path / "out")
    assert fusion.differs(made, KEPT[fusion.PREFIX + name]) is None


def test_an_entry_that_differs_is_seen(fusion_models):
    base = fusion.read(fusion_models[0])
    kept = fusion.short(base)
    assert fusion.differs(base, kept) is None
    name = next(n for n in base if n.endswith("up_proj.weight"))
    base[name][3, 5] += 1e-3 * base[name].abs().max()
    assert name in fusion.differs(base, kept)
    assert fusion.differs({n: t for n, t in base.items() if n != name}, kept) == f"tensors {[name]}"
