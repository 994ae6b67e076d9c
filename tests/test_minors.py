"""Faces by known minors: by hand, and against what was planted."""

import dataclasses
import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from luthier.kit import attempts, balance, cones, exact, faces, gram, minors, proof
from luthier.kit.context import Context
from luthier.kit.planted import STRUCTURES, Planting, generator, plant
from luthier.kit.polynomial import polynomial
from luthier.sos.certify import SumOfSquares

F = Fraction


def program(p, basis=None):
    return cones.split(cones.Program((cones.cone(basis or gram.consistent(p, gram.box(p))),)), p.support)


def left(text):
    """The bases over the face that known minors leave, as sets of polynomials."""
    p = polynomial(text)
    found = minors.face(program(p), dict(p.terms))
    return found and [[dict(b) for b in c.basis] for c in found.cones]


def test_by_hand():
    """x^4 - 2 x^2 y + y^2: the minor of x^2 and y is [[1, -1], [-1, 1]], which maps (1, 1) to 0."""
    assert left("x^4 - 2*x^2*y + y^2 + 1/3") == [[{(2, 0): F(1), (0, 1): F(-1)}, {(0, 0): F(1)}]]
    assert left("x^4 - x^2*y + y^2 + 1/3") is None
    # (3 x^2 - 2 y)^2 / 7: the multiple that is written is the one whose largest number is 1
    assert left("9/7*x^4 - 12/7*x^2*y + 4/7*y^2") == [[{(2, 0): F(1), (0, 1): F(-2, 3)}]]
    # a diagonal entry of 0 is a minor, too: the square of x^2 is no part of x^2 + 1
    p = polynomial("x^2 + 1")
    whole = cones.Program((cones.cone([(0,), (1,), (2,)]),))
    assert [c.monomials for c in minors.face(whole, dict(p.terms)).cones] == [[(1,), (0,)]]


def test_what_is_known():
    """Of x^2, x, 1 the product x^2 comes twice, all others once."""
    p = polynomial("x^4 + 2*x^3 + 5*x^2 + 6*x + 7")
    (entries,) = minors.known(program(p), dict(p.terms))
    assert entries == {(0, 0): 1, (0, 1): 1, (1, 2): 3, (2, 2): 7}


def test_a_face_makes_more_entries_known():
    """Over x + x^2 and 1, whose squares and product share x and x^2: x^4 gives the first entry, x^3 the same, and only
    then x the mixed one, and 1 the last."""
    over = faces.over(cones.cone([(0,), (1,), (2,)]), [[F(1), F(0), F(0)], [F(0), F(1), F(1)]])
    target = {(0,): F(5), (1,): F(6), (2,): F(8), (3,): F(4), (4,): F(2)}
    (entries,) = minors.known(cones.Program((over,)), target)
    assert entries == {(0, 0): 5, (0, 1): 3, (1, 1): 2}


def test_equations_are_unknowns():
    """A cofactor may give any multiple of x^2 - 1, so that of its monomials nothing is known."""
    free = cones.Free({(2,): F(1), (0,): F(-1)}, ((0,),))
    (entries,) = minors.known(cones.Program((cones.cone([(0,), (1,)]),), (free,)), {(0,): F(1), (1,): F(4)})
    assert entries == {(0, 1): 2}


@pytest.mark.parametrize("matrix", STRUCTURES)
@pytest.mark.parametrize("coercive", [False, True])
def test_planted_squares_lie_on_the_face(matrix, coercive):
    """The columns of the planted factor are combinations of what is left, in fractions."""
    smaller = 0
    for seed in range(12):
        what = Planting(n=4, half=3, size=12, matrix=matrix, coercive=coercive)
        planted = plant(what, generator(seed))
        p, hidden = planted.polynomial, planted.hidden
        found = minors.face(program(p, hidden), dict(p.terms))
        if found is None:
            continue
        smaller += 1
        basis = [[b.get(m, F(0)) for m in hidden] for c in found.cones for b in c.basis]
        assert len(basis) < len(hidden)
        rank = len(exact.reduced(basis)[1])
        columns = [[F(int(x)) for x in column] for column in planted.factor.T if column.any()]
        assert len(exact.reduced([*basis, *columns])[1]) == rank == len(basis)
    assert smaller > 3 if matrix in ("sparse", "lowrank") else smaller == 0


