"""Polynomials, in recipes and from Python, and certificates that lie."""

import json
from fractions import Fraction

from hostile import case, recipe

HEAD = "luthier: 1\nsteps:\n  a:\n    use: sos.certify\n    problem: "


def stated(text):
    return recipe(HEAD + json.dumps(text) + "\n")


def called(value):
    def work():
        from luthier.kit.polynomial import polynomial

        polynomial(value() if callable(value) else value)

    return lambda here: work


for what, text, says in (
    ("a megabyte of terms", "+".join(["x"] * 499_000), "characters"),
    ("half a megabyte in brackets", "(" * 250_000 + "x" + ")" * 250_000, "characters"),
    ("brackets 50,000 deep", "(" * 49_000 + "x" + ")" * 49_000, "nest deeper than 40"),
    ("brackets that never close", "(" * 99_000, "nest deeper"), ("signs only", "-" * 99_000, "ends too soon"),
    ("a tower of powers", "9**9**9", "a power of a power"), ("a tower in brackets", "((9^200)^200)^200", "bits"),
    ("a tower of names", "x^x^x", "an exponent is a whole number"), ("x to the billion", "x**(10**9)", "does not fit"),
    ("x to the billion, written out", "x^1000000000", "too large"),
    ("x to 9000 digits", "x^" + "9" * 9000, "too large"),
    ("a bracket to the 200", "(1 + x)^200*(1 + y)^56", None),
    ("billions of terms", "*".join(f"(1+{x})" for x in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"),
    "more than 20000 terms"),
    ("billions of terms by a power", "(a+b+c+d+e+f+g+h+i+j)^30", "too large when multiplied"),
    ("12,000 brackets", "*".join(["(x+y+z)"] * 12_000), "column"),
    ("a coefficient of 99,000 digits", "9" * 99_000 + "x", "more than 2500 digits"),
    ("a coefficient that grows", "*".join(["9999999999"] * 9000), "bits"), ("1e999999999", "1e999999999", "digits"),
    ("1e-999999999", "1e-999999999", "digits"),
    ("denominators that grow", "+".join(f"x/{1_000_003 + 2 * i}" for i in range(6000)), "bits"),
    ("300 variables", "+".join(f"x{i}" for i in range(300)), "300 variables"),
    ("a name of 90,000 letters", "x" * 90_000, "letters"),
    ("a name with 5000 digits", "x(" + "9" * 5000 + ")", "letters"),
    ("a call", "__import__('os').system('touch ran')", "no meaning"),
    ("a call of eval", "eval(x)", "reads like a function"),
    ("an attribute", "x.__class__", "'.' has no meaning"), ("a lambda", "lambda: 0", "':' has no meaning"),
    ("a template", "{{7*7}}", "'{' has no meaning"), ("a comparison", "x == 1", "alone"),
    ("empty", "", "ends too soon"),
    ("spaces", " " * 90_000, "ends too soon"), ("NUL", "x\0", "no meaning"), ("an emoji", "x + 🎻", "no meaning"),
    ("digits of another script", "x^٣", "no meaning"), ("a lone surrogate", "x\ud800", "r.yaml"),
    ("division by zero", "x/(1-1)", "division by zero"), ("division by a name", "1/x", "division by a variable"),
    ("a list", ["x"], "expected a polynomial"), ("a map", {"x": 1}, "unknown key 'x'"),
    ("true", True, "expected a polynomial"),
    ("a number of 39 digits", 10**39 - 1, None),
):  # fmt: skip
    case(f"polynomial: {what}", stated(text), *([says] if says else []))

for what, value, says in (
    ("ten megabytes", lambda: "x+" * 5_000_000, "10000000 characters"),
    ("a map of a million terms", lambda: {(i,): 1 for i in range(1_000_000)}, "1000000 terms"),
    ("a map of enormous exponents", {(10**400,): 1}, "degree"),
    ("a map of a hundred thousand variables", {(1,) * 100_000: 1}, "100000 variables"),
    ("a map of enormous numbers", {(1,): 10**100_000}, "bits"),
    ("a map of denominators", {(i,): Fraction(1, 2**89 - 2 * i) for i in range(200)}, "common denominator"),
    ("a number of 100,000 digits", 10**100_000, "bits"),
    ("NaN", float("nan"), "no rational number"),
    ("a fraction as text that is enormous", {(1,): "1/" + "9" * 1_000_000}, "no rational number"),
    ("an object of ours that lies", type("Liar", (), {"as_poly": 3, "free_symbols": ()})(), "no rational number"),
    ("bytes", b"x", "expected a polynomial"),
):
    case(f"polynomial from Python: {what}", called(value), says)


def array(shape, *rest, **more):
    """An array made inside the case."""

    def make():
        import numpy as np

        return np.ones(shape, *rest, **more)

    return make


for what, value, says in (
    ("an array of eight million ones", array((200, 200, 200)), "8000000 terms"),
    ("an array of 64 axes", array((1,) * 63 + (300,)), "degree"),
    ("an array of bytes", lambda: array(3)().astype("S"), "holds no coefficients"),
    ("an array of arrays", lambda: array(2, dtype=object)() * array(3)()[:, None], None),
    ("a million rows", lambda: (array((1_000_000, 1), int)(), array(1_000_000)()), "1000000 rows"),
    ("rows of a hundred thousand variables", lambda: (array((2, 100_000), int)(), [1, 1]), "100000 variables"),
    ("rows of enormous exponents", ([[10**400]], [1]), "degree"),
    ("rows that are words", (["ab", "cd"], [1, 1]), "no row of exponents"),
    ("rows without end", (type("E", (), {"__len__": lambda s: 10**9, "__getitem__": lambda s, i: [1]})(), [1]), "rows"),
):
    case(f"polynomial from Python: {what}", called(value), *([says] if says else []))


def related(text):
    def work():
        from luthier.kit.polynomial import relations

        relations(text)

    return lambda here: work


for what, text, says in (
    ("a million signs", ">=" * 500_000, "1000000 characters"),
    ("a million letters", "x" * 1_000_000 + ">= 0", "characters"),
    ("brackets across a sign", "(x >= 0)", "column 4"), ("a sign alone", ">=", "ends too soon"),
    ("a tower", "9^9^9 >= x", "a power of a power"), ("another script", "x ٣ = 0", "column 3"),
):  # fmt: skip
    case(f"relation: {what}", related(text), says)


CERTIFICATE = {
    "status": "exact", "reason": "", "variables": ["x"], "polynomial": [[[2], "1"]], "squares": [["1", [[[1], "1"]]]],
}  # fmt: skip


def lying(change, raw=None):
    """A certificate read and verified: what it claims must be refused with a reason."""

    def work():
        from luthier.certificate import Certificate
        from luthier.errors import LuthierError

        made = Certificate.from_json(raw if raw is not None else json.dumps(CERTIFICATE | change))
        why = made.refusal()
        if why:
            raise LuthierError(why)

    return lambda here: work


case("certificate: true", lying({}))
for what, change, says in (
    ("negative weight", {"squares": [["-1", [[[1], "1"]]]]}, "not positive"),
    ("another polynomial", {"polynomial": [[[2], "2"]]}, "do not add up"),
    ("exponent of a billion", {"polynomial": [[[10**9], "1"]]}, "degree"),
    ("exponent that is true", {"polynomial": [[[True], "1"]]}, "no monomial"),
    ("a number of a million digits", {"polynomial": [[[2], "9" * 1_000_000]]}, "no fraction"),
    ("over zero", {"polynomial": [[[2], "1/0"]]}, "over zero"),
    ("a status of its own", {"status": "true"}, "proves nothing"),
    ("a billion products",
     {"variables": ["x", "y"], "polynomial": [],
      "squares": [["1", [[[i // 99, i % 99], "1"] for i in range(5000)]]]}, "products"),
    ("lists for words", {"variables": 3}, "cannot be read"), ("nothing at all", {"polynomial": []}, "do not add up"),
    ("a basis of zillions",
    {"status": "not_sos", "point": [], "basis": [], "functional": [], "variables": list("abcdefgh"),
     "polynomial": [[[i] * 8, "1"] for i in (0, 100)]}, "monomials"),
    ("a point of enormous numbers", {"status": "not_sos", "point": ["9" * 4000], "polynomial": [[[1000], "1"]]},
     "not negative"),
):  # fmt: skip
    case(f"certificate: {what}", lying(change), says)
case("certificate: nested", lying({}, "[" * 100_000 + "]" * 100_000), "no certificate")
case("certificate: a list", lying({}, "[]"), "no certificate")
