"""The reader of polynomials: against a slow twin on what is right, one placed line on what is wrong."""

import random
import re
import time
from fractions import Fraction

from luthier.errors import LuthierError
from luthier.kit.polynomial import MAX_TERMS, Polynomial, polynomial
from luthier.kit.polynomial_text import MAX_TEXT

NAMES = ("x", "y", "z1", "z10", "alpha_")
NASTY = ["**", "^", "(", ")", "()", "e", "1e9", "1e-9", "/0", "//", "..", "^-1", "^^", "^999999999", "*", "+-", " ",
    "\n", "\0",
         "²", "−", "x(", "x[1]", "x(1)", "_", "9" * 50, "1/3", "0.1", ".5", "5.", "=", "<", "é", "٣", "__import__",
         "lambda",
         "(x+y+z)^9", "^2^2", "1e", "x" * 70, ";", "'", "\ud800", "(" * 50]  # fmt: skip


def expression(rng, point, depth=0):
    """A random polynomial's text and its exact value at a point."""
    way = rng.randrange(8) if depth < 4 else rng.randrange(2)
    if way == 0:
        whole, below = rng.randint(0, 99), rng.randint(1, 9)
        form = rng.choice(["{0}", "{0}/{1}", "{0}.{1}", ".{1}", "{0}e1", "{0}E-2"])
        value = {"{0}": Fraction(whole), "{0}/{1}": Fraction(whole, below), "{0}.{1}": Fraction(f"{whole}.{below}"),
                 ".{1}": Fraction(f"0.{below}"), "{0}e1": Fraction(whole * 10),
                 "{0}E-2": Fraction(whole, 100)}[form]  # fmt: skip
        text = form.format(whole, below)
        return (f"({text})" if "/" in text else text), value
    if way == 1:
        name = rng.choice(NAMES)
        return name, point[name]
    left, a = expression(rng, point, depth + 1)
    right, b = expression(rng, point, depth + 1)
    space = rng.choice(["", " ", "\t "])
    if way in (2, 3):
        return f"{left}{space}+{space}({right})", a + b
    if way == 4:
        return f"{left} -{space}({right})", a - b
    if way == 5:
        return f"({left})*({right})", a * b
    if way == 6:
        power = rng.randint(0, 3)
        return f"({left}){rng.choice(['^', '**'])}{rng.choice([str(power), f'({power})'])}", a**power
    return f"-({left})/7", -a / 7


def at(p, point):
    return p.at([point[name] for name in p.variables])


def refused_or(text):
    """The polynomial, or None where it is refused at a column that there is."""
    started = time.process_time()
    try:
        p = polynomial(text)
    except LuthierError as fault:
        line = str(fault)
        assert line and len(line) < 1300
        column = re.fullmatch(r"column (\d+)", fault.where or "column 1")
        assert column and 1 <= int(column[1]) <= len(text) + 1, line
        return None
    finally:
        assert time.process_time() - started < 10
    assert isinstance(p, Polynomial) and len(p.terms) <= MAX_TERMS and all(c for _, c in p.terms)
    assert len(str(p)) > MAX_TEXT or polynomial(str(p)) == p
    assert polynomial({e: c for e, c in p.terms}).terms == p.terms
    return p


def test_random_polynomials_have_the_value_of_the_numbers(times, tell):
    rng, count = random.Random(1), times(300, 8000)
    for _ in range(count):
        point = {name: Fraction(rng.randint(-5, 5), rng.randint(1, 3)) for name in NAMES}
        text, value = expression(rng, point)
        p = refused_or(text)
        assert p is not None and at(p, point) == value, text
    tell(f"polynomials against exact numbers: {count}")


def test_mutated_polynomials(times, tell):
    rng, count, right = random.Random(2), times(1500, 40_000), 0
    for _ in range(count):
        text, _ = expression(rng, dict.fromkeys(NAMES, Fraction(1)))
        for _ in range(rng.randint(1, 4)):
            cut = rng.randrange(len(text) + 1)
            piece = rng.choice([*NASTY, text[cut : cut + rng.randint(1, 20)]])
            text = text[:cut] + piece + text[cut + rng.randint(0, 2) :]
        right += refused_or(text) is not None
    assert right > count // 20
    tell(f"polynomials by mutated text: {count}, {right} of them right")


def test_raw_letters_as_polynomials(times, tell):
    rng, count, right = random.Random(3), times(4000, 150_000), 0
    letters = "xyz12 +-*/^().eE[]_²=\n٣é"
    for _ in range(count):
        right += refused_or("".join(rng.choice(letters) for _ in range(rng.randint(0, 24)))) is not None
    assert right
    tell(f"raw letters as polynomials: {count}, {right} of them right")


def test_polynomials_that_grow(times, tell):
    """Products, powers and sums put together until they are refused: each within a second or two."""
    rng, count, refused = random.Random(4), times(3, 20), 0
    for _ in range(count):
        text = "x + y/3"
        while (p := refused_or(text)) is not None and len(text) < 20_000:
            names = "+".join(rng.sample("abcdefghijklmnop", rng.randint(1, 6)))
            text = rng.choice([f"({text})^{rng.randint(2, 9)}", f"({text})*({names})^{rng.randint(1, 5)}",
                               f"{text} + ({names})^{rng.randint(1, 9)}*{rng.randint(1, 10**9)}"])  # fmt: skip
        refused += p is None
    assert refused >= count // 2
    tell(f"polynomials grown until refused: {count}")