@pytest.mark.parametrize(("n", "size", "seed"), [(4, 14, 3), (6, 20, 0)])
def test_boundaries_that_floats_do_not_describe(monkeypatch, n, size, seed):
    """Sparse squares of thousandths: proven over their face, numeric without it."""
    monkeypatch.setattr(attempts, "_whole", lambda *given: False)
    planted = plant(Planting(n=n, half=3, size=size, matrix="sparse"), generator(seed))
    p, hidden = planted.polynomial, planted.hidden
    made = proof.over(p, hidden, attempts.Settings(), Context(), complete=False)
    assert made.status == "exact" and made.verify() and made.numbers["faces"] == 1
    assert made.tried[0].startswith("minors that are known leave")
    assert proof.over(p, hidden, attempts.Settings(minors=False), Context(), complete=False).status == "numeric"


def test_entries_are_multiples_of_what_the_coefficients_are():
    """Low-rank squares of thousandths over so few monomials that no known minor is singular: a closer solution, rounded
    to millionths, is the Gram matrix that was planted; on coarser or finer grids it is none."""
    planted = plant(Planting(n=3, half=3, size=14, matrix="lowrank", coercive=True), generator(18))
    p, hidden = planted.polynomial, planted.hidden
    assert minors.face(program(p, hidden), dict(p.terms)) is None
    made = proof.over(p, hidden, attempts.Settings(), Context(), complete=False)
    assert made.status == "exact" and made.verify()
    assert any(line.startswith("Clarabel, to 1e-12") for line in made.tried)
    assert len(made.squares) == np.linalg.matrix_rank(planted.factor.astype(float)) < len(hidden)
    none = proof.over(p, hidden, attempts.Settings(faces=False), Context(), complete=False)
    assert none.status == "numeric" and not any("to 1e-12" in line for line in none.tried)


def test_a_face_in_units_of_the_variables():
    """Its polynomials change with the units, not its monomials alone: y = 1000 z."""
    p = polynomial("(3*x^2 - 7000*y)^2 + (x^2*y - 1000000*y^3)^2 + 1000000*y^2*x^2")
    assert any(balance.units(dict(p.terms)))
    known = minors.face(program(p), dict(p.terms))
    k = balance.units(dict(p.terms))
    over = balance.scaled_program(known, k)
    for before, after in zip(known.cones, over.cones, strict=True):
        for b, c in zip(before.basis, after.basis, strict=True):
            back = balance.scaled(c, k, -1)
            assert len({value / b[m] for m, value in back.items()}) == 1 and max(map(abs, c.values())) == 1
    made = SumOfSquares().certify(p, Context())
    assert made.status == "exact" and made.verify() and made.numbers["faces"] == 1


def test_a_face_is_found_where_the_whole_is_too_large():
    planted = plant(Planting(n=4, half=3, size=16, matrix="lowrank", rank=(1, 1)), generator(1))
    few = dataclasses.replace(attempts.Settings(), largest=3)
    made = proof.over(planted.polynomial, planted.hidden, few, Context(), complete=False)
    assert (made.status, len(made.squares), len(planted.hidden) > 3) == ("exact", 1, True)
    none = dataclasses.replace(few, minors=False)
    assert "largest=3 are allowed" in proof.over(planted.polynomial, planted.hidden, none, Context(), True).reason


def test_a_minor_that_no_squares_have():
    """[[1, 2], [2, 1]] is known and indefinite: still refuted by a functional or a point, not by the face."""
    made = SumOfSquares(multipliers=0).certify("x^4 + 4*x^2*y + y^2 + 1", Context())
    assert made.status == "not_sos" and made.verify()
    # a singular minor and no squares: x^4 - 2 x^2 y + y^2 - 1 is negative where x^2 = y
    assert SumOfSquares().certify("x^4 - 2*x^2*y + y^2 - 1", Context()).status == "not_sos"


def test_no_faces_are_asked_for():
    asked = polynomial("x^4 - 2*x^2*y + y^2 + 1/3")
    assert attempts.smallest(dict(asked.terms), program(asked), attempts.Settings(faces=False)) is None
    made = SumOfSquares(faces=False, rules=False).certify(asked, Context())
    assert not any("minors" in line for line in made.tried)


