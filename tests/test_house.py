"""The rules of the house that a machine can check: layers, sizes, names, words, shipped recipes, pages."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from luthier.catalogue import HERE, NOT_STAGES, SHAPES, cards
from luthier.testing import errata, golden
from luthier.testing.source import imported

ROOT = Path(__file__).parents[1]
FILES = sorted(HERE.rglob("*.py"))
METHODS = sorted(id_ for id_, entry in cards().items() if entry.module.startswith("luthier."))
ORDER = [
    ["errors", "verifier"], ["certificate"], ["fields"], ["trials"], ["flows"], ["shapes"], ["catalogue"], ["kit"],
    ["checkpoint"], ["STAGE"], ["model", "engine"], ["ledger", "report", "recipe"], ["cli"],
]  # fmt: skip
"""What stands later may import what stands earlier; within a layer, and within a stage, files are free."""
LIMIT_FILE, LIMIT_FUNCTION = 300, 60
LONG = {
    "shapes.py": "the page everyone reads first holds all ten shapes",
}
"""Files over the limit, and why."""
UNSAFE = ("pickle.load", "torch.load(", "trust_remote_code=True", "yaml.load(", "os.system(", "shell=True")
WEIGHTS = {"src/luthier/sos/neural_sos.safetensors": "what sos.neural_sos ships; its card says how it was made"}
"""The only weights in the repository, and why."""
TESTED = {("testing/card.py", "pickle.load")}
"""The suite pickles methods to see that they survive it."""
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".html", ".j2", ".css", ".json", ""}


def layer(name):
    """The place in ORDER of a module of ours, None for those that may import anything (testing, claims)."""
    part = name.split(".")[1] if "." in name else ""
    if part in ("testing", "claims", "recipes"):
        return None
    if part not in NOT_STAGES and (HERE / part).is_dir():
        part = "STAGE"
    for i, names in enumerate(ORDER):
        if any(part == n or part.startswith(f"{n}_") for n in names):
            return i
    return None


def module(path):
    return ".".join(("luthier", *path.relative_to(HERE).with_suffix("").parts)).removesuffix(".__init__")


def at_module_level(tree):
    """Import statements that run when the module is imported: not in functions, not for type checkers."""
    stack = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            stack += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]


def breaches(path, source):
    """Imports of the file at `path` that point the wrong way."""
    here = layer(module(path))
    stage = path.relative_to(HERE).parts[0]
    for node in at_module_level(ast.parse(source)):
        for name in imported(node):
            there = layer(name) if name.startswith("luthier.") else None
            if (
                name.startswith("luthier.cli")
                and stage not in ("cli.py", "__main__.py")
                and not stage.startswith("cli_")
            ):
                yield f"{path.name}:{node.lineno} imports the command line"
            if here is None or not name.startswith("luthier."):
                continue
            if there is None and name.split(".")[1] in ("testing", "claims"):
                yield f"{path.name}:{node.lineno} imports {name}"
            if there is not None and there > here:
                yield f"{path.name}:{node.lineno} imports {name} from a later layer"
            if there is not None and here == there == ORDER.index(["STAGE"]):
                yield f"{path.name}:{node.lineno} imports {name}: stages never import methods"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HERE)))
def test_imports_point_one_way(path):
    assert list(breaches(path, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("fields.py", "from luthier.kit import top"),
        ("kit/top.py", "from luthier.checkpoint.reader import Checkpoint"),
        ("merge/ties.py", "from luthier.merge.linear import Linear"),
        ("merge/ties.py", "from luthier.engine.stream import run_transform"),
        ("engine/stream.py", "import luthier.recipe"),
        ("recipe.py", "from luthier.cli import main"),
        ("testing/tiny.py", "from luthier.cli import main"),
        ("kit/top.py", "from luthier.testing import tiny"),
    ],
)
def test_the_layer_rule_can_fail(file, line):
    assert list(breaches(HERE / file, line))
    assert not list(breaches(HERE / file, f"def f():\n    {line}"))


def test_every_top_level_name_has_a_layer():
    names = [
        p.stem if p.suffix else p.name for p in HERE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    ]
    free = {"__init__", "__main__", "testing", "claims"}
    assert [n for n in names if n not in free and layer(f"luthier.{n}") is None] == []


def test_light_modules_stay_light():
    """The catalogue, and what it needs, import neither torch nor transformers."""
    code = (
        "import sys, luthier, luthier.catalogue, luthier.shapes, luthier.flows; luthier.catalogue.cards();"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'tyro'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HERE)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(HERE))
    assert (len(text.splitlines()) <= LIMIT_FILE) != (name in LONG), f"{len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= LIMIT_FUNCTION, f"{node.name} in line {node.lineno} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HERE)))
def test_every_file_says_what_it_is(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc and (len(doc.splitlines()) > 1 or doc.endswith("."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HERE)))
def test_nothing_is_unpickled_or_fetched_as_code(path):
    text = path.read_text(encoding="utf-8")
    found = [word for word in UNSAFE if word in text and (str(path.relative_to(HERE)), word) not in TESTED]
    assert found == []


def test_methods_lie_where_their_id_says():
    for path in FILES:
        parts = path.relative_to(HERE).parts
        if len(parts) == 2 and parts[0] not in NOT_STAGES and not parts[1].startswith("_"):
            assert f"{parts[0]}.{path.stem}" in cards(), f"{path} holds no method"
            assert re.fullmatch(r"[a-z][a-z0-9_]*", path.stem)


@pytest.mark.parametrize("id_", METHODS)
def test_every_method_has_golden_vectors_and_a_claim(id_):
    assert golden.file_of(id_).exists(), f"no {golden.file_of(id_).name}"
    assert (HERE / "claims" / f"{id_.replace('.', '_')}.py").exists(), "no claim"


def test_golden_files_belong_to_methods():
    ids = {id_.replace(".", "_") for id_ in METHODS}
    for path in (ROOT / "tests" / "golden").glob("test_*.py"):
        assert path.stem.removeprefix("test_") in ids, f"{path.name} belongs to no method"


def test_the_ten_shapes_stand():
    from luthier import shapes

    assert len(SHAPES) == 10
    assert {n for n, v in vars(shapes).items() if isinstance(v, type) and vars(v).get("_is_shape")} - {"Method"} == set(
        SHAPES
    )


def tracked():
    """Files under version control, or all there are where git is missing."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split("\0") if done.returncode == 0 else [str(p.relative_to(ROOT)) for p in FILES]
    return [ROOT / n for n in names if n and (ROOT / n).is_file()]


