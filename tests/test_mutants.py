"""Planted faults: each is one small change that still parses, and the hunt tells noticed from unnoticed."""

import ast
import difflib
import signal
import subprocess
import sys

import pytest

import toys
from luthier import catalogue
from luthier.errors import LuthierError
from luthier.testing import golden, mutants, run_method
from luthier.testing.faults import plant
from luthier.testing.mutants import HARMLESS, Hunt, hunt

SOURCE = '''"""Toy: 1 + 1 in words stays.

Paper: none (test).
"""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from x import y

Pair = Annotated[tuple[float, ...], Examples(((2.5, 7.5),))]


class Toy(Transform):
    share: Annotated[float, Range(0.0, 1.0)] = 0.5
    """one < two"""
    fast: bool = False
    reduces_to = Reduces({"share": 1.0}, "mean", tolerance=1e-6)
    departures = ("a + b",)

    def f(self, x, ks, k):
        if k < 1e-8:
            raise ValueError("k + 1" + str(3))
        if self.fast and k == 2:
            x = x.abs()
        if not ks:
            return x
        for a, b in zip(ks, x, strict=True):
            x.add_(a, alpha=b)
        y = torch.where(x > 0, x, -x).clamp(min=0.25)
        return y[: k - 1].sum() / max(k, 3)
'''


def changes(source):
    return {m.what for m in plant(source)}


def test_every_fault_is_one_change_that_parses():
    mutants = plant(SOURCE)
    assert len({m.text for m in mutants}) == len(mutants) > 20
    for mutant in mutants:
        ast.parse(mutant.text)
        moved = [d for d in difflib.ndiff(SOURCE.splitlines(), mutant.text.splitlines()) if d[0] in "+-"]
        assert 1 <= len(moved) <= 2, moved
        assert SOURCE.splitlines()[mutant.line - 1] in [d[2:] for d in moved]


@pytest.mark.parametrize(
    "what",
    [
        "0.5 -> 0.625", "False -> True", "k < 1e-08 -> k > 1e-08", "self.fast and k == 2 -> self.fast or k == 2",
        "not ks -> ks", "k == 2 -> k != 2", "2 -> 3", "x.abs() -> x", "x.add_(a, alpha=b) -> pass",
        "x.add_(a, alpha=b) -> x.sub_(a, alpha=b)", "x.add_(a, alpha=b) -> x.add_(a)", "x > 0 -> x >= 0",
        "x > 0 -> x < 0",
        "torch.where(x > 0, x, -x) -> torch.where(x > 0, -x, x)", "-x -> x", "0.25 -> 0.3125",
        "y[:k - 1] -> y[:k - 1 + 1]",
        "k - 1 -> k + 1", "y[:k - 1].sum() -> y[:k - 1].mean()", "max(k, 3) -> min(k, 3)",
        "y[:k - 1].sum() / max(k, 3) -> y[:k - 1].sum() * max(k, 3)",
    ],
)  # fmt: skip
def test_the_faults_that_are_planted(what):
    assert what in changes(SOURCE)


def test_what_only_speaks_is_left_alone():
    """Docstrings, messages, annotations, reductions, departures, guards and type-checking imports."""
    texts = [m.text for m in plant(SOURCE)]
    for line in SOURCE.splitlines():
        if any(word in line for word in ("raise", "reduces_to", "departures", "one < two", "TYPE_CHECKING", "strict")):
            assert all(line in text for text in texts), line
    assert all("Range(0.0, 1.0)" in text and "Examples(((2.5, 7.5),))" in text for text in texts)