def test_too_wide_a_basis_is_left_alone(monkeypatch):
    p = polynomial("x^4 - 2*x^2*y + y^2 + 1/3")
    monkeypatch.setattr(minors, "WIDEST", 1)
    assert minors.face(program(p), dict(p.terms)) is None


def test_cliques_are_all_that_are_maximal():
    for seed in range(30):
        draw = random.Random(seed)
        size = draw.randint(1, 8)
        near = [0] * size
        for i, j in itertools.combinations(range(size), 2):
            if draw.random() < 0.6:
                near[i] |= 1 << j
                near[j] |= 1 << i
        vertices = [i for i in range(size) if draw.random() < 0.9]
        near = [bits & sum(1 << i for i in vertices) for bits in near]
        whole = [
            set(group)
            for count in range(1, size + 1)
            for group in itertools.combinations(vertices, count)
            if all(near[i] >> j & 1 for i, j in itertools.combinations(group, 2))
        ]
        wanted = [group for group in whole if not any(group < other for other in whole)]
        assert sorted(minors._cliques(near, vertices)) == sorted(map(sorted, wanted))


def test_minors_looked_at_are_bounded(monkeypatch):
    """Of few minors fewer are singular; of none nothing is left out."""
    planted = plant(Planting(n=4, half=3, size=14, matrix="lowrank", coercive=True), generator(0))
    p, whole = planted.polynomial, program(planted.polynomial, planted.hidden)
    sizes = []
    for many in (400, 2):
        monkeypatch.setattr(minors, "CLIQUES", many)
        sizes.append((minors.face(whole, dict(p.terms)) or whole).largest)
    assert sizes[0] < sizes[1]
    monkeypatch.setattr(minors, "CLIQUES", 0)
    assert minors.face(whole, dict(p.terms)) is None


@pytest.mark.parametrize("even", [False, True])
def test_kernels(even):
    """What is left is orthogonal to the rows and complements them; of even ones no number is large."""
    draw = random.Random(0)
    for _ in range(40):
        width = draw.randint(1, 7)
        rows = [[F(draw.randint(-3, 3), draw.randint(1, 4)) for _ in range(width)] for _ in range(draw.randint(0, 5))]
        found = faces.kernel(rows, width, even=even)
        assert all(sum(map(F.__mul__, row, v)) == 0 for row in rows for v in found)
        rank = len(exact.reduced(rows)[1]) if rows else 0
        assert len(found) == width - rank == (len(exact.reduced(found)[1]) if found else 0)
        assert all(next(x for x in v if x) > 0 for v in found)
    tiny = [[F(1, 1000), F(1), F(2)]]
    largest = max(abs(x) for v in faces.kernel(tiny, 3, even=even) for x in v)
    assert largest <= 1 if even else largest >= 1000


def test_floats_only_say_no_where_there_is_no_doubt():
    """Singular ones, of numbers from 1e-9 to 1e9, are never refused; one with a clearly negative eigenvalue is."""

    def refused(matrix):
        common = math.lcm(*(x.denominator for row in matrix for x in row))
        return exact._negative([[int(x * common) for x in row] for row in matrix], common)

    draw = np.random.default_rng(0)
    for _ in range(40):
        size = int(draw.integers(exact.FLOATS, 14))
        factor = draw.integers(-9, 10, (size, int(draw.integers(1, size + 1))))
        units = [F(10) ** int(e) for e in draw.integers(-9, 10, size)]
        matrix = [[F(int(x)) * units[i] * units[j] for j, x in enumerate(row)] for i, row in enumerate(factor @ factor.T)]  # fmt: skip  # noqa: E501
        assert not refused(matrix)
        assert exact.ldl(matrix) is not None
        matrix[0][0] -= matrix[0][0] + units[0] ** 2
        assert refused(matrix) and exact.ldl(matrix) is None
    hidden = [[F(int(i == j)) for j in range(9)] for i in range(9)]
    hidden[0][1] = hidden[1][0] = F(3, 2)
    assert refused(hidden)
    hidden[0][1] = hidden[1][0] = 1 + F(1, 10**30)  # floats see a singular matrix
    assert not refused(hidden) and exact.ldl(hidden) is None
    assert not refused([[F(10) ** 400 * int(i == j) for j in range(9)] for i in range(9)])