def test_the_repository_speaks_of_the_product_only():
    """No path of anybody's machine, no word of how the work was organised, no index host but the well-known."""
    words = [r"/wo" r"rk/", r"\.\./sha" r"red", r"\.libr" r"ary\b", r"/tm" r"p/w\b", r"\bsub-?age" r"nt", r"/ro" r"ot/"]
    pattern = re.compile("|".join(words))
    found = []
    for path in tracked():
        if path.suffix in TEXT and path.stat().st_size < 2_000_000:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if pattern.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_the_repository_is_small_and_plain():
    """No weights, archives, caches or large files."""
    for path in tracked():
        kept = str(path.relative_to(ROOT)) in WEIGHTS
        assert kept or path.suffix not in {
            ".safetensors", ".gguf", ".bin", ".pt", ".pyc", ".zip", ".gz", ".whl", ".sqlite",
        }, path  # fmt: skip
        assert path.stat().st_size < 1_000_000, path
        assert b"\r\n" not in path.read_bytes()[:10_000], f"{path} has DOS line ends"


def test_no_dependency_is_copyleft():
    """What the package installs, by name: peers under the GPL stay in benchmarks' own environments."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*declared["dependencies"], *(d for group in declared["optional-dependencies"].values() for d in group)]
    names = {re.split(r"[<>=\[ ~!]", d)[0].lower() for d in every}
    assert not names & {"mergekit", "hydra-core", "pydantic", "plotly", "cvxpy"}
    assert declared["license"] == "Apache-2.0"


@pytest.mark.parametrize("path", sorted((HERE / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path):
    from luthier import recipe

    assert recipe.load(path).steps


def test_errata_are_up_to_date():
    """docs/errata.md is what the methods' departures say: python -m luthier.testing.errata docs/errata.md"""
    assert (ROOT / "docs" / "errata.md").read_text(encoding="utf-8") == errata.build()
    for entry in cards().values():
        for line in entry.departures:
            for file in re.findall(r"tests/[\w/]+\.py(?:::\w+)?", line):
                name, _, test = file.partition("::")
                assert f"def {test}" in (ROOT / name).read_text(encoding="utf-8"), file


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_can_begin(script):
    """What a script imports is there, its siblings among it; peers are other environments' and are not imported."""
    code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); __import__({script.stem!r})"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 0, made.stderr[-300:]