def test_brackets_keep_what_is_around():
    (mutant,) = [m for m in plant("x = (a + b) * c\n") if m.what == "a + b -> a - b"]
    assert eval(mutant.text.removeprefix("x = "), {"a": 5, "b": 3, "c": 2}) == 4


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A toy in a folder that other processes see, too."""
    made = toys.Toys(tmp_path, monkeypatch)
    yield made
    made.close()


def test_what_is_said_to_be_harmless_is_planted():
    """Each entry is about a fault of the method's file as it stands, or several of a line that read alike, and
    gives a reason."""
    sources = {id_: catalogue.card(id_).path.read_text(encoding="utf-8") for id_, *_ in HARMLESS}
    planted = {id_: plant(source) for id_, source in sources.items()}
    for (id_, line, what), why in HARMLESS.items():
        lines = sources[id_].splitlines()
        found = [m for m in planted[id_] if m.what == what and lines[m.line - 1].strip() == line]
        assert found and len(why) > 20, (id_, line, what)


def test_harmless_faults_are_not_noticed_ones():
    a, b, c = plant("x = 1 + y\nz = 2\n")
    found = Hunt("toy.one", 3, (a,), ((b, "the same in twos"),), {"golden": 1})
    assert (found.noticed, found.share) == (1, 1 / 3)
    assert found.lines()[0] == "toy.one: 1 of 3 planted faults noticed (33%)"
    assert found.lines()[2].endswith("changes nothing, the same in twos") and c.what not in str(found.lines())


@pytest.mark.slow
def test_a_fault_said_to_be_harmless_that_is_noticed_is_an_error(monkeypatch):
    key = ("norm.rms", "center: bool = False", "False -> True")
    monkeypatch.setattr(mutants, "HARMLESS", {key: "said so"})
    with pytest.raises(LuthierError, match="noticed False -> True, said to change nothing"):
        hunt("norm.rms", limit=1)


@pytest.mark.slow
def test_a_hunt_tells_noticed_from_unnoticed():
    """Of the plain average every fault in the sum is noticed, and the tree is as before."""
    path = golden.ROOT / "src" / "luthier" / "merge" / "linear.py"
    before = path.read_bytes()
    seen = []
    found = hunt("merge.linear", limit=4, watch=seen.append)
    assert path.read_bytes() == before
    assert (found.tried, len(seen)) == (4, 4)
    assert found.noticed + len(found.survivors) + len(found.harmless) == 4
    assert found.share >= 0.75
    assert found.lines()[0].startswith("merge.linear: ")


TRIAL = """
import pytest
from luthier.testing import trials
trials.SECONDS, trials.IDLE = {limits}
tests = trials.Tests({known}, {{"test_it.py::test_a": 2.0, "test_it.py::test_b": 1.0}})
pytest.main(["-qx", "-pno:cacheprovider", "test_it.py"], plugins=[tests])
print("ran", *tests.seconds, "and", tests.failed, "noticed")
"""


@pytest.mark.parametrize(
    ("line", "limits", "says"),
    [
        ("pass", None, "ran test_it.py::test_b test_it.py::test_a and  noticed"),
        ("assert False", None, "ran test_it.py::test_b and test_it.py::test_b noticed"),
        # the limit that is not asked about is far away, however slow the machine is: the start of pytest counts, too
        ("while True: pass", (0.5, 1000), signal.SIGPROF),
        ("__import__('time').sleep(500)", (500, 0.004), signal.SIGALRM),
    ],
)
def test_a_trial_runs_cheap_tests_first_and_ends_what_does_not_end(tmp_path, line, limits, says):
    (tmp_path / "test_it.py").write_text(f"def test_a():\n    pass\ndef test_b():\n    {line}\n")
    script = TRIAL.format(limits=limits or (10, 10), known={"test_it.py::test_b": 0.0} if limits else {})
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    ended = isinstance(says, signal.Signals)
    assert run.returncode == (-says if ended else 0), run.stderr
    assert ended or run.stdout.splitlines()[-1:] == [says]


@pytest.mark.slow
def test_a_hunt_needs_tests_that_pass(monkeypatch, tmp_path):
    """Where the tests fail anyway nothing can be told from their failing."""
    bad = tmp_path / "test_merge_linear.py"
    bad.write_text("def test_no():\n    assert False\n")
    monkeypatch.setattr(golden, "file_of", lambda id_: bad)
    with pytest.raises(LuthierError, match="fail without a planted fault: golden"):
        hunt("merge.linear", limit=1)


@pytest.mark.slow
def test_golden_vectors_are_part_of_the_report(tmp_path, monkeypatch):
    vectors = tmp_path / "test_norm_rms.py"
    monkeypatch.setattr(golden, "file_of", lambda id_: vectors)
    for line, passed in (("assert 1 == 1", True), ("assert 1 == 2", False)):
        vectors.write_text(f"def test_it():\n    {line}\n")
        (found,) = [o for o in run_method("norm.rms").outcomes if o.check == "golden"]
        assert found.passed is passed
        assert ("assert 1 == 2" in found.fault) is (not passed)
