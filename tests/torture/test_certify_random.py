"""Random polynomials through `luthier.certify`: what is called proven is, and what is well inside is found."""

import random
from fractions import Fraction
from itertools import product

import luthier


def monomials(variables, degree):
    return [e for e in product(range(degree + 1), repeat=variables) if sum(e) <= degree]


def times_out(square, terms):
    """Add the square of a sum to the terms."""
    for a, x in square.items():
        for b, y in square.items():
            key = tuple(i + j for i, j in zip(a, b, strict=True))
            terms[key] = terms.get(key, Fraction(0)) + x * y


def value(terms, point):
    total = Fraction(0)
    for exponents, c in terms.items():
        for x, e in zip(point, exponents, strict=True):
            c *= x**e
        total += c
    return total


def points(rng, variables):
    return [[Fraction(rng.randint(-12, 12), rng.randint(1, 6)) for _ in range(variables)] for _ in range(12)]


def test_random_polynomials(times, tell):
    """Of any sign: an exact one is nowhere negative, one that is not a sum of squares is not called one."""
    rng, count, statuses = random.Random(1), times(80, 10_000), {}
    for _ in range(count):
        n = rng.randint(1, 3)
        every = monomials(n, rng.choice((2, 4, 4, 6) if n < 3 else (2, 4)))
        scale = 10 ** rng.choice((0, 0, 0, 3, 6))
        terms = {e: Fraction(rng.randint(-9, 9), rng.randint(1, 4)) for e in rng.sample(every, min(len(every), 7))}
        for e in every:
            if e.count(0) == n - 1 and sum(e) == max(map(sum, every)):
                terms[e] = Fraction(rng.randint(1, 9) * scale)
        made = luthier.certify(terms)
        statuses[made.status] = statuses.get(made.status, 0) + 1
        assert made.verify() == (made.status in ("exact", "not_sos")), (terms, made.refusal())
        if made.status == "exact":
            assert all(value(terms, point) >= 0 for point in points(rng, n)), terms
    assert statuses["exact"] > count // 20 and statuses["not_sos"] > count // 20
    tell(f"random polynomials: {statuses}")


def test_planted_sums_of_squares_are_found(times, tell):
    """Squares over a full basis, and the square of each of its monomials: strictly feasible, so it must be exact."""
    rng, count = random.Random(2), times(40, 2000)
    for _ in range(count):
        n, degree = rng.choice([(1, 2), (1, 4), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1)])
        basis, terms = monomials(n, degree), {}
        for e in basis:
            times_out({e: Fraction(1)}, terms)
        for _ in range(rng.randint(1, 4)):
            times_out({e: Fraction(rng.randint(-5, 5), rng.randint(1, 3)) for e in basis if rng.random() < 0.5}, terms)
        made = luthier.certify(terms)
        assert made.status == "exact" and made.verify(), (terms, made.status, made.reason)
    tell(f"planted sums of squares, all found: {count}")
