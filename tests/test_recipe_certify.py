"""Certificates in recipes: planned, run, kept, reported; what cannot be proven is a result."""

import json

import pytest

from luthier import recipe, report
from luthier.errors import LuthierError
from luthier.flows import Certificate
from luthier.recipe_inputs import Inputs
from luthier.recipe_plan import plan
from luthier.recipe_run import run
from luthier.recipe_text import parse
from luthier.sos.certify import SumOfSquares

SCHEIDERER = "x^4 + x*y^3 + y^4 - 3x^2*y*z - 4x*y^2*z + 2x^2*z^2 + x*z^3 + y*z^3 + z^4"
STEPS = {
    "easy": {"use": "sos.certify", "problem": "x^2+1"},
    "seven": {"use": "sos.certify", "problem": 7},
    "motzkin": {
        "use": "sos.certify", "problem": "x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1", "set": {"multipliers": 0},
        "vary": {"set.basis": ["full", "newton"]},
    },
    "hard": {"use": "sos.certify", "problem": SCHEIDERER},
}  # fmt: skip
WHERE = {
    "disk": {
        "use": "sos.certify", "problem": {"polynomial": "x + y", "nonneg": ["2 - x^2 - y^2"]}, "set": {"ask": "bound"},
    },
    "line": {"use": "sos.certify", "problem": {"polynomial": "x*y", "zero": "x - y"}},
    "outside": {"use": "sos.certify", "problem": {"polynomial": "x", "nonneg": "1 - x^2", "zero": []}},
    "low": {"use": "sos.certify", "problem": "x^4 - 3*x^2", "set": {"ask": "bound"}},
    "times": {"use": "sos.certify", "problem": "x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1"},
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run({"luthier": 1, "steps": STEPS}, folder=tmp_path_factory.mktemp("runs") / "proofs")


def test_every_step_leaves_its_certificate(done):
    status = {}
    for name in done.records:
        made = Certificate.from_json((done.path(name) / "certificate.json").read_text())
        status[name] = made.status, made.verify()
    assert status == {
        "easy": ("exact", True), "seven": ("exact", True), "motzkin@set.basis=full": ("not_sos", True),
        "motzkin@set.basis=newton": ("not_sos", True), "hard": ("numeric", False),
    }  # fmt: skip
    record = done.record("easy")
    assert (record.status, record.shape, record.metrics["squares"], record.metrics["basis"]) == (
        "done",
        "Certify",
        2,
        2,
    )
    assert "dtype" not in record.config


def test_what_is_done_is_kept(done):
    again = run({"luthier": 1, "steps": STEPS}, folder=done.folder)
    assert len(again.kept) == 5
    other = run({"luthier": 1, "steps": {**STEPS, "easy": {**STEPS["easy"], "problem": "x^2+2"}}}, folder=done.folder)
    assert len(other.kept) == 4
    run({"luthier": 1, "steps": STEPS}, folder=done.folder)


def test_the_report_says_what_is_proven(done):
    verdicts = {v.question.partition(":")[0]: v for v in report.verdicts(done.folder)}
    assert {k: v.word for k, v in verdicts.items()} == {
        "easy": "shown", "seven": "shown", "motzkin@set.basis=full": "refuted",
        "motzkin@set.basis=newton": "refuted", "hard": "not shown",
    }  # fmt: skip
    assert verdicts["easy"].question == "easy: is x^2 + 1 a sum of squares?"
    assert "no proof in fractions" in verdicts["hard"].why
    assert "is x^2 + 1 a sum of squares?" in report.build(done.folder).read_text()


def test_constraints_and_bounds(tmp_path):
    """A problem may be a map; the report asks what was asked."""
    ran = run({"luthier": 1, "steps": WHERE}, folder=tmp_path / "where")
    for name in ran.records:
        made = Certificate.from_json((ran.path(name) / "certificate.json").read_text())
        assert made.verify(), (name, made.refusal())
    asked = {v.question: v.word for v in report.verdicts(ran.folder)}
    assert asked == {
        "disk: is x + y >= -2 where -x^2 - y^2 + 2 >= 0?": "shown",
        "line: is x*y >= 0 where x - y = 0?": "shown",
        "outside: is x >= 0 where -x^2 + 1 >= 0?": "refuted",
        "low: is x^4 - 3*x^2 >= -9/4?": "shown",
        "times: is x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1 >= 0?": "shown",
    }
    again = run({"luthier": 1, "steps": WHERE}, folder=ran.folder)
    assert len(again.kept) == 5
    other = WHERE | {"line": {"use": "sos.certify", "problem": {"polynomial": "x*y", "zero": "x - 2*y"}}}
    assert len(run({"luthier": 1, "steps": other}, folder=ran.folder).kept) == 4


def test_the_plan_costs_constraints(tmp_path):
    """The more the program holds, the more it takes."""
    ball = "1 - " + " - ".join(f"{v}^2" for v in "uvwxyz")
    problems = {
        "alone": "x^2",
        "disk": WHERE["disk"]["problem"],
        "ball": {"polynomial": "u*v*w*x*y*z + u", "nonneg": ball},
    }
    found = recipe.load({"luthier": 1, "steps": {n: {"use": "sos.certify", "problem": p} for n, p in problems.items()}})
    inputs = Inputs(found, tmp_path, lambda event: None)
    inputs.open()
    cost = {s.name: s.memory for s in plan(found, inputs).steps}
    assert cost["ball"] > cost["disk"] > cost["alone"]


def test_the_plan_costs_a_proof(tmp_path):
    large = " + ".join(f"{v}^6" for v in "uvwxyz") + " + u*v + u + v + w + x + y + z + 9"
    steps = {**STEPS, "large": {"use": "sos.certify", "problem": large}}
    found = recipe.load({"luthier": 1, "steps": steps})
    inputs = Inputs(found, tmp_path, lambda event: None)
    inputs.open()
    made = {s.name: s for s in plan(found, inputs).steps}
    assert made["easy"].gives == "certificate"
    assert made["large"].memory > 1e8 > made["easy"].memory
    assert made["large"].seconds > made["easy"].seconds


def test_the_plan_costs_a_training_once(tmp_path):
    """What two steps share is made by the first; the shipped network takes none."""
    learned = {"use": "sos.neural_sos", "problem": "x^2 + 1"}
    steps = {
        "shipped": learned,
        "first": {**learned, "set": {"steps": 4000}},
        "second": {**learned, "problem": "x^2 + 2", "set": {"steps": 4000}},
        "written": {**learned, "set": {"steps": 4000, "form": "sequence"}},
    }
    found = recipe.load({"luthier": 1, "steps": steps})
    inputs = Inputs(found, tmp_path, lambda event: None)
    inputs.open()
    took = {s.name: s.seconds for s in plan(found, inputs).steps}
    assert took["first"] > 300 and took["written"] > 300
    assert took["shipped"] < 5 and took["second"] < 5


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ('{use: sos.certify, problem: "x^2 + $"}', "r.yaml:3: column 7: '$' has no meaning"),
        ("{use: sos.certify}", "lacks 'problem'"),
        ("{use: sos.certify, problem: [x, y]}", "expected a polynomial"),
        ("{use: sos.certify, problem: {a: 1}}", "r.yaml:3: problem: unknown key 'a'"),
        ("{use: sos.certify, problem: {}}", "r.yaml:3"),
        ("{use: sos.certify, problem: {nonneg: x}}", "the problem names no polynomial"),
        ("{use: sos.certify, problem: {polynomial: x, nonneg: [x, 1^^]}}", "r.yaml:3: nonneg 2: column 3"),
        ("{use: sos.certify, problem: {polynomial: x, zero: x +}}", "r.yaml:3: zero 1: column 4"),
        ("{use: sos.certify, problem: {polynomial: x, nonneg: [[x]]}}", "r.yaml:3: expected a polynomial, got ['x']"),
        ("{use: sos.certify, problem: {polynomial: [x]}}", "r.yaml:3: expected a polynomial, got ['x']"),
        ("{use: sos.certify, problem: {polynomial: x, nonneg: {x: 1}}}", "r.yaml:3: expected a polynomial, got {'x'"),
        ("{use: sos.certify, problem: {polynomial: x, zero: null}}", "r.yaml:3: expected a polynomial, got None"),
        ("{use: sos.certify, problem: {polynomal: x}}", "did you mean 'polynomial'"),
        ("{use: sos.certify, problem: true}", "expected a polynomial, got bool"),
        ("{use: sos.certify, problem: x, dtype: bf16}", "unknown key of a sos.certify step 'dtype'"),
        ("{use: sos.certify, problem: x, set: {basis: newt}}", "did you mean 'newton'"),
        ("{use: sos.certify, problme: x}", "did you mean 'problem'"),
    ],
)
def test_faults_are_found_before_anything_runs(step, says):
    with pytest.raises(LuthierError) as caught:
        recipe.parse(parse(f"luthier: 1\nsteps:\n  a: {step}\n", "r.yaml"), "r")
    assert says in str(caught.value)


def test_a_certificate_is_no_model():
    text = 'luthier: 1\nsteps:\n  a: {use: sos.certify, problem: "x^2"}\n  b: {use: merge.linear, experts: [a]}\n'
    with pytest.raises(LuthierError, match="gives a certificate, not a model"):
        recipe.parse(parse(text, "r.yaml"), "r")


def test_from_python():
    made = SumOfSquares().apply(problem="x^2 + 1")
    assert made.verify() and made.variables == ("x",)
    assert SumOfSquares().apply(problem={(2,): 1, (0,): 1}).squares == made.squares
    assert json.loads(made.to_json())["status"] == "exact"
    with pytest.raises(LuthierError, match="'problem' is missing"):
        SumOfSquares().apply()
    with pytest.raises(LuthierError, match="unknown role or option 'problm'; did you mean 'problem'"):
        SumOfSquares().apply(problm="x")
