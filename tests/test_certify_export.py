"""What a certificate says in text, LaTeX and Lean reads back as the same identity; what is no proof is not written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import luthier
from luthier import verifier
from luthier.certificate import Certificate
from luthier.certificate_export import GREEK
from luthier.errors import LuthierError
from luthier.kit.polynomial import polynomial


def one(text, variables):
    """A polynomial's terms over these variables."""
    p = polynomial(text)
    place = [variables.index(v) for v in p.variables]
    wide = lambda m: tuple(m[place.index(i)] if i in place else 0 for i in range(len(variables)))
    return tuple((wide(m), str(c)) for m, c in p.terms)


def made(variables, p, squares=(), multiplier=(), nonneg=(), weighted=(), zero=(), cofactors=(), **rest):
    """A certificate written by hand."""
    variables = tuple(variables.split())
    sums = lambda several: tuple((w, one(t, variables)) for w, t in several)
    return Certificate(
        **{"status": "exact", "reason": "by hand"} | rest, variables=variables, polynomial=one(p, variables),
        squares=sums(squares), multiplier=sums(multiplier), nonneg=tuple(one(g, variables) for g in nonneg),
        weighted=tuple((k, sums(s)) for k, s in weighted), zero=tuple(one(h, variables) for h in zero),
        cofactors=tuple(one(c, variables) for c in cofactors),
    )  # fmt: skip


EXACT = {
    "squares": made("x y", "x^4 - 2*x^2*y + 4/3*y^2", [("1", "x^2 - y"), ("1/3", "y")]),
    "bound": made("x", "x^4 - 3*x^2", [("1", "x^2 - 3/2")], bound="-9/4"),
    "positive bound": made("x", "x^2 + 2*x + 3", [("1", "-x - 1")], bound="2"),
    "multiplier": made("x y", "x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1",
                       [("1", "x^2*y - y"), ("1", "x*y^2 - x"), ("1", "x^2*y^2 - 1"), ("1/4", "x*y^3 - x^3*y"),
                        ("3/4", "x*y^3 + x^3*y - 2*x*y")],
                       [("1", "-1"), ("1", "x"), ("1", "y")]),
    "a form": made("x y", "x^4 + y^4", [("1", "x^3"), ("1", "y^3"), ("1", "x^2*y"), ("1", "x*y^2")],
                   [("1", "x"), ("1", "y")]),
    "vanishing multiplier": made("x", "x^2 + 1", [("1", "x^2 + x"), ("1", "x + 1")], [("1", "x + 1")]),
    "disk": made("x y", "x", [("1/2", "x + 1"), ("1/2", "y")], bound="-1", nonneg=["1 - x^2 - y^2"],
                 weighted=[((0,), [("1/2", "1")])]),
    "product": made("x y z", "x*y*z^2 + z^2", [("1", "z")], nonneg=["x", "y"], weighted=[((0, 1), [("1", "z")])]),
    "only weighted": made("x", "2*x", nonneg=["x"], weighted=[((0,), [("2", "1")])]),
    "an unused constraint": made("x", "2*x", nonneg=["1 - x", "x"], weighted=[((0,), []), ((1,), [("2", "1")])]),
    "equation": made("x y", "x*y", [("1/2", "x + y")], zero=["x^2 + y^2"], cofactors=["-1/2"]),
    "three parts": made("x y", "x + y^2 + y", [("1", "y")], nonneg=["x"], weighted=[((0,), [("1", "1")])], zero=["y"],
                        cofactors=["1"]),
    "no squares": made("x", "0"),
    "names": made("alpha x_b x12 mass3", "alpha^2 + x_b^2 + x12^2 + mass3^2",
                  [("1", "alpha"), ("1", "x_b"), ("1", "x12"), ("1", "mass3")]),
    "a constant": made("", "7/2", [("7/2", "1")]),
}  # fmt: skip
POINTS = {
    "point": made("x y", "x^2 - y^2", status="not_sos", point=("1/2", "-2")),
    "point where": made("x y", "x", status="not_sos", point=("-1/2", "0"), nonneg=["1 - x^2"], zero=["x*y"]),
    "below a bound": made("x", "x^2", status="not_sos", point=("1",), bound="3/2"),
}
FUNCTIONAL = made("x", "x^2 - x", status="not_sos", basis=((1,), (0,)),
                  functional=(((2,), "1/2"), ((1,), "2/3"), ((0,), "1")))  # fmt: skip


