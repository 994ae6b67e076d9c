"""The published polynomials are what they are said to be, and a proof against the truth is never counted as one."""

from __future__ import annotations

import importlib.util
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from luthier.flows import Certificate
from luthier.kit.polynomial import polynomial

PATH = Path(__file__).parents[1] / "benchmarks" / "published.py"
SPEC = importlib.util.spec_from_file_location("published", PATH)
published = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(published)
ENTRIES = published.entries()
NAMED = {entry["name"]: entry for entry in ENTRIES}
each = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
POINTS, STARTS = 3000, 4


def values(p, points):
    """The polynomial at many points (rows), and the sum of its terms' sizes, which bounds what rounding does."""
    powers = np.prod(points[:, None, :] ** np.array(p.support)[None], axis=2)
    terms = powers * np.array([float(c) for _, c in p.terms])
    return terms.sum(1), np.abs(terms).sum(1)


def gradient(p, point):
    rows = np.array(p.support)
    found = np.zeros(len(point))
    for i in range(len(point)):
        lower = rows.copy()
        lower[:, i] = np.maximum(lower[:, i] - 1, 0)
        found[i] = np.array([float(c) for _, c in p.terms]) * rows[:, i] @ np.prod(point**lower, axis=1)
    return found


def least(entry):
    """What the polynomial is never below, None if it is not said."""
    if "minimum" in entry:
        return Fraction(entry["minimum"])
    return None if entry["truth"] == "negative" else Fraction(0)