def test_all_of_these_are_proofs():
    for name, each in (EXACT | POINTS | {"functional": FUNCTIONAL}).items():
        assert each.refusal() is None, f"{name}: {each.refusal()}"


def same(left, right):
    return polynomial(f"({left}) - ({right})").terms == ()


@pytest.mark.parametrize("name", EXACT)
def test_text_reads_back(name):
    head, *_, left, right = str(EXACT[name]).splitlines()
    assert head == "exact: by hand" and right.startswith("= ")
    assert same(left, right.removeprefix("= "))


def test_text_says_where_and_how_much():
    assert str(EXACT["disk"]).splitlines()[1:] == [
        "x >= -1 where -x^2 - y^2 + 1 >= 0", "x + 1", "= 1/2*(x + 1)^2 + 1/2*(y)^2 + (1/2*(1)^2)*(-x^2 - y^2 + 1)",
    ]  # fmt: skip
    assert str(EXACT["equation"]).splitlines()[1:3] == ["x*y >= 0 where x^2 + y^2 = 0", "x*y"]
    assert str(EXACT["a form"]).splitlines()[1:3] == ["x^4 + y^4 >= 0", "((x)^2 + (y)^2)*(x^4 + y^4)"]
    assert len(str(EXACT["squares"]).splitlines()) == 3
    unknown = made("x", "x", status="unknown", tried=("one way", "another"), minimisers=(("1/2",),))
    assert str(unknown) == "unknown: by hand\nx\ntried: one way\ntried: another\nabout as low at x = 1/2"


def lean_line(text, head):
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith(head)]
    return line


@pytest.mark.parametrize("name", EXACT)
def test_lean_reads_back(name):
    """The identity of `key` holds; its right side is the sum of the parts; the claim is the certificate's."""
    text = EXACT[name].to_lean()
    key = lean_line(text, "have key").split(" : ", 1)[1].removesuffix(" := by ring")
    left, right = (side.replace(" : ℝ", "") for side in key.split(" = "))
    assert same(left, right)
    parts = re.findall(r"have part_(\d+) : 0 ≤ (\(.*? : ℝ\)) := ", text)
    assert " + ".join(part for _, part in parts) == key.split(" = ")[1]
    claim = re.search(r":\n    \((\S+) : ℝ\) ≤ \((.*) : ℝ\) := by", text)
    assert claim[1] == EXACT[name].bound and (name == "names" or same(claim[2], EXACT[name].problem))
    assert text.count("(") == text.count(")") and text.startswith("import Mathlib\n")
    used = set(re.findall(r"\b(?:nonneg|zero|part)_\d+\b|\bpositive\b|\bkey\b|\bwhole\b", text.split(":= by\n")[1]))
    assert all(re.search(rf"(have|\() ?{word} :", text) for word in used)


def test_lean_words_for_each_kind():
    assert "(nonneg_0 : 0 ≤ (-x^2 - y^2 + 1 : ℝ))" in EXACT["disk"].to_lean("disk")
    assert str(EXACT["an unused constraint"]).endswith("\n= (2*(1)^2)*(x)")
    assert "mul_nonneg (by positivity) (mul_nonneg (nonneg_0) nonneg_1)" in EXACT["product"].to_lean()
    assert ":= (mul_eq_zero_of_right _ zero_0).ge" in EXACT["equation"].to_lean()
    assert (
        "have positive : 0 < (1 * (1)^2 + 1 * (x)^2 + 1 * (y)^2 : ℝ) := by positivity" in EXACT["multiplier"].to_lean()
    )
    vanishing = EXACT["vanishing multiplier"].to_lean()
    assert "rcases" not in EXACT["vanishing multiplier"].to_lean()
    assert "have whole := (add_nonneg (add_nonneg (part_0) part_1) part_2).trans_eq" in EXACT["three parts"].to_lean()
    assert "\n    (positive : 0 < (1 * (x + 1)^2 : ℝ)) :" in vanishing and "dense set" in vanishing
    end = "exact sub_nonneg.mp (nonneg_of_mul_nonneg_right whole positive)\n"
    positive = "have positive : 0 < (1 * (x)^2 + 1 * (y)^2 : ℝ) := by positivity\n"
    assert (
        EXACT["a form"]
        .to_lean()
        .endswith(
            "  rcases eq_or_ne x 0 with at_0 | at_0\n"
            "  · rcases eq_or_ne y 0 with at_1 | at_1\n"
            "    · norm_num [at_0, at_1]\n"
            f"    · {positive}      {end}"
            f"  · {positive}    {end}"
        )
    )
    assert "theorem twice " in EXACT["bound"].to_lean("twice")
    assert "rcases" not in vanishing
    assert "have whole := (add_nonneg (add_nonneg (part_0) part_1) part_2).trans_eq" in EXACT["three parts"].to_lean()
    names = EXACT["names"].to_lean()
    assert "-- v1 is alpha\n-- v2 is x_b\n-- v3 is mass3\n" in names and "(v1 v2 x12 v3 : ℝ)" in names


def test_lean_points():
    assert (
        POINTS["point"]
        .to_lean()
        .endswith(
            "theorem certificate : ∃ x y : ℝ, (x^2 - y^2 : ℝ) < (0 : ℝ) := by\n  refine ⟨1/2, -2, ?_⟩ <;> norm_num\n"
        )
    )
    assert "0 ≤ (-x^2 + 1 : ℝ) ∧ (x*y : ℝ) = 0 ∧ (x : ℝ) < (0 : ℝ) := by\n  refine ⟨-1/2, 0, ?_, ?_, ?_⟩ <;>" in (
        POINTS["point where"].to_lean()
    )
    assert "(x^2 : ℝ) < (3/2 : ℝ)" in POINTS["below a bound"].to_lean()


def plain(latex):
    """The text of a polynomial written in LaTeX, by the shapes that we write."""
    latex = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"(\1/\2)*", latex)
    latex = (
        latex.replace(r"\left(", "*(").replace(r"\right)", ")").replace(r"\,", "*").replace("&", "").replace("\\\\", "")
    )
    latex = re.sub(r"\\mathit\{(\w+)\}", r"\1", latex.replace(r"\quad", ""))
    latex = re.sub(r"_\{(\d+)\}", r"\1", re.sub(r"\^\{(\d+)\}", r"^\1", latex))
    latex = re.sub(r"\\(\w+)", lambda m: m[1] if GREEK.fullmatch(m[1]) else m[0], latex)
    return re.sub(
        r"\* *\*", "*", re.sub(r"(^|[(+-]) *\*", r"\1", re.sub(r"\* *($|[)+-])", r"\1", " ".join(latex.split())))
    )


@pytest.mark.parametrize("name", [n for n in EXACT if n != "names"])
def test_latex_reads_back(name):
    text = EXACT[name].to_latex()
    p = plain(re.search(r"p = (.*)\.\n", text)[1])
    assert same(p, EXACT[name].problem)
    left, right = re.search(r"\{align\*\}\n(.*)\.\n\\end\{align\*\}", text, re.S)[1].split("=", 1)
    assert same(re.sub(r"\bp\b", f"({p})", plain(left)), plain(right))
    assert text.count("{") == text.count("}") and text.count(r"\left(") == text.count(r"\right)")


def test_latex_words():
    assert r"Hence $p \ge -1$ wherever $-x^{2} - y^{2} + 1 \ge 0$." in EXACT["disk"].to_latex()
    assert r"Hence $p \ge -\frac{9}{4}$." in EXACT["bound"].to_latex()
    assert "dense set, and $p$ is continuous" in EXACT["vanishing multiplier"].to_latex()
    assert r"\alpha^{2} + " in EXACT["names"].to_latex() and "x_{12}^{2}" in EXACT["names"].to_latex()
    assert r"\mathit{mass}_{3}^{2}" in EXACT["names"].to_latex() and r"\mathit{x\_b}^{2}" in EXACT["names"].to_latex()
    assert r"At $x = \frac{1}{2},\, y = -2$, $p = -\frac{15}{4} < 0$." in POINTS["point"].to_latex()
    assert r"$p = -\frac{1}{2} < 0$." in POINTS["point where"].to_latex()
    functional = FUNCTIONAL.to_latex()
    assert r"L(x^{2}) &= \frac{1}{2}" in functional and r"$L(p) = -\frac{1}{6} < 0$" in functional