def spread(entry, rng, count):
    """Points to look at: multiples of 1/8 about the origin, and about where the minimum is."""
    about = np.array([float(Fraction(x)) for x in entry.get("at", ())] or [0.0])
    points = rng.integers(-24, 25, (count, len(published.asked(entry).variables))) / 8
    points[count // 2 :] += np.round(about * 8) / 8
    return points


def test_there_are_enough_with_sources():
    assert len(ENTRIES) >= 60
    assert len(NAMED) == len(ENTRIES)
    assert {e["truth"] for e in ENTRIES} == set(published.TRUTHS)
    assert not set().union(*ENTRIES) - {
        "name", "truth", "polynomial", "nonneg", "zero", "minimum", "at", "negative_at", "source", "checked"
    }  # fmt: skip


@each
def test_reads_and_has_a_source(entry):
    given = published.asked(entry)
    assert given.constrained == (entry["truth"] == "constrained")
    assert len(entry["source"]) > 20 or "/" in entry["source"] or "," in entry["source"]
    assert len(entry["checked"]) > 10
    assert ("minimum" in entry) <= ("at" in entry)
    assert ("negative_at" in entry) == (entry["truth"] == "negative")


@each
def test_the_stated_points(entry):
    """The minimum is taken where it is said to be, exactly if the point is exact; the negative point is negative."""
    given = published.asked(entry)
    if "at" in entry:
        at, wanted = [Fraction(x) for x in entry["at"]], Fraction(entry["minimum"])
        if all(isinstance(x, str) for x in [*entry["at"], entry["minimum"]]):
            assert given.holds(at)
            assert given.polynomial.at(at) == wanted
        else:
            assert abs(given.polynomial.at(at) - wanted) <= Fraction(1e-6) * (1 + abs(wanted))
            assert all(g.at(at) > -1e-5 for g in given.nonneg)
            assert all(abs(h.at(at)) < 1e-5 for h in given.zero)
    if "negative_at" in entry:
        assert given.polynomial.at([Fraction(x) for x in entry["negative_at"]]) < 0


@each
def test_never_below_at_thousands_of_points(entry):
    """In floats where rounding cannot hide it, in fractions where it could."""
    bound, given = least(entry), published.asked(entry)
    if bound is None or given.zero:
        return
    points = spread(entry, np.random.default_rng(0), POINTS)
    for g in given.nonneg:
        points = points[values(g, points)[0] >= 0]
    found, size = values(given.polynomial, points)
    slack = Fraction(published.SLACK) * (1 + abs(bound)) * isinstance(entry.get("minimum"), float)
    for point in points[found - float(bound) < 1e-9 * (1 + size)]:
        exact = [Fraction(x) for x in point]
        assert not given.holds(exact) or given.polynomial.at(exact) >= bound - slack, point


@each
def test_descent_finds_nothing_lower(entry):
    bound, given = least(entry), published.asked(entry)
    if bound is None:
        return
    rng, p = np.random.default_rng(1), given.polynomial
    sides = [("ineq", g) for g in given.nonneg] + [("eq", h) for h in given.zero]
    limits = [{"type": kind, "fun": lambda x, q=q: values(q, x[None])[0][0], "jac": lambda x, q=q: gradient(q, x)}
              for kind, q in sides]  # fmt: skip
    for start in spread(entry, rng, STARTS) + rng.normal(size=(STARTS, len(p.variables))) / 8:
        with np.errstate(all="ignore"):
            end = minimize(
                lambda x: values(p, x[None])[0][0], start, jac=lambda x: gradient(p, x), constraints=limits,
                method="SLSQP" if limits else "BFGS", options={"maxiter": 150},
            ).x  # fmt: skip
        if not all(limit["fun"](end) > -1e-6 for limit in limits if limit["type"] == "ineq"):
            continue
        if not all(abs(limit["fun"](end)) < 1e-6 for limit in limits if limit["type"] == "eq"):
            continue
        value, size = (x[0] for x in values(p, end[None]))
        about = 1e-2 if limits else 1e-6  # the constraints hold to 1e-6 only
        assert value >= float(bound) - about * (1 + abs(float(bound))) - 1e-9 * size, end


def test_the_convex_polynomial_that_is_recalled():
    """What its theorem says of it: a positive definite Hessian, whose first entry is the other polynomial."""
    p = polynomial(NAMED["Ahmadi-Parrilo"]["polynomial"])

    def derived(terms, i):
        lower = [(tuple(e - (k == i) for k, e in enumerate(m)), c * m[i]) for m, c in terms if m[i]]
        return tuple(lower)

    second = derived(derived(p.terms, 0), 0)
    assert dict(second) == dict(polynomial(NAMED["Ahmadi-Parrilo, second derivative by x1"]["polynomial"]).terms)
    points = np.random.default_rng(0).normal(size=(2000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    hessian = np.zeros((2000, 3, 3))
    for i in range(3):
        for j in range(3):
            terms = derived(derived(p.terms, i), j)
            powers = np.prod(points[:, None, :] ** np.array([m for m, _ in terms])[None], axis=2)
            hessian[:, i, j] = powers @ np.array([float(c) for _, c in terms])
    assert np.linalg.eigvalsh(hessian).min() > 1e-3


def made(status="exact", text="x^2", squares=(("1", (((1,), "1"),)),), **more):
    p = polynomial(text)
    return Certificate(status, "by hand", p.variables, tuple((m, str(c)) for m, c in p.terms), squares, **more)


def row(truth, text="x^2", **more):
    return {"name": "by hand", "truth": truth, "polynomial": text, **more}


TWICE = (("1", (((2,), "1"),)),)
"""x^2 squared: x^2 times x^2, so that x^2 may be multiplied by itself"""
BELOW = {"status": "not_sos", "text": "x^2 - 1", "squares": (), "point": ("0",)}


@pytest.mark.parametrize(
    ("truth", "certificate", "verdict"),
    [
        ("sos", made(), "proof"),
        ("negative", made(), "wrong"),
        ("nonnegative", made(), "wrong"),
        ("nonnegative", made(squares=(("4", (((1,), "1"),)),), multiplier=(("4", (((0,), "1"),)),)), "wrong"),
        ("nonnegative", made(squares=TWICE, multiplier=(("1", (((1,), "1"),)),)), "proof"),
        ("sos_real", made(squares=TWICE, multiplier=(("1", (((1,), "1"),)),)), "proof"),
        ("negative", made(squares=TWICE, multiplier=(("1", (((1,), "1"),)),)), "wrong"),
        ("sos", made(squares=(("2", (((1,), "1"),)),)), "wrong"),
        ("sos", made("numeric"), "none"),
        ("sos", made("unknown", squares=()), "none"),
        ("negative", made(squares=(("1", (((1,), "1"),)), ("1", (((0,), "1"),))), bound="-1"), "none"),
    ],
)  # fmt: skip
def test_what_counts_as_a_proof_of_the_sign(truth, certificate, verdict):
    """Squares alone of what is none, a proof that does not add up or is of the wrong sign: all are wrong."""
    assert published.judged(row(truth), "nonnegative?", certificate) == verdict


@pytest.mark.parametrize(("truth", "verdict"), [("negative", "proof"), ("sos", "wrong"), ("nonnegative", "wrong")])
def test_a_point_below_zero(truth, verdict):
    assert published.judged(row(truth, "x^2 - 1"), "nonnegative?", made(**BELOW)) == verdict


def test_another_polynomial_is_no_answer():
    assert published.judged(row("sos", "x^2 + 1"), "nonnegative?", made()) == "wrong"
    free = made(text="x", squares=(), nonneg=((((1,), "1"),),), weighted=(((0,), (("1", (((0,), "1"),)),)),))
    assert free.refusal() is None
    assert published.judged(row("constrained", "x", minimum="0", nonneg=["x"]), "minimum?", free) == "proof"
    assert published.judged(row("constrained", "x", minimum="0", nonneg=["x + 1"]), "minimum?", free) == "wrong"


@pytest.mark.parametrize(
    ("minimum", "bound", "verdict"),
    [
        ("1", "1", "proof"), ("1", "9999/10000", "proof"), ("1", "1/2", "none"), ("9/10", "1", "wrong"),
        (0.9999999, "1", "proof"), (0.999, "1", "wrong"),
    ],
)  # fmt: skip
def test_a_bound_above_the_minimum_is_wrong(minimum, bound, verdict):
    rest = 1 - Fraction(bound)
    squares = (("1", (((1,), "1"),)), *([(str(rest), (((0,), "1"),))] if rest else []))
    certificate = made(text="x^2 + 1", squares=squares, bound=bound)
    assert certificate.refusal() is None
    assert published.judged(row("sos", "x^2 + 1", minimum=minimum), "minimum?", certificate) == verdict


def test_a_question_is_answered_in_its_time():
    found = published.answered(NAMED["SOSDEMO1"], "nonnegative?", 60.0)
    assert (found["status"], found["verdict"]) == ("exact", "proof"), found
    assert published.answered(NAMED["Trid, six variables"], "nonnegative?", 60.0)["verdict"] == "proof"
    late = published.answered(NAMED["SOSDEMO1"], "nonnegative?", 0.0)
    assert (late["status"], late["verdict"]) == ("no answer", "none")


def test_the_summary_counts_what_is_there():
    base = {"question": "nonnegative?", "reason": "r", "cpu_s": 1.0, "functional": False, "met": False}
    rows = [
        {**base, "what": "a", "truth": "sos", "status": "exact", "verdict": "proof"},
        {**base, "what": "b", "truth": "sos", "status": "numeric", "verdict": "none"},
        {**base, "what": "c", "truth": "sos_real", "status": "numeric", "verdict": "none"},
        {**base, "what": "a", "truth": "sos", "status": "exact", "verdict": "proof", "question": "minimum?"},
    ]
    own, whole, squares, real, low, *missing = published.summary(rows)
    assert (own["asked"], own["proven"], own["share"]) == (2, 1, "50.0%")
    assert (whole["asked"], whole["proven"], low["asked"]) == (3, 2, 1)
    assert (squares["truth"], squares["exact"], squares["numeric"]) == ("sos", 1, 1)
    assert real["proven"] == 0
    assert [line["without a proof"] for line in missing] == ["b", "c"]
    json.dumps([whole, *missing])