@pytest.mark.parametrize("way", ["to_latex", "to_lean"])
def test_what_is_no_proof_is_not_written(way):
    for status in ("numeric", "unknown"):
        with pytest.raises(LuthierError, match=f"a verdict that is {status} has no proof"):
            getattr(made("x", "x^2", [("1", "x")], status=status), way)()
    with pytest.raises(LuthierError, match="does not hold: the squares do not add up"):
        getattr(made("x", "x^2", [("2", "x")]), way)()


def test_lean_says_what_it_cannot_write():
    with pytest.raises(LuthierError, match="take LaTeX or JSON"):
        FUNCTIONAL.to_lean()
    with pytest.raises(LuthierError, match="no name for a theorem"):
        EXACT["bound"].to_lean("x; axiom cheat : False --")


def test_a_name_that_would_break_out_is_not_written_out():
    """SymPy's names may hold anything."""
    odd = Certificate("exact", "r", ("x)\n:= sorry --", "\\input{a}"), (((2, 0), "1"), ((0, 2), "1")),
                      (("1", (((1, 0), "1"),)), ("1", (((0, 1), "1"),))))  # fmt: skip
    assert "-- v1 is x)?:= sorry --\n-- v2 is \\input{a}\n" in odd.to_lean()
    assert "(v1^2 + v2^2 : ℝ)" in odd.to_lean()
    assert r"\input" not in odd.to_latex() and "\n:=" not in odd.to_latex()


def test_names_that_would_look_the_same_are_kept_apart():
    text = made("x1 x_1", "x1^2 + 2*x_1^2", [("1", "x1"), ("2", "x_1")]).to_latex()
    assert text.startswith("% v_{1} is x1\n% v_{2} is x_1\nLet") and "v_{1}^{2} + 2\\,v_{2}^{2}" in text
    greek = Certificate("exact", "r", ("\\beta_2",), (((2,), "1"),), (("1", (((1,), "1"),)),))
    assert r"p = \beta_{2}^{2}." in greek.to_latex()


@pytest.mark.parametrize("command", [["-m", "luthier.verifier"], ["verifier.py"]])
def test_the_verifier_stands_alone(tmp_path, command):
    """As a module, and as one file without the package; 0 where all is proven, else 1."""
    shutil.copy(Path(verifier.__file__), tmp_path / "verifier.py")
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(EXACT["multiplier"].to_json())
    bad.write_text(json.dumps(json.loads(EXACT["disk"].to_json()) | {"bound": "-1/2"}))

    def run(*files):
        isolated = ["-I"] if command == ["verifier.py"] else []
        words = [sys.executable, *isolated, *command, *map(str, files)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert not done.stderr
        return done.returncode, done.stdout

    assert run(good) == (0, f"{good}: proven: exact\n")
    code, out = run(good, bad)
    assert code == 1 and f"{bad}: refused: the squares do not add up" in out
    for text in ("{", "[]", "[" * 100_000, '{"status": "exact"}', "\0", '{"a": ' + "9" * 5000 + "}"):
        bad.write_text(text)
        assert run(bad)[0] == 1
    assert run(tmp_path / "none.json")[0] == 1 and run()[0] == 1


def test_what_is_not_proven_does_not_fill_the_screen():
    """A claim of 1,820 terms is cut where nothing is proven about it, and whole where it is."""
    text = "(x + 2*y + 3*z + w + 1)^10 + x"
    open_, proven = luthier.certify(text), luthier.certify("(x + y + z + w + 1)^12")
    assert open_.status in ("unknown", "not_sos")
    assert len(str(open_).split("\n")[1]) <= 2010 and str(open_).split("\n")[1].endswith("...")
    assert len(str(proven)) > 20_000
